#!/usr/bin/env bash
# What FP8 costs in loss: bf16 against FP8 with tiles, with one scale a tensor, and with E5M2 gradients, and against fp32,
# which tells how far two runs drift apart for no reason but rounding. Three seeds, two CPU cores: about 30 minutes.
#
#   bash runs/fp8_losses.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

run() {  # name, seed, flags
    python train.py config/demo.py --n_layer=2 --num_nextn_predict_layers=0 --batch_size=8 --block_size=64 \
        --max_iters=1500 --lr_decay_iters=1500 --learning_rate=6e-4 --min_lr=6e-5 --eval_interval=1500 \
        --log_interval=1 --dtype=bfloat16 --seed="$2" --out_dir="out-$1-$2" "${@:3}"
}

python data/pydocs_char/prepare.py
for seed in 1337 1 2; do
    { run bf16 $seed; run fp32 $seed --dtype=float32; run e5m2 $seed --fp8=True --fp8_grad=e5m2; } &
    { run tile $seed --fp8=True; run tensor $seed --fp8=True --fp8_scaling=tensor; } &
    wait
done
python plot.py out-{fp32,tile,tensor,e5m2}-{1337,1,2}/log.jsonl --relative_to out-bf16-{1337,1,2}/log.jsonl \
    --out=out-tile-1337/fp8.png
