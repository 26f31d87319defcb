"""The training loop: transformers' Trainer, given our rows, our batches and our record."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from src.config import TrainConfig
from src.data.rows import IGNORED, Example
from src.errors import ConfigError
from src.model.adapters import without_input_casts
from src.runs import Run
from src.train import adalora
from src.train.callbacks import Bar, RunRecorder


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Tokenised rows as the Trainer indexes them."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        example = self.examples[index]
        return {"input_ids": example.ids, "labels": example.labels}


class Collator:
    """Pads a batch on the right: `input_ids`, `attention_mask`, `labels`, each (rows, longest row)."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        def padded(lists: list[list[int]], value: int) -> torch.Tensor:
            return pad_sequence([torch.tensor(x) for x in lists], batch_first=True, padding_value=value)

        return {
            "input_ids": padded([r["input_ids"] for r in rows], self.pad_token_id),
            "attention_mask": padded([[1] * len(r["input_ids"]) for r in rows], 0),
            "labels": padded([r["labels"] for r in rows], IGNORED),
        }


def fit(
    model: Any, tokenizer: Any, examples: Sequence[Example], held_out: Sequence[Example], cfg: TrainConfig,
    dtype: str, run: Run,
) -> dict[str, float]:  # fmt: skip
    """Train `model` in place. Returns the final figures: loss, steps, seconds, tokens."""
    recorder = RunRecorder(run)
    trainer = Trainer(
        model=model,
        args=arguments(cfg, dtype, len(examples), bool(held_out), run.path / "checkpoints"),
        train_dataset=Rows(examples),
        eval_dataset=Rows(held_out) if held_out else None,
        data_collator=Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=[recorder, *adalora.callbacks(model)],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if sys.stderr.isatty():
        trainer.add_callback(Bar)
    with recorder.heeding_interrupts(), without_input_casts(model, dtype):
        done = trainer.train()
    losses = [h["eval_loss"] for h in trainer.state.log_history if "eval_loss" in h]
    return {
        "train_loss": done.training_loss,
        **({"eval_loss": losses[-1]} if losses else {}),
        "steps": done.global_step,
        "seconds": round(done.metrics["train_runtime"], 1),
        "tokens": int(trainer.state.num_input_tokens_seen),
    }


def steps_an_epoch(cfg: TrainConfig, rows: int) -> int:
    """Optimizer steps of one pass over `rows` rows."""
    return math.ceil(math.ceil(rows / cfg.batch_size) / cfg.gradient_accumulation_steps)


def planned_steps(cfg: TrainConfig, rows: int) -> int:
    """Optimizer steps of the whole training."""
    return cfg.max_steps or math.ceil(cfg.epochs * steps_an_epoch(cfg, rows))


def arguments(cfg: TrainConfig, dtype: str, rows: int, evaluates: bool, folder: Path) -> TrainingArguments:
    """Our settings in the Trainer's words; checkpoints go to `folder`.

    Raises: ConfigError if the Trainer refuses what `trainer: {...}` holds.
    """
    warmup = round(cfg.warmup_ratio * planned_steps(cfg, rows))
    scheduler = cfg.lr_scheduler_type
    ours = dict(
        output_dir=str(folder),
        num_train_epochs=cfg.epochs,
        max_steps=cfg.max_steps or -1,
        per_device_train_batch_size=cfg.batch_size,
        per_device_eval_batch_size=cfg.batch_size,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        learning_rate=cfg.lr,
        warmup_steps=warmup,
        weight_decay=cfg.weight_decay,
        # the Trainer's "constant" ignores a warm-up without a word
        lr_scheduler_type="constant_with_warmup" if scheduler == "constant" and warmup else scheduler,
        max_grad_norm=cfg.max_grad_norm,
        activation_checkpointing=cfg.gradient_checkpointing,
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=cfg.logging_steps,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=cfg.eval_steps or steps_an_epoch(cfg, rows),
        save_strategy="steps",
        save_steps=cfg.save_steps or steps_an_epoch(cfg, rows),
        save_total_limit=cfg.save_total_limit,
        seed=cfg.seed,
        data_seed=cfg.seed,
        report_to=[],
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        prediction_loss_only=True,
        logging_nan_inf_filter=False,  # a loss that is no number would be logged as 0
    )
    try:
        return TrainingArguments(**(ours | cfg.trainer))
    except (ValueError, TypeError) as error:
        if not cfg.trainer:
            raise
        raise ConfigError(f"trainer={cfg.trainer}: {error}", hint="see transformers.TrainingArguments") from error
