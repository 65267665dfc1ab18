"""
Trains a model; nanoGPT's loop and flags, and every field of GPTConfig as a flag.

    python train.py config/train_shakespeare_char.py                      # one GPU, Apple's GPU or the CPU
    torchrun --standalone --nproc_per_node=8 train.py config/train_deepseek.py
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=29500 train.py ...

All randomness of a micro-batch (its rows, its dropout) follows from the seed and the micro-batch's number, counted over
iterations and ranks, so a resumed run goes on exactly as the uninterrupted one would have.
"""

import contextlib
import dataclasses
import json
import math
import os
import pickle
import platform
import random
import shlex
import shutil
import signal
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
always_save_checkpoint = True  # ckpt.pt is the last one, ckpt_best.pt the best; False: the best, and ckpt_last.pt
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
max_skipped_iters = 20  # stop after so many iterations in a row with a loss or a gradient that is not finite
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
fp8 = False  # the products of the linear layers and the experts in FP8, as in V3 section 3.3; needs fp8.py
fp8_scaling = 'tile'  # or 'row' or 'tensor': what shares a scale
fp8_grad = 'e4m3'  # or 'e5m2': the format of the gradients
fp8_power_of_two = False  # scales that are powers of two
bf16_moments = False  # AdamW's moments in bfloat16, as V3 keeps them; needs fp8.py
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


def stop(message):
    """What the user can mend: one line that says it, and exit code 2."""
    if os.environ.get('LOCAL_RANK', '0') == '0':  # one rank speaks for its machine
        print(message, file=sys.stderr, flush=True)
    raise SystemExit(2)


for key in ('batch_size', 'block_size', 'gradient_accumulation_steps', 'eval_interval', 'eval_iters', 'log_interval',
            'max_skipped_iters'):
    if config[key] <= 0:
        stop(f'{key} must be positive')
if gradient_accumulation_steps % world != 0:
    stop(f'gradient_accumulation_steps={gradient_accumulation_steps} must be a multiple of the {world} ranks')
for key in ('learning_rate', 'min_lr', 'weight_decay', 'grad_clip', 'max_iters', 'warmup_iters', 'lr_decay_iters',
            'mtp_lambda_late', 'mtp_late_from'):
    if not 0 <= config[key] < math.inf:
        stop(f'{key}={config[key]} must be finite and not negative')
for key in ('beta1', 'beta2'):
    if not 0 <= config[key] < 1:
        stop(f'{key}={config[key]} must lie in [0, 1)')
if ddp and device.startswith('cuda'):
    device = f'cuda:{os.environ["LOCAL_RANK"]}'
    if torch.cuda.device_count() < int(os.environ['LOCAL_WORLD_SIZE']):
        stop(f'{os.environ["LOCAL_WORLD_SIZE"]} ranks need as many GPUs; here are {torch.cuda.device_count()}')
try:
    device_type = torch.zeros(1, device=device).device.type
except Exception as e:  # torch raises RuntimeError, AssertionError and others
    stop(f'device={device!r} cannot be used here: {first_line(e)}')
if ddp:
    if device_type == 'cuda':
        torch.cuda.set_device(device)
    try:
        store, _, _ = next(dist.rendezvous('env://'))
        # torchrun's store outlives a restart, with the addresses of the ranks that were lost
        store = dist.PrefixStore('attempt' + os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
        dist.init_process_group(backend if device_type == 'cuda' else 'gloo', store=store, rank=rank, world_size=world)
    except (ValueError, RuntimeError) as e:
        stop(f'the ranks cannot be connected: {first_line(e)}')
hosts = dist.new_group(backend='gloo') if ddp else None  # for what the ranks agree on without their GPUs


def all_reduce(x, op=dist.ReduceOp.SUM, group=None):
    if ddp:
        dist.all_reduce(x, op, group)
    return x


if not 0 <= activation_memory <= 1:
    stop('activation_memory must lie in 0..1')
if seed < 0:
    stop('seed must not be negative')
if optimizer not in ('adamw', 'muon'):
    stop(f"optimizer={optimizer!r} must be 'adamw' or 'muon'")
if init_from not in ('scratch', 'resume') and not os.path.isdir(init_from):
    stop(f"init_from={init_from!r} must be 'scratch', 'resume' or a folder with a DeepSeek-V2 or V3 family checkpoint: "
         "GPT-2's weights do not fit this architecture")
if fp8_scaling not in ('tile', 'row', 'tensor'):
    stop(f"fp8_scaling={fp8_scaling!r} must be 'tile', 'row' or 'tensor'")
if fp8_grad not in ('e4m3', 'e5m2'):
    stop(f"fp8_grad={fp8_grad!r} must be 'e4m3' or 'e5m2'")
for key in ('fp8', 'bf16_moments'):
    if config[key] and not os.path.exists(os.path.join(here, 'fp8.py')):
        stop(f'{key}=True needs fp8.py beside train.py')
if bf16_moments and (optimizer != 'adamw' or dtype == 'float16'):
    stop("bf16_moments=True is AdamW's, and not for dtype='float16'")
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


class PlainUnpickler(pickle._Unpickler):
    """Reads a pickle of dicts, strings and numbers, and refuses one that names a class or a function.

    Python's own unpickler rather than the one in C, whose memo lets a few bytes ask for gigabytes.
    """

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'{module}.{name} is not plain data')


def load_meta(path):
    if not os.path.exists(path):
        return {}
    with open(path, 'rb') as f:
        meta = PlainUnpickler(f).load()
    if type(meta['vocab_size']) is not int or meta.get('dtype', 'uint16') not in ('uint16', 'uint32'):
        raise ValueError('its vocab_size must be an int, its dtype uint16 or uint32')
    stoi, itos = meta.get('stoi', {}), meta.get('itos', {})
    if {(type(k), type(v)) for k, v in [*stoi.items(), *((ch, i) for i, ch in itos.items())]} - {(str, int)}:
        raise ValueError('its stoi and itos must map characters to ints and back')
    if type(meta.get('row_length', 1)) is not int or meta.get('row_length', 1) < 1:
        raise ValueError('its row_length must be a positive int')
    return meta


try:
    meta = load_meta(os.path.join(data_dir, 'meta.pkl'))
except Exception as e:  # an unpickler meets damage in many ways
    stop(f'{data_dir}/meta.pkl cannot be used: {type(e).__name__}: {first_line(e)}')
tokens, masks = {}, {}
for split in ('train', 'val'):
    path = os.path.join(data_dir, f'{split}.bin')
    if not os.path.isfile(path):
        stop(f'{path} is missing: run python data/{dataset}/prepare.py first')
    # prepare.py writes uint32 where the vocabulary does not fit in uint16, and says so in meta.pkl
    token_dtype = np.dtype(meta.get('dtype', 'uint16'))
    if os.path.getsize(path) % token_dtype.itemsize != 0:
        stop(f'{path} is cut short, or does not hold {token_dtype}: run prepare.py again')
    if os.path.getsize(path) <= block_size * token_dtype.itemsize:
        stop(f'{path} holds too few tokens for block_size={block_size}')
    try:
        tokens[split] = np.memmap(path, dtype=token_dtype, mode='r')
    except OSError as e:
        stop(f'{path} cannot be read: {e.strerror}')
    head = tokens[split][:4096]
    if token_dtype == np.uint16 and len(head) >= 64 and head[0::2].any() and not head[1::2].any():
        stop(f'{path} holds numbers wider than uint16, by its zeros: write uint16, or name the dtype in meta.pkl')
    # a byte for each token, where prepare.py wrote them: 0 for one that counts in no loss (a prompt's)
    path = os.path.join(data_dir, f'{split}_mask.bin')
    if os.path.exists(path):
        if os.path.getsize(path) != len(tokens[split]):
            stop(f'{path} must hold a byte for each token of {split}.bin: run prepare.py again')
        masks[split] = np.memmap(path, dtype=np.uint8, mode='r')


def get_batch(split, stream, index):
    """The micro-batch number `index` of a stream of random batches: x, y, each (batch_size, block_size)."""
    data = tokens[split]
    rng = np.random.default_rng((seed, {'train': 0, 'val': 1}[split], stream, index))
    step = meta.get('row_length', 1)  # where the data are rows, a sequence begins where one of them does
    starts = step * rng.integers((len(data) - block_size - 1) // step + 1, size=batch_size)
    places = starts[:, None] + np.arange(block_size + 1)
    rows = data[places].astype(np.int64)                                          # (B, T + 1)
    targets = np.where(masks[split][places], rows, -1) if split in masks else rows
    xy = torch.from_numpy(np.stack((rows[:, :-1], targets[:, 1:])))               # (2, B, T)
    if device_type == 'cuda':
        xy = xy.pin_memory().to(device, non_blocking=True)
    else:
        xy = xy.to(device)
    return xy[0], xy[1]


# the model, new or from a checkpoint
iter_num = 0
best_val_loss = math.inf
torch.manual_seed(seed)
# ckpt.pt is what nanoGPT's is: the last checkpoint, or with always_save_checkpoint=False the best; the other is beside
names = ('ckpt.pt', 'ckpt_best.pt') if always_save_checkpoint else ('ckpt_last.pt', 'ckpt.pt')
last_path, best_path = (os.path.join(out_dir, name) for name in names)
ckpt_path = os.path.join(out_dir, 'ckpt_last.pt')
if not os.path.exists(ckpt_path):
    ckpt_path = os.path.join(out_dir, 'ckpt.pt')
if int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0 and os.path.exists(ckpt_path):
    init_from = 'resume'  # torchrun lost a rank and starts all of them again
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
            iter_num, best_val_loss = checkpoint.get('iter_num'), checkpoint.get('best_val_loss')
            trained_on = checkpoint.get('meta') or {}
            if (type(iter_num), type(best_val_loss), type(trained_on)) != (int, float, dict) or iter_num < 0:
                stop(f'{ckpt_path} is no checkpoint of a training run: its iter_num, best_val_loss or meta is odd')
            # the characters must be the same; a converted checkpoint, without an optimizer, has no table of them
            if checkpoint.get('optimizer') and trained_on.get('stoi') != meta.get('stoi'):
                stop(f'{data_dir} has another vocabulary than {ckpt_path} was trained on: resume with its dataset, or '
                     'restore its meta.pkl')
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
for split, data in tokens.items():  # all of it, each rank its share
    top = torch.tensor(int(np.array_split(data, world)[rank].max(initial=0)))
    top = all_reduce(top, dist.ReduceOp.MAX, hosts).item()
    if top >= model.config.vocab_size:
        stop(f'{data_dir}/{split}.bin holds the token {top}, beyond vocab_size={model.config.vocab_size}')
    if split == 'train' and top < 256 and not meta and not vocab_size and init_from == 'scratch':
        stop(f'{data_dir}/meta.pkl is missing, and {split}.bin holds no more than {top + 1} different tokens: run '
             f'prepare.py again, or say --vocab_size={top + 1}')
model.to(device)
if fp8:
    from fp8 import Recipe, enable
    execution = enable(model, Recipe(fp8_scaling, {'e4m3': torch.float8_e4m3fn, 'e5m2': torch.float8_e5m2}[fp8_grad],
                                     fp8_power_of_two))
    if master:
        print(execution)
raw_model = model
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
optimizer = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type, config['optimizer'])
if bf16_moments:
    from fp8 import AdamW16
    optimizer = AdamW16(optimizer.param_groups, fused=True)
if checkpoint is not None and checkpoint.get('optimizer'):  # a converted checkpoint has none
    try:
        optimizer.load_state_dict(checkpoint['optimizer'])
        if checkpoint.get('scaler'):
            scaler.load_state_dict(checkpoint['scaler'])
    except Exception as e:  # a dict of another shape fails in many ways
        stop(f'the optimizer in {ckpt_path} does not fit optimizer={config["optimizer"]!r}: {first_line(e)}')
if ddp:
    furthest = all_reduce(torch.tensor(iter_num), dist.ReduceOp.MAX, hosts).item()
    if all_reduce(torch.tensor(int(iter_num != furthest)), group=hosts) > 0:
        stop(f'the ranks hold checkpoints of different iterations: {out_dir} must be one folder for all machines')
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


def save_checkpoint(best):
    """Written beside, forced to the disk and renamed: a kill at any instant leaves the last checkpoint whole.

    The best one is a second name of the same file, and moves first: a run that is killed in between goes on from the
    checkpoint before, and comes to the same best one again.
    """
    new, new_best = last_path + '.tmp', best_path + '.tmp'
    try:
        with open(new, 'wb') as f:
            torch.save({'model': raw_model.state_dict(), 'optimizer': optimizer.state_dict(),
                        'scaler': scaler.state_dict(), 'model_args': model_args, 'iter_num': iter_num,
                        'best_val_loss': best_val_loss, 'config': config,
                        'meta': meta},  # a character set's table, for sample.py
                       f)
            f.flush()
            os.fsync(f.fileno())
        if best or not os.path.exists(os.path.join(out_dir, 'ckpt.pt')):
            with contextlib.suppress(FileNotFoundError):
                os.remove(new_best)
            try:
                os.link(new, new_best)
            except OSError:  # a file system without links
                shutil.copyfile(new, new_best)
            os.replace(new_best, best_path)
        os.replace(new, last_path)
        if os.name == 'posix':  # elsewhere a folder cannot be opened
            folder = os.open(out_dir, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as e:
        for path in (new, new_best):
            with contextlib.suppress(OSError):
                os.remove(path)
        cause = e if isinstance(e, OSError) else e.__context__ or e  # torch's own error hides the system's
        stop(f'{last_path} could not be written, what was saved before is whole: {first_line(cause)}')


def write_log(record):
    try:
        log_file.write(json.dumps(record).encode() + b'\n')
    except OSError as e:
        stop(f'{log_path} could not be written: {e.strerror}')


def log(record):
    # JSON has no nan and no infinity
    record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    write_log(record)
    if wandb_log:
        wandb.log({k: v for k, v in record.items() if v is not None}, step=record['step'])


def git_commit():
    try:
        return subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=here, capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if master:
    log_path = os.path.join(out_dir, 'log.jsonl')
    try:
        os.makedirs(out_dir, exist_ok=True)
        moves = []
        if init_from != 'resume':  # what an earlier run left here
            moves = [(name, name + '.old') for name in ('ckpt_last.pt', 'ckpt_best.pt', 'ckpt.pt', 'log.jsonl')]
        elif always_save_checkpoint and os.path.exists(os.path.join(out_dir, 'ckpt_last.pt')):  # it was False before
            moves = [('ckpt.pt', 'ckpt_best.pt'), ('ckpt_last.pt', 'ckpt.pt')]
        elif not always_save_checkpoint and os.path.exists(os.path.join(out_dir, 'ckpt_best.pt')):  # it was True
            moves = [('ckpt.pt', 'ckpt_last.pt'), ('ckpt_best.pt', 'ckpt.pt')]
        for old, new in moves:
            if os.path.exists(os.path.join(out_dir, old)) and not eval_only:
                os.replace(os.path.join(out_dir, old), os.path.join(out_dir, new))
                print(f'{out_dir}/{old} is now {new}')
        if os.path.exists(os.path.join(init_from, 'tokenizer.json')):  # it travels with the checkpoint
            shutil.copy(os.path.join(init_from, 'tokenizer.json'), out_dir)
        log_file = open(log_path, 'ab', buffering=0)
        if log_file.tell() > 0:
            log_file.write(b'\n')  # a run that was killed may have left half a line
    except OSError as e:
        stop(f'out_dir={out_dir!r} cannot be written: {e.strerror}')
    header = {'command': shlex.join(sys.argv), 'config': config, 'model_args': model_args, 'world_size': world,
              'parameters': raw_model.get_num_params(), 'active_parameters': raw_model.get_num_active_params(),
              'versions': {'python': platform.python_version(), 'torch': torch.__version__, 'numpy': np.__version__},
              'hardware': torch.cuda.get_device_name(device) if device_type == 'cuda' else
              f'{platform.machine()} {device_type}, {os.cpu_count()} cores', 'git_commit': git_commit()}
    if wandb_log:
        wandb.init(project=wandb_project, name=wandb_run_name, config=config)
    write_log(header)
    print(f'parameters without embedding and head: {header["parameters"] / 1e6:.2f}M, of which a token uses '
          f'{header["active_parameters"] / 1e6:.2f}M')
    print(f'tokens per iteration: {tokens_per_iter:,}; device: {device}, {dtype}')
    if init_from == 'resume':
        print(f'going on from {ckpt_path}, iteration {iter_num}')

# a signal ends the run after the step that it interrupts, with a checkpoint; a second Ctrl-C ends it at once
signalled = False


def on_signal(number, frame):
    global signalled
    if number == signal.SIGINT and signalled:
        os._exit(130)
    signalled = True


signal.signal(signal.SIGTERM, on_signal)
signal.signal(signal.SIGINT, on_signal)

# training loop
model.train()
running_mfu = math.nan
skipped, in_a_row = torch.zeros(2, device=device)  # iterations that changed nothing
t_log, iters_logged = time.time(), 0
while True:
    lr = get_lr(iter_num) if decay_lr else learning_rate
    for group in optimizer.param_groups:
        group['lr'] = lr
    raw_model.config.mtp_lambda = mtp_lambda if iter_num < mtp_late_from * max_iters else \
        min(mtp_lambda, mtp_lambda_late)

    # evaluate and save
    if iter_num % eval_interval == 0 or iter_num == max_iters or eval_only:
        losses = estimate_loss()
        improved = losses['val'] < best_val_loss
        if improved and iter_num > 0:  # an untrained model is never saved, so it is no best one either
            best_val_loss = losses['val']
        if master:
            print(f'step {iter_num}: train loss {losses["train"]:.4f}, val loss {losses["val"]:.4f}')
            log({'step': iter_num, 'train_loss': losses['train'], 'val_loss': losses['val'], 'lr': lr})
            if not math.isfinite(losses['val']):
                print('the validation loss is not finite: not saved')
            elif iter_num > 0 and not eval_only:
                save_checkpoint(best=improved)
        t_log, iters_logged = time.time(), 0
    if iter_num >= max_iters or eval_only:
        break

    # forward and backward, over the micro-batches
    stats = {}
    for micro_step in range(accumulation):
        number = iter_num * gradient_accumulation_steps + micro_step * world + rank
        for seed_generator in (torch.manual_seed, np.random.seed, random.seed):
            seed_generator((seed + number) % 2**32)
        x, y = get_batch('train', 0, number)
        if ddp:  # gradients travel with the last micro-batch
            model.require_backward_grad_sync = micro_step == accumulation - 1
        with ctx:
            _, loss = model(x, y)
        scaler.scale(loss / accumulation).backward()
        for k, v in raw_model.stats.items():
            stats[k] = stats[k] + v if k in stats else v
    # clip, step, balance; where a loss or a gradient is not finite, on any rank, they change nothing: decided on the
    # device
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip if grad_clip > 0 else math.inf)
    means = all_reduce(torch.cat([stats['losses'], *([stats['balance'].view(1)] if 'load' in stats else [])]))
    means = means / (accumulation * world)
    bad = ~(norm + means.sum()).isfinite()
    if optimizer.defaults['fused']:
        optimizer.found_inf = bad.float()  # where it is 1, a fused step leaves weights and moments alone
        optimizer.step()
    elif not bad:  # on MPS, with a host sync
        optimizer.step()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if 'load' in stats:
        raw_model.update_balance(all_reduce(stats['load']).masked_fill(bad, 0))
    skipped, in_a_row = skipped + bad, (in_a_row + 1) * bad
    iters_logged += 1

    # log: all numbers come over in one host sync, the only one of the loop
    if iter_num % log_interval == 0:
        numbers = [means, torch.stack([norm, skipped, in_a_row])]
        if 'load' in stats:
            load = stats['load'].float()  # of the whole iteration, all ranks: update_balance needed it so
            numbers.append(load.amax(dim=1) / load.mean(dim=1) - 1)
        numbers = torch.cat(numbers).tolist()
        losses, numbers = numbers[:len(stats['losses'])], numbers[len(stats['losses']):]
        record = {'step': iter_num, 'loss': losses[0], 'mtp_losses': losses[1:], 'lr': lr}
        if 'load' in stats:
            record['balance'] = numbers.pop(0)
            record['max_vio'] = numbers[3:]
        record |= {'grad_norm': numbers[0], 'skipped': int(numbers[1])}
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
            if record['skipped']:
                extra += f', skipped {record["skipped"]}'
            left = f'{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left'
            print(f'iter {iter_num}: loss {losses[0]:.4f}, time {dt * 1000:.2f}ms, mfu {running_mfu * 100:.2f}%, '
                  f'{tokens_per_iter / dt:,.0f} tok/s, {left}{extra}')
            log(record)
        if numbers[2] >= max_skipped_iters:
            stop(f'{int(numbers[2])} iterations in a row were skipped for a loss or a gradient that is not finite: try '
                 'a smaller learning_rate, with --init_from=resume if there is a checkpoint')
    iter_num += 1

    # leave after a signal to any rank, all ranks after the same step
    if all_reduce(torch.tensor(int(signalled)), group=hosts) > 0:
        if master:
            save_checkpoint(best=False)
            print(f'stopped by a signal before iteration {iter_num}: the same command with --init_from=resume goes on '
                  f'from {last_path}')
        break

if ddp:
    dist.destroy_process_group()
