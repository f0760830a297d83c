"""The estimate of memory that a run begins with against the peak of that run, a process for each row.

    python bench/memory.py [--long DIR]

`--long DIR`: a data directory with BoolQ, for two rows with long inputs; without it the last rows are 16
demonstrations in front of each sentence.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAINED = "--max_steps 3 --num_train 64 --train_as_classification"
BOOST = "--xgblora --xgblora_steps_per_iteration 2"
RUNS = {
    "zero-shot": "",
    "LoRA, zo": f"--trainer zo --lora {TRAINED}",
    "XGBLoRA, zo": f"--trainer zo {BOOST} {TRAINED}",
    "full, zo": f"--trainer zo {TRAINED}",
    "LoRA, regular": f"--trainer regular --lora {TRAINED}",
    "full, regular": f"--trainer regular {TRAINED}",
    "LoRA, zo, batch 64": f"--trainer zo --lora {TRAINED} --per_device_train_batch_size 64",
    "LoRA, regular, batch 32": f"--trainer regular --lora {TRAINED} --per_device_train_batch_size 32",
    "16 demonstrations": "--num_train 16",
}
LONG = {
    "BoolQ, zero-shot": "",
    "BoolQ, LoRA, zo": f"--trainer zo --lora {TRAINED}",
    "BoolQ, LoRA, regular": f"--trainer regular --lora {TRAINED} --per_device_train_batch_size 4",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_name", default=str(ROOT / "starter/smollm2-135m"))
    parser.add_argument("--data_dir", default=str(ROOT / "starter"))
    parser.add_argument("--task_name", default="Reviews")
    parser.add_argument("--long", help="a data directory with BoolQ")
    args = parser.parse_args()
    here = [(name, flags, args.data_dir, args.task_name) for name, flags in RUNS.items()]
    far = [(name, flags, args.long, "BoolQ") for name, flags in LONG.items()] if args.long else []
    print(f"{'':24} {'dtype':9} {'estimate':>8} {'measured':>8} {'ratio':>6}")
    for name, flags, data, task in here + far:
        for dtype in ("float32", "bfloat16"):
            with tempfile.TemporaryDirectory() as folder:
                command = f"{ROOT}/run.py --model_name {args.model_name} --data_dir {data} --task_name {task} {flags}"
                command += f" --num_eval 64 --load_bfloat16 {dtype == 'bfloat16'} --save_strategy no"
                command += f" --result_file {folder}/result.json --output_dir {folder}/out --disable_tqdm True"
                subprocess.run(
                    [sys.executable, *command.split()], cwd=ROOT, env=dict(os.environ), capture_output=True, check=True
                )
                result = json.loads(Path(folder, "result.json").read_text())
            estimate, peak = result.get("estimated_memory_mb", 0), result["peak_memory_mb"]
            print(f"{name:24} {dtype:9} {estimate:8} {peak:8} {estimate / peak:6.2f}", flush=True)


if __name__ == "__main__":
    main()
