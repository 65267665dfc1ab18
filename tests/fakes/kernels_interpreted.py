"""The numbers of extras/kernels.py by Triton's interpreter, on the CPU; tests/test_kernels.py runs this file.

The interpreter's bf16 products are wrong, so its copy of the kernels multiplies in fp32.
"""

import sys
import types

import pytest
import torch
from conftest import ROOT, tiny_model
from test_model import plain_moe

import model as model_file


@pytest.fixture(scope='session')
def kernels(tmp_path_factory):
    source = (ROOT / 'extras/kernels.py').read_text()
    assert source.count('tl.dot(a, b,') == 2
    path = tmp_path_factory.mktemp('kernels') / 'interpreted.py'  # triton reads a kernel's source
    path.write_text(source.replace('tl.dot(a, b,', 'tl.dot(a.to(tl.float32), b.to(tl.float32),'))
    module = sys.modules['interpreted'] = types.ModuleType('interpreted')
    exec(compile(path.read_text(), path, 'exec'), module.__dict__)
    return module


ROWS = {'empty experts': [0, 5, 0, 130, 0], 'one expert': [200], 'one row each': [1, 1, 1], 'whole tiles': [128, 256],
        'no rows': [0, 0], 'many': [3, 0, 7, 64, 1, 0, 0, 65, 2, 33, 0, 9]}


@pytest.mark.parametrize('gather', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('rows', ROWS.values(), ids=list(ROWS))
def test_products_against_fp64(kernels, rows, dtype, gather):
    """y, dx and dW, off by one place of the dtype at most: the interpreter truncates bf16. Nan lies beyond the rows."""
    N, K, tokens = 40, 72, 19
    offsets = torch.tensor(rows).cumsum(0).int()
    used, M = int(offsets[-1]), int(offsets[-1]) + 6
    x, w, dy = (torch.randn(shape).to(dtype) for shape in ((tokens if gather else M, K), (len(rows), N, K), (M, N)))
    token = torch.randint(tokens, (M,)) if gather else None
    dy[used:] = float('nan')
    got = (kernels.product(x, w, offsets, token)[:used], kernels.product(dy, w.transpose(1, 2), offsets)[:used],
           kernels.weight_grad(dy, x, offsets, token))
    wide = (x[token] if gather else x).double()
    parts = [slice(end - n, end) for n, end in zip(rows, offsets.tolist())]
    want = (torch.cat([wide[p] @ w[e].double().t() for e, p in enumerate(parts)]),
            torch.cat([dy[p].double() @ w[e].double() for e, p in enumerate(parts)]),
            torch.stack([dy[p].double().t() @ wide[p] for p in parts]))
    for ours, exact in zip(got, want):
        assert ours.dtype == dtype and ours.shape == exact.shape
        bound = torch.finfo(dtype).eps * exact.abs() + 2e-5 * exact.abs().max() if exact.numel() else exact
        assert ((ours.double() - exact).abs() <= bound * 1.01).all()


def with_kernels(model, kernels, monkeypatch):
    """As enable() leaves a model, on a GPU whose grouped_mm waits for the host."""
    for module in (kernels.experts_file, kernels):
        monkeypatch.setattr(module, 'has_grouped_kernel', lambda device, dtype: False)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (8, 0))
    chosen = []
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    assert kernels.enable(model) == '' and chosen == [torch.device('cpu')]
    assert model.rows_fn is kernels.cross_entropy_rows
    return model


def test_a_layer_of_experts_equals_a_loop_over_them(kernels, monkeypatch):
    """Gathered rows, and the gradient that flows back to each token from all of its experts."""
    moe = with_kernels(tiny_model(), kernels, monkeypatch).transformer.h[0].mlp
    moe.e_score_correction_bias[:] = torch.tensor([-9., 1, 0, .5, -9., 0, .2, 0])  # two experts stay empty
    x = torch.randn(2, 40, 32, requires_grad=True)
    seed = torch.randn(2, 40, 32)
    launches = []
    monkeypatch.setattr(kernels, 'product', lambda *args, product=kernels.product: launches.append(1) or product(*args))
    results = []
    for forward in (lambda x: moe(x)[0], lambda x: plain_moe(moe, x)):
        moe.zero_grad()
        x.grad = None
        y = forward(x)
        (y * seed).sum().backward()
        results.append([y.detach(), x.grad.clone(), *(p.grad.clone() for p in moe.parameters())])
    assert len(launches) == 4
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('V', [61, 4096, 9001])
def test_the_loss_against_fp64(kernels, V):
    """Among the rows one without a target and without weight, and one whose target is nearly certain."""
    logits = 4 * torch.randn(6, V)
    target, weight = torch.tensor([5, 0, -1, V - 1, 3, 7]), torch.tensor([1.0, 0.5, 0.0, 1.0, 1.0, 1e-3])
    logits[4, 3] = 9 + logits[4].logsumexp(0)
    exact = logits.double().requires_grad_()
    want = torch.nn.functional.cross_entropy(exact, target.clamp(min=0), reduction='none')
    (want * weight.double()).sum().backward()
    loss = kernels.cross_entropy_rows(logits, target, weight)
    torch.testing.assert_close(loss.double(), want.detach(), rtol=2e-6, atol=1e-6)
    at_target = torch.zeros(6, V, dtype=torch.bool).scatter_(1, target.clamp(min=0).unsqueeze(1), True)
    for where, atol in ((~at_target, 1e-12), (at_target, 3e-6)):  # there p - 1 has p's error
        torch.testing.assert_close(logits.double()[where], exact.grad[where], rtol=2e-5, atol=atol)
    bad = torch.randn(2, V)
    bad[0, 7] = float('nan')
    loss = kernels.cross_entropy_rows(bad, target[:2], weight[:2])
    assert loss.isnan().tolist() == [True, False]
    beyond = kernels.cross_entropy_rows(torch.randn(2, V), torch.tensor([V, 1]), torch.ones(2))
    assert beyond.isnan().tolist() == [True, False]


def test_training_with_the_kernels_gives_the_losses_of_training_without(kernels, monkeypatch):
    losses = []
    idx = torch.randint(61, (2, 25))
    for on in (False, True):
        torch.manual_seed(3)
        model = tiny_model().train()
        if on:
            with_kernels(model, kernels, monkeypatch)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
        for _ in range(2):
            _, loss = model(idx[:, :-1], idx[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-5)


def test_kernels_that_are_wrong_or_do_not_fit_are_left_alone(kernels, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    assert 'tensor-core' in kernels.enable(model)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    for name, wrong in (('product', 'product'), ('weight_grad', 'gradient'), ('cross_entropy_rows', 'loss')):
        right = getattr(kernels, name)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, name, lambda *args, right=right: right(*args) * 1.05)
            assert f'another {wrong} in torch.float32' in kernels.enable(model)
            if name == 'cross_entropy_rows':
                patch.setattr(kernels, name, lambda z, *args, right=right: (right(z, *args), z.mul_(1.05))[0])
                assert "another loss's gradient in torch.float32" in kernels.enable(model)
            patch.setattr(kernels, name, lambda *args: torch.zeros(3)[torch.tensor(7)])
            assert 'IndexError' in kernels.enable(model)
    assert model.rows_fn is model_file.cross_entropy_rows
    assert model.moe_layers()[0].experts_fn is model_file.sorted_experts
