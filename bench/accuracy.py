"""Accuracy of the methods on a real model, with seeds: runs `run.py` over a grid and prints a table.

    python bench/accuracy.py search --task Reviews --data_dir starter          # settings, judged on dev rows
    python bench/accuracy.py table --task Reviews --data_dir starter           # methods, judged on validation rows

One process per core with one thread each; a run whose result file exists is not repeated, so a killed grid goes on.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
BOOST = "--trainer zo --xgblora --lora_freeze_a --zo_normalize"
BOTH = "--trainer zo --xgblora"


def arm(base: str, steps: int, rate: float, eps: float, rounds: int = 0, batch: int = 16) -> tuple[str, str]:
    merges = f" --xgblora_steps_per_iteration {rounds}" if rounds else ""
    flags = f"{base} --max_steps {steps} --learning_rate {rate} --zo_eps {eps}{merges}"
    return flags, f"--per_device_train_batch_size {batch}"


def search_grid() -> dict[str, str]:
    grid = {}
    for rate, rounds, batch in ((3e-3, 25, 16), (6e-3, 25, 16), (4e-3, 10, 16), (3e-3, 50, 8), (6e-3, 25, 32)):
        steps = 225 * 16 // batch
        grid[f"xgblora-B-norm-lr{rate}-eps0.03-round{rounds}-bs{batch}"] = " ".join(
            arm(BOOST, steps, rate, 3e-2, rounds, batch)
        )
    return grid


def run(name: str, flags: str, args, seed: int) -> dict:
    path = ROOT / "result" / "accuracy" / f"{args.task}-{name}-seed{seed}.json"
    if not path.exists():
        command = [sys.executable, "run.py", "--model_name", args.model, "--data_dir", args.data_dir]
        command += ["--task_name", args.task, "--seed", str(seed), "--num_train", "1000", "--result_file", str(path)]
        command += [
            "--save_strategy",
            "no",
            "--disable_tqdm",
            "True",
            "--train_as_classification",
            "--logging_steps",
            "50",
        ]
        command += ["--output_dir", str(path.with_suffix("")), *args.dtype, *flags.split()]
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".log"), "w") as log:
            subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False)
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("grid", choices=["search", "table"])
    parser.add_argument("--task", default="Reviews")
    parser.add_argument("--data_dir", default="starter")
    parser.add_argument("--model", default="starter/smollm2-135m")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", nargs="*", default=["--load_bfloat16"])
    args = parser.parse_args()
    arms = {k: f"{v} --num_dev 500 --no_eval" for k, v in search_grid().items()}
    jobs = [(name, flags, args, seed) for name, flags in arms.items() for seed in args.seeds]
    with ThreadPoolExecutor(args.workers) as pool:
        done = list(tqdm(pool.map(lambda job: run(*job), jobs), total=len(jobs), unit="run"))
    print(f"{'accuracy':>10} {'loss':>7} {'passes':>7} {'seconds':>8} {'MB':>6}  arm")
    for i, name in enumerate(arms):
        results = [r for r in done[i * len(args.seeds) : (i + 1) * len(args.seeds)] if r]
        if not results:
            print(f"{'failed':>10} {name}")
            continue
        values = [100 * r.get("accuracy", r.get("dev_accuracy")) for r in results]
        spread = f"±{stdev(values):.1f}" if len(values) > 1 else ""
        loss = fmean(r.get("loss", r.get("dev_loss")) for r in results)
        costs = [fmean(r[name] for r in results) for name in ("forward_passes", "seconds", "peak_memory_mb")]
        print(f"{fmean(values):6.1f}{spread:>4} {loss:7.3f} {costs[0]:7.0f} {costs[1]:8.0f} {costs[2]:6.0f}  {name}")


if __name__ == "__main__":
    main()
