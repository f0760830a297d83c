"""Result files: one JSON per training set, one for all of them, and the table of a folder.

    python -m cli.results result/

The table has the mean over the runs that differ in nothing but the seed, and its standard deviation.
"""

import importlib.metadata
import json
import re
import sys
from pathlib import Path
from statistics import fmean, stdev

from cli.defaults import NOT_PART_OF_RUN_ID
from machine.resources import peak_memory_mb
from training import checkpoints

METRICS = ("accuracy", "macro_f1", "f1", "em", "perplexity", "loss")
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "numpy")
TABLE_ARGUMENTS = ("task_name", "model_name", "trainer", "xgblora", "lora")  # arguments that a table needs
SEEDS = {"seed", "data_seed", "train_set_seed"}
# Arguments that no rerun may be refused for, and that tell the rows of a table apart nevertheless.
ROW_ARGUMENTS = {"model_name", "data_dir", "tag", "num_eval"}
DIFFER_WITHIN_ROW = SEEDS | NOT_PART_OF_RUN_ID - ROW_ARGUMENTS


def result_path(args, seeds: list[int | None]) -> Path:
    """Return the result file of a run.

    Args:
        args: the arguments of the run.
        seeds: of its training sets; [None] where demonstrations are drawn for each example.
    """
    if args.result_file:
        return Path(args.result_file)
    words = [args.task_label, args.model_label, "sfc" if args.sfc else "", "icl_sfc" if args.icl_sfc else ""]
    for name, value in (("sampleeval", args.num_eval), ("ntrain", args.num_train), ("ndev", args.num_dev)):
        words.append(f"{name}{value}" if value is not None else "")
    words.append(args.tag)
    if seeds[0] is None:
        words.append("onetrainpereval")
    else:
        words.append(f"trainsets{seeds[0]}-{seeds[-1]}" if len(seeds) > 1 else f"trainset{seeds[0]}")
    return Path("result") / ("-".join(filter(None, words)) + ".json")


def set_path(path: Path, train_set: int | None) -> Path:
    """Return the file of one of several training sets, beside the file of all of them.

    Args:
        path: the file of all training sets.
        train_set: the seed of the training set.
    """
    stem = re.sub(r"-trainsets[0-9-]+$", "", path.stem)
    return path.with_name(f"{stem}-trainset{train_set}{path.suffix}")


def write_result(path: Path, args, sets: list[dict]) -> dict:
    """Write a result file and return its content.

    Means over the training sets stand on top, with `deviation` where there are several sets. Costs, the sets
    themselves, all arguments as they took effect, and versions follow.

    Args:
        path: where it goes.
        args: the arguments of the run.
        sets: the measurements of each training set.
    """
    names = [name for name in sets[0] if name.removeprefix("dev_") in METRICS]
    result = {name: fmean(measurement[name] for measurement in sets) for name in names}
    if len(sets) > 1:
        result["deviation"] = {name: stdev(measurement[name] for measurement in sets) for name in names}
    for name in ("forward_passes", "seconds"):
        result[name] = sum(measurement.get(name, 0) for measurement in sets)
    estimates = [row["estimated_memory_mb"] for row in sets if "estimated_memory_mb" in row]
    if estimates:
        result["estimated_memory_mb"] = max(estimates)
    result |= {
        "peak_memory_mb": round(peak_memory_mb()),
        "mode": args.mode,
        "seed": args.seed,
        "sets": sets,
        "args": json.loads(json.dumps(args.to_dict(), default=str)),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    checkpoints.write_atomically(path, json.dumps(result, indent=1) + "\n")
    return result


def read_result(path: Path) -> dict | None:
    """Return the content of a result file, None of any other file, such as predictions, one JSON a line."""
    try:
        result = json.loads(path.read_text())
        args = result["args"]
        values = [result[name] for name in METRICS if name in result]
        complete = {*TABLE_ARGUMENTS} <= args.keys() and isinstance(result["sets"], list)
        texts = all(isinstance(args[name], str) for name in ("model_name", "task_name", "trainer"))
        return result if complete and texts and all(isinstance(n, int | float) for n in values) else None
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None


def group_runs(directory: Path) -> list[list[dict]]:
    """Return the results of a folder, those together whose arguments differ in DIFFER_WITHIN_ROW alone."""
    groups: dict[str, list[dict]] = {}
    for path in sorted(directory.glob("*.json")):
        result = read_result(path)
        # The file of several sets holds nothing that the files of the sets do not hold.
        if result and len(result["sets"]) == 1:
            key = {name: value for name, value in result["args"].items() if name not in DIFFER_WITHIN_ROW}
            key["demonstrations per example"] = result["sets"][0].get("train_set") is None
            groups.setdefault(json.dumps(key, sort_keys=True), []).append(result)
    return list(groups.values())


def results_table(directory: Path) -> list[str]:
    """Return the lines of a table of all result files in a folder."""
    lines = [
        f"{'task':12} {'model':24} {'mode':8} {'trainer':8} {'runs':>4} {'metric':10} {'mean':>8} {'±':>7}"
    ]  # fmt: skip
    for results in group_runs(directory):
        args = results[0]["args"]
        mode = results[0].get("mode") or ("xgblora" if args["xgblora"] else "lora" if args["lora"] else "ft")
        model = Path(args["model_name"]).name
        row = f"{args['task_name']:12} {model:24} {mode:8} {args['trainer']:8}"
        for metric in METRICS:
            values = [result[metric] for result in results if metric in result]
            if values:
                deviation = f"{stdev(values):7.4f}" if len(values) > 1 else ""
                lines.append(f"{row} {len(values):4d} {metric:10} {fmean(values):8.4f} {deviation}")
    return lines


def main(argv=None) -> int:
    """Print the table of a folder, by default result/; return the exit status."""
    words = sys.argv[1:] if argv is None else argv
    directory = Path(words[0] if words else "result")
    if not directory.is_dir():
        print(
            f"python -m cli.results DIRECTORY: error: {directory} is not a directory", file=sys.stderr
        )  # fmt: skip
        return 2
    print("\n".join(results_table(directory)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
