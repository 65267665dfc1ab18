"""What the scripts around train.py share. train.py stands alone, so that it can be copied into a nanoGPT clone."""

import contextlib
import os
import sys

import torch
import torch.distributed as dist

from model import first_line


def stop(message, every_rank=False):
    """A user's mistake: one line, exit code 2. Rank 0 of each machine speaks, or whichever rank meets it."""
    if every_rank or os.environ.get('LOCAL_RANK', '0') == '0':
        print(message, file=sys.stderr, flush=True)
    raise SystemExit(2)


def default_device():
    return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'


def device_type_of(device):
    """'cuda', 'cpu', ...; stops where a number cannot be computed there and read back."""
    try:
        x = torch.zeros(1, device=device)
        x.item()  # which the meta device cannot
        return x.device.type
    except Exception as e:  # torch raises RuntimeError, AssertionError, NotImplementedError and others
        stop(f'device={device!r} cannot be used here: {first_line(e)}')


def autocast(device_type, dtype):
    """The context in which matrix products run in dtype ('float32', 'bfloat16' or 'float16')."""
    if dtype not in ('float32', 'bfloat16', 'float16'):
        stop(f"dtype={dtype!r} must be 'float32', 'bfloat16' or 'float16'")
    return contextlib.nullcontext() if dtype == 'float32' else torch.autocast(device_type, getattr(torch, dtype))


def all_reduce(x, op=dist.ReduceOp.SUM):
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x


def start_wandb(**settings):
    """wandb's module, with a run begun; stops where wandb is missing or nobody is logged in."""
    try:
        import wandb
        wandb.init(**settings)
    except ImportError:
        stop('wandb_log=True needs wandb: pip install wandb', every_rank=True)
    except Exception as e:
        stop(f'wandb_log=True: wandb cannot start ({first_line(e)}): run `wandb login`, or set WANDB_MODE=offline',
             every_rank=True)
    return wandb
