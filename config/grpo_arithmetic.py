# GRPO on 3-digit addition, from the cold start of config/sft_arithmetic.py.
#
#   python grpo.py config/grpo_arithmetic.py
#   torchrun --standalone --nproc_per_node=2 grpo.py config/grpo_arithmetic.py
#
# Hardware: two CPU cores. Expected: from 46% of the held-out sums to 98% or 99% in five minutes and a half (seed 1337;
# from 36% to 93%, and from 27% to 89%, with seeds 1 and 3).

init_from = 'out-sft-arithmetic'
out_dir = 'out-grpo-arithmetic'
dataset = 'arithmetic/add3'
eval_interval = 20
eval_prompts = 1000
wandb_project = 'arithmetic'

max_new_tokens = 32
prompts_per_iter = 32
group_size = 16
drop_zero_advantage = True  # a third to a half of the groups: all right, or all wrong
batch_size = 512

learning_rate = 2.5e-4
warmup_iters = 20
max_iters = 500

device = 'cpu'
