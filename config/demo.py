# The demo: learns Python's documentation, character by character, on a laptop's CPU. `make demo` runs it.
#
#   python data/pydocs_char/prepare.py
#   python train.py config/demo.py
#   python sample.py --out_dir=out-demo --start="The for statement"
#
# Hardware: two CPU cores. Expected: val loss 1.34 to 1.36 in one and a half to three minutes.

out_dir = 'out-demo'
eval_interval = 100
eval_iters = 20
log_interval = 10
wandb_project = 'demo'

dataset = 'pydocs_char'
gradient_accumulation_steps = 1
batch_size = 12
block_size = 128

n_layer = 4
n_head = 4
n_embd = 128

learning_rate = 2e-3
min_lr = 2e-4
max_iters = 500
lr_decay_iters = 500
warmup_iters = 50
beta2 = 0.99

device = 'cpu'
compile = False  # compiling takes longer than it would save here
