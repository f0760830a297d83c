#!/usr/bin/env bash
# The same by back-propagation: MODE=ft|prefix|lora|xgblora TASK=SST2 bash finetune.sh [flags of run.py]
# NUM_GPU=4 starts torchrun: each GPU takes its share of a batch, and holds the whole model, or with --fsdp a part of it.
set -euo pipefail

BS=${BS:-8}
EPOCH=${EPOCH:-5}
XGBLORA_STEPS=${XGBLORA_STEPS:-100}
GPU_DTYPE=bfloat16  # gradients of float16 weights underflow
source "$(dirname "$0")/recipe.sh"
TRAIN=${TRAIN:-${SIZES[0]}}
DEV=${DEV:-${SIZES[1]}}
# Long prompts: one or two rows at a time, the same batch in all.
case "$TASK" in
    MultiRC | ReCoRD | SQuAD) MICRO=2 ;;
    DROP) MICRO=1 ;;
    *) MICRO=$BS ;;
esac
[ "$MICRO" -le "$BS" ] || MICRO=$BS
[ $((BS % MICRO)) = 0 ] || { echo "finetune.sh: BS=$BS is no multiple of the $MICRO rows that $TASK takes at a time" >&2; exit 2; }

echo "MODEL: $MODEL"
echo "TASK: $TASK"
echo "MODE: $MODE"
echo "BS: $BS ($MICRO at a time)"
echo "LR: ${LR:-by mode}"
echo "SEED: $SEED"
echo "TRAIN/DEV/EVAL: $TRAIN/$DEV/$EVAL"
echo "EPOCH: $EPOCH"
echo "DATA_DIR: ${DATA_DIR:-(hub)}"
echo "Extra args: ${TUNE[*]} $*"

exec "${RUN[@]}" run.py "${COMMON[@]}" --tag "finetune-$MODE-$EPOCH-$BS" --trainer regular --seed "$SEED" \
    --train_set_seed "$SEED" --num_train "$TRAIN" --num_dev "$DEV" --per_device_train_batch_size "$MICRO" \
    --gradient_accumulation_steps $((BS / MICRO)) --num_train_epochs "$EPOCH" --logging_steps 10 \
    --eval_strategy epoch --save_strategy epoch --save_total_limit 1 --load_best_model_at_end --save_on_interrupt \
    "${TUNE[@]}" "$@"
