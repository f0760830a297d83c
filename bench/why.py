"""Why one form of adapter learns faster under MeZO than another: exact gradients and the trace of the Hessian.

    python bench/why.py [--steps 100]

A step θ ← θ − η g z on a batch b, g = zᵀ∇L_b, changes the loss by −η ‖∇L‖² + η²/2 · E g² · tr H on average, to second
order. So the best rate is η* = ‖∇L‖² / (E g² · tr H), and the best step lowers the loss by ‖∇L‖⁴ / (2 · E g² · tr H).
E g² = E ‖∇L_b‖² over batches of 8 rows, by back-propagation; tr H = E (ℓ₊ + ℓ₋ − 2ℓ₀) / ε² over 8 directions; both on
32 rows of Reviews. SmolLM2-135M of the starter in float32. η* · √(E g²) is the rate of normalised steps.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import run  # noqa: E402
import scoring  # noqa: E402
import utils  # noqa: E402
from zo import ZerothOrder  # noqa: E402

STARTER = ROOT / "starter"
COMMON = f"--model_name {STARTER / 'smollm2-135m'} --data_dir {STARTER} --task_name Reviews --trainer zo"
FORMS = {
    "r 8, alpha 16": ("--lora", 1e-2),
    "r 8, alpha 128": ("--lora --lora_alpha 128", 1e-2),
    "r 1, A and B": ("--xgblora", 1e-2),
    "r 1, B only": ("--xgblora --lora_freeze_a", 1e-2),
    "r 1, B only, upper 15 layers": ("--xgblora --lora_freeze_a --xgblora_layers top:15", 1e-2),
}
ROWS, BATCH, DIRECTIONS = 32, 8, 8


def gradient(model, params, batch) -> list[torch.Tensor]:
    loss = scoring.loss(model, batch, True)
    return [g.detach() for g in torch.autograd.grad(loss, params)]


def measure(made, examples, eps: float, seed: int) -> dict:
    """The terms of the formula at the adapters as they stand."""
    model, lora = made.model, made.lora_module
    params = [p for p in lora.parameters() if p.requires_grad]
    of_a = [i for i, p in enumerate(params) if any(p is m.lora_A for m in lora.lora_modules)]
    batches = [scoring.pack(examples[i : i + BATCH]) for i in range(0, ROWS, BATCH)]
    each = [gradient(model, params, batch) for batch in batches]
    whole = [torch.stack(gs).mean(0) for gs in zip(*each, strict=True)]
    squares = [float(g.square().sum()) for g in whole]
    noisy = fmean(sum(float(g.square().sum()) for g in gs) for gs in each)

    def loss() -> float:
        return fmean(scoring.loss(model, batch, True).item() for batch in batches)

    engine = ZerothOrder([{"params": params}], 1e-9, eps, seed=seed, master=True)
    points = [(0, 0.0), *((q, s) for q in range(DIRECTIONS) for s in (1.0, -1.0))]
    losses = engine.losses_at(points, loss)
    curvature = [losses[1 + 2 * q] + losses[2 + 2 * q] - 2 * losses[0] for q in range(DIRECTIONS)]
    trace = fmean(curvature) / eps**2
    square = sum(squares)
    return {
        "loss": losses[0], "gradient²": square, "of A": sum(squares[i] for i in of_a) / square, "E g²": noisy,
        "trace": trace, "rate": square / (noisy * trace), "normalised rate": square / (noisy**0.5 * trace),
        "decrease": square**2 / (2 * noisy * trace),
    }  # fmt: skip


def train(made, examples, steps: int, rate: float, eps: float) -> None:
    """Normalised zeroth-order steps at a falling rate."""
    lora = made.lora_module
    engine = ZerothOrder(
        [{"params": lora.parameters()}], rate, eps, seed=1, normalize=True, master=True, spread=lora.spread
    )
    for step in range(steps):
        engine.param_groups[0]["lr"] = rate * (1 - step / steps)
        batch = scoring.pack([examples[(BATCH * step + i) % len(examples)] for i in range(BATCH)])
        engine.estimate(partial(scoring.loss, made.model, batch, True), copies=2)
        engine.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="of training, before the second look")
    args = parser.parse_args()
    utils.keep_pages()
    found = {}

    def show(name: str, one: dict) -> None:
        found[name] = one
        print(
            f"{name:42} {one['loss']:6.3f} {one['gradient²']:9.3f} {100 * one['of A']:9.1f} {one['E g²']:9.3f} "
            f"{one['trace']:9.3g} {one['rate']:9.2e} {one['normalised rate']:9.2e} {one['decrease']:9.2e}",
            flush=True,
        )

    heads = " ".join(f"{head:>9}" for head in ("‖∇L‖²", "of A in %", "E g²", "tr H", "η*", "normed η*", "decrease"))
    print(f"{'':42} {'loss':>6} {heads}", flush=True)
    for name, (flags, eps) in FORMS.items():
        made = run.Framework(run.parse(f"{COMMON} {flags}".split()), run.get_task("Reviews", STARTER))
        rows = made.task.sample_subset("train", 0, ROWS + 400)
        examples = made.prompts.examples(rows)
        look, learn = examples[:ROWS], examples[ROWS:]
        made.model.requires_grad_(False)
        made.lora_module.require_grad()
        show(f"{name}, start", measure(made, look, eps, 0))
        if name in ("r 1, A and B", "r 1, B only"):
            train(made, learn, args.steps, 1e-3 if "A and B" in name else 5e-3, eps)
            show(f"{name}, after {args.steps} steps", measure(made, look, eps, 0))
            made.lora_module.merge_and_reinit()
            show(f"{name}, after its merge", measure(made, look, eps, 0))
    out = ROOT / "bench" / "experiments" / "why.json"
    out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
