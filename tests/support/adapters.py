"""Adapters that stand in for trained ones, and the logits to compare."""

import torch

from lora import LoRA
from support.models import tiny_model

IDS = torch.arange(24).view(2, 12) * 7 % 250


@torch.no_grad()
def logits(model):
    """Return fp32 logits [2, 12, vocabulary] of fixed token ids."""
    return model(input_ids=IDS).logits.float()


def train_a_bit(lora, seed, scale=0.05):
    """Add random numbers to A and B, in place of a round of training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in lora.lora_modules:
            module.lora_A.add_(torch.randn(module.lora_A.shape, generator=generator) * scale)
            module.lora_B.add_(torch.randn(module.lora_B.shape, generator=generator) * scale)


def boosted(family, rounds=3, dtype=torch.float32, **more):
    """Return (a model, its LoRA) after so many merged rounds; `more` are arguments of LoRA."""
    model = tiny_model(family, dtype=dtype)
    lora = LoRA(model, r=1, alpha=16, xgblora=True, **more)
    for i in range(rounds):
        train_a_bit(lora, i)
        lora.merge_and_reinit()
    return model, lora
