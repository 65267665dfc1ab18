"""
What grpo.py computes with the rollouts' experts and sampling masks, with a teacher, and for MTP modules.

V3.2 is arXiv 2512.02556: its section 3.1 has routing replay ("keep routing") and the sampling mask ("keep sampling
mask"). Letters in the shape comments: B rows, T their tokens less 1, L MoE layers of the main stack, K experts per
token, V vocabulary, D MTP modules.
"""

import contextlib

import torch
from torch.nn import functional as F

from model import MoE, balance_and_load


def pack_experts(experts, T):
    """Decoder.experts -> (B, T, L, K), int16. What fills a row has the experts 0 .. K - 1, and moves nothing."""
    L, K = experts[0].shape[1:] if experts else (0, 1)
    device = experts[0].device if experts else None  # copies within a device make no host wait
    packed = torch.arange(K, dtype=torch.int16, device=device).expand(len(experts), T, L, K).clone()
    for row, of_row in zip(packed, experts):
        row[:len(of_row)] = of_row
    return packed


def pack_support(support, prompts, T):
    """Decoder.support -> the tokens that could be sampled as each target (B, T, V): all, outside the responses"""
    V, device = (support[0].size(-1), support[0].device) if support else (1, None)
    packed = torch.ones(len(support), T, V, dtype=torch.bool, device=device)
    for row, of_row, prompt in zip(packed, support, prompts):
        row[len(prompt) - 1:len(prompt) - 1 + len(of_row)] = of_row
    return packed


@contextlib.contextmanager
def replayed(model, experts):
    """Within this context the main stack's MoE layers use the given experts (B, T, L, K), with gates from their own
    scores of these experts. V4's hash layers have them anyway. None: as usual
    """
    layers = [block.mlp for block in model.transformer.h if isinstance(block.mlp, MoE)]
    hooks = []
    for layer, moe in enumerate(layers if experts is not None else []):
        if not hasattr(moe, 'tid2eid'):
            chosen = experts[:, :, layer].flatten(0, 1).long()                                # (B*T, K)
            hooks.append(moe.register_forward_pre_hook(lambda moe, args, chosen=chosen: (*args, chosen)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def rerouted(experts, routing):
    """The rollout's experts (B, T, L, K), main_stack()'s routing -> share of layers with another set of them (B, T)"""
    trained = torch.stack([chosen for _, chosen in routing], dim=2)                           # (B, T, L, K)
    return (experts.sort(dim=-1).values != trained.sort(dim=-1).values).any(dim=-1).float().mean(dim=-1)


def drifted(logp, sampled_logp, mask, advantages, bound):
    """V3.2's off-policy sequence masking, M of its section 3.1: responses with a negative advantage (B) whose mean of
    log pi_rollout - log pi over their tokens, (B, T) each, is above the bound. -> (B), bool
    """
    drift = ((sampled_logp - logp) * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return (advantages < 0) & (drift > bound)


def reverse_kl(logp, teacher_logp):
    """KL(student || teacher) over the whole vocabulary: (B, T, V) each -> (B, T)"""
    return (logp.exp() * (logp - teacher_logp)).sum(dim=-1)


def mtp_labels(model, rows, mask):
    """Rows (B, T + 1), mask (B, T) -> what each MTP module predicts within the responses (D, B, T); -1: nothing"""
    return model.labels(rows[:, 1:].masked_fill(~mask, -1))[1:]


def mtp_loss(model, h, rows, labels, counts):
    """The modules' cross-entropy (V3 eq. 24), as its mean over the modules, and the load of their MoE layers.

    h (B, T, C): main_stack()'s states, from which no gradient flows back. labels: from mtp_labels(), counts (D): how
    many of them the update has in all.
    """
    states, routing, has_label, h = [], [], [], h.detach()
    for k, module in enumerate(model.mtp, start=1):
        h, more = model.mtp_module(module, F.pad(rows[:, k:-1], (0, min(k, h.size(1)))), h)  # t_{i+k}
        states.append(h)
        routing, has_label = routing + more, has_label + [labels[k - 1] >= 0] * len(more)
    loss, _ = model.loss_of_heads(states, labels, [1 / len(states)] * len(states), counts)
    return loss, balance_and_load(routing, torch.stack(has_label))[1] if routing else None
