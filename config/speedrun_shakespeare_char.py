# The fastest run found that reaches nanoGPT's laptop val loss (1.8857 in 62 to 72 s): tiny Shakespeare, characters.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/speedrun_shakespeare_char.py
#   python train.py config/speedrun_shakespeare_char.py --n_layer=3 --n_head=3 --n_embd=96 --learning_rate=1e-2 \
#       --max_iters=1450 --lr_decay_iters=1450    # in 1.2 times nanoGPT's whole time
#
# Hardware: two CPU cores. Expected: val loss 1.86 to 1.89 in 12 s; with the second command 1.58 in 75 s.
# The model has MLA and Muon, but a dense FFN and no MTP modules: at this size such a model learns fastest. The
# settings were chosen on the last tenth of the training split, without training on it.

out_dir = 'out-speedrun'
eval_interval = 10000  # evaluate only at the end
eval_iters = 40
log_interval = 20
wandb_project = 'speedrun'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 32
block_size = 64

n_layer = 2
n_head = 2
n_embd = 64
n_routed_experts = 0
num_nextn_predict_layers = 0

optimizer = 'muon'
learning_rate = 2e-2
min_lr = 0.0
warmup_iters = 10
max_iters = 340
lr_decay_iters = 340
beta2 = 0.99

device = 'cpu'
dtype = 'float32'  # at this size bf16 is slower
compile = False  # compiling takes longer than the run
