"""The estimate of memory: exact sizes, numbers that grow with what they depend on, advice, and no harm done."""

import json
import logging

import psutil
import pytest
import torch
from support.models import tiny_model
from support.references import some_examples
from support.runs import write_gguf
from transformers import LlamaForCausalLM, Qwen2ForCausalLM

import run
from lora import LoRA
from machine import memory_estimate, model_shape
from scoring import logprobs, packing


def parsed(flags: str = ""):
    return run.parse(f"--model_name none --task_name SST2 {flags}".split())


def estimated(flags="", config=None, learned=(), evaluated=(), copies=1) -> memory_estimate.Estimate:
    shape = model_shape.shape(config or tiny_model("llama").config)
    return memory_estimate.estimate(parsed(flags), shape, list(learned), list(evaluated), lambda tokens: copies, file=4)


def test_parameters_are_counted_exactly(family):
    model = tiny_model(family)
    state = torch.get_rng_state()
    before = model.config.to_dict()
    found = model_shape.shape(model.config)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.vocabulary == model.config.vocab_size
    assert torch.equal(state, torch.get_rng_state()) and model.config.to_dict() == before
    layers, width, queries, _, inner, made = found.widths()
    assert (layers, width, queries) == (2, 32, 32)
    assert inner == (128 if family == "gpt2" else 48)
    assert made == inner * (2 if family in ("llama", "qwen2") else 1)


@pytest.mark.parametrize("kind", [LlamaForCausalLM, Qwen2ForCausalLM])
def test_tied_weights_are_counted_once(kind):
    family = {LlamaForCausalLM: "llama", Qwen2ForCausalLM: "qwen2"}[kind]
    apart, tied = (model_shape.shape(tiny_model(family, tie_word_embeddings=tie).config) for tie in (False, True))
    assert apart.parameters - tied.parameters == apart.vocabulary * 32


def test_a_gguf_file_has_the_shape_of_its_model(tmp_path):
    model = tiny_model("llama")
    write_gguf(tmp_path / "tiny.gguf", model)
    found, wanted = model_shape.gguf_shape(str(tmp_path / "tiny.gguf")), model_shape.shape(model.config)
    assert (found.parameters, found.vocabulary) == (wanted.parameters, wanted.vocabulary)
    assert found.widths() == wanted.widths()
    assert sorted(found.linear.values()) == sorted(wanted.linear.values())
    assert len(found.targets()) == len(wanted.targets()) == 4


def test_weights_and_optimizer_are_what_torch_holds():
    config = tiny_model("llama").config
    model = LlamaForCausalLM(config).bfloat16()
    size = sum(p.nbytes for p in model.parameters())
    found = estimated("--trainer regular --load_bfloat16", config)
    assert found.weights == size
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.ones(1, 3, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())
    assert found.optimizer == moments + size
    assert estimated("--trainer zo", config).optimizer == 0


def test_an_adapter_counts_what_it_holds():

    model = tiny_model("llama")
    lora = LoRA(model, 1, 16, xgblora=True)
    held = [*lora.parameters(), *lora.chain.pretrained.values(), *lora.chain.delta_sum.values()]
    assert estimated("--trainer zo --xgblora", model.config).adapter == sum(t.nbytes for t in held)
    ensemble = estimated("--trainer zo --xgblora --xgblora_ensemble", model.config).adapter
    assert ensemble == sum(p.nbytes for p in lora.parameters())


@pytest.mark.parametrize("trainer", ["zo", "regular"])
def test_more_tokens_take_more_memory(trainer):
    def activations(batch, times=1, more=""):
        examples = [
            packing.Example([ids[:-n] * times + ids[-n:] for ids, n in zip(x.encodings, x.option_lens, strict=True)],
                            x.option_lens)
            for x in some_examples(32)
        ]  # fmt: skip
        flags = f"--trainer {trainer} --per_device_train_batch_size {batch} --max_steps 4 {more}"
        return estimated(flags, learned=examples).activations

    assert 0 < activations(2) < activations(8) < activations(32)
    assert activations(8) < activations(8, times=3)
    assert activations(8, more="--load_bfloat16") < activations(8)
    if trainer == "regular":
        assert activations(8, more="--gradient_checkpointing") < activations(8)


def test_copies_and_the_store_of_activations_count():
    examples = some_examples(16)
    one, two = (estimated("--trainer zo --lora", learned=examples, copies=n).activations for n in (1, 2))
    assert one < two
    flags = "--trainer zo --xgblora --xgblora_layers top:1 --xgblora_steps_per_iteration 5"
    plain, cached = (estimated(flags + more, learned=examples) for more in ("", " --zo_cache_activations"))
    assert cached.activations - plain.activations == sum(len(x.encodings[0]) for x in examples) * 32 * 4


def test_evaluation_is_packed_as_it_will_be(monkeypatch):
    model, examples, seen = tiny_model("llama"), some_examples(60, beginning=30), []
    plain = logprobs.option_logprobs

    def spied(model, batch, *args):
        seen.append(batch["input_ids"].numel())
        return plain(model, batch, *args)

    monkeypatch.setattr(logprobs, "option_logprobs", spied)
    monkeypatch.setattr(logprobs, "split_by_prefix", lambda encodings: [])
    monkeypatch.setattr(packing, "MAX_TOKENS", 200)
    logprobs.score(model, examples, 200)
    assert abs(max(p.rows * p.length for p in model_shape.evaluation_packs(examples)) / max(seen) - 1) < 0.2


@pytest.mark.parametrize(
    "flags, largest, words",
    [
        ("", "weights", ["--load_bfloat16", "--load_int8"]),
        ("--load_bfloat16 --load_int8", "weights", ["is the model"]),
        ("--trainer regular --load_bfloat16", "optimizer", ["--lora", "--trainer zo"]),
        ("--trainer regular --lora", "activations",
         ["--per_device_train_batch_size", "--max_length", "--gradient_checkpointing", "--load_bfloat16"]),
        ("--trainer zo --xgblora", "adapter", ["--xgblora_ensemble"]),
    ],
)  # fmt: skip
def test_too_little_memory_names_what_to_lower(flags, largest, words):
    parts = dict.fromkeys(memory_estimate.FLAGS, 1e6) | {largest: 5e6}
    args = parsed(flags)
    said = memory_estimate.Estimate(**parts, process=1e6, free=8e6).warning(args)
    assert said.startswith("this run needs about 9 MB, but 8 MB are free") and f"({largest}, 5 MB)" in said
    assert all(word in said for word in words), said
    assert memory_estimate.Estimate(**parts, process=1e6, free=10e6).warning(args) is None


def test_flags_that_have_been_taken_are_not_named():
    said = memory_estimate.Estimate(0, 5e6, 0, 0, 0, free=1e6).warning(
        parsed("--trainer regular --lora --load_bfloat16 --gradient_checkpointing --per_device_train_batch_size 1")
    )
    assert said.endswith("gets less with --max_length")


def test_a_run_says_what_it_will_take(model_dir, data_dir, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    available = psutil.virtual_memory()._replace(available=-(10**10))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available)
    flags = f"--model_name {model_dir} --data_dir {data_dir} --trainer zo --lora --max_steps 2 --num_train 8"
    with caplog.at_level(logging.INFO):
        assert run.main(f"{flags} --result_file r.json --output_dir out --disable_tqdm True".split()) == 0
    said = [record.getMessage() for record in caplog.records]
    assert sum(line.startswith("memory: about") for line in said) == 1
    assert any("this run needs about" in line for line in said)
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["estimated_memory_mb"] == result["sets"][0]["estimated_memory_mb"] > 0


def test_no_estimate_is_no_harm(model_dir, data_dir, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)

    def broken(*args):
        raise KeyError("an odd model")

    monkeypatch.setattr(memory_estimate, "shape", broken)
    flags = f"--model_name {model_dir} --data_dir {data_dir} --num_eval 2 --result_file r.json --disable_tqdm True"
    with caplog.at_level(logging.DEBUG, logger="run"):
        assert run.main(flags.split()) == 0
    assert "no estimate of memory: KeyError('an odd model')" in caplog.text
    assert "estimated_memory_mb" not in json.loads((tmp_path / "r.json").read_text())


def test_odd_files_give_no_estimate(tmp_path):
    path = tmp_path / "odd.gguf"
    for content in (b"", b"GGUF" + bytes(60), b"x" * 1000):
        path.write_bytes(content)
        args = run.parse(f"--model_name {path} --task_name SST2".split())
        assert memory_estimate.estimate_memory(args, None, [], [], lambda tokens: 1) is None


def test_generated_answers_count_their_cache():
    shape, examples = model_shape.shape(tiny_model("llama").config), some_examples(20)
    p = model_shape.answers_pack(shape, examples, 90, 4)
    assert p.length == max(len(x.encodings[0]) for x in examples) + 90 and p.rows == len(examples)
    few, many = (memory_estimate.activations(parsed(), shape, [], examples, None, new) for new in (1, 90))
    assert few < many


def test_eager_attention_holds_its_scores():
    config = tiny_model("llama").config
    config._attn_implementation = "eager"
    eager, fused = model_shape.shape(config), model_shape.shape(tiny_model("llama").config)
    assert eager.heads == 4 and fused.heads == 0
    p = model_shape.Pack(2, 100, 4)
    assert memory_estimate.inference(eager, p, 4) > memory_estimate.inference(fused, p, 4)
    assert memory_estimate.kept(eager, p, 4, False, False) > memory_estimate.kept(fused, p, 4, False, False)
