"""
A pipeline's step, simulated: 1F1B, ZB-V and DualPipeV on P ranks.

    python scale/schedules.py               # draws assets/scale.png
    python scale/schedules.py --measure     # times a block of the main run here first, into scale/times.json

A model is 2P stages, two on each rank; 1F1B has P stages twice as long. F, I, W: the time of a stage's forward, and of
its backward for the input and for the weights. An action is (kind, stage, micro-batch): kind F, I, W, or B for I and W.
"""

import argparse
import json
import math
import runpy
import sys
import timeit
from pathlib import Path
from types import SimpleNamespace

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))
import configurator  # noqa: F401 (a mistake is one line and exit code 2)

# isort: split
import torch
from torch.distributed.pipelining import schedules

from model import Block, GPTConfig, rope_table

# how much longer than its work a step takes, by the papers: V3 table 2 (1F1B, and DualPipe, whose PP / 2 is P here and
# whose overlapped F&B is taken as the sum), and 2401.10241 section 6 for F = I = W
BUBBLES = {'1F1B': lambda P, F, I, W: 2 * (P - 1) * (F + I + W),
           'ZB-V': lambda P, F, I, W: (P - 1) * F,
           'DualPipeV': lambda P, F, I, W: (P - 1) * (F + 2 * (I + W) - 3 * W)}


def orders(schedule, P, M):
    """Each rank's units in order; a unit is a list of actions, two where they overlap. torch's own, but for 1F1B."""
    if schedule == '1F1B':
        found = []
        for r in range(P):
            ahead = min(M, P - 1 - r)
            forward, backward = ([[(kind, r, m)] for m in range(M)] for kind in 'FB')
            steady = [unit for pair in zip(forward[ahead:], backward) for unit in pair]
            found.append(forward[:ahead] + steady + backward[M - ahead:])
        return found
    kinds = {schedules.FORWARD: 'F', schedules.BACKWARD_INPUT: 'I', schedules.BACKWARD_WEIGHT: 'W',
             schedules.FULL_BACKWARD: 'B'}
    order_of = {'ZB-V': schedules.ScheduleZBVZeroBubble, 'DualPipeV': schedules.ScheduleDualPipeV}[schedule]
    settings = SimpleNamespace(pp_group_size=P, _n_microbatches=M, num_stages=2 * P)
    return [[[(kinds[a.computation_type], a.stage_index, a.microbatch_index) for a in unit.sub_actions or [unit]]
             for unit in order_of._calculate_single_rank_operations(settings, rank) if unit is not None]
            for rank in range(P)]


def simulate(schedule, P, M, F, I, W):
    """Each rank takes its units in order, each as soon as what it needs is there; actions that overlap take the sum.
    -> the step's seconds, [(rank, kind, stage, micro-batch, start, end)]
    """
    stages, long = (P, 2) if schedule == '1F1B' else (2 * P, 1)
    seconds = {'F': long * F, 'I': long * I, 'W': long * W, 'B': long * (I + W)}
    queues, clock, spans = orders(schedule, P, M), [0.0] * P, []
    done = {(kind, outside, m): 0.0 for kind, outside in (('F', -1), ('I', stages)) for m in range(M)}

    def start_of(rank, unit):
        """inf while what other ranks hand on to this unit has no time yet; the rest a rank's own order sees to."""
        needed = [('F', stage - 1, m) if kind == 'F' else ('I', stage + 1, m) for kind, stage, m in unit if kind != 'W']
        return max([clock[rank], *(done.get(need, math.inf) for need in needed)])

    for _ in range(sum(map(len, queues))):  # more rounds than are needed, if no rank waits for ever
        for rank, queue in enumerate(queues):
            while queue and (end := start_of(rank, queue[0])) < math.inf:
                unit = queue.pop(0)
                for action in unit:
                    start, end = end, end + seconds[action[0]]
                    spans.append((rank, *action, start, end))
                done |= {('I' if kind == 'B' else kind, stage, m): end for kind, stage, m in unit}
                clock[rank] = end
    assert not any(queues)
    return max(clock), spans


def main_run():
    """What config/train_deepseek.py sets: all of it, and what of it are fields of GPTConfig."""
    settings = runpy.run_path(str(root / 'config/train_deepseek.py'))
    return settings, {name: settings[name] for name in GPTConfig.__dataclass_fields__ if name in settings}


def block_times():
    """F, I and W of a block of the main run: what measure() wrote."""
    return [json.loads((root / 'scale/times.json').read_text())[kind] for kind in 'FIW']


# -----------------------------------------------------------------------------
# the picture, and the measured times

def draw(path):
    from matplotlib.figure import Figure
    P, M = 4, 10
    colours = {'F': ('#9ecae1', '#4292c6'), 'I': ('#fdd0a2', '#fd8d3c'), 'W': ('#c7e9c0', '#74c476')}
    colours['B'] = colours['I']
    fig = Figure(figsize=(11, 7), layout='constrained')
    axes = fig.subplots(len(BUBBLES), 1)
    for ax, schedule in zip(axes, BUBBLES):
        step, spans = simulate(schedule, P, M, *block_times())
        for rank, kind, stage, m, start, end in spans:
            ax.barh(rank, end - start, left=start, height=0.9, color=colours[kind][stage >= P], edgecolor='white')
            ax.text((start + end) / 2, rank, m, ha='center', va='center', fontsize=6)
        ax.set_title(f'{schedule}: {step:.1f} s, of which a rank works {2 * M * sum(block_times()):.1f}', fontsize=10)
        ax.set(yticks=range(P), ylim=(P - 0.5, -0.5), xlim=(0, step), ylabel='rank')
    axes[-1].set_xlabel('seconds')
    fig.savefig(path, dpi=110)


def measure():
    """Time a block of the main run, 1 x 1,024 tokens, fp32, on this CPU: the fastest of 25."""
    config = GPTConfig(**main_run()[1])
    block, angles = Block(config, config.n_layer - 1).train(), rope_table(config)
    x = torch.randn(1, config.block_size, config.n_embd, requires_grad=True)

    def run(inputs):
        y, _ = block(x, *angles)
        if inputs:
            torch.autograd.grad(y, inputs, torch.ones_like(y))

    F, I, B = (min(timeit.repeat(lambda inputs=inputs: run(inputs), number=1, repeat=25))
               for inputs in ([], [x], [x, *block.parameters()]))
    times = {'F': round(F, 4), 'I': round(I - F, 4), 'W': round(B - I, 4)}
    (root / 'scale/times.json').write_text(json.dumps(times) + '\n')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,  # the docstring has it
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--measure', action='store_true', help='time a block of the main run first')
    if parser.parse_args().measure:
        measure()
    draw(root / 'assets/scale.png')
