# GRPO on the countdown game, from the cold start of config/sft_countdown.py.
#
#   python grpo.py config/grpo_countdown.py
#   torchrun --standalone --nproc_per_node=2 grpo.py config/grpo_countdown.py
#
# docs/grpo.md has two tasks at once.
#
# Hardware: two CPU cores. Expected: the model slowly wins more of the held-out games. A shorter run on a busy machine
# went from 19% to 25% in 30 iterations.

init_from = 'out-sft-countdown'
out_dir = 'out-grpo-countdown'
dataset = 'countdown/three'
reward_file = 'data/countdown/reward.py'
eval_interval = 10
eval_prompts = 1000
wandb_project = 'countdown'

max_new_tokens = 60
prompts_per_iter = 32
group_size = 32
drop_zero_advantage = True

learning_rate = 3e-4
warmup_iters = 10
max_iters = 300

device = 'cpu'
