"""What half precision does to 20,000 updates of full parameters: nearest, by chance, as the MeZO code does it.

    python research/rounding.py

A tensor of normal weights of scale 0.02 takes MeZO's updates θ ← θ − ηgz at the published η of 1e-6, with g of a given
root mean square, the same z in every arm; the truth is the sum in float64. `in place` perturbs and restores the weights
in their own dtype (+ε, −2ε, +ε) before each update. Lost: elements that an update of the first step does not move.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from zo.optimizer import ZerothOrder

ETA, EPS = 1e-6, 1e-3


@torch.no_grad()
def arms(dtype: torch.dtype, n: int, steps: int, g_rms: float) -> None:
    generator = torch.Generator().manual_seed(0)
    start = (torch.randn(n, generator=generator) * 0.02).to(dtype)
    gs = (torch.randn(steps, generator=generator) * g_rms).tolist()
    chance = torch.nn.Parameter(start.clone())
    engine = ZerothOrder([chance], ETA, EPS, master=False)
    truth, nearest, in_place, lost = start.double(), start.clone(), start.clone(), {}
    for step, g in enumerate(gs):
        z = engine.directions.z(engine.blocks[0], 0)
        before = chance.clone(), nearest.clone()
        engine.losses = [g * EPS, -g * EPS]
        engine.step()
        c = engine.trajectory.coefficients[-1][0]
        truth -= c * z.double()
        nearest = (nearest.float() - c * z).to(dtype)
        for scale in (EPS, -2 * EPS, EPS, -c):
            in_place += (z * scale).to(dtype)
        if step == 0:
            lost = {"chance": chance == before[0], "nearest": nearest == before[1]}
    norm = start.double().norm()
    moved = (truth - start.double()).norm() / norm
    print(f"\n{dtype}: true movement {moved:.2%} of the weights' norm after {steps} steps, |g| {g_rms}")
    for name, theta in (("chance", chance), ("nearest", nearest), ("in place", in_place)):
        error = (theta.double() - truth).norm() / norm
        along = ((theta.double() - start.double()) * (truth - start.double())).sum() / (
            truth - start.double()
        ).square().sum()
        gone = f"{lost[name].double().mean():.1%}" if name in lost else ""
        print(f"{name:9} off the truth {error:7.2%}   share of the true movement {along:6.2f}   lost updates {gone}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--elements", type=int, default=1 << 14)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--g", type=float, nargs="+", default=[1.15, 5.0])
    args = parser.parse_args()
    for dtype in (torch.float16, torch.bfloat16):
        for g in args.g:
            arms(dtype, args.elements, args.steps, g)


if __name__ == "__main__":
    main()
