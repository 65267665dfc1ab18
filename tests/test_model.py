"""The model against plain evaluations of the papers' equations, and its fast paths against slow ones."""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, tiny_model
from torch import nn
from torch.nn import functional as F

import model as model_file
from extras import experts as experts_file
from extras import parallel
from model import GPT, MLA, Gather, GPTConfig, LinearCrossEntropy, Mistake, apply_rope, peak_tflops, rope_table


def main_config():
    names = {}
    exec((ROOT / 'config/train_deepseek.py').read_text(), names)
    fields = {f.name for f in dataclasses.fields(GPTConfig)}
    return names, GPTConfig(**{k: v for k, v in names.items() if k in fields})


# sizes and settings

def test_main_config_has_the_published_sizes():
    """Exact counts, which lie within 1% of the design's 113.72M, 9.45M and 7.08M."""
    names, config = main_config()
    with torch.device('meta'):
        model = GPT(config)
    block = model.transformer.h[0]
    size = sum(p.numel() for p in block.parameters())
    expert = 3 * config.n_embd * config.moe_intermediate_size
    active = size - (config.n_routed_experts - config.num_experts_per_tok) * expert
    assert (model.get_num_params(), size, active) == (114_438_912, 9_448_896, 7_089_600)
    assert (model.get_num_params(), size, active) == pytest.approx((113.72e6, 9.45e6, 7.08e6), rel=0.01)
    assert (config.n_layer, len(model.mtp), len(model.mtp[0].h), len(model.moe_layers())) == (8, 2, 2, 12)
    idle = len(model.moe_layers()) * (config.n_routed_experts - config.num_experts_per_tok) * expert
    assert model.get_num_active_params() == model.get_num_params() - idle == 86_127_360

    # the table of sizes in docs/training.md, to its digits
    section = (ROOT / 'docs/training.md').read_text().split('### Sizes of `config/train_deepseek.py`')[1]
    section = section.split('\n#')[0]
    rows = dict(re.findall(r'^\| (.+?) \| (.+?) \|$', section, re.M))
    cache = config.kv_lora_rank + config.qk_rope_head_dim
    tokens = names['batch_size'] * names['gradient_accumulation_steps'] * names['block_size']
    assert rows == {
        'blocks': f'{config.n_layer} main + {len(model.mtp)} MTP modules of {config.mtp_n_layer}, all with experts',
        'width, heads, context, vocabulary': f'{config.n_embd}, {config.n_head}, {config.block_size:,}, '
        f'{config.vocab_size:,} (embedding and head tied: {model.lm_head.weight.numel() / 1e6:.2f}M)',
        'attention': f'queries through {config.q_lora_rank}; keys and values through {config.kv_lora_rank}; per head '
        f'{config.qk_nope_head_dim} without and {config.qk_rope_head_dim} with RoPE, values {config.v_head_dim}',
        'cache': f'{config.kv_lora_rank} + {config.qk_rope_head_dim} = {cache} numbers per token and layer; plain '
        f'attention with these heads: {config.n_head * 2 * config.v_head_dim:,}',
        'experts': f'{config.n_shared_experts} shared + {config.n_routed_experts} routed of width '
        f'{config.moe_intermediate_size}, {config.num_experts_per_tok} routed ones per token',
        'parameters without embedding and head': f'{model.get_num_params() / 1e6:.2f}M; a token uses '
        f'{model.get_num_active_params() / 1e6:.2f}M',
        'per block': f'{size / 1e6:.2f}M; a token uses {active / 1e6:.2f}M',
        'tokens per iteration': f'{names["batch_size"]} x {names["gradient_accumulation_steps"]} x '
        f'{names["block_size"]:,} = {tokens:,}'}


def test_sizes_derive_from_nanogpts_flags():
    config = GPTConfig(n_layer=4, n_head=4, n_embd=128)
    derived = dict(q_lora_rank=64, kv_lora_rank=48, v_head_dim=32, qk_rope_head_dim=16, qk_nope_head_dim=16,
                   moe_intermediate_size=64, routed_scaling_factor=math.sqrt(3), intermediate_size=256, mtp_n_layer=1,
                   initializer_range=0.5 / math.sqrt(128))
    assert {name: getattr(config, name) for name in derived} == derived
    assert GPTConfig(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize('overrides, word', [
    (dict(n_embd=30), 'n_head'), (dict(qk_rope_head_dim=3), 'qk_rope_head_dim'),
    (dict(num_experts_per_tok=9), '1..n_routed'), (dict(n_group=3), 'n_group'),
    (dict(n_group=4, topk_group=5), 'topk_group'),
    (dict(n_group=4, topk_group=1), 'fit in topk_group'), (dict(scoring_func='tanh'), 'scoring_func'),
    (dict(moe_intermediate_size=12), 'multiple of 8'),
    (dict(n_embd=1, n_head=1), 'unless n_routed_experts=0'), (dict(n_layer=0), 'n_layer'),
    (dict(dropout=1.0), 'dropout'),
    (dict(first_k_dense_replace=3), 'first_k'), (dict(initializer_range=-2.0), 'initializer'),
    (dict(rope_theta=0.0), 'rope_theta'), (dict(kv_lora_rank=0), 'kv_lora_rank'),
    (dict(num_nextn_predict_layers=-1), 'num_nextn'), (dict(vocab_size=10**19), 'vocab_size'),
    (dict(rope_factor=2.0, rope_theta=1.0), 'rope_theta'), (dict(rope_factor=1e300), 'rope_factor'),
    (dict(rope_factor=2.0, rope_beta_slow=1e-320), 'rope_beta_slow'), (dict(num_experts_per_tok=10**400), 'num_exp'),
])
def test_a_config_that_cannot_be_built_is_one_clear_error(overrides, word):
    with pytest.raises(ValueError, match=word) as error:
        GPTConfig(**{**TINY, **overrides})
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('overrides', [
    dict(n_routed_experts=0), dict(first_k_dense_replace=1), dict(q_lora_rank=0), dict(tie_word_embeddings=False),
    dict(bias=True), dict(scoring_func='softmax', norm_topk_prob=False, routed_scaling_factor=1.0),
    dict(n_shared_experts=0), dict(num_experts_per_tok=1),
    dict(num_nextn_predict_layers=0), dict(num_nextn_predict_layers=1, mtp_n_layer=2),
    dict(n_group=4, topk_group=2), dict(qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=16), dict(n_head=1),
    dict(v_head_dim=48), dict(dropout=0.1), dict(num_experts_per_tok=8),
])
def test_every_shape_trains_and_gives_every_parameter_a_gradient(overrides):
    model = tiny_model(**overrides)
    idx = torch.randint(61, (2, 33))
    _, loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # an expert that no token chose may have zeros in its slice, but no tensor may be all zeros
    assert without == []
    assert torch.isfinite(loss)


# attention

@pytest.mark.parametrize('overrides', [
    {}, dict(q_lora_rank=0), dict(qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=16), dict(n_head=1),
    dict(v_head_dim=24), dict(kv_lora_rank=20, bias=True, tie_word_embeddings=False),
])
@pytest.mark.parametrize('prefill, step', [(1, 1), (7, 1), (20, 1), (5, 4), (10, 7)])
@torch.no_grad()
def test_absorbed_equals_materialised_equals_uncached(overrides, prefill, step):
    model = tiny_model(**overrides).eval()
    idx = torch.randint(61, (3, prefill + 3 * step))
    cache = model.make_cache(3, idx.size(1))
    model(idx[:, :prefill], cache=cache)
    for pos in range(prefill, idx.size(1), step):
        absorbed, _ = model(idx[:, pos:pos + step], cache=cache, pos=pos)
        whole, _ = model(idx[:, :pos + step])                       # materialised, without a cache
        assert whole.std() > 0.5
        torch.testing.assert_close(absorbed, whole, atol=1e-5, rtol=1e-5)


def test_attention_equals_the_papers_equations_head_by_head():
    model = tiny_model(qk_nope_head_dim=12, qk_rope_head_dim=4, v_head_dim=8)
    config, attn = model.config, model.transformer.h[0].attn
    T, H, n, r, v, c = 9, 4, 12, 4, 8, config.kv_lora_rank
    x = torch.randn(1, T, 32)
    got = attn(x, *(t[:T] for t in rope_table(config)))[0]

    def norm(y, weight):
        return y / (y.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    def rotate(y, pos):  # complex numbers: an implementation of its own
        z = torch.view_as_complex(y.reshape(-1, 2).double().contiguous())
        angle = pos * 10000.0 ** (-torch.arange(0, r, 2).double() / r)
        return torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)).flatten().float()

    c_q = norm(x[0] @ attn.q_a_proj.weight.T, attn.q_a_layernorm.weight)
    q = (c_q @ attn.q_b_proj.weight.T).view(T, H, n + r)
    down = x[0] @ attn.kv_a_proj_with_mqa.weight.T
    c_kv = norm(down[:, :c], attn.kv_a_layernorm.weight)
    kv = (c_kv @ attn.kv_b_proj.weight.T).view(T, H, n + v)
    want = torch.zeros(T, H, v)
    for t in range(T):
        for h in range(H):
            query = torch.cat((q[t, h, :n], rotate(q[t, h, n:], t)))
            scores = torch.stack([query @ torch.cat((kv[s, h, :n], rotate(down[s, c:], s))) for s in range(t + 1)])
            weights = (scores / math.sqrt(n + r)).softmax(0)
            want[t, h] = weights @ kv[:t + 1, h, n:]
    torch.testing.assert_close(got, want.flatten(1) @ attn.o_proj.weight.T, atol=1e-5, rtol=1e-4)


def test_rope_scores_depend_on_the_offset_alone():
    cos, sin = rope_table(GPTConfig(qk_rope_head_dim=8, block_size=64))
    q, k = torch.randn(2, 8)
    def score(i, j):
        return apply_rope(q[None], cos[i:i + 1], sin[i:i + 1]) @ apply_rope(k[None], cos[j:j + 1], sin[j:j + 1]).T

    for offset in (0, 1, 5, 30):
        scores = torch.cat([score(i + offset, i) for i in range(0, 30, 3)])
        torch.testing.assert_close(scores, scores[:1].expand_as(scores), atol=1e-5, rtol=1e-5)
    assert (score(10, 0) - score(0, 0)).abs() > 0.1
    assert (score(0, 10) - score(10, 0)).abs() > 0.01  # the direction counts


def test_the_future_is_not_seen():
    model = tiny_model().eval()
    a = torch.randint(61, (1, 20))
    b = a.clone()
    b[:, 12:] = (b[:, 12:] + 7) % 61
    logits_a, _ = model(a, a)
    logits_b, _ = model(b, b)
    torch.testing.assert_close(logits_a[:, :12], logits_b[:, :12], atol=1e-6, rtol=1e-6)
    assert (logits_a[:, 12:] - logits_b[:, 12:]).abs().max() > 0.1


def test_cache_holds_latent_and_rotated_key_alone():
    model = tiny_model().eval()
    config = model.config
    cache = model.make_cache(3, 20)
    model(torch.randint(61, (3, 20)), cache=cache)
    cache = torch.stack(cache)
    assert cache.shape == (config.n_layer, 3, 20, config.kv_lora_rank + config.qk_rope_head_dim)
    weights = torch.stack([block.attn.kv_a_layernorm.weight for block in model.transformer.h])[:, None, None]
    latent = cache[..., :config.kv_lora_rank] / weights              # normed: its mean square is 1
    torch.testing.assert_close(latent.pow(2).mean(-1), torch.ones(config.n_layer, 3, 20), atol=1e-3, rtol=0)


# generation

@pytest.mark.parametrize('overrides', [{}, dict(q_lora_rank=0, v_head_dim=24), dict(n_routed_experts=0)])
def test_greedy_generate_equals_the_uncached_model_beyond_block_size_too(overrides):
    model = tiny_model(**overrides).eval()
    idx = torch.randint(61, (2, 5))
    got = model.generate(idx, 40, temperature=0)                     # block_size is 32
    want = idx
    for _ in range(40):
        logits, _ = model(want[:, -32:])
        want = torch.cat((want, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert got.tolist() == want.tolist()
    assert len(set(got[0].tolist())) > 5
    long = torch.randint(61, (2, 50))                                # a prompt longer than the context
    assert model.generate(long, 3, temperature=0)[:, -3:].tolist() == \
        model.generate(long[:, -32:], 3, temperature=0)[:, -3:].tolist()


def test_top_k_temperature_and_no_tokens():
    model = tiny_model().eval()
    idx = torch.randint(61, (4, 5))
    greedy = model.generate(idx, 10, temperature=0)
    assert model.generate(idx, 10, top_k=1).tolist() == greedy.tolist()
    assert model.generate(idx, 10, temperature=1e-4).tolist() == greedy.tolist()
    for lowest in (1e-6, 1e-39, 1e-300, 0.999e-6):                   # logits / 1e-39 are infinite: token 0 was taken
        assert model.generate(idx, 10, temperature=lowest).tolist() == greedy.tolist()
    assert model.generate(idx, 0).tolist() == idx.tolist()
    torch.manual_seed(1)
    one = model.generate(idx, 10)
    assert one.tolist() != greedy.tolist()
    torch.manual_seed(1)
    assert model.generate(idx, 10).tolist() == one.tolist()
    allowed = model(idx)[0][:, -1].topk(3).indices
    drawn = torch.cat([model.generate(idx, 1, temperature=5.0, top_k=3)[:, -1:] for _ in range(40)], dim=1)   # (4, 40)
    assert all(set(row) == set(three) for row, three in zip(drawn.tolist(), allowed.tolist()))


@pytest.mark.parametrize('number', [math.nan, math.inf, -math.inf])
def test_a_token_is_never_drawn_from_nan(number):
    """Token 0 would be: argmax takes the first nan. One row of two is enough, within block_size and beyond."""
    model = tiny_model(tie_word_embeddings=False).eval()
    with torch.no_grad():
        model.transformer.wte.weight[60] = number                    # the state is nan then
    for temperature, n, stop_token in ((0, 1, None), (1.0, 5, None), (1.0, 40, 3), (0, 40, 3)):
        with pytest.raises(Mistake, match='nan or infinity'):
            model.generate(torch.tensor([[1, 2], [3, 60]]), n, temperature, stop_token=stop_token)
        assert model.generate(torch.tensor([[1, 2], [3, 4]]), 1, temperature).size(1) == 3


def test_a_row_that_stopped_stays_stopped():
    model = tiny_model().eval()
    idx = torch.randint(61, (3, 4))
    free = model.generate(idx, 25, temperature=0)
    stop = free[0, 9].item()
    got = model.generate(idx, 25, temperature=0, stop_token=stop)
    for row, want in zip(got[:, 4:].tolist(), free[:, 4:].tolist()):
        end = want.index(stop) if stop in want else len(want)
        assert row[:end] == want[:end][:len(row)]
        assert set(row[end:]) <= {stop}
    alone = model.generate(idx[:1], 28, temperature=0, stop_token=stop)
    assert alone.size(1) == 4 + 16  # it ended before its 28 tokens


# experts

def routed_token_by_token(moe, x, gates, experts):
    """The routed part for x (N, C), with its gates and chosen experts (N, K)."""
    out = torch.zeros_like(x)
    for i, row in enumerate(x):
        for g, e in zip(gates[i], experts[i]):
            gate, up = (moe.experts_gate_up[e] @ row).chunk(2)
            out[i] += g * (moe.experts_down[e] @ (F.silu(gate) * up))
    return out


def plain_moe(moe, x):
    """eq. 12-16, token by token."""
    flat = x.view(-1, x.size(-1))
    scores = torch.sigmoid(flat @ moe.gate.weight.T)
    experts = torch.stack([(row + moe.e_score_correction_bias).topk(moe.config.num_experts_per_tok).indices
                           for row in scores])
    chosen = scores.gather(1, experts)
    gates = chosen / chosen.sum(dim=1, keepdim=True) * moe.config.routed_scaling_factor
    return (moe.shared_experts(flat) + routed_token_by_token(moe, flat, gates, experts)).view_as(x)


@pytest.mark.parametrize('path', ['grouped_mm', 'loop', 'wide'])
def test_dispatch_equals_a_loop_over_experts(path, monkeypatch):
    model = tiny_model()
    if path == 'loop':  # what fp32 takes on an accelerator: the CPU's loop takes what it has no grouped_mm for
        monkeypatch.setattr(model_file, 'grouped_linear', lambda x, w, offsets: model_file.grouped_linear_uncompiled(
            x.double(), w.double(), offsets).float())
        monkeypatch.setattr(F, 'grouped_mm', None)
    if path == 'wide':
        monkeypatch.setattr(experts_file, 'is_wide', lambda *args: True)
        experts_file.enable(model, sorted_way=None)
    moe = model.transformer.h[0].mlp
    moe.e_score_correction_bias[:] = torch.tensor([-9., 1, 0, .5, -9., 0, .2, 0])  # two experts stay empty
    x = torch.randn(2, 9, 32, requires_grad=True)
    seed = torch.randn(2, 9, 32)
    got, (_, experts) = moe(x)
    (got * seed).sum().backward()
    grads = {n: p.grad.clone() for n, p in moe.named_parameters()} | {'x': x.grad.clone()}
    moe.zero_grad()
    x.grad = None
    want = plain_moe(moe, x)
    (want * seed).sum().backward()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    for name, p in [*moe.named_parameters(), ('x', x)]:
        torch.testing.assert_close(grads[name], p.grad, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f'{name}: {m}')
    assert experts.shape == (2, 9, 3) and not torch.isin(experts, torch.tensor([0, 4])).any()


def test_where_experts_are_one_wide_ffn(monkeypatch):
    """On accelerators, where few experts stay unchosen, or where sorted rows would make the host wait."""
    half, single, fp16 = torch.bfloat16, torch.float32, torch.float16
    cases = [  # device, capability, dtype, extras/kernels.py; whether 7 of 14, 15, 28 and 29 experts are wide
        ('cpu', None, half, False, '0000'), ('cpu', None, single, False, '0000'),
        ('cuda', (9, 0), half, False, '1000'), ('cuda', (10, 0), half, False, '1000'),
        ('cuda', (8, 0), half, False, '1110'), ('cuda', (12, 0), half, False, '1110'),
        ('cuda', (8, 0), half, True, '1000'), ('cuda', (9, 0), single, True, '1000'),
        ('cuda', (9, 0), single, False, '1110'), ('cuda', (7, 5), fp16, False, '1110'),
        ('mps', None, half, False, '1110')]
    for device, capability, dtype, kernels, expected in cases:
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device, capability=capability: capability)
        for experts, wide in zip((14, 15, 28, 29), expected):
            found = experts_file.is_wide(7, experts, torch.device(device), dtype, kernels)
            assert found == (wide == '1'), (device, dtype, experts)


def test_few_tokens_compute_every_expert_where_they_choose_half_of_them():
    """Only without gradients: decoding."""
    for N, K, E, on_gpu, few in ((1, 4, 8, False, True), (1, 4, 9, False, False), (16, 4, 64, False, True),
                                 (17, 4, 64, False, False), (256, 4, 64, True, True), (257, 4, 64, True, False)):
        assert experts_file.is_few(N, K, E, on_gpu) == few
    ways = []
    way = functools.partial(experts_file.fastest, wide_way=None, kernels=False,
                            sorted_way=lambda x, *_: ways.append(len(x)) or x)
    experts, gates = torch.zeros(4, 3, dtype=torch.long), torch.zeros(4, 3)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            way(torch.zeros(4, 32), gates, experts, torch.zeros(8, 16, 32), torch.zeros(8, 32, 8))
    assert ways == [4]


def test_dispatch_and_combine_are_each_others_transpose():
    token = torch.tensor([1, 0, 2, 0, 1, 2])                         # 3 tokens with 2 experts each
    place = torch.tensor([[1, 3], [0, 4], [2, 5]])
    x, y = torch.randn(3, 4, dtype=torch.double), torch.randn(6, 4, dtype=torch.double)
    x.requires_grad_()
    y.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: Gather.apply(x, token, place), x)
    assert torch.autograd.gradcheck(lambda y: Gather.apply(y, place, token), y)


def test_group_limited_routing():
    moe = tiny_model(n_group=4, topk_group=2, num_experts_per_tok=3).transformer.h[0].mlp
    moe.e_score_correction_bias[:] = torch.randn(8) / 4 - 2.0        # below zero: a group masked with 0 would win
    x = torch.randn(50, 32)
    scores, gates, experts = moe.route(x)
    choice = (scores + moe.e_score_correction_bias).view(50, 4, 2)
    by_best = choice.amax(dim=2).topk(2).indices.sort(dim=1).values   # V2's rule gives other groups
    assert (by_best != choice.sum(dim=2).topk(2).indices.sort(dim=1).values).any()
    for t in range(50):
        choice = (scores[t] + moe.e_score_correction_bias).view(4, 2)
        groups = choice.sum(1).topk(2).indices.tolist()
        kept = [e for g in groups for e in (2 * g, 2 * g + 1)]
        want = sorted(kept, key=lambda e: -choice.view(-1)[e])[:3]
        assert set(experts[t].tolist()) == set(want)
        expected = scores[t][experts[t]] / scores[t][experts[t]].sum() * moe.config.routed_scaling_factor
        torch.testing.assert_close(gates[t], expected)


def test_gates_are_unbiased_scores_and_a_single_gate_is_not_normalised():
    moe = tiny_model(num_experts_per_tok=1, routed_scaling_factor=1.0).transformer.h[0].mlp
    moe.e_score_correction_bias[5] = 10.0
    scores, gates, experts = moe.route(torch.randn(6, 32))
    assert (experts == 5).all()
    torch.testing.assert_close(gates, scores[:, 5:6])


def test_sequence_wise_balance_loss_equals_its_equation():
    """f counts the K best of the scores themselves, whatever the balance bias makes the router choose."""
    moe = tiny_model().transformer.h[0].mlp
    moe.e_score_correction_bias[:] = torch.linspace(-2, 2, 8)
    B, T, E, K = 3, 7, 8, 3
    x = torch.randn(B, T, 32)
    got, _ = model_file.balance_and_load([moe(x)[1]], torch.ones(B, T, dtype=torch.bool))
    want = 0.0
    for b in range(B):
        s = torch.sigmoid(x[b] @ moe.gate.weight.T)                  # (T, E)
        for i in range(E):
            f = E / (K * T) * sum(1 for t in range(T) if i in s[t].topk(K).indices.tolist())         # eq. 18
            p = sum(s[t, i] / s[t].sum() for t in range(T)) / T                                      # eq. 19-20
            want = want + f * p / B                                                                  # eq. 17
    torch.testing.assert_close(got, want.view(1))
    assert got > 1.0


@pytest.mark.parametrize('scores', [torch.ones(8), torch.zeros(8), torch.full((8,), 1e-38)])
def test_the_balance_loss_of_equal_scores_is_1(scores):
    """K experts count as chosen, however many scores are equal; scores that underflow make no nan."""
    scores = scores.expand(2, 5, 8).clone().requires_grad_()
    loss, load = model_file.balance_and_load([(scores, torch.arange(3).expand(2, 5, 3))], torch.ones(2, 5).bool())
    loss.sum().backward()
    assert scores.grad.isfinite().all() and load.tolist() == [[10] * 3 + [0] * 5]
    assert loss.item() == pytest.approx(1.0 if scores.max() == 1 else 0.0)


def test_what_fills_a_row_counts_neither_in_the_load_nor_in_the_balance_loss(monkeypatch):
    """Tokens after a row's last label. Without alpha a balance loss that is not finite poisons nothing."""
    model = tiny_model(num_nextn_predict_layers=0)
    idx = torch.randint(61, (3, 32))
    cut = idx.roll(-1, 1)
    cut[:, 12:] = -1
    cut[0, 3:7] = -1  # tokens between labels count
    model(idx, cut)
    stats = model.stats
    model(idx[:, :12], cut[:, :12])
    assert torch.equal(stats['load'], model.stats['load']) and (stats['load'].sum(dim=1) == 3 * 12 * 3).all()
    torch.testing.assert_close(stats['balance'], model.stats['balance'])
    model = tiny_model()  # a module's last label stands before the main one's
    other = torch.where(cut < 0, idx.roll(1), idx)
    stats = []
    for x in (idx, torch.cat((idx[:, :13], other[:, 13:]), dim=1)):
        model(x, cut)
        stats.append(model.stats)
    assert (idx != other)[:, 13:].any() and torch.equal(stats[0]['load'], stats[1]['load'])
    assert stats[0]['load'].sum(dim=1).tolist() == [3 * 12 * 3] * 2 + [3 * 11 * 3, 3 * 10 * 3]
    torch.testing.assert_close(stats[0]['balance'], stats[1]['balance'])
    stats, model = stats[0], tiny_model(num_nextn_predict_layers=0, aux_loss_alpha=0.0)
    monkeypatch.setattr(model_file, 'balance_and_load', lambda *_: (torch.tensor([math.nan]), stats['load']))
    assert model(idx, cut)[1].isfinite()


@pytest.mark.parametrize('rows', [1, 4, 16])
def test_the_gradient_does_not_depend_on_how_rows_are_grouped(rows):
    """Rows of 4 and of 28 labels, some cut by a document's end: each label weighs the same in any micro-batch."""
    model = GPT(GPTConfig(block_size=32, vocab_size=22, n_layer=2, n_head=4, n_embd=64, aux_loss_alpha=0,
                          eos_token_id=3))
    x = torch.randint(22, (64, 32))
    y = x.roll(-1, 1)
    y[1::2, 28:] = y[::2, 4:] = -1

    def gradient(rows):
        model.zero_grad()
        counts = (model.labels(y) >= 0).sum(dim=(1, 2)) * rows / 64
        losses = 0
        for part_x, part_y in zip(x.split(rows), y.split(rows)):
            (model(part_x, part_y, label_counts=counts)[1] * rows / 64).backward()
            losses += model.stats['losses'] * rows / 64
        return torch.cat([p.grad.flatten() for p in model.parameters()]), losses

    (whole, losses), (grouped, means) = gradient(64), gradient(rows)
    assert (grouped - whole).norm() < 1e-5 * whole.norm()
    torch.testing.assert_close(means, losses)
    model.zero_grad()
    model(x, y)[1].backward()
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), whole)


@pytest.mark.parametrize('tokens', [64, 17, 16, 4])
def test_an_expert_that_nobody_chose_poisons_nothing(tokens):
    """Expert 7 overflows fp16; its bias keeps it from every token, and padding rows are zeros."""
    moe = tiny_model(n_embd=64).transformer.h[0].mlp.half()
    with torch.no_grad():
        moe.experts_gate_up[7] = 60.0
    moe.e_score_correction_bias[7] = -100.0
    x = torch.ones(tokens, 64, dtype=torch.float16)
    with torch.no_grad():
        _, gates, experts = moe.route(x)
    weights = moe.experts_gate_up, moe.experts_down
    for way in (model_file.sorted_experts, experts_file.all_experts, experts_file.wide_experts):
        for p in weights:
            p.grad = None
        out = way(x, gates, experts, *weights)
        out.float().sum().backward()
        assert out.isfinite().all() and all(p.grad.isfinite().all() for p in weights), way
        assert all((p.grad[7] == 0).all() for p in weights), way


def test_balance_bias_moves_against_the_load_and_only_when_told():
    model = tiny_model(bias_update_speed=0.01)
    idx = torch.randint(61, (4, 32))
    model(idx, idx)[1].backward()
    # forward and backward move nothing
    assert all(m.e_score_correction_bias.abs().sum() == 0 for m in model.moe_layers())
    load = model.stats['load']
    # the last k positions of a row have no label of module k
    assert load.shape == (4, 8) and load.sum(1).tolist() == [4 * T * 3 for T in (32, 32, 31, 30)]
    model.update_balance(load)
    for moe, row in zip(model.moe_layers(), load.float()):
        bias = moe.e_score_correction_bias
        want = 0.01 * torch.sign(row.mean() - row)
        torch.testing.assert_close(bias, want - want.mean())
        assert bias[row.argmax()] < bias[row.argmin()]
        assert bias.abs().max() > 0
    before = [m.e_score_correction_bias.clone() for m in model.moe_layers()]
    model.eval()
    model(idx, idx)
    model.generate(idx[:, :4], 3)
    assert all(torch.equal(a, m.e_score_correction_bias) for a, m in zip(before, model.moe_layers()))
    assert all(not m.e_score_correction_bias.requires_grad for m in model.moe_layers())


def test_a_layer_without_a_load_keeps_its_bias():
    """As after an iteration that is skipped: bit for bit, and the others move."""
    model = tiny_model(bias_update_speed=0.01)
    for moe in model.moe_layers():
        moe.e_score_correction_bias.normal_()                        # not centred
    before = [moe.e_score_correction_bias.clone() for moe in model.moe_layers()]
    load = torch.zeros(4, 8, dtype=torch.long)
    load[2, :4] = 5
    model.update_balance(load)
    same = [torch.equal(a, moe.e_score_correction_bias) for a, moe in zip(before, model.moe_layers())]
    assert same == [True, True, False, True]


def test_a_skewed_router_is_balanced_within_300_steps():
    moe_model = tiny_model(n_layer=1, num_nextn_predict_layers=0, num_experts_per_tok=2, bias_update_speed=0.01,
                           aux_loss_alpha=0.0)
    moe = moe_model.moe_layers()[0]
    x = torch.randn(8, 64, 32) + 1.0                                 # a common direction: some experts suit all tokens

    def load_of(x):
        return torch.bincount(moe(x)[1][1].flatten(), minlength=8)

    def max_vio():
        load = load_of(x).float()
        return (load.max() / load.mean() - 1).item()

    with torch.no_grad():
        moe.gate.weight += torch.linspace(-0.05, 0.05, 8)[:, None]
        start = max_vio()
        for _ in range(300):
            moe_model.update_balance(load_of(x)[None])
    assert start > 1.0
    assert max_vio() < 0.3


# dropout

@pytest.mark.parametrize('place', ['drop', 'resid_dropout', 'dropout', 'attention'])
def test_each_dropout_acts_in_training_alone(place):
    """With the other three turned off, two training forwards differ, and in eval the model is one without dropout."""
    model = tiny_model(dropout=0.5)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and name.split('.')[-1] != place:
            module.p = 0.0
        if isinstance(module, model_file.MLA) and place != 'attention':
            module.config = dataclasses.replace(module.config, dropout=0.0)
    plain = tiny_model().eval()
    plain.load_state_dict(model.state_dict())
    idx = torch.randint(61, (2, 20))
    a, b = (model(idx, idx)[1].item() for _ in range(2))
    assert a != b
    model.eval()
    assert torch.equal(model(idx, idx)[0], plain(idx, idx)[0])


# multi-token prediction

def train_on(batches, steps, lr=3e-3, **overrides):
    model = GPT(GPTConfig(**{**TINY, 'n_head': 2, 'num_experts_per_tok': 2, 'mtp_lambda': 1.0, **overrides}))
    optimizer = model.configure_optimizers(0.0, lr, (0.9, 0.95), 'cpu')
    for _ in range(steps):
        x, y = batches()
        model(x, y)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_each_mtp_head_learns_exactly_its_own_offset():
    """In the repository this model goes back to, head 0 learned t+2 and head 1 got no gradient at all."""
    def batches():
        start = torch.randint(13, (16, 1))
        rows = (start + 5 * torch.arange(34)) % 13                   # the next token, and all later ones, follow
        return rows[:, :32], rows[:, 1:33]

    model = train_on(batches, 150, vocab_size=13)
    x, y = batches()
    model(x, y)
    assert (model.stats['losses'] < 0.05).all(), model.stats['losses']
    # ground truth without model.forward's own bookkeeping: what each head says of position i
    with torch.no_grad():
        emb = model.transformer.wte
        rope = model.rope_cos[:32], model.rope_sin[:32]
        h = emb(x)
        for block in model.transformer.h:
            h = block(h, *rope)[0]
        h = model.transformer.ln_f(h)
        for k, module in enumerate(model.mtp, start=1):
            h = module.combine(emb(x.roll(-k, dims=1)), h)
            for block in module.h:
                h = block(h, *rope)[0]
            h = module.norm(h)
            said = model.lm_head(h).argmax(-1)[:, :32 - k - 1]
            assert (said == x[:, k + 1:]).float().mean() > 0.98
            for wrong in (k, k + 2):                                 # a head shifted by one would say these
                width = 32 - wrong
                assert (said[:, :width] == x[:, wrong:][:, :said.size(1)][:, :width]).float().mean() < 0.1


def test_mtp_loss_counts_the_right_targets():
    """Against module losses computed one position at a time, with missing targets in the middle."""
    model = tiny_model(eos_token_id=60)
    idx = torch.randint(61, (2, 12))
    targets = torch.randint(60, (2, 12))
    targets[0, 5] = -1
    targets[1, :3] = -1
    targets[1, 7] = 60                                               # a document ends here
    _, loss = model(idx, targets)
    rope = model.rope_cos[:12], model.rope_sin[:12]
    h = model.transformer.wte(idx)
    for block in model.transformer.h:
        h = block(h, *rope)[0]
    h = model.transformer.ln_f(h)
    losses = []
    for k in range(3):
        if k > 0:
            token = torch.cat((idx[:, k:], torch.zeros(2, k, dtype=torch.long)), dim=1)
            h = model.mtp[k - 1].combine(model.transformer.wte(token), h)
            for block in model.mtp[k - 1].h:
                h = block(h, *rope)[0]
            h = model.mtp[k - 1].norm(h)
        rows = [F.cross_entropy(model.lm_head(h[b, i]), targets[b, i + k]) for b in range(2) for i in range(12 - k)
                if (targets[b, i:i + k + 1] >= 0).all() and not (targets[b, i:i + k] == 60).any()]
        losses.append(torch.stack(rows).mean())
    torch.testing.assert_close(model.stats['losses'], torch.stack(losses))
    want = losses[0] + 0.3 / 2 * (losses[1] + losses[2]) + 1e-4 * 4 * model.stats['balance']
    torch.testing.assert_close(loss, want)


def test_a_module_joins_the_embedding_and_the_state_in_the_released_order():
    """eh_proj's first half takes the embedding, through enorm, and its second the state, through hnorm."""
    module = tiny_model().mtp[0]
    for norm in (module.enorm, module.hnorm):
        norm.weight.data = 0.5 + torch.rand(32)
    emb, h = torch.randn(2, 3, 7, 32)
    parts = [x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
             for x, norm in ((emb, module.enorm), (h, module.hnorm))]
    left, right = module.eh_proj.weight.split(32, dim=1)
    torch.testing.assert_close(module.combine(emb, h), parts[0] @ left.T + parts[1] @ right.T)


def test_eval_does_not_depend_on_mtp():
    model = tiny_model()
    idx = torch.randint(61, (2, 20))
    model.eval()
    logits, loss = model(idx, idx)
    for p in model.mtp.parameters():
        p.data.normal_()
    again, loss_again = model(idx, idx)
    assert torch.equal(logits, again) and torch.equal(loss, loss_again)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), idx.flatten()))
    targets = idx.clone()
    targets[0, :15] = -1                                             # they count in no mean
    _, loss = model(idx, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1))
    none, chunked = model(idx, targets, return_logits=False)
    assert none is None
    torch.testing.assert_close(chunked, loss)


def test_all_blocks_see_one_residual_dtype():
    """The modules' stream was bf16 under autocast: less exact than the main one, and a second graph to compile."""
    model = tiny_model()
    seen = []
    for block in model.blocks():
        block.register_forward_pre_hook(lambda block, args: seen.append(args[0].dtype))
    with torch.autocast('cpu', torch.bfloat16):
        model(*torch.randint(61, (2, 2, 16)))
    assert seen == [torch.float32] * 4


def test_norms_and_router_compute_in_fp32_under_autocast():
    """bf16 has 8 bits: a norm's weight, and scores that are near each other, would be lost in them."""
    model = tiny_model()
    norm, moe = model.transformer.h[0].attn.kv_a_layernorm, model.transformer.h[0].mlp
    norm.weight.data = 1 + torch.rand_like(norm.weight) / 100
    x = torch.randn(5, len(norm.weight))
    want = x.bfloat16().float()
    want = want / (want.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    h = torch.randn(50, 32)
    scores, gates, experts = moe.route(h)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(norm(x.bfloat16()), want.bfloat16())
        again = moe.route(h)
    assert all(torch.equal(a, b) for a, b in zip(again, (scores, gates, experts))) and again[0].dtype == torch.float32


def test_sequences_shorter_than_the_modules_offsets():
    model = tiny_model()
    for T in (1, 2, 3):
        idx = torch.randint(61, (2, T))
        _, loss = model(idx, idx)
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# the loss

@pytest.mark.parametrize('chunk', [4, 7, 1024])
def test_chunked_cross_entropy_equals_the_plain_one(chunk, monkeypatch):
    monkeypatch.setattr(LinearCrossEntropy, 'CHUNK', chunk)
    h = torch.randn(21, 16, requires_grad=True)
    w = torch.randn(50, 16, requires_grad=True)
    target = torch.randint(50, (21,))
    target[3] = -1
    weight = torch.rand(21) * (target >= 0)
    loss, rows = LinearCrossEntropy.apply(h, w, target, weight, model_file.cross_entropy_rows, True)
    (2.0 * loss).backward()
    grads = h.grad.clone(), w.grad.clone()
    h.grad = w.grad = None
    plain = F.cross_entropy(h @ w.T, target, ignore_index=-1, reduction='none')
    (2.0 * (plain * weight).sum()).backward()
    keep = target >= 0
    torch.testing.assert_close(rows[keep], plain[keep])
    torch.testing.assert_close(grads, (h.grad, w.grad), atol=1e-6, rtol=1e-5)


def test_chunked_cross_entropy_in_bf16_keeps_the_loss_in_fp32():
    h, w, target = torch.randn(64, 16), torch.randn(500, 16) / 4, torch.randint(500, (64,))
    want = F.cross_entropy(h @ w.T, target)
    with torch.autocast('cpu', torch.bfloat16):
        loss, _ = LinearCrossEntropy.apply(h, w, target, torch.full((64,), 1 / 64), model_file.cross_entropy_rows, True)
    assert loss.dtype == torch.float32
    assert abs(loss - want) < 5e-3


def test_golden_losses():
    """Twelve seeded fp32 steps against a stored file: a refactor that changes the numbers is seen.

    To renew it on purpose, delete tests/golden_losses.json and run this test: it fails once, and writes it anew.
    """
    path = Path(__file__).parent / 'golden_losses.json'
    model = GPT(GPTConfig(**TINY, dropout=0.0))
    optimizer = model.configure_optimizers(0.1, 3e-3, (0.9, 0.95), 'cpu')
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(61, (8, 33), generator=generator)
    steps = []
    for _ in range(12):
        _, loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.update_balance(model.stats['load'])
        steps.append([loss.item(), *model.stats['losses'].tolist(), norm.item()])
    if not path.exists():
        path.write_text(json.dumps(steps, indent=0))
        pytest.fail(f'wrote {path.name}')
    torch.testing.assert_close(torch.tensor(steps), torch.tensor(json.loads(path.read_text())), atol=2e-4, rtol=1e-4)


# nanoGPT's interface

def test_nanogpts_methods():
    model = GPT(GPTConfig(block_size=32, vocab_size=61, n_layer=2, n_head=4, n_embd=32, dropout=0.0, bias=False))
    idx = torch.randint(61, (2, 32))
    logits, loss = model(idx)
    assert logits.shape == (2, 1, 61) and loss is None
    logits, loss = model.eval()(idx, idx)
    assert logits.shape == (2, 32, 61) and loss.shape == ()
    assert model.get_num_params(non_embedding=False) - model.get_num_params() == 61 * 32
    assert math.isnan(model.estimate_mfu(fwdbwd_per_iter=4, dt=1.0))  # a CPU: a number, but not a wrong one
    assert peak_tflops('NVIDIA A100-SXM4-80GB') == 312 and peak_tflops('Tesla T4') == 65
    assert all(math.isnan(peak_tflops(name)) for name in ('NVIDIA RTX A1000', 'NVIDIA T400', 'RTX 5090 Laptop GPU'))
    before = model(idx[:, :8])[0]
    model.crop_block_size(8)
    assert model.config.block_size == 8
    torch.testing.assert_close(model(idx[:, :8])[0], before)
    with pytest.raises(ValueError, match='block_size'):
        model(idx)
    with pytest.raises(ValueError, match='prompt'):
        model.generate(idx[:, :0], 2)
    with pytest.raises(ValueError, match='crop'):
        model.crop_block_size(64)
    with pytest.raises(ValueError, match="do not fit"):
        GPT.from_pretrained('gpt2', dict(dropout=0.0))


def test_a_parameter_of_ones_own_keeps_its_initialisation(monkeypatch):
    """GPT draws Linear, Embedding and the experts anew, and sets norms to 1; shards, which build no module, say so."""
    def init(self, config, plain=MLA.__init__):
        plain(self, config)
        self.temperature = nn.Parameter(torch.tensor([0.3, -2.0]))
        self.own_norm = nn.LayerNorm(4)
        nn.init.constant_(self.own_norm.weight, 0.5)
        nn.init.constant_(self.own_norm.bias, 0.25)
        self.own_conv = nn.Conv1d(2, 2, 3)
        nn.init.constant_(self.own_conv.weight, 7.0)
        self.register_buffer('own_table', torch.full((3,), 5.0))
        self.o_proj.own_lora = nn.Parameter(torch.zeros(2, 2))      # as of a subclass
        self.kv_a_layernorm.own_shift = nn.Parameter(torch.zeros(2))
        self.o_proj.own_bias = nn.Parameter(torch.ones(2))

    monkeypatch.setattr(MLA, '__init__', init)
    model = tiny_model()
    for block in model.blocks():
        attn = block.attn
        assert attn.temperature.tolist() == pytest.approx([0.3, -2.0])
        assert (attn.own_norm.weight == 0.5).all() and (attn.own_norm.bias == 0.25).all()
        assert (attn.own_conv.weight == 7.0).all() and (attn.own_table == 5.0).all()
        assert not attn.o_proj.own_lora.any() and not attn.kv_a_layernorm.own_shift.any()
        assert (attn.o_proj.own_bias == 1.0).all()
    read, state = parallel.reader(model, None), model.state_dict()
    for name, tensor in state.items():
        if re.search(r'\.own_|temperature', name):
            with pytest.raises(Mistake, match=f'{name} has no initial value in shards'):
                read(name, tensor)
        else:
            assert read(name, tensor).isfinite().all()


def test_optimizer_holds_every_parameter_exactly_once():
    model = tiny_model(bias=True)
    optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=1e-3, betas=(0.9, 0.95), device_type='cpu')
    groups = optimizer.param_groups
    held = [id(p) for group in groups for p in group['params']]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    decays = {id(p): group['weight_decay'] > 0 for group in groups for p in group['params']}
    for name, p in model.named_parameters():
        assert decays[id(p)] == (p.dim() in (2, 3)), name
    assert any(p.dim() == 3 for p in model.parameters())


def test_flops_are_counted_from_the_structure():
    model = tiny_model(num_nextn_predict_layers=0, n_layer=1)
    c = model.config
    attn = sum(p.numel() for p in model.transformer.h[0].attn.parameters())
    ffn = (c.num_experts_per_tok + c.n_shared_experts) * 3 * 32 * c.moe_intermediate_size
    scores = 4 * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim) * c.block_size
    norms = 3 * 32
    assert model.flops_per_token() == 6 * (attn + ffn + 8 * 32 + norms + 61 * 32 + scores)


def test_each_embedding_is_dropped_out():
    """The main stack's, and each MTP module's."""
    model, kept = tiny_model(dropout=0.5).train(), []
    model.transformer.drop.register_forward_hook(lambda module, x, out: kept.append((out != 0).float().mean().item()))
    idx = torch.randint(61, (2, 17))
    model(idx[:, :-1], idx[:, 1:])
    assert len(kept) == 1 + len(model.mtp) and all(0.4 < share < 0.6 for share in kept)


def test_a_compiled_model_is_not_compiled_again():
    """In fp32, where the experts' products break the graph: the graphs of two passes serve all others."""
    torch._dynamo.reset()
    model, idx = tiny_model().train(), torch.randint(61, (2, 17))
    model.compile(backend='eager')
    graphs = []
    for _ in range(4):
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        graphs.append(torch._dynamo.utils.counters['stats']['unique_graphs'])
    assert graphs[0] > 2 and graphs[1] == graphs[2] == graphs[3], graphs


def test_recomputed_blocks_run_compiled():
    """Each block, and the loss: dynamo runs what it cannot trace eagerly, without a word."""
    def runs(recompute):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, ran = tiny_model().train(), []
        if recompute:
            model.recompute()
        model.compile(backend=lambda graph, inputs: lambda *args: ran.append(graph) or graph.forward(*args))
        idx = torch.randint(61, (2, 17))
        with torch.autocast('cpu', torch.bfloat16):
            model(idx[:, :-1], idx[:, 1:])[1].backward()
        return len(ran)

    blocks = len(list(tiny_model().blocks()))
    assert runs(recompute=True) == runs(recompute=False) == blocks + 1


def test_mfu_is_the_share_of_the_peak(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(model_file, 'peak_tflops', lambda name: 312)
    share = model.flops_per_token() * model.config.block_size * 4 / 0.5 / 312e12
    assert model.estimate_mfu(fwdbwd_per_iter=4, dt=0.5) == pytest.approx(share)


def test_yarn_keeps_fast_pairs_slows_slow_ones_and_blends_between():
    """DeepSeek-V3's own numbers: of 32 pairs the first 11 keep their frequency, the last 9 are slowed 40 times."""
    config = GPTConfig(**TINY | dict(qk_rope_head_dim=64, rope_factor=40.0, rope_original_max_position_embeddings=4096,
                                     rope_mscale=1.0, rope_mscale_all_dim=1.0))
    cos, sin = (table[1].double() for table in rope_table(config))           # at position 1 the angle is the frequency
    got, plain = torch.atan2(sin, cos), 10000.0 ** -(torch.arange(32).double() / 32)
    slowed = got / plain
    torch.testing.assert_close(slowed[:11], torch.ones(11).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(slowed[23:], torch.full((9,), 1 / 40).double(), atol=1e-5, rtol=1e-3)
    blend = (torch.arange(32).double() - 10) / 13                             # 0 at pair 10, 1 at pair 23
    torch.testing.assert_close(slowed[11:23], (1 - blend + blend / 40)[11:23], atol=1e-5, rtol=1e-4)


def test_checkpoints_of_a_compiled_model_and_of_one_that_knows_no_yarn(tmp_path):
    """torch.compile's prefix is taken off the names; a context is extended from the one that was trained."""
    model = tiny_model().eval()
    args = dataclasses.asdict(model.config)
    del args['rope_original_max_position_embeddings']
    torch.save({'model': {f'_orig_mod.{k}': v for k, v in model.state_dict().items()}, 'model_args': args},
               tmp_path / 'ckpt.pt')
    idx = torch.randint(61, (1, 9))
    assert torch.equal(GPT.from_checkpoint(tmp_path / 'ckpt.pt')[0].eval()(idx)[0], model(idx)[0])
    longer, _ = GPT.from_checkpoint(tmp_path / 'ckpt.pt', block_size=96, rope_factor=4.0)
    assert longer.config.rope_original_max_position_embeddings == 32 and longer.rope_cos.shape[0] == 96


def test_state_dict_round_trip_and_types():
    model = tiny_model()
    other = GPT(GPTConfig(**dataclasses.asdict(model.config)))
    other.load_state_dict(model.state_dict())
    idx = torch.randint(61, (1, 9))
    assert torch.equal(model.eval()(idx)[0], other.eval()(idx)[0])
    assert not any('rope' in key for key in model.state_dict())


@pytest.mark.parametrize('tokens', [1, 5, 16, 600])
def test_experts_by_sorted_rows_and_all_at_once_equal_a_loop_over_tokens(tokens):
    """600 tokens pad each expert's rows; 1 leaves most experts without any."""
    torch.manual_seed(0)
    moe = tiny_model().transformer.h[0].mlp
    x = torch.randn(tokens, moe.gate.in_features)
    _, gates, experts = moe.route(x)
    if tokens == 600:
        assert model_file.row_alignment(experts.numel(), moe.config.n_routed_experts) > 1
    expected = routed_token_by_token(moe, x, gates, experts)
    out, _ = moe(x.unsqueeze(0))
    torch.testing.assert_close(out[0] - moe.shared_experts(x), expected, rtol=1e-4, atol=1e-6)
    for way in (experts_file.all_experts, experts_file.wide_experts):
        out = way(x, gates, experts, moe.experts_gate_up, moe.experts_down)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-6)


def test_padded_rows_change_no_gradient(monkeypatch):
    torch.manual_seed(0)
    model = tiny_model().train()
    idx = torch.randint(61, (20, 31))
    grads = []
    for align in (1, 16):
        monkeypatch.setattr(model_file, 'row_alignment', lambda n, n_experts, align=align: align)
        model.zero_grad()
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
