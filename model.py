"""
A small DeepSeek-V3 behind nanoGPT's interface: Multi-head Latent Attention, DeepSeekMoE with loss-free balancing, and
multi-token prediction. The model comes first, from its config to generate(); its helpers stand below the rule.

Papers: V2 = arXiv 2405.04434, V3 = arXiv 2412.19437, loss-free balancing = arXiv 2408.15664.
Equation numbers in the comments are V3's unless they say otherwise.

Letters in the shape comments:
  B batch            T positions in this call     S positions attended to (cached ones included)
  C n_embd           H heads                      V vocabulary
  n qk_nope_head_dim, r qk_rope_head_dim, v v_head_dim, c kv_lora_rank: the head and latent sizes
  N = B*T tokens     E routed experts             K experts per token      h expert width
"""

import contextlib
import math
import os
import pickle
from dataclasses import dataclass, fields, replace

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    """nanoGPT's fields, then DeepSeek's, named as in the released configs. -1 (or -1.0): __post_init__ derives the
    value, so that nanoGPT's own flags describe a whole model."""
    block_size: int = 1024          # context length in tokens
    vocab_size: int = 50304         # GPT-2's 50257, padded to a multiple of 64
    n_layer: int = 12               # main blocks; each MTP module adds its own
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False              # biases in q_a_proj, kv_a_proj and o_proj (attention_bias)
    tie_word_embeddings: bool = True
    rms_norm_eps: float = 1e-6
    initializer_range: float = -1.0  # standard deviation of the initial weights
    # Multi-head Latent Attention
    q_lora_rank: int = -1           # width of the queries' latent; 0: no query compression
    kv_lora_rank: int = -1          # width of the latent that is cached
    qk_nope_head_dim: int = -1      # per head, size of the query and key part without RoPE
    qk_rope_head_dim: int = -1      # size of the part with RoPE; all heads share this key part, and it is cached
    v_head_dim: int = -1
    rope_theta: float = 10000.0
    # DeepSeekMoE
    n_routed_experts: int = 8       # 0: a dense model
    n_shared_experts: int = 1
    num_experts_per_tok: int = 3
    moe_intermediate_size: int = -1  # width of an expert
    intermediate_size: int = -1     # width of the dense FFN
    first_k_dense_replace: int = 0  # the first k main blocks are dense
    n_group: int = 1                # number of expert groups
    topk_group: int = 1             # groups a token may choose from
    scoring_func: str = 'sigmoid'   # or 'softmax' (V2)
    norm_topk_prob: bool = True     # a token's gates sum to 1
    routed_scaling_factor: float = -1.0  # multiplies the gates
    bias_update_speed: float = 0.001  # loss-free balancing, per optimizer step; 0: off
    aux_loss_alpha: float = 0.0001    # weight of the sequence-wise balance loss; 0: off
    # multi-token prediction
    num_nextn_predict_layers: int = 2  # MTP modules; 0: none
    mtp_n_layer: int = -1              # blocks in each module
    mtp_lambda: float = 0.3            # weight of the modules' mean loss
    eos_token_id: int = -1             # end-of-text id; MTP targets never cross it; -1: unknown
    # YaRN: a context longer than the trained one
    rope_factor: float = 1.0        # how many times longer; 1: off
    rope_original_max_position_embeddings: int = -1  # the trained context
    rope_beta_fast: float = 32.0    # pairs that turn more often than this in the trained context keep their frequency
    rope_beta_slow: float = 1.0     # pairs that turn less often than this are slowed by rope_factor
    rope_mscale: float = 1.0
    rope_mscale_all_dim: float = 1.0
    # no fields here, but another architecture may have others
    score_fns = {'sigmoid': torch.sigmoid, 'softmax': lambda logits: logits.softmax(dim=-1)}
    swiglu_limit, always_free, free_if_given = 0.0, (), ()  # the last two: what train.py's resume may change

    def __post_init__(self):
        check_config(self)
        C, d, K = self.n_embd, self.n_embd // self.n_head, self.num_experts_per_tok

        def derive(name, value):
            if getattr(self, name) == -1:
                setattr(self, name, value)

        derive('initializer_range', 0.5 / math.sqrt(C))           # V3's 0.006 at its 7168; 0.022 at 512
        derive('q_lora_rank', max(1, C // 2))
        derive('kv_lora_rank', max(1, 3 * C // 8))
        derive('v_head_dim', d)
        derive('qk_rope_head_dim', max(2, d // 4 * 2))
        derive('qk_nope_head_dim', max(1, d - self.qk_rope_head_dim))  # q, k and v heads have one size
        derive('rope_original_max_position_embeddings', max(1, int(self.block_size / self.rope_factor)))
        derive('moe_intermediate_size', max(8, (C // 2 + 7) // 8 * 8))
        derive('intermediate_size', max(1, self.n_shared_experts + K) * self.moe_intermediate_size)
        derive('routed_scaling_factor', math.sqrt(K))             # a mean of K outputs is sqrt(K) times smaller
        derive('mtp_n_layer', 2 if self.n_layer >= 8 else 1)

    @property
    def cache_width(self):  # numbers cached per token and layer: MLA.project()'s latent
        return self.kv_lora_rank + self.qk_rope_head_dim


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        # always in fp32; F.rms_norm is fused only if x and weight have the same dtype
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def apply_rope(x, cos, sin):
    """Rotate the interleaved pairs (x0, x1), (x2, x3), ... as in the released weights. x: (..., T, r)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)                 # (..., T, r/2) each
    y = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)    # (..., T, r/2, 2)
    return y.flatten(-2).to(x.dtype)


class MLA(nn.Module):
    """Multi-head Latent Attention (V2 section 2.1, V3 eq. 1-11)."""
    absorb = True  # a subclass whose keys or values are not linear in the latent sets False: it decodes as it trains

    def __init__(self, config):
        super().__init__()
        self.config = config
        C, H, n, r = config.n_embd, config.n_head, config.qk_nope_head_dim, config.qk_rope_head_dim
        c, v_dim = config.kv_lora_rank, config.v_head_dim
        self.sizes = n, r, c, v_dim
        self.scale = (n + r) ** -0.5 * yarn_mscale(config.rope_factor, config.rope_mscale_all_dim) ** 2  # q's and k's
        # all released models use 1e-6 in the norms of the latents, whatever their rms_norm_eps is
        if config.q_lora_rank > 0:
            self.q_a_proj = nn.Linear(C, config.q_lora_rank, bias=config.bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, 1e-6)
            self.q_b_proj = nn.Linear(config.q_lora_rank, H * (n + r), bias=False)
        else:
            self.q_proj = nn.Linear(C, H * (n + r), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(C, c + r, bias=config.bias)
        self.kv_a_layernorm = RMSNorm(c, 1e-6)
        self.kv_b_proj = nn.Linear(c, H * (n + v_dim), bias=False)
        self.o_proj = nn.Linear(H * v_dim, C, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, cache=None, pos=0):
        """x (B, T, C) -> (B, T, C). cache: (B, S_max, c + r) or None, written in place. pos: see run_blocks()"""
        q, latent = self.project(x, cos, sin)
        latent, seen = (latent, None) if cache is None else remember(cache, latent, pos)
        return self.resid_dropout(self.o_proj(self.attend(q, latent, seen)))           # eq. 11

    def project(self, x, cos, sin, latents=None):
        """x (B, T, C) -> q (B, H, T, n + r), and what the cache holds, a row for all heads: the normed latent and the
        rotated key, (B, T, c + r). cos, sin: (T, r/2), or row by row (B, T, r/2). latents: latents(x), if known"""
        n, r, c, _ = self.sizes
        q, kv = latents or self.latents(x)
        if self.config.q_lora_rank > 0:
            q = self.q_b_proj(self.q_a_layernorm(q))                                   # eq. 7
        q_nope, q_rope = q.unflatten(-1, (-1, n + r)).transpose(1, 2).split((n, r), dim=-1)
        c_kv, k_rope = kv.split((c, r), dim=-1)
        q_rope = apply_rope(q_rope, cos.unsqueeze(-3), sin.unsqueeze(-3))              # eq. 8
        k_rope = apply_rope(k_rope, cos, sin)
        return torch.cat((q_nope, q_rope), dim=-1), torch.cat((self.kv_a_layernorm(c_kv), k_rope), dim=-1)

    def latents(self, x):
        """x (B, T, C) -> the queries' latent (the queries if q_lora_rank is 0), [c_kv | k_rope] before norm and RoPE"""
        q = self.q_a_proj(x) if self.config.q_lora_rank > 0 else self.q_proj(x)        # eq. 6
        return q, self.kv_a_proj_with_mqa(x)                                           # eq. 1, 3

    def expand(self, latent):
        """latent (B, S, c + r) -> every head's keys (B, H, S, n + r) and values (B, H, S, v)"""
        n, r, c, v_dim = self.sizes
        c_kv, k_rope = latent.split((c, r), dim=-1)
        kv = self.kv_b_proj(c_kv).unflatten(-1, (-1, n + v_dim)).transpose(1, 2)       # (B, H, S, n+v)
        k_nope, v = kv.split((n, v_dim), dim=-1)                                       # eq. 2, 5
        return torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, kv.size(1), -1, -1)), dim=-1), v  # eq. 4

    def attend(self, q, latent, seen=None):
        """q (B, H, T, n + r) attends to latent (B, S, c + r). -> (B, T, H*v)
        seen: in decoding, the positions that each query attends to, (T, S) or (B, 1, T, S); None: a whole text"""
        if seen is not None and self.absorb:
            return self.attend_absorbed(q, latent, seen)
        k, v = self.expand(latent)
        # flash kernels want one head size for q, k and v: zeros appended to v come out as zeros
        y = F.scaled_dot_product_attention(q, k, F.pad(v, (0, max(0, q.size(-1) - v.size(-1)))), attn_mask=seen,
                                           is_causal=seen is None, scale=self.scale,
                                           dropout_p=self.config.dropout if self.training else 0.0)
        return y[..., :v.size(-1)].transpose(1, 2).flatten(2)                          # eq. 10

    def attend_absorbed(self, q, latent, seen):
        """attend() without expand(): fold W_uk into the query and W_uv into the output, and stay in the latent space.
        All heads share one key, the latent's row, and one value, the row's first c numbers."""
        (H, T), (n, r, c, v_dim) = q.shape[1:3], self.sizes
        q_nope, q_rope = q.split((n, r), dim=-1)
        w_uk, w_uv = self.kv_b_proj.weight.view(H, n + v_dim, c).split((n, v_dim), dim=1)
        # einsum multiplies head by head; @ would first copy the weights for each row of the batch
        q = torch.einsum('bhtn,hnc->bhtc', q_nope, w_uk.to(q.dtype))
        q = torch.cat((q, q_rope), dim=-1) * self.scale                                # (B, H, T, c+r)
        # the latent is the left factor, because a CPU kernel would copy its transpose
        scores = (latent @ q.flatten(1, 2).transpose(1, 2)).transpose(1, 2)            # (B, H*T, S)
        scores = scores.unflatten(1, (H, T)).float().masked_fill(~seen, float('-inf'))  # (B, H, T, S)
        weights = scores.softmax(dim=-1).to(latent.dtype).flatten(1, 2)                # (B, H*T, S)
        # multiply by whole rows, because a CPU's bf16 product would first copy a part of them
        mixed = (weights @ latent)[..., :c].unflatten(1, (H, T))                       # (B, H, T, c)
        return torch.einsum('bhtc,hvc->bthv', mixed, w_uv.to(mixed.dtype)).flatten(2)


def swiglu(x, limit=0.0):
    """[gate, up] (..., 2h) -> silu(gate) * up (..., h). limit > 0: clamp before that to gate <= limit, |up| <= limit"""
    gate, up = x.chunk(2, dim=-1)
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


class MLP(nn.Module):
    """The dense FFN, and all shared experts together as one wide FFN."""

    def __init__(self, config, width):
        super().__init__()
        self.limit = config.swiglu_limit
        self.gate_up_proj = nn.Linear(config.n_embd, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(swiglu(self.gate_up_proj(x), self.limit))


class MoE(nn.Module):
    """DeepSeekMoE (V3 eq. 12-20): shared experts for every token, and K of E small routed experts per token."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        E, C, h = config.n_routed_experts, config.n_embd, config.moe_intermediate_size
        self.gate = nn.Linear(C, E, bias=False)                             # the router
        self.experts_gate_up = nn.Parameter(torch.empty(E, 2 * h, C))
        self.experts_down = nn.Parameter(torch.empty(E, C, h))
        self.shared_experts = MLP(config, config.n_shared_experts * h) if config.n_shared_experts > 0 else None
        # b of eq. 16: not trained by gradients; GPT.update_balance changes it after each optimizer step
        self.register_buffer('e_score_correction_bias', torch.zeros(E))
        self.experts_fn = sorted_experts  # extras/experts.py, kernels.py and fp8.py replace it

    def forward(self, x, chosen=None):
        """(B, T, C) -> (B, T, C), and in training its scores (B, T, E) and chosen experts (B, T, K), else None."""
        B, T, C = x.shape
        flat = x.view(-1, C)                                                # (N, C)
        scores, gates, experts = self.route(flat, chosen)                   # (N, E), (N, K), (N, K)
        out = self.routed(flat, gates, experts).view(B, T, C)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)                              # eq. 12
        return out, (scores.view(B, T, -1), experts.view(B, T, -1)) if self.training else None

    def route(self, x, chosen=None):
        """x (N, C) -> scores (N, E), gates (N, K), chosen experts (N, K). All in fp32. chosen: not by their scores"""
        cfg, K = self.config, self.config.num_experts_per_tok
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.gate.weight.float())
        scores = cfg.score_fns[cfg.scoring_func](logits)                                         # eq. 15
        biased = scores.detach() + self.e_score_correction_bias
        if cfg.n_group > 1:
            biased = keep_best_groups(biased, cfg.n_group, cfg.topk_group, cfg.scoring_func)
        experts = biased.topk(K, dim=-1, sorted=False).indices if chosen is None else chosen     # eq. 16
        gates = scores.gather(1, experts)  # without b
        if cfg.norm_topk_prob and K > 1:  # with K = 1 the gate would always be 1, without a gradient
            gates = gates / (gates.sum(dim=-1, keepdim=True) + 1e-20)                            # eq. 13
        return scores, gates * cfg.routed_scaling_factor, experts

    def routed(self, x, gates, experts):
        """The sum over the chosen experts in eq. 12: x (N, C), gates and experts (N, K) -> (N, C)"""
        return self.experts_fn(x, gates, experts, self.experts_gate_up, self.experts_down, self.config.swiglu_limit)


def sorted_experts(x, gates, experts, gate_up, down, limit=0.0):
    """MoE.routed() with the N*K choices as M rows, sorted by expert. gate_up: (E, 2h, C), down: (E, C, h)"""
    token, place, row_gates, offsets = sort_by_expert(experts, gates, len(down))
    y = Gather.apply(x.to(compute_dtype(x)), token, place)                  # (M, C): each row's token
    y = swiglu(grouped_linear(y, gate_up, offsets), limit)                  # (M, h)
    y = y * row_gates.to(y.dtype)  # g of eq. 12, before the linear W_down because rows are narrower here
    y = grouped_linear(y, down, offsets)  # not within Gather.apply(...): each pass would be compiled anew (on CPUs)
    return Gather.apply(y, place, token)                                    # (N, C): the sum of each token's K rows


class Block(nn.Module):
    def __init__(self, config, layer, mla=MLA, moe=MoE):
        super().__init__()
        dense = config.n_routed_experts == 0 or layer < config.first_k_dense_replace
        self.input_layernorm = RMSNorm(config.n_embd, config.rms_norm_eps)
        self.attn = mla(config)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.rms_norm_eps)
        self.mlp = MLP(config, config.intermediate_size) if dense else moe(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, cache=None, pos=0):
        """(B, T, C) -> (B, T, C), and from an MoE block in training (scores, experts) as MoE.forward(), else None."""
        x = x + self.attn(self.input_layernorm(x), cos, sin, cache, pos)
        y = self.mlp(self.post_attention_layernorm(x))
        y, routing = y if isinstance(self.mlp, MoE) else (y, None)
        return x + self.dropout(y), routing


class MTP(nn.Module):
    """Multi-token prediction module k (V3 section 2.2): h_{k-1} and token t_{i+k} -> a state that predicts t_{i+k+1}"""

    def __init__(self, config, block):
        super().__init__()
        C, eps = config.n_embd, config.rms_norm_eps
        self.enorm = RMSNorm(C, eps)
        self.hnorm = RMSNorm(C, eps)
        self.eh_proj = nn.Linear(2 * C, C, bias=False)
        self.h = nn.ModuleList(block(config, config.n_layer + i) for i in range(config.mtp_n_layer))
        self.norm = RMSNorm(C, eps)

    def combine(self, emb, h):
        """eq. 21, in the released order: the embedding first. Both (B, T, C)."""
        x = self.eh_proj(torch.cat((self.enorm(emb), self.hnorm(h)), dim=-1))
        return x.to(emb.dtype)  # the residual stream has the embedding's dtype, with or without autocast


class GPT(nn.Module):
    """The model. Its initialisation follows nanoGPT; an nn.Parameter that you add keeps its values:

    | parameter                                           | distribution | std or value                        |
    |-----------------------------------------------------|--------------|-------------------------------------|
    | embedding, head, projections, router, experts       | normal       | initializer_range                   |
    | into the residual stream: o_proj, down_proj, _down  | normal       | initializer_range / sqrt(2 n_layer) |
    | norm weights; biases and e_score_correction_bias    | constant     | 1; 0                                |
    """
    config_class, block, module = GPTConfig, Block, MTP  # another architecture has its own

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(self.block(config, layer) for layer in range(config.n_layer)),
            ln_f=RMSNorm(config.n_embd, config.rms_norm_eps),
        ))
        self.mtp = nn.ModuleList(self.module(config, self.block) for _ in range(config.num_nextn_predict_layers))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.transformer.wte.weight = self.lm_head.weight
        for name, table in self.tables().items():
            self.register_buffer(name, table, persistent=False)
        self.stats = {}  # set by training_loss()
        self.rows_fn = cross_entropy_rows  # compile() and extras/kernels.py replace it
        for name, p in self.named_parameters():
            self.initialise(name, p)

    def run_blocks(self, blocks, x, cache, pos, *more):
        """x (B, T, C) through the blocks -> (B, T, C), and (scores, experts) of each MoE block in training.
        pos: the first token's position, or all positions (B, T), if each row has its own. more: for all blocks"""
        place = slice(pos, pos + x.size(1)) if isinstance(pos, int) else pos.clamp(max=self.config.block_size - 1)
        cos, sin = self.rope_cos[place], self.rope_sin[place]               # (T, r/2) or (B, T, r/2) each
        routing = []
        for i, block in enumerate(blocks):
            x, scores_and_experts = block(x, cos, sin, None if cache is None else cache[i], pos, *more)
            if scores_and_experts is not None:
                routing.append(scores_and_experts)
        return x, routing

    def main_stack(self, idx, cache=None, pos=0):
        """idx (B, T) at positions pos.. -> the state after the final norm (B, T, C), and its routing"""
        x, routing = self.run_blocks(self.transformer.h, self.transformer.drop(self.transformer.wte(idx)), cache, pos)
        return self.transformer.ln_f(x), routing

    def mtp_module(self, module, token, h, cache=None, pos=0):
        """eq. 21-22: token t_{i+k} (B, T), h_{k-1} (B, T, C) -> h_k (B, T, C), and the routing from run_blocks()"""
        x = module.combine(self.transformer.drop(self.transformer.wte(token)), h)
        x, routing = self.run_blocks(module.h, x, cache, pos)
        return module.norm(x), routing

    def forward(self, idx, targets=None, cache=None, pos=0, return_logits=True, mtp_lambda=None, label_counts=None):
        """idx (B, T), targets (B, T; -1: no target) or None -> logits, loss

        without targets      the logits (B, 1, V) of the last position, and None
        targets in eval      the logits (B, T, V), or None if not return_logits, and the main next-token loss
        targets in training  None (memory never holds all logits), and the loss of training_loss()
        cache: from make_cache(). idx are the tokens at positions pos..pos+T-1; forward writes them into the cache."""
        end = pos + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f'{end} tokens do not fit in block_size={self.config.block_size}')
        h, routing = self.main_stack(idx, cache, pos)                       # (B, T, C)
        if targets is None:
            return self.lm_head(h[:, -1:]), None
        if self.training:
            return None, self.training_loss(h, routing, idx, targets, mtp_lambda, label_counts)
        logits = self.lm_head(h) if return_logits else None                 # (B, T, V)
        return logits, self.loss_of_heads([h], targets.unsqueeze(0), [1.0])[0]

    def training_loss(self, h, routing, idx, targets, mtp_lambda=None, label_counts=None):
        """The loss to minimise: main + MTP + balance. h (B, T, C), routing: main_stack()'s.

        label_counts (1 + modules): each head's summed loss is divided by its number; None: by its labels in `targets`.
        The training loop gives the mean over micro-batches and ranks, so each label of an iteration weighs the same.
        Leaves tensors in `stats`: `losses` (1 + modules), of the main head and each MTP module; `balance`, the mean
        over MoE layers; `load` (MoE layers, E), the tokens of each expert."""
        D, states, labels = len(self.mtp), [h], self.labels(targets)
        has_label = [labels[0] >= 0] * len(routing)                         # for each MoE layer (B, T), its head's
        for k, module in enumerate(self.mtp, start=1):
            token = F.pad(idx[:, k:], (0, min(k, idx.size(1))))             # t_{i+k}; the padded end has no label
            h, more = self.mtp_module(module, token, h)
            routing, has_label = routing + more, has_label + [labels[k] >= 0] * len(more)
            states.append(h)
        weight = (self.config.mtp_lambda if mtp_lambda is None else mtp_lambda) / max(D, 1)   # eq. 24-25
        loss, losses = self.loss_of_heads(states, labels, [1.0] + [weight] * D, label_counts)
        self.stats = {'losses': losses}
        if routing:
            balance, load = balance_and_load(routing, torch.stack(has_label))
            if self.config.aux_loss_alpha > 0:
                loss = loss + self.config.aux_loss_alpha * balance.sum()
            self.stats |= {'balance': balance.detach().mean(), 'load': load}  # the mean: for the log
        return loss

    def labels(self, targets):
        """targets (B, T; -1: none) -> what each head predicts (1 + modules, B, T): module k at position i t_{i+k+1}.
        The last k positions have none, nor have those with a missing target or a document's end before the label."""
        labels = [targets]
        for k in range(1, 1 + len(self.mtp)):
            beyond = (labels[-1] < 0) | (labels[-1] == self.config.eos_token_id)
            ahead = F.pad(targets[:, k:], (0, min(k, targets.size(1))), value=-1)             # t_{i+k+1}
            labels.append(torch.where(beyond, -1, ahead))
        return torch.stack(labels)

    @torch.no_grad()
    def update_balance(self, load):
        """Loss-free balancing: raise b of experts below their layer's mean load, lower b of experts above it.
        Call it once after each optimizer step. load (MoE layers, E): tokens of each expert in the step, over all
        micro-batches and ranks. A layer without load keeps its b. b keeps its mean: a shift changes no choice."""
        step = self.config.bias_update_speed * torch.sign(load.float().mean(dim=1, keepdim=True) - load)
        biases = [moe.e_score_correction_bias for moe in self.moe_layers()]
        torch._foreach_add_(biases, list(step - step.mean(dim=1, keepdim=True)))

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, stop_token=None):
        """Append max_new_tokens tokens to each row of idx (B, T). temperature below GREEDY: always the likeliest token.
        Past block_size the context is the last block_size tokens, as in nanoGPT, and there is no cache. After its
        stop_token a row gets only stop_token; generation ends early when every row has one."""
        B, T = idx.shape
        if T == 0:
            raise ValueError('generate needs a prompt of at least one token')
        block_size = self.config.block_size
        cache, cached = self.make_cache(B, min(T + max_new_tokens, block_size)), 0
        done = torch.zeros(B, 1, dtype=torch.bool, device=idx.device)
        finite = ~done
        for step in range(max_new_tokens):
            if idx.size(1) <= block_size:
                logits, _ = self(idx[:, cached:], cache=cache, pos=cached)                   # (B, 1, V)
                cached = idx.size(1)
            else:
                logits, _ = self(idx[:, -block_size:])
            finite &= done | logits.amax(dim=-1).isfinite()
            token = draw(probabilities(logits[:, -1], temperature, top_k))                   # (B, 1)
            if stop_token is not None:
                token = token.masked_fill(done, stop_token)
                done |= token == stop_token
            idx = torch.cat((idx, token), dim=1)
            if stop_token is not None and step % 16 == 15 and done.all():  # a host sync: not at every token
                break
        if not finite.all():
            raise Mistake(NOT_FINITE)
        return idx

    # =================================================================================================================
    # The machinery: first the rest of GPT's methods, then the functions that the model above calls.
    def initialise(self, name, p):
        """Initialise one parameter by GPT's table."""
        owner, _, last = name.rpartition('.')
        module, weight = self.get_submodule(owner), last == 'weight'
        if isinstance(module, RMSNorm) and weight:
            nn.init.ones_(p)
        elif isinstance(module, nn.Linear) and last == 'bias':
            nn.init.zeros_(p)
        elif isinstance(module, (nn.Linear, nn.Embedding)) and weight or last in ('experts_gate_up', 'experts_down'):
            residual = name.endswith(('o_proj.weight', 'down_proj.weight', 'experts_down'))
            terms = 2 * self.config.n_layer if residual else 1
            nn.init.normal_(p, std=self.config.initializer_range / math.sqrt(terms))

    def tables(self):
        """The buffers that follow from the config, by name: cos and sin of RoPE, (block_size, r/2) each."""
        return dict(zip(('rope_cos', 'rope_sin'), rope_table(self.config)))

    def blocks(self):
        """Main blocks, then MTP blocks."""
        return [*self.transformer.h, *(block for module in self.mtp for block in module.h)]

    def moe_layers(self):
        return [block.mlp for block in self.blocks() if isinstance(block.mlp, MoE)]

    def make_cache(self, batch_size, length, blocks=None, device=None):
        """An empty latent cache: a tensor (B, length, c + r) for each main block, or for this number of blocks()."""
        w, shape = self.lm_head.weight, (batch_size, length, self.config.cache_width)
        return [torch.zeros(shape, dtype=compute_dtype(w), device=device or w.device)
                for _ in range(blocks or self.config.n_layer)]

    def loss_of_heads(self, states, labels, weights, counts=None):
        """States (B, T, C) through the shared head, against labels (heads, B, T; -1: none) -> the weighted sum of their
        mean losses, and these means (heads,) without a gradient. counts (heads,): see training_loss()"""
        labels = labels.flatten(1)                                          # (heads, B*T)
        valid = labels >= 0
        counts = valid.sum(dim=1) if counts is None else counts
        share = valid / counts.unsqueeze(1).clamp(min=1e-9)                 # of a label in its head's mean
        loss, row_losses = LinearCrossEntropy.apply(
            torch.stack(states).flatten(0, 2), self.lm_head.weight, labels.flatten(),
            torch.cat([w * s for w, s in zip(weights, share)]), self.rows_fn, torch.is_grad_enabled())
        return loss, (row_losses.view(len(states), -1) * share).sum(dim=1)

    def compile(self, **kwargs):
        """Compile the loss and each block; equal blocks share one graph."""
        global grouped_linear_uncompiled  # here, because as a decorator it imports the compiler, two seconds of a start
        grouped_linear_uncompiled = torch.compiler.disable(grouped_linear_uncompiled)
        # static: of a number that differs between models, a dynamic graph on a CPU keeps one value for all of them
        for block in self.blocks():  # 64: all kinds of blocks share one limit, also those of another architecture
            block.compile(dynamic=False, recompile_limit=64, **kwargs)
        if self.rows_fn is cross_entropy_rows:
            self.rows_fn = torch.compile(cross_entropy_rows, **kwargs)

    def recompute(self):
        """Keep only each block's input; the backward recomputes the rest."""
        def recomputed(forward):  # torch.compile traces through a function that calls checkpoint(), but not a partial
            return lambda *args: torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False)
        for block in self.blocks():
            block.forward = recomputed(block.forward)

    def get_num_params(self, non_embedding=True):
        """Number of parameters, without embedding and head unless asked for. A tied head counts once."""
        apart = {id(p): p.numel() for p in (self.transformer.wte.weight, self.lm_head.weight)} if non_embedding else {}
        return sum(p.numel() for p in self.parameters()) - sum(apart.values())

    def get_num_active_params(self):
        """Parameters used per token, without embedding and head."""
        idle = self.config.n_routed_experts - self.config.num_experts_per_tok
        expert = 3 * self.config.n_embd * self.config.moe_intermediate_size
        return self.get_num_params() - len(self.moe_layers()) * idle * expert

    def flops_per_token(self):
        """FLOPs of one training token, forward and backward: 6 per active weight, heads and attention included."""
        cfg = self.config
        heads = (1 + len(self.mtp)) * self.lm_head.weight.numel()
        head_dims = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim
        attention = len(self.blocks()) * cfg.n_head * head_dims * cfg.block_size
        return 6 * (self.get_num_active_params() + heads + attention)

    def estimate_mfu(self, fwdbwd_per_iter, dt):
        """Model FLOP/s over the device's peak, or nan. fwdbwd_per_iter: sequences on this device in dt seconds"""
        device = self.lm_head.weight.device
        peak = peak_tflops(torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type)
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / (peak * 1e12)

    def crop_block_size(self, block_size):
        """Shorten the context after loading, as in nanoGPT."""
        if block_size > self.config.block_size:
            raise Mistake(f'cannot crop block_size={self.config.block_size} to {block_size}')
        self.config.block_size = block_size

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW, fused where it exists. Matrices, 2-D and 3-D, decay; norms and biases do not."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ('cuda', 'cpu'))

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        raise Mistake(f"{model_type!r} has no ckpt.pt, and GPT-2's weights do not fit this architecture; see extras/")

    @classmethod
    def from_checkpoint(cls, path, map_location='cpu', assign=False, **overrides):
        """train.py's ckpt.pt -> the model, and the checkpoint. overrides: GPTConfig fields to replace. assign: the
        model uses the file's own tensors, in their dtypes, read from the disk when it needs them."""
        try:
            checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=assign)
            weights = {k.removeprefix('_orig_mod.'): v for k, v in checkpoint['model'].items()}
            config = cls.config_class(**checkpoint['model_args'])
        except Exception as e:  # no file, a damaged one, or another program's
            if is_out_of_memory(e):
                raise
            raise Mistake(f'{path} is no checkpoint of this model: {type(e).__name__}: {first_line(e)}') from None
        if 'transformer.wpe.weight' in weights:
            raise Mistake(f'{path}: this is a nanoGPT (GPT-2) checkpoint: it does not fit MLA and MoE; train a model')
        model = cls(replace(config, **overrides))
        try:
            model.load_state_dict(weights, assign=assign)
        except RuntimeError as e:
            raise Mistake(f'{path} is no checkpoint of this model: {first_line(e)}') from None
        return model, checkpoint


class Mistake(ValueError):
    """A user's mistake: what is wrong; what to do. configurator.py prints this one line, and the exit code is 2."""


def first_line(error):
    """exception -> one-line message. A long one is cut after a sentence"""
    said = ' '.join(str(error).split()) or type(error).__name__
    return said if len(said) <= 200 else said[:200].rpartition('. ')[0] or said[:200]


def is_out_of_memory(error):
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


CHECKS = [  # fields, a test of each value x (c: the config), the test in words; a default of -1 always passes
    ('block_size vocab_size n_layer mtp_n_layer n_head rms_norm_eps initializer_range kv_lora_rank qk_nope_head_dim '
     'qk_rope_head_dim rope_beta_slow rope_theta moe_intermediate_size intermediate_size n_embd rope_beta_fast '
     'v_head_dim rope_original_max_position_embeddings', lambda x, c: 1e-300 < x < 2**31, 'must be positive, < 2**31'),
    ('q_lora_rank n_routed_experts n_shared_experts num_experts_per_tok first_k_dense_replace routed_scaling_factor '
     'bias_update_speed aux_loss_alpha num_nextn_predict_layers mtp_lambda rope_mscale rope_mscale_all_dim',
     lambda x, c: 0 <= x < 2**31, 'must not be negative, nor 2**31 or more'),
    ('dropout', lambda x, c: 0 <= x < 1, 'must lie in [0, 1)'),
    ('rope_factor', lambda x, c: x == 1 or 1 < x < 2**31 and c.rope_theta > 2, 'must be 1 or more, and rope_theta > 2'),
    ('n_head', lambda x, c: c.n_embd % x == 0, 'must divide n_embd={n_embd}'),
    ('qk_rope_head_dim', lambda x, c: x % 2 == 0, 'must be even: RoPE rotates pairs'),
    ('first_k_dense_replace', lambda x, c: x <= c.n_layer, 'must lie in 0..n_layer={n_layer}'),
    ('eos_token_id', lambda x, c: 0 <= x < c.vocab_size, 'must be a token below vocab_size={vocab_size}, or -1'),
    ('scoring_func', lambda x, c: x in c.score_fns, "must be 'sigmoid' or 'softmax', or in model_v4 'sqrtsoftplus'"),
]
EXPERT_CHECKS = [
    ('n_group', lambda x, c: x > 0 and c.n_routed_experts % x == 0, 'must divide n_routed_experts={n_routed_experts}'),
    ('topk_group', lambda x, c: 0 < x <= c.n_group, 'must lie in 1..n_group={n_group}'),
    ('num_experts_per_tok', lambda x, c: 0 < x <= c.topk_group * c.n_routed_experts // c.n_group,
     'must lie in 1..n_routed_experts={n_routed_experts}, and fit in topk_group={topk_group} of {n_group} groups'),
    ('n_embd moe_intermediate_size', lambda x, c: x % 8 == 0, 'must be a multiple of 8, unless n_routed_experts=0'),
]


def check_config(config, further=()):
    """Mistake if the values cannot make a model. further: another architecture's checks"""
    defaults = {field.name: field.default for field in fields(config)}
    for name, default in defaults.items():
        value, kind = getattr(config, name), type(default)
        if not (math.isfinite(value) if kind is float and type(value) in (int, float) else type(value) is kind):
            raise Mistake(f'GPTConfig: {name} must be {kind.__name__}{" and finite" * (kind is float)}, not {value!r}')
    for names, fits, words in [*CHECKS, *further, *(EXPERT_CHECKS if config.n_routed_experts > 0 else [])]:
        for name in names.split():
            value = getattr(config, name)
            if not fits(value, config) and (value != -1 or defaults[name] != -1):
                raise Mistake(f'GPTConfig: {name}={value!r} {words.format(**vars(config))}')


def balance_and_load(routing, has_label):
    """-> the sequence-wise balance loss of each MoE layer without its weight alpha (layers,), 1 at balance (eq. 17-20),
    and its load (layers, E), the tokens that each expert got. routing: run_blocks()'s; has_label: (L or 1, B, T)"""
    scores, experts = (torch.stack(x) for x in zip(*routing))               # (L, B, T, E), (L, B, T, K)
    E, K = scores.size(-1), experts.size(-1)
    # tokens behind a row's last label only fill the row, and do not count
    counted = has_label.flip(-1).cumsum(dim=-1).flip(-1).unsqueeze(-1) > 0  # (L or 1, B, T, 1)
    T = counted.sum(dim=-2).clamp(min=1)                                    # (L or 1, B, 1)
    none = torch.zeros_like(scores, dtype=torch.bool)
    best = none.scatter(-1, scores.topk(K, dim=-1).indices, True)           # K experts, also if scores are equal
    f = (best & counted).sum(dim=2) / T * (E / K)                                                # eq. 18: (L, B, E)
    share = scores / scores.sum(dim=-1, keepdim=True).clamp(min=1e-20)                           # eq. 19
    p = (share * counted).sum(dim=2) / T                                                         # eq. 20: (L, B, E)
    load = (none.scatter(-1, experts, True) & counted).sum(dim=(1, 2))
    return (f * p).sum(dim=-1).mean(dim=1), load                                                 # eq. 17


def remember(cache, latent, pos):
    """Write latent (B, T, w) into cache (B, S_max, w) at pos -> what to attend to, (B, S, w), and attend()'s seen."""
    if isinstance(pos, torch.Tensor):  # extras/decode.py; what a rejected draft writes is overwritten later
        cache[torch.arange(len(pos), device=pos.device).unsqueeze(1), pos] = latent
        return cache, torch.arange(cache.size(1), device=pos.device) <= pos[:, None, :, None]  # (B, 1, T, S)
    T, S = latent.size(1), pos + latent.size(1)
    cache[:, pos:S] = latent
    seen = torch.ones(T, S, dtype=torch.bool, device=latent.device).tril(pos)  # the queries are the last T
    return cache[:, :S], seen if pos > 0 else None


def compute_dtype(x):
    """autocast's dtype if enabled, else x.dtype"""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def yarn_mscale(factor, mscale):
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_table(config):
    """cos and sin of position * theta^(-2i/r), each (block_size, r/2), fp32. YaRN (arXiv 2309.00071, section 3.2) keeps
    the frequency of pairs that turn often within the trained context, divides others by the factor, blends between."""
    r, factor = config.qk_rope_head_dim, config.rope_factor
    freq = config.rope_theta ** (-torch.arange(0, r, 2, dtype=torch.float64) / r)              # (r/2,)
    if factor > 1:
        trained = config.rope_original_max_position_embeddings
        low, high = (r * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))
                     for turns in (config.rope_beta_fast, config.rope_beta_slow))  # the pairs that make these turns
        low, high = max(math.floor(low), 0), min(math.ceil(high), r - 1)
        slowed = ((torch.arange(r // 2) - low) / (high - low or 0.001)).clamp(0, 1)            # (r/2,): 0 to 1
        freq = freq * (1 - slowed) + freq / factor * slowed
    # MLA.scale already contains mscale_all_dim; cos and sin take only the ratio mscale / mscale_all_dim
    scale = yarn_mscale(factor, 1.0)
    if config.rope_mscale > 0 and config.rope_mscale_all_dim > 0:
        scale = yarn_mscale(factor, config.rope_mscale) / yarn_mscale(factor, config.rope_mscale_all_dim)
    angle = torch.outer(torch.arange(config.block_size, dtype=torch.float64), freq)
    return (angle.cos() * scale).float(), (angle.sin() * scale).float()


def keep_best_groups(choice, n_group, topk_group, scoring_func):
    """Group-limited routing (V3 section 2.1.2): choice (N, E) -> choice, but -inf outside each token's topk_group best
    groups. A group's score is the sum of its two best experts' scores; in V2 (softmax) its best expert's score."""
    groups = choice.unflatten(-1, (n_group, -1))                            # (N, n_group, E / n_group)
    best = min(2 if scoring_func == 'sigmoid' else 1, groups.size(-1))
    strength = groups.topk(best, dim=-1).values.sum(dim=-1)                 # (N, n_group)
    kept = strength.topk(topk_group, dim=-1, sorted=False).indices
    dropped = torch.ones_like(strength, dtype=torch.bool).scatter(1, kept, False)
    return groups.masked_fill(dropped.unsqueeze(-1), float('-inf')).flatten(1)


def sort_by_expert(experts, gates, n_experts):
    """Sort the N*K choices (experts, gates: (N, K)) by expert, into M rows -> each row's token (M,), each choice's row
    (N, K), each row's gate (M, 1), and where each expert's rows end (E,). No loop, no host sync, no shape that depends
    on the data. Padding rows (token N: zeros; gate 0) align each expert's first row: kernels then meet few shapes."""
    N, K = experts.shape
    align = row_alignment(experts.numel(), n_experts)
    expert, order = experts.view(-1).sort(stable=True)                      # (N*K,)
    ends = torch.searchsorted(expert, torch.arange(n_experts, device=expert.device), right=True)
    load = ends.diff(prepend=ends.new_zeros(1))                             # (E,): how many tokens each expert got
    padded = (load + align - 1) // align * align
    offsets = padded.cumsum(0)                                              # (E,)
    shift = (offsets - padded) - (ends - load)                              # (E,): how far its rows move
    position = torch.arange(order.numel(), device=order.device)
    place = torch.empty_like(order).scatter_(0, order, position + shift[expert])  # (N*K,)
    M = order.numel() + n_experts * (align - 1)                             # enough rows for any load
    token = place.new_full((M,), N).scatter_(0, place, position // K)       # (M,)
    row_gates = gates.new_zeros(M).scatter(0, place, gates.view(-1))        # (M,)
    return token, place.view(-1, K), row_gates.unsqueeze(-1), offsets.int()


def row_alignment(n, n_experts):
    """The largest power of two, up to 64, that pads an expert's mean share of n rows by at most a 16th."""
    return 1 << min(6, max(1, n // n_experts // 8).bit_length() - 1)


class Gather(torch.autograd.Function):
    """index (M,): each row's token, zeros behind the last token. index (N, K): the sum of each token's K rows. The
    gradient of one is the other, by `inverse`. A plain x[index] adds gradients with atomics, slowly, in any order."""
    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(index, inverse)
        if index.dim() == 1:
            return F.pad(x, (0, 0, 0, 1)).index_select(0, index)
        return x.index_select(0, index.flatten()).view(*index.shape, -1).sum(dim=1)

    @staticmethod
    def backward(ctx, grad):
        index, inverse = ctx.saved_tensors
        return Gather.apply(grad.contiguous(), inverse, index), None, None


def grouped_linear(x, weight, offsets):
    """x (M, in): rows offsets[e-1]..offsets[e] times weight[e].T (E, out, in) -> (M, out); other rows undefined"""
    weight = weight.to(x.dtype)
    if x.dtype in (torch.bfloat16, torch.float16) and x.device.type != 'mps' and hasattr(F, 'grouped_mm'):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    return grouped_linear_uncompiled(x, weight, offsets)


def grouped_linear_uncompiled(x, weight, offsets):  # noqa: F811 (GPT.compile() wraps it)
    """grouped_mm takes fp32 only in eager mode on CPUs. Other dtypes and devices need a loop with a host sync."""
    if x.dtype == torch.float32 and x.device.type == 'cpu' and hasattr(F, 'grouped_mm'):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    ends = offsets.tolist()
    parts = [F.linear(x[start:end], w) for start, end, w in zip([0, *ends], ends, weight)]
    return torch.cat([*parts, x.new_zeros(len(x) - ends[-1], weight.size(1))])


def cross_entropy_rows(logits, target, row_weight):
    """logits (n, V), target and row_weight (n,) -> each row's loss (n,), fp32. Gradients overwrite the logits."""
    target = target.clamp(min=0).unsqueeze(-1)
    weight = row_weight.unsqueeze(-1)
    z = logits.float()
    lse = z.logsumexp(dim=-1, keepdim=True)
    log_p = z.gather(-1, target) - lse                                      # (n, 1)
    logits.copy_(z.sub_(lse).exp_().mul_(weight))                           # weight * softmax, and at the target
    logits.scatter_(-1, target, (log_p.expm1() * weight).to(logits.dtype))  # weight * (softmax - 1)
    return -log_p.squeeze(-1)


class LinearCrossEntropy(torch.autograd.Function):
    """sum_i row_weight_i * cross_entropy(h_i @ weight.T, target_i), without ever holding all the logits.
    The forward computes the gradient too, so that nothing of width V is kept or computed twice. h: (N, C), weight:
    (V, C), target and row_weight: (N,), row_weight 0 leaves a row out -> the sum, and each row's loss (N,)."""
    CHUNK = 2048  # rows whose gradients are held at a time; with fewer, the weight's gradient is slower
    SLICE = 512   # rows whose logits become gradients at a time: few enough that caches hold some of them

    @staticmethod
    def forward(ctx, h, weight, target, row_weight, rows_fn, with_grad):
        x, w = (a.to(compute_dtype(h)) for a in (h, weight))
        if not with_grad:
            parts = zip(x.split(LinearCrossEntropy.SLICE), target.split(LinearCrossEntropy.SLICE))
            losses = torch.cat([F.cross_entropy((part @ w.t()).float(), t, ignore_index=-1, reduction='none')
                                for part, t in parts])
            return (losses * row_weight).sum(), losses
        unit = row_weight.max().clamp(min=1e-20)  # the largest row weight is scaled to 1: fp16 would underflow
        share = row_weight / unit
        held = x.new_empty(min(len(x), LinearCrossEntropy.CHUNK), len(w))   # (chunk, V): logits, then gradients
        one_pass = x.is_cuda and rows_fn is not cross_entropy_rows          # then rows_fn makes no fp32 copy
        size = LinearCrossEntropy.CHUNK if one_pass else LinearCrossEntropy.SLICE
        losses, grad_x, grad_w = [], torch.empty_like(x), torch.zeros_like(weight)
        for start in range(0, len(x), LinearCrossEntropy.CHUNK):
            chunk = slice(start, start + LinearCrossEntropy.CHUNK)
            grad = held[:len(x[chunk])]
            for part, out, t, r in zip(*(a.split(size) for a in (x[chunk], grad, target[chunk], share[chunk]))):
                torch.mm(part, w.t(), out=out)
                losses.append(rows_fn(out, t, r))
            torch.mm(grad, w, out=grad_x[chunk])
            grad_w += grad.t() @ x[chunk]
        losses = torch.cat(losses)
        ctx.save_for_backward(grad_x.to(h.dtype), grad_w, unit)
        ctx.mark_non_differentiable(losses)
        return (losses * row_weight).sum(), losses

    @staticmethod
    def backward(ctx, grad_out, _):
        grad_h, grad_w, unit = ctx.saved_tensors
        scale = grad_out * unit
        return grad_h * scale, grad_w * scale, None, None, None, None


def probabilities(logits, temperature, top_k):
    """(..., V) -> (..., V), fp32. temperature below GREEDY: 1 for the likeliest token."""
    if temperature < GREEDY:
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    logits = logits.float() / temperature
    if top_k is not None and 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], float('-inf'))
    return logits.softmax(dim=-1)


def draw(probs):
    """probs (B, V), any sum -> sampled (B, 1): the smallest exponential time wins. multinomial waits for the host."""
    return (probs / torch.empty_like(probs).exponential_()).argmax(dim=-1, keepdim=True)


GREEDY = 1e-6  # below this temperature the likeliest token is taken: logits divided by it would overflow
NOT_FINITE = 'the model computes nan or infinity: its weights hold some, or its dtype overflows (try float32)'
# dense bf16 peak in TFLOP/s (fp16 on a device without bf16), by words of the device's name; nan if unknown
PEAK_TFLOPS = {'Laptop': math.nan, 'B200': 2250, 'H200': 989, 'H100 PCIe': 756, 'H100 NVL': 835, 'H100': 989,
               'A100': 312, 'L40S': 362, 'L40': 181, 'L4': 121, 'A10G': 70, 'A10': 125, 'RTX 5090': 209,
               'RTX 4090': 165, 'RTX 3090': 71, 'V100': 125, 'T4': 65}


def peak_tflops(name):
    words = f' {name} '.replace('-', ' ')
    return next((peak for part, peak in PEAK_TFLOPS.items() if f' {part} ' in words), math.nan)


def save_checkpoint(checkpoint, path, best_path=None):
    """Write a temporary file, force it to the disk, rename it: a kill at any instant leaves a whole one. The name
    best_path comes first: a run killed between the two repeats the steps since path, and writes the best one again."""
    new, new_best = f'{path}.tmp', f'{best_path}.tmp'

    def write(target):
        with open(target, 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())

    def remove():
        for name in filter(os.path.lexists, (new, new_best)):
            os.remove(name)

    try:
        remove()  # a kill may have left them as links to the best checkpoint, which must stay
        write(new)
        if best_path:
            try:
                os.link(new, new_best)
            except OSError:  # a file system without links
                write(new_best)
            os.replace(new_best, best_path)
        os.replace(new, path)
        sync_folder(os.path.dirname(path) or '.')
    except (OSError, RuntimeError) as e:
        with contextlib.suppress(OSError):
            remove()
        cause = e if isinstance(e, OSError) else e.__context__ or e  # torch's own error hides the system's
        raise Mistake(f'{path} could not be written, what was saved before is whole: {first_line(cause)}') from None


def sync_folder(folder):
    """Force the names of a folder's files to the disk."""
    if os.name == 'posix':  # Windows cannot open a folder
        file = os.open(folder, os.O_RDONLY)
        os.fsync(file)
        os.close(file)


class PlainUnpickler(pickle._Unpickler):  # not C's, which reserves as much memory as a few bytes ask for
    """Reads a pickle of dicts, strings and numbers. Refuses one that names a class or a function."""
    dispatch = {op: read for op, read in pickle._Unpickler.dispatch.items() if op != pickle.BYTEARRAY8[0]}

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'{module}.{name} is not plain data')


def load_meta(path):
    """A data set's meta.pkl -> dict with at least vocab_size; without a file {}: the tokens are GPT-2's."""
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, 'rb') as f:
            meta = PlainUnpickler(f).load()
        if type(meta['vocab_size']) is not int or meta.get('dtype', 'uint16') not in ('uint16', 'uint32'):
            raise ValueError('its vocab_size must be int, and its dtype uint16 or uint32')
    except Exception as e:  # damaged files raise many kinds of errors
        raise Mistake(f'{path} cannot be used: {type(e).__name__}: {first_line(e)}: run prepare.py again') from None
    return meta
