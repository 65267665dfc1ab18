"""inside.py --live=True: the page's model in a Chromium against model.py, and the page under a visitor's hands."""

import base64
import dataclasses
import json

import numpy as np
import pytest
import torch
from chromium import Chromium
from conftest import ROOT, tiny_model

import inside
from extras import live
from model import probabilities

SOURCE = (ROOT / 'extras/live.js').read_text()
PROMPT, LENGTH = 60, 360


@pytest.fixture(scope='module')
def browser():
    with Chromium() as browser:
        yield browser


# -----------------------------------------------------------------------------
# the model

@pytest.fixture(scope='module')
def tab(browser):
    """A tab without a page that knows live.js"""
    tab = browser.open('about:blank')
    tab.evaluate(SOURCE)
    return tab


def load(tab, model):
    """-> the model with the weights of a page; the tab has it as `model`"""
    copied, parts, content = live.rounded(model.eval())
    tab.evaluate(f'var model = new GPT({json.dumps(dataclasses.asdict(model.config))}, unpack({json.dumps(parts)}, '
                 f'"{base64.b64encode(content).decode()}")); model.config.n_layer')
    return copied


def biased_model(**overrides):
    model = tiny_model(**{'block_size': LENGTH, **overrides})
    for moe in model.moe_layers():
        moe.e_score_correction_bias.uniform_(-0.2, 0.2)
    return model


KINDS = {
    'MoE': {}, 'dense': dict(n_routed_experts=0), 'groups': dict(n_group=4, topk_group=2),
    'V2': dict(scoring_func='softmax', norm_topk_prob=False, n_group=4, topk_group=2, num_nextn_predict_layers=0),
    'no q_lora': dict(q_lora_rank=0, bias=True, v_head_dim=12, first_k_dense_replace=1, n_shared_experts=0),
    'YaRN': dict(rope_factor=4.0, rope_original_max_position_embeddings=76, rope_mscale=0.7),
    'untied': dict(tie_word_embeddings=False, mtp_n_layer=2, num_experts_per_tok=1, rms_norm_eps=1e-4),
}


@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_a_greedy_text_of_300_tokens(tab, kind):
    """One pass of model.py over the whole text finds the same logits, so the same choices, and the same cache."""
    copied = load(tab, biased_model(**KINDS[kind]))
    got = tab.evaluate(f"""
        var reader = new Reader(model, {LENGTH}), logits = [], tokens = {torch.randint(61, (PROMPT,)).tolist()};
        for (let pos = 0; pos < {LENGTH}; pos++) {{
          logits.push([...reader.read(tokens[pos]).logits]);
          if (pos >= {PROMPT} - 1) tokens.push(draw(probabilities(logits[pos], 0, 0), Math.random));
        }}
        ({{logits, tokens, caches: reader.caches[0].map(cache => [...cache])}})""")
    ids = torch.tensor([got['tokens'][:LENGTH]])
    caches = copied.make_cache(1, LENGTH)
    h, _ = copied.main_stack(ids, caches)
    wanted = copied.lm_head(h)[0]
    torch.testing.assert_close(torch.tensor(got['logits']), wanted, atol=1e-4, rtol=0)
    assert got['tokens'][PROMPT:] == wanted[PROMPT - 1:].argmax(dim=-1).tolist()
    for cache, recomputed in zip(got['caches'], caches, strict=True):
        torch.testing.assert_close(torch.tensor(cache).view(LENGTH, -1), recomputed[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('overrides', [dict(mtp_n_layer=2), dict(num_nextn_predict_layers=3)])
@torch.no_grad()
def test_drafts_are_those_of_the_decoder(tab, overrides):
    """From every place of a text that the model would not write"""
    copied, ids = load(tab, biased_model(**overrides)), torch.randint(61, (40,))
    D = len(copied.mtp)
    caches = inside.decode.empty_state(copied, 1, 40, D).caches
    states, _, _ = inside.watch(copied, ids[None], caches)
    wanted, _, _ = inside.speculate(copied, ids, states[0], caches)
    got = tab.evaluate(f'var reader = new Reader(model, 40); {ids.tolist()}.map(id => reader.read(id).drafts)')
    assert got[0] == [] and [[draft['token'] for draft in row] for row in got[1:]] == wanted[1:].tolist()
    wanted = copied.lm_head(states[1][0]).softmax(dim=-1).amax(dim=-1)       # MTP 1 drafts t_{i+2} at row i
    torch.testing.assert_close(torch.tensor([row[0]['p'] for row in got[1:]]), wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_int8(tab, monkeypatch):
    monkeypatch.setattr(live, 'MOST_FP16', 1000)
    model = biased_model(n_group=4, topk_group=2)
    copied, ids = load(tab, model), torch.randint(61, (1, 40))
    wanted, plain = (m(ids, ids)[0] for m in (copied, model))
    got = tab.evaluate(f'var reader = new Reader(model, 40); {ids[0].tolist()}.map(id => [...reader.read(id).logits])')
    torch.testing.assert_close(torch.tensor(got), wanted[0], atol=1e-4, rtol=0)
    assert 1e-3 < (wanted - plain).square().mean().sqrt() < 0.3 * plain.std()
    gate_up, before = (m.transformer.h[0].mlp.experts_gate_up for m in (copied, model))
    steps = gate_up / before.abs().amax(dim=-1, keepdim=True) * 127
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert torch.equal(copied.moe_layers()[0].gate.weight, model.moe_layers()[0].gate.weight)


def test_probabilities_are_those_of_model_py(tab):
    logits = (torch.randn(50) * 3).tolist()
    logits[7] = logits[8] = max(logits) - 1                                  # equal ones at the border stay both
    for temperature, top_k in ((1.0, 0), (0.7, 5), (2.0, 3), (1.0, 2), (1.0, 80), (0.0, 0), (0.0, 9)):
        got = tab.evaluate(f'[...probabilities(Float32Array.from({logits}), {temperature}, {top_k})]')
        wanted = probabilities(torch.tensor(logits), temperature, top_k)
        torch.testing.assert_close(torch.tensor(got).float(), wanted, atol=1e-6, rtol=1e-5)
    assert sum(p > 0 for p in tab.evaluate(f'[...probabilities(Float32Array.from({logits}), 1, 2)]')) == 3


@pytest.mark.parametrize('seed', [0, 1, 2**31, 2**32 - 1])
def test_tokens_are_drawn_as_often_as_they_should(tab, seed):
    """Chi-square of 20,000 draws over 12 tokens and, from the same numbers, of pairs that follow each other. Its mean
    is the number of degrees of freedom, its deviation the root of twice that."""
    p = torch.linspace(-2, 2, 12).softmax(dim=0)
    drawn = np.array(tab.evaluate(f"""
        var random = generator({seed}), probs = Float32Array.from({p.tolist()});
        Array.from({{length: 20000}}, () => draw(probs, random))"""))
    first, pairs = np.bincount(drawn, minlength=12), np.zeros((12, 12))
    np.add.at(pairs, (drawn[::2], drawn[1::2]), 1)
    for seen, wanted in ((first, p.double().numpy()), (pairs, torch.outer(p, p).double().numpy())):
        expected = wanted / wanted.sum() * seen.sum()
        freedom = seen.size - 1
        assert abs(((seen - expected) ** 2 / expected).sum() - freedom) < 4 * (2 * freedom) ** 0.5
    again = tab.evaluate(f'random = generator({seed}); Array.from({{length: 9}}, () => draw(probs, random))')
    assert again == drawn[:9].tolist()
