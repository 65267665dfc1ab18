# The main run continues with V3.2's sparse attention: a query attends to 256 of up to 1,024 positions. Three steps on
# one GPU (for more, torchrun as in config/train_deepseek.py):
#
#   python train.py config/train_deepseek.py                                        # dense attention
#   python train.py config/train_v32.py --init_from=out-deepseek --out_dir=out-v32-warm --index_warmup=True \
#       --learning_rate=1e-3 --max_iters=1000                                       # the indexer alone learns
#   python train.py config/train_v32.py                                             # everything learns, sparsely
#
# 115.6M parameters without the embedding (25.8M, tied to the head), 87.3M active per token, 1.06 GFLOP per token.
# Cache: 288 numbers per token and block. A decoding step reads the indexer's 64 of every token, and the other 224 of
# only 256 tokens.
#
# Hardware: GPUs with bf16. Training computes all positions and masks them. It computes the T x T attention weights a
# second time for the indexer's loss. So batch_size is a third of the main run's. If memory is too small, halve
# batch_size and double gradient_accumulation_steps.
# Expected loss and time: unknown, because nobody has made this run. The rates and the warm-up's length are V3.2's.

architecture = 'model_v4'
init_from = 'out-v32-warm'
out_dir = 'out-v32'
wandb_project = 'owt'
wandb_run_name = 'deepseek-v32-small'

dataset = 'openwebtext'
batch_size = 4
block_size = 1024
gradient_accumulation_steps = 3 * 5 * 8  # 4 * 1,024 * 120 = 491,520 tokens

n_layer = 8
n_head = 8
n_embd = 512
# MLA with an indexer: 192 + 32 + 64 cached numbers per token and layer
q_lora_rank = 256
kv_lora_rank = 192
qk_nope_head_dim = 32
qk_rope_head_dim = 32
v_head_dim = 64
index_topk = 256
index_n_heads = 4
index_head_dim = 64
# DeepSeekMoE and MTP as in the main run
n_shared_experts = 2
n_routed_experts = 20
num_experts_per_tok = 14
moe_intermediate_size = 256
num_nextn_predict_layers = 2
mtp_n_layer = 2
eos_token_id = 50256  # closes each document of OpenWebText

max_iters = 5000
decay_lr = False
warmup_iters = 0
learning_rate = 7.3e-6
weight_decay = 1e-1
mtp_late_from = 0.0  # the dense run has lowered the weight of the MTP loss

eval_interval = 500
eval_iters = 200
log_interval = 10
