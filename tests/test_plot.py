"""plot.py and plot_positions.py: what is drawn, and what is refused."""

import json

import matplotlib
import numpy as np
import pytest
import torch
from conftest import ROOT, run_inside, tiny_model

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


@pytest.mark.parametrize('more, panels', [({}, 9), ({'kl': 0.1}, 10), ({'kl': None, 'entropy': None}, 8)])
def test_the_figure_of_grpo(more, panels):
    """A panel for what was computed, no other; one legend; titles no wider than their panels."""
    runs = [('first', *grpo_records()), ('second', *grpo_records(**more)), ('only evaluated', [], grpo_records()[1])]
    runs = runs[1:] if panels < 9 else runs
    fig = plot.draw_rewards(plt, runs)
    fig.canvas.draw()
    assert len(fig.axes) == panels
    assert ('KL from the reference' in [ax.get_title() for ax in fig.axes]) == (panels == 10)
    assert [text.get_text() for text in fig.legends[0].get_texts()] == [name for name, *_ in runs]
    assert len(fig.legends) == 1 and not any(ax.get_legend() for ax in fig.axes)
    for ax in fig.axes:
        assert ax.lines and ax.title.get_window_extent().width <= ax.bbox.width
    plt.close(fig)


@pytest.mark.parametrize('out, words', [('nowhere/x.png', 'No such file'), ('x.xyz', 'must end in'),
                                        ('x', 'must end in'), ('', 'must end in'), ('log.jsonl', 'must end in')])
def test_where_it_cannot_be_drawn(log, out, words):
    before = log.read_bytes()
    code, _, said = run_inside(ROOT / 'plot.py', log, f'--out={out}', cwd=log.parent)
    assert code == 2 and words in said and len(said.splitlines()) == 1
    assert [path.name for path in log.parent.iterdir()] == ['log.jsonl'] and log.read_bytes() == before


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
    assert code == 0 and not said and out.startswith('wrote')


def test_positions(tmp_path, clone):
    model = tiny_model(block_size=64, num_nextn_predict_layers=0)
    torch.save({'model': model.state_dict(), 'model_args': vars(model.config)}, tmp_path / 'ckpt.pt')
    (clone / 'data/abc').mkdir()
    val = clone / 'data/abc/val.bin'
    np.random.default_rng(0).integers(61, size=500).astype(np.uint16).tofile(val)
    flags = ['plot_positions.py', tmp_path, '--data=abc', '--length=64', '--windows=2']
    code, out, said = run_inside(*flags, '--out=p.png', cwd=clone)
    assert code == 0 and (clone / 'p.png').exists(), said
    for flag, words in (('--out=nowhere/p.png', 'no folder'), ('--out=p.xyz', 'must end in'),
                        ('--length=640', 'too few'), ('--data=nope', 'is missing'), ('--windows=99999', '--windows')):
        code, _, said = run_inside(*flags, flag, cwd=clone)
        assert code == 2 and words in said and len(said.splitlines()) == 1, (flag, said)
    np.full(500, 61, dtype=np.uint16).tofile(val)
    code, _, said = run_inside(*flags, cwd=clone)
    assert code == 2 and 'was not trained on abc' in said and len(said.splitlines()) == 1
