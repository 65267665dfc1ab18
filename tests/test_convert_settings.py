"""What convert.py reads from a config.json that says little or much, and the dtype of an FP8 weight."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_convert import V2_LITE, V3_671B, YARN

import convert


def without(settings, *names):
    return {name: value for name, value in settings.items() if name not in names}


def test_what_a_config_leaves_out_is_transformers_default():
    args = convert.settings_in(without(V3_671B, *convert.DEFAULTS, 'rope_scaling'))
    assert {name: args[name] for name in ('bias', 'tie_word_embeddings', 'rms_norm_eps', 'rope_theta')} == {
        'bias': False, 'tie_word_embeddings': False, 'rms_norm_eps': 1e-6, 'rope_theta': 10000.0}
    assert (args['n_routed_experts'], args['n_shared_experts'], args['first_k_dense_replace']) == (0, 0, 0)
    assert convert.settings_in(V3_671B | {'tie_word_embeddings': True})['tie_word_embeddings']


@pytest.mark.parametrize('given, kept', [(1, 1), (None, None), ([1, 2], None), ('</s>', None)])
def test_one_end_of_text_token_is_taken_over(given, kept):
    """A list of them names none that closes a document."""
    assert convert.settings_in(V3_671B | {'eos_token_id': given}).get('eos_token_id') == kept


def test_groups_of_v2_count_where_its_method_is_group_limited():
    """With 'greedy' transformers does not look at the groups that a config names."""
    grouped = V2_LITE | {'n_group': 8, 'topk_group': 3}
    found = {method: convert.settings_in(grouped | {'topk_method': method}) for method in
             ('greedy', 'group_limited_greedy')}
    assert {method: (args['n_group'], args['topk_group']) for method, args in found.items()} == {
        'greedy': (1, 1), 'group_limited_greedy': (8, 3)}


def test_yarn_without_a_factor_reaches_as_far_as_the_context():
    scaling = without(YARN['rope_scaling'], 'factor')
    args = convert.settings_in(V3_671B | {'max_position_embeddings': 96, 'rope_scaling': scaling})
    assert (args['block_size'], args['rope_original_max_position_embeddings'], args['rope_factor']) == (96, 16, 6.0)


def test_an_fp8_weight_leaves_as_bf16(tmp_path):
    tensors = {'a.weight': torch.randn(130, 200).to(torch.float8_e4m3fn), 'a.weight_scale_inv': torch.rand(2, 2)}
    save_file(tensors, tmp_path / 'x.safetensors')
    file = safe_open(tmp_path / 'x.safetensors', framework='pt')
    read = convert.read(dict.fromkeys(tensors, file), 'a.weight')
    assert read.dtype == torch.bfloat16 and read.shape == (130, 200)
    for i, k in ((0, 0), (127, 128), (129, 127), (129, 199)):
        want = tensors['a.weight'][i, k].float() * tensors['a.weight_scale_inv'][i // 128, k // 128]
        assert read[i, k] == want.bfloat16()
