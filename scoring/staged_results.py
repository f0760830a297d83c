"""Staged results, as gradient boosting libraries give them: what a chain is worth after each of its boosters."""

from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from scoring.metrics import LOWER_IS_BETTER


def evaluate_prefixes(lora, evaluate: Callable[[], dict], every: int = 1, progress: bool = True) -> list[dict]:
    """[{"boosters": k, metric: value}] for k = 0, every, 2 · every, … and the whole chain; the model ends with that."""
    return [{"boosters": k, **evaluate()} for k in tqdm(lora.staged(every), desc="staged", disable=not progress)]


def best_prefix(stages: list[dict], metric: str) -> int:
    """The number of boosters with the best value; of equal ones the smallest."""
    choose = min if metric in LOWER_IS_BETTER else max
    return choose(stages, key=lambda stage: stage[metric])["boosters"]


def format_stages(stages: list[dict], metric: str) -> list[str]:
    """Lines of a table, the best stage marked."""
    names, chosen = list(stages[0]), best_prefix(stages, metric)
    lines = ["  ".join(f"{name:>9}" for name in names)]
    for stage in stages:
        values = [f"{stage['boosters']:9d}", *(f"{stage[name]:9.4f}" for name in names[1:])]
        lines.append("  ".join(values) + (f"  best {metric}" if stage["boosters"] == chosen else ""))
    return lines


def plot(runs: list[list[dict]], labels: list[str], metric: str, path: Path) -> None:
    """Draw a metric, and the loss where it is another, against the number of boosters: a curve for each run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys([metric, "loss" if "loss" in runs[0][0] else metric]))
    figure, axes = pyplot.subplots(1, len(names), figsize=(5.5 * len(names), 4), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for stages, label in zip(runs, labels, strict=True):
            axis.plot([s["boosters"] for s in stages], [s[name] for s in stages], marker=".", label=label)
        axis.set(xlabel="boosters", ylabel=name)
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
