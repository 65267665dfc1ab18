"""
Draws the loss by position in the context, to show what YaRN does for a model that was trained on short ones.

    python runs/positions.py out-short out-long [--data=pydocs_char] [--length=1024] [--windows=24] [--out=PNG]

A checkpoint with a context shorter than --length is drawn twice: as it is, and with YaRN but without training.
"""

import signal

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback

import argparse
import math
import os

import numpy as np
import torch
from torch.nn import functional as F

from common import stop
from model import GPT, first_line

try:
    import matplotlib
except ImportError:
    stop('runs/positions.py needs matplotlib: pip install matplotlib')
matplotlib.use('Agg')
import matplotlib.pyplot as plt


def losses_by_position(model, rows):
    """rows (n, T + 1) -> (T,): the mean loss of the token that follows each position."""
    total = torch.zeros(rows.size(1) - 1)
    with torch.no_grad():
        for row in rows.split(1):
            logits, _ = model(row[:, :-1], row[:, 1:])
            total += F.cross_entropy(logits[0].float(), row[0, 1:], reduction='none')
    return total / len(rows)


parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,  # the docstring has it
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('out_dirs', nargs='+', metavar='out_dir')
parser.add_argument('--data', default='pydocs_char')
parser.add_argument('--length', type=int, default=1024)
parser.add_argument('--windows', type=int, default=24, help='pieces of the validation data')
parser.add_argument('--out', metavar='PNG', default='positions.png')
args = parser.parse_args()

folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data', args.data)
path = os.path.join(folder, 'val.bin')
if args.length <= 0 or args.length % 32 != 0 or args.windows <= 0:
    stop('--length must be a multiple of 32, --windows positive')
if not os.path.isfile(path):
    stop(f'{path} is missing: run python data/{args.data}/prepare.py first')
if os.path.getsize(path) % 2 != 0 or os.path.getsize(path) // 2 <= args.length:
    stop(f'{path} holds too few tokens for --length={args.length}, or is cut short')
tokens = np.memmap(path, dtype=np.uint16, mode='r')
if args.windows > len(tokens):
    stop(f'--windows={args.windows}: {path} has {len(tokens)} tokens')
starts = np.linspace(0, len(tokens) - args.length - 1, args.windows).astype(int)
rows = torch.from_numpy(np.stack([tokens[i:i + args.length + 1] for i in starts]).astype(np.int64))  # (n, T + 1)

fig, ax = plt.subplots(figsize=(9, 4.5), layout='constrained')
kinds = sorted(fig.canvas.get_supported_filetypes())
if os.path.splitext(args.out)[1][1:].lower() not in kinds:
    stop(f'--out={args.out} must end in one of .{", .".join(kinds)}')
if not os.path.isdir(os.path.dirname(args.out) or '.'):
    stop(f'--out={args.out}: there is no folder {os.path.dirname(args.out)}')
for out_dir in args.out_dirs:
    path = os.path.join(out_dir, 'ckpt.pt')
    try:
        config = GPT.from_checkpoint(path)[0].config
        trained = config.block_size
        if rows.max() >= config.vocab_size:
            stop(f'{path} was not trained on {args.data}, which holds the token {rows.max()}')
        ways = {f'{out_dir}: trained at {trained}': {'block_size': max(trained, args.length)}}
        if trained < args.length:
            ways[f'{out_dir}: the same with YaRN, untrained'] = {
                'block_size': args.length, 'rope_factor': math.ceil(args.length / trained)}
        for label, overrides in ways.items():
            model, _ = GPT.from_checkpoint(path, **overrides)
            losses = losses_by_position(model.eval(), rows).view(-1, 32).mean(dim=1)                 # (T / 32,)
            parts = ', '.join(f'{part.mean():.3f}' for part in losses.chunk(4))
            print(f'{label}: mean loss in each quarter of the context: {parts}')
            ax.plot(np.arange(len(losses)) * 32 + 16, losses, label=label)
    except ValueError as e:
        stop(str(e))
ax.set(xlabel='position', ylabel='loss (nats per token)')
ax.grid(alpha=0.3)
ax.legend()
try:
    fig.savefig(args.out, dpi=130)
except (OSError, RuntimeError) as e:
    stop(f'--out={args.out} cannot be written: {first_line(e)}')
print(f'wrote {args.out}')
