"""Speculative decoding against plain decoding: the same tokens when greedy, the same distribution when sampled."""

import pytest
import torch
from conftest import tiny_model

from extras import decode
from extras.decode import verify
from model import draw, probabilities

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


@pytest.mark.parametrize('overrides', [{}, {'num_nextn_predict_layers': 1}, {'num_nextn_predict_layers': 3},
                                       {'mtp_n_layer': 2, 'first_k_dense_replace': 1}])
@pytest.mark.parametrize('prompt', [1, 7])
def test_greedy_output_is_the_same_up_to_block_size_and_beyond(overrides, prompt):
    model = tiny_model(**overrides).eval()
    idx = torch.randint(61, (3, prompt))
    for n in (0, 1, 2, 40):
        plain = model.generate(idx, n, temperature=0)
        assert torch.equal(decode.generate(model, idx, n, temperature=0)[0], plain)


@pytest.mark.parametrize('modules', [1, 2, 3])
def test_drafts_of_a_model_that_knows_its_text_are_all_accepted(modules):
    model = counting_model(num_nextn_predict_layers=modules)
    idx = torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8]])
    out, speculation = decode.generate(model, idx, 24, temperature=0)
    assert torch.equal(out, (idx[:, :1] + torch.arange(28)) % COUNTING)
    drafts, accepted = speculation.drafts, speculation.accepted
    assert torch.equal(drafts, accepted) and len(drafts) == modules
    assert speculation.passes <= -(-24 // (modules + 1))


def test_states_from_the_modules_caches_equal_those_of_whole_forwards():
    """Rejected drafts must leave the modules' caches too: every state that drafts is made again without a cache."""
    torch.manual_seed(1)
    model = tiny_model(num_nextn_predict_layers=3).eval()
    cached, calls = model.mtp_module, []

    def spy(module, token, h, cache, start):
        out = cached(module, token, h, cache, start)
        calls.append((token.clone(), start, out[0]))
        return out

    model.mtp_module = spy
    out, _ = decode.generate(model, torch.randint(61, (2, 5)), 20, temperature=0.3)
    assert len(calls) >= 30
    for i in range(0, len(calls), 3):
        _, start, state = calls[i]
        h, _ = model.main_stack(out[:, :start + state.size(1)])
        for k, (token, start, state) in enumerate(calls[i:i + 3], start=1):
            h, _ = cached(model.mtp[k - 1], torch.cat((out[:, k:start + k], token), dim=1), h)
            torch.testing.assert_close(h[:, start:], state, rtol=1e-4, atol=1e-4)


def chi_square(counts, expected):
    keep = expected > 5
    return ((counts - expected)[keep] ** 2 / expected[keep]).sum().item(), int(keep.sum()) - 1


def test_verify_keeps_the_distribution():
    """Of the first two tokens, however the drafts are distributed."""
    torch.manual_seed(0)
    V, n = 5, 4000
    p1, p2 = torch.rand(V).pow(2), torch.rand(V, V).pow(2)
    q1, q2 = torch.rand(V).pow(2), torch.rand(V, V).pow(2)
    p1, p2, q1, q2 = (x / x.sum(-1, keepdim=True) for x in (p1, p2, q1, q2))
    pairs = torch.zeros(V, V)
    first = torch.zeros(V)
    d1 = torch.multinomial(q1, n, replacement=True)
    d2 = torch.multinomial(q2[d1], 1).squeeze(1)
    for i in range(n):  # a row at a time: every row of a batch goes as far as the least lucky one
        drafts = torch.stack((d1[i], d2[i])).view(1, 2)
        q = torch.stack((q1, q2[d1[i]])).unsqueeze(0)
        p = torch.stack((p1, p2[d1[i]], torch.full((V,), 1 / V))).unsqueeze(0)
        new = verify(drafts, q, p, torch.zeros(1, 1, dtype=torch.bool))[0][0]
        first[new[0]] += 1
        second = new[1] if len(new) > 1 else draw(p2[new[0]].view(1, V))[0, 0]
        pairs[new[0], second] += 1
    value, dof = chi_square(first, p1 * first.sum())
    assert value < {3: 16.3, 4: 18.5}[dof]
    value, dof = chi_square(pairs.flatten(), (p1[:, None] * p2).flatten() * pairs.sum())
    assert value < dof + 4 * (2 * dof) ** 0.5
    # the drafts themselves are not so distributed, so the test can fail
    assert chi_square(torch.bincount(d1, minlength=V).float(), p1 * n)[0] > 100


def test_a_row_that_is_done_holds_no_other_back():
    """Its drafts are impossible, the other row's are certain: all of those are taken, and they alone are counted."""
    certain = torch.eye(4)[[1, 2, 3]].unsqueeze(0)                   # p: tokens 1, 2, 3 in turn
    p, q = certain.repeat(2, 1, 1), certain[:, :2].repeat(2, 1, 1)
    drafts = torch.tensor([[1, 2], [0, 0]])
    q[1] = torch.eye(4)[[0, 0]]
    tokens, reached, accepted = verify(drafts, q, p, torch.tensor([[False], [True]]))
    assert tokens[0].tolist() == [1, 2, 3]
    assert reached.tolist() == accepted.tolist() == [1, 1]
    tokens, reached, accepted = verify(drafts, q, p, torch.tensor([[False], [False]]))
    assert tokens.tolist() == [[1], [1]] and reached.tolist() == [2, 1] and accepted.tolist() == [1, 1]


@pytest.mark.parametrize('rows', [1, 3])
def test_sampled_output_of_a_model_keeps_the_distribution(rows):
    """Third token after a fixed prompt, 600 samples plain and speculative: a two-sample chi-square."""
    model = counting_model(steps=25, vocab_size=COUNTING)
    torch.manual_seed(0)
    idx = torch.tensor([[3, 4, 5]]).repeat(rows, 1)
    counts = []
    for speculative in (False, True):
        count = torch.zeros(COUNTING)
        accepted = drafts = 0
        for _ in range(600 // rows):
            if speculative:
                out, told = decode.generate(model, idx, 3, temperature=4.0, top_k=8)
                accepted += told.accepted.sum().item()
                drafts += told.drafts.sum().item()
            else:
                out = model.generate(idx, 3, temperature=4.0, top_k=8)
            count += torch.bincount(out[:, -1], minlength=COUNTING)
        counts.append(count)
    assert 0 < accepted < drafts
    a, b = counts
    keep = a + b > 10
    value = ((a - b)[keep] ** 2 / (a + b)[keep]).sum().item()
    dof = int(keep.sum()) - 1
    assert dof >= 4 and value < dof + 4 * (2 * dof) ** 0.5


def test_stop_token_ends_rows_as_in_plain_decoding():
    model = counting_model()
    idx = torch.tensor([[0, 1], [5, 6]])
    for stop in (8, 3):
        plain = model.generate(idx, 20, temperature=0, stop_token=stop)
        out, _ = decode.generate(model, idx, 20, temperature=0, stop_token=stop)
        n = min(plain.size(1), out.size(1))
        assert torch.equal(plain[:, :n], out[:, :n])
        assert (plain[:, n:] == stop).all() and (out[:, n:] == stop).all()


def test_a_model_without_modules_says_so():
    with pytest.raises(ValueError, match='MTP'):
        decode.generate(tiny_model(num_nextn_predict_layers=0).eval(), torch.zeros(1, 1, dtype=torch.long), 1)


def test_probabilities_at_temperature_0_are_all_at_the_likeliest():
    p = probabilities(torch.tensor([[0.0, 2.0, 1.0]]), 0, None)
    assert torch.equal(p, torch.tensor([[0.0, 1.0, 0.0]]))
