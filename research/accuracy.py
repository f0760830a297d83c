"""The accuracy of the methods on a real model, with seeds: runs `run.py` over a grid and prints a table.

    python research/accuracy.py table --task SST2 --data_dir DIR --seeds 0 1 2    # on validation rows
    python research/accuracy.py demo --seeds 0 1 2    # B only on all layers, its control
    python research/accuracy.py search    # rates and ε, on 500 dev rows
    python research/accuracy.py merges --task SST2 --data_dir DIR    # with merges and without, likewise

One process a core with one thread each, weights in bfloat16 where the CPU has it. A run whose result file
exists is not repeated, so a grid that was killed goes on. The control is the same run on training rows whose
labels are shuffled.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tqdm import tqdm

import run
from machine import resources
from scoring.metrics import best_threshold_accuracy

OUT = ROOT / "result" / "accuracy"
LORA = "--trainer zo --lora"
R1 = "--trainer zo --lora --lora_r 1"
XGBLORA = "--trainer zo --xgblora"
XGBLORA_B = "--trainer zo --xgblora --lora_freeze_a --zo_normalize"
REGULAR = "--max_steps 300 --learning_rate 1e-3 --per_device_train_batch_size 16"


def settings(
    rate: float | None = None, eps: float | None = None, rounds: int = 0, steps: int = 400, batch: int = 16
) -> str:
    """Return the flags of a run's length, rate, ε and steps of a round; None and 0 leave a flag out."""
    flags = f"--max_steps {steps} --per_device_train_batch_size {batch}"
    for name, value in (("learning_rate", rate), ("zo_eps", eps), ("xgblora_steps_per_iteration", rounds)):
        flags += f" --{name} {value}" if value else ""
    return flags


def search_grid() -> dict[str, str]:
    """Return the arms of `search`: rates, ε, steps of a round and batches, at 3,600 sentences."""
    choices = (  # rate, ε, steps of a round, batch
        (3e-3, 3e-2, 25, 16), (6e-3, 3e-2, 25, 16), (1.2e-2, 3e-2, 25, 16), (8e-3, 3e-2, 10, 16),
        (8e-3, 3e-2, 50, 16), (8e-3, 1e-1, 25, 16), (8e-3, 3e-2, 25, 32), (6e-3, 3e-2, 25, 8),
        (4e-3, 3e-2, 25, 8), (6e-3, 1.5e-2, 25, 8), (6e-3, 3e-2, 10, 8), (6e-3, 3e-2, 50, 8),
        (3e-3, 3e-2, 50, 4), (5e-3, 3e-2, 50, 4),
    )  # fmt: skip
    grid = {}
    for rate, eps, rounds, batch in choices:
        name = f"XGBLoRA B normalised, η {rate:g}, ε {eps:g}, rounds of {rounds}, batch {batch}"
        grid[name] = f"{XGBLORA_B} {settings(rate, eps, rounds, 3600 // batch, batch)}"
    return grid


def merge_grid() -> dict[str, str]:
    """Return the arms of `merges`: A and B or B alone, with merges and without, in 300 steps of 16 rows."""
    b_only = f"{R1} --lora_freeze_a --zo_normalize"
    return {
        "LoRA r 8, η 5e-5 (published)": f"{LORA} {settings(5e-5, 1e-2, steps=300)}",
        "LoRA r 8, η 7e-4": f"{LORA} {settings(7e-4, 1e-2, steps=300)}",
        "LoRA r 1, η 3e-4, no merge": f"{R1} {settings(3e-4, 1e-2, steps=300)}",
        "XGBLoRA, η 3e-4, rounds of 100": f"{XGBLORA} {settings(3e-4, 1e-2, 100, steps=300)}",
        "XGBLoRA, η 1e-4, rounds of 100": f"{XGBLORA} {settings(1e-4, 1e-2, 100, steps=300)}",
        "LoRA r 1 B normalised, η 6e-3, no merge": f"{b_only} {settings(6e-3, 3e-2, steps=300)}",
        "XGBLoRA B normalised, η 6e-3, rounds of 100": f"{XGBLORA_B} {settings(6e-3, 3e-2, 100, steps=300)}",
        "XGBLoRA B normalised, η 6e-3, rounds of 25": f"{XGBLORA_B} {settings(6e-3, 3e-2, 25, steps=300)}",
    }


def table_grid() -> dict[str, str]:
    """Return the arms of `table`: the methods."""
    return {
        "MeZO-XGBLoRA, B normalised": f"{XGBLORA_B} {settings(rounds=25)}",
        "MeZO-LoRA r 8, published rate": f"{LORA} {settings()}",
        "first-order LoRA r 8": f"--trainer regular --lora {REGULAR}",
        "first-order XGBLoRA": f"--trainer regular --xgblora --xgblora_steps_per_iteration 100 {REGULAR}",
        "MeZO-XGBLoRA, A and B": f"{XGBLORA} {settings(rounds=100)}",
        "MeZO-LoRA r 8, η 7e-4": f"{LORA} {settings(7e-4)}",
    }


def demo_grid(task: str, data_dir: Path) -> dict[str, str]:
    """Return the arms of `demo`, with the control on shuffled labels."""
    shuffled = OUT / "shuffled"
    shuffle_labels(data_dir / task, shuffled / task)
    flags = settings(rounds=25, steps=450, batch=8)
    return {
        "MeZO-LoRA r 8, published rate": f"{LORA} {settings(steps=450, batch=8)}",
        "MeZO-XGBLoRA, B normalised": f"{XGBLORA_B} {flags}",
        "the same on shuffled labels": f"{XGBLORA_B} {flags} --data_dir {shuffled}",
    }


def shuffle_labels(source: Path, target: Path) -> None:
    """Write a copy of a task's folder whose training rows have shuffled labels."""
    target.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in (source / "train.jsonl").read_text().splitlines()]
    labels = [row["label"] for row in rows]
    random.Random(0).shuffle(labels)
    lines = [json.dumps({**row, "label": label}) + "\n" for row, label in zip(rows, labels, strict=True)]
    (target / "train.jsonl").write_text("".join(lines))
    (target / "validation.jsonl").write_bytes((source / "validation.jsonl").read_bytes())


def common_flags(args, seed: int) -> list[str]:
    """Return the flags that all runs share."""
    dtype = ["--load_bfloat16"] if resources.cpu_has_bf16() else []
    source = ["--model_name", args.model_name, "--data_dir", str(args.data_dir), "--task_name", args.task]
    return [*source, "--seed", str(seed), "--disable_tqdm", "True", *dtype]


def run_arm(args, name: str, flags: str, seed: int) -> dict:
    """Return the result of an arm with a seed; {} where the run failed. A result file is not made anew."""
    label = "".join(c if c.isalnum() or c in ".-" else "_" for c in name)
    path = OUT / f"{args.task}-{label}-seed{seed}.json"
    if not path.exists():
        command = [sys.executable, "run.py", *common_flags(args, seed), "--result_file", str(path)]
        command += ["--num_train", "1000", "--train_as_classification", "--save_strategy", "no"]
        command += ["--output_dir", str(path.with_suffix("")), *flags.split()]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with open(path.with_suffix(".log"), "w") as log:
            subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False)
    return json.loads(path.read_text()) if path.exists() else {}


def print_zero_shot(args) -> None:
    """Print the accuracy of the model without training, and at the best threshold of its scores."""
    task = run.get_task(args.task, args.data_dir)
    framework = run.Framework(run.parse(common_flags(args, 0)), task)
    samples = task.sample_subset("validation", 0, sys.maxsize)
    framework.load()
    scores = framework.evaluator.score(framework.eval_batch(samples))
    margins = [positive - negative for negative, positive in scores]
    golds = [sample.correct_candidate for sample in samples]
    accuracy = 100 * fmean((m > 0) == gold for m, gold in zip(margins, golds, strict=True))
    bound = 100 * best_threshold_accuracy(margins, golds)
    print(f"zero-shot {accuracy:.1f}, at the best threshold {bound:.1f}")


def choose_arms(args) -> dict[str, str]:
    """Return {name: flags} of the grid that the command line names."""
    if args.grid in ("search", "merges"):
        arms = search_grid() if args.grid == "search" else merge_grid()
        arms = {name: f"{flags} --num_dev 500 --no_eval" for name, flags in arms.items()}
    else:
        arms = table_grid() if args.grid == "table" else demo_grid(args.task, args.data_dir)
    return {name: flags for name, flags in arms.items() if args.only in name}


def print_arm(name: str, results: list[dict]) -> None:
    """Print the means of an arm over its seeds."""
    if not results:
        print(f"{'failed':>11} {name}: see {OUT}")
        return
    values = [100 * result.get("accuracy", result.get("dev_accuracy")) for result in results]
    deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    seeds = f" ({', '.join(f'{value:.1f}' for value in values)})" if len(values) > 1 else ""
    loss = fmean(result.get("loss", result.get("dev_loss")) for result in results)
    costs = ("forward_passes", "seconds", "peak_memory_mb")
    passes, seconds, memory = (fmean(result[cost] for result in results) for cost in costs)
    row = f"{fmean(values):5.1f}{deviation:6} {loss:7.3f} {passes:7.0f} {seconds:8.0f} {memory:8.0f}"
    print(f"{row}  {name}{seeds}")


def main() -> None:
    """Run the arms of a grid that have no results, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("grid", choices=["search", "merges", "table", "demo"])
    parser.add_argument("--task", default="Reviews")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "starter")
    parser.add_argument("--model_name", default=str(ROOT / "starter" / "smollm2-135m"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", default="", help="only arms whose name holds this")
    args = parser.parse_args()
    args.data_dir = args.data_dir.resolve()
    OUT.mkdir(parents=True, exist_ok=True)
    arms = choose_arms(args)
    if args.grid in ("table", "demo"):
        print_zero_shot(args)
    jobs = [(name, flags, seed) for name, flags in arms.items() for seed in args.seeds]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = pool.map(lambda job: run_arm(args, *job), jobs)
        results = list(tqdm(runs, total=len(jobs), unit="run", desc=args.task))
    heads = f"{'accuracy':>11} {'loss':>7} {'passes':>7} {'seconds':>8} {'peak MB':>8}"
    print(f"{heads}  {args.task}, seeds {args.seeds}")
    for i, name in enumerate(arms):
        row_results = results[i * len(args.seeds) : (i + 1) * len(args.seeds)]
        print_arm(name, [result for result in row_results if result])


if __name__ == "__main__":
    main()
