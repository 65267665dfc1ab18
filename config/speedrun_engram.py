# The speedrun with a conditional memory (Engram, arXiv 2601.07372): tables that the last characters look up.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/speedrun_engram.py                                             # past nanoGPT's 1.8857
#   python train.py config/speedrun_engram.py --max_iters=340 --lr_decay_iters=340        # as long as the speedrun
#
# Hardware: two CPU cores. Expected: val loss 1.84 to 1.85 (seeds 1337, 1, 2: 1.850, 1.837, 1.851); with the second
# command about 1.62. A slow AMD EPYC took 14 s of one core's time for the first command (9 of them for Python's start
# and the two evaluations), and 44 s for config/speedrun_shakespeare_char.py.
# The settings were chosen on the last tenth of the training split, without training on it: one block instead of two,
# larger tables, and as many iterations as reached the loss of two blocks after 120. In longer runs the tables learn
# the training text by heart: see docs/after_v3.md.

out_dir = 'out-speedrun-engram'
eval_interval = 10000  # evaluate only at the end
eval_iters = 40
log_interval = 20
wandb_project = 'speedrun'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 32
block_size = 64

n_layer = 1
n_head = 2
n_embd = 64
n_routed_experts = 0
num_nextn_predict_layers = 0

architecture = 'model_v4'
engram_layers = '0'
engram_ngram = 5  # tables of the last 2, 3, 4 and 5 characters
engram_heads = 2  # two for each of these lengths
engram_rows = 16384
engram_conv = False  # so short a run does not learn it

optimizer = 'muon'
learning_rate = 2e-2
min_lr = 0.0
warmup_iters = 5
max_iters = 70
lr_decay_iters = 70
beta2 = 0.99

device = 'cpu'
dtype = 'float32'  # at this size bf16 is slower
compile = False  # compiling takes longer than the run
