"""inside.py on models of model_v4.py: what is drawn against plain recomputations, and in a browser."""

import math
import re

import pytest
import torch
from conftest import tiny_model
from test_inside import (
    HOVER,
    assert_drafts_are_the_decoders,
    in_browser,
    looked,
    random_ids,
    unpacked,
    write_checkpoint,
    write_page,
)
from test_v4 import WINDOWS, v4_model
from torch.nn import functional as F

import model_v4

SPARSE = dict(index_topk=5, index_n_heads=3, index_head_dim=12)
MEMORY = dict(engram_layers='0,1', engram_heads=2, engram_rows=50, engram_dim=4)
HYPER = dict(hc_mult=3)
V4 = {**WINDOWS, **HYPER, 'engram_layers': '1', 'engram_rows': 50, 'num_hash_layers': 1, 'layer_types': 'sch',
      'n_layer': 3, 'scoring_func': 'sqrtsoftplus', 'swiglu_limit': 2.0}


def unpacked_bits(packed, columns):
    steps = unpacked(packed).long()
    return torch.stack([steps[:, j // 8] >> (j % 8) & 1 for j in range(columns)], dim=1).bool()


def whole_map(packed, T):
    """A map of one token per cell as (H, T, T)"""
    whole = torch.zeros(packed['shape'][0], T, T).double()
    whole[:, torch.ones(T, T).tril() > 0] = unpacked(packed).square()
    return whole


@torch.no_grad()
def inputs_and_outputs(model, ids, parts):
    """What went into each part, and what came out, when the main stack read the ids"""
    seen = {}
    hooks = [part.register_forward_hook(lambda part, args, y: seen.update({part: (args, y)})) for part in parts]
    model.eval().main_stack(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return [seen[part] for part in parts]


def test_a_plain_model_has_none_of_it():
    plain, off = looked(tiny_model(), [*range(20)]), looked(v4_model(), [*range(20)])
    for data in plain, off:
        assert set(data['cache']) == {'latent', 'mha', 'dtype', 'layers', 'latent_numbers', 'mha_numbers'}
        for layer in data['layers']:
            assert set(layer) == {'name', 'start', 'attention', 'experts'} and 'hashed' not in layer['experts']
            assert set(layer['attention']) == {'cells', 'cell', 'limit', 'weights', 'nope', 'rope', 'numbers', 'spread'}


@pytest.mark.parametrize('warmup', [False, True])
@torch.no_grad()
def test_chosen_positions_are_those_of_the_index_scores(warmup):
    """One query, one position, one head at a time; of equal scores the later position."""
    model, ids, T = v4_model(**SPARSE, index_warmup=warmup), random_ids(20), 20
    data = looked(model, ids)
    attns = [block.attn for block in model.transformer.h]
    for layer, attn, (args, _) in zip(data['layers'], attns, inputs_and_outputs(model, ids, attns)):
        x, rope = args[0], (model.rope_cos[:T], model.rope_sin[:T])
        q, w, k = attn.indexer(x, attn.q_a_layernorm(attn.q_a_proj(x)), *rope)
        queries, latent = attn.project(x, *rope)
        logits = (queries @ attn.expand(latent)[0].transpose(-1, -2))[0] * attn.scale            # (H, T, T)
        shown, weights = layer['attention'], whole_map(layer['attention']['weights'], T)
        got = unpacked_bits(shown['chosen'], T)
        assert (shown['topk'], shown['warmup']) == (5, warmup)
        for t in range(T):
            scores = [sum(w[0, t, j] * (q[0, t, j] @ k[0, s]).relu() for j in range(3)).item() for s in range(t + 1)]
            best = sorted(range(t + 1), key=lambda s: (scores[s], s))[-5:]
            assert got[t].nonzero().flatten().tolist() == sorted(best)
            dense = logits[:, t, :t + 1].softmax(dim=-1)
            assert shown['held'][t] == pytest.approx(dense[:, best].sum(dim=1).mean().item(), abs=1e-4)
            seen = range(t + 1) if warmup else best
            want = torch.zeros(4, T).double()
            want[:, list(seen)] = logits[:, t, list(seen)].softmax(dim=-1).double()
            torch.testing.assert_close(weights[:, t], want, atol=5e-3, rtol=0)


@torch.no_grad()
def test_the_masks_are_those_that_the_model_attends_by(monkeypatch):
    """In the MTP modules too, whose last rows are not shown."""
    model, ids, seen = v4_model(**SPARSE), random_ids(30), []
    masked = model_v4.SparseMLA.attend_masked
    monkeypatch.setattr(model_v4.SparseMLA, 'attend_masked', lambda attn, q, latent, kept, learns:
                        seen.append(kept[0]) or masked(attn, q, latent, kept, learns))
    data = looked(model, ids)
    for layer, kept in zip(data['layers'], seen[:4], strict=True):
        T = 30 - layer['start']
        assert torch.equal(unpacked_bits(layer['attention']['chosen'], T), kept[:T, :T])


@torch.no_grad()
def test_windows_entries_and_sinks():
    """The softmax written out for each query and head, over what the definition says that it sees."""
    model, T = v4_model(**V4), 21
    ids = random_ids(T)
    data, blocks = looked(model, ids), model.transformer.h
    found = inputs_and_outputs(model, ids, [block.attn for block in blocks])
    counted = []
    for layer, block, (args, _) in zip(data['layers'], blocks, found):
        attn, shown, x = block.attn, layer['attention'], args[0]
        cos, sin = (table.chunk(2, dim=-1)[attn.kind != 's'] for table in (model.rope_cos, model.rope_sin))
        place = torch.arange(T).unsqueeze(0)
        rope = cos[place].unsqueeze(2), sin[place].unsqueeze(2)
        c_q = attn.q_a_layernorm(attn.q_a_proj(x))
        q = attn.q_b_proj(c_q).unflatten(-1, (4, 8))
        q = model_v4.rope_last(q / (q.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt(), *rope)[0]     # (T, H, D)
        rows = model_v4.rope_last(attn.kv_norm(attn.kv_proj(x)).unsqueeze(2), *rope)[0, :, 0]
        rate, entries = {'s': 1, 'c': 4, 'h': 6}[attn.kind], rows[:0]
        if attn.kind != 's':
            entries = attn.compressor(x, cos, sin, None, place, True)[0]
            assert (shown['rate'], len(entries)) == (rate, T // rate)
            read = unpacked_bits(shown['read'], len(entries))
        if attn.kind == 'c':
            qi, w, ki = attn.indexer(x, c_q, rope, cos, sin, None, place, True)
        window = whole_map(shown['weights'], T)
        spread = whole_map(shown['entries'], T) if attn.kind != 's' else None
        assert (shown['window'], shown['kind']) == (5, attn.kind) and len(shown['cells'] * [0]) == T
        for t in range(T):
            near = [s for s in range(T) if 0 <= t - s < 5]
            far = [e for e in range(len(entries)) if (e + 1) * rate <= t + 1]
            if attn.kind == 'c':
                scores = {e: sum(w[0, t, j] * (qi[0, t, j] @ ki[0, e]).relu() for j in range(8)).item() for e in far}
                far = sorted(sorted(far, key=lambda e: (scores[e], e))[-3:])
            if attn.kind != 's':
                assert read[t].nonzero().flatten().tolist() == far
            for h in range(4):
                logits = torch.cat((rows[near] @ q[t, h] * 8**-0.5, entries[far] @ q[t, h] * 8**-0.5,
                                    attn.sinks[h:h + 1]))
                p = logits.softmax(dim=0).double()
                torch.testing.assert_close(window[h, t, near], p[:len(near)], atol=5e-3, rtol=0)
                assert window[h, t].sum() == pytest.approx(p[:len(near)].sum().item(), abs=0.02)
                assert unpacked(shown['sink'])[h, t] == pytest.approx(p[-1].item(), abs=1e-4)
                counted.append(p[-1].item())
                if attn.kind == 's':
                    continue
                assert unpacked(shown['share'])[h, t] == pytest.approx(p[len(near):-1].sum().item(), abs=1e-4)
                for e, weight in zip(far, p[len(near):-1].tolist()):
                    assert spread[h, t, e * rate:(e + 1) * rate] == pytest.approx([weight / rate] * rate, abs=5e-3)
        half = torch.tensor(counted[-4 * T:]).view(T, 4)[T // 2:].mean(dim=0)
        assert shown['numbers']['sink'] == pytest.approx(half.tolist(), abs=1e-4)


@torch.no_grad()
def test_streams_are_mixed_as_the_model_mixes_them():
    """pre gives the sublayer's input; post and comb give what the next sublayer reads from."""
    model, ids, n = v4_model(**HYPER), random_ids(20), 3
    data, blocks = looked(model, ids), model.transformer.h
    parts = [part for block in blocks for part in (block.attn_hc, block.attn, block.ffn_hc, block.mlp)]
    found = inputs_and_outputs(model, ids, [*parts, model.transformer.ln_f])
    streams = [args[0][0] for args, _ in [*found[::2], found[-1]]][:5]                  # before each sublayer, and last
    for i, (layer, s) in enumerate([(layer, s) for layer in data['layers'][:2] for s in (0, 1)]):
        shown = layer['streams'][s]
        pre, post, comb = (x.float() for x in unpacked(shown['at']).split((n, n, n * n), dim=1))
        assert shown['mean'] == pytest.approx(unpacked(shown['at']).mean(dim=0).tolist(), abs=1e-3)
        h, *_ = found[2 * i][1]
        torch.testing.assert_close((pre.unsqueeze(-1) * streams[i]).sum(dim=1), h[0], atol=1e-3, rtol=1e-3)
        y = found[2 * i + 1][1]
        y = (y[0] if isinstance(y, tuple) else y)[0]
        for j in range(n):
            want = post[:, j:j + 1] * y + sum(comb[:, k * n + j].unsqueeze(1) * streams[i][:, k] for k in range(n))
            torch.testing.assert_close(streams[i + 1][:, j], want, atol=2e-3, rtol=1e-3)
    assert [len(layer['streams']) for layer in data['layers']] == [2] * 4
    assert len(unpacked(data['layers'][3]['streams'][0]['at'])) == 18                    # a second module's rows
    assert 'at' not in looked(v4_model(hc_mult=9), ids)['layers'][0]['streams'][0]


@pytest.mark.parametrize('n', [1, 3])
@torch.no_grad()
def test_the_gate_is_engrams_formula(n):
    model, ids, C = v4_model(**MEMORY, hc_mult=n), random_ids(20), 32
    data, memories = looked(model, ids), [block.engram for block in model.transformer.h]
    assert ['gate' in layer for layer in data['layers']] == [True, True, False, False]
    for layer, memory, (args, _) in zip(data['layers'], memories, inputs_and_outputs(model, ids, memories)):
        h, got = args[0].view(20, n, C), unpacked(layer['gate'])
        for t in range(20):
            tokens = [ids[t - k] if t >= k else 61 for k in range(3)]
            e = memory.table.weight[memory.rows(torch.tensor(tokens))].flatten()
            for j, key in enumerate((memory.k_proj.weight @ e).view(n, C)):
                k_norm, h_norm = (p.view(n, C)[j] for p in (memory.k_norm, memory.h_norm))
                a = (F.rms_norm(key, (C,), k_norm, 1e-6) @ F.rms_norm(h[t, j], (C,), h_norm, 1e-6)).item() / C**0.5
                assert got[t, j] == pytest.approx(1 / (1 + math.exp(-math.copysign(abs(a)**0.5, a))), abs=1e-4)


def test_hashed_experts_are_those_of_the_table():
    model, ids = v4_model(num_hash_layers=1), random_ids(32)
    data = looked(model, ids)
    first, second = (data['layers'][i]['experts'] for i in (0, 1))
    table = model.transformer.h[0].mlp.tid2eid
    assert [set(row) for row in unpacked(first['chosen']).long().tolist()] == [set(table[i].tolist()) for i in ids]
    assert first['load'] == table[ids].flatten().bincount(minlength=8).tolist()
    assert first['hashed'] and first['moved'] == 0 and 'hashed' not in second


def test_drafts_of_a_model_with_rings_are_the_decoders():
    model, ids = v4_model(**V4).eval(), random_ids(24)
    assert_drafts_are_the_decoders(model, ids, (1, 4, 6, 13, 22))


def test_bytes_of_rings_and_entries():
    model = v4_model(**V4)
    shown = looked(model, random_ids(32))['cache']
    for n in (1, 7, 32):
        assert shown['bytes'][n - 1] == sum(x.nbytes for part in model.make_cache(1, n)[:3] for x in part)
    assert len(shown['bytes']) == 32 and shown['mha'] == 4 * 3 * 2 * 4 * 8


# -----------------------------------------------------------------------------
# in a browser

ACTS = HOVER + """
const indices = (what, holds) => [...document.querySelectorAll(what)].flatMap((x, i) => holds(x) ? [i] : []);
const marked = name => indices('.token', x => x.classList.contains(name));
const look = () => ({read: marked('read'), entry: marked('entry'),
  shaded: indices('.token .word', x => x.style.background), detail: document.getElementById('detail').textContent,
  cells: [...document.querySelectorAll('#streams td')].map(x => x.textContent),
  streams: document.getElementById('streams').textContent});
said.layers = [...document.querySelectorAll('#layers input')].map(radio => {
  radio.click();
  const at = [9, 20].map(i => { hover(i); return look(); });
  document.activeElement.blur();
  token(20).focus();
  token(20).dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}));
  return [...at, look()];
});
said.gates = [...document.querySelectorAll('.token')].map(x => x.querySelectorAll('u.gate').length);
said.strips = [...document.querySelectorAll('u.gate')].map(x => x.style.background);
said.legend = document.getElementById('legend').textContent;
said.canvases = document.querySelectorAll('canvas').length;
said.width = document.documentElement.scrollWidth;
said.inner = innerWidth;
"""


def shown_in_browser(tmp_path, width, **overrides):
    write_checkpoint(tmp_path, build=v4_model, **overrides)
    (tmp_path / 'text.txt').write_text('(+,-.)' * 9)
    page, data, _ = write_page(tmp_path)
    said = in_browser(tmp_path, page, ACTS, width)
    assert said['errors'] == [] and said['inner'] == width and said['width'] <= width
    return data, said


@pytest.mark.parametrize('width', [1280, 390])
def test_v4_on_the_page(tmp_path, width):
    data, said = shown_in_browser(tmp_path, width, **V4)
    for layer, looks in zip(data['layers'], said['layers'], strict=True):
        attention = layer['attention']
        for i, look in zip((9, 20, 21), looks):
            row = i - layer['start']
            assert look['read'] == [j for j in range(32) if 0 <= i - j < 5 and j >= layer['start']]
            entries = unpacked_bits(attention['read'], 32 // attention['rate'])[row] if 'read' in attention else []
            tokens = [w * attention['rate'] + n for w, on in enumerate(entries) if on for n in range(attention['rate'])]
            assert look['entry'] == tokens and set(look['shaded']) == {*look['read'], *tokens}
            sink = unpacked(attention['sink'])[:, row].mean().item()
            assert f'Read in layer {layer["name"]}' in look['detail']
            assert f'sink: {100 * sink:.0f}%' in look['detail'] or sink < 0.01
            if 'read' in attention:
                assert f'{int(sum(entries))} of {(row + 1) // attention["rate"]} entr' in look['detail']
            values = [x for part in layer['streams'] for x in (part['mean'], unpacked(part['at'])[row].tolist())]
            assert [float(x) for x in look['cells']] == pytest.approx(sum(values, []), abs=0.006)
            assert f'token {i + 1},' in look['streams']
        assert [look['detail'] for look in looks] == [*dict.fromkeys(look['detail'] for look in looks)]
    gates = unpacked(data['layers'][1]['gate']).mean(dim=1)
    assert said['gates'] == [1] * 32
    strips = [float(re.search(r'([\d.]+)%, transparent', strip)[1]) for strip in said['strips']]
    assert strips == pytest.approx((100 * gates).tolist(), abs=0.06)
    assert 'in layer 1, from 0' in said['legend']


def test_sparse_attention_on_the_page(tmp_path):
    data, said = shown_in_browser(tmp_path, 390, **SPARSE)
    for layer, looks in zip(data['layers'], said['layers'], strict=True):
        for i, look in zip((9, 20, 21), looks):
            row, start = i - layer['start'], layer['start']
            chosen = unpacked_bits(layer['attention']['chosen'], 32)[row].nonzero().flatten() + start
            assert look['read'] == look['shaded'] == chosen.tolist() and look['entry'] == []
            assert f'chose 5 of {row + 1} positions' in look['detail'] and look['cells'] == []
            assert f'{100 * layer["attention"]["held"][row]:.0f}% of what' in look['detail']
    assert 'Gate of the memory' not in said['layers'][0][0]['detail'] and not any(said['gates'])


@pytest.mark.parametrize('overrides', [
    dict(SPARSE, **MEMORY, index_warmup=True, hc_mult=16),
    dict(layer_types='hs', compress_rate_hca=30, num_nextn_predict_layers=0, n_routed_experts=0)])
def test_other_models_in_a_browser(tmp_path, overrides):
    shown_in_browser(tmp_path, 390, **overrides)


def test_windows_that_never_close():
    """A text shorter than an entry's window has no entries."""
    model = v4_model(layer_types='hc', compress_rate_hca=30, compress_rate_csa=4, index_topk=2)
    data = looked(model, random_ids(6))
    assert ['entries' in layer['attention'] for layer in data['layers']] == [False, True, False, False]
    assert data['layers'][0]['attention']['numbers']['entries'] == [0.0] * 4
