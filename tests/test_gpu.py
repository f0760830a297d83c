"""What has to hold on a GPU too, by running its tests there: the same bits after a crash."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = (
    "test_boosting.py::test_resume_and_replay_give_the_same_bytes",
    "test_boosting.py::test_a_regular_run_resumes_with_the_same_bytes",
    "test_methods.py::test_resume_and_replay_come_for_nothing",
    "test_methods.py::test_the_method_of_the_documents_runs_and_is_fzoo",
    "test_modes.py",
    "test_rng_kernels.py",
)


@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="no GPU on this machine")
@pytest.mark.parametrize("name", TESTS)
def test_on_a_gpu(name):
    environment = {**os.environ, "TESTS_ON_GPU": "1"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    where = Path(__file__).parent / name
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", where], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stdout[-3000:]
