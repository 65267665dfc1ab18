"""plot.py and runs/positions.py: what is drawn, and what is refused."""

import json
import os
import signal
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from conftest import ROOT, full_disk, run_inside, tiny_model, writer_to

import plot

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402


def grpo_records(**more):
    batch = dict(reward=0.5, accuracy=0.4, format=1.0, length=20.0, zero_advantage=0.1, clip=0.0, entropy=1.0,
                 tokens_per_s=10.0)
    return ([{'step': i, 'seconds': float(i), **batch, **more} for i in range(4)],
            [{'step': i, 'seconds': float(i), 'val_accuracy': i / 4} for i in (0, 2, 4)])


@pytest.fixture
def log(tmp_path):
    path = tmp_path / 'log.jsonl'
    train, evals = grpo_records()
    path.write_text(''.join(json.dumps(r) + '\n' for r in train + evals))
    return path


@pytest.mark.parametrize('more, panels', [
    ({}, 9), ({'kl': 0.1}, 10), ({'kl': None, 'entropy': None}, 8),
    (dict.fromkeys('cut mismatch routing_mismatch drifted teacher_kl mtp_loss'.split(), 0.1), 15)])
def test_the_figure_of_grpo(more, panels):
    """A panel for what was computed, no other; one legend; titles no wider than their panels."""
    runs = [('first', *grpo_records()), ('second', *grpo_records(**more)), ('only evaluated', [], grpo_records()[1])]
    runs = runs[1:] if panels < 9 else runs
    fig = plot.draw_rewards(plt, runs)
    fig.canvas.draw()
    assert len(fig.axes) == panels
    titles = [ax.get_title() for ax in fig.axes]
    assert ('KL from the reference' in titles) == ('kl' in more and panels > 9)
    assert ('rollout against training' in titles) == ('mismatch' in more)
    assert [text.get_text() for text in fig.legends[0].get_texts()] == [name for name, *_ in runs]
    assert len(fig.legends) == 1 and not any(ax.get_legend() for ax in fig.axes)
    for ax in fig.axes:
        assert ax.lines and ax.title.get_window_extent().width <= ax.bbox.width
        if ax.get_title() != 'reward':                               # which may be negative
            low, high = ax.get_ylim()
            assert low == 0 and (high == 1.02 or ax.get_title() not in (
                'right answers, held out (greedy)', 'right answers (sampled)', 'well-formed responses'))
    plt.close(fig)


def train_records(n=3, every=1, **more):
    return [{'step': every * i, 'loss': 3.0 - i / n, 'lr': 1e-3, 'grad_norm': 1.0 + i, 'tokens_per_s': 9.0, **more}
            for i in range(n)]


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_the_figure_of_training():
    """Main loss, MTP 1 and MTP 2 are told apart, and lr and gradient norm drawn; no panel for what was not logged."""
    more = {'mtp_losses': [4.0, 1.0], 'max_vio': [0.5, 1.5]}
    runs = [('a', train_records(**more), [{'step': 0, 'train_loss': 3.0, 'val_loss': 3.5}]), ('b', train_records(), [])]
    titles = ['loss of the main model', 'MTP modules against the main model', 'balance (MaxVio)', 'learning rate',
              'gradient norm, before clipping', 'speed']
    for logs, missing in ((runs[:1], []), (runs, []), (runs[1:], titles[1:3])):
        fig = plot.draw_losses(plt, logs)
        panels = {ax.get_title(): ax for ax in fig.axes}
        assert list(panels) == [title for title in titles if title not in missing]
        assert list(panels['gradient norm, before clipping'].lines[0].get_ydata()) == [1.0, 2.0, 3.0]
        assert list(panels['learning rate'].lines[0].get_ydata()) == [1e-3] * 3
        if not missing:
            first, second, main = panels[titles[1]].lines
            assert list(first.get_ydata()) == pytest.approx([1, 4 / 3, 5 / 3]) and set(main.get_ydata()) == {0}
            assert list(second.get_ydata()) == pytest.approx([-2, -5 / 3, -4 / 3])
            assert first.get_linestyle() != second.get_linestyle()
            assert legend_of(panels[titles[1]]) == ['MTP 1', 'MTP 2', 'main']
            assert legend_of(panels[titles[0]]) == ['training batches', 'train', 'val']
        assert [text.get_text() for legend in fig.legends for text in legend.get_texts()] == (
            ['a', 'b'] if len(logs) == 2 else [])
        plt.close(fig)


def test_the_indexers_have_a_panel_of_their_own():
    fig = plot.draw_losses(plt, [('dense', train_records(), []), ('sparse', train_records(index_loss=0.3), [])])
    titles = [ax.get_title() for ax in fig.axes]
    assert titles == ['loss of the main model', 'learning rate', 'gradient norm, before clipping', 'speed',
                      'KL of the indexers from the attention']
    assert [list(line.get_ydata()) for line in fig.axes[-1].lines] == [[0.3] * 3]
    plt.close(fig)


def write_log(folder, *lines):
    folder.mkdir()
    (folder / 'log.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    return plot.read_log(folder / 'log.jsonl')[1:]


def header(batch_size=2, **more):
    return {'command': '', 'flops_per_token': 100,
            'config': {'gradient_accumulation_steps': 3, 'batch_size': batch_size, 'block_size': 4}, **more}


def test_the_axis_of_x(tmp_path):
    """24 tokens an iteration, then, resumed, 48; a training record counts its own iteration, an evaluation does not."""
    train, evals = write_log(
        tmp_path / 'a', header(), {'step': 0, 'val_loss': 3}, {'step': 1, 'loss': 3, 'tokens_per_s': 12},
        {'step': 3, 'loss': 2, 'tokens_per_s': 24}, header(4), {'step': 4, 'val_loss': 2},
        {'step': 5, 'loss': 1, 'tokens_per_s': 48}, {'step': 8, 'val_loss': 2})
    for x, of_train, of_evals in (('iterations', [1, 3, 5], [0, 4, 8]), ('tokens', [48, 96, 192], [0, 96, 288]),
                                  ('seconds', [4, 6, 8], [0, 6, 10]),
                                  ('flops', [4800, 9600, 19200], [0, 9600, 28800])):
        fig = plot.draw_losses(plt, [('a', train, evals)], x)
        assert [list(line.get_xdata()) for line in fig.axes[0].lines] == [of_train, of_evals]
        assert all(x in ax.get_xlabel() for ax in fig.axes)
        assert list(fig.axes[1].lines[0].get_xdata()) == of_train
    plt.close('all')


def test_the_log_of_two_files_alone(tmp_path):
    """Its header is the config, without a command."""
    own = {'config': header()['config']}
    train, evals = write_log(tmp_path / 'a', own, {'step': 1, 'loss': 3}, {'step': 2, 'val_loss': 3})
    fig = plot.draw_losses(plt, [('a', train, evals)], 'tokens')
    assert [list(line.get_xdata()) for line in fig.axes[0].lines] == [[48], [48]]
    plt.close('all')


def test_bits_per_byte_and_smoothing(tmp_path):
    train, evals = write_log(tmp_path / 'a', header(), {'step': 0, 'loss': 4.0}, {'step': 1, 'loss': None},
                             {'step': 2, 'loss': 2.0}, {'step': 0, 'val_loss': 2.0, 'val_bpb': 3.0, 'train_loss': 1.0})
    loss_ax = plot.draw_losses(plt, [('a', train, evals)], y='bpb', smooth=0.75).axes[0]
    assert [list(line.get_ydata()) for line in loss_ax.lines] == [
        pytest.approx([6.0, float('nan'), 5.25], nan_ok=True), [1.5], [3.0]]
    assert loss_ax.get_ylabel() == 'bits per byte'
    plt.close('all')


@pytest.mark.parametrize('flags, words', [
    (['--x=flops'], 'does not say the flops of step 0'), (['--x=seconds'], 'does not say the seconds of step 0'),
    (['--y=bpb'], 'has no val_bpb'), (['--x=days'], 'invalid choice'), (['--smooth=1'], 'must lie in 0..1'),
    (['--names=a,b'], 'must be 1 names'), (['--names='], 'must be 1 names'),
    (['--x=tokens', '--relative_to', 'a'], 'are for the losses of train.py')])
def test_axes_that_a_log_does_not_have(tmp_path, flags, words):
    write_log(tmp_path / 'a', header() | {'flops_per_token': None}, {'step': 0, 'loss': 1})
    code, _, said = run_inside(ROOT / 'plot.py', 'a', *flags, cwd=tmp_path)
    assert code == 2 and words in said and len(said.splitlines()) == 1
    assert [path.name for path in (tmp_path / 'a').iterdir()] == ['log.jsonl']


def test_the_axis_of_the_loss_shows_the_end_of_the_curve():
    """Not the loss of the first steps, in whose shadow the differences at the end would be flat."""
    train = [{'step': i, 'loss': 11.0 if i < 5 else 3.0 - i / 100} for i in range(101)]
    evals = [{'step': 0, 'val_loss': 11.0}, {'step': 50, 'val_loss': 2.6}, {'step': 100, 'val_loss': 2.2}]
    ax = plot.draw_losses(plt, [('a', train, evals)]).axes[0]
    low, high = ax.get_ylim()
    assert 1.9 < low < 2.0 and 2.9 < high < 3.0
    for few in (train[:1], train[:3], [{'step': 0, 'loss': None}]):         # nothing to leave out
        plot.draw_losses(plt, [('a', few, [])])
    plt.close('all')


def test_a_folder_stands_for_its_log_and_several_logs_leave_each_figure(tmp_path):
    evals = [{'step': step, 'val_loss': loss, 'val_bpb': 2 * loss} for step, loss in ((0, 3.0), (1, 1.5), (2, 2.0))]
    for name, records in (('a', train_records()), ('b', train_records() + evals)):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'log.jsonl').write_text('\n'.join(map(json.dumps, records)))
    assert run_inside(ROOT / 'plot.py', 'a', cwd=tmp_path)[1] == 'wrote a/log.png\n'
    before = (tmp_path / 'a/log.png').read_bytes()
    b = 'b: val loss 2.0000 (4.0000 bits per byte) at step 2, the lowest is 1.5000 at step 1\n'
    assert run_inside(ROOT / 'plot.py', 'a', 'b/log.jsonl', cwd=tmp_path)[1] == b + 'wrote a/logs.png\n'
    assert run_inside(ROOT / 'plot.py', 'b/log.jsonl', 'a/', cwd=tmp_path)[1] == b + 'wrote b/logs.png\n'
    assert (tmp_path / 'a/log.png').read_bytes() == before and not (tmp_path / 'b/log.png').exists()


def test_a_folder_whose_name_is_no_utf_8(tmp_path):
    folder = tmp_path / 'a\udcff'
    folder.mkdir()
    (folder / 'log.jsonl').write_text('\n'.join(map(json.dumps, train_records())))
    code, _, said = run_inside(ROOT / 'plot.py', 'a\udcff', cwd=tmp_path)
    assert (code, said) == (0, '') and (folder / 'log.png').exists()


@pytest.mark.parametrize('theirs, words', [
    (dict(n=12, every=9), 'it has no step from 100 on, where the comparison begins'), (dict(n=13, every=9), None),
    (dict(n=14, every=9), 'has other steps'), (None, 'must have its seed, 1; 0 have')])
def test_runs_that_cannot_be_compared(tmp_path, theirs, words):
    mine = train_records(**(theirs or dict(n=11)))
    for name, seed, records in (('mine', 1, mine if words != 'has other steps' else mine[:-1]),
                                ('theirs', 1 if theirs else 2, mine)):
        (tmp_path / name).mkdir()
        lines = [{'command': '', 'config': {'seed': seed}}, *records]
        (tmp_path / name / 'log.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    code, out, said = run_inside(ROOT / 'plot.py', 'mine/log.jsonl', '--relative_to', 'theirs/log.jsonl', cwd=tmp_path)
    if words is None:                                                # steps 0, 9 .. 99, 108
        assert code == 0 and 'mine: 0.00%' in out
    else:
        assert code == 2 and words in said and said.startswith('mine') and len(said.splitlines()) == 1


@pytest.mark.parametrize('out, words', [('nowhere/x.png', 'No such file'), ('x.xyz', 'must end in'),
                                        ('x', 'must end in'), ('', 'must end in'), ('log.jsonl', 'must end in')])
def test_where_it_cannot_be_drawn(log, out, words):
    before = log.read_bytes()
    code, _, said = run_inside(ROOT / 'plot.py', log, f'--out={out}', cwd=log.parent)
    assert code == 2 and words in said and len(said.splitlines()) == 1
    assert [path.name for path in log.parent.iterdir()] == ['log.jsonl'] and log.read_bytes() == before


@pytest.mark.parametrize('kind', ['png', 'svg', 'pdf', 'eps', 'jpg'])
def test_what_a_figure_replaces(log, kind):
    """An earlier figure, whole or not at all. A file without the mark stays; some formats have no room for it."""
    log.write_text('{"loss": 1, "step": 1}\n')                              # few panels are drawn faster
    out, args = log.parent / f'a.{kind}', (ROOT / 'plot.py', log, f'--out=a.{kind}')
    code, said, _ = run_inside(*args, cwd=log.parent)
    assert (code, said) == (0, f'wrote a.{kind}\n')
    before = out.read_bytes()
    with full_disk(2000):
        code, _, said = run_inside(*args, cwd=log.parent)
    words = 'cannot be written: File too large' if kind != 'jpg' else 'is there, and this program did not write it'
    assert code == 2 and said.startswith(f'a.{kind} {words}') and said.count('\n') == 1
    assert out.read_bytes() == before and len(list(log.parent.iterdir())) == 2
    if kind == 'png':
        assert run_inside(*args, cwd=log.parent)[0] == 0
        out.write_bytes(b"another program's")
        assert run_inside(*args, cwd=log.parent)[0] == 2 and out.read_bytes() == b"another program's"


def test_a_figure_does_not_replace_its_log(log):
    from extras import output
    log = log.rename(log.with_suffix('.png'))
    with open(log, 'a') as f:
        f.write(json.dumps({'note': output.MARK}))
    before = log.read_bytes()
    code, _, said = run_inside(ROOT / 'plot.py', log.name, f'--out={log}', cwd=log.parent)
    assert code == 2 and 'is the file to read' in said and log.read_bytes() == before


@pytest.mark.parametrize('name, words', [('nowhere', 'No such file'), ('.', './log.jsonl cannot be used: No such file'),
                                         ('bytes', 'no records')])
def test_what_is_no_log(tmp_path, name, words):
    (tmp_path / 'bytes').write_bytes(b'\xff\0\n{}\n')
    code, _, said = run_inside(ROOT / 'plot.py', name, cwd=tmp_path)
    assert code == 2 and words in said and len(said.splitlines()) == 1


@pytest.mark.parametrize('line', ['{"loss": 1}', '{"loss": 1, "step": "a"}', '{"val_loss": 1, "step": 1.5}',
                                  '{"loss": 1, "step": %s}' % ('9' * 400), '{"reward": 1, "step": true}'])
def test_a_record_without_its_step(log, line):
    log.write_text('\n' + line + '\n')
    code, _, said = run_inside(ROOT / 'plot.py', log, cwd=log.parent)
    assert code == 2 and 'line 2' in said and 'step' in said and len(said.splitlines()) == 1


@pytest.mark.parametrize('line', ['{"loss": "x", "step": 1}', '{"loss": [1], "step": 1, "mtp_losses": 3}',
                                  '{"loss": NaN, "step": 1, "mtp_losses": ["a", null], "max_vio": [Infinity, "a"]}',
                                  '{"val_loss": 1, "step": 0}', '{"val_accuracy": "x", "step": 0}', '[' * 99999,
                                  '{"step": 1, "loss": %s}' % ('9' * 5000), '{"reward": 1, "step": 0, "length": {}}'])
def test_odd_values_are_gaps(log, line):
    good = '{"loss": 1, "step": 2}\n' if 'acc' not in line and 'reward' not in line else ''
    log.write_text(line + '\n' + good)
    code, out, said = run_inside(ROOT / 'plot.py', log, cwd=log.parent)
    assert code == 0 and not said and out.splitlines()[-1].startswith('wrote')


@pytest.mark.parametrize('when', ['imports', 'work'])
def test_ctrl_c(tmp_path, when):
    """While matplotlib is imported, or while the log, a pipe, is read. A matplotlib.py in its place reads it, too."""
    os.mkfifo(tmp_path / 'log.jsonl')
    if when == 'imports':
        (tmp_path / 'matplotlib.py').write_text("open('log.jsonl').read()\n")
    process = subprocess.Popen([sys.executable, ROOT / 'plot.py', 'log.jsonl'], cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=os.environ | {'PYTHONPATH': str(tmp_path)})
    with writer_to(tmp_path / 'log.jsonl', process):
        process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=60)  # the pipe is closed: a read that began after the signal ends, too
    assert (process.returncode, out, said) == (130, b'', b'interrupted\n')


def test_positions(tmp_path, clone):
    model = tiny_model(block_size=64, num_nextn_predict_layers=0)
    torch.save({'model': model.state_dict(), 'model_args': vars(model.config)}, tmp_path / 'ckpt.pt')
    (clone / 'data/abc').mkdir()
    val = clone / 'data/abc/val.bin'
    np.random.default_rng(0).integers(61, size=500).astype(np.uint16).tofile(val)
    flags = ['runs/positions.py', tmp_path, '--data=abc', '--length=64', '--windows=2']
    code, out, said = run_inside(*flags, '--out=p.png', cwd=clone)
    assert code == 0 and (clone / 'p.png').exists(), said
    for flag, words in (('--out=nowhere/p.png', 'no folder'), ('--out=p.xyz', 'must end in'),
                        ('--length=640', 'too few'), ('--data=nope', 'is missing'), ('--windows=99999', '--windows')):
        code, _, said = run_inside(*flags, flag, cwd=clone)
        assert code == 2 and words in said and len(said.splitlines()) == 1, (flag, said)
    np.full(500, 61, dtype=np.uint16).tofile(val)
    code, _, said = run_inside(*flags, cwd=clone)
    assert code == 2 and 'was not trained on abc' in said and len(said.splitlines()) == 1
