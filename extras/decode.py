"""
Decoding: how sample.py and bench.py cast a model for it, and self-speculative decoding (V3 section 5.4.3), where the D
MTP modules draft D tokens and one pass of the main stack verifies them all. Its tokens are those of GPT.generate at
temperature 0, and their distribution is the same otherwise.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from model import draw, probabilities


def for_decoding(model, dtype):
    """The model, its weights cast once to the dtype that its products then run in. Norms, routers and b stay fp32."""
    for name, p in model.named_parameters():
        if not name.endswith(('norm.weight', 'ln_f.weight', 'mlp.gate.weight')):
            p.data = p.data.to(dtype)
    return model.eval().requires_grad_(False)


class Speculation(NamedTuple):
    passes: int             # forward passes that verified drafts
    tokens: int             # tokens that these gave to a row
    drafts: torch.Tensor    # (D,): drafts of each module that had all before them accepted
    accepted: torch.Tensor  # (D,): ... and were accepted too


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, stop_token=None):
    """GPT.generate, speculatively: idx (B, T) -> (B, T + at most max_new_tokens), and its Speculation.

    Each step accepts the number of drafts that all rows accept. Past block_size decoding is plain. ValueError for
    a model without MTP modules.
    """
    B, T = idx.shape
    D, block_size, total = len(model.mtp), model.config.block_size, T + max_new_tokens
    if T == 0:
        raise ValueError('generate needs a prompt of at least one token')
    if D == 0:
        raise ValueError('speculative decoding needs MTP modules, and this model has none')
    # `out` holds the tokens, then unverified drafts, which the verified tokens overwrite
    out = torch.cat((idx, idx.new_zeros(B, max_new_tokens + 2 * D)), dim=1)
    cache = model.make_cache(B, min(out.size(1), block_size), blocks=len(model.blocks()))
    done = torch.zeros(B, 1, dtype=torch.bool, device=idx.device)
    counts = torch.zeros(2, D, dtype=torch.long, device=idx.device)
    passes, verified, since_check, draft_probs = 0, 0, 0, None
    known, cached, drafted = T, 0, 0  # tokens that are certain; positions in the cache; drafts behind the tokens
    state = None                      # (B, up to D - 1, C): main states before position `cached`
    while known < total:
        # one pass of the main stack: over the prompt, or the newest token and the drafts behind it
        if known > block_size:
            h, _ = model.main_stack(out[:, known - block_size:known])
        else:
            h, _ = model.main_stack(out[:, cached:known + drafted], cache, cached)
        probs = probabilities(model.lm_head(h[:, -1 - drafted:]), temperature, top_k)        # (B, 1 + drafted, V)
        if drafted:
            new, reached, accepted = verify(out[:, known:known + drafted], draft_probs, probs, done)
            passes += 1
            verified += new.size(1)
            counts += torch.stack((reached, accepted))
        else:
            new = draw(probs[:, 0])                                                          # (B, 1)
        if stop_token is not None:
            for i in range(new.size(1)):
                new[:, i:i + 1].masked_fill_(done, stop_token)
                done |= new[:, i:i + 1] == stop_token
        n = new.size(1)
        out[:, known:known + n] = new
        known += n
        since_check += n
        if stop_token is not None and since_check >= 16:  # a host sync: not at every token
            since_check = 0
            if done.all():
                break

        # the modules draft the next D tokens
        if known - 1 <= block_size:
            first, cached = cached, known - 1  # rejected drafts lie beyond `cached`: they are written over
            drafted = D if known < total and known + D <= block_size else 0
        if drafted:
            # Module k's last k - 1 cache rows came from drafts: it computes them again.
            h = h[:, :cached - first]
            state = h if state is None else torch.cat((state, h), dim=1)                     # (B, positions, C)
            start = cached - state.size(1)
            h, layer, draft_probs = state, model.config.n_layer, []
            for k, module in enumerate(model.mtp, start=1):
                h, _ = model.mtp_module(module, out[:, start + k:cached + k], h, cache[layer:], start)
                layer += len(module.h)
                draft_probs.append(probabilities(model.lm_head(h[:, -1:]), temperature, top_k))  # (B, 1, V)
                out[:, cached + k:cached + k + 1] = draw(draft_probs[-1][:, 0])
            draft_probs = torch.cat(draft_probs, dim=1)                                      # (B, D, V)
            state = state[:, state.size(1) - (D - 1):] if D > 1 else None
    return out[:, :min(known, total)], Speculation(passes, verified, *counts)


def verify(drafts, q, p, done):
    """Speculative sampling (arXiv 2211.17192): tokens distributed as p's, though the drafts were drawn from q.

    drafts (B, D); q (B, D, V); p (B, D + 1, V); done (B, 1): rows whose tokens do not matter.
    -> the tokens (B, a + 1): the a drafts that every row accepts, and one more; and of each draft in how many rows all
    before it were accepted, and in how many it was too: (D,), (D,).
    """
    D = drafts.size(1)
    at_draft = [x.gather(-1, drafts.unsqueeze(-1)).squeeze(-1) for x in (p[:, :D], q)]       # (B, D) each
    accept = (torch.rand_like(at_draft[1]) * at_draft[1] < at_draft[0]) | done               # with probability p / q
    run = accept.long().cumprod(dim=1)                                                       # (B, D): all up to here
    a = int(run.sum(dim=1).min())  # the one host sync of a pass
    rest = p[:, a]
    if a < D:  # in a row that rejects draft a + 1: from max(p - q, 0); in the others, the draft itself
        rest = (rest - q[:, a]).clamp(min=0)
        rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p[:, a])
        last = torch.where(run[:, a:a + 1] > 0, drafts[:, a:a + 1], draw(rest))
    else:
        last = draw(rest)
    alive = (~done).long()
    reached = F.pad(run[:, :-1], (1, 0), value=1)
    return torch.cat((drafts[:, :a], last), dim=1), (reached * alive).sum(dim=0), (run * alive).sum(dim=0)


