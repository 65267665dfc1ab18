"""
docs/scale.md's tables and its picture, computed: what a rank holds and sends under each kind of parallelism, which
layout one would choose, and how long a pipeline's step takes.

    python runs/scale.py               # writes the tables into docs/scale.md, and assets/scale.png
    python runs/scale.py --measure     # times a block of the main run here first, into runs/scale_times.json

Letters: W ranks in all, P of them in a pipeline, D = W / P data ranks; a model's shards lie on `shard` ranks, a layer's
experts on `ep`. F, I, W of a stage: its forward, and the input's and the weights' part of its backward.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import runpy
import sys
import time
from functools import lru_cache
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining import schedules

root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, root)
from model import GPT, MLP, Block, GPTConfig

# -----------------------------------------------------------------------------
# the models, and the tokens of a step

TIMES = os.path.join(root, 'runs/scale_times.json')
FIELDS = {field.name for field in dataclasses.fields(GPTConfig)}
MAIN = runpy.run_path(os.path.join(root, 'config/train_deepseek.py'))
LITE = dict(vocab_size=102400, n_layer=27, n_head=16, n_embd=2048, q_lora_rank=0, kv_lora_rank=512,
            qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64, n_shared_experts=2,
            num_experts_per_tok=6, moe_intermediate_size=1408, first_k_dense_replace=1, tie_word_embeddings=False,
            num_nextn_predict_layers=0)


class Model(NamedTuple):
    gpt: GPT            # without memory
    sequences: int      # per step
    efficiency: float   # the share of the bf16 peak that a GPU's kernels reach, without communication: an assumption


def without_memory(**settings):
    with torch.device('meta'):
        return GPT(GPTConfig(**settings))


MODELS = {
    'main run': Model(without_memory(**{k: v for k, v in MAIN.items() if k in FIELDS}),
                      MAIN['batch_size'] * MAIN['gradient_accumulation_steps'], 0.31),       # docs/gpu.md's estimate
    'V2-Lite': Model(without_memory(block_size=4096, intermediate_size=10944, scoring_func='softmax',
                                    norm_topk_prob=False, routed_scaling_factor=1.0, **LITE), 4608, 0.5),
    'Moonlight': Model(without_memory(**LITE | dict(block_size=8192, vocab_size=163840, intermediate_size=11264,
                                                    routed_scaling_factor=2.446)), 2048, 0.5),
    'V3': Model(without_memory(block_size=4096, vocab_size=129280, n_layer=61, n_head=128, n_embd=7168,
                               q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
                               v_head_dim=128, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8,
                               moe_intermediate_size=2048, intermediate_size=18432, first_k_dense_replace=3, n_group=8,
                               topk_group=4, routed_scaling_factor=2.5, tie_word_embeddings=False,
                               num_nextn_predict_layers=1, mtp_n_layer=1), 15360, 0.5),
}
# an H800's (V3 section 3.2.2): bytes per second that a GPU sends, to its 7 neighbours and to other machines
NVLINK, NETWORK, NODE = 160e9, 50e9, 8
PEAK, MEMORY = 989e12, 0.92 * 80e9  # dense bf16 FLOP/s; bytes, less what the driver and fragments take


@lru_cache
def sizes(gpt):
    """Numbers of parameters: in blocks without routed experts, in routed experts, and outside of blocks."""
    experts = sum(p.numel() for name, p in gpt.named_parameters() if name.endswith(('experts_gate_up', 'experts_down')))
    blocks = sum(p.numel() for block in gpt.blocks() for p in block.parameters())
    return blocks - experts, experts, gpt.get_num_params(non_embedding=False) - blocks


@lru_cache
def moe_layers(gpt):
    return len(gpt.moe_layers())


@lru_cache
def flops_per_token(gpt):
    return gpt.flops_per_token()


# -----------------------------------------------------------------------------
# memory per rank, in bytes

def saved_bytes(config, dense=False, fake=True):
    """What one block keeps of one sequence for the backward pass under bf16 autocast, by torch's own account: of the
    code in model.py, run on tensors without memory (fake). Not counted: weights, and autocast's copies of them.
    """
    found = {}

    def keep(x):
        found[x.untyped_storage()._cdata] = x  # kept, so that no other storage gets its address
        return x

    with FakeTensorMode() if fake else contextlib.nullcontext():
        block = Block(config, dense).train()
        angles = torch.empty(2, config.block_size, config.qk_rope_head_dim // 2)
        x = torch.randn(1, config.block_size, config.n_embd, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast('cpu', torch.bfloat16):
            block(x, *angles)
        for p in block.parameters():
            found.pop(p.untyped_storage()._cdata, None)
        copies = sum(2 * p.numel() for name, p in block.named_parameters() if p.dim() > 1 and name != 'mlp.gate.weight')
        return sum(x.untyped_storage().nbytes() for x in found.values()) - copies


@lru_cache
def saved_by_block(gpt):
    """saved_bytes() of each block of one sequence, of the main stack's and the MTP modules'."""
    kinds = {dense: saved_bytes(gpt.config, dense) for dense in {isinstance(block.mlp, MLP) for block in gpt.blocks()}}
    return [kinds[isinstance(block.mlp, MLP)] for block in gpt.blocks()]


def activations(gpt, sequences, recompute):
    """Of one micro-batch through all blocks; with recompute by block: each block's input, and one block's whole."""
    saved = saved_by_block(gpt)
    if recompute:
        return sequences * (len(saved) * 4 * gpt.config.block_size * gpt.config.n_embd + max(saved))
    return sequences * sum(saved)


class Layout(NamedTuple):
    """S = 1 on one pipeline is DDP; with a pipeline the optimizer alone is sharded, over all data ranks (ZeRO-1)."""
    pp: int = 1
    ep: int = 1
    shard: int = 1

    def name(self, W):
        parts = []
        if self.pp > 1:
            parts.append(f'PP {self.pp}')
        if self.ep > 1:
            parts.append(f'EP {self.ep}')
        replicas = W // self.pp // self.shard
        if self.pp > 1:
            parts += ['ZeRO-1'] if W > self.pp else []
        elif self.shard > 1:
            parts.append(f'FSDP {self.shard}' if replicas == 1 else f'HSDP {replicas} x {self.shard}')
        elif replicas > 1:
            parts.append(f'DDP {W}')
        return ', '.join(parts) or 'one GPU'


def local_sizes(gpt, W, layout):
    """This rank's parameters before sharding: (those that all data ranks hold, routed experts). In a pipeline rank 0's,
    which has the embedding and the head besides."""
    dense, experts, ends = sizes(gpt)
    return dense / layout.pp + ends, experts / layout.pp / layout.ep


def shard_ranks(W, layout):
    """Among how many ranks the states of the two kinds are divided: experts have fewer copies."""
    D = W // layout.pp
    if layout.pp > 1:
        return D, D // layout.ep
    return layout.shard, min(layout.shard, D // layout.ep)


def states(gpt, W, layout, moments=8):
    """Bytes of weights, gradients and AdamW's moments: fp32 throughout (moments=4: --bf16_moments)."""
    total = 0
    for n, ranks in zip(local_sizes(gpt, W, layout), shard_ranks(W, layout)):
        if layout.pp > 1:  # ZeRO-1: bf16 weights and fp32 gradients whole; fp32 weights and moments in shards
            total += n * (2 + 4) + n / ranks * (4 + moments)
        else:
            total += n / ranks * (4 + 4 + moments)
            if ranks == 1 and W // layout.ep > 1:
                total += 4 * n  # DDP's buckets
    return total


def memory(gpt, W, layout, sequences, recompute):
    """Peak bytes on a rank: states, gathered weights, activations of a micro-batch of so many sequences, the loss."""
    dense, experts = local_sizes(gpt, W, layout)
    blocks = len(gpt.blocks()) / layout.pp
    if layout.pp > 1:
        work = 0
    elif layout.shard > 1:  # two blocks' weights in bf16, one's gradients in fp32
        work = (dense + experts) / blocks * (2 * 2 + 4)
    else:  # autocast's bf16 copies
        work = 2 * (dense + experts) * (1 / blocks if recompute else 1)
    held = activations(gpt, sequences, recompute)
    if layout.pp > 1:  # DualPipeV: 2P + 1 micro-batches, of one stage of 2P each
        held *= 1 + 1 / (2 * layout.pp)
    # the loss: a slice of logits in fp32 and twice in bf16, and the head's gradient
    head = gpt.lm_head.weight
    loss = 2048 * len(head) * 8 + 4 * head.numel()
    return states(gpt, W, layout) + work + held + loss


# -----------------------------------------------------------------------------
# bytes that a rank sends, by ring algorithms; a group's ranks each hold n bytes, or a share of n bytes

def all_reduce(n, ranks):
    return 2 * n * (ranks - 1) / ranks


def all_gather(n, ranks):
    return n * (ranks - 1) / ranks


reduce_scatter = all_gather


def ddp_bytes(n, ranks):
    """Once a step: n fp32 gradients."""
    return all_reduce(4 * n, ranks)


def fsdp_bytes(in_blocks, outside, ranks, micro_batches, gathered=2):
    """Per step: in each micro-batch blocks are gathered twice, forward and backward, the rest once; fp32 gradients."""
    n = in_blocks + outside
    each = all_gather(gathered * (2 * in_blocks + outside), ranks) + reduce_scatter(4 * n, ranks)
    return micro_batches * each


def expert_copies(gpt, ep):
    """Of a token's copies for its experts: how many leave the rank, and the machine (one per machine, V3 3.2.2)."""
    config, K = gpt.config, gpt.config.num_experts_per_tok
    machines = max(1, ep // NODE)
    reached = min(K, machines, config.topk_group if config.n_group > 1 else machines)
    return K * (ep - 1) / ep, reached * (machines - 1) / machines


def expert_bytes(gpt, tokens, copies, size=2, passes=4):
    """A micro-batch's tokens to their experts and back, forward and backward: 4 passes, 6 with recomputation."""
    return moe_layers(gpt) * passes * tokens * copies * gpt.config.n_embd * size


def pipeline_bytes(gpt, tokens, P, size=4):
    """A micro-batch's states and their gradients pass 2P - 1 places between stages, one of which lies within a rank.
    -> a rank's share of all
    """
    return 2 * (2 * P - 2) / P * tokens * gpt.config.n_embd * size


def wire(gpt, W, layout, sequences, micro_batches, recompute=False):
    """Per step and rank: {what: (bytes sent, seconds that its link takes)}."""
    found = {}
    tokens = sequences * gpt.config.block_size

    def add(what, n, seconds):
        if n > 0:
            before = found.get(what, (0, 0))
            found[what] = before[0] + n, before[1] + seconds

    def speed(ranks):
        return NVLINK if ranks <= NODE else NETWORK

    (dense, experts), ranks, D = local_sizes(gpt, W, layout), shard_ranks(W, layout), W // layout.pp
    _, _, ends = sizes(gpt)
    for n, outside, shards, copies in ((dense, ends, ranks[0], D), (experts, 0, ranks[1], D // layout.ep)):
        span = shards * (1 if copies == D else layout.ep)  # ranks of one group are that far apart
        if layout.pp > 1:
            sent = reduce_scatter(4 * n, shards) + all_gather(2 * n, shards)
            add('ZeRO-1', sent, sent / speed(span))
            continue
        if shards > 1:
            sent = fsdp_bytes(n - outside, outside, shards, micro_batches)
            add('FSDP', sent, sent / speed(span))
        if copies > shards:
            sent = ddp_bytes(n / shards, copies // shards)
            add('gradients', sent, sent / speed(W if W > NODE else span * copies))
    if layout.ep > 1:
        near, far = (micro_batches / layout.pp * expert_bytes(gpt, tokens, copies, passes=6 if recompute else 4)
                     for copies in expert_copies(gpt, layout.ep))
        add('experts', near, max(near / NVLINK, far / NETWORK))
    if layout.pp > 1:
        sent = micro_batches * pipeline_bytes(gpt, tokens, layout.pp)
        add('pipeline', sent, sent / NETWORK)
    return found


# -----------------------------------------------------------------------------
# a pipeline's step, simulated: each rank takes its actions in order, each as soon as what it needs is there

KINDS = {schedules.FORWARD: 'F', schedules.BACKWARD_INPUT: 'I', schedules.BACKWARD_WEIGHT: 'W',
         schedules.FULL_BACKWARD: 'B'}


def orders(schedule, P, M):
    """Of each rank a list of units; a unit is [(kind, stage, micro-batch)], two of them where they overlap.

    kind: F forward, I and W the input's and the weights' backward, B both. ZB-V and DualPipeV are torch's own orders.
    """
    if schedule == '1F1B':
        found = []
        for r in range(P):
            ahead = min(M, P - 1 - r)
            units = [('F', r, m) for m in range(ahead)]
            for m in range(M):
                units += [('F', r, m + ahead)] if m + ahead < M else []
                units += [('B', r, m)]
            found.append([[unit] for unit in units])
        return found
    kind = {'ZB-V': schedules.ScheduleZBVZeroBubble, 'DualPipeV': schedules.ScheduleDualPipeV}[schedule]
    sizes = SimpleNamespace(pp_group_size=P, _n_microbatches=M, num_stages=2 * P)
    return [[[(KINDS[a.computation_type], a.stage_index, a.microbatch_index) for a in action.sub_actions or [action]]
             for action in kind._calculate_single_rank_operations(sizes, rank) if action is not None]
            for rank in range(P)]


def simulate(schedule, P, M, seconds, send=0.0):
    """The step's length, and [(rank, kind, stage, micro-batch, start, end)].

    seconds: (kind, stage) -> the time of one action; two that overlap take the sum. send: from rank to rank.
    """
    lists = orders(schedule, P, M)
    last = max(stage for units in lists for unit in units for _, stage, _ in unit)
    done, clock, place, spans = {}, [0.0] * P, [0] * P, []

    def needs(kind, stage, m):
        """What must be done before; the second: it comes from the stage beside, perhaps on another rank."""
        if kind == 'F':
            return [(('F', stage - 1, m), True)] if stage > 0 else []
        if kind == 'W':
            return [(('I', stage, m), False)]
        return [(('F', stage, m), False)] + ([(('I', stage + 1, m), True)] if stage < last else [])

    def rank_of(stage):
        return stage if stage < P else 2 * P - 1 - stage

    def start_of(rank, unit):
        start, inside = clock[rank], {('F', stage, m) for kind, stage, m in unit if kind == 'F'}
        for action in unit:
            for need, sent in needs(*action):
                if need in inside:
                    continue
                if need not in done:
                    return None
                start = max(start, done[need] + (send if sent and rank_of(need[1]) != rank else 0))
        return start

    going = True
    while going:
        going = False
        for rank in range(P):
            while place[rank] < len(lists[rank]):
                unit = lists[rank][place[rank]]
                start = start_of(rank, unit)
                if start is None:
                    break
                end = start + sum(seconds(kind, stage) for kind, stage, _ in unit)
                for kind, stage, m in unit:
                    done['I' if kind == 'B' else kind, stage, m] = end  # a whole backward hands on what I does
                    spans.append((rank, kind, stage, m, start, end))
                    start = start + seconds(kind, stage)  # for the picture
                clock[rank], going = end, True
                place[rank] += 1
    assert place == [len(units) for units in lists]
    return max(clock), spans


def constant(F, I, W):
    """Times of equal stages, for simulate()."""
    times = {'F': F, 'I': I, 'W': W, 'B': I + W}
    return lambda kind, stage: times[kind]


# the bubbles that the papers give, of the schedules above with the times of one stage of P (1F1B) or 2P stages
BUBBLES = {'1F1B': lambda P, F, I, W: (P - 1) * (F + I + W),                         # V3 table 2
           'ZB-V': lambda P, F, I, W: (P - 1) * F,                                   # 2401.10241 section 6, F = I = W
           'DualPipeV': lambda P, F, I, W: (P - 1) * (F + (I + W) + (I + W) - 3 * W)}  # V3 table 2, of 2P stages


@lru_cache
def bubble(P, recompute, send):
    """Of DualPipeV with 2P micro-batches, and what each one more adds; in parts of a stage's forward, with F = I = W (I
    computes F again where recompute), and a message of `send` parts.
    """
    times = (1, 2 if recompute else 1, 1)
    few, more = (simulate('DualPipeV', P, m, constant(*times), send)[0] - 2 * m * sum(times) for m in (2 * P, 4 * P))
    return few, (more - few) / (2 * P)


# -----------------------------------------------------------------------------
# the layout that one would choose

class Plan(NamedTuple):
    layout: Layout
    sequences: int   # in a micro-batch
    recompute: bool  # block by block
    bytes: float     # on the fullest rank
    step: float      # seconds
    mfu: float


def fullest(gpt, pp):
    """Rank 0's work in a pipeline over an even share of it, if the main blocks are divided as well as they can be: it
    has the heads and the MTP modules, whatever else.
    """
    if pp == 1:
        return 1
    heads = (1 + len(gpt.mtp)) * gpt.lm_head.weight.numel()
    blocks = flops_per_token(gpt) / 6 - heads
    mine = heads + blocks * len([block for module in gpt.mtp for block in module.h]) / len(gpt.blocks())
    return max(1, mine * pp / (heads + blocks))


def predict(model, W, layout, sequences, recompute):
    """The Plan of this layout. What is hidden and what is not: docs/scale.md."""
    gpt, D = model.gpt, W // layout.pp
    micro_batches = model.sequences // (D * sequences)
    tokens = sequences * gpt.config.block_size
    flops = flops_per_token(gpt) * tokens / layout.pp
    plain = flops / (PEAK * model.efficiency)                          # a micro-batch on a rank
    work = plain * (4 / 3 if recompute else 1) * fullest(gpt, layout.pp)
    took = {what: seconds for what, (_, seconds) in wire(gpt, W, layout, sequences, micro_batches, recompute).items()}
    step = micro_batches * work
    if layout.pp > 1:
        forward = plain / 6                                            # of one of the rank's two stages
        send = round(4 * tokens * gpt.config.n_embd / NETWORK / forward, 2)
        few, each = bubble(layout.pp, recompute, send)
        step += (few + (micro_batches - 2 * layout.pp) * each) * forward
        step += max(0, took.get('experts', 0) - micro_batches * work)
    else:
        step += took.get('experts', 0)
    step += max(0, took.get('FSDP', 0) - micro_batches * work)
    step += max(0, took.get('gradients', 0) - work / 2)
    step += took.get('ZeRO-1', 0)
    used = memory(gpt, W, layout, sequences, recompute)
    return Plan(layout, sequences, recompute, used, step, micro_batches * flops / step / PEAK)


def choose(model, W, pipelines):
    """The fastest Plan that fits in a GPU, or None; of those within a percent the simplest."""
    gpt, best = model.gpt, None
    for pp in (1, 2, 4, 8, 16) if pipelines else (1,):
        for ep in (1, 2, 4, 8, 16, 32, 64):
            D = W // pp
            if D < ep or D % ep or gpt.config.n_routed_experts % ep or 2 * pp > gpt.config.n_layer:
                continue
            for shard in sorted({1, min(NODE, D), D}) if pp == 1 else (D,):
                for sequences in (60, 30, 16, 12, 8, 4, 2, 1):
                    micro_batches, rest = divmod(model.sequences, D * sequences)
                    if rest or micro_batches < (2 * pp if pp > 1 else 1):
                        continue
                    for recompute in (False, True):
                        plan = predict(model, W, Layout(pp, ep, shard), sequences, recompute)
                        if plan.bytes <= MEMORY and (best is None or plan.step < 0.99 * best.step):
                            best = plan
    return best


# -----------------------------------------------------------------------------
# the tables

def table(head, rows):
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)


def GB(n):
    return f'{n / 1e9:,.{2 if n < 1e9 else 1 if n < 100e9 else 0}f}'


def active(gpt):
    """Parameters that a token uses, with embedding and head, as V3 counts them."""
    return gpt.get_num_active_params() + gpt.get_num_params(non_embedding=False) - gpt.get_num_params()


def models_table():
    rows = []
    without_mtp = without_memory(**dataclasses.asdict(MODELS['V3'].gpt.config) | {'num_nextn_predict_layers': 0})
    shown = {**MODELS, 'V3 without MTP': MODELS['V3']._replace(gpt=without_mtp)}
    for name, (gpt, sequences, _) in shown.items():
        whole, T = gpt.get_num_params(non_embedding=False), gpt.config.block_size
        rows.append([name, f'{whole / 1e9:.2f}B', f'{active(gpt) / 1e9:.2f}B',
                     f'{flops_per_token(gpt) / 1e9:.1f}', f'{sequences:,} x {T:,}', GB(states(gpt, 1, Layout())),
                     *(GB(activations(gpt, 1, recompute)) for recompute in (False, True))])
    return table(['model', 'parameters', 'of which a token uses', 'GFLOP per token', 'tokens of a step',
                  'states, GB', 'activations of a sequence, GB', 'with recomputation, GB'], rows)


# on 64 ranks, with a pipeline of 8 with 8 data ranks
LAYOUTS = [Layout(), Layout(shard=64), Layout(shard=8), Layout(ep=8), Layout(ep=8, shard=64), Layout(8, 8, 8)]


def memory_table():
    return table(['GB of states on each of 64 ranks', *(layout.name(64) for layout in LAYOUTS)],
                 [[name, *(GB(states(model.gpt, 64, layout)) for layout in LAYOUTS)] for name, model in MODELS.items()])


def wire_table():
    rows = []
    for name, model in MODELS.items():
        row = [name]
        for layout in LAYOUTS:
            micro_batches = model.sequences // (64 // layout.pp)
            sent = wire(model.gpt, 64, layout, 1, micro_batches)
            row.append(GB(sum(n for n, _ in sent.values())))
        rows.append(row)
    return table(['GB sent by each of 64 ranks in a step', *(layout.name(64) for layout in LAYOUTS)], rows)


def plan_cells(model, W, plan):
    if plan is None:
        return ['none fits' if model.sequences % W == 0 else f'{model.sequences:,} sequences do not divide', '', '', '']
    words = f'{plan.layout.name(W)}; {plan.sequences} x {model.gpt.config.block_size:,}'
    tokens = model.sequences * model.gpt.config.block_size / plan.step
    return [words + ', recomputed' * plan.recompute, GB(plan.bytes), f'{plan.mfu:.0%}', f'{tokens:,.0f}']


def choice_table():
    rows = []
    for name, model in MODELS.items():
        for W in (1, 8, 64, 2048):
            plans = [choose(model, W, pipelines) for pipelines in (False, True)]
            cells = plan_cells(model, W, plans[0]), plan_cells(model, W, plans[1])
            rows.append([name, f'{W:,}', *cells[0], *(['the same', '', '', ''] if cells[0] == cells[1] else cells[1])])
    return table(['model', 'GPUs', 'without a pipeline; micro-batch', 'GB', 'MFU', 'tokens/s',
                  'with DualPipeV; micro-batch', 'GB', 'MFU', 'tokens/s'], rows)


def v3_table():
    """Its published layout, V3 section 3.2: PP 16, EP 64, ZeRO-1; 180K GPU hours for a trillion tokens, section 1."""
    model, layout = MODELS['V3'], Layout(16, 64, 128)
    T = model.gpt.config.block_size

    def row(words, speed, used):
        mfu = speed * flops_per_token(model.gpt) / PEAK
        return [words, f'{speed:,.0f}', f'{1e12 / speed / 3600e3:,.0f}', f'{mfu:.0%}', used]

    rows = [row('published', 1e12 / (180e3 * 3600), 'fits in 80')]
    for recompute in (False, True):
        plan = predict(model, 2048, layout, 1, recompute)
        rows.append(row(f'by these formulas, {"every block" if recompute else "nothing"} recomputed',
                        model.sequences * T / plan.step / 2048, GB(plan.bytes)))
    return table(['V3 on 2,048 H800: PP 16, EP 64, ZeRO-1', 'tokens/s per GPU', 'thousand GPU hours per trillion',
                  'MFU, of the bf16 peak', 'GB on rank 0'], rows)


def block_times():
    """Seconds of F, I and W of a main run's block, and of a head: what measure() wrote."""
    with open(TIMES) as f:
        return json.load(f)


def bubble_table():
    times, rows = block_times(), []
    F, I, W = (times[kind] / times['F'] for kind in 'FIW')
    for P in (4, 8, 16):
        for schedule, formula in BUBBLES.items():
            row = [P, schedule]
            for each in ((1, 1, 1), (F, I, W)):
                half = [2 * t if schedule == '1F1B' else t for t in each]  # its stages hold twice the layers
                M = 4 * P
                work = 2 * M * sum(each)
                step, _ = simulate(schedule, P, M, constant(*half))
                row += [f'{step - work:.1f}', f'{formula(P, *half):.1f}', f'{1 - work / step:.0%}']
            rows.append(row)
    measured = f'F = 1, I = {I:.2f}, W = {W:.2f}'
    return table(['P', 'schedule', 'bubble, F = I = W = 1', 'by formula', 'of the step',
                  f'bubble, {measured}', 'by formula', 'of the step'], rows)


def main_run_stages(P):
    """(kind, stage) -> seconds of the main run's stages as runs/pipeline.py divides it."""
    times, config = block_times(), MODELS['main run'].gpt.config
    ends = [-(-config.n_layer * s // (2 * P)) for s in range(2 * P + 1)]
    blocks = [end - start for start, end in zip(ends, ends[1:])]
    blocks[-1] += config.num_nextn_predict_layers * config.mtp_n_layer
    heads = (1 + config.num_nextn_predict_layers) * times['head']  # with its gradients, all in the forward

    def seconds(kind, stage):
        if kind == 'B':
            return seconds('I', stage) + seconds('W', stage)
        return blocks[stage] * times[kind] + (heads if stage == 2 * P - 1 and kind == 'F' else 0)

    return seconds


def main_run_table():
    rows = []
    for P in (2, 4):
        M, seconds = MODELS['main run'].sequences, main_run_stages(P)
        work = M * sum(seconds(kind, s) for kind in 'FIW' for s in range(2 * P))
        step, _ = simulate('DualPipeV', P, M, seconds)
        rest = M * (sum(seconds(kind, 2 * P - 1) + seconds(kind, 0) for kind in 'FIW'))
        rows.append([P, f'{work / P:.0f}', f'{rest:.0f}', f'{step:.0f}', f'{work / P / step:.0%}'])
    return table(['P', 'work of an even share, s', "rank 0's work, s", 'step, s', 'share of it that computes'], rows)


def times_table():
    times = block_times()
    return table(['F', 'I', 'W', 'one head with its gradients'],
                 [[f'{times[kind] * 1000:.0f} ms' for kind in ('F', 'I', 'W', 'head')]])


TABLES = {'models': models_table, 'memory': memory_table, 'wire': wire_table, 'choice': choice_table, 'v3': v3_table,
          'bubbles': bubble_table, 'main-run': main_run_table, 'times': times_table}


def filled(text):
    """A page whose tables, each between its two comments, are those of this file."""
    for name, build in TABLES.items():
        before, mark, rest = text.partition(f'<!-- {name} -->\n')
        _, end, after = rest.partition('<!-- end -->')
        if not end:
            raise SystemExit(f'the page has no place for the table {name!r}')
        text = before + mark + build() + '\n' + end + after
    return text


# -----------------------------------------------------------------------------
# the picture, and the measured times

def draw(path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    times = block_times()
    each = [times[kind] for kind in 'FIW']
    P, M = 4, 10
    panels = [('1F1B', constant(*(2 * t for t in each)), '1F1B, a stage of two blocks on each rank'),
              ('ZB-V', constant(*each), 'ZB-V, two stages of a block on each rank'),
              ('DualPipeV', constant(*each), 'DualPipeV, the same; what overlaps is drawn one after the other'),
              ('DualPipeV', main_run_stages(P),
               'DualPipeV, the whole main run: the last stage, on rank 0, has four MTP blocks and three heads more')]
    colours = {'F': ('#9ecae1', '#4292c6'), 'I': ('#fdd0a2', '#fd8d3c'), 'B': ('#fdd0a2', '#fd8d3c'),
               'W': ('#c7e9c0', '#74c476')}
    fig, axes = plt.subplots(len(panels), 1, figsize=(11, 9), layout='constrained')
    for ax, (schedule, seconds, title) in zip(axes, panels):
        step, spans = simulate(schedule, P, M, seconds)
        work = sum(end - start for *_, start, end in parts(spans, seconds)) / P
        for rank, kind, stage, m, start, end in parts(spans, seconds):
            ax.barh(rank, end - start, left=start, height=0.9, color=colours[kind][stage >= P], edgecolor='white',
                    linewidth=0.4)
            if end - start > step / 90:
                ax.text((start + end) / 2, rank, m, ha='center', va='center', fontsize=6)
        ax.set(title=f'{title}: {step:.1f} s, of which a rank works {work:.1f}', yticks=range(P),
               ylim=(P - 0.5, -0.5), xlim=(0, step), ylabel='rank')
        ax.title.set_fontsize(10)
    axes[-1].set_xlabel('seconds')
    names = {'F': 'forward', 'B': "input's backward, or whole", 'W': "weights' backward"}
    marks = [plt.Rectangle((0, 0), 1, 1, color=colours[kind][half]) for kind in names for half in (0, 1)]
    labels = [f'{names[kind]}, stage {"P to 2P-1" if half else "0 to P-1"}' for kind in names for half in (0, 1)]
    fig.legend(marks, labels, loc='outside lower center', ncols=3, fontsize=8)
    fig.savefig(path, dpi=110)


def parts(spans, seconds):
    """Spans as long as their own action: of two that overlap the second begins where the first ends."""
    return [(rank, kind, stage, m, start, start + seconds(kind, stage)) for rank, kind, stage, m, start, _ in spans]


def measure():
    """Seconds of a main run's block and of one head, 1 x 1,024 tokens, fp32, on this CPU: the fastest of 25 each."""
    gpt = GPT(MODELS['main run'].gpt.config)
    block = gpt.transformer.h[0].train()
    x = torch.randn(1, gpt.config.block_size, gpt.config.n_embd, requires_grad=True)
    labels = torch.randint(gpt.config.vocab_size, x.shape[:2])
    rounds = []
    for _ in range(25):
        marks = [time.perf_counter()]
        y, _ = block(x, gpt.rope_cos, gpt.rope_sin)
        marks.append(time.perf_counter())
        torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
        marks.append(time.perf_counter())
        y.backward(torch.ones_like(y))
        marks.append(time.perf_counter())
        gpt.loss_of_heads([x], [labels], [1.0])[0].backward()
        marks.append(time.perf_counter())
        rounds.append([end - start for start, end in zip(marks, marks[1:])])
    F, I, both, head = (min(column) for column in zip(*rounds))
    with open(TIMES, 'w') as f:
        json.dump({name: round(t, 4) for name, t in (('F', F), ('I', I), ('W', both - I), ('head', head))}, f)
        f.write('\n')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--measure', action='store_true', help='time a block of the main run first')
    if parser.parse_args().measure:
        measure()
    page = os.path.join(root, 'docs/scale.md')
    with open(page, encoding='utf-8') as f:
        text = filled(f.read())
    with open(page, 'w', encoding='utf-8') as f:
        f.write(text)
    draw(os.path.join(root, 'assets/scale.png'))
