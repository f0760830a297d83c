"""Accuracy of the methods on a real model, with seeds: runs `run.py` over a grid and prints a table.

    python research/accuracy.py table --task SST2 --data_dir DIR --seeds 0 1 2    # methods, on the validation rows
    python research/accuracy.py demo --seeds 0 1 2    # B only on all layers, its control
    python research/accuracy.py search    # rates and ε, on 500 dev rows
    python research/accuracy.py merges --task SST2 --data_dir DIR    # with merges and without, likewise

One process a core with one thread each, weights in bfloat16 where the CPU has it. A run whose result file exists is not
repeated, so a grid that was killed goes on. The control is the same run on training rows whose labels are shuffled.
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
BOTH = "--trainer zo --xgblora"
BEST = "--trainer zo --xgblora --lora_freeze_a --zo_normalize"
REGULAR = "--max_steps 300 --learning_rate 1e-3 --per_device_train_batch_size 16"


def settings(rate: float | None = None, eps: float | None = None, rounds: int = 0, steps: int = 400, batch: int = 16):
    flags = f"--max_steps {steps} --per_device_train_batch_size {batch}"
    for name, value in (("learning_rate", rate), ("zo_eps", eps), ("xgblora_steps_per_iteration", rounds)):
        flags += f" --{name} {value}" if value else ""
    return flags


def search_grid() -> dict[str, str]:
    """Rates, ε, round lengths and batches at 3,600 sentences; the rank-1 runs without merges stand beside."""
    grid = {}
    for rate, eps, rounds, batch in (
        (3e-3, 3e-2, 25, 16), (6e-3, 3e-2, 25, 16), (1.2e-2, 3e-2, 25, 16), (8e-3, 3e-2, 10, 16), (8e-3, 3e-2, 50, 16),
        (8e-3, 1e-1, 25, 16), (8e-3, 3e-2, 25, 32), (6e-3, 3e-2, 25, 8), (4e-3, 3e-2, 25, 8), (6e-3, 1.5e-2, 25, 8),
        (6e-3, 3e-2, 10, 8), (6e-3, 3e-2, 50, 8), (3e-3, 3e-2, 50, 4), (5e-3, 3e-2, 50, 4),
    ):  # fmt: skip
        name = f"XGBLoRA B normalised, η {rate:g}, ε {eps:g}, rounds of {rounds}, batch {batch}"
        grid[name] = f"{BEST} {settings(rate, eps, rounds, 3600 // batch, batch)}"
    return grid


def merge_grid() -> dict[str, str]:
    """300 steps of 16 rows: the published rate and larger ones, A and B or B alone, with merges and without."""
    free = f"{R1} --lora_freeze_a --zo_normalize"
    return {
        "LoRA r 8, η 5e-5 (published)": f"{LORA} {settings(5e-5, 1e-2, steps=300)}",
        "LoRA r 8, η 7e-4": f"{LORA} {settings(7e-4, 1e-2, steps=300)}",
        "LoRA r 1, η 3e-4, no merge": f"{R1} {settings(3e-4, 1e-2, steps=300)}",
        "XGBLoRA, η 3e-4, rounds of 100": f"{BOTH} {settings(3e-4, 1e-2, 100, steps=300)}",
        "XGBLoRA, η 1e-4, rounds of 100": f"{BOTH} {settings(1e-4, 1e-2, 100, steps=300)}",
        "LoRA r 1 B normalised, η 6e-3, no merge": f"{free} {settings(6e-3, 3e-2, steps=300)}",
        "XGBLoRA B normalised, η 6e-3, rounds of 100": f"{BEST} {settings(6e-3, 3e-2, 100, steps=300)}",
        "XGBLoRA B normalised, η 6e-3, rounds of 25": f"{BEST} {settings(6e-3, 3e-2, 25, steps=300)}",
    }


def table_grid() -> dict[str, str]:
    return {
        "MeZO-XGBLoRA, B normalised": f"{BEST} {settings(rounds=25)}",
        "MeZO-LoRA r 8, published rate": f"{LORA} {settings()}",
        "first-order LoRA r 8": f"--trainer regular --lora {REGULAR}",
        "first-order XGBLoRA": f"--trainer regular --xgblora --xgblora_steps_per_iteration 100 {REGULAR}",
        "MeZO-XGBLoRA, A and B": f"{BOTH} {settings(rounds=100)}",
        "MeZO-LoRA r 8, η 7e-4": f"{LORA} {settings(7e-4)}",
    }


def demo_grid(task: str, data_dir: Path) -> dict[str, str]:
    shuffled = OUT / "shuffled"
    shuffle_labels(data_dir / task, shuffled / task)
    flags = settings(rounds=25, steps=450, batch=8)
    return {
        "MeZO-LoRA r 8, published rate": f"{LORA} {settings(steps=450, batch=8)}",
        "MeZO-XGBLoRA, B normalised": f"{BEST} {flags}",
        "the same on shuffled labels": f"{BEST} {flags} --data_dir {shuffled}",
    }


def shuffle_labels(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in (source / "train.jsonl").read_text().splitlines()]
    labels = [row["label"] for row in rows]
    random.Random(0).shuffle(labels)
    lines = [json.dumps({**row, "label": label}) + "\n" for row, label in zip(rows, labels, strict=True)]
    (target / "train.jsonl").write_text("".join(lines))
    (target / "validation.jsonl").write_bytes((source / "validation.jsonl").read_bytes())


def common(args, seed: int) -> list[str]:
    dtype = ["--load_bfloat16"] if resources.cpu_has_bf16() else []
    where = ["--model_name", args.model_name, "--data_dir", str(args.data_dir), "--task_name", args.task]
    return [*where, "--seed", str(seed), "--disable_tqdm", "True", *dtype]


def run_one(args, name: str, flags: str, seed: int) -> dict:
    label = "".join(c if c.isalnum() or c in ".-" else "_" for c in name)
    path = OUT / f"{args.task}-{label}-seed{seed}.json"
    if not path.exists():
        command = [sys.executable, "run.py", *common(args, seed), "--result_file", str(path), "--num_train", "1000"]
        command += ["--train_as_classification", "--save_strategy", "no", "--output_dir", str(path.with_suffix(""))]
        command += flags.split()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with open(path.with_suffix(".log"), "w") as log:
            subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False)
    return json.loads(path.read_text()) if path.exists() else {}


def zero_shot(args) -> None:
    task = run.get_task(args.task, args.data_dir)
    made = run.Framework(run.parse(common(args, 0)), task)
    made.load()
    samples = task.sample_subset("validation", 0, sys.maxsize)
    margins = [b - a for a, b in made.evaluator.score(made.eval_batch(samples))]
    golds = [s.correct_candidate for s in samples]
    right = fmean((m > 0) == g for m, g in zip(margins, golds, strict=True))
    print(f"zero-shot {100 * right:.1f}, at the best threshold {100 * best_threshold_accuracy(margins, golds):.1f}")


def main() -> None:
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
    if args.grid in ("search", "merges"):
        arms = search_grid() if args.grid == "search" else merge_grid()
        arms = {name: f"{flags} --num_dev 500 --no_eval" for name, flags in arms.items()}
    else:
        arms = table_grid() if args.grid == "table" else demo_grid(args.task, args.data_dir)
        zero_shot(args)
    arms = {name: flags for name, flags in arms.items() if args.only in name}
    jobs = [(name, flags, seed) for name, flags in arms.items() for seed in args.seeds]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(
            tqdm(pool.map(lambda job: run_one(args, *job), jobs), total=len(jobs), unit="run", desc=args.task)
        )
    print(f"{'accuracy':>11} {'loss':>7} {'passes':>7} {'seconds':>8} {'peak MB':>8}  {args.task}, seeds {args.seeds}")
    for i, name in enumerate(arms):
        done = [r for r in results[i * len(args.seeds) : (i + 1) * len(args.seeds)] if r]
        if not done:
            print(f"{'failed':>11} {name}: see {OUT}")
            continue
        values = [100 * r.get("accuracy", r.get("dev_accuracy")) for r in done]
        spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        loss = fmean(r.get("loss", r.get("dev_loss")) for r in done)
        passes, seconds, memory = (
            fmean(r[key] for r in done) for key in ("forward_passes", "seconds", "peak_memory_mb")
        )
        each = f" ({', '.join(f'{v:.1f}' for v in values)})" if len(values) > 1 else ""
        print(f"{fmean(values):5.1f}{spread:6} {loss:7.3f} {passes:7.0f} {seconds:8.0f} {memory:8.0f}  {name}{each}")


if __name__ == "__main__":
    main()
