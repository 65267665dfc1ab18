"""The decoder against GPT.generate and whole forwards: greedy tokens, the distribution of sampled ones, its caches."""

import contextlib
import itertools
import re

import pytest
import torch
from conftest import TINY, tiny_model
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import model_v4
from extras import decode
from extras.decode import Decoder, verify
from model import MLA, Mistake, probabilities

COUNTING = 11  # t_{i+1} = t_i + 1 modulo this: every offset is predictable


def counting_model(steps=150, **overrides):
    """Trained until each head knows its token."""
    torch.manual_seed(0)
    model = tiny_model(**overrides).train()
    optimizer = model.configure_optimizers(0.0, 1e-2, (0.9, 0.99), 'cpu')
    for _ in range(steps):
        data = (torch.randint(COUNTING, (8, 1)) + torch.arange(17)) % COUNTING
        model(data[:, :-1], data[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def prompts_of(*lengths, vocab_size=61):
    return [torch.randint(vocab_size, (n,)).tolist() for n in lengths]


def plain(model, prompts, n, stop_token=None):
    """Each prompt alone, by the slow twin, cut behind its stop token."""
    rows = [model.generate(torch.tensor([p]), n, temperature=0)[0].tolist() for p in prompts]
    return cut(rows, prompts, stop_token)


def cut(rows, prompts, stop_token):
    new = [row[len(p):] for row, p in zip(rows, prompts)]
    return [p + (row[:row.index(stop_token) + 1] if stop_token in row else row) for p, row in zip(prompts, new)]


@pytest.mark.parametrize('overrides', [
    {}, dict(num_nextn_predict_layers=1), dict(num_nextn_predict_layers=3), dict(mtp_n_layer=2, q_lora_rank=0),
    dict(first_k_dense_replace=1, n_shared_experts=0, v_head_dim=24, bias=True), dict(n_routed_experts=0)])
def test_greedy_tokens_are_generates_for_prompts_of_all_lengths_and_beyond_block_size(overrides):
    model = tiny_model(**overrides).eval()                           # block_size is 32
    decoder = Decoder(model)
    for lengths in (1,), (7, 1, 3), (31, 32, 33, 40, 2):
        prompts = prompts_of(*lengths)
        want = plain(model, prompts, 25)
        for n, speculative in itertools.product((0, 1, 2, 25), (False, True)):
            rows = decoder.generate(prompts, n, temperature=0, speculative=speculative)[0]
            assert rows == [row[:len(prompt) + n] for row, prompt in zip(want, prompts)]


@pytest.mark.parametrize('overrides', [{}, dict(v_head_dim=24, q_lora_rank=0, bias=True)])
def test_without_absorption_each_decoder_gives_the_tokens_of_whole_forwards(monkeypatch, overrides):
    """MLA.absorb: decoding either folds the heads into the latent, or expands keys and values as training does."""
    monkeypatch.setattr(MLA, 'absorb', False)
    monkeypatch.setattr(MLA, 'attend_absorbed', None)
    model = tiny_model(**overrides).eval()
    prompts = prompts_of(5, 9)
    want = [[*prompt] for prompt in prompts]
    for row in want:
        row += (model(torch.tensor([row[-32:]]))[0].argmax().item() for _ in range(30))      # block_size is 32
    assert plain(model, prompts, 30) == want
    for speculative in (False, True):
        assert Decoder(model).generate(prompts, 30, temperature=0, speculative=speculative)[0] == want
    monkeypatch.undo()                                               # absorb is True again
    assert plain(model, prompts, 30) == want


@pytest.mark.parametrize('absorb', [False, True])
def test_a_changed_attention_is_decoded_only_without_absorption(monkeypatch, absorb):
    """QK-norm, as a researcher adds it: the queries' in project(), the keys' in expand()."""
    def project(attn, x, cos, sin, plain=MLA.project):
        q, latent = plain(attn, x, cos, sin)
        return F.rms_norm(q, q.shape[-1:]), latent

    def expand(attn, latent, plain=MLA.expand):
        k, v = plain(attn, latent)
        return F.rms_norm(k, k.shape[-1:]), v

    monkeypatch.setattr(MLA, 'project', project)
    monkeypatch.setattr(MLA, 'expand', expand)
    monkeypatch.setattr(MLA, 'absorb', absorb)
    model = tiny_model().eval()
    idx = torch.randint(61, (2, 12))
    cache = model.make_cache(2, 12)
    model(idx[:, :8], cache=cache)
    got, want = model(idx[:, 8:], cache=cache, pos=8)[0], model(idx)[0]
    assert torch.allclose(got, want, atol=1e-5) != absorb
    with pytest.raises(Mistake, match='set absorb = False') if absorb else contextlib.nullcontext():
        decode.check_absorption(model)
        assert Decoder(model).generate(idx.tolist(), 9, 0)[0] == model.generate(idx, 9, 0).tolist()


@pytest.mark.parametrize('change', ['a window of 8', 'the last layer alone'])
def test_a_changed_attention_is_seen_in_any_layer_and_at_any_distance(change):
    model = tiny_model().eval()
    decode.check_absorption(model)
    attn = model.blocks()[-1].attn

    def attend(q, latent, seen=None):
        T = q.size(2)
        if seen is None and change == 'a window of 8':
            seen = torch.ones(T, T, dtype=torch.bool).tril().triu(-7)
            k, v = attn.expand(latent)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=attn.scale).transpose(1, 2).flatten(2)
        return MLA.attend(attn, q if seen is None else 2 * q, latent, seen)

    attn.attend = attend
    with pytest.raises(Mistake, match='set absorb = False'):
        decode.check_absorption(model)


def test_a_stop_token_ends_each_row_for_itself():
    model, ended = tiny_model(block_size=64).eval(), []
    decoder, prompts = Decoder(model), prompts_of(5, 1, 9, 4, 4, 2)
    rows = plain(model, prompts, 40)
    for stop_token in rows[0][8:30:6]:
        want = cut(rows, prompts, stop_token)
        ended += [row[-1] == stop_token for row in want]
        for speculative in (False, True):
            got, _ = decoder.generate(prompts, 40, temperature=0, stop_token=stop_token, speculative=speculative)
            assert got == want
    assert 4 <= sum(ended) < len(ended)
    # one behind every position of a pass, among the drafts too; and beyond block_size
    model, short = counting_model(block_size=16), [[0, 1], [5], [2, 3, 4]]
    for n in (12, 40):
        rows = plain(model, short, n)
        for stop_token in range(COUNTING):
            got, _ = Decoder(model).generate(short, n, 0, stop_token=stop_token, speculative=True)
            assert got == cut(rows, short, stop_token)
    # a prompt that ends with it is not complete
    assert decoder.generate([[3, 7, stop_token]], 5, stop_token=stop_token)[0][0][3:] != []


def test_rows_that_are_done_wait_for_the_next_look():
    decoder = Decoder(counting_model())
    decoder.steps_between_looks = 7                                  # as a GPU's host does
    for speculative in (False, True):
        got, _ = decoder.generate([[0, 1], [5]], 20, 0, stop_token=8, speculative=speculative)
        assert got == [[*range(9)], [5, 6, 7, 8]]


@pytest.mark.parametrize('speculative', [False, True])
def test_rows_that_are_done_are_computed_no_longer(monkeypatch, speculative):
    model, sizes, step = counting_model(block_size=32), [], decode.step
    monkeypatch.setattr(decode, 'step', lambda model, s, *kind: sizes.append(len(s.done)) or step(model, s, *kind))
    prompts = [[n] for n in range(9)]                                # each stops at 9, the last one first
    rows, told = Decoder(model).generate(prompts, 20, 0, stop_token=9, speculative=speculative)
    assert rows == [[*range(n, 10)] for n in range(9)]
    assert not speculative or told.tokens.tolist() == [8 - n for n in range(9)]
    assert sizes == ([9, 5, 2] if speculative else [9, 9, 6, 6, 4, 3, 2, 1])  # rows go when a quarter of them is done


@pytest.mark.parametrize('overrides, speculative', [
    ({}, False), (dict(num_nextn_predict_layers=3), True), (dict(engram_layers='0,1', hc_mult=2), True),
    (dict(layer_types='ch', sliding_window=4, compress_rate_hca=8, index_topk=2), True)])
def test_a_stream_keeps_its_caches_from_prompt_to_prompt(monkeypatch, overrides, speculative):
    """Tokens and drafts are those of a prompt that is computed anew, but only its new tokens are read."""
    overrides = {**TINY, 'block_size': 48, 'initializer_range': 0.2, **overrides}
    later = 'index_topk' in overrides or 'hc_mult' in overrides
    model = (model_v4.GPT(model_v4.GPTConfig(**overrides)) if later else tiny_model(**overrides)).eval()
    read, stack, row = [], model.main_stack, prompts_of(5)[0]
    monkeypatch.setattr(model, 'main_stack', lambda idx, *args: read.append(idx.size(1)) or stack(idx, *args))
    decoder, D = Decoder(model), len(model.mtp) if speculative else 0
    # tokens to generate, tokens of the next line, and how many of the prompt are read: all, where the room is too small
    for n, line, reads in ((5, 4, 5), (1, 0, 5), (7, 1, 15), (9, 0, 2), (13, 2, 32), (5, 0, 3)):
        anew = Decoder(model)
        want = [*anew.stream(row, n, 0, speculative=speculative)]
        read.clear()
        lists = [*decoder.stream(row, n, 0, speculative=speculative, spare=10)]
        assert lists == want and read[0] == reads
        known = decoder.kept.known.item()
        assert decoder.kept.tokens[0, :known + D].equal(anew.kept.tokens[0, :known + D])      # and the next drafts
        assert decoder.kept.counts.equal(anew.kept.counts)
        for mine, other in zip(*(tree_leaves(d.kept.caches) for d in (decoder, anew))):
            if (mine.size(1), other.size(1)) == (decoder.kept.tokens.size(1), anew.kept.tokens.size(1)):  # no ring
                assert torch.allclose(mine[:, :known - 1 - D], other[:, :known - 1 - D], atol=1e-4)
        row += itertools.chain(*lists)
        row += prompts_of(line)[0] if line else []
    assert Decoder(model).generate([row[:-5]], 5, 0, speculative=speculative)[0] == [row]     # beyond block_size


def test_a_stream_that_is_left_goes_on_where_it_was():
    model, row = tiny_model().eval(), [3]
    decoder, want = Decoder(model), plain(model, [[3]], 25)[0]
    for tokens in decoder.stream([3], 20, 0, speculative=True, spare=9):
        row += tokens
        if len(row) > 5:
            break
    assert row == want[:len(row)] and len(row) < 12 and decoder.continues(row, 25, 2)
    rest = itertools.chain(*decoder.stream(row, 26 - len(row), 0, stop_token=want[-1], speculative=True))
    assert [*rest] == want[len(row):want.index(want[-1], len(row)) + 1]
    assert not decoder.continues([3, 3], 20, 2) and not decoder.continues(row[:2], 20, 2)
    decoder.generate([row], 5)
    assert not decoder.continues(row, 20, 2)                         # a compiled one writes to the same State
    for mistake, prompt, speculative in (('at least one', [], False), ('MTP modules', [1], True)):
        with pytest.raises(ValueError, match=mistake):
            next(Decoder(tiny_model(num_nextn_predict_layers=0)).stream(prompt, 3, speculative=speculative))


def test_equal_prompts_are_computed_once(monkeypatch):
    model, seen = tiny_model().eval(), []
    stack = model.main_stack
    monkeypatch.setattr(model, 'main_stack', lambda idx, *args: seen.append(idx.shape) or stack(idx, *args))
    a, b, c = prompts_of(5, 3, 5)
    prompts = [a, b, a, c, b, a]
    for speculative in (False, True):
        rows, _ = Decoder(model).generate(prompts, 9, temperature=0, speculative=speculative)
        assert rows == plain(model, prompts, 9) and seen[0] == (3, 5)
        seen.clear()


@pytest.mark.parametrize('speculative', [False, True])
def test_the_lowest_temperatures_take_the_likeliest_token(speculative):
    """Logits divided by 1e-39 are infinite: token 0 was taken."""
    model, prompts = tiny_model().eval(), prompts_of(5, 2)
    for lowest in (1e-6, 0.999e-6, 1e-39, 1e-300):
        rows, _ = Decoder(model).generate(prompts, 40, lowest, speculative=speculative)
        assert rows == plain(model, prompts, 40)


def test_past_block_size_the_settings_are_the_same():
    model = tiny_model().eval()
    prompts = prompts_of(30, 32, 4)
    assert Decoder(model).generate(prompts, 40, temperature=1.0, top_k=1)[0] == plain(model, prompts, 40)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('temperature', [0.7, 1e-5])
def test_half_precision_draws_from_the_plain_probabilities(monkeypatch, dtype, temperature):
    model, seen, real = decode.for_decoding(tiny_model(), dtype), [], decode.probabilities
    monkeypatch.setattr(decode, 'probabilities', lambda *args: seen.append(real(*args)) or seen[-1])
    prompt = prompts_of(6)[0]
    (row,), _ = Decoder(model).generate([prompt], 8, temperature, 20)
    assert len(seen) == 8 and all(probs.isfinite().all() for probs in seen)
    logits, _ = model(torch.tensor([prompt]))
    assert torch.equal(seen[0], real(logits, temperature, 20))
    assert 0 <= min(row) and max(row) < 61 and len(set(row[6:])) > 1


def test_norms_and_routers_are_not_cast_for_decoding():
    model = decode.for_decoding(tiny_model(), torch.bfloat16)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if re.search(r'norm|ln_f|\.gate\.', name) else torch.bfloat16), name


def test_rooms_hold_the_last_tokens_drafts():
    """A compiled step's, here run eagerly."""
    decoder, rooms = Decoder(tiny_model(block_size=300, num_nextn_predict_layers=3).eval()), set()
    decoder.compile = True
    for length in range(1, 200):
        rooms.add(decoder.state(1, length, 3).tokens.size(1))
        assert length + 4 <= max(rooms)
    state = decoder.state(1, length, 3)
    assert decoder.bytes_per_row(length, 3) > sum(x.nbytes for x in decode.tensors_of(state))
    assert rooms == {64, 96, 160, 288}
    for start, n in ((90, 10), (60, 33), (92, 2), (150, 20)):
        prompts = prompts_of(start, 3)
        want = plain(decoder.model, prompts, n)
        assert decoder.generate(prompts, n, temperature=0)[0] == want
        got, told = decoder.generate(prompts, n, temperature=0, speculative=True)
        assert got == want
        _, again = decoder.generate(prompts[::-1], n, temperature=0, speculative=True)  # in the same tensors
        assert all(torch.equal(a, b.flip(0)) for a, b in zip(told, again))
        assert told.tokens.tolist() == [n - 1] * 2


def test_a_nan_does_not_stay():
    model, prompts = tiny_model().eval(), prompts_of(4, 9)
    decoder, head = Decoder(model), model.lm_head.weight.detach().clone()
    decoder.compile = True                                           # its state stays
    with torch.no_grad():
        model.lm_head.weight.fill_(float('nan'))
        with pytest.raises(Mistake):
            decoder.generate(prompts, 10, temperature=0)
        model.lm_head.weight.copy_(head)
    assert decoder.generate(prompts, 10, temperature=0)[0] == plain(model, prompts, 10)


@pytest.mark.parametrize('temperature', [0, 1.0])
@pytest.mark.parametrize('speculative', [False, True])
def test_no_token_is_drawn_from_nan(temperature, speculative):
    """Token 0 would be: argmax takes the first nan, in the drafts too. One row of two is enough, at any position."""
    model = tiny_model(block_size=16, tie_word_embeddings=False).eval()
    with torch.no_grad():
        model.transformer.wte.weight[60] = float('nan')              # a token that the first prompt ends with
    for stop_token, n in itertools.product((None, 12), (1, 2, 9, 40)):
        with pytest.raises(Mistake, match='nan or infinity'):
            Decoder(model).generate([[1, 60], [5, 6, 7]], n, temperature, None, stop_token, speculative)


def test_drafts_that_are_nan_are_rejected():
    """They are the MTP module's mistake: the main stack's tokens are right."""
    model, prompts = tiny_model().eval(), prompts_of(3, 2)
    with torch.no_grad():
        for p in model.mtp.parameters():
            p.fill_(float('nan'))                                    # drafts are token 0 then, which comes nowhere
    for temperature, top_k in ((0, None), (1.0, 1)):
        rows, told = Decoder(model).generate(prompts, 20, temperature, top_k, speculative=True)
        assert rows == plain(model, prompts, 20) and told.accepted.sum() == 0


@pytest.mark.parametrize('modules', [1, 2, 3])
def test_caches_equal_those_of_whole_forwards(monkeypatch, modules):
    """Rejected drafts must leave the modules' caches too. Sampled, so that rows accept different numbers of drafts."""
    torch.manual_seed(1)
    model = counting_model(steps=30, num_nextn_predict_layers=modules)
    decoder, prompts = Decoder(model), prompts_of(5, 2, 9, vocab_size=COUNTING)
    decoder.compile = True                                           # no row leaves the state
    states, empty_state = [], decode.empty_state
    monkeypatch.setattr(decode, 'empty_state', lambda *args: states.append(empty_state(*args)) or states[-1])
    rows, told = decoder.generate(prompts, 20, temperature=2.0, speculative=True)
    assert 0 < told.accepted.sum() < told.drafts.sum()
    state, = states
    for i, row in enumerate(rows):
        idx = torch.tensor([row])
        caches = model.make_cache(1, 32, len(model.blocks()))
        with torch.no_grad():
            h, _ = model.main_stack(idx, caches)
            n = len(row) - 2                                         # the newest token has been through nothing yet
            torch.testing.assert_close(state.h[i, :n], h[0, :n], rtol=1e-5, atol=1e-5)
            layer = model.config.n_layer
            for k, module in enumerate(model.mtp, start=1):
                h, _ = model.mtp_module(module, idx[:, k:], h[:, :len(row) - k], caches[layer:])
                layer += len(module.h)
        for block, cache in enumerate(state.caches):
            k = 0 if block < model.config.n_layer else 1 + (block - model.config.n_layer) // model.config.mtp_n_layer
            torch.testing.assert_close(cache[i, :n - k], caches[block][0, :n - k], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('modules', [1, 2, 3])
def test_drafts_of_a_model_that_knows_its_text_are_all_accepted(modules):
    model = counting_model(num_nextn_predict_layers=modules)
    rows, told = Decoder(model).generate([[0, 1, 2, 3], [5, 6, 7]], 24, temperature=0, speculative=True)
    assert rows == [[(row[0] + i) % COUNTING for i in range(len(row))] for row in rows]
    assert torch.equal(told.drafts, told.accepted) and told.drafts.shape == (2, modules)
    assert told.passes.tolist() == [-(-23 // (modules + 1))] * 2


def test_a_row_keeps_its_drafts_whatever_the_others_accept(monkeypatch):
    """The second row accepts none."""
    def picky(drafts, q, p):
        new, a = verify(drafts, q, p)
        if drafts.size(1) > 0:
            new[-1, 0], a[-1] = p[-1, 0].argmax(), 0
        return new, a

    model, prompts = counting_model(block_size=64), [[4, 5, 6], [0, 1]]
    monkeypatch.setattr('extras.decode.verify', picky)
    rows, told = Decoder(model).generate(prompts, 31, top_k=1, speculative=True)
    assert rows == plain(model, prompts, 31)
    assert told.passes.tolist() == [10, 30] and told.accepted.sum(dim=1).tolist() == [20, 0]


def chi_square(counts, expected):
    keep = expected > 5
    return ((counts - expected)[keep] ** 2 / expected[keep]).sum().item(), int(keep.sum()) - 1


def pairs_drawn(rule):
    """The first two of the tokens that a rule makes of 4,000 pairs of drafts: how often each pair, and p's share."""
    torch.manual_seed(0)
    V, n = 5, 4000
    p1, p2, q1, q2 = (x / x.sum(-1, keepdim=True) for x in (torch.rand(*shape).pow(2) for shape in (
        (V,), (V, V), (V,), (V, V))))
    d1 = torch.multinomial(q1, n, replacement=True)
    d2 = torch.multinomial(q2[d1], 1).squeeze(1)
    q = torch.stack((q1.expand(n, V), q2[d1]), dim=1)
    p = torch.stack((p1.expand(n, V), p2[d1], torch.full((n, V), 1 / V)), dim=1)
    new, a = rule(torch.stack((d1, d2), dim=1), q, p)
    second = torch.where(a > 0, new[:, 1], torch.multinomial(p2[new[:, 0]], 1).squeeze(1))
    return torch.bincount(new[:, 0] * V + second, minlength=V * V).float(), (p1[:, None] * p2).flatten() * n


def test_verify_keeps_the_distribution():
    value, dof = chi_square(*pairs_drawn(verify))
    assert dof >= 15 and value < dof + 4 * (2 * dof) ** 0.5

    def accept_all(drafts, q, p):
        return torch.cat((drafts, drafts[:, :1]), dim=1), torch.full((len(drafts),), 2)

    def redraw_from_p(drafts, q, p):  # rather than from max(p - q, 0)
        new, a = verify(drafts, q, p)
        redrawn = torch.multinomial(p[torch.arange(len(a)), a], 1)
        return new.scatter(1, a.unsqueeze(1), redrawn), a

    for wrong in (accept_all, redraw_from_p):
        value, dof = chi_square(*pairs_drawn(wrong))
        assert value > dof + 8 * (2 * dof) ** 0.5


def test_sampled_output_of_a_model_keeps_the_distribution():
    """Of the third new token of rows with prompts of two lengths: a two-sample chi-square."""
    model = counting_model(steps=25, vocab_size=COUNTING)
    torch.manual_seed(0)
    prompts = [[3, 4, 5], [4, 5]] * 300
    counts = []
    for speculative in (False, True):
        rows, told = Decoder(model).generate(prompts, 3, temperature=4.0, top_k=8, speculative=speculative)
        counts.append(torch.bincount(torch.tensor([row[-1] for row in rows]), minlength=COUNTING).float())
    assert 0 < told.accepted.sum() < told.drafts.sum()
    slow = torch.cat([model.generate(torch.tensor(prompts[i:i + 1]).expand(300, -1), 3, 4.0, 8)[:, -1] for i in (0, 1)])
    for b in counts:
        a = torch.bincount(slow, minlength=COUNTING).float()
        keep = a + b > 10
        value = ((a - b)[keep] ** 2 / (a + b)[keep]).sum().item()
        dof = int(keep.sum()) - 1
        assert dof >= 4 and value < dof + 4 * (2 * dof) ** 0.5


def traced(monkeypatch):
    """torch.compile makes the same graphs, but Inductor, which takes half a minute, does not compile them."""
    real = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, options, **kwargs: real(
        f, backend='eager', options={'guard_filter_fn': options['guard_filter_fn']}, **kwargs))


@pytest.mark.parametrize('overrides, experts, inductor', [
    ({'first_k_dense_replace': 1, 'n_shared_experts': 0}, 'all', False),
    pytest.param({'first_k_dense_replace': 1, 'n_shared_experts': 0}, 'all', True, marks=pytest.mark.slow),
    pytest.param({'n_routed_experts': 16}, 'their own', True, marks=pytest.mark.slow)])
def test_a_compiled_step_is_compiled_once_and_its_tokens_are_the_same(monkeypatch, overrides, experts, inductor):
    """Whatever the position, the prompts' lengths, the stop token, the temperature and the weights."""
    if not inductor:
        traced(monkeypatch)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_model(**{'n_layer': 1, 'num_nextn_predict_layers': 1, 'block_size': 200} | overrides).eval()
    decoder = Decoder(model, compile=True)
    if experts == 'their own':
        for length in (150, 170, 160):
            prompts = prompts_of(length)
            assert decoder.generate(prompts, 20, temperature=0)[0] == plain(model, prompts, 20)
            with torch.no_grad():
                model.transformer.wte.weight.copy_(model.transformer.wte.weight.flip(0))
    else:
        for lengths, temperature, stop_token in (((5, 1, 9), 0.5, None), ((2, 19, 3), 0.8, 7)):
            prompts = prompts_of(*lengths)                           # top_k=1: the likeliest, but by a sampling step
            got, _ = decoder.generate(prompts, 20, temperature, 1, stop_token, speculative=True)
            assert got == plain(model, prompts, 20, stop_token)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == len(decoder.calls) == 1
    assert decoder.compile and decoder.compile_seconds > 0


@pytest.mark.slow
def test_a_compiled_decoder_does_not_take_the_graph_of_another_models(monkeypatch):
    """Whose sizes are the same. Without Inductor, which guards nothing."""
    traced(monkeypatch)
    prompts = prompts_of(4)
    sizes = dict(n_layer=1, num_nextn_predict_layers=0, tie_word_embeddings=False)
    for scaling in (1.0, 9.0):
        model = tiny_model(**sizes, routed_scaling_factor=scaling).eval()
        decoder = Decoder(model, compile=True)
        assert decoder.generate(prompts, 20, temperature=0)[0] == plain(model, prompts, 20) and decoder.compile


def test_weights_are_read_as_they_are_at_each_call():
    model = tiny_model().eval()
    decoder, prompts = Decoder(model), prompts_of(4)
    before = decoder.generate(prompts, 10, temperature=0)[0]
    with torch.no_grad():
        model.transformer.wte.weight.copy_(model.transformer.wte.weight.flip(0))
    after = decoder.generate(prompts, 10, temperature=0)[0]
    assert after == plain(model, prompts, 10) != before


def test_without_a_compiler_it_goes_on(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError('no compiler')

    monkeypatch.setattr(torch, 'compile', lambda *_, **__: fail)
    model, prompts = tiny_model().eval(), prompts_of(4, 2)
    assert Decoder(model, compile=True).generate(prompts, 10, temperature=0)[0] == plain(model, prompts, 10)
    assert capsys.readouterr().out == 'going on without torch.compile: RuntimeError: no compiler\n'


def test_what_cannot_be_generated_says_so():
    decoder = Decoder(tiny_model(num_nextn_predict_layers=0).eval())
    with pytest.raises(ValueError, match='MTP'):
        decoder.generate([[0]], 1, speculative=True)
    with pytest.raises(ValueError, match='at least one token'):
        decoder.generate([[0], []], 1)


def test_probabilities_at_temperature_0_are_all_at_the_likeliest():
    p = probabilities(torch.tensor([[0.0, 2.0, 1.0]]), 0, None)
    assert torch.equal(p, torch.tensor([[0.0, 1.0, 0.0]]))
