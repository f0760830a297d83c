"""The lower layers run once, or never: the losses are those of whole forwards."""

import json
from collections import namedtuple

import pytest
import torch
from support.adapters import train_a_bit
from support.models import tiny_model, tiny_tokenizer
from support.references import some_examples
from support.runs import adapter_bytes

from lora import LoRA
from scoring import logprobs, packing
from training import activation_cache, checkpoints
from utils import UsageError
from zo.optimizer import ZerothOrder

CACHED = (
    "--trainer zo --xgblora --xgblora_layers top:1 --xgblora_steps_per_iteration 4 "
    "--max_steps 11 --learning_rate 1e-2 "
    "--save_steps 2 --save_model --output_dir out --logging_steps 1"
)


def upper(family, dtype=torch.float32):
    model = tiny_model(family, dtype=dtype)
    lora = LoRA(model, 1, 16, xgblora=True, layers="top:1")
    train_a_bit(lora, 0)
    return model, lora


def perturbation(lora, n):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(n, *p.shape, generator=generator) * 0.05 for p in lora.parameters()]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("copies", [None, 2, 3])
def test_losses_without_the_lower_layers_are_those_of_whole_forwards(family, copies, plain):
    model, lora = upper(family)
    layers, first = lora.first_adapted_layer
    examples = some_examples(8)
    batch = packing.pack(examples, plain)
    hidden = activation_cache.capture_hidden_states(layers[first], lambda: logprobs.loss(model, batch, True))
    cache = activation_cache.ActivationCache(model, layers, first, examples, plain)
    cached_batch = packing.pack(cache.examples, plain)
    with torch.inference_mode():
        lora.set_perturbations(perturbation(lora, copies) if copies else None)
        expected = logprobs.loss(model, batch, True, copies)
        with activation_cache.skip_lower_layers(layers, first, hidden):
            assert torch.allclose(logprobs.loss(model, batch, True, copies), expected, atol=2e-5)
        with activation_cache.skip_lower_layers(layers, first, cache(cached_batch)):
            assert torch.allclose(logprobs.loss(model, cached_batch, True, copies), expected, atol=2e-5)
        assert torch.equal(logprobs.loss(model, batch, True, copies), expected)  # all layers are back
    assert [type(layer) for layer in layers] == [type(layers[0])] * 2


def test_a_cached_row_is_the_same_in_any_pack(family):
    """Rows that share a tree in a batch, and batches in another order, get the states of their own rows."""
    model, lora = upper(family)
    layers, first = lora.first_adapted_layer
    cache = activation_cache.ActivationCache(model, layers, first, some_examples(9), plain_rows=False)
    assert any(
        len(t.reads) > len(x.encodings)
        for t in packing.build_trees(cache.examples)
        for x in cache.examples[:1]
    )
    for some in (cache.examples[::-1], cache.examples[2:5], cache.examples[:1]):
        batch = packing.pack(some)
        expected = activation_cache.capture_hidden_states(
            layers[first], lambda batch=batch: logprobs.loss(model, batch, True)
        )
        real = batch["end"] > 0
        assert torch.allclose(cache(batch)[real], expected[real], atol=2e-5)


def test_the_lower_layers_run_once_for_all_points(family):
    model, lora = upper(family)
    layers, first = lora.first_adapted_layer
    calls = [0, 0]
    for i, layer in enumerate(layers):
        layer.register_forward_hook(lambda *a, i=i: calls.__setitem__(i, calls[i] + 1))
    batch = packing.pack(some_examples(4))
    hidden = activation_cache.capture_hidden_states(layers[first], lambda: logprobs.loss(model, batch, True))
    engine = ZerothOrder(
        [{"params": lora.parameters()}],
        1e-3,
        1e-2,
        master=True,
        queries=3,
        set_perturbations=lora.set_perturbations,
    )
    with activation_cache.skip_lower_layers(layers, first, hidden):
        engine.estimate(lambda **k: logprobs.loss(model, batch, True, **k), copies=2)
    assert calls == [1, 3]


def test_an_error_inside_leaves_the_model_whole():
    layers, first = upper("llama")[1].first_adapted_layer
    kept = list(layers)
    with (
        pytest.raises(ZeroDivisionError),
        activation_cache.skip_lower_layers(layers, first, torch.zeros(1, 1, 32)),
    ):
        raise ZeroDivisionError
    assert list(layers) == kept and not layers[first]._forward_pre_hooks
    assert activation_cache.capture_hidden_states(layers[first], lambda: None) is None


def logs(path="out"):
    state = (
        max(checkpoints.list_checkpoints(path), key=lambda p: int(p.name.rpartition("-")[2]))
        / "trainer_state.json"
    )
    return [e["loss"] for e in json.loads(state.read_text())["log_history"] if "loss" in e]


@pytest.mark.parametrize("family", ["opt", "llama", "qwen2", "gpt2"])
def test_a_cached_run_is_the_run_without_a_cache(go, family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / family)
    tiny_tokenizer().save_pretrained(tmp_path / family)
    go(CACHED, model=tmp_path / family)
    plain = logs()
    go(f"{CACHED} --zo_cache_activations --overwrite", model=tmp_path / family)
    assert logs() == pytest.approx(plain, abs=2e-4) and len(plain) == 11


@pytest.mark.parametrize("dtype", ["", "--load_bfloat16"])
def test_a_cached_run_resumes_with_the_same_bits(go, dtype):
    flags = f"{CACHED} --zo_cache_activations {dtype}"
    go(flags)
    expected = adapter_bytes()
    for path in checkpoints.list_checkpoints("out"):
        if path.name != "checkpoint-6":
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    go(flags)
    assert adapter_bytes() == expected


def test_the_size_is_told_and_too_much_is_refused(go, caplog, monkeypatch, capsys):
    caplog.set_level("INFO")
    go(f"{CACHED} --zo_cache_activations")
    assert "16 rows" in caplog.text and "MB on the host" in caplog.text
    monkeypatch.setattr(activation_cache.psutil, "virtual_memory", lambda: namedtuple("M", "available")(1000))
    go(f"{CACHED} --zo_cache_activations --overwrite", status=2)
    assert "MB are free" in capsys.readouterr().err


def test_a_cache_that_does_not_fit_is_refused_before_it_is_filled(monkeypatch):
    model, lora = upper("opt")
    monkeypatch.setattr(activation_cache.psutil, "virtual_memory", lambda: namedtuple("M", "available")(0))
    with pytest.raises(UsageError, match="--num_train"):
        activation_cache.ActivationCache(model, *lora.first_adapted_layer, some_examples(3), plain_rows=False)
