"""Why one form of adapter learns faster under MeZO than another: exact gradients and the trace of the Hessian.

    python research/why.py    # measures, about half an hour on one core; `experiments.py plot` draws the picture

A step θ ← θ − η g z on a batch b, g = zᵀ∇L_b, changes the loss by −η ‖∇L‖² + η²/2 · E g² · tr H on average, to second
order. So the best rate is η* = ‖∇L‖² / (E g² · tr H), and the best step lowers the loss by ‖∇L‖⁴ / (2 · E g² · tr H).
E g² = E ‖∇L_b‖² over batches of 8 rows, by back-propagation; tr H = E (ℓ₊ + ℓ₋ − 2ℓ₀) / ε² over 8 directions; both on
32 rows of Reviews. SmolLM2-135M of the starter in float32. η* · √(E g²) is the rate of normalised steps. "measured" is
the change of the loss that steps of η*/2 and of η* make, mean and standard error over 12 directions; the formula says
3/4 of the decrease and the whole of it.
"""

import argparse
import json
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from arms import OUT

import run
from machine import resources
from scoring import (
    logprobs,
    packing,
)
from zo.optimizer import ZerothOrder

STARTER = ROOT / "starter"
COMMON = f"--model_name {STARTER / 'smollm2-135m'} --data_dir {STARTER} --task_name Reviews --trainer zo"
B_ONLY = "--xgblora --lora_freeze_a"
# name: (flags, ε, rate of the normalised steps, steps a round, looks at these steps)
FORMS = {
    "r 8, alpha 16": ("--lora", 1e-2, 0, 0, (0,)),
    "r 8, alpha 128": ("--lora --lora_alpha 128", 1e-2, 0, 0, (0,)),
    "r 1, A and B": ("--xgblora", 1e-2, 1e-3, 100, (0, 100)),
    "r 1, B only": (B_ONLY, 1e-2, 5e-3, 100, (0, 100)),
    "r 1, B only, upper 15 layers": (f"{B_ONLY} --xgblora_layers top:15", 1e-2, 1e-2, 25, (0, 25, 100, 200, 400)),
}
ROWS, BATCH, DIRECTIONS, STEPS, MULTIPLES = 32, 8, 8, 12, (0.5, 1.0)
# What the best rate is held against: normalised rate and loss on the dev rows of 400 steps (research/EXPERIMENTS.md).
BEST = {
    "r 8, alpha 128": "MeZO-LoRA_r_8__alpha_128__normalised__η_1e-3",
    "r 1, B only": "XGBLoRA_B_only_normalised",
    "r 1, B only, upper 15 layers": "upper_15_of_30__η_0.01",
}


def gradient(model, params, batch) -> list[torch.Tensor]:
    loss = logprobs.loss(model, batch, True)
    return [g.detach() for g in torch.autograd.grad(loss, params)]


def square(tensors) -> float:
    return sum(float(t.square().sum()) for t in tensors)


def measure(made, examples, eps: float, step_too: bool) -> dict:
    """The terms of the formula at the adapters as they stand."""
    model, lora = made.model, made.lora_module
    params = [p for p in lora.parameters() if p.requires_grad]
    of_a = [i for i, p in enumerate(params) if any(p is m.lora_A for m in lora.lora_modules)]
    batches = [packing.pack(examples[i : i + BATCH]) for i in range(0, ROWS, BATCH)]
    each = [gradient(model, params, batch) for batch in batches]
    whole = [torch.stack(gs).mean(0) for gs in zip(*each, strict=True)]
    signal, noisy = square(whole), fmean(square(gs) for gs in each)

    def loss() -> float:
        return fmean(logprobs.loss(model, batch, True).item() for batch in batches)

    def curvatures(some) -> tuple[float, list[float], ZerothOrder]:
        engine = ZerothOrder([{"params": some}], 1e-9, eps, seed=0, master=True)
        points = [(0, 0.0), *((q, s) for q in range(DIRECTIONS) for s in (1.0, -1.0))]
        losses = engine.losses_at(points, loss)
        pairs = zip(losses[1::2], losses[2::2], strict=True)
        return losses[0], [(up + down - 2 * losses[0]) / eps**2 for up, down in pairs], engine

    now, bends, engine = curvatures(params)
    trace = fmean(bends)
    found = {
        "loss": now, "gradient²": signal, "of A": square(whole[i] for i in of_a) / signal, "E g²": noisy,
        "of A, E g²": fmean(square(gs[i] for i in of_a) for gs in each) / noisy, "trace": trace,
        "rate": signal / (noisy * trace), "normalised rate": signal / (noisy**0.5 * trace),
        "decrease": signal**2 / (2 * noisy * trace),
    }  # fmt: skip
    if found["of A"]:  # at B = 0 the loss does not see A
        found["of A, trace"] = fmean(curvatures([params[i] for i in of_a])[1]) / trace
    if not step_too:
        return found
    order = [next(i for i, p in enumerate(params) if p is one) for block in engine.blocks for one in block.params]
    gs = []
    for q in range(STEPS):
        z = [part for block in engine.blocks for part in block.split(engine.directions.z(block, q))]
        grads = each[q % len(each)]
        gs.append(sum(float((grads[i] * part).sum()) for i, part in zip(order, z, strict=True)))
    found["steps"] = []
    for multiple in MULTIPLES:
        rate = multiple * found["rate"]
        moved = [after - now for after in engine.losses_at([(q, -rate * g / eps) for q, g in enumerate(gs)], loss)]
        found["steps"] += [{"multiple": multiple, "mean": fmean(moved), "error": stdev(moved) / STEPS**0.5}]
    return found


def train(made, engine: ZerothOrder, examples, steps: range, total: int, rate: float, every: int) -> None:
    """Normalised zeroth-order steps at a rate that falls to 0 at `total`; a merge after each `every`, not the last."""
    for step in steps:
        if step and step % every == 0:
            made.lora_module.merge_and_reinit()
            engine.restart()
        engine.param_groups[0]["lr"] = rate * (1 - step / total)
        batch = packing.pack([examples[(BATCH * step + i) % len(examples)] for i in range(BATCH)])
        engine.estimate(partial(logprobs.loss, made.model, batch, True), copies=2)
        engine.step()


def picture(path: Path) -> None:
    """Draw research/runs/why.json: each form's start, the way along a run, steps held against the formula."""
    from matplotlib import pyplot

    found = json.loads((OUT / "why.json").read_text())
    figure, ((start, way), (parabola, rates)) = pyplot.subplots(2, 2, figsize=(13, 9), layout="constrained")
    starts = {name: found[f"{name}, start"] for name in FORMS}
    for i, (label, key) in enumerate(
        (("‖∇L‖²", "gradient²"), ("tr H", "trace"), ("decrease of the best step", "decrease"))
    ):
        first = next(iter(starts.values()))[key]
        places = [row + 0.25 * (i - 1) for row in range(len(starts))]
        start.barh(places, [one[key] / first for one in starts.values()], 0.25, label=label)
    start.set_yticks(range(len(starts)), starts)
    start.invert_yaxis()
    start.set(xscale="log", title="At the start, as a multiple of r 8, alpha 16")
    start.legend()
    for form in FORMS:
        looks = [(0, "start"), *((n, f"after {n} steps") for n in FORMS[form][4][1:])]
        points = [(step, found[f"{form}, {name}"]) for step, name in looks]
        if len(points) > 1:
            (line,) = way.plot([s for s, _ in points], [one["decrease"] for _, one in points], "o-", label=form)
            if merged := found.get(f"{form}, after its merge"):
                way.plot(points[-1][0], merged["decrease"], "x", ms=10, mew=2, color=line.get_color())
    way.set(yscale="log", xlabel="steps", title="Along a run: decrease of the best step (×: after a merge)")
    way.legend()
    fine = [m / 20 for m in range(41)]
    parabola.plot(fine, [m * m - 2 * m for m in fine], color="0.5", label="formula")
    for i, (name, one) in enumerate(starts.items()):
        at = [s["multiple"] + 0.02 * (i - 2) for s in one["steps"]]
        means, errors = ([s[key] / one["decrease"] for s in one["steps"]] for key in ("mean", "error"))
        parabola.errorbar(at, means, errors, fmt="o", capsize=3, label=name)
    parabola.set(xlabel="rate as a multiple of η*", title="Change of the loss, in units of the best decrease")
    parabola.legend(fontsize=8)
    for i, (form, stem) in enumerate(BEST.items()):
        runs = [json.loads(p.read_text()) for p in sorted((OUT / "dev").glob(f"{stem}-400x8-seed*.json"))]
        words = runs[0]["command"].split()
        best = float(words[len(words) - 1 - words[::-1].index("--learning_rate") + 1])
        rates.loglog(found[f"{form}, start"]["normalised rate"], best, "o", color=f"C{i}", label=form)
    low, high = 1e-2, 5e-1
    rates.plot([low, high], [low / 10, high / 10], color="0.5", label="a tenth of it")
    rates.set(
        xlabel="η* of a normalised step at the start", ylabel="best rate found in 400 steps", title="One step and 400"
    )
    rates.legend()
    for axis in (start, way, parabola, rates):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    resources.keep_pages()
    found = {}

    def show(name: str, one: dict) -> None:
        found[name] = one
        (OUT / "why.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        shares = "/".join(
            f"{100 * one[key]:.0f}" if key in one else "-" for key in ("of A", "of A, E g²", "of A, trace")
        )
        measured = ", ".join(f"{s['mean']:.3f} ± {s['error']:.3f}" for s in one.get("steps", ()))
        cells = [name, *(f"{one[key]:.3f}" for key in ("loss", "gradient²", "E g²")), f"{one['trace']:.3g}", shares]
        cells += [*(f"{one[key]:.2e}" for key in ("rate", "normalised rate", "decrease")), measured]
        print(f"| {' | '.join(cells)} |", flush=True)

    heads = "", "loss", "‖∇L‖²", "E g²", "tr H", "of A in these, %", "η*", "normalised η*", "decrease", "measured"
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    for name, (flags, eps, rate, every, looks) in FORMS.items():
        made = run.Framework(run.parse(f"{COMMON} {flags}".split()), run.get_task("Reviews", STARTER))
        examples = made.prompts.examples(made.task.sample_subset("train", 0, ROWS + 400))
        look, learn = examples[:ROWS], examples[ROWS:]
        made.load()
        made.model.requires_grad_(False)
        made.lora_module.require_grad()
        show(f"{name}, start", measure(made, look, eps, True))
        of_lora = [{"params": made.lora_module.parameters()}]
        engine = ZerothOrder(
            of_lora,
            rate,
            eps,
            seed=1,
            normalize=True,
            master=True,
            set_perturbations=made.lora_module.set_perturbations,
        )
        for before, after in pairwise(looks):
            train(made, engine, learn, range(before, after), looks[-1], rate, every)
            show(f"{name}, after {after} steps", measure(made, look, eps, after == looks[-1]))
        if len(looks) == 2:
            made.lora_module.merge_and_reinit()
            show(f"{name}, after its merge", measure(made, look, eps, False))


if __name__ == "__main__":
    main()
