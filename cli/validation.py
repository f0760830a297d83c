"""Which choices of a run exclude or need each other, or lie out of range: one line each, before a model loads."""

import math

from transformers import TrainingArguments

from boosters.targets import parse_layer_choice
from cli import load_model
from distributed import collectives
from tasks import GENERATION, METRICS, OPTIONS, TEXT, CustomTask
from utils import UsageError, load_from_file
from zo.method import Method
from zo.methods import METHODS


def find_method(name: str) -> type[Method]:
    """The method of that name, or of a file; raises UsageError where there is none."""
    if name in METHODS:
        return METHODS[name]
    found = load_from_file(name)
    if found is None:
        raise UsageError(f"--zo_method {name}: there are {', '.join(METHODS)}, or file.py:Name")
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UsageError(f"--zo_method {name}: it is no subclass of zo.Method")
    return found


MINIMUM = {  # flag -> the least that it may be
    "num_train": 0, "num_dev": 0, "num_eval": 1, "num_train_sets": 1, "train_set_seed": 0, "seed": 0,
    "max_length": 2, "max_new_tokens": 1, "num_beams": 1, "top_k": 1,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "num_train_epochs": 0, "weight_decay": 0,
    "max_grad_norm": 0, "dataloader_num_workers": 0, "rank_check_steps": 0, "ddp_timeout": 1,
    "lora_r": 1, "num_prefix": 1, "zo_queries": 1, "replay_steps": 0, "boosters": 0, "staged": 0, "export_rank": 1,
    "xgblora_steps_per_iteration": 0, "xgblora_merge_frequency": 1, "xgblora_patience": 1, "xgblora_a_warmup": 0,
}  # fmt: skip


def validate(args) -> None:
    """Raise UsageError for choices that exclude each other or lie out of range."""
    trains, zo, lora = args.trainer != "none", args.trainer == "zo", args.lora or args.xgblora
    adapters = lora or args.prefix_tuning
    conflicts = {
        ("--xgblora", "--prefix_tuning"): args.xgblora and args.prefix_tuning,
        ("--lora", "--prefix_tuning"): args.lora and args.prefix_tuning,
        ("--sfc", "--icl_sfc"): args.sfc and args.icl_sfc,
        ("--load_float16", "--load_bfloat16"): args.load_float16 and args.load_bfloat16,
        ("--load_int8", "--load_int4"): args.load_int8 and args.load_int4,
        (f"--load_int{args.bits}", "--model_name of a .gguf file"): args.bits and args.model_name.endswith(".gguf"),
        ("--device_map", f"--load_int{args.bits}"): args.device_map and args.bits,
        ("--device_map", "--model_name of a .gguf file"): args.device_map and args.model_name.endswith(".gguf"),
        ("--device_map", "--untie_emb"): args.device_map and args.untie_emb,
        ("--head_tuning", "adapters (--lora, --xgblora, --prefix_tuning)"): args.head_tuning and adapters,
        ("--linear_probing", "another way of tuning"): args.linear_probing and (adapters or args.head_tuning or zo),
        ("--linear_probing", "--sfc and --icl_sfc"): args.linear_probing and (args.sfc or args.icl_sfc),
        ("--linear_probing", "--save_model"): args.linear_probing and args.save_model,  # no format has a place for it
        ("--prefix_tuning", "--gradient_checkpointing (it takes no cache)"): args.prefix_tuning
        and args.gradient_checkpointing,
        ("--prefix_tuning", "--save_merged"): args.prefix_tuning and args.save_merged,
        ("--objective", "--train_as_classification"): args.objective and args.train_as_classification,
        ("--objective", "--zo_cache_activations"): args.objective and args.zo_cache_activations,
        ("--objective", "--zo_check (such a loss has steps)"): args.objective and args.zo_check,
        (f"--load_int{args.bits}", "--save_merged"): args.bits and args.save_merged,
        ("--trainer zo", "--fp16 (load float16 weights with --load_float16)"): zo and args.fp16,
        ("--device_map", "--no_auto_device"): args.device_map and args.no_auto_device,
        ("--replay", "--staged and --predictions (it evaluates nothing)"): args.replay
        and (args.staged or args.predictions),
        ("--trainer zo", "--deepspeed"): zo and args.deepspeed,
        ("--trainer", "--label_smoothing_factor (the loss is ours)"): trains and args.label_smoothing_factor,
        ("--trainer", "--save_only_model (nothing could go on from it)"): trains and args.save_only_model,
        ("--trainer", "--train_sampling_strategy group_by_length"): trains
        and args.train_sampling_strategy == "group_by_length",
        ("--trainer zo", "--neftune_noise_alpha"): zo and args.neftune_noise_alpha,
        ("--trainer zo", "--auto_find_batch_size"): zo and args.auto_find_batch_size,
        ("--trainer zo", f"--optim {args.optim}"): zo and args.optim != TrainingArguments.default_optim,
        ("--train_as_classification", "--only_train_option False"): trains
        and args.train_as_classification
        and not args.only_train_option,
        ("--num_dev", "--trainer none"): args.num_dev and not trains,
        ("--xgblora_a_warmup", "--lora_freeze_a"): args.xgblora_a_warmup and args.lora_freeze_a,
        ("--staged", "--no_eval"): args.staged and args.no_eval,
        ("--xgblora_restart_lr", f"--lr_scheduler_type {args.lr_scheduler_type}"): args.xgblora_restart_lr
        and args.lr_scheduler_type in ("constant", "reduce_lr_on_plateau", "greedy"),  # no functions of the step
        ("--eval_strategy", "no --num_dev"): trains and args.eval_strategy != "no" and not args.num_dev,
        ("--eval_on_start", "no --num_dev"): trains and args.eval_on_start and not args.num_dev,
    }
    for names, clash in conflicts.items():
        if clash:
            raise UsageError(f"{names[0]} and {names[1]} exclude each other")
    ranks = collectives.env_world_size()
    validate_fsdp(args, ranks)
    boosts = args.xgblora and trains
    kind, _ = parse_layer_choice(args.xgblora_layers)
    method = find_method(args.zo_method)

    def set_one(*names: str) -> dict[str, bool]:
        """{name: whether it has another value than its default}."""
        return {name: getattr(args, name) != type(args).__dataclass_fields__[name].default for name in names}

    of_boosting = set_one("xgblora_steps_per_iteration", "xgblora_merge_frequency")
    of_training = set_one("xgblora_rank_schedule", "xgblora_adaptive", "xgblora_a_warmup", "xgblora_restart_lr",
                          "xgblora_best")  # fmt: skip
    of_lora = set_one("lora_r", "lora_alpha")
    of_zo = set_one("zo_eps", "zo_queries", "zo_distribution", "zo_optim", "zo_method")
    of_regular = set_one("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args")
    needs = {
        **{f"--{name} needs --trainer regular": on and zo for name, on in of_regular.items()},
        "--fp16_full_eval changes nothing: load the weights with --load_float16": args.fp16_full_eval,
        "--bf16_full_eval changes nothing: load the weights with --load_bfloat16": args.bf16_full_eval,
        "--max_steps 0 trains nothing: --trainer none evaluates": trains and args.max_steps == 0,
        "--recipe needs --trainer zo": args.recipe and not zo,
        **{f"--{name} needs --xgblora": on and not args.xgblora for name, on in of_boosting.items()},
        **{f"--{name} needs --xgblora and a --trainer": on and not boosts for name, on in of_training.items()},
        **{f"--{name} needs --trainer zo": on and args.trainer == "regular" for name, on in of_zo.items()},
        **{f"--{name} needs --lora or --xgblora": on and not lora for name, on in of_lora.items()},
        "--save_model needs a --trainer (or --save_merged, --export_rank)": args.save_model and not trains,
        "--xgblora_ensemble needs --xgblora or --adapter": args.xgblora_ensemble
        and not (boosts or (args.adapter and not trains)),
        "--xgblora_layers needs --lora or --xgblora": kind != "all" and not (lora and trains),
        f"--xgblora_layers {args.xgblora_layers} needs --xgblora": kind == "random" and not args.xgblora,
        "--xgblora_adaptive and --xgblora_best go by dev rows: give --num_dev": (
            args.xgblora_adaptive or args.xgblora_best
        )
        and not args.num_dev,
        "--xgblora_patience needs --xgblora_adaptive": args.xgblora_patience and not args.xgblora_adaptive,
        "--zo_cache_activations needs --trainer zo and --xgblora_layers top:N": args.zo_cache_activations
        and not (zo and kind == "top"),
        "--staged needs --xgblora or --adapter": args.staged and not (boosts or (args.adapter and not trains)),
        "--export_rank needs --lora, --xgblora or --adapter": args.export_rank and not (lora or args.adapter),
        "--zo_normalize needs --trainer zo and --lora, --xgblora or --prefix_tuning": args.zo_normalize
        and not (zo and adapters),
        "--zo_normalize with --prefix_tuning has no default rate: give --learning_rate": args.zo_normalize
        and args.prefix_tuning
        and args.learning_rate is None,
        "--lora_freeze_a needs --trainer zo and --lora or --xgblora": args.lora_freeze_a and not (zo and lora),
        "--template and the other flags of own data need --task_name own": args.own != CustomTask()
        and args.task_name != "own",
        "--predictions and --no_eval: no example is evaluated": args.predictions and args.no_eval,
        f"--zo_optim {args.zo_optim} needs --lora, --xgblora or --prefix_tuning: it keeps state for every element": zo
        and args.zo_optim != "sgd"
        and not adapters,
        "--boosters needs --adapter": args.boosters is not None and not args.adapter,
        "--lora_targets needs --lora or --xgblora": args.lora_targets is not None and not lora,
        "--head_tuning needs a --trainer": args.head_tuning and not trains,
        "--prefix_tuning needs a --trainer": args.prefix_tuning and not trains,
        "--untie_emb needs --head_tuning, or a --trainer without adapters": args.untie_emb and (not trains or adapters),
        "--lp_early_stopping needs --linear_probing": args.lp_early_stopping and not args.linear_probing,
        "--objective and --non_diff need --trainer zo": args.objective and not zo,
        f"--load_int{args.bits} with --trainer {args.trainer} needs --lora, --xgblora or --prefix_tuning": args.bits
        and trains
        and not adapters
        and not args.linear_probing,
        f"--load_int{args.bits} with --xgblora needs --xgblora_ensemble: quantised weights can't take a merge": (
            args.bits and args.xgblora and not args.xgblora_ensemble
        ),
        "--zo_check needs --trainer zo": args.zo_check and not zo,
        "--recipe atoms is LoRA of rank 8, whose alpha another rank would not fit": args.recipe == "atoms"
        and (args.xgblora or args.lora_r not in (None, 8)),
        f"--zo_method {args.zo_method} is for full fine-tuning; with adapters try --lora_freeze_a": zo
        and method.full_only
        and adapters,
        f"--zo_method {args.zo_method} is for --lora or --xgblora with A and B trained": zo
        and method.adapters_only
        and (not lora or args.lora_freeze_a or args.xgblora_a_warmup),
        f"--zo_method {args.zo_method} needs --zo_queries {method.least_queries} or more": zo
        and args.zo_queries < method.least_queries,
        "--replay needs the flags of its run, --trainer zo among them": args.replay and not zo,
        "--replay_steps needs --replay": args.replay_steps is not None and not args.replay,
        f"--zo_parallel queries needs --zo_queries {ranks} or more, for {ranks} ranks": args.zo_parallel == "queries"
        and args.zo_queries < ranks,
        "--device_map runs in one process: under torchrun each rank has one device": args.device_map and ranks > 1,
        "--offload_folder needs --device_map": args.offload_folder and not args.device_map,
        "--zo_parallel queries needs --trainer zo": args.zo_parallel == "queries" and not zo,
        "--replay runs in one process: start it without torchrun": args.replay and ranks > 1,
        "--resume_from_checkpoint is not needed: the same command goes on by itself": args.resume_from_checkpoint,
        f"--lora_r {args.lora_r} with --xgblora: boosters are of rank 1": args.xgblora
        and args.lora_r not in (None, 1)
        and not args.xgblora_rank_schedule,
        f"--adapter {args.adapter} with --trainer {args.trainer} needs --lora, --xgblora or --prefix_tuning": (
            args.adapter and trains and not adapters
        ),
    }  # fmt: skip
    for message, broken in needs.items():
        if broken:
            raise UsageError(message)
    if args.device_map:
        load_model.read_device_map(args.device_map)
    if not args.eos_token:
        raise UsageError("--eos_token is empty: an answer has to end somewhere")
    last = (args.train_set_seed or 0) + (args.num_train_sets or 1) - 1
    for name, value in (("seed", args.seed), ("train_set_seed", last)):
        if value >= 2**32:
            raise UsageError(f"--{name} is {value}, but must be below 2**32")
    for name, least in MINIMUM.items():
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value >= least):
            raise UsageError(f"--{name} is {value}, but must be at least {least}")
    if not 0 < args.top_p <= 1:
        raise UsageError(f"--top_p is {args.top_p}, but must be above 0 and at most 1")
    for name in ("zo_eps", "lora_alpha", "temperature"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"--{name} is {value}, but must be a positive number")
    if args.learning_rate is not None and not (math.isfinite(args.learning_rate) and args.learning_rate >= 0):
        raise UsageError(f"--learning_rate is {args.learning_rate}, but must be a number, 0 or more")


def validate_fsdp(args, ranks: int) -> None:
    """Raise UsageError for choices that do not go with weights divided among so many ranks (`--fsdp`)."""
    if not args.fsdp:
        return
    excluded = {
        f"--load_int{args.bits}": args.bits,
        "--deepspeed": args.deepspeed,
        "--save_merged": args.save_merged,
        "--linear_probing": args.linear_probing,
        f"--optim {args.optim} (adamw_torch and sgd do)": not args.optim.startswith(("adamw_torch", "sgd")),
        "--fsdp_config (nothing reads it)": args.fsdp_config,
    }
    words = {*str(args.fsdp).lower().split()}  # the flag alone says "true"
    problems = {f"and {flag} exclude each other": given for flag, given in excluded.items()} | {
        f"{args.fsdp}: there is full_shard, with or without auto_wrap": words - {"full_shard", "auto_wrap", "true"},
        "needs --trainer regular (a model that outgrows a device: --device_map)": args.trainer != "regular",
        "divides the weights among ranks: start with torchrun": ranks == 1,
    }
    for problem, there in problems.items():
        if there:
            raise UsageError(f"--fsdp {problem}")


def validate_task(args, task) -> None:
    """Raise UsageError for choices that this task has no use for; `--non_diff` becomes the objective of its kind."""
    if task.kind != OPTIONS:
        for flag in ("train_as_classification", "sfc", "icl_sfc"):
            if getattr(args, flag):
                raise UsageError(f"--{flag} is for tasks with candidates, but {task.name} has none")
    if task.kind == TEXT and args.trainer == "none" and args.num_train:
        raise UsageError(f"--num_train: {task.name} is evaluated without demonstrations")
    if args.objective == "auto":
        args.objective = "accuracy" if task.kind == OPTIONS else "f1"
    fits = {"accuracy": (OPTIONS,), "f1": (GENERATION,), "em": (GENERATION,)}
    if args.objective and task.kind not in fits.get(args.objective, (OPTIONS, GENERATION)):
        raise UsageError(f"--objective {args.objective} is not for {task.name}, whose metric is {task.metric_name}")
    best = (args.metric_for_best_model or "loss").removeprefix("eval_")
    known = [m for m in METRICS[task.kind] if m != "macro_f1" or m == task.metric_name]
    if args.trainer != "none" and args.metric_for_best_model and best not in known:
        raise UsageError(f"--metric_for_best_model {best}: {task.name} has {', '.join(known)}")
    if args.linear_probing:  # a probe has one output an option
        some = task.samples["train"]
        options = {tuple(map(str, some[i].candidates or ())) for i in range(min(len(some), 50))}
        if task.kind != OPTIONS or len(options) > 1:
            raise UsageError(f"--linear_probing needs the same options in every row, which {task.name} has not")


def validate_prefix(args) -> None:
    """Raise UsageError for choices that a saved prefix (`--adapter`) has no use for."""
    for flag in ("lora", "xgblora", "boosters", "staged", "export_rank", "save_merged", "xgblora_ensemble"):
        if getattr(args, flag) not in (None, False, 0):
            raise UsageError(f"--{flag} is for LoRA adapters, but --adapter {args.adapter} is a prefix")
    if args.trainer != "none" and not args.prefix_tuning:
        raise UsageError(f"--adapter {args.adapter} is a prefix: --trainer {args.trainer} goes on with --prefix_tuning")
