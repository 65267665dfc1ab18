"""Optimizers other than AdamW: Muon (train.py --optimizer=muon) and AdamW with bf16 moments (--bf16_moments=True).
And what a resume does before it trusts the state of any optimizer."""

import math
import os

import torch

from model import Mistake


def muon(model, weight_decay, learning_rate, betas, device_type):
    """GPT -> Muon for its matrices; AdamW, in the model's own groups, for embedding, head, routers and all the rest."""
    adamw_names = ('wte.weight', 'lm_head.weight', 'gate.weight', 'engram.conv', 'position_bias')
    names = {id(p): name for name, p in model.named_parameters()}
    groups = model.configure_optimizers(weight_decay, learning_rate, betas, device_type).param_groups
    decayed, small, *more = [{k: group[k] for k in ('params', 'weight_decay', 'lr_scale') if k in group}
                             for group in groups]
    others = [p for p in decayed['params'] if names[id(p)].endswith(adamw_names)]
    matrices = [p for p in decayed['params'] if not names[id(p)].endswith(adamw_names)]
    groups = [decayed | {'params': others}, small, decayed | {'params': matrices, 'muon': True}, *more]
    return Muon(groups, lr=learning_rate, betas=betas, fused=device_type in ('cuda', 'cpu'))


def orthogonalise(G, steps=5):
    """Newton-Schulz steps towards the nearest semi-orthogonal matrix, for each matrix in G (..., m, n)."""
    a, b, c = 3.4445, -4.7750, 2.0315  # singular values end between 0.7 and 1.2
    X = G if G.device.type == 'cpu' else G.bfloat16()
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    if G.size(-2) > G.size(-1):
        return orthogonalise(G.transpose(-2, -1), steps).transpose(-2, -1)
    for _ in range(steps):
        A = X @ X.transpose(-2, -1)                                         # (..., m, m)
        X = a * X + (b * A + c * A @ A) @ X
    return X.to(G.dtype)


def like(x, p):
    """x, spread over the ranks as the parameter p is: the products above may have gathered or cut it otherwise."""
    return x.redistribute(p.device_mesh, p.placements) if hasattr(p, 'placements') else x


class Muon(torch.optim.AdamW):
    """Muon (kellerjordan.github.io/posts/muon) for the groups marked muon=True, AdamW for the others.

    The update is torch.optim.Muon's with adjust_lr_fn='match_rms_adamw' (arXiv 2502.16982), so that one learning rate
    serves both. Each matrix of a 3-D weight has its own update; matrices of one shape are computed in one batch.
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
        by_shape = {}
        for p in group['params']:
            if p.grad is not None:
                # shards can be batched only within one mesh (extras/parallel.py)
                by_shape.setdefault((p.shape[-2:], getattr(p, 'device_mesh', None)), []).append(p)
        for ((m, n), _), params in by_shape.items():
            for p in params:
                if 'momentum_buffer' not in self.state[p]:
                    # AdamW's load_state_dict needs `step` in every state
                    self.state[p].update(step=torch.zeros(()), momentum_buffer=torch.zeros_like(p))
            grads = [p.grad for p in params]
            momenta = [self.state[p]['momentum_buffer'] for p in params]
            decay, keep = 1 - group['lr'] * group['weight_decay'], 1
            if found_inf is not None:
                grads = [torch.where(found_inf > 0, m, g) for g, m in zip(grads, momenta)]  # keep the momenta
                keep = 1 - found_inf
                decay = torch.where(found_inf > 0, 1.0, decay)
            torch._foreach_lerp_(momenta, grads, 1 - self.MOMENTUM)
            nesterov = torch._foreach_lerp(grads, momenta, self.MOMENTUM)
            update = orthogonalise(torch.cat([g.view(-1, m, n) for g in nesterov])) * keep    # (matrices, m, n)
            updates = update.split([p.numel() // (m * n) for p in params])
            updates = [like(u.view_as(p), p) for u, p in zip(updates, params)]
            torch._foreach_mul_(params, decay)
            torch._foreach_add_(params, updates, alpha=-group['lr'] * 0.2 * math.sqrt(max(m, n)))


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
