"""A model that is larger than a device: accelerate spreads its layers over GPUs, the host and the disk, and brings what
a layer needs to where it computes, by hooks around each layer's `forward`.

    python run.py --device_map auto …              # or FILE.json: {"model.embed_tokens": 0, "model.layers.0": "cpu", …}

What lies on the host beside a GPU, or on the disk, is offloaded: between calls such a weight is a name without storage
(on torch's meta device). Forward passes work there, and so does zeroth order with adapters; nothing can be written to
such a weight.
"""

import json
import logging
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from utils import UsageError

logger = logging.getLogger(__name__)


def read_map(name: str) -> str | dict[str, int | str]:
    """`auto`, or the {module: device} of a file; raises UsageError where it is none."""
    if name == "auto":
        return name
    try:
        found = json.loads(Path(name).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"--device_map {name} is neither auto nor a file of JSON ({error})") from error
    devices = found.values() if isinstance(found, dict) else [None]
    if not found or not all(isinstance(d, str) or (type(d) is int and d >= 0) for d in devices):
        raise UsageError(f'--device_map {name}: not of the form {{"model.layers.0": 0, "model.layers.1": "cpu", …}}')
    return found


def is_placed(model: nn.Module) -> bool:
    """Whether the model is spread, and accelerate's hooks move what goes into its layers."""
    return hasattr(model, "_hf_hook")


def described(model: nn.Module) -> str:
    """How many parts of the model are where."""
    return ", ".join(f"{n} on {device}" for device, n in Counter(map(str, model.hf_device_map.values())).items())


def execution_device(module: nn.Module) -> torch.device:
    """Where a layer that has a weight computes."""
    if not module.weight.is_meta:
        return module.weight.device
    hook = module._hf_hook  # of several hooks the first is the one that brings the weight
    return torch.device(getattr(hook, "hooks", [hook])[0].execution_device)


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go: to the embedding."""
    return execution_device(model.get_input_embeddings())


def piece(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that all ranks have, where `like` is divided (fsdp.py)."""
    if not isinstance(like, DTensor) or isinstance(whole, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def check(args, model: nn.Module) -> None:
    """Raise UsageError where this run would have to write to offloaded weights, or to hold all of them."""
    offloaded = [name for name, p in model.named_parameters() if p.is_meta]
    if not offloaded:
        return
    where = f"--device_map {args.device_map} offloads {len(offloaded)} weights ({offloaded[0]}, …)"
    if args.trainer == "regular":
        raise UsageError(f"{where}, and back-propagation would keep them all: --trainer zo")
    if args.trainer == "zo" and not (args.lora or args.xgblora or args.prefix_tuning):
        raise UsageError(f"{where}, which a full fine-tune can't write to: --lora, --xgblora or --prefix_tuning train")
    if args.save_merged:
        raise UsageError(f"{where}, which --save_merged would have to hold: leave --device_map out for it")
