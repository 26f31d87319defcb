"""One training: a model, its batches and its loss put together, and run to the end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from src.data.store import Example
from src.errors import ConfigError
from src.model import methods, packed_attention
from src.model.adapters import as_trained
from src.schema import TrainConfig
from src.train import adalora, checkpoint
from src.train.callbacks import PlainProgressBar, RunRecorder
from src.train.collate_tasks import COLLATORS
from src.train.collators import PackedCollator, PaddingCollator, TokenDataset
from src.train.launch_plan import WEIGHT_SHARDING
from src.train.losses import Criterion, class_weights
from src.train.objective import Objective
from src.train.signals import StopRequest
from src.train.trainer import AssayTrainer, RowLocator
from src.train.training_args import Schedule, build_batch_sampler, build_training_arguments
from src.utils import environment
from src.utils.logs import log
from src.utils.process_info import process_info

CPU_SHAPE_MULTIPLE = 64


class BatchStrategy(NamedTuple):
    """How a model's batches are made, and what their loss is."""

    collate: Any
    objective: Objective

    @classmethod
    def of(cls, model: Any, tokenizer: Any, cfg: TrainConfig, dtype: str) -> BatchStrategy:
        """Raises: ConfigError if the model cannot take such batches, or has no such classes to weigh."""
        end_to_end = can_pack(model, cfg)
        objective = Objective(
            model, build_criterion(model, tokenizer, cfg), dtype, end_to_end,
            fused=cfg.distributed not in WEIGHT_SHARDING, noise=cfg.neftune_noise_alpha,
        )  # fmt: skip
        if cfg.task == "causal_lm":
            return cls(causal_lm_collator(tokenizer, end_to_end), objective)
        return cls(COLLATORS[cfg.task](tokenizer, model), objective)


def fit(
    model: Any, tokenizer: Any, examples: Sequence[Example], held_out: Sequence[Example], cfg: TrainConfig,
    dtype: str, recorder: RunRecorder, folder: Path, where: RowLocator, start: Path | None = None,
    way: BatchStrategy | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor] | None]:  # fmt: skip
    """Train `model` in place, from the checkpoint `start` on if there is one; checkpoints go to `folder`.

    Returns: the final figures: loss, steps, seconds, tokens; and the whole weights, where `model` holds a part.
    Raises: Stopped after a checkpoint, if a signal asked for it; DivergedError; OutOfMemory.
    """
    way = way or BatchStrategy.of(model, tokenizer, cfg, dtype)
    now = process_info()
    batches = build_batch_sampler(examples, cfg, now)
    schedule = Schedule.of(len(batches), cfg)
    _set_numerics(cfg)
    with StopRequest(recorder.run.path, several=now.world_size > 1) as asked:
        loop = AssayTrainer(
            model=model,
            args=build_training_arguments(cfg, dtype, schedule, bool(held_out), folder),
            train_dataset=TokenDataset(examples),
            eval_dataset=TokenDataset(held_out) if held_out else None,
            collate=way.collate,
            processing_class=tokenizer,
            batches=batches,
            held_out=held_out,
            objective=way.objective,
            asked=asked,
            recorder=recorder,
            where=where,
            spread=cfg.distributed,
        )
        loop.remove_callback(ProgressCallback)
        loop.remove_callback(PrinterCallback)
        if now.is_main and sys.stderr.isatty():
            loop.add_callback(PlainProgressBar)
        recorder.prepare(asked, cfg, bool(held_out), start)
        for callback in adalora.callbacks(model):
            loop.add_callback(callback)
        if now.rank:  # the others draw noise of their own, for their rows; every process has made the same weights
            set_seed(cfg.seed + now.rank)
        with closing(recorder), loop.objective.attention(model), as_trained(model, dtype, use_custom_kernels(cfg)):
            _train(loop, start, schedule.steps)
    asked.refuse_if_stopped(loop.state.global_step, schedule.steps)
    if cfg.load_best_model_at_end and loop.state.best_global_step:
        log.info("the best weights are those of step %d", loop.state.best_global_step)
        loop.take_weights(folder / f"checkpoint-{loop.state.best_global_step}")
    return recorder.figures(loop.state, cfg.load_best_model_at_end), loop.whole_weights()


def _train(loop: AssayTrainer, start: Path | None, steps: int) -> None:
    """Train from `start` to the end; where that is the end already, only its weights are taken."""
    if start is not None:
        state = TrainerState.load_from_json(str(start / checkpoint.STATE))
        if state.global_step >= steps or loop.recorder.patience_is_out(state):
            loop.state = state
            loop.take_weights(start)
            return
    loop.train(resume_from_checkpoint=str(start) if start else None)


def can_pack(model: Any, cfg: TrainConfig) -> bool:
    """Whether batches are rows laid end to end; why not is said.

    Raises: ConfigError if `packing` is asked of a model that cannot take them.
    """
    reason: str | None = "padding_free=false"
    if cfg.task != "causal_lm":
        reason = f"task={cfg.task} has no rows that go on"
    elif cfg.padding_free:
        reason = methods.why_padded(cfg.method) or packed_attention.why_not(model)
    if reason and cfg.packing:
        raise ConfigError(f"packing=true needs rows laid end to end: {reason}", hint="set packing=false")
    if reason:
        log.info("batches are padded: %s", reason)
    return reason is None


def causal_lm_collator(tokenizer: Any, end_to_end: bool) -> PackedCollator | PaddingCollator:
    """What makes a batch of rows.

    On a CPU shapes are rounded up: oneDNN compiles, and keeps, its bfloat16 kernels anew for each one.
    """
    if not end_to_end:
        return PaddingCollator(tokenizer.pad_token_id)
    return PackedCollator(multiple=1 if torch.cuda.is_available() else CPU_SHAPE_MULTIPLE)


def use_custom_kernels(cfg: TrainConfig) -> bool:
    """Whether a layer's weights are where it is, and what it computes is not torch.compile's to put together."""
    return cfg.distributed not in WEIGHT_SHARDING and not cfg.torch_compile


def build_criterion(model: Any, tokenizer: Any, cfg: TrainConfig) -> Criterion:
    """The loss asked for. Raises: ConfigError if `class_weights` names what is not one class."""

    labels: dict[str, int] = model.config.label2id if cfg.task == "classification" else {}

    def ids(name: str) -> list[int]:
        if labels:
            return [labels[name]] if name in labels else []
        return list(tokenizer(name, add_special_tokens=False)["input_ids"])

    classes = len(labels) or model.get_output_embeddings().weight.shape[0]
    return Criterion(cfg, class_weights(cfg, classes, ids))


def _set_numerics(cfg: TrainConfig) -> None:
    """Set torch as `deterministic` and `tf32` ask."""
    torch.use_deterministic_algorithms(cfg.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads it, and filling takes time
    tf32 = environment.choose_tf32(cfg.tf32, cfg.cuda_visible_devices).value == "on"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
