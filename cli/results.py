"""Result files: one JSON per training set, and one for all of them; `python -m cli.results result/` prints them as a table.

python -m cli.results result/        # mean ± deviation over the runs that differ in nothing but the seed
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
# What the runs of one row may differ in: seeds, and what says where and how often something is written or shown.
DIFFER_WITHIN_ROW = {"seed", "data_seed", "train_set_seed"} | NOT_PART_OF_RUN_ID - {
    "model_name",
    "data_dir",
    "tag",
    "num_eval",
}


def result_path(args, seeds: list[int | None]) -> Path:
    """The result file of a run over the training sets of these seeds (None: demonstrations drawn per example)."""
    if args.result_file:
        return Path(args.result_file)
    parts = [args.task_label, args.model_label, "sfc" if args.sfc else "", "icl_sfc" if args.icl_sfc else ""]
    for word, value in (("sampleeval", args.num_eval), ("ntrain", args.num_train), ("ndev", args.num_dev)):
        parts.append(f"{word}{value}" if value is not None else "")
    several = f"trainsets{seeds[0]}-{seeds[-1]}" if len(seeds) > 1 else f"trainset{seeds[0]}"
    parts += [args.tag, "onetrainpereval" if seeds[0] is None else several]
    return Path("result") / ("-".join(filter(None, parts)) + ".json")


def set_path(path: Path, train_set: int | None) -> Path:
    """Where the file of one of several training sets goes, beside that of all."""
    return path.with_name(re.sub(r"-trainsets[0-9-]+$", "", path.stem) + f"-trainset{train_set}{path.suffix}")


def write_result(path: Path, args, sets: list[dict]) -> dict:
    """Write means over the sets on top, with `deviation` where there are several, then costs, the sets, all arguments
    as they took effect, and versions; returns what was written."""
    names = [name for name in sets[0] if name.removeprefix("dev_") in METRICS]
    result = {name: fmean(s[name] for s in sets) for name in names}
    if len(sets) > 1:
        result["deviation"] = {name: stdev(s[name] for s in sets) for name in names}
    result |= {name: sum(s.get(name, 0) for s in sets) for name in ("forward_passes", "seconds")}
    estimates = [s["estimated_memory_mb"] for s in sets if "estimated_memory_mb" in s]
    result |= {"estimated_memory_mb": max(estimates)} if estimates else {}
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
    """A result file, or None where a file is none, such as predictions, one JSON a line."""
    try:
        result = json.loads(path.read_text())
        numbers = [result[name] for name in METRICS if name in result]
        whole = {*TABLE_ARGUMENTS} <= result["args"].keys() and isinstance(result["sets"], list)
        texts = all(isinstance(result["args"][name], str) for name in ("model_name", "task_name", "trainer"))
        return result if whole and texts and all(isinstance(n, int | float) for n in numbers) else None
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None


def results_table(directory: Path) -> list[str]:
    """Lines of a table: one row for all result files in a directory whose arguments differ in nothing but `APART`."""
    rows: dict[str, list[dict]] = {}
    for path in sorted(directory.glob("*.json")):
        result = read_result(path)
        # the file of several sets holds nothing that the files of the sets don't
        if result and len(result["sets"]) == 1:
            kept = {name: value for name, value in result["args"].items() if name not in DIFFER_WITHIN_ROW}
            kept["each its own"] = result["sets"][0].get("train_set") is None  # demonstrations drawn for each example
            rows.setdefault(json.dumps(kept, sort_keys=True), []).append(result)
    lines = [f"{'task':12} {'model':24} {'mode':8} {'trainer':8} {'runs':>4} {'metric':10} {'mean':>8} {'±':>7}"]
    for results in rows.values():
        args = results[0]["args"]
        mode = results[0].get("mode") or ("xgblora" if args["xgblora"] else "lora" if args["lora"] else "ft")
        for metric in METRICS:
            values = [result[metric] for result in results if metric in result]
            if values:
                spread = f"{stdev(values):7.4f}" if len(values) > 1 else ""
                model = Path(args["model_name"]).name
                lines.append(
                    f"{args['task_name']:12} {model:24} {mode:8} {args['trainer']:8} {len(values):4d} {metric:10} "
                    f"{fmean(values):8.4f} {spread}"
                )
    return lines


def main(argv=None) -> int:
    words = sys.argv[1:] if argv is None else argv
    directory = Path(words[0] if words else "result")
    if not directory.is_dir():
        print(f"results.py: error: {directory} is not a directory", file=sys.stderr)
        return 2
    print("\n".join(results_table(directory)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
