"""Which method wins on a real model, with seeds: a grid of `run.py` runs, a JSON for each in research/runs/.

    python research/experiments.py run [--groups base rounds …] [--only WORDS]   # runs without a JSON
    python research/experiments.py table    # the tables of research/EXPERIMENTS.md; why.py prints its own
    python research/experiments.py plot     # every picture
    python research/experiments.py list     # commands of the runs without a JSON

SmolLM2-135M of the starter, 1,000 training rows, weights of the arm's dtype unless `--dtype` names another
one. A seed drives directions, A, order and training set. Settings are chosen on dev rows of Reviews: the last
500 rows of its training split, in a folder of their own in the place of the validation rows. Accuracy is that
of the last step. Beside it stand AUC and the accuracy at the best threshold, because a shift of the label
bias alone gains much. A process uses one core and one thread. Each JSON holds the command that repeats its
run. `run` makes the dev rows; $DATA_DIR is a folder with SST2/{train,validation}.jsonl in the hub's columns.
"""

import argparse
import contextlib
import gc
import json
import logging
import math
import multiprocessing
import os
import shlex
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from arms import BIAS, METHODS, OUT, RECIPE, Arm, grid
from tqdm import tqdm

import run
from scoring.metrics import auc, best_threshold_accuracy

WORK = ROOT / "result" / "experiments"
DEV = WORK / "dev"  # Reviews with dev rows in the place of the validation rows
DEV_ROWS = 500
MIN_SEEDS = 5  # of an interval: with two seeds it would be 12.7 standard errors wide
T95 = {5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # Student's t, 95 %, by the number of pairs


def make_dev() -> None:
    """Write a folder of Reviews in which the last training rows take the place of the validation rows."""
    lines = (ROOT / "starter" / "Reviews" / "train.jsonl").read_text().splitlines(keepends=True)
    folder = DEV / "Reviews"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(lines[:-DEV_ROWS]))
    (folder / "validation.jsonl").write_text("".join(lines[-DEV_ROWS:]))


def label_bias(arm: Arm, seed: int) -> None:
    """Fit a number for each label, added to its score, on the training rows, and write what that alone gives.

    Only the difference of the two numbers counts. Cross-entropy has its minimum where the mean probability of
    a label is its share.
    """
    start = time.perf_counter()
    words = os.path.expandvars(arm.command.removesuffix(BIAS)).split()
    args = run.parse([*words, "--trainer", "none", "--seed", str(seed), "--disable_tqdm", "True"])
    task = run.get_task(args.task_name, args.data_dir)
    framework = run.Framework(args, task)
    framework.load()
    train_margins, train_golds = margins_and_golds(framework, task.sample_subset("train", seed, 1000))
    margins, golds = margins_and_golds(framework, task.sample_subset("validation", 0, 10**9))
    bias = fit_bias(train_margins, fmean(train_golds))
    shifted_margins = [m + bias for m in margins]
    losses = [math.log1p(math.exp(-m if gold else m)) for m, gold in zip(shifted_margins, golds, strict=True)]
    write_run(
        arm,
        seed,
        {
            "accuracy": fmean((m > 0) == gold for m, gold in zip(shifted_margins, golds, strict=True)),
            "loss": fmean(losses),
            "auc": auc(shifted_margins, golds),
            "best_threshold": best_threshold_accuracy(shifted_margins, golds),
            "forward_passes": 0,
            "seconds": round(time.perf_counter() - start, 1),
            "boosters": 0,
        },
    )


def margins_and_golds(framework: run.Framework, samples) -> tuple[list[float], list[int]]:
    """Return the score of label 1 minus that of label 0 of each sample, and the right labels."""
    scores = framework.evaluator.score(framework.eval_batch(samples), progress=False)
    return [positive - negative for negative, positive in scores], [s.correct_candidate for s in samples]


def fit_bias(margins: list[float], share: float) -> float:
    """Return the number that, added to the margins, makes the mean probability of label 1 its share."""
    lower_end = -20.0
    upper_end = 20.0
    while upper_end - lower_end > 1e-6:
        middle = (lower_end + upper_end) / 2
        if fmean(1 / (1 + math.exp(-m - middle)) for m in margins) > share:
            upper_end = middle
        else:
            lower_end = middle
    return lower_end


def write_run(arm: Arm, seed: int, measurement: dict) -> None:
    """Write the JSON of a run: the arm, the command that repeats it, and the measurements."""
    description = {
        "arm": arm.name,
        "group": arm.group,
        "task": arm.task,
        "seed": seed,
        "steps": arm.steps,
        "batch": arm.batch,
        "weights": arm.dtype,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    path = arm.path(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**description, "command": arm.line(seed), **measurement}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def run_arm_with_seed(job: tuple[Arm, int]) -> None:
    """Run an arm with a seed and write its JSON."""
    arm, seed = job
    if arm.flags == BIAS:
        label_bias(arm, seed)
        return
    name = f"{arm.task}-{arm.path(seed).stem}"
    result_file = WORK / f"{name}.json"
    predictions_file = WORK / f"{name}.jsonl"
    command = arm.line(seed).removeprefix("python run.py ")
    command = os.path.expandvars(command)
    outputs = f"--result_file {result_file} --predictions {predictions_file} --output_dir {WORK / name}"
    words = [*shlex.split(command), *shlex.split(f"{outputs} --overwrite --disable_tqdm True")]
    run_words = run_in_this_process if torch.cuda.is_available() else run_in_new_process
    with open(WORK / f"{name}.log", "w") as log:
        status = run_words(words, log)
    if status != 0:
        tqdm.write(f"failed: {name}, see {WORK / name}.log")
        return
    result = json.loads(result_file.read_text())
    rows = [json.loads(line) for line in predictions_file.read_text().splitlines()]
    write_run(arm, seed, measurements(result, rows))


def measurements(result: dict, rows: list[dict]) -> dict:
    """Return the numbers of a result file and its predictions that the tables need."""
    margins = [row["scores"][1] - row["scores"][0] for row in rows]
    golds = [row["gold"] for row in rows]
    train_set = result["sets"][0]
    numbers = {
        "accuracy": result["accuracy"],
        "loss": result["loss"],
        "auc": auc(margins, golds),
        "best_threshold": best_threshold_accuracy(margins, golds),
        "forward_passes": result["forward_passes"],
        "seconds": train_set["train_seconds"],
        "boosters": train_set.get("boosters", 0),
    }
    if "staged" in train_set:
        numbers["staged"] = train_set["staged"]
    if not torch.cuda.is_available():
        numbers["cpu_seconds"] = train_set["train_cpu_seconds"]
        numbers["peak_memory_mb"] = result["peak_memory_mb"]
    return numbers


def run_in_new_process(words: list[str], log) -> int:
    """Return the exit status of run.py in a process of its own, so that peak memory is that of the run."""
    words = [sys.executable, "run.py", *words]
    return subprocess.run(words, cwd=ROOT, stdout=log, stderr=log, check=False).returncode


def run_in_this_process(words: list[str], log) -> int:
    """Return the exit status of a run here: on a GPU it is over before a new process has started."""
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            return run.main(words) or 0
        except (Exception, SystemExit):
            traceback.print_exc()
            return 1
        finally:
            logging.getLogger().handlers.clear()  # they write to this run's log
            gc.collect()
            torch.cuda.empty_cache()


def paired(values: dict[int, float], reference_values: dict[int, float]) -> str:
    """Return the mean difference over common seeds, with its 95 % interval from `MIN_SEEDS` seeds on."""
    seeds = sorted(values.keys() & reference_values.keys())
    differences = [values[s] - reference_values[s] for s in seeds]
    if len(seeds) < MIN_SEEDS:
        return f"{fmean(differences):+.1f}" if seeds else ""
    half = T95.get(len(seeds), 2.0) * stdev(differences) / len(seeds) ** 0.5
    return f"{fmean(differences):+.1f} ± {half:.1f}"


NUMBERS = ("accuracy", "auc", "best_threshold", "loss", "forward_passes")
HEAD = (
    "group", "arm", "seeds", "accuracy", "− base", "AUC", "best threshold", "loss", "passes × rows", "CPU s",
    "MB",
)  # fmt: skip


def finished(arms: list[Arm], task: str) -> list[tuple[Arm, dict[int, dict]]]:
    """Return (arm, {seed: JSON of the run}) of those arms of a task that have runs."""
    rows = []
    for arm in arms:
        paths = {seed: arm.path(seed) for seed in arm.seeds}
        runs = {seed: json.loads(path.read_text()) for seed, path in paths.items() if path.exists()}
        if arm.task == task and runs:
            rows.append((arm, runs))
    return rows


def title(task: str) -> str:
    """Return the name of a task as tables and pictures show it."""
    return "Reviews, dev rows" if task == "dev" else task


def percent(runs: dict[int, dict]) -> dict[int, float]:
    """Return {seed: accuracy in %}."""
    return {seed: 100 * run["accuracy"] for seed, run in runs.items()}


def cells(arm: Arm, runs: dict[int, dict]) -> list[str]:
    """Return the means over the seeds, as the tables show them."""
    mean = {key: fmean(run[key] for run in runs.values()) for key in NUMBERS}
    in_fp32 = sum(run.get("weights") == "float32" and bool(arm.steps) for run in runs.values())
    seeds = f"{len(runs)}, {in_fp32} in float32" if in_fp32 else f"{len(runs)}"
    row = [seeds, f"{100 * mean['accuracy']:.1f}"]
    row += [f"{mean['auc']:.3f}", f"{100 * mean['best_threshold']:.1f}", f"{mean['loss']:.3f}"]
    row += [f"{mean['forward_passes']:.0f} × {arm.batch}"]
    for cost in ("cpu_seconds", "peak_memory_mb"):  # of runs on a CPU, which several runs share
        costs = [run[cost] for run in runs.values() if cost in run]
        row += [f"{fmean(costs):.0f}" if costs else ""]
    return row


def table(arms: list[Arm]) -> None:
    """Print a row for each arm that has runs, against the base of its task, or against the recipe."""
    for task in dict.fromkeys(arm.task for arm in arms):
        if not (rows := finished(arms, task)):
            continue
        base = next((percent(runs) for arm, runs in rows if arm.group == "base"), {})
        recipe = next((percent(runs) for arm, runs in rows if arm.name == RECIPE), {})
        print(f"\n{title(task)}\n\n| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
        for arm, runs in rows:
            seeds, accuracy, *other_cells = cells(arm, runs)
            reference = recipe if arm.group == "recipe" else base
            is_base = arm.group == "base" and percent(runs) == reference
            difference = "" if is_base else paired(percent(runs), reference)
            print(f"| {' | '.join([arm.group, arm.name, seeds, accuracy, difference, *other_cells])} |")


def best_of_methods(arms: list[Arm]) -> list[tuple[str, int, Arm, dict[int, dict]]]:
    """Return (method, number of settings tried, the best setting, its runs) on the dev rows.

    A setting of a single seed is the best only where all settings of the method have a single seed.
    """

    def quality(row: tuple[Arm, dict[int, dict]]) -> tuple[bool, float]:
        _, runs = row
        return len(runs) > 1, fmean(percent(runs).values())

    methods = []
    rows = finished(arms, "dev")
    for method, beginnings in METHODS.items():
        settings = [(arm, runs) for arm, runs in rows if arm.name.startswith(beginnings)]
        if settings:
            methods.append((method, len(settings), *max(settings, key=quality)))
    return methods


def main_table(arms: list[Arm]) -> None:
    """Print each method at the best of its settings on the dev rows, and how many settings were tried."""
    heads = "method", "tried", "best", *HEAD[2:4], *HEAD[5:]
    print(f"\nMethods\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for method, num_settings, arm, runs in best_of_methods(arms):
        print(f"| {' | '.join([method, f'{num_settings}', arm.name, *cells(arm, runs)])} |")


def plot_costs(arms: list[Arm], path: Path) -> None:
    """Draw accuracy against the costs on a CPU; runs in bfloat16 and in float32 are of different machines."""
    from matplotlib import pyplot

    costs = {"cpu_seconds": "processor seconds", "peak_memory_mb": "peak MB"}
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained", sharey=True)
    for i, (method, _, _, runs) in enumerate(best_of_methods(arms)):
        style = {"marker": "os^D"[i // 10], "color": f"C{i % 10}", "linestyle": ""}
        axes[1].plot([], [], label=method, **style)
        for axis, cost in zip(axes, costs, strict=True):
            for dtype in ("bfloat16", "float32"):
                runs_of_dtype = [
                    r for r in runs.values() if cost in r and r.get("weights", "bfloat16") == dtype
                ]
                if runs_of_dtype:
                    filling = {} if dtype == "bfloat16" else {"markerfacecolor": "none"}
                    accuracy = 100 * fmean(r["accuracy"] for r in runs_of_dtype)
                    axis.plot(fmean(r[cost] for r in runs_of_dtype), accuracy, **style, **filling)
    for axis, label in zip(axes, costs.values(), strict=True):
        heading = f"{title('dev')}: filled bfloat16, hollow float32"
        axis.set(title=heading, xlabel=label, ylabel="accuracy in %")
        axis.grid(alpha=0.3)
    axes[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8)
    figure.savefig(path, dpi=110)


def plot_passes(arms: list[Arm], task: str, path: Path) -> None:
    """Draw accuracy against forward passes, of runs at their end and of a staged run along its chain."""
    from matplotlib import pyplot

    figure, (by_passes, by_boosters) = pyplot.subplots(1, 2, figsize=(14, 5), layout="constrained")
    families: dict[str, list[tuple[float, float]]] = {}
    for arm, runs in finished(arms, task):
        for entry in runs.values():
            if "staged" in entry:
                rows = entry["forward_passes"] * arm.batch / entry["boosters"]
                stages = [(stage["boosters"], 100 * stage["accuracy"]) for stage in entry["staged"]]
                passes = [rows * boosters for boosters, _ in stages[1:]]
                by_passes.plot(passes, [a for _, a in stages[1:]], color="0.6", label=arm.name)
                by_boosters.plot(*zip(*stages, strict=True), ".-", color="0.4", label=arm.name)
        if arm.steps and arm.group != "weights":
            name = arm.name.removesuffix(f", {arm.steps} steps").removesuffix(", staged")
            passes = fmean(run["forward_passes"] for run in runs.values())
            families.setdefault(name, []).append((passes * arm.batch, fmean(percent(runs).values())))
    for i, (name, points) in enumerate(families.items()):
        style = "os^D"[i // 10] + ":"
        by_passes.plot(*zip(*sorted(points), strict=True), style, color=f"C{i % 10}", label=name)
    by_passes.set(xscale="log", xlabel="forward passes × rows", ylabel="accuracy in %", title=title(task))
    heading = f"{title(task)}, the first boosters of one run"
    by_boosters.set(xlabel="boosters", ylabel="accuracy in %", title=heading)
    for axis in (by_passes, by_boosters):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def plot_table(arms: list[Arm], path: Path) -> None:
    """Draw the accuracy of every arm with its runs as dots, a panel for each task."""
    from matplotlib import pyplot

    panels = {task: rows for task in dict.fromkeys(a.task for a in arms) if (rows := finished(arms, task))}
    if not panels:
        return
    ratios = [len(rows) for rows in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, 0.9 * len(panels) + 0.33 * sum(ratios)), layout="constrained",
        squeeze=False, gridspec_kw={"height_ratios": ratios},
    )  # fmt: skip
    for axis, (task, rows) in zip(axes[:, 0], panels.items(), strict=True):
        for i, (_, runs) in enumerate(rows):
            values = list(percent(runs).values())
            axis.plot(values, [i] * len(values), "o", color="C0", alpha=0.5)
            axis.plot(fmean(values), i, "|", color="C3", ms=14, mew=2)
        axis.set_yticks(range(len(rows)), [arm.name for arm, _ in rows])
        axis.invert_yaxis()
        axis.set(title=title(task), xlabel="accuracy in %: each seed, and their mean")
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def parse_args() -> argparse.Namespace:
    """Return the choices of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["run", "table", "plot", "list"])
    parser.add_argument("--groups", nargs="+", help="only these groups")
    parser.add_argument("--only", default="", help="only arms whose name holds this")
    parser.add_argument("--tasks", nargs="+", help="only these tasks; dev stands for the dev rows of Reviews")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these seeds")
    parser.add_argument("--dtype", help="of the weights; bfloat16 takes thrice the time where a CPU lacks it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    return parser.parse_args()


def chosen_arms(args) -> list[Arm]:
    """Return the arms of the grid that the command line selects."""
    arms = [arm for arm in grid() if not args.groups or arm.group in args.groups]
    arms = [arm for arm in arms if args.only in arm.name]
    arms = [arm for arm in arms if not args.tasks or arm.task in args.tasks]
    if args.seeds:
        arms = [replace(arm, seeds=tuple(seed for seed in arm.seeds if seed in args.seeds)) for arm in arms]
    return arms


def plot_all(arms: list[Arm]) -> None:
    """Draw every picture of research/runs/."""
    import matplotlib
    import why

    matplotlib.use("Agg")
    dev = [arm for arm in arms if arm.task == "dev"]
    plot_table(dev, OUT / "arms.png")
    plot_table([arm for arm in arms if arm.task != "dev"], OUT / "confirmed.png")
    plot_costs(dev, OUT / "costs.png")
    plot_passes(arms, "SST2", OUT / "passes.png")
    why.plot_terms(OUT / "why.png")


def run_all(jobs: list[tuple[Arm, int]], num_processes: int) -> None:
    """Run these arms and seeds, several at a time."""
    make_dev()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # of the workers
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
        for _ in tqdm(pool.map(run_arm_with_seed, jobs), total=len(jobs), unit="run", desc="experiments"):
            pass


def main() -> None:
    """Run, list, print or draw the chosen arms."""
    args = parse_args()
    arms = chosen_arms(args)
    if args.command == "table":
        main_table(arms)
        table(arms)
    elif args.command == "plot":
        plot_all(arms)
    else:
        runnable = [(arm, seed) for arm in arms if arm.runnable for seed in arm.seeds]
        jobs = [(arm, seed) for arm, seed in runnable if not arm.path(seed).exists()]
        if args.command == "list":
            for arm, seed in jobs:
                print(arm.line(seed))
            return
        if args.dtype:
            jobs = [(replace(arm, dtype=args.dtype), seed) for arm, seed in jobs]
        run_all(jobs, args.jobs)


if __name__ == "__main__":
    main()
