# V4's ideas and Engram's memory on a laptop: tiny Shakespeare in characters, as config/train_v4.py in small.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/laptop_v4.py
#
# 0.80M parameters without the embedding, 0.39M active per token (a token reads two rows of the memory), 2.7 MFLOP per
# token. Cache in bf16: 29 bytes per token, and 11,544 that do not grow; MLA would have 288 per token.
#
# Hardware: two CPU cores. Expected: val loss 1.704 after 500 iterations, in 3 minutes.

architecture = 'model_v4'
out_dir = 'out-laptop-v4'
wandb_project = 'shakespeare-char'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 16
block_size = 64

n_layer = 3
n_head = 4
n_embd = 96
layer_types = 'sch'
sliding_window = 16
compress_rate_csa = 4
compress_rate_hca = 16
index_topk = 8  # of the 16 entries that a full context has
index_head_dim = 12
o_groups = 2
hc_mult = 2
scoring_func = 'sqrtsoftplus'
swiglu_limit = 10.0
num_hash_layers = 1
engram_layers = '0'
num_nextn_predict_layers = 1
mtp_n_layer = 1

optimizer = 'muon'
learning_rate = 1e-2
min_lr = 0.0
warmup_iters = 20
max_iters = 500
lr_decay_iters = 500
beta2 = 0.99

eval_interval = 250
eval_iters = 40
log_interval = 20

device = 'cpu'
dtype = 'float32'  # at this size bf16 is slower
compile = False  # compiling takes longer than the run
