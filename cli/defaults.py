"""Defaults that depend on other choices, recipes, warnings, and the choices that identify a run."""

import math

from machine.resources import cpu_has_bf16

SEARCHED_SCALING = 16  # alpha / rank that the entries of DEFAULTS with B alone belong to
SEARCHED_STEPS = 1500  # steps up to which the rates of normalised steps were searched
# (trainer, mode, --zo_normalize, --lora_freeze_a) -> (learning rate, eps). Full, prefix and LoRA as published
# (MeZO, Table 15). XGBLoRA and the last two switches: searched on the starter model at alpha/r = 16
# (bench/RESULTS.md).
DEFAULTS = {
    ("zo", "ft", False, False): (1e-6, 1e-3),
    ("zo", "head", False, False): (1e-6, 1e-3),
    ("zo", "prefix", False, False): (1e-2, 1e-1),
    ("zo", "prefix", True, False): (None, 1e-1),  # nobody has searched for it
    ("zo", "lora", False, False): (5e-5, 1e-2),
    ("zo", "lora", False, True): (1e-3, 1e-2),
    ("zo", "lora", True, False): (1e-3, 1e-2),
    ("zo", "lora", True, True): (5e-3, 3e-2),
    ("zo", "xgblora", False, False): (3e-4, 1e-2),
    ("zo", "xgblora", False, True): (1e-3, 1e-2),
    ("zo", "xgblora", True, False): (1e-3, 1e-2),
    ("zo", "xgblora", True, True): (5e-3, 3e-2),
    ("regular", "ft", False, False): (1e-5, None),
    ("regular", "head", False, False): (1e-5, None),
    ("regular", "prefix", False, False): (1e-2, None),
    ("regular", "lora", False, False): (1e-3, None),
    ("regular", "xgblora", False, False): (1e-3, None),
}

# `--recipe NAME`: flags that take these values unless they are given (research/EXPERIMENTS.md says why).
RECIPES = {
    "fast": {
        "xgblora": True, "xgblora_steps_per_iteration": 25, "lora_freeze_a": True, "zo_normalize": True,
        "xgblora_layers": "top:half", "zo_cache_activations": True,
    },
    "atoms": {
        "lora": True, "lora_alpha": 1024, "zo_method": "ar1-zo", "zo_normalize": True, "learning_rate": 5e-4,
        "zo_eps": 2e-3,
    },
}  # fmt: skip


def scale_rate_by_length(rate: float, steps: int) -> float:
    """Return the rate of normalised steps in a run of `steps` steps (0 or less: the length is not known).

    A step has one length however small g has become, so that the noise of a run grows with Σ η². Beyond
    SEARCHED_STEPS the rate falls as 1/√steps, which keeps that sum (research/EXPERIMENTS.md).
    """
    return rate * min(1.0, math.sqrt(SEARCHED_STEPS / max(steps, 1)))


def default_rates(
    trainer: str,
    mode: str,
    normalize: bool,
    freeze_a: bool,
    scaling: float,
    upper_half: bool = False,
    steps: int = 0,
) -> tuple[float, float | None]:
    """Return the (learning rate, eps) of the table for these choices, (0, None) where there is no training.

    With B alone trained the model sees scaling · B A, so that both follow exactly from their values at
    another scaling. In the upper half of the layers the curvature is a seventh: there a normalised step may
    be twice as long.

    Args:
        trainer, mode, normalize, freeze_a: the key of the table.
        scaling: alpha / rank.
        upper_half: whether the upper half of the layers is adapted.
        steps: length of the run; 0 where it is not known.
    """
    zeroth_order = trainer == "zo"
    key = (trainer, mode, zeroth_order and normalize, zeroth_order and freeze_a)
    learning_rate, eps = DEFAULTS.get(key, (0.0, None))
    if zeroth_order and normalize and learning_rate:
        learning_rate = scale_rate_by_length(learning_rate, steps)
    if zeroth_order and freeze_a:
        ratio = SEARCHED_SCALING / scaling
        learning_rate *= 2 if upper_half and normalize else 1
        learning_rate *= ratio ** (1 if normalize else 2)
        eps *= ratio
    return learning_rate, eps


# (trainer, mode) -> (learning rates, eps) that were searched for the published numbers (MeZO, Table 15, OPT).
GRIDS = {
    ("zo", "ft"): ((1e-7, 1e-6), 1e-3),
    ("zo", "prefix"): ((1e-3, 1e-2), 1e-1),
    ("zo", "lora"): ((5e-5, 1e-4), 1e-2),
    ("regular", "ft"): ((1e-5, 8e-5), None),
}


# ---- the block of settings ----


def settings_block(args) -> dict[str, str]:
    """Return {name: value} of the settings that matter, as they took effect."""
    bits = f", {args.bits}-bit layers" if args.bits else ""
    placement = f", placed by {args.device_map}" if args.device_map else ""
    block = {
        "task": args.task_name,
        "model": f"{args.model_name} in {str(args.dtype).removeprefix('torch.')}{bits}{placement}",
        "mode": f"{args.mode}, trainer {args.trainer}, seed {args.seed}",
    }
    if args.trainer != "none":
        block |= training_block(args)
    if args.trainer == "zo":
        normalised = ", normalised" if args.zo_normalize else ""
        queries = f"{args.zo_queries} x {args.zo_distribution}"
        block["zeroth order"] = f"eps {args.zo_eps:g}, {args.zo_method}, {queries}{normalised}"
    if args.lora or args.xgblora:
        ranks = args.xgblora_rank_schedule or args.lora_r
        trained = ", B only" if args.lora_freeze_a else ""
        block["adapters"] = f"rank {ranks}, alpha {args.lora_alpha:g}{trained}, layers {args.xgblora_layers}"
    if args.xgblora and args.trainer != "none":
        steps = args.xgblora_steps_per_iteration
        period = f"{steps} steps" if steps else f"{args.xgblora_merge_frequency} epochs"
        replaced = " (--xgblora takes the place of --lora)" if args.lora else ""
        block["boosting"] = f"a booster every {period}{replaced}"
    if args.prefix_tuning:
        reparametrised = "" if args.no_reparam else ", reparametrised"
        block["prefix"] = f"{args.num_prefix} tokens{reparametrised}"
    return block


def training_block(args) -> dict[str, str]:
    """Return {name: value} of the settings that both trainers have."""
    accumulated = args.gradient_accumulation_steps
    batch = f"{args.train_batch_size}" + (f" x {accumulated}" if accumulated > 1 else "")
    batch += f", divided among {args.data_parallel_size} ranks" if args.data_parallel_size > 1 else ""
    batch += ", and so are the weights" if args.sharded else ""
    loss = "classification" if args.train_as_classification else "language modelling"
    return {
        "learning rate": f"{args.learning_rate:g} ({args.lr_scheduler_type.value})",
        "batch": batch,
        "length": f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs",
        "objective": args.objective or loss,
    }


# ---- warnings ----


def warnings(args) -> list[str]:
    """Return a line for each choice that looks like a mistake: a rate outside the grid, a slow dtype."""
    lines = rate_warnings(args)
    if args.trainer == "zo" and args.weight_decay and args.mode != "ft":
        lines.append(f"--weight_decay {args.weight_decay:g} is for full fine-tuning: adapters do not decay")
    if args.device.type == "cpu":
        lines += cpu_warnings(args)
    if args.trainer == "regular" and args.load_float16:
        lines.append(
            "gradients of float16 weights underflow: --load_bfloat16, or float32, trains more safely"
        )  # fmt: skip
    return lines


def rate_warnings(args) -> list[str]:
    """Return a line for learning rate and eps where they lie outside the published grid of their mode."""
    lines = []
    rates, eps = GRIDS.get((args.trainer, args.mode), (None, None))
    other_scaling = args.mode == "lora" and args.lora_alpha / args.lora_r != 2
    if args.zo_normalize or args.lora_freeze_a or other_scaling:
        rates = None  # published for plain steps, and for rank 8 with alpha 16
    if rates and not rates[0] <= args.learning_rate <= rates[1]:
        lines.append(
            f"--learning_rate {args.learning_rate:g} lies outside the published grid of mode {args.mode} "
            f"with --trainer {args.trainer}, {rates[0]:g} to {rates[1]:g}"
        )
    adapters = args.mode in ("lora", "xgblora")
    if rates and eps and args.zo_eps != eps:
        lines.append(f"--zo_eps {args.zo_eps:g}: mode {args.mode} is published with {eps:g}")
    elif args.trainer == "zo" and adapters and args.zo_eps <= 1e-3:
        eps_text = f"--zo_eps {args.zo_eps:g} is for full fine-tuning"
        lines.append(f"{eps_text}: with adapters 0.01 tells more from rounding")
    return lines


def cpu_warnings(args) -> list[str]:
    """Return a line where another dtype is the fast choice on this CPU."""
    bf16_is_fast = cpu_has_bf16()
    if args.load_float16:
        advice = "--load_bfloat16 is fast here" if bf16_is_fast else "leave it out"
        return [f"float16 is slow on a CPU: {advice}"]
    if bf16_is_fast and not args.load_bfloat16:
        return ["this CPU has bfloat16 in hardware: --load_bfloat16 is the fast choice here"]
    if args.load_bfloat16 and not bf16_is_fast:
        return ["this CPU has no bfloat16 in hardware: float32 (no --load_bfloat16) is the fast choice here"]
    return []


# ---- which flags identify a run ----

# Flags that a rerun may change and still be the same run: where and how often something is written or shown.
NOT_PART_OF_RUN_ID = {
    "output_dir", "result_file", "predictions", "tag", "verbose", "overwrite", "no_eval", "num_eval",
    "save_model", "save_merged", "zo_check", "replay", "replay_steps", "staged", "export_rank",
    "save_on_interrupt", "recipe", "device_map", "offload_folder", "no_auto_device", "logging_steps",
    "logging_strategy", "logging_first_step", "logging_nan_inf_filter", "log_level", "run_name",
    "log_level_replica", "log_on_each_node", "report_to", "disable_tqdm", "save_steps", "save_strategy",
    "save_total_limit", "save_on_each_node", "dataloader_num_workers", "dataloader_pin_memory", "use_cpu",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "model_name", "data_dir", "push_to_hub",
    "hub_model_id", "hub_token", "hub_strategy", "num_train_sets", "logging_dir", "do_eval", "zo_parallel",
    "rank_check_steps", "ddp_timeout", "ddp_backend", "local_rank",
}  # fmt: skip
# The settings that a replay has to share with its run: what the weights come from, and how a step moves them.
REPLAY_ID = {
    "model", "seed", "adapter", "boosters", "load_float16", "load_bfloat16", "load_int8", "load_int4",
    "prefix_tuning", "num_prefix", "no_reparam", "prefix_init_by_real_act", "head_tuning", "untie_emb",
    "lora", "lora_r", "lora_alpha", "lora_freeze_a", "lora_targets", "xgblora", "xgblora_ensemble",
    "xgblora_rank_schedule", "xgblora_layers", "xgblora_adaptive", "xgblora_best",
    "weight_decay", "zo_distribution", "zo_queries", "zo_optim", "zo_method",
}  # fmt: skip
