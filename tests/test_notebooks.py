"""notebooks/: they run from top to bottom; the walk's checks notice a wrong line, and the docs have its numbers."""

import ast
import json
import re
import sys

import matplotlib
import pytest
import torch
from conftest import ROOT

WALK, DEMO = ROOT / 'notebooks/walk.ipynb', ROOT / 'notebooks/demo.ipynb'


def cells(path, kind):
    return [''.join(cell['source']) for cell in json.loads(path.read_text())['cells'] if cell['cell_type'] == kind]


def execute(source, scope):
    with torch.no_grad():  # the walk turns gradients off, and the next test wants them
        exec(compile(source, 'walk.ipynb', 'exec'), scope)


WRONG_LINES = [  # in the walk, and instead
    ('(x[t] ** 2).mean()', 'x[t].var()'),
    ('-2 * i / r', '-i / r'),
    ('x[t, 2 * i], x[t, 2 * i + 1]', 'x[t, i], x[t, i + r // 2]'),
    ('k_rope = rope(down[:, c:])', 'k_rope = down[:, c:]'),
    ('scores / math.sqrt(n + r), dim=0)     #', 'scores / math.sqrt(n), dim=0)     #'),
    ('rope(down[None, c:], start=t)', 'rope(down[None, c:])'),
    ('cache[:t + 1] @ absorbed', 'cache[:t + 1] @ absorbed * 1.01'),
    ('gates = scores[chosen] /', 'gates = (scores + moe.e_score_correction_bias)[chosen] /'),
    ('return x + experts(', 'return experts('),
    ('chosen * E /', 'chosen /'),
    ('moved - moved.mean() + bias.mean()', 'moved'),
    ('(embeddings[i], states[i])', '(states[i], embeddings[i])'),
    ('config.mtp_lambda * mtp_loss', 'mtp_loss'),
    ('newton_schulz(0.95 * momentum + 0.05 * gradient)', 'newton_schulz(momentum)'),
    ('max(weight.shape)', 'min(weight.shape)'),
]


@pytest.fixture
def walked(monkeypatch):
    """The variables of the walk after all of its cells, with 3 steps of training."""
    matplotlib.use('Agg')
    monkeypatch.chdir(WALK.parent)  # where Jupyter starts it
    monkeypatch.setattr(sys, 'path', sys.path[:])
    scope = {}
    for source in cells(WALK, 'code'):
        execute(source.replace('steps = 400', 'steps = 3').replace('plt.show()', 'plt.close()'), scope)
    assert scope['steps'] == 3
    return scope


def test_the_walk_runs_and_notices_a_wrong_line(walked):
    for right, wrong in WRONG_LINES:
        (source,) = [source for source in cells(WALK, 'code') if right in source]
        with pytest.raises(AssertionError, match='they differ by'):
            execute(source.replace(right, wrong), {**walked})
            print(f'unnoticed: {wrong}')


def test_functions_of_the_walk_are_short():
    functions = [node for source in cells(WALK, 'code') for node in ast.parse(source).body
                 if isinstance(node, ast.FunctionDef)]
    assert len(functions) > 12
    for node in functions:
        assert node.end_lineno - node.lineno + 1 <= 25, node.name


def tables(text):
    """Rows of markdown tables, as dicts by the names of their columns; the text before a table may say the size."""
    for table in re.findall(r'(.*)\n\n((?:\|.*\n)+)', text):
        head, _, *rows = ([x.strip() for x in line.split('|')[1:-1]] for line in table[1].splitlines())
        for row in rows:
            yield {'size': 'large' if table[0] == 'The large size:' else 'small', **dict(zip(head, row))}


def test_numbers_of_the_walk_are_those_of_the_docs():
    measured = [row for row in tables((ROOT / 'docs/insight.md').read_text()) if 'variant' in row]
    cited = [row for source in cells(WALK, 'markdown') for row in tables(source + '\n') if 'variant' in row]
    assert len(cited) > 15
    for row in cited:
        assert any(row.items() <= other.items() for other in measured), row


def test_what_the_notebooks_hold():
    """The walk keeps its pictures, for who reads it without running it, and the demo, which embeds a page, nothing."""
    walk, demo = (json.loads(path.read_text()) for path in (WALK, DEMO))
    outputs = [output for cell in walk['cells'] for output in cell.get('outputs', [])]
    assert sum('image/png' in output.get('data', {}) for output in outputs) == 6
    assert all(output['output_type'] != 'error' for output in outputs)
    counts = [cell['execution_count'] for cell in walk['cells'] if cell['cell_type'] == 'code']
    assert counts == [*range(1, 1 + len(counts))]  # one run, from top to bottom
    assert not any(cell.get('outputs') or cell.get('execution_count') for cell in demo['cells'])
    for path in (WALK, DEMO):
        assert path.stat().st_size < 400_000
        text = json.dumps([{**cell, 'outputs': [{**output, 'data': {**output.get('data', {}), 'image/png': ''}}
                                                for output in cell.get('outputs', [])]}
                           for cell in json.loads(path.read_text())['cells']])
        assert not re.search(r'/(home|root|tmp|work|Users|usr|opt)/|[A-Z]:\\\\', text)


def run_notebook(path):
    """Executed in a kernel of its own, as Jupyter does -> its text outputs"""
    import nbformat
    from nbclient import NotebookClient
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=3600, resources={'metadata': {'path': str(path.parent)}}).execute()
    return ''.join(output.get('text', '') for cell in notebook.cells for output in cell.get('outputs', []))


@pytest.mark.slow
def test_the_whole_walk_runs(clone):
    printed = run_notebook(clone / 'notebooks/walk.ipynb')
    assert printed.count('equal: ') == 15 and 'drafts were right' in printed


@pytest.mark.slow
def test_the_whole_demo_runs(clone):
    printed = run_notebook(clone / 'notebooks/demo.ipynb')
    assert 'done; to sample' in printed and 'The for statement' in printed and 'accepted drafts' in printed, printed
    assert (clone / 'out-notebook/inside.html').is_file()
