"""model_v4.py: with everything off it is model.py; each idea against a plain or foreign twin."""

import dataclasses
import json

import pytest
import torch
from conftest import TINY, run_inside, torchrun, train

import model
import model_v4
from extras import architecture, hf
from extras.decode import Decoder
from model import Mistake

V4 = '--architecture=model_v4'


@pytest.mark.parametrize('overrides', [{}, {'dropout': 0.1}, {'n_routed_experts': 0, 'tie_word_embeddings': False}])
def test_with_everything_off_it_is_model_py(overrides):
    def computed(module):
        torch.manual_seed(3)
        gpt = module.GPT(module.GPTConfig(**TINY | overrides))
        idx = torch.randint(61, (2, 32))
        loss = gpt(idx, idx)[1]
        loss.backward()
        state = gpt.state_dict()
        return loss, *state.values(), *(p.grad for p in gpt.parameters()), gpt.eval().generate(idx[:, :5], 10)

    assert model.GPT(model.GPTConfig(**TINY)).state_dict().keys() == \
        model_v4.GPT(model_v4.GPTConfig(**TINY)).state_dict().keys()
    for a, b in zip(computed(model), computed(model_v4), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_every_field_is_checked_and_says_what_it_is_for():
    for field in dataclasses.fields(model_v4.GPTConfig):
        with pytest.raises(Mistake, match=f'{field.name} must be'):
            model_v4.GPTConfig(**{field.name: [0]})


def test_a_run_says_its_architecture_and_the_scripts_read_it_back(small):
    """By a flag or by a line of the config file; then sample.py, grpo.py and a resume know it from the checkpoint."""
    (small / 'v4.py').write_text("architecture = 'model_v4'\nmax_iters = 3\n")
    plain = train(small, '--max_iters=3')
    for how in (V4,), ('v4.py',):
        said = train(small, *how, '--max_iters=3')
        lines = [line for line in said.splitlines() if line.startswith('step ')]
        assert lines and lines == [line for line in plain.splitlines() if line.startswith('step ')]
    GPT, GPTConfig = architecture.of_file(small / 'out/ckpt.pt')
    assert (GPT, GPTConfig) == (model_v4.GPT, model_v4.GPTConfig)
    code, printed, said = run_inside('sample.py', '--out_dir=out', '--start=01', '--num_samples=1',
                                     '--max_new_tokens=5', '--device=cpu', cwd=small)
    assert (code, said) == (0, '') and '01' in printed
    assert 'iteration 3 of 6' in train(small, V4, '--init_from=resume')


def test_architectures_that_are_none(small):
    for name in ('model_v5', 'sample', '../model', ''):
        said = train(small, f'--architecture={name}', code=2)
        assert said.splitlines()[-1].startswith(f'architecture={name!r} must be one of the files model, model_v4')
    train(small, V4, '--max_iters=3')
    said = train(small, '--init_from=resume', code=2)
    assert "'architecture'" in said.splitlines()[-1]


def test_its_fields_are_flags_and_stand_in_the_help(small):
    code, printed, said = run_inside('train.py', V4, '--help', cwd=small)
    assert (code, said) == (0, '')
    for field in dataclasses.fields(model_v4.GPTConfig):
        assert f'  --{field.name}=' in printed


def test_two_ranks_are_as_one(small):
    one = train(small, V4)
    code, printed = torchrun(small, V4)
    assert code == 0, printed
    steps = [[line for line in said.splitlines() if line.startswith('step ')] for said in (one, printed)]
    assert steps[0] == steps[1] and len(steps[0]) == 3


# DeepSeek sparse attention (V3.2)

DSA = dict(index_topk=5, index_n_heads=3, index_head_dim=12)


def built(std=0.2, **overrides):
    """A model whose logits are far from flat: conftest.tiny_model of model_v4."""
    gpt = model_v4.GPT(model_v4.GPTConfig(**{**TINY, 'initializer_range': std, **overrides}))
    for name, p in gpt.named_parameters():
        if 'norm' in name or 'ln_f' in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return gpt


@pytest.mark.parametrize('yarn', [False, True])
def test_dsa_is_transformers(yarn):
    from transformers import DeepseekV32Config, DeepseekV32ForCausalLM
    rope = dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=24, mscale=1.0, mscale_all_dim=0.8,
                beta_fast=32.0, beta_slow=1.0)
    theirs = DeepseekV32ForCausalLM(DeepseekV32Config(
        vocab_size=61, hidden_size=32, intermediate_size=40, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=3, n_group=1,
        topk_group=1, first_k_dense_replace=1, kv_lora_rank=12, q_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=6, v_head_dim=10, max_position_embeddings=96, index_topk=7, index_head_dim=12,
        index_n_heads=12, initializer_range=0.25, routed_scaling_factor=2.5,
        rope_parameters={'rope_theta': 10000.0} | (rope if yarn else {'rope_type': 'default'}))).eval()
    scaled = dict(rope_factor=4.0, rope_original_max_position_embeddings=24, rope_mscale_all_dim=0.8) if yarn else {}
    ours = model_v4.GPT(model_v4.GPTConfig(
        block_size=96, vocab_size=61, n_layer=2, n_head=4, n_embd=32, intermediate_size=40, moe_intermediate_size=16,
        first_k_dense_replace=1, kv_lora_rank=12, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=6,
        v_head_dim=10, routed_scaling_factor=2.5, num_nextn_predict_layers=0, tie_word_embeddings=False,
        index_topk=7, index_n_heads=12, index_head_dim=12, **scaled)).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if 'norm' in name:
                torch.nn.init.uniform_(p, 0.5, 1.5)
        for name, tensor in ours.state_dict().items():
            if 'experts_' in name and 'shared' not in name:
                layer = name.split('.')[2]
                part = {'experts_gate_up': 'gate_up_proj', 'experts_down': 'down_proj'}[name.split('.')[-1]]
                tensor.copy_(theirs.state_dict()[f'model.layers.{layer}.mlp.experts.{part}'])
                continue
            for part, view in hf.parts(ours.config, name, tensor):
                view.copy_(theirs.state_dict()[part])
        idx = torch.randint(61, (2, 90))
        got, want = ours(idx, idx)[0], theirs(idx).logits
        assert want.std() > 1
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        ours.config.index_topk = 90
        assert (ours(idx, idx)[0] - want).abs().max() > 0.1


def test_dsa_that_chooses_all_is_v3():
    plain, sparse = (built(**more).eval() for more in ({}, dict(DSA, index_topk=32)))
    sparse.load_state_dict(plain.state_dict())
    idx = torch.randint(61, (2, 32))
    assert torch.equal(plain(idx, idx)[0], sparse(idx, idx)[0])
    assert torch.equal(plain.generate(idx[:, :9], 40, temperature=0), sparse.generate(idx[:, :9], 40, temperature=0))
    sparse.config.index_topk = 31                                    # only the last query loses a position
    with torch.no_grad():
        differ = (plain(idx, idx)[0] - sparse(idx, idx)[0]).abs().amax(dim=(0, 2))
    assert differ[:31].max() < 1e-4 < differ[31]


@pytest.mark.parametrize('overrides', [DSA, DSA | dict(index_topk=1), DSA | dict(index_topk=31)])
def test_dsa_cached_is_uncached_and_causal(overrides):
    """Prefill masks, later tokens gather their rows; a changed token alters no logit before it."""
    gpt = built(**overrides).eval()
    idx = torch.randint(61, (2, 32))
    with torch.no_grad():
        want = gpt(idx, idx)[0]
        cache = gpt.make_cache(2, 32)
        gpt(idx[:, :7], cache=cache)
        for pos, more in ((7, 1), (8, 3), (11, 1), (12, 20)):
            got = gpt(idx[:, pos:pos + more], cache=cache, pos=pos)[0][:, 0]
            torch.testing.assert_close(got, want[:, pos + more - 1], atol=1e-5, rtol=1e-5)
        other = idx.clone()
        other[:, 20] = (other[:, 20] + 1) % 61
        differ = (gpt(other, other)[0] - want).abs().amax(dim=(0, 2))
    assert differ[:20].max() == 0 < differ[20]


def test_equal_index_scores_choose_the_same_rows_in_prefill_and_decoding():
    """ReLU makes many exact zeros, and topk breaks ties as it likes, by the number of rows too."""
    gpt = built(**DSA).eval()
    for block in gpt.blocks():
        torch.nn.init.zeros_(block.attn.indexer.weights_proj.weight)
    idx = torch.randint(61, (2, 32))
    with torch.no_grad():
        want, cache = gpt(idx, idx)[0], gpt.make_cache(2, 32)
        got = torch.cat([gpt(idx[:, t:t + 1], cache=cache, pos=t)[0] for t in range(32)], dim=1)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def greedy(gpt, prompts, n):
    return [gpt.generate(torch.tensor([prompt]), n, temperature=0)[0].tolist() for prompt in prompts]


def test_dsa_decodes_to_the_tokens_of_generate():
    gpt = built(**DSA).eval()
    prompts = [torch.randint(61, (n,)).tolist() for n in (7, 1, 12, 30)]
    want = greedy(gpt, prompts, 25)
    for speculative in (False, True):
        assert Decoder(gpt).generate(prompts, 25, temperature=0, speculative=speculative)[0] == want


def test_decoding_reads_the_chosen_rows_alone(monkeypatch):
    gpt, read = built(**DSA).eval(), []
    absorbed = model.MLA.attend_absorbed
    monkeypatch.setattr(model.MLA, 'attend_absorbed',
                        lambda attn, q, latent, seen: read.append(latent.shape) or absorbed(attn, q, latent, seen))
    cache, idx = gpt.make_cache(2, 32), torch.randint(61, (2, 30))
    gpt(idx[:, :28], cache=cache)
    assert read == []
    gpt(idx[:, 28:], cache=cache, pos=28)
    assert read == [(4, 5, 16)] * 2                                  # of 2 * 2 queries, 5 rows each of c + r numbers


def test_the_indexer_learns_from_its_own_loss_alone():
    """And the rest from the language loss alone: with 0.0 for the indexers' loss its gradients are none."""
    idx = torch.randint(61, (2, 32))

    def gradients(weight):
        torch.manual_seed(2)
        gpt = built(**DSA)
        h, routing = gpt.main_stack(idx)
        gpt.index_losses = [weight * loss for loss in gpt.index_losses]
        gpt.training_loss(h, routing, idx, idx, mtp_lambda=0.0).backward()
        return {name: p.grad for name, p in gpt.named_parameters()}

    with_loss, without = gradients(1.0), gradients(0.0)
    for name, grad in with_loss.items():
        if '.indexer.' not in name:
            torch.testing.assert_close(grad, without[name], atol=0, rtol=0)
        elif not name.startswith('mtp'):
            assert grad.any() and not without[name].any()


@pytest.mark.parametrize('warmup', [False, True])
def test_the_indexers_loss_is_the_papers(warmup):
    """By loops over tokens: p is the heads' mean attention over the positions that are attended to."""
    gpt = built(**DSA, index_warmup=warmup, num_nextn_predict_layers=0, n_layer=1)
    idx = torch.randint(61, (2, 20))
    gpt(idx, idx)
    attn, config = gpt.transformer.h[0].attn, gpt.config
    with torch.no_grad():
        x = gpt.transformer.h[0].input_layernorm(gpt.transformer.wte(idx))
        rope = gpt.rope_cos[:20], gpt.rope_sin[:20]
        q, latent = attn.project(x, *rope)
        logits = q @ attn.expand(latent)[0].transpose(-1, -2) * attn.scale           # (B, H, T, S)
        qi, w, ki = attn.indexer(x, attn.q_a_layernorm(attn.q_a_proj(x)), *rope)
        total = 0.0
        for b in range(2):
            for t in range(20):
                score = torch.stack([(w[b, t] * (qi[b, t] @ ki[b, s]).relu()).sum() for s in range(t + 1)])
                seen = torch.arange(t + 1)
                if not warmup:                                       # of equal scores (zeros, by ReLU) the last ones
                    seen = t - score.flip(0).sort(descending=True, stable=True).indices[:5]
                p = logits[b, :, t, seen].softmax(dim=-1).mean(dim=0)
                total += (p * (p.log() - score[seen].log_softmax(dim=0))).sum()
    assert config.index_topk == 5
    torch.testing.assert_close(gpt.stats['index_loss'], total / 40, atol=1e-6, rtol=1e-4)


def test_the_warm_up_is_dense_and_trains_the_indexer_alone():
    dense = built()
    gpt = built(**DSA, index_warmup=True, bias_update_speed=0.1)
    gpt.load_state_dict(dense.state_dict())                          # which has no indexer
    before = {name: p.clone() for name, p in gpt.state_dict().items()}
    optimizer = gpt.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    idx = torch.randint(61, (4, 32))
    torch.testing.assert_close(gpt.eval()(idx, idx)[0], dense.eval()(idx, idx)[0], atol=0, rtol=0)
    gpt.train()
    losses = []
    for _ in range(20):
        gpt(idx, idx)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        gpt.update_balance(gpt.stats['load'])
        losses.append(gpt.stats['index_loss'].item())
    assert losses[-1] < losses[0] / 2
    changed = {name for name, p in gpt.state_dict().items() if not torch.equal(p, before[name])}
    assert changed and all('.indexer.' in name for name in changed)
    assert {name for name in before if '.indexer.' in name} == changed


def test_a_run_warms_the_indexer_of_a_dense_run_up_and_goes_on_sparse(small):
    train(small, '--max_iters=3')
    index = [V4, '--init_from=out', '--index_topk=4', '--index_head_dim=8', '--warmup_iters=0', '--decay_lr=False']
    train(small, *index, '--index_warmup=True', '--out_dir=warm')
    logged = [json.loads(line) for line in (small / 'warm/log.jsonl').read_text().splitlines()]
    said = [line['index_loss'] for line in logged if 'index_loss' in line]
    assert len(said) == 6 and said[-1] < said[0]
    assert len({line['val_loss'] for line in logged if 'val_loss' in line}) == 1                 # all else is frozen
    train(small, V4, '--init_from=warm', '--out_dir=sparse')
    gpt, _ = model_v4.GPT.from_checkpoint(small / 'sparse/ckpt.pt')
    assert (gpt.config.index_warmup, gpt.config.index_topk) == (False, 4)


def test_compiled_and_recomputed_blocks_keep_the_indexers_loss():
    idx = torch.randint(61, (2, 32))

    def gradients(change):
        torch.manual_seed(2)
        gpt = built(**DSA, n_layer=1, num_nextn_predict_layers=0)
        change(gpt)
        gpt(idx, idx)[1].backward()
        return [p.grad for p in gpt.parameters()] + [gpt.stats['index_loss']]

    want = gradients(lambda gpt: None)
    assert all(grad is not None and grad.any() for grad in want)
    for change in (lambda gpt: gpt.recompute(), lambda gpt: (gpt.recompute(), gpt.compile(backend='eager'))):
        for a, b in zip(gradients(change), want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('flags, message', [
    (dict(index_topk=4, q_lora_rank=0), 'index_topk=4 needs q_lora_rank above 0'),
    (dict(index_topk=-1), 'index_topk=-1 must not be negative'),
    (dict(index_topk=4, index_head_dim=2), 'index_head_dim=2 must be at least qk_rope_head_dim=4'),
    (dict(index_topk=4, index_n_heads=0), 'index_n_heads=0 must be positive'),
    (dict(index_warmup=True), 'index_warmup=True must be False, unless index_topk is above 0'),
])
def test_settings_of_v4_that_fit_nothing(flags, message):
    with pytest.raises(Mistake, match=message):
        model_v4.GPTConfig(**TINY | flags)
