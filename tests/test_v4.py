"""model_v4.py: with everything off it is model.py; each idea against a plain or foreign twin."""

import dataclasses
import json
import math

import pytest
import torch
from conftest import TINY, load, losses, run_inside, torchrun, train
from torch.nn import functional as F

import grpo
import model
import model_v4
from extras import architecture, experts, fp8, hf, optim, parallel
from extras.decode import Decoder, for_decoding
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


@pytest.mark.parametrize('form', ['whole', 'dcp'])
def test_a_resume_needs_no_flag(small, form):
    """Its optimizer has the group of Engram's tables, too."""
    given = ['--engram_layers=0', '--engram_rows=50', f'--checkpoint={form}']
    train(small, V4, *given)
    train(small, V4, *given, '--max_iters=3', '--out_dir=other')
    train(small, given[-1], '--out_dir=other', '--init_from=resume')
    assert losses(small) == losses(small, 'other')


def test_architectures_that_are_none(small):
    for name in ('model_v5', 'sample', '../model', ''):
        said = train(small, f'--architecture={name}', code=2)
        assert said.splitlines()[-1].startswith(f'architecture={name!r} must be one of the files model, model_v4')


def test_settings_that_would_do_nothing_are_told(small):
    assert 'layer_types is a setting of model_v4.py: add --architecture=model_v4' in \
        train(small, '--layer_types=ss', code=2)
    assert 'did you mean engram_layers' in train(small, '--engram_layer=0', code=2)
    told = train(small, V4, '--engram_rows=100', '--layer_types=ss', '--index_topk=4')
    assert 'note: engram_rows=100 has no effect, because engram_layers is off' in told
    assert 'note: sliding_window=128 covers the whole block_size=16' in told
    assert 'note: index_topk=4 has no effect' in told
    assert "ignored, since the architecture is the checkpoint's: architecture=model" in \
        train(small, '--architecture=model', '--init_from=resume')
    assert 'hc_mult=2: out was trained with another architecture; of what model_v4.py adds only index_topk' in \
        train(small, V4, '--hc_mult=2', '--init_from=out', '--out_dir=streams', code=2)
    assert 'index_warmup=True needs trained weights' in \
        train(small, V4, '--index_topk=4', '--index_warmup=True', code=2)


def test_its_fields_are_flags_and_stand_in_the_help(small):
    code, printed, said = run_inside('train.py', V4, '--help', cwd=small)
    assert (code, said) == (0, '')
    for field in dataclasses.fields(model_v4.GPTConfig):
        assert f'  --{field.name}=' in printed


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
    prompts = [torch.randint(61, (n,)).tolist() for n in (7, 1, 26)]
    want = greedy(gpt, prompts, 16)
    for speculative in (False, True):
        assert Decoder(gpt).generate(prompts, 16, temperature=0, speculative=speculative)[0] == want


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
    assert not gpt.main_stack(idx)[0].requires_grad                  # nothing else has a backward, not one of zeros
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
    train(small, *index, '--index_warmup=True', '--out_dir=warm', '--eos_token_id=5')
    logged = [json.loads(line) for line in (small / 'warm/log.jsonl').read_text().splitlines()]
    said = [line['index_loss'] for line in logged if 'index_loss' in line]
    assert len(said) == 6 and said[-1] < said[0]
    assert len({line['val_loss'] for line in logged if 'val_loss' in line}) == 1                 # all else is frozen
    assert "is of an indexer's warm-up: add --architecture=model_v4" in \
        train(small, '--init_from=warm', '--out_dir=sparse', code=2)
    assert 'trained with index_warmup=True: resume with --index_warmup=True' in \
        train(small, V4, '--init_from=resume', '--out_dir=warm', code=2)
    said = run_inside('grpo.py', '--init_from=warm', '--out_dir=tuned', '--device=cpu', cwd=small)[2]
    assert "the model in warm is in its indexer's warm-up" in said, said
    train(small, V4, '--init_from=warm', '--out_dir=sparse')
    assert 'trained with index_warmup=False' in \
        train(small, V4, '--index_topk=4', '--index_warmup=True', '--init_from=resume', '--out_dir=sparse', code=2)
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


def test_models_with_other_numbers_are_compiled_anew():
    """A graph with a number as its input would keep the number of the model that it was compiled for, on CPUs."""
    torch._dynamo.reset()
    idx, graphs = torch.randint(61, (2, 16)), []
    for limit in (0.5, 2.0, 1.0):
        gpt = v4_model(n_layer=1, n_routed_experts=0, num_nextn_predict_layers=0, swiglu_limit=limit)
        want = gpt(idx, idx)[1]
        gpt.compile(backend='eager')
        torch.testing.assert_close(gpt(idx, idx)[1], want)
        graphs.append(torch._dynamo.utils.counters['stats']['unique_graphs'])
    assert graphs[0] < graphs[1] < graphs[2], graphs


@pytest.mark.slow
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_every_kind_of_block_is_compiled():
    """config/train_v4.py has about as many kinds of blocks as one function may be compiled for."""
    gpt = v4_model(n_layer=8, layer_types='sschchch', num_hash_layers=2, engram_layers='1,3', engram_rows=50, hc_mult=2,
                   sliding_window=5, compress_rate_hca=6, o_groups=2, index_topk=3, num_nextn_predict_layers=2,
                   mtp_n_layer=2)
    idx = torch.randint(61, (2, 32))
    torch._dynamo.reset()
    with torch.autocast('cpu', torch.bfloat16):  # in fp32 the experts' products are left out, on CPUs
        want = gpt(idx, idx)[1]
        gpt.compile(backend='eager')
        got = gpt(idx, idx)[1]
        got.backward()
        with torch.no_grad():
            gpt.eval()(idx, idx, return_logits=False)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0)


# V4's attention

WINDOWS = dict(layer_types='ch', sliding_window=5, compress_rate_csa=4, compress_rate_hca=6, o_groups=2, index_topk=3,
               index_n_heads=8, index_head_dim=8)
KINDS = {'s': 'sliding_attention', 'c': 'compressed_sparse_attention', 'h': 'heavily_compressed_attention'}
THEIRS = {'q_a_layernorm': 'q_a_norm', 'o_proj': 'o_b_proj', 'indexer.compressor': 'compressor.indexer',
          'indexer.wq_b': 'compressor.indexer.q_b_proj',
          'indexer.weights_proj': 'compressor.indexer.scorer.weights_proj'}


def windowed(**overrides):
    gpt = built(**{**WINDOWS, 'layer_types': 'sch', 'n_layer': 3, **overrides})
    for name, p in gpt.named_parameters():
        if name.endswith(('sinks', 'position_bias')):
            torch.nn.init.normal_(p)
    return gpt


@pytest.mark.parametrize('yarn', [False, True])
@pytest.mark.parametrize('kind', 'sch')
def test_v4s_attention_is_transformers_and_cached_at_every_phase(kind, yarn):
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as released
    T, scaled = 40, dict(factor=4.0, original_max_position_embeddings=16)
    settings = DeepseekV4Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, head_dim=16, q_lora_rank=12, qk_rope_head_dim=8,
        layer_types=[KINDS[kind]], mlp_layer_types=['moe'], sliding_window=6, o_groups=2, o_lora_rank=10,
        compress_rates={KINDS['c']: 4, KINDS['h']: 8}, index_n_heads=6, index_head_dim=12, index_topk=5,
        max_position_embeddings=64, attn_implementation='eager',
        **(dict(rope_parameters=dict(rope_type='yarn', beta_fast=32, beta_slow=1, **scaled)) if yarn else {}))
    config = model_v4.GPTConfig(
        block_size=64, n_layer=1, n_head=4, n_embd=32, q_lora_rank=12, qk_rope_head_dim=8, qk_nope_head_dim=8,
        layer_types=kind, sliding_window=6, o_groups=2, o_lora_rank=10, compress_rate_csa=4, compress_rate_hca=8,
        index_n_heads=6, index_head_dim=12, index_topk=5,
        **({f'rope_{name}': value for name, value in scaled.items()} if yarn else {}))
    theirs, ours = released.DeepseekV4Attention(settings, 0).eval(), model_v4.Attention(config, 0).eval()
    with torch.no_grad():
        left = theirs.state_dict()
        for name, p in theirs.named_parameters():
            p.uniform_(0.5, 1.5) if 'norm' in name else p.normal_(std=0.3)
        for name, p in ours.named_parameters():
            for mine, other in THEIRS.items():
                if name.startswith(mine):
                    name = name.replace(mine, other, 1)
                    break
            p.copy_(left.pop(name))
        assert all(name.endswith('inv_freq') for name in left)
        x, place = torch.randn(2, T, 32), torch.arange(T)
        rotary = released.DeepseekV4RotaryEmbedding(settings)
        rope = {name: rotary(x, place.expand(2, T), layer_type=name) for name in ('main', 'compress')}
        age = place[:, None] - place
        mask = torch.zeros(T, T).masked_fill((age < 0) | (age >= 6), float('-inf')).expand(2, 1, T, T)
        want, tables = theirs(x, rope, place.expand(2, T), mask)[0], model_v4.rope_tables(config)
        assert want.std() > 0.5
        torch.testing.assert_close(ours(x, *tables)[0], want, atol=1e-5, rtol=1e-5)
        for first in (1, 2, 3, 4, 8, 9):                              # a prompt of this length, then pieces
            cache = ours.make_cache(lambda *size: torch.zeros(2, *size), T)
            ends = [0, first, *range(first + 1, 30), 33, T]
            got = [ours(x[:, a:b], *tables, cache, a)[0] for a, b in zip(ends, ends[1:])]
            torch.testing.assert_close(torch.cat(got, dim=1), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('overrides', [{}, dict(index_topk=0, hc_mult=2, engram_layers='1'), dict(sliding_window=99)])
def test_v4s_attention_is_causal_and_cached_in_a_whole_model(overrides):
    gpt = windowed(**overrides).eval()
    idx = torch.randint(61, (2, 32))
    with torch.no_grad():
        want, cache = gpt(idx, idx)[0], gpt.make_cache(2, 32)
        got = [gpt(idx[:, a:b], idx[:, a:b], cache=cache, pos=a)[0] for a, b in ((0, 9), (9, 10), (10, 13), (13, 32))]
        torch.testing.assert_close(torch.cat(got, dim=1), want, atol=2e-5, rtol=1e-5)
        for t in range(12, 24):                                      # all phases of both rates
            other = idx.clone()
            other[:, t] = (other[:, t] + 1) % 61
            differ = (gpt(other, other)[0] - want).abs().amax(dim=(0, 2))
            assert differ[:t].max() == 0 < differ[t]


@pytest.mark.parametrize('overrides', [{}, dict(index_topk=0, num_nextn_predict_layers=3, engram_layers='0,2')])
def test_v4s_attention_decodes_to_the_tokens_of_generate(overrides):
    """Prompts of several lengths, drafts that are refused, rows that are done, and beyond block_size."""
    gpt = windowed(n_routed_experts=0, **overrides).eval()
    prompts = [torch.randint(61, (n,)).tolist() for n in (7, 1, 12, 7, 30)]
    prompts.append(prompts[2])
    want = greedy(gpt, prompts, 16)
    for speculative in (False, True):
        assert Decoder(gpt).generate(prompts, 16, temperature=0, speculative=speculative)[0] == want


def test_v4s_attention_keeps_accepted_drafts():
    gpt = windowed(n_layer=2, layer_types='ch', n_routed_experts=0).train()
    optimizer = gpt.configure_optimizers(0.0, 1e-2, (0.9, 0.99), 'cpu')
    for _ in range(80):
        data = (torch.randint(11, (8, 1)) + torch.arange(25)) % 11
        gpt(data[:, :-1], data[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    rows, told = Decoder(gpt.eval()).generate([[0, 1, 2], [5]], 25, temperature=0, speculative=True)
    assert rows == [[i % 11 for i in range(28)], [i % 11 for i in range(5, 31)]]
    assert told.tokens.sum() > 2 * told.passes.sum()


def test_rings_do_not_grow_with_the_context():
    gpt = windowed()
    sizes = [[[x.shape[1] for x in block] for block in gpt.make_cache(1, length)] for length in (32, 320)]
    assert sizes[0] == [[8], [8, 11, 9, 11, 9], [8, 9, 6]]           # 3 rows more than the window: 2 modules' drafts
    assert sizes[1] == [[8], [8, 11, 81, 11, 81], [8, 9, 54]]


def test_every_parameter_of_v4s_attention_learns_and_has_an_initial_value():
    gpt = windowed()
    idx = torch.randint(61, (2, 32))
    gpt(idx, idx)[1].backward()
    for name, p in gpt.named_parameters():
        assert p.grad is not None and p.grad.any(), name
        gpt.initialise(name, p.data.fill_(torch.nan))                # as extras/parallel.py does
        assert not p.isnan().any(), name
    warm = windowed(index_warmup=True)
    warm(idx, idx)[1].backward()
    grads = {name: p.grad for name, p in warm.named_parameters() if p.grad is not None}
    assert grads and all('.indexer.' in name and grad.any() for name, grad in grads.items())


@pytest.mark.parametrize('flags, message', [
    (dict(index_topk=4, q_lora_rank=0), 'index_topk=4 needs q_lora_rank above 0'),
    (dict(index_topk=-1), 'index_topk=-1 must not be negative'),
    (dict(index_topk=4, index_head_dim=2), 'index_head_dim=2 must be at least qk_rope_head_dim=4'),
    (dict(index_topk=4, index_n_heads=0), 'index_n_heads=0 must be positive'),
    (dict(index_warmup=True), 'index_warmup=True must be False, unless index_topk is above 0'),
    (dict(layer_types='sh', index_topk=4, compress_rate_hca=8, index_warmup=True), 'index_warmup=True must be False'),
    (dict(layer_types='sc', compress_rope_theta=1.5, rope_factor=2.0), 'compress_rope_theta=1.5 must be above 2'),
    (dict(layer_types='sc', n_layer=3), "layer_types='sc' must be '' or a letter s, c or h for each of the n_layer=3"),
    (dict(layer_types='sx'), "layer_types='sx' must be '' or a letter"),
    (dict(layer_types='ss', q_lora_rank=0), "layer_types='ss' needs q_lora_rank above 0"),
    (dict(layer_types='sh'), "compress_rate_hca=128 must be at most block_size=32: no window of layer_types=sh"),
    (dict(layer_types='sc', compress_rate_csa=0), 'compress_rate_csa=0 must be positive'),
    (dict(sliding_window=0), 'sliding_window=0 must be positive'),
    (dict(o_groups=3), 'o_groups=3 must divide n_head=4'),
])
def test_settings_of_v4_that_fit_nothing(flags, message):
    with pytest.raises(Mistake, match=message):
        model_v4.GPTConfig(**TINY | flags)
# -----------------------------------------------------------------------------
# what every idea must do

IDEAS = {
    'mhc': dict(hc_mult=3),
    'engram': dict(engram_layers='0,1', engram_heads=2, engram_rows=50, engram_dim=4),
    'experts': dict(scoring_func='sqrtsoftplus', swiglu_limit=0.5, num_hash_layers=1),
    'dsa': DSA,
    'all': dict(hc_mult=2, engram_layers='1', engram_ngram=4, engram_rows=50, scoring_func='sqrtsoftplus',
                swiglu_limit=2.0, num_hash_layers=2, **WINDOWS),
}
idea = pytest.mark.parametrize('overrides', IDEAS.values(), ids=IDEAS)


def flags(overrides):
    return [f'--{name}={value}' for name, value in overrides.items()]


def v4_model(std=0.2, **overrides):
    """A model in which no part is at its neutral initial value."""
    gpt = model_v4.GPT(model_v4.GPTConfig(**{**TINY, 'initializer_range': std, **overrides}))
    for name, p in gpt.named_parameters():
        if name.endswith(('norm', 'norm.weight')):
            torch.nn.init.uniform_(p, 0.5, 1.5)
        elif name.endswith(('conv', 'base', 'scale', 'hc_fn', 'sinks', 'position_bias')):
            torch.nn.init.normal_(p, std=0.5)
    return gpt


@idea
def test_each_idea_changes_the_logits_and_all_its_parameters_learn(overrides):
    gpt, idx = v4_model(**overrides), torch.randint(61, (2, 32))
    gpt(idx, idx)[1].backward()
    idle = [name for name, p in gpt.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not idle
    plain = model.GPT(model.GPTConfig(**TINY))
    plain.load_state_dict({name: x for name, x in gpt.state_dict().items() if name in plain.state_dict()}, strict=False)
    assert (plain.eval()(idx)[0] - gpt.eval()(idx)[0]).abs().max() > 1e-3


@idea
@torch.no_grad()
def test_decoding_with_a_cache_equals_the_whole(overrides):
    """Token by token and in parts; then rows of different lengths, with and without drafts of the MTP modules."""
    gpt, idx = v4_model(**overrides).eval(), torch.randint(61, (2, 32))
    whole, cache = gpt(idx, idx)[0], gpt.make_cache(2, 32)
    for start, end in ((0, 2), (2, 3), (3, 4), (4, 11), (11, 12), (12, 30), (30, 31), (31, 32)):
        got = gpt(idx[:, start:end], cache=cache, pos=start)[0]
        torch.testing.assert_close(got[:, 0], whole[:, end - 1], atol=1e-4, rtol=1e-4)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [1], [1, 2, 3]]
    plain = [gpt.generate(torch.tensor([prompt]), 20, temperature=0)[0].tolist() for prompt in prompts]
    decoder = Decoder(gpt)
    assert decoder.generate(prompts, 20, temperature=0)[0] == plain
    rows, told = decoder.generate(prompts, 20, temperature=0, speculative=True)
    assert rows == plain and told.drafts.sum() > told.accepted.sum()


@idea
def test_no_token_changes_what_stands_before_it(overrides):
    gpt, idx = v4_model(**overrides).eval(), torch.randint(61, (1, 24))
    other = idx.clone()
    other[0, 12] = (idx[0, 12] + 1) % 61
    a, b = (gpt(x, x)[0][0] for x in (idx, other))
    torch.testing.assert_close(a[:12], b[:12], atol=1e-6, rtol=1e-6)
    assert (a[12:15] - b[12:15]).abs().amax(dim=1).min() > 1e-4


@idea
def test_recompute_and_bf16(overrides):
    gpt, idx = v4_model(0.05, **overrides), torch.randint(61, (2, 32))

    def gradients():
        gpt.zero_grad()
        loss = gpt(idx, idx)[1]
        loss.backward()
        return [loss.detach(), *(p.grad for p in gpt.parameters())]

    want = gradients()
    with torch.autocast('cpu', torch.bfloat16):
        low = gradients()
    assert low[0] == pytest.approx(want[0].item(), rel=0.02)
    low, whole = (torch.cat([grad.flatten() for grad in found[1:]]) for found in (low, want))
    assert F.cosine_similarity(low, whole, dim=0) > 0.98
    logits = gpt.eval()(idx, idx)[0]
    gpt.train().recompute()
    for a, b in zip(gradients(), want, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    gpt = for_decoding(gpt.eval(), torch.bfloat16)
    assert (gpt(idx, idx)[0] - logits).square().mean() < 0.01 * logits.square().mean()
    rows, _ = Decoder(gpt).generate([[1, 2], [3]], 12, speculative=True)
    assert [len(row) for row in rows] == [14, 13]


@idea
@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_every_parameter_is_in_one_group_of_the_optimizer(overrides, kind):
    gpt = v4_model(**overrides)
    make = optim.muon if kind == 'muon' else model_v4.GPT.configure_optimizers
    groups = make(gpt, 0.1, 1e-3, (0.9, 0.95), 'cpu').param_groups
    inside = [id(p) for group in groups for p in group['params']]
    assert len(inside) == len(set(inside)) and set(inside) == {id(p) for p in gpt.parameters()}
    tables = {id(block.engram.table.weight) for block in gpt.blocks() if block.engram}
    apart = [group for group in groups if 'lr_scale' in group]
    assert [(group['lr_scale'], group['weight_decay'], 'muon' in group) for group in apart] == \
        [(5.0, 0.0, False)] * bool(tables)
    assert {id(p) for group in apart for p in group['params']} == tables
    decayed = {id(p) for group in groups if group['weight_decay'] > 0 for p in group['params']}
    assert not any(id(p) in decayed for p in gpt.parameters() if p.dim() < 2)


@idea
def test_initial_values_in_shards_are_those_of_one_process(overrides):
    config = model_v4.GPTConfig(**TINY, **overrides, tie_word_embeddings=False)
    torch.manual_seed(5)
    whole = model_v4.GPT(config)
    with torch.device('meta'):
        empty = model_v4.GPT(config)
    empty.to_empty(device='cpu')
    torch.manual_seed(5)
    parallel.fill(empty, None)
    for name, x in whole.state_dict().items():
        assert torch.equal(empty.state_dict()[name], x), name


@idea
def test_grpo_trains_it(overrides):
    gpt = v4_model(**overrides, eos_token_id=0)
    before = {name: p.clone() for name, p in gpt.named_parameters()}
    decoder, prompts = Decoder(gpt), [[1, 2, 3]] * 2 + [[4, 5]] * 2
    responses = grpo.sample_responses(decoder, prompts, 8, 1.0)
    rows, mask, sampled = grpo.pack(prompts, responses, 0, 'cpu', decoder.log_probs)
    optimizer = gpt.configure_optimizers(0.0, 1e-3, (0.9, 0.99), 'cpu')
    numbers = grpo.update(gpt, optimizer, rows, mask, torch.tensor([1., -1, 1, -1]), sampled_logp=sampled)
    assert numbers['mismatch'] < 1e-4 and 0 < numbers['grad_norm']
    assert any(not torch.equal(before[name], p) for name, p in gpt.named_parameters())


def test_only_experts_that_are_chosen_by_scores_are_balanced():
    gpt = v4_model(n_layer=1, num_nextn_predict_layers=0, num_hash_layers=1, aux_loss_alpha=100.0)
    idx = torch.randint(61, (2, 32))
    grads = []
    for alpha in (100.0, 0.0):
        gpt.config.aux_loss_alpha = alpha
        gpt.zero_grad()
        gpt(idx, idx)[1].backward()
        grads.append(gpt.transformer.h[0].mlp.gate.weight.grad)
    assert torch.equal(*grads) and grads[0].any()


def test_scores_of_any_logit_have_a_gradient():
    logits = torch.tensor([-200.0, -110, -20, 0, 30], requires_grad=True)
    model_v4.sqrtsoftplus(logits).sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[2:].all()


def assert_same_losses(folder, out, rel=1e-3):
    one, other = losses(folder), losses(folder, out)
    assert len(one) == 6 and one.keys() == other.keys()
    assert all(other[step] == pytest.approx(one[step], rel=rel) for step in one)


@pytest.mark.parametrize('overrides', [IDEAS['all'], *(pytest.param(IDEAS[name], marks=pytest.mark.slow)
                                                      for name in ('mhc', 'engram', 'experts'))])
def test_two_ranks_and_a_resume_train_as_one_run(small, overrides):
    given = [V4, *flags(overrides)]
    train(small, *given)
    assert 'iteration 3 of 6' in train(small, *given, '--max_iters=3', '--out_dir=other') + \
        train(small, *given, '--out_dir=other', '--init_from=resume')
    one, other = load(small), load(small, 'other/ckpt.pt')
    assert all(torch.equal(x, other['model'][name]) for name, x in one['model'].items())
    code, printed = torchrun(small, *given, '--out_dir=two')
    assert code == 0, printed
    assert_same_losses(small, 'two', rel=1e-4)


@pytest.mark.slow
@idea
def test_compiled_and_sharded_runs_train_as_a_plain_one(small, overrides):
    given = [V4, *flags(overrides)]
    train(small, *given)
    assert 'without torch.compile' not in train(small, *given, '--compile=True', '--out_dir=compiled')
    assert_same_losses(small, 'compiled')
    for more in ('--expert_parallel=2', '--checkpoint=dcp'):
        code, printed = torchrun(small, *given, '--shard=2', more, f'--out_dir={more[2:5]}')
        assert code == 0, printed
        assert_same_losses(small, more[2:5])
    code, printed = torchrun(small, *given, '--shard=2', '--checkpoint=dcp', '--out_dir=che', '--init_from=resume',
                             '--max_iters=8')
    assert code == 0 and 'iteration 6 of 8' in printed, printed


@pytest.mark.slow
@idea
@torch.no_grad()
def test_a_compiled_step_decodes_as_a_plain_one(overrides):
    gpt = v4_model(**overrides).eval()
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    decoder = Decoder(gpt, compile=True)
    rows = decoder.generate(prompts, 20, temperature=0, speculative=True)[0]
    assert decoder.compile and rows == Decoder(gpt).generate(prompts, 20, temperature=0)[0]


@pytest.mark.parametrize('overrides, said', [
    (dict(hc_mult=65), 'hc_mult=65 must lie in 0..64'), (dict(hc_sinkhorn_iters=0), 'hc_sinkhorn_iters=0 must'),
    (dict(engram_layers='0,2'), "engram_layers='0,2' must be different main blocks below n_layer=2"),
    (dict(engram_layers='1,1'), 'must be different'), (dict(engram_layers='first'), 'must be different'),
    (dict(engram_ngram=16, engram_heads=18), 'engram_heads=18 times engram_ngram - 1 must be at most 256 tables'),
    (dict(engram_ngram=1), 'engram_ngram=1 must lie in 2..16'), (dict(engram_rows=0), 'engram_rows=0 must be positive'),
    (dict(num_hash_layers=3), 'num_hash_layers=3 must lie in 0..n_layer=2'),
    (dict(num_hash_layers=1, n_routed_experts=0), 'needs experts'),
    (dict(num_hash_layers=1, first_k_dense_replace=1), 'needs experts'), (dict(swiglu_limit=-1.0), 'swiglu_limit=-1.0'),
    (dict(scoring_func='sqrtsoftplus', n_group=2), 'needs n_group=1'),
    (dict(scoring_func='relu'), "must be 'sigmoid' or 'softmax', or in model_v4 'sqrtsoftplus'"),
])
def test_fields_that_do_not_fit(overrides, said):
    with pytest.raises(Mistake) as e:
        model_v4.GPTConfig(**TINY | overrides)
    assert said in str(e.value)
    with pytest.raises(Mistake):
        model.GPTConfig(scoring_func='sqrtsoftplus')


def test_a_model_is_exported_in_the_format_that_has_all_its_ideas():
    """With all of them off it is a V3. tests/test_convert_v4.py has the formats of V3.2 and V4."""
    kinds = {'dsa': 'deepseek_v32', 'off': 'deepseek_v3'}
    for name, overrides in (IDEAS | {'off': {}}).items():
        config = model_v4.GPTConfig(**TINY, **overrides)
        if name in kinds:
            assert hf.settings_out(config, 'float32', None)[0]['model_type'] == kinds[name]
            continue
        with pytest.raises(Mistake, match='in DeepseekV4ForCausalLM .* must ') as e:
            hf.settings_out(config, 'float32', None)
        needed = {'mhc': "swiglu_limit=0.0", 'engram': "engram_layers='0,1'", 'experts': "hc_mult=0",
                  'all': "engram_layers='1'"}
        assert needed[name] in str(e.value)


# -----------------------------------------------------------------------------
# mHC

def transformers_v4(**sizes):
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4 import modeling_deepseek_v4
    return modeling_deepseek_v4, DeepseekV4Config(hidden_size=32, num_hidden_layers=2, **sizes)


def test_mixing_matrices_are_doubly_stochastic():
    comb = model_v4.sinkhorn(torch.randn(50, 4, 4), 20, 1e-6)
    for dim in (-1, -2):
        torch.testing.assert_close(comb.sum(dim=dim), torch.ones(50, 4), atol=1e-3, rtol=0)
    assert (comb - comb.transpose(-1, -2)).abs().max() > 0.1 and comb.min() > 0


@torch.no_grad()
def test_hyper_connections_equal_transformers():
    theirs, config = transformers_v4(hc_mult=4)
    ours = model_v4.GPTConfig(**TINY, hc_mult=4)
    a, b = model_v4.HyperConnection(ours), theirs.DeepseekV4HyperConnection(config)
    head, their_head = model_v4.StreamNorm(ours), theirs.DeepseekV4HyperHead(config)
    for p, q in ((a.fn, b.fn), (a.base, b.base), (a.scale, b.scale), (head.hc_fn, their_head.hc_fn),
                 (head.hc_base, their_head.hc_base), (head.hc_scale, their_head.hc_scale)):
        q.copy_(p.normal_())
    x, y = torch.randn(2, 9, 4, 32), torch.randn(2, 9, 32)
    post, comb, collapsed = b(x)
    want = post.unsqueeze(-1) * y.unsqueeze(-2) + comb.transpose(-1, -2) @ x
    h, *mix = a(x)
    for got, wanted in ((h, collapsed), (mix[0], post), (mix[1], comb), (model_v4.connect(x, y, *mix), want),
                        (head(x), torch.nn.functional.rms_norm(their_head(x), (32,), eps=1e-6))):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_one_stream_that_passes_all_is_the_plain_residual():
    x, y = torch.randn(2, 5, 1, 32), torch.randn(2, 5, 32)
    hc = model_v4.HyperConnection(model_v4.GPTConfig(**TINY, hc_mult=1))
    with torch.no_grad():
        hc.fn.zero_()
        hc.base.copy_(torch.tensor([30.0, 0.0, 7.0]))                       # pre 1, post 1, comb 1
    h, *mix = hc(x)
    torch.testing.assert_close(h, x[:, :, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model_v4.connect(x, y, *mix)[:, :, 0], x[:, :, 0] + y, atol=1e-5, rtol=1e-5)


# -----------------------------------------------------------------------------
# Engram

@pytest.mark.parametrize('n', [1, 3])
@torch.no_grad()
def test_engram_equals_plain_loops(n):
    """The hash of the released demo, the gate and the convolution, one position and one stream at a time."""
    gpt = v4_model(engram_layers='0,1', engram_ngram=3, engram_heads=2, engram_rows=40, engram_dim=4, hc_mult=n)
    memory, idx = gpt.transformer.h[1].engram, torch.randint(61, (2, 20))
    C, N, V, rms = 32, 3, 61, torch.nn.functional.rms_norm
    h = torch.randn(2, 20, n, C)
    tokens, _ = gpt.recent(idx, None, 0)
    got = memory(h if n > 1 else h[:, :, 0], tokens).view(2, 20, n, C)
    sizes = [block.engram.primes for block in gpt.transformer.h]
    assert sizes == [[41, 43, 47, 53], [59, 61, 67, 71]]
    k_norm, h_norm, conv_norm = (p.view(n, C) for p in (memory.k_norm, memory.h_norm, memory.conv_norm))
    for b in range(2):
        values = []
        for t in range(20):
            ids = [int(idx[b, t - k]) if t >= k else V for k in range(N)]
            parts, start = [], 0
            for length in (2, 3):
                mix = 0
                for k in range(length):
                    mix ^= ids[k] * memory.multipliers[k]
                    assert 0 <= mix < 2**63
                for head in range(2):
                    prime = memory.primes[2 * (length - 2) + head]
                    parts.append(memory.table.weight[start + mix % prime])
                    start += prime
            e = torch.cat(parts)
            key, value = (memory.k_proj.weight @ e).view(n, C), memory.v_proj.weight @ e
            rows = []
            for j in range(n):
                a = (rms(key[j], (C,), k_norm[j], 1e-6) @ rms(h[b, t, j], (C,), h_norm[j], 1e-6)).item() / C**0.5
                rows.append(torch.sigmoid(torch.tensor(math.copysign(abs(a)**0.5, a))) * value)
            values.append(torch.stack(rows))
        normed = [torch.stack([rms(v[j], (C,), conv_norm[j], 1e-6) for j in range(n)]) for v in values]
        for t in range(20):
            z = sum(memory.conv[k].view(n, C) * normed[t - 3 * k] for k in range(4) if t >= 3 * k)
            want = values[t] + torch.nn.functional.silu(z)
            torch.testing.assert_close(got[b, t], want, atol=1e-5, rtol=1e-5)


def test_engram_begins_without_its_convolution_and_counts_the_rows_it_reads():
    gpt = model_v4.GPT(model_v4.GPTConfig(**TINY, engram_layers='0', engram_heads=2, engram_dim=4))
    plain = model.GPT(model.GPTConfig(**TINY))
    memory = gpt.transformer.h[0].engram
    assert not memory.conv.any()
    added = sum(p.numel() for p in memory.parameters())
    rows = memory.table.weight.numel()
    assert rows == 4 * sum(memory.primes) > 4 * 4 * 4096
    assert gpt.get_num_params() == plain.get_num_params() + added
    assert gpt.get_num_active_params() == plain.get_num_active_params() + added - rows + 4 * 4
    assert gpt.flops_per_token() == plain.flops_per_token() + 6 * (added - rows)


def test_the_tables_learn_at_a_multiple_of_the_rate(small):
    """After one step of AdamW from zero moments each weight that has a gradient has moved by the learning rate."""
    moved = {}
    for scale in (1, 5):
        given = [V4, '--engram_layers=0', f'--engram_lr_scale={scale}', '--warmup_iters=0', '--eval_interval=1',
                 '--weight_decay=0.0', '--decay_lr=False', '--learning_rate=1e-3']
        train(small, *given, '--max_iters=2', f'--out_dir={scale}')
        train(small, *given, '--max_iters=1', f'--out_dir={scale}1')
        a, b = (load(small, f'{out}/ckpt.pt')['model']['transformer.h.0.engram.table.weight']
                for out in (scale, f'{scale}1'))
        moved[scale] = (a - b).abs().max().item()
    assert moved[5] == pytest.approx(5 * moved[1], rel=0.2)


# -----------------------------------------------------------------------------
# V4's experts

@pytest.mark.parametrize('hashed', [True, False])
@torch.no_grad()
def test_experts_equal_transformers(hashed):
    theirs, config = transformers_v4(
        n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=16, intermediate_size=16, vocab_size=61,
        swiglu_limit=0.5, n_shared_experts=1, mlp_layer_types=['hash_moe', 'moe'])
    gpt = v4_model(scoring_func='sqrtsoftplus', swiglu_limit=0.5, num_hash_layers=1, routed_scaling_factor=1.5)
    ours, block = gpt.transformer.h[not hashed].mlp.eval(), theirs.DeepseekV4SparseMoeBlock(config, int(not hashed))
    block.gate.weight.copy_(ours.gate.weight)
    block.experts.gate_up_proj.copy_(ours.experts_gate_up)
    block.experts.down_proj.copy_(ours.experts_down)
    gate, up = ours.shared_experts.gate_up_proj.weight.chunk(2)
    for p, q in ((block.shared_experts.gate_proj, gate), (block.shared_experts.up_proj, up),
                 (block.shared_experts.down_proj, ours.shared_experts.down_proj.weight)):
        p.weight.copy_(q)
    idx, x = torch.randint(61, (2, 40)), torch.randn(2, 40, 32)
    if hashed:
        block.gate.tid2eid.copy_(ours.tid2eid)
    else:
        block.gate.e_score_correction_bias.copy_(ours.e_score_correction_bias.normal_())
    want, clamped = block(x, idx), (gpt.transformer.h[0].mlp.experts_gate_up[0] @ x.flatten(0, 1).t()).abs() > 0.5
    assert clamped.float().mean() > 0.3
    for way in (model.sorted_experts, experts.all_experts, experts.wide_experts, experts.chosen_experts):
        ours.experts_fn = way
        got = ours(x, idx.unsqueeze(-1)) if hashed else ours(x)
        torch.testing.assert_close(got[0], want, atol=1e-5, rtol=1e-5)


def test_the_table_of_experts_is_balanced():
    gpt = model_v4.GPT(model_v4.GPTConfig(**TINY, num_hash_layers=2))
    tables = [block.mlp.tid2eid for block in gpt.transformer.h]
    for table in tables:
        assert table.shape == (61, 3) and all(len(set(row)) == 3 for row in table.tolist())
        assert set(table.flatten().bincount(minlength=8).tolist()) == {22, 23}
    assert not torch.equal(*tables)


@pytest.mark.parametrize('way', ['fp8', 'fp8 wide', 'kernels'])
def test_no_way_of_the_experts_drops_the_clamps(way, monkeypatch):
    gpt, x = v4_model(0.5, swiglu_limit=0.25, first_k_dense_replace=1), torch.randn(2, 16, 32)
    want = [block.mlp(x) for block in gpt.transformer.h]
    without = v4_model(0.5, first_k_dense_replace=1)
    without.load_state_dict(gpt.state_dict())
    if way == 'kernels':                                                    # where torch's own grouped kernel runs
        kernels = pytest.importorskip('extras.kernels')
        experts.enable(gpt, kernels.sorted_experts, kernels=True)
        experts.enable(without, kernels.sorted_experts, kernels=True)
    else:
        monkeypatch.setattr(experts, 'is_wide', lambda *_: way == 'fp8 wide')
        fp8.enable(gpt, fp8.Recipe())
        fp8.enable(without, fp8.Recipe())
    for wanted, a, b in zip(want, gpt.transformer.h, without.transformer.h):
        wanted, got, other = (y[0] if isinstance(y, tuple) else y for y in (wanted, a.mlp(x), b.mlp(x)))
        assert (got - wanted).norm() < 0.2 * wanted.norm() < (other - wanted).norm()
