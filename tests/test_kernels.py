"""extras/kernels.py without a GPU: the code that the compiler makes of it for each GPU; and its numbers, by Triton's
interpreter on the CPU: tests/fakes/kernels_interpreted.py. What tensor cores make of the kernels only a GPU can show.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='this torch has no triton')


@pytest.mark.slow
def test_numbers_by_the_interpreter():
    """In a process of its own: triton decides at its import whether it interprets."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith('PYTEST')} | {'TRITON_INTERPRET': '1'}
    command = [sys.executable, '-m', 'pytest', '-q', '-n', '0', '-p', 'no:cacheprovider',
               'tests/fakes/kernels_interpreted.py']
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert 'skipped' not in done.stdout


# bytes of shared memory that a block may have
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


@pytest.mark.parametrize('cc', [cc if cc == 80 else pytest.param(cc, marks=pytest.mark.slow) for cc in SHARED])
def test_each_kernel_compiles_for_each_gpu(cc, tmp_path):
    """With tensor-core instructions, within the shared memory; and at multiples of 16 no register spills to memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from extras import kernels

    def sizes(dtype, *names):
        return dict(zip(names, kernels.tile_sizes(dtype)))

    half, single = (sizes(dtype, 'BLOCK_M', 'BLOCK_N', 'BLOCK_K') for dtype in (torch.bfloat16, torch.float32))
    rows_last, single_rows_last = (sizes(dtype, 'BLOCK_N', 'BLOCK_K', 'BLOCK_M')
                                   for dtype in (torch.bfloat16, torch.float32))
    # kernel, dtype, constants; the last dimension of w is contiguous, as for y, or the first, as for dx
    cases = [(kernels.product_kernel, 'bf16', dict(half, GATHER=True, stride_wk=1, E=20, E2=32, PRECISION='tf32')),
             (kernels.product_kernel, 'bf16', dict(half, GATHER=False, stride_wn=1, E=256, E2=256, PRECISION='tf32')),
             (kernels.product_kernel, 'fp32', dict(single, GATHER=True, stride_wk=1, E=20, E2=32, PRECISION='tf32')),
             (kernels.product_kernel, 'fp32', dict(single, GATHER=True, stride_wk=1, E=20, E2=32, PRECISION='ieee')),
             (kernels.weight_grad_kernel, 'bf16', dict(rows_last, GATHER=True, PRECISION='tf32')),
             (kernels.weight_grad_kernel, 'fp16', dict(rows_last, GATHER=False, PRECISION='tf32')),
             (kernels.product_kernel, 'fp16', dict(half, GATHER=True, stride_wk=1, E=20, E2=32, PRECISION='tf32')),
             (kernels.weight_grad_kernel, 'fp32', dict(single_rows_last, GATHER=True, PRECISION='ieee')),
             *((kernels.loss_kernel, dtype, dict(BLOCK=kernels.LOSS_BLOCK)) for dtype in ('bf16', 'fp16', 'fp32'))]
    # sizes that are multiples of 8 alone: without asynchronous copies, and slow
    cases = [(*case, True) for case in cases] + [(*case, False) for case in (cases[0], cases[4], cases[-1])]
    numbers = ('N', 'K', 'V', 'stride_we', 'stride_wn', 'stride_wk')
    other = {'token': '*i64', 'target': '*i64', 'offsets': '*i32', 'row_weight': '*fp32', 'loss': '*fp32'}
    for kernel, dtype, constants, aligned in cases:
        names = [p.name for p in kernel.params]
        signature = {n: 'constexpr' if n in constants else 'i32' if n in numbers else other.get(n, f'*{dtype}')
                     for n in names}
        sixteens = {(i,): [['tt.divisibility', 16]] for i, n in enumerate(names)
                    if n not in constants and (aligned or n not in numbers)}
        warps = 8 if kernel is kernels.loss_kernel else 4
        source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, sixteens)
        made = triton.compile(source, target=GPUTarget('cuda', cc, 32), options={'num_warps': warps, 'num_stages': 3})
        assert made.metadata.shared <= SHARED[cc]
        (tmp_path / 'kernel.ptx').write_text(made.asm['ptx'])
        folder = Path(triton.__file__).parent / 'backends/nvidia/bin'
        ptxas = next(p for p in (folder / 'ptxas-blackwell' if cc >= 100 else folder / 'ptxas', folder / 'ptxas')
                     if p.exists())
        said = subprocess.run([ptxas, '-v', f'--gpu-name=sm_{cc}' + 'a' * (cc >= 90), tmp_path / 'kernel.ptx', '-o',
                               tmp_path / 'kernel.cubin'], capture_output=True, text=True, check=True).stderr
        assert not aligned or re.findall(r'(\d+) bytes spill', said) == ['0', '0'], (kernel, said)
        if constants.get('PRECISION') == 'tf32':
            assert re.search(r'mma\.sync|wgmma|tcgen05\.mma', made.asm['ptx'])
