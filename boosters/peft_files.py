"""Adapters on the disk: a LoRA in PEFT's two files, and beside it the chain of boosters that it was folded from.

`adapter_config.json` and `adapter_model.safetensors` hold one LoRA a layer: all rounds side by side, scaling folded
into B. `boosters.safetensors` holds the factors of each round as they were trained, fp32: going on costs no bits.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from boosters.chain import Booster, Round, concat_factors
from boosters.targets import layer_number
from utils import UsageError

PREFIX = "base_model.model."  # of PEFT's names in adapter_model.safetensors
# In PEFT's configuration: what makes an adapter more than B A beside a layer, and starts that move the base weights.
UNSUPPORTED = (
    "use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
CONFIG, WEIGHTS, CHAIN = "adapter_config.json", "adapter_model.safetensors", "boosters.safetensors"


@dataclass
class SavedAdapter:
    """What a directory holds: the rounds, the last of them live (being trained); the step lengths of the others, which
    their scalings include; and how many rounds there have been, rejected ones too."""

    rounds: list[Round]
    lengths: list[float] = field(default_factory=list)
    round: int = 0


def has_chain(directory) -> bool:
    """Whether a saved adapter holds the rounds that it was folded from."""
    return (Path(directory) / CHAIN).exists()


def save_adapter(
    directory,
    model,
    modules: Sequence[str],
    targets: Sequence[str],
    fan_in_fan_out: bool,
    saved: SavedAdapter,
    chain: bool,
) -> None:
    """Write a PEFT adapter, with `chain` also the unfolded rounds; without, the one round is a LoRA with its alpha.

    `modules`: names of all layers that rounds may adapt; `targets`: what PEFT shall look for to find them.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors, unfolded, ranks = {}, {}, {}
    names = list(dict.fromkeys(name for boosters in saved.rounds for name in boosters))
    for name in names:
        A, B = concat_factors(saved.rounds, name, fold=chain)
        ranks[name] = len(A)
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = A, B.contiguous()
        if chain:
            unfolded[f"{name}.A"], unfolded[f"{name}.B"] = concat_factors(saved.rounds, name, fold=False)
    r = max(ranks.values())
    # Where B holds the scaling, alpha is the rank, so that PEFT's own scaling is 1.
    uneven = {name: rank for name, rank in ranks.items() if rank != r}
    alpha = r if chain else saved.rounds[0][names[0]].scaling * r
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.config.name_or_path,
        "r": r,
        "lora_alpha": alpha,
        "target_modules": list(targets) if len(names) == len(modules) else names,
        "fan_in_fan_out": fan_in_fan_out,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        **({"rank_pattern": uneven, "alpha_pattern": uneven} if uneven else {}),
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CHAIN).unlink(missing_ok=True)  # of an earlier run
    if chain:
        firsts = [next(iter(boosters.values())) for boosters in saved.rounds]
        about = {
            "ranks": [len(b.A) for b in firsts], "scalings": [b.scaling for b in firsts], "lengths": saved.lengths,
            "round": saved.round,
        }  # fmt: skip
        if any(len(boosters) < len(modules) for boosters in saved.rounds):
            about["layers"] = [sorted({layer_number(name) for name in boosters}) for boosters in saved.rounds]
        # one entry: safetensors writes several in any order, and equal chains shall be equal bytes
        save_file(unfolded, directory / CHAIN, metadata={"chain": json.dumps(about)})


def remove_adapter(directory) -> None:
    """Remove an adapter, and leave what else lies there."""
    for name in (CONFIG, WEIGHTS, CHAIN):
        (Path(directory) / name).unlink(missing_ok=True)


def load_adapter(directory, shapes: dict[str, tuple[int, int]], chain: bool) -> SavedAdapter:
    """What `save` or PEFT wrote, for layers of these (in, out) features; raises UsageError where it does not fit them.

    With `chain`, the unfolded rounds where there are some; an adapter made by PEFT is one round, which is not live.
    """
    directory = Path(directory)
    if not (chain and has_chain(directory)):
        config = read_lora_config(directory)
        r, alpha = config["r"], config["lora_alpha"]
        scaling = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        tensors, _ = read_tensors(directory / WEIGHTS)
        names = (f"{PREFIX}{{}}.lora_A.weight", f"{PREFIX}{{}}.lora_B.weight")
        factors = check_tensors(tensors, *names, dict.fromkeys(shapes, r), shapes, directory)
        one = {name: Booster(A, B, scaling) for name, (A, B) in factors.items()}
        return SavedAdapter([one, {}], [1.0], 1) if chain else SavedAdapter([one])
    tensors, metadata = read_tensors(directory / CHAIN)
    about = parse_chain_metadata(metadata, directory / CHAIN)
    layers = about.get("layers") or [None] * len(about["ranks"])
    active = [[n for n in shapes if own is None or layer_number(n) in own] for own in layers]
    totals = dict.fromkeys(shapes, 0)
    for names, rank in zip(active, about["ranks"], strict=True):
        for name in names:
            totals[name] += rank
    totals = {name: total for name, total in totals.items() if total}
    factors = check_tensors(tensors, "{}.A", "{}.B", totals, shapes, directory)
    rounds, used = [], dict.fromkeys(shapes, 0)
    for names, rank, scaling in zip(active, about["ranks"], about["scalings"], strict=True):
        rounds.append({})
        for name in names:
            (A, B), start = factors[name], used[name]
            used[name] = end = start + rank
            rounds[-1][name] = Booster(A[start:end].clone(), B[:, start:end].clone(), scaling)
    merged = len(rounds) - 1
    return SavedAdapter(rounds, about.get("lengths", [1.0] * merged), about.get("round", merged))


def parse_chain_metadata(metadata: dict[str, str], path: Path) -> dict:
    """What a chain says of its rounds; raises UsageError where that makes no sense."""

    def numbers(values, n=None, kind=(int, float)) -> bool:
        fit = isinstance(values, list) and (n is None or len(values) == n)
        return fit and all(type(v) in kind and math.isfinite(v) for v in values)

    try:
        about = json.loads(metadata["chain"])
        ranks, n = about["ranks"], len(about["ranks"])
        whole = n and numbers(ranks, kind=(int,)) and min(ranks) > 0 and numbers(about["scalings"], n)
        whole = whole and numbers(about.get("lengths", [1.0] * (n - 1)), n - 1)
        layers = about.get("layers", [[0]] * n)
        whole = whole and len(layers) == n and all(numbers(own, kind=(int,)) and own for own in layers)
        whole = whole and type(about.get("round", 0)) is int and about.get("round", 0) >= 0
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, OverflowError):
        whole = False
    if not whole:
        raise UsageError(f"{path}: its account of the rounds is damaged")
    return about


def check_tensors(tensors, name_a: str, name_b: str, ranks, shapes, directory) -> dict[str, tuple[Tensor, Tensor]]:
    """{module name: (A [rank, in], B [out, rank])}, every key and shape checked."""
    expected = {}
    for name, rank in ranks.items():
        features_in, features_out = shapes[name]
        expected[name_a.format(name)] = (rank, features_in)
        expected[name_b.format(name)] = (features_out, rank)
    for key in sorted(expected.keys() ^ tensors.keys()):
        raise UsageError(
            f"{directory}: {'no' if key in expected else 'unexpected'} tensor {key}; was the adapter made for this "
            "base model and these target layers?"
        )
    for key, shape in expected.items():
        if tuple(tensors[key].shape) != shape:
            raise UsageError(f"{directory}: {key} is {list(tensors[key].shape)}, but this model wants {list(shape)}")
        if not bool(tensors[key].isfinite().all()):
            raise UsageError(f"{directory}: {key} holds NaN or infinity")
    return {n: (tensors[name_a.format(n)].float(), tensors[name_b.format(n)].float()) for n in ranks}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file; raises UsageError where there is none or it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        return load_file(path), about
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: {error}") from error


def read_adapter_config(directory) -> dict:
    """The `adapter_config.json` of a PEFT adapter, with its `peft_type`; raises UsageError where there is none."""
    path = Path(directory) / CONFIG
    try:
        config = json.loads(path.read_text())
        _ = config["peft_type"]
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; --adapter takes a directory with a PEFT adapter") from error
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not the configuration of an adapter ({error!r})") from error
    return config


def read_lora_config(directory) -> dict:
    """The `adapter_config.json` of a PEFT LoRA adapter; raises UsageError for what we can't apply as it was meant."""
    path, config = Path(directory) / CONFIG, read_adapter_config(directory)
    try:
        kind, _, _, targets = config["peft_type"], config["r"], config["lora_alpha"], config["target_modules"]
    except KeyError as error:
        raise UsageError(f"{path}: not the configuration of a LoRA adapter ({error!r})") from error
    numbers = [config["r"], config["lora_alpha"]]
    if not all(type(n) in (int, float) and 0 < n < math.inf for n in numbers) or type(config["r"]) is not int:
        raise UsageError(f"{path}: r {numbers[0]!r} and lora_alpha {numbers[1]!r} are no rank and alpha")
    odd = [name for name in UNSUPPORTED if config.get(name)]
    if not has_chain(directory):  # a chain knows the rank of each of its rounds
        odd += [name for name in ("rank_pattern", "alpha_pattern") if config.get(name)]
    odd += ["bias"] if config.get("bias", "none") != "none" else []
    odd += ["init_lora_weights"] if str(config.get("init_lora_weights")).startswith(BASE_CHANGING_INITS) else []
    if kind != "LORA" or odd or not isinstance(targets, list):
        raise UsageError(f"{path}: only plain LoRA is supported, not {', '.join(odd) or f'{kind} on {targets}'}")
    return config
