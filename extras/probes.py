"""
Two probes of a model that reads a text, for inside.py. The logit lens: what the output head says after each block.
Knock-outs: what the loss becomes when one part is off. Both look at the main blocks alone. T: the tokens of the text.
"""

import contextlib
import copy
import functools
import math

import torch
from torch.nn import functional as F

import model_v4
from extras.attention_maps import rounded
from model import MoE


def calls_of(model, ids):
    """The model reads ids (T,) -> the arguments of each main block and of the final norm; the first is the residual."""
    calls = []
    parts = [*model.transformer.h, model.transformer.ln_f]
    hooks = [part.register_forward_pre_hook(lambda part, args: calls.append(args)) for part in parts]
    model.main_stack(ids[None])
    for hook in hooks:
        hook.remove()
    return calls


def lens_of(model, ids, calls):
    """For each block, the final norm and the head on the residual behind it: the likeliest next token after each token
    and its probability, the probability of the token that came, and the mean loss. mHC's streams are contracted by
    the final norm, as at the model's end.
    """
    lens = []
    for residual, *_ in calls[1:]:
        logits = model.lm_head(model.transformer.ln_f(residual))[0].float()            # (T, V)
        likeliest = logits.softmax(dim=-1).max(dim=-1)
        losses = F.cross_entropy(logits[:-1], ids[1:], reduction='none')               # (T-1,)
        lens.append({'ids': likeliest.indices.tolist(), 'p': rounded(likeliest.values),
                     'came': rounded((-losses).exp()), 'loss': losses.mean().item()})
    return lens


def knock_outs(model, ids, calls):
    """The loss on the text with each part of parts_of() off, less the loss with all. The blocks before a part's own
    block compute the same as in `calls`, and are not run again.
    """
    blocks = model.transformer.h

    def loss_from(layer):
        x = calls[layer][0]
        for block, (_, *rest) in zip(blocks[layer:], calls[layer:]):
            x, _ = block(x, *rest)
        logits = model.lm_head(model.transformer.ln_f(x))[0]                           # (T, V)
        return F.cross_entropy(logits[:-1].float(), ids[1:]).item()

    loss, found = loss_from(len(blocks)), []
    for layer, kind, number, off in parts_of(model):
        with off():
            found.append({'layer': layer, 'kind': kind, 'number': number, 'change': round(loss_from(layer) - loss, 5)})
    return found


# -----------------------------------------------------------------------------
# the parts, and how each is switched off

def parts_of(model):
    """-> for each part: its layer, its kind, its number among its kind in the layer, and off(), a context"""
    parts = []
    for layer, block in enumerate(model.transformer.h):
        moe, attn, memory = block.mlp, block.attn, getattr(block, 'engram', None)
        if isinstance(moe, MoE):
            parts += [(layer, 'expert', e, functools.partial(expert_off, moe, e))
                      for e in range(model.config.n_routed_experts)]
            if moe.shared_experts is not None:
                parts.append((layer, 'shared', 0, functools.partial(output_off, moe.shared_experts)))
        parts += [(layer, 'head', h, functools.partial(head_off, attn, h)) for h in range(model.config.n_head)]
        parts.append((layer, 'rope', 0, functools.partial(rope_off, attn)))
        if memory is not None:
            parts.append((layer, 'memory', 0, functools.partial(output_off, memory)))
    return parts


def expert_off(moe, e):
    """Its score is -inf before the top K. If a table chooses it, or all experts are chosen, its gate is 0."""
    config, e = copy.copy(moe.config), torch.tensor(e, device=moe.e_score_correction_bias.device)
    score = config.score_fns[config.scoring_func]
    config.score_fns = {config.scoring_func: lambda logits: score(logits).index_fill(-1, e, 0)}
    bias = moe.e_score_correction_bias.index_fill(0, e, -math.inf)
    return replaced(moe, config=config, e_score_correction_bias=bias)


def output_off(part):
    return part.register_forward_hook(lambda part, args, y: torch.zeros_like(y))


def head_off(attn, h):
    """Its output is 0 before the output projection."""
    def without(y):                                                                    # (B, T, H, v)
        return y.index_fill(2, torch.tensor(h, device=y.device), 0)

    if isinstance(attn, model_v4.Attention):
        attend = attn.attend

        def attend_without(q, parts):
            y, weights = attend(q, parts)
            return without(y), weights
        return replaced(attn, attend=attend_without)
    heads = attn.config.n_head
    return attn.o_proj.register_forward_pre_hook(
        lambda proj, args: without(args[0].unflatten(-1, (heads, -1))).flatten(2))


def rope_off(attn):
    """The rotated part of the queries is 0, and so is its part of the scores. (An indexer keeps its own.)"""
    def without(q):                                                                    # (..., n + r)
        return F.pad(q[..., :attn.config.qk_nope_head_dim], (0, attn.config.qk_rope_head_dim))

    if isinstance(attn, model_v4.Attention):
        attend = attn.attend
        return replaced(attn, attend=lambda q, parts: attend(without(q), parts))
    project = attn.project

    def project_without(*args):
        q, latent = project(*args)
        return without(q), latent
    return replaced(attn, project=project_without)


@contextlib.contextmanager
def replaced(part, **values):
    """The part has other methods, buffers or attributes for a while."""
    before = {name: getattr(part, name) for name in values}
    for name, value in values.items():
        setattr(part, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            if hasattr(type(part), name):
                delattr(part, name)  # the class's own method comes back
            else:
                setattr(part, name, value)
