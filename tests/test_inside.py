"""inside.py: its numbers against plain recomputations, its page as a file, and in a browser where there is one."""

import base64
import dataclasses
import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, full_disk, run_inside, tiny_model
from test_decode import counting_model
from test_sample import write_tokenizer
from torch.nn import functional as F

import inside
from extras import decode, tokenizer
from model import MoE

LETTERS = {chr(40 + i): i for i in range(61)}
SPEAKS = tokenizer.characters(LETTERS, {i: ch for ch, i in LETTERS.items()})


def unpacked(packed):
    numbers = np.frombuffer(base64.b64decode(packed['data']), dtype=f'<u{packed["bits"] // 8}')
    return torch.from_numpy(numbers.astype(np.float64)).view(packed['shape']) * packed['scale']


def looked(model, ids, **kwargs):
    return inside.look(model.eval(), SPEAKS, ids, 16384, **kwargs)


def random_ids(n, vocab_size=61):
    return torch.randint(vocab_size, (n,)).tolist()


# -----------------------------------------------------------------------------
# the numbers

@pytest.mark.parametrize('overrides', [{}, dict(mtp_n_layer=2, first_k_dense_replace=1),
                                       dict(scoring_func='softmax', n_group=4, topk_group=2, norm_topk_prob=False)])
def test_experts_gates_and_losses_are_those_of_a_training_forward(monkeypatch, overrides):
    """Which runs the modules on tokens shifted by one and two, and says their losses and loads."""
    model, ids = tiny_model(**overrides), random_ids(20)
    for moe in model.moe_layers():
        moe.e_score_correction_bias.uniform_(-0.2, 0.2)
    before = [moe.e_score_correction_bias.clone() for moe in model.moe_layers()]
    data = looked(model, ids)
    assert all(torch.equal(moe.e_score_correction_bias, b) for moe, b in zip(model.moe_layers(), before))
    routed, route = [], MoE.route
    monkeypatch.setattr(MoE, 'route', lambda self, x, *_: routed.append(route(self, x)) or routed[-1])
    idx, targets = torch.tensor([ids]), torch.tensor([[*ids[1:], -1]])
    model.train()(idx, targets)
    layers = [layer for layer in data['layers'] if 'experts' in layer]
    assert len(layers) == len(routed) == len(model.moe_layers()) and len(data['layers']) == len(model.blocks())
    for layer, (scores, gates, experts) in zip(layers, routed):
        n, shown = 20 - layer['start'], layer['experts']
        torch.testing.assert_close(unpacked(shown['scores']), scores[:n], atol=2e-5, rtol=0, check_dtype=False)
        all_gates, wanted = (torch.zeros(n, 8).double() for _ in range(2))
        all_gates.scatter_(1, unpacked(shown['chosen']).long(), unpacked(shown['gates']))
        wanted.scatter_(1, experts[:n], gates[:n].double())
        torch.testing.assert_close(all_gates, wanted, atol=5e-5, rtol=0)
        assert (unpacked(shown['gates']).diff(dim=1) <= 0).all()          # the largest first
        without = [set(row.topk(3).indices.tolist()) for row in scores[:n]]
        if overrides.get('n_group', 1) == 1:
            moved = sum(a != set(b.tolist()) for a, b in zip(without, experts[:n])) / n
            assert shown['moved'] == pytest.approx(moved) and 0 < moved < 1
        if not layer['start']:
            load = torch.bincount(experts.flatten(), minlength=8)
            assert shown['load'] == load.tolist()
            assert shown['max_vio'] == pytest.approx((load.max() / load.float().mean() - 1).item())
    for head, loss in zip(data['heads'], model.stats['losses'], strict=True):
        assert head['loss'] == pytest.approx(loss.item(), abs=1e-4)
        p = torch.tensor(head['came'])
        assert -p.clamp(min=1e-9).log().mean() == pytest.approx(loss.item(), abs=0.2)
    logits, _ = model.eval()(idx, targets)
    best = logits[0].softmax(dim=-1).topk(5)
    assert data['heads'][0]['ids'] == best.indices.tolist()
    torch.testing.assert_close(torch.tensor(data['heads'][0]['p']), best.values, atol=1e-4, rtol=0)
    rank = logits[0, 3].argsort(descending=True).tolist().index(ids[4])
    assert data['heads'][0]['rank'][3] == rank + 1


@pytest.mark.parametrize('overrides', [{}, dict(v_head_dim=24, q_lora_rank=0, rope_factor=2.0)])
def test_nope_and_rope_add_up_to_the_attention(monkeypatch, overrides):
    """Of the queries and keys that the model itself gives to torch's attention."""
    model, ids = tiny_model(**overrides).eval(), random_ids(20)
    seen, attend = [], F.scaled_dot_product_attention

    def spy(q, k, v, scale, **kwargs):
        seen.append((scale * q[0] @ k[0].transpose(1, 2)).masked_fill(~torch.ones(20, 20).tril().bool(), -torch.inf))
        return attend(q, k, v, scale=scale, **kwargs)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', spy)
    model(torch.tensor([ids]))
    monkeypatch.undo()
    data = looked(model, ids)
    below = torch.ones(20, 20).tril() > 0
    for layer, scores in zip(data['layers'], seen[:2]):
        shown, weights = layer['attention'], scores.softmax(dim=-1)
        assert (shown['cells'], shown['cell']) == (20, 1)
        torch.testing.assert_close(unpacked(shown['weights']).square(), weights[:, below], atol=5e-3, rtol=0,
                                   check_dtype=False)
        total = torch.full((4, 20, 20), -torch.inf).double()
        total[:, below] = (unpacked(shown['nope']) + unpacked(shown['rope']) - 2) * shown['limit']
        torch.testing.assert_close(total.softmax(dim=-1).float(), weights, atol=0.02 * shown['limit'], rtol=0)
        assert shown['numbers']['previous'] == pytest.approx(
            [w.diagonal(-1)[9:].mean().item() for w in weights], abs=1e-4)
        back = (weights * (torch.arange(20)[:, None] - torch.arange(20))).sum(dim=-1)[:, 10:].mean(dim=1)
        assert shown['numbers']['back'] == pytest.approx(back.tolist(), abs=1e-4)


def test_cells_of_several_tokens():
    nope, rope = torch.randn(2, 3, 10, 10).unbind()
    one, four = inside.attention_of(nope, rope, 1), inside.attention_of(nope, rope, 4)
    assert (four['cells'], four['cell']) == (3, 4)
    below = torch.ones(10, 10).tril() > 0
    for name in ('weights', 'nope'):
        whole = torch.zeros(3, 10, 10).double()
        whole[:, below], got = (unpacked(x[name]).square() if name == 'weights' else
                                (unpacked(x[name]) - 1) * x['limit'] for x in (one, four))
        for n, (i, j) in enumerate([(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]):
            cell = whole[:, 4 * i:4 * i + 4, 4 * j:4 * j + 4]
            pairs = below[4 * i:4 * i + 4, 4 * j:4 * j + 4].sum() if name == 'nope' else cell.size(1)
            assert got[:, n] == pytest.approx((cell.sum(dim=(1, 2)) / pairs).numpy(), abs=0.05)


@pytest.mark.parametrize('overrides', [{}, dict(num_nextn_predict_layers=3), dict(num_nextn_predict_layers=1)])
def test_drafts_are_those_of_the_decoder(overrides):
    """Its passes over a text of its own: from each place that one begins at, as many accepted drafts."""
    model, seen = counting_model(steps=4, **overrides), set()
    D = len(model.mtp)
    for start in ([3, 9, 40, 2], [7, 7], [1, 50, 50, 22, 6, 6, 0]):
        (row,), told = decode.Decoder(model).generate([start], 32 - len(start), temperature=0, speculative=True)
        data = looked(model, row)
        accepted, passes = data['drafts']['accepted'], 0
        assert accepted[0] == -1 and len(accepted) == len(row) == 32
        p, last = len(start), len(row) - 1                              # p: the newest token that is known
        while p < last:
            right = [a == b for a, b in zip(data['drafts']['ids'][p], row[p + 1:])]
            assert accepted[p] >= [*right, False].index(False)
            if p + D < last:
                assert accepted[p] == [*right, False].index(False)
                seen.add(accepted[p])
            p, passes = p + 1 + accepted[p], passes + 1
        assert passes == told.passes.item()
    assert len(seen) > 1                                                # some were rejected, some accepted


def test_drafts_in_a_text_that_the_model_would_not_write():
    model, ids = counting_model(steps=4), random_ids(12)
    assert_drafts_are_the_decoders(model, ids, range(1, 11))


def assert_drafts_are_the_decoders(model, ids, places):
    """The decoder is put at each place with the text before it."""
    drafts = looked(model, ids)['drafts']
    for p in places:
        s = decode.empty_state(model, 1, 40, 2)
        with torch.no_grad():
            decode.begin(model, s, [ids[:p]], 20, 0.0, None, 2, False, None)
            s.tokens[0, p] = ids[p]                                     # where it had its own choice
            decode.draft(model, s, False, None)
            assert drafts['ids'][p] == s.tokens[0, p + 1:p + 3].tolist()
            decode.step(model, s, 2, False, None)
        assert drafts['accepted'][p] == s.known.item() - (p + 1) - 1
        choice = model.generate(torch.tensor([[*ids[:p + 1]]]), 1, temperature=0)[0, -1]
        assert drafts['choices'][p][0] == choice


def test_load_and_typical_tokens_are_counted_over_the_whole_text():
    """A router made by hand: layer 0 sends a token to the experts that its number names."""
    model = tiny_model(num_experts_per_tok=1, n_layer=1, num_nextn_predict_layers=0, n_embd=64).eval()
    moe = model.moe_layers()[0]
    with torch.no_grad():
        model.transformer.wte.weight.copy_(torch.eye(64)[:61] * 100)    # its residual stream knows its token
        model.transformer.h[0].attn.o_proj.weight.zero_()
        moe.gate.weight.zero_()
        for i in range(61):
            moe.gate.weight[i % 8, i] = 1.0
    ids = [i for _ in range(40) for i in (1, 2, 2, 9, 3, 5)]
    data = looked(model, ids)
    assert (data['tokens'], data['counted'], len(data['ids'])) == (240, 224, 32)
    experts, counted = data['layers'][0]['experts'], ids[:224]
    assert experts['load'] == [sum(i % 8 == e for i in counted) for e in range(8)]
    assert [i for i, *_ in experts['typical'][1]] == [1, 9] and experts['typical'][0] == []
    token, lift, times = experts['typical'][2][0]
    assert (token, times) == (2, counted.count(2)) and lift == pytest.approx(224 / counted.count(2), abs=0.01)
    assert data['words'][9] == SPEAKS.decode([9])


def test_cache_bytes():
    model = tiny_model(v_head_dim=24)
    shown = looked(model, random_ids(32))['cache']
    assert 32 * shown['latent'] == sum(part.nbytes for part in model.make_cache(1, 32))
    assert shown['mha_numbers'] == 4 * (8 + 24) and looked(model, random_ids(9), dtype='bfloat16')['cache'][
        'latent'] * 2 == shown['latent']


@pytest.mark.parametrize('records, steps', [
    (None, None), ([{'step': 0, 'loss': 1.0}], None),
    ([{'step': 1, 'loss': 1.0, 'load': [[1]], 'bias': [[0.0]]}], None),
    ([{'step': i, 'loss': 1.0, 'load': [[i, 3]] * 2, 'bias': [[0.0, i]] * 2} for i in range(201)], 67),
    ([{'step': 1, 'loss': 1.0, 'load': [[1, 'x']] * 2, 'bias': [[0, 0]] * 2}], None)])
def test_the_log(tmp_path, records, steps):
    path = tmp_path / 'log.jsonl'
    if records is not None:
        path.write_text(''.join(json.dumps(r) + '\n' for r in records))
    shown = inside.training_of(path, 2, 2)
    assert (shown and len(shown['steps'])) == steps
    if shown:
        assert shown['steps'][-1] == 200 and shown['bias'][-1] == [[0.0, 200.0]] * 2
        assert shown['load'][-1][0] == pytest.approx([200 / 203, 3 / 203], abs=1e-4)


# -----------------------------------------------------------------------------
# tokens as text

def test_a_character_of_several_tokens(tiktoken_cache, monkeypatch, tmp_path):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tiktoken_cache))
    write_tokenizer(tmp_path / 'hf')
    for speaks in (tokenizer.gpt2(), tokenizer.from_folder(tmp_path / 'hf')):
        for said in ('naïve – 東京 𝄞 ok\n', '𝄞𝄞', ' the\tthe'):
            ids = speaks.encode(said)
            pieces = inside.pieces_of(speaks, ids)
            assert len(pieces) == len(ids) and ''.join(pieces) == said
        ids = speaks.encode('𝄞')
        assert '' in inside.pieces_of(speaks, ids)
        assert inside.pieces_of(speaks, ids[:1] + speaks.encode('a')) == [f'#{ids[0]}', 'a']   # no UTF-8
        assert inside.pieces_of(speaks, ids[1:2]) == [f'#{ids[1]}']


def test_characters_that_more_than_four_tokens_hold_together():
    """No token but the last ends where a character does; the first stood as its number."""
    raw = 'a€€€é'.encode()
    parts = [raw[:1], raw[1:3], raw[3:5], raw[5:6], raw[6:8], raw[8:11], raw[11:], b'!', b'\x80', b'\x80', b'!']
    speaks = tokenizer.Tokenizer('bytes', None, lambda ids: b''.join(parts[i] for i in ids).decode(errors='replace'),
                                 len(parts), [], None)
    pieces = inside.pieces_of(speaks, [*range(len(parts))])
    assert pieces == ['a', '€€€é', '', '', '', '', '', '!', '#8', '#9', '!']


def test_a_token_without_a_text(tmp_path):
    write_tokenizer(tmp_path / 'hf', '<s> $A', bos_token='<s>')
    assert inside.pieces_of(tokenizer.from_folder(tmp_path / 'hf'), [0, 258, 1]) == ['#0', 'th', '#1']


def test_a_long_chain_of_shared_characters_takes_no_longer_than_other_tokens():
    """Each token ends one character and begins the next: reading them took a time that grew with the square."""
    table, read = (b'\xc3', b'\xa9\xc3', b'\xa9'), []

    def decode(ids):
        read.append(len(ids))
        return b''.join(table[i] for i in ids).decode(errors='replace')

    for n in (1, 62, 63, 64, 65, 126, 127, 128, 500, 3000):
        read.clear()
        pieces = inside.pieces_of(SPEAKS._replace(decode=decode), [0] + [1] * n + [2])
        assert len(pieces) == n + 2 and ''.join(pieces) == 'é' * (n + 1)
        assert sum(read) < 200 * (n + 2)


# -----------------------------------------------------------------------------
# the page

EVIL = '</script><!--\0\x1b\u202e\u2028\ufeff&"\'<>`\\ \n\tab'


def write_checkpoint(folder, chars=None, build=tiny_model, **overrides):
    chars = ''.join(LETTERS) if chars is None else chars
    model = build(**{'vocab_size': max(61, len(chars)), **overrides})
    folder.mkdir(exist_ok=True)
    meta = {'stoi': {ch: i for i, ch in enumerate(chars)}, 'itos': dict(enumerate(chars))} if chars else {}
    torch.save({'model': model.state_dict(), 'model_args': dataclasses.asdict(model.config), 'iter_num': 7,
                'meta': meta, 'config': {'dtype': 'bfloat16'}}, folder / 'ckpt.pt')


def write_page(folder, *flags):
    """The page of the checkpoint in a folder for its text.txt, and its numbers."""
    code, said, err = run_inside(str(ROOT / 'inside.py'), f'--out_dir={folder}', f'--text={folder}/text.txt',
                                 '--device=cpu', *flags, cwd=folder)
    assert code == 0 and not err, err
    page = (folder / 'inside.html').read_text()
    return page, json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]), said


@pytest.fixture(scope='module')
def evil(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('evil<b>')
    write_checkpoint(folder, ''.join(dict.fromkeys(EVIL + ''.join(LETTERS))), block_size=len(EVIL))
    (folder / 'text.txt').write_text(EVIL, newline='')
    record = {'step': 1, 'loss': 1.0, 'load': [[5] * 8] * 4, 'bias': [[0.01] * 8] * 4}
    (folder / 'log.jsonl').write_text(json.dumps(record) + '\n' + json.dumps(record | {'step': 2}) + '\n')
    return folder


def test_no_token_is_markup(evil):
    page, data, _ = write_page(evil)
    assert ''.join(data['pieces']) == EVIL.translate({0: 'U+0000', 0x1b: 'U+001B', 0x202e: 'U+202E', 0x2028: 'U+2028',
                                                      0xfeff: 'U+FEFF'})
    elements = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: elements.append(tag)
    parser.feed(page)
    template = (ROOT / 'extras/inside.html').read_text()
    assert page.count('<') == template.count('<') and elements.count('script') == 2 and 'b' not in elements
    assert page.isascii() or set(page) - set(template) <= {ch for ch in page if ch.isascii()}


def test_the_page_needs_no_network(evil):
    page, *_ = write_page(evil)
    page = re.sub(r'(id="data">).*?<', r'\1<', page, flags=re.S)         # the numbers may spell anything
    page = page.replace('http://www.w3.org/2000/svg', '')               # a name, not an address
    assert not re.search(r'https?:|["\'(]//|@import|fetch\(|XMLHttp|WebSocket|import\(|src=', page)
    assert re.findall(r'(?:href|url)[=(]"?([^")]*)', page) == ['data:,']


def test_another_number_of_experts(tmp_path):
    write_checkpoint(tmp_path, block_size=16)
    (tmp_path / 'text.txt').write_text(SPEAKS.decode(random_ids(16)))
    said = {}
    for experts in ('', '1', 'all'):
        _, data, printed = write_page(tmp_path, '--count_tokens=16', f'--experts={experts}')
        said[experts] = printed.split()[-1]
        assert said[experts] == f'{data["heads"][0]["loss"]:.4f}'
    assert len(set(said.values())) == 3


@pytest.mark.parametrize('overrides', [
    dict(n_layer=4, num_nextn_predict_layers=2), dict(n_layer=8, n_head=8, n_embd=64, n_routed_experts=20,
                                                      num_experts_per_tok=14, mtp_n_layer=2)], ids=['demo', 'main run'])
def test_the_size_of_512_tokens(tmp_path, overrides):
    write_checkpoint(tmp_path, block_size=512, **overrides)
    (tmp_path / 'text.txt').write_text(SPEAKS.decode(random_ids(600)))
    page, data, said = write_page(tmp_path, '--count_tokens=512', '--knockouts=False')
    assert len(data['pieces']) == 512 and len(page.encode()) < 2e6
    assert '512 tokens; the file has 600, the context holds 512' in said
    cells, cell = data['layers'][0]['attention']['cells'], data['layers'][0]['attention']['cell']
    assert (cells - 1) * cell < 512 <= cells * cell and cells > 50


@pytest.mark.parametrize('overrides', [
    dict(n_routed_experts=0), dict(num_nextn_predict_layers=0), dict(num_experts_per_tok=1, mtp_n_layer=2),
    dict(scoring_func='softmax', n_group=4, topk_group=2), dict(first_k_dense_replace=2), dict(n_shared_experts=0),
    dict(n_routed_experts=0, num_nextn_predict_layers=0, block_size=2), dict(num_experts_per_tok=8, block_size=4)])
def test_kinds_of_models(tmp_path, overrides):
    write_checkpoint(tmp_path, **overrides)
    (tmp_path / 'text.txt').write_text('(+,-.)' * 9)
    _, data, _ = write_page(tmp_path)
    dense = overrides.get('n_routed_experts') == 0
    modules = overrides.get('num_nextn_predict_layers', 2)
    assert len(data['heads']) == 1 + modules and (data['drafts'] is None) == (modules == 0)
    with_experts = ['experts' in layer for layer in data['layers']]
    assert with_experts == [not dense and i >= overrides.get('first_k_dense_replace', 0)
                            for i in range(2 + modules * overrides.get('mtp_n_layer', 1))]


def test_tokenizer_json_and_gpt2(tmp_path, tiktoken_cache, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tiktoken_cache))
    for name, vocab_size in (('hf', 260), ('gpt2', 50304)):
        write_checkpoint(tmp_path / name, '', vocab_size=vocab_size)
        (tmp_path / name / 'text.txt').write_text('the 東京 cat')
    write_tokenizer(tmp_path / 'hf', bos_token='<s>', add_bos_token=True)
    _, data, _ = write_page(tmp_path / 'hf')
    assert data['pieces'][:3] == ['#0', 'the', ' '] and data['ids'][0] == 0
    _, data, _ = write_page(tmp_path / 'gpt2')
    assert ''.join(data['pieces']) == 'the 東京 cat'


@pytest.mark.parametrize('flags, message', [
    (['--text='], "text='' must name the file"), (['--text=nowhere'], 'No such file'), (['--text=binary'], 'codec'),
    (['--text=short'], 'must have 4 at least'), (['--text=empty'], 'has 0 tokens'), (['--text=other'], 'does not know'),
    (['--out=text.txt'], 'must end in .html'), (['--out=nowhere/a.html'], 'must end in .html'),
    (['--out=folder.html'], 'this program did not write it'), (['--out_dir=nowhere', '--out=a.html'], 'is missing'),
    (['--out_dir='], 'must name the folder'), (['--count_tokens=0'], 'positive'), (['--device=gpu'], 'cannot be used'),
    (['--map_bytes=0'], 'positive'), (['--knockouts=1'], "be 'True', 'False'"), (['--tekst=a'], 'did you mean text'),
    (['--out_dir=nan', '--out=a.html'], 'finite'),
])
def test_mistakes(tmp_path, flags, message):
    write_checkpoint(tmp_path / 'out')
    write_checkpoint(tmp_path / 'nan')
    saved = torch.load(tmp_path / 'nan/ckpt.pt', weights_only=True)
    saved['model']['transformer.ln_f.weight'][0] = torch.nan
    torch.save(saved, tmp_path / 'nan/ckpt.pt')
    (tmp_path / 'folder.html').mkdir()
    for name, content in (('text.txt', b'(())'), ('binary', b'\xff'), ('short', b'(()'), ('empty', b''),
                          ('other', '(é)'.encode())):
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.rglob('*'))
    code, _, said = run_inside(str(ROOT / 'inside.py'), '--out_dir=out', '--text=text.txt', '--device=cpu', *flags,
                               cwd=tmp_path)
    assert code == 2 and message in said and said.count('\n') == 1, said
    assert sorted(tmp_path.rglob('*')) == before
    assert (tmp_path / 'text.txt').read_bytes() == b'(())'


def test_what_a_page_replaces(tmp_path):
    """An earlier page, whole or not at all; neither another file nor the text."""
    write_checkpoint(tmp_path / 'out')
    texts = {'text.txt': '(())', 'note.html': '<p>', 'page.html': '(()('}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / 'link.html').symlink_to('page.html')
    args = str(ROOT / 'inside.py'), '--out_dir=out', '--device=cpu', '--count_tokens=64'
    for flags in (['--text=text.txt', '--out=note.html'], ['--text=page.html', '--out=link.html']):
        code, _, said = run_inside(*args, *flags, cwd=tmp_path)
        assert code == 2 and 'did not write it' in said or 'is the file to read' in said
        assert {name: (tmp_path / name).read_text() for name in texts} == texts
    (tmp_path / 'page.html').unlink()
    for _ in range(2):
        code, _, said = run_inside(*args, '--text=text.txt', '--out=link.html', cwd=tmp_path)
        assert code == 0 and (tmp_path / 'link.html').is_symlink(), said
    before = (tmp_path / 'page.html').read_bytes()
    with full_disk(20_000):
        code, _, said = run_inside(*args, '--text=text.txt', '--out=link.html', cwd=tmp_path)
    assert (code, said) == (2, 'link.html cannot be written: File too large\n')
    assert (tmp_path / 'page.html').read_bytes() == before and not list(tmp_path.rglob('*.tmp'))


# -----------------------------------------------------------------------------
# in a browser

# a reader's acts, and what is on the page after each
HOVER = """
const said = {errors};
const token = i => document.querySelectorAll('.token')[i];
const hover = i => token(i).dispatchEvent(new PointerEvent('pointerover', {bubbles: true, pointerType: 'mouse'}));
"""
ACTS = HOVER + """
const bands = () => [...document.querySelectorAll('.band')].map(x => x.textContent).join('|');
const detail = () => document.getElementById('detail').textContent;
said.tokens = document.querySelectorAll('.token').length;
said.title = document.title;
said.words = [...document.querySelectorAll('.word')].map(x => x.textContent);
said.bands = [bands()];
hover(5);
said.hovered = [detail()];
token(2).click();
hover(5);
said.hovered.push(detail());
token(2).click();
hover(7);
said.hovered.push(detail());
for (const key of ['ArrowRight', 'End', 'Home'])
  document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true})), said[key] = detail();
said.focus = document.activeElement.getAttribute('aria-label');
said.stops = [...document.querySelectorAll('.token')].filter(x => x.tabIndex === 0).length;
for (const radio of document.querySelectorAll('#layers input')) { radio.click(); said.bands.push(bands()); }
const numbers = document.querySelectorAll('#experts .chip');
said.chips = numbers.length;
if (numbers.length) { numbers[0].click(); said.away = document.querySelectorAll('.token.away').length; }
said.canvases = [...document.querySelectorAll('canvas')].map(x =>
  new Set(x.getContext('2d').getImageData(0, 0, x.width, x.height).data).size);
said.charts = document.querySelectorAll('svg').length;
said.width = document.documentElement.scrollWidth;
"""
# it ends up in an element that --dump-dom prints, also of a page that holds this one in a frame
TELL = """
const out = document.createElement('pre');
out.id = 'said';
out.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(said))));
document.body.append(out);
if (parent !== window) parent.postMessage(out.textContent, '*');
"""
FRAME = """<iframe src="acts.html" style="width: WIDTHpx; height: 844px; border: 0"></iframe><script>
onmessage = event => {
  const out = document.createElement('pre');
  out.id = 'said';
  out.textContent = event.data;
  document.body.append(out);
};</script>"""


def in_browser(folder, page, acts=ACTS, frame=None):
    """What the acts found on the page, 500 pixels wide: a headless window is no narrower. frame: of this width instead
    """
    browser = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if browser is None:
        pytest.skip('no Chromium here: apt-get install chromium')
    start = "<script>const errors = []; onerror = message => { errors.push(message); };" \
            "console.error = console.warn = (...words) => errors.push(words.join(' '));</script>"
    page = page.replace('<head>', '<head>' + start).replace('</body>', f'<script>{acts}{TELL}</script></body>')
    (folder / 'acts.html').write_text(page)
    (folder / 'frame.html').write_text(FRAME.replace('WIDTH', str(frame)))
    command = [browser, '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={folder}/profile',
               '--window-size=500,844', '--virtual-time-budget=2000', '--dump-dom',
               f'file://{folder}/{"frame" if frame else "acts"}.html']
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    found = re.search(r'<pre id="said">([^<]+)</pre>', done.stdout)
    assert found, done.stderr[-2000:] + done.stdout[-2000:]
    return json.loads(base64.b64decode(found[1]))


def test_hover_keys_and_layers(evil):
    page, data, _ = write_page(evil)
    said = in_browser(evil, page)
    n = len(EVIL)
    assert said['errors'] == [] and said['tokens'] == n and said['stops'] == 1
    assert 'evil<b>' in said['title'] and said['width'] <= 500
    assert said['words'][:3] == ['<', '/', 's'] and 'U+202E' in said['words'] and '⏎' in said['words']
    for shown, i in zip([*said['hovered'], said['ArrowRight'], said['End'], said['Home']], (5, 2, 7, 8, n - 1, 0)):
        assert f'{i + 1} of {n}' in shown and 'What comes next' in shown
        assert ('Drafts from here' in shown) == (i > 0)
        experts = data['layers'][0]['experts']
        gates = [f'{g:.2f}' for g in unpacked(experts['gates'])[i].tolist()]
        chosen = unpacked(experts['chosen'])[i].long().tolist()
        assert '  '.join(f'{e} {g}' for e, g in zip(chosen, gates)) in shown
    assert said['focus'].startswith('1: <; experts ')
    first, *each = said['bands']
    assert first == each[0] and len(set(each)) == len(data['layers']) == 4
    for layer, shown in zip(data['layers'], each):
        want = [' '] * layer['start'] + [f'{row[0]:.0f}' for row in unpacked(layer['experts']['chosen']).tolist()]
        assert [band.split(' ')[0] or ' ' for band in shown.split('|')] == want
    last = data['layers'][-1]['experts']
    assert said['chips'] == 8 and said['away'] == n - (unpacked(last['chosen']) == 0).any(dim=1).sum()
    assert len(said['canvases']) == 3 * 4 and min(said['canvases']) > 10 and said['charts'] == 4


@pytest.mark.parametrize('overrides', [dict(n_routed_experts=0, num_nextn_predict_layers=0),
                                       dict(first_k_dense_replace=1, scoring_func='softmax')])
def test_other_models_in_a_browser(tmp_path, overrides):
    write_checkpoint(tmp_path, **overrides)
    (tmp_path / 'text.txt').write_text('(+,-.)' * 9)
    page, data, _ = write_page(tmp_path)
    said = in_browser(tmp_path, page)
    assert said['errors'] == [] and said['tokens'] == 32
    assert ('Experts' in said['End']) == ('first_k_dense_replace' in overrides)
