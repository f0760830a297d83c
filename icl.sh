#!/usr/bin/env bash
# In-context learning, nothing trained: TASK=SST2 TRAIN=32 bash icl.sh [flags of run.py]; TRAIN=0 is zero-shot.
# Without SEED every example gets demonstrations of its own; with it all share one set, which is encoded once.
set -euo pipefail

SETS=${SEED:+--train_set_seed $SEED}
source "$(dirname "$0")/recipe.sh"
TRAIN=${TRAIN:-32}

echo "MODEL: $MODEL"
echo "TASK: $TASK"
echo "TRAIN/EVAL: $TRAIN/$EVAL"
echo "DEMONSTRATIONS: ${SETS:-each example its own}"
echo "DATA_DIR: ${DATA_DIR:-(hub)}"
echo "Extra args: $*"

exec "${RUN[@]}" run.py "${COMMON[@]}" --tag "icl-$TRAIN" --trainer none --num_train "$TRAIN" $SETS "$@"
