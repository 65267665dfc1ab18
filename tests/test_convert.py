"""convert.py and extras/hf.py against transformers' DeepseekV3ForCausalLM and DeepseekV2ForCausalLM, random weights."""

import base64
import contextlib
import dataclasses
import glob
import hashlib
import json
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, run_inside
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FineGrainedFP8Config,
)
from transformers.quantizers.quantizers_utils import should_convert_module

import convert
import model as model_file
from extras import hf, output
from extras.decode import Decoder
from model import GPT, MLA, GPTConfig, Mistake

V3 = dict(vocab_size=61, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
          num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3,
          kv_lora_rank=12, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, n_group=1,
          topk_group=1, first_k_dense_replace=1, max_position_embeddings=96, num_nextn_predict_layers=0,
          routed_scaling_factor=2.5, eos_token_id=None, initializer_range=0.25)
V2 = V3 | dict(routed_scaling_factor=1.0, norm_topk_prob=False, topk_method='greedy')
YARN = dict(max_position_embeddings=96, rope_scaling=dict(
    type='yarn', factor=6.0, original_max_position_embeddings=16, beta_fast=2.0, beta_slow=0.5, mscale=1.0,
    mscale_all_dim=0.7))
GROUPS = dict(n_group=4, topk_group=2, num_experts_per_tok=4)


def theirs(settings, v2=False, bias=0.3):
    model = (DeepseekV2ForCausalLM(DeepseekV2Config(**settings)) if v2 else
             DeepseekV3ForCausalLM(DeepseekV3Config(**settings))).eval()
    for name, p in model.named_parameters():
        if 'norm' in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
        elif name.endswith('bias'):
            torch.nn.init.normal_(p, std=0.5)
    for name, b in model.named_buffers():
        if name.endswith('e_score_correction_bias'):
            b.normal_(std=bias)
    return model


def write_checkpoint(out_dir, model, **extra):
    out_dir.mkdir(exist_ok=True)
    torch.save({'model': model.state_dict(), 'optimizer': None, 'model_args': dataclasses.asdict(model.config),
                'iter_num': 7, 'val_loss': 1.5, 'best_val_loss': 1.25, 'config': {'dataset': 'letters'},
                'meta': {}} | extra, out_dir / 'ckpt.pt')


def ours(**overrides):
    sizes = {**TINY, 'block_size': 96, 'initializer_range': 0.25, 'mtp_n_layer': 1}
    model = GPT(GPTConfig(**sizes | overrides)).eval()
    for moe in model.moe_layers():
        if model.config.scoring_func == 'sigmoid':
            moe.e_score_correction_bias.normal_(std=0.3)
    for name, p in model.named_parameters():
        if 'norm' in name or 'ln_f' in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
        elif name.endswith('bias'):
            torch.nn.init.normal_(p, std=0.5)
    return model


def same_model(a, b):
    """Same logits with and without the cache, same greedy tokens; b is transformers'."""
    idx = torch.randint(61, (2, 90))
    with torch.no_grad():
        logits, want = a(idx, idx)[0], b(idx).logits
        assert 3 < want.abs().max() < 60 and want.std() > 1
        assert (logits - want).abs().max() <= 1e-4

        cache = a.make_cache(2, 90)
        a(idx[:, :40], cache=cache)
        past = b(idx[:, :40], use_cache=True).past_key_values
        for pos in range(40, 44):
            step = a(idx[:, pos:pos + 1], cache=cache, pos=pos)[0]
            assert (step - b(idx[:, pos:pos + 1], past_key_values=past).logits).abs().max() <= 1e-4
    prompt = idx[:1, :8]
    assert torch.equal(a.generate(prompt, 64, temperature=0),
                       b.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None))


IMPORTS = [
    ('plain', V3, False), ('no q compression', V3 | dict(q_lora_rank=None), False),
    ('all dense', V3 | dict(first_k_dense_replace=3), False), ('groups', V3 | GROUPS, False),
    ('yarn', V3 | YARN, False), ('tied', V3 | dict(tie_word_embeddings=True), False),
    ('biases', V3 | dict(attention_bias=True), False), ('one eps', V3 | dict(rms_norm_eps=1e-2), False),
    ('theta', V3 | dict(rope_theta=50000.0), False), ('two shared', V3 | dict(n_shared_experts=2), False),
    ('gates as they are', V3 | dict(norm_topk_prob=False), False),
    ('yarn without mscale', V3 | dict(rope_scaling=dict(type='yarn', factor=6.0,
                                                        original_max_position_embeddings=16)), False),
    ('V2', V2, True), ('V2 Lite', V2 | YARN | dict(q_lora_rank=None), True),
    ('V2 groups', V2 | GROUPS | dict(topk_method='group_limited_greedy', routed_scaling_factor=16.0), True),
]


@pytest.mark.parametrize('settings, v2', [case[1:] for case in IMPORTS], ids=[case[0] for case in IMPORTS])
def test_what_transformers_saves_opens_here(tmp_path, settings, v2):
    model = theirs(settings, v2)
    model.save_pretrained(tmp_path, max_shard_size='20KB' if settings is V3 else '5GB')
    assert (tmp_path / 'model.safetensors.index.json').exists() == (settings is V3)
    same_model(hf.from_pretrained(str(tmp_path)).eval(), model)


def test_overrides_keep_the_trained_context_of_the_folder(tmp_path):
    """The original length of YaRN is what the folder was trained at, not what block_size and the factor make of it."""
    theirs(V3).save_pretrained(tmp_path)
    longer = hf.from_pretrained(str(tmp_path), {'block_size': 384, 'rope_factor': 8.0}).config
    assert (longer.block_size, longer.rope_original_max_position_embeddings) == (384, 96)


def test_mtp_modules_that_are_named_and_not_there_are_done_without(tmp_path, capsys):
    """transformers keeps their number when it saves a model, and drops their weights."""
    model = theirs(V3 | dict(num_nextn_predict_layers=1))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / 'config.json').read_text())['num_nextn_predict_layers'] == 1
    same_model(hf.from_pretrained(str(tmp_path)).eval(), model)
    assert 'going on without' in capsys.readouterr().out


EXPORTS = [
    dict(), dict(q_lora_rank=0), dict(first_k_dense_replace=1), dict(n_group=4, topk_group=2),
    dict(n_group=8, topk_group=4), dict(tie_word_embeddings=False), dict(bias=True),
    dict(rope_factor=6.0, rope_beta_fast=2.0, rope_mscale_all_dim=0.7), dict(rope_factor=6.0, rope_mscale_all_dim=0.0),
    dict(n_routed_experts=0), dict(n_shared_experts=0), dict(num_experts_per_tok=1), dict(rms_norm_eps=1e-2),
    dict(scoring_func='softmax', norm_topk_prob=False),
    dict(scoring_func='softmax', norm_topk_prob=False, n_group=4, topk_group=2),
]


@pytest.mark.parametrize('overrides', EXPORTS, ids=str)
def test_a_model_from_here_opens_in_transformers_and_comes_back_bit_for_bit(tmp_path, overrides):
    expressible = overrides.get('n_routed_experts') != 0 and overrides.get('scoring_func') != 'softmax'
    model = ours(num_nextn_predict_layers=2 if expressible else 0, **overrides)
    write_checkpoint(tmp_path / 'out', model)
    convert.export_folder(str(tmp_path / 'out'), str(tmp_path / 'hf'))
    their_class = DeepseekV2ForCausalLM if overrides.get('scoring_func') == 'softmax' else DeepseekV3ForCausalLM
    loaded, info = load(their_class, tmp_path / 'hf', model.config)
    assert not any(info.values())
    same_model(model, loaded)

    convert.import_folder(str(tmp_path / 'hf'), str(tmp_path / 'back'))
    back = torch.load(tmp_path / 'back/ckpt.pt', weights_only=True)
    state = model.state_dict()
    assert list(back['model']) == list(state)
    for name, tensor in state.items():
        assert back['model'][name].dtype == tensor.dtype and torch.equal(back['model'][name], tensor), name
    again, _ = GPT.from_checkpoint(tmp_path / 'back/ckpt.pt')
    idx = torch.randint(61, (1, 90))
    assert torch.equal(again.eval()(idx, idx)[0], model(idx, idx)[0])


def scaled(path, factor=1.5):
    """-> (path, a version of this function of model.py whose first result is larger)"""
    owner, name = path.rsplit('.', 1)
    plain = getattr(model_file if owner == 'model' else getattr(model_file, owner.split('.')[1]), name)

    def changed(*args, **kwargs):
        out = plain(*args, **kwargs)
        return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor
    return path, changed


def gelu_gated(x, *_):
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate) * up


CHANGES = {
    'activation (the format has silu(gate) * up) of model.layers.0': ('model.swiglu', gelu_gated),
    'attention of model.layers.0': scaled('model.MLA.expand'),
    'norm (input_layernorm) of model.layers.0': scaled('model.RMSNorm.forward'),
    'router of model.layers.1': ('model.keep_best_groups', lambda choice, *_: choice),
    'feed-forward layer of model.layers.1': scaled('model.MoE.routed'),
    'residual stream of model.layers.0': scaled('model.Block.forward'),
    'the embedding, the order of the blocks or the head differs': scaled('model.GPT.main_stack'),
    'the input of MTP module 1 differs': scaled('model.MTP.combine'),
}


@pytest.mark.parametrize('part', CHANGES)
def test_a_model_that_the_format_cannot_express_is_not_exported(tmp_path, monkeypatch, part):
    """After a change of model.py's equations: one line names the part, and no folder is left."""
    overrides = dict(first_k_dense_replace=1, n_group=4, topk_group=2)
    write_checkpoint(tmp_path / 'out', ours(**overrides))
    convert.export_folder(str(tmp_path / 'out'), str(tmp_path / 'plain'))
    monkeypatch.setattr(*CHANGES[part])
    with pytest.raises(Mistake) as refused:
        convert.export_folder(str(tmp_path / 'out'), str(tmp_path / 'hf'))
    assert part in str(refused.value) and 'DeepseekV3ForCausalLM' in str(refused.value)
    assert sorted(os.listdir(tmp_path)) == ['out', 'plain']
    assert len({path.stat().st_mode for path in (tmp_path / 'plain').iterdir()}) == 1  # also model.safetensors


def test_a_parameter_of_ones_own_is_not_exported(tmp_path, monkeypatch):
    """Whether it changes the output or not: transformers would leave it out."""
    def init(self, config, plain=MLA.__init__):
        plain(self, config)
        self.temperature = torch.nn.Parameter(torch.ones(1))

    monkeypatch.setattr(MLA, '__init__', init)
    write_checkpoint(tmp_path / 'out', ours())
    with pytest.raises(Mistake, match=r'model.layers.0.self_attn.temperature has no place in the format'):
        convert.export_folder(str(tmp_path / 'out'), str(tmp_path / 'hf'))
    monkeypatch.setattr(MLA, 'project', scaled('model.MLA.project', 2.0)[1])
    with pytest.raises(Mistake, match=r'model.layers.0.self_attn.temperature has no place in the format'):
        convert.export_folder(str(tmp_path / 'out'), str(tmp_path / 'hf'))
    assert os.listdir(tmp_path) == ['out']


def load(their_class, folder, config, **kwargs):
    """As the model card says: the pattern names the layers that are MTP modules."""
    before = their_class._keys_to_ignore_on_load_unexpected
    their_class._keys_to_ignore_on_load_unexpected = [
        rf'model\.layers\.{config.n_layer + k}\.' for k in range(config.num_nextn_predict_layers)]
    try:
        model, info = their_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    finally:
        their_class._keys_to_ignore_on_load_unexpected = before
    model._keys_to_ignore_on_load_unexpected = [
        rf'model\.layers\.{config.n_layer + k}\.' for k in range(config.num_nextn_predict_layers)]
    return model.eval(), info


def counted_drafts(loaded, prompt, new_tokens):
    """transformers' greedy generation with its MTP modules: the tokens, the drafts it made, those it accepted."""
    from transformers.generation.candidate_generator import MTPCandidateGenerator
    drafts, accepted = [], []
    get_candidates, update = MTPCandidateGenerator.get_candidates, MTPCandidateGenerator.update_candidate_strategy

    def counting_candidates(self, input_ids, *args, **kwargs):
        ids, logits = get_candidates(self, input_ids, *args, **kwargs)
        drafts.append(ids.size(1) - input_ids.size(1))
        return ids, logits

    def counting_update(self, input_ids, scores, n_matches):
        accepted.append(int(n_matches))
        return update(self, input_ids, scores, n_matches)

    MTPCandidateGenerator.get_candidates = counting_candidates
    MTPCandidateGenerator.update_candidate_strategy = counting_update
    try:
        tokens = loaded.generate(prompt, max_new_tokens=new_tokens, do_sample=False, use_mtp=True)
    finally:
        MTPCandidateGenerator.get_candidates = get_candidates
        MTPCandidateGenerator.update_candidate_strategy = update
    return tokens, drafts, accepted


@pytest.fixture(scope='module', params=[1, 2])
def drafting(request, tmp_path_factory):
    """Trained for seconds on a text, so that some drafts are right and some are wrong: its folder, and the model."""
    torch.manual_seed(0)
    folder, modules = tmp_path_factory.mktemp('drafting'), request.param
    text = 'the cat sat on the mat; the dog lay on the log; a cat and a dog met at the gate; ' * 3
    letters = sorted(set(text))
    stoi = {ch: i for i, ch in enumerate(letters)}
    data = torch.tensor([stoi[ch] for ch in text])
    model = GPT(GPTConfig(**{**TINY, 'block_size': 160, 'vocab_size': len(letters), 'mtp_n_layer': 1,
                             'num_nextn_predict_layers': modules}))
    optimizer = model.configure_optimizers(0.1, 3e-3, (0.9, 0.95), 'cpu')
    for _ in range(150):
        starts = torch.randint(len(data) - 33, (8,))
        rows = torch.stack([data[i:i + 33] for i in starts])
        model(rows[:, :-1], rows[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_balance(model.stats['load'])
    write_checkpoint(folder / 'out', model, meta={'vocab_size': len(letters), 'stoi': stoi,
                                                  'itos': dict(enumerate(letters))})
    return folder, model.eval()


@pytest.mark.parametrize('fp8', [False, True])
def test_drafts_there_are_accepted_as_here(tmp_path, drafting, fp8):
    """In FP8 too: transformers reads the MTP modules' weights without their factors, so they stay as they are."""
    (out, model), folder = drafting, tmp_path / 'hf'
    stoi = torch.load(out / 'out/ckpt.pt', weights_only=True)['meta']['stoi']
    letters, modules = list(stoi), model.config.num_nextn_predict_layers
    convert.export_folder(str(out / 'out'), str(folder), fp8=fp8)
    if fp8:
        model = hf.from_pretrained(str(folder)).eval()
    loaded, _ = load(DeepseekV3ForCausalLM, folder, model.config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer('the cat ', return_tensors='pt').input_ids
    assert prompt.tolist() == [[stoi[ch] for ch in 'the cat ']]
    plain = loaded.generate(prompt, max_new_tokens=100, do_sample=False)
    tokens, drafts, accepted = counted_drafts(loaded, prompt, 100)
    assert torch.equal(tokens, plain) and tokenizer.decode(plain[0]) == ''.join(letters[i] for i in plain[0])
    (ours,), told = Decoder(model).generate(prompt.tolist(), 100, temperature=0, speculative=True)
    assert fp8 or ours == plain[0].tolist()  # what leaves FP8 is bf16 here and fp32 there
    # the first pass there drafts nothing; the last one's acceptance is cut at the length
    made = [n for n, d in zip(accepted, drafts) if d == modules]
    rate = sum(made[:-1]) / (modules * len(made[:-1]))
    assert 0.15 < rate < 1
    assert abs(rate - int(told.accepted.sum()) / (modules * int(told.passes))) < 0.05, (rate, told)


@pytest.mark.parametrize('size', ['qk_nope_head_dim', 'kv_lora_rank'])
def test_an_odd_size_of_v2_is_refused_because_transformers_cannot_run_it(size):
    softmax = dict(scoring_func='softmax', norm_topk_prob=False, num_nextn_predict_layers=0)
    with pytest.raises(Mistake, match=f'{size}=7 must be even'):
        hf.settings_out(GPTConfig(**TINY | softmax | {size: 7}), 'float32', None)
    settings = hf.settings_out(GPTConfig(**TINY | softmax | {size: 8}), 'float32', None)[0]
    names = {'torch_dtype', 'architectures', 'model_type'}
    config = DeepseekV2Config(**{k: v for k, v in settings.items() if k not in names})
    for value, runs in ((8, True), (7, False)):
        setattr(config, size, value)
        model, ids = DeepseekV2ForCausalLM(config), torch.arange(8)[None]
        with contextlib.nullcontext() if runs else pytest.raises(RuntimeError, match='divisible by 2'):
            model(ids)


def test_modules_of_two_blocks_are_left_out_and_a_line_says_so(tmp_path, capsys):
    model = ours(mtp_n_layer=2, num_nextn_predict_layers=2)
    write_checkpoint(tmp_path / 'out', model)
    convert.export_folder(str(tmp_path / 'out'), str(tmp_path / 'hf'))
    line = 'left out: the 2 MTP modules, because the format has no modules with 2 blocks each'
    assert line in capsys.readouterr().out and line in (tmp_path / 'hf/README.md').read_text()
    assert not any('layers.2.' in name for name in load_file(tmp_path / 'hf/model.safetensors'))
    loaded, info = load(DeepseekV3ForCausalLM, tmp_path / 'hf', model.config)
    assert not any(info.values())
    same_model(model, loaded)


def test_the_released_naming(tmp_path):
    write_checkpoint(tmp_path / 'out', ours(tie_word_embeddings=False, num_nextn_predict_layers=1))
    convert.export_folder(str(tmp_path / 'out'), str(tmp_path / 'hf'))
    tensors = load_file(tmp_path / 'hf/model.safetensors')
    for name in ('model.layers.1.mlp.experts.7.up_proj.weight', 'model.layers.0.self_attn.kv_a_proj_with_mqa.weight',
                 'model.layers.2.eh_proj.weight', 'model.layers.2.enorm.weight', 'model.layers.2.hnorm.weight',
                 'model.layers.2.shared_head.norm.weight', 'model.layers.2.shared_head.head.weight',
                 'model.layers.2.embed_tokens.weight', 'model.layers.2.self_attn.o_proj.weight', 'lm_head.weight'):
        assert name in tensors
    assert tensors['model.layers.1.mlp.gate.e_score_correction_bias'].dtype == torch.float32
    settings = json.loads((tmp_path / 'hf/config.json').read_text())
    assert settings['architectures'] == ['DeepseekV3ForCausalLM'] and settings['num_nextn_predict_layers'] == 1
    card = (tmp_path / 'hf/README.md').read_text()
    assert r"_keys_to_ignore_on_load_unexpected = [r'model\.layers\.2\.']" in card
    assert 'letters' in card and '| iterations | 7, validation loss 1.5000 |' in card
    assert (tmp_path / 'hf/generation_config.json').exists()


@pytest.mark.parametrize('tied', [False, True])
def test_the_card_counts_a_tied_head_once(tmp_path, tied):
    model = ours(tie_word_embeddings=tied, vocab_size=1000)
    write_checkpoint(tmp_path / 'out', model)
    convert.export_folder(str(tmp_path / 'out'), str(tmp_path / 'hf'))
    count = model.get_num_params() + (1 if tied else 2) * 1000 * model.config.n_embd
    assert f'| parameters | {count / 1e6:.2f}M; without' in (tmp_path / 'hf/README.md').read_text()


def test_bf16_stays_bf16_and_the_balance_bias_fp32(tmp_path):
    theirs(V3).bfloat16().save_pretrained(tmp_path / 'hf')
    convert.import_folder(str(tmp_path / 'hf'), str(tmp_path / 'out'))
    state = torch.load(tmp_path / 'out/ckpt.pt', weights_only=True)['model']
    for name, tensor in state.items():
        assert tensor.dtype == (torch.float32 if name.endswith('correction_bias') else torch.bfloat16), name
    convert.export_folder(str(tmp_path / 'out'), str(tmp_path / 'again'))
    first, second = (load_file(tmp_path / name / 'model.safetensors') for name in ('hf', 'again'))
    for name in first:
        assert torch.equal(first[name].float(), second[name].float()), name


def test_block_fp8_is_dequantised_by_its_scales(tmp_path):
    """Widths that are no multiple of 128: the last block of a row and of a column is a part of one."""
    settings = V3 | dict(hidden_size=160, intermediate_size=136)
    theirs(settings).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / 'model.safetensors')
    name = 'model.layers.0.mlp.gate_proj.weight'                                # (136, 160)
    weight = tensors[name].to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.5, 2.0], [3.0, 7.0]])
    save_file(tensors | {name: weight, f'{name}_scale_inv': scale}, tmp_path / 'model.safetensors')
    config = json.loads((tmp_path / 'config.json').read_text())
    config['quantization_config'] = {'quant_method': 'fp8', 'fmt': 'e4m3', 'weight_block_size': [128, 128]}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    got = hf.from_pretrained(str(tmp_path)).transformer.h[0].mlp.gate_up_proj.weight[:136]
    for row, col in ((0, 0), (127, 127), (127, 128), (128, 127), (135, 159)):
        want = weight[row, col].float() * scale[row // 128, col // 128]
        assert got[row, col] == want.bfloat16().float()
    save_file(tensors | {name: weight}, tmp_path / 'model.safetensors')
    with pytest.raises(Mistake, match='scale_inv is missing'):
        hf.from_pretrained(str(tmp_path))


@pytest.mark.parametrize('whole', [True, False])
def test_export_in_fp8(tmp_path, whole):
    """V3's released form: what comes back, here and in transformers, is each weight rounded block by block."""
    model = ours(n_embd=256, n_head=4, first_k_dense_replace=1, num_nextn_predict_layers=1, tie_word_embeddings=False,
                 kv_lora_rank=96 if whole else 192)
    write_checkpoint(tmp_path / 'out', model)
    convert.export_folder(str(tmp_path / 'out'), str(tmp_path / 'hf'), fp8=True)
    tensors = load_file(tmp_path / 'hf/model.safetensors')
    in_fp8 = {name for name, t in tensors.items() if t.dtype == torch.float8_e4m3fn}
    assert {name for name in tensors if name.endswith('_scale_inv')} == {f'{name}_scale_inv' for name in in_fp8}
    plain = {'embed_tokens', 'lm_head', 'gate'}
    ragged = set() if whole else {'kv_a_proj_with_mqa', 'kv_b_proj'}  # 224 rows, 192 columns
    for name, t in tensors.items():
        if t.dim() == 2 and not name.endswith('_scale_inv'):
            whole_layer = name.split('.')[-2] not in plain | ragged and 'layers.2.' not in name
            assert (name in in_fp8) == whole_layer, name
    settings = json.loads((tmp_path / 'hf/config.json').read_text())['quantization_config']
    left = settings.pop('modules_to_not_convert')
    assert left == ['lm_head', *sorted(ragged), 'model.layers.2']
    for name in ('lm_head', 'model.layers.2.mlp.up_proj', *(f'model.layers.0.self_attn.{layer}' for layer in ragged)):
        assert not should_convert_module(name, left)
    for name in ('model.layers.1.self_attn.o_proj', 'model.layers.0.mlp.up_proj', 'model.layers.21.self_attn.o_proj'):
        assert should_convert_module(name, left)
    assert settings == V3_671B['quantization_config']

    back = hf.from_pretrained(str(tmp_path / 'hf')).eval()
    for (name, p), q in zip(model.named_parameters(), back.parameters()):
        kept = p.dim() < 2 or any(layer in name.split('.') for layer in ('wte', 'lm_head', 'gate', 'mtp', *ragged))
        assert torch.equal(p, q) == kept and (p - q).norm() < 0.04 * p.norm(), name
    loaded, _ = load(DeepseekV3ForCausalLM, tmp_path / 'hf', model.config, dtype=torch.float32,
                     quantization_config=FineGrainedFP8Config(dequantize=True))
    for p in [*back.parameters(), *loaded.parameters()]:
        p.data = p.data.bfloat16().float()  # here, what leaves FP8 is bf16
    same_model(back, loaded)


@pytest.fixture
def in_fp8(tmp_path):
    """A folder in FP8 whose factors are rounded up to powers of two, and its weights multiplied out."""
    model = ours(n_embd=128, num_nextn_predict_layers=0)
    stoi = {chr(i): i for i in range(61)}
    write_checkpoint(tmp_path / 'out', model, meta={'vocab_size': 61, 'stoi': stoi, 'itos': dict(enumerate(stoi))})
    convert.export_folder(str(tmp_path / 'out'), str(tmp_path / 'hf'), fp8=True)
    tensors = load_file(tmp_path / 'hf/model.safetensors')
    for name in [name for name in tensors if name.endswith('_scale_inv')]:
        tensors[name] = torch.exp2(torch.log2(tensors[name]).ceil())
    save_file(tensors, tmp_path / 'hf/model.safetensors')
    return tmp_path, tensors


def of_folder(data, folder):
    """A meta.pkl that says whose tokens these are, as prepare.py --tokenizer=FOLDER writes it."""
    sha256 = hashlib.sha256((folder / 'tokenizer.json').read_bytes()).hexdigest()
    (data / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 61, 'tokenizer': sha256}))


def train_from(folder, clone, script, ok=True):
    data = clone / 'data/ascii'
    data.mkdir(exist_ok=True)
    for split in ('train', 'val'):
        torch.randint(61, (2000,), dtype=torch.uint16).numpy().tofile(data / f'{split}.bin')
    of_folder(data, folder)
    return script('train.py', '--dataset=ascii', '--device=cpu', '--compile=False', '--dtype=float32', '--batch_size=2',
                  '--eval_iters=1', '--gradient_accumulation_steps=1', '--block_size=96', '--max_iters=1',
                  '--warmup_iters=0', f'--init_from={folder}', f'--out_dir={folder.parent}/tuned', ok=ok, root=clone)


def test_factors_of_one_byte_are_read_as_those_of_four(in_fp8, clone, script):
    """UE8M0: powers of two, as scale_fmt says, in F8_E8M0; by every script that reads such a folder."""
    tmp_path, tensors = in_fp8
    wide = hf.from_pretrained(str(tmp_path / 'hf'))
    save_file({name: tensor.to(torch.float8_e8m0fnu) if name.endswith('_scale_inv') else tensor
               for name, tensor in tensors.items()}, tmp_path / 'hf/model.safetensors')
    config = json.loads((tmp_path / 'hf/config.json').read_text())
    config['quantization_config']['scale_fmt'] = 'ue8m0'
    (tmp_path / 'hf/config.json').write_text(json.dumps(config))
    for a, b in zip(wide.parameters(), hf.from_pretrained(str(tmp_path / 'hf')).parameters()):
        assert torch.equal(a, b)
    script('convert.py', 'import', f'--hf_dir={tmp_path}/hf', f'--out_dir={tmp_path}/back')
    state = torch.load(tmp_path / 'back/ckpt.pt', weights_only=True)['model']
    assert all(torch.equal(state[name].float(), p) for name, p in wide.state_dict().items())
    script('sample.py', f'--init_from={tmp_path}/hf', '--device=cpu', '--num_samples=1', '--max_new_tokens=2')
    assert 'step 0: train loss' in train_from(tmp_path / 'hf', clone, script)


@pytest.mark.parametrize('change, message', [
    (lambda w, scale: (w, scale.to(torch.int8)), 'weight_scale_inv is I8 of the shape [1, 1]'),
    (lambda w, scale: (w, scale.flatten()), 'weight_scale_inv is F32 of the shape [1]'),
    (lambda w, scale: (w, scale.repeat(2, 1)), 'weight_scale_inv is F32 of the shape [2, 1]'),
    (lambda w, scale: (w.float().to(torch.float8_e5m2), scale), 'weight is in F8_E5M2'),
    (lambda w, scale: (w, None), 'weight_scale_inv is missing'),
])
def test_numbers_that_are_not_read_get_one_line_in_every_script(in_fp8, clone, script, change, message):
    tmp_path, tensors = in_fp8
    name = 'model.layers.0.self_attn.o_proj.weight'                                              # (128, 128)
    tensors[name], tensors[f'{name}_scale_inv'] = change(tensors[name], tensors[f'{name}_scale_inv'])
    save_file({name: t for name, t in tensors.items() if t is not None}, tmp_path / 'hf/model.safetensors')
    assert message in script('convert.py', 'import', f'--hf_dir={tmp_path}/hf', f'--out_dir={tmp_path}/back', ok=False)
    assert message in script('sample.py', f'--init_from={tmp_path}/hf', '--device=cpu', ok=False)
    assert message in train_from(tmp_path / 'hf', clone, script, ok=False)
    assert not (tmp_path / 'back').exists() and not (tmp_path / 'tuned').exists()


def test_groups_of_softmax_scores_are_ranked_by_their_best():
    model = ours(scoring_func='softmax', norm_topk_prob=False, n_group=2, topk_group=1, num_experts_per_tok=2,
                 routed_scaling_factor=1.0)
    moe = model.transformer.h[0].mlp
    torch.nn.init.zeros_(moe.gate.weight)
    moe.gate.weight.data[:, 0] = torch.tensor([5.0, 0, 0, 0, 4.0, 4.0, 0, 0])   # a best one, against two good ones
    scores, gates, experts = moe.route(torch.eye(1, 32))
    assert (experts < 4).all() and torch.equal(gates, scores.gather(1, experts))


# -----------------------------------------------------------------------------
# the published models

V2_LITE = dict(
    architectures=['DeepseekV2ForCausalLM'], model_type='deepseek_v2', attention_bias=False, aux_loss_alpha=0.001,
    bos_token_id=100000, eos_token_id=100001, first_k_dense_replace=1, hidden_act='silu', hidden_size=2048,
    initializer_range=0.02, intermediate_size=10944, kv_lora_rank=512, max_position_embeddings=163840,
    moe_intermediate_size=1408, moe_layer_freq=1, n_group=1, n_routed_experts=64, n_shared_experts=2,
    norm_topk_prob=False, num_attention_heads=16, num_experts_per_tok=6, num_hidden_layers=27, num_key_value_heads=16,
    q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, rms_norm_eps=1e-6, rope_theta=10000,
    rope_scaling=dict(beta_fast=32, beta_slow=1, factor=40, mscale=0.707, mscale_all_dim=0.707,
                      original_max_position_embeddings=4096, type='yarn'),
    routed_scaling_factor=1.0, scoring_func='softmax', seq_aux=True, tie_word_embeddings=False, topk_group=1,
    topk_method='greedy', torch_dtype='bfloat16', v_head_dim=128, vocab_size=102400)
V3_671B = dict(
    architectures=['DeepseekV3ForCausalLM'], model_type='deepseek_v3', attention_bias=False, bos_token_id=0,
    eos_token_id=1, first_k_dense_replace=3, hidden_act='silu', hidden_size=7168, initializer_range=0.02,
    intermediate_size=18432, kv_lora_rank=512, max_position_embeddings=163840, moe_intermediate_size=2048,
    moe_layer_freq=1, n_group=8, n_routed_experts=256, n_shared_experts=1, norm_topk_prob=True,
    num_attention_heads=128, num_experts_per_tok=8, num_hidden_layers=61, num_key_value_heads=128,
    num_nextn_predict_layers=1, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64,
    quantization_config=dict(activation_scheme='dynamic', fmt='e4m3', quant_method='fp8', weight_block_size=[128, 128]),
    rms_norm_eps=1e-6, rope_theta=10000,
    rope_scaling=dict(beta_fast=32, beta_slow=1, factor=40, mscale=1.0, mscale_all_dim=1.0,
                      original_max_position_embeddings=4096, type='yarn'),
    routed_scaling_factor=2.5, scoring_func='sigmoid', tie_word_embeddings=False, topk_group=4, topk_method='noaux_tc',
    torch_dtype='bfloat16', v_head_dim=128, vocab_size=129280)
MOONLIGHT = dict(
    architectures=['DeepseekV3ForCausalLM'], model_type='deepseek_v3', attention_bias=False, bos_token_id=163584,
    eos_token_id=163585, first_k_dense_replace=1, hidden_act='silu', hidden_size=2048, initializer_range=0.02,
    intermediate_size=11264, kv_lora_rank=512, max_position_embeddings=8192, moe_intermediate_size=1408,
    moe_layer_freq=1, n_group=1, n_routed_experts=64, n_shared_experts=2, norm_topk_prob=True, num_attention_heads=16,
    num_experts_per_tok=6, num_hidden_layers=27, num_key_value_heads=16, num_nextn_predict_layers=0, q_lora_rank=None,
    qk_nope_head_dim=128, qk_rope_head_dim=64, rms_norm_eps=1e-5, rope_theta=50000.0, routed_scaling_factor=2.446,
    scoring_func='sigmoid', tie_word_embeddings=False, topk_group=1, topk_method='noaux_tc', torch_dtype='bfloat16',
    v_head_dim=128, vocab_size=163840)


@pytest.mark.parametrize('settings, billions', [(V2_LITE, 15.71), (V3_671B, 671.03), (MOONLIGHT, 15.96)])
def test_published_models_have_their_published_sizes(settings, billions):
    args = hf.settings_in(settings) | {'num_nextn_predict_layers': 0}
    with torch.device('meta'):
        model = GPT(GPTConfig(**args))
    assert abs(model.get_num_params(non_embedding=False) / 1e9 - billions) < 0.01
    assert convert.memory_estimate(model.config, 2).startswith(f'{billions:.4g}B parameters')
    factor = settings.get('rope_scaling', {}).get('factor', 1)
    all_dim = settings.get('rope_scaling', {}).get('mscale_all_dim', 0)
    want = 192 ** -0.5 * (0.1 * all_dim * math.log(factor) + 1) ** 2
    assert math.isclose(model.transformer.h[0].attn.scale, want)


# -----------------------------------------------------------------------------
# tokenizers

def test_gpt2_tokenizer_is_tiktokens(tmp_path, tiktoken_cache, monkeypatch):
    import tiktoken
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tiktoken_cache))
    model = ours(vocab_size=50304, n_embd=8, n_layer=1, n_head=1, num_nextn_predict_layers=0)
    write_checkpoint(tmp_path / 'out', model)
    convert.export_folder(str(tmp_path / 'out'), str(tmp_path / 'hf'))
    tokenizer, enc = AutoTokenizer.from_pretrained(tmp_path / 'hf'), tiktoken.get_encoding('gpt2')
    text = "It's 3.14159 naïve\tcafés — 東京 🙂\n\n    def f(x):  return x  <|endoftext|> and so on"
    ids = enc.encode(text, allowed_special='all')
    assert tokenizer(text).input_ids == ids and tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == 50256
    assert json.loads((tmp_path / 'hf/config.json').read_text())['eos_token_id'] == 50256


def test_a_character_the_tokenizer_lacks_is_an_error():
    tokenizer = convert.character_tokenizer({'a': 0, '\n': 1, ' ': 2})
    assert tokenizer.encode('a a\n').ids == [0, 2, 0, 1] and tokenizer.decode([0, 2, 0, 1]) == 'a a\n'
    with pytest.raises(Exception, match='UNK'):
        tokenizer.encode('ab')


# -----------------------------------------------------------------------------
# the scripts, run in this process: starting Python and torch anew takes seconds

@pytest.fixture(scope='session')
def exported_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp('exported')
    stoi = {chr(i): i for i in range(61)}
    torch.manual_seed(0)
    model = ours(num_nextn_predict_layers=1)
    write_checkpoint(folder / 'out', model, meta={'vocab_size': 61, 'stoi': stoi, 'itos': dict(enumerate(stoi))})
    convert.export_folder(str(folder / 'out'), str(folder / 'hf'))
    return folder


@pytest.fixture
def exported(exported_once, tmp_path, monkeypatch):
    """A checkpoint of ASCII characters, and its export; the working directory is theirs."""
    shutil.copytree(exported_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def script():
    """What a script prints; with ok=False the one line that it ends with."""
    def run(name, *args, ok=True, root=ROOT):
        code, out, err = run_inside(str(root / name), *args, cwd=os.getcwd())
        assert code == (0 if ok else 2), err
        assert ok or err.count('\n') == 1
        return out if ok else err
    return run


def test_sample_speaks_with_the_tokenizer_that_travels_along(exported, script):
    assert 'M parameters' in script('convert.py', 'import', '--hf_dir=hf', '--out_dir=back')
    said = []
    for where in (['--out_dir=out'], ['--out_dir=back'], ['--init_from=hf', '--out_dir=nowhere']):
        printed = script('sample.py', '--start=1 + 2', '--temperature=0', '--num_samples=1', '--max_new_tokens=20',
                         '--device=cpu', '--dtype=float32', *where)
        said.append(printed[printed.index('1 + 2', printed.rindex('Overriding')):printed.index('-----')])
    assert said[0] == said[1] == said[2] and len(said[0]) == 5 + 20 + 1
    for start, unknown in (('é', "all of 'é'"), ('1 + ü + é', "the characters 'éü'")):
        said = script('sample.py', '--init_from=hf', '--device=cpu', f'--start={start}', ok=False)
        assert f'hf/tokenizer.json does not know {unknown}' in said
    assert "GPT-2's weights" in script('sample.py', '--init_from=gpt2', ok=False)


def test_training_goes_on_from_an_import_and_reaches_further_with_yarn(exported, clone, script):
    """Fine-tuning from the folder, then a context four times as long: block_size and rope_factor are free at resume."""
    data = clone / 'data/ascii'
    data.mkdir()
    for split in ('train', 'val'):
        torch.randint(61, (2000,), dtype=torch.uint16).numpy().tofile(data / f'{split}.bin')
    of_folder(data, exported / 'hf')

    def train(*flags, ok=True):
        return script('train.py', '--dataset=ascii', '--device=cpu', '--compile=False', '--dtype=float32',
                      '--eval_interval=1', '--eval_iters=1', '--gradient_accumulation_steps=1', '--batch_size=2',
                      '--warmup_iters=0', *flags, ok=ok, root=clone)

    assert '--rope_factor=4' in train('--init_from=hf', '--out_dir=tuned', '--block_size=384', ok=False)
    assert 'step 1:' in train('--init_from=hf', '--out_dir=tuned', '--block_size=96', '--max_iters=1')
    assert (exported / 'tuned/tokenizer.json').exists()
    script('convert.py', 'import', '--hf_dir=hf', '--out_dir=longer')
    flags = ['--init_from=resume', '--out_dir=longer', '--block_size=384']
    assert '--rope_factor=4' in train(*flags, ok=False)
    train(*flags, '--rope_factor=4', '--max_iters=1')
    args = torch.load('longer/ckpt.pt', weights_only=True)['model_args']
    assert (args['block_size'], args['rope_factor'], args['rope_original_max_position_embeddings']) == (384, 4.0, 96)
    printed = train(*flags, '--max_iters=2')  # the factor is the checkpoint's by now
    assert 'step 2:' in printed and 'ignored' not in printed


@pytest.mark.parametrize('damage, message', [
    ('missing', 'missing, the first is model.norm.weight'), ('extra', 'to this model, the first is model.extra'),
    ('shape', 'model.norm.weight has the shape [31]'), ('architecture', 'its architecture is LlamaForCausalLM'),
    ('truncated', 'model.safetensors is damaged'), ('rope', "RoPE of type 'linear'"), ('json', 'cannot be read'),
    ('weights', 'model.safetensors is damaged or missing'), ('quantised', "by 'awq'"), ('lacks', 'lacks hidden_size'),
    ('topk', "topk_method='random'"), ('copy', 'shared_head.head.weight differs'),
])
def test_a_damaged_folder_gets_one_line_and_leaves_nothing_behind(exported, damage, message):
    folder = exported / 'hf'
    tensors, config = load_file(folder / 'model.safetensors'), json.loads((folder / 'config.json').read_text())
    if damage == 'missing':
        del tensors['model.norm.weight']
    if damage == 'extra':
        tensors['model.extra'] = torch.zeros(1)
    if damage == 'shape':
        tensors['model.norm.weight'] = torch.zeros(31)
    if damage == 'copy':
        tensors['model.layers.2.shared_head.head.weight'] += 1
    config |= {'architecture': dict(architectures=['LlamaForCausalLM']), 'topk': dict(topk_method='random'),
               'rope': dict(rope_scaling=dict(type='linear', factor=2.0)), 'lacks': dict(hidden_size=None),
               'quantised': dict(quantization_config=dict(quant_method='awq'))}.get(damage, {})
    save_file(tensors, folder / 'model.safetensors')
    (folder / 'config.json').write_text(json.dumps(config)[:50 if damage == 'json' else None])
    if damage == 'truncated':
        (folder / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes()[:-100])
    if damage == 'weights':
        (folder / 'model.safetensors').unlink()
    with pytest.raises(Mistake) as error:
        convert.import_folder(str(folder), str(exported / 'new'))
    assert message in str(error.value) and '\n' not in str(error.value)
    assert not (exported / 'new').exists()


# folders that an adversary wrote

NAMES = ['config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json']


@pytest.fixture
def hostile(exported):
    """`exported`, whose folder has every file that an import reads."""
    (exported / 'hf/special_tokens_map.json').write_text('{}')
    return exported


@pytest.fixture
def alarm():
    """Whoever waits for a pipe is told so after 20 seconds."""
    def rang(*_):
        raise AssertionError('it waits')
    before = signal.signal(signal.SIGALRM, rang)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def move_out(path):
    """The file itself, elsewhere: only its place is wrong."""
    private = path.parent.parent / 'private'
    path.rename(private)
    path.symlink_to(private)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def device(path):
    path.unlink()
    path.symlink_to('/dev/zero')


def terabyte(path):
    os.truncate(path, 2**40)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('spoil, message', [(move_out, 'leads out of its folder'), (pipe, 'no regular file'),
                                            (device, 'no regular file'), (terabyte, '1,099,511,627,776 bytes')])
def test_only_files_of_the_folder_are_read(hostile, alarm, script, name, spoil, message):
    """A link to ~/.ssh/id_rsa called special_tokens_map.json was copied into out_dir, and from there into an export."""
    spoil(hostile / 'hf' / name)
    message = message if (spoil, name) != (terabyte, 'model.safetensors') else 'is damaged or missing'
    assert message in script('convert.py', 'import', '--hf_dir=hf', '--out_dir=new', ok=False)
    assert not (hostile / 'new').exists()
    if 'token' in name:  # from a run's folder too
        shutil.copy(hostile / 'hf/tokenizer.json', hostile / 'out') if name != 'tokenizer.json' else None
        os.rename(hostile / 'hf' / name, hostile / 'out' / name)
        checkpoint = torch.load(hostile / 'out/ckpt.pt')
        torch.save({**checkpoint, 'meta': {}}, hostile / 'out/ckpt.pt')
        assert message in script('convert.py', 'export', '--out_dir=out', '--hf_dir=new', ok=False)
        assert not (hostile / 'new').exists()


def test_a_new_run_copies_no_private_file(hostile, clone, script):
    move_out(hostile / 'hf/special_tokens_map.json')
    data = clone / 'data/ascii'
    data.mkdir()
    for split in ('train', 'val'):
        torch.randint(61, (2000,), dtype=torch.uint16).numpy().tofile(data / f'{split}.bin')
    of_folder(data, hostile / 'hf')
    train = ['train.py', '--dataset=ascii', '--device=cpu', '--compile=False', '--dtype=float32', '--block_size=96',
             '--batch_size=2', '--gradient_accumulation_steps=1', '--eval_iters=1', '--init_from=hf', '--out_dir=tuned']
    (hostile / 'text.txt').write_text('1 + 2 ' * 9)
    prepare = ['data/shakespeare/prepare.py', '--input=text.txt', '--tokenizer=hf', '--name=mine']
    for args in (train, prepare):
        assert 'leads out of its folder' in script(*args, ok=False, root=clone)
    assert not (hostile / 'tuned').exists()
    assert not (clone / 'data/mine').exists()


def test_the_cache_of_the_hub_is_read(hostile, monkeypatch):
    """There each file is a link out of its folder, into the blobs of the same repository, and of no other."""
    snapshot = hostile / 'models--a--b/snapshots/0123'
    snapshot.mkdir(parents=True)
    blobs = hostile / 'models--a--b/blobs'
    blobs.mkdir()
    for name in NAMES:
        (hostile / 'hf' / name).rename(blobs / f'of-{name}')
        (snapshot / name).symlink_to(f'../../blobs/of-{name}')
    convert.import_folder(str(snapshot), 'new')
    monkeypatch.chdir(snapshot)
    convert.import_folder('.', str(hostile / 'newer'))
    blobs.rename(hostile / 'private')
    blobs.symlink_to(hostile / 'private')
    with pytest.raises(Mistake, match='leads out of its folder'):
        convert.import_folder('.', str(hostile / 'newest'))


@pytest.mark.parametrize('name', ['../model.safetensors', '/model.safetensors', 'hf/../../model.safetensors', '', '\0',
                                  None, 3])
def test_an_index_names_files_of_its_folder(hostile, script, name):
    outside = hostile / 'model.safetensors'
    (hostile / 'hf/model.safetensors').rename(outside)
    name = str(outside) if name == '/model.safetensors' else name
    (hostile / 'hf/model.safetensors.index.json').write_text(json.dumps({'weight_map': {'a': name}}))
    said = script('convert.py', 'import', '--hf_dir=hf', '--out_dir=new', ok=False)
    assert 'cannot be read' in said or 'damaged or missing' in said


def test_settings_that_name_code_stay_behind(hostile):
    """auto_map names Python that transformers downloads and runs, if told to trust it."""
    for name in NAMES:
        if name.endswith('g.json') or name.endswith('p.json'):
            table = json.loads((hostile / 'hf' / name).read_text())
            table |= {'auto_map': {'AutoTokenizer': ['evil.Code', None]}, 'unheard_of': 1, 'eos_token': '<end>'}
            (hostile / 'hf' / name).write_text(json.dumps(table))
    convert.import_folder('hf', 'new')
    convert.export_folder('new', 'again')
    for folder in ('new', 'again'):
        for name in (*NAMES[2:], *NAMES[:1] * (folder == 'again')):
            text = (hostile / folder / name).read_text()
            assert 'evil' not in text and 'unheard_of' not in text
        assert json.loads((hostile / folder / 'tokenizer_config.json').read_text())['eos_token'] == '<end>'


@pytest.mark.parametrize('change', [
    {'num_hidden_layers': 10**7}, {'num_hidden_layers': 2**31}, {'n_routed_experts': 8 * 10**8},
    {'num_nextn_predict_layers': 10**7}, {'max_position_embeddings': 10**9}, {'vocab_size': 10**9},
    {'hidden_size': 32 * 10**7}, {'moe_intermediate_size': 8 * 10**18}, {'vocab_size': 10**19},
    {'rope_theta': 1.0, 'rope_scaling': {'type': 'yarn', 'factor': 2.0}},
    {'rope_scaling': {'type': 'yarn', 'factor': 2.0, 'beta_slow': 1e-320}},
    {'rope_scaling': {'type': 'yarn', 'factor': 10**400}},
])
def test_a_config_asks_for_no_more_than_the_weights_hold(hostile, alarm, script, change):
    config = json.loads((hostile / 'hf/config.json').read_text())
    (hostile / 'hf/config.json').write_text(json.dumps(config | change))
    said = script('convert.py', 'import', '--hf_dir=hf', '--out_dir=new', ok=False)
    assert 'hf' in said and not (hostile / 'new').exists()


DOUBLE = {'type': 'Replace', 'pattern': {'String': '1'}, 'content': '11'}
ANYWHERE = {'type': 'Replace', 'pattern': {'Regex': 'x*'}, 'content': '1' * 2000}
PANICS = {'type': 'Precompiled', 'precompiled_charsmap': ''}
LONG = {'type': 'Precompiled', 'precompiled_charsmap': base64.b64encode(b'\4\0\0\0' + bytes(4) + b'1' * 2000).decode()}


@pytest.mark.parametrize('change, message', [
    ({'normalizer': {'type': 'Sequence', 'normalizers': [DOUBLE] * 40}}, '1,000 times longer'),
    ({'normalizer': {'type': 'Sequence', 'normalizers': [{'type': 'Sequence', 'normalizers': [DOUBLE] * 20}] * 2}},
     '1,000 times longer'),
    ({'normalizer': ANYWHERE}, '1,000 times longer'), ({'normalizer': LONG}, '1,000 times longer'),
    ({'normalizer': {'type': 'Prepend', 'prepend': '1' * 2000}}, '1,000 times longer'),
    ({'decoder': {'type': 'Sequence', 'decoders': [DOUBLE] * 40}}, '1,000 times longer'),
    # panics of the library, which are no Exception: when it reads, encodes and decodes
    ({'normalizer': PANICS}, 'cannot be read: '),
    ({'pre_tokenizer': {'type': 'FixedLength', 'length': 0}}, 'does not know'),
    ({'decoder': {'type': 'Strip', 'content': '1', 'start': 5, 'stop': 5}}, 'cannot spell the tokens'),
])
def test_a_tokenizer_that_makes_texts_long_or_panics(hostile, capfd, script, change, message):
    """Forty steps that double a text would ask for a terabyte."""
    table = json.loads((hostile / 'hf/tokenizer.json').read_text())
    (hostile / 'hf/tokenizer.json').write_text(json.dumps(table | change))
    assert message in script('sample.py', '--init_from=hf', '--device=cpu', '--start=1 + 1', '--max_new_tokens=9',
                             '--num_samples=1', ok=False)
    assert 'panicked' not in capfd.readouterr().err


@pytest.mark.parametrize('args, message', [
    (['export', '--out_dir=out', '--hf_dir=hf'], 'hf exists already'),
    (['export', '--out_dir=nowhere', '--hf_dir=new'], 'ckpt.pt is missing'),
    (['import', '--hf_dir=hf', '--out_dir=out'], 'out exists already'),
    (['import', '--hf_dir=nowhere', '--out_dir=new'], 'nowhere has no config.json, and no ckpt.pt'),
    (['export', '--out_dir=out', '--hf_dir=out/ckpt.pt/new'], 'out/ckpt.pt/new cannot be written'),
    (['import', '--hf_dir=hf', '--out_dir=out/ckpt.pt/new'], 'out/ckpt.pt/new cannot be written'),
])
def test_the_script_ends_with_one_line_and_overwrites_nothing(exported, script, args, message):
    assert message in script('convert.py', *args, ok=False)
    assert sorted(p.name for p in exported.iterdir()) == ['hf', 'out']


@pytest.mark.parametrize('name', ['ckpt_last.pt', 'ckpt.dcp', 'tokenizer.json', 'notes'])
def test_an_import_goes_into_a_new_folder(exported, script, name):
    (exported / 'run').mkdir()
    (exported / 'run' / name).write_text('')
    said = script('convert.py', 'import', '--hf_dir=hf', '--out_dir=run', ok=False)
    assert 'run exists already' in said and os.listdir('run') == [name]


def test_an_import_goes_through_a_link_but_replaces_neither_a_mount_nor_the_working_directory(exported, monkeypatch):
    """Once, a link or a mount was refused after the last weight was read."""
    (exported / 'disk').mkdir()
    (exported / 'link').symlink_to('disk')
    convert.import_folder('hf', 'link')
    assert os.path.islink('link') and os.path.exists('disk/ckpt.pt')
    (exported / 'empty').mkdir()
    monkeypatch.setattr(os.path, 'ismount', lambda path: path == 'empty')
    with pytest.raises(Mistake, match='empty is a mount or the working directory'):
        convert.import_folder('hf', 'empty')
    hf_dir = os.path.abspath('hf')
    (exported / 'here').mkdir()
    monkeypatch.chdir('here')
    with pytest.raises(Mistake, match='. is a mount or the working directory'):
        convert.import_folder(hf_dir, '.')


def test_a_killed_import_can_be_repeated(exported):
    """A kill runs no clean-up: what stands in the new folder is under another name, and goes with the next import."""
    pid = os.fork()
    if pid == 0:
        convert.save_checkpoint = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        convert.import_folder('hf', 'new')
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    left, = glob.glob('new.*')
    os.mkdir('new.another1.unfinished')
    open(f'new.another1.unfinished/{output.OURS}', 'w').close()
    descriptor = output.lock('new.another1.unfinished')  # as a process that is still writing to it
    for own in ('new.notes.unfinished', 'new.mybackup.unfinished'):  # the user's
        os.mkdir(own)
    convert.import_folder('hf', 'new')
    os.close(descriptor)
    assert os.path.exists('new/ckpt.pt') and not os.path.exists(left)
    assert sorted(glob.glob('new.*')) == ['new.another1.unfinished', 'new.mybackup.unfinished', 'new.notes.unfinished']


def test_an_export_touches_no_other_folder(exported):
    for name in ('new.tmp', 'new.old'):
        (exported / name).mkdir()
        (exported / name / 'notes').write_text('mine')
    convert.export_folder('out', 'new/')
    assert sorted(p.name for p in exported.iterdir()) == ['hf', 'new', 'new.old', 'new.tmp', 'out']
    assert (exported / 'new.tmp/notes').read_text() == (exported / 'new.old/notes').read_text() == 'mine'
    assert (exported / 'new').stat().st_mode == (exported / 'out').stat().st_mode  # other users may read it too


def test_an_export_that_fails_leaves_nothing_behind(tmp_path):
    model = ours(scoring_func='softmax', norm_topk_prob=False, num_nextn_predict_layers=0)
    model.moe_layers()[0].e_score_correction_bias[:] = 1.0
    write_checkpoint(tmp_path / 'out', model)
    with pytest.raises(Mistake, match='bias_update_speed=0'):
        convert.export_folder(str(tmp_path / 'out'), str(tmp_path / 'hf'))
    (tmp_path / 'out/tokenizer.json').mkdir()  # a folder where a file should be
    write_checkpoint(tmp_path / 'out', ours())
    with pytest.raises(Mistake, match='cannot be read'):
        convert.export_folder(str(tmp_path / 'out'), str(tmp_path / 'hf'))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out']


def test_a_disk_that_is_full(exported):
    """The kernel's limit on a file's size does as a full disk: it ends the export within the weights."""
    before, limits = sorted(exported.rglob('*')), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(Mistake, match='new cannot be written'):
            convert.export_folder('out', 'new')
        with pytest.raises(Mistake, match='new/ckpt.pt could not be written'):
            convert.import_folder('hf', 'new')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(exported.rglob('*')) == before


def test_ctrl_c_leaves_nothing_half_written(exported, monkeypatch):
    def interrupted(tensors, path, *_, **__):
        with open(path, 'w') as f:
            f.write('half')
            signal.raise_signal(signal.SIGINT)

    before = sorted(exported.rglob('*'))
    monkeypatch.setattr(convert, 'save_file', interrupted)
    monkeypatch.setattr(torch, 'save', lambda checkpoint, file: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        convert.export_folder('out', 'new')
    with pytest.raises(KeyboardInterrupt):
        convert.import_folder('hf', 'new')
    assert sorted(exported.rglob('*')) == before


def test_ctrl_c_in_the_first_seconds(exported):
    """While torch is imported: a torch.py in its place says that it is, and waits."""
    (exported / 'torch.py').write_text("import time\nprint('importing', flush=True)\nwhile 1: time.sleep(0.1)\n")
    process = subprocess.Popen([sys.executable, ROOT / 'convert.py', 'export', '--out_dir=out', '--hf_dir=new'],
                               env={**os.environ, 'PYTHONPATH': str(exported)}, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stdout.readline() == b'importing\n'
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said == b'interrupted\n'


def test_the_card_has_the_last_whole_command_of_the_log(exported):
    """A run that was killed may have left half a header."""
    lines = ['{"command": "train.py --seed=1"}', '{"step": 0}', '{"command": "train.py --seed=2", "config": {}}',
             '{"command": "train.py --eval_only=True", "config": {"eval_only": true}}', '{"command": "tr', '{"command"',
             '{"command": "a", "config": 3}', '{"command" ' + '[' * 10**5, '\udcff']
    (exported / 'out/log.jsonl').write_text('\n'.join(lines), errors='surrogateescape')
    convert.export_folder('out', 'new')
    assert '| command | `python train.py --seed=2` |' in (exported / 'new/README.md').read_text()


@pytest.mark.parametrize('changes, line', [({'val_loss': None}, '| iterations | 7 |'),
                                           ({'val_loss': None, 'iter_num': 0}, None)])
def test_the_card_of_weights_that_were_not_evaluated(exported, changes, line):
    """As after a signal. Once, the card gave them the best loss of the run, which other weights had."""
    checkpoint = torch.load('out/ckpt.pt')
    torch.save({**checkpoint, **changes}, 'out/ckpt.pt')
    convert.export_folder('out', 'new')
    lines = (exported / 'new/README.md').read_text().splitlines()
    assert [x for x in lines if 'iterations' in x or 'loss' in x] == ([line] if line else [])


def test_from_pretrained_says_what_fits():
    with pytest.raises(Mistake, match="GPT-2's weights do not fit.*see extras/"):
        GPT.from_pretrained('gpt2-medium')


# what a config.json says, or leaves out

def without(settings, *names):
    return {name: value for name, value in settings.items() if name not in names}


def test_what_a_config_leaves_out_is_transformers_default():
    args = hf.settings_in(without(V3_671B, *hf.DEFAULTS, 'rope_scaling'))
    assert {name: args[name] for name in ('bias', 'tie_word_embeddings', 'rms_norm_eps', 'rope_theta')} == {
        'bias': False, 'tie_word_embeddings': False, 'rms_norm_eps': 1e-6, 'rope_theta': 10000.0}
    assert (args['n_routed_experts'], args['n_shared_experts'], args['first_k_dense_replace']) == (0, 0, 0)
    assert hf.settings_in(V3_671B | {'tie_word_embeddings': True})['tie_word_embeddings']


@pytest.mark.parametrize('given, kept', [(1, 1), ([1], 1), (None, None), ([1, 2], None), ([], None), ('</s>', None)])
def test_one_end_of_text_token_is_taken_over(capsys, given, kept):
    """A list of several names none that closes a document, and that is said."""
    assert hf.settings_in(V3_671B | {'eos_token_id': given}).get('eos_token_id') == kept
    said = "config.json has several eos_token_id, [1, 2]: left out, so a text ends with the tokenizer's eos_token\n"
    assert capsys.readouterr().out == said * (given == [1, 2])


def test_groups_of_v2_count_where_its_method_is_group_limited():
    """With 'greedy' transformers does not look at the groups that a config names."""
    grouped = V2_LITE | {'n_group': 8, 'topk_group': 3}
    found = {method: hf.settings_in(grouped | {'topk_method': method}) for method in
             ('greedy', 'group_limited_greedy')}
    assert {method: (args['n_group'], args['topk_group']) for method, args in found.items()} == {
        'greedy': (1, 1), 'group_limited_greedy': (8, 3)}


def test_yarn_without_a_factor_reaches_as_far_as_the_context():
    scaling = without(YARN['rope_scaling'], 'factor')
    args = hf.settings_in(V3_671B | {'max_position_embeddings': 96, 'rope_scaling': scaling})
    assert (args['block_size'], args['rope_original_max_position_embeddings'], args['rope_factor']) == (96, 16, 6.0)


def test_an_fp8_weight_leaves_as_bf16(tmp_path):
    tensors = {'a.weight': torch.randn(130, 200).to(torch.float8_e4m3fn), 'a.weight_scale_inv': torch.rand(2, 2)}
    save_file(tensors, tmp_path / 'x.safetensors')
    file = safe_open(tmp_path / 'x.safetensors', framework='pt')
    read = hf.read(dict.fromkeys(tensors, file), 'a.weight')
    assert read.dtype == torch.bfloat16 and read.shape == (130, 200)
    for i, k in ((0, 0), (127, 128), (129, 127), (129, 199)):
        want = tensors['a.weight'][i, k].float() * tensors['a.weight_scale_inv'][i // 128, k // 128]
        assert read[i, k] == want.bfloat16()
