"""What the scripts around train.py share. train.py stands alone, so that it can be copied into a nanoGPT clone."""

import contextlib
import os
import secrets
import sys
import time

import torch
import torch.distributed as dist

from model import GPT, first_line
from tokenizer import of_checkpoint

DTYPES = ('float32', 'bfloat16', 'float16')


def stop(message, every_rank=False):
    """A user's mistake: one line, exit code 2. Rank 0 of each machine speaks, or whichever rank meets it."""
    if every_rank or os.environ.get('LOCAL_RANK', '0') == '0':
        print(message, file=sys.stderr, flush=True)
    else:
        time.sleep(10)  # torchrun ends all ranks when one has ended: the one that speaks comes first
    if dist.is_initialized() and dist.get_backend() == 'gloo':  # nccl would wait for ranks that do not stop
        disconnect()
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
    if dtype not in DTYPES:
        stop(f"dtype={dtype!r} must be 'float32', 'bfloat16' or 'float16'")
    return contextlib.nullcontext() if dtype == 'float32' else torch.autocast(device_type, getattr(torch, dtype))


def connect(backend):
    """Join torchrun's ranks. Returns the run's id, a random one that is the same in each attempt of --max-restarts."""
    try:
        store, rank, world = next(dist.rendezvous('env://'))
        # torchrun's store outlives a restart: the id, and the addresses of ranks that were lost
        run = store.compare_set('run', '', secrets.token_hex(8)).decode()
        store = dist.PrefixStore('attempt' + os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    except (ValueError, RuntimeError) as e:
        stop(f'the ranks cannot be connected: {first_line(e)}')
    return run


def disconnect():
    """Leave the ranks, if there are any. gloo's threads end here: one that outlives the interpreter aborts the process
    (pytorch#190489)."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce(x, op=dist.ReduceOp.SUM):
    if dist.is_initialized():
        try:
            dist.all_reduce(x, op)
            return x
        except RuntimeError as e:
            error = first_line(e)
        # after `except`: the error's frames hold the group, and with it gloo's threads
        stop(f'rank {dist.get_rank()}: another rank is gone: {error}', every_rank=True)
    return x


def load_checkpoint(folder, device, **overrides):
    """The model of a folder's ckpt.pt on the device, the checkpoint itself, and its tokenizer."""
    path = os.path.join(folder, 'ckpt.pt')
    try:
        model, checkpoint = GPT.from_checkpoint(path, device, **overrides)
        tokenizer = of_checkpoint(folder, checkpoint.get('meta') or {}, model.config.vocab_size)
        model.to(device)
    except ValueError as e:
        stop(str(e))
    except RuntimeError as e:
        stop(f'the model cannot be loaded: {first_line(e)}')
    config = checkpoint.get('config') or {}
    if type(config) is not dict or (config.get('dtype') or 'float32') not in DTYPES:
        stop(f'{path} is no checkpoint of this model: its config is no table with a dtype of {", ".join(DTYPES)}')
    return model, checkpoint, tokenizer


def use_kernels(model):
    """The model; on a GPU it uses extras/kernels.py from now on."""
    if model.lm_head.weight.device.type != 'cuda':
        return model
    try:
        from extras import kernels
        fault = kernels.enable(model)
    except ImportError as e:  # triton is missing
        fault = first_line(e)
    if fault:
        print(f'going on without extras/kernels.py: {fault}', file=sys.stderr)
    return model


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
