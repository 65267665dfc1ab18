"""Muon against torch.optim.Muon, stacked experts against matrices of their own, and AdamW with moments in bf16."""

import copy
import math

import torch
from conftest import tiny_model

from extras import optim
from extras.optim import Muon, orthogonalise

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
