# A small model that writes Python, for a release: the standard library's modules in 2,048 tokens of its own.
#
#   bash runs/release.sh       # the text, the tokens, this run, a sample, the export, and a look with transformers
#
# 3.1M parameters without the embedding (0.4M, tied to the head), 1.8M active per token, 18 MFLOP per token.
#
# Hardware: two CPU cores. Expected: val loss 3.24 (1.494 bits per byte) after 15 minutes, at 0.8 s an iteration on a
# Xeon with AVX-512. 1,000 iterations of 4,096 tokens are about one pass over the text, so the model does not learn it
# by heart.

out_dir = 'out-release'
eval_interval = 100
eval_iters = 40
log_interval = 10
wandb_project = 'release'

dataset = 'stdlib-bpe'
gradient_accumulation_steps = 1
batch_size = 16
block_size = 256

n_layer = 4
n_head = 4
n_embd = 192
num_nextn_predict_layers = 1  # it drafts, also in transformers
mtp_n_layer = 1

optimizer = 'muon'
learning_rate = 5e-3  # the speedrun's 2e-2 at width 64, divided by the width's ratio and rounded down: a guess
min_lr = 0.0
warmup_iters = 25
max_iters = 1000
lr_decay_iters = 1000
beta2 = 0.99

device = 'cpu'
dtype = 'float32'  # at this size bf16 is slower
compile = False
