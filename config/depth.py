# One dial for a whole run: sizes, rate, batch and length from the number of blocks.
#
#   python train.py --depth=8                                                       # reads this file with depth 8
#   python train.py --depth=4 --dataset=shakespeare_char --block_size=256           # other flags stay
#   python bench.py size --depth=8                                                  # what it costs
#
# Expected loss and time: unknown, because nobody has made a whole run. docs/training.md tells facts from guesses.

import dataclasses as _dataclasses
import math as _math
import os as _os

import torch as _torch

from model import GPT as _GPT
from model import GPTConfig as _GPTConfig

_depth = globals().get('depth') or 4
_block_size, _rows = (max(1, globals().get(name, size)) for name, size in (('block_size', 1024), ('batch_size', 12)))
_given = {name: globals()[name] for name in globals().get('_flagged', ())}  # flags keep their say

# sizes: 64 channels for each block, and heads of 64, as in nanochat; experts by GPTConfig's rule, MTP as in V3
n_layer = _depth
n_head = _depth
n_embd = 64 * _depth
q_lora_rank = kv_lora_rank = qk_nope_head_dim = qk_rope_head_dim = v_head_dim = -1
moe_intermediate_size = intermediate_size = -1
first_k_dense_replace = 0
n_routed_experts = 8
num_experts_per_tok = 3
n_shared_experts = 1
num_nextn_predict_layers = 1
mtp_n_layer = 1

# length: 20 tokens for each active parameter of the main blocks (Chinchilla, arXiv 2203.15556), as the flags have them
_fields = {field.name for field in _dataclasses.fields(_GPTConfig)}
_sizes = {name: value for name, value in (globals() | _given).items() if name in _fields}
with _torch.device('meta'):
    _main = _GPT(_GPTConfig(**_sizes | {'vocab_size': 1, 'eos_token_id': -1, 'num_nextn_predict_layers': 0}))
_active = _main.get_num_active_params()
_tokens = 20 * _active
_flops = 6 * _active * _tokens

# batch by compute: DeepSeek LLM's law (arXiv 2401.02954, eq. 1), fitted to dense models from 1e17 FLOPs on
_batch = 0.2920 * _flops ** 0.3271  # tokens
_ranks = int(_os.environ.get('WORLD_SIZE', 1))
_sequences = max(1, round(_batch / _block_size))  # in an iteration
_steps = _math.ceil(_sequences / _rows / _ranks) * _ranks
gradient_accumulation_steps = _given.get('gradient_accumulation_steps', _steps)
batch_size = _given.get('batch_size', min(_rows, max(1, round(_sequences / max(1, gradient_accumulation_steps)))))
_per_iter = max(1, gradient_accumulation_steps * batch_size) * _block_size
max_iters = lr_decay_iters = _given.get('max_iters', _math.ceil(_tokens / _per_iter))
warmup_iters = _math.ceil(max_iters / 50)

# rate: the same paper's law, for its batch; for another one with the root of the ratio, as Adam asks (arXiv 2205.10287)
_law = float(f'{0.3118 * _flops ** -0.1250 * _math.sqrt(_per_iter / _batch):.2g}')
learning_rate = _given.get('learning_rate', _law)
min_lr = float(f'{learning_rate / 10:.2g}')

eval_interval = max(1, _math.ceil(max_iters / 10))

out_dir = f'out-depth{_depth}'
