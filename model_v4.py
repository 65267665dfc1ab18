"""
What DeepSeek added after V3, each idea with a switch that is off by default. With all switches off the model is
model.py's, number for number. A run chooses this file by --architecture=model_v4, or by `architecture` in its config.

Papers: V3.2 = arXiv 2512.02556, mHC = arXiv 2512.24880, Engram = arXiv 2601.07372, V4 = arXiv 2606.19348.

Letters in the shape comments as in model.py, and
  d index_head_dim    J index_n_heads      k index_topk
  D n + r, V4's head size    W entries, one for each closed window of tokens    s a compressor's series
  n hc_mult, the streams of the residual (in mHC and Engram, where no head size is meant)
  N engram_ngram      R rows looked up per token: (N - 1) * engram_heads
"""

import functools
import math
import random
import re
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from torch.nn import functional as F

import model
from model import RMSNorm, compute_dtype


def sqrtsoftplus(logits):
    return F.softplus(logits).clamp(min=1e-30).sqrt()  # at 0 the root's gradient is infinite


@dataclass
class GPTConfig(model.GPTConfig):
    """model.py's fields, then those of the later ideas, named as in the released configs."""
    architecture: str = 'model_v4'
    # DeepSeek sparse attention (V3.2)
    index_topk: int = 0             # positions that a query attends to; 0: off, it attends to all
    index_n_heads: int = 4
    index_head_dim: int = -1        # -1: as an attention head; cached too, once per token and layer
    index_warmup: bool = False      # attention stays dense, and the indexer alone learns
    # V4's attention; a head has the size qk_nope_head_dim + qk_rope_head_dim
    layer_types: str = ''           # a letter for each main block: s window alone, c window and CSA, h window and HCA
    sliding_window: int = 128       # positions that every block sees, the query's own included
    compress_rate_csa: int = 4      # tokens for each entry; of CSA's entries a query reads index_topk (0: all)
    compress_rate_hca: int = 128
    compress_rope_theta: float = 160000.0  # in blocks with entries
    o_groups: int = 1               # groups of heads, each with an output projection of its own
    o_lora_rank: int = -1           # width of a group's output
    # hyper-connections (mHC)
    hc_mult: int = 0                # streams of the residual; 0 or 1: off
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    # conditional memory (Engram)
    engram_layers: str = ''         # the main blocks that look up, such as 0 or 1,3; '': off
    engram_ngram: int = 3           # what is looked up: the last 2, 3, ... engram_ngram tokens
    engram_heads: int = 1           # tables for each of these lengths
    engram_rows: int = 4096         # rows of a table: the next primes from here
    engram_dim: int = 16            # width of a row
    engram_conv: bool = True        # a short convolution over what was found
    engram_lr_scale: float = 5.0    # the tables learn with this multiple of the learning rate
    # V4's experts
    scoring_func: str = 'sigmoid'   # or 'softmax' (V2) or 'sqrtsoftplus' (V4)
    swiglu_limit: float = 0.0       # clamps gate <= limit and |up| <= limit; 0: off (V4: 10)
    num_hash_layers: int = 0        # the first blocks choose experts by token id alone

    score_fns = model.GPTConfig.score_fns | {'sqrtsoftplus': sqrtsoftplus}

    always_free, free_if_given = ('architecture', 'index_warmup'), ('index_topk', 'index_n_heads', 'index_head_dim')

    def __post_init__(self):
        super().__post_init__()
        if self.index_head_dim == -1:
            self.index_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        if self.o_lora_rank == -1:
            self.o_lora_rank = max(1, self.n_embd // max(1, self.o_groups))
        model.check_config(self, CHECKS)

    @property
    def cache_width(self):
        return super().cache_width + (self.index_head_dim if self.index_topk > 0 else 0)

    @property
    def memory_layers(self):
        return [int(layer) for layer in self.engram_layers.split(',') if layer]


CHECKS = [  # as in model.py, but after the -1 are derived
    ('architecture', lambda x, c: x == 'model_v4', "must be 'model_v4'"),
    ('index_topk', lambda x, c: 0 <= x < 2**31, 'must not be negative, nor 2**31 or more'),
    ('index_topk', lambda x, c: x == 0 or c.q_lora_rank > 0, "needs q_lora_rank above 0: the indexer's queries come "
     "from the queries' latent"),
    ('index_n_heads', lambda x, c: 0 < x < 2**31, 'must be positive, < 2**31'),
    ('index_head_dim', lambda x, c: c.qk_rope_head_dim <= x < 2**31,
     'must be at least qk_rope_head_dim={qk_rope_head_dim}, < 2**31'),
    ('layer_types', lambda x, c: x == '' or len(x) == c.n_layer and set(x) <= set('sch'),
     "must be '' or a letter s, c or h for each of the n_layer={n_layer} main blocks"),
    ('layer_types', lambda x, c: x == '' or c.q_lora_rank > 0, 'needs q_lora_rank above 0'),
    ('sliding_window compress_rate_csa compress_rate_hca compress_rope_theta o_lora_rank', lambda x, c: 0 < x < 2**31,
     'must be positive, < 2**31'),
    ('compress_rate_csa', lambda x, c: 'c' not in c.layer_types or x <= c.block_size,
     'must be at most block_size={block_size}: no window of layer_types={layer_types} would ever close'),
    ('compress_rate_hca', lambda x, c: 'h' not in c.layer_types or x <= c.block_size,
     'must be at most block_size={block_size}: no window of layer_types={layer_types} would ever close'),
    ('compress_rope_theta', lambda x, c: c.layer_types == '' or c.rope_factor == 1 or x > 2,
     'must be above 2 with rope_factor={rope_factor}'),
    ('o_groups', lambda x, c: 0 < x and c.n_head % x == 0, 'must divide n_head={n_head}'),
    ('index_warmup', lambda x, c: not x or c.index_topk > 0 and (c.layer_types == '' or 'c' in c.layer_types),
     'must be False, unless index_topk is above 0 and, if there are layer_types, one is c'),
    ('hc_mult', lambda x, c: 0 <= x <= 64, 'must lie in 0..64'),
    ('hc_sinkhorn_iters', lambda x, c: 0 < x <= 1000, 'must lie in 1..1000'),
    ('hc_eps engram_lr_scale swiglu_limit', lambda x, c: 0 <= x < 2**31, 'must not be negative, nor 2**31 or more'),
    ('engram_layers', lambda x, c: re.fullmatch(r'(\d{1,9}(,\d{1,9})*)?', x) and
     len(set(c.memory_layers)) == len(c.memory_layers) and all(layer < c.n_layer for layer in c.memory_layers),
     "must be different main blocks below n_layer={n_layer} with commas, such as '0' or '1,3', or ''"),
    ('engram_ngram', lambda x, c: 2 <= x <= 16, 'must lie in 2..16'),
    ('engram_heads engram_dim', lambda x, c: 0 < x < 2**16, 'must lie in 1..65535'),
    ('engram_heads', lambda x, c: (c.engram_ngram - 1) * x <= 256, 'times engram_ngram - 1 must be at most 256 tables'),
    ('engram_rows', lambda x, c: 0 < x < 2**31, 'must be positive, < 2**31'),
    ('num_hash_layers', lambda x, c: x == 0 or 0 < x <= c.n_layer and 0 < c.n_routed_experts and
     c.first_k_dense_replace == 0, 'must lie in 0..n_layer={n_layer}, and needs experts in these blocks: '
     'n_routed_experts > 0 and first_k_dense_replace=0'),
    ('scoring_func', lambda x, c: x != 'sqrtsoftplus' or c.n_group == 1, "needs n_group=1: V4 has no expert groups"),
]


# -----------------------------------------------------------------------------
# DeepSeek sparse attention (V3.2 section 2.1): an indexer chooses the k positions that a query attends to

class Indexer(nn.Module):
    """The lightning indexer (V3.2 eq. 1). Its inputs carry no gradient: it learns from index_loss() alone."""

    def __init__(self, config):
        super().__init__()
        J, self.d = config.index_n_heads, config.index_head_dim
        self.wq_b = nn.Linear(config.q_lora_rank, J * self.d, bias=False)
        self.wk = nn.Linear(config.n_embd, self.d, bias=False)
        self.k_norm = nn.LayerNorm(self.d, eps=1e-6)
        self.weights_proj = nn.Linear(config.n_embd, J, bias=False)

    def forward(self, x, c_q, cos, sin):
        """x (B, T, C) and the normed latent of the queries -> q (B, T, J, d), w (B, T, J), k (B, T, d), all in fp32"""
        q = self.wq_b(c_q).unflatten(-1, (-1, self.d))
        k = self.k_norm(self.wk(x).float())
        w = head_weights(x, self.weights_proj, self.d)
        return rope_halves(q, cos.unsqueeze(-2), sin.unsqueeze(-2)), w, rope_halves(k, cos, sin)


def head_weights(x, proj, d):
    """x (B, T, C) -> w of V3.2 eq. 1 (B, T, J) in fp32, with the scale of the scores"""
    with torch.autocast(x.device.type, enabled=False):
        w = F.linear(x.float(), proj.weight.float())
    return w * (w.size(-1) * d) ** -0.5


def rope_halves(x, cos, sin):
    """Rotate the pairs (x_i, x_{i + r/2}) of the first r channels, not MLA's interleaved pairs. -> x in fp32"""
    x, r = x.float(), 2 * cos.size(-1)
    a, b = x[..., :r].chunk(2, dim=-1)                                                 # (..., T, r/2) each
    return torch.cat((a * cos - b * sin, a * sin + b * cos, x[..., r:]), dim=-1)


def learns(indexer):
    """Whether index_loss() trains it: not in an evaluation, and not where it is frozen (grpo.py)"""
    return indexer.training and indexer.wq_b.weight.requires_grad


def index_scores(q, w, k, seen):
    """V3.2 eq. 1: q (B, T, J, d), w (B, T, J), k (B, S, d) -> I (B, T, S) in fp32; -inf where not seen."""
    with torch.autocast(q.device.type, enabled=False):
        dots = torch.einsum('btjd,bsd->btjs', q, k.float()).relu()
        scores = torch.einsum('btj,btjs->bts', w, dots)
    # ReLU makes exact zeros: the later position wins, in training as in decoding; other scores keep every bit
    scores = scores + 1e-30 * torch.arange(k.size(1), device=k.device)
    return scores.masked_fill(~seen, float('-inf'))


def best_of(scores, seen, k):
    """Of what is seen, (1 or B, T, S), each query's k best by its scores (B, T, S)"""
    return seen & torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(k, dim=-1).indices, True)


def index_loss(scores, attention, kept):
    """V3.2 eq. 3-4: KL(p || softmax I) over the kept positions, the mean over tokens. All three are (B, T, S);
    attention: the sum over heads, 0 where not kept. A token that keeps none adds 0.
    """
    p = attention / attention.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    log_i = scores.masked_fill(~kept, float('-inf')).log_softmax(dim=-1).masked_fill(~kept, 0)
    return F.kl_div(log_i, p, reduction='none').sum(dim=-1).mean()


class SparseMLA(model.MLA):
    """MLA over the k positions with the largest index scores (V3.2 eq. 2). The cache holds [c_kv | k_rope | k_index].
    Training and prefill compute all positions and mask; decoding reads the chosen rows alone.
    """

    def __init__(self, config):
        super().__init__(config)
        self.indexer = Indexer(config)

    def forward(self, x, cos, sin, cache=None, pos=0):
        """x (B, T, C) -> (B, T, C), and in training the indexer's loss, else None. cache: (B, S_max, c + r + d)"""
        latents = self.latents(x)
        q, latent = self.project(x, cos, sin, latents)                                 # (B, H, T, n+r), (B, T, c+r)
        c_q = self.q_a_layernorm(latents[0])
        q_index, w, k_index = self.indexer(x.detach(), c_q.detach(), cos, sin)
        seen, teaching = None, learns(self.indexer)
        if cache is not None:  # only then joined: else gradients of the indexer's loss would flow through both parts
            rows, seen = model.remember(cache, torch.cat((latent, k_index.to(latent.dtype)), dim=-1), pos)
            latent, k_index = rows.split((latent.size(-1), k_index.size(-1)), dim=-1)  # (B, S, c+r), (B, S, d)
        T, S, k = x.size(1), latent.size(1), self.config.index_topk
        sparse, loss = k < S and not self.config.index_warmup, None
        if not sparse and not teaching:
            return self.resid_dropout(self.o_proj(self.attend(q, latent, seen))), None
        past = torch.ones(T, S, dtype=torch.bool, device=x.device).tril() if seen is None else seen.view(-1, T, S)
        scores = index_scores(q_index, w, k_index, past)                               # (B, T, S)
        if seen is not None and sparse:
            y = self.attend_chosen(q, latent, scores)
        else:
            kept = best_of(scores, past, k) if sparse else past.expand_as(scores)
            y, attention = self.attend_masked(q, latent, kept, teaching)
            loss = index_loss(scores, attention, kept) if teaching else None
        return self.resid_dropout(self.o_proj(y)), loss

    def attend_masked(self, q, latent, kept, teaching):
        """attend() to the kept positions (B, T, S) -> (B, T, H*v), and if the indexer learns from it the sum of the
        heads' attention (B, T, S)
        """
        k, v = self.expand(latent)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=kept.unsqueeze(1), scale=self.scale,
                                           dropout_p=self.config.dropout if self.training else 0.0)
        attention = None
        if teaching:
            with torch.no_grad():
                logits = (q @ k.transpose(-1, -2)).float() * self.scale                # (B, H, T, S)
                attention = logits.masked_fill(~kept.unsqueeze(1), float('-inf')).softmax(dim=-1).sum(dim=1)
        return y.transpose(1, 2).flatten(2), attention

    def attend_chosen(self, q, latent, scores):
        """attend_absorbed() to the k best positions of each query, which are gathered. -> (B, T, H*v)"""
        best, chosen = scores.topk(self.config.index_topk, dim=-1)                     # (B, T, k) each
        rows = latent[row_numbers(latent, chosen), chosen]                             # (B, T, k, c+r)
        q, rows, seen = q.transpose(1, 2).flatten(0, 1), rows.flatten(0, 1), (best > float('-inf')).flatten(0, 1)
        y = self.attend_absorbed(q.unsqueeze(2), rows, seen[:, None, None])            # each query is a batch row
        return y.view(*chosen.shape[:2], -1)


# -----------------------------------------------------------------------------
# V4's attention (V4 section 2.3): one head of keys that are also the values, a sliding window, and compressed entries

class Compressor(nn.Module):
    """One entry for each window of `rate` tokens: a mean of their C, by softmax(Z + B) for each channel (V4 eq. 9-12,
    20-23). CSA has two series: an entry mixes series a of the window before with series b of its own.
    """

    def __init__(self, config, kind, width):
        super().__init__()
        self.series, self.rate = (2, config.compress_rate_csa) if kind == 'c' else (1, config.compress_rate_hca)
        self.kv_proj = nn.Linear(config.n_embd, self.series * width, bias=False)
        self.gate_proj = nn.Linear(config.n_embd, self.series * width, bias=False)
        self.position_bias = nn.Parameter(torch.zeros(self.rate, self.series * width))
        self.kv_norm = RMSNorm(width, config.rms_norm_eps)

    def forward(self, x, cos, sin, cache, place, whole):
        """x (B, T, C) at the positions place (1 or B, T) -> entries (B, W, width). cache: None, or a ring of the last
        windows' [C | Z], and the entries; what closes no window goes to their last row
        whole: x begins at the first position, else the cache has what was before. cos, sin: tables (block_size, r/2)
        """
        cz = torch.cat((self.kv_proj(x), self.gate_proj(x)), dim=-1)                   # (B, T, 2 s width)
        if cache is not None:
            ring, kept = cache
            write_ring(ring, cz, place)
        if whole:
            w = torch.arange(x.size(1) // self.rate, device=x.device)
            windows = cz[:, :len(w) * self.rate].unflatten(1, (len(w), self.rate))     # (B, W, rate, 2 s width)
            entries = self.mix(windows, windows.roll(1, dims=1), w, cos, sin).to(cz.dtype)
            if cache is not None:
                kept[:, :len(w)] = entries
            return entries
        w = place // self.rate                                                         # each token's window
        slots = (w * self.rate).unsqueeze(-1) + torch.arange(-self.rate, self.rate, device=x.device)
        found = ring[row_numbers(x, slots), slots[..., -self.series * self.rate:] % ring.size(1)]
        entry = self.mix(found[:, :, -self.rate:], found[:, :, :self.rate], w, cos, sin)   # (B, T, width)
        closed = (place + 1) % self.rate == 0  # a draft's entry is written again with its position's next token
        kept[row_numbers(x, w), torch.where(closed, w, kept.size(1) - 1)] = entry.to(kept.dtype)
        return kept[:, :-1]

    def mix(self, windows, before, w, cos, sin):
        """[C | Z] of the windows w and of those before them (B, W, rate, 2 s width) -> entries (B, W, width)"""
        (c, z), (c_a, z_a) = (x.float().chunk(2, dim=-1) for x in (windows, before))
        z, z_a = z + self.position_bias.float(), z_a + self.position_bias.float()
        if self.series == 2:
            width = c.size(-1) // 2
            z_a = z_a.masked_fill((w == 0)[..., None, None], float('-inf'))            # nothing is before window 0
            c, z = (torch.cat((a[..., :width], b[..., width:]), dim=-2) for a, b in ((c_a, c), (z_a, z)))
        at = (w * self.rate).clamp(max=len(cos) - 1)
        return rope_last(self.kv_norm((c * z.softmax(dim=-2)).sum(dim=-2)), cos[at], sin[at])


class EntryIndexer(nn.Module):
    """CSA's lightning indexer (V4 eq. 13-17): it scores entries of its own compressor. Trained as V3.2's."""

    def __init__(self, config):
        super().__init__()
        J, self.d = config.index_n_heads, config.index_head_dim
        self.wq_b = nn.Linear(config.q_lora_rank, J * self.d, bias=False)
        self.weights_proj = nn.Linear(config.n_embd, J, bias=False)
        self.compressor = Compressor(config, 'c', self.d)

    def forward(self, x, c_q, rope, *compressing):
        """x (B, T, C), c_q the normed latent of the queries -> q (B, T, J, d), w (B, T, J), k (B, W, d)"""
        q = rope_last(self.wq_b(c_q).unflatten(-1, (-1, self.d)).float(), *rope)
        return q, head_weights(x, self.weights_proj, self.d), self.compressor(x, *compressing)


class Attention(nn.Module):
    """V4's attention. Its cache is a list of tensors, batch first, whose sizes but for the entries' do not grow."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.kind = config, config.layer_types[layer] if layer < config.n_layer else 's'  # MTP: s
        # tokens that the rings can take without losing what the first of them reads
        self.at_a_time = 1 + config.num_nextn_predict_layers
        C, H, D, G = config.n_embd, config.n_head, config.qk_nope_head_dim + config.qk_rope_head_dim, config.o_groups
        self.q_a_proj = nn.Linear(C, config.q_lora_rank, bias=config.bias)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.q_b_proj = nn.Linear(config.q_lora_rank, H * D, bias=False)
        self.kv_proj = nn.Linear(C, D, bias=config.bias)
        self.kv_norm = RMSNorm(D, config.rms_norm_eps)
        self.sinks = nn.Parameter(torch.zeros(H))
        self.compressor = Compressor(config, self.kind, D) if self.kind != 's' else None
        self.indexer = EntryIndexer(config) if self.kind == 'c' and config.index_topk > 0 else None
        self.o_a_proj = nn.Linear(H // G * D, G * config.o_lora_rank, bias=False)      # each group has its own rows
        self.o_proj = nn.Linear(G * config.o_lora_rank, C, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def make_cache(self, zeros, length):
        """zeros(rows, width) -> an empty tensor (B, rows, width). A ring has room for the drafts of a pass behind its
        newest token, so that what they write is never seen: their rows are those of positions that no query reads.
        """
        def ring(rows, width):
            return zeros(min(rows, length) + self.at_a_time, width)

        cache = [ring(self.config.sliding_window, self.kv_proj.out_features)]
        for part in filter(None, (self.compressor, self.indexer and self.indexer.compressor)):
            width = part.position_bias.size(1)
            cache += [ring(part.series * part.rate, 2 * width), zeros(length // part.rate + 1, width // part.series)]
        return cache

    def forward(self, x, cos, sin, cache=None, pos=0):
        """x (B, T, C) -> (B, T, C), and in training the indexer's loss, else None. cos, sin: GPT's whole tables
        cache: from make_cache(), written in place, or None. pos: see run_blocks()
        """
        cfg, T, n, whole = self.config, x.size(1), self.at_a_time, isinstance(pos, int) and pos == 0
        if isinstance(pos, int) and pos > 0 and T > n:
            return torch.cat([self(x[:, i:i + n], cos, sin, cache, pos + i)[0] for i in range(0, T, n)], dim=1), None
        place = torch.arange(pos, pos + T, device=x.device).unsqueeze(0) if isinstance(pos, int) else pos
        cos, sin = (table.chunk(2, dim=-1)[self.kind != 's'] for table in (cos, sin))  # (block_size, r/2)
        at = place.clamp(max=len(cos) - 1)
        rope = cos[at].unsqueeze(2), sin[at].unsqueeze(2)                              # (1 or B, T, 1, r/2)
        c_q = self.q_a_layernorm(self.q_a_proj(x))
        kv = self.kv_norm(self.kv_proj(x))                                             # (B, T, D)
        q = rms(self.q_b_proj(c_q).unflatten(-1, (-1, kv.size(-1))), cfg.rms_norm_eps).to(kv.dtype)
        q, rows = rope_last(q, *rope), rope_last(kv.unsqueeze(2), *rope).squeeze(2)    # (B, T, H, D), (B, T, D)
        if cache is not None:
            write_ring(cache[0], rows, place)
        rows = rows if whole else cache[0]
        age = (place.unsqueeze(-1) - torch.arange(rows.size(1), device=x.device)) % rows.size(1)
        parts = [(rows, (age < cfg.sliding_window) & (age <= place.unsqueeze(-1)))]
        if self.compressor is not None:
            entries = self.compressor(x, cos, sin, cache and cache[1:3], place, whole)         # (B, W, D)
            seen = torch.arange(entries.size(1), device=x.device) < ((place + 1) // self.compressor.rate).unsqueeze(-1)
            if self.indexer is not None:
                q_index, w, k = self.indexer(x.detach(), c_q.detach(), rope, cos, sin, cache and cache[3:], place,
                                             whole)
                scores = index_scores(q_index, w, k, seen)                             # (B, T, W)
                entries, seen = self.choose(entries, seen, scores, whole)
            parts.append((entries, seen))
        y, weights = self.attend(q, parts)
        loss = None
        if self.indexer is not None and learns(self.indexer):
            loss = index_loss(scores, weights[1].detach().sum(dim=2), seen.expand_as(scores))
        y = rope_last(y, rope[0], -rope[1]).flatten(2).unflatten(-1, (cfg.o_groups, -1))       # (B, T, G, H/G D)
        w = self.o_a_proj.weight.unflatten(0, (cfg.o_groups, -1)).to(y.dtype)
        return self.resid_dropout(self.o_proj(torch.einsum('btgi,goi->btgo', y, w).flatten(2))), loss

    def choose(self, entries, seen, scores, whole):
        """-> the entries of which a query reads the k best: all, with a mask; or, decoding, (B, T, k, D) of them"""
        k = self.config.index_topk
        if k >= entries.size(1) or self.config.index_warmup:
            return entries, seen
        if whole:
            return entries, best_of(scores, seen, k)
        best, chosen = scores.topk(k, dim=-1)                                          # (B, T, k)
        return entries[row_numbers(entries, chosen), chosen], best > float('-inf')

    def attend(self, q, parts):
        """q (B, T, H, D) attends to parts: rows (B, S, D), or (B, T, S, D) if each query has its own, and which are
        seen (1 or B, T, S). -> (B, T, H, D), and each part's weights (B, T, H, S)
        """
        names = ['bsd' if rows.dim() == 3 else 'btsd' for rows, _ in parts]
        logits = [torch.einsum(f'bthd,{name}->bths', q, rows).float().masked_fill(~seen.unsqueeze(2), float('-inf'))
                  for name, (rows, seen) in zip(names, parts)]
        sinks = self.sinks.float().unsqueeze(-1).expand(*q.shape[:3], 1)
        weights = torch.cat([x * q.size(-1) ** -0.5 for x in logits] + [sinks], dim=-1).softmax(dim=-1)
        weights = weights.split([x.size(-1) for x in logits] + [1], dim=-1)
        y = sum(torch.einsum(f'bths,{name}->bthd', F.dropout(x, self.config.dropout, self.training).to(q.dtype), rows)
                for name, x, (rows, _) in zip(names, weights, parts))
        return y, weights


def rope_last(x, cos, sin):
    """apply_rope() on the last r channels"""
    r = 2 * cos.size(-1)
    return torch.cat((x[..., :-r], model.apply_rope(x[..., -r:], cos, sin)), dim=-1)


def row_numbers(x, places):
    """-> the rows' numbers (B, 1, ...), to index x (B, S, ...) together with places (1 or B, T, ...)"""
    return torch.arange(len(x), device=x.device).view(-1, *[1] * (places.dim() - 1))


def write_ring(ring, rows, place):
    """Write rows (B, T, w) into a ring (B, R, w): position p stands in row p % R."""
    R = ring.size(1)
    place = place[:, -R:] % R
    ring[row_numbers(ring, place), place] = rows[:, -R:].to(ring.dtype)


def rope_tables(config):
    """As model.rope_table(), but two tables side by side (block_size, r): for blocks without entries, then for blocks
    with entries. The second has YaRN, which leaves the size of the numbers alone.
    """
    plain = model.rope_table(replace(config, rope_factor=1.0))
    slow = model.rope_table(replace(config, rope_theta=config.compress_rope_theta, rope_mscale=1.0,
                                    rope_mscale_all_dim=1.0))
    return [torch.cat(pair, dim=-1) for pair in zip(plain, slow)]


# -----------------------------------------------------------------------------
# mHC: the residual is n streams, mixed by doubly stochastic matrices

class HyperConnection(nn.Module):
    """What one sublayer reads from the n streams, and how its output and the streams are mixed (mHC section 4)."""

    def __init__(self, config):
        super().__init__()
        n = config.hc_mult
        self.iters, self.eps, self.norm_eps = config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps
        self.fn = nn.Parameter(torch.empty(n + n + n * n, n * config.n_embd))
        self.base = nn.Parameter(torch.zeros(n + n + n * n))
        self.scale = nn.Parameter(torch.full((3,), 0.01))

    def forward(self, x):
        """x (B, T, n, C) -> the sublayer's input (B, T, C), post (B, T, n) and comb (B, T, n, n), these two in fp32"""
        pre, post, comb = self.weights(x)
        return weighted(x, pre), post, comb

    def weights(self, x):
        """x (B, T, n, C) -> pre (B, T, n), post (B, T, n) and comb (B, T, n, n), in fp32"""
        n = x.size(2)
        sizes = n, n, n * n
        pre, post, comb = (part * scale + base for part, scale, base in zip(
            stream_weights(x, self.fn, self.norm_eps).split(sizes, dim=-1), self.scale.float(),
            self.base.float().split(sizes)))
        comb = sinkhorn(comb.unflatten(-1, (n, n)), self.iters, self.eps)
        return pre.sigmoid() + self.eps, 2 * post.sigmoid(), comb


def stream_weights(x, fn, eps):
    """x (B, T, n, C) -> linear functions of the normed streams (B, T, len(fn)), in fp32"""
    with torch.autocast(x.device.type, enabled=False):
        x = x.float().flatten(2)                                            # (B, T, n C)
        # the norm has no weight, so it may follow the product, where a token has fewer numbers
        return F.linear(x, fn.float()) * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()


def rms(x, eps):
    """RMSNorm without a weight, in fp32"""
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps)


def weighted(x, weights):
    """x (B, T, n, C), weights (B, T, n) -> the weighted sum of the streams (B, T, C)"""
    return (weights.unsqueeze(-1) * x).sum(dim=2).to(x.dtype)


def sinkhorn(logits, iters, eps):
    """logits (..., n, n) -> matrices whose columns sum to 1, and nearly so the rows (Sinkhorn-Knopp)"""
    comb = logits.softmax(dim=-1) + eps
    comb = comb.flatten(0, -3).permute(1, 2, 0).contiguous()                # (n, n, B T): long loops, not n steps each
    comb = comb / (comb.sum(dim=0, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(dim=1, keepdim=True) + eps)
        comb = comb / (comb.sum(dim=0, keepdim=True) + eps)
    return comb.permute(2, 0, 1).view(logits.shape)                         # (..., n, n)


def connect(x, y, post=None, comb=None):
    """X' = post y + comb^T X: streams x (B, T, n, C) and a sublayer's output y (B, T, C) -> (B, T, n, C)
    Without weights x + y, both (B, T, C).
    """
    if post is None:
        return x + y
    with torch.autocast(x.device.type, enabled=False):
        weights = torch.cat((comb.transpose(-1, -2), post.unsqueeze(-1)), dim=-1)   # (B, T, n, n + 1)
        return (weights @ torch.cat((x, y.unsqueeze(2)), dim=2).float()).to(x.dtype)


class StreamNorm(RMSNorm):
    """The last norm, before the output head: first it contracts the n streams to their weighted sum."""

    def __init__(self, config):
        super().__init__(config.n_embd, config.rms_norm_eps)
        n = config.hc_mult
        self.hc_eps = config.hc_eps
        self.hc_fn = nn.Parameter(torch.zeros(n, n * config.n_embd))
        self.hc_base = nn.Parameter(torch.zeros(n))
        self.hc_scale = nn.Parameter(torch.full((1,), 0.01))

    def forward(self, x):
        """(B, T, n, C) -> (B, T, C)"""
        weights = stream_weights(x, self.hc_fn, self.eps) * self.hc_scale.float() + self.hc_base.float()
        return super().forward(weighted(x, weights.sigmoid() + self.hc_eps))


# -----------------------------------------------------------------------------
# Engram: rows of tables, found by hashing the last tokens

class Engram(nn.Module):
    """Conditional memory (Engram section 2): what the last 2, ..., N tokens have in their tables joins the residual."""

    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        N, V, C, n = config.engram_ngram, config.vocab_size, config.n_embd, max(1, config.hc_mult)
        self.primes = table_sizes(config)[layer]  # R of them
        rng = random.Random(10007 * layer)
        # odd, and small enough that no product with a token id overflows 63 bits
        self.multipliers = [2 * rng.randrange((2**62 - 1) // (V + 1)) + 1 for _ in range(N)]
        # each token's id in the hash (V: no token, before the first); two tokens with one id share their rows
        self.register_buffer('canonical', torch.arange(V + 1))
        self.table = nn.Embedding(sum(self.primes), config.engram_dim)
        self.k_proj = nn.Linear(len(self.primes) * config.engram_dim, n * C, bias=False)
        self.v_proj = nn.Linear(len(self.primes) * config.engram_dim, C, bias=False)
        self.k_norm = nn.Parameter(torch.ones(n * C))
        self.h_norm = nn.Parameter(torch.ones(n * C))
        if config.engram_conv:
            self.conv_norm = nn.Parameter(torch.ones(n * C))
            self.conv = nn.Parameter(torch.zeros(4, n * C))  # kernel 4, for each channel

    def forward(self, h, tokens, cache=None, pos=0):
        """h (B, T, C) or streams (B, T, n, C), tokens (B, T, N): see look_back() -> what joins h, of its shape.
        cache (B, R, n C): a ring of the convolution's inputs, written in place
        """
        C, eps = self.config.n_embd, self.config.rms_norm_eps
        x = h.unflatten(-1, (-1, C)) if h.dim() == 3 else h                 # (B, T, n, C)
        e = self.table(self.rows(self.canonical[tokens])).flatten(-2)       # (B, T, R * engram_dim)
        v = self.gate(x, e) * self.v_proj(e).unsqueeze(2)                   # (B, T, n, C)
        if self.config.engram_conv:
            z = (rms(v, eps) * self.conv_norm.view(-1, C)).flatten(2).to(compute_dtype(h))   # (B, T, n C)
            steps = [k * self.config.engram_ngram for k in range(4)]        # dilation N
            past = zip(self.conv, look_back(z, steps, 0, cache, pos))
            v = v + F.silu(sum(weight * row for weight, row in past)).view_as(v)
        return v.view_as(h).to(h.dtype)

    def gate(self, x, e):
        """Streams x (B, T, n, C), the rows that were found e (B, T, R * engram_dim) -> gates (B, T, n, 1) in fp32"""
        C, eps = self.config.n_embd, self.config.rms_norm_eps
        key = rms(self.k_proj(e).unflatten(-1, (-1, C)), eps) * self.k_norm.view(-1, C)
        a = (key * rms(x, eps) * self.h_norm.view(-1, C)).sum(dim=-1, keepdim=True) / math.sqrt(C)
        return (a.abs().clamp(min=1e-6).sqrt() * a.sign()).sigmoid()

    def rows(self, tokens):
        """Canonical tokens (B, T, N) -> for each length and head a row of the joint table, (B, T, R)"""
        found, start, mix = [], 0, tokens[..., 0] * self.multipliers[0]
        for k, primes in enumerate(zip(*[iter(self.primes)] * self.config.engram_heads), start=1):
            mix = mix ^ tokens[..., k] * self.multipliers[k]
            for prime in primes:
                found.append(start + mix % prime)
                start += prime
        return torch.stack(found, dim=-1)


def table_sizes(config):
    """{layer: the sizes of its R tables}: all different primes, so that two tables seldom confuse the same tokens"""
    sizes, prime = {}, config.engram_rows - 1
    for layer in sorted(config.memory_layers):
        sizes[layer] = []
        for _ in range((config.engram_ngram - 1) * config.engram_heads):
            prime += 1
            while prime < 2 or any(prime % d == 0 for d in range(2, math.isqrt(prime) + 1)):
                prime += 1
            sizes[layer].append(prime)
    return sizes


def look_back(x, steps, before, cache, pos):
    """x (B, T, ...) at the positions pos.. -> for each of `steps` the rows that many positions earlier, (B, T, ...);
    `before` stands before the first position. cache: a ring (B, R, ...) of earlier rows, which x is written into, or
    None. R is at least the largest step, and as many tokens as are decoded at a time
    """
    T, m = x.size(1), max(steps)
    if isinstance(pos, torch.Tensor):
        write_ring(cache, x, pos)
        row, known = row_numbers(x, pos), pos.view(*pos.shape, *[1] * (x.dim() - 2))   # (B, 1), (B, T, 1, ...)
        return [torch.where(known >= k, cache[row, (pos - k) % cache.size(1)], before) for k in steps]
    rows = torch.cat((torch.full_like(x[:, :1], before).expand(-1, m, *x.shape[2:]), x), dim=1)  # (B, m + T, ...)
    if cache is not None:
        place = torch.arange(max(0, pos - m), pos, device=x.device)
        rows[:, m - len(place):m] = cache[:, place % cache.size(1)]
        write_ring(cache, x, torch.arange(pos, pos + T, device=x.device).unsqueeze(0))
    return [rows[:, m - k:m - k + T] for k in steps]


# -----------------------------------------------------------------------------
# V4's experts

class HashMoE(model.MoE):
    """V4's first blocks (V4 section 2.1): a fixed table says which experts a token has; the router gives the gates."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer('tid2eid', torch.zeros(config.vocab_size, config.num_experts_per_tok, dtype=torch.long))

    def forward(self, x, tokens):
        """x (B, T, C), tokens (B, T, N), the newest first -> as in model.py"""
        y, routing = super().forward(x, self.tid2eid[tokens[..., 0].flatten()])
        return y, routing and (routing[0].detach(), routing[1])  # the scores choose nothing that could be balanced


def balanced_table(n_tokens, n_experts, k):
    """-> (n_tokens, k): different experts for each token, at random, and each expert as often as the others"""
    place = torch.randperm(n_tokens).unsqueeze(1) * k + torch.arange(k)
    return torch.randperm(n_experts)[place % n_experts]


# -----------------------------------------------------------------------------
# the model of these parts

class Block(model.Block):
    def __init__(self, config, layer):
        mla = SparseMLA if config.index_topk > 0 else model.MLA
        if config.layer_types:
            mla = functools.partial(Attention, layer=layer)
        super().__init__(config, layer, mla, HashMoE if layer < config.num_hash_layers else model.MoE)
        self.layer, streams = layer, config.hc_mult > 1
        self.attn_hc = HyperConnection(config) if streams else None
        self.ffn_hc = HyperConnection(config) if streams else None
        self.engram = Engram(config, layer) if layer in config.memory_layers else None

    def forward(self, x, cos, sin, cache=None, pos=0, tokens=None, convolved=None, tables=None):
        """As in model.py, but with mHC x is n streams (B, T, n, C). tokens and convolved: from GPT.recent()
        tables: GPT's whole tables of cos and sin, for V4's attention.
        Third in the routing is the indexer's loss. Compiled and recomputed blocks would lose what they kept aside.
        """
        if self.engram is not None:
            x = x + self.engram(x, tokens, convolved.get(self.layer), pos)
        h, *mix = self.attn_hc(x) if self.attn_hc else (x,)
        y = self.attn(self.input_layernorm(h), *(tables or (cos, sin)), cache, pos)
        y, index_loss = y if isinstance(y, tuple) else (y, None)
        x = connect(x, y, *mix)
        h, *mix = self.ffn_hc(x) if self.ffn_hc else (x,)
        h = self.post_attention_layernorm(h)
        y = self.mlp(h, tokens) if isinstance(self.mlp, HashMoE) else self.mlp(h)
        y, routing = y if isinstance(self.mlp, model.MoE) else (y, None)
        return connect(x, self.dropout(y), *mix), (*(routing or (None, None)), index_loss) if self.training else None


class MTP(model.MTP):
    """With mHC the module's combined input is copied into n streams, and a head of its own contracts them: its norm."""

    def __init__(self, config, block):
        super().__init__(config, block)
        if config.hc_mult > 1:
            self.norm = StreamNorm(config)


CONSTANT = (dict.fromkeys(('k_norm', 'h_norm', 'conv_norm'), 1.0) | dict.fromkeys(('scale', 'hc_scale'), 0.01) |
            dict.fromkeys(('base', 'hc_base', 'hc_fn', 'conv', 'sinks', 'position_bias'), 0.0))


class GPT(model.GPT):
    """model.py's, with the parts above. What it adds to the table of initial values:

    | parameter                                            | distribution | std or value      |
    |------------------------------------------------------|--------------|-------------------|
    | fn of a HyperConnection, tables and k, v of Engram   | normal       | initializer_range |
    | scales of mHC; its bases, hc_fn, Engram's convolution | constant    | 0.01; 0           |
    | sinks and position_bias of V4's attention            | constant     | 0                 |
    | tid2eid                                              | random, each expert as often as the others |
    """
    config_class, block, module = GPTConfig, Block, MTP

    def __init__(self, config):
        super().__init__(config)
        if config.hc_mult > 1:
            self.transformer.ln_f = StreamNorm(config)
        for name, buffer in self.named_buffers():
            if name.endswith('tid2eid'):
                self.initialise(name, buffer)
        self.index_losses = []  # of each block, set by main_stack() and mtp_module() for training_loss()
        if config.index_warmup:
            for name, p in self.named_parameters():
                p.requires_grad_('.indexer.' in name)

    def tables(self):
        if not self.config.layer_types:
            return super().tables()
        return dict(zip(('rope_cos', 'rope_sin'), rope_tables(self.config)))

    def run_blocks(self, blocks, x, cache, pos, tokens=None, convolved=None):
        if self.config.hc_mult > 1:
            x = x.unsqueeze(2).repeat(1, 1, self.config.hc_mult, 1)         # (B, T, n, C)
        tables = (self.rope_cos, self.rope_sin) if self.config.layer_types else None
        x, found = super().run_blocks(blocks, x, cache, pos, tokens, convolved, tables)
        self.index_losses += [index_loss for *_, index_loss in found if index_loss is not None]
        return x, [routing for *routing, _ in found if routing[0] is not None]

    def main_stack(self, idx, cache=None, pos=0):
        self.index_losses = []
        x = self.transformer.drop(self.transformer.wte(idx))
        x, routing = self.run_blocks(self.transformer.h, x, cache, pos, *self.recent(idx, cache, pos))
        return self.transformer.ln_f(x), routing

    def training_loss(self, *args, **kwargs):
        """As model.GPT.training_loss(), and the losses of the indexers. `stats` gets `index_loss`, the blocks' mean."""
        loss = super().training_loss(*args, **kwargs)
        if self.index_losses:
            index_losses = torch.stack(self.index_losses)
            loss, self.index_losses = loss + index_losses.sum(), []  # each indexer has a loss of its own
            self.stats['index_loss'] = index_losses.detach().mean()
        return loss

    def update_balance(self, load):
        if not self.config.index_warmup:
            super().update_balance(load)

    def recent(self, idx, cache, pos):
        """-> the last N tokens at each position of idx (B, T, N), the newest first, and by layer the cache of Engram's
        convolution, (B, R, n C). Without Engram N is 1.
        """
        layers = self.config.memory_layers
        if not layers:
            return idx.unsqueeze(-1), {}
        kept = [None] if cache is None else cache[-1 - len(layers) * self.config.engram_conv:]
        tokens = look_back(idx, range(self.config.engram_ngram), self.config.vocab_size, kept[0], pos)
        return torch.stack(tokens, dim=-1), dict(zip(layers, kept[1:]))

    def make_cache(self, batch_size, length, blocks=None, device=None):
        """As in model.py, but for V4's attention a list of tensors for each block. With Engram, behind the blocks, the
        tokens (B, length), and for each of its layers a ring of its convolution's inputs (B, R, n C).
        """
        cfg, w = self.config, self.lm_head.weight

        def zeros(*size, dtype=None):
            return torch.zeros(batch_size, *size, dtype=dtype or compute_dtype(w), device=device or w.device)

        if cfg.layer_types:
            cache = [block.attn.make_cache(zeros, length) for block in self.blocks()[:blocks or cfg.n_layer]]
        else:
            cache = super().make_cache(batch_size, length, blocks, device)
        if cfg.memory_layers:
            cache.append(zeros(length, dtype=torch.long))
            ring = min(length, 3 * cfg.engram_ngram) + 1 + cfg.num_nextn_predict_layers     # as V4's attention has them
            cache += [zeros(ring, max(1, cfg.hc_mult) * cfg.n_embd) for _ in cfg.memory_layers if cfg.engram_conv]
        return cache

    @torch.no_grad()
    def initialise(self, name, p):
        """Initialise one parameter, or one buffer of a checkpoint, by GPT's table."""
        last = name.rpartition('.')[2]
        if last in CONSTANT:
            p.fill_(CONSTANT[last])
        elif last == 'fn':
            p.normal_(std=self.config.initializer_range)
        elif isinstance(self.get_submodule(name.rpartition('.')[0]), nn.LayerNorm):
            p.fill_(float(last == 'weight'))
        elif last == 'canonical':
            p.copy_(torch.arange(len(p)))
        elif last == 'tid2eid':
            p.copy_(balanced_table(len(p), self.config.n_routed_experts, p.size(1)))
        else:
            super().initialise(name, p)

    def load_state_dict(self, state_dict, *args, **kwargs):
        """A checkpoint without an indexer leaves this model's as it is: the warm-up begins there."""
        new = {name: x for name, x in self.state_dict().items() if '.indexer.' in name and name not in state_dict}
        if any(x.is_meta for x in new.values()):
            raise model.Mistake('the checkpoint has no indexer: begin the warm-up without shard and expert_parallel')
        return super().load_state_dict(dict(state_dict) | new, *args, **kwargs)

    def get_num_active_params(self):
        """As in model.py; of Engram's tables a token uses R rows."""
        idle = sum(m.table.weight.numel() - m.k_proj.in_features for m in self.memories())
        return super().get_num_active_params() - idle

    def flops_per_token(self):
        """As in model.py; a row that is looked up is no product."""
        return super().flops_per_token() - 6 * sum(m.k_proj.in_features for m in self.memories())

    def memories(self):
        return [block.engram for block in self.blocks() if block.engram is not None]

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """As in model.py; Engram's tables learn faster, and do not decay."""
        optimizer = super().configure_optimizers(weight_decay, learning_rate, betas, device_type)
        tables = [m.table.weight for m in self.memories() if m.table.weight.requires_grad]
        if tables:
            matrices = optimizer.param_groups[0]
            matrices['params'] = [p for p in matrices['params'] if all(p is not table for table in tables)]
            optimizer.add_param_group({'params': tables, 'weight_decay': 0.0,
                                       'lr_scale': self.config.engram_lr_scale})
        return optimizer
