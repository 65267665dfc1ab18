"""
What the first person with a GPU runs: its numbers against the CPU's, its host syncs, its speed, and a report to paste.

    make gpu                                                  # all of it; the report is gpu-report.md
    python tests/by_hand/test_gpu.py -k decoding              # a part of it
    TEST_GPU=cpu python -m pytest tests/by_hand/test_gpu.py   # the comparisons themselves: the CPU in the GPU's place

An error is a share of what is right: see distance(). What it may be follows from the errors that the CPU itself makes
in the same dtype against fp32 or fp64: see limits().
"""

import contextlib
import copy
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of conftest, when this is a script
GPU = os.environ.get('TEST_GPU', 'cuda')
if GPU == 'cuda' and not torch.cuda.is_available() and __name__ != '__main__':
    pytest.skip('no CUDA GPU', allow_module_level=True)

import numpy as np
from conftest import ROOT, SMALL, losses, optimizer_of, run, run_inside, tiny_model, torchrun
from test_decode import counting_model, plain, prompts_of
from torch.nn import functional as F

import model as model_file
from extras import decode, fp8, optim
from extras import experts as experts_file
from extras.scripts import use_kernels
from model import GPT, Gather, GPTConfig, LinearCrossEntropy, cross_entropy_rows, sort_by_expert

ON_GPU = GPU == 'cuda'
CAPABILITY = torch.cuda.get_device_capability() if ON_GPU and torch.cuda.is_available() else (0, 0)
# a T4 and older ones have no bf16
HALF = torch.float16 if ON_GPU and CAPABILITY < (8, 0) else torch.bfloat16
HALF_NAME = str(HALF).removeprefix('torch.')
needs_gpu = pytest.mark.skipif(not ON_GPU, reason='only a GPU can show it')
# extras/kernels.py wants tensor cores that multiply bf16
needs_kernels = pytest.mark.skipif(CAPABILITY < (8, 0) or importlib.util.find_spec('triton') is None,
                                   reason='no Triton, or a GPU below compute capability 8.0')


# -----------------------------------------------------------------------------
# errors, and what they may be

def distance(got, want):
    """The norm of the difference over that of `want`, or its largest number over the largest of `want`: the larger."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    assert got.shape == want.shape, (got.shape, want.shape)
    difference = got - want
    if not difference.isfinite().all():
        return math.inf
    if not want.any():
        return math.inf if difference.any() else 0.0
    return max((difference.norm() / want.norm()).item(), (difference.abs().max() / want.abs().max()).item())


def distances(got, want):
    assert got.keys() == want.keys()
    return {name: distance(got[name], want[name]) for name in want}


def limits(own, factor):
    """What the errors may be: so many times the errors `own`, or of the mean of those whose names begin with the same
    word, where one is small by luck.
    """
    kinds = {}
    for name, error in own.items():
        kinds.setdefault(name.split()[0], []).append(error)
    return {name: factor * max(error, statistics.mean(kinds[name.split()[0]]), torch.finfo(torch.float32).eps)
            for name, error in own.items()}


@pytest.fixture
def judge(record_property):
    """Notes the worst error for the report, and fails where one is beyond its limit."""
    def judge(errors, limit):
        limit = limit if isinstance(limit, dict) else dict.fromkeys(errors, limit)
        worst = max(errors, key=lambda name: errors[name] / max(limit[name], 1e-300))
        record_property('largest error', f'{errors[worst]:.1e} of {limit[worst]:.1e}, {worst}')
        beyond = {name: f'{error:.1e} > {limit[name]:.1e}' for name, error in errors.items()
                  if not error <= limit[name]}
        assert not beyond, beyond
    return judge


@pytest.fixture(autouse=True)
def on_a_clean_gpu():
    """fp32 products in fp32. After an error that no kernel can follow, xdist goes on in a new process."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.reset()
    yield
    if ON_GPU:
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception:
            if 'PYTEST_XDIST_WORKER' not in os.environ:
                raise
            os._exit(1)


def on_gpu(x):
    """A copy of a model or a tensor there."""
    return copy.deepcopy(x).to(GPU)


def autocast(device, dtype):
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(torch.device(device).type, dtype) if half else contextlib.nullcontext()


# -----------------------------------------------------------------------------
# the whole model

SIZES = dict(block_size=64, vocab_size=211, n_layer=3, n_head=4, n_embd=64, mtp_n_layer=1, eos_token_id=3)
MODELS = {'sorted': dict(n_routed_experts=16, num_experts_per_tok=3, n_group=4, topk_group=2, first_k_dense_replace=1),
          'wide': dict(n_routed_experts=20, num_experts_per_tok=14, scoring_func='softmax', bias=True),
          'dense': dict(n_routed_experts=0)}


def numbers(model, dtype):
    """{name: tensor}: logits, losses and gradients of a batch; and the experts' load."""
    device, found = model.lm_head.weight.device, {}
    generator = torch.Generator().manual_seed(1)
    idx, targets = torch.randint(SIZES['vocab_size'], (2, 8, SIZES['block_size']), generator=generator)
    targets[:, 10] = -1
    idx, targets = idx.to(device), targets.to(device)
    with autocast(device, dtype):
        model.eval()
        with torch.no_grad():
            found['logits of many tokens'], found['loss with logits'] = model(idx, targets)
            found['loss without'] = model(idx, targets, return_logits=False)[1]
            found['logits of few tokens'], _ = model(idx[:1])
        _, found['loss'] = model.train()(idx, targets)
    scale = 1024 if dtype == torch.float16 else 1  # as a GradScaler does
    (found['loss'] * scale).backward()
    found |= {f'loss of head {k}': loss for k, loss in enumerate(model.stats['losses'])}
    if 'balance' in model.stats:
        found['balance'] = model.stats['balance']
    for name, p in model.named_parameters():
        found[f'gradient of {name}'] = p.grad / scale
    return found, model.stats.get('load')


def prepared(model, way):
    """plain: model.py alone; ways: the experts' ways without a kernel of the project's own."""
    model = on_gpu(model)
    if way == 'ways':
        experts_file.enable(model)
    elif way != 'plain':
        assert use_kernels(model) == (CAPABILITY >= (8, 0))
    if way == 'compiled':
        model.compile()
    return model


ways = pytest.mark.parametrize('kind, way', [
    ('sorted', 'plain'), ('sorted', 'kernels'), ('sorted', 'compiled'), ('wide', 'plain'), ('wide', 'ways'),
    ('wide', 'kernels'), ('wide', 'compiled'), ('dense', 'plain')])


@ways
def test_model_in_fp32(kind, way, judge):
    """It may be 8 times as far from fp64 as the CPU in fp32 is. (Norms and routers are in fp32 in all of them.)"""
    model = tiny_model(0.1, **SIZES, **MODELS[kind])
    want, load = numbers(copy.deepcopy(model).double(), torch.float64)
    own = distances(numbers(copy.deepcopy(model), torch.float32)[0], want)
    there = prepared(model, way)
    got, load_there = numbers(there, torch.float32)
    judge(distances(got, want), limits(own, 8))
    if load is not None:
        assert torch.equal(load_there.cpu(), load)
        for x in (model, there):
            x.update_balance(load.to(x.lm_head.weight.device))
        for ours, theirs in zip(there.moe_layers(), model.moe_layers()):
            b = theirs.e_score_correction_bias
            assert b.any() and torch.allclose(ours.e_score_correction_bias.cpu(), b, atol=1e-7)


def fix_choices(model):
    """Every token's experts are the same, in every dtype: one that rounding changes would be a large error. Others are
    idle. Scores lie in 0..1, and no two sums of two powers of two are equal.
    """
    for moe in model.moe_layers():
        moe.e_score_correction_bias.copy_(2.0 ** (1 + torch.randperm(moe.config.n_routed_experts)))
    return model


@ways
def test_model_in_half_precision(kind, way, judge):
    """It may be 3 times as far from the CPU's fp32 as the CPU's bf16 is."""
    model = fix_choices(tiny_model(0.1, **SIZES, **MODELS[kind]))
    want, load = numbers(copy.deepcopy(model), torch.float32)
    own = distances(numbers(copy.deepcopy(model), torch.bfloat16)[0], want)
    got, load_there = numbers(prepared(model, way), HALF)
    # the balance loss counts the choices without the bias, which rounding changes
    judge(distances(got, want), limits(own, 3) | {'balance': 0.01})
    if load is not None:
        assert torch.equal(load_there.cpu(), load)


# -----------------------------------------------------------------------------
# the experts' products, the loss and the balance

LOADS = {'ragged': [37, 1, 90, 64, 129], 'empty experts': [0, 200, 0, 57, 0], 'one expert': [0, 0, 300, 0, 0],
         'even': [64] * 5}


def outcomes(function, tensors, device, dtype):
    """function(*tensors), and the gradients of its product with some dy."""
    tensors = [t.detach().to(device, dtype, copy=True).requires_grad_() for t in tensors]
    y = function(*tensors)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    y.backward(dy.to(y))
    return {'result': y, **{f'gradient of operand {i}': t.grad for i, t in enumerate(tensors)}}


def judge_product(judge, ours, plainly, tensors, dtype):
    """ours(*tensors) on the GPU may be 3 times as far from fp64 as plainly(*tensors) on the CPU is, in fp32 8 times."""
    tensors = [t.to(dtype) for t in tensors]
    want = outcomes(plainly, tensors, 'cpu', torch.float64)
    own = distances(outcomes(plainly, tensors, 'cpu', dtype), want)
    judge(distances(outcomes(ours, tensors, GPU, dtype), want), limits(own, 8 if dtype == torch.float32 else 3))


def grouped(function, loads):
    """Of x (sum(loads), in) and weight (E, out, in); function also gets 13 rows that no expert has."""
    def call(x, weight):
        offsets = torch.tensor(loads, dtype=torch.int32, device=x.device).cumsum(0, dtype=torch.int32)
        return function(F.pad(x, (0, 0, 0, 13), value=1.0), weight, offsets)[:len(x)]
    return call


def loop_over_experts(loads):
    return lambda x, weight: torch.cat([F.linear(part, w) for part, w in zip(x.split(loads), weight)])


def dispatched(function, experts):
    """Of x (N, in) and weight (E, out, in), the products with each token's K experts: (N, K, out)."""
    def call(x, weight):
        gates = torch.ones(experts.shape, device=x.device)
        token, place, _, offsets = sort_by_expert(experts.to(x.device), gates, len(weight))
        return function(x, weight, offsets, token, place)[place]
    return call


def some_experts(N, K, E):
    """(N, K), no two of a row alike, of which the first and the last of E are idle."""
    return torch.rand(N, E - 2).topk(K, dim=-1).indices + 1


def each_token_its_experts(experts):
    return lambda x, weight: torch.einsum('nc,nkoc->nko', x, weight[experts.to(x.device)])


def operands(rows, E):
    return torch.randn(rows, 200), torch.randn(E, 136, 200) / 200 ** 0.5


@pytest.mark.parametrize('loads', LOADS.values(), ids=LOADS)
@pytest.mark.parametrize('dtype', [HALF, torch.float32], ids=str)
def test_grouped_linear(dtype, loads, judge):
    judge_product(judge, grouped(model_file.grouped_linear, loads), loop_over_experts(loads),
                  operands(sum(loads), len(loads)), dtype)


@needs_kernels
@pytest.mark.parametrize('loads', LOADS.values(), ids=LOADS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_grouped_linear_by_the_kernels(dtype, loads, judge):
    """Also on the GPUs that have torch's kernel."""
    from extras import kernels
    judge_product(judge, grouped(kernels.GroupedLinear.apply, loads), loop_over_experts(loads),
                  operands(sum(loads), len(loads)), dtype)


@pytest.mark.parametrize('dtype', [HALF, torch.float32], ids=str)
def test_dispatch_and_product(dtype, judge):
    def dispatch_linear(x, weight, offsets, token, place):
        return model_file.grouped_linear(Gather.apply(x, token, place), weight, offsets)
    experts = some_experts(150, 3, 9)
    judge_product(judge, dispatched(dispatch_linear, experts), each_token_its_experts(experts), operands(150, 9), dtype)


@needs_kernels
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dispatch_and_product_by_the_kernels(dtype, judge):
    from extras import kernels
    experts = some_experts(150, 3, 9)
    judge_product(judge, dispatched(kernels.DispatchLinear.apply, experts), each_token_its_experts(experts),
                  operands(150, 9), dtype)


@needs_kernels
def test_the_kernels_are_used_here():
    """enable() tries them first, and says why it does not."""
    from extras import kernels
    assert kernels.enable(on_gpu(tiny_model())) == ''


def test_rows_are_sorted_alike():
    for N, K, E in ((1, 1, 3), (300, 3, 16), (1000, 6, 64)):
        experts, gates = some_experts(N, K, E), torch.rand(N, K)
        want, got = sort_by_expert(experts, gates, E), sort_by_expert(experts.to(GPU), gates.to(GPU), E)
        for name, theirs, ours in zip(('token', 'place', 'gates', 'offsets'), want, got, strict=True):
            assert torch.equal(ours.cpu(), theirs), name


@pytest.mark.parametrize('rows_fn', ['eager', 'compiled', pytest.param('kernels', marks=needs_kernels)])
@pytest.mark.parametrize('dtype', [HALF, torch.float32], ids=str)
def test_loss(dtype, rows_fn, judge):
    """Against the plain formula in fp64; what it may be wrong by, as for the model."""
    if rows_fn == 'kernels':
        from extras import kernels
        rows_fn = kernels.cross_entropy_rows
    else:
        rows_fn = torch.compile(cross_entropy_rows) if rows_fn == 'compiled' else cross_entropy_rows
    N, V, C = 2600, 5003, 64                                                # more rows than a chunk, ragged slices
    target = torch.randint(V, (N,))
    row_weight = torch.rand(N) / N
    target[::7], row_weight[::7] = -1, 0

    def ours(h, w):
        with autocast(GPU, dtype):
            return LinearCrossEntropy.apply(h, w, target.to(GPU), row_weight.to(GPU), rows_fn, True)

    def plainly(h, w):
        with autocast('cpu', torch.bfloat16 if dtype != torch.float32 else dtype):
            logits = h @ w.t()
        rows = F.cross_entropy(logits.float() if h.dtype == torch.float32 else logits, target, reduction='none',
                               ignore_index=-1)
        return (rows * row_weight).sum(), rows

    def found(function, device, leaf_dtype):
        h, w = (t.to(device, leaf_dtype, copy=True).requires_grad_() for t in (hidden, weight))
        loss, rows = function(h, w)
        loss.backward()
        return {'loss': loss, 'loss of each row': rows.cpu()[row_weight > 0], 'gradient of h': h.grad,
                'gradient of the head': w.grad}
    hidden, weight = torch.randn(N, C), torch.randn(V, C) * 0.3
    want = found(plainly, 'cpu', torch.float64)
    own = distances(found(plainly, 'cpu', torch.float32), want)
    judge(distances(found(ours, GPU, torch.float32), want), limits(own, 8 if dtype == torch.float32 else 3))


# -----------------------------------------------------------------------------
# FP8

def fp8_products(recipe, device, dtype):
    """A linear layer's three products, whose contractions are 5, 3 and 2 tiles and a part of one."""
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-4, 4, (shape[0], 1),
                                                                                     generator=generator))
                for shape in ((200, 640), (328, 640), (200, 328)))
    x, w, dy = x.to(device).requires_grad_(), w.to(device).requires_grad_(), dy.bfloat16().to(device, dtype)
    y = fp8.LinearFunction.apply(x, w, recipe, dtype, False)
    y.backward(dy)
    return {'y': y, 'dx': x.grad, 'dW': w.grad}


RECIPES = [fp8.Recipe(scaling, grad_dtype, power_of_two) for scaling in ('tile', 'row', 'tensor')
           for grad_dtype, power_of_two in ((torch.float8_e4m3fn, False), (torch.float8_e5m2, True))]


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda r: f'{r.scaling}-{r.grad_dtype}'.replace('torch.float8_', ''))
@pytest.mark.parametrize('execution', ['emulation', 'scaled_mm'])
def test_fp8_products_are_those_of_the_cpus_emulation(recipe, execution, judge):
    """In fp32 that is exact; bf16 rounds to a 256th, scaled_mm once and the emulation its operands too."""
    there = recipe._replace(hardware=execution == 'scaled_mm')
    if there.hardware:
        fault = fp8.fault_of_hardware(there, torch.device(GPU))
        if fault.startswith('no kernel'):
            pytest.skip(fault)
        assert fault == ''
    judge(distances(fp8_products(there, GPU, HALF), fp8_products(recipe, 'cpu', torch.float32)), 0.01)


@pytest.mark.parametrize('way', ['plain', 'kernels'])
@pytest.mark.parametrize('kind', ['sorted', 'wide'])
@pytest.mark.parametrize('scaling', ['tile', 'row', 'tensor'])
def test_fp8_model(scaling, kind, way, judge, record_property):
    """It may be twice as far from fp32 as the CPU's FP8 is."""
    model = fix_choices(tiny_model(0.1, **SIZES, **MODELS[kind]))
    want, _ = numbers(copy.deepcopy(model), torch.float32)
    there, here = prepared(model, way), copy.deepcopy(model)
    kernels = way == 'kernels' and CAPABILITY >= (8, 0)
    record_property('execution', fp8.enable(there, fp8.Recipe(scaling, kernels=kernels)))
    fp8.enable(here, fp8.Recipe(scaling))
    own = distances(numbers(here, torch.bfloat16)[0], want)
    judge(distances(numbers(there, HALF)[0], want), limits(own, 2) | {'balance': 0.05})


# -----------------------------------------------------------------------------
# optimizers

def test_orthogonalise(judge):
    """It may be three times as far from fp64 as the CPU in bf16 is."""
    G = torch.randn(3, 96, 160)
    want = {'the wide': optim.orthogonalise(G.double()), 'the tall': optim.orthogonalise(G.double().mT)}
    own, got = ({'the wide': optim.orthogonalise(x), 'the tall': optim.orthogonalise(x.mT)}
                for x in (G.bfloat16(), G.to(GPU)))
    judge(distances(got, want), limits(distances(own, want), 3))


# of the whole update's: Muon's products are in bf16 on a GPU, and what rounds to bf16 may round the other way
STEP_LIMITS = {'adamw': 1e-4, 'bf16_moments': 0.004, 'muon': 0.05}


@pytest.mark.parametrize('kind', STEP_LIMITS)
def test_optimizer_steps(kind, judge):
    """What four steps change of each parameter, with the same gradients; the third changes nothing."""
    def updates(model):
        device = model.lm_head.weight.device
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        made = optimizer_of(model, 'muon' if kind == 'muon' else 'adamw', 0.1, 0.01, (0.9, 0.95), device.type)
        if kind == 'bf16_moments':
            made = optim.AdamW16(made.param_groups, fused=True)
        generator = torch.Generator().manual_seed(3)
        for i in range(4):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(device)
            made.found_inf = torch.tensor(float(i == 2), device=device)
            made.step()
        return {name: p - before[name] for name, p in model.named_parameters()}
    model = tiny_model()
    judge(distances(updates(on_gpu(model)), updates(model)), STEP_LIMITS[kind])


# -----------------------------------------------------------------------------
# decoding

@pytest.mark.parametrize('compiled', [False, True], ids=['eager', 'compiled'])
@pytest.mark.parametrize('kind', ['predictable', 'random'])
def test_decoding_gives_the_tokens_of_generate(kind, compiled, record_property):
    """Greedy, by both generate() and Decoder, plain and speculative, also past block_size; and drawn from the likeliest
    one alone. Random weights make drafts that are refused, the counting model's are accepted."""
    model = (counting_model if kind == 'predictable' else tiny_model)(block_size=64).eval()
    prompts, n = prompts_of(7, 1, 3), 70
    prompts[0] = [t % 11 for t in range(5, 12)]
    want = plain(model, prompts, n)
    model = on_gpu(model)
    use_kernels(model)
    assert [model.generate(torch.tensor([p], device=GPU), n, temperature=0)[0].tolist() for p in prompts] == want
    decoder = decode.Decoder(model, compiled)
    for speculative in (False, True):
        got, told = decoder.generate(prompts, n, temperature=0, speculative=speculative)
        assert got == want
        got, _ = decoder.generate(prompts, n, 1.0, top_k=1, speculative=speculative)
        assert got == want
    assert decoder.compile == compiled                                      # it did not go on without
    record_property('tokens of a pass', f'{(told.tokens.sum() / told.passes.sum()).item():.2f}')
    assert kind == 'random' or told.accepted.sum() > 0.8 * told.drafts.sum()


@pytest.mark.parametrize('speculative', [False, True], ids=['plain', 'speculative'])
def test_decoding_draws_from_the_models_distribution(speculative, judge, record_property):
    """20,000 rows' second new token; a chi-square of its counts against the exact distribution."""
    model = counting_model(steps=40, block_size=16)
    first = model(torch.tensor([[0, 1]]))[0][0, -1]
    p1 = model_file.probabilities(first, 2.0, 8)                            # (V,)
    likely = torch.arange(61)[p1 > 0]
    p2 = model_file.probabilities(model(torch.tensor([[0, 1, t] for t in likely]))[0][:, -1], 2.0, 8)
    want = p1[likely] @ p2                                                  # (V,)
    got, _ = decode.Decoder(on_gpu(model)).generate([[0, 1]] * 20_000, 3, 2.0, 8, speculative=speculative)
    counts = torch.bincount(torch.tensor(got)[:, 3], minlength=61)
    assert counts[want == 0].sum() == 0
    expected = want * 20_000
    often = expected >= 10
    chi = ((counts - expected)[often] ** 2 / expected[often]).sum().item()
    k = int(often.sum()) - 1
    record_property('chi-square', f'{chi:.0f}, {k} expected')
    assert k >= 7 and chi < k + 5 * math.sqrt(2 * k)


# -----------------------------------------------------------------------------
# train.py

SORTED = ('--n_routed_experts=16', '--num_experts_per_tok=2')  # SMALL's experts, 2 of 4, are one wide product


def curves_differ(a, b):
    """By how much of itself, at most: losses and gradient norms of two runs, by their common iterations."""
    common = a.keys() & b.keys()
    assert common
    return {f'iteration {i}': max(abs(x - y) / abs(y) for x, y in zip(a[i], b[i])) for i in sorted(common)}


@pytest.mark.parametrize('compiled', [False, True], ids=['eager', 'compiled'])
def test_a_resumed_run_goes_on(small, compiled, judge):
    """As an uninterrupted one does, to a thousandth; and as one on the CPU does, to TF32."""
    flags = [*SMALL, *SORTED, '--max_iters=12', '--lr_decay_iters=12', '--mtp_late_from=1.0', '--eval_interval=6',
             '--learning_rate=1e-2']
    there = [f'--device={GPU}', f'--compile={compiled}']
    for out, more in (('cpu', []), ('whole', there), ('halves', [*there, '--max_iters=6']),
                      ('halves', [*there, '--init_from=resume'])):
        printed = run('train.py', *flags, f'--out_dir=out-{out}', *more, cwd=small, timeout=900)
        assert 'going on without' not in printed or CAPABILITY < (8, 0), printed
    assert 'going on from out-halves/ckpt.pt, iteration 6' in printed
    cpu, whole, halves = (losses(small, f'out-{out}') for out in ('cpu', 'whole', 'halves'))
    assert list(halves) == list(whole) == list(range(12)) and whole[11][0] < whole[0][0]
    judge(curves_differ(halves, whole), 1e-3)
    judge(curves_differ(whole, cpu), 0.02)


@pytest.mark.parametrize('flags', [
    SORTED, (*SORTED, '--compile=True'), ('--compile=True',), ('--optimizer=muon', *SORTED), ('--bf16_moments=True',),
    ('--fp8=True',), ('--fp8=True', '--fp8_scaling=row', '--compile=True', *SORTED),
    pytest.param(('--dtype=float16', '--compile=True', *SORTED), marks=needs_gpu)], ids=' '.join)
def test_training_in_half_precision_learns(small, flags, record_property):
    """Half of the characters never come, so the loss falls from ln 40 = 3.69 to ln 20 = 3.00."""
    if '--bf16_moments=True' in flags and HALF == torch.float16:
        pytest.skip('not for fp16')
    printed = run('train.py', *SMALL, f'--device={GPU}', f'--dtype={HALF_NAME}', '--max_iters=80',
                  '--lr_decay_iters=80', '--learning_rate=1e-2', '--eval_interval=80', *flags, cwd=small, timeout=900)
    assert 'going on without torch.compile' not in printed, printed
    assert 'going on without' not in printed or CAPABILITY < (8, 0), printed
    records = [r for r in map(json.loads, (small / 'out/log.jsonl').read_text().splitlines()) if 'loss' in r]
    record_property('loss', f'{records[0]["loss"]:.3f} to {records[-1]["loss"]:.3f}')
    record_property('skipped', records[-1]['skipped'])
    assert records[0]['loss'] > 3.6 and records[-1]['loss'] < 3.1
    assert records[-1]['skipped'] <= (12 if 'float16' in (HALF_NAME, flags[0].removeprefix('--dtype=')) else 0)


def without_syncs(folder, flags, planted=()):
    """A copy of train.py in which, from the second iteration on, a host sync is an error: its exit code, and its words.
    """
    text = (folder / 'train.py').read_text()
    for line, added in (('while True:', "    torch.cuda.set_sync_debug_mode('default')"),
                        ('    # forward and backward, over the micro-batches',
                         "    torch.cuda.set_sync_debug_mode('error' if iter_num > 0 else 'default')"), *planted):
        assert text.count(f'\n{line}\n') == 1
        text = text.replace(f'\n{line}\n', f'\n{line}\n{added}\n')
    (folder / 'strict.py').write_text(text)
    try:
        code, printed, said = run_inside('strict.py', *SMALL, f'--device={GPU}', f'--dtype={HALF_NAME}',
                                         '--dropout=0.1', '--max_iters=5', '--log_interval=1000',
                                         '--eval_interval=1000', *flags, cwd=folder)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    return code, printed + said


@needs_gpu
@pytest.mark.parametrize('flags', [
    SORTED, (*SORTED, '--compile=True'), (), ('--compile=True',), ('--optimizer=muon', '--n_group=2', '--topk_group=1'),
    ('--fp8=True', '--scoring_func=softmax'), ('--fp8=True', '--fp8_scaling=row', *SORTED),
    ('--fp8=True', '--fp8_scaling=tensor', '--bf16_moments=True', *SORTED)], ids=' '.join)
def test_a_training_iteration_has_no_host_sync(small, flags):
    if '--bf16_moments=True' in flags and HALF == torch.float16:
        pytest.skip('not for fp16')
    if set(SORTED) <= set(flags) and CAPABILITY < (8, 0):
        pytest.skip('without extras/kernels.py, more than four times as many experts as are chosen wait for the host')
    code, printed = without_syncs(small, flags)
    assert code == 0 and 'going on without torch.compile' not in printed, printed
    assert (small / 'out/ckpt.pt').exists()


@needs_gpu
@pytest.mark.parametrize('after, planted', [
    ('        scaler.scale(loss / accumulation).backward()', '        loss.item()'),
    ('    iters_logged += 1', '    if bad: pass')])
def test_a_host_sync_is_seen(small, after, planted):
    code, printed = without_syncs(small, SORTED, [(after, planted)])
    assert code == 1 and 'synchronizing CUDA operation' in printed and planted.strip() in printed, printed


@needs_gpu
@pytest.mark.parametrize('compiled', [False, True], ids=['eager', 'compiled'])
def test_a_decoding_step_has_no_host_sync(compiled):
    """The first steps of a kind compile it, and record its CUDA graph."""
    model = on_gpu(tiny_model(block_size=128))
    use_kernels(model)
    model = decode.for_decoding(model, HALF)
    decoder = decode.Decoder(model, compiled)
    with torch.no_grad():
        for D, sampled in ((0, False), (2, False), (0, True), (2, True)):
            s = decoder.state(2, 64, D)
            decode.begin(model, s, [[1, 2, 3], [4]], 60, float(sampled), None, D, sampled, 10)
            for i in range(12):
                with sync_is_error(i >= 4):
                    decoder.take_step(s, D, sampled, 10)
    assert decoder.compile == compiled and s.known.min() >= 13
    with pytest.raises(RuntimeError, match='synchronizing'), sync_is_error(True):
        torch.ones(1, device=GPU).item()


@contextlib.contextmanager
def sync_is_error(on):
    torch.cuda.set_sync_debug_mode('error' if on else 'default')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason='one GPU')
@pytest.mark.parametrize('flags', [(), ('--optimizer=muon', '--compile=True')], ids=' '.join)
def test_two_ranks_train_as_one(small, flags, judge):
    """The same micro-batches, shared out: nccl between GPUs. Then the two resume what the one began."""
    flags = [*SORTED, *flags, f'--device={GPU}', '--max_iters=12', '--lr_decay_iters=12', '--mtp_late_from=1.0',
             '--eval_interval=6']
    run('train.py', *SMALL, *flags, '--out_dir=out-one', cwd=small, timeout=900)
    for more in ((), ('--init_from=resume', '--max_iters=16')):
        code, printed = torchrun(small, *flags, '--out_dir=out-two', *more)
        assert code == 0 and 'going on without torch.compile' not in printed, printed
    one, two = losses(small, 'out-one'), losses(small, 'out-two')
    assert list(one) == list(range(12)) and list(two) == list(range(16))
    judge(curves_differ(two, one), 0.01)


# -----------------------------------------------------------------------------
# speed: figures for the report; no bound is set on them

# what main_config_steps() changes of the main run; a CPU in the GPU's place gets a toy of it
STEPS = ['--max_iters=50', '--gradient_accumulation_steps=5', '--eval_interval=1000', '--eval_iters=1',
         '--log_interval=10', '--warmup_iters=20'] if ON_GPU else [
         '--max_iters=3', '--gradient_accumulation_steps=1', '--eval_iters=1', '--log_interval=1', '--block_size=128',
         '--n_layer=1', '--vocab_size=50304', '--num_nextn_predict_layers=1', '--device=cpu', '--dtype=float32']
MEASURED = '''
import runpy, torch
runpy.run_path('train.py', run_name='__main__')
print('PEAK', torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30)
'''


@pytest.fixture
def random_tokens(clone):
    """A clone with a data set of random tokens of GPT-2's vocabulary."""
    folder = clone / 'data/random'
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, n in (('train', 2_000_000), ('val', 100_000)):
        rng.integers(50257, size=n).astype(np.uint16).tofile(folder / f'{split}.bin')
    (clone / 'measured.py').write_text(MEASURED)
    return clone


def main_config_steps(folder, batch_size, flags):
    command = [sys.executable, 'measured.py', 'config/train_deepseek.py', '--dataset=random', '--out_dir=out',
               f'--batch_size={batch_size}', *STEPS, *flags]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('flags', [('--compile=False',), ('--compile=True',), ('--compile=True', '--fp8=True')],
                         ids=' '.join)
def test_50_steps_of_the_main_config(random_tokens, flags, record_property):
    """Five micro-batches an iteration instead of 40. Half the sequences in each, where memory ends, and again."""
    code = batch_size = 24 if ON_GPU else 2
    while code != 0 and batch_size > 1:
        batch_size //= 2
        code, printed = main_config_steps(random_tokens, batch_size, flags)
        assert code == 0 or 'out of memory' in printed, printed
        if code != 0:
            record_property('out of memory', re.findall('.*out of memory.*', printed)[-1])
    assert code == 0 and 'going on without torch.compile' not in printed, printed
    header, *records = map(json.loads, (random_tokens / 'out/log.jsonl').read_text().splitlines())
    assert header['config']['dtype'] == (HALF_NAME if ON_GPU else 'float32')  # the one that train.py chooses
    records = [r for r in records if 'loss' in r]
    speed = [(r['tokens_per_s'], r['mfu']) for r in records[1:]]            # the first holds the first calls
    tokens_per_s, mfu = (statistics.median(x[i] or math.nan for x in speed) for i in (0, 1))
    peak = [float(x) for x in re.search(r'PEAK (\S+) (\S+)', printed).groups()]
    for name, value in (('batch_size', batch_size), ('tokens/s', f'{tokens_per_s:,.0f}'), ('MFU', f'{mfu:.1%}'),
                        ('peak GiB', f'{peak[0]:.2f} allocated, {peak[1]:.2f} reserved'),
                        ('loss', f'{records[0]["loss"]:.3f} to {records[-1]["loss"]:.3f}'),
                        *((f'train.py said ({i})', line) for i, line in enumerate(
                            line for line in printed.splitlines() if re.match('going on|FP8', line)))):
        record_property(name, value)
    uniform = math.log(50257)                                               # the loss that random tokens allow
    assert all(uniform - 0.1 < r['loss'] < uniform + 0.5 and r['skipped'] < 10 for r in records)


@pytest.mark.slow
@pytest.mark.parametrize('experts, chosen', [(20, 14), (16, 8), (24, 8), (64, 6)])
def test_speed_of_the_experts_ways(experts, chosen, monkeypatch, record_property):
    """A compiled layer of the main run's width, forward and backward: experts.is_wide() chooses by estimates."""
    config = GPTConfig(n_layer=1, n_head=8, n_embd=512, n_routed_experts=experts, num_experts_per_tok=chosen,
                       moe_intermediate_size=256, num_nextn_predict_layers=0)
    x = torch.randn(12 if ON_GPU else 1, 1024, 512, device=GPU, requires_grad=True)
    seconds = {}
    for way in ('wide', 'grouped', 'kernels'):
        model = GPT(config).to(GPU)
        if way == 'kernels' and not use_kernels(model):
            continue
        if way == 'wide':
            experts_file.enable(model)
        monkeypatch.setattr(experts_file, 'is_wide', lambda *args, way=way: way == 'wide')
        moe = model.moe_layers()[0].train()
        moe.compile()
        times = []
        for _ in range(23):
            t0 = time.time()
            with autocast(GPU, HALF):
                moe(x)[0].sum().backward()
            if ON_GPU:
                torch.cuda.synchronize()
            times.append(time.time() - t0)
        seconds[way] = statistics.median(times[3:])
        torch._dynamo.reset()
    record_property('figures', ', '.join(f'{way} {1000 * s:.2f} ms' for way, s in seconds.items()))


@pytest.mark.slow
@pytest.mark.parametrize('compiled', [False, True], ids=['eager', 'compiled'])
@pytest.mark.parametrize('batch_size', [1, 8])
def test_speed_of_decoding(batch_size, compiled, record_property):
    """bench.py's: tokens per second behind 960 tokens of context, and the share of what memory's bandwidth allows."""
    toy = [] if ON_GPU else ['--prompt_tokens=8', '--new_tokens=4', '--n_layer=1', '--device=cpu']
    printed = subprocess.run(
        [sys.executable, 'bench.py', 'decode', '--peer=ours', '--json', f'--batch_size={batch_size}',
         f'--compile={compiled}', f'--dtype={HALF_NAME}', *toy], cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert printed.returncode == 0, printed.stderr
    row, = json.loads(printed.stdout)
    assert 'missing' not in row, row
    for name in ('tokens/s', 'of it', 'peak GiB', 'first run s'):
        record_property({'of it': "share of the bandwidth's"}.get(name, name), f'{row[name]:.3g}')


# -----------------------------------------------------------------------------
# the report

REPORT = 'gpu-report.md'


def machine():
    """What the report begins with. Not by torch: its context in this process would take memory of the GPU."""
    def said_by(*command):
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as e:
            return f'not known ({type(e).__name__})'
    triton = importlib.util.find_spec('triton') and __import__('triton').__version__
    gpus = said_by('nvidia-smi', '--query-gpu=name,driver_version,compute_cap,memory.total,power.limit',
                   '--format=csv,noheader')
    return {'GPU, driver, capability, memory, power limit': '; '.join(gpus.splitlines()),
            'torch': f'{torch.__version__}, CUDA {torch.version.cuda}', 'triton': triton,
            'python': f'{platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores',
            'commit': said_by('git', 'describe', '--always', '--dirty'), 'command': ' '.join(sys.argv)}


def cell(text):
    return ' '.join(str(text).split()).replace('|', '\\|')


class Report:
    """A plugin of pytest's: it hears of each test, and writes the file anew, so that a crash leaves what was seen."""

    def __init__(self):
        self.machine, self.rows, self.failures, self.start = machine(), {}, {}, time.time()
        self.write()

    def pytest_runtest_logreport(self, report):
        if report.when != 'call' and report.outcome == 'passed':
            return
        name = report.nodeid.split('::')[-1]
        said = '; '.join(f'{k}: {v}' for k, v in report.user_properties)
        if report.outcome == 'skipped':
            said = report.longrepr[2].removeprefix('Skipped: ')
        if report.outcome == 'failed':
            self.failures[name] = self.failures.get(name, '') + report.longreprtext[-4000:]
        self.rows[name] = (report.outcome, f'{report.duration:.1f}', said or self.rows.get(name, ('', '', ''))[2])
        self.write()

    def write(self):
        outcomes = [outcome for outcome, _, _ in self.rows.values()]
        count = ', '.join(f'{outcomes.count(outcome)} {outcome}' for outcome in ('passed', 'failed', 'skipped'))
        lines = ['# GPU report', '', *(f'- {name}: {cell(value)}' for name, value in self.machine.items()),
                 f'- {count}, in {(time.time() - self.start) / 60:.0f} minutes', '',
                 '| test | outcome | s | seen |', '|---|---|---|---|']
        # failures first, then the figures
        order = sorted(self.rows, key=lambda name: (self.rows[name][0] != 'failed', not re.search('steps|speed', name)))
        lines += [f'| {" | ".join(map(cell, (name, *self.rows[name])))} |' for name in order]
        for name, text in self.failures.items():
            lines += ['', f'## {name}', '', '```', text, '```']
        with open(REPORT, 'w') as f:
            f.write('\n'.join(lines) + '\n')


def main():
    if GPU == 'cuda' and not torch.cuda.is_available():
        print('no CUDA GPU here, or this torch has no CUDA build', file=sys.stderr)
        return 2
    # one worker: a GPU's speed is that of one test, and where a worker dies another goes on
    code = pytest.main([__file__, '-n', '1', '-m', '', '--max-worker-restart=100', *sys.argv[1:]], plugins=[Report()])
    print(f'\nthe report: {os.path.abspath(REPORT)}')
    return int(code)


if __name__ == '__main__':
    sys.exit(main())
