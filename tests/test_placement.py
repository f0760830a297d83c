"""A model that is spread over devices, host and disk gives what it gives on one device.

Without a GPU the host computes and only the disk is another place; `cpu_offload` makes weights that lie on
the host be brought at each call, as beside a GPU.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import attach_execution_device_hook
from safetensors.torch import load_file
from support.models import tiny_model, tiny_tokenizer
from support.references import some_examples
from support.runs import ZO, adapter_bytes, in_folder

import utils
from lora import LoRA
from prefix import PrefixTuning
from scoring import logprobs, packing
from scoring.generate import generate
from utils import UsageError
from zo.optimizer import ZerothOrder

PARTS = (
    "model.embed_tokens",
    "model.layers.0",
    "model.layers.1",
    "model.norm",
    "model.rotary_emb",
    "lm_head",
)
PLACES = {  # of these parts
    "host and disk": ["disk", "cpu", "disk", "cpu", "cpu", "cpu"],
    "disk": ["disk"] * 6,
}


@pytest.fixture(params=PLACES)
def placed(request, tmp_path):
    return device_map(tmp_path, PLACES[request.param])


@pytest.fixture
def on_disk(tmp_path):
    return device_map(tmp_path, PLACES["disk"])


def device_map(folder, places):
    path = folder / "map.json"
    path.write_text(json.dumps(dict(zip(PARTS, places, strict=True))))
    return f"--device_map {path}"


def scores(go, flags):
    go(f"{flags} --predictions said.jsonl")
    return torch.tensor([json.loads(line)["scores"] for line in Path("said.jsonl").read_text().splitlines()])


@pytest.mark.parametrize("shots", ["--num_train 0", "--num_train 8 --train_set_seed 1"])
def test_scores_do_not_depend_on_the_place_of_the_layers(go, placed, shots):
    assert torch.equal(scores(go, f"{shots} {placed}"), scores(go, shots))


@pytest.mark.parametrize(
    "mode", ["--lora", "--lora --xgblora_layers top:1 --zo_cache_activations --zo_batched on"]
)
def test_a_run_with_adapters_is_the_same_run(go, placed, mode):
    def trained(flags, out):
        go(f"{ZO} {mode} {flags}".replace("--output_dir out", f"--output_dir {out}"))
        return (Path(out) / "adapter_model.safetensors").read_bytes()

    assert trained(placed, "spread") == trained("", "one")


def test_an_ensemble_of_boosters_is_the_same_and_goes_on_there(go, on_disk):
    offloaded_run, plain_run = (f"{in_folder(name)} --xgblora_ensemble" for name in ("a", "b"))
    there = scores(go, f"{offloaded_run} {on_disk}")
    assert torch.equal(there, scores(go, plain_run))
    assert adapter_bytes("a") == adapter_bytes("b")
    # The run goes on there, and at another place: the place is no part of the run.
    for last, place in ((8, on_disk), (9, "")):
        go(f"{offloaded_run} {place} --max_steps {last}")
    go(f"{plain_run} --max_steps 9")
    assert adapter_bytes("a") == adapter_bytes("b")
    assert torch.equal(
        scores(go, f"--adapter a --xgblora_ensemble {on_disk}"), scores(go, "--adapter b --xgblora_ensemble")
    )


def test_a_prefix_is_the_same_run(go, on_disk):
    def trained(flags, out):
        go(f"{ZO} --prefix_tuning {flags}".replace("--output_dir out", f"--output_dir {out}"))
        return (Path(out) / "adapter_model.safetensors").read_bytes()

    assert trained(on_disk, "spread") == trained("", "one")
    assert torch.equal(scores(go, f"--adapter spread {on_disk}"), scores(go, "--adapter one"))


def test_layers_that_keep_their_weights_are_merged(go, tmp_path):
    there = device_map(tmp_path, ["disk", "cpu", "cpu", "cpu", "cpu", "disk"])  # no target layer is offloaded
    offloaded_run, plain_run = (in_folder(name) for name in ("a", "b"))
    assert torch.equal(scores(go, f"{offloaded_run} {there}"), scores(go, plain_run)) and adapter_bytes(
        "a"
    ) == adapter_bytes("b")


def offloaded(family):
    return cpu_offload(tiny_model(family), execution_device=torch.device("cpu"))


def test_every_family_scores_generates_and_steps_offloaded(family):
    examples, tokenizer = some_examples(beginning=20), tiny_tokenizer()
    prompts, outcomes = [x.encodings[0] for x in examples], []
    for model in (tiny_model(family), offloaded(family)):
        plain = not logprobs.supports_packed_rows(model)
        names = [name for name, _ in model.named_parameters()]
        lora = LoRA(model, 2, 4)
        answers = generate(model, tokenizer, prompts, max_new_tokens=4)
        batch = packing.pack(examples, plain)
        zo = ZerothOrder(lora.parameters(), lr=1e-2, eps=1e-2, master=True)
        losses = [
            zo.step(lambda model=model, batch=batch: logprobs.loss(model, batch, True)) for _ in range(3)
        ]
        outcomes.append((plain, answers, losses, logprobs.score(model, examples, plain_rows=plain)))
        lora.remove()
        assert [name for name, _ in model.named_parameters()] == names
    assert outcomes[0] == outcomes[1]


def test_a_prefix_generates_offloaded():
    prompts, outcomes = [x.encodings[0] for x in some_examples(beginning=20)], []
    for model in (tiny_model("llama"), offloaded("llama")):
        PrefixTuning(model, 3)
        ways = ({}, {"num_beams": 2}, {"use_cache": False})
        outcomes.append([generate(model, tiny_tokenizer(), prompts, max_new_tokens=4, **how) for how in ways])
    assert outcomes[0] == outcomes[1]


def test_weights_that_are_not_safetensors_go_to_the_offload_folder(go, refused, on_disk, model_dir, tmp_path):
    old = shutil.copytree(model_dir, tmp_path / "old")
    torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    there = f"--model_name {old} {on_disk}"
    refused(there, "offload_folder")
    assert torch.equal(scores(go, f"{there} --offload_folder {tmp_path / 'put'}"), scores(go, ""))
    assert list((tmp_path / "put").glob("*.safetensors"))


def test_a_map_of_one_place(go, tmp_path):
    scored = [scores(go, "--trainer zo --lora --max_steps 2 --zo_check --overwrite")]
    for place in ("cpu", "disk"):
        (tmp_path / "one.json").write_text(json.dumps({"": place}))
        scored.append(
            scores(go, f"--trainer zo --lora --max_steps 2 --overwrite --device_map {tmp_path / 'one.json'}")
        )
    assert torch.equal(scored[0], scored[1]) and torch.equal(scored[0], scored[2])


def test_hooks_around_weights_that_are_there_change_nothing(family):
    outcomes = []
    for model in (tiny_model(family), tiny_model(family)):
        if outcomes:
            attach_execution_device_hook(model, torch.device("cpu"))
        lora = LoRA(model, 1, 16, xgblora=True)
        lora.lora_modules[0].lora_B.data.fill_(0.1)
        lora.merge_and_reinit()
        lora.lora_modules[0].lora_B.data.fill_(0.1)
        plain = not logprobs.supports_packed_rows(model)
        outcomes.append((lora.plain_state_dict(), logprobs.score(model, some_examples(), plain_rows=plain)))
    assert outcomes[0][1] == outcomes[1][1] and outcomes[0][0].keys() == outcomes[1][0].keys()
    assert all(torch.equal(value, outcomes[1][0][name]) for name, value in outcomes[0][0].items())


def test_offloaded_weights_take_no_merge(family):
    with pytest.raises(UsageError, match="--xgblora_ensemble"):
        LoRA(offloaded(family), 1, 16, xgblora=True)


def test_where_ids_go():
    assert (
        utils.input_device(tiny_model("opt")) == utils.input_device(offloaded("opt")) == torch.device("cpu")
    )
    model = cpu_offload(tiny_model("opt"), execution_device=torch.device("meta"))
    assert utils.input_device(model) == torch.device("meta")


REFUSED = {
    "--trainer zo": ("--device_map", "full fine-tune", "--lora"),
    "--trainer zo --head_tuning": ("--device_map", "full fine-tune"),
    "--trainer regular": ("--device_map", "back-propagation"),
    "--trainer regular --lora": ("--device_map", "back-propagation", "--trainer zo"),
    "--trainer zo --xgblora --xgblora_steps_per_iteration 2": ("offloaded", "--xgblora_ensemble"),
    "--trainer zo --lora --save_merged": ("--device_map", "--save_merged"),
    "--trainer zo --lora --load_int8": ("--device_map", "--load_int8"),
    "--trainer zo --head_tuning --untie_emb": ("--device_map", "--untie_emb"),
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_needs_weights_that_are_there_is_refused(refused, on_disk, flags):
    refused(f"{flags} --max_steps 2 {on_disk}", *REFUSED[flags])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"": true}', '{"": -1}', '{"": null}'])
def test_a_file_that_is_no_map_is_refused(refused, tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    refused(f"--device_map {tmp_path / 'bad.json'}", "--device_map", "bad.json")


def test_other_refusals(refused, tmp_path, monkeypatch):
    refused("--device_map nowhere.json", "--device_map nowhere.json", "auto")
    refused("--offload_folder here", "--offload_folder", "--device_map")
    refused(f"{device_map(tmp_path, ['cpu', 'cpu', 'cpu', 'cpu', 'cpu', 'nonsense'])}", "nonsense")
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    refused("--device_map auto", "--device_map", "torchrun")


def test_auto_leaves_a_model_whole_that_fits(go):
    assert torch.equal(scores(go, "--num_train 0 --device_map auto"), scores(go, "--num_train 0"))
