"""The training loop: transformers' Trainer, given our batches, our loss, our checkpoints and our record."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from src.config import TrainConfig
from src.data.rows import Example
from src.errors import ConfigError
from src.model import attention, methods
from src.model.adapters import without_input_casts
from src.train import adalora, checkpoint, trouble
from src.train.batches import Batches
from src.train.callbacks import Bar, RunRecorder
from src.train.collate import EndToEnd, Padded, Rows
from src.train.collate_tasks import COLLATORS
from src.train.losses import Criterion, class_weights
from src.train.objective import Objective
from src.train.stop import Asked
from src.utils import environment
from src.utils.logs import log

CPU_MULTIPLE = 64
Where = Callable[[int], str]  # file:line of a row, by its number


class Schedule(NamedTuple):
    """Optimizer steps of an epoch and of the whole training, on all devices together."""

    steps_an_epoch: int
    steps: int

    @classmethod
    def of(cls, batches: int, cfg: TrainConfig) -> Schedule:
        """From the number of batches that one device takes in an epoch."""
        an_epoch = max(1, math.ceil(batches / cfg.gradient_accumulation_steps))
        return cls(an_epoch, cfg.max_steps or math.ceil(cfg.epochs * an_epoch))


class Loop(Trainer):  # type: ignore[misc]
    """One optimizer step after another, as the Trainer makes them, over batches that know their rows."""

    def __init__(
        self, *, batches: Batches, held_out: Sequence[Example], objective: Objective, asked: Asked,
        recorder: RunRecorder, collate: Any, where: Where, **of_trainer: Any,
    ) -> None:  # fmt: skip
        super().__init__(data_collator=collate, callbacks=[recorder], **of_trainer)
        self.batches, self.held_out, self.objective, self.asked = batches, held_out, objective, asked
        self.recorder, self.where = recorder, where
        self.loss_is_scaled_for_ga = True  # by the labels of all batches of a step, in compute_loss
        self.step_tokens = 0

    # batches

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader: Any = DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,  # type: ignore[arg-type]
            collate_fn=self.data_collator,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # it would draw from the global one, which dropout shares
        )
        loader.set_epoch = self.batches.set_epoch
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """The batches of one optimizer step, and the weight of all their labels, on every device together."""
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        weight = sum((self.objective.criterion.total_weight(b["labels"]) for b in batches), torch.zeros(()))
        counts = torch.tensor([float(weight), sum(b["tokens"] for b in batches), *self.asked.flags()])
        rows = [b.pop("rows") for b in batches]
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts.to(device), "sum").cpu()
            gathered: list[Any] = [None] * self.args.world_size
            torch.distributed.all_gather_object(gathered, rows)
            rows = [micro for of_device in zip(*gathered, strict=True) for micro in of_device]
        self.asked.agree((counts[2:] > 0).tolist())
        self.step_tokens = int(counts[1])
        self.recorder.takes(self.state.global_step + 1, [row for batch in rows for row in batch])
        return batches, counts[0].clamp(min=1e-9).to(device)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Every token of the step once: those of the other devices were counted with ours."""
        self.state.num_input_tokens_seen += self.step_tokens
        self.step_tokens = 0

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0

    # loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Our share of the mean loss over all labels of the step; devices are averaged, hence the factor."""
        with trouble.out_of_memory(self.state.global_step + 1, inputs):
            loss = self.objective.summed(model, inputs) * (self.args.world_size / num_items_in_batch)
            if (extra := methods.extra_loss(self.model)) is not None:
                loss = loss + extra / self.current_gradient_accumulation_steps
        if not math.isfinite(loss.item()):
            step = self.state.global_step + 1
            self._diverged("loss", loss.item(), step, step - 2)
        return loss

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> torch.Tensor:
        with trouble.out_of_memory(self.state.global_step + 1, inputs):
            return super().training_step(model, inputs, *rest, **named)

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        value = float(norm) if norm is not None else 0.0
        if not math.isfinite(value) and not self.args.fp16:  # fp16 skips such a step and scales anew
            step = self.state.global_step + 1
            self._diverged("gradient's norm", value, step, step - 1)
        return norm

    def _diverged(self, what: str, value: float, step: int, proven: int) -> None:
        """`proven` is the last step after which the weights still gave a loss that is a number."""
        rows = [self.where(row) for row in self.recorder.rows]
        good = checkpoint.newest(self._checkpoints, until=proven)
        raise trouble.diverged(what, value, step, rows, good)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The mean loss over all labels of the held-out rows."""
        size, world, rank = self.args.eval_batch_size, self.args.world_size, self.args.process_index
        sums = torch.zeros(2, dtype=torch.float64)
        self.model.eval()
        with torch.no_grad():
            for start in range(rank * size, len(self.held_out), world * size):
                items = list(enumerate(self.held_out[start : start + size]))
                batch = self._prepare_inputs(self.data_collator(items))
                sums[0] += self.objective.summed(self.model, batch).item()
                sums[1] += self.objective.criterion.total_weight(batch["labels"]).item()
        if world > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), "sum").cpu()
        metrics = {"eval_loss": float(sums[0] / sums[1].clamp(min=1e-9))}
        if not math.isfinite(metrics["eval_loss"]):
            step = self.state.global_step
            self._diverged("evaluation loss", metrics["eval_loss"], step, step - 1)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # checkpoints

    @property
    def _checkpoints(self) -> Path:
        return Path(self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._refuse_broken_weights()
        self.recorder.flush()
        folder = self._checkpoints / f"checkpoint-{self.state.global_step}"
        with checkpoint.sealed(folder, self.args.world_size, self.args.should_save) as temporary:
            with adalora.all_ranks(self.model):
                self.save_model(str(temporary), _internal_call=True)
            self._save_optimizer_and_scheduler(str(temporary))
            self._save_scaler(str(temporary))
            checkpoint.save_rng(
                temporary / checkpoint.RNG, self.args.world_size, self.args.should_save,
                float(self._tr_loss), self._globalstep_last_logged,
            )  # fmt: skip
            if self.args.should_save:
                self.state.save_to_json(str(temporary / checkpoint.STATE))
                checkpoint.save_progress(temporary, self.recorder.seconds)
                adalora.save(self.model, temporary)
        if self.args.should_save:
            best = self.state.best_global_step if self.recorder.args.load_best_model_at_end else None
            checkpoint.rotate(self._checkpoints, self.args.save_total_limit, best)

    def _refuse_broken_weights(self) -> None:
        trained = (p for p in self.model.parameters() if p.requires_grad)
        if not all(bool(torch.isfinite(p).all()) for p in trained):
            self._diverged("weight", math.nan, self.state.global_step, self.state.global_step - 1)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        adalora.load(self.model, Path(resume_from_checkpoint))

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            path = Path(checkpoint_folder) / checkpoint.RNG
            loss, self._globalstep_last_logged = checkpoint.load_rng(path, self.args.process_index)
            self._tr_loss += loss


def fit(
    model: Any, tokenizer: Any, examples: Sequence[Example], held_out: Sequence[Example], cfg: TrainConfig,
    dtype: str, recorder: RunRecorder, folder: Path, where: Where, start: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train `model` in place, from the checkpoint `start` on if there is one; checkpoints go to `folder`.

    Returns: the final figures: loss, steps, seconds, tokens.
    Raises: Stopped after a checkpoint, if a signal asked for it; DivergedError; MemoryRunOut.
    """
    end_to_end = lay_out_rows(model, cfg)
    collate = collator(tokenizer, end_to_end) if cfg.task == "causal_lm" else COLLATORS[cfg.task](tokenizer, model)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    batches = batches_of(examples, cfg, rank, world)
    schedule = Schedule.of(len(batches), cfg)
    _precise(cfg)
    with Asked(recorder.run.path) as asked:
        loop = Loop(
            model=model,
            args=arguments(cfg, dtype, schedule, bool(held_out), folder),
            train_dataset=Rows(examples),
            eval_dataset=Rows(held_out) if held_out else None,
            collate=collate,
            processing_class=tokenizer,
            batches=batches,
            held_out=held_out,
            objective=Objective(
                model, criterion(model, tokenizer, cfg), dtype, end_to_end, noise=cfg.neftune_noise_alpha
            ),
            asked=asked,
            recorder=recorder,
            where=where,
        )
        loop.remove_callback(ProgressCallback)
        loop.remove_callback(PrinterCallback)
        if sys.stderr.isatty():
            loop.add_callback(Bar)
        recorder.prepare(asked, cfg, bool(held_out), start)
        for callback in adalora.callbacks(model):
            loop.add_callback(callback)
        with closing(recorder), loop.objective.attention(model), without_input_casts(model, dtype):
            _run(loop, start, schedule.steps)
    asked.refuse_if_stopped(loop.state.global_step, schedule.steps)
    if cfg.load_best_model_at_end and loop.state.best_global_step:
        log.info("the best weights are those of step %d", loop.state.best_global_step)
        loop._load_from_checkpoint(str(folder / f"checkpoint-{loop.state.best_global_step}"))
    return recorder.figures(loop.state, cfg.load_best_model_at_end)


def _run(loop: Loop, start: Path | None, steps: int) -> None:
    """Train from `start` to the end; where that is the end already, only its weights are taken."""
    if start is not None:
        state = TrainerState.load_from_json(str(start / checkpoint.STATE))
        if state.global_step >= steps or loop.recorder.patience_is_out(state):
            loop.state = state
            loop._load_from_checkpoint(str(start))
            return
    loop.train(resume_from_checkpoint=str(start) if start else None)


def lay_out_rows(model: Any, cfg: TrainConfig) -> bool:
    """Whether batches are rows laid end to end; why not is said.

    Raises: ConfigError if `packing` is asked of a model that cannot take them.
    """
    reason: str | None = "padding_free=false"
    if cfg.task != "causal_lm":
        reason = f"task={cfg.task} has no rows that go on"
    elif cfg.padding_free:
        reason = methods.why_padded(cfg.method) or attention.why_not(model)
    if reason and cfg.packing:
        raise ConfigError(f"packing=true needs rows laid end to end: {reason}", hint="set packing=false")
    if reason:
        log.info("batches are padded: %s", reason)
    return reason is None


def batches_of(examples: Sequence[Example], cfg: TrainConfig, rank: int = 0, world: int = 1) -> Batches:
    lengths = getattr(examples, "lengths", None)
    lengths = [len(e.ids) for e in examples] if lengths is None else lengths
    pack_to = cfg.max_length if cfg.packing else None
    return Batches(lengths, cfg.batch_size, cfg.seed, pack_to=pack_to, rank=rank, world=world)


def collator(tokenizer: Any, end_to_end: bool) -> EndToEnd | Padded:
    """What makes a batch of rows.

    On a CPU shapes are rounded up: oneDNN compiles, and keeps, its bfloat16 kernels anew for each one.
    """
    if not end_to_end:
        return Padded(tokenizer.pad_token_id)
    return EndToEnd(multiple=1 if torch.cuda.is_available() else CPU_MULTIPLE)


def criterion(model: Any, tokenizer: Any, cfg: TrainConfig) -> Criterion:
    """The loss asked for. Raises: ConfigError if `class_weights` names what is not one class."""

    labels: dict[str, int] = model.config.label2id if cfg.task == "classification" else {}

    def ids(name: str) -> list[int]:
        if labels:
            return [labels[name]] if name in labels else []
        return list(tokenizer(name, add_special_tokens=False)["input_ids"])

    classes = len(labels) or model.get_output_embeddings().weight.shape[0]
    return Criterion(cfg, class_weights(cfg, classes, ids))


def _precise(cfg: TrainConfig) -> None:
    """Set torch as `deterministic` and `tf32` ask."""
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(cfg.deterministic)
    tf32 = environment.choose_tf32(cfg.tf32, cfg.cuda_visible_devices).value == "on"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")


def arguments(
    cfg: TrainConfig, dtype: str, schedule: Schedule, evaluates: bool, folder: Path
) -> TrainingArguments:
    """Our settings in the Trainer's words; checkpoints go to `folder`.

    Raises: ConfigError if the Trainer refuses what `trainer: {...}` holds.
    """
    warmup = round(cfg.warmup_ratio * schedule.steps)
    kernels = environment.choose_kernels(cfg.use_liger_kernel, cfg.cuda_visible_devices).value
    scheduler = cfg.lr_scheduler_type
    ours = dict(
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
        activation_checkpointing=cfg.gradient_checkpointing is True,
        torch_compile=cfg.torch_compile,
        use_liger_kernel=kernels == "liger",
        liger_kernel_config={"fused_linear_cross_entropy": False, "cross_entropy": False},  # Objective's part
        fp16=dtype == "float16",  # bfloat16 needs no scaling of the loss: Objective casts by itself
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
        return TrainingArguments(**(ours | cfg.trainer))
    except (ValueError, TypeError) as error:
        if not cfg.trainer and not cfg.lr_scheduler_kwargs:
            raise
        raise ConfigError(f"trainer={cfg.trainer}: {error}", hint="see transformers.TrainingArguments") from error
