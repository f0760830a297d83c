"""Adapters, merges and the chain of boosters: the function is kept, the chain is the truth, PEFT reads it."""

import json
import math

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import IDS, boosted, logits, train_a_bit
from support.models import tiny_model
from torch import nn

from lora import LoRA, LoRALinear
from utils import UsageError


def last_parts(names) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in names}


def test_injection_leaves_the_function_unchanged(family):
    model = tiny_model(family)
    before = logits(model)
    lora = LoRA(model, r=4, alpha=16)
    assert torch.equal(logits(model), before)
    assert lora.lora_modules and all(isinstance(m, LoRALinear) for m in lora.lora_modules)


def test_targets_are_q_and_v_or_the_fused_layer(family):
    lora = LoRA(tiny_model(family), r=2, alpha=4)
    assert last_parts(lora.modules) == ({"c_attn"} if family == "gpt2" else {"q_proj", "v_proj"})
    for module in lora.lora_modules:
        out_features, in_features = module.lora_B.shape[0], module.lora_A.shape[1]
        shape = (in_features, out_features) if family == "gpt2" else (out_features, in_features)
        assert tuple(module.weight.shape) == shape
        assert module.r == 2 and module.scaling == 2.0


def test_a_layer_computes_the_formula(family):
    model = tiny_model(family)
    lora = LoRA(model, r=3, alpha=6)
    train_a_bit(lora, 0)
    module = lora.lora_modules[0]
    x = torch.randn(2, 5, module.lora_A.shape[1])
    weight = module.weight.T if module.fan_in_fan_out else module.weight
    expected = x @ (weight + 2.0 * module.lora_B @ module.lora_A).T
    if module.bias is not None:
        expected = expected + module.bias
    assert torch.allclose(module(x), expected, atol=1e-5)


def test_only_adapters_are_trained(family):
    model = tiny_model(family)
    LoRA(model, r=1, alpha=16)
    assert last_parts(n for n, p in model.named_parameters() if p.requires_grad) == {"lora_A", "lora_B"}
    model = tiny_model(family)
    LoRA(model, r=1, alpha=16, freeze_a=True)
    assert last_parts(n for n, p in model.named_parameters() if p.requires_grad) == {"lora_B"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_are_fp32_over_half_precision_weights(dtype):
    model = tiny_model("llama", dtype=dtype)
    lora = LoRA(model, r=2, alpha=16, float16=dtype == torch.float16)
    train_a_bit(lora, 0)
    assert all(m.lora_A.dtype == m.lora_B.dtype == torch.float32 for m in lora.lora_modules)
    assert model(input_ids=IDS).logits.dtype == dtype


def test_a_merge_keeps_the_function_and_starts_a_fresh_round(family):
    model = tiny_model(family)
    lora = LoRA(model, r=1, alpha=16, xgblora=True, seed=5)
    old_a = [m.lora_A.clone() for m in lora.lora_modules]
    train_a_bit(lora, 0)
    before = logits(model)
    lora.merge_and_reinit()
    assert torch.allclose(logits(model), before, atol=2e-5)
    for module, a in zip(lora.lora_modules, old_a, strict=True):
        assert not module.lora_B.any()
        assert not torch.equal(module.lora_A, a)
        assert module.lora_A.abs().max() <= module.lora_A.shape[1] ** -0.5
    assert len(lora.boosters) == 1 and not lora.is_trained()


def test_fresh_a_depends_on_seed_round_and_name_only():
    first, second = boosted("llama", 2, seed=3)[1], boosted("llama", 2, seed=3)[1]
    torch.manual_seed(99)
    third = boosted("llama", 2, seed=4)[1]
    a, b, c = ([m.lora_A for m in x.lora_modules] for x in (first, second, third))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(a, c, strict=True))
    assert not torch.equal(a[0], a[2])  # two layers of one shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_weight_is_the_pretrained_one_plus_the_chain_rounded_once(family, dtype):
    pretrained = {k: v.double() for k, v in tiny_model(family, dtype=dtype).state_dict().items()}
    _, lora = boosted(family, 40, dtype)
    for name, module in lora.modules.items():
        exact = sum(b[name].scaling * (b[name].B.double() @ b[name].A.double()) for b in lora.boosters)
        exact = pretrained[f"{name}.weight"] + (exact.T if module.fan_in_fan_out else exact)
        # half a unit in the last place of the dtype, and what fp32 leaves of 40 sums
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + 40 * 2**-24 * exact.abs().max()
        assert ((module.weight.double() - exact).abs() <= bound).all()


def test_merging_one_by_one_in_bf16_would_lose_more():
    pretrained = tiny_model("llama", dtype=torch.bfloat16).state_dict()
    _, lora = boosted("llama", 40, torch.bfloat16, seed=1)
    chain_error = sequential_error = 0.0
    for name, module in lora.modules.items():
        weight, exact = pretrained[f"{name}.weight"].clone(), pretrained[f"{name}.weight"].double()
        for booster in (b[name] for b in lora.boosters):
            delta = booster.scaling * booster.B @ booster.A
            weight += delta.to(weight.dtype)
            exact += delta.double()
        chain_error += (module.weight.double() - exact).square().sum().item()
        sequential_error += (weight.double() - exact).square().sum().item()
    assert chain_error < sequential_error / 9


def test_merge_outside_xgblora_warns_and_does_nothing(caplog):
    model = tiny_model("opt")
    lora = LoRA(model, r=2, alpha=16)
    train_a_bit(lora, 0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lora.merge_and_reinit()
    assert "only for XGBLoRA" in caplog.text
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_boosters_are_of_rank_1():
    with pytest.raises(ValueError, match="rank 1"):
        LoRA(tiny_model("opt"), r=8, alpha=16, xgblora=True)


@pytest.mark.parametrize(("family", "has"), [("llama", "down_proj"), ("gpt2", "c_attn")])
def test_a_model_without_the_layers_is_refused_with_those_it_has(family, has):
    with pytest.raises(UsageError, match=has):
        LoRA(tiny_model(family), r=1, alpha=16, targets=["nonsense"])


def test_tied_weights_stay_tied_and_untouched():
    model, lora = boosted("opt", 2)
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tiny_model("opt").lm_head.weight)
    assert len(lora.boosters) == 2


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
@pytest.mark.parametrize("kind", ["lora", "xgblora"])
def test_peft_loads_the_adapter_with_the_same_logits(family, kind, tmp_path):
    if kind == "lora":
        model = tiny_model(family)
        lora = LoRA(model, r=4, alpha=8)
    else:
        model, lora = boosted(family, 3)
    train_a_bit(lora, 77)
    lora.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 4  # 3 boosters and the current one
    assert torch.allclose(logits(loaded), logits(model), atol=2e-5)


def test_a_saved_chain_comes_back_bit_for_bit(family, tmp_path):
    model, lora = boosted(family, 3, torch.bfloat16, seed=2)
    train_a_bit(lora, 9)
    lora.save_pretrained(tmp_path)
    reloaded = tiny_model(family, dtype=torch.bfloat16)
    loaded = LoRA(reloaded, r=1, alpha=16, xgblora=True, seed=2)
    loaded.load(tmp_path)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in reloaded.state_dict().items())
    for a, b in zip(loaded.boosters, lora.boosters, strict=True):
        assert all(torch.equal(a[n].A, b[n].A) and torch.equal(a[n].B, b[n].B) for n in lora.modules)
    for x in (lora, loaded):  # and goes on alike
        x.merge_and_reinit()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in reloaded.state_dict().items())


def test_an_adapter_made_by_peft_is_taken(tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft_model = peft.get_peft_model(tiny_model("llama"), config).eval()
    peft_model.save_pretrained(tmp_path)
    model = tiny_model("llama")
    LoRA(model, r=3, alpha=6).load(tmp_path)
    assert torch.allclose(logits(model), logits(peft_model), atol=2e-5)
    model = tiny_model("llama")
    lora = LoRA(model, r=1, alpha=16, xgblora=True)
    lora.load(tmp_path)  # as the first booster
    assert len(lora.boosters) == 1 and torch.allclose(logits(model), logits(peft_model), atol=2e-5)


@pytest.mark.parametrize("kind", ["lora", "xgblora"])
def test_the_plain_state_dict_is_the_model_with_everything_merged(family, kind):
    model, lora = boosted(family, 2) if kind == "xgblora" else (tiny_model(family), None)
    lora = lora or LoRA(model, r=4, alpha=8)
    train_a_bit(lora, 5)
    plain = tiny_model(family, seed=123)
    plain.load_state_dict(lora.plain_state_dict())
    assert torch.allclose(logits(plain), logits(model), atol=2e-5)


def damaged(change):
    def write(path):
        model = tiny_model("llama")
        LoRA(model, r=1, alpha=16).save_pretrained(path)
        tensors = load_file(path / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, path / "adapter_model.safetensors")

    return write


def with_config(change):
    def write(path):
        config = path / "adapter_config.json"
        config.write_text(json.dumps(change(json.loads(config.read_text()))))

    return write


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD_ADAPTERS = {
    "no tensor": damaged(lambda t: t.pop(FIRST)),
    "unexpected tensor": damaged(lambda t: t.update(extra=torch.zeros(1))),
    "this model wants": damaged(lambda t: t.update({FIRST: torch.zeros(1, 5)})),
    "NaN": damaged(lambda t: t[FIRST].fill_(math.nan)),
    "No such file": lambda path: (path / "adapter_config.json").unlink(),
    "not the configuration": with_config(lambda config: {}),
    "only plain LoRA is supported, not init_lora_weights": with_config(
        lambda config: {**config, "init_lora_weights": "pissa"}
    ),
    "only plain LoRA": with_config(lambda config: {**config, "use_dora": True}),
    "safetensors": lambda path: (path / "adapter_model.safetensors").write_bytes(b"rubbish"),
}


@pytest.mark.parametrize("message", BAD_ADAPTERS)
def test_an_adapter_that_does_not_fit_is_refused(message, tmp_path):
    LoRA(tiny_model("llama"), r=1, alpha=16).save_pretrained(tmp_path)
    BAD_ADAPTERS[message](tmp_path)
    with pytest.raises(UsageError, match=message):
        LoRA(tiny_model("llama"), r=1, alpha=16).load(tmp_path)


def test_an_adapter_of_another_rank_is_refused(tmp_path):
    LoRA(tiny_model("llama"), r=2, alpha=16).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="rank 2"):
        LoRA(tiny_model("llama"), r=1, alpha=16).load(tmp_path)


def test_gradients_reach_the_adapters_only():
    model = tiny_model("gpt2")
    lora = LoRA(model, r=2, alpha=16)
    train_a_bit(lora, 0)
    nn.functional.cross_entropy(model(input_ids=IDS).logits.flatten(0, 1), IDS.flatten()).backward()
    assert last_parts(n for n, p in model.named_parameters() if p.grad is not None) == {"lora_A", "lora_B"}
