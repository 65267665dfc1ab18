"""runs/ablations.py: variants are what their names say; its sweep; and the tables of docs/insight.md."""

import math
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from model import GPTConfig

sys.path.insert(0, str(ROOT / 'runs'))
import ablations


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
def test_grouped_attention_equals_loops_over_heads(kv_heads):
    config = GPTConfig(n_embd=32, n_head=4, block_size=8, vocab_size=61, qk_rope_head_dim=8)
    attn = ablations.GroupedQueryAttention(config, kv_heads)
    x, angle = torch.randn(2, 8, 32), torch.rand(8, 4)
    q, k, v = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)

    def rotated(t):  # (2, 8, 8), each pair as a complex number
        return torch.view_as_real(torch.view_as_complex(t.reshape(2, 8, 4, 2).contiguous())
                                  * torch.polar(torch.ones_like(angle), angle)).flatten(2)

    heads = []
    for h in range(4):
        g = h * kv_heads // 4  # neighbouring queries share a key
        own = [t[..., 8 * i:8 * i + 8] for t, i in ((q, h), (k, g), (v, g))]
        scores = rotated(own[0]) @ rotated(own[1]).transpose(1, 2) / 8 ** 0.5
        heads.append(scores.masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf).softmax(dim=-1) @ own[2])
    torch.testing.assert_close(attn(x, angle.cos(), angle.sin()), attn.o_proj(torch.cat(heads, dim=-1)))


@pytest.mark.slow
@pytest.mark.parametrize('size', ablations.SIZES)
def test_variants_see_no_later_token_and_equal_widths_are_equal(size):
    active = {}
    for question, found in ablations.variants(size).items():
        for name in found:
            torch.manual_seed(0)
            model, cached = ablations.build(size, name, vocab_size=61)
            active[question, name] = model.get_num_active_params()
            if question == 'precision':
                continue  # FP8 scales of tiles span positions
            idx = torch.randint(61, (1, 12))
            other = torch.cat((idx[:, :8], (idx[:, 8:] + 1) % 61), dim=1)
            h, h_other = (model.eval().main_stack(x)[0] for x in (idx, other))
            torch.testing.assert_close(h[:, :8], h_other[:, :8])
            assert not torch.allclose(h[:, 8:], h_other[:, 8:])
    base = active['base', 'base']
    for (question, name), n in active.items():
        if question in ('experts', 'balance', 'router', 'initialisation'):
            assert n == pytest.approx(base, rel=0.03), name  # routers differ


def test_latent_sizes_give_the_caches_and_parameters_they_name():
    def measures(name):
        model, cached = ablations.build('small', name, vocab_size=61)
        return cached, model.get_num_active_params()

    assert measures("MLA, GQA's cache")[0] == measures('GQA, 2 groups')[0]
    assert measures('base')[0] == measures('MQA')[0]
    assert measures("MLA, MHA's parameters")[1] == pytest.approx(measures('MHA')[1], rel=0.001)


def test_sweep_goes_on_while_the_best_rate_is_at_its_edge():
    steps = ablations.SIZES['small']['steps']
    held = {0.001: 1.8, 0.002: 1.7, 0.004: 1.6, 0.008: 1.5, 0.016: float('nan')}
    runs, order = [], []
    while jobs := ablations.missing(runs, 'small', 'dense', seeds=3):
        for size, variant, lr, seed, n in jobs:
            order.append((lr, seed))
            runs.append({'size': size, 'variant': variant, 'lr': lr, 'seed': seed, 'steps': n, 'held': held[lr]})
    assert order == [(0.001, 0), (0.002, 0), (0.004, 0), (0.008, 0), (0.016, 0), (0.008, 1), (0.008, 2)]
    assert {r['steps'] for r in runs} == {steps}


def test_the_base_in_other_time_is_that_of_the_same_seeds():
    steps = ablations.SIZES['small']['steps']
    runs = [{'size': 'small', 'variant': 'base', 'lr': 0.002, 'seed': seed, 'steps': n, 'held': 1.0, 'val': val + seed}
            for n, val, seeds in ((steps // 2, 4.0, 1), (steps, 3.0, 5), (2 * steps, 2.0, 5)) for seed in range(seeds)]
    assert ablations.base_after(runs, 'small', 2 ** 0.5, {0, 1}) == pytest.approx(2.5 + 0.5)
    assert ablations.base_after(runs, 'small', 2, range(5)) == pytest.approx(2 + 2)
    assert ablations.base_after(runs, 'small', 0.5, {0}) == pytest.approx(4)
    assert ablations.base_after(runs, 'small', 0.9, {0, 1}) is None  # the half has seed 0 alone


def test_a_run_is_repeated_by_its_line(monkeypatch):
    """The same job gives the same line, another seed another."""
    tokens = torch.randint(61, (4200,), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(ablations, 'load', lambda size: (dict.fromkeys(('train', 'held', 'val'), tokens), 61))
    threads = torch.get_num_threads()
    try:
        first, again, other = (ablations.train(('small', 'two modules', 0.004, seed, 8)) for seed in (0, 0, 1))
    finally:
        torch.set_num_threads(threads)
    assert first == again and first['val'] != other['val']
    assert [it for it, _ in first['curve']] == [1, 2, 3, 4, 5, 6, 7] and len(first['accepted']) == 2


def test_page_holds_the_tables_of_the_results():
    page, found = (ROOT / 'docs' / 'insight.md').read_text(), [*ablations.tables(*ablations.read_results())]
    assert found
    for size, question, table in found:
        assert table in page, f'{question}, {size}: python runs/ablations.py report'


def test_a_rows_interval_is_its_own():
    """Student's t of the paired differences: a noisy row is not made sure by the calm rows around it."""
    mean, half_width = ablations.interval([-0.03, -0.02, -0.06, -0.02, 0.02])
    assert (mean, half_width) == pytest.approx((-0.022, 2.776 * math.sqrt(0.00328 / 4 / 5)))
    for n, t in ablations.T_95.items():                             # the density's integral from -t to t
        x = np.linspace(-t, t, 100_001)
        scale = math.gamma(n / 2) / math.gamma((n - 1) / 2) / math.sqrt(math.pi * (n - 1))
        assert np.trapezoid(scale * (1 + x**2 / (n - 1)) ** (-n / 2), x) == pytest.approx(0.95, abs=1e-4)


def test_page_names_the_rows_that_differ_and_counts_seed_by_seed():
    page, (runs, _) = (ROOT / 'docs' / 'insight.md').read_text(), ablations.read_results()
    for size, rows, names in ablations.differing(runs):
        assert f'\n- {size}, {len(names)} of {rows} rows: {"; ".join(names)}' in page
    by_seed = ablations.against_base(runs, 'small', 'MHA')
    said = page.partition("MHA's differences by seed are ")[2].partition(':')[0].replace(' and', ',')
    assert [float(x) for x in said.split(', ')] == pytest.approx(by_seed, abs=6e-4)
    assert f'| {sum(x < 0 for x in by_seed)} of {len(by_seed)} |' in page.partition('\n| MHA |')[2].partition('\n')[0]
