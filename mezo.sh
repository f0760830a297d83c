#!/usr/bin/env bash
# MeZO with the recipe of its authors: MODE=ft|prefix|lora|xgblora TASK=SST2 bash mezo.sh [flags of run.py]
set -euo pipefail

RECIPE=${RECIPE:-}  # fast or atoms: see run.py --help
[ "$RECIPE" != atoms ] || MODE=${MODE:-lora}
MODE=${MODE:-${RECIPE:+xgblora}}
XGBLORA_STEPS=${XGBLORA_STEPS:-${RECIPE:+25}}
XGBLORA_STEPS=${XGBLORA_STEPS:-1000}
BS=${BS:-16}
STEPS=${STEPS:-20000}
EVAL_STEPS=${EVAL_STEPS:-4000}
EPS=${EPS:-}  # this and LR empty: run.py takes the mode's value and prints it
source "$(dirname "$0")/recipe.sh"
TRAIN=${TRAIN:-${SIZES[0]}}
DEV=${DEV:-${SIZES[1]}}
[ -z "$EPS" ] || TUNE+=(--zo_eps "$EPS")
[ -z "$RECIPE" ] || TUNE+=(--recipe "$RECIPE")

echo "MODEL: $MODEL"
echo "TASK: $TASK"
echo "MODE: $MODE"
echo "BS: $BS"
echo "LR: ${LR:-by mode}"
echo "EPS: ${EPS:-by mode}"
echo "SEED: $SEED"
echo "TRAIN/DEV/EVAL: $TRAIN/$DEV/$EVAL"
echo "TRAIN/EVAL STEPS: $STEPS/$EVAL_STEPS"
[ "$MODE" != xgblora ] || echo "XGBLORA_STEPS: $XGBLORA_STEPS"
[ -z "$RECIPE" ] || echo "RECIPE: $RECIPE"
echo "DATA_DIR: ${DATA_DIR:-(hub)}"
echo "Extra args: ${TUNE[*]} $*"

exec "${RUN[@]}" run.py "${COMMON[@]}" --tag "mezo-$MODE-$STEPS-$BS" --trainer zo --seed "$SEED" \
    --train_set_seed "$SEED" --num_train "$TRAIN" --num_dev "$DEV" --per_device_train_batch_size "$BS" \
    --max_steps "$STEPS" --logging_steps 10 --eval_strategy steps --eval_steps "$EVAL_STEPS" \
    --save_strategy steps --save_steps "$EVAL_STEPS" --save_total_limit 1 --load_best_model_at_end --save_on_interrupt \
    "${TUNE[@]}" "$@"
