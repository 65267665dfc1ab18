"""
Draws the log.jsonl of one or several runs: losses, tokens per second, and the balance of the experts; of grpo.py's
runs the accuracy on held-out prompts and what is logged of each batch.

    python plot.py out-demo/log.jsonl [out-other/log.jsonl ...] [--out=PNG]
    python plot.py out-fp8-*/log.jsonl --relative_to out-bf16-*/log.jsonl

The second draws by how much the smoothed training loss of each run differs from that of the run with its seed.
"""

import argparse
import json
import os
import sys


def stop(message):
    """A mistake of the user's: one line, and exit code 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


def read_log(path):
    """The header, the training records and the evaluation records of a log, in the order of their steps.

    A resumed run writes its steps again from the last checkpoint on: the later record counts.
    """
    header, train, evals = {}, {}, {}
    try:
        with open(path, encoding='utf-8') as f:
            for line in f:
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # the last line of a run that was killed
                    continue
                if type(record) is not dict:
                    continue
                if 'command' in record:
                    header = record
                elif 'val_loss' in record or 'val_accuracy' in record or 'test_accuracy' in record:
                    evals[record['step']] = record
                elif 'loss' in record or 'reward' in record:
                    train[record['step']] = record
    except OSError as e:
        stop(f'{path}: {e.strerror}')
    except UnicodeDecodeError:
        stop(f'{path}: not UTF-8 text')
    if not train and not evals:
        stop(f'{path}: no records in it')
    return header, [train[k] for k in sorted(train)], [evals[k] for k in sorted(evals)]


def draw_losses(plt, logs):
    fig, (loss_ax, speed_ax, balance_ax) = plt.subplots(1, 3, figsize=(15, 4.5), layout='constrained')
    for i, (name, train, evals) in enumerate(logs):
        color = f'C{i}'

        def curve(ax, records, value, color=color, **style):
            if records:
                ax.plot([r['step'] for r in records], [value(r) for r in records], color=color, **style)

        curve(loss_ax, train, lambda r: r['loss'], alpha=0.35, linewidth=0.8, label=f'{name}: main, training batches')
        for k in range(len(train[0]['mtp_losses']) if train else 0):
            curve(loss_ax, train, lambda r, k=k: r['mtp_losses'][k], alpha=0.35, linewidth=0.8,
                  linestyle=(':', '--', '-.')[k % 3], label=f'{name}: MTP module {k + 1}')
        curve(loss_ax, evals, lambda r: r['train_loss'], linestyle='--', marker='.', label=f'{name}: train')
        curve(loss_ax, evals, lambda r: r['val_loss'], marker='o', markersize=4, label=f'{name}: val')
        curve(speed_ax, train, lambda r: r['tokens_per_s'], linewidth=0.8, label=name)
        routed = [r for r in train if 'max_vio' in r]
        curve(balance_ax, routed, lambda r: sum(r['max_vio']) / len(r['max_vio']), label=f'{name}: mean over layers')
        curve(balance_ax, routed, lambda r: max(r['max_vio']), alpha=0.35, linewidth=0.8, label=f'{name}: worst layer')
    loss_ax.set(xlabel='step', ylabel='loss (nats per token)', title='loss')
    speed_ax.set(xlabel='step', ylabel='tokens / s', title='speed', ylim=(0, None))
    balance_ax.set(xlabel='step', ylabel='max load / mean load - 1', title='balance (MaxVio)', ylim=(0, None))
    return fig


def draw_rewards(plt, logs):
    fig, axes = plt.subplots(2, 5, figsize=(20, 7), layout='constrained')
    panels = [('length', 'tokens', 'response length'), ('reward', 'mean', 'reward'),
              ('accuracy', 'share', 'right answers (sampled)'), ('format', 'share', 'well-formed responses'),
              ('zero_advantage', 'share', 'groups of equal rewards'), ('entropy', 'nats per token', 'entropy'),
              ('kl', 'nats per token', 'KL from the reference'), ('clip', 'share', 'tokens whose gradient was clipped'),
              ('tokens_per_s', 'response tokens / s', 'speed')]
    held_out = axes.flat[0]
    for i, (name, train, evals) in enumerate(logs):
        accuracy = [r.get('val_accuracy', r.get('test_accuracy')) for r in evals]
        if train:
            held_out.plot([r['seconds'] for r in evals], accuracy, color=f'C{i}', marker='o', markersize=4, label=name)
        elif evals:  # a run of grpo.py --eval_only=True
            held_out.axhline(accuracy[-1], color=f'C{i}', linestyle='--', label=name)
        for ax, (key, _, _) in zip(axes.flat[1:], panels):
            if train:
                ax.plot([r['step'] for r in train], [r[key] for r in train], color=f'C{i}', linewidth=0.8, label=name)
    held_out.set(xlabel='seconds of sampling and training', ylabel='share', ylim=(0, 1),
                 title='right answers to held-out prompts (greedy)')
    for ax, (_, unit, title) in zip(axes.flat[1:], panels):
        ax.set(xlabel='iteration', ylabel=unit, title=title)
    return fig


def smoothed(train, decay=0.98):
    """The training loss as an exponential moving average over steps, begun at its first value."""
    losses = [r['loss'] for r in train]
    out = losses[:1]
    for loss in losses[1:]:
        out.append(decay * out[-1] + (1 - decay) * loss)
    return out


def draw_relative(plt, logs, bases, skip=100):
    """The first `skip` steps, where losses fall fast, are not counted."""
    fig, ax = plt.subplots(figsize=(9, 4.5), layout='constrained')
    print(f'smoothed loss from step {skip} on, against the run with the same seed: largest and mean difference')
    seeds = {}
    for name, train, _, header in logs:
        seed, steps = header['config']['seed'], [r['step'] for r in train]
        base = [records for _, records, _, other in bases if other['config']['seed'] == seed]
        if len(base) != 1 or [r['step'] for r in base[0]] != steps or len(steps) <= skip:
            stop(f'{name}: exactly one log of --relative_to must have its seed, {seed}, and its steps')
        difference = [100 * (a / b - 1) for a, b in zip(smoothed(train), smoothed(base[0]))][skip:]
        mean = sum(difference) / len(difference)
        print(f'{name}: {max(map(abs, difference)):.2f}%, {mean:+.2f}%')
        kind = name.removesuffix(f'-{seed}')  # runs that differ by their seed alone have one colour
        color = f'C{seeds.setdefault(kind, len(seeds))}'
        ax.plot(steps[skip:], difference, color=color, linewidth=0.9, label=name)
    for bound in (-0.25, 0.25):
        ax.axhline(bound, color='black', linestyle=':', linewidth=0.8)
    ax.set(xlabel='step', ylabel='difference of the smoothed loss (%)', title='training loss, relative')
    return fig


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,  # the docstring has it
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('logs', nargs='+', metavar='log.jsonl')
    parser.add_argument('--relative_to', nargs='+', default=[], metavar='log.jsonl',
                        help='runs to compare those above with')
    parser.add_argument('--out', metavar='PNG', help='default: log.png beside the first log')
    args = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        stop('plot.py needs matplotlib: pip install matplotlib')
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    def read(path):
        header, train, evals = read_log(path)
        return os.path.basename(os.path.dirname(os.path.abspath(path))), train, evals, header

    logs = [read(path) for path in args.logs]
    bases = [read(path) for path in args.relative_to]
    rewarded = ['loss' not in (train + evals)[0] and 'val_loss' not in (train + evals)[0]
                for _, train, evals, _ in logs + bases]
    if any(rewarded) and not all(rewarded):
        stop('logs of train.py and of grpo.py are drawn apart')
    if bases and rewarded[0]:
        stop('--relative_to compares losses, and these are logs of grpo.py')
    if bases:
        fig = draw_relative(plt, logs, bases)
    else:
        fig = (draw_rewards if rewarded[0] else draw_losses)(plt, [log[:3] for log in logs])
    for ax in fig.axes:
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(fontsize=7)
    out = args.out or os.path.join(os.path.dirname(args.logs[0]), 'log.png')
    fig.savefig(out, dpi=130)
    print(f'wrote {out}')


if __name__ == '__main__':
    main()
