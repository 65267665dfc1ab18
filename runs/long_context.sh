#!/usr/bin/env bash
# The losses of docs/after_v3.md's "Long contexts": three models of 4,096 tokens on Python's standard library, one with
# MLA, the same with an indexer, and one with V4's attention; then their loss by position. Nothing is tuned. More
# than an hour on one core; the masks of 16,384 tokens need 8 GB.
#
#   bash runs/long_context.sh
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p out-long/python
cp "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"/*.py out-long/python
python data/shakespeare_char/prepare.py --input=out-long/python --glob='*.py' --vocab=2048 --name=python

run="python train.py config/speedrun_shakespeare_char.py --dataset=python --block_size=4096 --batch_size=1 --n_layer=3
  --n_embd=128 --learning_rate=1e-2 --max_iters=200 --lr_decay_iters=200 --eval_iters=8"
v32='--architecture=model_v4 --index_topk=512 --index_head_dim=32'
$run --out_dir=out-long/mla
# the indexer alone learns for 30 iterations, then the whole model with the rows that it chooses, for 10
$run --out_dir=out-long/warm $v32 --init_from=out-long/mla --index_warmup=True --optimizer=adamw --decay_lr=False \
  --max_iters=30
$run --out_dir=out-long/v32 $v32 --init_from=out-long/warm --learning_rate=1e-4 --decay_lr=False --max_iters=10
$run --out_dir=out-long/v4 --architecture=model_v4 --layer_types=sch --index_topk=128 --index_head_dim=32
for length in 1024 4096 16384; do
  models='out-long/mla out-long/v32'
  if [ $length != 16384 ]; then models="$models out-long/v4"; fi  # V4's scores of 16k x 16k for each head are too large
  python runs/positions.py $models --data=python --length=$length --windows=8 --out=out-long/$length.png
done
