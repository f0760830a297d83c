"""Staged results, as gradient boosting libraries give them: metrics of a chain after each of its boosters."""

from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from scoring.metrics import LOWER_IS_BETTER


def evaluate_prefixes(
    lora,
    evaluate: Callable[[], dict],
    every: int = 1,
    progress: bool = True,
) -> list[dict]:
    """Evaluate the chain after 0, `every`, 2 · `every`, … boosters, and after all of them.

    The model ends with the whole chain.

    Args:
        lora: a `LoRA` with a chain of boosters.
        evaluate: function that returns {metric: value} of the model as it is.

    Returns:
        [{"boosters": number of boosters, metric: value, …}, …].
    """
    bar = tqdm(lora.chain.staged(every), desc="staged", disable=not progress)
    return [{"boosters": k, **evaluate()} for k in bar]


def best_prefix(stages: list[dict], metric: str) -> int:
    """Return the number of boosters with the best value; of equal values the smallest number."""
    choose = min if metric in LOWER_IS_BETTER else max
    return choose(stages, key=lambda stage: stage[metric])["boosters"]


def format_stages(stages: list[dict], metric: str) -> list[str]:
    """Return the lines of a table, the best stage marked."""
    names = list(stages[0])
    best = best_prefix(stages, metric)
    lines = ["  ".join(f"{name:>9}" for name in names)]
    for stage in stages:
        values = [f"{stage['boosters']:9d}", *(f"{stage[name]:9.4f}" for name in names[1:])]
        mark = f"  best {metric}" if stage["boosters"] == best else ""
        lines.append("  ".join(values) + mark)
    return lines


def plot(runs: list[list[dict]], labels: list[str], metric: str, path: Path) -> None:
    """Draw a metric, and the loss too, against the number of boosters: a curve for each run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys([metric, "loss" if "loss" in runs[0][0] else metric]))
    size = (5.5 * len(names), 4)
    figure, axes = pyplot.subplots(1, len(names), figsize=size, layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for stages, label in zip(runs, labels, strict=True):
            axis.plot([s["boosters"] for s in stages], [s[name] for s in stages], marker=".", label=label)
        axis.set(xlabel="boosters", ylabel=name)
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
