"""Fixtures: a tiny model and a small task as directories, runs of `run.py`, a trained Framework."""

import gc
import json
import os

import pytest
import support  # noqa: F401 - sets the environment, before torch is imported
import torch
from support.data import TRAIN, write_rows
from support.models import FAMILIES, tiny_model, tiny_tokenizer
from transformers import set_seed

import run
from trainer import OurTrainer

# Files whose tests read what one fixture has run; all of them go to one worker.
ONE_WORKER = ("test_distributed.py", "test_sharding.py", "test_ranks.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Hand out tests one by one, but the files of `ONE_WORKER` whole."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return file if file.endswith(ONE_WORKER) else nodeid

    return Scheduling(config, log)


@pytest.fixture(scope="module", autouse=True)
def freeze_imported_objects():
    """Take the libraries' objects out of garbage collection, which each run does twice, for 0.4 s each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed_generators():
    """Give every test the same random numbers, whichever tests ran before it in the same process."""
    set_seed(0)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A tiny Llama with its tokenizer, as a model directory."""
    path = tmp_path_factory.mktemp("model") / "tiny-llama"
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """SST2 with 8 × 4 training rows and 8 validation rows."""
    path = tmp_path_factory.mktemp("data")
    write_rows(path / "SST2" / "train.jsonl", [(f"{s} {i}", y) for i in range(4) for s, y in TRAIN])
    write_rows(path / "SST2" / "validation.jsonl", TRAIN)
    return path


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def go(model_dir, data_dir, tmp_path, monkeypatch):
    """go(flags) -> result of `run.py` in an empty folder; AssertionError where it does not end with 0."""
    monkeypatch.chdir(tmp_path)

    def main(flags: str, model=model_dir, status: int = 0, result: bool = True) -> dict:
        path = tmp_path / "result.json"
        common = f"--model_name {model} --data_dir {data_dir} --result_file {path} --disable_tqdm True"
        common += " --train_as_classification --num_train 16"
        assert run.main(f"{common} {flags}".split()) == status
        return json.loads(path.read_text()) if status == 0 and result else {}

    return main


@pytest.fixture
def refused(model_dir, data_dir, tmp_path, monkeypatch, capsys):
    """refused(flags, *words): `run.py` exits with 2 and its last line holds the words."""
    monkeypatch.chdir(tmp_path)

    def check(flags: str, *words: str):
        common = f"--model_name {model_dir} --data_dir {data_dir} --output_dir {tmp_path / 'out'} {flags}"
        assert run.main(common.split()) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        line = error.splitlines()[-1]
        assert line.startswith("run.py: error: ")
        for word in words:
            assert word in line, line

    return check


@pytest.fixture
def framework(model_dir, data_dir, tmp_path, monkeypatch):
    """framework(flags) -> a trained Framework, with the batches of its steps in `.seen`."""

    def train(flags: str, rows: int | None = None, dev: int = 0):
        common = f"--model_name {model_dir} --data_dir {data_dir} --output_dir {tmp_path} --disable_tqdm True"
        args = run.parse(f"{common} --train_as_classification --logging_steps 1 --seed 7 {flags}".split())
        task = run.get_task("SST2", str(data_dir))
        framework = run.Framework(args, task)
        framework.seen = []
        step = OurTrainer.training_step

        def recording(self, model, inputs, n=None):
            framework.seen.append({k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)})
            return step(self, model, inputs, n)

        monkeypatch.setattr(OurTrainer, "training_step", recording)
        samples = task.sample_subset("train", 0, (rows or 32) + dev)
        framework.train(samples[: rows or 32], framework.eval_batch(samples[rows or 32 :]), tmp_path)
        return framework

    return train


@pytest.fixture(scope="module")
def place(tmp_path_factory, model_dir, data_dir):
    """An empty folder with the flags that all runs share."""
    folder = tmp_path_factory.mktemp("ranks")
    rows = [{"q": "ab" * (1 + i % 5), "a": "b"} for i in range(9)]
    for split in ("train", "validation"):
        (folder / "own").mkdir(exist_ok=True)
        (folder / "own" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = os.getcwd()
    os.chdir(folder)
    yield f"--model_name {model_dir} --data_dir {data_dir} --disable_tqdm True"
    os.chdir(before)
