"""Record what runs leave behind, so that a change without an effect can show that it changed no byte.

    python tests/stress/fingerprints.py record before.json --data_dir DIR --tokenizer DIR [--root CHECKOUT]
    python tests/stress/fingerprints.py compare before.json after.json

`record` takes small random models (OPT, Llama, Qwen2, GPT-2) through every trainer, mode and method, two
ranks, a killed run, and zero-shot evaluations of the eleven tasks in DIR; with the starter also `--recipe
fast` on real weights. For each run it writes the sha256 of every safetensors file and the result without
seconds, memory and versions.
"""

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
NOT_COMPARED = {
    "seconds",
    "train_seconds",
    "train_cpu_seconds",
    "peak_memory_mb",
    "estimated_memory_mb",
    "versions",
    "ranks",
}
TASKS = ("SST2", "RTE", "CB", "BoolQ", "WSC", "WIC", "MultiRC", "Copa", "ReCoRD", "SQuAD", "DROP")
FAMILIES = ("opt", "llama", "qwen2", "gpt2")

ZO = "--trainer zo --max_steps 7 --learning_rate 1e-2 --num_train 24 --num_dev 8 --save_steps 3"
ZO += " --train_as_classification"
REGULAR = (
    "--trainer regular --max_steps 5 --learning_rate 1e-3 --num_train 24 --num_dev 8 "
    "--train_as_classification"
)
FULL = "--learning_rate 1e-4"
BOOST = "--xgblora --xgblora_steps_per_iteration 3"
EVERY_FAMILY = {
    "full": f"{ZO} {FULL}",
    "lora": f"{ZO} --lora",
    "xgblora": f"{ZO} {BOOST}",
    "ensemble": f"{ZO} {BOOST} --xgblora_ensemble",
    "prefix": f"{ZO} --prefix_tuning",
    "recipe fast": f"{ZO} --recipe fast --xgblora_steps_per_iteration 3",
    "regular lora": f"{REGULAR} --lora",
    "regular xgblora": f"{REGULAR} --xgblora --xgblora_steps_per_iteration 2",
}
LLAMA_ALONE = {
    "full, bf16, decay": f"{ZO} {FULL} --load_bfloat16 --weight_decay 0.1",
    "full, two groups of micro-batches": (
        f"{ZO} {FULL} --gradient_accumulation_steps 2 --per_device_train_batch_size 4"
    ),
    "full, rademacher, 3 queries": f"{ZO} {FULL} --zo_queries 3 --zo_distribution rademacher",
    "full, one point a forward": f"{ZO} {FULL} --zo_batched off",
    "lozo": f"{ZO} {FULL} --zo_method lozo",
    "fzoo": f"{ZO} {FULL} --zo_method fzoo --zo_queries 4",
    "fzoo lora": f"{ZO} --lora --zo_method fzoo --zo_queries 2 --zo_normalize",
    "ar1-zo": f"{ZO} --lora --zo_method ar1-zo",
    "recipe atoms": f"{ZO} --recipe atoms",
    "objective accuracy": f"{ZO} --lora --objective accuracy".replace("--train_as_classification", ""),
    "momentum": f"{ZO} --lora --zo_optim momentum",
    "adamw": f"{ZO} {BOOST} --zo_optim adamw",
    "normalised, clipped": f"{ZO} --lora --zo_normalize --max_grad_norm 1",
    "xgblora, bf16": f"{ZO} {BOOST} --load_bfloat16",
    "xgblora by epochs": f"{ZO} --xgblora --per_device_train_batch_size 8",
    "adaptive": f"{ZO} {BOOST} --xgblora_adaptive --xgblora_patience 2 --xgblora_best",
    "best checkpoint": f"{ZO} {BOOST} --eval_strategy steps --eval_steps 3 --load_best_model_at_end",
    "rank schedule": f"{ZO} {BOOST} --xgblora_rank_schedule 1,2",
    "random layers": f"{ZO} {BOOST} --xgblora_layers random:1",
    "language modelling": f"{ZO} --lora --only_train_option False".replace("--train_as_classification", ""),
    "prefix, reparametrised": f"{ZO} --prefix_tuning --no_reparam False",
    "head": f"{ZO} {FULL} --head_tuning --untie_emb",
    "staged": f"{ZO} {BOOST} --staged 1 --export_rank 1 --save_merged",
    "regular full": f"{REGULAR} --learning_rate 1e-5",
    "regular prefix": f"{REGULAR} --prefix_tuning",
    "regular, checkpointing": f"{REGULAR} --lora --gradient_checkpointing --gradient_accumulation_steps 2",
    "probe": "--linear_probing --num_train 24",
    "answers": "--trainer zo --lora --max_steps 2 --learning_rate 1e-2 --num_train 6 --task_name own "
    "--data_dir ANSWERS --template {q}_A: --answer_column a --max_new_tokens 4 --objective f1",
    "chat": (
        "--trainer zo --lora --max_steps 2 --learning_rate 1e-2 --num_train 6 "
        "--task_name own --data_dir PAIRS"
    ),
}

TWO_RANKS = {
    "two ranks": f"{ZO} {BOOST}",
    "two ranks, queries": f"{ZO} --lora --zo_queries 2 --zo_parallel queries",
    "two ranks, regular": f"{REGULAR} --lora",
}


def small_models(folder: Path) -> None:
    """Write a random model of each family with a tokenizer of bytes, as the tests have them."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.data import TRAIN, write_rows
    from support.models import tiny_model, tiny_tokenizer

    for family in FAMILIES:
        tiny_model(family).save_pretrained(folder / family)
        tiny_tokenizer().save_pretrained(folder / family)
    write_rows(folder / "rows/SST2/train.jsonl", [(f"{s} {i}", y) for i in range(4) for s, y in TRAIN])
    write_rows(folder / "rows/SST2/validation.jsonl", TRAIN)
    for name, rows in {
        "answers": [{"q": "ab" * (1 + i % 5), "a": "b"} for i in range(9)],
        "pairs": [{"prompt": f"say {i} ", "response": "so be it"} for i in range(9)],
    }.items():
        (folder / name).mkdir()
        for split in ("train", "validation"):
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def model_for_tasks(folder: Path, tokenizer: str) -> Path:
    """Write a random OPT with OPT's own tokenizer, for the prompts of the eleven tasks."""
    import torch
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 2048}
    model = OPTForCausalLM(OPTConfig(num_hidden_layers=2, num_attention_heads=4, **sizes))
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder / "opt-words")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder / "opt-words")
    return folder / "opt-words"


def hash_of(path: Path) -> str:
    """Return the sha256 of a file; of a trajectory without the flags of its run, which are in the result."""
    if path.name != "trajectory.safetensors":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
        about.pop("settings", None)
        tensors = {name: file.get_tensor(name).numpy().tobytes().hex() for name in sorted(file.keys())}
    return hashlib.sha256(json.dumps([about, tensors], sort_keys=True).encode()).hexdigest()


def fingerprint(folder: Path) -> dict:
    """Return {file: hash} of all tensors below a folder, and the result without times and memory."""
    files = {
        str(path.relative_to(folder)): hash_of(path)
        for path in sorted(folder.rglob("*"))
        if path.suffix == ".safetensors" or path.name == "predictions.jsonl"
    }
    results = {}
    for path in sorted(folder.glob("result*.json")):
        result = json.loads(path.read_text())
        sets = [
            {k: v for k, v in measured.items() if k not in NOT_COMPARED} for measured in result.pop("sets")
        ]
        results[path.name] = {k: v for k, v in result.items() if k not in NOT_COMPARED} | {"sets": sets}
    return {"files": files, "results": results}


def command(model: Path, rows: Path, folder: Path, flags: str) -> list[str]:
    """Return the words of one run that writes everything below `folder`."""
    words = (
        f"--model_name {model} --data_dir {rows} --output_dir {folder}/out "
        f"--result_file {folder}/result.json "
    )
    words += f"--predictions {folder}/predictions.jsonl --disable_tqdm True --logging_steps 1 {flags}"
    words += " --save_model" if "--trainer" in flags and "--trainer none" not in flags else ""
    return [word.replace("_A:", " A:") for word in words.split()]


def record(args) -> dict:
    """Run everything in this process, but what needs several; return {name: fingerprint}."""
    sys.path.insert(0, str(args.root))
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)
    import run

    logging.disable(logging.INFO)
    # One path for every recording: paths stand in the results.
    home = Path(tempfile.gettempdir()) / "fingerprints"
    subprocess.run(["rm", "-rf", str(home)], check=True)
    home.mkdir()
    os.chdir(home)
    recorded: dict[str, dict] = {}

    def go(name: str, model: str, flags: str, rows: str = "rows") -> None:
        folder = home / "runs" / name.replace(" ", "_").replace(",", "")
        folder.mkdir(parents=True)
        flags = flags.replace("ANSWERS", str(home / "answers")).replace("PAIRS", str(home / "pairs"))
        output = io.StringIO()
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            status = run.main(command(Path(model), Path(rows), folder, flags))
        if status:
            print(
                f"{name}: exit status {status}: {output.getvalue().strip().splitlines()[-1]}", file=sys.stderr
            )
        recorded[name] = {"status": status, **fingerprint(folder)}
        print(f"{len(recorded):3d} {name}", file=sys.stderr, flush=True)

    small_models(home)
    for family in FAMILIES:
        for name, flags in EVERY_FAMILY.items():
            go(f"{family}: {name}", family, flags)
    for name, flags in LLAMA_ALONE.items():
        go(f"llama: {name}", "llama", flags)
    if args.data_dir:
        model = model_for_tasks(home, args.tokenizer)
        for task in TASKS:
            shots = "--num_train 2 --train_set_seed 0" if task not in ("MultiRC", "ReCoRD") else ""
            for name, flags in (
                ("zero-shot", "--num_train 0"),
                ("2 demonstrations", shots),
                ("calibrated", "--sfc"),
            ):
                if flags and not (name == "calibrated" and task not in ("SST2", "Copa")):
                    more = f"--task_name {task} --num_eval 12 --max_new_tokens 8 --max_length 1024"
                    go(f"{task}: {name}", str(model), f"--trainer none {flags} {more}", args.data_dir)
    starter = args.root / "starter"
    if starter.exists():
        flags = "--task_name Reviews --num_train 200 --num_eval 64 --trainer zo --recipe fast --max_steps 30"
        go(
            "starter: recipe fast",
            str(starter / "smollm2-135m"),
            f"{flags} --train_as_classification",
            str(starter),
        )
    return recorded | processes(args.root, home)


def processes(root: Path, home: Path) -> dict:
    """Record what takes processes of its own: two ranks, a run that is killed, test_xgblora.py."""
    recorded = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name, flags in TWO_RANKS.items():
        folder = home / "runs" / name.replace(" ", "_").replace(",", "")
        folder.mkdir(parents=True)
        launcher = "-m torch.distributed.run --nproc_per_node 2 --master_port 29611"
        words = [sys.executable, *launcher.split()]
        words += [str(root / "run.py"), *command(home / "llama", home / "rows", folder, flags)]
        subprocess.run(words, check=True, capture_output=True, env=environment, cwd=home)
        recorded[name] = fingerprint(folder)
    folder = home / "runs" / "killed"
    folder.mkdir()
    words = [
        sys.executable,
        str(root / "run.py"),
        *command(home / "llama", home / "rows", folder, f"{ZO} {BOOST} --max_steps 200"),
    ]
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, cwd=home
    )
    while not list(folder.glob("out/checkpoint-*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(words, check=True, capture_output=True, env=environment, cwd=home)
    recorded["killed, and the same command again"] = fingerprint(folder)
    done = subprocess.run(
        [sys.executable, str(root / "test_xgblora.py")], capture_output=True, text=True, env=environment
    )
    recorded["test_xgblora.py"] = {"status": done.returncode, "said": done.stdout.splitlines()}
    return recorded


def differences(before, after, where: str = "") -> list[str]:
    """Return a line for each leaf in which two recordings differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        lines = []
        for key in sorted(before.keys() | after.keys()):
            inside = f"{where}/{key}"
            if key not in before or key not in after:
                lines.append(f"{inside}: only {'after' if key in after else 'before'}")
            else:
                lines += differences(before[key], after[key], inside)
        return lines
    return [] if before == after else [f"{where}: {str(before)[:60]} -> {str(after)[:60]}"]


def compare(before: Path, after: Path) -> int:
    """Print a line for each run, and each kind of difference once with the number of runs that have it."""
    old, new = json.loads(before.read_text()), json.loads(after.read_text())
    kinds: dict[str, int] = {}
    same_files = 0
    for name in old:
        lines = differences(old[name], new.get(name, {}))
        files = [line for line in lines if line.startswith("/files")]
        same_files += not files and name in new
        for line in files:
            print(f"{name}: {line}")
        for line in set(lines) - set(files):
            kinds[line] = kinds.get(line, 0) + 1
    for line, n in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"{n:3d} x {line}")
    print(f"{same_files} of {len(old)} runs left the same bytes in every tensor and prediction")
    return int(same_files < len(old))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("files", nargs="+", type=Path, help="record: one file to write; compare: two to read")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout whose run.py is recorded")
    parser.add_argument("--data_dir", help="rows of the eleven tasks, DIR/<task>/{train,validation}.jsonl")
    parser.add_argument("--tokenizer", help="OPT's tokenizer")
    args = parser.parse_args()
    if args.what == "compare":
        return compare(*args.files)
    args.root, args.data_dir = args.root.resolve(), args.data_dir and str(Path(args.data_dir).resolve())
    args.tokenizer = args.tokenizer and str(Path(args.tokenizer).resolve())
    path = args.files[0].resolve()
    path.write_text(json.dumps(record(args), indent=1, sort_keys=True, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
