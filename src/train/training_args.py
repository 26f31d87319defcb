"""Our settings in the Trainer's words: batches, steps and arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainingArguments

from src.data.store import Example
from src.errors import ConfigError
from src.schema import TrainConfig
from src.train import sharding
from src.train.batch_sampler import BatchSampler
from src.utils import environment
from src.utils.process_info import ProcessInfo

TRAINING_ARGUMENTS = {field.name for field in fields(TrainingArguments)}
# transformers has named it anew, and warns of the older name.
CHECKPOINTING = (
    "activation_checkpointing" if "activation_checkpointing" in TRAINING_ARGUMENTS else "gradient_checkpointing"
)


class Schedule(NamedTuple):
    """Optimizer steps of an epoch and of the whole training, on all devices together."""

    steps_an_epoch: int
    steps: int

    @classmethod
    def of(cls, batches: int, cfg: TrainConfig) -> Schedule:
        """From the number of batches that one device takes in an epoch."""
        an_epoch = max(1, math.ceil(batches / cfg.gradient_accumulation_steps))
        return cls(an_epoch, cfg.max_steps or math.ceil(cfg.epochs * an_epoch))


def build_batch_sampler(
    examples: Sequence[Example],
    cfg: TrainConfig,
    now: ProcessInfo = ProcessInfo(),  # noqa: B008
) -> BatchSampler:
    """The batches of one process, by itself unless it is told otherwise."""
    lengths = getattr(examples, "lengths", None)
    lengths = [len(e.ids) for e in examples] if lengths is None else lengths
    pack_to = cfg.max_length if cfg.packing else None
    return BatchSampler(lengths, cfg.batch_size, cfg.seed, pack_to=pack_to, rank=now.rank, world=now.world_size)


def build_training_arguments(
    cfg: TrainConfig, dtype: str, schedule: Schedule, evaluates: bool, folder: Path
) -> TrainingArguments:
    """Our settings in the Trainer's words; checkpoints go to `folder`.

    Raises: ConfigError if the Trainer refuses what `trainer: {...}` holds.
    """
    warmup = round(cfg.warmup_ratio * schedule.steps)
    kernels = environment.choose_kernels(cfg.use_liger_kernel, cfg.cuda_visible_devices).value
    scheduler = cfg.lr_scheduler_type
    ours: dict[str, Any] = dict(
        output_dir=str(folder),
        num_train_epochs=cfg.epochs,
        max_steps=schedule.steps,
        per_device_train_batch_size=cfg.batch_size,
        per_device_eval_batch_size=cfg.batch_size,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        learning_rate=cfg.lr,
        warmup_steps=warmup,
        weight_decay=cfg.weight_decay,
        adam_beta1=cfg.adam_beta1,
        adam_beta2=cfg.adam_beta2,
        adam_epsilon=cfg.adam_epsilon,
        optim=cfg.optim,
        # the Trainer's "constant" ignores a warm-up without a word
        lr_scheduler_type="constant_with_warmup" if scheduler == "constant" and warmup else scheduler,
        lr_scheduler_kwargs=cfg.lr_scheduler_kwargs,
        max_grad_norm=cfg.max_grad_norm,
        **{CHECKPOINTING: cfg.gradient_checkpointing is True},
        torch_compile=cfg.torch_compile,
        use_liger_kernel=kernels == "liger",
        liger_kernel_config={"fused_linear_cross_entropy": False, "cross_entropy": False},  # Objective's part
        fp16=dtype == "float16",  # bfloat16 needs no scaling of the loss: Objective casts by itself
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=cfg.logging_steps,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=cfg.eval_steps or max(1, round(cfg.eval_epochs * schedule.steps_an_epoch)),
        save_strategy="steps",
        save_steps=cfg.save_steps or schedule.steps_an_epoch,
        save_total_limit=cfg.save_total_limit,
        metric_for_best_model="eval_loss" if evaluates else None,
        greater_is_better=False,
        seed=cfg.seed,
        data_seed=cfg.seed,
        report_to=[r for r in cfg.report_to if r != "tensorboard"],
        include_num_input_tokens_seen="all",
        remove_unused_columns=False,
        prediction_loss_only=True,
        logging_nan_inf_filter=False,  # a loss that is no number would be logged as 0
    )
    try:
        return TrainingArguments(**(ours | sharding.engine_arguments(cfg, dtype) | cfg.trainer))
    except (ValueError, TypeError) as error:
        if not cfg.trainer and not cfg.lr_scheduler_kwargs:
            raise
        raise ConfigError(f"trainer={cfg.trainer}: {error}", hint="see transformers.TrainingArguments") from error
