"""Why one form of adapter learns faster under MeZO than another: gradients and the trace of the Hessian.

    python research/why.py    # half an hour on one core; `experiments.py plot` draws the picture

A step θ ← θ − η g z on a batch b, g = zᵀ∇L_b, changes the loss by −η ‖∇L‖² + η²/2 · E g² · tr H on average,
to second order. So the best rate is η* = ‖∇L‖² / (E g² · tr H), and the best step lowers the loss by ‖∇L‖⁴ /
(2 · E g² · tr H). E g² = E ‖∇L_b‖² over batches of 8 rows, by back-propagation. tr H = E (ℓ₊ + ℓ₋ − 2ℓ₀) / ε²
over 8 directions. Both are taken on 32 rows of Reviews, with SmolLM2-135M of the starter in float32. η* · √(E
g²) is the rate of normalised steps. "measured" is the change of the loss in steps of η*/2 and of η*, mean and
standard error over 12 directions; the formula says 3/4 of the best decrease and the whole of it.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from arms import OUT

import run
from machine import resources
from scoring import logprobs, packing
from zo.optimizer import ZerothOrder

STARTER = ROOT / "starter"
COMMON = f"--model_name {STARTER / 'smollm2-135m'} --data_dir {STARTER} --task_name Reviews --trainer zo"
B_ONLY = "--xgblora --lora_freeze_a"


class Form(NamedTuple):
    """A form of adapter, and the run along which it is measured.

    Attributes:
        flags: of run.py.
        eps: ε of the perturbations.
        rate: of the normalised steps.
        round_steps: steps of a round.
        measured_at: the steps after which the terms are measured.
    """

    flags: str
    eps: float = 1e-2
    rate: float = 0
    round_steps: int = 0
    measured_at: tuple[int, ...] = (0,)


FORMS = {
    "r 8, alpha 16": Form("--lora"),
    "r 8, alpha 128": Form("--lora --lora_alpha 128"),
    "r 1, A and B": Form("--xgblora", 1e-2, 1e-3, 100, (0, 100)),
    "r 1, B only": Form(B_ONLY, 1e-2, 5e-3, 100, (0, 100)),
    "r 1, B only, upper 15 layers": Form(
        f"{B_ONLY} --xgblora_layers top:15", 1e-2, 1e-2, 25, (0, 25, 100, 200, 400)
    ),
}  # fmt: skip
NUM_ROWS = 32
BATCH_SIZE = 8
NUM_DIRECTIONS = 8
NUM_STEPS = 12
MULTIPLES = (0.5, 1.0)  # of the best rate
# Form -> the setting of 400 steps with the best rate on the dev rows (research/EXPERIMENTS.md).
BEST_SETTINGS = {
    "r 8, alpha 128": "MeZO-LoRA_r_8__alpha_128__normalised__η_1e-3",
    "r 1, B only": "XGBLoRA_B_only_normalised",
    "r 1, B only, upper 15 layers": "upper_15_of_30__η_0.01",
}


def gradient(model, params, batch) -> list[torch.Tensor]:
    """Return the gradient of the loss of a batch, by back-propagation."""
    loss = logprobs.loss(model, batch, True)
    return [g.detach() for g in torch.autograd.grad(loss, params)]


def squared_norm(tensors) -> float:
    """Return the sum of the squares of all elements."""
    return sum(float(t.square().sum()) for t in tensors)


class Measurement:
    """The terms of the formula at the adapters as they stand.

    Args:
        framework: with the model and its adapters.
        examples: NUM_ROWS rows.
        eps: ε of the perturbations.
    """

    def __init__(self, framework: run.Framework, examples, eps: float):
        self.model = framework.model
        lora = framework.lora_module
        self.eps = eps
        self.params = [p for p in lora.parameters() if p.requires_grad]
        a_matrices = [m.lora_A for m in lora.lora_modules]
        self.a_indices = [i for i, p in enumerate(self.params) if any(p is a for a in a_matrices)]
        starts = range(0, NUM_ROWS, BATCH_SIZE)
        self.batches = [packing.pack(examples[i : i + BATCH_SIZE]) for i in starts]
        self.gradients = [gradient(self.model, self.params, batch) for batch in self.batches]

    def loss(self) -> float:
        """Return the mean loss of the batches."""
        return fmean(logprobs.loss(self.model, batch, True).item() for batch in self.batches)

    def curvatures(self, params) -> tuple[float, list[float], ZerothOrder]:
        """Return loss, zᵀHz of each direction of these parameters, and the engine that draws directions."""
        engine = ZerothOrder([{"params": params}], 1e-9, self.eps, seed=0, master=True)
        points = [(0, 0.0), *((q, sign) for q in range(NUM_DIRECTIONS) for sign in (1.0, -1.0))]
        center, *sides = engine.losses_at(points, self.loss)
        pairs = zip(sides[0::2], sides[1::2], strict=True)
        return center, [(plus + minus - 2 * center) / self.eps**2 for plus, minus in pairs], engine

    def terms(self, with_steps: bool) -> dict:
        """Return the terms of the formula, and with `with_steps` the losses after real steps."""
        mean_gradient = [torch.stack(gs).mean(0) for gs in zip(*self.gradients, strict=True)]
        signal = squared_norm(mean_gradient)
        mean_square = fmean(squared_norm(gs) for gs in self.gradients)
        loss, curvatures, engine = self.curvatures(self.params)
        trace = fmean(curvatures)
        a_mean_square = fmean(squared_norm(gs[i] for i in self.a_indices) for gs in self.gradients)
        terms = {
            "loss": loss,
            "gradient²": signal,
            "of A": squared_norm(mean_gradient[i] for i in self.a_indices) / signal,
            "E g²": mean_square,
            "of A, E g²": a_mean_square / mean_square,
            "trace": trace,
            "rate": signal / (mean_square * trace),
            "normalised rate": signal / (mean_square**0.5 * trace),
            "decrease": signal**2 / (2 * mean_square * trace),
        }
        if terms["of A"]:  # at B = 0 the loss does not depend on A
            a_params = [self.params[i] for i in self.a_indices]
            terms["of A, trace"] = fmean(self.curvatures(a_params)[1]) / trace
        if with_steps:
            terms["steps"] = self.steps(engine, terms["rate"], loss)
        return terms

    def steps(self, engine: ZerothOrder, best_rate: float, loss: float) -> list[dict]:
        """Return mean and standard error over directions of a step's change of the loss, for each multiple.

        Args:
            engine: draws the directions.
            best_rate: η*.
            loss: before the step.
        """
        in_blocks = [p for block in engine.blocks for p in block.params]
        order = [next(i for i, p in enumerate(self.params) if p is param) for param in in_blocks]
        projected = []
        for q in range(NUM_STEPS):
            z = [piece for block in engine.blocks for piece in block.split(engine.directions.z(block, q))]
            grads = self.gradients[q % len(self.gradients)]
            products = [float((grads[i] * piece).sum()) for i, piece in zip(order, z, strict=True)]
            projected.append(sum(products))
        results = []
        for multiple in MULTIPLES:
            rate = multiple * best_rate
            points = [(q, -rate * g / self.eps) for q, g in enumerate(projected)]
            changes = [new_loss - loss for new_loss in engine.losses_at(points, self.loss)]
            error = stdev(changes) / NUM_STEPS**0.5
            results.append({"multiple": multiple, "mean": fmean(changes), "error": error})
        return results


def train_form(framework, engine: ZerothOrder, examples, steps: range, form: Form) -> None:
    """Take normalised zeroth-order steps, with a merge after each round but the last.

    The rate falls from that of the form to 0 at the last step that is measured.

    Args:
        framework: with the model and its adapters.
        engine: of the adapters.
        examples: the training rows.
        steps: numbers of the steps.
        form: rate, length of a round and of the run.
    """
    for step in steps:
        if step and step % form.round_steps == 0:
            framework.lora_module.merge_and_reinit()
            engine.restart()
        engine.param_groups[0]["lr"] = form.rate * (1 - step / form.measured_at[-1])
        rows = [examples[(BATCH_SIZE * step + i) % len(examples)] for i in range(BATCH_SIZE)]
        engine.estimate(partial(logprobs.loss, framework.model, packing.pack(rows), True), copies=2)
        engine.step()


# ---- the picture ----


def plot_terms(path: Path) -> None:
    """Draw research/runs/why.json: each form at its start, along a run, and steps against the formula."""
    from matplotlib import pyplot

    terms = json.loads((OUT / "why.json").read_text())
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9), layout="constrained")
    starts = {name: terms[f"{name}, start"] for name in FORMS}
    plot_starts(axes[0, 0], starts)
    plot_runs(axes[0, 1], terms)
    plot_steps(axes[1, 0], starts)
    plot_rates(axes[1, 1], starts)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def plot_starts(axis, starts: dict[str, dict]) -> None:
    """Draw the terms of each form at its start, as multiples of those of the first form."""
    bars = {"‖∇L‖²": "gradient²", "tr H": "trace", "decrease of the best step": "decrease"}
    for i, (label, key) in enumerate(bars.items()):
        reference = next(iter(starts.values()))[key]
        places = [row + 0.25 * (i - 1) for row in range(len(starts))]
        axis.barh(places, [terms[key] / reference for terms in starts.values()], 0.25, label=label)
    axis.set_yticks(range(len(starts)), starts)
    axis.invert_yaxis()
    axis.set(xscale="log", title="At the start, as a multiple of r 8, alpha 16")
    axis.legend()


def plot_runs(axis, terms: dict[str, dict]) -> None:
    """Draw the decrease of the best step along the run of each form."""
    for name, form in FORMS.items():
        moments = {0: "start"} | {step: f"after {step} steps" for step in form.measured_at[1:]}
        decreases = [terms[f"{name}, {moment}"]["decrease"] for moment in moments.values()]
        if len(decreases) > 1:
            (line,) = axis.plot(list(moments), decreases, "o-", label=name)
            if terms_after_merge := terms.get(f"{name}, after its merge"):
                last_step = list(moments)[-1]
                axis.plot(last_step, terms_after_merge["decrease"], "x", ms=10, mew=2, color=line.get_color())
    axis.set(yscale="log", xlabel="steps", title="Along a run: decrease of the best step (×: after a merge)")
    axis.legend()


def plot_steps(axis, starts: dict[str, dict]) -> None:
    """Draw the measured change of the loss in a step, beside the parabola of the formula."""
    multiples = [m / 20 for m in range(41)]
    axis.plot(multiples, [m * m - 2 * m for m in multiples], color="0.5", label="formula")
    for i, (name, terms) in enumerate(starts.items()):
        places = [step["multiple"] + 0.02 * (i - 2) for step in terms["steps"]]
        means = [step["mean"] / terms["decrease"] for step in terms["steps"]]
        errors = [step["error"] / terms["decrease"] for step in terms["steps"]]
        axis.errorbar(places, means, errors, fmt="o", capsize=3, label=name)
    axis.set(xlabel="rate as a multiple of η*", title="Change of the loss, in units of the best decrease")
    axis.legend(fontsize=8)


def plot_rates(axis, starts: dict[str, dict]) -> None:
    """Draw the best rate of 400 steps against the best rate of a step at the start."""
    for i, (name, stem) in enumerate(BEST_SETTINGS.items()):
        paths = sorted((OUT / "dev").glob(f"{stem}-400x8-seed*.json"))
        words = json.loads(paths[0].read_text())["command"].split()
        index = len(words) - 1 - words[::-1].index("--learning_rate")
        axis.loglog(starts[name]["normalised rate"], float(words[index + 1]), "o", color=f"C{i}", label=name)
    limits = [1e-2, 5e-1]
    axis.plot(limits, [limit / 10 for limit in limits], color="0.5", label="a tenth of it")
    axis.set(
        xlabel="η* of a normalised step at the start",
        ylabel="best rate found in 400 steps",
        title="One step and 400",
    )
    axis.legend()


# ---- the table ----


def print_terms(name: str, terms: dict) -> None:
    """Print a row of the table."""
    a_shares = [f"{100 * terms[k]:.0f}" if k in terms else "-" for k in ("of A", "of A, E g²", "of A, trace")]
    steps = ", ".join(f"{s['mean']:.3f} ± {s['error']:.3f}" for s in terms.get("steps", ()))
    cells = [name, *(f"{terms[key]:.3f}" for key in ("loss", "gradient²", "E g²"))]
    cells += [f"{terms['trace']:.3g}", "/".join(a_shares)]
    cells += [f"{terms[key]:.2e}" for key in ("rate", "normalised rate", "decrease")]
    print(f"| {' | '.join([*cells, steps])} |", flush=True)


def measure_form(form: Form) -> Iterator[tuple[str, dict]]:
    """Yield (moment, terms) of a form: at its start, along its run, and after a merge."""
    framework = run.Framework(run.parse(f"{COMMON} {form.flags}".split()), run.get_task("Reviews", STARTER))
    samples = framework.task.sample_subset("train", 0, NUM_ROWS + 400)
    examples = framework.prompts.examples(samples)
    measured_rows = examples[:NUM_ROWS]
    training_rows = examples[NUM_ROWS:]
    framework.load()
    lora = framework.lora_module
    framework.model.requires_grad_(False)
    lora.require_grad()
    yield "start", Measurement(framework, measured_rows, form.eps).terms(with_steps=True)
    engine = ZerothOrder(
        [{"params": lora.parameters()}],
        form.rate,
        form.eps,
        seed=1,
        normalize=True,
        master=True,
        set_perturbations=lora.set_perturbations,
    )
    for start, stop in pairwise(form.measured_at):
        train_form(framework, engine, training_rows, range(start, stop), form)
        at_end = stop == form.measured_at[-1]
        yield f"after {stop} steps", Measurement(framework, measured_rows, form.eps).terms(with_steps=at_end)
    if len(form.measured_at) == 2:
        lora.merge_and_reinit()
        yield "after its merge", Measurement(framework, measured_rows, form.eps).terms(with_steps=False)


def main() -> None:
    """Measure every form, print the table and write research/runs/why.json."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    resources.keep_pages()
    heads = ["", "loss", "‖∇L‖²", "E g²", "tr H", "of A in these, %"]
    heads += ["η*", "normalised η*", "decrease", "measured"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    all_terms = {}
    for form_name, form in FORMS.items():
        for moment, terms in measure_form(form):
            name = f"{form_name}, {moment}"
            all_terms[name] = terms
            (OUT / "why.json").write_text(json.dumps(all_terms, indent=1, ensure_ascii=False) + "\n")
            print_terms(name, terms)


if __name__ == "__main__":
    main()
