# The main run with V4's ideas: compressed attention, hyper-connections, V4's experts; and Engram's memory.
# An iteration has as many tokens as in config/train_deepseek.py: 491,520, at 1,024 context.
#
#   python data/openwebtext/prepare.py
#   python train.py config/train_v4.py                                              # one GPU
#   torchrun --standalone --nproc_per_node=8 train.py config/train_v4.py            # eight
#
# 120.6M parameters without the embedding (25.8M, tied to the head), 88.0M active per token, 1.07 GFLOP per token, with
# full attention counted. Cache in bf16: 203 bytes per token, and 368,000 that do not grow; MLA has 3,584 per token.
#
# Hardware: GPUs with bf16. Attention keeps its T x T weights, and the residual is 4 streams. So batch_size is a third
# of the main run's. If memory is too small, halve batch_size and double gradient_accumulation_steps.
# Expected loss and time: unknown, because nobody has made this run.

architecture = 'model_v4'
out_dir = 'out-v4'
wandb_project = 'owt'
wandb_run_name = 'deepseek-v4-small'

dataset = 'openwebtext'
batch_size = 4
block_size = 1024
gradient_accumulation_steps = 3 * 5 * 8  # 4 * 1,024 * 120 = 491,520 tokens

n_layer = 8
n_head = 8
n_embd = 512
# V4's attention: heads of 32 + 32 numbers; two blocks with a window alone, then CSA and HCA in turn
layer_types = 'sschchch'
sliding_window = 128
compress_rate_csa = 4
compress_rate_hca = 128
index_topk = 64  # of the 256 entries that a full context has
index_n_heads = 4
index_head_dim = 64
q_lora_rank = 256
qk_nope_head_dim = 32
qk_rope_head_dim = 32
o_groups = 2
o_lora_rank = 256
# mHC
hc_mult = 4
# V4's experts: 2 shared + 20 routed ones of width 256, 14 routed ones per token; in two blocks chosen by token id
n_shared_experts = 2
n_routed_experts = 20
num_experts_per_tok = 14
moe_intermediate_size = 256
scoring_func = 'sqrtsoftplus'
routed_scaling_factor = 1.5
swiglu_limit = 10.0
num_hash_layers = 2
# Engram: the last 2 and 3 tokens, two tables each, before the second and the fourth block
engram_layers = '1,3'
engram_ngram = 3
engram_heads = 2
engram_rows = 16384
engram_dim = 32
# MTP
num_nextn_predict_layers = 2
mtp_n_layer = 2
eos_token_id = 50256  # closes each document of OpenWebText

max_iters = 20000
lr_decay_iters = 20000
warmup_iters = 700
learning_rate = 6e-4
min_lr = 6e-5
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10
