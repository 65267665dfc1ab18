"""
Trains a model; nanoGPT's loop and flags, and every field of GPTConfig as a flag.

    python train.py config/train_shakespeare_char.py                      # one GPU, Apple's GPU or the CPU
    torchrun --standalone --nproc_per_node=8 train.py config/train_deepseek.py
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=29500 train.py ...

All randomness of a micro-batch (its rows, its dropout) follows from the seed and the micro-batch's number, counted over
iterations and ranks, so a resumed run goes on exactly as the uninterrupted one would have.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the loop has its own handler: Ctrl-C ends without a traceback

import contextlib
import dataclasses
import functools
import importlib
import json
import math
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
import uuid

import numpy as np
import torch
import torch._functorch.config
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from model import GPT, GPTConfig, first_line, is_of_run, is_out_of_memory, load_meta, open_log, save_checkpoint

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
checkpoint = 'whole'  # ckpt.pt; or 'dcp': ckpt.dcp, in shards, written meanwhile; needs extras/dcp.py
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
optimizer = 'adamw'  # or 'muon': Muon for the blocks' matrices, AdamW for the rest; needs extras/optim.py
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
dtype = ''  # 'float32', 'bfloat16' or 'float16'; '': bfloat16 where the device is faster in it
compile = True  # torch.compile, block by block
fp8 = False  # the products of the linear layers and the experts in FP8, as in V3 section 3.3; needs extras/fp8.py
fp8_scaling = 'tile'  # or 'row' or 'tensor': what shares a scale
fp8_grad = 'e4m3'  # or 'e5m2': the format of the gradients
fp8_power_of_two = False  # scales that are powers of two
bf16_moments = False  # AdamW's moments in bfloat16, as V3 keeps them; needs extras/optim.py
recompute = False  # keep a block's input alone for the backward, which computes the rest again
shard = ''  # 'True': FSDP2 over all ranks; '4': over groups of four, each with the whole; needs extras/parallel.py
expert_parallel = 1  # so many ranks share a layer's experts; needs extras/parallel.py
activation_memory = 1.0  # with compile: share of a block's activations that is kept; the backward recomputes the rest
# -----------------------------------------------------------------------------
config_keys = [k for k, v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())  # from the command line, config files
config = {k: globals()[k] for k in config_keys}
here = os.path.dirname(os.path.abspath(__file__))
# -----------------------------------------------------------------------------
# checks: what fails because of a user's mistake raises a ValueError, and stop() says it

# one process, or one of several under torchrun
ddp = 'RANK' in os.environ
rank, world, local_rank = (int(os.environ.get(k, d)) for k, d in (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
master = rank == 0
sharded = shard not in ('', 'False') or expert_parallel > 1
parallel = dcp = None  # extras/parallel.py and extras/dcp.py, where a flag asks for them
hosts = None  # a gloo group for small messages between CPUs: see most()


def stop(message, every_rank=False):
    """A user's mistake: one line, printed on local rank 0 unless every_rank, and exit code 2."""
    if every_rank or local_rank == 0:
        print(message, file=sys.stderr, flush=True)
    else:
        time.sleep(10)  # torchrun ends all ranks when one has ended: the one that speaks comes first
    disconnect(failed=True)
    raise SystemExit(2)


def disconnect(failed=False):
    """Leave the process groups. gloo's threads must end before Python does, or they may abort it (pytorch#190489), and
    they end when nothing holds their groups: neither DDP's module nor shards nor `hosts`.
    """
    global model, raw_model, optimizer, hosts
    group, model, hosts = hosts, None, None
    if sharded:  # every tensor of theirs knows its group
        raw_model = optimizer = None
    for extra in filter(None, (dcp, parallel)):
        extra.leave()
    if not dist.is_initialized():
        return
    if failed and dist.get_backend() == 'nccl':  # it would wait for ranks that may not come
        dist.destroy_process_group(group)
    else:
        dist.destroy_process_group()


RANGES = [  # settings, the values that they may have, and these in words
    ('batch_size block_size gradient_accumulation_steps eval_interval eval_iters log_interval max_skipped_iters '
     'expert_parallel',
     lambda x: x > 0, 'be positive'),
    ('learning_rate min_lr weight_decay grad_clip max_iters warmup_iters lr_decay_iters mtp_lambda_late mtp_late_from',
     lambda x: 0 <= x < math.inf, 'be finite and not negative'),
    ('beta1 beta2', lambda x: 0 <= x < 1, 'lie in [0, 1)'),
    ('activation_memory', lambda x: 0 <= x <= 1, 'lie in 0..1'),
    ('shard', lambda x: x in ('', 'False', 'True') or x.isdecimal() and int(x) > 0, "be 'True', or a number of ranks"),
    ('seed', lambda x: 0 <= x < 2**32, 'lie in 0..2**32 - 1'),
    ('optimizer', lambda x: x in ('adamw', 'muon'), "be 'adamw' or 'muon'"),
    ('checkpoint', lambda x: x in ('whole', 'dcp'), "be 'whole' or 'dcp'"),
    ('dtype', lambda x: x in ('', 'float32', 'bfloat16', 'float16'), "be 'float32', 'bfloat16' or 'float16'"),
    ('fp8_scaling', lambda x: x in ('tile', 'row', 'tensor'), "be 'tile', 'row' or 'tensor'"),
    ('fp8_grad', lambda x: x in ('e4m3', 'e5m2'), "be 'e4m3' or 'e5m2'"),
    ('init_from', lambda x: x in ('scratch', 'resume') or os.path.isdir(x),
     "be 'scratch', 'resume' or a folder with a DeepSeek-V2 or V3 family checkpoint: GPT-2's weights do not fit this "
     'architecture'),
    ('out_dir', lambda x: x != '', 'name a folder'),
]


def beside(path, what):
    """A module of this repository that a flag asks for, such as extras/fp8.py."""
    if not os.path.exists(os.path.join(here, path)):
        raise ValueError(f'{what} needs {path} beside train.py')
    return importlib.import_module(path.removesuffix('.py').replace('/', '.'))


def check_settings():
    for names, fits, words in RANGES:
        for name in names.split():
            if not fits(config[name]):
                raise ValueError(f'{name}={config[name]!r} must {words}')
    if gradient_accumulation_steps % world != 0:
        raise ValueError(f'gradient_accumulation_steps={gradient_accumulation_steps} must be a multiple of the {world} '
                         'ranks')
    if os.path.isdir(init_from) and os.path.realpath(init_from) == os.path.realpath(out_dir):
        raise ValueError(f'out_dir={out_dir!r} must not be the folder that the run begins with, init_from')
    if bf16_moments and (optimizer != 'adamw' or dtype == 'float16'):
        raise ValueError("bf16_moments=True is AdamW's, and not for dtype='float16'")
    if decay_lr and warmup_iters > lr_decay_iters and master:
        print(f'note: the rate rises until warmup_iters={warmup_iters} and then falls to min_lr at once, because '
              f'lr_decay_iters={lr_decay_iters} is before that')


# -----------------------------------------------------------------------------
# ranks and device

def connect():
    """This rank's device, and a random name of the run, which all ranks share and torchrun's restarts keep."""
    global hosts
    gpu = device.startswith('cuda')
    place = f'cuda:{local_rank}' if ddp and gpu else device
    if ddp and gpu and torch.cuda.device_count() < int(os.environ['LOCAL_WORLD_SIZE']):
        raise ValueError(f'{os.environ["LOCAL_WORLD_SIZE"]} ranks need as many GPUs; here are '
                         f'{torch.cuda.device_count()}')
    try:
        torch.zeros(1, device=place).item()
    except Exception as e:  # torch raises RuntimeError, AssertionError and others
        raise ValueError(f'device={device!r} cannot be used here: {first_line(e)}') from None
    if not ddp:
        return place, uuid.uuid4().hex
    if gpu:
        torch.cuda.set_device(place)
    try:
        store, _, _ = next(dist.rendezvous('env://'))
        # torchrun's store outlives a restart, with the addresses of the ranks that were lost
        attempt = dist.PrefixStore('attempt' + os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
        check_devices(attempt, gpu)
        check_host_names(attempt)
        dist.init_process_group(backend if gpu else 'gloo', store=attempt, rank=rank, world_size=world)
        hosts = dist.new_group(backend='gloo')
    except (ValueError, RuntimeError) as e:
        raise ValueError(f'the ranks cannot be connected: {first_line(e)}') from None
    return place, store.compare_set('run', '', uuid.uuid4().hex).decode()


def check_devices(store, gpu):
    """gloo and nccl would wait for each other."""
    store.add('gpus', int(gpu))
    if store.add('ranks', 1) == world:
        store.set('counted', '')
    store.get('counted')  # waits for all
    if store.add('gpus', 0) not in (0, world):
        raise ValueError('some ranks have a GPU and others have none: give all of them the same --device')


def check_host_names(store):
    """gloo listens where a machine's name points to; on many it is 127.0.1.1, which no other machine can reach."""
    machines = int(os.environ.get('GROUP_WORLD_SIZE', 1))
    if machines == 1 or 'GLOO_SOCKET_IFNAME' in os.environ:
        return
    if local_rank == 0:
        try:
            address = socket.gethostbyname(socket.gethostname())
        except OSError:
            address = '127.0.0.1'  # what gloo takes then
        store.set('host' + os.environ['GROUP_RANK'], address)
    addresses = [store.get(f'host{machine}').decode() for machine in range(machines)]
    if any(address.startswith('127.') for address in addresses):
        raise ValueError(f'by their names the machines are {", ".join(addresses)}, and no other reaches 127...: '
                         'set GLOO_SOCKET_IFNAME to the network interface, such as eth0, on every machine')


def all_reduce(x, op=dist.ReduceOp.SUM, group=None):
    if ddp:
        dist.all_reduce(x, op, group)
    return x


def most(x):
    """The largest of the ranks' ints."""
    return all_reduce(torch.tensor(int(x)), dist.ReduceOp.MAX, hosts).item()


def same(x):
    """Whether all ranks hold the same int."""
    return most(x) == -most(-x)


def best_dtype(device_type):
    """bfloat16 where the device multiplies it faster than float32, but for GPUs without it."""
    if device_type == 'cuda':
        return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    # a CPU needs AMX: with AVX512 alone, even with its bf16 instructions, a step took 1.6 times as long as in float32
    return 'bfloat16' if device_type == 'cpu' and torch.cpu._is_amx_tile_supported() else 'float32'


try:
    parallel = beside('extras/parallel.py', 'shard or expert_parallel') if sharded else None
    dcp = beside('extras/dcp.py', 'checkpoint=dcp') if checkpoint == 'dcp' else None
    check_settings()
    device, run = connect()
    device_type = torch.device(device).type
    dtype = config['dtype'] = dtype or best_dtype(device_type)
    if dtype == 'float16' and device_type != 'cuda':
        raise ValueError("dtype='float16' needs CUDA (its gradients are scaled there); use bfloat16 or float32")
    if sharded:
        parallel.check(config, world if ddp else 0)
except ValueError as e:
    stop(e)
accumulation = gradient_accumulation_steps // world
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size
ctx = contextlib.nullcontext() if dtype == 'float32' else torch.autocast(device_type, getattr(torch, dtype))
# with bf16 or fp16 the few fp32 products that are left, the routers', are exact
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == 'float32'

# -----------------------------------------------------------------------------
# data: flat files of token ids, read where they lie
data_dir = os.path.join(here, 'data', dataset)


def open_tokens(split):
    """The tokens of a split, and where prepare.py wrote one, its mask: 0 for a token that counts in no loss."""
    path, mask_path = (os.path.join(data_dir, name) for name in (f'{split}.bin', f'{split}_mask.bin'))
    kind = np.dtype(meta.get('dtype', 'uint16'))
    if not os.path.isfile(path):
        sets = sorted(os.path.relpath(folder, os.path.join(here, 'data'))
                      for folder, _, files in os.walk(os.path.join(here, 'data')) if 'train.bin' in files)
        raise ValueError(f'{path} is missing: run python data/{dataset}/prepare.py first, or name a data set that is '
                         f'prepared: {", ".join(sets) or "there is none yet"}')
    size = os.path.getsize(path)
    if size % kind.itemsize != 0:
        raise ValueError(f'{path} is cut short, or does not hold {kind}: run prepare.py again')
    if size <= block_size * kind.itemsize:
        raise ValueError(f'{path} holds too few tokens for block_size={block_size}')
    if os.path.exists(mask_path) and os.path.getsize(mask_path) != size // kind.itemsize:
        raise ValueError(f'{mask_path} must hold a byte for each token of {split}.bin: run prepare.py again')
    mask = np.memmap(mask_path, dtype=np.uint8, mode='r') if os.path.exists(mask_path) else None
    return np.memmap(path, dtype=kind, mode='r'), mask


def check_tokens(vocab_size):
    """All of them, each rank its share: a token beyond the vocabulary would be an odd error much later."""
    for split, (tokens, _) in data.items():
        top = most(np.array_split(tokens, world)[rank].max(initial=0))
        if top >= vocab_size:
            raise ValueError(f'{data_dir}/{split}.bin holds the token {top}, beyond vocab_size={vocab_size}')
        if split == 'train' and top < 256 and not meta and not config['vocab_size'] and init_from == 'scratch':
            raise ValueError(f'{data_dir}/meta.pkl is missing, and {split}.bin holds no more than {top + 1} different '
                             f'tokens: run prepare.py again, or say --vocab_size={top + 1}')


def get_batch(split, stream, index):
    """The micro-batch number `index` of a stream of random batches: x, y, each (batch_size, block_size)."""
    tokens, mask = data[split]
    rng = np.random.default_rng((seed, {'train': 0, 'val': 1}[split], stream, index))
    step = meta.get('row_length', 1)  # where the data are rows, a sequence begins where one of them does
    starts = step * rng.integers((len(tokens) - block_size - 1) // step + 1, size=batch_size)
    places = starts[:, None] + np.arange(block_size + 1)
    rows = tokens[places].astype(np.int64)                                        # (B, T + 1)
    targets = rows if mask is None else np.where(mask[places], rows, -1)
    xy = torch.from_numpy(np.stack((rows[:, :-1], targets[:, 1:])))               # (2, B, T)
    if device_type == 'cuda':
        xy = xy.pin_memory().to(device, non_blocking=True)
    else:
        xy = xy.to(device)
    return xy[0], xy[1]


try:
    meta = load_meta(os.path.join(data_dir, 'meta.pkl'))
    data = {split: open_tokens(split) for split in ('train', 'val')}
except (ValueError, OSError) as e:
    stop(e)

# -----------------------------------------------------------------------------
# the model: new, from a checkpoint of this file's, or from a Hugging Face folder
# ckpt.pt is the last checkpoint, and ckpt_best.pt the best; with always_save_checkpoint=False, as in nanoGPT, ckpt.pt
# is the best, and ckpt_last.pt the last
ending = '.dcp' if checkpoint == 'dcp' else '.pt'
last_path, best_path = (os.path.join(out_dir, name + ending) for name in
                        (('ckpt', 'ckpt_best') if always_save_checkpoint else ('ckpt_last', 'ckpt')))
fields = {field.name: field.default for field in dataclasses.fields(GPTConfig)}
on_meta = torch.device('meta') if sharded else contextlib.nullcontext()  # sharded, no rank ever holds the whole model


def new_model():
    args = {name: config[name] for name in fields}
    args['vocab_size'] = vocab_size or meta.get('vocab_size', 50304)
    with on_meta:
        return GPT(GPTConfig(**args))


# what a run may change of a checkpoint's config: the first by every flag, the others by a flag that is not the default
FREE = ('dropout', 'bias_update_speed', 'aux_loss_alpha', 'mtp_lambda', 'block_size')
FREE_IF_GIVEN = ('eos_token_id', 'rope_factor', 'rope_original_max_position_embeddings', 'rope_beta_fast',
                 'rope_beta_slow', 'rope_mscale', 'rope_mscale_all_dim')


def overrides():
    given = [name for name in FREE_IF_GIVEN if config[name] != fields[name]]
    return {name: config[name] for name in (*FREE, *given)}


def resumed_model():
    """The model of the last checkpoint, and the checkpoint."""
    path = resume_path()
    if not same(os.path.exists(path)):
        raise ValueError(f'{path} is missing on some machines: {out_dir} must be one folder for all of them')
    other = os.path.join(out_dir, 'ckpt_last' if always_save_checkpoint else 'ckpt_best') + path[path.rindex('.'):]
    if os.path.exists(other):
        raise ValueError(f'{other} is of a run with always_save_checkpoint={not always_save_checkpoint}: resume it so')
    open_checkpoint = beside('extras/dcp.py', path).open_checkpoint if path.endswith('.dcp') else GPT.from_checkpoint
    with on_meta:  # and then the weights stay in the file: each rank reads its own part of them
        model, checkpoint = open_checkpoint(path, 'cpu' if sharded else device, assign=sharded, **overrides())
    iter_num, best, trained_on = (checkpoint.get(key) for key in ('iter_num', 'best_val_loss', 'meta'))
    if (type(iter_num), type(best), type(trained_on or {})) != (int, float, dict) or iter_num < 0:
        raise ValueError(f'{path} is no checkpoint of a training run: its iter_num, best_val_loss or meta has '
                         'a wrong type')
    if not same(iter_num):
        raise ValueError(f'the ranks hold checkpoints of different iterations: {out_dir} must be one folder for all '
                         'machines')
    if not checkpoint.get('optimizer'):  # converted: it has no meta either
        beside('convert.py', 'a converted checkpoint').check_vocabulary(out_dir, meta, data_dir)
    elif any((trained_on or {}).get(key) != meta.get(key) for key in ('stoi', 'tokenizer')):
        raise ValueError(f'{data_dir} has another vocabulary than {path} was trained on: resume with its dataset, or '
                         'restore its meta.pkl')
    return model, checkpoint


def resume_path():
    """The last checkpoint, of two forms the newer; where there is none, as after an import, ckpt.pt."""
    paths = [last_path.removesuffix(ending) + form for form in ('.pt', '.dcp')]
    return max(filter(os.path.exists, paths), key=os.path.getmtime, default=os.path.join(out_dir, 'ckpt.pt'))


def check_fit(model):
    ignored = [f'{name}={config[name]}' for name, default in fields.items() if name not in overrides()
               and name != 'vocab_size' and config[name] not in (default, getattr(model.config, name))]
    if ignored and master:
        print(f'ignored, since the architecture is the checkpoint\'s: {", ".join(ignored)}')
    original, factor = model.config.rope_original_max_position_embeddings, model.config.rope_factor
    if block_size > factor * original:
        raise ValueError(f'block_size={block_size} is longer than the {int(factor * original)} of the checkpoint: '
                         'resume with the config file and the flags of its run, or extend it with '
                         f'--rope_factor={math.ceil(block_size / original)}')


def build_model():
    """The model on this rank's device, and the checkpoint that it came from, or None."""
    checkpoint = source = None
    if init_from == 'scratch':
        model = new_model()
    elif init_from == 'resume':
        model, checkpoint = resumed_model()
        source = resume_path() if resume_path().endswith('.dcp') else model.state_dict()
    else:
        convert = beside('convert.py', f'init_from={init_from}')
        convert.check_vocabulary(init_from, meta, data_dir)
        if sharded:
            model, source = convert.open_model(init_from, overrides(), 'meta')
        else:
            model = convert.load_folder(init_from, overrides())
    if init_from != 'scratch':
        check_fit(model)
    check_tokens(model.config.vocab_size)
    if sharded:
        model = parallel.distribute(model.config, source, device, dtype, shard, expert_parallel)
    return model.to(device), checkpoint


def use_kernels(model):
    """extras/kernels.py, on a GPU and where it lies beside this file: without it the experts may wait for the host."""
    if device_type != 'cuda' or not os.path.exists(os.path.join(here, 'extras/kernels.py')):
        return
    try:
        fault = importlib.import_module('extras.kernels').enable(model)
    except ImportError as e:
        fault = first_line(e)
    if fault:
        print(f'rank {rank}: ' * ddp + f'going on without extras/kernels.py: {fault}')


def build_optimizer(model, checkpoint):
    betas = (beta1, beta2)
    if optimizer == 'muon':
        made = beside('extras/optim.py', 'optimizer=muon').muon(model, weight_decay, learning_rate, betas, device_type)
    else:
        made = model.configure_optimizers(weight_decay, learning_rate, betas, device_type)
    if bf16_moments:
        made = beside('extras/optim.py', 'bf16_moments=True').AdamW16(made.param_groups, fused=True)
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
    if checkpoint is not None and checkpoint.get('optimizer'):  # a converted checkpoint has none
        try:
            state = checkpoint['optimizer']
            made.load_state_dict(parallel.optimizer_state(state, made) if sharded else state)
            for group in made.param_groups:
                group['fused'] = made.defaults['fused']  # this device's, not that of the checkpoint's
            if checkpoint.get('scaler'):
                scaler.load_state_dict(checkpoint['scaler'])
        except Exception as e:  # a dict of another shape fails in many ways
            raise ValueError(f'the optimizer in {resume_path()} does not fit optimizer={optimizer!r}: '
                             f'{first_line(e)}') from None
    return made, scaler


def micro_batch(n):
    """Forward and backward of n sequences, an evaluation, and a step that makes the optimizer's state and changes
    nothing. The gradients stay: the next one is as the later micro-batches of an iteration."""
    x, y = (rows[:n] for rows in get_batch('train', 0, 0))
    with ctx:
        _, loss = raw_model.train()(x, y)
    loss.backward()
    with ctx, torch.no_grad():
        raw_model.eval()(x, y, return_logits=False)
    if optimizer.defaults['fused']:
        optimizer.found_inf = torch.ones((), device=device)
        optimizer.step()


def try_micro_batch():
    """One before anything is renamed. -> the ranks' worst fault: 0, 1, 2 (memory).

    Each rank prints its own fault; all take the same decision by the result.
    """
    fault = 0
    try:
        for _ in range(2 if device_type == 'cuda' else 1):  # the second beside gradients and the optimizer's state
            micro_batch(batch_size)
    except Exception as e:
        fault = 2 if is_out_of_memory(e) else 1
        if fault == 1 and not compile:
            raise
        if sharded:  # the others wait for this rank within the micro-batch
            stop(f'rank {rank}: {first_line(e)}: try ' +
                 ('--compile=False' if fault == 1 else 'a smaller batch_size'), every_rank=True)
        if fault == 1:
            print(f'rank {rank}: ' * ddp + f'going on without torch.compile: {type(e).__name__}: {first_line(e)}')
    optimizer.zero_grad(set_to_none=True)
    return most(fault)


def peak_memory(n):
    """Bytes that micro-batches of n sequences take on a GPU; 0 where they do not fit."""
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        micro_batch(n)
        micro_batch(n)
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        return 0
    return torch.cuda.max_memory_allocated(device)


def what_fits():
    """The batch size for a GPU whose memory was too small, in words: half of it, and half again, until it fits, and as
    much more as the peaks of that one and of its half allow."""
    n = batch_size // 2
    while n > 0 and (peak := peak_memory(n)) == 0:
        n //= 2
    if n == 0:
        return 'make the model smaller (n_embd, n_layer, n_routed_experts)'
    per_sequence = (peak - peak_memory(n // 2)) / (n - n // 2) if n > 1 else peak
    room = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)  # what other programs leave
    more = (0.95 * room - peak) / max(per_sequence, 1)  # the last few percent are in pieces
    n += max(0, min(int(more), n, batch_size - 1 - n))
    return f'about batch_size={n} fits here; make gradient_accumulation_steps larger'


try:
    torch.manual_seed(seed)
    restarted = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0
    if most(restarted and is_of_run(resume_path(), run)):
        init_from = 'resume'  # torchrun lost a rank and starts all of them again
    raw_model, found = build_model()
    use_kernels(raw_model)
    if fp8:
        grad_dtype = {'e4m3': torch.float8_e4m3fn, 'e5m2': torch.float8_e5m2}[fp8_grad]
        file = beside('extras/fp8.py', 'fp8=True')
        execution = file.enable(raw_model, file.Recipe(fp8_scaling, grad_dtype, fp8_power_of_two))
        if master:
            print(execution)
    optimizer, scaler = build_optimizer(raw_model, found)
    iter_num, best_val_loss = (found['iter_num'], found['best_val_loss']) if found else (0, math.inf)
    found = None  # free the memory
    for block in raw_model.blocks() if recompute else ():
        block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
    if compile:
        torch._functorch.config.activation_memory_budget = activation_memory
        raw_model.compile()
    fault = try_micro_batch()
    if fault == 1:  # without a compiler the run is only slower
        raw_model.uncompile()
        compile = False
        fault = try_micro_batch()
    if fault == 2:
        advice = 'make batch_size smaller, and gradient_accumulation_steps larger'
        raise ValueError(f'out of memory: {what_fits() if device_type == "cuda" and not ddp else advice}')
except ValueError as e:
    stop(e)
except (RuntimeError, MemoryError) as e:
    if not is_out_of_memory(e):
        raise
    stop('out of memory: make the model smaller (n_embd, n_layer, n_routed_experts)', every_rank=True)
model = raw_model
clip_grad_norm_ = parallel.clip_grad_norm_ if sharded else torch.nn.utils.clip_grad_norm_
if ddp and not sharded:
    # the only buffer that changes, the balance bias, changes alike on all ranks
    model = DDP(model, device_ids=[device] if device_type == 'cuda' else None, forward_sync_buffers=False)


# -----------------------------------------------------------------------------
# evaluation and rate

@torch.no_grad()
def estimate_loss():
    """Mean main loss over eval_iters batches of each split, the same ones each time, shared out over the ranks."""
    raw_model.eval()
    out = {}
    for split in ('train', 'val'):
        total = torch.zeros((), device=device)
        for k in range(rank, math.ceil(eval_iters / world) * world, world):  # all ranks take part in each batch
            with ctx:
                loss = raw_model(*get_batch(split, 1, k), return_logits=False)[1]
            if k < eval_iters:
                total += loss
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


def get_mtp_lambda(it):
    return mtp_lambda if it < mtp_late_from * max_iters else min(mtp_lambda, mtp_lambda_late)


# -----------------------------------------------------------------------------
# checkpoint and log, on rank 0
log_path = os.path.join(out_dir, 'log.jsonl')


def save(best):
    if not (master or sharded or dcp):
        return
    rest = {'scaler': scaler.state_dict(), 'model_args': dataclasses.asdict(raw_model.config), 'iter_num': iter_num,
            'best_val_loss': best_val_loss, 'config': config, 'run': run,
            'meta': meta}  # a character set's table, for sample.py
    try:
        if dcp:
            dcp.finish()  # the checkpoint before
        # the first checkpoint is also saved as the best
        best = best or not os.path.exists(os.path.join(out_dir, 'ckpt' + ending))
        if dcp:
            dcp.save(raw_model, optimizer, rest, last_path, best_path if best else None)
            return
        state = {'model': raw_model.state_dict(keep_vars=sharded), 'optimizer': optimizer.state_dict()}
        if sharded:
            state = parallel.whole(state)
        if master:
            save_checkpoint(state | rest, last_path, best_path if best else None)
    except ValueError as e:
        stop(e)


def start_wandb():
    try:
        import wandb
        wandb.init(project=wandb_project, name=wandb_run_name, config=config)
        return wandb
    except Exception as e:  # it is missing, or nobody is logged in; wandb has errors of its own
        raise ValueError(f'wandb_log=True, and wandb cannot start ({first_line(e)}): pip install wandb and run wandb '
                         'login, or set WANDB_MODE=offline') from None


def git_commit():
    try:
        return subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=here, capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def header():
    return {'command': shlex.join(sys.argv), 'config': config, 'run': run, 'world_size': world,
            'model_args': dataclasses.asdict(raw_model.config),  # with every derived size
            'parameters': raw_model.get_num_params(), 'active_parameters': raw_model.get_num_active_params(),
            'versions': {'python': platform.python_version(), 'torch': torch.__version__, 'numpy': np.__version__},
            'hardware': torch.cuda.get_device_name(device) if device_type == 'cuda' else
            f'{platform.machine()} {device_type}, {os.cpu_count()} cores', 'git_commit': git_commit()}


def plain(value):
    """JSON has no nan and no infinity: None."""
    if isinstance(value, list):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def log(record):
    record = {k: plain(v) for k, v in record.items()}
    try:
        log_file.write(json.dumps(record).encode() + b'\n')
    except OSError as e:
        stop(f'{log_path} could not be written: {e.strerror}')
    if wandb_log:
        wandb.log({k: v for k, v in record.items() if v is not None}, step=record['step'])


if master:
    try:
        if wandb_log:
            wandb = start_wandb()
        new = init_from != 'resume' and not eval_only
        log_file = open_log(log_path, header(), (data_dir if init_from == 'scratch' else init_from) if new else None)
    except ValueError as e:
        stop(e)
    print(f'parameters without embedding and head: {raw_model.get_num_params() / 1e6:.2f}M, of which a token uses '
          f'{raw_model.get_num_active_params() / 1e6:.2f}M')
    print(f'tokens per iteration: {tokens_per_iter:,}; device: {device}, {dtype}')
    if init_from == 'resume':
        print(f'going on from {resume_path()}, iteration {iter_num}')
        if iter_num >= max_iters and not eval_only:
            print(f'nothing to do but evaluate: it has made {iter_num} of max_iters={max_iters} updates')
most(0)  # a barrier: rank 0 has opened the log
if most(not os.path.exists(log_path)) and master:
    print(f'note: {out_dir} is not one folder for all machines: to resume, copy its checkpoint to all of them')

# -----------------------------------------------------------------------------
# the loop
# a signal ends the run after the step that it interrupts, with a checkpoint; a second Ctrl-C ends it at once
signalled = False


def on_signal(number, frame):
    global signalled
    if number == signal.SIGINT and signalled:
        os._exit(130)
    signalled = True


signal.signal(signal.SIGTERM, on_signal)
signal.signal(signal.SIGINT, on_signal)


def to_host(tensors):
    """{name: tensor} -> {name: its numbers}, in one transfer and one host sync."""
    numbers = iter(torch.cat([t.flatten().float() for t in tensors.values()]).tolist())
    return {name: [next(numbers) for _ in range(t.numel())] for name, t in tensors.items()}


model.train()
running_mfu = math.nan
skipped, in_a_row = torch.zeros(2, device=device)  # iterations that changed nothing
t_log, iters_logged = time.time(), 0
while True:
    # the iteration's rate, and its weight of the MTP loss
    lr = get_lr(iter_num) if decay_lr else learning_rate
    for group in optimizer.param_groups:
        group['lr'] = lr

    # evaluate and save
    if iter_num % eval_interval == 0 or iter_num == max_iters or eval_only:
        losses = estimate_loss()
        improved = losses['val'] < best_val_loss
        if improved and iter_num > 0:  # iteration 0 is not saved, so its loss does not count as best
            best_val_loss = losses['val']
        if master:
            print(f'step {iter_num}: train loss {losses["train"]:.4f}, val loss {losses["val"]:.4f}')
            log({'step': iter_num, 'train_loss': losses['train'], 'val_loss': losses['val'], 'lr': lr})
            if not math.isfinite(losses['val']):
                print('the validation loss is not finite: not saved')
        if math.isfinite(losses['val']) and iter_num > 0 and not eval_only:
            save(best=improved)
        t_log, iters_logged = time.time(), 0
    if iter_num >= max_iters or eval_only:
        break

    # forward and backward, over the micro-batches
    stats = {}
    for micro_step in range(accumulation):
        number = iter_num * gradient_accumulation_steps + micro_step * world + rank
        torch.manual_seed((seed + number) % 2**32)
        x, y = get_batch('train', 0, number)
        if sharded:  # between groups that each have the whole, gradients travel with the last micro-batch
            model.set_requires_all_reduce(micro_step == accumulation - 1)
        elif ddp:  # so do all of DDP's
            model.require_backward_grad_sync = micro_step == accumulation - 1
        with ctx:
            _, loss = model(x, y, mtp_lambda=get_mtp_lambda(iter_num))
        scaler.scale(loss / accumulation).backward()
        for k, v in raw_model.stats.items():
            stats[k] = stats[k] + v if k in stats else v

    # clip, step, balance; where a loss or a gradient is not finite, on any rank, they change nothing: decided on the
    # device
    scaler.unscale_(optimizer)
    norm = clip_grad_norm_(model.parameters(), grad_clip if grad_clip > 0 else math.inf)
    means = {k: all_reduce(stats[k]) / (accumulation * world) for k in ('losses', 'balance') if k in stats}
    bad = ~(norm + means['losses'].sum()).isfinite()
    if optimizer.defaults['fused']:
        optimizer.found_inf = bad.float()  # where it is 1, a fused step leaves weights and moments alone
        optimizer.step()
    elif not bad:  # on MPS, with a host sync
        optimizer.step()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if 'load' in stats:
        load = all_reduce(stats['load'])                                          # (MoE layers, E)
        raw_model.update_balance(load.masked_fill(bad, 0))
    skipped, in_a_row = skipped + bad, (in_a_row + 1) * bad
    iters_logged += 1

    # log: the only host sync of the loop
    if iter_num % log_interval == 0:
        numbers = means | {'grad_norm': norm, 'skipped': skipped, 'in_a_row': in_a_row}
        if 'load' in stats:
            numbers['max_vio'] = load.amax(dim=1) / load.float().mean(dim=1) - 1
            if iter_num % max(1, eval_interval // 10) < log_interval:  # long lines: ten or so between evaluations
                bias = torch.stack([moe.e_score_correction_bias for moe in raw_model.moe_layers()])
                numbers |= {'load': load, 'bias': bias}                               # (MoE layers, E) each
        numbers = to_host(numbers)
        now = time.time()
        dt = (now - t_log) / iters_logged
        t_log, iters_logged = now, 0
        mfu = raw_model.estimate_mfu(batch_size * accumulation, dt)
        running_mfu = mfu if math.isnan(running_mfu) else 0.9 * running_mfu + 0.1 * mfu
        record = {'step': iter_num, 'loss': numbers['losses'][0], 'mtp_losses': numbers['losses'][1:], 'lr': lr,
                  'grad_norm': numbers['grad_norm'][0], 'skipped': int(numbers['skipped'][0]),
                  'tokens_per_s': tokens_per_iter / dt, 'mfu': mfu}
        if 'max_vio' in numbers:
            record |= {'balance': numbers['balance'][0], 'max_vio': numbers['max_vio']}
        if 'load' in numbers:  # rows of E: tokens of this iteration per expert, and b after it
            for name, digits in (('load', None), ('bias', 6)):
                row, E = [round(x, digits) for x in numbers[name]], raw_model.config.n_routed_experts
                record[name] = [row[i:i + E] for i in range(0, len(row), E)]
        if master:
            left = int(dt * (max_iters - iter_num - 1))
            line = f'iter {iter_num}: loss {record["loss"]:.4f}, time {dt * 1000:.2f}ms'
            if not math.isnan(mfu):  # the device's peak is known
                line += f', mfu {running_mfu * 100:.2f}%'
            line += f', {tokens_per_iter / dt:,.0f} tok/s, {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left'
            line += ''.join(f', mtp{k} {v:.4f}' for k, v in enumerate(record['mtp_losses'], start=1))
            if 'max_vio' in record:
                line += f', maxvio {max(record["max_vio"]):.2f}'
            if record['skipped']:
                line += f', skipped {record["skipped"]}'
            print(line)
            log(record)
        if numbers['in_a_row'][0] >= max_skipped_iters:
            stop(f'{int(numbers["in_a_row"][0])} iterations in a row were skipped for a loss or a gradient that is not '
                 'finite: try a smaller learning_rate, with --init_from=resume if there is a checkpoint')
    iter_num += 1

    # leave after a signal to any rank, all ranks after the same step
    if most(signalled):
        save(best=False)
        if master:
            print(f'stopped by a signal before iteration {iter_num}: the same command with --init_from=resume goes on '
                  f'from {last_path}')
        break

try:
    if dcp:
        dcp.finish()  # the checkpoint that is still being written
except ValueError as e:
    stop(e)
disconnect()
