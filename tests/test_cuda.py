"""Readiness for CUDA, shown without a GPU: a forward traced at full size, and an audit of a real step's operations."""

import pytest
import torch
from conftest import tiny_model
from test_model import main_config
from torch.utils._python_dispatch import TorchDispatchMode

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
@pytest.mark.parametrize('training', [True, False])
def test_full_size_forward_traces_on_fake_cuda_tensors(training):
    """Fails on a data-dependent shape, on a dtype that grouped_mm refuses, and on a tensor left on the CPU."""
    from torch._subclasses import FakeTensorMode

    _, config = main_config()
    with FakeTensorMode():
        model, idx = on_fake_cuda(GPT(config).train(training))
        try:
            if training:
                _, loss = model(idx, idx)
                model.update_balance(model.stats['load'])
                assert model.stats['load'].shape == (12, config.n_routed_experts)
            else:
                logits, loss = model(idx, idx)
                assert logits.shape == (4, config.block_size, config.vocab_size)
                out = model.generate(idx[:, :7], 3, top_k=50)
                assert out.shape == (4, 10) and out.device.type == 'cuda'
        finally:
            torch.set_autocast_enabled('cuda', False)
        assert loss.device.type == 'cuda' and loss.dtype == torch.float32


class Audit(TorchDispatchMode):
    """Records the operations that would make the host wait for the GPU, and every grouped_mm that CUDA would refuse."""
    SYNCS = ('_local_scalar_dense', 'nonzero', 'bincount', 'masked_select', 'unique', 'item', 'equal', 'is_nonzero',
             'repeat_interleave')

    def __init__(self):
        super().__init__()
        self.syncs, self.faults, self.grouped = [], [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.SYNCS or any(name.startswith(s + '_') for s in ('unique', 'nonzero')):
            self.syncs.append(name)
        if name in ('index', 'index_put', 'index_put_') and any(
                i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            self.syncs.append(name + ' with a mask')
        if name == '_grouped_mm':
            self.grouped += 1
            self.faults += grouped_mm_faults([*args, *((kwargs or {}).values())])
        return func(*args, **(kwargs or {}))


def audited_step(model, idx, kind='adamw'):
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu', kind)
    with Audit() as audit:
        with torch.autocast('cpu', torch.bfloat16):
            _, loss = model(idx[:, :-1], idx[:, 1:])
        (loss / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        bad = ~(norm + model.stats['losses'].sum()).isfinite()
        optimizer.found_inf = bad.float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.update_balance(model.stats['load'].masked_fill(bad, 0))
    return audit


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_a_bf16_step_has_no_host_sync_and_no_grouped_mm_that_cuda_refuses(kind):
    model = tiny_model(dropout=0.1, n_group=4, topk_group=2, first_k_dense_replace=1)
    audit = audited_step(model, torch.randint(61, (2, 33)), kind)
    assert audit.syncs == []
    assert audit.faults == []
    assert audit.grouped == 2 * 3 * len(model.moe_layers())  # each projection: forward, and two gradients


def test_the_audit_sees_what_it_should():
    model = tiny_model()
    forward = model.transformer.h[0].mlp.forward

    def syncing(x):
        x[x.new_zeros(x.shape, dtype=torch.bool)]
        x.sum().item()
        return forward(x)

    model.transformer.h[0].mlp.forward = syncing
    audit = audited_step(model, torch.randint(61, (2, 33)))
    assert any('mask' in s or 'nonzero' in s for s in audit.syncs) and '_local_scalar_dense' in audit.syncs
    odd = torch.zeros(4, 12, dtype=torch.bfloat16)
    assert grouped_mm_faults([odd, odd, torch.zeros(1)]) != []
