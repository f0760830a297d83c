# What mezo.sh, finetune.sh and icl.sh share; sourced by them. Environment variables in, words for run.py out:
# COMMON (model, task, rows to evaluate), TUNE (mode and loss), RUN (the program that starts run.py).
cd "$(dirname "${BASH_SOURCE[0]}")"
NAME=$(basename "$0")
case "${BS:-1}" in *[!0-9]* | 0) echo "$NAME: BS=$BS is no number of rows" >&2; exit 2 ;; esac

MODEL=${MODEL:-facebook/opt-1.3b}
TASK=${TASK:-SST2}
SEED=${SEED:-0}
XGBLORA_STEPS=${XGBLORA_STEPS:-1000}
EVAL=${EVAL:-1000}
DATA_DIR=${DATA_DIR:-}
# Training rows that a task has beside 1,000 + 500; dev never eats them.
case "$TASK" in
    CB) SIZES=(150 100) ;;
    Copa) SIZES=(300 100) ;;
    WSC) SIZES=(454 100) ;;
    *) SIZES=(1000 500) ;;
esac

COMMON=(--model_name "$MODEL" --task_name "$TASK" --num_eval "$EVAL")
[ -z "$DATA_DIR" ] || COMMON+=(--data_dir "$DATA_DIR")
# Half precision is the fast one on a GPU; on a CPU run.py says which is.
case " $* " in
    *" --load_float16"* | *" --load_bfloat16"* | *" --load_int"*) ;;
    *) ! nvidia-smi > /dev/null 2>&1 || COMMON+=(--load_"${GPU_DTYPE:-float16}") ;;
esac

TUNE=()
# Where candidates are whole phrases or answers are generated, the loss is that of language modelling.
case "$TASK" in
    Copa | ReCoRD | SQuAD | DROP | own) ;;
    *) TUNE+=(--train_as_classification) ;;
esac
case "${MODE:=ft}" in
    ft) ;;
    prefix) TUNE+=(--prefix_tuning --num_prefix 5 --no_reparam --prefix_init_by_real_act) ;;
    lora) TUNE+=(--lora) ;;
    xgblora) TUNE+=(--xgblora --xgblora_steps_per_iteration "$XGBLORA_STEPS") ;;
    *) echo "$NAME: unknown MODE '$MODE'; there are ft, prefix, lora, xgblora" >&2; exit 2 ;;
esac
[ -z "${LR:=}" ] || TUNE+=(--learning_rate "$LR")

PYTHON=python
[ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
RUN=("$PYTHON")
[ "${NUM_GPU:-1}" = 1 ] || RUN=("$PYTHON" -m torch.distributed.run --nproc_per_node "$NUM_GPU")
