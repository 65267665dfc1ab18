# GRPO on 3-digit addition, from the cold start of config/sft_arithmetic.py.
#
#   python grpo.py config/grpo_arithmetic.py
#   torchrun --standalone --nproc_per_node=2 grpo.py config/grpo_arithmetic.py
#
# Hardware: two CPU cores. Expected: a third to two thirds of the held-out sums are right at first, 98% after 30 s, and
# 98.5 to 100% at the end, after 70 to 124 seconds.

init_from = 'out-sft-arithmetic'
out_dir = 'out-grpo-arithmetic'
dataset = 'arithmetic/add3'
eval_interval = 5
eval_prompts = 1000
wandb_project = 'arithmetic'

max_new_tokens = 32
prompts_per_iter = 32
group_size = 16
drop_zero_advantage = True  # at the end, all responses are right in half of the groups

learning_rate = 2.5e-4
warmup_iters = 10
max_iters = 100

device = 'cpu'
