"""Which flags of the library's `TrainingArguments` this program takes, and what takes the place of others.

A flag is supported only where a test shows what it does with our trainer (tests/test_flags.py). Every other
flag is refused by name: the library would take it without a word, even where it does nothing or does harm.
"""

# Optimizers of `--optim` that a test runs.
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adamw_bnb_8bit", "sgd", "adafactor", "adagrad", "rmsprop")

# flag -> (group in `--help all`, what it does here)
DESCRIPTIONS: dict[str, tuple[str, str]] = {
    "output_dir": (
        "training",
        "checkpoints, trajectory and trained model go here (default: result/<task>-<model>-…)",
    ),
    "per_device_train_batch_size": ("training", "rows that a rank takes at a time"),
    "gradient_accumulation_steps": ("training", "batches of a step"),
    "max_steps": ("training", "length of the run in steps; -1: --num_train_epochs says it"),
    "num_train_epochs": ("training", "length of the run in passes over the training rows"),
    "seed": ("training", "of directions, adapters, order of the rows, and the draw of the training set"),
    "data_seed": ("training", "another seed for the order of the rows (default: --seed)"),
    "weight_decay": ("training", "decay of the matrices in full fine-tuning"),
    "warmup_steps": (
        "training",
        "steps in which the learning rate rises from 0; below 1: their share of the run",
    ),
    "lr_scheduler_kwargs": (
        "training",
        'JSON, what a schedule needs: {"min_lr": 1e-5} of cosine_with_min_lr',
    ),
    "dataloader_num_workers": ("training", "processes that prepare batches"),
    "dataloader_drop_last": ("training", "leave out the last batch of an epoch where it is short"),
    "optim": ("back-propagation", f"optimizer of --trainer regular: {', '.join(OPTIMIZERS)}"),
    "optim_args": ("back-propagation", "of --optim sgd, adagrad and rmsprop: momentum=0.9,nesterov=true"),
    "adam_beta1": ("back-propagation", "decay of AdamW's mean of gradients"),
    "adam_beta2": ("back-propagation", "decay of AdamW's mean of squared gradients"),
    "adam_epsilon": ("back-propagation", "number that AdamW adds to the root of that mean"),
    "gradient_checkpointing": ("back-propagation", "compute activations twice instead of storing them"),
    "fsdp": (
        "back-propagation",
        "under torchrun: divide weights, gradients and optimizer state among the ranks",
    ),
    "eval_strategy": ("evaluation and checkpoints", "evaluate the dev rows: no, steps or epoch"),
    "eval_steps": ("evaluation and checkpoints", "evaluate every n steps (default: --logging_steps)"),
    "eval_on_start": ("evaluation and checkpoints", "evaluate before the first step too"),
    "save_strategy": ("evaluation and checkpoints", "write a checkpoint: no, steps, epoch or best"),
    "save_steps": ("evaluation and checkpoints", "write a checkpoint every n steps"),
    "save_total_limit": ("evaluation and checkpoints", "keep the newest n checkpoints, and the best one"),
    "load_best_model_at_end": (
        "evaluation and checkpoints",
        "the result is the best checkpoint, not the last one",
    ),
    "metric_for_best_model": (
        "evaluation and checkpoints",
        "metric that chooses the best checkpoint (default: the task's)",
    ),
    "logging_strategy": ("log", "write a line of loss and learning rate: no, steps or epoch"),
    "logging_steps": ("log", "write one every n steps; below 1: a share of the run"),
    "logging_first_step": ("log", "write one after the first step too"),
    "log_level": ("log", "of the library's messages: debug, info, warning, error (passive: as it is)"),
    "disable_tqdm": ("log", "no progress bars"),
    "report_to": ("log", "also send the log to tensorboard, wandb, …, where its package is installed"),
    "run_name": ("log", "name of the run in `--report_to`"),
    "bf16": (
        "machine",
        "autocast to bfloat16 beside float32 weights (weights in half the memory: --load_bfloat16)",
    ),
    "use_cpu": ("machine", "stay on the CPU where there is a GPU"),
}
SUPPORTED: tuple[str, ...] = tuple(DESCRIPTIONS)

_EVALUATION = "evaluation packs rows by a token budget"
_UPLOAD = "--save_model writes OUTPUT_DIR, then `hf upload`"
_GRADIENTS = "ranks exchange losses or sum gradients themselves, DistributedDataParallel is not used"
_TRACKIO = "set the environment variables of trackio"
_COMPILE = "torch.compile can't follow perturbed weights; --load_bfloat16 is the fast choice"
_WORKERS = "--dataloader_num_workers is all there is to choose"
# flag -> what to use in its place, or why there is nothing
REFUSED: dict[str, str] = {
    "activation_checkpointing": "--gradient_checkpointing",
    "activation_checkpointing_kwargs": "--gradient_checkpointing takes no settings",
    "gradient_checkpointing_kwargs": "--gradient_checkpointing takes no settings",
    "accelerator_config": "--per_device_train_batch_size, --gradient_accumulation_steps, torchrun",
    "auto_find_batch_size": "the estimate of memory before a run says which batch fits",
    "average_tokens_across_devices": "the loss of a batch is the same for any number of ranks",
    "batch_eval_metrics": _EVALUATION,
    "bf16_full_eval": "it would change nothing, load the weights with --load_bfloat16",
    "dataloader_in_order": _WORKERS,
    "dataloader_multiprocessing_context": _WORKERS,
    "dataloader_persistent_workers": _WORKERS,
    "dataloader_pin_memory": "memory is pinned where there is a GPU",
    "dataloader_prefetch_factor": _WORKERS,
    "ddp_backend": "gloo carries numbers, with --fsdp nccl carries tensors",
    "ddp_broadcast_buffers": _GRADIENTS,
    "ddp_bucket_cap_mb": _GRADIENTS,
    "ddp_find_unused_parameters": _GRADIENTS,
    "ddp_static_graph": _GRADIENTS,
    "debug": "--zo_check, or torch.autograd.set_detect_anomaly in your own loop",
    "deepspeed": "--fsdp divides weights among ranks, --device_map spreads them over devices",
    "do_eval": "--eval_strategy evaluates in training, and the end of a run evaluates unless --no_eval",
    "do_predict": "--predictions FILE",
    "do_train": "--trainer zo or --trainer regular",
    "enable_jit_checkpoint": "--save_on_interrupt",
    "eval_accumulation_steps": _EVALUATION,
    "eval_delay": "--eval_steps",
    "eval_do_concat_batches": _EVALUATION,
    "eval_use_gather_object": _EVALUATION,
    "fp16": "load float16 weights with --load_float16, or autocast with --bf16",
    "fp16_full_eval": "it would change nothing, load the weights with --load_float16",
    "fsdp_config": "nothing reads it, --fsdp is full_shard",
    "full_determinism": "runs on one kind of machine repeat already, by --seed and --data_seed",
    "greater_is_better": "it follows from --metric_for_best_model",
    "hub_always_push": _UPLOAD,
    "hub_model_id": _UPLOAD,
    "hub_private_repo": _UPLOAD,
    "hub_revision": _UPLOAD,
    "hub_strategy": _UPLOAD,
    "hub_token": "`hf auth login`",
    "ignore_data_skip": "a run that goes on takes the rows that an undisturbed one would take",
    "include_for_metrics": "--metric, --objective file.py:name",
    "include_num_input_tokens_seen": "the result file counts forward passes and seconds",
    "label_names": "--label_column",
    "label_smoothing_factor": "the loss is ours, --train_as_classification is the choice there is",
    "length_column_name": _EVALUATION,
    "liger_kernel_config": "logits are computed only where they are read",
    "local_rank": "torchrun sets LOCAL_RANK",
    "log_level_replica": "rank 0 alone writes a log",
    "log_on_each_node": "rank 0 alone writes a log",
    "logging_nan_inf_filter": "under zo a NaN loss is skipped and counted in skipped_steps",
    "neftune_noise_alpha": "there is nothing in its place",
    "optim_target_modules": "--lora_targets, and an --optim that needs none",
    "parallelism_config": "torchrun, --fsdp, --zo_parallel or --device_map",
    "per_device_eval_batch_size": _EVALUATION,
    "prediction_loss_only": "--metric loss chooses by it",
    "project": _TRACKIO,
    "push_to_hub": _UPLOAD,
    "remove_unused_columns": "rows are read by the task's columns",
    "restore_callback_states_from_checkpoint": "a run goes on with all of its state",
    "resume_from_checkpoint": "it is not needed, the same command goes on by itself",
    "save_on_each_node": "nodes share --output_dir, rank 0 alone writes",
    "save_only_model": "nothing could go on from it, --save_model writes the result",
    "skip_memory_metrics": "the result file has the peak of memory and its estimate",
    "tf32": "--load_bfloat16",
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "torch_empty_cache_steps": "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment",
    "trackio_bucket_id": _TRACKIO,
    "trackio_space_id": _TRACKIO,
    "trackio_static_space_id": _TRACKIO,
    "train_sampling_strategy": "rows are shuffled by --data_seed, packed rows have no padding",
    "use_cache": "the program decides, scoring and generation use a cache where it helps",
    "use_liger_kernel": "logits are computed only where they are read",
}

# Refused flags whose fields the program or the library sets: the value does not tell what was asked for.
DERIVED = (
    "accelerator_config", "activation_checkpointing", "dataloader_pin_memory", "debug", "do_eval",
    "logging_nan_inf_filter", "remove_unused_columns",
)  # fmt: skip


def refused_values(args) -> list[str]:
    """Return a message for each refused field that Python code, not a command line, gave a value.

    Args:
        args: a `TrainingArguments` before its `__post_init__` has run.
    """
    messages = []
    for name, hint in REFUSED.items():
        field = type(args).__dataclass_fields__[name]
        default = field.default_factory() if callable(field.default_factory) else field.default
        if name not in DERIVED and getattr(args, name) != default:
            messages.append(f"--{name} is not supported: {hint}")
    return messages
