"""
What inside.py draws of model_v4.py: the positions that an indexer chose, the windows, entries and sinks of V4's
attention, the mixing of streams by hyper-connections, and the gate of the memory. T: the rows that are shown.
"""

import contextlib
import math

import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import model_v4
from extras import decode
from extras.attention_maps import attention_of, head_numbers, pack, rounded, score_parts, weight_map

METHODS = {model_v4.Attention: 'attend', model_v4.HyperConnection: 'weights', model_v4.Engram: 'gate'}


@contextlib.contextmanager
def recorded(model):
    """-> {part: (arguments, result)} of the last call of its method in METHODS, for each such part of the model"""
    found = {}

    def keep(part, name):
        compute = getattr(part, name)

        def method(*args):
            found[part] = args, compute(*args)
            return found[part][1]

        setattr(part, name, method)

    parts = [(part, METHODS[type(part)]) for part in model.modules() if type(part) in METHODS]
    for part in parts:
        keep(*part)
    yield found
    for part, name in parts:
        delattr(part, name)


def chosen_positions(attn, x, cos, sin):
    """x (1, T, C) into SparseMLA -> the positions that its indexer chooses for each query (T, T), bool"""
    T = x.size(1)
    q, w, k = attn.indexer(x, attn.q_a_layernorm(attn.latents(x)[0]), cos, sin)
    past = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
    return model_v4.best_of(model_v4.index_scores(q, w, k, past)[0], past, min(attn.config.index_topk, T))


def window_and_entries(record, T):
    """What Attention.attend() got and gave -> its weights on the window's tokens (H, T, T), on the entries (H, T, W)
    and on the sink (H, T), and the entries that each query reads (T, W), bool. W is 0 without a closed window.
    """
    (_, parts), (_, weights) = record
    window, *entries, sink = (x[0, :T].transpose(0, 1) for x in weights)                # (H, T, ...) each
    window, sink = window[..., :T], sink.squeeze(-1)
    if not entries:
        return window, window[..., :0], sink, window[0, :, :0] > 0
    return window, entries[0], sink, parts[1][1][0, :T]


def sparse_attention_of(model, attn, x, cell):
    """As attention_of(), and what the indexer of model_v4.py's sparse attention chose."""
    T = x.size(1)
    nope, rope = score_parts(model, attn, x)
    chosen = chosen_positions(attn, x, model.rope_cos[:T], model.rope_sin[:T])
    dense = (nope + rope).masked_fill(~torch.ones_like(chosen).tril(), -math.inf).softmax(dim=-1)
    shown = attention_of(nope, rope, cell, None if attn.config.index_warmup else chosen)
    return shown | {'chosen': pack(bits(chosen), 8), 'topk': attn.config.index_topk,
                    'warmup': attn.config.index_warmup, 'held': rounded((dense * chosen).sum(dim=-1).mean(dim=0))}


def window_attention_of(attn, record, T, cell):
    """V4's attention: maps of the window and of the entries, each entry's weight spread over its tokens."""
    window, entries, sink, read = window_and_entries(record, T)
    half = slice(T // 2, T)
    numbers = {**head_numbers(window), 'sink': rounded(sink[:, half].mean(dim=1)),
               'entries': rounded(entries[:, half].sum(dim=-1).mean(dim=1))}
    shown = {'cells': -(-T // cell), 'cell': cell, 'weights': weight_map(window, cell), 'numbers': numbers,
             'window': attn.config.sliding_window, 'kind': attn.kind, 'sink': pack(sink, 16)}
    if entries.size(-1) > 0:
        rate = attn.compressor.rate
        shown |= {'rate': rate, 'entries': weight_map(over_tokens(entries, rate), cell),
                  'share': pack(entries.sum(dim=-1), 16), 'read': pack(bits(read), 8)}
    return shown


def over_tokens(entries, rate):
    """Weights on entries (H, T, W) -> on tokens (H, T, T): an entry's weight spread evenly over its window's tokens"""
    T = entries.size(1)
    return F.pad((entries / rate).repeat_interleave(rate, dim=-1), (0, T))[..., :T]


def bits(mask):
    """(T, S), bool -> bytes (T, S / 8, rounded up), the lowest bit first"""
    mask = F.pad(mask.long(), (0, -mask.size(1) % 8)).unflatten(1, (-1, 8))             # (T, S/8, 8)
    return (mask << torch.arange(8, device=mask.device)).sum(dim=-1)


def mixing(block, found, T):
    """[pre | post | comb] of the hyper-connections before attention and FFN, (T, n + n + n*n) each; or nothing"""
    parts = [found[part][1] for part in (getattr(block, 'attn_hc', None), getattr(block, 'ffn_hc', None)) if part]
    return [torch.cat((pre[0, :T], post[0, :T], comb[0, :T].flatten(1)), dim=1) for pre, post, comb in parts]


def memory_gate(block, found, T):
    """The gate of each stream (T, n), or None in a block without a memory"""
    memory = getattr(block, 'engram', None)
    return found[memory][1][0, :T, :, 0] if memory else None


def route(moe, x, tokens):
    """MoE.route(); in V4's first blocks a table says which experts the tokens (N,) have."""
    return moe.route(x, moe.tid2eid[tokens]) if hasattr(moe, 'tid2eid') else moe.route(x)


def has_rings(model):
    return getattr(model.config, 'layer_types', '') != ''


def read_prefixes(model, s, places):
    """Rings hold the last positions alone: each row of the State reads the text before its place, (B,), anew."""
    for row, place in enumerate(places.tolist()):
        decode.read(model, s, s.tokens, slice(row, row + 1), place, len(model.mtp))


def cache_bytes(model, T, size):
    """Bytes of the main blocks' caches for 1 .. T tokens, with numbers of `size` bytes"""
    def numbers(length):
        return sum(x.numel() for x in tree_leaves(model.make_cache(1, length, device='meta')[:model.config.n_layer]))
    return [size * numbers(length) for length in range(1, T + 1)]
