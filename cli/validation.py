"""Refuse flags that exclude each other, need each other or lie out of range, before a model is loaded.

A function for each group of flags yields an error for each value that does not fit; `validate` raises the
first error.
"""

import math
from collections.abc import Iterator

from transformers import TrainingArguments

from boosters.targets import parse_layer_choice
from cli import load_model
from tasks import GENERATION, METRICS, OPTIONS, TEXT, CustomTask
from utils import UsageError, load_from_file
from zo.methods import METHODS, Method

MINIMUM = {  # flag -> the least value that it may have
    "num_train": 0, "num_dev": 0, "num_eval": 1, "num_train_sets": 1, "train_set_seed": 0, "seed": 0,
    "max_length": 2, "max_new_tokens": 1, "num_beams": 1, "top_k": 1,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "num_train_epochs": 0,
    "learning_rate": 0, "weight_decay": 0, "max_grad_norm": 0,
    "dataloader_num_workers": 0, "rank_check_steps": 0, "ddp_timeout": 1,
    "lora_r": 1, "num_prefix": 1, "zo_queries": 1, "replay_steps": 0, "boosters": 0, "staged": 0,
    "export_rank": 1,
    "xgblora_steps_per_iteration": 0, "xgblora_merge_frequency": 1, "xgblora_patience": 1,
}  # fmt: skip
POSITIVE = ("zo_eps", "lora_alpha", "temperature")


def validate(args, world_size: int = 1) -> None:
    """Check the flags against each other; `world_size` is the number of ranks that torchrun has started.

    Raises:
        UsageError: with the first error, in one line.
    """
    for errors in (
        range_errors(args),
        data_errors(args),
        model_errors(args),
        evaluation_errors(args),
        training_errors(args),
        zeroth_order_errors(args),
        adapter_errors(args),
        output_errors(args),
        boosting_errors(args),
        placement_errors(args, world_size),
    ):
        for message in errors:
            raise UsageError(message)


def exclude(flag: str, other_flag: str) -> str:
    return f"{flag} and {other_flag} exclude each other"


def non_default(args, *names: str) -> list[str]:
    """Return those of the flags that have another value than their default."""
    defaults = type(args).__dataclass_fields__
    return [name for name in names if getattr(args, name) != defaults[name].default]


def trains_adapters(args) -> bool:
    return args.lora or args.xgblora or args.prefix_tuning


def range_errors(args) -> Iterator[str]:
    """Numbers that lie out of their range."""
    last_seed = (args.train_set_seed or 0) + (args.num_train_sets or 1) - 1
    for name, value in (("seed", args.seed), ("train_set_seed", last_seed)):
        if value >= 2**32:
            yield f"--{name} is {value}, but must be below 2**32"
    for name, minimum in MINIMUM.items():
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value >= minimum):
            yield f"--{name} is {value}, but must be at least {minimum}"
    if not 0 < args.top_p <= 1:
        yield f"--top_p is {args.top_p}, but must be above 0 and at most 1"
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            yield f"--{name} is {value}, but must be a positive number"


def data_errors(args) -> Iterator[str]:
    """Rows, dev rows, and the description of a task of the user's own."""
    trains = args.trainer != "none"
    if args.num_dev and not trains:
        yield exclude("--num_dev", "--trainer none")
    for flag, needs_dev in (
        ("--eval_strategy", args.eval_strategy != "no"),
        ("--eval_on_start", args.eval_on_start),
    ):
        if trains and needs_dev and not args.num_dev:
            yield exclude(flag, "no --num_dev")
    if args.custom_task != CustomTask() and args.task_name != "own":
        yield "--template and the other flags of own data need --task_name own"
    if not args.eos_token:
        yield "--eos_token is empty: an answer has to end somewhere"


def model_errors(args) -> Iterator[str]:
    """Precision, and what a quantised model or a `.gguf` file can't do."""
    bits, trains = f"--load_int{args.bits}", args.trainer != "none"
    if args.load_float16 and args.load_bfloat16:
        yield exclude("--load_float16", "--load_bfloat16")
    if args.load_int8 and args.load_int4:
        yield exclude("--load_int8", "--load_int4")
    if args.bits and args.model_name.endswith(".gguf"):
        yield exclude(bits, "--model_name of a .gguf file")
    if args.bits and args.save_merged:
        yield exclude(bits, "--save_merged")
    if args.bits and trains and not trains_adapters(args) and not args.linear_probing:
        yield f"{bits} with --trainer {args.trainer} needs --lora, --xgblora or --prefix_tuning"
    if args.bits and args.xgblora and not args.xgblora_ensemble:
        yield f"{bits} with --xgblora needs --xgblora_ensemble: quantised weights can't take a merge"
    if args.boosters is not None and not args.adapter:
        yield "--boosters needs --adapter"
    if args.adapter and trains and not trains_adapters(args):
        adapter = f"--adapter {args.adapter}"
        yield f"{adapter} with --trainer {args.trainer} needs --lora, --xgblora or --prefix_tuning"


def evaluation_errors(args) -> Iterator[str]:
    """Scores, a linear probe, and what is written of an evaluation."""
    other_tuning = trains_adapters(args) or args.head_tuning or args.trainer == "zo"
    if args.sfc and args.icl_sfc:
        yield exclude("--sfc", "--icl_sfc")
    if args.linear_probing and other_tuning:
        yield exclude("--linear_probing", "another way of tuning")
    if args.linear_probing and (args.sfc or args.icl_sfc):
        yield exclude("--linear_probing", "--sfc and --icl_sfc")
    if args.linear_probing and args.save_model:  # no format has a place for a probe
        yield exclude("--linear_probing", "--save_model")
    if args.lp_early_stopping and not args.linear_probing:
        yield "--lp_early_stopping needs --linear_probing"
    if args.predictions and args.no_eval:
        yield "--predictions and --no_eval: no example is evaluated"
    if args.staged and args.no_eval:
        yield exclude("--staged", "--no_eval")


def training_errors(args) -> Iterator[str]:
    """Check the flags that both trainers share, and those of back-propagation."""
    trains, zeroth_order = args.trainer != "none", args.trainer == "zo"
    if trains and args.train_as_classification and not args.only_train_option:
        yield exclude("--train_as_classification", "--only_train_option False")
    if trains and args.max_steps == 0:
        yield "--max_steps 0 trains nothing: --trainer none evaluates"
    if zeroth_order and args.optim != TrainingArguments.default_optim:
        yield exclude("--trainer zo", f"--optim {args.optim}")
    if zeroth_order and args.gradient_checkpointing:
        yield exclude("--trainer zo", "--gradient_checkpointing (no activation is stored)")
    if zeroth_order:
        for name in non_default(args, "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args"):
            yield f"--{name} needs --trainer regular"
    if args.head_tuning and trains_adapters(args):
        yield exclude("--head_tuning", "adapters (--lora, --xgblora, --prefix_tuning)")
    if args.head_tuning and not trains:
        yield "--head_tuning needs a --trainer"
    if args.untie_emb and (not trains or trains_adapters(args)):
        yield "--untie_emb needs --head_tuning, or a --trainer without adapters"


def zeroth_order_errors(args) -> Iterator[str]:
    """Flags of zeroth order."""
    zeroth_order, adapters = args.trainer == "zo", trains_adapters(args)
    if args.trainer == "regular":
        for name in non_default(args, "zo_eps", "zo_queries", "zo_distribution", "zo_optim", "zo_method"):
            yield f"--{name} needs --trainer zo"
    if args.objective and not zeroth_order:
        yield "--objective and --non_diff need --trainer zo"
    if args.zo_check and not zeroth_order:
        yield "--zo_check needs --trainer zo"
    if args.recipe and not zeroth_order:
        yield "--recipe needs --trainer zo"
    for flag, is_set in {
        "--train_as_classification": args.train_as_classification,
        "--zo_cache_activations": args.zo_cache_activations,
        "--zo_check (such a loss has steps)": args.zo_check,
    }.items():
        if args.objective and is_set:
            yield exclude("--objective", flag)
    if args.zo_normalize and not (zeroth_order and adapters):
        yield "--zo_normalize needs --trainer zo and --lora, --xgblora or --prefix_tuning"
    if args.zo_normalize and args.prefix_tuning and args.learning_rate is None:
        yield "--zo_normalize with --prefix_tuning has no default rate: give --learning_rate"
    if zeroth_order and args.zo_optim != "sgd" and not adapters:
        optimizer = f"--zo_optim {args.zo_optim}"
        yield f"{optimizer} needs --lora, --xgblora or --prefix_tuning: it keeps state for every element"
    if args.zo_cache_activations and not (
        zeroth_order and parse_layer_choice(args.xgblora_layers)[0] == "top"
    ):
        yield "--zo_cache_activations needs --trainer zo and --xgblora_layers top:N"
    yield from method_errors(args)


def method_errors(args) -> Iterator[str]:
    """A method that does not fit what is trained; raises UsageError where there is no method of that name."""
    method = find_method(args.zo_method)
    if args.trainer != "zo":
        return
    if method.full_only and trains_adapters(args):
        yield f"--zo_method {args.zo_method} is for full fine-tuning; with adapters try --lora_freeze_a"
    if method.adapters_only and (not (args.lora or args.xgblora) or args.lora_freeze_a):
        yield f"--zo_method {args.zo_method} is for --lora or --xgblora with A and B trained"
    if args.zo_queries < method.least_queries:
        yield f"--zo_method {args.zo_method} needs --zo_queries {method.least_queries} or more"


def find_method(name: str) -> type[Method]:
    """Return the class that `--zo_method` names; raises UsageError where there is none."""
    if name in METHODS:
        return METHODS[name]
    method = load_from_file(name)
    if method is None:
        raise UsageError(f"--zo_method {name}: there are {', '.join(METHODS)}, or file.py:Name")
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise UsageError(f"--zo_method {name}: it is no subclass of zo.Method")
    return method


def adapter_errors(args) -> Iterator[str]:
    """LoRA and prefix tuning."""
    zeroth_order, trains, lora = args.trainer == "zo", args.trainer != "none", args.lora or args.xgblora
    for name in ("xgblora", "lora"):
        if getattr(args, name) and args.prefix_tuning:
            yield exclude(f"--{name}", "--prefix_tuning")
    if args.prefix_tuning and not trains:
        yield "--prefix_tuning needs a --trainer"
    if args.prefix_tuning and args.gradient_checkpointing:
        yield exclude("--prefix_tuning", "--gradient_checkpointing (it takes no cache)")
    if args.prefix_tuning and args.save_merged:
        yield exclude("--prefix_tuning", "--save_merged")
    if args.lora_freeze_a and not (zeroth_order and lora):
        yield "--lora_freeze_a needs --trainer zo and --lora or --xgblora"
    if args.lora_targets is not None and not lora:
        yield "--lora_targets needs --lora or --xgblora"
    for name in non_default(args, "lora_r", "lora_alpha"):
        if not lora:
            yield f"--{name} needs --lora or --xgblora"
    if args.recipe == "atoms" and (args.xgblora or args.lora_r not in (None, 8)):
        yield "--recipe atoms is LoRA of rank 8, whose alpha another rank would not fit"


def boosting_errors(args) -> Iterator[str]:
    """XGBLoRA."""
    trains, lora = args.trainer != "none", args.lora or args.xgblora
    boosts = args.xgblora and trains
    saved_chain = args.adapter and not trains
    layers, _ = parse_layer_choice(args.xgblora_layers)
    if args.xgblora and args.lora_r not in (None, 1) and not args.xgblora_rank_schedule:
        yield f"--lora_r {args.lora_r} with --xgblora: boosters are of rank 1"
    for name in non_default(args, "xgblora_steps_per_iteration", "xgblora_merge_frequency"):
        if not args.xgblora:
            yield f"--{name} needs --xgblora"
    for name in non_default(args, "xgblora_rank_schedule", "xgblora_adaptive", "xgblora_best"):
        if not boosts:
            yield f"--{name} needs --xgblora and a --trainer"
    if args.xgblora_ensemble and not (boosts or saved_chain):
        yield "--xgblora_ensemble needs --xgblora or --adapter"
    if layers != "all" and not (lora and trains):
        yield "--xgblora_layers needs --lora or --xgblora"
    if layers == "random" and not args.xgblora:
        yield f"--xgblora_layers {args.xgblora_layers} needs --xgblora"
    if (args.xgblora_adaptive or args.xgblora_best) and not args.num_dev:
        yield "--xgblora_adaptive and --xgblora_best go by dev rows: give --num_dev"
    if args.xgblora_patience and not args.xgblora_adaptive:
        yield "--xgblora_patience needs --xgblora_adaptive"
    if args.staged and not (boosts or saved_chain):
        yield "--staged needs --xgblora or --adapter"


def output_errors(args) -> Iterator[str]:
    """Check the flags of files, and of runs that are rebuilt from a trajectory."""
    trains = args.trainer != "none"
    if args.save_model and not trains:
        yield "--save_model needs a --trainer (or --save_merged, --export_rank)"
    if args.export_rank and not (args.lora or args.xgblora or args.adapter):
        yield "--export_rank needs --lora, --xgblora or --adapter"
    if args.replay and (args.staged or args.predictions):
        yield exclude("--replay", "--staged and --predictions (it evaluates nothing)")
    if args.replay and args.trainer != "zo":
        yield "--replay needs the flags of its run, --trainer zo among them"
    if args.replay_steps is not None and not args.replay:
        yield "--replay_steps needs --replay"


def placement_errors(args, world_size: int) -> Iterator[str]:
    """Several ranks, divided weights, layers on several devices."""
    if args.zo_parallel == "queries" and args.trainer != "zo":
        yield "--zo_parallel queries needs --trainer zo"
    if args.zo_parallel == "queries" and args.zo_queries < world_size:
        yield f"--zo_parallel queries needs --zo_queries {world_size} or more, for {world_size} ranks"
    if args.replay and world_size > 1:
        yield "--replay runs in one process: start it without torchrun"
    if args.offload_folder and not args.device_map:
        yield "--offload_folder needs --device_map"
    if args.device_map:
        yield from device_map_errors(args, world_size)
    if args.fsdp:
        yield from fsdp_errors(args, world_size)


def device_map_errors(args, world_size: int) -> Iterator[str]:
    """`--device_map`; raises UsageError where its file can't be read."""
    for flag, is_set in {
        f"--load_int{args.bits}": args.bits,
        "--model_name of a .gguf file": args.model_name.endswith(".gguf"),
        "--untie_emb": args.untie_emb,
        "--no_auto_device": args.no_auto_device,
    }.items():
        if is_set:
            yield exclude("--device_map", flag)
    if world_size > 1:
        yield "--device_map runs in one process: under torchrun each rank has one device"
    load_model.read_device_map(args.device_map)


def fsdp_errors(args, world_size: int) -> Iterator[str]:
    """`--fsdp`."""
    for flag, is_set in {
        f"--load_int{args.bits}": args.bits,
        "--save_merged": args.save_merged,
        "--linear_probing": args.linear_probing,
        f"--optim {args.optim} (adamw_torch and sgd do)": not args.optim.startswith(("adamw_torch", "sgd")),
    }.items():
        if is_set:
            yield exclude("--fsdp", flag)
    words = {*str(args.fsdp).lower().split()}
    if not words <= {"full_shard", "auto_wrap", "true"}:  # the flag alone says "true"
        yield f"--fsdp {args.fsdp}: there is full_shard, with or without auto_wrap"
    if args.trainer != "regular":
        yield "--fsdp needs --trainer regular (a model that outgrows a device: --device_map)"
    if world_size == 1:
        yield "--fsdp divides the weights among ranks: start with torchrun"


def validate_task(args, task) -> None:
    """Check the flags against a task; raises UsageError with the first that the task has no use for."""
    for message in task_errors(args, task):
        raise UsageError(message)


def task_errors(args, task) -> Iterator[str]:
    """Flags that a task of this kind has no use for."""
    if task.kind != OPTIONS:
        for name in ("train_as_classification", "sfc", "icl_sfc"):
            if getattr(args, name):
                yield f"--{name} is for tasks with candidates, but {task.name} has none"
    if task.kind == TEXT and args.trainer == "none" and args.num_train:
        yield f"--num_train: {task.name} is evaluated without demonstrations"
    kinds = {"accuracy": (OPTIONS,), "f1": (GENERATION,), "em": (GENERATION,)}
    if args.objective and task.kind not in kinds.get(args.objective, (OPTIONS, GENERATION)):
        yield f"--objective {args.objective} is not for {task.name}, whose metric is {task.metric_name}"
    best = (args.metric_for_best_model or "loss").removeprefix("eval_")
    metrics = [name for name in METRICS[task.kind] if name != "macro_f1" or name == task.metric_name]
    if args.trainer != "none" and args.metric_for_best_model and best not in metrics:
        yield f"--metric_for_best_model {best}: {task.name} has {', '.join(metrics)}"
    if args.linear_probing:  # a probe has one output for each option
        samples = task.samples["train"]
        options = {tuple(map(str, samples[i].candidates or ())) for i in range(min(len(samples), 50))}
        if task.kind != OPTIONS or len(options) > 1:
            yield f"--linear_probing needs the same options in every row, which {task.name} has not"


def validate_prefix(args) -> None:
    """Check the flags against the saved prefix of `--adapter`.

    Raises:
        UsageError: with the first flag that a prefix has no use for.
    """
    for name in ("lora", "xgblora", "boosters", "staged", "export_rank", "save_merged", "xgblora_ensemble"):
        if getattr(args, name) not in (None, False, 0):
            raise UsageError(f"--{name} is for LoRA adapters, but --adapter {args.adapter} is a prefix")
    if args.trainer != "none" and not args.prefix_tuning:
        raise UsageError(
            f"--adapter {args.adapter} is a prefix: --trainer {args.trainer} goes on with --prefix_tuning"
        )
