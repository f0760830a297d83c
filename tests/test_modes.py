"""Head tuning, linear probing and objectives without a gradient; bases of 8 and 4 bits."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import tiny_model, tiny_tokenizer
from support.references import some_examples
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cli import load_model
from lora import LoRA
from scoring import linear_probe, logprobs, metrics, packing
from utils import UsageError
from zo.optimizer import ZerothOrder

# ---- the head ----


@pytest.mark.parametrize("untied", [False, True])
def test_head_tuning_trains_the_head_alone(family, untied):
    model, batch = tiny_model(family, tie_word_embeddings=True), packing.pack(some_examples())
    embedding = model.get_input_embeddings().weight
    if untied:
        load_model.untie_head(model)
    load_model.train_head_only(model)
    head = model.get_output_embeddings().weight
    assert (head is embedding) != untied
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    zo = ZerothOrder(model, 1e-3, 1e-3, 0)
    zo.step(lambda: logprobs.loss(model, batch, True))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert len(changed) == 1 and torch.equal(head, dict(model.named_parameters())[changed.pop()])
    z = zo.directions.z_rows(zo.blocks[0], 0, range(0, 1))
    assert z.shape[-1] == head.shape[-1]


def test_a_streamed_step_of_the_head_equals_the_plain_one():
    model, batch = tiny_model("llama"), packing.pack(some_examples())
    load_model.train_head_only(model)
    head = model.get_output_embeddings().weight
    zo = ZerothOrder(model, 1e-3, 1e-2, 0, master=False)
    z = zo.directions.z(zo.blocks[0], 0).clone()
    start, losses = head.detach().clone(), []
    with torch.inference_mode():
        for sign in (1, -1):
            head.copy_(start + sign * 1e-2 * z)
            losses.append(float(logprobs.loss(model, batch, True)))
        head.copy_(start)
    zo.step(lambda: logprobs.loss(model, batch, True))
    assert zo.projected_grads[0] == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=1e-3, abs=1e-4)
    torch.testing.assert_close(head.detach(), start - 1e-3 * zo.projected_grads[0] * z)


@pytest.mark.parametrize("trainer", ["zo", "regular"])
def test_an_untied_head_is_saved_and_loads(go, trainer, tmp_path):
    tied = tiny_model("llama", tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    tiny_tokenizer().save_pretrained(tmp_path / "tied")
    run = f"--trainer {trainer} --head_tuning --untie_emb --learning_rate 1e-2 --max_steps 3"
    result = go(f"{run} --output_dir out --save_model", model=tmp_path / "tied")
    assert result["args"]["head_tuning"] and "boosters" not in result["sets"][0]
    loaded = AutoModelForCausalLM.from_pretrained("out")
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    assert torch.equal(loaded.model.embed_tokens.weight, tied.model.embed_tokens.weight)
    again = go("--trainer none --num_train 0", model="out")
    assert again["loss"] == pytest.approx(result["loss"], abs=1e-5)


# ---- linear probing ----


@pytest.mark.parametrize("plain", [False, True])
def test_the_probe_sees_the_last_hidden_state_of_the_prompt(family, plain):
    model, examples = tiny_model(family), some_examples(beginning=20)
    states = linear_probe.prompt_states(model, examples, plain)
    head_inputs = []
    model.get_output_embeddings().register_forward_pre_hook(lambda head, args: head_inputs.append(args[0]))
    for x, state in zip(examples, states, strict=True):
        prompt = x.encodings[0][: -x.option_lens[0]]
        with torch.inference_mode():
            model(torch.tensor([prompt]))
        np.testing.assert_allclose(state, head_inputs.pop()[0, -1].numpy(), rtol=1e-4, atol=1e-5)


def test_a_probe_separates_what_can_be_separated():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(200, 12)).astype(np.float32) * np.array([100, *[1] * 11], dtype=np.float32)
    labels = (states[:, 3] + 0.1 * rng.normal(size=200) > 0).astype(int).tolist()
    for early in (False, True):
        probe = linear_probe.LinearProbe(states[:150], labels[:150], early)
        scores = np.array(probe.log_probs(states[150:], 3))
        assert (scores[:, :2].argmax(1) == labels[150:]).mean() > 0.9 and (scores[:, 2] < -1e8).all()
        np.testing.assert_allclose(np.exp(scores).sum(1), 1, rtol=1e-6)
    with pytest.raises(UsageError, match="two labels"):
        linear_probe.LinearProbe(states[:9], [1] * 9)


def test_linear_probing_from_the_command_line(go):
    for flags in ("--linear_probing", "--linear_probing --trainer regular --lp_early_stopping --num_dev 8"):
        result = go(flags.replace("--num_dev", "--output_dir out --num_dev"))
        assert result["args"]["trainer"] in ("none", "regular") and result["forward_passes"] == 0
        # The validation sentences are the training sentences without a number.
        assert result["accuracy"] >= 0.75
        assert ("dev_accuracy" in result) == ("num_dev" in flags)


# ---- objectives ----


def test_objectives():
    assert metrics.find_metric("accuracy")(["a", "b"], ["a", "c"]) == 0.5
    assert metrics.find_metric("f1")(["a red car", "x"], [["red car"], ["y"]]) == 0.5
    assert metrics.find_metric("em")(["The car", "x"], [["car"], ["y"]]) == 0.5
    with pytest.raises(UsageError, match="accuracy, f1, em"):
        metrics.find_metric("bleu")


def test_steps_raise_the_accuracy_or_a_function_of_ones_own(go, tmp_path):
    run = (
        "--trainer zo --lora --max_steps 4 --logging_steps 2 --output_dir {} --train_as_classification False"
    )
    go(f"{run.format('a')} --objective accuracy --zo_eps 1")
    history = json.loads(Path("a", "checkpoint-4", "trainer_state.json").read_text())["log_history"]
    shares = [entry["zero_gradient_share"] for entry in history if "loss" in entry]
    assert len(shares) == 2 and all(0 <= share <= 1 for share in shares)
    assert all(-1 <= entry["loss"] <= 0 for entry in history if "loss" in entry)
    go(f"{run.format('b')} --non_diff --zo_eps 1")
    assert Path("a", "adapter_model.safetensors").exists() is False
    same = [Path(d, "checkpoint-4", "adapter_model.safetensors").read_bytes() for d in "ab"]
    assert same[0] == same[1]
    (tmp_path / "mine.py").write_text(
        "def share_of_ones(predictions, golds):\n    return sum(predictions) / len(golds)\n"
    )
    go(f"{run.format('c')} --objective {tmp_path}/mine.py:share_of_ones")
    go(f"{run.format('d')} --objective {tmp_path}/mine.py:nothing", status=2)
    go(f"{run.format('d')} --objective f1", status=2)


def test_f1_of_generated_answers_is_an_objective(go, tmp_path):
    row = {"id": "0", "title": "T", "context": "It is red.", "question": "What is it?"}
    for split in ("train", "validation"):
        rows = [{**row, "id": str(i), "answers": {"text": ["red"], "answer_start": [6]}} for i in range(24)]
        path = tmp_path / "qa" / "SQuAD" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = "--task_name SQuAD --trainer zo --lora --non_diff --max_steps 2 --max_new_tokens 4 --num_eval 4"
    more = "--train_as_classification False --max_length 120 --output_dir out"
    result = go(f"{flags} --data_dir {tmp_path / 'qa'} {more}")
    assert 0 <= result["f1"] <= 1 and result["forward_passes"] == 4


# ---- quantised bases ----

needs_bitsandbytes = pytest.mark.skipif(
    not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def big_enough(tmp_path_factory):
    """A Llama whose layers are wide enough for blocks of 64 weights."""
    path = tmp_path_factory.mktemp("quantised") / "llama"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=264, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, bos_token_id=256, eos_token_id=257,
            pad_token_id=258,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def dequantised(model):
    """{module name: weight} of the quantised layers, fp32."""
    import bitsandbytes as bnb

    weights = {}
    for name, m in model.named_modules():
        if isinstance(m, bnb.nn.Linear4bit):
            weights[name] = bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state).float()
        elif isinstance(m, bnb.nn.Linear8bitLt):
            scale = m.state.SCB if m.state.SCB is not None else m.weight.SCB
            weights[name] = m.weight.data.float() * scale.view(-1, 1) / 127
    return weights


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [8, 4])
def test_losses_and_gradients_on_a_quantised_base(big_enough, bits):
    """Against the model with the weights that the quantised ones stand for."""
    quantised = load_model.read_model(str(big_enough), torch.float32, bits=bits)
    if bits == 4:
        load_model.use_differentiable_kernels(quantised)
    plain = load_model.read_model(str(big_enough), torch.float32)
    weights = dequantised(quantised)
    assert len(weights) == 14
    with torch.no_grad():
        for name, weight in weights.items():
            plain.get_submodule(name).weight.copy_(weight)
    loras, batch, losses = [], packing.pack(some_examples()), []
    for model in (quantised, plain):
        model.train()
        loras.append(LoRA(model, 2, 16))
        for m in loras[-1].lora_modules:
            m.lora_B.data.fill_(0.01)
        loss = logprobs.loss(model, batch, True)
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for a, b in zip(*(lora.lora_modules for lora in loras), strict=True):
        assert (
            torch.nn.functional.cosine_similarity(a.lora_A.grad.flatten(), b.lora_A.grad.flatten(), dim=0)
            > 0.999
        )


@needs_bitsandbytes
@pytest.mark.parametrize("flags", ["--load_int8", "--load_int4"])
def test_adapters_train_on_a_quantised_base(go, big_enough, flags):
    common = f"{flags} --max_steps 4 --output_dir {{}} --save_model"
    boost = (
        "--trainer zo --xgblora --xgblora_ensemble "
        f"--xgblora_steps_per_iteration 2 {common.format('boosted')}"
    )
    result = go(f"{boost} --learning_rate 1e-2", model=big_enough)
    assert result["sets"][0]["boosters"] == 2
    loaded = go(f"{flags} --adapter boosted --xgblora_ensemble --num_train 0", model=big_enough)
    assert loaded["loss"] == pytest.approx(result["loss"], abs=1e-3)
    go(f"--trainer regular --lora {common.format('first')}", model=big_enough)
    go(f"--trainer zo --prefix_tuning {common.format('prefix')}", model=big_enough)
    go(f"--trainer zo --xgblora {common.format('no')}", model=big_enough, status=2)
    go(f"--trainer zo {common.format('no')}", model=big_enough, status=2)
    go(f"{flags} --adapter boosted --num_train 0", model=big_enough, status=2)


@needs_bitsandbytes
def test_a_merge_into_quantised_weights_is_refused_with_the_way_out(big_enough):
    with pytest.raises(UsageError, match="xgblora_ensemble"):
        LoRA(load_model.read_model(str(big_enough), torch.float32, bits=8), 1, 16, xgblora=True)


# ---- back-propagation ----


@pytest.mark.parametrize("mode", ["", "--lora", "--xgblora --xgblora_steps_per_iteration 2"])
def test_gradient_checkpointing_and_bf16_train_the_same(go, mode):
    run = f"--trainer regular {mode} --max_steps 4 --learning_rate 1e-3 --save_model"
    losses = [
        go(f"{run} {more} --output_dir {i}")["loss"]
        for i, more in enumerate(("", "--gradient_checkpointing", "--bf16 --use_cpu"))
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and losses[2] == pytest.approx(losses[0], abs=0.05)
    assert losses[0] != go("--trainer none --num_train 0")["loss"]
