"""inside.py --live=True: the page's model in a Chromium against model.py, and the page under a visitor's hands."""

import base64
import dataclasses
import html.parser
import json
import re
import time

import numpy as np
import pytest
import torch
from chromium import Chromium
from conftest import ROOT, run_inside, tiny_model
from test_inside import EVIL, LETTERS, write_checkpoint
from test_v4 import v4_model

import inside
from extras import live, probes, tokenizer
from model import GPT, probabilities

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
    for name, p in model.named_parameters():
        if name.endswith('.bias'):
            torch.nn.init.normal_(p)
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


@pytest.mark.parametrize('kind', ['MoE', 'groups', 'dense'])
@torch.no_grad()
def test_parts_are_off_as_in_the_knock_outs(tab, kind):
    copied, ids = load(tab, biased_model(**KINDS[kind])), torch.randint(61, (1, 16))
    parts, wanted = probes.parts_of(copied), [copied(ids, ids)[0]]
    for *_, off in parts:
        with off():
            wanted.append(copied(ids, ids)[0])
    got = tab.evaluate(f"""
        var parts = [[0, ''], ...{json.dumps([part[:3] for part in parts])}];
        parts.map(([layer, kind, number]) => {{
          model.h.forEach(({{attn, mlp}}, l) => {{
            const off = name => l === layer && kind === name;
            attn.off = {{heads: off('head') ? [number] : [], rope: off('rope')}};
            mlp.off = {{experts: off('expert') ? [number] : [], shared: off('shared')}};
          }});
          const reader = new Reader(model, 16);
          return {ids[0].tolist()}.map(id => [...reader.read(id).logits]);
        }})""")
    wanted = torch.cat(wanted)
    torch.testing.assert_close(torch.tensor(got), wanted, atol=1e-4, rtol=0)
    changed = (wanted[1:] - wanted[0]).abs().amax(dim=(1, 2)) > 1e-3          # some experts are never chosen
    assert changed.float().mean() > 0.8 and len(changed) == len(parts) >= 10


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


# -----------------------------------------------------------------------------
# the page

def write_page(folder, *flags):
    """The page of the checkpoint in a folder, and what was printed"""
    code, said, err = run_inside(str(ROOT / 'inside.py'), f'--out_dir={folder}', '--live=True', *flags, cwd=folder)
    assert code == 0 and not err, err
    return (folder / 'live.html').read_text(), said


@pytest.fixture(scope='module')
def evil(tmp_path_factory):
    """A folder with the page of a model whose name and vocabulary would be markup"""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('evil<b>')
    write_checkpoint(folder, ''.join(dict.fromkeys(EVIL + ''.join(LETTERS))), block_size=64)
    saved = torch.load(folder / 'ckpt.pt', weights_only=True)
    saved['config']['dataset'] = '<img>'
    torch.save(saved, folder / 'ckpt.pt')
    write_page(folder)
    return folder


@pytest.fixture
def open_page(browser):
    tabs = []

    def open_tab(folder, **kwargs):
        """The page in a tab that knows three functions more, once it has written its first text"""
        tabs.append(browser.open((folder / 'live.html').as_uri(), **kwargs))
        tabs[-1].evaluate("""
            var fill = (id, value) => {
              $(id).value = value;
              $(id).dispatchEvent(new Event('input'));
              clearTimeout(waiting);
              go();
              return $('mistake').textContent;
            };
            var written = n => runs[n].records.map(record => record.token);
            var articles = () => [...document.querySelectorAll('article')].map(x => x.textContent);
            0""")
        return done(tabs[-1])

    yield open_tab
    for tab in tabs:
        tab.close()


def done(tab):
    tab.wait('!running && $("status").textContent.startsWith("Done")')
    return tab


@torch.no_grad()
def test_the_page_writes_what_the_model_would(open_page, tmp_path):
    """300 greedy tokens by the worker; again with a part switched off by a click; and with it on again."""
    write_checkpoint(tmp_path, build=biased_model)
    write_page(tmp_path)
    tab = open_page(tmp_path)
    copied, _, _ = live.rounded(GPT.from_checkpoint(tmp_path / 'ckpt.pt')[0].eval())
    prompt = ''.join(LETTERS)[:PROMPT].replace('"', '.').replace('\\', '.')
    tab.evaluate(f'fill("temperature", 0); fill("length", {LENGTH}); fill("prompt", "{prompt}")')
    tokens = done(tab).evaluate('written(0)')
    logits = copied.lm_head(copied.main_stack(torch.tensor([tokens]))[0])[0]
    assert len(tokens) == LENGTH and tokens[PROMPT:] == logits[PROMPT - 1:-1].argmax(dim=-1).tolist()
    came = logits[:-1].softmax(dim=-1).gather(1, torch.tensor(tokens[1:]).unsqueeze(1)).squeeze(1)
    shown = torch.tensor(tab.evaluate('runs[0].records.slice(1).map(record => record.came)'))
    torch.testing.assert_close(shown, came, atol=1e-5, rtol=1e-4)
    assert '300 tokens written' in tab.evaluate('articles()[0]')
    tab.evaluate("""document.querySelector('[aria-label^="head 1 of layer 0"]').click()""")
    changed = done(tab).evaluate('written(1)')
    assert 'without head 1 of layer 0' in tab.evaluate('articles()[1]') and tab.evaluate('written(0)') == tokens
    copied.transformer.h[0].attn.o_proj.weight[:, 8:16] = 0                  # what reads head 1
    logits = copied.lm_head(copied.main_stack(torch.tensor([changed]))[0])[0]
    assert changed != tokens and changed[PROMPT:] == logits[PROMPT - 1:-1].argmax(dim=-1).tolist()
    tab.evaluate('$("reset").click()')
    assert len(done(tab).evaluate('articles()')) == 1 and tab.evaluate('written(0)') == tokens
    assert tab.errors() == []


def test_a_new_run_ends_the_one_before(open_page, evil):
    tab = open_page(evil)
    tab.evaluate("""
        var came = [];
        worker.addEventListener('message', ({data}) => came.push(data.run));
        $('prompt').value = 'ab'.repeat(9);
        $('slowly').click()""")
    tab.wait('came.length > 1')                                              # 4 tokens a second
    assert tab.evaluate('runs[0].records.length > runs[0].asked.prompt.length && !articles()[0].includes("tokens/s")')
    slow = tab.evaluate('$("slowly").click(), came[0]')
    done(tab)
    time.sleep(0.6)
    assert tab.evaluate(f'came.indexOf(numbers) > 0 && came.lastIndexOf({slow}) < came.indexOf(numbers)')
    tab.evaluate('$("slowly").click()')
    tab.wait(f'came.at(-1) > {slow} + 1')
    tab.evaluate('$("stop").click()')
    tab.wait('$("status").textContent.startsWith("Done")')
    before = tab.evaluate('came.length')
    time.sleep(0.6)
    assert tab.evaluate('came.length') <= before + 1 and tab.errors() == []


def test_no_token_and_no_prompt_is_markup(open_page, evil):
    """And no script runs but the page's own, nothing is fetched: its policy holds."""
    page, template = (evil / 'live.html').read_text(), (ROOT / 'extras/live.html').read_text()
    assert page.count('<') == template.count('<') + SOURCE.count('<') and 'evil&lt;b&gt;' in page

    def elements(text):
        found, parser = [], html.parser.HTMLParser()
        parser.handle_starttag = lambda tag, attributes: found.append(tag)
        parser.feed(text)
        return found

    assert elements(page) == elements(template) and elements(page).count('script') == 4
    tab = open_page(evil)
    assert 'learned from the data set <img> and' in tab.evaluate('$("learned").textContent')
    loaded = 'document.querySelectorAll("script, style, link, iframe, img").length'
    before = tab.evaluate(loaded)
    tab.evaluate(f'fill("prompt", {json.dumps(EVIL)})')
    shown = done(tab).evaluate('runs[0].nodes.map(node => node.firstChild.textContent).join("")')
    assert shown.startswith('</script><!--U+0000U+001BU+202EU+2028U+FEFF&"\'<>`\\ ⏎⇥ab')
    assert tab.evaluate(loaded) == before and tab.errors() == []
    tab.evaluate("""
        var refused = [], script = document.createElement('script'), image = new Image();
        document.addEventListener('securitypolicyviolation', event => refused.push(event.effectiveDirective));
        script.textContent = 'refused.push("a script ran")';
        document.body.append(script);
        image.src = 'https://example.com/a.png';
        fetch('https://example.com/').catch(() => refused.push('no answer'));
        document.body.setAttribute('style', 'color: red');
        0""")
    tab.wait('refused.length >= 5')
    assert {*tab.evaluate('refused')} == {'script-src-elem', 'img-src', 'connect-src', 'style-src-attr', 'no answer'}


def test_the_page_needs_no_network(evil):
    page = (evil / 'live.html').read_text()
    page = re.sub(r'(id="(?:data|weights)">).*?<', r'\1<', page, flags=re.S)  # they may spell anything
    assert not re.search(r'https?:|["\'(]//\w|@import|fetch\(|XMLHttp|WebSocket|import\(|src=|eval\(|innerHTML', page)
    assert re.findall(r'(?:href|url)[=(]"?([^")]*)', page) == ['data:,']
    assert '</script' not in SOURCE and '<!--' not in SOURCE


def test_what_a_visitor_may_type(open_page, evil):
    tab, stale = open_page(evil), 'document.querySelectorAll("[inert]").length'
    said = tab.evaluate(r'fill("prompt", "aé\x07béa")')
    assert said.endswith('characters. It skips “é”, “U+0007” and reads the rest.')
    assert done(tab).evaluate('decode(runs[0].asked.prompt)') == 'aba'
    for empty in ('', 'é'):
        assert 'at least one' in tab.evaluate(f'fill("prompt", "{empty}")') and tab.evaluate(stale) == 5
        tab.wait('$("status").textContent.includes("the old one") && $("again").disabled')
    assert tab.evaluate('fill("prompt", "a")') == '' and tab.evaluate(stale) == 0
    tab.evaluate('fill("prompt", "ab".repeat(64))')
    assert done(tab).evaluate('runs[0].asked.prompt.length') == 32
    assert 'has 128 tokens: it reads the last 32' in tab.evaluate('$("status").textContent')
    for length in (64, 48):
        tab.evaluate(f'fill("length", {length})')
        last = done(tab).evaluate(f'written(0).slice({length} / 2)')
        tab.evaluate('$("on").click()')
        assert done(tab).evaluate('runs[0].asked.prompt') == last


def test_what_a_change_did_is_said_below_the_parts(open_page, evil):
    """The surprises before and after, and where the texts part; a kept token stays, until Esc."""
    tab, at = open_page(evil), '[runs.indexOf(picked.run), picked.i, pinned]'
    tab.evaluate('fill("temperature", 2); fill("prompt", "ab(+,-./")')
    assert done(tab).evaluate(at) == [0, 36, False]                          # the middle of 8 ... 64
    assert tab.evaluate('$("result").hidden')
    tab.evaluate('runs[0].nodes[20].click(); $("rope").click()')
    done(tab).wait('$("said").textContent.startsWith("Without rope: ")')
    assert tab.evaluate(at) == [0, 20, True]
    losses = tab.evaluate("""runs.map(run => {
        let sum = 0;
        for (let i = 1; i < 8; i++) sum -= Math.log(run.records[i].came);
        return (sum / 7).toFixed(2);
    })""")
    first, second = tab.evaluate('[written(0), written(1)]')
    differs = next(i for i in range(64) if first[i] != second[i])
    assert tab.evaluate('$("said").textContent') == (
        f'Without rope: surprise at your text {losses[0]} → {losses[1]} (lower is better). The texts differ from token '
        f'{differs + 1} on; both stand above.')
    blind = np.log(tab.evaluate('C.vocab_size'))
    assert f'text {losses[1]} over 7 tokens (lower is better; blind guessing: {blind:.2f})' in \
        tab.evaluate('articles()[1]')
    line = tab.evaluate('$("reset").scrollIntoView(), (({top, bottom}) => [top, bottom])($("said").'
                        'getBoundingClientRect())')
    assert 0 < line[0] < line[1] < 900
    tab.evaluate('$("both").click()')
    tab.wait('Math.abs($("texts").getBoundingClientRect().top) < 5')
    tab.evaluate('runs[1].nodes[30].click(); fill("temperature", 1)')
    assert done(tab).evaluate(at) == [1, 30, True]
    tab.evaluate('fill("length", 24)')
    assert done(tab).evaluate(at) == [1, 23, True]
    tab.press('Escape')
    assert tab.evaluate(at) == [1, 23, False]
    tab.evaluate('$("reset").click()')
    done(tab).wait('runs[0].nodes.length === 24')
    assert tab.evaluate(at) == [0, 16, False]
    tab.press('ArrowRight')                                                  # nothing has the focus
    assert tab.evaluate(at) == [0, 17, True]
    tab.evaluate('fill("prompt", "b")')
    assert not done(tab).evaluate('pinned') and tab.errors() == []


def test_the_same_seed_writes_the_same_text(open_page, evil):
    tab, texts = open_page(evil), []
    for seed in (1, 2, 1):
        tab.evaluate(f'fill("prompt", "ab"); fill("seed", {seed})')
        texts.append(done(tab).evaluate('written(0)'))
    assert texts[0] == texts[2] != texts[1]
    tab.evaluate('$("again").click()')
    assert done(tab).evaluate('written(0)') == texts[1] and tab.evaluate('$("seed").value') == '2'


@pytest.mark.parametrize('width, dark', [(1280, False), (390, True)])
def test_by_keys_alone(open_page, evil, width, dark):
    tab = open_page(evil, width=width, dark=dark)
    focus = 'document.activeElement.getAttribute("aria-label") || document.activeElement.id'
    tab.evaluate('$("prompt").select()')
    tab.call('Input.insertText', text='ab(')
    tab.wait('runs[0].asked.prompt.length === 3')
    done(tab)
    stops = ['']
    while 'layer 0: on' not in stops[-1]:
        tab.press('Tab')
        stops.append(tab.evaluate(focus))
        assert len(stops) < 30, stops
    sliders = ['temperature', 'top_k', 'length', 'seed'] if width > 800 else []        # closed on a phone
    assert [stop for stop in stops if stop.isidentifier()] == ['again', 'on', 'slowly', *sliders, 'head', 'rope',
                                                               'experts']
    assert sum(bool(re.match(r'\d+: ', stop)) for stop in stops) == 1        # the text is one stop
    tab.press('ArrowRight')
    assert tab.evaluate(focus).startswith('head 1 of layer 0: on, looks most at')
    tab.press('Enter', '\r')
    assert done(tab).evaluate(focus) == 'head 1 of layer 0: off' and len(tab.evaluate('articles()')) == 2
    tab.evaluate('runs[0].nodes[3].focus()')
    for key, token in (('ArrowRight', 5), ('End', 64), ('Home', 1)):
        tab.press(key)
        assert tab.evaluate(focus).startswith(f'{token}: ')
        tab.wait(f'$("at").textContent.includes("token {token} of 64")')
    unnamed = """[...document.querySelectorAll('button, input, select, textarea')].filter(x =>
        !(x.textContent.trim() || x.getAttribute('aria-label') || x.labels && x.labels.length)).length"""
    assert tab.evaluate(unnamed) == 0 and tab.errors() == []
    assert tab.evaluate('document.documentElement.scrollWidth') <= width


@pytest.mark.parametrize('overrides', [dict(n_routed_experts=0, num_nextn_predict_layers=0),
                                       dict(scoring_func='softmax', n_group=4, topk_group=2, first_k_dense_replace=1)])
def test_other_models_on_a_page(open_page, tmp_path, overrides):
    write_checkpoint(tmp_path, **overrides)
    write_page(tmp_path)
    tab = open_page(tmp_path)
    assert len(tab.evaluate('written(0)')) == 32
    tab.evaluate('document.querySelectorAll(".part").forEach(x => x.click())')         # all off
    assert len(done(tab).evaluate('written(1)')) == 32 and tab.errors() == []


def write_bpe(folder, change=lambda table: None):
    """A checkpoint of a byte-level BPE"""
    text = "the cat and the hat; it's 東京 naïve 12 345\n\n  the end\t" * 9
    write_checkpoint(folder, '', vocab_size=330, block_size=64)
    for name, data in tokenizer.train_bpe([text], 320).items():
        (folder / name).write_bytes(data)
    table = json.loads((folder / 'tokenizer.json').read_text())
    change(table)
    (folder / 'tokenizer.json').write_text(json.dumps(table))


def test_a_byte_level_bpe(open_page, tmp_path):
    write_bpe(tmp_path)
    write_page(tmp_path)
    tab, speaks = open_page(tmp_path), tokenizer.from_folder(tmp_path)
    for text in ('the cat', " it's we'll 12 345,  the\n\n the end\t", 'naïve 東京 𝄞𝄞 ok\u0085\u2003x\ufeffy',
                 '<b>"&amp;</script>', 'THE  \r\n x', "'s'S ''' don't", 'a<|endoftext|>b  <|endoftext|>'):
        ids = speaks.encode(text)
        assert tab.evaluate(f'encode({json.dumps(text)})') == ids, text
        assert tab.evaluate(f'decode({ids})') == text
    assert ''.join(tab.evaluate(f'{speaks.encode("the 𝄞")}.map(textOf)')) == r'the \xf0\x9d\x84\x9e'
    tab.evaluate('added.set("<|end-of-text|>", 1)')                          # a hyphen, which no expression may escape
    assert tab.evaluate('encode("the<|end-of-text|>")') == [*speaks.encode('the'), 1]
    tab.evaluate('added.delete("<|end-of-text|>")')
    milliseconds = 'began = performance.now(), encode("東京大学".repeat(1000)), performance.now() - began'
    assert tab.evaluate(milliseconds) < 5000                                 # the page does not freeze
    assert tab.evaluate('textOf(329)') == '#329' and tab.evaluate('D.stop') == speaks.end == 0
    assert tab.errors() == []


# -----------------------------------------------------------------------------
# what does not fit

def prefixed(table):
    table['pre_tokenizer']['add_prefix_space'] = True


def worded(table):
    table['model'] = {'type': 'WordLevel', 'vocab': table['model']['vocab'], 'unk_token': 'the'}


@pytest.mark.parametrize('change, message', [
    (prefixed, 'is no byte-level BPE'), (worded, 'is no byte-level BPE'),
    (lambda saved: saved['config'].update(fp8=True), 'FP8'),
    (lambda saved: saved['model']['lm_head.weight'].fill_(1e5), 'beyond 65,504'),
    (lambda saved: saved['model']['transformer.ln_f.weight'].fill_(3e38), 'nan or infinity'),
], ids=['prefix', 'words', 'fp8', 'fp16', 'overflow'])
def test_checkpoints_that_do_not_fit(tmp_path, change, message):
    if change in (prefixed, worded):
        write_bpe(tmp_path, change)
    else:
        write_checkpoint(tmp_path)
        saved = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
        change(saved)
        torch.save(saved, tmp_path / 'ckpt.pt')
    assert_mistake(tmp_path, message)


def assert_mistake(folder, message, *flags):
    before = sorted(folder.rglob('*'))
    code, _, said = run_inside(str(ROOT / 'inside.py'), f'--out_dir={folder}', '--live=True', *flags, cwd=folder)
    assert code == 2 and message in said and said.count('\n') == 1, said
    assert sorted(folder.rglob('*')) == before


def test_models_that_do_not_fit(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, build=v4_model)
    assert_mistake(tmp_path, 'this is one of model_v4.py')
    write_checkpoint(tmp_path, block_size=1)
    assert_mistake(tmp_path, 'a context of 2 tokens')
    write_checkpoint(tmp_path)
    model = tiny_model()
    model.transformer.h[0].attn.q_norm = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match='does not know this architecture.*q_norm.weight'):
        live.check(model, {})
    monkeypatch.setattr(live, 'MOST', 1000)
    assert_mistake(tmp_path, 'holds up to 1,000 parameters, and this model has')


@pytest.mark.parametrize('flags, message', [
    (['--out_dir='], 'must name the folder'), (['--out=a.txt'], 'must end in .html'), (['--text=nowhere'], 'No such'),
    (['--out=nowhere/a.html'], 'must end in .html'), (['--out=note.html'], 'did not write it'),
    (['--text=short'], '2 tokens at least'), (['--text=other'], 'does not know the characters'),
    (['--text=note.html', '--out=note.html'], 'is the file to read'), (['--experts=all'], 'leave out experts')])
def test_mistakes(tmp_path, flags, message):
    write_checkpoint(tmp_path)
    for name, text in (('note.html', '(())'), ('short', '('), ('other', 'é')):
        (tmp_path / name).write_text(text)
    assert_mistake(tmp_path, message, *flags)
    assert (tmp_path / 'note.html').read_text() == '(())'


def test_the_first_prompt_ends_with_a_word():
    speaks = tokenizer.characters({ch: i for i, ch in enumerate('ab \n')}, {})
    for text, prompt in (('ab ab\nab', 'ab'), ('ab a b', 'ab a'), ('ababab', 'abab'), ('ab ', 'ab ')):
        assert live.first_prompt(speaks, text, 8) == prompt


def test_rounding_is_measured(tmp_path, monkeypatch):
    """On a text, which is the prompt too, and on what the model wrote; what is printed is the difference of losses."""
    write_checkpoint(tmp_path)
    text = '(+,-.)' * 40
    (tmp_path / 'text.txt').write_text(text)
    losses = {}
    for most in (8_000_000, 1000):
        monkeypatch.setattr(live, 'MOST_FP16', most)
        page, said = write_page(tmp_path, '--text=text.txt')
        data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
        assert data['prompt'] == text[:16] and ('float16' in said) == (most > 1000) == (data['kind'] == 'float16')
        before, after = losses[most] = data['rounding']['losses']
        model = GPT.from_checkpoint(tmp_path / 'ckpt.pt')[0].eval()
        windows = torch.tensor(tokenizer.characters(LETTERS, {}).encode(text))[:224].view(7, 32)
        for loss, m in ((before, model), (after, live.rounded(model)[0])):
            assert loss == pytest.approx(m(windows[:, :-1], windows[:, 1:].contiguous())[1].item(), abs=1e-5)
        assert f'by {after - before:+.5f} on 217 tokens of the text' in said
    assert 0 < abs(losses[8_000_000][1] - before) < abs(losses[1000][1] - before)
    _, said = write_page(tmp_path)
    assert 'on 992 tokens that the model wrote' in said
