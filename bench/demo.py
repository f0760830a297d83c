"""`make demo`: a real model learns to judge film reviews, with forward passes only, while you watch.

SmolLM2-135M on the Reviews of the starter: zero-shot, MeZO-LoRA as published (rank 8, alpha 16) and MeZO-XGBLoRA
(`--recipe fast`: rank-1 boosters in the upper half of the layers, B only, normalised steps, cached activations). Five
steps are timed first, so that both trainings fit into six minutes together: a quarter for MeZO-LoRA, whose curve is
flat at this scale, the rest for boosting (at equal forward passes the two stand in research/EXPERIMENTS.md). Results
go to result/demo/*.json, the curves to result/demo/curve.png.
"""

import argparse
import json
import multiprocessing
import sys
import time
from pathlib import Path
from statistics import fmean, median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import run
from cli.results import write_result
from machine import resources
from scoring import (
    logprobs,
    packing,
)
from scoring.metrics import accuracy, best_threshold_accuracy
from zo.optimizer import ZerothOrder

OUT = ROOT / "result" / "demo"
BATCH, TRAIN, DEV, SHOWN = 8, 1000, 100, 5
EVALUATIONS = 6  # on the dev rows, of each training
SHARES = {"zero-shot": 0, "MeZO-LoRA": 1 / 4, "MeZO-XGBLoRA": 3 / 4}  # of the time
METHODS = {
    "zero-shot": "--trainer none",
    "MeZO-LoRA": "--trainer zo --lora",
    "MeZO-XGBLoRA": "--trainer zo --recipe fast",
}


def framework(flags: str, seed: int) -> run.Framework:
    starter = ROOT / "starter"
    dtype = "--load_bfloat16" if resources.cpu_has_bf16() or torch.cuda.is_available() else ""
    common = f"--model_name {starter / 'smollm2-135m'} --data_dir {starter} --task_name Reviews --seed {seed} {dtype}"
    return run.Framework(run.parse(f"{common} {flags}".split()), run.get_task("Reviews", starter))


def time_step(seed: int) -> float:
    """Seconds of a step of two whole forwards: the median of five, after one to warm up."""
    made = framework(METHODS["MeZO-XGBLoRA"], seed)
    examples = made.prompts.examples(made.task.sample_subset("train", seed, 6 * BATCH))
    made.load()
    engine, seconds = ZerothOrder(made.model, lr=0.0, eps=1e-2), []
    for i in range(6):
        batch, start = packing.pack(examples[BATCH * i : BATCH * i + BATCH]), time.perf_counter()
        engine.step(lambda batch=batch: logprobs.loss(made.model, batch, True))
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def fit_steps(seconds: float, step: float, cached: bool) -> int:
    """Steps that fit into so many seconds, a multiple of 25. In a run of minutes a step takes up to 1.3 × what five
    alone take; a step is two passes over BATCH rows, an evaluation one over DEV rows. With cached activations a step is
    half of that, after half a pass over TRAIN rows."""
    evaluations = EVALUATIONS * DEV / BATCH / 2
    left = seconds / (1.3 * step) - evaluations
    if cached:
        left = 2 * (left - TRAIN / BATCH / 4)
    return max(50, int(left) // 25 * 25)


def run_method(name: str, flags: str, steps: int, seed: int) -> None:
    """One method in a process of its own, so that its peak memory is its own; everything it found goes to a file."""
    run.logging.basicConfig(level=run.logging.WARNING)
    resources.keep_pages()
    flags += f" --output_dir {OUT / name} --overwrite --train_as_classification --per_device_train_batch_size {BATCH}"
    flags += f" --max_steps {steps} --logging_steps 5 --save_steps {steps} --save_total_limit 1"
    trains = "--trainer zo" in flags
    if trains:
        flags += f" --save_model --num_train {TRAIN} --num_dev {DEV} --eval_strategy steps"
        flags += f" --eval_steps {max(1, steps // EVALUATIONS)}"
    made, start = framework(flags, seed), time.perf_counter()
    measured = {"train_set": seed, "forward_passes": 0, "log": []}
    if trains:
        rows = made.task.sample_subset("train", seed, TRAIN + DEV)
        made.train(rows[:TRAIN], made.eval_batch(rows[TRAIN:]), OUT / name)
        measured |= {"forward_passes": made.trainer.forward_passes, "log": made.trainer.state.log_history}
    measured["train_seconds"] = round(time.perf_counter() - start, 1)
    validation = made.task.sample_subset("validation", 0, sys.maxsize)
    golds = [s.correct_candidate for s in validation]
    made.load()
    scores = made.evaluator.score(made.eval_batch(validation))
    prior = logprobs.score(made.model, made.prompts.examples(validation[:1], sfc=True))[0]
    margins = [b - a for a, b in scores]
    measured |= {
        "accuracy": accuracy([int(m > 0) for m in margins], golds),
        "calibrated_accuracy": accuracy([int(m > prior[1] - prior[0]) for m in margins], golds),
        "best_threshold_accuracy": best_threshold_accuracy(margins, golds),
        "boosters": len(made.lora_module.boosters) if made.lora_module else 0,
        "seconds": round(time.perf_counter() - start, 1),
        "margins": margins[:SHOWN],
    }
    write_result(OUT / f"{name}.json", made.args, [measured])


def draw(results: dict[str, dict], path: Path) -> None:
    """Loss and dev accuracy against forward passes, with a mark at every merge."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for color, (name, result) in zip(("C0", "C1"), list(results.items())[1:], strict=True):
        log = result["log"]
        losses = [(2 * e["step"], e["loss"]) for e in log if "loss" in e]
        smooth = [fmean(v for _, v in losses[max(0, i - 3) : i + 1]) for i in range(len(losses))]
        left.plot([x for x, _ in losses], smooth, color=color, label=name)
        seen = [(2 * e["step"], 100 * e["eval_accuracy"]) for e in log if "eval_accuracy" in e]
        right.plot(*zip(*seen, strict=True), "o-", color=color, label=f"{name}, {DEV} dev rows")
        end = (result["forward_passes"], 100 * result["accuracy"])
        right.plot(*end, "*", ms=14, color=color, label=f"{name}, validation")
        for entry in (e for e in log if "merged_booster" in e):
            left.axvline(2 * entry["step"], color=color, alpha=0.25, lw=1)
    zero = results["zero-shot"]
    right.axhline(100 * zero["accuracy"], color="0.6", ls=":", label="zero-shot")
    right.axhline(100 * zero["best_threshold_accuracy"], color="0.6", ls="--", label="zero-shot, best threshold")
    passes = f"forward passes of {BATCH} rows"
    left.set(xlabel=passes, ylabel="training loss (mean of 20 steps)", title="vertical lines: merges")
    right.set(xlabel=passes, ylabel="accuracy (%)", title="SmolLM2-135M on Reviews")
    left.legend()
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def report(results: dict[str, dict]) -> None:
    columns = ("accuracy", "calibrated", "passes", "seconds", "peak MB", "boosters")
    print(f"\n{'method':14}" + "".join(f"{column:>11}" for column in columns))
    for name, r in results.items():
        shares = f"{100 * r['accuracy']:10.1f}%{100 * r['calibrated_accuracy']:10.1f}%"
        counts = (r["forward_passes"], round(r["train_seconds"]), r["peak_memory_mb"], r["boosters"])
        print(f"{name:14}{shares}" + "".join(f"{count:11}" for count in counts))
    bound = results["zero-shot"]["best_threshold_accuracy"]
    print(f"the best that any threshold on the zero-shot scores could reach: {100 * bound:.1f}%")
    print("\nfive validation sentences: what the model says before and after")
    words = {True: "great", False: "terrible"}
    task = run.get_task("Reviews", ROOT / "starter")
    for i, sample in enumerate(task.sample_subset("validation", 0, SHOWN)):
        before, after = (words[results[name]["margins"][i] > 0] for name in ("zero-shot", "MeZO-XGBLoRA"))
        people = words[sample.correct_candidate == 1]
        print(f"  {sample.data['sentence'][:90]!r}: {before} -> {after} (people: {people})")
    print(f"\nresults and picture: {OUT.relative_to(ROOT)}/*.json, {(OUT / 'curve.png').relative_to(ROOT)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=6.0, help="for both trainings together")
    parser.add_argument("--steps", type=int, help="steps of a training, instead of fitting them to the machine")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    resources.keep_pages()
    fast = resources.cpu_has_bf16()
    print(f"weights in {'bfloat16, which this CPU has' if fast else 'float32: this CPU has no bfloat16'} in hardware")
    steps = {name: args.steps for name in METHODS}
    if not args.steps:
        step = time_step(args.seed)
        steps = {
            name: fit_steps(60 * args.minutes * share, step, cached="fast" in METHODS[name])
            for name, share in SHARES.items()
        }
        trained = ", ".join(f"{steps[name]} for {name}" for name in list(METHODS)[1:])
        print(
            f"a step of {BATCH} rows takes {step:.2f} s here; steps that fit into {args.minutes:g} minutes: {trained}"
        )
    results = {}
    for name, flags in METHODS.items():
        print(f"\n== {name}: run.py {flags}", flush=True)
        process = multiprocessing.get_context("spawn").Process(
            target=run_method, args=(name, flags, steps[name], args.seed)
        )
        process.start()
        process.join()
        if process.exitcode:
            return 1
        written = json.loads((OUT / f"{name}.json").read_text())
        results[name] = {**written["sets"][0], "peak_memory_mb": written["peak_memory_mb"]}
    draw(results, OUT / "curve.png")
    report(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
