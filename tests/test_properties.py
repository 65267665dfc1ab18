"""Properties that hold for any input, tried on inputs that hypothesis makes up."""

import contextlib
import io
import itertools
import runpy
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, optimizer_of, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from extras.decode import Decoder
from model import GPT, GPTConfig

settings.register_profile('steady', deadline=None, derandomize=True, print_blob=False, database=None,
                          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
settings.load_profile('steady')
SOURCE = (ROOT / 'configurator.py').read_text()
DEFAULTS = dict(rate=0.1, steps=10, name='x', flag=True)
TEXT = st.text(st.characters(exclude_categories=['Cs']), max_size=20)


def configure(*argv):
    """The settings after these arguments, or None where they are refused: with exit code 2 and one line."""
    names, said = dict(DEFAULTS), io.StringIO()
    with mock.patch.object(sys, 'argv', ['script.py', *argv]), contextlib.redirect_stdout(io.StringIO()), \
            contextlib.redirect_stderr(said), mock.patch.object(sys, 'excepthook', sys.excepthook):
        try:
            try:
                exec(SOURCE, names)
            except Exception as e:
                sys.excepthook(type(e), e, e.__traceback__)
                raise
        except SystemExit as e:
            assert e.code == 2 and len(said.getvalue().splitlines()) == 1
            return None
    assert said.getvalue() == ''
    return {k: names[k] for k in DEFAULTS}


@given(rate=st.floats(allow_nan=False, allow_infinity=False), steps=st.integers(), name=TEXT, flag=st.booleans())
def test_values_come_through_as_they_were(rate, steps, name, flag):
    values = dict(rate=rate, steps=steps, name=name, flag=flag)
    assert configure(*(f'--{k}={v}' for k, v in values.items())) == values
    assert configure(f'--rate={steps}') in (None if abs(steps) >= 1e300 else DEFAULTS | {'rate': float(steps)},)


@given(key=st.sampled_from([*DEFAULTS, 'rat', '']) | TEXT, text=TEXT | st.floats().map(str) | st.integers().map(repr),
       dashes=st.sampled_from(['--', '-', '---', '']), equals=st.sampled_from(['=', '==', '', ' = ']))
@settings(max_examples=300)
def test_any_argument_is_refused_or_fits_its_type(key, text, dashes, equals):
    got = configure(dashes + key + equals + text)
    assert got is None or all(type(got[k]) is type(v) for k, v in DEFAULTS.items())
    if got is not None:
        assert {k for k in got if got[k] != DEFAULTS[k]} <= {key}


SIZES = st.fixed_dictionaries({}, optional=dict(
    block_size=st.integers(1, 12), vocab_size=st.integers(1, 50), n_layer=st.integers(1, 2),
    n_head=st.sampled_from([1, 2, 4, 3]), n_embd=st.sampled_from([8, 16, 24, 12]), bias=st.booleans(),
    dropout=st.sampled_from([0.0, 0.1, 0.3, 1.0]), tie_word_embeddings=st.booleans(), q_lora_rank=st.integers(-2, 9),
    kv_lora_rank=st.integers(-1, 9), qk_nope_head_dim=st.integers(-1, 5), v_head_dim=st.integers(-1, 9),
    qk_rope_head_dim=st.sampled_from([-1, 2, 4, 6, 3]), rope_factor=st.sampled_from([1, 2.0, 4.0, 0.5]),
    n_routed_experts=st.sampled_from([0, 3, 4, 6, 2]), n_shared_experts=st.integers(0, 2),
    num_experts_per_tok=st.sampled_from([1, 2, 3, 0]), moe_intermediate_size=st.sampled_from([-1, 8, 16, 12]),
    intermediate_size=st.integers(-1, 9), first_k_dense_replace=st.integers(0, 2),
    n_group=st.sampled_from([1, 1, 2, 3]), topk_group=st.sampled_from([1, 1, 2]),
    scoring_func=st.sampled_from(['sigmoid', 'softmax', 'relu']), norm_topk_prob=st.booleans(),
    num_nextn_predict_layers=st.integers(0, 3), mtp_n_layer=st.integers(-1, 2), eos_token_id=st.integers(-2, 60),
    aux_loss_alpha=st.sampled_from([0.0, 0.01, -1.0])))
SMALLEST = dict(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=16)


def test_a_config_is_refused_or_trains_a_step_and_generates():
    tried = {'valid': 0, 'refused': 0}

    @given(sizes=SIZES, kind=st.sampled_from(['adamw', 'muon']))
    @settings(max_examples=300)
    def one(sizes, kind):
        try:
            config = GPTConfig(**SMALLEST | sizes)
        except ValueError as e:
            tried['refused'] += 1
            assert str(e).startswith('GPTConfig: ') and '\n' not in str(e)
            return
        tried['valid'] += 1
        torch.manual_seed(0)
        model = GPT(config).train()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = optimizer_of(model, kind, 0.1, 1e-2, (0.9, 0.95), 'cpu')
        idx = torch.randint(config.vocab_size, (2, config.block_size + 1))
        _, loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        if 'load' in model.stats:
            model.update_balance(model.stats['load'])
        assert all(p.isfinite().all() for p in model.parameters())
        assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before))
        model.eval()
        rows, _ = Decoder(model).generate(idx[:, :1].tolist(), 3, speculative=config.num_nextn_predict_layers > 0)
        for out in (model.generate(idx[:, :1], 3), torch.tensor(rows)):
            assert out.shape == (2, 4) and 0 <= out.min() and out.max() < config.vocab_size
            assert torch.equal(out[:, :1], idx[:, :1])

    one()
    assert min(tried.values()) >= 50, tried


@given(field=st.sampled_from(sorted(GPTConfig.__dataclass_fields__)),
       value=st.sampled_from([None, 'x', [1], {}, 1.5j, float('nan'), float('inf'), -3, -0.5, b'x']))
def test_a_value_that_no_field_can_have_is_a_value_error(field, value):
    with pytest.raises(ValueError):
        GPTConfig(**SMALLEST | {field: value})


@pytest.fixture
def loader(small, monkeypatch):
    """train.py's get_batch, and the settings that it reads."""
    monkeypatch.chdir(small)
    monkeypatch.setattr(sys, 'argv', ['train.py', *SMALL, '--eval_only=True', '--eval_iters=1'])
    get_batch = runpy.run_path('train.py')['get_batch']
    return get_batch, get_batch.__globals__


@given(data=st.data())
@settings(max_examples=200)
def test_batches_lie_within_the_data(loader, data):
    get_batch, names = loader
    block_size = names['block_size'] = data.draw(st.integers(1, 40), 'block_size')
    n = data.draw(st.integers(block_size + 1, block_size + 60), 'tokens')
    names['batch_size'] = data.draw(st.integers(1, 9), 'batch_size')
    names['seed'] = data.draw(st.integers(0, 2**31), 'seed')
    dtype = data.draw(st.sampled_from([np.uint16, np.uint32]), 'dtype')
    names['data'] = {split: np.arange(n, dtype=dtype) for split in ('train', 'val')}
    names['masks'] = {'train': None, 'val': None}
    where = data.draw(st.tuples(st.sampled_from(['train', 'val']), st.integers(0, 1), st.integers(0, 2**40)), 'batch')
    x, y = get_batch(*where)
    assert x.shape == y.shape == (names['batch_size'], block_size) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x, x[:, :1] + torch.arange(block_size)) and torch.equal(y, x + 1)
    assert x.min() >= 0 and y.max() < n
    assert all(torch.equal(a, b) for a, b in zip((x, y), get_batch(*where)))  # the same when asked again


@given(data=st.data())
@settings(max_examples=100)
def test_masked_targets_count_not_and_rows_begin_where_they_do(loader, data):
    get_batch, names = loader
    names['block_size'], names['batch_size'] = data.draw(st.integers(1, 20)), 8
    n = names['block_size'] + data.draw(st.integers(1, 100))
    mask = np.array(data.draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)), dtype=np.uint8)
    step = data.draw(st.integers(1, 9), 'row_length')
    names['data'], names['masks'] = {'train': np.arange(n, dtype=np.uint16)}, {'train': mask}
    meta = names['meta']
    try:
        names['meta'] = meta | {'row_length': step}
        x, y = get_batch('train', 0, data.draw(st.integers(0, 1000)))
    finally:
        names['meta'] = meta
    assert torch.equal(x, x[:, :1] + torch.arange(names['block_size'])) and (x[:, 0] % step == 0).all()
    assert torch.equal(y, torch.where(torch.from_numpy(mask)[x + 1] > 0, x + 1, -1))


def test_every_start_is_drawn(loader):
    get_batch, names = loader
    names['data'], names['masks'] = {'train': np.arange(22, dtype=np.uint16)}, {'train': None}
    starts = {int(s) for index in range(40) for s in get_batch('train', 0, index)[0][:, 0]}
    assert starts == set(range(22 - names['block_size']))


MODELS = {D: tiny_model(num_nextn_predict_layers=D).eval() for D in (1, 2, 3)}


@given(D=st.sampled_from([1, 2, 3]), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
       new=st.integers(2, 18), choices=st.lists(st.integers(0, 3), min_size=20, max_size=20),
       seed=st.integers(0, 2**31))
@settings(max_examples=60)
def test_caches_are_right_after_any_acceptance(D, lengths, new, choices, seed):
    """Each row keeps as many drafts as chance says, right or wrong: what follows is as if those had been given.

    Every draft is its module's, every other token the main stack's likeliest, each computed anew without a cache.
    """
    model, passes, choices = MODELS[D], [[] for _ in lengths], itertools.cycle(choices)
    torch.manual_seed(seed)
    prompts = [torch.randint(61, (n,)).tolist() for n in lengths]

    def chance(drafts, q, p):
        a = torch.tensor([min(next(choices), drafts.size(1)) for _ in drafts])
        if drafts.size(1) > 0:  # not the first token, behind the prompt
            for row, n in zip(passes, a.tolist()):
                row.append(n)
        new = torch.cat((drafts, drafts[:, :0].new_zeros(len(a), 1)), dim=1)
        return new.scatter(1, a.unsqueeze(1), p[torch.arange(len(a)), a].argmax(dim=-1, keepdim=True)), a

    decoder = Decoder(model)
    decoder.compile = True  # no row leaves the state, whose rows are then the prompts'
    with mock.patch('extras.decode.verify', chance):  # top_k=1: drafts are their modules' likeliest
        rows, _ = decoder.generate(prompts, new, top_k=1, speculative=True)

    def likeliest(h):
        return model.lm_head(h[0, -1]).argmax().item()

    with torch.no_grad():
        for prompt, row, kept in zip(prompts, rows, passes):
            assert row[:len(prompt)] == prompt and len(row) == len(prompt) + new
            out, known = torch.tensor([row]), len(prompt)
            assert row[known] == likeliest(model.main_stack(out[:, :known])[0])
            known += 1
            for a in kept:
                if known >= len(row):  # a row that is done
                    break
                h, _ = model.main_stack(out[:, :known - 1])
                for k in range(1, min(a, len(row) - known) + 1):
                    h, _ = model.mtp_module(model.mtp[k - 1], out[:, k:known - 1 + k], h)
                    assert row[known + k - 1] == likeliest(h), f'draft {k} behind {known} tokens, kept {kept}'
                known += a + 1
                if known <= len(row):
                    assert row[known - 1] == likeliest(model.main_stack(out[:, :known - 1])[0])
            assert known >= len(row)
