"""Check 20,000 steps of a tiny model: memory, the time of a step, open files, log and trajectory.

    python tests/stress/soak.py [--steps 20000]

A real `run.py` job (XGBLoRA with zo, merges every 50 steps, a checkpoint every 500, an evaluation
every 1,000) on a tiny random Llama and made-up rows. Every 500 steps resident memory, open files and
the time of a step are taken. Printed are slopes by least squares after the first tenth, and the
sizes of what the run leaves.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import numpy as np
import psutil
from support.data import TRAIN, write_rows
from support.models import tiny_model, tiny_tokenizer

import run
from trainer import OurTrainer
from training import checkpoints

EVERY = 500


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20000)
    args = parser.parse_args()
    samples = []  # (step, resident MB, open files, seconds of a step)
    times = []
    training_step = OurTrainer.training_step
    process = psutil.Process()

    def timed_step(self, *a):
        start = time.perf_counter()
        loss = training_step(self, *a)
        times.append(time.perf_counter() - start)
        if len(times) == EVERY:
            resident = process.memory_info().rss / 1e6
            samples.append((self.state.global_step, resident, process.num_fds(), median(times)))
            times.clear()
        return loss

    OurTrainer.training_step = timed_step
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        tiny_model("llama").save_pretrained("model")
        tiny_tokenizer().save_pretrained("model")
        write_rows(Path("data/SST2/train.jsonl"), [(f"{s} {i}", y) for i in range(8) for s, y in TRAIN])
        write_rows(Path("data/SST2/validation.jsonl"), TRAIN)
        flags = (
            "--model_name model --data_dir data --trainer zo --xgblora "
            "--xgblora_steps_per_iteration 50 --num_dev 8"
        )
        flags += f" --train_as_classification --max_steps {args.steps} --save_steps 500 --save_total_limit 2"
        flags += (
            " --eval_strategy steps --eval_steps 1000 --logging_steps 100 "
            "--output_dir out --disable_tqdm True"
        )
        start = time.perf_counter()
        status = run.main([*flags.split(), "--result_file", "result.json"])
        seconds = time.perf_counter() - start
        last = checkpoints.list_checkpoints("out")[-1]
        files = {p.name: p.stat().st_size for p in last.iterdir()}
        history = len(json.loads((last / "trainer_state.json").read_text())["log_history"])
        trajectory = Path("out/trajectory.safetensors").stat().st_size
    table = np.array(samples)
    late = table[len(table) // 10 :]
    print(f"{args.steps} steps in {seconds:.0f} s, status {status}")
    for name, column, unit in (
        ("resident memory", 1, "MB"),
        ("open files", 2, ""),
        ("step, median of 500", 3, "s"),
    ):
        slope = np.polyfit(late[:, 0], late[:, column], 1)[0] * 1000
        print(
            f"{name:20} first {table[0, column]:.4g} {unit}, last {table[-1, column]:.4g} {unit}, "
            f"slope {slope:+.3g} {unit} per 1,000 steps"
        )
    print(f"trajectory {trajectory / 1000:.0f} kB; log history {history} entries; last checkpoint: "
          + ", ".join(f"{name} {n / 1000:.0f} kB" for name, n in files.items() if n > 20000))  # fmt: skip
    return status


if __name__ == "__main__":
    sys.exit(main())
