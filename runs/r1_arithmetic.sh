#!/usr/bin/env bash
# R1's pipeline in small (arXiv 2501.12948), on 3-digit addition, two CPU cores: about 40 minutes.
#
#   bash runs/r1_arithmetic.sh
#
# Every model is measured at the end on the 1,000 test prompts, which none was trained on.
set -euo pipefail
cd "$(dirname "$0")/.."

prepare() { python data/arithmetic/prepare.py "$@"; }
sft() { python train.py config/sft_arithmetic.py "$@"; }
grpo() { python grpo.py config/grpo_arithmetic.py "$@"; }

# R1: cold start, GRPO, rejection-sampled SFT from scratch, GRPO
prepare
sft
grpo
grpo --init_from=out-grpo-arithmetic --traces=out-grpo-arithmetic/accepted.txt
prepare --traces=out-grpo-arithmetic/accepted.txt --name=add3-accepted
sft --dataset=arithmetic/add3-accepted --out_dir=out-sft2-arithmetic
grpo --init_from=out-sft2-arithmetic --out_dir=out-grpo2-arithmetic

# two more seeds, and SFT alone on the cold start's data, for the time of the cold start and of GRPO together
for seed in 1 2; do
    sft --seed=$seed --out_dir=out-sft-seed$seed
    grpo --seed=$seed --init_from=out-sft-seed$seed --out_dir=out-grpo-seed$seed
done
sft --max_iters=2000 --lr_decay_iters=2000 --out_dir=out-sft-longer
grpo --init_from=out-sft-longer --out_dir=out-sft-longer --eval_only=True
python plot.py out-grpo-arithmetic/log.jsonl out-grpo-seed{1,2}/log.jsonl out-sft-longer/eval.jsonl --out=out-grpo-arithmetic/grpo.png

# R1-Zero: the cold start shows the form of an answer and no work; what comes between < and > is left to GRPO
prepare --terse=1 --name=add3-answer --length=40
sft --dataset=arithmetic/add3-answer --out_dir=out-sft-zero
grpo --init_from=out-sft-zero --out_dir=out-grpo-zero --max_iters=300

# distillation: a smaller student on the teacher's accepted responses; the same student by RL
student=(--n_layer=1 --n_embd=64)
sft "${student[@]}" --dataset=arithmetic/add3-accepted --max_iters=2000 --lr_decay_iters=2000 --out_dir=out-student-distilled
sft "${student[@]}" --out_dir=out-student-cold
grpo --init_from=out-student-cold --out_dir=out-student-grpo --max_iters=300

# other tasks
for task in add4 sub3 sort6; do
    prepare --task=$task --length=56
    sft --dataset=arithmetic/$task --block_size=56 --out_dir=out-sft-$task
    grpo --dataset=arithmetic/$task --max_new_tokens=44 --init_from=out-sft-$task --out_dir=out-grpo-$task
done

measure() {  # the folder of a model, and of its task's data
    grpo --init_from=$1 --out_dir=$1 --eval_only=True --eval_split=test --dataset=arithmetic/$2 "${@:3}" | tail -n 1
}
for run in sft-arithmetic grpo-arithmetic sft2-arithmetic grpo2-arithmetic sft-seed1 grpo-seed1 sft-seed2 grpo-seed2 \
           sft-longer sft-zero grpo-zero student-distilled student-cold student-grpo; do
    echo "$run: $(measure out-$run add3)"
done
for task in add4 sub3 sort6; do
    for run in sft-$task grpo-$task; do
        echo "$run: $(measure out-$run $task --max_new_tokens=44)"
    done
done
