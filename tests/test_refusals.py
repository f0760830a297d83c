"""Bad input gets one clear line and exit status 2, and it gets it before anything is trained."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import processes
from support.data import DATA, write_rows
from support.models import tiny_model, tiny_tokenizer

import run
from lora import LoRA
from training import checkpoints
from utils import UsageError

ROOT = Path(run.__file__).parent
GOOD = [("fine", 1), ("poor", 0), ("good", 1), ("bad", 0)]


FLAGS = {
    "--task_name Nonsense": ("Nonsense", "SST2"),
    "--xgblora --prefix_tuning": ("--xgblora", "--prefix_tuning"),
    "--prefix_tuning": ("--prefix_tuning", "--trainer"),
    "--trainer zo --lora --prefix_tuning": ("--lora", "--prefix_tuning"),
    "--trainer zo --prefix_tuning --num_prefix 0": ("--num_prefix",),
    "--trainer regular --prefix_tuning --gradient_checkpointing": (
        "--prefix_tuning",
        "--gradient_checkpointing",
    ),
    "--trainer zo --prefix_tuning --zo_normalize": ("--zo_normalize", "--learning_rate"),
    "--trainer zo --prefix_tuning --save_merged": ("--prefix_tuning", "--save_merged"),
    "--trainer zo --prefix_tuning --lora_freeze_a": ("--lora_freeze_a", "--lora"),
    "--trainer zo --prefix_tuning --zo_method ar1-zo": ("ar1-zo", "--lora"),
    "--head_tuning": ("--head_tuning", "--trainer"),
    "--trainer zo --head_tuning --lora": ("--head_tuning", "--lora"),
    "--trainer zo --lora --untie_emb": ("--untie_emb",),
    "--linear_probing --trainer zo": ("--linear_probing",),
    "--linear_probing --sfc": ("--linear_probing", "--sfc"),
    "--linear_probing --save_model": ("--linear_probing", "--save_model"),
    "--lp_early_stopping": ("--lp_early_stopping", "--linear_probing"),
    "--objective accuracy": ("--objective", "--trainer zo"),
    "--trainer zo --objective bleu": ("--objective bleu", "accuracy, f1, em"),
    "--trainer zo --non_diff --train_as_classification": ("--objective", "--train_as_classification"),
    "--load_int8 --load_int4": ("--load_int8", "--load_int4"),
    "--load_int8 --model_name some.gguf": ("--load_int8", ".gguf"),
    "--load_int8 --trainer zo": ("--load_int8", "--lora"),
    "--load_int4 --trainer zo --xgblora": ("--load_int4", "--xgblora_ensemble"),
    "--load_int4 --trainer zo --lora --save_merged": ("--load_int4", "--save_merged"),
    "--load_float16 --load_bfloat16": ("--load_float16", "--load_bfloat16"),
    "--trainer zo --fp16": ("--fp16", "--load_float16"),
    "--bf16_full_eval": ("--bf16_full_eval", "--load_bfloat16"),
    "--device_map auto --no_auto_device": ("--device_map", "--no_auto_device"),
    "--trainer zo --lora --lora_targets q_proj,v_porj --max_steps 1": ("--lora_targets", "v_porj"),
    "--num_train 100000": ("--num_train 100000", "32"),
    "--num_train 2 --train_set_seed 4294967295 --num_train_sets 2": ("--train_set_seed", "2**32"),
    "--trainer zo --num_train 9 --per_device_train_batch_size 16 --dataloader_drop_last": (
        "--dataloader_drop_last",
    ),
    "--trainer zo --report_to comet_ml": ("--report_to comet_ml",),
    "--trainer zo --lora --zo_optim adamw --adam_beta1 0.1": ("--adam_beta1", "--trainer regular"),
    "--trainer regular --adam_beta1 2 --max_steps 1": ("--optim", "beta"),
    "--trainer regular --optim galore_adamw --max_steps 1": ("--optim", "galore_adamw", "adamw_torch"),
    '--trainer zo --max_steps 1 --lr_scheduler_type linear --lr_scheduler_kwargs {"bad":1}': (
        "linear",
        "bad",
    ),
    "--trainer zo --zo_method README:Name": ("README:Name", "mezo"),
    "--save_merged --output_dir /proc/no": ("--output_dir", "can't be written"),
    "--trainer zo --lora --replay x.safetensors --staged 1": ("--replay", "--staged"),
    "--trainer zo --deepspeed x.json": ("--deepspeed", "--fsdp"),
    "--trainer zo --label_smoothing_factor 0.1": ("--label_smoothing_factor",),
    "--trainer zo --optim sgd": ("--trainer zo", "--optim sgd"),
    "--trainer zo --resume_from_checkpoint x": ("--resume_from_checkpoint",),
    "--trainer zo --num_train 30 --num_dev 8": ("--num_train 30", "--num_dev 8", "32"),
    "--trainer zo --num_dev 40": ("--num_dev 40", "32"),
    "--num_dev 4": ("--num_dev", "--trainer none"),
    "--trainer zo --eval_strategy steps --eval_steps 2": ("--eval_strategy", "--num_dev"),
    "--trainer zo --xgblora --xgblora_steps_per_iteration -1": ("--xgblora_steps_per_iteration", "-1"),
    "--trainer zo --xgblora --xgblora_merge_frequency 0": ("--xgblora_merge_frequency", "0"),
    "--trainer zo --xgblora --lora_r 8": ("--lora_r 8", "--xgblora"),
    "--trainer zo --lora --lora_r 0": ("--lora_r", "0"),
    "--trainer zo --lora --lora_alpha nan": ("--lora_alpha",),
    "--trainer zo --zo_eps 0": ("--zo_eps", "0"),
    "--trainer zo --zo_eps inf": ("--zo_eps",),
    "--trainer zo --learning_rate -1": ("--learning_rate",),
    "--trainer zo --zo_normalize": ("--zo_normalize", "--lora"),
    "--trainer regular --lora --lora_freeze_a": ("--lora_freeze_a", "--trainer zo"),
    "--trainer zo --train_as_classification --only_train_option False": ("--only_train_option",),
    "--max_length 5": ("--max_length", "6"),
    "--max_length 1": ("--max_length",),
    "--num_eval 0": ("--num_eval",),
    "--adapter nowhere": ("nowhere", "adapter_config.json"),
    "--nonsense 3": ("--nonsense",),
    "--xgblora_steps_per_iteratoin 3": ("--xgblora_steps_per_iteration?",),
    "--trainer magic": ("--trainer", "magic"),
    "--num_train many": ("--num_train", "many"),
    "--model_name no/such_model": ("no/such_model", "make starter"),
    "--data_dir no/such/place": ("no/such/place", "train.jsonl"),
    "--trainer zo --eval_strategy steps --num_dev 4 --load_best_model_at_end --save_strategy no": ("best",),
    "--num_train -1": ("--num_train", "-1"),
    "--num_train_sets 0": ("--num_train_sets",),
    "--max_new_tokens 0": ("--max_new_tokens",),
    "--temperature 0": ("--temperature",),
    "--temperature nan": ("--temperature",),
    "--top_p 1.5": ("--top_p",),
    "--top_p nan": ("--top_p",),
    "--num_beams 0": ("--num_beams",),
    "--seed -1": ("--seed",),
    "--seed 99999999999": ("--seed", "2**32"),
    "--trainer zo --zo_eps nan": ("--zo_eps",),
    "--trainer zo --zo_eps -1e-3": ("--zo_eps",),
    "--trainer zo --learning_rate nan": ("--learning_rate",),
    "--trainer zo --learning_rate inf": ("--learning_rate",),
    "--trainer zo --lora --lora_alpha inf": ("--lora_alpha",),
    "--trainer zo --lora --lora_alpha 0": ("--lora_alpha",),
    "--trainer zo --zo_queries 0": ("--zo_queries",),
    "--trainer zo --zo_method nothing": ("--zo_method", "mezo"),
    "--trainer zo --zo_method none.py:X": ("--zo_method",),
    "--trainer zo --zo_distribution cauchy": ("--zo_distribution", "cauchy"),
    "--trainer zo --zo_optim adamw": ("--zo_optim adamw", "--lora"),
    "--metric bleu": ("--metric bleu", "accuracy"),
    "--sfc --icl_sfc": ("--sfc", "--icl_sfc"),
    "--boosters 3": ("--boosters", "--adapter"),
    "--replay x.safetensors": ("--replay", "--trainer zo"),
    "--trainer zo --lora --replay no.safetensors": ("no.safetensors",),
    "--result_file /proc/no/result.json": ("--result_file", "can't be written"),
    "--predictions .": ("--predictions", "can't be written"),
    "--trainer zo --max_steps 1 --per_device_train_batch_size 0": ("batch",),
    "--trainer zo --max_steps 1 --gradient_accumulation_steps 0": ("gradient_accumulation_steps",),
    "--trainer zo --max_grad_norm -1": ("--max_grad_norm",),
    "--trainer zo --max_grad_norm nan": ("--max_grad_norm",),
    "--trainer zo --weight_decay nan": ("--weight_decay",),
    "--trainer regular --lr_scheduler_type wrong": ("wrong",),
    "--trainer zo --save_only_model": ("--save_only_model", "go on"),
    "--trainer zo --train_sampling_strategy group_by_length": ("--train_sampling_strategy", "--data_seed"),
    "--trainer zo --eval_on_start": ("--eval_on_start", "--num_dev"),
    "--trainer zo --max_steps 1 --lr_scheduler_type cosine_with_min_lr": ("cosine_with_min_lr", "min_lr"),
    "--trainer zo --num_dev 4 --eval_strategy steps --eval_steps 1 --load_best_model_at_end --save_steps 1 "
    "--metric_for_best_model f1": ("--metric_for_best_model f1", "accuracy, loss"),
    "--trainer zo --xgblora_steps_per_iteration 9": ("--xgblora_steps_per_iteration", "--xgblora"),
    "--trainer zo --xgblora_merge_frequency 2": ("--xgblora_merge_frequency", "--xgblora"),
    "--trainer zo --lora_r 4": ("--lora_r", "--lora"),
    "--trainer zo --lora_alpha 32": ("--lora_alpha", "--lora"),
    "--trainer regular --zo_eps 1e-2": ("--zo_eps", "--trainer zo"),
    "--trainer regular --lora --zo_optim adamw": ("--zo_optim", "--trainer zo"),
    "--trainer regular --zo_queries 4": ("--zo_queries", "--trainer zo"),
    "--save_model": ("--save_model", "--trainer"),
    "--recipe fast": ("--recipe", "--trainer zo"),
    "--trainer zo --recipe fast --xgblora_layers all --zo_cache_activations": (
        "--zo_cache_activations",
        "top:N",
    ),
    "--trainer zo --recipe fast --objective accuracy --zo_cache_activations": (
        "--objective",
        "--zo_cache_activations",
    ),
    "--trainer zo --objective accuracy --zo_check": ("--objective", "--zo_check"),
    "--trainer zo --lora --zo_method fzoo": ("fzoo", "--zo_queries 2"),
    "--trainer zo --lora --lora_targets q_proj,lm_head --xgblora_layers top:1 --max_steps 1": (
        "lm_head",
        "numbered",
    ),
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags(refused, flags):
    refused(flags, *FLAGS[flags])


ROWS = {
    "not JSON": (["{"], "row 1"),
    "a list": (["[1, 2]"], "row 1"),
    "no column": ([json.dumps({"idx": 0, "sentence": "x", "label": 0}), '{"idx": 1, "label": 1}'], "row 2"),
    "a label outside the classes": (['{"sentence": "x", "label": 2}'], "label is 2"),
    "a label that is a word": (['{"sentence": "x", "label": "1"}'], "label is '1'"),
    "a sentence that is a number": (['{"sentence": 5, "label": 1}'], "sentence is a int"),
    "an empty sentence": (['{"sentence": " ", "label": 1}'], "sentence is empty"),
    "no rows": ([], "no rows"),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows(refused, name, tmp_path):
    lines, words = ROWS[name]
    write_rows(tmp_path / "SST2" / "validation.jsonl", GOOD)
    (tmp_path / "SST2" / "train.jsonl").write_text("\n".join(lines))
    refused(f"--data_dir {tmp_path}", "train.jsonl", words)


def test_a_file_that_is_not_utf8(refused, tmp_path):
    write_rows(tmp_path / "SST2" / "validation.jsonl", GOOD)
    (tmp_path / "SST2" / "train.jsonl").write_bytes(b'{"sentence": "\xff", "label": 1}')
    refused(f"--data_dir {tmp_path}", "train.jsonl", "UTF-8")


def test_bad_rows_are_refused_before_the_model_is_looked_at(refused, tmp_path):
    write_rows(tmp_path / "SST2" / "train.jsonl", [("x", 7)])
    refused(f"--data_dir {tmp_path} --model_name no/such_model", "label is 7")


def test_dev_rows_never_come_out_of_the_training_rows(refused, tmp_path):
    """WSC has 554 rows; the recipe's 1,000 + 500 would leave 54 to train on."""
    shutil.copytree(DATA / "WSC", tmp_path / "WSC")
    rows = (DATA / "WSC" / "train.jsonl").read_text(encoding="utf-8")
    (tmp_path / "WSC" / "train.jsonl").write_text(rows * 277, encoding="utf-8")
    flags = "--task_name WSC --trainer zo --num_train 1000 --num_dev 500"
    refused(f"{flags} --data_dir {tmp_path}", "--num_train 1000", "--num_dev 500", "554")


def test_ranks(refused, monkeypatch):
    refused("--trainer regular --fsdp", "torchrun")
    monkeypatch.setenv("WORLD_SIZE", "4")
    refused("--trainer zo --lora --max_steps 1", "WORLD_SIZE is 4", "torchrun")
    refused("--trainer zo --lora --zo_parallel queries --zo_queries 3", "--zo_queries 4 or more")
    refused("--trainer regular --lora --zo_parallel queries --zo_queries 8", "--trainer zo")
    refused("--trainer zo --fsdp full_shard", "--fsdp needs --trainer regular")
    refused("--trainer regular --fsdp hybrid_shard", "there is full_shard")
    refused("--trainer regular --fsdp --optim adafactor", "--fsdp", "adafactor", "exclude")
    refused("--trainer regular --fsdp --lora --save_merged", "--fsdp", "--save_merged")
    refused("--trainer zo --lora --replay trajectory.safetensors", "--replay")


def test_models_that_are_none(refused, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(f"--model_name {empty}", "empty")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(b"GGUF\x03\x00\x00\x00rubbish")
    refused(f"--model_name {cut}", "cut.gguf")
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "config.json").write_text(
        json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]})
    )
    refused(f"--model_name {bert}", "BertForMaskedLM", "not a causal language model")


def test_weights_that_lack_a_layer(refused, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    model = tiny_model("llama")
    state = model.state_dict()
    state.pop("model.layers.1.mlp.up_proj.weight")
    model.save_pretrained(tmp_path / "m", state_dict=state)
    refused(f"--model_name {tmp_path / 'm'}", "lack", "up_proj")


def test_a_model_without_attention_projections_names_what_it_has(refused, tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"vocab_size": 264, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    MambaForCausalLM(MambaConfig(**sizes)).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    refused(
        f"--model_name {tmp_path / 'm'} --trainer zo --lora --max_steps 1", "no layer to adapt", "in_proj"
    )


def test_an_output_directory_that_is_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("")
    refused(
        f"--trainer zo --lora --max_steps 1 --output_dir {tmp_path / 'file'}", "--output_dir", "not writable"
    )


def test_a_directory_that_another_process_trains_in(refused, tmp_path):

    with checkpoints.lock_output_dir(tmp_path / "out"):
        refused("--trainer zo --lora --max_steps 1", "another process")


def test_the_hub_out_of_reach_names_the_way_out(refused, monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UsageError, match=r"make starter.*--data_dir starter"):
        run.get_task("SST2")
    with pytest.raises(UsageError, match="make starter"):
        run.get_task("Reviews")


def test_the_process_says_one_line_and_exits_with_2(tmp_path):
    command = [sys.executable, str(ROOT / "run.py"), "--load_float16", "--load_bfloat16"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout


@pytest.mark.parametrize("flags", ["--task_name Nonsense", "--nonsense"])
def test_a_refusal_is_one_line_and_nothing_else(flags, tmp_path):
    done = processes.call(processes.train, flags.split(), folder=tmp_path)
    assert done.status == 2 and len(done.err.splitlines()) == 1 and not done.out


# ---- files ----


def broken_row_17(path):
    write_rows(path, GOOD * 5)
    lines = path.read_text().splitlines()
    lines[16] = lines[16][:-4]
    path.write_text("\n".join(lines))


def loop_of_links(path):
    path.symlink_to(path)


def written(text):
    return lambda path: path.write_bytes(text if isinstance(text, bytes) else text.encode())


FILES = {
    "empty": (written(""), "no rows"),
    "white space": (written(" \n\n"), "no rows"),
    "row 17 is broken": (broken_row_17, "row 17"),
    "UTF-16": (written('{"sentence": "x", "label": 1}'.encode("utf-16")), "UTF-8"),
    "binary": (written(bytes(range(128, 256))), "UTF-8"),
    "a directory": (lambda path: path.mkdir(), "directory"),
    "a loop of links": (loop_of_links, "symbolic links"),
    "a dead link": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "a column of the wrong type": (written('{"sentence": ["x"], "label": 1}'), "sentence is a list"),
    "a null": (written('{"sentence": null, "label": 1}'), "sentence is a NoneType"),
    "a label that is true": (written('{"sentence": "x", "label": true}'), "label is True"),
    "a label that is a fraction": (written('{"sentence": "x", "label": 1.0}'), "label is 1.0"),
    "a label of NaN": (written('{"sentence": "x", "label": NaN}'), "label is nan"),
    "a negative label": (written('{"sentence": "x", "label": -1}'), "label is -1"),
    "half an emoji": (written('{"sentence": "\\ud83d", "label": 1}'), "surrogate"),
    "a line of 10 MB that ends nowhere": (written('{"sentence": "' + "x" * 10**7), "row 1"),
    "nested ten thousand times": (written('{"sentence": ' + "[" * 10000), "row 1"),
    "a number of ten thousand digits": (written('{"sentence": "x", "label": ' + "1" * 10000 + "}"), "row 1"),
    "two objects in a row": (written('{"sentence": "x", "label": 1} {}'), "row 1"),
    "commas between rows": (written('{"sentence": "x", "label": 1},'), "row 1"),
}


@pytest.mark.parametrize("name", FILES)
def test_files(refused, name, tmp_path):
    make, words = FILES[name]
    write_rows(tmp_path / "SST2" / "validation.jsonl", GOOD)
    make(tmp_path / "SST2" / "train.jsonl")
    refused(f"--data_dir {tmp_path} --model_name no/such_model", "train.jsonl", words)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(refused, tmp_path):
    for split in ("train", "validation"):
        write_rows(tmp_path / "SST2" / f"{split}.jsonl", GOOD)
    (tmp_path / "SST2" / "train.jsonl").chmod(0)
    refused(f"--data_dir {tmp_path}", "train.jsonl", "Permission")


@pytest.mark.parametrize("text", ["\ufeff{}\n{}", "{}\r\n{}\r\n", "{}\n\n{}", "{}\n{}"])
def test_a_bom_and_windows_lines_are_no_harm(tmp_path, text):
    rows = [json.dumps({"sentence": s, "label": y}) for s, y in GOOD[:2]]
    for split in ("train", "validation"):
        (tmp_path / "SST2").mkdir(exist_ok=True)
        (tmp_path / "SST2" / f"{split}.jsonl").write_bytes(text.format(*rows).encode())
    assert len(run.get_task("SST2", tmp_path).samples["train"]) == 2


def test_rows_of_one_class_teach_nothing(refused, tmp_path):
    for split in ("train", "validation"):
        write_rows(tmp_path / "SST2" / f"{split}.jsonl", [("fine", 1), ("good", 1)])
    flags = "--trainer zo --lora --max_steps 1 --train_as_classification"
    refused(f"--data_dir {tmp_path} {flags}", "all 2 training rows", "one label")


# ---- tasks of one's own ----

OWN_ROW = {"text": "x", "label": "a", "options": ["b", "c"], "answer": 0, "reply": "y"}
LABELS = """--template '{text}' --label_column label --label_words '{"a": "one", "b": "two"}'"""
CHOICE = "--template '{text}' --candidates_column options --answer_index_column answer"
OWN = {
    "no template": ({}, "--label_column label", "--template"),
    "a column that is not there": ({}, LABELS.replace("{text}", "{nothing}"), "'nothing'"),
    "an attribute": ({}, LABELS.replace("{text}", "{text.__class__}"), "text.__class__"),
    "an index": ({}, LABELS.replace("{text}", "{options[0]}"), "options[0]"),
    "a conversion": ({}, LABELS.replace("{text}", "{text!r}"), "nothing else"),
    "a format": ({}, LABELS.replace("{text}", "{text:>99999999}"), "nothing else"),
    "an open brace": ({}, LABELS.replace("{text}", "{text"), "--template"),
    "no column at all": ({}, LABELS.replace("{text}", "text"), "no {column}"),
    "label words that are no JSON": ({}, LABELS.replace('"two"}', ""), "--label_words"),
    "one label word": ({}, LABELS.replace(', "b": "two"', ""), "--label_words"),
    "the same word twice": ({}, LABELS.replace("two", "one"), "different words"),
    "an empty label word": ({}, LABELS.replace("two", " "), "--label_words"),
    "an unknown label": ({"label": "z"}, LABELS, "'z'"),
    "candidates that are a text": ({"options": "bc"}, CHOICE, "options"),
    "no candidates": ({"options": []}, CHOICE, "options"),
    "an empty candidate": ({"options": ["b", ""]}, CHOICE, "options"),
    "a candidate twice": ({"options": ["b", "b"]}, CHOICE, "'b' stands there twice"),
    "an index beyond": ({"answer": 2}, CHOICE, "beyond the 2 candidates"),
    "an index that is true": ({"answer": True}, CHOICE, "answer"),
    "answers that are a number": ({"reply": 5}, "--template '{text}' --answer_column reply", "reply"),
    "two ways at once": ({}, f"{LABELS} --answer_column reply", "one of"),
}


@pytest.mark.parametrize("name", OWN)
def test_own_tasks(name, tmp_path, model_dir, capsys):
    changed, flags, words = OWN[name]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({**OWN_ROW, **changed}) + "\n")
    argv = [
        "--model_name",
        str(model_dir),
        "--task_name",
        "own",
        "--data_dir",
        str(tmp_path),
        *shlex.split(flags),
    ]
    assert run.main(argv) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("run.py: error: ") and words in line


# ---- models and adapters ----


def test_a_tokenizer_of_another_model(refused, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "vocab_size": 90}))
    refused(f"--model_name {tmp_path / 'm'}", "90 tokens", "of another model")


def test_a_model_of_which_only_the_configuration_is_there(refused, tmp_path):
    tiny_model("llama").config.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    refused(f"--model_name {tmp_path / 'm'}", "can't be read")


def test_weights_that_are_cut_off(refused, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(f"--model_name {tmp_path / 'm'}", "can't be read")


def test_a_head_that_is_the_embedding_takes_no_merge(refused, tmp_path):
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    flags = f"--model_name {tmp_path / 'm'} --trainer zo --xgblora --lora_targets lm_head --max_steps 1"
    refused(flags, "lm_head shares its weight", "--xgblora_ensemble")


def test_stages_need_a_chain(refused, tmp_path):
    LoRA(tiny_model("llama"), 2, 16).save_pretrained(tmp_path / "plain")
    refused(f"--adapter {tmp_path / 'plain'} --staged 1", "--staged", "no chain")


def test_adapters_that_do_not_fit(refused, tmp_path):
    for name, (family, more) in {"base": ("gpt2", {}), "rank": ("llama", {})}.items():
        LoRA(tiny_model(family), 2, 16, **more).save_pretrained(tmp_path / name)
    refused(f"--adapter {tmp_path / 'base'}", "Linear layers")
    refused(f"--adapter {tmp_path / 'rank'} --trainer zo --lora --lora_r 4 --max_steps 1", "rank 2", "rank 4")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    refused(f"--adapter {tmp_path / 'bert'}", "adapter_config.json")
