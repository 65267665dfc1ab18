"""
Trains a model; nanoGPT's loop and flags, and every field of GPTConfig as a flag.

    python train.py config/train_shakespeare_char.py                      # one GPU, Apple's GPU or the CPU
    torchrun --standalone --nproc_per_node=8 train.py config/train_deepseek.py
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=29500 train.py ...

It needs model.py and a configurator.py. With the folder extras/ more flags work, and guard.py checks each run first.
The rows and the dropout of a micro-batch depend only on the seed and on the micro-batch's number, counted over
iterations and ranks. So a resumed run computes the same as an uninterrupted one.
"""

import contextlib
import dataclasses
import importlib
import json
import math
import os
import signal
import sys
import time

if {'--help', '-h'} & set(sys.argv[1:]):  # before the slow imports
    import configurator
    configurator.answer_help(__file__)

# isort: split
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from model import GPT, GPTConfig, Mistake, load_meta, save_checkpoint

# -----------------------------------------------------------------------------
# the model's settings: every field of GPTConfig with its default (-1: derived from n_layer, n_head and n_embd)
globals().update({field.name: field.default for field in dataclasses.fields(GPTConfig)})
vocab_size = 0  # 0: from the data's meta.pkl, else GPT-2's 50,257 rounded up to 50,304
architecture = 'model'  # or 'model_v4', whose further fields are settings too: --architecture=model_v4 --help
# I/O
out_dir = 'out'
eval_interval = 2000
log_interval = 1
eval_iters = 200
eval_only = False  # evaluate once and stop
always_save_checkpoint = True  # True: last ckpt.pt, best ckpt_best.pt; False: best ckpt.pt, last ckpt_last.pt
checkpoint = 'whole'  # or 'dcp': ckpt.dcp, a folder of shards, written while training goes on; needs extras/dcp.py
init_from = 'scratch'  # or 'resume', another run's out_dir, or a DeepSeek checkpoint in Hugging Face's format
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
optimizer = 'adamw'  # or 'muon': Muon for the blocks' matrices; 'muon_split': by head, by gate and up; extras/optim.py
learning_rate = 6e-4
max_iters = 600000
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # 0.0: no clipping
qk_clip = 0.0  # bound each head's attention logits, for Muon: 100; 0.0: off; needs extras/qk_clip.py
max_skipped_iters = 20  # stop after this many iterations in a row without a finite loss and gradient
# learning rate: linear warm-up, cosine decay
decay_lr = True
warmup_iters = 2000
lr_decay_iters = 600000
min_lr = 6e-5
# weight of the MTP loss: mtp_lambda, and at most mtp_lambda_late after mtp_late_from * max_iters (V3 section 4.2)
mtp_lambda_late = 0.1
mtp_late_from = 0.67
# system
seed = 1337
backend = 'nccl'  # between GPUs; CPUs use gloo
device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
dtype = ''  # 'float32', 'bfloat16' or 'float16'; '': bfloat16 if it is faster on the device
compile = True  # torch.compile, block by block
fp8 = False  # linear layers and experts multiply in FP8 (V3 section 3.3); needs extras/fp8.py
fp8_scaling = 'tile'  # or 'row' or 'tensor': the part of a matrix that shares a scale
fp8_grad = 'e4m3'  # or 'e5m2': the format of the gradients
fp8_power_of_two = False  # round the scales up to powers of two
bf16_moments = False  # AdamW's moments in bfloat16, as V3 keeps them; needs extras/optim.py
recompute = False  # keep only each block's input; the backward recomputes the rest
shard = 1  # FSDP2: this many ranks share a copy of the model; 0: all ranks; needs extras/parallel.py
expert_parallel = 1  # this many ranks share a layer's experts; needs extras/parallel.py
activation_memory = 1.0  # with compile: share of a block's activations that is kept; the backward recomputes the rest
# -----------------------------------------------------------------------------
config_keys = [k for k, v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())  # read flags and config files
config = {k: globals()[k] for k in config_keys}
here = os.path.dirname(os.path.abspath(__file__))
has_extras = os.path.exists(os.path.join(here, 'extras'))


def import_extra(name, flag):
    """-> the module extras/NAME.py, or Mistake. flag: the setting that needs it"""
    if not os.path.exists(os.path.join(here, 'extras', name + '.py')):
        raise Mistake(f'{flag} needs extras/{name}.py: copy the folder extras/ to where train.py is')
    return importlib.import_module('extras.' + name)


guard, scripts = (import_extra(name, '') if has_extras else None for name in ('guard', 'scripts'))
if architecture != 'model':
    GPT, GPTConfig = import_extra('architecture', 'architecture').named(architecture)

# -----------------------------------------------------------------------------
# ranks and device
ddp = 'RANK' in os.environ  # torchrun started this process
rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
master = rank == 0
sharded = shard != 1 or expert_parallel > 1
if ddp and device.startswith('cuda'):
    device = f'cuda:{os.environ["LOCAL_RANK"]}'
device_type = device.split(':')[0]
if guard:
    guard.check_settings(config, device, world)
if ddp:
    if device_type == 'cuda':
        torch.cuda.set_device(device)
    if scripts:
        store = scripts.connect(backend, device_type)
    else:
        dist.init_process_group(backend if device_type == 'cuda' else 'gloo')
    cpu_group = dist.new_group(backend='gloo')  # for small messages: see max_over_ranks()
if not dtype and device_type == 'cuda':
    dtype = 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
elif not dtype:
    # bfloat16 is faster only with AMX: on a CPU with AVX512 alone a step took 1.6 times as long as in float32
    dtype = 'bfloat16' if device_type == 'cpu' and getattr(torch.cpu, '_is_amx_tile_supported', bool)() else 'float32'
config['dtype'] = dtype
ctx = contextlib.nullcontext() if dtype == 'float32' else torch.autocast(device_type, getattr(torch, dtype))
# under autocast only the routers' products stay in fp32: keep them exact; TF32 is for runs in float32
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == 'float32'

# -----------------------------------------------------------------------------
# data: flat files of token ids, read from the disk when needed
data_dir = os.path.join(here, 'data', dataset)
meta = load_meta(os.path.join(data_dir, 'meta.pkl'))
if guard:
    guard.check_files(data_dir, meta, block_size, resume=init_from == 'resume')
data, masks = {}, {}
for split in ('train', 'val'):
    data[split] = np.memmap(os.path.join(data_dir, f'{split}.bin'), dtype=meta.get('dtype', 'uint16'), mode='r')
    mask_path = os.path.join(data_dir, f'{split}_mask.bin')  # 0: no loss for this token
    masks[split] = np.memmap(mask_path, dtype=np.uint8, mode='r') if os.path.exists(mask_path) else None


def get_batch(split, stream, index):
    """Micro-batch `index` of a stream (0: training; 1: evaluation, equal for all seeds) -> x, y (batch_size, T)"""
    tokens, mask = data[split], masks[split]
    rng = np.random.default_rng((1337 if stream else seed, {'train': 0, 'val': 1}[split], stream, index))
    step = meta.get('row_length', 1)  # if the data are rows, a sequence starts where a row starts
    starts = step * rng.integers((len(tokens) - block_size - 1) // step + 1, size=batch_size)
    places = starts[:, None] + np.arange(block_size + 1)
    rows = tokens[places].astype(np.int64)                                        # (B, T + 1)
    targets = rows if mask is None else np.where(mask[places], rows, -1)
    xy = torch.from_numpy(np.stack((rows[:, :-1], targets[:, 1:])))               # (2, B, T)
    xy = xy.pin_memory().to(device, non_blocking=True) if device_type == 'cuda' else xy.to(device)
    return xy[0], xy[1]


def all_reduce(x, op=dist.ReduceOp.SUM, group=None):
    if ddp:
        dist.all_reduce(x, op, group)
    return x


def max_over_ranks(x):
    """The largest of the ranks' ints, exchanged without the GPU."""
    return all_reduce(torch.tensor(int(x)), dist.ReduceOp.MAX, cpu_group).item() if ddp else int(x)


# -----------------------------------------------------------------------------
# the model: new, from this run's or another run's checkpoint, or from a folder in Hugging Face's format
fields = {field.name: field.default for field in dataclasses.fields(GPTConfig)}
# settings that a resume may change (always / only if given); the checkpoint decides all others
always_free = ('dropout', 'bias_update_speed', 'aux_loss_alpha', 'mtp_lambda', 'block_size', *GPTConfig.always_free)
free_if_given = ('eos_token_id', 'rope_factor', 'rope_original_max_position_embeddings', 'rope_beta_fast',
                 'rope_beta_slow', 'rope_mscale', 'rope_mscale_all_dim', *GPTConfig.free_if_given)
given = [name for name in free_if_given if config[name] != fields[name]]
overrides = {name: config[name] for name in (*always_free, *given)}
# the last checkpoint: guard finds every kind and compares iterations, two files alone compare times
paths = [os.path.join(out_dir, name) for name in ('ckpt.pt', 'ckpt_last.pt')]
newest = max(filter(os.path.exists, paths), key=os.path.getmtime, default=paths[0])
path = guard.last_checkpoint(out_dir) if guard else newest
if ddp and scripts and store.check(['begun']) and max_over_ranks(os.path.exists(path)):
    init_from = 'resume'  # torchrun lost a rank and has restarted all ranks
if init_from != 'resume':  # another run's checkpoint, the one that sample.py reads; from scratch there is none
    path = guard.last_checkpoint(init_from, ['ckpt']) if guard else os.path.join(init_from, 'ckpt.pt')
if guard:  # the checkpoint's own architecture
    GPT = guard.check_path(init_from, path, overrides, max_over_ranks, GPT)

torch.manual_seed(seed)
parallel = import_extra('parallel', 'shard or expert_parallel') if sharded else None
build = parallel.layout(config, device) if sharded else GPT  # both build and load a model by the same calls
loaded = {}  # the checkpoint
if init_from == 'scratch':
    args = {name: config[name] for name in fields} | {'vocab_size': vocab_size or meta.get('vocab_size', 50304)}
    raw_model = build(GPTConfig(**args))
elif init_from == 'resume' or os.path.exists(path):
    source = import_extra('dcp', path) if path.endswith('.dcp') and not sharded else build
    raw_model, loaded = source.from_checkpoint(path, device, **overrides)
else:
    source = build if sharded or not has_extras else import_extra('hf', 'init_from')
    raw_model = source.from_pretrained(init_from, overrides)
raw_model.to(device)
if guard:
    guard.check_fit(init_from, path, raw_model, loaded, config, overrides, meta, max_over_ranks)
    guard.check_tokens(data, raw_model.config, config, meta, max_over_ranks)
    import_extra('canonical', 'architecture').begin(raw_model, init_from, data_dir, meta)  # of tokens spelled alike
loaded = loaded if init_from == 'resume' else {}  # a new run takes the weights alone

# -----------------------------------------------------------------------------
# optimizer, compile, DDP
kernels = scripts.use_kernels(raw_model) if scripts else False  # faster ways for the experts
if fp8:
    execution = import_extra('fp8', 'fp8=True').enable_by(config, raw_model, kernels)
    if master:
        print(execution)
qk = import_extra('qk_clip', 'qk_clip') if has_extras or qk_clip > 0 else None
if qk_clip > 0:
    qk.check(raw_model, qk_clip)

make = (GPT.configure_optimizers if optimizer == 'adamw' else
        getattr(import_extra('optim', f'optimizer={optimizer}'), optimizer))
opt = make(raw_model, weight_decay, learning_rate, (beta1, beta2), device_type)
if bf16_moments:
    opt = import_extra('optim', 'bf16_moments=True').AdamW16(opt.param_groups, fused=True)
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
if loaded.get('optimizer'):  # a converted checkpoint has none
    if guard:
        guard.load_optimizer(opt, loaded['optimizer'], path, max_over_ranks, parallel and parallel.optimizer_state)
    else:  # the flags decide the settings, not the checkpoint; a fused step would read past too small a state
        opt.load_state_dict(loaded['optimizer'] | {'param_groups': opt.state_dict()['param_groups']})
        if any(x.shape != p.shape for p, state in opt.state.items() for name, x in state.items() if name != 'step'):
            raise Mistake(f'the optimizer in {path} does not fit')
    if loaded.get('scaler'):
        scaler.load_state_dict(loaded['scaler'])
iter_num, best_val_loss = loaded.get('iter_num', 0), loaded.get('best_val_loss', math.inf)
seen = loaded.get('micro_batches', iter_num * gradient_accumulation_steps)  # by all ranks, also before a resume
val_loss, wandb_id = loaded.get('val_loss'), loaded.get('wandb_id')  # the loss of these weights, None: not evaluated
loaded = {}  # free the memory

if recompute:
    raw_model.recompute()
if compile:
    if activation_memory < 1:
        import_extra('scripts', 'activation_memory').keep_activations(activation_memory)
    raw_model.compile()
if guard:
    guard.try_micro_batch(raw_model, opt, get_batch('train', 0, 0), ctx, config, max_over_ranks)
model = raw_model
if ddp and not sharded:
    # the balance bias is the only buffer that changes, and it changes equally on all ranks
    model = DDP(raw_model, device_ids=[device] if device_type == 'cuda' else None, forward_sync_buffers=False)
clip_grad_norm_ = parallel.clip_grad_norm_ if sharded else torch.nn.utils.clip_grad_norm_
accumulation = gradient_accumulation_steps // world  # micro-batches per iteration and rank
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size

# -----------------------------------------------------------------------------
# evaluation and learning rate

@torch.no_grad()
def estimate_loss():
    """{split: mean main loss} over eval_iters batches, always the same ones; each rank computes a part."""
    raw_model.eval()
    out = {}
    for split in ('train', 'val'):
        total = torch.zeros(2, device=device)  # the sum of the losses, and how many they are
        for k in range(rank, math.ceil(eval_iters / world) * world, world):  # shards need equally many on each rank
            with ctx:
                x, y = get_batch(split, 1, k)
                loss = raw_model(x, y, return_logits=False)[1]
            if k < eval_iters:
                n = (y >= 0).sum()
                total += torch.stack((loss * n, n))
        loss, n = all_reduce(total).tolist()
        out[split] = loss / max(n, 1)
    raw_model.train()
    return out


def get_lr(it):
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    ratio = (it - warmup_iters) / max(1, lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (learning_rate - min_lr)

# -----------------------------------------------------------------------------
# checkpoint and log
dcp = import_extra('dcp', 'checkpoint=dcp') if checkpoint == 'dcp' else None
save_checkpoint = dcp.save_checkpoint if dcp else parallel.save_checkpoint if sharded else save_checkpoint
names = ('ckpt', 'ckpt_best') if always_save_checkpoint else ('ckpt_last', 'ckpt')
last_path, best_path = (os.path.join(out_dir, name + ('.dcp' if dcp else '.pt')) for name in names)


def save(best):
    """Write the last checkpoint. It is also the best one if `best`, or if there is no best one yet."""
    best = best or best_val_loss == math.inf
    if master:
        print(f'saving checkpoint to {out_dir}')
    if master or sharded or dcp:
        save_checkpoint({'model': raw_model.state_dict(), 'optimizer': opt.state_dict(), 'scaler': scaler.state_dict(),
                         'model_args': dataclasses.asdict(raw_model.config), 'config': config, 'meta': meta,
                         'iter_num': iter_num, 'micro_batches': seen, 'val_loss': val_loss,
                         'best_val_loss': best_val_loss, 'wandb_id': wandb_id}, last_path, best_path if best else None)


def log(record):
    """Write one line to log.jsonl, and to wandb."""
    record = json.loads(json.dumps(record), parse_constant=lambda name: None)  # JSON has no nan and no infinity
    try:
        log_file.write(json.dumps(record).encode() + b'\n')
    except OSError as e:
        raise Mistake(f'{log_file.name} could not be written: {e.strerror}; the last checkpoint is whole') from None
    if wandb_log and 'step' in record:  # by nanoGPT's names; a list's numbers one by one, no tables
        names = {'step': 'iter', 'train_loss': 'train/loss', 'val_loss': 'val/loss'}
        items = {f'{k}/{i}': v for k, values in record.items() if type(values) is list for i, v in enumerate(values)}
        wandb.log({names.get(k, k): v * 100 if k == 'mfu' else v for k, v in (record | items).items()
                   if type(v) in (int, float)}, step=record['step'])


def to_host(tensors):
    """{name: tensor} -> {name: its number, or nested lists of them}, with one transfer and one host sync."""
    numbers = torch.cat([t.flatten().float() for t in tensors.values()]).cpu()
    parts = numbers.split([t.numel() for t in tensors.values()])
    return {name: part.view(t.shape).to(t.dtype).tolist() for (name, t), part in zip(tensors.items(), parts)}


if wandb_log and master:
    import wandb
    (scripts.start_wandb if scripts else wandb.init)(project=wandb_project, name=wandb_run_name, config=config,
                                                     id=wandb_id, resume='allow')
    wandb_id = wandb.run.id
if guard:  # lock out_dir, and keep an earlier run
    guard.begin(config, init_from, data_dir, master, max_over_ranks)
if master:
    os.makedirs(out_dir, exist_ok=True)
    log_file = open(os.path.join(out_dir, 'log.jsonl'), 'ab', buffering=0)
    log_file.write(b'\n' * (log_file.tell() > 0))  # a run that was killed may have left half a line
    parameters, active = raw_model.get_num_params(), raw_model.get_num_active_params()
    log(scripts.header(raw_model, config) if scripts else {'config': config})
    print(f'parameters without embedding and head: {parameters / 1e6:.2f}M; a token uses {active / 1e6:.2f}M')
    print(f'tokens per iteration: {tokens_per_iter:,}; device: {device}, {dtype}')
    if init_from == 'resume':
        print(f'going on from {path}, iteration {iter_num} of {max_iters}')
if ddp and scripts:
    max_over_ranks(0)  # a barrier: all ranks are ready
    store.set('begun', '')  # from now on a restart resumes
# a signal ends the run after the current step, with a checkpoint; a second Ctrl-C ends it at once
signalled = False


def on_signal(number, frame):
    global signalled
    if number == signal.SIGINT and signalled:
        os._exit(130)
    signalled = True


signal.signal(signal.SIGTERM, on_signal)
signal.signal(signal.SIGINT, on_signal)

# -----------------------------------------------------------------------------
# the loop
model.train()
skipped, in_a_row = torch.zeros(2, dtype=torch.int64, device=device)  # iterations without an update
t_log, iters_logged, running_dt = time.time(), 0, math.nan
while True:
    # set the learning rate and the weight of the MTP loss
    lr = get_lr(iter_num) if decay_lr else learning_rate
    for group in opt.param_groups:
        group['lr'] = lr * group.get('lr_scale', 1)
    mtp_weight = min(mtp_lambda, mtp_lambda_late) if iter_num >= mtp_late_from * max_iters else mtp_lambda

    # evaluate and save
    due = iter_num % eval_interval == 0 and val_loss is None  # not if it was evaluated before a resume
    if due or iter_num >= max_iters or eval_only:
        train_loss, val_loss = estimate_loss().values()
        improved = val_loss < best_val_loss
        if iter_num > 0:  # iteration 0 is not saved, so its loss does not count as best
            best_val_loss = min(best_val_loss, val_loss)
        if master:
            bpb = val_loss / math.log(2) / meta.get('bytes_per_token', math.nan)  # bits per byte; nan: unknown
            per_byte = f' ({bpb:.4f} bits per byte)' * (bpb == bpb)
            print(f'step {iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}{per_byte}')
            log({'step': iter_num, 'train_loss': train_loss, 'val_loss': val_loss, 'val_bpb': bpb, 'lr': lr})
            if not math.isfinite(val_loss):
                print('the validation loss is not finite: no checkpoint is written')
        if math.isfinite(val_loss) and iter_num > 0 and not eval_only:
            save(best=improved)
        t_log, iters_logged = time.time(), 0
    if iter_num >= max_iters or eval_only:
        break

    # this rank's micro-batches, and how many labels each head (1 + modules) has in a micro-batch, the mean over all
    # ranks: each divides its summed losses by it, so that each label of the iteration has the same weight
    micro_batches = range(seen + rank, seen + gradient_accumulation_steps, world)
    batches = [get_batch('train', 0, number) for number in micro_batches]
    labels = sum((raw_model.labels(y) >= 0).sum(dim=(1, 2)) for _, y in batches)
    label_counts = all_reduce(labels) / gradient_accumulation_steps

    # forward and backward
    stats = {}
    for micro_step, (number, (x, y)) in enumerate(zip(micro_batches, batches)):
        torch.manual_seed(np.random.default_rng((seed, 2, number)).integers(2**63))  # hashed: seeds do not overlap
        if sharded:  # copies of the model exchange gradients only in the last micro-batch
            model.set_requires_all_reduce(micro_step == accumulation - 1)
        elif ddp:  # and so do the copies of DDP
            model.require_backward_grad_sync = micro_step == accumulation - 1
        with ctx:
            _, loss = model(x, y, mtp_lambda=mtp_weight, label_counts=label_counts)
        scaler.scale(loss / accumulation).backward()
        for k, v in raw_model.stats.items():
            stats[k] = stats[k] + v if k in stats else v

    # clip, step, balance. The device, not the host, skips the update if any rank's loss or gradient is not finite
    scaler.unscale_(opt)
    norm = clip_grad_norm_(model.parameters(), grad_clip if grad_clip > 0 else math.inf)
    means = {k: all_reduce(v) / (accumulation * world) for k, v in stats.items() if k != 'load'}
    bad = ~(norm + means['losses'].sum()).isfinite()
    if opt.defaults['fused']:  # found_inf is GradScaler's: a fused step with 1 changes nothing, and no host waits
        opt.found_inf = bad.float()
    if opt.defaults['fused'] or not bad:  # MPS has no fused step, and waits for the device here
        opt.step()
    scaler.update()
    opt.zero_grad(set_to_none=True)
    if 'load' in stats:
        load = all_reduce(stats['load'])                                          # (MoE layers, E)
        raw_model.update_balance(load.masked_fill(bad, 0))
    skipped, in_a_row = skipped + bad, (in_a_row + 1) * bad
    iters_logged += 1

    # now and then: the largest attention logit of each head (blocks, H), which qk_clip bounds
    logits = qk.look(raw_model, x, y, ctx, iter_num, config, all_reduce) if qk else {}

    # log: the only host sync of the loop
    if iter_num % log_interval == 0:
        numbers = {'loss': means['losses'][0], 'mtp_losses': means['losses'][1:], 'grad_norm': norm,
                   'skipped': skipped, 'in_a_row': in_a_row, **{k: means[k] for k in means if k != 'losses'}, **logits}
        if 'load' in stats:
            numbers |= {'max_vio': load.amax(dim=1) / load.float().mean(dim=1) - 1}
            if iter_num % max(1, eval_interval // 10) < log_interval:  # long, so about ten between evaluations
                bias = torch.stack([moe.e_score_correction_bias for moe in raw_model.moe_layers()])
                numbers |= {'load': load, 'bias': bias}                               # (MoE layers, E) each
        numbers = to_host(numbers)
        dt, t_log = (time.time() - t_log) / iters_logged, time.time()
        iters_logged = 0
        running_dt = 0.9 * running_dt + 0.1 * dt if dt > running_dt / 2 else dt  # without the first: it compiled
        mfu, running_mfu = (raw_model.estimate_mfu(batch_size * accumulation, t) for t in (dt, running_dt))
        record = {'step': iter_num, **numbers, 'lr': lr, 'tokens_per_s': tokens_per_iter / dt, 'mfu': mfu}
        if master:
            left = int(running_dt * (max_iters - iter_num - 1))
            line = f'iter {iter_num}: loss {record["loss"]:.4f}, time {dt * 1000:.2f}ms'
            line += f', mfu {running_mfu * 100:.2f}%' * (not math.isnan(mfu))  # nan: the device's peak is unknown
            line += f', {tokens_per_iter / dt:,.0f} tok/s, {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left'
            line += ''.join(f', mtp{k} {v:.4f}' for k, v in enumerate(record['mtp_losses'], start=1))
            line += f', index {record.get("index_loss", 0):.4f}' * ('index_loss' in record)
            if 'max_vio' in record:
                line += f', maxvio {max(record["max_vio"]):.2f}'
            print(line + f', skipped {record["skipped"]}' * (record['skipped'] > 0))
            log(record)
        if record['in_a_row'] >= max_skipped_iters:
            raise Mistake(f'{record["in_a_row"]} iterations in a row had a loss or a gradient that is not '
                          'finite; try a smaller learning_rate, with --init_from=resume if there is a checkpoint')
    iter_num, seen, val_loss = iter_num + 1, seen + gradient_accumulation_steps, None

    # after a signal to any rank, all ranks leave after the same step
    if max_over_ranks(signalled):
        save(best=False)
        if master:
            print(f'stopped by a signal before iteration {iter_num}; add --init_from=resume to go on from {last_path}')
        break

if dcp:
    dcp.finish()  # wait until the last checkpoint is written
if master and os.path.exists(last_path) and not (signalled or eval_only):
    print(f'done; to sample from the model: python sample.py --out_dir={out_dir} --num_samples=1')
if wandb_log and master:
    wandb.finish()
if ddp:
    max_over_ranks(0)  # no rank leaves while another one still needs it
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # at once: gloo's threads may outlive Python and abort it (pytorch#190489)
