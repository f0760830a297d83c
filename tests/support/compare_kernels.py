"""Compare the kernels of rng_kernels.py with the torch operations of counter_rng.py.

`python -m support.compare_kernels`: with TRITON_INTERPRET=1 on the CPU, else on a GPU.
"""

import os

import torch
from torch import nn

from zo import ZerothOrder, counter_rng, perturbed_weights, rng_kernels

NO_TRITON = "no Triton here: it comes with torch's CUDA builds"
INTERPRETED = "TRITON_INTERPRET" in os.environ
DEVICE = "cpu" if INTERPRETED else "cuda"
COUNTER = (3, 0)
ROUNDING = (3, "rounding")
# Within words, and over the ends of keys: a key serves 2^31 gaussian elements and 2^35 signs. The interpreter
# takes long for a launch; a GPU compares every offset with every length.
STARTS = (0, 1, 33, (1 << 31) - 700, (1 << 33) + 5, (1 << 35) - 700)
PLACES_OF_INTERPRETER = {
    "gaussian": [(1, 1), ((1 << 31) - 700, 1100), ((1 << 33) + 5, 1100)],
    "rademacher": [(33, 1), ((1 << 35) - 700, 1100)],
}


def places(name: str) -> list[tuple[int, int]]:
    """(first element, number of elements)."""
    return PLACES_OF_INTERPRETER[name] if INTERPRETED else [(start, n) for start in STARTS for n in (1, 1100)]


def compare_z(name: str, start: int, n: int) -> None:
    """z, θ + scale·z and the update, in every dtype that has a kernel."""
    source = rng_kernels.DirectionSource(5, name)
    z = counter_rng.direction_range(name, (5, *COUNTER), start, n)
    assert torch.equal(source.rows(COUNTER, start, 1, range(n), DEVICE).view(-1).cpu(), z), (name, start, n)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values, scales = torch.randn(n).to(dtype), [1e-3, -1e-3, 2.0]
        theta = values.to(DEVICE, copy=True)
        for ours, scale in zip(source.perturb_values(COUNTER, start, theta, scales), scales, strict=True):
            expected = (z * scale).add_(values.float()).to(dtype)
            if INTERPRETED and dtype == torch.bfloat16:  # the interpreter's cast cuts off instead of rounding
                distance = (ours.view(torch.int16) - expected.view(torch.int16)).abs().max()
                assert distance <= 1, (name, start, n)
            else:
                assert torch.equal(ours.cpu(), expected), (name, start, n, dtype)
        if dtype == torch.float16:  # has no kernel for updates
            continue
        source.update_values(COUNTER, start, theta, 0.123, 0.99, ROUNDING)
        expected = values.float().mul_(0.99).sub_(z * 0.123)
        if dtype == torch.bfloat16:
            expected = counter_rng.stochastic_round(expected, dtype, (5, *ROUNDING), start)
        assert torch.equal(theta.cpu(), expected), (name, start, n, dtype)


class Small(nn.Module):
    """An embedding, a norm, a linear layer and a product as GPT-2 has it."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.norm = nn.LayerNorm(12)
        self.linear = nn.Linear(12, 20)
        self.weight = nn.Parameter(torch.randn(20, 5) / 4)
        self.bias = nn.Parameter(torch.randn(5) / 4)

    def forward(self, ids):
        x = self.linear(self.norm(self.embedding(ids)))
        return torch.addmm(self.bias, x.view(-1, 20), self.weight)


def compare_steps(queries: int) -> None:
    """Losses and weights after two steps with weight decay, with and without kernels."""
    results = []
    for available in (rng_kernels.kernels_available, lambda device: False):
        perturbed_weights.kernels_available = available
        torch.manual_seed(0)
        model = Small().to(DEVICE)
        ids = torch.arange(24).view(3, 8).to(DEVICE)
        params = list(model.parameters())
        engine = ZerothOrder(params, 1e-3, 1e-2, weight_decay=0.1, queries=queries, master=False)
        losses = [engine.step(lambda model=model, ids=ids: model(ids).square().mean()) for _ in range(2)]
        results.append((losses, [p.detach().cpu() for p in params]))
    (losses, ours), (expected, theirs) = results
    assert losses == expected and all(map(torch.equal, ours, theirs)), queries


def main() -> None:
    if rng_kernels.triton is None:
        print(NO_TRITON)
        return
    if INTERPRETED:
        rng_kernels.kernels_available = lambda device: True
    torch.manual_seed(0)
    for name in counter_rng.DISTRIBUTIONS:
        for start, n in places(name):
            compare_z(name, start, n)
    for queries in (1, 2):
        compare_steps(queries)
    print("the same bits")


if __name__ == "__main__":
    main()
