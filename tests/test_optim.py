"""Muon against torch.optim.Muon, stacked experts and blocks of rows against matrices of their own, and AdamW with
moments in bf16."""

import copy
import math

import torch
from conftest import tiny_model

from extras import optim
from extras.optim import Muon, gram_newton_schulz, newton_schulz, orthogonalise

LR, WD = 0.02, 0.1


def muon(params):
    return Muon([{'params': params, 'weight_decay': WD, 'muon': True}], lr=LR, betas=(0.9, 0.99))


def test_the_update_is_that_of_torch():
    torch.manual_seed(0)
    for shape in ((24, 16), (16, 24), (32, 32)):
        ours = torch.nn.Parameter(torch.randn(shape))
        theirs = torch.nn.Parameter(ours.detach().clone())
        a = muon([ours])
        b = torch.optim.Muon([theirs], lr=LR, weight_decay=WD, momentum=0.95, adjust_lr_fn='match_rms_adamw')
        for _ in range(4):
            before = ours.detach().clone()
            ours.grad = torch.randn(shape)
            theirs.grad = ours.grad.clone()
            a.step()
            b.step()
            # torch's Newton-Schulz runs in bf16
            assert (ours - theirs).norm() < 0.03 * (ours - before).norm()


def test_a_stacked_experts_update_is_that_of_a_matrix():
    torch.manual_seed(0)
    stacked = torch.nn.Parameter(torch.randn(3, 16, 24))
    single = [torch.nn.Parameter(w.clone()) for w in stacked.detach()]
    together, apart = muon([stacked]), [muon([w]) for w in single]
    for _ in range(3):
        stacked.grad = torch.randn_like(stacked) * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1)
        for w, grad in zip(single, stacked.grad):
            w.grad = grad.clone()
        for optimizer in (together, *apart):
            optimizer.step()
    torch.testing.assert_close(stacked, torch.stack(single), rtol=1e-5, atol=1e-5)


def rows_of(name, w, config):
    """The matrices that a weight consists of, cut by hand."""
    n, r, v, out = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, []
    if w.dim() == 3:
        return [part for expert in w for part in rows_of(name.replace('experts', 'expert'), expert, config)]
    first, second = {'q_b_proj': (n, r), 'kv_b_proj': (n, v), 'kv_a_proj_with_mqa': (config.kv_lora_rank, r),
                     'gate_up_proj': [len(w) // 2] * 2, 'expert_gate_up': [len(w) // 2] * 2
                     }.get(name.removesuffix('.weight').split('.')[-1], (len(w), 0))
    for start in range(0, len(w), first + second):
        out += [w[start:start + first], w[start + first:start + first + second]]
    return [part for part in out if len(part)]


def test_muon_split_updates_each_head_and_gate_and_up_as_a_matrix_of_its_own():
    torch.manual_seed(0)
    model = tiny_model(qk_nope_head_dim=6, v_head_dim=10)
    together = optim.muon_split(model, WD, LR, (0.9, 0.99), 'cpu')
    (group,) = (group for group in together.param_groups if group.get('muon'))
    names = {id(p): name for name, p in model.named_parameters()}
    weights = {names[id(p)]: p for p in group['params']}
    single = {name: [torch.nn.Parameter(part.detach().clone()) for part in rows_of(name, w, model.config)]
              for name, w in weights.items()}
    apart = muon([part for parts in single.values() for part in parts])
    for _ in range(2):
        for name, w in weights.items():
            w.grad = torch.randn_like(w)
            for part, grad in zip(single[name], rows_of(name, w.grad, model.config)):
                part.grad = grad.clone()
        together.step()
        apart.step()
    for name, w in weights.items():
        for ours, part in zip(rows_of(name, w, model.config), single[name], strict=True):
            torch.testing.assert_close(ours, part, rtol=1e-4, atol=1e-5, msg=lambda said, name=name: f'{name}: {said}')
    heads = 2 * model.config.n_head
    assert len(single['transformer.h.0.attn.q_b_proj.weight']) == heads and len(single) == len(group['heights'])


def test_a_step_with_found_inf_changes_nothing():
    model = tiny_model()
    optimizer = optim.muon_split(model, WD, LR, (0.9, 0.99), 'cpu')
    for bad in (0.0, 1.0):
        before = [p.detach().clone() for p in model.parameters()]
        momenta = [state['momentum_buffer'].clone() for state in optimizer.state.values() if 'momentum_buffer' in state]
        for p in model.parameters():
            p.grad = torch.full_like(p, math.nan) if bad else torch.randn_like(p)
        optimizer.found_inf = torch.tensor(bad)
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    after = [state['momentum_buffer'] for state in optimizer.state.values() if 'momentum_buffer' in state]
    assert all(torch.equal(m, old) for m, old in zip(after, momenta, strict=True)) and momenta


def test_cautious_decay_is_of_the_weights_that_the_update_makes_smaller():
    torch.manual_seed(0)
    start, grad = torch.randn(2, 16, 24)
    moved = {}
    for name, more in (('none', {'weight_decay': 0.0}), ('all', {}), ('cautious', {'cautious': True})):
        w = torch.nn.Parameter(start.clone())
        w.grad = grad.clone()
        Muon([{'params': [w], 'weight_decay': WD, 'muon': True} | more], lr=LR, betas=(0.9, 0.99)).step()
        moved[name] = w.detach()
    smaller = (start - moved['none']) * start > 0
    torch.testing.assert_close(moved['cautious'], torch.where(smaller, moved['all'], moved['none']))
    assert smaller.any() and not smaller.all() and not torch.equal(moved['all'], moved['none'])


def test_the_gram_iteration_is_the_plain_one():
    """Also where singular values differ by a factor of a thousand."""
    torch.manual_seed(0)
    for m, n in ((16, 24), (16, 160), (40, 80)):
        u, _, v = torch.linalg.svd(torch.randn(3, m, n), full_matrices=False)
        for s in (torch.ones(m), torch.logspace(0, -3, m)):
            X = u * (s / s.norm()) @ v
            for G in (X, 100 * X.mT):
                torch.testing.assert_close(gram_newton_schulz(G, 5), newton_schulz(G, 5), rtol=0, atol=1e-3)
            torch.testing.assert_close(newton_schulz(X.mT, 5).mT, newton_schulz(X, 5), rtol=0, atol=1e-5)
    assert not gram_newton_schulz(torch.zeros(1, 4, 8), 5).any()  # a weight without a gradient


def test_orthogonalise_flattens_the_singular_values():
    torch.manual_seed(0)
    s = torch.linalg.svdvals(orthogonalise(torch.randn(5, 24, 16)))
    assert s.min() > 0.5 and s.max() < 1.3


def test_every_parameter_is_in_one_group_and_only_the_blocks_matrices_are_muons():
    model = tiny_model()
    optimizer = optim.muon(model, 0.1, 1e-3, (0.9, 0.99), 'cpu')
    held = [id(p) for group in optimizer.param_groups for p in group['params']]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    muons = {names[id(p)] for group in optimizer.param_groups if group.get('muon') for p in group['params']}
    assert any('experts_down' in name for name in muons) and any('eh_proj' in name for name in muons)
    assert not any('wte' in name or 'lm_head' in name or 'norm' in name or name.endswith('mlp.gate.weight')
                   for name in muons)


def test_a_resumed_muon_goes_on_exactly():
    torch.manual_seed(0)
    data = torch.randint(61, (6, 4, 17))

    def train(model, optimizer, batches):
        for batch in batches:
            model(batch[:, :-1], batch[:, 1:])[1].backward()
            optimizer.step()
            optimizer.zero_grad()

    def new():
        torch.manual_seed(1)
        model = tiny_model().train()
        return model, optim.muon(model, 0.1, 1e-2, (0.9, 0.99), 'cpu')

    whole = new()
    train(*whole, data)
    first = new()
    train(*first, data[:3])
    second = new()
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    train(*second, data[3:])
    for a, b in zip(whole[0].parameters(), second[0].parameters()):
        assert torch.equal(a, b)


def test_moments_in_bf16():
    """Near torch's AdamW with fp32 moments; a step with found_inf changes nothing; a resumed run goes on alike."""
    params = [torch.nn.Parameter(torch.randn(5, 40, generator=torch.Generator().manual_seed(0))) for _ in range(3)]
    start = params[0].detach().clone()
    kwargs = dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ours, torchs, resumed = optim.AdamW16(params[:1], **kwargs), torch.optim.AdamW(params[1:2], **kwargs), None
    for step in range(40):
        grad = torch.randn(5, 40) + (math.nan if step == 7 else 0.0)
        if step == 20:
            resumed = optim.AdamW16(params[2:], **kwargs)
            params[2].data.copy_(params[0].data)
            resumed.load_state_dict(copy.deepcopy(ours.state_dict()))
        for optimizer in (ours, torchs, resumed):
            if optimizer is not None:
                optimizer.found_inf = torch.tensor(float(step == 7))
                optimizer.param_groups[0]['params'][0].grad = grad.clone()
                optimizer.step()
    moved = (params[1] - start).norm()
    assert 0 < (params[0] - params[1]).norm() < 0.01 * moved
    assert torch.equal(params[0], params[2])
    assert ours.state[params[0]]['exp_avg'].dtype == torch.bfloat16 and ours.state[params[0]]['step'] == 39
