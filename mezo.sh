#!/usr/bin/env bash
# MeZO with the recipe of its authors: MODE=ft|prefix|lora|xgblora TASK=SST2 bash mezo.sh [flags of run.py]
#
# MODEL=facebook/opt-1.3b TASK=SST2 MODE=ft SEED=0; DATA_DIR: rows from there and not from the hub; NUM_GPU=n: n ranks;
# paths count from the folder of this file
# TRAIN=1000 DEV=500 EVAL=1000 rows (fewer for CB, Copa and WSC); BS=16 rows a step of each rank; LR, EPS: by mode
# STEPS=20000 EVAL_STEPS=4000 XGBLORA_STEPS=1000; RECIPE=fast|atoms (run.py --help): MODE and XGBLORA_STEPS=25 follow
set -euo pipefail

RECIPE=${RECIPE:-}
[ "$RECIPE" != atoms ] || MODE=${MODE:-lora}
MODE=${MODE:-${RECIPE:+xgblora}}
XGBLORA_STEPS=${XGBLORA_STEPS:-${RECIPE:+25}}
BS=${BS:-16}
STEPS=${STEPS:-20000}
EVAL_STEPS=${EVAL_STEPS:-4000}
EPS=${EPS:-}
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
