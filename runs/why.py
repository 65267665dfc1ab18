"""
README's first figure: validation loss against seconds of nanoGPT's laptop command, in a nanoGPT clone and here, and of
the speedrun; one after the other on one machine, about six minutes on two cores. Both need their shakespeare_char data.

    python runs/why.py NANOGPT_CLONE [--out=assets/why.png]
"""

import argparse
import os
import re
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from configurator import mistake  # whose import makes a mistake one line and exit code 2

# isort: split
from matplotlib.figure import Figure

LAPTOP = ('config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 '
          '--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 '
          '--dropout=0.0')
SPEEDRUN = 'config/speedrun_shakespeare_char.py --out_dir=out-why-speedrun'
LONGER = '--n_layer=3 --n_head=3 --n_embd=96 --learning_rate=1e-2 --max_iters=1450 --lr_decay_iters=1450'


def evaluations(folder, flags):
    """[(seconds since the command was given, iteration, val loss)], without that of the untrained model."""
    start, found = time.time(), []
    run = subprocess.Popen([sys.executable, '-u', 'train.py', *flags.split()], cwd=folder, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in run.stdout:
        step = re.match(r'step (\d+): train loss \S+, val loss (\S+)', line)
        if step and int(step[1]) > 0:
            found.append((time.time() - start, int(step[1]), float(step[2])))
            print(f'{folder} {flags.split()[0]}: {found[-1][0]:.1f} s, iteration {step[1]}, val loss {step[2]}')
    if run.wait() != 0:
        raise mistake(f'train.py {flags} ended with code {run.returncode} in {folder}')
    return found


parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,  # the docstring has it
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('nanogpt', help='a nanoGPT clone with its own train.py and model.py')
parser.add_argument('--out', default=os.path.join(ROOT, 'assets', 'why.png'))
args = parser.parse_args()
theirs = evaluations(args.nanogpt, LAPTOP)
speedrun = [evaluations(ROOT, flags)[-1] for flags in (SPEEDRUN, f'{SPEEDRUN} {LONGER}')]
ours = evaluations(ROOT, f'{LAPTOP} --out_dir=out-why')

fig = Figure(figsize=(8, 4.2), layout='constrained')
ax = fig.subplots()
for label, found, style in (('nanoGPT, its laptop command', theirs, 's--'),
                            ('this repository, the same command', ours, 'o-'),
                            ('this repository, the speedrun (340 and 1,450 iterations)', speedrun, 'D')):
    ax.plot([seconds for seconds, _, _ in found], [loss for _, _, loss in found], style, label=label, markersize=5)
ax.axhline(theirs[-1][2], color='black', linewidth=0.8, linestyle=':')
ax.set(xlabel='seconds from the command, evaluations included', ylabel='validation loss',
       title='tiny Shakespeare in characters, two CPU cores', xlim=(0, None))
ax.grid(alpha=0.3)
ax.legend()
fig.savefig(args.out, dpi=130)
print(f'wrote {args.out}')
