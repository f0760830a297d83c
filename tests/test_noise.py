"""The kernels of rng_kernels.py give the bits of counter_rng.py: on a GPU, or where there is none in Triton's interpreter.

Run as a script in a process of its own, because the interpreter is chosen when kernels are defined.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scoring import logprobs, packing
from zo import counter_rng, rng_kernels, step_directions
from zo.optimizer import ZerothOrder

NO_TRITON = "no Triton here: it comes with torch's CUDA builds"


def test_kernels_give_the_bits_of_the_passes():
    environment = {**os.environ, "TESTS_ON_GPU": "1"}
    if not os.environ.get("TESTS_ON_GPU"):
        environment["TRITON_INTERPRET"] = "1"
    ran = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, cwd=ROOT)
    if NO_TRITON in ran.stdout:
        pytest.skip(NO_TRITON)
    assert ran.returncode == 0 and "the same bits" in ran.stdout, ran.stdout + ran.stderr


def test_a_gpu_without_kernels_is_told_of(caplog):
    rng_kernels.kernels_available.cache_clear()
    assert not rng_kernels.kernels_available(torch.device("cuda:99")) and not rng_kernels.kernels_available(
        torch.device("cuda:99")
    )
    assert not rng_kernels.kernels_available(torch.device("cpu"))
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("no kernels on cuda:99 (")


def check() -> None:

    if rng_kernels.triton is None:
        return print(NO_TRITON)
    interpreted = "TRITON_INTERPRET" in os.environ
    device = "cpu" if interpreted else "cuda"
    if interpreted:
        rng_kernels.kernels_available = lambda device: True
    torch.manual_seed(0)
    starts = (0, 1, 33, (1 << 31) - 700, (1 << 33) + 5, (1 << 35) - 700)  # within words, over the ends of keys
    for name in counter_rng.DISTRIBUTIONS:
        source = rng_kernels.DirectionSource(5, name)
        for start, n in ((start, n) for start in starts for n in (1, 1100)):
            z = counter_rng.direction_range(name, (5, 3, 0), start, n)
            assert torch.equal(source.rows((3, 0), start, 1, range(n), device).view(-1).cpu(), z), (name, start, n)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                values, scales = torch.randn(n).to(dtype), [1e-3, -1e-3, 2.0]
                given = values.to(device, copy=True)
                for got, scale in zip(source.perturbed((3, 0), start, given, scales), scales, strict=True):
                    wanted = (z * scale).add_(values.float()).to(dtype)
                    if interpreted and dtype == torch.bfloat16:  # whose cast cuts off instead of rounding
                        assert (got.view(torch.int16) - wanted.view(torch.int16)).abs().max() <= 1, (name, start, n)
                    else:
                        assert torch.equal(got.cpu(), wanted), (name, start, n, dtype)
                if dtype == torch.float16:  # by the passes
                    continue
                source.update((3, 0), start, given, 0.123, 0.99, (3, "rounding"))
                wanted = values.float().mul_(0.99).sub_(z * 0.123)
                if dtype == torch.bfloat16:
                    wanted = counter_rng.stochastic_round(wanted, dtype, (5, 3, "rounding"), start)
                assert torch.equal(given.cpu(), wanted), (name, start, n, dtype)
    check_engine(device)
    print("the same bits")


def check_engine(device: str) -> None:
    """Losses and updates of a whole step, in fp32, with and without kernels; several queries and weight decay too."""
    from support.models import tiny_model
    from support.references import some_examples

    for family, queries in (("llama", 1), ("gpt2", 2)):
        found = []
        for kernels in (True, False):
            step_directions.kernels_available = rng_kernels.kernels_available if kernels else lambda device: False
            model = tiny_model(family).to(device)
            batch = {name: t.to(device) for name, t in packing.pack(some_examples()).items()}
            groups = [{"params": list(model.parameters()), "weight_decay": 0.1}]
            engine = ZerothOrder(groups, 1e-3, 1e-2, queries=queries, master=False)
            losses = [engine.step(partial(logprobs.loss, model, batch, True)) for _ in range(2)]
            found.append((losses, [p.detach().cpu() for p in model.parameters()]))
        (losses, ours), (expected, theirs) = found
        assert losses == expected and all(map(torch.equal, ours, theirs)), family


if __name__ == "__main__":
    check()
