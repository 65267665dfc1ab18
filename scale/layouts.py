"""
The plan on paper: what a rank holds and sends under each kind of parallelism, and which layout one would choose.

    python scale/layouts.py     # writes the tables into scale/README.md

W ranks are P pipeline ranks times D data ranks. Memory and messages are in bytes, times in seconds.
"""

import argparse
import re
import sys
from collections import Counter
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))
from schedules import BUBBLES, block_times, main_run, simulate

from model import GPT, MLP, Block, GPTConfig

# -----------------------------------------------------------------------------
# the models and the machine


class Model(NamedTuple):
    gpt: GPT            # without memory
    sequences: int      # in a step
    efficiency: float   # the share of the peak that kernels reach without communication: an assumption


def without_memory(**settings):
    with torch.device('meta'):
        return GPT(GPTConfig(**settings))


main, main_sizes = main_run()
lite = dict(vocab_size=102400, block_size=4096, n_layer=27, n_head=16, n_embd=2048, q_lora_rank=0, kv_lora_rank=512,
            qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64, n_shared_experts=2,
            num_experts_per_tok=6, moe_intermediate_size=1408, intermediate_size=10944, first_k_dense_replace=1,
            tie_word_embeddings=False, num_nextn_predict_layers=0)
moonlight = lite | dict(vocab_size=163840, block_size=8192, intermediate_size=11264)
v3 = lite | dict(vocab_size=129280, n_layer=61, n_head=128, n_embd=7168, q_lora_rank=1536, n_routed_experts=256,
                 n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048, intermediate_size=18432,
                 first_k_dense_replace=3, n_group=8, topk_group=4, num_nextn_predict_layers=1, mtp_n_layer=1)
MODELS = {'main run': Model(without_memory(**main_sizes),
                            main['batch_size'] * main['gradient_accumulation_steps'], 0.31),  # docs/gpu.md's estimate
          'V2-Lite': Model(without_memory(**lite), 4608, 0.5),
          'Moonlight': Model(without_memory(**moonlight), 2048, 0.5),
          'V3': Model(without_memory(**v3), 15360, 0.5)}

# an H800's: what a GPU sends in a second to the others of its machine and to other machines (V3 section 3.2.2), dense
# bf16 FLOP/s, and memory less what the driver and fragments take
NVLINK, NETWORK, NODE = 160e9, 50e9, 8
PEAK, MEMORY = 989e12, 0.92 * 80e9


@lru_cache
def sizes(gpt):
    """Numbers of parameters: in blocks without routed experts, in routed experts, and outside of blocks."""
    experts = sum(moe.experts_gate_up.numel() + moe.experts_down.numel() for moe in gpt.moe_layers())
    blocks = sum(p.numel() for block in gpt.blocks() for p in block.parameters())
    return blocks - experts, experts, gpt.get_num_params(non_embedding=False) - blocks


flops_per_token = lru_cache(GPT.flops_per_token)


# -----------------------------------------------------------------------------
# layouts

class Layout(NamedTuple):
    pp: int = 1     # ranks of the pipeline
    ep: int = 1     # neighbouring ranks that share a layer's experts
    shard: int = 1  # neighbouring ranks that share all weights; in a pipeline the optimizer's state alone, all D

    def name(self, W):
        replicas = W // self.pp // self.shard
        names = [f'{name} {ranks}' for name, ranks in (('PP', self.pp), ('EP', self.ep)) if ranks > 1]
        if self.pp > 1:
            names.append('ZeRO-1')
        elif self.shard == 1:
            names.append(f'DDP {W}' if W > 1 else 'one GPU')
        else:
            names.append(f'FSDP {W}' if replicas == 1 else f'HSDP {replicas} x {self.shard}')
        return ', '.join(names)


def parts(gpt, layout):
    """Of a rank's parameters, those that all data ranks have and then its experts: (their number, how many of them are
    outside of blocks, the ranks that share them, and how far those are apart). In a pipeline it is rank 0, which has
    embedding and head besides its share of the blocks.
    """
    pp, ep, shard = layout
    dense, experts, outside = sizes(gpt)
    return [(dense / pp + outside, outside, shard, 1),
            (experts / pp / ep, 0, max(1, shard // ep), ep)]  # as extras/parallel.py lays them


# -----------------------------------------------------------------------------
# a rank's memory

def states(gpt, W, layout):
    """Weights, gradients and AdamW's moments."""
    if layout.pp > 1:  # ZeRO-1: bf16 weights and fp32 gradients whole, fp32 weights and moments in shards
        return sum(n * (2 + 4) + n / shards * (4 + 8) for n, _, shards, _ in parts(gpt, layout))
    buckets = 4 if W > 1 and layout == Layout() else 0  # DDP's; all other layouts are FSDP2's
    return sum(n / shards * (4 + 4 + 8 + buckets) for n, _, shards, _ in parts(gpt, layout))


def saved_bytes(config, layer):
    """What a block keeps of a sequence for the backward under bf16 autocast, as torch counts it while model.py runs.
    Weights do not count, nor autocast's copies of them.
    """
    block = Block(config, layer).train()
    angles = torch.empty(2, config.block_size, config.qk_rope_head_dim // 2)
    x = torch.randn(1, config.block_size, config.n_embd, requires_grad=True)
    saved = []  # the tensors themselves: alive, no two storages have one address
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x), \
            torch.autocast('cpu', torch.bfloat16):
        block(x, *angles)
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in saved}
    weights = {p.untyped_storage()._cdata for p in block.parameters()}
    copies = sum(2 * p.numel() for name, p in block.named_parameters() if p.dim() > 1 and name != 'mlp.gate.weight')
    return sum(size for address, size in storages.items() if address not in weights) - copies


@lru_cache
def activations(gpt):
    """Of one sequence through all blocks, and where each block keeps its fp32 input and one at a time all the rest."""
    dense = [isinstance(block.mlp, MLP) for block in gpt.blocks()]
    with FakeTensorMode():
        saved = {kind: saved_bytes(gpt.config, dense.index(kind)) for kind in set(dense)}
    inputs = len(dense) * 4 * gpt.config.block_size * gpt.config.n_embd
    return sum(saved[kind] for kind in dense), inputs + max(saved.values())


def memory(gpt, W, layout, sequences, recompute):
    """The peak, with micro-batches of so many sequences: states, copies of weights, activations, the loss."""
    blocks, outside, head = len(gpt.blocks()), sizes(gpt)[2], gpt.lm_head.weight
    n = sum(n for n, *_ in parts(gpt, layout))
    held = sequences * activations(gpt)[recompute]
    if layout.pp > 1:  # the bf16 weights are among the states; DualPipeV: 2P + 1 micro-batches, each of a stage of 2P
        work = 0
        held *= 1 + 1 / (2 * layout.pp)
    elif W > 1 and layout != Layout():  # FSDP2: two blocks' weights in bf16, one's gradients; outside both in fp32
        work = (n - outside) / blocks * (2 * 2 + 4) + outside * (4 + 4)
    else:  # autocast's, in bf16
        work = 2 * n / (blocks if recompute else 1)
    # 2,048 rows of logits in bf16, 512 of them twice in fp32, and the head's gradient
    loss = len(head) * (2048 * 2 + 512 * 2 * 4) + 4 * head.numel()
    return states(gpt, W, layout) + work + held + loss


# -----------------------------------------------------------------------------
# what a rank sends

def ring(n, ranks):
    """Bytes of a ring's all-gather or reduce-scatter of n bytes in all; an all-reduce is both."""
    return n * (ranks - 1) / ranks


def ring_speed(ranks, apart):
    """A ring leaves a machine once for all of its ranks there, and so has the links of all of them."""
    return NVLINK if ranks * apart <= NODE else min(NVLINK, NETWORK * max(1, NODE // apart))


def wire(gpt, W, layout, sequences, micro_batches, recompute=False):
    """Yields of a step (what, bytes that a rank sends, seconds that its link takes)."""
    P, D = layout.pp, W // layout.pp
    for n, outside, shards, apart in parts(gpt, layout):
        if P > 1:  # once: fp32 gradients, bf16 weights
            sent = ring(4 * n, shards) + ring(2 * n, shards)
            yield 'ZeRO-1', sent, sent / ring_speed(shards, apart)
        else:
            # FSDP, each micro-batch: blocks in bf16 forward and backward, the rest in fp32 once, fp32 gradients
            sent = micro_batches * ring(2 * 2 * (n - outside) + 4 * outside + 4 * n, shards)
            yield 'FSDP', sent, sent / ring_speed(shards, apart)
            # DDP and HSDP, once: a shard's fp32 gradients
            replicas = D // apart // shards
            sent = 2 * ring(4 * n / shards, replicas)
            yield 'gradients', sent, sent / ring_speed(replicas, apart * shards)
    config, K = gpt.config, gpt.config.num_experts_per_tok
    numbers = micro_batches * sequences * config.block_size * config.n_embd  # of a state of all tokens
    # bf16 rows to their K experts and back, forward and backward; where recomputed, forward again. A machine sends a
    # row once to each other one (V3 section 3.2.2), of which node-limited routing reaches few (section 2.1.2)
    passes = len(gpt.moe_layers()) / P * (6 if recompute else 4)
    machines = max(1, layout.ep // NODE)
    reached = min(K, machines, config.topk_group if config.n_group > 1 else K)
    sent, far = passes * ring(2 * numbers * K, layout.ep), passes * ring(2 * numbers * reached, machines)
    yield 'experts', sent, max(sent / NVLINK, far / NETWORK)
    # 2P stages hand on fp32 states and gradients at 2P - 1 places, one of which lies within a rank
    sent = 2 * (2 * P - 2) / P * 4 * numbers
    yield 'stages', sent, sent / (NVLINK if W <= NODE else NETWORK)


# -----------------------------------------------------------------------------
# the layout that one would choose

class Plan(NamedTuple):
    layout: Layout
    sequences: int   # in a micro-batch
    recompute: bool  # block by block
    memory: float
    step: float      # seconds
    mfu: float


def predict(model, W, layout, sequences, recompute):
    """The Plan of this layout. What hides behind what: scale/README.md."""
    gpt, P = model.gpt, layout.pp
    micro_batches = model.sequences // (W // P * sequences)
    flops = flops_per_token(gpt) * sequences * gpt.config.block_size / P  # of a micro-batch on a rank
    forward = flops / (PEAK * model.efficiency) / 6  # of one of its 2 stages; as long as each half of the backward
    backward_input = forward * (2 if recompute else 1)
    work = 2 * (forward + backward_input + forward)
    took = Counter()
    for what, _, seconds in wire(gpt, W, layout, sequences, micro_batches, recompute):
        took[what] += seconds
    if P > 1:
        bubble = BUBBLES['DualPipeV'](P, forward, backward_input, forward)
        hidden, rest = took['experts'] + took['stages'], bubble + took['ZeRO-1']
    else:
        hidden, rest = took['FSDP'], took['experts'] + max(0, took['gradients'] - work / 2)
    step = max(micro_batches * work, hidden) + rest
    return Plan(layout, sequences, recompute, memory(gpt, W, layout, sequences, recompute), step,
                micro_batches * flops / step / PEAK)


def layouts(gpt, W, pipelines):
    """Those that the code could run, simple ones first. Rings have no latency here, and so no more than 8 machines."""
    heads = (1 + len(gpt.mtp)) * gpt.lm_head.weight.numel()
    weights = flops_per_token(gpt) / 6
    first = heads + (weights - heads) * (1 - gpt.config.n_layer / len(gpt.blocks()))  # heads and MTP modules, on rank 0
    for P, ep in product((1, 2, 4, 8, 16) if pipelines else (1,), (1, 2, 4, 8, 16, 32, 64)):
        if W % (P * ep) == 0 and gpt.config.n_routed_experts % ep == 0 and (P == 1 or first <= weights / P):
            for shard in (W // P,) if P > 1 else (1, NODE, 8 * NODE):
                if W // P % shard == 0 and (shard < ep or shard % ep == 0) and 2 * P <= gpt.config.n_layer:
                    yield Layout(P, ep, shard)


def choose(model, W, pipelines):
    """The fastest Plan that fits in a GPU, or None; of those within a percent the simplest."""
    best = None
    for layout in layouts(model.gpt, W, pipelines):
        for sequences, recompute in product((60, 30, 16, 12, 8, 4, 2, 1), (False, True)):
            micro_batches, rest = divmod(model.sequences, W // layout.pp * sequences)
            if rest == 0 and micro_batches >= (2 * layout.pp if layout.pp > 1 else 1):
                plan = predict(model, W, layout, sequences, recompute)
                if plan.memory <= MEMORY and (best is None or plan.step < 0.99 * best.step):
                    best = plan
    return best


# -----------------------------------------------------------------------------
# the tables

def table(head, rows):
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in [head, ['---'] * len(head), *rows])


def GB(n):
    return f'{n / 1e9:,.{2 if n < 1e9 else 1 if n < 100e9 else 0}f}'


def active(gpt):
    """Parameters that a token uses, with embedding and head, as V3 counts them."""
    return gpt.get_num_active_params() + gpt.get_num_params(non_embedding=False) - gpt.get_num_params()


def models_table():
    rows = [[name, f'{sum(sizes(gpt)) / 1e9:.2f}B', f'{active(gpt) / 1e9:.2f}B', f'{flops_per_token(gpt) / 1e9:.1f}',
             f'{sequences:,} x {gpt.config.block_size:,}', GB(states(gpt, 1, Layout())),
             *map(GB, activations(gpt))] for name, (gpt, sequences, _) in MODELS.items()]
    return table(['model', 'parameters', 'of which a token uses', 'GFLOP per token', 'tokens of a step',
                  'states, GB', 'activations of a sequence, GB', 'with recomputation, GB'], rows)


def layouts_table(what, cell):
    """cell(model, layout) on 64 ranks."""
    layouts = [Layout(), Layout(shard=64), Layout(shard=8), Layout(ep=8), Layout(ep=8, shard=64), Layout(8, 8, 8)]
    return table([f'GB {what} each of 64 ranks', *(layout.name(64) for layout in layouts)],
                 [[name, *(GB(cell(model, layout)) for layout in layouts)] for name, model in MODELS.items()])


def sent(model, layout):
    return sum(n for _, n, _ in wire(model.gpt, 64, layout, 1, model.sequences // (64 // layout.pp)))


def choice_table():
    v3, T = MODELS['V3'], MODELS['V3'].gpt.config.block_size
    rows = []
    for (name, model), W in product(MODELS.items(), (1, 8, 64, 2048)):
        plans = dict.fromkeys(choose(model, W, pipelines) for pipelines in (False, True))
        rows += [plan_row(name, W, plan) for plan in plans if plan]
        if not any(plans):
            reason = 'none fits' if model.sequences % W == 0 else f'{model.sequences:,} sequences do not divide'
            rows.append([name, f'{W:,}', reason, '', '', '', ''])
    # V3's own layout (section 3.2), and its 180K GPU hours for a trillion tokens (section 1)
    rows += [plan_row('V3', 2048, predict(v3, 2048, Layout(16, 64, 128), 1, recompute)) for recompute in (False, True)]
    speed = 2048 * 1e12 / (180e3 * 3600)
    rows.append(['V3, published', '2,048', 'PP 16, EP 64, ZeRO-1', f'? x {T:,}', 'fits in 80',
                 f'{speed * flops_per_token(v3.gpt) / 2048 / PEAK:.0%}', f'{speed:,.0f}'])
    return table(['model', 'GPUs', 'layout', 'micro-batch', 'GB', 'MFU', 'tokens/s'], rows)


def plan_row(name, W, plan):
    model = MODELS[name]
    T = model.gpt.config.block_size
    return [name, f'{W:,}', plan.layout.name(W), f'{plan.sequences} x {T:,}{", recomputed" * plan.recompute}',
            GB(plan.memory), f'{plan.mfu:.0%}', f'{model.sequences * T / plan.step:,.0f}']


def bubble_table():
    rows, times = [], block_times()
    for P, (schedule, formula) in product((4, 8, 16), BUBBLES.items()):
        M = 4 * P
        equal, step = (simulate(schedule, P, M, *each)[0] for each in ((1, 1, 1), times))
        lost = step - 2 * M * sum(times)
        rows.append([P, schedule, f'{equal - 2 * M * 3:g}', formula(P, 1, 1, 1), f'{lost * 1000:,.0f}',
                     f'{lost / step:.0%}'])
    measured = ', '.join(f'{kind} = {t * 1000:.0f}' for kind, t in zip('FIW', times))
    return table(['P', 'schedule', 'bubble, F = I = W = 1', 'by formula', f'bubble in ms, {measured}', 'of the step'],
                 rows)


TABLES = {'models': models_table, 'choice': choice_table, 'bubbles': bubble_table,
          'memory': lambda: layouts_table('of states on', lambda model, layout: states(model.gpt, 64, layout)),
          'wire': lambda: layouts_table('sent in a step by', sent)}


def filled(text):
    """A page whose tables, each between its two comments, are those of this file."""
    return re.sub(r'(<!-- (\w+) -->\n).*?(<!-- end -->)', lambda m: f'{m[1]}{TABLES[m[2]]()}\n{m[3]}', text, flags=re.S)


if __name__ == '__main__':
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    page = root / 'scale/README.md'
    page.write_text(filled(page.read_text(encoding='utf-8')), encoding='utf-8')
