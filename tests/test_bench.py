"""bench.py as a user runs it, at toy sizes, with the real peers."""

import json
import sys

import pytest
import torch
from conftest import ROOT, run_inside, run_outside
from torch.utils._pytree import tree_leaves

import model
import model_v4
from extras import sizes

TOY = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16', '--vocab_size=64', '--q_lora_rank=8',
       '--kv_lora_rank=8', '--qk_nope_head_dim=4', '--qk_rope_head_dim=4', '--v_head_dim=8', '--n_routed_experts=4',
       '--num_experts_per_tok=2', '--moe_intermediate_size=8', '--mtp_n_layer=1', '--compile=False', '--dtype=float32',
       '--gemm_size=64']


def bench(*args):
    code, printed, said = run_outside(ROOT / 'bench.py', *args, cwd=ROOT)
    assert code == 0, said
    return json.loads(printed)


@pytest.mark.parametrize('what, args', [
    ('train', ['--peer=ours', '--steps=1']),
    pytest.param('train', ['--peer=ours,transformers', '--steps=1'], marks=pytest.mark.slow),
    pytest.param('decode', ['--peer=ours,gpt2', '--prompt_tokens=4', '--new_tokens=2'], marks=pytest.mark.slow)])
def test_every_row_is_measured(what, args):
    rows = bench(what, '--json', *TOY, *args)
    assert [row['peer'] for row in rows] == args[0].removeprefix('--peer=').split(',')
    for row in rows:
        assert 'missing' not in row and row['tokens/s'] > 0 and row['peak GiB'] > 0


@pytest.mark.slow
def test_every_way_to_the_loss_finds_the_same():
    rows = bench('loss', '--json', *TOY, '--rows=32', '--steps=1')
    assert [row['peer'] for row in rows] == ['ours', 'plain', 'torch']
    assert all(row['loss'] == pytest.approx(rows[1]['loss'], abs=1e-5) for row in rows)


def size(*args):
    code, printed, said = run_inside('bench.py', 'size', '--json', *args, cwd=ROOT)
    assert code == 0, said
    return json.loads(printed)


@pytest.mark.parametrize('flags', [[], ['--architecture=model_v4', '--layer_types=sh', '--sliding_window=4',
                                        '--compress_rate_hca=4', '--num_hash_layers=1', '--hc_mult=2']])
def test_the_size_of_a_model_that_is_not_built(flags):
    """Against the model itself, of real tensors: parameters, FLOPs and caches."""
    fields = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=64)
    found = size(*(f'--{key}={value}' for key, value in fields.items()), *flags)
    fields |= dict(flag.removeprefix('--').split('=') for flag in flags)
    module = model_v4 if flags else model
    config = module.GPTConfig(**{k: int(v) if str(v).isdigit() else v for k, v in fields.items()})
    gpt = module.GPT(config)
    assert found['parameters'] == gpt.get_num_params(non_embedding=False) == found['training']['weights'] / 4
    assert found['active parameters'] == gpt.get_num_active_params() + 64 * 32
    assert found['FLOPs a token, training'] == gpt.flops_per_token()
    for n in (32, 48):
        with torch.autocast('cpu', torch.bfloat16):
            held = sum(x.nbytes for x in tree_leaves(gpt.make_cache(1, n)))
        assert held == found['cache bytes a token'] * n + found['cache bytes besides']
    assert (found['cache bytes besides'] > 0) == bool(flags)


def test_the_estimate_of_the_main_runs_memory():
    """docs/gpu.md has the peak of an uncompiled step on the fake GPU, 13.23 GiB."""
    flags = 'config/train_deepseek.py', '--vocab_size=50304'
    parts = size(*flags)['training']
    assert sum(parts.values()) == pytest.approx(13.23 * 2**30, rel=0.1)
    less = size(*flags, '--recompute=True', '--bf16_moments=True', '--batch_size=6')['training']
    assert less["optimizer's state"] == parts["optimizer's state"] / 2
    assert less['activations'] < parts['activations'] / 10


def rows_of(page, head):
    """The cells of the table whose first column has this head"""
    table = (ROOT / page).read_text().split(f'| {head} |')[1].split('\n\n')[0]
    return [[cell.strip().strip('`') for cell in row.split('|')[1:-1]] for row in table.splitlines()[2:]]


def measured(monkeypatch, *flags):
    """train.py's settings with these flags, and the cells of a table"""
    monkeypatch.setattr('sys.argv', ['train.py', *flags])
    monkeypatch.setattr('sys.excepthook', sys.excepthook)  # which configurator.py replaces
    settings = sizes.read_settings(ROOT)
    found = sizes.measure(settings, ROOT, memory=False)
    names = 'parameters', 'active parameters', 'FLOPs a token, training'
    return settings, [*(sizes.big(found[name]) for name in names), sizes.cached(found)]


def test_the_table_of_configs_is_what_the_code_computes(monkeypatch):
    """And it has every config file of train.py."""
    rows = rows_of('docs/training.md', '`python bench.py size ...`')
    for command, *cells in rows:
        assert cells == measured(monkeypatch, *command.split())[1], command
    files = {path.name for path in (ROOT / 'config').glob('*.py') if not path.name.startswith('grpo_')} - {'depth.py'}
    assert {command.split()[0] for command, *_ in rows} == {f'config/{name}' for name in files}


def test_the_table_of_depths_is_what_the_dial_sets(monkeypatch):
    rows = rows_of('docs/training.md', '`--depth`')
    assert [int(row[0]) for row in rows] == [2, 3, 4, 6, 8, 12, 16, 20, 24]
    for depth, *cells in rows:
        s, shown = measured(monkeypatch, f'--depth={depth}', '--vocab_size=50304')
        tokens, active = s['batch_size'] * s['gradient_accumulation_steps'] * s['block_size'], main_blocks(int(depth))
        assert cells == [str(s['n_embd']), *shown, str(s['learning_rate']), f'{tokens:,}', f'{s["max_iters"]:,}']
        assert 0 <= tokens * s['max_iters'] - 20 * active < tokens
        batch, rate = 0.2920 * (120 * active ** 2) ** 0.3271, 0.3118 * (120 * active ** 2) ** -0.125
        assert tokens == pytest.approx(batch, rel=0.1)
        assert s['learning_rate'] == pytest.approx(rate * (tokens / batch) ** 0.5, rel=0.05)


def main_blocks(depth):
    """Active parameters, counted by hand: MLA with a latent of C/2 for queries and of 3C/8 for keys and values, heads
    of 32 + 32 and 64, and four experts of width C/2.
    """
    C, q, kv = 64 * depth, 32 * depth, 24 * depth
    attention = C * q + q + q * C + C * (kv + 32) + kv + kv * depth * (32 + 64) + C * C
    return depth * (attention + 4 * 3 * C * C // 2 + 8 * C + 2 * C) + C


def test_mistakes_are_one_line():
    for args, words in (((), 'usage'), (('swim',), 'usage'), (('train', '--peer=nobody'), 'must name some of'),
                        (('train', '--steps=0'), 'steps=0 must lie in'), (('train', '--_here=.'), 'unknown key'),
                        (('train', '--here=.'), 'unknown key'), (('train', '--as_json=True'), 'unknown key'),
                        (('loss', '--rows=0'), 'rows=0 must lie in'),
                        (('train', '--batch_size=-1'), 'batch_size=-1 must lie'), (('train', '--n_head=7'), 'divide'),
                        (('train', '--device=meta'), 'device'), (('train', '--dtype=int8'), 'dtype'),
                        (('size', '--nobody=1'), 'unknown key'), (('size', '--n_head=7'), 'divide'),
                        (('size', '--batch_size=0'), 'batch_size=0 must lie'),
                        (('size', '--architecture=x'), 'must be one of the files'),
                        (('decode', '--new_tokens=1'), 'new_tokens=1'), (('decode', '--block_size=99'), 'do not fit')):
        code, _, said = run_inside('bench.py', *args, cwd=ROOT)
        said = [line for line in said.splitlines() if not line.startswith('Overriding: ')]
        assert code == 2 and len(said) == 1 and words in said[0], (args, code, said)


def test_a_step_after_a_long_context(tmp_path):
    """Each config's cache by length: MLA's rows grow, V4's rings do not, and its entries are one for 4 or 16 tokens."""
    sizes = 'n_layer, n_head, n_embd, q_lora_rank, qk_nope_head_dim, qk_rope_head_dim = 2, 2, 32, 16, 8, 8\n'
    (tmp_path / 'mla.py').write_text(sizes + 'kv_lora_rank = 24\n')
    (tmp_path / 'v4.py').write_text(sizes + "architecture, layer_types, sliding_window = 'model_v4', 'sh', 8\n"
                                    'compress_rate_hca = 16\n')
    configs = [tmp_path / name for name in ('mla.py', 'v4.py')]
    code, printed, said = run_inside(ROOT / 'runs/long_context.py', *configs, '--lengths=64,128', '--steps=2', cwd=ROOT)
    assert code == 0, said
    rows = [line.split() for line in printed.splitlines()]
    assert rows[0] == ['tokens', 'mla.py', 'v4.py'] and [row[0] for row in rows[1:]] == ['64', '128']
    mla = [2 * (24 + 8) * 4 * n for n in (64, 128)]
    rings = 2 * 9 * 16 + 17 * 2 * 16                                        # of the window; of C and Z
    v4 = [4 * (rings + (n // 16 + 1) * 16) for n in (64, 128)]
    assert [[row[i] for i in (3, 7)] for row in rows[1:]] == [[f'{x:,}' for x in both] for both in zip(mla, v4)]
    for args in (['--lengths=64,x'], ['--lengths=64', '--steps=0'], [tmp_path / 'none.py']):
        code, _, said = run_inside(ROOT / 'runs/long_context.py', *args, cwd=ROOT)
        assert code == 2 and len(said.splitlines()) == 1, said
