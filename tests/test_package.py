"""`pip install .` gives the package `zo` alone, and what its README says runs."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from support.models import tiny_model, tiny_tokenizer
from torch import nn

import zo

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "zo" / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
THE_LOOP = BLOCKS[0]
NOT_COPIED = (".*", "starter", "result", "build", "runs", "__pycache__", "*.egg-info")

# What the README's first loop stands among.
SMALL_WORLD = """
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
x = torch.randn(40, 16, 8)
y = (x[..., 0] > 0).long()
loader = list(zip(x, y))
loss_fn = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """An empty folder into which the wheel was installed."""
    folder = tmp_path_factory.mktemp("package")
    checkout = folder / "checkout"  # a copy: setuptools writes beside what it builds
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(*NOT_COPIED))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    alone = ["--no-deps", "--no-index"]
    build = ["wheel", *alone, "--no-build-isolation", "--wheel-dir", str(folder), str(checkout)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    install = ["install", *alone, "--no-compile", "--target", str(target), str(wheel)]
    subprocess.run([*pip, *install], check=True)
    return target


def test_the_wheel_contains_zo_alone(installed):
    (wheel,) = installed.parent.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    contents = {name for name in names if ".dist-info/" not in name}
    assert contents == {"zo/README.md", *(f"zo/{path.name}" for path in (ROOT / "zo").glob("*.py"))}
    (metadata,) = installed.glob("*.dist-info/METADATA")
    requirements = re.findall(r"^Requires-Dist: ([\w-]+)(.*)$", metadata.read_text(), re.M)
    always = {name for name, condition in requirements if "extra" not in condition}
    assert always == {"torch", "numpy", "safetensors"}


def test_the_loop_runs_where_nothing_else_is(installed, tmp_path):
    program = tmp_path / "loop.py"
    check = (
        "import sys\n"
        f"assert zo_package.__file__.startswith({str(installed)!r})\n"
        f"assert not any(path.startswith({str(ROOT) + '/'!r}) and '.venv' not in path for path in sys.path)\n"
        "assert 'transformers' not in sys.modules\n"
        "print(before, float(loss_fn(model, everything)))\n"
    )
    begin = (
        "import zo as zo_package\n"
        "everything = (x.flatten(0, 1), y.flatten())\n"
        "before = float(loss_fn(model, everything))\n"
    )
    program.write_text(SMALL_WORLD + begin + THE_LOOP + check)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(program)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = map(float, done.stdout.split())
    assert after < before
    assert (tmp_path / "trajectory.safetensors").exists()


def test_zo_imports_nothing_but_torch_numpy_safetensors_and_triton():
    allowed = {"torch", "numpy", "safetensors", "triton", "zo", *sys.stdlib_module_names}
    for path in (ROOT / "zo").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, path.name


def test_zo_does_not_speak_of_flags():
    for path in (ROOT / "zo").glob("*.py"):
        assert not re.search(r"(?<![\w-])--[a-z]", path.read_text()), path.name


def test_zo_exports_the_engine_the_seam_and_the_methods():
    assert set(zo.__all__) == {"ZerothOrder", "Method", "Trajectory", "METHODS", "LOZO", "FZOO", "AR1ZO"}


def test_every_block_of_the_readme_runs(tmp_path, monkeypatch):
    """In their order, in one namespace, on tiny models."""
    monkeypatch.chdir(tmp_path)
    tiny_model("opt").save_pretrained("opt")
    tiny_tokenizer().save_pretrained("opt")
    namespace: dict = {}
    exec(SMALL_WORLD, namespace)
    for block in BLOCKS:
        exec(block.replace("facebook/opt-125m", "opt"), namespace)
    assert len(BLOCKS) >= 5 and torch.is_tensor(namespace["x"]) and isinstance(namespace["model"], nn.Module)
