"""What a choice defaults to where that depends on other choices, and which choices make a run another run."""

# (trainer, mode, --zo_normalize, --lora_freeze_a) -> (learning rate, eps). Full and LoRA: published (MeZO, Table 15).
# XGBLoRA and the last two switches: found on the starter model at scaling alpha/r = 16 (bench/RESULTS.md).
SCALING = 16  # alpha / rank that the entries with B alone belong to
DEFAULTS = {
    ("zo", "ft", False, False): (1e-6, 1e-3),
    ("zo", "lora", False, False): (5e-5, 1e-2),
    ("zo", "lora", False, True): (1e-3, 1e-2),
    ("zo", "lora", True, False): (1e-3, 1e-2),
    ("zo", "lora", True, True): (5e-3, 3e-2),
    ("zo", "xgblora", False, False): (3e-4, 1e-2),
    ("zo", "xgblora", False, True): (1e-3, 1e-2),
    ("zo", "xgblora", True, False): (1e-3, 1e-2),
    ("zo", "xgblora", True, True): (5e-3, 3e-2),
    ("regular", "ft", False, False): (1e-5, None),
    ("regular", "lora", False, False): (1e-3, None),
    ("regular", "xgblora", False, False): (1e-3, None),
}

# `--recipe NAME`: flags that take these values where they have not been given (docs/EXPERIMENTS.md says why).
RECIPES = {
    "fast": {
        "xgblora": True, "xgblora_steps_per_iteration": 25, "lora_freeze_a": True, "zo_normalize": True,
        "xgblora_layers": "top:half", "zo_cache_activations": True,
    },
}  # fmt: skip


def published(trainer: str, mode: str, normalize: bool, freeze_a: bool, scaling: float) -> tuple[float, float | None]:
    """(learning rate, eps) of the table for these choices, (0, None) where there is no training.

    With B alone trained the model sees scaling · B A, so both follow exactly from their values at another scaling.
    """
    zo = trainer == "zo"
    learning_rate, eps = DEFAULTS.get((trainer, mode, zo and normalize, zo and freeze_a), (0.0, None))
    if zo and freeze_a:
        ratio = SCALING / scaling
        learning_rate, eps = learning_rate * ratio ** (1 if normalize else 2), eps * ratio
    return learning_rate, eps


# Flags that a rerun may change without becoming another run: where and how often something is written or shown.
INCIDENTAL = {
    "output_dir", "result_file", "predictions", "tag", "verbose", "overwrite", "no_eval", "num_eval", "save_model",
    "save_merged", "zo_check", "replay", "replay_steps", "staged", "export_rank",
    "save_on_interrupt", "recipe",
    "logging_steps", "logging_strategy", "logging_first_step", "logging_nan_inf_filter", "log_level", "run_name",
    "log_level_replica", "log_on_each_node", "report_to", "disable_tqdm", "save_steps", "save_strategy",
    "save_total_limit", "save_on_each_node", "dataloader_num_workers", "dataloader_pin_memory", "use_cpu",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "model_name", "data_dir", "data_seed",
    "push_to_hub", "hub_model_id", "hub_token", "hub_strategy", "num_train_sets", "logging_dir", "do_eval",
    "zo_parallel", "rank_check_steps", "ddp_timeout", "ddp_backend", "local_rank",
}  # fmt: skip
# The settings that a replay has to share with its run: what the weights come from, and how a step moves them.
REPLAYED = {
    "model", "seed", "lora", "lora_r", "lora_alpha", "lora_freeze_a", "lora_targets", "xgblora", "load_float16",
    "load_bfloat16", "adapter", "boosters", "weight_decay", "zo_distribution", "zo_queries", "zo_optim", "zo_method",
    "xgblora_ensemble", "xgblora_rank_schedule", "xgblora_layers", "xgblora_a_warmup", "xgblora_adaptive",
    "xgblora_best",
}  # fmt: skip
