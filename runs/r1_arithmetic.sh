#!/usr/bin/env bash
# R1's pipeline in small (arXiv 2501.12948), on 3-digit addition, two CPU cores: about 20 minutes.
#
#   bash runs/r1_arithmetic.sh
#
# Every model is measured at the end on the 1,000 test prompts, which nothing was trained or chosen on.
set -euo pipefail
cd "$(dirname "$0")/.."

prepare() { python data/arithmetic/prepare.py "$@"; }
sft() { python train.py config/sft_arithmetic.py "$@"; }
grpo() { python grpo.py config/grpo_arithmetic.py "$@"; }
accuracy() { grpo --init_from="$1" --out_dir="$1-test" --eval_only=True --eval_split=test | tail -n 1; }

# R1: cold start, GRPO, rejection-sampled SFT from scratch, GRPO
prepare
sft
grpo
grpo --init_from=out-grpo-arithmetic --traces=out-grpo-arithmetic/accepted.txt
prepare --traces=out-grpo-arithmetic/accepted.txt --name=add3-accepted
sft --dataset=arithmetic/add3-accepted --out_dir=out-sft2-arithmetic
grpo --init_from=out-sft2-arithmetic --out_dir=out-grpo2-arithmetic

# R1-Zero: the cold start shows the form of an answer and no work; what comes between < and > is left to GRPO
prepare --style=answer --name=add3-answer --length=40 --examples=5000
sft --dataset=arithmetic/add3-answer --max_iters=1000 --lr_decay_iters=1000 --out_dir=out-sft-zero
grpo --init_from=out-sft-zero --out_dir=out-grpo-zero

# SFT alone, on the cold start's data, for the time of the cold start and of GRPO together
sft --max_iters=4000 --lr_decay_iters=4000 --out_dir=out-sft-longer
grpo --init_from=out-sft-longer --out_dir=out-sft-alone --eval_only=True
python plot.py out-grpo-arithmetic/log.jsonl out-sft-alone/log.jsonl

# distillation: a smaller student on the teacher's accepted responses; the same student by RL
student=(--n_layer=1 --n_embd=64)
sft "${student[@]}" --dataset=arithmetic/add3-accepted --max_iters=2000 --lr_decay_iters=2000 --out_dir=out-student-distilled
sft "${student[@]}" --max_iters=600 --lr_decay_iters=600 --out_dir=out-student-cold
grpo --init_from=out-student-cold --out_dir=out-student-grpo

for run in sft-arithmetic grpo-arithmetic sft2-arithmetic grpo2-arithmetic sft-zero grpo-zero sft-longer \
           student-distilled student-cold student-grpo; do
    echo "$run: $(accuracy out-$run)"
done
