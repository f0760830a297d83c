"""The estimate of memory: exact sizes, monotone numbers, advice; a failed estimate stops no run."""

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
    """Return the arguments of a run with these flags."""
    return run.parse(f"--model_name none --task_name SST2 {flags}".split())


def estimated(
    flags="", config=None, train_examples=(), eval_examples=(), points_per_forward=1
) -> memory_estimate.Estimate:
    """Return the estimate of a run with these flags; without `config`, of a tiny llama."""
    model = model_shape.read_model_shape(config or tiny_model("llama").config)
    return memory_estimate.estimate_run(
        parsed(flags), model, list(train_examples), list(eval_examples), lambda tokens: points_per_forward,
        file_itemsize=4,
    )  # fmt: skip


def test_parameters_are_counted_exactly(family):
    model = tiny_model(family)
    rng_state = torch.get_rng_state()
    config = model.config.to_dict()
    shape = model_shape.read_model_shape(model.config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.vocabulary == model.config.vocab_size
    assert torch.equal(rng_state, torch.get_rng_state()) and model.config.to_dict() == config
    widths = shape.widths()
    assert (widths.layers, widths.hidden_size, widths.queries) == (2, 32, 32)
    assert widths.intermediate_size == (128 if family == "gpt2" else 48)
    assert widths.mlp_outputs == widths.intermediate_size * (2 if family in ("llama", "qwen2") else 1)


@pytest.mark.parametrize("kind", [LlamaForCausalLM, Qwen2ForCausalLM])
def test_tied_weights_are_counted_once(kind):
    family = {LlamaForCausalLM: "llama", Qwen2ForCausalLM: "qwen2"}[kind]
    configs = [tiny_model(family, tie_word_embeddings=tie).config for tie in (False, True)]
    untied, tied = (model_shape.read_model_shape(config) for config in configs)
    assert untied.parameters - tied.parameters == untied.vocabulary * 32


def test_a_gguf_file_has_the_shape_of_its_model(tmp_path):
    model = tiny_model("llama")
    write_gguf(tmp_path / "tiny.gguf", model)
    shape = model_shape.read_gguf_shape(str(tmp_path / "tiny.gguf"))
    expected = model_shape.read_model_shape(model.config)
    assert (shape.parameters, shape.vocabulary) == (expected.parameters, expected.vocabulary)
    assert shape.widths() == expected.widths()
    assert sorted(shape.linear.values()) == sorted(expected.linear.values())
    assert len(shape.adapted_matrices()) == len(expected.adapted_matrices()) == 4


def test_weights_and_optimizer_are_what_torch_holds():
    config = tiny_model("llama").config
    model = LlamaForCausalLM(config).bfloat16()
    size = sum(p.nbytes for p in model.parameters())
    estimate = estimated("--trainer regular --load_bfloat16", config)
    assert estimate.weights == size
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.ones(1, 3, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())
    assert estimate.optimizer == moments + size
    assert estimated("--trainer zo", config).optimizer == 0


def test_an_adapter_counts_what_it_holds():
    model = tiny_model("llama")
    lora = LoRA(model, 1, 16, xgblora=True)
    tensors = [*lora.parameters(), *lora.chain.pretrained.values(), *lora.chain.delta_sum.values()]
    assert estimated("--trainer zo --xgblora", model.config).adapter == sum(t.nbytes for t in tensors)
    ensemble = estimated("--trainer zo --xgblora --xgblora_ensemble", model.config).adapter
    assert ensemble == sum(p.nbytes for p in lora.parameters())


@pytest.mark.parametrize("trainer", ["zo", "regular"])
def test_more_tokens_take_more_memory(trainer):
    def activations(batch, times=1, more=""):
        """Return the bytes for batches of prompts that are repeated so many times."""
        examples = []
        for x in some_examples(32):
            options = [ids[:-n] * times + ids[-n:] for ids, n in zip(x.encodings, x.option_lens, strict=True)]
            examples.append(packing.Example(options, x.option_lens))
        flags = f"--trainer {trainer} --per_device_train_batch_size {batch} --max_steps 4 {more}"
        return estimated(flags, train_examples=examples).activations

    assert 0 < activations(2) < activations(8) < activations(32)
    assert activations(8) < activations(8, times=3)
    assert activations(8, more="--load_bfloat16") < activations(8)
    if trainer == "regular":
        assert activations(8, more="--gradient_checkpointing") < activations(8)


def test_copies_and_the_activation_cache_count():
    examples = some_examples(16)
    flags = "--trainer zo --lora"
    single, double = (
        estimated(flags, train_examples=examples, points_per_forward=n).activations for n in (1, 2)
    )  # fmt: skip
    assert single < double
    flags = "--trainer zo --xgblora --xgblora_layers top:1 --xgblora_steps_per_iteration 5"
    plain = estimated(flags, train_examples=examples)
    cached = estimated(f"{flags} --zo_cache_activations", train_examples=examples)
    tokens = sum(len(x.encodings[0]) for x in examples)
    assert cached.activations - plain.activations == tokens * 32 * 4


def test_evaluation_is_packed_as_it_will_be(monkeypatch):
    model = tiny_model("llama")
    examples = some_examples(60, beginning=30)
    batch_tokens = []
    option_logprobs = logprobs.option_logprobs

    def recording(model, batch, *args):
        batch_tokens.append(batch["input_ids"].numel())
        return option_logprobs(model, batch, *args)

    monkeypatch.setattr(logprobs, "option_logprobs", recording)
    monkeypatch.setattr(logprobs, "split_by_prefix", lambda encodings: [])
    monkeypatch.setattr(packing, "MAX_TOKENS", 200)
    logprobs.score(model, examples, 200)
    largest = max(batch.tokens for batch in model_shape.largest_evaluation_batches(examples))
    assert abs(largest / max(batch_tokens) - 1) < 0.2


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
    parts = dict.fromkeys(memory_estimate.FLAGS_BY_PART, 1e6) | {largest: 5e6}
    args = parsed(flags)
    warning = memory_estimate.Estimate(**parts, process=1e6, free_memory=8e6).warning(args)
    assert warning.startswith("this run needs about 9 MB, but 8 MB are free")
    assert f"({largest}, 5 MB)" in warning
    assert all(word in warning for word in words), warning
    assert memory_estimate.Estimate(**parts, process=1e6, free_memory=10e6).warning(args) is None


def test_flags_that_are_given_already_are_not_named():
    flags = "--trainer regular --lora --load_bfloat16 --gradient_checkpointing"
    flags += " --per_device_train_batch_size 1"
    warning = memory_estimate.Estimate(0, 5e6, 0, 0, 0, free_memory=1e6).warning(parsed(flags))
    assert warning.endswith("gets less with --max_length")


def test_a_run_logs_its_estimate(model_dir, data_dir, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    available = psutil.virtual_memory()._replace(available=-(10**10))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available)
    flags = f"--model_name {model_dir} --data_dir {data_dir} --trainer zo --lora --max_steps 2 --num_train 8"
    with caplog.at_level(logging.INFO):
        assert run.main(f"{flags} --result_file r.json --output_dir out --disable_tqdm True".split()) == 0
    messages = [record.getMessage() for record in caplog.records]
    assert sum(message.startswith("memory: about") for message in messages) == 1
    assert any("this run needs about" in message for message in messages)
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["estimated_memory_mb"] == result["sets"][0]["estimated_memory_mb"] > 0


def test_a_failed_estimate_stops_no_run(model_dir, data_dir, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)

    def broken(*args):
        raise KeyError("an odd model")

    monkeypatch.setattr(memory_estimate, "read_model_shape", broken)
    flags = f"--model_name {model_dir} --data_dir {data_dir} --num_eval 2 --result_file r.json"
    with caplog.at_level(logging.DEBUG, logger="run"):
        assert run.main(flags.split()) == 0
    assert "no estimate of memory: KeyError('an odd model')" in caplog.text
    assert "estimated_memory_mb" not in json.loads((tmp_path / "r.json").read_text())


def test_damaged_files_give_no_estimate(tmp_path):
    path = tmp_path / "damaged.gguf"
    for content in (b"", b"GGUF" + bytes(60), b"x" * 1000):
        path.write_bytes(content)
        args = run.parse(f"--model_name {path} --task_name SST2".split())
        assert memory_estimate.estimate_memory(args, None, [], [], lambda tokens: 1) is None


def test_generated_answers_count_their_cache():
    model = model_shape.read_model_shape(tiny_model("llama").config)
    examples = some_examples(20)
    batch = model_shape.largest_generation_batch(model, examples, 90, 4)
    assert batch.length == max(len(x.encodings[0]) for x in examples) + 90
    assert batch.rows == len(examples)
    short, long = (memory_estimate.activation_bytes(parsed(), model, [], examples, None, n) for n in (1, 90))
    assert short < long


def test_eager_attention_holds_its_scores():
    config = tiny_model("llama").config
    fused = model_shape.read_model_shape(config)
    config._attn_implementation = "eager"
    eager = model_shape.read_model_shape(config)
    assert eager.score_heads == 4 and fused.score_heads == 0
    batch = model_shape.BatchShape(2, 100, 4)
    assert memory_estimate.forward_bytes(eager, batch, 4) > memory_estimate.forward_bytes(fused, batch, 4)
    saved = [memory_estimate.saved_for_backward(model, batch, 4, False, False) for model in (eager, fused)]
    assert saved[0] > saved[1]
