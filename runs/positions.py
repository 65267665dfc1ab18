"""
Draws the loss by position in the context, to show what YaRN does for a model that was trained on short ones.

    python runs/positions.py out-short out-long [--data=pydocs_char] [--length=1024] [--windows=24] [--out=PNG]

A checkpoint with a context shorter than --length is drawn twice: as it is, and with YaRN but without training.
"""

import argparse
import math
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import configurator  # noqa: F401 (a mistake is one line and exit code 2)

# isort: split
import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

from extras.guard import need
from extras.scripts import open_checkpoint
from model import Mistake, first_line


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

path = os.path.join(ROOT, 'data', args.data, 'val.bin')
need(args.length > 0 and args.length % 32 == 0 and args.windows > 0,
     '--length must be a multiple of 32, --windows positive')
need(os.path.isfile(path), f'{path} is missing: run python data/{args.data}/prepare.py first')
need(os.path.getsize(path) % 2 == 0 and os.path.getsize(path) // 2 > args.length,
     f'{path} holds too few tokens for --length={args.length}, or is cut short')
tokens = np.memmap(path, dtype=np.uint16, mode='r')
need(args.windows <= len(tokens), f'--windows={args.windows}: {path} has {len(tokens)} tokens')
starts = np.linspace(0, len(tokens) - args.length - 1, args.windows).astype(int)
rows = torch.from_numpy(np.stack([tokens[i:i + args.length + 1] for i in starts]).astype(np.int64))  # (n, T + 1)

fig = Figure(figsize=(9, 4.5), layout='constrained')
ax = fig.subplots()
kinds = sorted(fig.canvas.get_supported_filetypes())
need(os.path.splitext(args.out)[1][1:].lower() in kinds, f'--out={args.out} must end in one of .{", .".join(kinds)}')
need(os.path.isdir(os.path.dirname(args.out) or '.'), f'--out={args.out}: there is no folder for it')
for out_dir in args.out_dirs:
    path, model, _ = open_checkpoint(out_dir)
    config = model.config
    trained = config.block_size
    need(rows.max() < config.vocab_size, f'{path} was not trained on {args.data}, which holds the token {rows.max()}')
    ways = {f'{out_dir}: trained at {trained}': {'block_size': max(trained, args.length)}}
    if trained < args.length:
        ways[f'{out_dir}: the same with YaRN, untrained'] = {
            'block_size': args.length, 'rope_factor': math.ceil(args.length / trained)}
    for label, overrides in ways.items():
        model = open_checkpoint(out_dir, **overrides)[1]
        losses = losses_by_position(model.eval(), rows).view(-1, 32).mean(dim=1)                 # (T / 32,)
        parts = ', '.join(f'{part.mean():.3f}' for part in losses.chunk(4))
        print(f'{label}: mean loss in each quarter of the context: {parts}')
        ax.plot(np.arange(len(losses)) * 32 + 16, losses, label=label)
ax.set(xlabel='position', ylabel='loss (nats per token)')
ax.grid(alpha=0.3)
ax.legend()
try:
    fig.savefig(args.out, dpi=130)
except (OSError, RuntimeError) as e:  # no such folder; a format whose program is missing
    raise Mistake(f'--out={args.out} cannot be written: {first_line(e)}') from None
print(f'wrote {args.out}')
