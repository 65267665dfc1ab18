# The cold start of the countdown game: a model of characters learns from 30,000 lines of random tries how to calculate.
#
#   python data/countdown/prepare.py
#   python train.py config/sft_countdown.py
#
# Hardware: two CPU cores. Expected: val loss 0.25 in five to ten minutes. Half of the answers then have no wrong step,
# and 23% of the held-out games are won.

out_dir = 'out-sft-countdown'
eval_interval = 150
eval_iters = 5
log_interval = 10
wandb_project = 'countdown'

dataset = 'countdown/three'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 88  # the length of the data's rows; a row is one line

n_layer = 2
n_head = 4
n_embd = 128
n_routed_experts = 4
num_experts_per_tok = 2
num_nextn_predict_layers = 0
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
