"""
The largest attention logit of each head of MLA, and QK-Clip (arXiv 2507.20534), which bounds it (train.py
--qk_clip=100).

Under Muon the logits of some heads may grow without bound. Fused attention does not return them, so measuring them
means computing one micro-batch again, without gradients. train.py measures once between evaluations, for the log; a run
that clips measures more often.
"""

import torch
import torch.distributed as dist

from extras.optim import local, own_part
from model import MLA, Mistake

EVERY = 10  # iterations from one look to the next in a run that clips
ROWS = 256  # queries whose logits are held at a time


def attentions(model):
    """Of the main blocks: an evaluation, as which a look computes, leaves the MTP modules out."""
    return [block.attn for block in model.transformer.h if isinstance(block.attn, MLA)]


def check(model, tau):
    """Mistake if the model has no MLA, whose logits tau would bound"""
    if not attentions(model):
        raise Mistake(f'qk_clip={tau} bounds the logits of MLA, which this model does not have: leave it at 0')


def look(model, x, y, ctx, iteration, config, all_reduce):
    """For train.py, after a step: if a look is due, {'max_logits': (main blocks with MLA, H)} over all ranks, and the
    heads are clipped; else {}. It is due in the log halfway between evaluations, and each EVERY iterations for qk_clip.
    """
    interval, logged, tau = config['eval_interval'], config['log_interval'], config['qk_clip']
    halfway = iteration % logged == 0 and (iteration + interval // 2) % interval < logged
    if not attentions(model) or not (halfway or tau > 0 and iteration % EVERY == 0):
        return {}
    largest = all_reduce(largest_logits(model, x, y, ctx), dist.ReduceOp.MAX)
    clip(model, largest, tau)
    return {'max_logits': largest}


@torch.no_grad()
def largest_logits(model, x, y, ctx):
    """Each head's largest logit in a micro-batch, x and y (B, T) -> (main blocks with MLA, H), without a host sync"""
    found = {}

    def note(attn, inputs):
        q, latent = attn.project(*inputs[:3])                               # (B, H, T, n+r), (B, T, c+r)
        found[attn] = largest_logit(q, attn.expand(latent)[0]) * attn.scale

    hooks = [attn.register_forward_pre_hook(note) for attn in attentions(model)]
    try:
        with ctx, torch.compiler.set_stance('force_eager'):  # a compiled block would be compiled anew with the hook
            model.eval()(x, y, return_logits=False)
    finally:
        for hook in hooks:
            hook.remove()
        model.train()
    return torch.stack([found[attn] for attn in attentions(model)])


def largest_logit(q, k):
    """q, k (B, H, T, n+r) -> the largest product of a query and a key that it sees (H,)"""
    largest = []
    for start in range(0, q.size(2), ROWS):
        rows = q[:, :, start:start + ROWS]
        with torch.autocast(q.device.type, enabled=False):
            logits = rows.float() @ k[:, :, :start + ROWS].float().mT       # (B, H, rows, S)
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril(start)
        largest.append(logits.masked_fill(~seen, float('-inf')).amax(dim=(0, 2, 3)))
    return torch.stack(largest).amax(dim=0)


@torch.no_grad()
def clip(model, largest, tau):
    """QK-Clip: where a head's largest logit is above tau, its next one is tau (0: off). largest: (blocks with MLA, H)

    The rows of its q_nope and k_nope are multiplied by sqrt(gamma), gamma = tau / largest, and those of its q_rope by
    gamma, because all heads share the rotated key.
    """
    if tau == 0:
        return
    gamma = torch.where((largest > tau) & largest.isfinite(), tau / largest, 1.0)
    for attn, g in zip(attentions(model), gamma.unsqueeze(-1)):             # (H, 1)
        n, r, _, v_dim = attn.sizes
        q_proj = attn.q_b_proj if attn.config.q_lora_rank > 0 else attn.q_proj
        root = g.sqrt().expand(-1, n)
        scale_rows(q_proj.weight, torch.cat((root, g.expand(-1, r)), dim=1))                   # (H, n + r)
        scale_rows(attn.kv_b_proj.weight, torch.cat((root, torch.ones_like(g).expand(-1, v_dim)), dim=1))


def scale_rows(p, factors):
    """Multiply each row of a weight, or of this rank's shard of it, by its factor, in place."""
    local(p).mul_(own_part(factors.flatten().unsqueeze(1).expand(p.shape), p))
