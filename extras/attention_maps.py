"""
The attention maps of inside.py's page, and the packing of its numbers. H heads, T tokens. A map is a lower triangle of
cells, row by row; a cell covers cell x cell numbers.
"""

import base64
import math

import torch
from torch.nn import functional as F


def pack(x, bits=16):
    """A tensor of numbers >= 0 -> its shape, and the base64 of its numbers, each rounded to a multiple of `scale`."""
    top = 2 ** bits - 1
    scale = max(x.max().item(), 1e-9) / top if x.is_floating_point() else 1
    steps = (x / scale).round().long().cpu().numpy().astype(f'<u{bits // 8}')
    return {'shape': list(x.shape), 'bits': bits, 'scale': scale, 'data': base64.b64encode(steps.tobytes()).decode()}


def rounded(x, digits=4):
    """A tensor as lists of numbers; they are finite, or JSON could not hold them."""
    return [rounded(row, digits) for row in x] if x.dim() > 0 else round(x.item(), digits)


def score_parts(model, attn, x):
    """x (1, T, C) -> the two parts of the attention scores, before the softmax: nope and rope (H, T, T). V3 eq. 10"""
    T, n = x.size(1), attn.config.qk_nope_head_dim
    q, latent = attn.project(x, model.rope_cos[:T], model.rope_sin[:T])
    k, _ = attn.expand(latent)                                                         # (1, H, T, n+r), as q
    nope = q[..., :n] @ k[..., :n].transpose(-1, -2)                                   # (1, H, T, T)
    rope = q[..., n:] @ k[..., n:].transpose(-1, -2)
    return attn.scale * nope[0], attn.scale * rope[0]


def in_cells(x, cell):
    """The sum over each cell of cell x cell numbers: (H, T, T) -> (H, n (n + 1) / 2), the lower triangle row by row."""
    n = -(-x.size(1) // cell)
    rows, columns = torch.tril_indices(n, n, device=x.device)
    more = n * cell - x.size(1)
    x = F.pad(x, (0, more, 0, more)).unflatten(2, (n, cell)).unflatten(1, (n, cell))
    return x.sum(dim=(2, 4))[:, rows, columns]                                         # (H, n, cell, n, cell)


def weight_map(weights, cell):
    """Attention weights (H, T, T) -> a map of their roots, because small ones are many; means over a cell's queries."""
    n = -(-weights.size(1) // cell)
    queries = torch.full((n,), cell, device=weights.device)
    queries[-1] = weights.size(1) - cell * (n - 1)
    rows, _ = torch.tril_indices(n, n, device=weights.device)
    return pack((in_cells(weights, cell) / queries[rows]).clamp(min=0).sqrt(), 8)


def head_numbers(weights):
    """Attention weights (H, T, T) -> means over the second half of the queries, for each head"""
    T = weights.size(1)
    half, place = torch.arange(T // 2, T, device=weights.device), torch.arange(T, device=weights.device)
    numbers = {'itself': weights[:, half, half], 'previous': weights[:, half, (half - 1).clamp(min=0)],
               'first': weights[:, half, 0],
               'back': (weights * (place[:, None] - place).float()).sum(dim=-1)[:, half]}
    return {name: rounded(x.mean(dim=1)) for name, x in numbers.items()}


def attention_of(nope, rope, cell, kept=None):
    """Parts of the scores (H, T, T) -> the maps on the page, and numbers about each head.

    The softmax takes no notice of what is added to all of a row: each row of a part is shown less its mean.
    kept: what is attended to (T, T), if it is not all that came before
    """
    T = nope.size(1)
    seen = torch.ones(T, T, dtype=torch.bool, device=nope.device).tril()
    weights = (nope + rope).masked_fill(~(seen if kept is None else kept), -math.inf).softmax(dim=-1)  # (H, T, T)
    parts = [((x - (x * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)) * seen) for x in (nope, rope)]
    pairs = in_cells(seen[None].float(), cell)
    shown = [in_cells(part, cell) / pairs for part in parts]
    limit = max(part.abs().max().item() for part in shown) or 1.0
    half = torch.arange(T // 2, T, device=nope.device)
    spreads = [(part[:, half].square().sum(dim=(1, 2)) / seen[half].sum()).sqrt() for part in parts]
    return {'cells': -(-T // cell), 'cell': cell, 'limit': limit, 'weights': weight_map(weights, cell),
            'nope': pack(shown[0] / limit + 1, 8), 'rope': pack(shown[1] / limit + 1, 8),
            'numbers': head_numbers(weights), 'spread': [rounded(x) for x in spreads]}
