# GRPO on the countdown game, from the cold start of config/sft_countdown.py.
#
#   python grpo.py config/grpo_countdown.py
#   torchrun --standalone --nproc_per_node=2 grpo.py config/grpo_countdown.py
#
# docs/grpo.md has two tasks at once.
#
# Hardware: two CPU cores. Expected: the model slowly wins more games. On a busy machine its sampled answers went from
# 22% to 24% right in 50 iterations.

init_from = 'out-sft-countdown'
out_dir = 'out-grpo-countdown'
dataset = 'countdown/three'
reward_file = 'data/countdown/reward.py'
eval_interval = 20
eval_prompts = 1000
wandb_project = 'countdown'

max_new_tokens = 72
prompts_per_iter = 16
group_size = 16
format_weight = 0.0  # a reward for the form teaches short, wrong answers
drop_zero_advantage = True

learning_rate = 1e-4
warmup_iters = 10
max_iters = 300

device = 'cpu'
