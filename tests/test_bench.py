"""bench.py as a user runs it, at toy sizes, with the real peers."""

import json

import pytest
from conftest import ROOT, run_inside, run_outside

TOY = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16', '--vocab_size=64', '--q_lora_rank=8',
       '--kv_lora_rank=8', '--qk_nope_head_dim=4', '--qk_rope_head_dim=4', '--v_head_dim=8', '--n_routed_experts=4',
       '--num_experts_per_tok=2', '--moe_intermediate_size=8', '--mtp_n_layer=1', '--compile=False', '--dtype=float32',
       '--gemm_size=64']


def bench(*args):
    code, printed, said = run_outside(ROOT / 'bench.py', *args, cwd=ROOT)
    assert code == 0, said
    return json.loads(printed)


@pytest.mark.parametrize('what, args', [
    ('train', ['--peer=ours,transformers', '--steps=1']),
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


def test_mistakes_are_one_line():
    for args, words in (((), 'usage'), (('swim',), 'usage'), (('train', '--peer=nobody'), 'must name some of'),
                        (('train', '--steps=0'), 'steps=0 must lie in'), (('train', '--_here=.'), 'unknown key'),
                        (('train', '--here=.'), 'unknown key'), (('train', '--as_json=True'), 'unknown key'),
                        (('loss', '--rows=0'), 'rows=0 must lie in'),
                        (('train', '--batch_size=-1'), 'batch_size=-1 must lie'), (('train', '--n_head=7'), 'divide'),
                        (('train', '--device=meta'), 'device'), (('train', '--dtype=int8'), 'dtype'),
                        (('decode', '--new_tokens=1'), 'new_tokens=1'), (('decode', '--block_size=99'), 'do not fit')):
        code, _, said = run_inside('bench.py', *args, cwd=ROOT)
        said = [line for line in said.splitlines() if not line.startswith('Overriding: ')]
        assert code == 2 and len(said) == 1 and words in said[0], (args, code, said)
