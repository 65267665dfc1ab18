# A character-level model of Shakespeare, at nanoGPT's sizes (6 blocks of 384, context 256).
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char.py
#
# Hardware: one GPU. Expected loss and time: unknown, because nobody has made this run. On a laptop's CPU, train the
# smaller model (expected: val loss 1.59 in 166 seconds on two cores):
#   python train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 \
#       --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 \
#       --dropout=0.0

out_dir = 'out-shakespeare-char'
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # ckpt.pt is the best one: this model overfits

wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-deepseek'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
