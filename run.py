"""One program for everything: load a model, inject adapters, train with forward passes only, evaluate.

    python run.py --model_name starter/smollm2-135m --data_dir starter --task_name Reviews
    --xgblora --trainer zo \\
        --xgblora_steps_per_iteration 50 --max_steps 400

`main` reads the flags, draws the sets of training rows, runs each and writes the results. The flags are in
cli/arguments.py, what is done with a model and a task in framework.py, what a step is in trainer.py and zo/.
"""

import gc
import json
import logging
import pickle
import sys
import time
from pathlib import Path

import torch

from cli import results
from cli.arguments import OurArguments
from cli.command_line import EXAMPLES, parse
from distributed import collectives, stop_signals
from framework import Framework
from machine.resources import keep_pages
from scoring import staged_results
from scoring.prompts import EvalBatch
from tasks import get_task
from training import checkpoints
from utils import Interrupted, UsageError

__all__ = ["Framework", "OurArguments", "get_task", "main", "parse"]

logger = logging.getLogger("run")

# Errors whose text says all there is to say, and those that every rank raises where one rank does.
EXPECTED_ERRORS = (
    UsageError, FloatingPointError, checkpoints.StateNotSaved, collectives.PeerLost, collectives.PeerFailed,
    collectives.Diverged,
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the program with the flags of `argv` (None: of the command line); return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    words = sys.argv[1:] if argv is None else argv
    if not words:
        if collectives.is_main_process():
            print(EXAMPLES, end="", file=sys.stderr)
        return 2
    keep_pages()
    try:
        args = read_arguments(words)
        if args.replay:
            return run_replay(args)
        return run(args)
    except Interrupted as signal:
        print_error(f"stopped by {signal}; the same command goes on from the last checkpoint")
        return stop_signals.EXIT_REQUEUE
    except KeyboardInterrupt:
        print_error("interrupted; the same command goes on from the last checkpoint")
        return 130
    except Exception as error:
        return report_error(error)


def read_arguments(words: list[str]) -> OurArguments:
    """Return the arguments of a command line, and join the other ranks where torchrun has started some."""
    gpus = collectives.choose_gpu()
    args = parse(words)
    if args.sharded and not args.use_cpu:
        collectives.refuse_shared_gpus(gpus)
    collectives.join_process_group(args.ddp_timeout, args.sharded)
    return args


def run(args: OurArguments) -> int:
    """Train and evaluate on each training set, and write the results; return the exit status."""
    task = get_task(args.task_name, args.data_dir, args.custom_task, args.metric)
    args = args.for_task(task)
    train_sets = draw_train_sets(args, task)
    path = results.result_path(args, [seed for seed, _, _ in train_sets])
    writes_models = args.save_merged or args.export_rank
    model_file = Path(args.output_dir) / "config.json" if writes_models else None
    for flag, file in (
        ("--result_file", path),
        ("--predictions", args.predictions),
        ("--output_dir", model_file),
    ):
        if file:
            checkpoints.check_writable(file, flag)
    args.announce()
    measurements = []
    for train_set in train_sets:
        measurements.append(run_set(args, task, *train_set))
        gc.collect()  # trainer and callbacks hold each other, and the model, while the next model loads
        if len(train_sets) > 1 and collectives.is_main_process():
            results.write_result(results.set_path(path, train_set[0]), args, measurements[-1:])
    if not collectives.is_main_process():
        return 0
    result = results.write_result(path, args, measurements)
    if args.staged:
        labels = [f"trainset{measurement['train_set']}" for measurement in measurements]
        stages = [measurement["staged"] for measurement in measurements]
        staged_results.plot(stages, labels, task.metric_name, path.with_suffix(".png"))
    logger.info("%s: %s", path, {k: v for k, v in result.items() if k not in ("args", "sets", "versions")})
    return 0


def draw_train_sets(args: OurArguments, task) -> list[tuple[int | None, list, list]]:
    """Draw the training rows, and dev rows from the end of the draw, never out of the training rows.

    Returns:
        (seed, training rows, dev rows) of each set; a single (None, [], []) where nothing is trained and
        every evaluation example gets demonstrations of its own.

    Raises:
        UsageError: the task has fewer rows.
    """
    available, dev = len(task.samples["train"]), args.num_dev or 0
    size = args.num_train
    if size is None:
        size = available - dev if args.learns else 0
    if size + dev > available or (args.learns and size < 1):
        raise UsageError(
            f"--num_train {size} and --num_dev {dev}: {task.name} has {available} training rows in all"
        )
    if args.num_train_sets is None and args.train_set_seed is None:
        if not args.learns:
            return [(None, [], [])]
        seeds = [args.seed]
    else:
        first_seed = args.train_set_seed or 0
        seeds = range(first_seed, first_seed + (args.num_train_sets or 1))
    train_sets = []
    for seed in seeds:
        rows = task.sample_subset("train", seed, size + dev)
        train_sets.append((seed, rows[:size], rows[size:]))
    return train_sets


def run_set(args: OurArguments, task, train_set: int | None, train_samples: list, dev_samples: list) -> dict:
    """Train and evaluate on one training set, from a fresh model.

    Returns:
        {metric: value, "dev_…": value, forward passes, seconds, …}
    """
    framework = Framework(args, task)
    output_dir = args.run_dir(train_set or 0)
    trains = args.trainer != "none" and not args.linear_probing
    dev_rows, eval_rows = evaluation_rows(framework, train_set, train_samples, dev_samples)
    measurement = {"train_set": train_set}
    start = time.perf_counter()
    cpu_start = time.process_time()
    with stop_signals.StopSignals(args.save_on_interrupt and trains) as signals:
        if trains:
            with checkpoints.lock_on_main(output_dir):
                framework.train(train_samples, dev_rows, output_dir, signals)
            measurement["forward_passes"] = framework.trainer.forward_passes
            if collectives.world_size() > 1:
                measurement["ranks"] = framework.trainer.exchange.report()
                logger.info("ranks: %s", measurement["ranks"])
        elif args.linear_probing:
            framework.fit_probe(train_samples)
        measurement["train_seconds"] = round(time.perf_counter() - start, 2)
        measurement["train_cpu_seconds"] = round(time.process_time() - cpu_start, 2)  # of all threads
        with signals.interruptible():
            measurement |= evaluate_and_write(framework, output_dir, train_set, dev_rows, eval_rows)
    measurement["seconds"] = round(time.perf_counter() - start, 2)
    if framework.estimate:
        measurement["estimated_memory_mb"] = round(framework.estimate.total / 1e6)
    if framework.lora_module:
        measurement["boosters"] = len(framework.lora_module.boosters)
    return measurement


def evaluation_rows(
    framework: Framework, train_set, train_samples, dev_samples
) -> tuple[EvalBatch, EvalBatch | None]:
    """Return the dev rows and the validation rows as an evaluation takes them; None with `--no_eval`.

    Where nothing is learned the training rows are demonstrations: the same for all,
    or a set for each example.
    """
    args, task = framework.args, framework.task
    eval_samples = task.sample_subset("validation", args.train_set_seed or 0, args.num_eval or sys.maxsize)
    demonstrations = [] if args.learns else train_samples
    if train_set is None and args.num_train:
        demonstrations = [task.sample_subset("train", i, args.num_train) for i in range(len(eval_samples))]
    eval_rows = None if args.no_eval else framework.eval_batch(eval_samples, demonstrations)
    return framework.eval_batch(dev_samples), eval_rows


def evaluate_and_write(framework: Framework, output_dir: Path, train_set, dev_rows, eval_rows) -> dict:
    """Evaluate the model, and write the files and predictions that the flags ask for; return the metrics."""
    args = framework.args
    measurement = {}
    write_models(framework, output_dir)
    if dev_rows.samples:
        measurement |= {f"dev_{name}": value for name, value in framework.evaluate(dev_rows).items()}
    if eval_rows:
        predictions = framework.predict(eval_rows)
        measurement |= framework.evaluator.metrics(predictions)
        if args.predictions and collectives.is_main_process():
            path = Path(args.predictions)
            several_sets = (args.num_train_sets or 1) > 1
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
            checkpoints.write_atomically(results.set_path(path, train_set) if several_sets else path, lines)
    if args.staged:
        measurement["staged"] = staged_results.evaluate_prefixes(
            framework.lora_module,
            lambda: framework.evaluate(eval_rows, False),
            args.staged,
            framework.evaluator.progress,
        )
        logger.info(
            "\n".join(staged_results.format_stages(measurement["staged"], framework.task.metric_name))
        )
    return measurement


def write_models(framework: Framework, output_dir: Path) -> None:
    """Write the files of `--save_merged` and `--export_rank`."""
    args = framework.args
    if args.save_merged and collectives.is_main_process():
        framework.save_merged(output_dir / "merged")
    if args.export_rank and collectives.is_main_process():
        framework.export(output_dir / f"rank{args.export_rank}")


def run_replay(args: OurArguments) -> int:
    """Rebuild trained weights from pretrained ones and a trajectory (`--replay`); return the exit status."""
    start = time.perf_counter()
    output_dir = args.run_dir(args.seed if args.train_set_seed is None else args.train_set_seed)
    args.announce()
    with checkpoints.lock_output_dir(output_dir):
        framework = Framework(args, None)
        framework.rebuild_from_trajectory(args.replay, output_dir)
        write_models(framework, output_dir)
    logger.info("%s: rebuilt in %.1f s", output_dir, time.perf_counter() - start)
    return 0


# ---- errors ----


def report_error(raised: Exception) -> int:
    """Print one line about an error and return the exit status; raises an error that needs its traceback."""
    error = collectives.peer_lost_error(raised) if collectives.is_network_error(raised) else raised
    line = message(error)
    if not line:
        raise raised
    # Rank 0 may be the rank that is lost: then rank 1 speaks.
    speaks_for_rank_0 = isinstance(error, collectives.PeerLost) and collectives.rank() == 1
    print_error(f"error: {line}", on_this_rank=speaks_for_rank_0 or not isinstance(error, EXPECTED_ERRORS))
    return 2 if isinstance(error, UsageError | ImportError | pickle.UnpicklingError) else 1


def message(error: Exception) -> str | None:
    """Return the line for the person at the terminal, or None for an error that needs its traceback."""
    text = str(error)
    # An ImportError names a package that a flag asks for.
    if isinstance(error, (*EXPECTED_ERRORS, ImportError)) or checkpoints.is_disk_full(error):
        return " ".join(text.split())
    if isinstance(error, pickle.UnpicklingError):
        return "a file of the checkpoint holds more than numbers and is not read; --overwrite starts afresh"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return (
            f"out of memory ({text.splitlines()[0] if text else type(error).__name__}): lower "
            "--per_device_train_batch_size or --max_length, or load the model with --load_bfloat16; "
            "the same command goes on from the last checkpoint"
        )
    return None


def print_error(text: str, on_this_rank: bool = False) -> None:
    """Print the last line of a run that does not end well.

    Args:
        on_this_rank: print it on another rank than 0 too, because only this rank knows of the error.
    """
    if collectives.is_main_process():
        print(f"run.py: {text}", file=sys.stderr)
    elif on_this_rank:
        print(f"run.py: rank {collectives.rank()}: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
