"""Muon (train.py --optimizer=muon, or muon_split, which splits matrices first) and AdamW with bf16 moments
(--bf16_moments=True). Also what a resume does before it trusts the state of any optimizer."""

import functools
import math
import os

import torch

from model import Mistake


def muon(model, weight_decay, learning_rate, betas, device_type, split=False, cautious=False):
    """GPT -> Muon for its matrices; AdamW, in the model's own groups, for embedding, head, routers and all the rest.
    split: orthogonalise by row_heights(). cautious: see Muon"""
    adamw_names = ('wte.weight', 'lm_head.weight', 'gate.weight', 'engram.conv', 'position_bias')
    names = {id(p): name for name, p in model.named_parameters()}
    groups = model.configure_optimizers(weight_decay, learning_rate, betas, device_type).param_groups
    decayed, small, *more = [{k: group[k] for k in ('params', 'weight_decay', 'lr_scale') if k in group}
                             for group in groups]
    others = [p for p in decayed['params'] if names[id(p)].endswith(adamw_names)]
    matrices = [p for p in decayed['params'] if not names[id(p)].endswith(adamw_names)]
    own = {'params': matrices, 'muon': True, 'cautious': cautious}
    if split:
        own['heights'] = [row_heights(names[id(p)], p, model.config) for p in matrices]
    groups = [decayed | {'params': others}, small, decayed | own, *more]
    return Muon(groups, lr=learning_rate, betas=betas, fused=device_type in ('cuda', 'cpu'))


muon_split = functools.partial(muon, split=True)  # train.py --optimizer=muon_split


def row_heights(name, p, config):
    """The heights of the blocks of rows that a weight consists of; they repeat, for each head or expert. Each block is
    a matrix of its own: a head's queries without and with RoPE, its keys, its values; latent and rotated key; gate, up.
    """
    n, r, half = config.qk_nope_head_dim, config.qk_rope_head_dim, p.size(-2) // 2
    heights = {'q_proj': [n, r], 'q_b_proj': [n, r], 'kv_b_proj': [n, config.v_head_dim],
               'kv_a_proj_with_mqa': [config.kv_lora_rank, r],
               'gate_up_proj': [half, half], 'experts_gate_up': [half, half]}
    if hasattr(config, 'o_lora_rank'):  # model_v4.py's
        heights |= {'o_a_proj': [config.o_lora_rank], 'wq_b': [config.index_head_dim]}
    return heights.get(name.removesuffix('.weight').rpartition('.')[2], [p.size(-2)])


def blocks(x, heights):
    """x (..., rows, n) -> for each of the heights (blocks of this height, height, n), views of x"""
    return x.view(-1, sum(heights), x.size(-1)).split(heights, dim=1)


NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # after five steps singular values lie between 0.7 and 1.2


def orthogonalise(G, steps=5):
    """Newton-Schulz steps towards the nearest semi-orthogonal matrix, for each matrix in G (..., m, n)."""
    if G.dim() == 2:
        return orthogonalise(G.unsqueeze(0), steps).squeeze(0)
    shorter, longer = sorted(G.shape[-2:])
    # on CPUs the second way took 0.9 of the first one's time at n = 2m, 0.6 at 4m, 1.0 at 1.5m, 1.2 at m
    iterate = gram_newton_schulz if G.device.type == 'cpu' and longer > 1.5 * shorter else newton_schulz
    return iterate(G, steps)


def newton_schulz(G, steps):
    """G (matrices, m, n): singular values s become a s + b s^3 + c s^5, in each step. On a GPU in bf16"""
    a, b, c = NEWTON_SCHULZ
    tall = G.size(-2) > G.size(-1)
    X = G.mT if tall else G
    X = X if G.device.type == 'cpu' else X.bfloat16()
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        A = X @ X.mT                                                        # (matrices, m, m)
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if tall else X).to(G.dtype)


def gram_newton_schulz(G, steps):
    """newton_schulz() that multiplies by G twice in all, not twice a step: a step multiplies X by P, a polynomial in
    A = X X^T, so the next A is P A P. In half precision this A would lose the small singular values."""
    a, b, c = NEWTON_SCHULZ
    tall = G.size(-2) > G.size(-1)
    A, Q = G.mT @ G if tall else G @ G.mT, None                             # (matrices, m, m) each, m the shorter side
    square = A.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[:, None, None].clamp(min=1e-14)  # of G's norm
    A /= square
    for step in range(steps):
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        Q = P if Q is None else P @ Q
        A = P @ A @ P if step < steps - 1 else None
    Q /= square.sqrt()
    return G @ Q if tall else Q @ G


class Muon(torch.optim.AdamW):
    """Muon (kellerjordan.github.io/posts/muon) for the groups marked muon=True, AdamW for the others.

    The update is torch.optim.Muon's with adjust_lr_fn='match_rms_adamw' (arXiv 2502.16982), so that one learning rate
    serves both. Each matrix of a 3-D weight has its own update, and so has each block of rows that group['heights']
    tells apart; matrices of one shape, of the whole model, are computed in one batch. A step overwrites the gradients.
    group['cautious']: weights decay only where the update makes them smaller, too (arXiv 2510.12402).
    """
    MOMENTUM = 0.95

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get('muon')]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get('muon'):
                self._muon(group, getattr(self, 'found_inf', None))
        return loss

    def _muon(self, group, found_inf):
        """found_inf, as in fused AdamW: if this tensor is 1, a step changes nothing, without a host sync."""
        heights = group.get('heights') or [[p.size(-2)] for p in group['params']]
        found = [(p, rows) for p, rows in zip(group['params'], heights) if p.grad is not None]
        params, heights = [p for p, _ in found], [rows for _, rows in found]
        for p in params:
            if 'momentum_buffer' not in self.state[p]:
                # AdamW's load_state_dict needs `step` in every state
                self.state[p].update(step=torch.zeros(()), momentum_buffer=torch.zeros_like(p))
        grads, momenta = [local(p.grad) for p in params], [local(self.state[p]['momentum_buffer']) for p in params]
        shrink, keep = 1 - group['lr'] * group['weight_decay'], 1
        if found_inf is not None:
            for g, momentum in zip(grads, momenta):
                torch.where(found_inf > 0, momentum, g, out=g)              # this keeps the momenta
            shrink, keep = torch.where(found_inf > 0, 1.0, shrink), 1 - found_inf
        torch._foreach_lerp_(momenta, grads, 1 - self.MOMENTUM)
        torch._foreach_lerp_(grads, momenta, self.MOMENTUM)                 # Nesterov's momentum

        updates, by_shape = [whole_matrices(p.grad) for p in params], {}
        for p, grad, update, rows in zip(params, grads, updates, heights):
            mesh = p.device_mesh if update is not grad else None
            for x in blocks(update, rows):                                  # (matrices, m, n)
                by_shape.setdefault((x.shape[1:], mesh), []).append(x)
        for (sides, mesh), views in by_shape.items():
            batch = torch.cat(views)
            batch = orthogonalise_shares(batch, mesh) if mesh else orthogonalise(batch)
            batch *= 0.2 * math.sqrt(max(sides)) * keep
            torch._foreach_copy_(views, batch.split([len(x) for x in views]))

        weights = [local(p) for p in params]
        updates = [own_part(update, p) for update, p in zip(updates, params)]
        if group.get('cautious'):
            torch._foreach_mul_(weights, [torch.where(w * u > 0, shrink, 1.0) for w, u in zip(weights, updates)])
        else:
            torch._foreach_mul_(weights, shrink)
        torch._foreach_add_(weights, updates, alpha=-group['lr'])


# -----------------------------------------------------------------------------
# shards (extras/parallel.py), DTensors

def local(x):
    return x.to_local() if hasattr(x, 'to_local') else x


def whole_matrices(x):
    """A shard -> this rank's experts, if it holds whole ones; else the whole tensor, gathered from all ranks."""
    mine = local(x)
    return mine if x is mine or x.dim() == 3 and mine.shape[1:] == x.shape[1:] else x.full_tensor()


def own_part(update, p):
    """What this rank holds of a parameter's update from whole_matrices()"""
    if update.shape == local(p).shape:
        return update
    from extras.parallel import piece
    return piece(update, p)


def orthogonalise_shares(G, mesh):
    """orthogonalise() for matrices that all ranks of a mesh hold: each rank computes a share, and all gather them."""
    from torch.distributed.tensor import DTensor, Replicate, Shard
    shares = [Shard(0)] * mesh.ndim
    G = DTensor.from_local(G, mesh, [Replicate()] * mesh.ndim, run_check=False)
    mine = orthogonalise(G.redistribute(mesh, shares).to_local())
    return DTensor.from_local(mine, mesh, shares, run_check=False, shape=G.shape, stride=G.stride()).full_tensor()


class AdamW16(torch.optim.AdamW):
    """AdamW that keeps its moments in bfloat16, as in V3 (section 3.3.2); the arithmetic is in fp32.

    With beta2 above 0.99 the second moment's updates would be too small for its 8 bits. found_inf works as in torch's
    fused AdamW: if this tensor is 1, a step changes nothing, without a host sync.
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group['betas']
            for p in group['params']:
                if p.grad is None:
                    continue
                keep = 1 - getattr(self, 'found_inf', torch.zeros((), device=p.device))
                state = self.state[p]
                if not state:
                    state.update(step=torch.zeros((), device=p.device),
                                 exp_avg=torch.zeros_like(p, dtype=torch.bfloat16),
                                 exp_avg_sq=torch.zeros_like(p, dtype=torch.bfloat16))
                state['step'] += keep
                steps = state['step'].clamp(min=1)
                grad = torch.where(keep > 0, p.grad, 0.0)
                m = state['exp_avg'].float().lerp(grad, (1 - beta1) * keep)
                v = state['exp_avg_sq'].float().lerp(grad.square(), (1 - beta2) * keep)
                denominator = (v / (1 - beta2 ** steps)).sqrt() + group['eps']
                p *= 1 - group['lr'] * group['weight_decay'] * keep
                p -= m / (1 - beta1 ** steps) / denominator * (group['lr'] * keep)
                state['exp_avg'], state['exp_avg_sq'] = m.bfloat16(), v.bfloat16()


def load_optimizer(opt, found, path, max_over_ranks=int, shards=None):
    """opt.load_state_dict() of the state dict found at `path`, with the settings of the flags, not of the file. Mistake
    if a state does not fit its parameter: a fused step reads past the end of a smaller one. shards: the function that
    cuts whole states into this rank's shards
    """
    params = [p for group in opt.param_groups for p in group['params']]
    moments = [{'momentum_buffer'} if group.get('muon') else {'exp_avg', 'exp_avg_sq'}
               for group in opt.param_groups for _ in group['params']]

    def fits(name, x, p):
        if x.shape != (() if name == 'step' else p.shape) or x.is_meta:
            return False
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64) or not x.is_contiguous():
            return False
        x = x.to_local() if hasattr(x, 'to_local') else x
        return bool((x.isfinite() & ((x >= 0) | (name not in ('step', 'exp_avg_sq')))).all())

    try:
        found = shards(found, opt) if shards else found
        states = found['state']
        lengths = [[len(group['params']) for group in groups] for groups in (found['param_groups'], opt.param_groups)]
        fit = lengths[0] == lengths[1] and all(
            state.keys() == {'step', *moments[i]} and all(fits(name, x, params[i]) for name, x in state.items())
            for i, state in states.items())
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError):  # not an optimizer's state at all
        fit = False
    if max_over_ranks(not fit):
        raise Mistake(f'the optimizer in {path} is damaged, or does not fit: resume with the --optimizer of its run')
    trained = sum(p.requires_grad for p in params)
    if len(states) < trained and os.environ.get('RANK', '0') == '0':
        print(f'note: {path} has the optimizer state of {len(states)} of {trained} parameters; the others begin anew')
    opt.load_state_dict({'state': states, 'param_groups': opt.state_dict()['param_groups']})
