"""What an exported DeepseekV4ForCausalLM computes, written plainly: see extras/compare.py. All is in fp32."""

import math

import torch
from torch.nn import functional as F

from extras.compare import Released
from extras.hf_v4 import KINDS, released


class ReleasedV4(Released):
    """Its tensors go by V4's released names; the code here has those of the V3 format. Letters as in model_v4.py."""

    def get(self, name):
        return super().get(released(name))

    def linear(self, x, name):
        return F.linear(x, self.get(f'{name}.weight'))

    def unit(self, x):
        return x / (x.square().mean(dim=-1, keepdim=True) + self.s['rms_norm_eps']).sqrt()

    def __init__(self, settings, tensors, tokens):
        super().__init__(settings, tensors)
        self.tokens = tokens                                                           # (N,), for layers with a table

    def first(self, emb):
        return emb.unsqueeze(2).expand(-1, -1, self.s['hc_mult'], -1)                  # (B, T, n, C)

    def last(self, x):
        name, scores = 'model.hc_head.hc_', self.unit(x.flatten(2)) @ self.get('model.hc_head.hc_fn').t()
        weights = (scores * self.get(f'{name}scale') + self.get(f'{name}base')).sigmoid() + self.s['hc_eps']
        return self.norm(torch.einsum('btn,btnc->btc', weights, x), 'model.norm')

    def enter(self, x, layer, sublayer):
        """Streams x (B, T, n, C) -> the sublayer's input (B, T, C), and a function of its output: the next streams"""
        n, eps, name = x.size(2), self.s['hc_eps'], f'{layer}.{sublayer}_hc'
        scale = self.get(f'{name}.scale').repeat_interleave(torch.tensor([n, n, n * n]))
        pre, post, comb = (self.unit(x.flatten(2)) @ self.get(f'{name}.fn').t() * scale +
                           self.get(f'{name}.base')).split((n, n, n * n), dim=-1)
        comb = comb.unflatten(-1, (n, n)).softmax(dim=-1) + eps
        for i in range(self.s['hc_sinkhorn_iters']):
            if i > 0:
                comb = comb / (comb.sum(dim=-1, keepdim=True) + eps)
            comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
        mixed, post = torch.einsum('btij,btic->btjc', comb, x), 2 * post.sigmoid()
        return torch.einsum('btn,btnc->btc', pre.sigmoid() + eps, x), \
            lambda y: torch.einsum('btn,btc->btnc', post, y) + mixed

    def rotate(self, x, turn):
        """The last r channels of x (B, T, heads, D) by turn (T, r/2)"""
        rest, x = x.split((x.size(-1) - 2 * turn.size(-1), 2 * turn.size(-1)), dim=-1)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn.unsqueeze(1)
        return torch.cat((rest, torch.view_as_real(pairs).flatten(-2)), dim=-1)

    def entries(self, x, name, rate, series, turn):
        """-> one entry for each window of `rate` tokens (B, W, D), in whole windows"""
        c, z, bias = self.linear(x, f'{name}.kv_proj'), self.linear(x, f'{name}.gate_proj'), \
            self.get(f'{name}.position_bias')
        D, W = c.size(-1) // series, x.size(1) // rate
        found = []
        for w in range(W):
            parts = [(c[:, w * rate + j, -D:], z[:, w * rate + j, -D:] + bias[j, -D:]) for j in range(rate)]
            if series == 2 and w > 0:  # the first series, of the window before
                parts += [(c[:, (w - 1) * rate + j, :D], z[:, (w - 1) * rate + j, :D] + bias[j, :D])
                          for j in range(rate)]
            values, logits = (torch.stack(part, dim=1) for part in zip(*parts))        # (B, rate or 2 rate, D)
            found.append((values * logits.softmax(dim=1)).sum(dim=1))
        if not found:
            return x.new_zeros(len(x), 0, D)
        found = self.norm(torch.stack(found, dim=1), f'{name}.kv_norm')
        return self.rotate(found.unsqueeze(2), turn[:W * rate:rate]).squeeze(2)

    def attention(self, x, layer):
        s, T, name = self.s, x.size(1), f'{layer}.self_attn'
        kind, D = s['layer_types'][int(layer.split('.')[-1])], s['head_dim']
        plain = kind == KINDS['s']
        yarn = None if plain or 'rope_scaling' not in s else s['rope_scaling'] | {'mscale': 1.0, 'mscale_all_dim': 1.0}
        turn, _ = self.angles(T, s['rope_theta' if plain else 'compress_rope_theta'], yarn)
        latent_q = self.norm(self.linear(x, f'{name}.q_a_proj'), f'{name}.q_a_layernorm')
        q = self.rotate(self.unit(self.linear(latent_q, f'{name}.q_b_proj').unflatten(-1, (-1, D))), turn)
        rows = self.norm(self.linear(x, f'{name}.kv_proj'), f'{name}.kv_norm')
        rows = self.rotate(rows.unsqueeze(2), turn).squeeze(2)                         # (B, T, D)
        place = torch.arange(T)
        age = place.unsqueeze(1) - place
        seen = ((age >= 0) & (age < s['sliding_window'])).expand(len(x), T, T)
        if not plain:
            rate, series = s['compress_rates'][kind], 2 if kind == KINDS['c'] else 1
            entries = self.entries(x, f'{name}.compressor', rate, series, turn)        # (B, W, D)
            closed = torch.arange(entries.size(1)) < ((place + 1) // rate).unsqueeze(1)
            if series == 2:
                index = f'{name}.indexer'
                k = self.entries(x, f'{index}.compressor', rate, 2, turn)
                q_index = self.linear(latent_q, f'{index}.wq_b').unflatten(-1, (-1, s['index_head_dim']))
                closed = self.best(self.rotate(q_index, turn), k, self.linear(x, f'{index}.weights_proj'), closed)
            rows, seen = torch.cat((rows, entries), dim=1), torch.cat((seen, closed.expand(len(x), -1, -1)), dim=-1)
        scores = torch.einsum('bthd,bsd->bths', q, rows) / math.sqrt(D)
        scores = scores.masked_fill(~seen.unsqueeze(2), -math.inf)
        sink = self.get(f'{name}.sinks').view(-1, 1).expand(*q.shape[:3], 1)
        weights = torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]
        y = self.rotate(torch.einsum('bths,bsd->bthd', weights, rows), turn.conj()).flatten(2)
        groups = self.get(f'{name}.o_a_proj.weight').chunk(s['o_groups'])
        y = [F.linear(part, w) for part, w in zip(y.chunk(s['o_groups'], dim=-1), groups)]
        return self.linear(torch.cat(y, dim=-1), f'{name}.o_proj')

    def activation(self, gate, up):
        limit = self.s['swiglu_limit']
        return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)

    def route(self, x, layer):
        """As of V3; a layer with a table takes the experts that it names for the tokens."""
        logits = self.linear(x, f'{layer}.mlp.gate')
        scores = logits.sigmoid() if self.s['scoring_func'] == 'sigmoid' else F.softplus(logits).sqrt()
        if self.s['mlp_layer_types'][int(layer.split('.')[-1])] == 'hash_moe':
            experts = self.get(f'{layer}.mlp.tid2eid').long()[self.tokens]             # (N, K)
        else:
            choice = scores + self.get(f'{layer}.mlp.gate.e_score_correction_bias')
            experts = choice.topk(self.s['num_experts_per_tok'], dim=-1).indices
        gates = torch.zeros_like(scores).scatter(1, experts, scores.gather(1, experts))
        return gates / gates.sum(dim=-1, keepdim=True) * self.s['routed_scaling_factor']
