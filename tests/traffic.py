"""
What data parallelism holds and sends, by torch and the kernel: for test_scale.py, under torchrun in a network namespace
of its own, whose one interface, lo, then carries nothing else.

    torchrun ... tests/traffic.py SETTINGS        # those of a GPTConfig, as JSON; prints JSON

gloo's reduce-scatter is an all-reduce: it sends twice what a ring needs, and nccl's does not.
"""

import json
import re
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import GPT, GPTConfig


def sent():
    return int(re.search(r'lo:\s*(?:\d+\s+){8}(\d+)', Path('/proc/net/dev').read_text())[1])


def bytes_of(run):
    """Bytes that a rank sends while all run this: the least of three, because torchrun's agent uses lo now and then."""
    def once(what):
        dist.barrier()
        time.sleep(0.1)
        before = sent()
        dist.barrier()
        what()
        dist.barrier()
        time.sleep(0.1)
        return sent() - before

    nothing, something = (min(once(what) for _ in range(3)) for what in (lambda: None, run))
    return (something - nothing) / world


def states_of(model, optimizer):
    """Bytes of this rank's weights, gradients and moments."""
    held = [*model.parameters(), *(p.grad for p in model.parameters())]
    held += [x for state in optimizer.state.values() for x in state.values() if x.dim() > 0]
    storages = [(x.to_local() if hasattr(x, 'to_local') else x).untyped_storage() for x in held]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())  # FSDP's gradients share one


def of_a_step(wrap):
    torch.manual_seed(0)
    gpt = GPT(config).train()
    model = wrap(gpt)
    optimizer = torch.optim.AdamW(gpt.parameters())
    x = torch.randint(config.vocab_size, (1, config.block_size))

    def step():
        model(x, x)[1].backward()

    for _ in range(2):  # DDP arranges its buckets in the first
        step()
        optimizer.step()
        optimizer.zero_grad()
    n = bytes_of(step)
    optimizer.step()
    return n, states_of(gpt, optimizer), model


def sharded(mesh):
    def wrap(gpt):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in gpt.blocks():
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(gpt, mesh=mesh, mp_policy=policy)

    return wrap


def exchange():
    """A layer's rows to other ranks' experts and back, forward and backward, each expert with as many as another."""
    rows = torch.randn(config.num_experts_per_tok * config.block_size, config.n_embd, dtype=torch.bfloat16,
                       requires_grad=True)
    group = dist.group.WORLD
    there = all_to_all_single_autograd(rows, None, None, group)
    all_to_all_single_autograd(there, None, None, group).sum().backward()


dist.init_process_group('gloo')
world = dist.get_world_size()
config = GPTConfig(**json.loads(sys.argv[1]))
found = {}
n, states, model = of_a_step(DDP)
buckets = model._get_ddp_logging_data()['bucket_sizes']
found['ddp'] = n, states + sum(int(size) for size in buckets.split(','))
del model
found['fsdp'] = of_a_step(sharded(init_device_mesh('cpu', (world,))))[:2]
if world == 4:
    found['hsdp'] = of_a_step(sharded(init_device_mesh('cpu', (2, 2), mesh_dim_names=('replicate', 'shard'))))[:2]
found['experts'] = bytes_of(exchange)
if dist.get_rank() == 0:
    print(json.dumps(found))
dist.destroy_process_group()
