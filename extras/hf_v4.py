"""
DeepSeek's files <-> model_v4.GPTConfig and its state dict: what V3.2 and V4 add to the V3 format of extras/hf.py.
"""

import math
import re

from model import GPTConfig, Mistake

KINDS = {'s': 'sliding_attention', 'c': 'compressed_sparse_attention', 'h': 'heavily_compressed_attention'}
RATIOS = {0: 's', 4: 'c', 128: 'h'}  # the released configs name a block's attention by its compression
ARCHITECTURES = {'V3.2': 'DeepseekV32ForCausalLM', 'V4': 'DeepseekV4ForCausalLM'}
INDEX = ('index_topk', 'index_n_heads', 'index_head_dim')
V4_SAME = (*INDEX, 'sliding_window', 'compress_rope_theta', 'o_groups', 'o_lora_rank', 'hc_mult', 'hc_sinkhorn_iters',
           'hc_eps', 'swiglu_limit', 'scoring_func')
# settings of the V3 format that V4's lacks; its intermediate_size would be the experts' width
V3_ALONE = ('kv_lora_rank', 'qk_nope_head_dim', 'v_head_dim', 'intermediate_size', 'first_k_dense_replace', 'n_group',
            'topk_group', 'moe_layer_freq')
V32_NEEDS = [  # a field, a test of its value x (c: the config), what the format asks for in words
    ('scoring_func', lambda x, c: x == 'sigmoid', "be 'sigmoid'"),
    ('index_warmup', lambda x, c: not x, 'be False: its attention is never dense'),
]
V4_NEEDS = [
    ('layer_types', lambda x, c: x != '', 'name the attention of each block'),
    ('engram_layers', lambda x, c: x == '', "be '': it has no Engram"),
    ('index_topk', lambda x, c: x > 0 or 'c' not in c.layer_types, 'be above 0: its CSA has an indexer'),
    ('index_warmup', lambda x, c: not x, 'be False: its CSA always chooses'),
    ('hc_mult', lambda x, c: x > 1, 'be above 1'),
    ('scoring_func', lambda x, c: x in ('sqrtsoftplus', 'sigmoid'), "be 'sqrtsoftplus' or 'sigmoid'"),
    ('swiglu_limit', lambda x, c: x > 0, 'be above 0: its experts always clamp'),
    ('norm_topk_prob', lambda x, c: x, 'be True'),
    ('num_experts_per_tok', lambda x, c: x > 1, 'be above 1: here a single gate is not normalised'),
    ('n_routed_experts', lambda x, c: x > 0, 'be above 0'),
    ('n_shared_experts', lambda x, c: x == 1, 'be 1'),
    ('first_k_dense_replace', lambda x, c: x == 0, 'be 0: it has no dense blocks'),
    ('n_group', lambda x, c: x == 1, 'be 1: it has no expert groups'),
    ('bias', lambda x, c: not x, 'be False'),
]

RELEASED = [  # in this order
    (r'^model\.', ''), (r'^embed_tokens\.', 'embed.'), (r'^lm_head\.', 'head.'), (r'^(norm|hc_head)\.hc_', 'hc_head_'),
    (r'\.input_layernorm\.', '.attn_norm.'), (r'\.post_attention_layernorm\.', '.ffn_norm.'),
    (r'\.(attn|ffn)_hc\.', r'.hc_\1_'), (r'\.self_attn\.', '.attn.'), (r'\.mlp\.', '.ffn.'),
    (r'\.attn\.norm\.', '.attn.kv_norm.'), (r'\.compressor\.kv_norm\.', '.compressor.norm.'),
    (r'\.q_a_(layer)?norm\.', '.q_norm.'), (r'\.(q_a|q_b)_proj\.', lambda m: f'.w{m[1]}.'), (r'\.kv_proj\.', '.wkv.'),
    (r'(compressor)\.gate_proj\.', r'\1.wgate.'), (r'\.position_bias$', '.ape'), (r'\.sinks$', '.attn_sink'),
    (r'\.o_a_proj\.', '.wo_a.'), (r'\.o(_b)?_proj\.', '.wo_b.'),
    (r'\.gate_proj\.', '.w1.'), (r'\.down_proj\.', '.w2.'), (r'\.up_proj\.', '.w3.'),
    (r'\.ffn\.tid2eid$', '.ffn.gate.tid2eid'), (r'\.gate\.e_score_correction_bias$', '.gate.bias'),
]


# -----------------------------------------------------------------------------
# the settings

def family(config):
    """-> '' (V2 and V3), 'V3.2' or 'V4': a GPTConfig's format. A Mistake names the settings that it cannot express."""
    plain = vars(GPTConfig())
    on = {name for name, value in vars(config).items()
          if value and name not in plain and not getattr(type(config), name) and (name, value) != ('hc_mult', 1)}
    if not on and config.scoring_func in GPTConfig.score_fns:
        return ''
    known = {'index_topk', 'index_warmup'}
    kind, needs = ('V3.2', V32_NEEDS) if on and on <= known else ('V4', V4_NEEDS)
    wrong = [f'{name}={getattr(config, name)!r} must {words}' for name, fits, words in needs
             if not fits(getattr(config, name), config)]
    if kind == 'V4':
        known |= {'num_hash_layers', *(name for name, *_ in V4_NEEDS)}
        wrong += [f'{name}={getattr(config, name)!r} has no place' for name in sorted(on - known)]
    if wrong:
        raise Mistake(f'in {ARCHITECTURES[kind]} {", ".join(wrong)}')
    return kind


def settings_out(config, settings):
    """V3's settings of a model -> those of its own format."""
    kind = family(config)
    if not kind:
        return settings
    names = {'architectures': [ARCHITECTURES[kind]], 'model_type': 'deepseek_v32' if kind == 'V3.2' else 'deepseek_v4'}
    if kind == 'V3.2':
        return settings | names | {name: getattr(config, name) for name in INDEX}
    D, r = config.qk_nope_head_dim + config.qk_rope_head_dim, config.qk_rope_head_dim
    share = r / D if int(D * (r / D)) == r else math.nextafter(r / D, 1)  # transformers computes int(D * share)
    settings = {name: value for name, value in settings.items() if name not in V3_ALONE}
    settings |= names | {name: getattr(config, name) for name in V4_SAME} | {
        'num_key_value_heads': 1, 'head_dim': D, 'partial_rotary_factor': share,
        'layer_types': [KINDS[letter] for letter in config.layer_types],
        'compress_rates': {KINDS['c']: config.compress_rate_csa, KINDS['h']: config.compress_rate_hca},
        'mlp_layer_types': ['hash_moe' if i < config.num_hash_layers else 'moe' for i in range(config.n_layer)]}
    if 'rope_scaling' in settings:  # in V4 YaRN leaves the size of the numbers alone
        settings['rope_scaling'] = {name: value for name, value in settings['rope_scaling'].items()
                                    if 'mscale' not in name}
    return settings


def settings_in(settings):
    """config.json -> the same as a V3's, for extras/hf.py, and the keywords of GPTConfig that a V3 does not have."""
    kind = {name: kind for kind, name in ARCHITECTURES.items()}.get((settings.get('architectures') or [None])[0])
    if kind is None:
        return settings, {}
    n = need(settings, 'num_hidden_layers')
    args = {'architecture': 'model_v4'} | {name: need(settings, name) for name in INDEX}
    settings = settings | {'architectures': ['DeepseekV3ForCausalLM']}
    if kind == 'V3.2':
        only(settings, 'layer_types', [['indexed_attention'] * len(settings.get('layer_types') or [])])
        if settings.get('mlp_layer_types') is not None:
            settings['first_k_dense_replace'] = leading(settings, 'mlp_layer_types', 'dense', 'sparse')
        return settings, args

    only(settings, 'num_key_value_heads', [1])
    only(settings, 'attention_bias', [False])
    args |= {name: need(settings, name) for name in V4_SAME}
    args |= {'layer_types': attention_of_blocks(settings), 'rope_mscale': 1.0, 'rope_mscale_all_dim': 1.0}
    rates = settings.get('compress_rates') or {}
    for letter, name, rate in (('c', 'compress_rate_csa', 4), ('h', 'compress_rate_hca', 128)):
        args[name] = rates.get(KINDS[letter], settings.get(name, rate))
    if settings.get('mlp_layer_types') is None:
        args['num_hash_layers'] = min(n, settings.get('num_hash_layers', 3))
    else:
        args['num_hash_layers'] = leading(settings, 'mlp_layer_types', 'hash_moe', 'moe')
    D, share = need(settings, 'head_dim'), settings.get('partial_rotary_factor')
    r = need(settings, 'qk_rope_head_dim') if share is None else int(D * share)
    if settings.get('num_nextn_predict_layers'):
        print("config.json names MTP modules: V4's read all streams of the residual, the ones here do not: left out")
    return settings | rope(settings, args) | {
        'qk_rope_head_dim': r, 'qk_nope_head_dim': D - r, 'v_head_dim': D, 'kv_lora_rank': D,
        'intermediate_size': need(settings, 'moe_intermediate_size'), 'first_k_dense_replace': 0,
        'num_key_value_heads': settings.get('num_attention_heads'), 'scoring_func': 'sigmoid',
        'num_nextn_predict_layers': 0}, args


def need(settings, name):
    if settings.get(name) is None:
        raise Mistake(f'config.json lacks {name}')
    return settings[name]


def only(settings, name, allowed):
    if settings.get(name) is not None and settings[name] not in allowed:
        raise Mistake(f'{name}={settings[name]!r} is not supported; {" or ".join(map(repr, allowed))} is')


def leading(settings, name, first, rest):
    """The number of layers that a list calls `first`. They stand before those that it calls `rest`."""
    kinds, n = list(settings[name]), settings['num_hidden_layers']
    count = kinds.count(first)
    if len(kinds) != n or kinds != [first] * count + [rest] * (len(kinds) - count):
        raise Mistake(f'{name} must have {n} entries, {first!r} for the first layers and {rest!r} for all others')
    return count


def attention_of_blocks(settings):
    """-> GPTConfig's layer_types. The ratios of a released config name the MTP modules too."""
    n, kinds, ratios = settings['num_hidden_layers'], settings.get('layer_types'), settings.get('compress_ratios')
    if kinds is None and ratios is None:
        raise Mistake('config.json lacks layer_types')
    name, given, letters = ('compress_ratios', ratios[:n], RATIOS) if kinds is None else \
        ('layer_types', kinds, {kind: letter for letter, kind in KINDS.items()})
    unknown = [kind for kind in given if kind not in letters]
    if unknown:
        raise Mistake(f'{name}: {unknown[0]!r} is not supported; {", ".join(map(str, letters))} are')
    if len(given) != n:
        raise Mistake(f'{name} has {len(given)} entries, and num_hidden_layers is {n}')
    return ''.join(letters[kind] for kind in given)


def rope(settings, args):
    """V4's two RoPEs, as transformers or the released config.json has them -> V3's settings: rope_theta of the blocks
    without entries, YaRN of the blocks with entries. The theta of the latter goes to args.
    """
    given = settings.get('rope_parameters') or settings.get('rope_scaling') or {}
    nested = type(given.get('main')) is type(given.get('compress')) is dict
    main, slow = (given['main'], given['compress']) if nested else ({}, given)
    only(main, 'rope_type', ['default'])
    theta = main.get('rope_theta') or settings.get('rope_theta')
    args['compress_rope_theta'] = slow.get('rope_theta') if nested else args['compress_rope_theta']
    yarn = (slow.get('rope_type') or slow.get('type')) == 'yarn'
    if yarn and slow.get('attention_factor', None if nested else 1.0) != 1.0:
        raise Mistake("V4's YaRN with an attention_factor other than 1.0 is not supported")
    left = ('attention_factor', 'rope_theta', 'mscale', 'mscale_all_dim')
    return {'rope_theta': theta, 'rope_parameters': None,
            'rope_scaling': {name: value for name, value in slow.items() if name not in left}}


# -----------------------------------------------------------------------------
# the weights: V4's have names of their own

def released(name):
    """A tensor's name in the form of V3, or as transformers saves V4's -> V4's released name."""
    for pattern, text in RELEASED:
        name = re.sub(pattern, text, name)
    return name


class Renamed:
    """An open file whose tensors go by V4's released names, but for the factors of FP8: V3's. Without MTP modules."""

    def __init__(self, file):
        self.file = file
        self.names = {re.sub(r'\.scale$', '.weight_scale_inv', released(name)): name for name in file.keys()}

    def keys(self):
        return [name for name in self.names if not name.startswith('mtp.')]

    def get_slice(self, name):
        return self.file.get_slice(self.names[name])

    def get_tensor(self, name):
        return self.file.get_tensor(self.names[name])


def check_tables(folder, config, tensors):
    """A Mistake if a hash layer's table names an expert that is not there."""
    for i in range(getattr(config, 'num_hash_layers', 0)):
        name = f'layers.{i}.ffn.gate.tid2eid'
        table = tensors[name].get_tensor(name)
        if table.numel() and not 0 <= table.min() <= table.max() < config.n_routed_experts:
            raise Mistake(f'{folder}: {name} names experts outside 0..{config.n_routed_experts - 1}')
