"""Check properties of XGBLoRA: `python test_xgblora.py` prints a line for each; its status is 1 if one fails.

The check needs no network and no data: a random OPT of 2 layers, made from a configuration. pytest collects
the file too.
"""

import logging
import sys
import tempfile

import torch
from transformers import OPTConfig, OPTForCausalLM
from transformers.utils import logging as transformers_logging

from cli.command_line import parse
from lora import LoRA
from scoring import Example, loss, pack
from trainer import OurTrainer
from zo.optimizer import ZerothOrder

IDS = torch.arange(48).view(3, 16) * 11 % 97


def model(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64}
    config = OPTConfig(num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, **sizes)
    return OPTForCausalLM(config).eval().to(dtype)


@torch.no_grad()
def logits(m):
    return m(input_ids=IDS).logits.float()


def boosting(m=None, seed=0):
    return LoRA(m or model(), r=1, alpha=16, float16=False, xgblora=True, seed=seed)


@torch.no_grad()
def train_a_round(lora, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for module in lora.lora_modules:
        module.lora_B.copy_(torch.randn(module.lora_B.shape, generator=generator) * 0.02)


def test_adapters_are_rank_1_on_q_and_v_of_every_layer():
    m = model()
    lora = boosting(m)
    assert len(lora.lora_modules) == 2 * m.config.num_hidden_layers
    assert all(x.lora_A.shape == (1, 64) and x.lora_B.shape == (64, 1) for x in lora.lora_modules)
    try:
        LoRA(model(), r=8, alpha=16, float16=False, xgblora=True)
    except ValueError:
        return f"{len(lora.lora_modules)} layers, another rank is refused"
    raise AssertionError("rank 8 was accepted")


def test_injection_leaves_the_function_unchanged():
    m = model()
    before = logits(m)
    boosting(m)
    assert torch.equal(logits(m), before)


def test_a_merge_keeps_the_function_and_starts_afresh():
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        m = model(dtype)
        lora = boosting(m)
        train_a_round(lora)
        old = [x.lora_A.clone() for x in lora.lora_modules]
        before, start = logits(m), logits(model(dtype))
        lora.merge_and_reinit()
        change, effect = (logits(m) - before).abs().max().item(), (before - start).abs().max().item()
        assert change <= (1e-5 if dtype == torch.float32 else 0.2) and effect > change
        assert not any(x.lora_B.any() for x in lora.lora_modules)
        assert not any(torch.equal(x.lora_A, a) for x, a in zip(lora.lora_modules, old, strict=True))
        lines.append(f"{str(dtype).removeprefix('torch.')} within {change:.1e} of an effect of {effect:.1e}")
    return "; ".join(lines)


def test_several_rounds_add_up_to_the_chain():
    m, plain = model(), model()
    lora = boosting(m)
    for i in range(5):
        train_a_round(lora, i)
        lora.merge_and_reinit()
    for name, module in lora.modules.items():
        delta = sum(b[name].scaling * b[name].B.double() @ b[name].A.double() for b in lora.boosters)
        assert torch.allclose(module.weight.double(), plain.get_submodule(name).weight + delta, atol=1e-6)
    return f"{len(lora.boosters)} boosters"


def test_frozen_weights_stay_frozen():
    m, plain = model(), model().state_dict()
    lora = boosting(m)
    engine = ZerothOrder(m, lr=1e-2, eps=1e-2)
    for step in range(6):
        engine.step(lambda: m(input_ids=IDS, labels=IDS).loss)
        if step == 2:
            lora.merge_and_reinit()
            engine.load_master()
    targets = {f"{name}.weight" for name in lora.modules}
    state = m.state_dict()
    assert all(torch.equal(state[k], v) for k, v in plain.items() if k not in targets)
    assert not any(torch.equal(state[k], plain[k]) for k in targets)
    assert {n.rsplit(".", 1)[-1] for n, p in m.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_a_mezo_step_with_learning_rate_0_changes_no_bit():
    for dtype in (torch.float32, torch.bfloat16):
        m = model(dtype)
        boosting(m)
        before = {k: v.clone() for k, v in m.state_dict().items()}
        engine = ZerothOrder(m, lr=0.0, eps=1e-2)
        for _ in range(5):
            engine.step(lambda m=m: m(input_ids=IDS, labels=IDS).loss)
        assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


def merges(flags: str) -> list[int]:
    """Return the steps at which a real Trainer run merged."""
    m = model()
    with tempfile.TemporaryDirectory() as folder:
        shared_flags = f"--trainer zo --xgblora --output_dir {folder} --save_strategy no --use_cpu True"
        shared_flags += " --disable_tqdm True --logging_strategy no --log_level error"
        args = parse(f"{shared_flags} {flags}".split())
        data = [Example([[*row.tolist(), 1], [*row.tolist(), 2]], [1, 1], i % 2) for i, row in enumerate(IDS)]
        trainer = OurTrainer(
            model=m,
            args=args,
            train_dataset=data * 4,
            data_collator=pack,
            loss_fn=lambda m, x: loss(m, x, True),
        )
        trainer.lora_module = boosting(m)
        trainer.log = lambda *a, **k: None
        trainer.train()
    return [entry["step"] for entry in trainer.state.log_history if "merged_booster" in entry]


def test_merges_by_steps():
    assert merges("--xgblora_steps_per_iteration 4 --max_steps 10 --per_device_train_batch_size 4") == [4, 8]
    return "every 4 of 10 steps: at 4 and 8"


def test_merges_by_epochs():
    flags = "--xgblora_merge_frequency 2 --num_train_epochs 4 --per_device_train_batch_size 4"
    assert merges(flags) == [6, 12]
    return "every 2 epochs of 3 steps: at 6 and 12"


def main() -> int:
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    status = 0
    for name, test in [(n, t) for n, t in globals().items() if n.startswith("test_")]:
        try:
            detail = test()
            print(f"✓ {name.removeprefix('test_').replace('_', ' ')}" + (f" ({detail})" if detail else ""))
        except Exception as error:
            status = 1
            print(f"✗ {name.removeprefix('test_').replace('_', ' ')}: {error or type(error).__name__}")
    return status


if __name__ == "__main__":
    sys.exit(main())
