"""The chain of boosters over random shapes, ranks, layers and dtypes loses nothing, in any form."""

import json
import math
from types import SimpleNamespace

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapters import boosted, logits, train_a_bit
from support.models import tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from boosters import chain, peft_files, targets
from lora import LoRA
from scoring import staged_results
from utils import UsageError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Absolute for outputs around 1, relative for larger ones.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}


class Stack(nn.Module):
    """Linear layers in a numbered list, with residuals where shapes allow none."""

    def __init__(self, shapes, dtype, conv=False):
        super().__init__()
        self.config = SimpleNamespace(model_type="stack", name_or_path="stack")
        torch.manual_seed(1)
        kind = (lambda i, o: Conv1D(o, i)) if conv else nn.Linear
        self.layers = nn.ModuleList(nn.ModuleDict({"proj": kind(i, o)}) for i, o in shapes)
        for p in self.parameters():
            p.data.copy_(torch.randn_like(p) * 0.3)
        self.to(dtype)

    def forward(self, x):
        """Return the outputs of all layers for the same numbers, so that no error hides another."""
        layers = [layer["proj"] for layer in self.layers]
        return torch.cat([layer(x[..., : shape_of(layer)[0]]) for layer in layers], -1).float()


def shape_of(module):
    weight = module.weight
    conv = getattr(module, "fan_in_fan_out", isinstance(module, Conv1D))
    return tuple(weight.shape) if conv else tuple(weight.T.shape)


CHAINS = st.fixed_dictionaries(
    {
        "shapes": st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4),
        "ranks": st.lists(st.integers(1, 4), min_size=1, max_size=4),
        "rounds": st.integers(1, 6),
        "dtype": st.sampled_from(DTYPES),
        "ensemble": st.booleans(),
        "conv": st.booleans(),
        "random": st.booleans(),
        "freeze_a": st.booleans(),
        "lengths": st.lists(st.sampled_from([0.0, 0.25, 1.0, 2.0]), min_size=6, max_size=6),
    }
)


def build(c):
    model = Stack(c["shapes"], c["dtype"], c["conv"])
    layers = f"random:{(len(c['shapes']) + 1) // 2}" if c["random"] else "all"
    lora = LoRA(
        model, 1, 16, xgblora=True, targets=["proj"], ranks=c["ranks"], layers=layers, ensemble=c["ensemble"],
        freeze_a=c["freeze_a"], seed=3,
    )  # fmt: skip
    return model, lora


def dense(lora, rounds=None) -> dict[str, torch.Tensor]:
    """fp64 sum of the chain of every layer, as the weights lie."""
    total = {name: torch.zeros(m.weight.shape, dtype=torch.float64) for name, m in lora.modules.items()}
    for boosters in lora.boosters if rounds is None else rounds:
        for name, b in boosters.items():
            total[name] += lora.modules[name].to_weight_layout(b.scaling * b.B.double() @ b.A.double())
    return total


def half_a_unit(exact, dtype, additions: int):
    """Return how far one rounding to a dtype may move, and the error of so many additions in fp32."""
    tiny = torch.finfo(dtype).smallest_normal if dtype == torch.float16 else 0.0
    rounding = torch.finfo(dtype).eps / 2 * exact.abs().clamp(min=tiny)
    return rounding + (additions + 2) * 2**-22 * (1 + exact.abs().max())


@settings(max_examples=60, deadline=None)
@given(CHAINS)
def test_a_merge_keeps_the_function_and_the_chain_its_sum(c):
    plain = Stack(c["shapes"], c["dtype"], c["conv"])
    pretrained = {name: p.detach().double() for name, p in plain.named_parameters()}
    model, lora = build(c)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0)).to(c["dtype"])
    num_merged = 0
    for i in range(c["rounds"]):
        rank = c["ranks"][min(i, len(c["ranks"]) - 1)]
        adapted = [m for m in lora.lora_modules if m.r]
        assert {m.r for m in adapted} == {rank}
        assert len(adapted) == ((len(c["shapes"]) + 1) // 2 if c["random"] else len(c["shapes"]))
        train_a_bit(lora, i, 0.1)
        before, length = model(x), c["lengths"][i]
        with lora.scale_current(length):
            expected = model(x)
        assert torch.equal(model(x), before)
        lora.merge_and_reinit(length)
        num_merged += length > 0
        tolerance = TOLERANCE[c["dtype"]]
        assert torch.allclose(model(x), expected, rtol=tolerance, atol=tolerance)
    assert len(lora.boosters) == len(lora.lengths) == num_merged and lora.round == c["rounds"]
    for name, delta in dense(lora).items():
        module, start = lora.modules[name], pretrained[f"{name}.weight"]
        if c["ensemble"]:
            assert torch.equal(module.weight.double(), start)
            assert torch.allclose(lora.chain.merged_fp32(name).double(), start + delta, atol=1e-5)
        else:
            error = (module.weight.double() - start - delta).abs()
            assert (error <= half_a_unit(start + delta, c["dtype"], 4 * num_merged)).all()


@settings(max_examples=40, deadline=None)
@given(c=CHAINS)
def test_a_saved_chain_is_the_same_bits_again_and_peft_adds_up_to_it(c, tmp_path_factory):
    path = tmp_path_factory.mktemp("chain")
    model, lora = build(c)
    for i in range(c["rounds"]):
        train_a_bit(lora, i, 0.1)
        lora.merge_and_reinit(c["lengths"][i])
    train_a_bit(lora, 99, 0.1)
    lora.save_pretrained(path)
    reloaded, loaded = build(c)
    loaded.load(path)
    assert (loaded.round, loaded.lengths) == (lora.round, lora.lengths)
    for adapters in (lora, loaded):
        train_a_bit(adapters, 7)
        adapters.merge_and_reinit()
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0)).to(c["dtype"])
    assert torch.equal(model(x), reloaded(x))
    for a, b in zip(lora.boosters, loaded.boosters, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[n].A, b[n].A) and torch.equal(a[n].B, b[n].B) for n in a)
    config = peft_files.read_lora_config(path)
    tensors, _ = peft_files.read_tensors(path / peft_files.WEIGHTS)
    chain = dense(
        lora, [*peft_files.load_adapter(path, {n: shape_of(m) for n, m in lora.modules.items()}, True).rounds]
    )
    for name, delta in chain.items():
        if f"{peft_files.PREFIX}{name}.lora_A.weight" in tensors:
            A, B = (tensors[f"{peft_files.PREFIX}{name}.lora_{k}.weight"].double() for k in "AB")
            alpha = config.get("alpha_pattern", {}).get(name, config["lora_alpha"])
            assert len(A) == config.get("rank_pattern", {}).get(name, config["r"])
            of_peft = lora.modules[name].to_weight_layout(alpha / len(A) * B @ A)
            assert torch.allclose(of_peft, delta, atol=1e-5)
        else:
            assert not delta.any()


@settings(max_examples=40, deadline=None)
@given(c=CHAINS)
def test_injection_and_removal_leave_the_model_bit_for_bit(c):
    plain = Stack(c["shapes"], c["dtype"], c["conv"])
    plain.layers[0]["proj"].bias.requires_grad_(False)
    model = Stack(c["shapes"], c["dtype"], c["conv"])
    model.layers[0]["proj"].bias.requires_grad_(False)
    lora = LoRA(model, 1, 16, xgblora=True, targets=["proj"], ranks=c["ranks"], ensemble=c["ensemble"])
    for i in range(2):
        train_a_bit(lora, i)
        lora.merge_and_reinit()
    lora.remove()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    for (name, a), (other, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b) and a.requires_grad == b.requires_grad


def test_removal_gives_a_real_model_back(family):
    model = tiny_model(family)
    before, ids = {k: v.clone() for k, v in model.state_dict().items()}, logits(model)
    lora = LoRA(model, 1, 16, xgblora=True)
    train_a_bit(lora, 0)
    lora.merge_and_reinit()
    assert not torch.equal(logits(model), ids)
    lora.remove()
    assert model.state_dict().keys() == before.keys() and torch.equal(logits(model), ids)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_2000_boosters_are_rounded_once(dtype):
    model = Stack([(16, 24), (24, 16)], dtype)
    start = {n: p.detach().double() for n, p in model.named_parameters()}
    lora = LoRA(model, 1, 16, xgblora=True, targets=["proj"])
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        for module in lora.lora_modules:
            module.lora_B.data.copy_(torch.randn(module.lora_B.shape, generator=generator) * 1e-3)
        lora.merge_and_reinit()
    for name, delta in dense(lora).items():
        exact = start[f"{name}.weight"] + delta
        error = (lora.modules[name].weight.double() - exact).abs()
        # fp32 adds with half a unit of its own each time, at random: a few √2000 of 2^-24
        assert (error <= torch.finfo(dtype).eps / 2 * exact.abs() + 500 * 2**-24).all()
        assert delta.abs().max() > 0.1


def test_a_chain_of_200_comes_back_and_loads_in_peft(tmp_path):
    model, lora = boosted("llama", 200)
    lora.save_pretrained(tmp_path)
    reloaded = tiny_model("llama")
    loaded = LoRA(reloaded, 1, 16, xgblora=True)
    loaded.load(tmp_path)
    assert len(loaded.boosters) == 200 and torch.equal(logits(reloaded), logits(model))
    peft_model = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    scale = logits(model).abs().max()
    assert (logits(peft_model) - logits(model)).abs().max() <= 1e-4 * scale


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
@pytest.mark.parametrize("form", ["ensemble", "ranks", "random", "top", "all-linear"])
def test_peft_loads_every_form_with_the_same_logits(family, form, tmp_path):
    more = {
        "ensemble": {"ensemble": True},
        "ranks": {"ranks": [1, 2, 4]},
        "random": {"layers": "random:1", "ranks": [2, 1]},
        "top": {"layers": "top:1"},
        "all-linear": {"targets": ["c_fc", "fc1", "fc2", "out_proj", "down_proj"]},
    }[form]
    model, lora = boosted(family, 3, **more)
    train_a_bit(lora, 5)
    lora.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    assert torch.allclose(logits(loaded), logits(model), atol=5e-5)
    plain = tiny_model(family, seed=9)
    plain.load_state_dict(lora.plain_state_dict())
    assert torch.allclose(logits(plain), logits(model), atol=5e-5)


def test_an_ensemble_is_the_same_function_as_the_merged_form(family):
    merged, merged_lora = boosted(family, 4)
    ensemble, ensemble_lora = boosted(family, 4, ensemble=True)
    before = tiny_model(family).state_dict()
    assert torch.allclose(logits(ensemble), logits(merged), atol=2e-5)
    assert all(torch.equal(v, before[k]) for k, v in ensemble.state_dict().items() if "lora_" not in k)
    for lora in (merged_lora, ensemble_lora):
        train_a_bit(lora, 8)
    assert torch.allclose(logits(ensemble), logits(merged), atol=2e-5)
    assert (
        not ensemble_lora.chain.pretrained and not ensemble_lora.chain.delta_sum
    )  # no copy of the weights on the host


def test_an_ensemble_in_bf16_is_nearer_to_the_exact_weights():
    _, exact = boosted("llama", 3, torch.float32)
    errors = {}
    start = tiny_model("llama", dtype=torch.bfloat16)
    deltas = dense(exact)
    for form in (False, True):
        _, lora = boosted("llama", 3, torch.bfloat16, ensemble=form)
        errors[form] = 0.0
        for name, module in lora.modules.items():
            weight = lora.chain.merged_fp32(name) if form else module.weight
            expected = start.get_submodule(name).weight.double() + deltas[name]
            errors[form] += (weight.double() - expected).square().sum()
    assert errors[True] < errors[False] / 1000


def test_copies_see_their_own_perturbation_beside_an_ensemble():
    module = boosted("llama", 2, ensemble=True)[1].lora_modules[0]
    x = torch.randn(4, 3, module.in_features)
    deltas = torch.randn(2, 1, module.in_features), torch.randn(2, module.out_features, 1)
    module.deltas = deltas
    both = module(x)
    module.deltas = None
    for i in range(2):
        A, B = module.lora_A.detach().clone(), module.lora_B.detach().clone()
        module.lora_A.data, module.lora_B.data = A + deltas[0][i], B + deltas[1][i]
        rows = slice(2 * i, 2 * i + 2)
        assert torch.allclose(module(x[rows]), both[rows], atol=1e-4)  # of numbers up to 30
        module.lora_A.data, module.lora_B.data = A, B


def test_random_layers_are_a_function_of_seed_and_round():
    def layers_of_rounds(seed):
        lora = LoRA(tiny_model("llama"), 1, 16, xgblora=True, layers="random:1", seed=seed)
        rounds = []
        for _ in range(12):
            rounds.append(tuple(sorted(n for n, m in lora.modules.items() if m.r)))
            lora.merge_and_reinit()
        return rounds

    assert layers_of_rounds(0) == layers_of_rounds(0) != layers_of_rounds(1)
    assert (
        all(len(names) == 2 for names in layers_of_rounds(0)) and len(set(layers_of_rounds(0))) == 2
    )  # q and v of either layer


def test_the_upper_layers_are_those_with_the_highest_numbers(family):
    lora = LoRA(tiny_model(family), 1, 16, xgblora=True, layers="top:1")
    assert {targets.layer_number(name) for name in lora.modules} == {1}
    assert lora.first_adapted_layer[1] == 1 and len(lora.first_adapted_layer[0]) == 2


@pytest.mark.parametrize("layers", ["top:3", "random:9", "top", "top:0", "some", "random:x"])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(UsageError, match="layers"):
        LoRA(tiny_model("llama"), 1, 16, xgblora=True, layers=layers)


def test_stages_are_the_chains_beginnings_and_leave_the_whole(family):
    model, lora = boosted(family, 5, torch.bfloat16, seed=2)
    full_chain, stages = logits(model), {}
    for k in lora.chain.staged(2):
        stages[k] = logits(model)
    assert sorted(stages) == [0, 2, 4, 5]
    assert torch.equal(logits(model), full_chain) and torch.equal(stages[5], full_chain)
    assert torch.equal(stages[0], logits(tiny_model(family, dtype=torch.bfloat16)))
    assert torch.equal(stages[2], logits(boosted(family, 2, torch.bfloat16, seed=2)[0]))


def test_a_truncated_chain_goes_on_from_there():
    model, lora = boosted("llama", 5)
    lora.chain.truncate(2)
    assert len(lora.boosters) == len(lora.lengths) == 2 and lora.round == 5
    assert torch.equal(logits(model), logits(boosted("llama", 2)[0]))


@pytest.mark.parametrize("ensemble", [False, True])
def test_the_first_boosters_of_a_saved_chain(tmp_path, ensemble):
    _, lora = boosted("llama", 4)
    train_a_bit(lora, 50)  # the current one counts as the fifth
    lora.save_pretrained(tmp_path)
    for k in (0, 3, 5, None):
        model = tiny_model("llama")
        loaded = LoRA(model, 1, 16, xgblora=True, ensemble=ensemble)
        loaded.load(tmp_path, k, keep_current=False)
        assert len(loaded.boosters) == (5 if k is None else k) and not loaded.is_trained()
    with pytest.raises(UsageError, match="chain of 5"):
        LoRA(tiny_model("llama"), 1, 16, xgblora=True).load(tmp_path, 6, keep_current=False)


def test_a_current_booster_that_this_round_can_not_train_becomes_part_of_the_chain(tmp_path):
    saved, lora = boosted("llama", 1, ranks=[1, 2])
    train_a_bit(lora, 3)
    lora.save_pretrained(tmp_path)
    model = tiny_model("llama")
    other = LoRA(model, 1, 16, xgblora=True)
    other.load(tmp_path)
    assert len(other.boosters) == 2 and not other.is_trained()
    assert torch.allclose(logits(model), logits(saved), atol=2e-5)


@pytest.mark.parametrize("rank", [1, 3, 6, 50])
def test_compression_is_the_best_of_its_rank(rank, family, tmp_path):
    model, lora = boosted(family, 6)
    compressed, error = chain.compress(lora.boosters, rank)
    squared_error = squared_norm = 0.0
    for name, delta in dense(lora).items():
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        best = lora.modules[name].to_weight_layout(compressed[name].B.double() @ compressed[name].A.double())
        assert torch.allclose(best, (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-4 * s[0])
        squared_error += s[rank:].square().sum()
        squared_norm += s.square().sum()
    assert error == pytest.approx(math.sqrt(squared_error / squared_norm), abs=1e-6)
    assert rank < 6 or error < 1e-6
    assert lora.export(tmp_path, rank) == pytest.approx(error, abs=1e-6)
    peft_model = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] <= max(rank, 7)
    if rank >= 6:
        assert torch.allclose(logits(peft_model), logits(model), atol=1e-4)


def test_the_loss_of_a_rounding_is_told_and_a_large_one_names_the_ensemble(caplog):
    caplog.set_level("INFO")
    for scale in (0.5, 1e-5):
        model = tiny_model("llama", dtype=torch.bfloat16)
        lora = LoRA(model, 1, 16, xgblora=True)
        train_a_bit(lora, 0, scale)
        lora.merge_and_reinit()
    large, small = [r.getMessage() for r in caplog.records if "rounding the merged" in r.getMessage()]
    assert "--xgblora_ensemble" not in large and "--xgblora_ensemble" in small


def test_a_grouped_query_model_has_its_own_shapes_per_layer():
    model, lora = boosted("llama", 2)
    shapes = {name.rsplit(".", 1)[-1]: (m.in_features, m.out_features) for name, m in lora.modules.items()}
    assert shapes == {"q_proj": (32, 32), "v_proj": (32, 16)} and torch.isfinite(logits(model)).all()


def test_the_best_stage_is_the_first_of_the_best():
    values = ((0, 0.5, 0.7), (1, 0.8, 0.5), (2, 0.8, 0.4))
    stages = [{"boosters": k, "accuracy": accuracy, "loss": loss} for k, accuracy, loss in values]
    assert staged_results.best_prefix(stages, "accuracy") == 1
    assert staged_results.best_prefix(stages, "loss") == 2
    lines = staged_results.format_stages(stages, "accuracy")
    assert "best accuracy" in lines[2] and len(lines) == 4


def test_a_picture_of_stages_is_drawn(tmp_path):
    stages = [{"boosters": k, "accuracy": k / 3, "loss": 1 - k / 4} for k in range(3)]
    staged_results.plot([stages, stages], ["a", "b"], "accuracy", tmp_path / "x" / "staged.png")
    assert (tmp_path / "x" / "staged.png").read_bytes().startswith(b"\x89PNG")
