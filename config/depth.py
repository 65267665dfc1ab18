# One dial for a whole run: sizes, rate, batch and length from the number of blocks.
#
#   python train.py --depth=8                                                       # reads this file with depth 8
#   python train.py --depth=4 --dataset=shakespeare_char --block_size=256           # other flags keep their say
#   python bench.py size --depth=8                                                  # what it costs
#
# Expected loss and time: unknown, because nobody has made a whole run. docs/training.md says what is fact and guess.

import math as _math
import os as _os

import torch as _torch

from model import GPT as _GPT
from model import GPTConfig as _GPTConfig

_depth = globals().get('depth') or 4
_block_size, _rows = (max(1, globals().get(name, size)) for name, size in (('block_size', 1024), ('batch_size', 12)))


def _unless_flagged(name, value):
    return globals()[name] if name in globals().get('_flagged', ()) else value



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

# length: 20 tokens for each active parameter of the main blocks (Chinchilla, arXiv 2203.15556)
with _torch.device('meta'):
    _main = _GPT(_GPTConfig(vocab_size=1, n_layer=n_layer, n_head=n_head, n_embd=n_embd, num_nextn_predict_layers=0))
_active = _main.get_num_active_params()
_tokens = 20 * _active
_flops = 6 * _active * _tokens

# batch by compute: DeepSeek LLM's law (arXiv 2401.02954, eq. 1), fitted to dense models from 1e17 FLOPs on
_batch = 0.2920 * _flops ** 0.3271  # tokens
_ranks = int(_os.environ.get('WORLD_SIZE', 1))
_sequences = max(1, round(_batch / _block_size))  # in an iteration
_steps = _math.ceil(_sequences / _rows / _ranks) * _ranks
gradient_accumulation_steps = _unless_flagged('gradient_accumulation_steps', _steps)
batch_size = _unless_flagged('batch_size', max(1, round(_sequences / gradient_accumulation_steps)))
_per_iter = max(1, gradient_accumulation_steps * batch_size) * _block_size
max_iters = _math.ceil(_tokens / _per_iter)
lr_decay_iters = max_iters
warmup_iters = _math.ceil(max_iters / 50)

# rate: the same paper's law, for its batch; for another one with the root of the ratio, as Adam asks (arXiv 2205.10287)
learning_rate = float(f'{0.3118 * _flops ** -0.1250 * _math.sqrt(_per_iter / _batch):.2g}')
min_lr = float(f'{learning_rate / 10:.2g}')

eval_interval = _math.ceil(max_iters / 10)

out_dir = f'out-depth{_depth}'
