"""Kill a real run again and again, and compare its end with that of a run that nothing happened to.

    # a small random OPT on SST2, every mode, 20 kills each
    python tests/stress/crash.py --tokenizer DIR --data_dir DIR
    # one mode on the starter's model
    python tests/stress/crash.py --model_name MODEL --data_dir starter --task_name Reviews --modes xgblora

60 steps that save every 5, merge every 15 and evaluate every 10. SIGKILL comes at a random moment, or inside
a checkpoint write, a merge or an evaluation, drawn by seed; then the same command runs again. Compared are
the bytes of the adapter (of the model) and the result file but for times and memory. Attempts are forks of
this process, which saves their imports.
"""

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch

import run
from boosters.chain import BoosterChain
from training import checkpoints

BOOST = "--trainer zo --xgblora --xgblora_steps_per_iteration 15"
MODES = {
    "xgblora": f"{BOOST} --learning_rate 1e-3",
    "normalised, B only": f"{BOOST} --lora_freeze_a --zo_normalize",
    "ensemble": f"{BOOST} --xgblora_ensemble --learning_rate 1e-3 --load_bfloat16",
    "adaptive": f"{BOOST} --xgblora_adaptive --xgblora_patience 5 --learning_rate 1e-3",
    "momentum": f"{BOOST} --zo_optim momentum --learning_rate 1e-4",
    "adamw": f"{BOOST} --zo_optim adamw --learning_rate 1e-3",
    "full": "--trainer zo --learning_rate 1e-4",
    "regular": "--trainer regular --xgblora --xgblora_steps_per_iteration 15 --learning_rate 1e-3",
}
TIMES = ("seconds", "train_seconds", "train_cpu_seconds", "peak_memory_mb")


def small_opt(tokenizer: str, path: Path) -> Path:
    """Write a random OPT of 4 layers of width 128 with the given tokenizer."""
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "ffn_dim": 512, "word_embed_proj_dim": 128, "max_position_embeddings": 256}
    OPTForCausalLM(OPTConfig(num_hidden_layers=4, num_attention_heads=4, **sizes)).save_pretrained(path)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(path)
    return path


def die_at(owner, name: str, nth: int) -> None:
    """SIGKILL this process in the n-th call of a function, after its work, before its caller knows."""
    original, calls = getattr(owner, name), [0]

    def wrapped(*args, **kwargs):
        calls[0] += 1
        value = original(*args, **kwargs)
        if calls[0] == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    setattr(owner, name, wrapped)


INSIDE = {  # the function that dies, and how many times it is called in a run, about
    "checkpoint write": (checkpoints, "sha256", 100),
    "merge": (BoosterChain, "append", 4),
    "evaluation": (run.Framework, "predict", 6),
}


def attempt(argv: list[str], folder: Path, plan: tuple[str, float] | None = None) -> int:
    """`run.py argv` in a fork, in `folder`; dies as planned. Returns its exit status, or minus the signal."""
    folder.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if not pid:
        status = 70
        try:
            os.chdir(folder)
            log = os.open("log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 - until the fork ends
            if plan and plan[0] in INSIDE:
                owner, name, _ = INSIDE[plan[0]]
                die_at(owner, name, int(plan[1]))
            logging.root.handlers.clear()  # of the process before the fork
            status = run.main(argv)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if plan and plan[0] == "moment":
        deadline = time.monotonic() + plan[1]
        while time.monotonic() < deadline:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return 0  # it was faster
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def end_of(folder: Path) -> dict:
    """Return what a run leaves: bytes of its tensors, and its result but for times."""
    result = json.loads((folder / "result.json").read_text())
    result["sets"] = [{k: v for k, v in measured.items() if k not in TIMES} for measured in result["sets"]]
    numbers = {name: value for name, value in result.items() if name not in TIMES}
    files = {p.name: p.read_bytes() for p in sorted((folder / "out").glob("*.safetensors"))}
    return {"result": numbers, "files": files}


def torture(argv: list[str], folder: Path, kills: int, seed: int) -> dict:
    """Run undisturbed, then with so many kills.

    Returns:
        {kind of kill: how many there were, "same": whether the ends agree}.
    """
    argv = [*argv, "--output_dir", "out", "--result_file", "result.json"]
    start = time.monotonic()
    if attempt(argv, folder / "calm"):
        raise RuntimeError((folder / "calm" / "log").read_text()[-2000:])
    duration = time.monotonic() - start
    rng = random.Random(seed)
    counts = dict.fromkeys(("moment", *INSIDE), 0)
    while sum(counts.values()) < kills:
        kind = rng.choice(["moment", "moment", *INSIDE])
        # most runs are killed again before they get far: else the first few kills would see the whole of it
        at = (
            rng.uniform(0, duration * 0.7)
            if kind == "moment"
            else rng.randint(1, max(1, INSIDE[kind][2] // 3))
        )
        status = attempt(argv, folder / "killed", (kind, at))
        if status == -signal.SIGKILL:
            counts[kind] += 1
        elif status:
            raise RuntimeError((folder / "killed" / "log").read_text()[-2000:])
        else:  # it came to its end: start over
            if end_of(folder / "killed") != end_of(folder / "calm"):
                return {**counts, "same": False}
            shutil.rmtree(folder / "killed")
    status = attempt(argv, folder / "killed")
    return {**counts, "same": status == 0 and end_of(folder / "killed") == end_of(folder / "calm")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_name", help="default: a small random OPT, for which --tokenizer is needed")
    parser.add_argument("--tokenizer")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--task_name", default="SST2")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a fork may not use threads that its parent has started
    failed = 0
    print(
        f"{'mode':20} {'moment':>7} {'checkpoint write':>17} {'merge':>6} {'evaluation':>11}"
        "  seconds  same bytes"
    )
    for mode in args.modes:
        with tempfile.TemporaryDirectory() as folder:
            model = args.model_name or str(small_opt(args.tokenizer, Path(folder) / "model"))
            data_dir = str(Path(args.data_dir).resolve())
            argv = ["--model_name", str(Path(model).resolve()), "--data_dir", data_dir]
            flags = (
                f"--task_name {args.task_name} --num_train 64 --num_dev 16 --num_eval 32 "
                f"--max_steps 60 {MODES[mode]}"
            )
            flags += " --save_steps 5 --save_total_limit 3 --eval_strategy steps --eval_steps 10 --save_model"
            argv += (
                f"{flags} --train_as_classification --per_device_train_batch_size 4 --disable_tqdm True"
            ).split()
            start = time.monotonic()
            outcome = torture(argv, Path(folder), args.kills, args.seed)
            seconds = time.monotonic() - start
        kills = f"{outcome['moment']:7d} {outcome['checkpoint write']:17d} {outcome['merge']:6d}"
        kills += f" {outcome['evaluation']:11d}"
        print(f"{mode:20} {kills}  {seconds:7.0f}  {'yes' if outcome['same'] else 'NO'}", flush=True)
        failed |= not outcome["same"]
    return failed


if __name__ == "__main__":
    sys.exit(main())
