"""The largest attention logit of each head, against all logits; QK-Clip; and both in a run of train.py."""

import contextlib

import pytest
import torch
from conftest import log, tiny_model, train

from extras import qk_clip

CTX = contextlib.nullcontext()


def all_logits(model, x, y):
    """By plain products: (main blocks, B, H, T, T), -inf where a query sees no key."""
    found, hooks = [], []

    def look(attn, inputs):
        q, latent = attn.project(*inputs[:3])
        logits = q @ attn.expand(latent)[0].transpose(-1, -2) * attn.scale
        found.append(logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1) > 0, float('-inf')))

    for block in model.transformer.h:
        hooks.append(block.attn.register_forward_pre_hook(look))
    with torch.no_grad():
        model(x, y)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


def batch():
    idx = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(0))
    return idx[:, :-1], idx[:, 1:]


@pytest.mark.parametrize('rows', [5, 256])
def test_the_largest_logits_are_those_of_plain_products(rows, monkeypatch):
    monkeypatch.setattr(qk_clip, 'ROWS', rows)
    model = tiny_model().train()
    largest = qk_clip.largest_logits(model, *batch(), CTX)
    torch.testing.assert_close(largest, all_logits(model, *batch()).amax(dim=(1, 3, 4)))
    assert largest.shape == (len(model.transformer.h), model.config.n_head)
    assert not any(block.attn._forward_pre_hooks for block in model.transformer.h)


@pytest.mark.parametrize('q_lora_rank', [0, 16])
def test_a_head_beyond_tau_comes_back_to_it(q_lora_rank):
    model = tiny_model(q_lora_rank=q_lora_rank).train()
    attn, config = model.transformer.h[0].attn, model.config
    weight = (attn.q_b_proj if q_lora_rank else attn.q_proj).weight
    with torch.no_grad():
        weight.view(config.n_head, -1, weight.size(1))[1] *= 1e4
        before = qk_clip.largest_logits(model, *batch(), CTX)[0]
        tau, key = before[1].item() / 7, attn.kv_a_proj_with_mqa.weight.clone()
        assert before[1] > tau and (before[[i for i in range(config.n_head) if i != 1]] < tau).all()
        logits = all_logits(model, *batch())[0]
        qk_clip.clip(model, torch.stack([before] + [before * 0] * (len(model.transformer.h) - 1)), tau)
    after = all_logits(model, *batch())[0]
    assert after[:, 1].max().item() == pytest.approx(tau, rel=1e-4)
    torch.testing.assert_close(after[:, 1], logits[:, 1] / 7, rtol=1e-3, atol=1e-3 * tau)  # each logit of this head
    torch.testing.assert_close(after[:, 0], logits[:, 0])
    assert torch.equal(attn.kv_a_proj_with_mqa.weight, key)


def test_logits_that_are_not_finite_clip_nothing():
    model = tiny_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for value in (float('nan'), float('inf')):
        qk_clip.clip(model, torch.full((len(model.transformer.h), model.config.n_head), value), 1.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_run_logs_the_largest_logits_and_bounds_them(small):
    flags = ['--max_iters=12', '--eval_interval=20', '--optimizer=muon', '--learning_rate=0.05']
    train(small, *flags, '--out_dir=free')
    train(small, *flags, '--out_dir=clipped', '--qk_clip=1e-4')
    seen = {out: [line['max_logits'] for line in log(small, out) if 'max_logits' in line]
            for out in ('free', 'clipped')}
    assert len(seen['free']) == 1 and torch.tensor(seen['free']).max() > 1e-3
    first, second = (torch.tensor(x) for x in seen['clipped'][:2])
    assert len(seen['clipped']) == 2 and second.max() < torch.tensor(seen['free']).max() and first.min() > 0


def test_a_model_without_mla(small):
    said = train(small, '--architecture=model_v4', '--layer_types=ss', '--qk_clip=100', code=2)
    assert said.splitlines()[-1].startswith('qk_clip=100.0 bounds the logits of MLA, which this model does not have')
