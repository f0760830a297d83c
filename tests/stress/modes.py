"""Mode × trainer × family: what works, by running it. A ✓ is a run on real rows that ended with a number.

    python tests/stress/modes.py [--families llama gpt2 …] [--smollm2]

Models of random weights, two layers and width 64, of each family, with the starter's tokenizer (make starter)
and its Reviews: 32 rows to train on, 16 to evaluate. `--smollm2` adds the starter's own model, whose numbers
mean something. Where something can't be done, its one line stands below the table.
"""

import argparse
import contextlib
import io
import json
import logging
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import run

STARTER = ROOT / "starter"
WIDTH = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ROTARY = {**WIDTH, "intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 1024}
FAMILIES = {
    "opt": {**WIDTH, "ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 1024},
    "llama": ROTARY, "mistral": ROTARY, "qwen2": ROTARY,
    "qwen3": {**ROTARY, "head_dim": 16}, "gemma": {**ROTARY, "head_dim": 16},
    "phi3": {**ROTARY, "num_key_value_heads": 4}, "stablelm": {**ROTARY, "num_key_value_heads": 4},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4}, "gpt_neox": {**WIDTH, "intermediate_size": 128},
    "falcon": WIDTH, "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
}  # fmt: skip
ZO, FIRST = "--trainer zo --max_steps 2", "--trainer regular --max_steps 2"
BOOST = "--xgblora --xgblora_steps_per_iteration 1"
MODES = {
    ("none", "zero-shot"): "--num_train 0",
    ("none", "4 demonstrations"): "--num_train 4 --train_set_seed 0",
    ("none", "linear probing"): "--linear_probing",
    **{
        (trainer, mode): f"{flags} {more}"
        for trainer, flags in (("zo", ZO), ("regular", FIRST))
        for mode, more in {
            "full": "", "head": "--head_tuning --untie_emb", "prefix": "--prefix_tuning",
            "prefix, reparametrised": "--prefix_tuning --no_reparam False", "lora": "--lora",
            "xgblora": BOOST, "xgblora ensemble": f"{BOOST} --xgblora_ensemble",
        }.items()
    },
    ("zo", "recipe fast"): f"{ZO} --recipe fast",
    ("zo", "lora, accuracy as objective"): f"{ZO} --lora --non_diff",
    ("zo", "lora, 8 bits"): f"{ZO} --lora --load_int8",
    ("zo", "ensemble, 4 bits"): f"{ZO} {BOOST} --xgblora_ensemble --load_int4",
    ("regular", "lora, 4 bits"): f"{FIRST} --lora --load_int4",
}  # fmt: skip


def make(family: str, directory: Path) -> Path:
    """Write a model directory of random weights."""
    tokenizer = AutoTokenizer.from_pretrained(STARTER / "smollm2-135m")
    ids = {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **FAMILIES[family], **ids)
        ).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def go(model: Path, flags: str, folder: Path) -> str:
    """Return ✓ with the accuracy, or the last line of the run."""
    words = f"--model_name {model} --data_dir {STARTER} --task_name Reviews --num_eval 16 --max_length 512"
    words += (
        f" --output_dir {folder / 'out'} --overwrite --result_file {folder / 'r.json'} --disable_tqdm True"
    )
    words += "" if "--num_train" in flags else " --num_train 32"
    classify = "--trainer" in flags and "--non_diff" not in flags
    words += " --train_as_classification" if classify else ""
    output = io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        try:
            status = run.main([*words.split(), *flags.split()])
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    if status:
        return output.getvalue().strip().splitlines()[-1]
    return f"✓ {json.loads((folder / 'r.json').read_text())['accuracy']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--smollm2", action="store_true", help="also the starter's own model")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    columns = [*args.families, *(["smollm2"] if args.smollm2 else [])]
    cells: dict[tuple, str] = {}
    with tempfile.TemporaryDirectory() as name, tqdm(total=len(columns) * len(MODES), unit="run") as bar:
        for column in columns:
            folder = Path(name) / column
            model = STARTER / "smollm2-135m" if column == "smollm2" else make(column, folder)
            for mode, flags in MODES.items():
                cells[*mode, column] = go(model, flags, Path(name))
                bar.update()
    refusals = list(dict.fromkeys(text for text in cells.values() if text[0] != "✓"))
    print(f"| trainer | mode | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 2)}")
    for trainer, mode in MODES:
        texts = [cells[trainer, mode, column] for column in columns]
        marks = [text if text[0] == "✓" else f"({refusals.index(text) + 1})" for text in texts]
        print(f"| {trainer} | {mode} | {' | '.join(marks)} |")
    for i, text in enumerate(refusals, 1):
        print(f"({i}) {text}")


if __name__ == "__main__":
    main()
