"""In every model family, adapters, chains, steps, scores and answers are those of the plain computation.

The table of docs/FAMILIES.md says the same as `FACTS`: its targets are those of
`test_targets_are_q_and_v_or_those_of_peft`, its scoring that of
`test_scores_are_those_of_one_row_a_candidate`, its full zo that of
`test_a_full_step_is_that_of_perturbed_weights`, its notes those of
`test_windows_decide_where_rows_may_be_longer`, `test_rows_are_no_longer_than_the_model_takes` and
`test_models_with_images_are_refused`.
"""

import json
import re
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from support.adapters import boosted, logits, train_a_bit
from support.models import ALL_FAMILIES, tiny_model, tiny_tokenizer
from support.references import (
    assert_close,
    loss_at,
    perturbed,
    plain_answers,
    plain_scores,
    some_examples,
    some_prompts,
)
from transformers import AutoModelForCausalLM

from cli import load_model
from lora import LoRA
from scoring import generate, logprobs, packing
from trainer import OurTrainer
from training import activation_cache
from utils import UsageError
from zo import counter_rng
from zo.optimizer import ZerothOrder

Q_V, FUSED = "q_proj, v_proj", "query_key_value"
# family -> (targets of LoRA, whether rows are packed, whether a full step is one forward for both signs)
FACTS = {
    "opt": (Q_V, True, True),
    "opt-350m": (Q_V, True, True),
    "llama": (Q_V, True, True),
    "mistral": (Q_V, True, True),
    "mistral-window": (Q_V, False, True),
    "mixtral": (Q_V, True, False),  # stacked experts
    "qwen2": (Q_V, True, True),
    "qwen3": (Q_V, True, True),
    "gemma": (Q_V, True, True),
    "gemma2": (Q_V, True, True),
    "gemma2-window": (Q_V, False, True),
    "gemma3": (Q_V, False, True),
    "phi": (Q_V, True, True),
    "phi3": ("qkv_proj", True, True),
    "stablelm": (Q_V, True, True),
    "stablelm-parallel": (Q_V, True, True),
    "olmo2": (Q_V, True, True),
    "granite": (Q_V, True, True),
    "cohere": (Q_V, True, True),
    "gpt2": ("c_attn", True, True),
    "gpt_neox": (FUSED, True, True),
    "falcon": (FUSED, True, True),
    "falcon-new": (FUSED, True, True),
    "falcon-heads": (FUSED, True, True),
    "falcon-alibi": (FUSED, False, True),
    "bloom": (FUSED, False, True),
    "mpt": ("Wqkv", False, True),
    "gptj": (Q_V, True, True),
    "gpt_neo": (Q_V, False, True),
    "gpt_bigcode": ("c_attn", True, True),
    "codegen": ("qkv_proj", True, True),
}


@pytest.fixture(params=ALL_FAMILIES)
def family(request):
    return request.param


def packs(family) -> bool:
    return FACTS[family][1]


def closure_of(model, family, n=9):
    return partial(logprobs.loss, model, packing.pack(some_examples(n), plain_rows=not packs(family)), True)


def losses(engine, closure, copies):
    engine.losses = [0.0] * len(engine.losses)
    engine.estimate(closure, copies=copies)
    return engine.losses


def test_every_family_has_its_facts():
    assert FACTS.keys() == set(ALL_FAMILIES)


def test_targets_are_q_and_v_or_those_of_peft(family):
    model = tiny_model(family)
    before = logits(model)
    lora = LoRA(model, r=4, alpha=16)
    assert torch.equal(logits(model), before)
    kinds = sorted({name.rsplit(".", 1)[-1] for name in lora.modules})
    assert ", ".join(kinds) == FACTS[family][0]
    kind = model.config.model_type
    if kinds != ["q_proj", "v_proj"] and kind not in ("phi3",):  # PEFT knows no Phi-3
        assert kinds == PEFT_TARGETS[kind]
    assert len(lora.modules) == len(kinds) * model.config.num_hidden_layers
    boosting = LoRA(tiny_model(family), r=1, alpha=16, xgblora=True)
    assert list(boosting.modules) == list(lora.modules)


def test_a_merge_keeps_the_function_and_merged_weights_are_a_plain_model(family, tmp_path):
    model = tiny_model(family)
    lora = LoRA(model, r=1, alpha=16, xgblora=True)
    pretrained = logits(model)
    train_a_bit(lora, 0)
    before = logits(model)
    assert (before - pretrained).abs().max() > 1e-3
    lora.merge_and_reinit()
    assert torch.allclose(logits(model), before, atol=2e-5)
    train_a_bit(lora, 1)
    expected = logits(model)
    fresh = tiny_model(family, seed=123)
    fresh.load_state_dict(lora.plain_state_dict())
    assert torch.allclose(logits(fresh), expected, atol=2e-5)
    model.save_pretrained(tmp_path, state_dict=lora.plain_state_dict())  # as --save_merged does
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.allclose(logits(loaded), expected, atol=2e-5)


def test_peft_loads_our_chain_with_its_current_booster(family, tmp_path):
    model, lora = boosted(family, 2)
    train_a_bit(lora, 9)
    lora.save_pretrained(tmp_path)
    peft_model = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    assert torch.allclose(logits(peft_model), logits(model), atol=2e-5)
    reloaded = tiny_model(family)
    LoRA(reloaded, r=1, alpha=16, xgblora=True).load(tmp_path)
    assert torch.equal(logits(reloaded), logits(model))


def test_both_signs_of_adapters_in_one_forward(family):
    model = tiny_model(family)
    lora = LoRA(model, 2, 16, seed=1)
    train_a_bit(lora, 0, scale=0.5)
    engine = ZerothOrder(model, eps=1e-2, master=True, set_perturbations=lora.set_perturbations)
    closure = closure_of(model, family)
    one_by_one = losses(engine, closure, 1)
    assert losses(engine, closure, 2) == pytest.approx(one_by_one, rel=1e-5) and not engine.forward_per_point
    assert abs(one_by_one[0] - one_by_one[1]) > 1e-4


def test_a_full_step_is_that_of_perturbed_weights(family, caplog):
    """One forward serves both signs where the family can; else there is one log line, and a forward each."""
    model = tiny_model(family)
    closure = closure_of(model, family, 5)
    engine = ZerothOrder(model, lr=1e-3, eps=1e-2, seed=3, master=False)
    params = list(model.parameters())
    expected = [loss_at(params, perturbed(model, engine, 0, s * 1e-2), closure) for s in (1, -1)]
    for copies in (1, 2, 2):
        assert losses(engine, closure, copies) == pytest.approx(expected, rel=5e-6), copies
    batched = FACTS[family][2]
    assert engine.forward_per_point != batched and len(caplog.records) == (not batched)
    g = (engine.losses[0] - engine.losses[1]) / 2e-2
    expected_params = perturbed(model, engine, 0, -1e-3 * g)
    engine.step()
    for p, value in zip(params, expected_params, strict=True):
        assert torch.allclose(p, value, atol=1e-6)


def test_no_matrix_is_perturbed_whole(family, monkeypatch, caplog):
    """Only stacked experts are, and the log says how much that is."""
    monkeypatch.setattr(
        counter_rng, "CHUNK_SIZE", 300
    )  # norms, biases and what is computed from them have fewer elements
    model = tiny_model(family)
    engine = ZerothOrder(model, eps=1e-2, master=False)
    losses(engine, closure_of(model, family, 3), 1)
    losses(engine, closure_of(model, family, 3), 1)
    expected = ["up to 0.0 MB"] if family == "mixtral" else []
    assert [re.search("up to .* MB", record.message)[0] for record in caplog.records] == expected


def test_scores_are_those_of_one_row_a_candidate(family):
    model = tiny_model(family)
    assert logprobs.supports_packed_rows(model) == packs(family)
    for beginning in (0, 40):
        examples = some_examples(beginning=beginning)
        scores = logprobs.score(model, examples, plain_rows=not packs(family))
        assert_close(scores, plain_scores(model, examples))


@pytest.mark.parametrize("family", [name for name in ALL_FAMILIES if FACTS[name][1]])
def test_packed_rows_are_found_in_half_precision_too(family):
    assert logprobs.supports_packed_rows(tiny_model(family, dtype=torch.bfloat16))


def test_windows_decide_where_rows_may_be_longer():
    assert not logprobs.supports_packed_rows(tiny_model("gemma2"), max_length=8192)
    assert not logprobs.supports_packed_rows(tiny_model("gemma2", sliding_window=1024))
    assert logprobs.supports_packed_rows(tiny_model("gemma3", sliding_window=4096))


def test_models_with_images_are_refused(tmp_path):
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="not a causal language model"):
        load_model.read_model_config(str(tmp_path))


def test_rows_are_no_longer_than_the_model_takes(caplog):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
    model = tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=24)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        long, short = model(ids).logits[:, :24], model(ids[:, :24]).logits
        assert not torch.allclose(long, short, atol=1e-3)  # the library's way
    assert load_model.longest_row(model.config, 40) == 24 and "cut to 24" in caplog.text
    caplog.clear()
    limits = {family: load_model.longest_row(tiny_model(family).config, 2048) for family in ALL_FAMILIES}
    assert limits.pop("bloom") == 2048 and set(limits.values()) == {128} and not caplog.records
    assert load_model.longest_row(None, 2048) == 2048


def test_answers_are_those_of_one_prompt_at_a_time(family):
    model = tiny_model(family)
    for beginning in (0, 40):
        prompts = some_prompts(beginning)
        expected = plain_answers(model, prompts, 6)
        answers = generate.generate(
            model, tiny_tokenizer(), prompts, max_new_tokens=6, do_sample=False, use_cache=packs(family)
        )
        assert any(expected) and answers == expected


def test_layers_below_the_adapted_one_run_once(family):
    model = tiny_model(family)
    lora = LoRA(model, 1, 16, xgblora=True, layers="top:1")
    train_a_bit(lora, 0)
    layers, first = lora.first_adapted_layer
    assert first == len(layers) - 1 == model.config.num_hidden_layers - 1
    plain, calls = not packs(family), []
    store = activation_cache.ActivationCache(model, layers, first, some_examples(6), plain)
    generator = torch.Generator().manual_seed(5)
    deltas = [torch.randn(2, *p.shape, generator=generator) * 0.05 for p in lora.parameters()]
    for examples in (store.examples, store.examples[:1]):  # some rows, and the fewest
        batch = packing.pack(examples, plain)
        forward = partial(logprobs.loss, model, batch, True)
        hidden = activation_cache.capture_hidden_states(layers[first], forward)
        with torch.inference_mode():
            lora.set_perturbations(deltas)
            expected = logprobs.loss(model, batch, True, 2)
            hook = layers[0].register_forward_hook(lambda *args: calls.append(1))
            for states in (hidden, store(batch)):
                with activation_cache.skip_lower_layers(layers, first, states):
                    assert torch.allclose(logprobs.loss(model, batch, True, 2), expected, atol=2e-5)
            hook.remove()
            lora.set_perturbations(None)
    assert not calls


def test_norms_and_biases_are_not_decayed(family):
    model = tiny_model(family)
    decayed = OurTrainer.get_decay_parameter_names(None, model)
    assert all((name in decayed) == (p.dim() > 1) for name, p in model.named_parameters())


def test_the_table_of_families_says_so():
    text = (Path(__file__).parent.parent / "docs" / "FAMILIES.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    seen = set()
    for _, names, targets, scored, full, _ in rows:
        for name in re.findall(r"`([^`]+)`", names):
            seen.add(name)
            kinds = ", ".join(re.findall(r"`([^`]+)`", targets))
            assert (kinds, scored == "packed", full == "one forward") == FACTS[name], name
    assert seen == FACTS.keys()
