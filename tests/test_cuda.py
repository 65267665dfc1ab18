"""Readiness for CUDA, shown without a GPU: a forward traced at full size, and an audit of train.py's operations."""

import itertools
import linecache
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL, run_inside, tiny_model
from test_model import main_config
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import model
from extras import decode
from model import GPT


def grouped_mm_faults(args):
    """What CUDA's grouped_mm would refuse of these arguments; the rules of its meta kernel, and bf16."""
    faults = []
    for x in args[:2]:
        if x.dtype != torch.bfloat16:
            faults.append(f'dtype {x.dtype}')
        rows, cols = x.stride()[-2:]
        if not ((cols == 1 and rows * 2 % 16 == 0) or (rows == 1 and cols * 2 % 16 == 0)):
            faults.append(f'strides {x.stride()}')
        if x.data_ptr() % 16:
            faults.append('unaligned')
    offsets = args[2]
    if offsets.dtype != torch.int32:
        faults.append(f'offsets {offsets.dtype}')
    return faults


needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None,
                                      reason='this torch has no CUDA build, so it cannot trace CUDA kernels')


def on_fake_cuda(model):
    """In a FakeTensorMode: the model as if it lay on a GPU, under bf16 autocast, and a batch for it.

    torch.autocast turns itself off where there is no GPU: who calls this turns it off again by set_autocast_enabled.
    """
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty_like(p, device='cuda'))
        for name, b in list(module._buffers.items()):
            module._buffers[name] = torch.empty_like(b, device='cuda')
    model.transformer.wte.weight = model.lm_head.weight
    torch.set_autocast_enabled('cuda', True)
    torch.set_autocast_dtype('cuda', torch.bfloat16)
    return model, torch.empty(4, model.config.block_size, dtype=torch.long, device='cuda')


@needs_cuda_build
@pytest.mark.parametrize('experts', [20, 64])
@pytest.mark.parametrize('training', [True, False])
def test_full_size_forward_traces_on_fake_cuda_tensors(training, experts, capability, monkeypatch):
    """Fails on a data-dependent shape, on a dtype that grouped_mm refuses, and on a tensor left on the CPU.

    14 of 20 experts are one wide product, and of 64 grouped ones.
    """
    from torch._subclasses import FakeTensorMode

    _, config = main_config()
    config = replace(config, n_routed_experts=experts)
    with FakeTensorMode():
        gpt, idx = on_fake_cuda(GPT(config).train(training))
        try:
            if training:
                _, loss = gpt(idx, idx)
                gpt.update_balance(gpt.stats['load'])
                assert gpt.stats['load'].shape == (12, config.n_routed_experts)
            else:
                logits, loss = gpt(idx, idx)
                assert logits.shape == (4, config.block_size, config.vocab_size)
                monkeypatch.setattr(torch.Tensor, '__bool__', lambda x: True)  # read once, at the end: all finite?
                out = gpt.generate(idx[:, :7], 3, top_k=50)
                assert out.shape == (4, 10) and out.device.type == 'cuda'
        finally:
            torch.set_autocast_enabled('cuda', False)
        assert loss.device.type == 'cuda' and loss.dtype == torch.float32


@needs_cuda_build
@pytest.mark.parametrize('sampled', [True, False])
def test_a_full_size_decoding_step_traces_on_fake_cuda_tensors(sampled):
    """Plain and speculative: no shape of it, and no value of the host, depends on the tokens."""
    from torch._subclasses import FakeTensorMode

    _, config = main_config()
    with FakeTensorMode():
        gpt, _ = on_fake_cuda(GPT(config).eval())
        torch.set_autocast_enabled('cuda', False)
        gpt = decode.for_decoding(gpt, torch.bfloat16)
        for D in (0, 2):
            state = decode.empty_state(gpt, 4, 1056, D)
            decode.step(gpt, state, D, sampled, 50)
            assert all(x.device.type == 'cuda' for x in decode.tensors_of(state))


@pytest.mark.slow
def test_decoding_has_no_host_sync_in_a_step():
    """It looks at the rows once in as many passes as they need at least."""
    gpt = decode.for_decoding(tiny_model(block_size=128), torch.bfloat16)
    for speculative, temperature in itertools.product((False, True), (0, 1.0)):
        with Audit() as audit, HostCopies(audit):
            decode.Decoder(gpt).generate([[1, 2, 3], [4]], 101, temperature, 10, speculative=speculative)
        looks = [n for line, n in audit.syncs.items() if 'remaining =' in line]
        assert len(looks) == 1 and (1 < looks[0] <= 20 if speculative else looks[0] == 1), audit.syncs
        # and where it takes up the result
        others = {line.split(': ')[0] for line in audit.syncs if 'remaining =' not in line}
        assert others <= {'tolist', 'cpu'}, audit.syncs


class Audit(TorchDispatchMode):
    """Counts the operations that would make the host wait for the GPU, by the project's line that asked for them.

    And every grouped_mm that CUDA would refuse.
    """
    SYNCS = ('_local_scalar_dense', 'nonzero', 'bincount', 'masked_select', 'unique', 'item', 'equal', 'is_nonzero',
             'repeat_interleave')

    def __init__(self):
        super().__init__()
        self.syncs, self.faults, self.grouped = Counter(), [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        sync = name in self.SYNCS or any(name.startswith(s + '_') for s in ('unique', 'nonzero'))
        if name in ('index', 'index_put', 'index_put_') and any(
                i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            sync, name = True, name + ' with a mask'
        if sync:
            self.syncs[f'{name}: {projects_line()}'] += 1
        if name == '_grouped_mm':
            self.grouped += 1
            self.faults += grouped_mm_faults([*args, *((kwargs or {}).values())])
        return func(*args, **(kwargs or {}))


class HostCopies(TorchFunctionMode):
    """For an Audit, the calls that wait for a GPU and on the CPU dispatch nothing."""

    def __init__(self, audit):
        super().__init__()
        self.audit = audit

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, '__name__', '') in ('tolist', 'numpy', 'cpu'):
            self.audit.syncs[f'{func.__name__}: {projects_line()}'] += 1
        return func(*args, **(kwargs or {}))


def projects_line():
    """The line of train.py, model.py or another script that is being run."""
    frame = sys._getframe()
    names = ('train.py', 'model.py', 'decode.py', 'fp8.py', 'optim.py', 'syncing.py')
    while frame and Path(frame.f_code.co_filename).name not in names:
        frame = frame.f_back
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip() if frame else '?'


def audited_run(folder, iterations, *flags, script='train.py'):
    """train.py in bf16, which evaluates before its first iteration and after its last, and logs the first alone."""
    with Audit() as audit, HostCopies(audit):
        code, _, said = run_inside(script, *SMALL, '--dtype=bfloat16', '--log_interval=1000', '--eval_interval=1000',
                                   '--dropout=0.1', '--first_k_dense_replace=1', '--num_nextn_predict_layers=1',
                                   f'--max_iters={iterations}', *flags, cwd=folder)
    assert code == 0, said
    return audit


def what_three_iterations_add(folder, *flags, script='train.py'):
    """Of syncs, by their lines, and of grouped_mm: what grows from a run of 2 iterations to one of 5."""
    short, long = (audited_run(folder, n, *flags, script=script) for n in (2, 5))
    return long.syncs - short.syncs, long.grouped - short.grouped, short.faults + long.faults


@pytest.mark.parametrize('flags', [
    [], ['--optimizer=muon', '--n_group=2', '--topk_group=1'],
    ['--fp8=True', '--scoring_func=softmax'],
    pytest.param(['--fp8=True', '--fp8_scaling=row', '--grad_clip=0.0'], marks=pytest.mark.slow),
    pytest.param(['--fp8=True', '--fp8_scaling=tensor', '--bf16_moments=True'], marks=pytest.mark.slow)], ids=' '.join)
def test_the_training_loop_has_no_host_sync_and_no_grouped_mm_that_cuda_refuses(small, flags):
    """train.py itself, in bf16."""
    syncs, grouped, faults = what_three_iterations_add(small, *flags)
    assert not syncs and faults == []
    # 2 micro-batches, 2 layers with experts; of two projections the forward and two gradients
    assert grouped == 3 * 2 * 2 * (2 * 3)


FORWARD = '_, loss = model(x, y, mtp_lambda=mtp_weight, label_counts=label_counts)'


@pytest.mark.parametrize('planted, after', [
    ('loss.item()', FORWARD), ('x[x > 3]', FORWARD), ('bool(bad)', 'iters_logged += 1'),
    ('norm.tolist()', 'iters_logged += 1')])
def test_the_audit_sees_a_sync_in_the_loop(small, planted, after):
    """One line more in train.py."""
    lines = (small / 'train.py').read_text().splitlines()
    place, = (i for i, line in enumerate(lines) if line.strip() == after)
    indent = lines[place][:lines[place].index(after)]
    (small / 'syncing.py').write_text('\n'.join([*lines[:place + 1], indent + planted, *lines[place + 1:]]))
    syncs, _, _ = what_three_iterations_add(small, script='syncing.py')
    seen = {line.split(': ', 1)[1]: n for line, n in syncs.items()}
    assert seen == {planted: 3 * 2 if after == FORWARD else 3}


def test_the_audit_sees_a_grouped_mm_that_cuda_refuses(small, monkeypatch):
    """Rows that begin at an odd address, which the CPU's takes."""
    grouped_linear = model.grouped_linear
    monkeypatch.setattr(model, 'grouped_linear', lambda x, *args: grouped_linear(
        x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x), *args))
    assert 'unaligned' in audited_run(small, 1).faults
    odd = torch.zeros(4, 12, dtype=torch.bfloat16)
    faults = grouped_mm_faults([odd, odd, torch.zeros(1)])
    assert [fault.split()[0] for fault in faults] == ['strides', 'strides', 'offsets']
