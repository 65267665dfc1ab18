"""extras/hf_v4.py and convert.py against transformers' DeepseekV32ForCausalLM and DeepseekV4ForCausalLM."""

import dataclasses
import json
import re

import pytest
import torch
from conftest import ROOT, TINY, load, log, run_inside, train
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    FineGrainedFP8Config,
)

import convert
import model
import model_v4
from extras import architecture, hf, hf_v4
from model import Mistake

KINDS = {'s': 'sliding_attention', 'c': 'compressed_sparse_attention', 'h': 'heavily_compressed_attention'}
COMMON = dict(vocab_size=61, hidden_size=32, moe_intermediate_size=16, num_attention_heads=4, n_routed_experts=8,
              num_experts_per_tok=3, max_position_embeddings=96, initializer_range=0.25, eos_token_id=None,
              index_n_heads=12, index_head_dim=12)
V32 = COMMON | dict(
    num_hidden_layers=3, num_key_value_heads=4, intermediate_size=40, n_group=1, topk_group=1, first_k_dense_replace=1,
    kv_lora_rank=12, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=6, v_head_dim=10, index_topk=7)
V4 = COMMON | dict(
    num_hidden_layers=4, head_dim=16, q_lora_rank=12, qk_rope_head_dim=8, layer_types=[KINDS[x] for x in 'schc'],
    mlp_layer_types=['hash_moe', 'hash_moe', 'moe', 'moe'], compress_rates={KINDS['c']: 4, KINDS['h']: 8},
    sliding_window=6, o_groups=2, o_lora_rank=10, index_topk=5, hc_mult=3, swiglu_limit=0.5,
    num_nextn_predict_layers=0)
YARN = dict(rope_type='yarn', factor=6.0, original_max_position_embeddings=16, beta_fast=2.0, beta_slow=0.5)
CLASSES = {'DeepseekV32ForCausalLM': (DeepseekV32ForCausalLM, DeepseekV32Config),
           'DeepseekV4ForCausalLM': (DeepseekV4ForCausalLM, DeepseekV4Config)}


@torch.no_grad()
def randomise(gpt):
    """No part stays at its neutral initial value. Ours and transformers' names have the same ends."""
    for name, x in [*gpt.named_parameters(), *gpt.named_buffers()]:
        if name.endswith(('norm', 'norm.weight', 'ln_f.weight')):
            x.uniform_(0.5, 1.5)
        elif name.endswith(('bias', 'base', 'scale', 'hc_fn', 'sinks')):
            x.normal_(std=0.3)
        elif name.endswith('tid2eid'):
            x.copy_(torch.rand(x.size(0), 8).argsort()[:, :x.size(1)])
    return gpt.eval()


def theirs(settings):
    their_class, config = CLASSES['DeepseekV4ForCausalLM' if 'hc_mult' in settings else 'DeepseekV32ForCausalLM']
    return randomise(their_class(config(**settings)))


def saved(folder, settings):
    """A folder that transformers has written, and its model."""
    gpt = theirs(settings)
    gpt.save_pretrained(folder)
    return gpt


def ours(**overrides):
    return randomise(model_v4.GPT(model_v4.GPTConfig(**{**TINY, 'block_size': 96, 'initializer_range': 0.25,
                                                        **overrides})))


DSA = dict(index_topk=7, index_n_heads=12, index_head_dim=12)
FLASH = dict(n_layer=4, layer_types='schc', sliding_window=6, compress_rate_csa=4, compress_rate_hca=8, o_groups=2,
             index_topk=5, index_n_heads=12, index_head_dim=12, hc_mult=3, scoring_func='sqrtsoftplus',
             swiglu_limit=0.5, num_hash_layers=2)


def write_checkpoint(out_dir, gpt, **extra):
    out_dir.mkdir()
    torch.save({'model': gpt.state_dict(), 'optimizer': None, 'model_args': dataclasses.asdict(gpt.config),
                'iter_num': 7, 'val_loss': 1.5, 'best_val_loss': 1.25, 'config': {}, 'meta': {}} | extra,
               out_dir / 'ckpt.pt')


@torch.no_grad()
def same_logits(a, b):
    """Of our model and transformers', the whole at once; of ours with a cache too."""
    idx = torch.randint(61, (2, 90))
    got, want, cache = a(idx, idx)[0], b(idx).logits, a.make_cache(2, 90)
    assert want.std() > 1 and type(a) is model_v4.GPT
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for start, end in ((0, 70), (70, 71), (71, 73)):
        step = a(idx[:, start:end], cache=cache, pos=start)[0][:, 0]
        torch.testing.assert_close(step, want[:, end - 1], atol=2e-5, rtol=1e-5)


def rewrite(folder, change=lambda settings: None, tensors=lambda tensors: None):
    """Change config.json's table and the table of tensors of a folder, each in place."""
    settings, found = json.loads((folder / 'config.json').read_text()), load_file(folder / 'model.safetensors')
    change(settings)
    tensors(found)
    (folder / 'config.json').write_text(json.dumps(settings))
    save_file(found, folder / 'model.safetensors', metadata={'format': 'pt'})


# -----------------------------------------------------------------------------
# in from transformers

IMPORTS = {
    'V3.2': V32, 'V3.2 with YaRN': V32 | dict(rope_parameters=YARN | dict(rope_theta=1e4, mscale=1, mscale_all_dim=.7)),
    'V3.2 with groups and biases': V32 | dict(n_group=4, topk_group=2, attention_bias=True),
    'V3.2, dense and tied': V32 | dict(first_k_dense_replace=3, tie_word_embeddings=True),
    'V4': V4, 'V4 with YaRN': V4 | dict(rope_parameters=YARN),
    'V4 with two thetas': V4 | dict(rope_parameters={
        'main': dict(rope_type='default', rope_theta=7e3, partial_rotary_factor=0.5),
        'compress': YARN | dict(rope_theta=5e3, partial_rotary_factor=0.5, attention_factor=1.0)}),
    'V4, tied, of sigmoid scores': V4 | dict(tie_word_embeddings=True, scoring_func='sigmoid', hc_mult=2),
    'V4 without tables and CSA': V4 | dict(layer_types=[KINDS[x] for x in 'shhs'], mlp_layer_types=['moe'] * 4,
                                           compress_rope_theta=9e3, rope_theta=5e4, rms_norm_eps=1e-2),
}


@pytest.mark.parametrize('settings', IMPORTS.values(), ids=IMPORTS)
def test_what_transformers_saves_opens_here(tmp_path, settings):
    want = saved(tmp_path, settings)
    same_logits(hf.from_pretrained(str(tmp_path)).eval(), want)


def as_released(folder):
    """A folder of V4 from transformers, in the form in which DeepSeek has released it."""
    def settings(table):
        for name in ('layer_types', 'mlp_layer_types', 'compress_rates', 'partial_rotary_factor', 'rope_parameters'):
            del table[name]
        table |= {'compress_ratios': [0, 4, 128, 4, 0], 'num_hash_layers': 2, 'num_nextn_predict_layers': 1,
                  'rope_scaling': {name.replace('rope_', ''): value for name, value in YARN.items()}}

    def tensors(table):
        for name in list(table):
            to = name.removeprefix('model.').replace('.attn.norm.', '.attn.kv_norm.').replace('hc_head.hc_', 'hc_head_')
            table[to.replace('embed_tokens.', 'embed.')] = table.pop(name)
        table['mtp.0.e_proj.weight'] = torch.ones(32, 32)

    rewrite(folder, settings, tensors)


def test_v4_in_its_released_form_opens_here_and_there(tmp_path, capsys):
    compressed = {KINDS['c']: 4, KINDS['h']: 128}
    saved(tmp_path, V4 | dict(compress_rates=compressed, max_position_embeddings=256, rope_parameters=YARN))
    as_released(tmp_path)
    want, info = DeepseekV4ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    gpt = hf.from_pretrained(str(tmp_path)).eval()
    assert 'config.json names MTP modules' in capsys.readouterr().out and len(gpt.mtp) == 0
    same_logits(gpt, want.eval())


V4_FLASH = dict(
    architectures=['DeepseekV4ForCausalLM'], attention_bias=False, bos_token_id=0, eos_token_id=1, expert_dtype='fp4',
    hc_eps=1e-6, hc_mult=4, hc_sinkhorn_iters=20, head_dim=512, hidden_act='silu', hidden_size=4096, index_head_dim=128,
    index_n_heads=64, index_topk=512, max_position_embeddings=1048576, moe_intermediate_size=2048, n_routed_experts=256,
    n_shared_experts=1, norm_topk_prob=True, num_attention_heads=64, num_experts_per_tok=6, num_hidden_layers=43,
    num_hash_layers=3, num_key_value_heads=1, num_nextn_predict_layers=1, o_groups=8, o_lora_rank=1024,
    q_lora_rank=1024, qk_rope_head_dim=64, rms_norm_eps=1e-6, rope_theta=10000, routed_scaling_factor=1.5,
    quantization_config=dict(activation_scheme='dynamic', fmt='e4m3', quant_method='fp8', weight_block_size=[128, 128]),
    rope_scaling=dict(beta_fast=32, beta_slow=1, factor=16, original_max_position_embeddings=65536, type='yarn'),
    scoring_func='sqrtsoftplus', sliding_window=128, swiglu_limit=10.0, tie_word_embeddings=False,
    topk_method='noaux_tc', vocab_size=129280, compress_rope_theta=160000,
    compress_ratios=[0, 0] + [4, 128] * 20 + [4, 0])


def test_v4_flash_has_its_published_size():
    """284 billion parameters, of which a token uses 13."""
    config = model_v4.GPTConfig(**hf.settings_in(V4_FLASH))
    assert hf_v4.family(config) == 'V4'
    with torch.device('meta'):
        gpt = model_v4.GPT(config)
    assert round(gpt.get_num_params(non_embedding=False) / 1e9) == 284
    assert round(gpt.get_num_active_params() / 1e9) == 13


def test_v4s_fp8_is_dequantised_by_its_scales(tmp_path):
    saved(tmp_path, V4)
    weight = torch.randn(20, 32).to(torch.float8_e4m3fn)
    name = 'model.layers.0.attn.wo_a'
    scale = torch.tensor([[0.5]]).to(torch.float8_e8m0fnu)
    rewrite(tmp_path, tensors=lambda found: found.update({f'{name}.weight': weight, f'{name}.scale': scale}))
    got = hf.from_pretrained(str(tmp_path)).transformer.h[0].attn.o_a_proj.weight
    assert torch.equal(got, weight.float() * 0.5)
    rewrite(tmp_path, tensors=lambda found: found.pop(f'{name}.scale'))
    with pytest.raises(Mistake, match='layers.0.attn.wo_a.weight is in FP8 and its .*scale_inv is missing'):
        hf.open_folder(str(tmp_path))


def test_a_tied_head_may_stand_in_the_file_too(tmp_path):
    saved(tmp_path, V4 | dict(tie_word_embeddings=True))
    embedding = load_file(tmp_path / 'model.safetensors')['model.embed_tokens.weight']
    rewrite(tmp_path, tensors=put(**{'head.weight': embedding.clone()}))
    hf.open_folder(str(tmp_path))
    rewrite(tmp_path, tensors=put(**{'head.weight': embedding + 1}))
    with pytest.raises(Mistake, match='head.weight differs from embed.weight'):
        hf.open_folder(str(tmp_path))


def drop(name):
    return lambda found: found.pop(name)


def put(**changes):
    return lambda settings: settings.update(changes)


def NO(found):
    """No change"""


LAYER = 'model.layers.1.attn.'
BAD = [
    (V32, put(index_topk=None), NO, 'config.json lacks index_topk'),
    (V32, put(q_lora_rank=None), NO, 'index_topk=7 needs q_lora_rank above 0'),
    (V32, put(layer_types=['full_attention'] * 3), NO, "layer_types=.* is not supported"),
    (V32, put(mlp_layer_types=['dense', 'sparse', 'dense']), NO, "mlp_layer_types must have 3 entries, 'dense' for"),
    (V32, put(index_n_heads=11), NO, r'wq_b.weight has the shape \[144, 16\], config.json asks for \[132, 16\]'),
    (V32, put(num_hidden_layers=10**12), NO, 'mlp_layer_types must have 1000000000000 entries'),
    (V32, put(num_hidden_layers=10**9, mlp_layer_types=None), NO, 'tensors at least, and there are'),
    (V4, put(num_hidden_layers=10**12), NO, 'layer_types has 4 entries, and num_hidden_layers is 1000000000000'),
    (V4, put(num_hidden_layers='4'), NO, 'cannot be read'), (V4, put(layer_types=3), NO, 'cannot be read'),
    (V32, put(index_topk='7'), NO, 'index_topk must be int'),
    (V32, put(), drop('model.layers.2.self_attn.indexer.k_norm.bias'), '1 tensors are missing, the first is model'),
    (V32, put(), put(**{'model.layers.2.self_attn.indexer.k_norm.extra': torch.ones(1)}), 'unknown to this model'),
    (V4, put(layer_types=[KINDS['s']] * 3), NO, 'layer_types has 3 entries, and num_hidden_layers is 4'),
    (V4, put(layer_types=['full_attention'] * 4), NO, "layer_types: 'full_attention' is not supported; sliding"),
    (V4, put(layer_types=None), NO, 'config.json lacks layer_types'),
    (V4, put(layer_types=None, compress_ratios=[0, 4, 16, 4]), NO, 'compress_ratios: 16 is not supported; 0, 4, 128'),
    (V4, put(layer_types=None, compress_ratios=[0, 4]), NO, 'compress_ratios has 2 entries'),
    (V4, put(compress_rates={KINDS['c']: 0}), NO, 'compress_rate_csa=0 must be positive'),
    (V4, put(compress_rates={KINDS['c']: 5, KINDS['h']: 8}), NO, r'ape has the shape \[4, 32\], .* \[5, 32\]'),
    (V4, put(compress_rates={KINDS['c']: 4}), NO, 'compress_rate_hca=128 must be at most block_size=96'),
    (V4, put(compress_rates='4'), NO, 'cannot be read'),
    (V4, put(mlp_layer_types=['moe', 'hash_moe', 'moe', 'moe']), NO, "'hash_moe' for the first layers and 'moe' for"),
    (V4, put(mlp_layer_types=['hash_moe'] * 3 + ['moe']), NO, 'missing, the first is layers.2.ffn.gate.tid2eid'),
    (V4, put(q_lora_rank=None), NO, 'q_lora_rank above 0'),
    (V4, put(index_topk=0), NO, 'in DeepseekV4ForCausalLM index_topk=0 must be above 0'),
    (V4, put(hc_mult=1), NO, 'hc_mult=1 must be above 1'), (V4, put(hc_mult=2), NO, 'hc_attn_fn has the shape'),
    (V4, put(swiglu_limit=0.0), NO, 'swiglu_limit=0.0 must be above 0'),
    (V4, put(scoring_func='softmax'), NO, "scoring_func='softmax' must be 'sqrtsoftplus' or"),
    (V4, put(norm_topk_prob=False), NO, 'norm_topk_prob=False must be True'),
    (V4, put(num_key_value_heads=4), NO, 'num_key_value_heads=4 is not supported; 1 is'),
    (V4, put(attention_bias=True), NO, 'attention_bias=True is not supported'),
    (V4, put(o_groups=3), NO, 'o_groups=3 must divide n_head=4'),
    (V4, put(hidden_act='gelu'), NO, "hidden_act='gelu' is not supported"),
    (V4, put(head_dim=None), NO, 'config.json lacks head_dim'),
    (V4, put(rope_parameters={'main': {'rope_theta': 1e4}, 'compress': YARN | {'rope_theta': 1e4}}), NO,
     "V4's YaRN with an attention_factor other than 1.0"),
    (V4, put(rope_parameters={'main': {'rope_type': 'yarn'}, 'compress': {}}), NO, "rope_type='yarn' is not supported"),
    (V4, put(), drop('model.layers.0.ffn.gate.tid2eid'), 'missing, the first is layers.0.ffn.gate.tid2eid'),
    (V4, put(), put(**{'model.layers.0.ffn.gate.tid2eid': torch.full((61, 3), 8)}), r'names experts outside 0\.\.7'),
    (V4, put(), put(**{'model.layers.0.ffn.gate.tid2eid': torch.ones(61, 3)}), 'tid2eid is in F32; I64, I32 are read'),
    (V4, put(), drop(f'{LAYER}indexer.compressor.ape'), 'missing, the first is layers.1.attn.indexer.compressor.ape'),
    (V4, put(), put(**{f'{LAYER}compressor.ape': torch.ones(4, 16)}), r'ape has the shape \[4, 16\]'),
    (V4, put(), put(**{f'{LAYER}wk.weight': torch.ones(4, 16)}), 'unknown to this model, the first is layers.1.attn'),
    (V4, put(), put(**{f'{LAYER}wq_a.weight': torch.ones(12, 32).char()}), 'layers.1.attn.wq_a.weight is in I8'),
]


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    made = {}
    for name, settings in (('V32', V32), ('V4', V4)):
        made[name] = tmp_path_factory.mktemp(name)
        saved(made[name], settings)
    return made


@pytest.mark.parametrize('settings, change, tensors, message', BAD, ids=[case[-1] for case in BAD])
def test_a_folder_that_does_not_fit(folders, tmp_path, settings, change, tensors, message):
    source = folders['V4' if settings is V4 else 'V32']
    for name in ('config.json', 'model.safetensors'):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    hf.open_folder(str(tmp_path))
    rewrite(tmp_path, change, tensors)
    with pytest.raises(Mistake, match=message) as said:
        convert.import_folder(str(tmp_path), str(tmp_path / 'new'))
    assert '\n' not in str(said.value) and str(tmp_path) in str(said.value) and not (tmp_path / 'new').exists()


# -----------------------------------------------------------------------------
# out to transformers

EXPORTS = [
    DSA | dict(rope_factor=6.0, rope_beta_fast=2.0, rope_mscale_all_dim=0.7),
    DSA | dict(first_k_dense_replace=1, tie_word_embeddings=False, n_shared_experts=0),
    DSA | dict(bias=True, n_group=4, topk_group=2, hc_mult=1),
    DSA | dict(n_routed_experts=0, num_nextn_predict_layers=0), FLASH,
    FLASH | dict(rope_factor=6.0, rope_beta_fast=2.0, num_hash_layers=0, scoring_func='sigmoid'),
    FLASH | dict(layer_types='shhs', index_topk=0, tie_word_embeddings=False, num_hash_layers=4),
    FLASH | dict(n_layer=2, layer_types='hc', qk_nope_head_dim=20, qk_rope_head_dim=26, index_head_dim=30),
]


@pytest.mark.parametrize('overrides', EXPORTS)
def test_a_model_from_here_opens_in_transformers_and_comes_back_bit_for_bit(tmp_path, capsys, overrides):
    gpt, v4 = ours(**overrides), 'layer_types' in overrides
    write_checkpoint(tmp_path / 'out', gpt)
    convert.export_folder(str(tmp_path / 'out'), str(tmp_path / 'hf'))
    assert ('left out: the 2 MTP modules' in capsys.readouterr().out) == v4
    settings = json.loads((tmp_path / 'hf/config.json').read_text())
    assert not v4 or 'mscale' not in settings.get('rope_scaling', {})
    name = settings['architectures'][0]
    assert name == ('DeepseekV4ForCausalLM' if v4 else 'DeepseekV32ForCausalLM')
    loaded, info = CLASSES[name][0].from_pretrained(tmp_path / 'hf', output_loading_info=True)
    mtp = [key for key in info.pop('unexpected_keys') if not key.startswith(f'model.layers.{gpt.config.n_layer + 1}.')]
    assert not any(info.values()) and all(key.startswith(f'model.layers.{gpt.config.n_layer}.') for key in mtp)
    same_logits(gpt, loaded.eval())
    card = (tmp_path / 'hf/README.md').read_text()
    assert 'use_mtp' not in card and (f'{name}._keys_to_ignore' in card) == (len(mtp) > 0)

    convert.import_folder(str(tmp_path / 'hf'), str(tmp_path / 'back'))
    GPT, _ = architecture.of_file(tmp_path / 'back/ckpt.pt')
    back, checkpoint = GPT.from_checkpoint(tmp_path / 'back/ckpt.pt')
    for key, x in checkpoint['model'].items():
        layer = re.match(r'transformer\.h\.(\d+)\.mlp\.e_score_correction_bias', key)
        if not layer or int(layer[1]) >= gpt.config.num_hash_layers:                   # a layer with a table has none
            assert torch.equal(x, gpt.state_dict()[key]) and x.dtype == gpt.state_dict()[key].dtype, key
    idx = torch.randint(61, (1, 90))
    assert torch.equal(back.eval()(idx, idx)[0], gpt(idx, idx)[0])
    assert len(back.mtp) == (0 if v4 else len(gpt.mtp))


@pytest.mark.parametrize('overrides, said', [
    (DSA | dict(scoring_func='softmax'), "in DeepseekV32ForCausalLM scoring_func='softmax' must be 'sigmoid'"),
    (DSA | dict(index_warmup=True), 'in DeepseekV32ForCausalLM index_warmup=True must be False'),
    (DSA | dict(hc_mult=3), "in DeepseekV4ForCausalLM layer_types='' must name"),
    (DSA | dict(n_routed_experts=1, num_experts_per_tok=1), 'single routed expert'),
    (dict(hc_mult=3), "layer_types='' must name"), (dict(swiglu_limit=1.0), 'hc_mult=0 must be above 1'),
    (dict(scoring_func='sqrtsoftplus'), "layer_types='' must name"), (dict(num_hash_layers=1), "layer_types='' must"),
    (dict(engram_layers='0'), "engram_layers='0' must be '': it has no Engram"),
    (FLASH | dict(engram_layers='0'), "in DeepseekV4ForCausalLM engram_layers='0' must be '': it has no Engram"),
    (FLASH | dict(hc_mult=0), 'hc_mult=0 must be above 1'), (FLASH | dict(index_topk=0), 'index_topk=0 must be above'),
    (FLASH | dict(index_warmup=True), 'index_warmup=True must be False'), (FLASH | dict(bias=True), 'bias=True must'),
    (FLASH | dict(swiglu_limit=0.0), 'swiglu_limit=0.0 must be above 0: its experts always clamp'),
    (FLASH | dict(n_shared_experts=2), 'n_shared_experts=2 must be 1'),
    (FLASH | dict(scoring_func='softmax'), "scoring_func='softmax' must be 'sqrtsoftplus' or 'sigmoid'"),
    (FLASH | dict(scoring_func='sigmoid', n_group=2, topk_group=2), 'n_group=2 must be 1'),
    (FLASH | dict(num_experts_per_tok=1), 'num_experts_per_tok=1 must be above 1'),
    (FLASH | dict(norm_topk_prob=False), 'norm_topk_prob=False must be True'),
    (FLASH | dict(num_hash_layers=0, first_k_dense_replace=1), 'first_k_dense_replace=1 must be 0'),
    (FLASH | dict(num_hash_layers=0, n_routed_experts=0), 'n_routed_experts=0 must be above 0'),
], ids=str)
def test_settings_that_a_format_cannot_express(overrides, said):
    with pytest.raises(Mistake) as e:
        hf.settings_out(model_v4.GPTConfig(**TINY | overrides), 'float32', None)
    assert said in str(e.value) and '\n' not in str(e.value)


def test_a_switch_that_is_not_known_here_is_not_exported():
    """A field that someone adds to model_v4.GPTConfig, off by default."""
    @dataclasses.dataclass
    class Config(model_v4.GPTConfig):
        mine: int = 0

    with pytest.raises(Mistake, match='in DeepseekV4ForCausalLM mine=3 has no place'):
        hf_v4.family(Config(**TINY | FLASH, mine=3))
    assert hf_v4.family(Config(**TINY | FLASH)) == 'V4'


def changed(owner, name, after):
    """-> (a class or module, a function of it, a version of the function whose results go through `after`)"""
    plain = getattr(owner, name)
    return owner, name, lambda *args, **kwargs: after(plain(*args, **kwargs))


def larger(out):
    return (out[0] * 1.5, *out[1:]) if isinstance(out, tuple) else out * 1.5


def shifted(out):
    return out[0] + 1, *out[1:]                                                        # a norm would undo a factor


def of_token_0(moe, x, tokens):
    return model.MoE.forward(moe, x, moe.tid2eid[0 * tokens.flatten()])


CHANGES = [
    (DSA, 'attention of model.layers.0', (model_v4, 'rope_halves', lambda x, *_: x.float())),
    (DSA, 'attention of model.layers.0', changed(model_v4, 'head_weights', lambda w: -w)),
    (DSA, 'feed-forward layer of model.layers.0', changed(model.MoE, 'routed', larger)),
    (FLASH, 'attention of model.layers.0', changed(model_v4.Attention, 'attend', larger)),
    (FLASH, 'attention of model.layers.1', changed(model_v4.Compressor, 'mix', larger)),
    (FLASH, 'attention of model.layers.1', changed(model_v4, 'head_weights', lambda w: -w)),
    (FLASH, 'hyper-connection (attn_hc) of model.layers.0', changed(model_v4.HyperConnection, 'forward', shifted)),
    (FLASH, 'residual stream of model.layers.0', changed(model_v4, 'sinkhorn', larger)),
    (FLASH, 'activation (the format has silu(gate) * up) of', (model, 'swiglu', lambda x, *_: x.chunk(2, -1)[1])),
    (FLASH, 'router of model.layers.0',
     changed(model.MoE, 'route', lambda out: (out[0], out[1] * 1.5, out[2]))),
    (FLASH, 'feed-forward layer of model.layers.0', (model_v4.HashMoE, 'forward', of_token_0)),
    (FLASH, 'the last norm differs', changed(model_v4.StreamNorm, 'forward', larger)),
]


@pytest.mark.parametrize('overrides, part, change', CHANGES, ids=[f'{case[2][1]}' for case in CHANGES])
def test_a_model_of_other_equations_is_not_exported(monkeypatch, overrides, part, change):
    gpt = ours(**overrides, num_nextn_predict_layers=0)
    settings, _ = hf.settings_out(gpt.config, 'float32', None)
    tensors = convert.released_tensors(gpt.config, gpt.state_dict(), False)
    convert.check_export(gpt, settings, tensors)
    monkeypatch.setattr(*change)
    with pytest.raises(Mistake) as said:
        convert.check_export(gpt, settings, tensors)
    assert part in str(said.value) and settings['architectures'][0] in str(said.value)


@pytest.mark.parametrize('overrides', [DSA, FLASH])
def test_equal_index_scores_are_no_reason_to_refuse(overrides):
    """An indexer of few heads has many scores of 0; here all are."""
    gpt = ours(**overrides, num_nextn_predict_layers=0)
    for name, p in gpt.named_parameters():
        if 'weights_proj' in name:
            torch.nn.init.zeros_(p)
    tensors = convert.released_tensors(gpt.config, gpt.state_dict(), False)
    convert.check_export(gpt, hf.settings_out(gpt.config, 'float32', None)[0], tensors)


def test_a_parameter_of_ones_own_is_not_exported():
    for overrides, name in ((DSA, 'model.layers.0.self_attn.mine'), (FLASH, 'layers.0.attn.mine')):
        gpt = ours(**overrides, num_nextn_predict_layers=0)
        gpt.transformer.h[0].attn.mine = torch.nn.Parameter(torch.ones(1))
        tensors = convert.released_tensors(gpt.config, gpt.state_dict(), False)
        with pytest.raises(Mistake, match=f'{name} has no place in the format'):
            convert.check_export(gpt, hf.settings_out(gpt.config, 'float32', None)[0], tensors)


def test_v32_in_fp8_and_v4_not(tmp_path):
    """The indexer's head weights stay as they are, as in the release."""
    gpt = ours(index_topk=7, index_n_heads=12, index_head_dim=32, n_embd=256, n_layer=1, kv_lora_rank=96,
               num_nextn_predict_layers=0, tie_word_embeddings=False, initializer_range=0.1)
    write_checkpoint(tmp_path / 'out', gpt)
    convert.export_folder(str(tmp_path / 'out'), str(tmp_path / 'hf'), fp8=True)
    tensors = load_file(tmp_path / 'hf/model.safetensors')
    index = 'model.layers.0.self_attn.indexer.'
    kinds = {name: tensors[f'{index}{name}.weight'].dtype for name in ('wk', 'wq_b', 'weights_proj')}
    assert kinds == {'wk': torch.float8_e4m3fn, 'wq_b': torch.float8_e4m3fn, 'weights_proj': torch.float32}
    loaded, info = DeepseekV32ForCausalLM.from_pretrained(
        tmp_path / 'hf', output_loading_info=True, dtype=torch.float32,
        quantization_config=FineGrainedFP8Config(dequantize=True))
    assert not any(info.values())
    back = hf.from_pretrained(str(tmp_path / 'hf')).eval()
    for p in [*back.parameters(), *loaded.parameters()]:
        p.data = p.data.bfloat16().float()                                             # here FP8 becomes bf16
    same_logits(back, loaded.eval())
    write_checkpoint(tmp_path / 'v4', ours(**FLASH))
    with pytest.raises(Mistake, match="--fp8 writes V3's format"):
        convert.export_folder(str(tmp_path / 'v4'), str(tmp_path / 'new'), fp8=True)


# -----------------------------------------------------------------------------
# the scripts

def script(name, *args, cwd, ok=True):
    code, out, err = run_inside(str(ROOT / name), *args, cwd=cwd)
    assert code == (0 if ok else 2), err
    assert ok or err.count('\n') == 1
    return out if ok else err


def val_losses(clone, out='out'):
    return [line['val_loss'] for line in log(clone, out) if 'val_loss' in line]


RUNS = {'V3.2': ['--index_topk=4', '--index_head_dim=8'],
        'V4': ['--layer_types=ch', '--index_topk=2', '--index_head_dim=8', '--compress_rate_hca=8', '--hc_mult=2',
               '--sliding_window=4', '--scoring_func=sqrtsoftplus', '--swiglu_limit=10', '--num_hash_layers=1']}


@pytest.mark.parametrize('kind', RUNS)
def test_the_scripts_read_such_a_folder(small, kind):
    """sample.py says the same from the run, the folder and the import; train.py goes on with the folder's weights."""
    train(small, '--architecture=model_v4', *RUNS[kind], '--num_nextn_predict_layers=0')
    script('convert.py', 'export', '--out_dir=out', '--hf_dir=hf', cwd=small)
    script('convert.py', 'import', '--hf_dir=hf', '--out_dir=back', cwd=small)
    said = []
    for where in (['--out_dir=out'], ['--out_dir=back'], ['--init_from=hf', '--out_dir=nowhere']):
        printed = script('sample.py', *where, '--start=024', '--num_samples=1', '--max_new_tokens=9', '--device=cpu',
                         '--temperature=0', '--dtype=float32', cwd=small)
        said.append(printed[printed.rindex('024'):printed.index('-----')])
    assert said[0] == said[1] == said[2] and len(said[0].strip()) == 12
    trained = []
    for begin, *flag in (('hf',), ('hf', '--architecture=model_v4'), ('back',)):
        train(small, *flag, f'--init_from={begin}', f'--out_dir=from-{begin}', '--eval_interval=2', '--max_iters=4')
        trained.append(val_losses(small, f'from-{begin}'))
    assert trained[0] == trained[1] == trained[2] and trained[0][0] == val_losses(small)[-1] != trained[0][-1]
    train(small, '--out_dir=from-hf', '--init_from=resume', '--max_iters=5')
    assert load(small, 'from-hf/ckpt.pt')['model_args']['architecture'] == 'model_v4'


def test_an_indexer_joins_the_weights_of_a_v3_folder(small):
    train(small)
    script('convert.py', 'export', '--out_dir=out', '--hf_dir=hf', cwd=small)
    given = ['--architecture=model_v4', '--init_from=hf', '--out_dir=warm', '--index_topk=4', '--index_head_dim=8']
    train(small, *given, '--index_warmup=True')
    assert len([line for line in log(small, 'warm') if 'index_loss' in line]) == 6
    assert set(val_losses(small, 'warm')) == {val_losses(small)[-1]}                   # all but the indexer is frozen
