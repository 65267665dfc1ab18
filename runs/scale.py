"""
docs/scale.md's tables and its picture, computed: what a rank holds and sends under each kind of parallelism, which layout
one would choose, and how long a pipeline's step takes.

    python runs/scale.py                   # writes the tables into docs/scale.md, and assets/scale.png
    python runs/scale.py --measure=True    # times a block of the main run here first, into runs/scale_times.json

Letters: W ranks in all, P of them in a pipeline, D = W / P data ranks; S ranks share the weights' shards, EP the experts.
"""

import dataclasses
import json
import math
import os
import re
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
from model import GPT, Block, GPTConfig

# -----------------------------------------------------------------------------
# the models, and the tokens of a step

TIMES = os.path.join(root, 'runs/scale_times.json')
FIELDS = {field.name for field in dataclasses.fields(GPTConfig)}
MAIN = runpy.run_path(os.path.join(root, 'config/train_deepseek.py'))
SMALL_16B = dict(vocab_size=102400, n_layer=27, n_head=16, n_embd=2048, q_lora_rank=0, kv_lora_rank=512,
                 qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64, n_shared_experts=2,
                 num_experts_per_tok=6, moe_intermediate_size=1408, first_k_dense_replace=1, tie_word_embeddings=False,
                 num_nextn_predict_layers=0)


class Model(NamedTuple):
    config: GPTConfig
    sequences: int      # per step
    efficiency: float   # the share of the bf16 peak that a GPU's kernels reach, without communication: an assumption


MODELS = {
    'main run': Model(GPTConfig(**{k: v for k, v in MAIN.items() if k in FIELDS}), MAIN['batch_size']
                      * MAIN['gradient_accumulation_steps'], 0.31),                          # docs/gpu.md's estimate
    'V2-Lite': Model(GPTConfig(block_size=4096, intermediate_size=10944, scoring_func='softmax', norm_topk_prob=False,
                               routed_scaling_factor=1.0, **SMALL_16B), 4608, 0.5),          # V2 appendix B
    'Moonlight': Model(GPTConfig(**SMALL_16B | dict(block_size=8192, vocab_size=163840, intermediate_size=11264)), 2048,
                       0.5),                                                                 # 2502.16982
    'V3': Model(GPTConfig(block_size=4096, vocab_size=129280, n_layer=61, n_head=128, n_embd=7168, q_lora_rank=1536,
                          kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
                          n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048,
                          intermediate_size=18432, first_k_dense_replace=3, n_group=8, topk_group=4,
                          tie_word_embeddings=False, num_nextn_predict_layers=1, mtp_n_layer=1), 15360, 0.5),  # 4.2
}
# an H800's (V3 section 3.2.2): bytes per second that a GPU sends, to its 7 neighbours and to other machines
NVLINK, NETWORK, NODE = 160e9, 50e9, 8
PEAK, MEMORY = 989e12, 0.92 * 80e9  # dense bf16 FLOP/s; bytes, less what the driver and fragments take


@lru_cache
def meta_model(config):
    with torch.device('meta'):
        return GPT(config)


GPTConfig.__hash__ = lambda self: hash(dataclasses.astuple(self))  # for lru_cache: no config changes here


@lru_cache
def sizes(config):
    """Numbers of parameters: in blocks without routed experts, in routed experts, and outside of blocks."""
    model = meta_model(config)
    experts = sum(p.numel() for name, p in model.named_parameters() if 'experts_' in name.rsplit('.', 1)[-1])
    blocks = sum(p.numel() for block in model.blocks() for p in block.parameters())
    return blocks - experts, experts, model.get_num_params(non_embedding=False) - blocks


# -----------------------------------------------------------------------------
# memory per rank, in bytes

@lru_cache
def saved_bytes(config, dense=False, fake=True):
    """What one block keeps of one sequence for the backward pass, by torch's own account, without weights."""
    found, weights = {}, set()

    def keep(x):
        if x.untyped_storage()._cdata not in weights:
            found[x.untyped_storage()._cdata] = x  # kept, so that no other storage gets its address
        return x

    with FakeTensorMode() if fake else torch.device('cpu'):
        block = Block(config, dense).train()
        weights |= {p.untyped_storage()._cdata for p in block.parameters()}
        angles = torch.empty(2, config.block_size, config.qk_rope_head_dim // 2)
        x = torch.randn(1, config.block_size, config.n_embd, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast('cpu', torch.bfloat16):
            block(x, *angles)
        shapes = {p.shape[-2:] for p in block.parameters() if p.dim() >= 2}  # autocast's copies of them are no activations
        return sum(x.untyped_storage().nbytes() for x in found.values()
                   if not (x.dtype == torch.bfloat16 and ({x.shape[-2:], x.mT.shape[-2:]} & shapes if x.dim() > 1 else 0)))


def activations(config, sequences, recompute):
    """Of one micro-batch through all blocks; with recompute by block: each block's input, and one block's whole."""
    moe = saved_bytes(config, config.n_routed_experts == 0)
    n = len(meta_model(config).blocks())
    if recompute:
        return sequences * (n * 4 * config.block_size * config.n_embd + moe)
    dense = saved_bytes(config, True) if config.first_k_dense_replace > 0 else 0
    return sequences * ((n - config.first_k_dense_replace) * moe + config.first_k_dense_replace * dense)


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
            parts += ['ZeRO-1'] if replicas > 1 else []
        elif self.shard > 1:
            parts.append(f'FSDP {self.shard}' if replicas == 1 else f'HSDP {replicas} x {self.shard}')
        elif replicas > 1:
            parts.append(f'DDP {W}')
        return ', '.join(parts) or 'one GPU'


def local_sizes(config, W, layout):
    """This rank's parameters before sharding: (those that all data ranks hold, routed experts). With a pipeline rank 0's:
    it holds the most, the embedding, the head, and the MTP modules' projections."""
    dense, experts, ends = sizes(config)
    return dense / layout.pp + ends, experts / layout.pp / layout.ep


def shard_ranks(W, layout):
    """Among how many ranks the states of the two kinds are divided: experts have fewer copies."""
    D = W // layout.pp
    if layout.pp > 1:
        return D, D // layout.ep
    return layout.shard, min(layout.shard, D // layout.ep)


def states(config, W, layout, moments=8):
    """Bytes of weights, gradients and AdamW's moments: fp32 throughout (moments=4: --bf16_moments)."""
    total = 0
    for n, ranks in zip(local_sizes(config, W, layout), shard_ranks(W, layout)):
        if layout.pp > 1:  # ZeRO-1: bf16 weights and fp32 gradients whole; fp32 weights and moments in shards
            total += n * (2 + 4) + n / ranks * (4 + moments)
        else:
            total += n / ranks * (4 + 4 + moments)
            if ranks == 1 and W // layout.ep > 1:
                total += 4 * n  # DDP's buckets
    return total


def memory(config, W, layout, sequences, recompute):
    """Peak bytes on a rank: states, gathered weights, activations of a micro-batch of so many sequences, the loss."""
    dense, experts = local_sizes(config, W, layout)
    blocks = len(meta_model(config).blocks()) / layout.pp
    if layout.pp > 1:
        work = 0
    elif layout.shard > 1:  # two blocks' weights in bf16, one's gradients in fp32
        work = (dense + experts) / blocks * (2 * 2 + 4)
    else:  # autocast's bf16 copies
        work = 2 * (dense + experts) * (1 / blocks if recompute else 1)
    held = activations(config, sequences, recompute)
    if layout.pp > 1:  # DualPipeV: 2P + 1 micro-batches, of one stage of 2P each
        held *= 1 + 1 / (2 * layout.pp)
    # the loss: a slice of logits in fp32 and twice in bf16, and the head's gradient
    loss = 2048 * config.vocab_size * 8 + 4 * config.vocab_size * config.n_embd
    return states(config, W, layout) + work + held + loss


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


def expert_copies(config, ep):
    """Of a token's copies for its experts: how many leave the rank, and the machine (one per machine, V3 3.2.2)."""
    K = config.num_experts_per_tok
    machines = max(1, ep // NODE)
    reached = min(K, machines, config.topk_group if config.n_group > 1 else machines)
    return K * (ep - 1) / ep, reached * (machines - 1) / machines


def expert_bytes(config, tokens, copies, size=2, passes=4):
    """A micro-batch's tokens to their experts and back, forward and backward: 4 passes, 6 with recomputation."""
    return len(meta_model(config).moe_layers()) * passes * tokens * copies * config.n_embd * size


def pipeline_bytes(config, tokens, size=4):
    """A micro-batch's states and their gradients, from both stages of a rank amid the pipeline."""
    return 2 * 2 * tokens * config.n_embd * size


def wire(config, W, layout, sequences, micro_batches, recompute=False):
    """Per step and rank: {what: bytes to other machines or NVLink neighbours}, and seconds by the slower link of each."""
    found = {}
    tokens = sequences * config.block_size

    def add(what, n, seconds):
        if n > 0:
            before = found.get(what, (0, 0))
            found[what] = before[0] + n, before[1] + seconds

    def speed(ranks):
        return NVLINK if ranks <= NODE else NETWORK

    (dense, experts), ranks, D = local_sizes(config, W, layout), shard_ranks(W, layout), W // layout.pp
    _, _, ends = sizes(config)
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
        near, far = (micro_batches / layout.pp * expert_bytes(config, tokens, copies, passes=6 if recompute else 4)
                     for copies in expert_copies(config, layout.ep))
        add('experts', near, max(near / NVLINK, far / NETWORK))
    if layout.pp > 1:
        sent = micro_batches * pipeline_bytes(config, tokens)
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


@lru_cache
def slowdown(P, M, recompute, send_share):
    """A DualPipeV step over its work, with F = I = W (I computes F again), send in parts of F."""
    F, I, W = 1, 2 if recompute else 1, 1
    return simulate('DualPipeV', P, M, constant(F, I, W), send_share)[0] / (2 * M * (F + I + W))


# -----------------------------------------------------------------------------
# the layout that one would choose

def predict(model, W, layout, sequences, recompute):
    """Seconds of a step, and the share of them that compute: products, and not what waits or computes again."""
    config = model.config
    D, tokens = W // layout.pp, sequences * config.block_size
    micro_batches = model.sequences // (D * sequences)
    plain = meta_model(config).flops_per_token() * tokens / layout.pp / (PEAK * model.efficiency)
    work = plain * (4 / 3 if recompute else 1)                             # a micro-batch on a rank
    sent = wire(config, W, layout, sequences, micro_batches, recompute)
    took = {what: seconds for what, (_, seconds) in sent.items()}
    step = micro_batches * work
    if layout.pp > 1:
        share = took['pipeline'] / (4 * micro_batches) / (plain / 6)       # one message in parts of a stage's forward
        step *= slowdown(layout.pp, micro_batches, recompute, round(share, 2))
        step += max(0, took.get('experts', 0) - micro_batches * work)      # hidden beside the other direction's products
    else:
        step += took.get('experts', 0)                                     # nothing hides it
    step += max(0, took.get('FSDP', 0) - micro_batches * work)             # hidden beside the blocks' products
    step += max(0, took.get('gradients', 0) - work / 2)                    # beside the last backward
    step += took.get('ZeRO-1', 0)
    return step, micro_batches * plain / step


def choose(model, W):
    """The fastest layout that fits: (seconds, share, layout, sequences in a micro-batch, recompute, bytes), or None."""
    config, best = model.config, None
    for pp in (1, 2, 4, 8, 16):
        for ep in (1, 2, 4, 8, 16, 32, 64):
            for shard in sorted({1, NODE, W // pp} if pp == 1 else {W // pp}):
                D = W // pp
                if W % pp or D % shard or D % ep or config.n_routed_experts % ep or D < 1 or shard > D:
                    continue
                if 2 * pp > config.n_layer:
                    continue
                for sequences in (1, 2, 4, 8, 12, 16, 24, 30, 60):
                    micro_batches, rest = divmod(model.sequences, D * sequences)
                    if rest or micro_batches < (2 * pp if pp > 1 else 1):
                        continue
                    for recompute in (False, True):
                        layout = Layout(pp, ep, shard)
                        need = memory(config, W, layout, sequences, recompute)
                        if need > MEMORY:
                            continue
                        step, share = predict(model, W, layout, sequences, recompute)
                        if best is None or step < 0.99 * best[0]:  # a simpler layout came first
                            best = step, share, layout, sequences, recompute, need
    return best
