#!/usr/bin/env bash
# MeZO with the recipe of its authors: MODE=ft|lora|xgblora TASK=SST2 MODEL=facebook/opt-1.3b bash mezo.sh [flags of run.py]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

MODEL=${MODEL:-facebook/opt-1.3b}
TASK=${TASK:-SST2}
RECIPE=${RECIPE:-}  # fast: see run.py --help
MODE=${MODE:-${RECIPE:+xgblora}}
MODE=${MODE:-ft}
BS=${BS:-16}
SEED=${SEED:-0}
# Training rows that a task has beside 1,000 + 500; dev never eats them.
case "$TASK" in
    CB) SIZES=(150 100) ;;
    Copa) SIZES=(300 100) ;;
    WSC) SIZES=(454 100) ;;
    *) SIZES=(1000 500) ;;
esac
TRAIN=${TRAIN:-${SIZES[0]}}
DEV=${DEV:-${SIZES[1]}}
EVAL=${EVAL:-1000}
STEPS=${STEPS:-20000}
EVAL_STEPS=${EVAL_STEPS:-4000}
XGBLORA_STEPS=${XGBLORA_STEPS:-${RECIPE:+25}}
XGBLORA_STEPS=${XGBLORA_STEPS:-1000}
DATA_DIR=${DATA_DIR:-}
LR=${LR:-}    # empty: run.py takes the mode's value and prints it
EPS=${EPS:-}

MODE_ARGS=()
# Where candidates are whole phrases or answers are generated, the loss is that of language modelling.
case "$TASK" in
    Copa | ReCoRD | SQuAD | DROP | own) ;;
    *) MODE_ARGS+=(--train_as_classification) ;;
esac
case "$MODE" in
    ft) ;;
    lora) MODE_ARGS+=(--lora) ;;
    xgblora) MODE_ARGS+=(--xgblora --xgblora_steps_per_iteration "$XGBLORA_STEPS") ;;
    prefix) echo "mezo.sh: MODE=prefix is not available yet; there are ft, lora, xgblora" >&2; exit 2 ;;
    *) echo "mezo.sh: unknown MODE '$MODE'; there are ft, lora, xgblora" >&2; exit 2 ;;
esac
[ -z "$LR" ] || MODE_ARGS+=(--learning_rate "$LR")
[ -z "$EPS" ] || MODE_ARGS+=(--zo_eps "$EPS")
[ -z "$RECIPE" ] || MODE_ARGS+=(--recipe "$RECIPE")
[ -z "$DATA_DIR" ] || MODE_ARGS+=(--data_dir "$DATA_DIR")
# Half precision is the fast one on a GPU; on a CPU run.py says which is.
case " $* " in
    *" --load_"*) ;;
    *) ! nvidia-smi > /dev/null 2>&1 || MODE_ARGS+=(--load_float16) ;;
esac

PYTHON=python
[ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python

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
echo "Extra args: ${MODE_ARGS[*]} $*"

exec "$PYTHON" run.py --model_name "$MODEL" --task_name "$TASK" --tag "mezo-$MODE-$STEPS-$BS" \
    --trainer zo --seed "$SEED" --train_set_seed "$SEED" \
    --num_train "$TRAIN" --num_dev "$DEV" --num_eval "$EVAL" --per_device_train_batch_size "$BS" \
    --max_steps "$STEPS" --logging_steps 10 --eval_strategy steps --eval_steps "$EVAL_STEPS" \
    --save_strategy steps --save_steps "$EVAL_STEPS" --save_total_limit 1 --load_best_model_at_end --save_on_interrupt \
    "${MODE_ARGS[@]}" "$@"
