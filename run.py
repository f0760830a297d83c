"""One program for everything: load a model, inject adapters, train with forward passes only, evaluate.

    python run.py --model_name starter/smollm2-135m --data_dir starter --task_name Reviews --xgblora --trainer zo \\
        --xgblora_steps_per_iteration 50 --max_steps 400

`main` reads the flags, draws the sets of training rows, runs each and writes the results. The flags stand in
arguments.py, what is done with a model and a task in framework.py, what a step is in trainer.py and zo.py.
"""

import gc
import json
import logging
import pickle
import sys
import time
from pathlib import Path

import torch

import utils
from cli import results
from cli.arguments import OurArguments, parse
from cli.machine import keep_pages
from distributed import collectives, stop_signals
from framework import Framework
from scoring import staged_results
from scoring.prompts import EvalBatch
from tasks import get_task
from training import checkpoints
from utils import UsageError

logger = logging.getLogger("run")
# What says all there is to say in its own words, and what every rank raises where one does.
EXPECTED_ERRORS = (
    UsageError,
    FloatingPointError,
    checkpoints.StateNotSaved,
    collectives.PeerLost,
    collectives.PeerFailed,
    collectives.Diverged,
)


def draw_train_sets(args: OurArguments, task) -> list[tuple[int | None, list, list]]:
    """[(set's seed, training rows, dev rows)]: dev comes from the end of the draw and never out of the training rows.

    One (None, [], []) where nothing is trained and every evaluation example gets demonstrations of its own.
    """
    available, dev = len(task.samples["train"]), args.num_dev or 0
    wanted = args.num_train
    if wanted is None:
        wanted = available - dev if args.learns else 0
    if wanted + dev > available or (args.learns and wanted < 1):
        raise UsageError(f"--num_train {wanted} and --num_dev {dev}: {task.name} has {available} training rows in all")
    if args.num_train_sets is None and args.train_set_seed is None:
        if not args.learns:
            return [(None, [], [])]
        seeds = [args.seed]
    else:
        first = args.train_set_seed or 0
        seeds = range(first, first + (args.num_train_sets or 1))
    sets = []
    for seed in seeds:
        rows = task.sample_subset("train", seed, wanted + dev)
        sets.append((seed, rows[:wanted], rows[wanted:]))
    return sets


def run_set(args: OurArguments, task, train_set, train_samples, dev_samples) -> dict:
    """One training set from a fresh model: {metric: value, "dev_…": value, forward passes, seconds, …}."""
    framework = Framework(args, task)
    output_dir, trains = args.run_dir(train_set or 0), args.trainer != "none" and not args.linear_probing
    eval_samples = task.sample_subset("validation", args.train_set_seed or 0, args.num_eval or sys.maxsize)
    demonstrations = [] if args.learns else train_samples
    if train_set is None and args.num_train:  # a demonstration set for every example
        demonstrations = [task.sample_subset("train", i, args.num_train) for i in range(len(eval_samples))]
    eval_rows = None if args.no_eval else framework.eval_batch(eval_samples, demonstrations)
    dev_rows = framework.eval_batch(dev_samples)
    measured, start, cpu = {"train_set": train_set}, time.perf_counter(), time.process_time()
    with stop_signals.StopSignals(args.save_on_interrupt and trains) as signals:
        if trains:
            with checkpoints.lock_on_main(output_dir):
                framework.train(train_samples, dev_rows, output_dir, signals)
            measured["forward_passes"] = framework.trainer.forward_passes
            if collectives.world_size() > 1:
                measured["ranks"] = framework.trainer.exchange.report()
                logger.info("ranks: %s", measured["ranks"])
        elif args.linear_probing:
            framework.fit_probe(train_samples)
        measured["train_seconds"] = round(time.perf_counter() - start, 2)
        measured["train_cpu_seconds"] = round(time.process_time() - cpu, 2)  # of all threads, whoever else is busy
        with signals.interruptible():
            measured |= evaluate_and_write(framework, output_dir, train_set, dev_rows, eval_rows)
    measured["seconds"] = round(time.perf_counter() - start, 2)
    if framework.estimate:
        measured["estimated_memory_mb"] = round(framework.estimate.total / 1e6)
    if framework.lora_module:
        measured["boosters"] = len(framework.lora_module.boosters)
    return measured


def evaluate_and_write(
    framework: Framework, output_dir: Path, train_set, dev_rows: EvalBatch, eval_rows: EvalBatch | None
) -> dict:
    """What the model, trained or not, is worth: its files, its metrics and its predictions, as the flags ask."""
    args, measured = framework.args, {}
    write_models(framework, output_dir)
    if dev_rows.samples:
        measured |= {f"dev_{name}": value for name, value in framework.evaluate(dev_rows).items()}
    if eval_rows:
        found = framework.predict(eval_rows)
        measured |= framework.evaluator.metrics(found)
        if args.predictions and collectives.is_main_process():
            path = Path(args.predictions)
            lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in found)
            several = (args.num_train_sets or 1) > 1
            checkpoints.write_atomically(results.set_path(path, train_set) if several else path, lines)
    if args.staged:
        lora, progress = framework.lora_module, not args.disable_tqdm
        measured["staged"] = staged_results.evaluate_prefixes(
            lora, lambda: framework.evaluate(eval_rows, False), args.staged, progress
        )
        logger.info("\n".join(staged_results.format_stages(measured["staged"], framework.task.metric_name)))
    return measured


def write_models(framework: Framework, output_dir: Path) -> None:
    """The files of `--save_merged` and `--export_rank`."""
    args = framework.args
    if args.save_merged and collectives.is_main_process():
        framework.save_merged(output_dir / "merged")
    if args.export_rank and collectives.is_main_process():
        framework.export(output_dir / f"rank{args.export_rank}")


def replay(args: OurArguments) -> int:
    """`--replay`: the trained weights again, from the pretrained model and a few kilobytes."""
    start, first = time.perf_counter(), args.train_set_seed
    output_dir = args.run_dir(args.seed if first is None else first)
    args.announce()
    with checkpoints.lock_output_dir(output_dir):
        framework = Framework(args, None)
        framework.replay(args.replay, output_dir)
        write_models(framework, output_dir)
    logger.info("%s: rebuilt in %.1f s", output_dir, time.perf_counter() - start)
    return 0


def message(error: Exception) -> str | None:
    """What to tell the person at the terminal; None where only a traceback tells it."""
    if isinstance(error, EXPECTED_ERRORS) or checkpoints.is_disk_full(error):
        return " ".join(str(error).split())
    words = str(error)
    if isinstance(error, ImportError):  # a package that a flag asks for
        return " ".join(words.split())
    if isinstance(error, pickle.UnpicklingError):
        return "a file of the checkpoint holds more than numbers and is not read; --overwrite starts afresh"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in words:
        return (
            f"out of memory ({words.splitlines()[0] if words else type(error).__name__}): lower "
            "--per_device_train_batch_size or --max_length, or load the model with --load_bfloat16; the same command "
            "goes on from the last checkpoint"
        )
    return None


def print_error(words: str, alone: bool = False) -> None:
    """The last line of a run that does not end well: rank 0's, and of another rank what it `alone` knows."""
    if collectives.is_main_process():
        print(f"run.py: {words}", file=sys.stderr)
    elif alone:
        print(f"run.py: rank {collectives.rank()}: {words}", file=sys.stderr)


def main(argv=None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    keep_pages()
    try:
        args = parse(argv)
        if args.replay:
            return replay(args)
        task = get_task(args.task_name, args.data_dir, args.own, args.metric)
        sets = draw_train_sets(args, task)
        path = results.result_path(args, [seed for seed, _, _ in sets])
        made = Path(args.output_dir) / "config.json" if args.save_merged or args.export_rank else None
        for flag, file in (("--result_file", path), ("--predictions", args.predictions), ("--output_dir", made)):
            if file:
                checkpoints.check_writable(file, flag)
        args.announce()
        measured = []
        for one in sets:
            measured.append(run_set(args, task, *one))
            gc.collect()  # the trainer and its callbacks hold each other, and the model, while the next one loads
            if len(sets) > 1 and collectives.is_main_process():
                results.write_result(results.set_path(path, one[0]), args, measured[-1:])
        if not collectives.is_main_process():
            return 0
        result = results.write_result(path, args, measured)
        if args.staged:
            labels = [f"trainset{one['train_set']}" for one in measured]
            staged_results.plot([one["staged"] for one in measured], labels, task.metric_name, path.with_suffix(".png"))
    except utils.Interrupted as signal:
        print_error(f"stopped by {signal}; the same command goes on from the last checkpoint")
        return stop_signals.EXIT_REQUEUE
    except KeyboardInterrupt:
        print_error("interrupted; the same command goes on from the last checkpoint")
        return 130
    except Exception as raised:
        error = collectives.peer_lost_error(raised) if collectives.is_network_error(raised) else raised
        said = message(error)
        if not said:
            raise
        lost = isinstance(error, collectives.PeerLost) and collectives.rank() == 1  # rank 0 itself, perhaps
        print_error(f"error: {said}", alone=lost or not isinstance(error, EXPECTED_ERRORS))
        return 2 if isinstance(error, UsageError | ImportError | pickle.UnpicklingError) else 1
    logger.info("%s: %s", path, {k: v for k, v in result.items() if k not in ("args", "sets", "versions")})
    return 0


if __name__ == "__main__":
    sys.exit(main())
