# nanoGPT's GPT-2 run (12 blocks of 768, OpenWebText, 491,520 tokens per iteration) with DeepSeek's blocks.
#
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
#
# Hardware: eight GPUs of 40 GB or more. Expected loss and time: unknown, because nobody has made this run.

wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-deepseek'

batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
