"""
Draws the log.jsonl of one or several runs: losses, the balance of the experts, rate, gradient norm and speed; for runs
of grpo.py the accuracy on held-out prompts and the figures of each batch.

    python plot.py out-demo [out-other ...] [--out=PNG]        # folders, or their log.jsonl
    python plot.py out-char out-bpe --x=seconds --y=bpb --smooth=0.9 --names=characters,BPE
    python plot.py out-fp8-* --relative_to out-bf16-*

--x: iterations, seconds of training (without evaluations), tokens, or the FLOPs of these tokens. --y=bpb: bits per byte
of the validation text, to compare runs with different tokens. --smooth: the decay of a moving average of the training
batches' losses. --relative_to draws how much each run's smoothed training loss differs from the loss of the named run
with the same seed.
"""

import argparse
import bisect
import io
import itertools
import json
import math
import os

from configurator import mistake, need  # whose import makes a mistake one line and exit code 2
from extras import output


def number(record, key):
    """A number of a record; nan, which leaves a gap in the curve, if it is missing or cannot be drawn"""
    value = record.get(key)
    return float(value) if type(value) in (int, float) and abs(value) < 1e300 else math.nan


def numbers(record, key):
    """A list of numbers of a record; [] if it is missing or no list"""
    value = record.get(key)
    return [number({key: x}, key) for x in value] if type(value) is list else []


def held_out(record):
    """grpo.py's accuracy on held-out prompts, of either split; nan in other records."""
    return number(record, 'val_accuracy' if 'val_accuracy' in record else 'test_accuracy')


def known(values):
    return any(not math.isnan(value) for value in values)


def read_log(path):
    """The header, the training records and the evaluation records of a log, in the order of their steps.

    A resumed run writes its steps again from the last checkpoint on: the later record counts.
    """
    header, train, evals = {}, {}, {}
    with open(path, encoding='utf-8', errors='replace') as f:
        for n, line in enumerate(f, 1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # the last line of a run that was killed
                continue
            if type(record) is not dict:
                continue
            if 'step' not in record and {'command', 'config'} & set(record):
                header = record
                continue
            records = (evals if {'val_loss', 'val_accuracy', 'test_accuracy'} & set(record) else
                       train if {'loss', 'reward'} & set(record) else None)
            if records is None:
                continue
            need(type(record.get('step')) is int and number(record, 'step') >= 0,
                 f'{path}, line {n}: a record needs a step, a whole number from 0 on')
            records[record['step']] = record | {'header': header}  # a resume may change the batch
    need(train or evals, f'{path}: no records in it')
    return header, [train[k] for k in sorted(train)], [evals[k] for k in sorted(evals)]


def limit_to_the_end(ax, skip=0.1):
    """Fit the y axis to the curves without the first tenth of the steps: a loss falls fast from about 11 there."""
    points = [point for line in ax.lines for point in line.get_xydata()]
    last = max((step for step, _ in points), default=0)
    values = [y for step, y in points if step >= skip * last and not math.isnan(y)]
    if values and min(values) < max(values):
        margin = 0.05 * (max(values) - min(values))
        ax.set_ylim(min(values) - margin, max(values) + margin)


def tokens_per_iteration(record):
    config = record['header'].get('config')
    sizes = [number(config if type(config) is dict else {}, key)
             for key in ('gradient_accumulation_steps', 'batch_size', 'block_size')]
    return math.prod(sizes)


def cost(record, unit):
    """What an iteration took at this training record: tokens, seconds, or the FLOPs of its tokens; nan if unknown"""
    tokens = tokens_per_iteration(record)
    if unit == 'seconds':
        return tokens / (number(record, 'tokens_per_s') or math.nan)
    return tokens * (number(record['header'], 'flops_per_token') if unit == 'flops' else 1)


def places(name, train, unit):
    """-> a function: a number of iterations -> its place on the x axis"""
    if unit == 'iterations':
        return lambda n: n
    need(train, f'{name}: no training records in its log, so --x={unit} is not known')
    done, spent = [0], [0.0]
    for record in train:
        each = cost(record, unit)
        need(each < math.inf, f'{name}: its log does not say the {unit} of step {record["step"]}: leave out --x={unit}')
        spent.append(spent[-1] + (record['step'] + 1 - done[-1]) * each)
        done.append(record['step'] + 1)

    def place(n):
        i = min(max(1, bisect.bisect_left(done, n)), len(done) - 1)  # behind the last record at its speed
        return spent[i] + (n - done[i]) * (spent[i] - spent[i - 1]) / (done[i] - done[i - 1])

    return place


def per_byte(name, evals):
    """Bits per byte for a nat per token, by the log's own figures for the validation text"""
    pairs = [(number(r, 'val_bpb'), number(r, 'val_loss')) for r in evals]
    ratios = [bits / nats for bits, nats in pairs if bits > 0 and nats > 0]
    need(ratios, f'{name}: its log has no val_bpb: prepare its data set again, which counts the bytes, and train anew '
         "(GPT-2's tokens have no meta.pkl to keep them)")
    return ratios[-1]


def draw_losses(plt, logs, x='iterations', y='nats', smooth=0.0):
    """A panel for whatever one of the runs logged at least; for several runs, one legend with their names."""
    indexed = any(known(number(r, 'index_loss') for r in train) for _, train, _ in logs)  # of DSA or CSA
    fig, axes = plt.subplots(2, 3 + indexed, figsize=(15 + 5 * indexed, 8), layout='constrained')
    loss_ax, modules_ax, balance_ax, lr_ax, norm_ax, speed_ax, *more = axes.flat
    for i, (name, train, evals) in enumerate(logs):
        place, scale = places(name, train, x), per_byte(name, evals) if y == 'bpb' else 1.0

        def curve(ax, records, values, color=f'C{i}', linewidth=0.9, after=1, place=place, **style):
            if known(values):  # a training record is one iteration further than an evaluation of its step
                after = 0 if x == 'iterations' else after
                ax.plot([place(r['step'] + after) for r in records], values, color=color, linewidth=linewidth, **style)

        def scaled(records, key, scale=scale):
            return [scale * number(r, key) for r in records]

        main = [number(r, 'loss') for r in train]
        curve(loss_ax, train, [scale * loss for loss in smoothed(train, smooth)], alpha=0.4, label='training batches')
        curve(loss_ax, evals, scaled(evals, 'train_loss'), linewidth=1.5, linestyle='--', marker='.', label='train',
              after=0)
        curve(loss_ax, evals, scaled(evals, 'val_loss'), linewidth=1.5, marker='o', markersize=4, label='val', after=0)
        # one batch's losses rise and fall together: their differences show what the losses themselves would hide
        modules = [numbers(r, 'mtp_losses') for r in train]
        for k in range(max(map(len, modules), default=0)):
            above = [losses[k] - loss if k < len(losses) else math.nan for losses, loss in zip(modules, main)]
            curve(modules_ax, train, above, color=f'C{k + 1}' if len(logs) == 1 else f'C{i}',
                  linestyle=('-', '--', ':', '-.')[k % 4], label=f'MTP {k + 1}')
        routed = [r for r in train if numbers(r, 'max_vio')]
        layers = [numbers(r, 'max_vio') for r in routed]
        curve(balance_ax, routed, [sum(vio) / len(vio) for vio in layers], linewidth=1.5, label='mean over layers')
        curve(balance_ax, routed, [max(vio) for vio in layers], alpha=0.4, label='worst layer')
        for ax, key in zip((lr_ax, norm_ax, speed_ax, *more), ('lr', 'grad_norm', 'tokens_per_s', 'index_loss')):
            curve(ax, train, [number(r, key) for r in train])
    loss_ax.set(ylabel='bits per byte' if y == 'bpb' else 'nats per token', title='loss of the main model')
    limit_to_the_end(loss_ax)
    modules_ax.set(ylabel='loss less the main loss (nats)', title='MTP modules against the main model')
    if modules_ax.lines:
        modules_ax.axhline(0, color='black', linewidth=0.8, label='main')
    balance_ax.set(ylabel='max load / mean load - 1', title='balance (MaxVio)', ylim=(0, None))
    lr_ax.set(title='learning rate', ylim=(0, None))
    norm_ax.set(title='gradient norm, before clipping', ylim=(0, None))
    speed_ax.set(ylabel='tokens / s', title='speed', ylim=(0, None))
    if indexed:
        more[0].set(ylabel='nats per token', title='KL of the indexers from the attention', ylim=(0, None))
    for ax in axes.flat:
        ax.set_xlabel('seconds of training' if x == 'seconds' else x)
        if not ax.lines:
            ax.remove()
            continue
        kinds = {}  # each kind of line once, in the first run's colour
        for line in ax.lines:
            if not line.get_label().startswith('_'):
                kinds.setdefault(line.get_label(), line)
        if kinds:
            ax.legend(handles=[*kinds.values()], fontsize=7)
    if len(logs) > 1:
        lines = [plt.Line2D([], [], color=f'C{i}', label=name) for i, (name, *_) in enumerate(logs)]
        fig.legend(handles=lines, loc='outside lower center', ncols=min(6, len(logs)))
    return fig


def draw_rewards(plt, logs):
    """A panel for whatever was computed in one of the runs at least, and one legend for all."""
    share, positive = (0, 1.02), (0, None)  # the range of an axis
    panels = [('length', 'tokens', 'response length', positive), ('reward', 'mean', 'reward', (None, None)),
              ('accuracy', 'share', 'right answers (sampled)', share),
              ('format', 'share', 'well-formed responses', share),
              ('zero_advantage', 'share', 'groups of equal rewards', share),
              ('entropy', 'nats per token', 'entropy', positive),
              ('cut', 'share', 'responses that were cut off', positive),
              ('kl', 'nats per token', 'KL from the reference', positive),
              ('teacher_kl', 'nats per token', 'KL from the teacher', positive),
              ('clip', 'share', 'tokens with a clipped gradient', positive),
              ('mismatch', 'nats per token', 'rollout against training', positive),
              ('routing_mismatch', 'share', 'other experts than in the rollout', positive),
              ('drifted', 'share', 'tokens left out by mask_drift', positive),
              ('mtp_loss', 'nats per token', 'MTP modules', positive),
              ('tokens_per_s', 'response tokens / s', 'speed', positive)]
    panels = [panel for panel in panels if known(number(r, panel[0]) for _, train, _ in logs for r in train)]
    rows = 1 + (len(panels) > 2) + (len(panels) > 9)
    columns = math.ceil((1 + len(panels)) / rows)
    fig, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3.5 * rows), layout='constrained', squeeze=False)
    first, *others = axes.flat
    lines = []
    for i, (name, train, evals) in enumerate(logs):
        accuracy, color = [held_out(r) for r in evals], f'C{i}'
        if train:
            lines += first.plot([number(r, 'seconds') for r in evals], accuracy, color=color, marker='o', markersize=4,
                                label=name)
        elif evals:  # a run of grpo.py --eval_only=True
            lines.append(first.axhline(accuracy[-1], color=color, linestyle='--', label=name))
        for ax, (key, *_) in zip(others, panels):
            if train:
                ax.plot([r['step'] for r in train], [number(r, key) for r in train], color=color, linewidth=0.8)
    first.set(xlabel='seconds of sampling and training', ylabel='share', ylim=share)
    first.set_title('right answers, held out (greedy)', fontsize='medium')
    for ax, (_, unit, title, limits) in zip(others, panels):
        ax.set(xlabel='iteration', ylabel=unit, ylim=limits)
        ax.set_title(title, fontsize='medium')
    for ax in others[len(panels):]:
        ax.remove()
    fig.legend(handles=lines, loc='outside lower center', ncols=columns)
    return fig


def smoothed(train, decay=0.98):
    """The training loss as an exponential moving average over records, begun at its first value. An unknown loss is a
    gap, and does not count.
    """
    out, mean = [], math.nan
    for loss in (number(r, 'loss') for r in train):
        if not math.isnan(loss):
            mean = loss if math.isnan(mean) else decay * mean + (1 - decay) * loss
        out.append(math.nan if math.isnan(loss) else mean)
    return out


def draw_relative(plt, logs, bases, skip=100):
    """The first `skip` steps, where losses fall fast, are not counted."""
    fig, ax = plt.subplots(figsize=(9, 4.5), layout='constrained')
    print(f'smoothed loss from step {skip} on, against the run with the same seed: largest and mean difference')
    seeds = {}

    def seed_of(header):
        config = header.get('config')
        return config.get('seed') if type(config) is dict else None

    for name, train, _, header in logs:
        seed, steps = seed_of(header), [r['step'] for r in train]
        base = [records for _, records, _, other in bases if seed_of(other) == seed]
        need(len(base) == 1, f'{name}: exactly one log of --relative_to must have its seed, {seed}; {len(base)} have')
        need([r['step'] for r in base[0]] == steps, f'{name}: the log of --relative_to with its seed, {seed}, has '
             'other steps: both runs need the same max_iters and log_interval')
        first = sum(step < skip for step in steps)
        need(first < len(steps),
             f'{name}: it has no step from {skip} on, where the comparison begins: train for longer')
        difference = [100 * (a / (b or math.nan) - 1) for a, b in zip(smoothed(train), smoothed(base[0]))][first:]
        mean = sum(difference) / len(difference)
        print(f'{name}: {max(map(abs, difference)):.2f}%, {mean:+.2f}%')
        kind = name.removesuffix(f'-{seed}')  # runs that differ by their seed alone have one colour
        color = f'C{seeds.setdefault(kind, len(seeds))}'
        ax.plot(steps[first:], difference, color=color, linewidth=0.9, label=name)
    for bound in (-0.25, 0.25):
        ax.axhline(bound, color='black', linestyle=':', linewidth=0.8)
    ax.set(xlabel='step', ylabel='difference of the smoothed loss (%)', title='training loss, relative')
    ax.legend(fontsize=7)
    return fig


def print_losses(name, evals):
    """The last validation loss of a run, and the lowest."""
    if not evals:
        return
    last, best = evals[-1], min(evals, key=lambda r: r['val_loss'])
    per_byte = f' ({last["val_bpb"]:.4f} bits per byte)' if not math.isnan(number(last, 'val_bpb')) else ''
    print(f'{name}: val loss {last["val_loss"]:.4f}{per_byte} at step {last["step"]}, the lowest is '
          f'{best["val_loss"]:.4f} at step {best["step"]}')


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,  # the docstring has it
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('logs', nargs='+', metavar='OUT_DIR', help='a folder with a log.jsonl, or the path of a log')
    parser.add_argument('--relative_to', nargs='+', default=[], metavar='OUT_DIR',
                        help='runs to compare those above with')
    parser.add_argument('--x', choices=('iterations', 'seconds', 'tokens', 'flops'), default='iterations')
    parser.add_argument('--y', choices=('nats', 'bpb'), default='nats', help='per token, or bits per byte')
    parser.add_argument('--smooth', type=float, default=0.0, metavar='DECAY', help='0 (not at all) to below 1')
    parser.add_argument('--names', metavar='A,B', help="the runs' names in the figure, with commas between")
    parser.add_argument('--out', metavar='PNG', help='default: log.png beside the log, or logs.png beside the first')
    args = parser.parse_args()
    names = args.names.split(',') if args.names is not None else []
    need(args.names is None or len(names) == len(args.logs) and all(names),
         f'--names={args.names} must be {len(args.logs)} names, one for each run')
    need(0 <= args.smooth < 1, f'--smooth={args.smooth} must lie in 0..1, below 1')
    import matplotlib
    matplotlib.use('Agg')
    matplotlib.rcParams['text.parse_math'] = False  # a $ in a name begins no formula
    import matplotlib.pyplot as plt

    inputs = []

    def read(path, name=None):
        path = os.path.join(path, 'log.jsonl') if os.path.isdir(path) else path
        inputs.append(path)
        header, train, evals = read_log(path)
        name = os.path.basename(os.path.dirname(os.path.abspath(path))) if name is None else name
        name = os.fsencode(name).decode(errors='replace')
        return name, train, evals, header

    logs = [read(*pair) for pair in itertools.zip_longest(args.logs, names)]
    bases = [read(path) for path in args.relative_to]
    rewarded = ['loss' not in (train + evals)[0] and 'val_loss' not in (train + evals)[0]
                for _, train, evals, _ in logs + bases]
    need(all(rewarded) or not any(rewarded), 'logs of train.py and of grpo.py are drawn apart')
    need(not (bases and rewarded[0]), '--relative_to compares losses, and these are logs of grpo.py')
    axes = args.x, args.y, args.smooth
    need(axes == ('iterations', 'nats', 0) or not (bases or rewarded[0]),
         '--x, --y and --smooth are for the losses of train.py, without --relative_to')
    if bases:
        fig = draw_relative(plt, logs, bases)
    elif rewarded[0]:
        fig = draw_rewards(plt, [log[:3] for log in logs])
    else:
        fig = draw_losses(plt, [log[:3] for log in logs], *axes)
        for name, _, evals, _ in logs:
            print_losses(name, [r for r in evals if not math.isnan(number(r, 'val_loss'))])
    for ax in fig.axes:
        ax.grid(alpha=0.3)
    first = args.logs[0] if os.path.isdir(args.logs[0]) else os.path.dirname(args.logs[0])
    default = os.path.join(first, 'log.png' if len(logs + bases) == 1 else 'logs.png')
    out = default if args.out is None else args.out
    kinds = sorted(fig.canvas.get_supported_filetypes())
    kind = os.path.splitext(out)[1][1:].lower()
    need(kind in kinds, f'--out={out} must end in one of .{", .".join(kinds)}')
    mark = {'metadata': {'Creator': output.MARK}} if kind in ('eps', 'pdf', 'png', 'ps', 'svg') else {}
    drawn = io.BytesIO()
    try:
        fig.savefig(drawn, format=kind, dpi=130, **mark)
    except (OSError, RuntimeError) as e:  # a format whose program is missing
        raise mistake(f'--out={out} cannot be written: {e}') from None
    output.write(out, drawn.getvalue(), inputs)
    print(f'wrote {out}')


if __name__ == '__main__':
    main()
