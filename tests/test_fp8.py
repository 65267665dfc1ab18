"""FP8: the quantiser against a scalar reference, the products against fp32, and training."""

import dataclasses
import functools
import math
import re

import pytest
import torch
from conftest import SMALL, run, run_inside, tiny_model, torchrun
from test_cuda import needs_cuda_build, on_fake_cuda
from test_model import main_config
from torch.nn import functional as F
from torch.nn.functional import ScalingType as S

from extras import fp8
from model import GPT, MoE

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
    q, scale, _ = fp8.quantise(x, (1, 128), dtype, power_of_two)
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
    quantised = fp8.quantise(x, (1, 128))
    y = quantised.wide()
    assert quantised.scale.isnan().tolist() == [[False, False], [True, False], [False, False], [False, False]]
    assert y[1, :128].isnan().all() and y[1, 128:].isfinite().all() and y[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize('tile', [(1, 128), (128, 128), (1, 0), (0, 0)])
def test_the_error_is_the_formats(tile):
    """Three bits of mantissa: no number that is not subnormal is off by more than 1/16."""
    x = torch.randn(3, 130, 200) + 3 * torch.randn(3, 130, 200).sign()
    y = fp8.quantise(x, tile).wide()
    assert ((y - x).abs() <= x.abs() / 16 * 1.0001).all() and (y != x).any()


def test_the_largest_numbers_and_the_smallest_scales():
    """A tile's largest magnitude becomes the format's largest number. No scale is subnormal: GPUs may flush it."""
    for dtype in (E4M3, E5M2):
        q, scale, _ = fp8.quantise(torch.tensor([[1e-37, -3.0, 2.0]]), (1, 1), dtype)
        assert q[0, 1:].float().tolist() == [-torch.finfo(dtype).max, torch.finfo(dtype).max]
        assert scale[0, 0] == torch.finfo(torch.float32).tiny
        assert q[0, 0].float() * scale[0, 0] == pytest.approx(1e-37, rel=1 / 8)


@pytest.mark.parametrize('scaling, of_x, of_w', [('tile', (200, 3), (2, 3)), ('row', (200, 1), (200, 1)),
                                                 ('tensor', (1, 1), (1, 1))])
def test_what_shares_a_scale(scaling, of_x, of_w):
    """Scales of an activation and of a weight, both (200, 300): V3's are 1 x 128 and 128 x 128."""
    x, recipe = torch.randn(200, 300), fp8.Recipe(scaling)
    assert fp8.activation(x, recipe).scale.shape == of_x and fp8.weight_of(x, recipe).scale.shape == of_w


def test_gradients_and_they_alone_are_in_grad_dtype(monkeypatch):
    """In both products of the backward pass, of a linear layer and of the experts."""
    quantise, seen = fp8.quantise, []

    def spy(x, tile, dtype=E4M3, power_of_two=False):
        seen.append((x.abs().max().item() > 100, dtype))             # gradients are large here
        return quantise(x, tile, dtype, power_of_two)

    monkeypatch.setattr(fp8, 'quantise', spy)
    x, w = torch.randn(64, 32, requires_grad=True), torch.randn(2, 48, 32, requires_grad=True)
    recipe, offsets = fp8.Recipe(grad_dtype=E5M2), torch.tensor([32, 64], dtype=torch.int32)
    for y in (fp8.LinearFunction.apply(x, w[0], recipe, torch.float32, False),
              fp8.GroupedFunction.apply(x, w, offsets, recipe)):
        seen.clear()
        y.backward(1000 * torch.randn(64, 48))
        assert sorted(seen, key=str) == [(False, E4M3)] * 2 + [(True, E5M2)] * 2


def test_the_experts_weight_gradient_has_its_tiles_along_the_rows():
    """A feature that is a million times larger than the others spoils none of their gradients."""
    x, grad, weight = torch.randn(256, 32), torch.randn(256, 48), torch.randn(2, 48, 32)
    offsets = torch.tensor([128, 256], dtype=torch.int32)
    x[:, 0] *= 1e6
    grad[:, 0] *= 1e6
    exact = torch.stack([grad[rows].t() @ x[rows] for rows in (slice(0, 128), slice(128, 256))])
    kept = fp8.Quantised(x, torch.ones(256, 32), (1, 1))             # not rounded
    _, ours = fp8.grouped_gradients(grad, weight, kept, offsets, fp8.Recipe(), torch.float32)
    error = (ours - exact)[:, 1:, 1:].norm() / exact[:, 1:, 1:].norm()
    assert 0.01 < error < 0.06


def test_tiles_keep_outliers_to_themselves():
    """V3 section 3.3.2: with one outlier in a thousand, tiles lose less than one scale for the tensor."""
    x, w = torch.randn(256, 512) * 1e-3, torch.randn(384, 512)
    x[torch.rand_like(x) < 1e-5] = 100.0
    clean = (x.abs() < 1).all(dim=1)
    exact = x @ w.t()
    error = {}
    for scaling in ('tile', 'row', 'tensor'):
        y = fp8.LinearFunction.apply(x, w, fp8.Recipe(scaling), torch.float32, False)
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
    ours = torch.autograd.grad((fp8.LinearFunction.apply(x, w, recipe, torch.float32, False) * dy).sum(), (x, w))
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
        expected = fp8.LinearFunction.apply(part, w, recipe, torch.float32, False)
        torch.testing.assert_close(y[rows], expected)
        expected.backward(dy[rows])
        torch.testing.assert_close(grad_x[rows], part.grad)
        assert ((grad_w[e] - w.grad).norm() / w.grad.norm()).item() < 0.05  # other tiles along the rows
    assert (grad_w[1] == 0).all() and grad_w.isfinite().all()


def test_rows_that_are_nobodys_spoil_nothing(monkeypatch):
    """Whatever the inputs, the gradients and grouped_mm's results hold there, their tiles are as without it."""
    grouped_linear = fp8.model_file.grouped_linear

    def leaves_nan(x, weight, offsets):
        y = grouped_linear(x, weight, offsets)
        return torch.where((torch.arange(len(y)) < offsets[-1]).unsqueeze(1), y, math.nan)

    monkeypatch.setattr(fp8.model_file, 'grouped_linear', leaves_nan)
    x, weight, dy = torch.randn(40, 32), torch.randn(2, 48, 32), torch.randn(40, 48)
    offsets = torch.tensor([16, 32], dtype=torch.int32)
    seen = []
    for filler in (0.0, math.nan):
        a, w = x.clone(), weight.clone().requires_grad_()
        a[32:] = filler
        a.requires_grad_()
        y = fp8.GroupedFunction.apply(a, w, offsets, fp8.Recipe())
        y.backward(torch.cat((dy[:32], torch.full((8, 48), filler))))
        seen.append((y, a.grad, w.grad))
        assert (y[32:] == 0).all() and (a.grad[32:] == 0).all()
    assert all(torch.equal(p, q) and p.isfinite().all() for p, q in zip(*seen))


def test_swiglu_from_fp8_inputs():
    """Its value is exact; its gradients are those of the plain form at the inputs as FP8 has them."""
    x, g, dy = torch.randn(6, 300, requires_grad=True), torch.rand(6, 1, requires_grad=True), torch.randn(6, 150)
    y = fp8.SwiGLU.apply(x, g, 0.0)
    near = fp8.quantise(x.detach(), (1, 128)).wide().requires_grad_()
    gate, up = near.chunk(2, dim=-1)
    torch.testing.assert_close(y, torch.nn.functional.silu(x[:, :150]) * x[:, 150:] * g)
    expected = torch.autograd.grad((torch.nn.functional.silu(gate) * up * g * dy).sum(), (near, g))
    torch.testing.assert_close(torch.autograd.grad((y * dy).sum(), (x, g)), expected)


def test_a_changed_activation_arrives(monkeypatch):
    """An FFN and experts of ReLU^2 give in FP8 what they give without it, and their gradients."""
    def relu_squared(x, limit):
        gate, up = x.chunk(2, dim=-1)
        return F.relu(gate).square() * up

    def through(block, x):
        y = block.mlp(x)[0] if isinstance(block.mlp, MoE) else block.mlp(x)
        return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]

    model, x = tiny_model(first_k_dense_replace=1), torch.randn(4, 16, 32, requires_grad=True)
    silu = [through(block, x) for block in model.transformer.h]
    monkeypatch.setattr('model.swiglu', relu_squared)
    relu = [through(block, x) for block in model.transformer.h]
    fp8.enable(model, fp8.Recipe())
    for block, *results in zip(model.transformer.h, silu, relu):
        for got, before, want in zip(through(block, x), *results):
            assert (got - want).norm() < 0.15 * want.norm() and (before - want).norm() > 0.5 * want.norm()


def kept_bytes(model, idx):
    """Of all that a training forward keeps for its backward pass, parameters and repeated storages aside."""
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t  # held, so that no address comes twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast('cpu', torch.bfloat16):
        model(idx[:, :-1], idx[:, 1:])
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def test_what_is_kept_for_the_backward_pass():
    """Of a linear layer: x in one byte a number and a scale for 128. Of a model: a quarter less than in bf16."""
    kept = []
    x, w = torch.randn(256, 512, requires_grad=True), torch.randn(128, 512, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fp8.LinearFunction.apply(x, w, fp8.Recipe(), torch.float32, False)
    assert sum(t.nbytes for t in kept if t.data_ptr() != w.data_ptr()) == 256 * 512 + 256 * 4 * 4
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fp8.LinearFunction.apply(x, w, fp8.Recipe(), torch.float32, True)
    assert any(torch.equal(t, x) for t in kept)                      # attention's output projection keeps x itself
    model = tiny_model(n_embd=128, n_head=4, num_nextn_predict_layers=0, block_size=128)
    idx = torch.randint(61, (4, 129))
    plain = kept_bytes(model, idx)
    fp8.enable(model, fp8.Recipe())
    linear = {name: m.keep_wide for name, m in model.named_modules() if isinstance(m, fp8.Linear)}
    assert any(linear.values()) and all(wide == name.endswith('o_proj') for name, wide in linear.items())
    assert kept_bytes(model, idx) < 0.75 * plain


@pytest.mark.parametrize('scaling', ['row', 'tensor'])
@pytest.mark.parametrize('grad_dtype', [E4M3, E5M2])
def test_scaled_mm_is_the_emulation(scaling, grad_dtype):
    """The CPU's own FP8 kernels, which know these two: all three products, of shapes that must be padded."""
    x, w, dy = torch.randn(50, 70), torch.randn(33, 70) * torch.exp2(torch.randn(33, 1)), torch.randn(50, 33)
    recipe = fp8.Recipe(scaling, grad_dtype)
    for name, args in ((fp8.output, (x, w)), (fp8.grad_input, (dy, w)), (fp8.grad_weight, (dy, x))):
        ours, emulated = (name(*args, recipe._replace(hardware=hardware), torch.bfloat16) for hardware in (True, False))
        assert ours.shape == emulated.shape and ((ours - emulated).norm() / emulated.norm()).item() < 0.01


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
                               '--bf16_moments=True', cwd=small)
    assert code == 0, said
    optimizer = torch.load(small / 'out-tile/ckpt.pt', weights_only=True)['optimizer']
    assert {state['exp_avg'].dtype for state in optimizer['state'].values()} == {torch.bfloat16}


@pytest.mark.parametrize('flags', [['--fp8=True', '--fp8_scaling=column'], ['--fp8=True', '--fp8_grad=e3m4'],
                                   ['--bf16_moments=True', '--optimizer=muon']])
def test_mistakes(small, flags):
    code, _, said = run_inside('train.py', *SMALL, *flags, cwd=small)
    assert code == 2 and len(said.strip().splitlines()) == 1
    assert flags[0][2:].split('=')[0] in said or flags[1][2:].split('=')[0] in said


FILES = {'fp8': 'extras/fp8.py', 'bf16_moments': 'extras/optim.py'}


@pytest.mark.parametrize('flag', FILES)
def test_train_without_the_file(small, flag):
    (small / FILES[flag]).unlink()
    code, _, said = run_inside('train.py', *SMALL, f'--{flag}=True', cwd=small)
    assert code == 2
    assert said == f'{flag}=True needs {FILES[flag]}: copy the folder extras/ to where train.py is\n'


def test_the_start_up_check(monkeypatch):
    """On the CPU, whose kernels for rows are real: no fault; one where a scale is misread, or a kernel missing."""
    recipe, device = fp8.Recipe('row', hardware=True), torch.device('cpu')
    assert fp8.fault_of_hardware(recipe, device) == ''
    assert 'no kernel for it here' in fp8.fault_of_hardware(recipe._replace(scaling='tile'), device)
    assert 'no kernel for it here' in fp8.fault_of_hardware(recipe._replace(grouped=True), device)
    layout = fp8.scale_layout
    monkeypatch.setattr(fp8, 'scale_layout', lambda x: layout(x).flip(0))
    assert fp8.fault_of_hardware(recipe, device) == 'the hardware gives another y'


@needs_cuda_build
@pytest.mark.parametrize('capability, tried', [((9, 0), True), ((8, 9), False), ((10, 0), False), ((10, 3), False)])
def test_the_grouped_kernel_is_tried_on_hopper_alone(monkeypatch, capability, tried):
    """Where it traps, the trial itself would end the run. No kernel is launched here, there is no GPU."""
    from torch._subclasses import FakeTensorMode

    trials = []
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
    monkeypatch.setattr(fp8, 'fault_of_hardware', lambda recipe, device: trials.append(recipe) or '')
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, _ = on_fake_cuda(tiny_model(n_routed_experts=16))
        torch.set_autocast_enabled('cuda', False)
        said = fp8.enable(model, fp8.Recipe('row'))
        assert [recipe.grouped for recipe in trials] == [False, True][:1 + tried]
        assert said.endswith('experts by scaled_grouped_mm' if tried else 'experts multiplied out')
        model, _ = on_fake_cuda(tiny_model(n_routed_experts=6))
        torch.set_autocast_enabled('cuda', False)
        assert fp8.enable(model, fp8.Recipe('row')).endswith('so are the experts')


def cublas(a, b, scale_a, kind_a, scale_b, kind_b, output_dtype=None, **_):
    """scaled_mm as cuBLAS documents it, slowly: an assertion where it would refuse or misread its arguments.

    docs.nvidia.com/cuda/cublas/#scaling-factors-layouts says where in memory the scale of an element lies.
    """
    (M, K), N = a.shape, b.size(1)
    assert a.dtype in (E4M3, E5M2) and b.dtype in (E4M3, E5M2) and scale_a.dtype == scale_b.dtype == torch.float32
    assert a.stride() == (K, 1) and b.stride() == (1, K) and M % 16 == N % 16 == K % 128 == 0
    y = wide(a, scale_a, kind_a) @ wide(b.t(), scale_b, kind_b).t()
    return y.to(output_dtype)


def wide(q, scale, kind):
    """q (rows, K) times its scales, which are checked for the shapes and strides that torch asks for."""
    rows, K = q.shape
    tiles = K // 128
    padded = -(-tiles // 4) * 4
    row, tile = torch.arange(rows, device=q.device).unsqueeze(1), torch.arange(K, device=q.device) // 128
    shapes, strides, place = {
        S.TensorWise: ([()], (), 0 * row + 0 * tile),
        S.RowWise: ([(rows, 1), (1, rows)], None, row + 0 * tile),
        S.BlockWise1x128: ([(rows, tiles)], (1, rows), row + rows * tile),
        S.BlockWise128x128: ([(padded, -(-rows // 128))], (1, padded), tile + padded * (row // 128)),
    }[kind]
    assert scale.shape in shapes, (kind, scale.shape)
    if strides is not None:
        assert all(a == b for a, b, n in zip(scale.stride(), strides, scale.shape) if n > 1), (kind, scale.stride())
    else:
        assert scale.is_contiguous()
    memory = scale.as_strided((scale.numel(),), (1,))
    return q.float() * memory[place]


@pytest.mark.parametrize('grad_dtype', [E4M3, E5M2])
@pytest.mark.parametrize('rows', [1, 50, 700])
def test_scale_layouts_are_those_cublas_documents(monkeypatch, rows, grad_dtype):
    """All three products, of 1, 3, 5 and 6 tiles along the contraction, of magnitudes that vary from tile to tile.

    All numbers are positive: nothing cancels, so the order of the sums does not matter.
    """
    monkeypatch.setattr(fp8.F, 'scaled_mm', cublas)
    recipe = fp8.Recipe(grad_dtype=grad_dtype)
    x, w, dy = (torch.rand(m, n) * torch.exp2(4 * torch.randn(m, 1)) * torch.exp2(4 * torch.randn(n))
                for m, n in ((rows, 640), (300, 640), (rows, 300)))
    for function, args in ((fp8.output, (x, w)), (fp8.grad_input, (dy, w)), (fp8.grad_weight, (dy, x))):
        ours, emulated = (function(*args, recipe._replace(hardware=hardware), torch.float32)
                          for hardware in (True, False))
        torch.testing.assert_close(ours, emulated, rtol=0.005, atol=0)  # bf16


@needs_cuda_build
@pytest.mark.parametrize('experts', [20, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize('scaling', ['tile', *(pytest.param(s, marks=pytest.mark.slow) for s in ('row', 'tensor'))])
def test_full_size_forward_traces_on_fake_cuda_tensors_through_scaled_mm(monkeypatch, scaling, experts, capability):
    """Each FP8 linear layer comes to one scaled_mm, and the experts to two where 14 of 20 are one wide layer; and the
    two products of a linear layer's backward pass, as direct calls."""
    from torch._subclasses import FakeTensorMode

    calls, shapes, scaled_mm = [], set(), torch.nn.functional.scaled_mm

    def checked(*args, **kwargs):
        calls.append(None)
        cublas(*args, **kwargs)
        return scaled_mm(*args, **kwargs)

    _, config = main_config()
    model = GPT(dataclasses.replace(config, n_layer=2, num_nextn_predict_layers=1, n_routed_experts=experts))
    fp8.enable(model, fp8.Recipe(scaling))
    recipe = fp8.Recipe(scaling, hardware=True, grouped=scaling == 'row')
    linear = [m for m in model.modules() if isinstance(m, fp8.Linear)]
    for module in model.modules():
        if isinstance(module, fp8.Linear):
            module.recipe = recipe
    ways = (functools.partial(way, recipe=recipe) for way in (fp8.sorted_experts, fp8.wide_experts))
    fp8.experts_file.enable(model, *ways)
    monkeypatch.setattr(fp8.F, 'scaled_mm', checked)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, idx = on_fake_cuda(model.train())
        try:
            _, loss = model(idx, idx)
        finally:
            torch.set_autocast_enabled('cuda', False)
        in_forward = len(linear) + (2 * len(model.moe_layers()) if experts == 20 else 0)
        assert loss.device.type == 'cuda' and len(calls) == in_forward
        for rows in (idx.numel(), 1000):
            for weight in [m.weight for m in linear]:
                x, dy = (torch.empty(rows, n, device='cuda', dtype=torch.bfloat16) for n in reversed(weight.shape))
                shapes.add(weight.shape)
                assert fp8.grad_input(dy, weight, recipe, torch.bfloat16).shape == x.shape
                assert fp8.grad_weight(dy, x, recipe, torch.bfloat16).shape == weight.shape
        for weight in (model.transformer.h[0].mlp.experts_gate_up, model.transformer.h[0].mlp.experts_down):
            (E, out, width), M = weight.shape, 1003
            x, dy = (torch.empty(M, n, device='cuda', dtype=torch.bfloat16) for n in (width, out))
            offsets = torch.empty(E, dtype=torch.int32, device='cuda')
            grad_x, grad_w = fp8.grouped_gradients(dy, weight, fp8.activation(x, recipe), offsets, recipe, x.dtype)
            assert grad_x.shape == x.shape and grad_w.shape == weight.shape
    assert len(calls) == in_forward + 4 * len(linear) and len(shapes) == 7


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(small):
    """But for the tiles along the rows, which end with a rank's rows."""
    flags = [*SMALL, '--fp8=True', '--batch_size=8', '--log_interval=1']
    run('train.py', *flags, '--out_dir=one', cwd=small)
    torchrun(small, *flags, '--out_dir=two')
    one, two = (torch.load(small / out / 'ckpt.pt', weights_only=True)['model'] for out in ('one', 'two'))
    for k in one:
        torch.testing.assert_close(two[k], one[k], atol=1e-3, rtol=1e-2, msg=lambda m, k=k: f'{k}: {m}')


@pytest.mark.slow
@pytest.mark.parametrize('scaling', ['tile', 'tensor'])
def test_blocks_compile(scaling):
    """Compiled block by block, a training step gives the loss and the gradients of one that is not.

    In fp32: in bf16 a compiled block rounds elsewhere, and FP8 makes steps of what then falls on the other side.
    """
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = tiny_model(std=0.02, num_nextn_predict_layers=1)
        fp8.enable(model, fp8.Recipe(scaling))
        if compiled:
            model.compile()
        idx = torch.randint(61, (2, 33))
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results):
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize('scaling', ['row', 'tensor'])
def test_scaled_mm_under_compile_is_the_eager_one(scaling):
    """There it is an operation of its own. The CPU has it for rows and tensors."""
    recipe = fp8.Recipe(scaling, hardware=True)
    compiled = torch.compile(fp8.LinearFunction.apply, backend='aot_eager', fullgraph=True)
    results = []
    for function in (fp8.LinearFunction.apply, compiled):
        torch.manual_seed(1)
        x, w = torch.randn(40, 96, requires_grad=True), torch.randn(64, 96, requires_grad=True)
        y = function(x, w, recipe, torch.float32, False)
        y.square().sum().backward()
        results.append((y, x.grad, w.grad))
    for eager, opaque in zip(*results):
        assert torch.equal(eager, opaque) and eager.any()


@pytest.mark.parametrize('scaling', ['tile', 'row'])
def test_wide_experts_are_quantised_as_grouped_ones(monkeypatch, scaling):
    """Widths of whole tiles, so that none crosses from one expert to the next: by tiles the same numbers, forward."""
    moe = tiny_model(n_embd=128, moe_intermediate_size=128, n_shared_experts=0).transformer.h[0].mlp
    gpt = torch.nn.Module()
    gpt.lm_head, gpt.mlp, gpt.moe_layers, gpt.config = torch.nn.Linear(1, 1), moe, lambda: [moe], moe.config
    fp8.enable(gpt, fp8.Recipe(scaling))
    x = torch.randn(2, 20, 128, requires_grad=True)
    results = []
    for wide in (False, True):
        monkeypatch.setattr(fp8.experts_file, 'is_wide', lambda *args, wide=wide: wide)
        x.grad = None
        y, _ = moe(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    (grouped, grouped_grad), (wide, wide_grad) = results
    # by rows, an activation's scale is one for all of its experts in the one, and for each of them in the other
    assert (wide - grouped).norm() < (1e-5 if scaling == 'tile' else 0.1) * grouped.norm()
    assert (wide_grad - grouped_grad).norm() < 0.1 * grouped_grad.norm()
