"""
What data parallelism holds and sends, by torch and the kernel: for test_scale.py, under torchrun in a network namespace
of its own, whose one interface, lo, then carries nothing else.

    torchrun ... tests/fakes/traffic.py SETTINGS    # those of a GPTConfig, as JSON; prints JSON

gloo's reduce-scatter is an all-reduce: it sends twice what a ring needs, and nccl's does not.
"""

import json
import re
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from extras import parallel
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


def with_ddp():
    torch.manual_seed(0)
    return DDP(GPT(config))


def with_shards(shard, expert_parallel):
    torch.manual_seed(0)
    return parallel.distribute(config, None, 'cpu', 'bfloat16', shard, expert_parallel)


def of_a_step(model):
    """Bytes that a rank sends in a step of one micro-batch, and those of its states."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randint(config.vocab_size, (1, config.block_size))

    def step():
        with torch.autocast('cpu', torch.bfloat16):
            loss = model(x, x)[1]
        loss.backward()

    for _ in range(2):  # DDP arranges its buckets in the first
        step()
        optimizer.step()
        optimizer.zero_grad()
    n = bytes_of(step)
    optimizer.step()
    return n, states_of(model, optimizer)


dist.init_process_group('gloo')
world = dist.get_world_size()
config = GPTConfig(**json.loads(sys.argv[1]))
model = with_ddp()
n, states = of_a_step(model)
buckets = model._get_ddp_logging_data()['bucket_sizes']
found = {'ddp': (n, states + sum(int(size) for size in buckets.split(',')))}
del model
found['fsdp'] = of_a_step(with_shards(0, 1))
found['experts'] = of_a_step(with_shards(1, world))
if world == 4:
    found['hsdp'] = of_a_step(with_shards(2, 1))
    found['experts and hsdp'] = of_a_step(with_shards(2, 2))
if dist.get_rank() == 0:
    print(json.dumps(found))
sys.stdout.flush()
dist.destroy_process_group()
