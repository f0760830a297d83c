"""The kernels of rng_kernels.py give the bits of counter_rng.py: on a GPU, else in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from support.compare_kernels import NO_TRITON
from support.runs import ROOT

from zo import rng_kernels


def test_kernels_give_the_bits_of_the_torch_operations():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    if not os.environ.get("TESTS_ON_GPU"):
        environment["TRITON_INTERPRET"] = "1"  # is read when kernels are defined: in a process of its own
    command = [sys.executable, "-m", "support.compare_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if NO_TRITON in done.stdout:
        pytest.skip(NO_TRITON)
    assert done.returncode == 0 and "the same bits" in done.stdout, done.stdout + done.stderr


def test_a_gpu_without_kernels_is_told_of(caplog):
    rng_kernels.kernels_available.cache_clear()
    absent = torch.device("cuda:99")
    assert not rng_kernels.kernels_available(absent)
    assert not rng_kernels.kernels_available(absent)
    assert not rng_kernels.kernels_available(torch.device("cpu"))
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("no kernels on cuda:99 (")
