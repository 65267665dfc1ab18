"""extras/probes.py: the logit lens and the knock-outs, against models without the part, and on inside.py's page."""

import copy
import dataclasses
import math

import pytest
import torch
from conftest import tiny_model
from test_inside import HOVER, in_browser, looked, random_ids, write_checkpoint, write_page
from test_v4 import WINDOWS, v4_model

import model_v4

MEMORY = dict(engram_layers='1', engram_rows=50, engram_dim=4)
V4 = {**WINDOWS, 'layer_types': 'sch', 'o_groups': 2}
HASHED = dict(num_hash_layers=1, norm_topk_prob=False)


@torch.no_grad()
def loss_of(model, ids):
    """Of all next tokens of the text, by a plain forward pass."""
    return model.eval()(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))[1].item()


def changes(model, ids):
    """{(layer, kind, number): the change of the loss}, as on the page"""
    found = looked(model, ids, knockouts='True')['knockouts']
    assert found['passes'] == len(found['parts'])
    return {(p['layer'], p['kind'], p['number']): p['change'] for p in found['parts']}


def without(model, edit):
    """A copy of the model that edit(model) has changed"""
    model = copy.deepcopy(model)
    with torch.no_grad():
        edit(model)
    return model


# -----------------------------------------------------------------------------
# the logit lens

@pytest.mark.parametrize('build, overrides', [
    (tiny_model, dict(first_k_dense_replace=1)), (v4_model, dict(hc_mult=3)),
    (v4_model, V4)], ids=['plain', 'streams', 'windows'])
def test_the_lens_is_a_model_of_the_first_blocks(build, overrides):
    """Which ends after block i with the same final norm and head."""
    model, ids = build(n_layer=3, **overrides), random_ids(20)
    lens = looked(model, ids)['lens']
    for i, shown in enumerate(lens, start=1):
        shorter = dict(n_layer=i, num_nextn_predict_layers=0)
        if 'layer_types' in overrides:
            shorter['layer_types'] = overrides['layer_types'][:i]
        first = type(model)(dataclasses.replace(model.config, **shorter))
        first.load_state_dict({name: x for name, x in model.state_dict().items() if name in first.state_dict()})
        logits, loss = first.eval()(torch.tensor([ids]), torch.tensor([[*ids[1:], -1]]))
        assert shown['loss'] == pytest.approx(loss.item(), abs=1e-5)
        for t, p in enumerate(logits[0].softmax(dim=-1)):
            assert shown['ids'][t] == p.argmax() and shown['p'][t] == pytest.approx(p.max().item(), abs=1e-4)
            assert t == 19 or shown['came'][t] == pytest.approx(p[ids[t + 1]].item(), abs=1e-4)
    assert len(lens) == 3 and len({round(shown['loss'], 3) for shown in lens}) == 3


# -----------------------------------------------------------------------------
# knock-outs

def expert_never_chosen(model, layer, e):
    model.transformer.h[layer].mlp.e_score_correction_bias[e] = -math.inf


def shared_experts_of_zeros(model, layer, _):
    model.transformer.h[layer].mlp.shared_experts.down_proj.weight.zero_()


def head_with_columns_of_zeros(model, layer, h):
    """V4's attention projects a group of heads by itself: there the head's columns are those of its group's rows."""
    attn, D = model.transformer.h[layer].attn, model.config.v_head_dim
    weight = attn.o_proj.weight
    if isinstance(attn, model_v4.Attention):
        per_group = model.config.n_head // model.config.o_groups
        group, h = divmod(h, per_group)
        weight = attn.o_a_proj.weight.unflatten(0, (model.config.o_groups, -1))[group]
    weight[:, h * D:(h + 1) * D] = 0


def queries_without_rope(model, layer, _):
    attn, cfg = model.transformer.h[layer].attn, model.config
    proj = attn.q_b_proj if cfg.q_lora_rank > 0 else attn.q_proj
    proj.weight.unflatten(0, (cfg.n_head, -1))[:, cfg.qk_nope_head_dim:] = 0


def memory_of_zeros(model, layer, _):
    model.transformer.h[layer].engram.v_proj.weight.zero_()


TWINS = dict(expert=expert_never_chosen, shared=shared_experts_of_zeros, head=head_with_columns_of_zeros,
             rope=queries_without_rope, memory=memory_of_zeros)


@pytest.mark.parametrize('build, overrides, parts', [
    (tiny_model, {}, 2 * (8 + 1 + 4 + 1)),
    (tiny_model, dict(first_k_dense_replace=1, q_lora_rank=0, v_head_dim=24, n_shared_experts=0), 2 * 5 + 8),
    (tiny_model, dict(scoring_func='softmax', n_group=2, topk_group=1, num_nextn_predict_layers=0), 2 * 14),
    (tiny_model, dict(n_routed_experts=0), 2 * 5),
    (v4_model, dict(index_topk=5, index_n_heads=3, index_head_dim=12, hc_mult=3, **MEMORY), 2 * 14 + 1)],
    ids=['plain', 'dense block', 'groups', 'dense', 'sparse, streams, memory'])
def test_a_part_that_is_off_is_a_model_without_it(build, overrides, parts):
    model, ids = build(**overrides), random_ids(20)
    for moe in model.moe_layers():
        moe.e_score_correction_bias.uniform_(-0.2, 0.2)
    state, loss = copy.deepcopy(model.state_dict()), loss_of(model, ids)
    found = changes(model, ids)
    assert len(found) == parts and len(set(found.values())) > parts // 2
    for (layer, kind, number), change in found.items():
        twin = without(model, lambda m, layer=layer, kind=kind, number=number: TWINS[kind](m, layer, number))
        assert change == pytest.approx(loss_of(twin, ids) - loss, abs=2e-5), (layer, kind, number)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())          # all is on again
    assert loss_of(model, ids) == loss


@pytest.mark.parametrize('chosen', [3, 8])
def test_an_expert_that_is_off_is_a_model_with_one_less(chosen):
    """With chosen = 8 all experts are: then the others are, with gates that sum to as much."""
    model, ids = tiny_model(num_experts_per_tok=chosen, routed_scaling_factor=1.5), random_ids(20)
    found, loss = changes(model, ids), loss_of(model, ids)
    for layer, e in ((0, 0), (1, 7)):
        twin = copy.deepcopy(model)
        moe, kept = twin.transformer.h[layer].mlp, [i for i in range(8) if i != e]
        moe.config = dataclasses.replace(model.config, n_routed_experts=7, num_experts_per_tok=min(chosen, 7))
        for name in ('experts_gate_up', 'experts_down'):
            setattr(moe, name, torch.nn.Parameter(getattr(moe, name)[kept]))
        moe.gate.weight = torch.nn.Parameter(moe.gate.weight[kept])
        moe.e_score_correction_bias = moe.e_score_correction_bias[kept]
        assert found[layer, 'expert', e] == pytest.approx(loss_of(twin, ids) - loss, abs=2e-5)


def test_an_expert_that_a_table_chooses_is_off_too():
    model, ids = v4_model(**HASHED), random_ids(20)
    found, loss = changes(model, ids), loss_of(model, ids)
    for e in range(8):
        twin = without(model, lambda m, e=e: m.transformer.h[0].mlp.experts_down[e].zero_())
        assert found[0, 'expert', e] == pytest.approx(loss_of(twin, ids) - loss, abs=2e-5)


def test_parts_of_v4s_attention(monkeypatch):
    """Of windows alone, CSA and HCA, in two groups of heads. Without rope: the scores by the other channels alone."""
    model, ids = v4_model(**V4, n_layer=3, num_nextn_predict_layers=0), random_ids(24)
    found, loss = changes(model, ids), loss_of(model, ids)
    for layer in range(3):
        for h in range(4):
            twin = without(model, lambda m, layer=layer, h=h: head_with_columns_of_zeros(m, layer, h))
            assert found[layer, 'head', h] == pytest.approx(loss_of(twin, ids) - loss, abs=2e-5)
        attn, n = model.transformer.h[layer].attn, model.config.qk_nope_head_dim

        def attend(q, parts, attn=attn, n=n):
            scores, values = [], []
            for rows, seen in parts:
                dots = torch.einsum('bthd,bsd->bths', q[..., :n], rows[..., :n]) * q.size(-1)**-0.5
                scores.append(dots.masked_fill(~seen.unsqueeze(2), -math.inf))
                values.append(rows)
            sinks = attn.sinks.view(1, 1, -1, 1).expand(1, q.size(1), -1, 1)
            weights = torch.cat((*scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]
            return torch.einsum('bths,bsd->bthd', weights, torch.cat(values, dim=1)), None

        with monkeypatch.context() as patched:
            patched.setattr(attn, 'attend', attend)
            assert found[layer, 'rope', 0] == pytest.approx(loss_of(model, ids) - loss, abs=2e-5)


def test_what_takes_long_is_left_out_unless_it_is_asked_for():
    small = tiny_model()
    assert 'parts' in looked(small, random_ids(20), knockouts='')['knockouts']
    assert looked(small, random_ids(20))['knockouts'] == {'passes': 28}
    small.flops_per_token = lambda: 1e12 / 28 / 20 + 1
    assert looked(small, random_ids(20), knockouts='')['knockouts'] == {'passes': 28}


# -----------------------------------------------------------------------------
# in a browser

ACTS = HOVER + """
const cells = (what, row = 'tr') => [...document.querySelectorAll(what)].map(x =>
  [...x.querySelectorAll(row)].map(y => [...y.children].map(z => z.textContent)));
said.lens = [4, 20, 31].map(i => {
  hover(i);
  return [cells('#lens table')[0], document.querySelector('#lens p').textContent];
});
said.marked = [...document.querySelectorAll('#layers input')].map(x => {
  x.click();
  return document.querySelectorAll('#lens tr.now').length;
});
said.charts = document.querySelectorAll('#lens svg').length;
said.said = document.querySelector('#knockouts p').textContent;
said.list = cells('#knockouts .scroll:not(figure .scroll)').flat().map(x => x.slice(0, 2));
said.bars = [...document.querySelectorAll('#knockouts .bar b')].map(x => parseFloat(x.style.width));
said.maps = cells('#knockouts figure table');
said.colours = [...document.querySelectorAll('#knockouts figure td')].map(x => x.style.background);
said.markup = document.querySelectorAll('#lens b, #lens i, #knockouts i').length;
said.width = document.documentElement.scrollWidth;
said.inner = innerWidth;
"""


def percent(x):
    return '<0.1%' if 0 < x < 0.0005 else f'{100 * x:.1f}%' if 0 < x < 0.00995 else f'{100 * x + 1e-9:.0f}%'


@pytest.mark.parametrize('width, overrides', [(1280, {}), (390, dict(hc_mult=2, **MEMORY, n_routed_experts=20))])
def test_lens_and_knock_outs_on_the_page(tmp_path, width, overrides):
    write_checkpoint(tmp_path, '<b>&"/i' + 'acdefghjklmnopqrstuvwxyz0123456789', v4_model, **overrides)
    (tmp_path / 'text.txt').write_text('<b>&"/i>' * 9)
    page, data, _ = write_page(tmp_path)
    said = in_browser(tmp_path, page, ACTS, width)
    assert said['errors'] == [] and said['inner'] == width and said['width'] <= width and said['markup'] == 0
    for i, (rows, words) in zip((4, 20, 31), said['lens']):
        for n, (row, block) in enumerate(zip(rows[1:], data['lens'], strict=True)):
            came = i < 31 and data['ids'][i + 1] == block['ids'][i]
            assert row[:2] == [str(n), data['words'][str(block['ids'][i])] + ' ✓' * came]
            assert row[2:4] == [percent(block['p'][i]), percent(block['came'][i]) if i < 31 else '–']
            assert row[4] == f'{block["loss"]:.3f}'
        assert f'token {i + 1}, {data["pieces"][i]}, ' in words
        assert ('streams' in words) == ('hc_mult' in overrides)
    assert said['marked'] == [1, 1, 0, 0] and said['charts'] == 1
    parts = sorted(data['knockouts']['parts'], key=lambda p: -p['change'])
    names = {'shared': 'shared experts', 'rope': 'rope', 'memory': 'memory'}

    def signed(x):
        return f'{"−" if x < -0.0005 else "+" if x >= 0.0005 else ""}{abs(x):.3f}'

    shown = [[f'{names.get(p["kind"]) or p["kind"] + " " + str(p["number"])}, layer {p["layer"]}', signed(p['change'])]
             for p in parts]
    assert sorted(said['list']) == sorted(shown) and [x for _, x in said['list']] == [x for _, x in shown]
    top = max(abs(p['change']) for p in parts)
    assert said['bars'] == pytest.approx([100 * abs(p['change']) / top for p in parts], abs=0.01)
    assert f'{len(parts)} parts' in said['said'] and f'{data["heads"][0]["loss"]:.3f}' in said['said']
    at = {(p['layer'], p['kind'], p['number']): signed(p['change']) for p in parts}
    experts, heads = said['maps']
    E = data['E']
    assert experts[0] == ['layer', *map(str, range(E)), 'shared']
    assert experts[1:] == [[str(i), *(at[i, 'expert', e] for e in range(E)), at[i, 'shared', 0]] for i in range(2)]
    memory = [['–'], [at.get((1, 'memory', 0))]] if 'engram_layers' in overrides else [[], []]
    assert heads[1:] == [[str(i), *(at[i, 'head', h] for h in range(4)), at[i, 'rope', 0], *memory[i]]
                         for i in range(2)]
    assert len(said['colours']) == 2 * (E + 1 + 4 + 1 + len(memory[0]))
