"""
What an exported folder computes, written plainly; convert.py compares the model with it before an export.

config.json and the released tensors hold no formulas: transformers' classes have them. This file states these formulas
with the released names and without model.py's code, so it notices a change in model.py. All is in fp32.
"""

import copy
import math

import torch
from torch.nn import functional as F

import model as model_file
from extras.hf import shared_copies
from model import Mistake, MoE

TOLERANCE = 1e-3  # relative error of a token's state or logits; only rounding differs


class Released:
    """The model of a config.json (s) and its released tensors. Letters as in model.py."""

    def __init__(self, settings, tensors):
        self.s, self.tensors, self.read = settings, tensors, set()

    def get(self, name):
        self.read.add(name)
        if name not in self.tensors:
            raise Mistake(f"{self.s['architectures'][0]} has {name}, and this model does not: it cannot be exported")
        return self.tensors[name].float()

    def linear(self, x, name):
        bias = self.get(f'{name}.bias') if f'{name}.bias' in self.tensors else None
        return F.linear(x, self.get(f'{name}.weight'), bias)

    def norm(self, x, name, eps=None):
        mean_square = x.square().mean(dim=-1, keepdim=True)
        return x / (mean_square + (self.s['rms_norm_eps'] if eps is None else eps)).sqrt() * self.get(f'{name}.weight')

    def angles(self, T, theta, yarn):
        """-> the rotation of each position and pair (T, r/2), complex, and the factor of the scores"""
        r = self.s['qk_rope_head_dim']
        freq, size, factor = theta ** (-torch.arange(0, r, 2, dtype=torch.float64) / r), 1.0, 1.0
        if yarn:
            def pair(turns):
                return r * math.log(yarn['original_max_position_embeddings'] / (turns * 2 * math.pi)) / \
                    (2 * math.log(theta))

            def mscale(m):
                return 0.1 * m * math.log(yarn['factor']) + 1.0
            low, high = max(math.floor(pair(yarn['beta_fast'])), 0), min(math.ceil(pair(yarn['beta_slow'])), r - 1)
            slowed = ((torch.arange(r // 2) - low) / (high - low or 0.001)).clamp(0, 1)
            freq = freq * (1 - slowed) + freq / yarn['factor'] * slowed
            both = yarn['mscale'] > 0 and yarn['mscale_all_dim'] > 0
            size = mscale(yarn['mscale']) / mscale(yarn['mscale_all_dim']) if both else mscale(1.0)
            factor = mscale(yarn['mscale_all_dim']) ** 2
        angle = torch.outer(torch.arange(T, dtype=torch.float64), freq)
        return torch.polar(torch.full_like(angle, size), angle).to(torch.complex64), factor

    def attention(self, x, layer):
        s, T, name = self.s, x.size(1), f'{layer}.self_attn'
        H, n, r, v = (s[key] for key in ('num_attention_heads', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim'))
        turn, factor = self.angles(T, s['rope_theta'], s.get('rope_scaling'))

        def rotate(x):  # (B, T, heads, r)
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(pairs * turn.unsqueeze(1)).flatten(-2)
        if s['q_lora_rank']:
            latent_q = self.norm(self.linear(x, f'{name}.q_a_proj'), f'{name}.q_a_layernorm', 1e-6)
            q = self.linear(latent_q, f'{name}.q_b_proj')
        else:
            q = self.linear(x, f'{name}.q_proj')
        q_nope, q_rope = q.unflatten(-1, (H, n + r)).split((n, r), dim=-1)                       # (B, T, H, n or r)
        latent, k_rope = self.linear(x, f'{name}.kv_a_proj_with_mqa').split((s['kv_lora_rank'], r), dim=-1)
        kv = self.linear(self.norm(latent, f'{name}.kv_a_layernorm', 1e-6), f'{name}.kv_b_proj')
        k_nope, values = kv.unflatten(-1, (H, n + v)).split((n, v), dim=-1)                      # (B, T, H, n or v)
        scores = torch.einsum('bthn,bshn->bhts', q_nope, k_nope)
        scores = scores + torch.einsum('bthr,bsr->bhts', rotate(q_rope), rotate(k_rope.unsqueeze(2)).squeeze(2))
        scores = scores * factor / math.sqrt(n + r)
        seen = torch.ones(T, T, dtype=torch.bool).tril()
        if 'index_topk' in s:
            seen = self.chosen(x, latent_q, turn, f'{name}.indexer', seen).unsqueeze(1)
        y = torch.einsum('bhts,bshv->bthv', scores.masked_fill(~seen, -math.inf).softmax(dim=-1), values)
        return self.linear(y.flatten(2), f'{name}.o_proj')

    def chosen(self, x, latent_q, turn, name, seen):
        """V3.2's indexer: the positions that each query attends to, of those that it has seen (T, T). -> (B, T, T)"""
        d, r = self.s['index_head_dim'], self.s['qk_rope_head_dim']

        def rotate(x):  # (B, T, heads, d): pairs of the first r channels, r/2 apart
            pairs = torch.complex(x[..., :r // 2], x[..., r // 2:r]) * turn.unsqueeze(1)
            return torch.cat((pairs.real, pairs.imag, x[..., r:]), dim=-1)
        q = rotate(self.linear(latent_q, f'{name}.wq_b').unflatten(-1, (-1, d)))                 # (B, T, J, d)
        k = F.layer_norm(self.linear(x, f'{name}.wk'), (d,), *(
            self.get(f'{name}.k_norm.{part}') for part in ('weight', 'bias')), 1e-6)
        return self.best(q, rotate(k.unsqueeze(2)).squeeze(2), self.linear(x, f'{name}.weights_proj'), seen)

    def best(self, q, k, weights, seen):
        """q (B, T, J, d), k (B, S, d), weights (B, T, J) -> where seen (T, S), the best ones of each query (B, T, S)"""
        J, d = q.shape[2:]
        dots = torch.einsum('btjd,bsd->btjs', q, k).relu() / math.sqrt(d)
        scores = torch.einsum('btj,btjs->bts', weights / math.sqrt(J), dots)
        scores = scores + 1e-30 * torch.arange(k.size(1))  # of equal scores, mostly zeros, the later
        best = scores.masked_fill(~seen, -math.inf).topk(min(self.s['index_topk'], k.size(1)), dim=-1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True) & seen

    def activation(self, gate, up):
        return F.silu(gate) * up

    def ffn(self, x, name):
        return self.linear(self.activation(self.linear(x, f'{name}.gate_proj'), self.linear(x, f'{name}.up_proj')),
                           f'{name}.down_proj')

    def route(self, x, layer):
        """x (N, C) -> gates (N, E), 0 for the experts that are not chosen"""
        s, v3 = self.s, self.s['scoring_func'] == 'sigmoid'
        logits = self.linear(x, f'{layer}.mlp.gate')
        scores = logits.sigmoid() if v3 else logits.softmax(dim=-1)
        choice = scores + self.get(f'{layer}.mlp.gate.e_score_correction_bias') if v3 else scores
        if s['n_group'] > 1:
            groups = choice.unflatten(-1, (s['n_group'], -1))
            strength = groups.topk(2, dim=-1).values.sum(dim=-1) if v3 else groups.amax(dim=-1)
            best = torch.zeros_like(strength).scatter(1, strength.topk(s['topk_group'], dim=-1).indices, 1.0)
            choice = groups.masked_fill(best.unsqueeze(-1) == 0, -math.inf).flatten(1)
        chosen = torch.zeros_like(scores).scatter(1, choice.topk(s['num_experts_per_tok'], dim=-1).indices, 1.0)
        gates = scores * chosen
        if s['norm_topk_prob']:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        return gates * s['routed_scaling_factor']

    def feed_forward(self, x, layer):
        if f'{layer}.mlp.down_proj.weight' in self.tensors:
            return self.ffn(x, f'{layer}.mlp')
        out = self.ffn(x, f'{layer}.mlp.shared_experts')
        flat, total = x.flatten(0, 1), out.flatten(0, 1)                                         # (N, C)
        gates = self.route(flat, layer)
        for e in range(self.s['n_routed_experts']):
            rows = gates[:, e].nonzero().squeeze(1)
            total.index_add_(0, rows, gates[rows, e:e + 1] * self.ffn(flat[rows], f'{layer}.mlp.experts.{e}'))
        return total.view_as(x)

    def first(self, emb):
        return emb

    def enter(self, x, layer, sublayer):
        """-> the input of the sublayer's norm, and a function of the sublayer's output: the state after it"""
        return x, lambda y: x + y

    def block(self, x, layer):
        h, after = self.enter(x, layer, 'attn')
        x = after(self.attention(self.norm(h, f'{layer}.input_layernorm'), layer))
        h, after = self.enter(x, layer, 'ffn')
        return after(self.feed_forward(self.norm(h, f'{layer}.post_attention_layernorm'), layer))

    def last(self, x):
        return self.norm(x, 'model.norm')

    def combine(self, emb, h, layer):
        both = torch.cat((self.norm(emb, f'{layer}.enorm'), self.norm(h, f'{layer}.hnorm')), dim=-1)
        return self.linear(both, f'{layer}.eh_proj')


def differ(ours, theirs):
    """(..., C) each -> the relative error that 95% of the tokens do not exceed, 0 if it is only rounding. Rounding may
    choose other experts for the rest.
    """
    ours, theirs = ours.flatten(0, -2).float(), theirs.flatten(0, -2)
    error = ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-20)).nan_to_num(math.inf)
    error = error.sort().values[math.ceil(0.95 * len(error)) - 1].item()
    return error if error > TOLERANCE else 0.0


def part_that_differs(block, released, layer, x, rope, idx):
    """-> the first part of a Block that computes something else than the released one, from the same input x"""
    h, after = released.enter(x, layer, 'attn')
    if getattr(block, 'attn_hc', None) and differ(block.attn_hc(x)[0], h):
        return 'hyper-connection (attn_hc)'
    y = released.norm(h, f'{layer}.input_layernorm')
    if differ(block.input_layernorm(h), y):
        return 'norm (input_layernorm)'
    attention = block.attn(y, *rope)
    if differ(attention[0] if isinstance(attention, tuple) else attention, released.attention(y, layer)):
        return 'attention'
    x = after(released.attention(y, layer))
    h, _ = released.enter(x, layer, 'ffn')
    y = released.norm(h, f'{layer}.post_attention_layernorm')
    if differ(block.post_attention_layernorm(h), y):
        return 'norm (post_attention_layernorm)'
    limit = released.s.get('swiglu_limit', 0.0)
    gate_up = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * (2 * limit or 1)
    if differ(model_file.swiglu(gate_up, limit), released.activation(*gate_up.chunk(2, dim=-1))):
        return 'activation (the format has silu(gate) * up)'
    moe, table = block.mlp if isinstance(block.mlp, MoE) else None, getattr(block.mlp, 'tid2eid', None)
    if moe:
        _, gates, experts = moe.route(y.flatten(0, 1), None if table is None else table[idx.flatten()])
        gates = torch.zeros(len(gates), moe.config.n_routed_experts).scatter(1, experts, gates)
        if differ(gates, released.route(y.flatten(0, 1), layer)):
            return 'router'
    out = block.mlp(y) if table is None else block.mlp(y, idx.unsqueeze(-1))
    return 'feed-forward layer' if differ(out[0] if moe else out, released.feed_forward(y, layer)) else \
        'residual stream'


@torch.no_grad()
def check_export(model, settings, tensors):
    """A Mistake if a GPT computes something else than the folder that its export would write.

    The blocks are compared in fp32, one at a time. Buffers that are no part of a checkpoint may be on the device meta.
    """
    config, architecture, T = model.config, settings['architectures'][0], min(model.config.block_size, 512)
    idx = torch.randint(config.vocab_size, (1, T), generator=torch.Generator().manual_seed(0))
    for name, table in model.tables().items():
        setattr(model, name, table)
    rope = model.rope_cos[:T], model.rope_sin[:T]
    released, more = Released(settings, tensors), {}
    if settings['model_type'] == 'deepseek_v4':
        from extras.compare_v4 import ReleasedV4
        released, more = ReleasedV4(settings, tensors, idx.flatten()), {'tokens': idx.unsqueeze(-1), 'tables': rope}
    model.eval()

    def refuse(what, error=''):
        raise Mistake(f'not exported: {what}; {architecture} would compute something else' +
                      (f' (error {error:.2g})' if error else ''))

    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            refuse(f'the buffer {name} has no place in the format')

    def own(module):
        return copy.deepcopy(module).float()

    def compare(block, layer, x, y):
        """One block, from our state x and the folder's y. -> both after it"""
        block, before = own(block), x
        x, y = block(x, *rope, **more)[0], released.block(y, layer)
        error = differ(x, y)
        if error:
            unknown = [name for name in tensors if name.startswith(f'{layer}.self_attn.') and name not in released.read]
            refuse(f'{unknown[0]} has no place in the format' if unknown else
                   f'the {part_that_differs(block, released, layer, before, rope, idx)} of {layer} differs', error)
        return x, y

    emb = released.get('model.embed_tokens.weight')[idx]
    x = y = released.first(emb)
    for i, block in enumerate(model.transformer.h):
        x, y = compare(block, f'model.layers.{i}', x, y)
    h, y = own(model.transformer.ln_f)(x), released.last(y)
    if differ(h, y):
        refuse('the last norm differs')
    head = released.get('model.embed_tokens.weight' if settings['tie_word_embeddings'] else 'lm_head.weight')
    if model.lm_head.weight.dtype == torch.float32:  # the whole forward too: embedding, order of the blocks, logits
        logits, _ = model(idx, idx)
        if differ(logits, y @ head.t()):
            refuse('the embedding, the order of the blocks or the head differs', differ(logits, y @ head.t()))
    for k, module in enumerate(list(model.mtp)[:settings['num_nextn_predict_layers']], start=1):
        layer, token = f'model.layers.{config.n_layer + k - 1}', F.pad(emb[:, k:], (0, 0, 0, min(k, T)))
        x, y = own(module).combine(token, h), released.combine(token, y, layer)
        if differ(x, y):
            refuse(f'the input of MTP module {k} differs')
        x, y = compare(module.h[0], layer, x, y)
        h, y = own(module.norm)(x), released.norm(y, f'{layer}.shared_head.norm')
    copies = shared_copies(config)
    for name in tensors:
        if name not in released.read and name not in copies and tensors[name].numel() > 0:
            refuse(f'{name} has no place in the format')
