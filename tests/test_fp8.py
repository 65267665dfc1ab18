"""FP8: the quantiser against a scalar reference, the products against fp32, and training."""

import math
import re

import pytest
import torch
from conftest import SMALL, run_inside, tiny_model

import fp8

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def nearest(value, dtype):
    """The number of the format next to a value, ties to an even mantissa; beyond its range its largest."""
    mantissa, smallest = {E4M3: (3, -6), E5M2: (2, -14)}[dtype]
    if value == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(value))), smallest)
    step = 2.0 ** (exponent - mantissa)  # below the smallest exponent: subnormals, evenly spaced
    return math.copysign(min(round(abs(value) / step) * step, fp8.MAX[dtype]), value)  # round() is half to even


@pytest.mark.parametrize('dtype', [E4M3, E5M2])
@pytest.mark.parametrize('power_of_two', [False, True])
def test_quantiser_against_a_scalar_reference(dtype, power_of_two):
    """Magnitudes over all exponents of the format and beyond, zeros, subnormals of it, outliers; ragged tiles."""
    x = torch.randn(5, 300) * torch.exp2(torch.randint(-40, 12, (5, 300)).float())
    x[0, :7], x[1, 3], x[2, 128:256] = 0.0, 1e6, 0.0
    q, scale = fp8.quantise(x, 1, 128, dtype, power_of_two)
    assert q.shape == x.shape and q.dtype == dtype and scale.shape == (5, 3)
    for i in range(5):
        for k in range(3):
            tile = x[i, 128 * k:128 * (k + 1)]
            s = scale[i, k].item()
            if tile.abs().max() == 0:
                assert s == 1
            elif power_of_two:
                assert s == 2.0 ** math.ceil(math.log2(tile.abs().max().item() / fp8.MAX[dtype]))
            else:
                assert s == pytest.approx(tile.abs().max().item() / fp8.MAX[dtype], rel=1e-6)
            ours = q[i, 128 * k:128 * (k + 1)].float().tolist()
            assert ours == [nearest((v / scale[i, k]).item(), dtype) for v in tile]


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(bad):
    """Its whole tile is nan, the others are as they were: no large number stands silently in its place."""
    x = torch.randn(4, 256)
    x[1, 5] = bad
    y = fp8.dequantise(*fp8.quantise(x, 1, 128), 1, 128)
    assert y[1, :128].isnan().all() and y[1, 128:].isfinite().all() and y[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize('tile', [(1, 128), (128, 128), (1, 0), (0, 0)])
def test_the_error_is_the_formats(tile):
    """Three bits of mantissa: no number that is not subnormal is off by more than 1/16."""
    x = torch.randn(3, 130, 200) + 3 * torch.randn(3, 130, 200).sign()
    y = fp8.dequantise(*fp8.quantise(x, *tile), *tile)
    assert ((y - x).abs() <= x.abs() / 16 * 1.0001).all() and (y != x).any()


def test_tiles_keep_outliers_to_themselves():
    """V3 section 3.3.2: with one outlier in a thousand, tiles lose less than one scale for the tensor."""
    x, w = torch.randn(256, 512) * 1e-3, torch.randn(384, 512)
    x[torch.rand_like(x) < 1e-5] = 100.0
    clean = (x.abs() < 1).all(dim=1)
    exact = x @ w.t()
    error = {}
    for scaling in ('tile', 'row', 'tensor'):
        y = fp8.LinearFunction.apply(x, w, fp8.Recipe(scaling), torch.float32)
        error[scaling] = ((y - exact)[clean].norm() / exact[clean].norm()).item()
    assert max(error['tile'], error['row']) < 0.05 and error['tensor'] > 2 * max(error['tile'], error['row'])


@pytest.mark.parametrize('recipe', [fp8.Recipe(), fp8.Recipe('row'), fp8.Recipe('tensor'),
                                    fp8.Recipe(power_of_two=True), fp8.Recipe(grad_dtype=E5M2)])
def test_gradients_against_fp32(recipe):
    """Within the rounding of two operands: about 4% each way for E4M3, twice that for E5M2; and not exact."""
    x, w = torch.randn(70, 96, requires_grad=True), torch.randn(200, 96, requires_grad=True)
    dy = torch.randn(70, 200)
    bound = 0.05 if recipe.grad_dtype == E4M3 else 0.09
    exact = torch.autograd.grad((x @ w.t() * dy).sum(), (x, w))
    ours = torch.autograd.grad((fp8.LinearFunction.apply(x, w, recipe, torch.float32) * dy).sum(), (x, w))
    for a, b in zip(ours, exact):
        assert 0.01 < ((a - b).norm() / b.norm()).item() < bound


def test_grouped_is_linear_expert_by_expert():
    """With one scale a row nothing is shared between experts but the tiles of dW; rows that are nobody's may be nan."""
    x, weight = torch.randn(40, 32), torch.randn(3, 48, 32)
    offsets = torch.tensor([16, 16, 32], dtype=torch.int32)
    x[32:] = math.nan
    x.requires_grad_(), weight.requires_grad_()
    recipe = fp8.Recipe()
    y = fp8.GroupedFunction.apply(x, weight, offsets, recipe)
    dy = torch.randn(40, 48)
    y[:32].backward(dy[:32])
    grad_x, grad_w = x.grad[:32].clone(), weight.grad.clone()
    for e, rows in ((0, slice(0, 16)), (2, slice(16, 32))):
        part, w = x[rows].detach().requires_grad_(), weight[e].detach().requires_grad_()
        expected = fp8.LinearFunction.apply(part, w, recipe, torch.float32)
        torch.testing.assert_close(y[rows], expected)
        expected.backward(dy[rows])
        torch.testing.assert_close(grad_x[rows], part.grad)
        assert ((grad_w[e] - w.grad).norm() / w.grad.norm()).item() < 0.05  # other tiles along the rows
    assert (grad_w[1] == 0).all() and grad_w.isfinite().all()


def test_what_is_kept_for_the_backward_pass():
    """x in one byte a number and a scale for 128; the weight is the parameter itself."""
    kept = []
    x, w = torch.randn(256, 512, requires_grad=True), torch.randn(128, 512, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fp8.LinearFunction.apply(x, w, fp8.Recipe(), torch.float32)
    assert sum(t.nbytes for t in kept if t.data_ptr() != w.data_ptr()) == 256 * 512 + 256 * 4 * 4


def test_a_model_learns_and_its_checkpoint_is_plain():
    """All linear layers but head and router, and the experts, are FP8's; parameters keep their names."""
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = tiny_model(std=0.02, num_nextn_predict_layers=1)
        names = set(model.state_dict())
        if enabled:
            fp8.enable(model, fp8.Recipe())
            plain = [name for name, m in model.named_modules() if type(m) is torch.nn.Linear]
            assert {name.split('.')[-1] for name in plain} == {'lm_head', 'gate'}
        assert set(model.state_dict()) == names
        optimizer = model.configure_optimizers(0.0, 3e-3, (0.9, 0.95), 'cpu')
        idx = torch.randint(61, (8, 33))
        for _ in range(30):
            loss = model(idx[:, :-1], idx[:, 1:])[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] != losses[0] and abs(losses[1] - losses[0]) < 0.05 * losses[0] < 4.0


def test_train_with_the_flag(small):
    """train.py --fp8=True trains, says what runs, and writes a checkpoint that goes on without the flag."""
    flags = ['--max_iters=4', '--eval_interval=4', '--log_interval=1']
    losses = {}
    for name, more in (('plain', []), ('tile', ['--fp8=True']), ('tensor', ['--fp8=True', '--fp8_scaling=tensor']),
                       ('e5m2', ['--fp8=True', '--fp8_grad=e5m2', '--fp8_power_of_two=True'])):
        code, out, said = run_inside('train.py', *SMALL, *flags, f'--out_dir=out-{name}', *more, cwd=small)
        assert code == 0, said
        assert ('FP8 products are emulated' in out) == (name != 'plain')
        losses[name] = re.findall(r'iter \d+: loss ([\d.]+)', out)
    assert losses['plain'] != losses['tile'] != losses['tensor'] and losses['e5m2'] != losses['tile']
    for ours, plain in zip(losses['tile'], losses['plain']):
        assert float(ours) == pytest.approx(float(plain), rel=0.02)
    code, _, said = run_inside('train.py', *SMALL, *flags, '--init_from=resume', '--out_dir=out-tile', '--max_iters=6',
                               cwd=small)
    assert code == 0, said


@pytest.mark.parametrize('flag', ['--fp8_scaling=column', '--fp8_grad=e3m4'])
def test_mistakes(small, flag):
    code, _, said = run_inside('train.py', *SMALL, '--fp8=True', flag, cwd=small)
    assert code == 2 and len(said.strip().splitlines()) == 1 and flag[2:].split('=')[0] in said


def test_train_without_the_file(small):
    (small / 'fp8.py').unlink()
    code, _, said = run_inside('train.py', *SMALL, '--fp8=True', cwd=small)
    assert code == 2 and said == 'fp8=True needs fp8.py beside train.py\n'
