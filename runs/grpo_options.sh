#!/usr/bin/env bash
# What V3.2 and V4 add to GRPO, with and without each part: the countdown game, three seeds, two CPU cores, some hours.
#
#   bash runs/grpo_options.sh
#
# Every model is measured at the end on the 1,000 test prompts. Figures: out-options/*.png. The logs' `mismatch` and
# `routing_mismatch` tell how far rollout and training are apart, before and after replay.
set -euo pipefail
cd "$(dirname "$0")/.."
seeds="${SEEDS:-1337 1 2}"
mkdir -p out-options

sft() { python train.py config/sft_countdown.py "$@"; }
grpo() { python grpo.py config/grpo_countdown.py "$@"; }

declare -A options=(
    [plain]=""
    [bf16]="--dtype=bfloat16"
    [bf16-replay]="--dtype=bfloat16 --replay_routing=True"
    [bf16-rollout]="--dtype=bfloat16 --old_logp=rollout"
    [topk]="--top_k=5"
    [topk-mask]="--top_k=5 --keep_sampling_mask=True"
    [mu4]="--mu=4"
    [mu4-drift]="--mu=4 --mask_drift=0.05"
    [kl]="--kl_coef=0.05"
    [kl-unbiased]="--kl_coef=0.05 --unbiased_kl=True"
    [truncated]="--truncated=mask"
)
pairs="bf16:bf16-replay bf16:bf16-rollout topk:topk-mask mu4:mu4-drift kl:kl-unbiased plain:truncated"

# one cold start, because it alone makes more difference than an option; then each option with each seed
python data/countdown/prepare.py
sft
for seed in $seeds; do
    for name in "${!options[@]}"; do
        grpo ${options[$name]} --seed=$seed --out_dir=out-options/$name-$seed
    done
done
for pair in $pairs; do
    for name in ${pair/:/ }; do
        for seed in $seeds; do echo out-options/$name-$seed/log.jsonl; done
    done | xargs python plot.py --out=out-options/${pair/:/-}.png
done

# a smaller student: on the teacher's accepted responses (R1), and on its own with the teacher's KL (V4)
prepare_arithmetic() { python data/arithmetic/prepare.py "$@"; }
arithmetic=(config/grpo_arithmetic.py --dataset=arithmetic/add3)
student=(config/sft_arithmetic.py --n_layer=1 --n_embd=64)
prepare_arithmetic
python train.py config/sft_arithmetic.py --out_dir=out-options/teacher-start
python grpo.py "${arithmetic[@]}" --init_from=out-options/teacher-start --out_dir=out-options/teacher
python grpo.py "${arithmetic[@]}" --init_from=out-options/teacher --traces=out-options/accepted.txt
prepare_arithmetic --traces=out-options/accepted.txt --name=add3-accepted
for seed in $seeds; do
    python train.py "${student[@]}" --seed=$seed --out_dir=out-options/student-$seed
    python train.py "${student[@]}" --seed=$seed --dataset=arithmetic/add3-accepted --max_iters=2000 \
        --lr_decay_iters=2000 --out_dir=out-options/traced-$seed
    python grpo.py "${arithmetic[@]}" --seed=$seed --init_from=out-options/student-$seed \
        --teacher=out-options/teacher --max_iters=300 --out_dir=out-options/taught-$seed
done

# two tasks at once
python data/countdown/prepare.py --sums=3000 --name=mixed
sft --dataset=countdown/mixed --max_iters=1000 --lr_decay_iters=1000 --out_dir=out-options/mixed-start
for seed in $seeds; do
    grpo --seed=$seed --init_from=out-options/mixed-start --dataset=countdown/mixed,arithmetic/add3 \
        --reward_file=data/countdown/reward.py,data/arithmetic/reward.py --out_dir=out-options/mixed-$seed
done

# drafts after reinforcement learning, with and without training the MTP modules
sft --num_nextn_predict_layers=2 --out_dir=out-options/drafts-start
for train_mtp in False True; do
    grpo --init_from=out-options/drafts-start --train_mtp=$train_mtp --out_dir=out-options/drafts-$train_mtp
    echo "drafts, train_mtp=$train_mtp: $(python sample.py --out_dir=out-options/drafts-$train_mtp --device=cpu \
        --speculative=True --start='17,23,11:17=' --num_samples=20 --max_new_tokens=60 | grep -i draft)"
done

measure() { python grpo.py "$@" --eval_only=True --eval_split=test | tail -n 1; }
for seed in $seeds; do
    for name in "${!options[@]}"; do
        echo "$name, seed $seed: $(measure config/grpo_countdown.py --init_from=out-options/$name-$seed \
            --out_dir=out-options/$name-$seed)"
    done
    for name in traced taught; do
        echo "$name, seed $seed: $(measure "${arithmetic[@]}" --init_from=out-options/$name-$seed \
            --out_dir=out-options/$name-$seed)"
    done
done
