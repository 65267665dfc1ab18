# The cold start of R1 in small: a model of characters learns 3-digit sums from 3,000 lines. 40% of the lines show work.
#
#   python data/arithmetic/prepare.py
#   python train.py config/sft_arithmetic.py
#
# Hardware: two CPU cores. Expected: val loss 0.18 in 71 to 121 seconds. A third to two thirds of the held-out sums are
# then right, most of them by guessing; docs/grpo.md says how much this varies.

out_dir = 'out-sft-arithmetic'
eval_interval = 100
eval_iters = 5
log_interval = 10
wandb_project = 'arithmetic'

dataset = 'arithmetic/add3'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 40  # the length of the data's rows; a row is one line

n_layer = 2
n_head = 4
n_embd = 128
n_routed_experts = 4
num_experts_per_tok = 2
num_nextn_predict_layers = 0  # grpo.py trains the main stack alone
eos_token_id = 0  # the newline

learning_rate = 2e-3
min_lr = 2e-4
max_iters = 1000
lr_decay_iters = 1000
warmup_iters = 20
beta2 = 0.99

device = 'cpu'
dtype = 'float32'  # at this size bf16 is slower
compile = False
