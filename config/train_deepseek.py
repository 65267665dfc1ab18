# The main run: a small DeepSeek-V3 on OpenWebText, 491,520 tokens per iteration at 1,024 context.
# 8 main blocks and 2 MTP modules of 2 blocks. 114.4M parameters without the embedding (25.8M, tied to the head), 86.1M
# active per token; per block 9.45M, 7.09M active.
#
#   python data/openwebtext/prepare.py
#   python train.py config/train_deepseek.py                                        # one GPU
#   torchrun --standalone --nproc_per_node=8 train.py config/train_deepseek.py      # eight
#   torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=29500 \
#       train.py config/train_deepseek.py                     # two machines; the second one with --node_rank=1
#
# Hardware: GPUs with bf16. If memory is too small, halve batch_size and double gradient_accumulation_steps.
# Expected loss and time: unknown, because nobody has made this run. It takes 1.05 GFLOP per token, 1.0e19 in all: eight
# hours on one H100 at 35% of its peak.

out_dir = 'out-deepseek'
wandb_project = 'owt'
wandb_run_name = 'deepseek-114M'

dataset = 'openwebtext'
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8  # 12 * 1,024 * 40 = 491,520 tokens

n_layer = 8
n_head = 8
n_embd = 512
# MLA: 192 + 32 cached numbers per token and layer; the keys and values of 8 heads would be 1,024
q_lora_rank = 256
kv_lora_rank = 192
qk_nope_head_dim = 32
qk_rope_head_dim = 32
v_head_dim = 64
# DeepSeekMoE: 2 shared + 20 routed experts of width 256, 14 routed ones per token
n_shared_experts = 2
n_routed_experts = 20
num_experts_per_tok = 14
moe_intermediate_size = 256
# MTP
num_nextn_predict_layers = 2
mtp_n_layer = 2
eos_token_id = 50256  # closes each document of OpenWebText

# 9.8 billion tokens drawn at random: 1.1 times the size of OpenWebText
max_iters = 20000
lr_decay_iters = 20000
warmup_iters = 700
learning_rate = 6e-4
min_lr = 6e-5
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10
