"""The diagnosis of eps on a real model: the starter's, a minute of forwards (`make stress`)."""

from functools import partial

import torch
from support.data import TRAIN, starter
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora import LoRA
from scoring import logprobs, packing
from zo import ZerothOrder
from zo.diagnostics import diagnose


def test_a_diagnosis_finds_a_wrong_eps_on_smollm2_in_bf16():
    """B alone trained: 1e-3 drowns in the rounding of half-precision weights, 3e-2 does not."""
    path = starter("smollm2-135m")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    words = [tokenizer.encode(" terrible"), tokenizer.encode(" great")]
    prompts = [tokenizer.encode(f"{sentence} It was") for sentence, _ in TRAIN]
    examples = []
    for prompt, (_, label) in zip(prompts, TRAIN, strict=True):
        examples.append(packing.Example([prompt + word for word in words], [1, 1], label))
    closure = partial(logprobs.loss, model, packing.pack(examples), True)
    LoRA(model, 1, 16, freeze_a=True)
    share = {}
    for eps in (1e-3, 3e-2):
        engine = ZerothOrder(model, 5e-3, eps, normalize=True, master=True)
        share[eps] = diagnose(engine, closure).noise_share
    assert share[1e-3] > 0.4 > 0.3 > share[3e-2]  # at 1e-3 0.45 to 0.6, by the CPU
