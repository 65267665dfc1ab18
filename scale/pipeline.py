"""
Pipeline parallelism: the layers are divided among the ranks, by torch.distributed.pipelining's schedules.

    python data/shakespeare_char/prepare.py
    torchrun --standalone --nproc_per_node=2 scale/pipeline.py               # or 4: small sizes, on CPUs over gloo
    torchrun --standalone --nproc_per_node=2 scale/pipeline.py config/train_deepseek.py    # on GPUs if there are any

With DualPipeV (github.com/deepseek-ai/DualPipe) P ranks hold 2P stages: rank r has the stages r and 2P-1-r. So rank 0
has the first and the last, with the embedding, the head, and the MTP modules, which share both (V3 section 3.2.3).
With 1F1B rank r has stage r of P; then the first and the last rank hold copies of the embedding.

The run is train.py's on one process: the same flags, batches, rates and losses. It neither evaluates nor resumes; at
the end rank 0 writes all weights to out_dir/ckpt.pt.
"""

import dataclasses
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.pipelining.schedules import ScheduleDualPipeV

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))
from extras.folder import take
from extras.guard import RANGES, check_device, check_files, check_ranges, need
from extras.scripts import all_reduce, autocast, connect, default_device, leave, open_log
from model import GPT, GPTConfig, balance_and_load, load_meta, save_checkpoint

# -----------------------------------------------------------------------------
# the model's settings: every field of GPTConfig
fields = [field.name for field in dataclasses.fields(GPTConfig)]
globals().update({field.name: field.default for field in dataclasses.fields(GPTConfig)})
n_layer = 8
n_head = 4
n_embd = 64
block_size = 64
vocab_size = 0  # 0: from the data's meta.pkl, else GPT-2's 50,304
num_nextn_predict_layers = 1
# the pipeline
schedule = 'dualpipev'  # or '1f1b', for fewer micro-batches or layers: P of each suffice, DualPipeV needs 2P
# the run, as in train.py
out_dir = 'out-pipeline'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 16  # micro-batches per iteration, all of which pass through all ranks
batch_size = 4  # sequences in a micro-batch
learning_rate = 1e-3
max_iters = 100
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # 0.0: no clipping
decay_lr = True
warmup_iters = 10
lr_decay_iters = 100
min_lr = 1e-4
mtp_lambda_late = 0.1
mtp_late_from = 0.67
seed = 1337
device = default_device()
dtype = 'float32'  # or 'bfloat16'
# in train.py's configs, and without a meaning here
eval_interval = eval_iters = log_interval = 1
wandb_project = wandb_run_name = ''
compile = False  # torch divides no compiled backward into the input's and the weights'
# -----------------------------------------------------------------------------
settings = [k for k, v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
exec(open(root / 'configurator.py').read())  # from the command line, config files
settings = {k: globals()[k] for k in settings}
rank, P = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
micro_batches = gradient_accumulation_steps
n_stages = 2 * P if schedule == 'dualpipev' else P

# -----------------------------------------------------------------------------
# checks: what can fail does so before the ranks are connected
check_ranges(settings, [
    ('schedule', lambda x: x in ('dualpipev', '1f1b'), "be 'dualpipev' or '1f1b'"),
    ('dtype', lambda x: x in ('float32', 'bfloat16'), "be 'float32' or 'bfloat16'"),
    *[(name, fits, words) for names, fits, words in RANGES for name in names.split() if name in settings]])
need(P > 1, 'a pipeline needs two ranks or more: torchrun --standalone --nproc_per_node=2 scale/pipeline.py')
for name in ('gradient_accumulation_steps', 'n_layer'):
    other = f', or --schedule=1f1b with {P}' if schedule == 'dualpipev' and settings[name] >= P else ''
    need(settings[name] >= n_stages, f'{name}={settings[name]}: {P} ranks with schedule={schedule!r} are {n_stages} '
         f'stages, and need {n_stages} or more{other}')
data_dir = root / 'data' / dataset
meta = load_meta(data_dir / 'meta.pkl')
check_files(data_dir, meta, block_size)
need(not (data_dir / 'train_mask.bin').exists(), f'{data_dir} has a mask of its targets, which is not read here: '
     'name another --dataset')
sizes = {name: settings[name] for name in fields}
config = GPTConfig(**sizes | {'vocab_size': vocab_size or meta.get('vocab_size', 50304)})
tokens = np.memmap(data_dir / 'train.bin', dtype=meta.get('dtype', 'uint16'), mode='r')
need(tokens.max() < config.vocab_size, f'{data_dir}/train.bin must hold tokens below vocab_size={config.vocab_size}')
if device.startswith('cuda'):
    here = int(os.environ['LOCAL_WORLD_SIZE'])
    need(torch.cuda.device_count() >= here, f'{here} ranks need as many GPUs; here are {torch.cuda.device_count()}')
    device = f'cuda:{os.environ["LOCAL_RANK"]}'
    torch.cuda.set_device(device)
device_type = check_device(device)
connect('nccl', device_type)

# -----------------------------------------------------------------------------
# this rank's part of the model


class AddLoss(torch.autograd.Function):
    """x, with a loss whose gradient is added in x's backward: so a stage's own loss needs no way to the last stage."""

    @staticmethod
    def forward(ctx, x, loss):
        ctx.save_for_backward(loss)
        return x.clone()  # no view: torch detaches a stage's output in place

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.ones_like(ctx.saved_tensors[0])


class Stage(nn.Module):
    """Some of the model's blocks: (B, T, C) -> (B, T, C). The first stage begins with tokens (B, T)."""

    def __init__(self, model, layers, first, last):
        super().__init__()
        self.blocks = nn.ModuleList(layers)
        self.embed = nn.Sequential(model.transformer.wte, model.transformer.drop) if first else nn.Identity()
        self.ln_f = model.transformer.ln_f if last else nn.Identity()
        # what the loss multiplies with is the last stage's too: the weights' gradients are computed stage by stage
        self.used_by_loss = nn.ModuleList([model.mtp, model.lm_head, model.transformer.wte] if last else [])
        self.run = model.run_blocks
        self.load = 0  # of this iteration: (MoE layers, E)

    def forward(self, x):
        with autocast(device_type, dtype):
            x, routing = self.run(self.blocks, self.embed(x), None, 0)
            x = self.ln_f(x)
        if routing:
            balance, load = balance_and_load(routing, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))
            x = AddLoss.apply(x, config.aux_loss_alpha * balance.sum() / micro_batches)
            self.load = self.load + load
        return x


def divide(n_layer, n_stages):
    """The layers of each stage; the last has the fewest, because the MTP modules and the heads come on top."""
    ends = [-(-n_layer * s // n_stages) for s in range(n_stages + 1)]
    return [list(range(start, end)) for start, end in zip(ends, ends[1:])]


torch.manual_seed(seed)
model = GPT(config)  # whole, on the CPU: every rank draws the weights of one process, and keeps its own
indices = [rank, n_stages - 1 - rank] if schedule == 'dualpipev' else [rank]
first, last = 0 in indices, n_stages - 1 in indices
parts = divide(n_layer, n_stages)
layers = [i for s in indices for i in parts[s]]
blocks = {i: model.transformer.h[i] for i in layers}
model.transformer.h = nn.ModuleList(blocks.values())
if not last:
    model.mtp = nn.ModuleList()
    del model.transformer['ln_f'], model.lm_head
if not first and not last:
    del model.transformer['wte']
model.to(device).train()
example = torch.empty(batch_size, block_size, n_embd, device=device, requires_grad=True)  # what passes between stages
example_tokens = torch.empty(batch_size, block_size, dtype=torch.int64, device=device)
stages = [Stage(model, [blocks[i] for i in parts[s]], s == 0, s == n_stages - 1) for s in indices]
# torch divides a stage's backward into the input's gradient and the weights', for weights that are used once. The last
# stage reads the tied one at several depths: its backward stays whole, and what is left for later is nothing
pipeline_stages = [PipelineStage(stage, s, n_stages, torch.device(device), output_args=example,
                                 input_args=example_tokens if s == 0 else example,
                                 dw_builder=(lambda: lambda: None) if s == n_stages - 1 else None)
                   for stage, s in zip(stages, indices)]
torch.manual_seed(np.random.default_rng((seed, 2, rank)).integers(2**63))  # dropout differs from rank to rank

losses = mtp_load = 0  # of this iteration
label_counts = None  # ... the mean over its micro-batches, see GPT.training_loss()


def loss_of(h, xy):
    """The loss of a micro-batch over their number, from the last stage's state h (B, T, C) and xy (B, 2, T)."""
    global losses, mtp_load
    x, y = xy.unbind(1)
    with autocast(device_type, dtype):
        loss = model.training_loss(h, [], x, y, get_mtp_lambda(iter_num), label_counts)
    losses = losses + model.stats['losses'] / micro_batches
    mtp_load = mtp_load + model.stats.get('load', 0)
    return loss / micro_batches


# the losses are divided by their number above, because torch's scale_grads would divide the tied weight of two stages
# twice
if schedule == 'dualpipev':
    step = ScheduleDualPipeV(pipeline_stages, micro_batches, loss_fn=loss_of, scale_grads=False).step
else:
    step = Schedule1F1B(pipeline_stages[0], micro_batches, loss_fn=loss_of, scale_grads=False).step
copies = None  # the ranks with the embedding, where the last one reads it too
if schedule == '1f1b' and (tie_word_embeddings or num_nextn_predict_layers > 0):
    copies = dist.new_group([0, P - 1])
optimizer = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type)

# -----------------------------------------------------------------------------
# data, rate, clipping


def get_batch(it):
    """An iteration's micro-batches, train.py's on one process, one after the other: x, y (micro_batches * B, T)."""
    row = meta.get('row_length', 1)
    n = (len(tokens) - block_size - 1) // row + 1
    numbers = range(it * micro_batches, (it + 1) * micro_batches)
    starts = row * np.concatenate([np.random.default_rng((seed, 0, 0, number)).integers(n, size=batch_size)
                                   for number in numbers])
    rows = torch.from_numpy(tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)).to(device)
    return rows[:, :-1], rows[:, 1:]


def get_lr(it):
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    ratio = (it - warmup_iters) / max(1, lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (learning_rate - min_lr)


def get_mtp_lambda(it):
    return mtp_lambda if it < mtp_late_from * max_iters else min(mtp_lambda, mtp_lambda_late)


def clip():
    """Over all ranks' gradients; a copied embedding counts once. -> their norm"""
    embedding = model.transformer.wte.weight if copies and (first or last) else None
    if embedding is not None:
        dist.all_reduce(embedding.grad, group=copies)
    grads = [p.grad for p in model.parameters() if p.grad is not None and (first or p is not embedding)]
    norm = all_reduce(torch.nn.utils.get_total_norm(grads) ** 2).sqrt()
    if grad_clip > 0:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, norm)
    return norm


# -----------------------------------------------------------------------------
# the loop
if rank == 0:
    take(out_dir, data_dir)
    log = open_log(os.path.join(out_dir, 'log.jsonl'), {'config': settings, 'world_size': P,
                                                        'model_args': dataclasses.asdict(config)})
millions = sum(p.numel() for p in model.parameters()) / 1e6
print(f'rank {rank}: stages {indices}, layers {layers}, {millions:.2f}M parameters')

for iter_num in range(max_iters):
    t0 = time.time()
    for group in optimizer.param_groups:
        group['lr'] = get_lr(iter_num) if decay_lr else learning_rate
    x, y = get_batch(iter_num)
    label_counts = (model.labels(y) >= 0).sum(dim=(1, 2)) / micro_batches
    step(*([x] if first else []), target=torch.stack((x, y), dim=1) if last else None, return_outputs=False)
    norm = clip()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    # loss-free balancing, of the layers that are here
    loads = [load for load in (*(stage.load for stage in stages), mtp_load) if torch.is_tensor(load)]
    max_vio = torch.zeros((), device=device)
    if loads:
        load = torch.cat(loads)                                                   # (MoE layers here, E)
        model.update_balance(load)
        max_vio = (load.amax(dim=1) / load.float().mean(dim=1) - 1).max()
    max_vio = all_reduce(max_vio, dist.ReduceOp.MAX)
    if last and not first:
        dist.send(losses, 0)
    elif first and not last:
        losses = torch.empty(1 + num_nextn_predict_layers, device=device)
        dist.recv(losses, P - 1)
    if rank == 0:
        main, *others = losses.tolist()
        log.write(json.dumps({'step': iter_num, 'loss': main, 'mtp_losses': others, 'grad_norm': norm.item(),
                              'max_vio': max_vio.item()}).encode() + b'\n')
        print(f'iter {iter_num}: loss {main:.4f}, time {(time.time() - t0) * 1000:.2f}ms, maxvio {max_vio:.2f}'
              + ''.join(f', mtp{k} {loss:.4f}' for k, loss in enumerate(others, start=1)))
    losses = mtp_load = 0
    for stage in stages:
        stage.load = 0

# the weights of all ranks, under their names in the whole model
here = {re.sub(r'(?<=^transformer\.h\.)\d+', lambda i: str(layers[int(i[0])]), name): weight.cpu()
        for name, weight in model.state_dict().items()}
everywhere = [None] * P if rank == 0 else None
dist.gather_object(here, everywhere)
if rank == 0:
    weights = {name: weight for part in reversed(everywhere) for name, weight in part.items()}
    save_checkpoint({'model': weights, 'model_args': dataclasses.asdict(config), 'iter_num': max_iters,
                     'best_val_loss': math.inf, 'config': settings, 'meta': meta},
                    os.path.join(out_dir, 'ckpt.pt'))
leave()
