"""Adapters on the disk: PEFT's two files, and the chain of boosters that these were computed from.

`adapter_config.json` and `adapter_model.safetensors` hold one LoRA for each layer: the factors of all rounds
side by side, the scaling multiplied into B. `boosters.safetensors` holds the factors of each round as they
were trained, fp32, so that a run which goes on from them has the same bits.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from boosters.chain import Booster, Round, concat_factors
from boosters.targets import TargetLayers, layer_number, names_of_layers
from utils import UsageError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CHAIN = "boosters.safetensors"
PREFIX = "base_model.model."  # of PEFT's names in adapter_model.safetensors

# Fields of PEFT's configuration that make an adapter more than B A beside a layer.
UNSUPPORTED = (
    "use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "target_parameters",
    "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip
# Values of its `init_lora_weights` that change the base weights before training.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

Shapes = Mapping[str, tuple[int, int]]  # {module name: (in features, out features)}


@dataclass
class SavedAdapter:
    """Hold the rounds of an adapter as a directory has them.

    Attributes:
        rounds: of boosters; the last is the current one, which is being trained.
        lengths: the step lengths of the others, which their scalings include.
        round: how many rounds have ended, rejected ones too.
    """

    rounds: list[Round]
    lengths: list[float] = field(default_factory=list)
    round: int = 0

    def with_last_merged(self) -> "SavedAdapter":
        """Return the state after a merge of the current round; a round with B = 0 is dropped."""
        *merged_rounds, current_round = self.rounds
        if not any(bool(booster.B.any()) for booster in current_round.values()):
            return SavedAdapter([*merged_rounds, {}], self.lengths, self.round)
        return SavedAdapter([*merged_rounds, current_round, {}], [*self.lengths, 1.0], self.round + 1)


@dataclass(frozen=True)
class ChainMetadata:
    """Describe the rounds in `boosters.safetensors`.

    Attributes:
        ranks: of each round.
        scalings: of each round.
        lengths: the step length of each round but the last.
        layers: the numbers of the decoder layers that each round adapts; None where each adapts all layers.
        round: how many rounds have ended, rejected ones too.
    """

    ranks: list[int]
    scalings: list[float]
    lengths: list[float]
    layers: list[list[int]] | None
    round: int


def has_chain(directory: str | Path) -> bool:
    """Return whether a saved adapter holds the chain of boosters that it was computed from."""
    return (Path(directory) / CHAIN).exists()


# ---- writing ----


def save_adapter(
    directory: str | Path, adapter: SavedAdapter, targets: TargetLayers, base_model: str, with_chain: bool
) -> None:
    """Write a PEFT adapter.

    Args:
        directory: is made where it does not exist.
        adapter: the rounds to write.
        targets: the layers that rounds may adapt.
        base_model: name or path of the pretrained model.
        with_chain: write the factors of each round too. Without it there is one round, which becomes a LoRA
            with its own alpha.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for boosters in adapter.rounds for name in boosters))
    tensors = {}
    ranks = {}
    for name in names:
        A, B = concat_factors(adapter.rounds, name, fold=with_chain)
        ranks[name] = len(A)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B.contiguous()
    # Where B includes the scaling, alpha is the rank, so that PEFT's own scaling is 1.
    alpha = max(ranks.values()) if with_chain else adapter.rounds[0][names[0]].scaling * max(ranks.values())
    config = lora_config(targets, ranks, alpha, base_model)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CHAIN).unlink(missing_ok=True)  # of an earlier run
    if with_chain:
        save_chain(directory / CHAIN, adapter, names, len(targets.names))


def lora_config(targets: TargetLayers, ranks: Mapping[str, int], alpha: float, base_model: str) -> dict:
    """Return PEFT's configuration of a LoRA.

    Args:
        targets: the layers that could be adapted.
        ranks: {module name: rank} of those that are.
        alpha: of the layers of the highest rank; the alpha of another layer is its rank.
        base_model: name or path of the pretrained model.
    """
    r = max(ranks.values())
    lower_ranks = {name: rank for name, rank in ranks.items() if rank != r}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": r,
        "lora_alpha": alpha,
        "target_modules": list(targets.peft_targets) if len(ranks) == len(targets.names) else list(ranks),
        "fan_in_fan_out": targets.fan_in_fan_out,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    if lower_ranks:
        config |= {"rank_pattern": lower_ranks, "alpha_pattern": lower_ranks}
    return config


def save_chain(path: Path, adapter: SavedAdapter, names: Sequence[str], num_targets: int) -> None:
    """Write the factors of each round, fp32, and what is known of the rounds."""
    tensors = {}
    for name in names:
        tensors[f"{name}.A"], tensors[f"{name}.B"] = concat_factors(adapter.rounds, name, fold=False)
    first_boosters = [next(iter(boosters.values())) for boosters in adapter.rounds]
    metadata = {
        "ranks": [len(booster.A) for booster in first_boosters],
        "scalings": [booster.scaling for booster in first_boosters],
        "lengths": adapter.lengths,
        "round": adapter.round,
    }
    if any(len(boosters) < num_targets for boosters in adapter.rounds):
        metadata["layers"] = [
            sorted({layer_number(name) for name in boosters}) for boosters in adapter.rounds
        ]
    # One entry: safetensors writes several in any order, and equal chains shall be equal bytes.
    save_file(tensors, path, metadata={"chain": json.dumps(metadata)})


def remove_adapter(directory: str | Path) -> None:
    """Remove the files of an adapter; other files of the directory stay."""
    for name in (CONFIG, WEIGHTS, CHAIN):
        (Path(directory) / name).unlink(missing_ok=True)


# ---- reading ----


def load_adapter(directory: str | Path, shapes: Shapes, with_chain: bool) -> SavedAdapter:
    """Read what `save_adapter` or PEFT wrote.

    Args:
        directory: of the adapter.
        shapes: of the layers that take it.
        with_chain: read the factors of each round. An adapter without a chain, as PEFT writes it, is one
            merged round.

    Raises:
        UsageError: the adapter is damaged, or not for these layers.
    """
    directory = Path(directory)
    if with_chain and has_chain(directory):
        return load_chain(directory, shapes)
    config = read_lora_config(directory)
    r = config["r"]
    scaling = config["lora_alpha"] / (math.sqrt(r) if config.get("use_rslora") else r)
    tensors, _ = read_tensors(directory / WEIGHTS)
    names = (f"{PREFIX}{{}}.lora_A.weight", f"{PREFIX}{{}}.lora_B.weight")
    factors = check_tensors(tensors, *names, dict.fromkeys(shapes, r), shapes, directory)
    boosters = {name: Booster(A, B, scaling) for name, (A, B) in factors.items()}
    return SavedAdapter([boosters, {}], [1.0], 1) if with_chain else SavedAdapter([boosters])


def load_chain(directory: Path, shapes: Shapes) -> SavedAdapter:
    """Read the factors of each round; raises UsageError where they are damaged or not for these layers."""
    tensors, file_metadata = read_tensors(directory / CHAIN)
    metadata = parse_chain_metadata(file_metadata, directory / CHAIN)
    names_by_round = [list(shapes)] * len(metadata.ranks)
    if metadata.layers:
        names_by_round = [names_of_layers(shapes, numbers) for numbers in metadata.layers]
    total_ranks = dict.fromkeys(shapes, 0)
    for names, rank in zip(names_by_round, metadata.ranks, strict=True):
        for name in names:
            total_ranks[name] += rank
    total_ranks = {name: rank for name, rank in total_ranks.items() if rank}
    factors = check_tensors(tensors, "{}.A", "{}.B", total_ranks, shapes, directory)
    rounds = []
    used_ranks = dict.fromkeys(shapes, 0)
    for names, rank, scaling in zip(names_by_round, metadata.ranks, metadata.scalings, strict=True):
        boosters = {}
        for name in names:
            A, B = factors[name]
            start = used_ranks[name]
            end = start + rank
            boosters[name] = Booster(A[start:end].clone(), B[:, start:end].clone(), scaling)
            used_ranks[name] = end
        rounds.append(boosters)
    return SavedAdapter(rounds, metadata.lengths, metadata.round)


def parse_chain_metadata(file_metadata: Mapping[str, str], path: Path) -> ChainMetadata:
    """Read what a chain says of its rounds; raises UsageError where that makes no sense."""
    try:
        fields = json.loads(file_metadata["chain"])
        num_rounds = len(fields["ranks"])
        metadata = ChainMetadata(
            ranks=fields["ranks"],
            scalings=fields["scalings"],
            lengths=fields.get("lengths", [1.0] * (num_rounds - 1)),
            layers=fields.get("layers"),
            round=fields.get("round", num_rounds - 1),
        )
        valid = _is_valid(metadata, num_rounds) and ("layers" not in fields or metadata.layers is not None)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, OverflowError):
        valid = False
    if not valid:
        raise UsageError(f"{path}: its account of the rounds is damaged")
    return metadata


def _is_valid(metadata: ChainMetadata, num_rounds: int) -> bool:
    """Return whether the values have the types and lengths that they should have."""

    def are_numbers(values, count: int | None = None, types=(int, float)) -> bool:
        if not isinstance(values, list) or count not in (None, len(values)):
            return False
        return all(type(value) in types and math.isfinite(value) for value in values)

    if not (num_rounds and are_numbers(metadata.ranks, types=(int,)) and min(metadata.ranks) > 0):
        return False
    if not (are_numbers(metadata.scalings, num_rounds) and are_numbers(metadata.lengths, num_rounds - 1)):
        return False
    if metadata.layers is not None:
        valid = [bool(numbers) and are_numbers(numbers, types=(int,)) for numbers in metadata.layers]
        if len(valid) != num_rounds or not all(valid):
            return False
    return type(metadata.round) is int and metadata.round >= 0


def check_tensors(
    tensors: Mapping[str, Tensor],
    name_a: str,
    name_b: str,
    ranks: Mapping[str, int],
    shapes: Shapes,
    directory: Path,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Check that a file holds the factors of these layers and nothing else, in the right shapes and finite.

    Args:
        tensors: of the file.
        name_a: format of the name that A of a layer has in the file.
        name_b: the same of B.
        ranks: {module name: rank}.
        shapes: of the layers.
        directory: of the file, for the error.

    Returns:
        {module name: (A [rank, in], B [out, rank])}, fp32.

    Raises:
        UsageError: names the first tensor that is wrong.
    """
    expected_shapes = {}
    for name, rank in ranks.items():
        in_features, out_features = shapes[name]
        expected_shapes[name_a.format(name)] = (rank, in_features)
        expected_shapes[name_b.format(name)] = (out_features, rank)
    for key in sorted(expected_shapes.keys() ^ tensors.keys()):
        problem = "no" if key in expected_shapes else "unexpected"
        question = "was the adapter made for this base model and these target layers?"
        raise UsageError(f"{directory}: {problem} tensor {key}; {question}")
    for key, shape in expected_shapes.items():
        tensor = tensors[key]
        if tuple(tensor.shape) != shape:
            actual = list(tensor.shape)
            raise UsageError(f"{directory}: {key} is {actual}, but this model wants {list(shape)}")
        if not bool(tensor.isfinite().all()):
            raise UsageError(f"{directory}: {key} holds NaN or infinity")
    return {n: (tensors[name_a.format(n)].float(), tensors[name_b.format(n)].float()) for n in ranks}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors, metadata) of a safetensors file; raises UsageError for a missing or damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: {error}") from error


def read_adapter_config(directory: str | Path) -> dict:
    """Return the `adapter_config.json` of any PEFT adapter; raises UsageError where there is none."""
    path = Path(directory) / CONFIG
    try:
        config = json.loads(path.read_text())
        _ = config["peft_type"]
    except OSError as error:
        advice = "--adapter takes a directory with a PEFT adapter"
        raise UsageError(f"{path}: {error.strerror}; {advice}") from error
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not the configuration of an adapter ({error!r})") from error
    return config


def read_lora_config(directory: str | Path) -> dict:
    """Return the `adapter_config.json` of a LoRA; raises UsageError for more than plain LoRA."""
    path = Path(directory) / CONFIG
    config = read_adapter_config(directory)
    try:
        peft_type = config["peft_type"]
        r = config["r"]
        alpha = config["lora_alpha"]
        targets = config["target_modules"]
    except KeyError as error:
        raise UsageError(f"{path}: not the configuration of a LoRA adapter ({error!r})") from error
    if type(r) is not int or type(alpha) not in (int, float) or not (r > 0 and 0 < alpha < math.inf):
        raise UsageError(f"{path}: r {r!r} and lora_alpha {alpha!r} are no rank and alpha")
    unsupported = [name for name in UNSUPPORTED if config.get(name)]
    if not has_chain(directory):  # a chain knows the rank of each of its rounds
        unsupported += [name for name in ("rank_pattern", "alpha_pattern") if config.get(name)]
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if str(config.get("init_lora_weights")).startswith(BASE_CHANGING_INITS):
        unsupported.append("init_lora_weights")
    if peft_type != "LORA" or unsupported or not isinstance(targets, list):
        reason = ", ".join(unsupported) or f"{peft_type} on {targets}"
        raise UsageError(f"{path}: only plain LoRA is supported, not {reason}")
    return config
