"""
Trains a model; nanoGPT's loop and flags, and every field of GPTConfig as a flag.

    python train.py config/train_shakespeare_char.py                      # one GPU, Apple's GPU or the CPU
    torchrun --standalone --nproc_per_node=8 train.py config/train_deepseek.py
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=29500 train.py ...

All randomness of an iteration (its batches, its dropout) follows from (seed, iteration, rank), so a resumed run
goes on exactly as the uninterrupted one would have.
"""

import contextlib
import dataclasses
import json
import math
import os
import pickle
import platform
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np
import torch
import torch._functorch.config
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from model import GPT, GPTConfig, first_line

# -----------------------------------------------------------------------------
# the model's settings: every field of GPTConfig with its default (-1: derived from n_layer, n_head and n_embd)
globals().update({field.name: field.default for field in dataclasses.fields(GPTConfig)})
vocab_size = 0  # 0: from the data's meta.pkl, else GPT-2's 50,257 rounded up to 50,304
# I/O
out_dir = 'out'
eval_interval = 2000
log_interval = 1
eval_iters = 200
eval_only = False  # evaluate once and stop
always_save_checkpoint = True  # after every evaluation, not only after a better one
init_from = 'scratch'  # or 'resume', or the path of a DeepSeek checkpoint in Hugging Face's format
# wandb logging
wandb_log = False
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
dataset = 'openwebtext'
gradient_accumulation_steps = 5 * 8  # micro-batches per iteration, over all ranks together
batch_size = 12  # sequences in a micro-batch
block_size = 1024
# optimizer
optimizer = 'adamw'  # or 'muon': Muon for the blocks' matrices, AdamW for the rest
learning_rate = 6e-4
max_iters = 600000
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # 0.0: no clipping
# learning rate: linear warm-up, cosine decay
decay_lr = True
warmup_iters = 2000
lr_decay_iters = 600000
min_lr = 6e-5
# weight of the MTP loss: mtp_lambda, and from this share of max_iters on at most mtp_lambda_late (V3 section 4.2)
mtp_lambda_late = 0.1
mtp_late_from = 0.67
# system
seed = 1337
backend = 'nccl'  # between GPUs; CPUs use gloo
device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
dtype = ''  # 'float32', 'bfloat16' or 'float16'; '': bfloat16 where the device computes in it
compile = True  # torch.compile, block by block
activation_memory = 1.0  # with compile: share of a block's activations that is kept; the backward recomputes the rest
# -----------------------------------------------------------------------------
config_keys = [k for k, v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())  # from the command line, config files
config = {k: globals()[k] for k in config_keys}
# -----------------------------------------------------------------------------

here = os.path.dirname(os.path.abspath(__file__))
# one process, or one of several under torchrun
ddp = 'RANK' in os.environ
rank, world = (int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])) if ddp else (0, 1)
master = rank == 0
if ddp:
    if device.startswith('cuda'):
        device = f'cuda:{os.environ["LOCAL_RANK"]}'
        torch.cuda.set_device(device)
    dist.init_process_group(backend if device.startswith('cuda') else 'gloo')


def stop(message):
    raise SystemExit(message if master else 1)


for key in ('batch_size', 'block_size', 'gradient_accumulation_steps', 'eval_interval', 'eval_iters', 'log_interval'):
    if config[key] <= 0:
        stop(f'{key} must be positive')
try:
    device_type = torch.zeros(1, device=device).device.type
except Exception as e:  # torch raises RuntimeError, AssertionError and others
    stop(f'device={device!r} cannot be used here: {first_line(e)}')
if gradient_accumulation_steps % world != 0:
    stop(f'gradient_accumulation_steps={gradient_accumulation_steps} must be a multiple of the {world} ranks')
if not 0 <= activation_memory <= 1:
    stop('activation_memory must lie in 0..1')
if seed < 0:
    stop('seed must not be negative')
if optimizer not in ('adamw', 'muon'):
    stop(f"optimizer={optimizer!r} must be 'adamw' or 'muon'")
if init_from not in ('scratch', 'resume') and not os.path.isdir(init_from):
    stop(f"init_from={init_from!r} must be 'scratch', 'resume' or a folder with a DeepSeek-V2 or V3 family checkpoint: "
         "GPT-2's weights do not fit this architecture")
accumulation = gradient_accumulation_steps // world
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size

if not dtype:
    bf16 = (torch.cuda.is_bf16_supported(including_emulation=False) if device_type == 'cuda' else
            device_type == 'cpu' and torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    dtype = 'bfloat16' if bf16 else 'float16' if device_type == 'cuda' else 'float32'
    config['dtype'] = dtype
if dtype == 'float16' and device_type != 'cuda':
    stop("dtype='float16' needs CUDA (its gradients are scaled there); use bfloat16 or float32")
ptdtype = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}.get(dtype)
if ptdtype is None:
    stop(f"dtype={dtype!r} must be 'float32', 'bfloat16' or 'float16'")
ctx = contextlib.nullcontext() if dtype == 'float32' else torch.amp.autocast(device_type, dtype=ptdtype)
torch.backends.cuda.matmul.allow_tf32 = True
torch.backends.cudnn.allow_tf32 = True

if wandb_log and master:
    try:
        import wandb
    except ImportError:
        stop('wandb_log=True needs wandb: pip install wandb')

# data: flat files of token ids, read where they lie
data_dir = os.path.join(here, 'data', dataset)


class PlainUnpickler(pickle.Unpickler):
    """Reads a pickle of dicts, strings and numbers, and refuses one that names a class or a function."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'{module}.{name} is not plain data')


def load_meta(path):
    if not os.path.exists(path):
        return {}
    with open(path, 'rb') as f:
        meta = PlainUnpickler(f).load()
    if type(meta['vocab_size']) is not int or meta.get('dtype', 'uint16') not in ('uint16', 'uint32'):
        raise ValueError('its vocab_size must be an int, its dtype uint16 or uint32')
    return meta


try:
    meta = load_meta(os.path.join(data_dir, 'meta.pkl'))
except Exception as e:  # an unpickler meets damage in many ways
    stop(f'{data_dir}/meta.pkl cannot be used: {type(e).__name__}: {first_line(e)}')
tokens = {}
for split in ('train', 'val'):
    path = os.path.join(data_dir, f'{split}.bin')
    if not os.path.exists(path):
        stop(f'{path} is missing: run python data/{dataset}/prepare.py first')
    # prepare.py writes uint32 where the vocabulary does not fit in uint16, and says so in meta.pkl
    token_dtype = np.dtype(meta.get('dtype', 'uint16'))
    if os.path.getsize(path) <= block_size * token_dtype.itemsize:
        stop(f'{path} holds too few tokens for block_size={block_size}')
    tokens[split] = np.memmap(path, dtype=token_dtype, mode='r')


def get_batch(split, stream, index):
    """The micro-batch number `index` of a stream of random batches: x, y, each (batch_size, block_size)."""
    data = tokens[split]
    rng = np.random.default_rng((seed, {'train': 0, 'val': 1}[split], stream, index))
    starts = rng.integers(len(data) - block_size, size=batch_size)
    rows = data[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)     # (B, T + 1)
    rows = torch.from_numpy(rows)
    if device_type == 'cuda':
        rows = rows.pin_memory().to(device, non_blocking=True)
    else:
        rows = rows.to(device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


# the model, new or from a checkpoint
iter_num = 0
best_val_loss = math.inf
torch.manual_seed(seed)
ckpt_path = os.path.join(out_dir, 'ckpt.pt')
checkpoint = None
try:
    if init_from == 'scratch':
        model_args = {field.name: config[field.name] for field in dataclasses.fields(GPTConfig)}
        model_args['vocab_size'] = vocab_size or meta.get('vocab_size', 50304)
        model = GPT(GPTConfig(**model_args))
    else:
        # the architecture is the checkpoint's; these may change from run to run
        free = ('dropout', 'bias_update_speed', 'aux_loss_alpha', 'mtp_lambda')
        # these where they are given: YaRN extends the context of a trained model
        if_given = ['eos_token_id', *(field.name for field in dataclasses.fields(GPTConfig)
                                      if field.name.startswith('rope_') and field.name != 'rope_theta')]
        overrides = {k: config[k] for k in free} | {'block_size': block_size}
        overrides |= {k: config[k] for k in if_given if config[k] != getattr(GPTConfig, k)}
        if init_from == 'resume':
            model, checkpoint = GPT.from_checkpoint(ckpt_path, device, **overrides)
            iter_num = checkpoint['iter_num']
            best_val_loss = checkpoint['best_val_loss']
        else:
            model = GPT.from_pretrained(init_from, overrides)
        ignored = [f'{field.name}={config[field.name]}' for field in dataclasses.fields(GPTConfig)
                   if field.name not in (*free, *if_given, 'block_size', 'vocab_size')
                   and config[field.name] not in (field.default, getattr(model.config, field.name))]
        if ignored and master:
            print(f'ignored, since the architecture is the checkpoint\'s: {", ".join(ignored)}')
        original = model.config.rope_original_max_position_embeddings
        if block_size > model.config.rope_factor * original:
            stop(f'block_size={block_size} is longer than the {int(model.config.rope_factor * original)} of the '
                 'checkpoint: resume with the config file and the flags that the run was started with, or extend it '
                 f'with --rope_factor={math.ceil(block_size / original)}')
        if iter_num >= max_iters and not eval_only and master:
            print(f'nothing to do but evaluate: {ckpt_path} has made {iter_num} of {max_iters} updates')
except ValueError as e:
    stop(str(e))
model_args = dataclasses.asdict(model.config)  # with every derived size
if max(int(tokens[split][:1_000_000].max()) for split in tokens) >= model.config.vocab_size:
    stop(f'{data_dir} holds tokens beyond vocab_size={model.config.vocab_size}')
model.to(device)
raw_model = model
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
optimizer = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type, config['optimizer'])
if checkpoint is not None and checkpoint['optimizer']:  # a converted checkpoint has none
    optimizer.load_state_dict(checkpoint['optimizer'])
    if checkpoint.get('scaler'):
        scaler.load_state_dict(checkpoint['scaler'])
checkpoint = None  # free the memory

if compile:
    # try it on one micro-batch, in training and in evaluation: no compiler costs speed and nothing else
    torch._functorch.config.activation_memory_budget = activation_memory
    raw_model.compile()
    try:
        with ctx:
            raw_model(*get_batch('train', 0, 0))[1].backward()
            with torch.no_grad():
                raw_model.eval()(*get_batch('train', 0, 0), return_logits=False)
    except torch.OutOfMemoryError:
        stop('out of memory: make batch_size smaller, and gradient_accumulation_steps larger')
    except Exception as e:
        raw_model.uncompile()
        if master:
            print(f'going on without torch.compile: {type(e).__name__}: {first_line(e)}')
    optimizer.zero_grad(set_to_none=True)
if ddp:
    # the only buffer that changes, the balance bias, changes alike on all ranks
    model = DDP(model, device_ids=[device] if device_type == 'cuda' else None, broadcast_buffers=False)


def all_reduce(x):
    if ddp:
        dist.all_reduce(x)
    return x


@torch.no_grad()
def estimate_loss():
    """Mean main loss over eval_iters batches of each split, the same ones each time, shared out over the ranks."""
    raw_model.eval()
    out = {}
    for split in ('train', 'val'):
        total = torch.zeros((), device=device)
        for k in range(rank, eval_iters, world):
            with ctx:
                total += raw_model(*get_batch(split, 1, k), return_logits=False)[1]
        out[split] = all_reduce(total).item() / eval_iters
    raw_model.train()
    return out


def get_lr(it):
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    ratio = (it - warmup_iters) / max(1, lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (learning_rate - min_lr)


def save_checkpoint():
    """Written beside and renamed: a kill at any instant leaves the last checkpoint whole."""
    torch.save({'model': raw_model.state_dict(), 'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict(),
                'model_args': model_args, 'iter_num': iter_num, 'best_val_loss': best_val_loss, 'config': config,
                'meta': meta},  # a character set's table, for sample.py
               ckpt_path + '.tmp')
    with open(ckpt_path + '.tmp', 'rb') as f:
        os.fsync(f.fileno())
    os.replace(ckpt_path + '.tmp', ckpt_path)


def log(record):
    # JSON has no nan and no infinity
    record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    print(json.dumps(record), file=log_file, flush=True)
    if wandb_log:
        wandb.log({k: v for k, v in record.items() if v is not None}, step=record['step'])


def git_commit():
    try:
        return subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=here, capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if master:
    try:
        os.makedirs(out_dir, exist_ok=True)
    except OSError as e:
        stop(f'out_dir={out_dir!r} cannot be made: {e.strerror}')
    if os.path.exists(os.path.join(init_from, 'tokenizer.json')):  # it travels with the checkpoint
        shutil.copy(os.path.join(init_from, 'tokenizer.json'), out_dir)
    log_path = os.path.join(out_dir, 'log.jsonl')
    if init_from != 'resume' and not eval_only and os.path.exists(log_path):
        os.replace(log_path, log_path + '.old')
    log_file = open(log_path, 'a')
    if log_file.tell() > 0:
        print(file=log_file)  # a run that was killed may have left half a line
    header = {'command': shlex.join(sys.argv), 'config': config, 'model_args': model_args, 'world_size': world,
              'parameters': raw_model.get_num_params(), 'active_parameters': raw_model.get_num_active_params(),
              'versions': {'python': platform.python_version(), 'torch': torch.__version__, 'numpy': np.__version__},
              'hardware': torch.cuda.get_device_name(device) if device_type == 'cuda' else
              f'{platform.machine()} {device_type}, {os.cpu_count()} cores', 'git_commit': git_commit()}
    if wandb_log:
        wandb.init(project=wandb_project, name=wandb_run_name, config=config)
    print(json.dumps(header), file=log_file, flush=True)
    print(f'parameters without embedding and head: {header["parameters"] / 1e6:.2f}M, of which a token uses '
          f'{header["active_parameters"] / 1e6:.2f}M')
    print(f'tokens per iteration: {tokens_per_iter:,}; device: {device}, {dtype}')

# training loop
model.train()
running_mfu = math.nan
t_log, iters_logged = time.time(), 0
while True:
    lr = get_lr(iter_num) if decay_lr else learning_rate
    for group in optimizer.param_groups:
        group['lr'] = lr
    raw_model.config.mtp_lambda = mtp_lambda if iter_num < mtp_late_from * max_iters else \
        min(mtp_lambda, mtp_lambda_late)
    # whatever is random in this iteration
    torch.manual_seed(seed + iter_num * world + rank)

    # evaluate and save
    if iter_num % eval_interval == 0 or iter_num == max_iters or eval_only:
        losses = estimate_loss()
        improved = losses['val'] < best_val_loss
        if iter_num > 0:  # an untrained model is never saved, so it is no best one either
            best_val_loss = min(best_val_loss, losses['val'])
        if master:
            print(f'step {iter_num}: train loss {losses["train"]:.4f}, val loss {losses["val"]:.4f}')
            log({'step': iter_num, 'train_loss': losses['train'], 'val_loss': losses['val'], 'lr': lr})
            if iter_num > 0 and not eval_only and (improved or always_save_checkpoint):
                save_checkpoint()
        t_log, iters_logged = time.time(), 0
    if iter_num >= max_iters or eval_only:
        break

    # forward and backward, over the micro-batches
    stats = {}
    for micro_step in range(accumulation):
        x, y = get_batch('train', 0, iter_num * gradient_accumulation_steps + micro_step * world + rank)
        if ddp:  # gradients travel with the last micro-batch
            model.require_backward_grad_sync = micro_step == accumulation - 1
        with ctx:
            _, loss = model(x, y)
        scaler.scale(loss / accumulation).backward()
        for k, v in raw_model.stats.items():
            stats[k] = stats[k] + v if k in stats else v
    # clip, step, balance
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip if grad_clip > 0 else math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if 'load' in stats:
        raw_model.update_balance(all_reduce(stats['load']))
    iters_logged += 1

    # log: all numbers come over in one host sync, the only one of the loop
    if iter_num % log_interval == 0:
        means = torch.cat([stats['losses'], *([stats['balance'].view(1)] if 'load' in stats else [])])
        numbers = [all_reduce(means) / (accumulation * world), norm.view(1)]
        if 'load' in stats:
            load = stats['load'].float()  # of the whole iteration, all ranks: update_balance needed it so
            numbers.append(load.amax(dim=1) / load.mean(dim=1) - 1)
        numbers = torch.cat(numbers).tolist()
        losses, numbers = numbers[:len(stats['losses'])], numbers[len(stats['losses']):]
        record = {'step': iter_num, 'loss': losses[0], 'mtp_losses': losses[1:], 'lr': lr}
        if 'load' in stats:
            record['balance'] = numbers.pop(0)
            record['max_vio'] = numbers[1:]
        record['grad_norm'] = numbers[0]
        now = time.time()
        dt = (now - t_log) / iters_logged
        t_log, iters_logged = now, 0
        mfu = raw_model.estimate_mfu(batch_size * accumulation, dt)
        running_mfu = mfu if math.isnan(running_mfu) else 0.9 * running_mfu + 0.1 * mfu
        record |= {'tokens_per_s': tokens_per_iter / dt, 'mfu': None if math.isnan(mfu) else mfu}
        if master:
            left = int(dt * (max_iters - iter_num - 1))
            extra = ''.join(f', mtp{k} {v:.4f}' for k, v in enumerate(losses[1:], start=1))
            if 'load' in stats:
                extra += f', maxvio {max(record["max_vio"]):.2f}'
            left = f'{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left'
            print(f'iter {iter_num}: loss {losses[0]:.4f}, time {dt * 1000:.2f}ms, mfu {running_mfu * 100:.2f}%, '
                  f'{tokens_per_iter / dt:,.0f} tok/s, {left}{extra}')
            log(record)
    iter_num += 1

if ddp:
    dist.destroy_process_group()
