"""The arguments in `trainer` and `lr_scheduler_kwargs`: which are passed on, and why the others are refused.

Every argument of transformers.TrainingArguments is in one of OWNED, UNUSED and PASSED_ON. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from pydantic import AllowInfNan

from ..config import expected, fits
from ..errors import ConfigError
from ..model import methods
from ..stages import METRICS, import_function
from ..utils.signatures import PASSTHROUGH, check_arguments, class_arguments

# Arguments that a setting of ours determines: of two values for one thing, one would be ignored.
OWNED = {
    "output_dir": "output_dir",
    "num_train_epochs": "epochs",
    "max_steps": "max_steps",
    "per_device_train_batch_size": "batch_size",
    "auto_find_batch_size": "batch_size; the stage plan says what fits",
    "learning_rate": "lr",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "warmup_steps": "warmup_ratio",
    "optim": "optim",
    "weight_decay": "weight_decay",
    "adam_beta1": "adam_beta1",
    "adam_beta2": "adam_beta2",
    "adam_epsilon": "adam_epsilon",
    "lr_scheduler_type": "lr_scheduler_type",
    "lr_scheduler_kwargs": "lr_scheduler_kwargs",
    "max_grad_norm": "max_grad_norm",
    "label_smoothing_factor": "label_smoothing_factor",
    "neftune_noise_alpha": "neftune_noise_alpha",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "bf16": "bf16",
    "bf16_full_eval": "bf16",
    "fp16": "bf16=false",
    "fp16_full_eval": "bf16=false",
    "tf32": "tf32",
    "torch_compile": "torch_compile",
    "use_liger_kernel": "use_liger_kernel",
    "liger_kernel_config": "use_liger_kernel",
    "full_determinism": "deterministic",
    "use_cpu": 'cuda_visible_devices=""',
    "seed": "seed",
    "data_seed": "seed",
    "run_name": "run_name",
    "logging_steps": "logging_steps",
    "logging_strategy": "logging_steps",
    "eval_strategy": "eval_steps",
    "eval_steps": "eval_steps",
    "save_strategy": "save_steps",
    "save_steps": "save_steps",
    "save_total_limit": "save_total_limit",
    "load_best_model_at_end": "load_best_model_at_end",
    "resume_from_checkpoint": "resume",
    "report_to": "report_to; TensorBoard is always on",
    "deepspeed": "distributed=zero2 or distributed=zero3",
    "fsdp": "distributed=fsdp2",
    "fsdp_config": "distributed=fsdp2",
    "parallelism_config": "distributed",
    "local_rank": "num_processes, num_nodes and node_rank",
    "push_to_hub": "publish-hf",
    "hub_model_id": "publish-hf",
    "hub_strategy": "publish-hf",
    "hub_private_repo": "publish-hf",
    "hub_always_push": "publish-hf",
    "hub_revision": "publish-hf",
    "hub_token": "the environment variable HF_TOKEN",
    "do_train": "the command train",
    "do_eval": "the command eval",
    "do_predict": "the command eval",
}

# Arguments that would do nothing, or would break what this project promises; each with the reason.
_BATCHES = "batch_size, packing and padding_free make the batches, and no row is dropped"
_FIXED_ORDER = "the seed alone determines the batches and their order"
_EVAL_LOSS = "the evaluation loss is always the mean over all labels of dev_split"
_BEST = "the best model is the one of the lowest evaluation loss"
_COMPLETE = "a checkpoint always holds all that an exact resume needs"
_SIGNAL = "a signal saves a checkpoint already"
_ONE_DISK = "the machines of a run share output_dir"
_FINITE = "a loss, a gradient or a weight that is not finite ends the run"
_LABELS = "the loss is always the mean over all labels of a step, on all devices"
_OTHER_OPTIMIZERS = "no optimizer of the setting optim reads it"
_PROCESSES = "the processes are connected before the Trainer starts"
_TRACKIO = "report_to has no trackio"
_NO_CACHE = "training never caches keys and values"
_BAR = "a terminal shows a bar, and a file does not"
_SPEED = "the log and metrics.json hold speed and tokens"
UNUSED = {
    "dataloader_drop_last": _BATCHES,
    "remove_unused_columns": _BATCHES,
    "length_column_name": _BATCHES,
    "accelerator_config": _BATCHES,
    "train_sampling_strategy": _FIXED_ORDER,
    "dataloader_in_order": _FIXED_ORDER,
    "dataloader_multiprocessing_context": "workers are forked, since they share the tokens",
    "ignore_data_skip": _FIXED_ORDER,
    "average_tokens_across_devices": _LABELS,
    "label_names": _EVAL_LOSS,
    "prediction_loss_only": _EVAL_LOSS,
    "include_for_metrics": _EVAL_LOSS,
    "batch_eval_metrics": _EVAL_LOSS,
    "eval_do_concat_batches": _EVAL_LOSS,
    "eval_use_gather_object": _EVAL_LOSS,
    "eval_accumulation_steps": _EVAL_LOSS,
    "eval_on_start": "evaluations follow steps: see eval_steps and eval_epochs",
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "save_only_model": _COMPLETE,
    "restore_callback_states_from_checkpoint": _COMPLETE,
    "enable_jit_checkpoint": _SIGNAL,
    "save_on_each_node": _ONE_DISK,
    "debug": _FINITE,
    "logging_nan_inf_filter": _FINITE,
    "optim_target_modules": _OTHER_OPTIMIZERS,
    "ddp_backend": _PROCESSES,
    "ddp_timeout": _PROCESSES,
    "project": _TRACKIO,
    "trackio_space_id": _TRACKIO,
    "trackio_bucket_id": _TRACKIO,
    "trackio_static_space_id": _TRACKIO,
    "use_cache": _NO_CACHE,
    "disable_tqdm": _BAR,
    "include_num_input_tokens_seen": _SPEED,
    "skip_memory_metrics": _SPEED,
}

# Arguments that take effect, with their type.
MAX_WORKERS = 256  # each is a process
LogLevel = Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]
Count = Annotated[int, Ge(1), Le(2**31 - 1)]
Positive = Annotated[float, Gt(0), AllowInfNan(False)]
NotNegative = Annotated[float, Ge(0), AllowInfNan(False)]
Fraction = Annotated[float, Ge(0), Le(1)]
Reentrant = dict[Literal["use_reentrant"], bool]
PASSED_ON: dict[str, Any] = {
    "per_device_eval_batch_size": Count,
    "optim_args": str,
    "activation_checkpointing_kwargs": Reentrant,
    "gradient_checkpointing_kwargs": Reentrant,
    "torch_compile_backend": Literal["inductor", "eager", "aot_eager", "cudagraphs"],
    "torch_compile_mode": Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
    "torch_empty_cache_steps": Count,
    "logging_first_step": bool,
    "log_level": LogLevel,
    "log_level_replica": LogLevel,
    "log_on_each_node": bool,
    "eval_delay": NotNegative,
    "dataloader_num_workers": Annotated[int, Ge(0), Le(MAX_WORKERS)],
    "dataloader_prefetch_factor": Count,
    "dataloader_persistent_workers": bool,
    "dataloader_pin_memory": bool,
    "ddp_find_unused_parameters": bool,
    "ddp_bucket_cap_mb": Count,
    "ddp_broadcast_buffers": bool,
    "ddp_static_graph": bool,
}
# What some of them need beside them: a setting with its values.
_WORKERS = ("trainer.dataloader_num_workers", "1 or more", lambda value: bool(value))
_COMPILED = ("torch_compile", "true", lambda value: value is True)
_RECOMPUTED = ("gradient_checkpointing", "true or auto", lambda value: value is not False)
NEEDED: dict[str, tuple[str, str, Any]] = {
    "dataloader_prefetch_factor": _WORKERS,
    "dataloader_persistent_workers": _WORKERS,
    "torch_compile_backend": _COMPILED,
    "torch_compile_mode": _COMPILED,
    "activation_checkpointing_kwargs": _RECOMPUTED,
    "gradient_checkpointing_kwargs": _RECOMPUTED,
    "optim_args": ("optim", "sgd, whose momentum it sets", lambda value: value == "sgd"),
}
OPTIM_ARGS = re.compile(r"momentum=0?\.\d*[1-9]\d*(, ?nesterov=(true|false))?")

BITSANDBYTES_OPTIMIZERS = frozenset({
    "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_32bit", "lion_8bit", "paged_lion_8bit",
})  # fmt: skip

# The arguments of each schedule of the learning rate, with their types; those of NEEDS_ONE need exactly one.
_CYCLES = {"num_cycles": Positive}
_SHAPE = Literal["linear", "cosine", "1-sqrt"]
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "constant": {},
    "constant_with_warmup": {},
    "cosine": _CYCLES,
    "cosine_with_restarts": {"num_cycles": Count},
    "cosine_with_min_lr": _CYCLES | {"min_lr": NotNegative, "min_lr_rate": Fraction},
    "polynomial": {"lr_end": NotNegative, "power": Positive},
    "inverse_sqrt": {"timescale": Count},
    "warmup_stable_decay": _CYCLES | {
        "num_decay_steps": Count, "num_stable_steps": Annotated[int, Ge(0)], "min_lr_ratio": Fraction,
        "warmup_type": _SHAPE, "decay_type": _SHAPE,
    },
}  # fmt: skip
NEEDS_ONE = {
    "cosine_with_min_lr": (("min_lr", "min_lr_rate"), "{min_lr_rate: 0.1}"),
    "warmup_stable_decay": (("num_decay_steps",), "{num_decay_steps: 100}"),
}


def problems(values: Mapping[str, Any]) -> list[str]:
    """The contradictions in composed training settings that the schema does not know, one message each."""
    return [*methods.problems(values), *_trainer_problems(values), *_schedule_problems(values),
            *_metric_problems(values)]  # fmt: skip


def check_packages(method: str, optim: str) -> None:
    """Raises: ConfigError if a package that the method or the optimizer needs is not installed."""
    needed = {
        f"method={method}": methods.METHODS[method].four_bit,
        f"optim={optim}": optim in BITSANDBYTES_OPTIMIZERS,
    }
    missing = [setting for setting, needs in needed.items() if needs and not find_spec("bitsandbytes")]
    if missing:
        problems = [f"{setting} needs bitsandbytes, which is not installed" for setting in missing]
        raise ConfigError(*problems, hint="make install installs it")


def _metric_problems(values: Mapping[str, Any]) -> list[str]:
    """Metrics that do not exist: otherwise only the evaluation after the training would find them."""
    gate, given = values.get("gate") or {}, values.get("metrics") or []
    gate = gate if isinstance(gate, Mapping) else {}
    guards = gate.get("guards") or []
    named = {
        "metrics": given if isinstance(given, list) else [],
        "gate.metric": [gate.get("metric")],
        "gate.guards": [guard.get("metric") for guard in guards if isinstance(guard, Mapping)],
    }
    texts = {key: [name for name in names if isinstance(name, str)] for key, names in named.items()}
    if not any(texts.values()):
        return []
    unknown = import_function(METRICS)  # imports NumPy and sacreBLEU
    return [problem for key, names in texts.items() for problem in unknown(key, names)]


def _trainer_problems(values: Mapping[str, Any]) -> list[str]:
    given = values.get("trainer")
    if not isinstance(given, Mapping) or not given:
        return []  # the schema reports a wrong type
    target = PASSTHROUGH["trainer"]
    found = check_arguments("trainer", given, target.cls, class_arguments(target), OWNED)
    found += [f"trainer.{name} is not supported: {UNUSED[name]}" for name in given if name in UNUSED]
    found += _wrong_values("trainer", given, PASSED_ON)
    beside = {**values, **{f"trainer.{name}": value for name, value in given.items()}}
    for name, (setting, wanted, holds) in NEEDED.items():
        if name in given and not holds(beside.get(setting)):
            found.append(f"trainer.{name} needs {setting}={wanted}")
    text = given.get("optim_args")
    if isinstance(text, str) and not OPTIM_ARGS.fullmatch(text):
        found.append(f"trainer.optim_args={text}: should be momentum=0.9, or momentum=0.9,nesterov=true")
    return found


def _schedule_problems(values: Mapping[str, Any]) -> list[str]:
    name, given = values.get("lr_scheduler_type"), values.get("lr_scheduler_kwargs") or {}
    known = SCHEDULES.get(str(name))
    if known is None or not isinstance(given, Mapping):
        return []
    takes = f"takes {', '.join(known)}" if known else "takes none"
    found = [f"lr_scheduler_kwargs.{key}: lr_scheduler_type={name} {takes}" for key in given if key not in known]
    found += _wrong_values("lr_scheduler_kwargs", given, known)
    found += [
        f"lr_scheduler_kwargs.{key}={given[key]}: should be less than lr={values.get('lr')}"
        for key in ("lr_end", "min_lr")
        if key in known
        and _is_number(given.get(key))
        and _is_number(values.get("lr"))
        and given[key] >= values["lr"]
    ]
    needed, example = NEEDS_ONE.get(str(name), ((), ""))
    if needed and sum(given.get(key) is not None for key in needed) != 1:
        found.append(
            f"lr_scheduler_type={name} needs {' or '.join(needed)}, such as lr_scheduler_kwargs={example}"
        )
    return found


def _is_number(value: Any) -> bool:
    return fits(value, float)


def _wrong_values(key: str, given: Mapping[str, Any], types: Mapping[str, Any]) -> list[str]:
    words = {Reentrant: "{use_reentrant: true} or {use_reentrant: false}"}
    return [
        f"{key}.{name}={value}: should be {words.get(types[name]) or expected(types[name])}"
        for name, value in given.items()
        if name in types and not fits(value, types[name])
    ]
