"""The effect of half precision on 20,000 updates of all weights: rounded to nearest, by chance, or in place.

    python research/rounding.py

A tensor of normal weights of scale 0.02 takes MeZO's updates θ ← θ − ηgz at the published η of 1e-6. g has a
given root mean square, and every arm has the same z; the truth is the sum in float64. `in place`, as the MeZO
code does it, perturbs and restores the weights in their own dtype (+ε, −2ε, +ε) before each update. `lost
updates` are elements that an update of the first step does not move.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from zo.optimizer import ZerothOrder

ETA = 1e-6
EPS = 1e-3


@torch.no_grad()
def compare_roundings(dtype: torch.dtype, num_elements: int, steps: int, g_rms: float) -> None:
    """Print how far each way of rounding is off the truth.

    Args:
        dtype: of the weights.
        num_elements: of the tensor.
        steps: number of updates.
        g_rms: root mean square of g.
    """
    generator = torch.Generator().manual_seed(0)
    start = (torch.randn(num_elements, generator=generator) * 0.02).to(dtype)
    gs = (torch.randn(steps, generator=generator) * g_rms).tolist()
    chance = torch.nn.Parameter(start.clone())
    engine = ZerothOrder([chance], ETA, EPS, master=False)
    truth = start.double()
    nearest = start.clone()
    in_place = start.clone()
    unmoved_elements = {}
    for step, g in enumerate(gs):
        z = engine.directions.z(engine.blocks[0], 0)
        engine.losses = [g * EPS, -g * EPS]
        engine.step()
        coefficient = engine.trajectory.coefficients[-1][0]
        truth -= coefficient * z.double()
        nearest = (nearest.float() - coefficient * z).to(dtype)
        for scale in (EPS, -2 * EPS, EPS, -coefficient):
            in_place += (z * scale).to(dtype)
        if step == 0:
            unmoved_elements = {"chance": chance == start, "nearest": nearest == start}
    movement = truth - start.double()
    norm = start.double().norm()
    distance = f"{movement.norm() / norm:.2%} of the weights' norm"
    print(f"\n{dtype}: true movement {distance} after {steps} steps, |g| {g_rms}")
    for name, theta in (("chance", chance), ("nearest", nearest), ("in place", in_place)):
        error = (theta.double() - truth).norm() / norm
        share = ((theta.double() - start.double()) * movement).sum() / movement.square().sum()
        percent_unmoved = f"{unmoved_elements[name].double().mean():.1%}" if name in unmoved_elements else ""
        print(
            f"{name:9} off the truth {error:7.2%}   share of the true movement {share:6.2f}   "
            f"lost updates {percent_unmoved}"
        )


def main() -> None:
    """Print the comparison for both half precisions and each size of g."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--elements", type=int, default=1 << 14)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--g", type=float, nargs="+", default=[1.15, 5.0])
    args = parser.parse_args()
    for dtype in (torch.float16, torch.bfloat16):
        for g in args.g:
            compare_roundings(dtype, args.elements, args.steps, g)


if __name__ == "__main__":
    main()
