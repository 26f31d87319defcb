"""The training loop: transformers' Trainer, given our batches, our loss, our checkpoints and our record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from src.data.store import Example
from src.model import methods
from src.train import adalora, checkpoint, failures, sharding
from src.train.batch_sampler import BatchSampler
from src.train.callbacks import RunRecorder
from src.train.launch_plan import WEIGHT_SHARDING
from src.train.objective import Objective
from src.train.signals import StopRequest

RowLocator = Callable[[int], str]  # file:line of a row, by its number
# Seconds that the other processes let the first one say and write alone what all of them have found out.
MAIN_PROCESS_HEAD_START_S = 5.0


class AssayTrainer(Trainer):  # type: ignore[misc]
    """One optimizer step after another, as the Trainer makes them, over batches that know their rows."""

    def __init__(
        self, *, batches: BatchSampler, held_out: Sequence[Example], objective: Objective, asked: StopRequest,
        recorder: RunRecorder, collate: Any, where: RowLocator, spread: str, **of_trainer: Any,
    ) -> None:  # fmt: skip
        """`spread`: the setting `distributed`."""
        self.spread = spread
        self.shared_out = False  # whether each process holds a part of the weights by now
        super().__init__(data_collator=collate, callbacks=[recorder], **of_trainer)
        self.batches, self.held_out, self.objective, self.asked = batches, held_out, objective, asked
        self.recorder, self.where = recorder, where
        self.loss_is_scaled_for_ga = True  # by the labels of all batches of a step, in compute_loss
        self.step_tokens = 0
        self.not_finite = 0.0  # the loss, if it was no number

    def create_accelerator_and_postprocess(self) -> None:
        with sharding.fsdp_on_cpu(bool(self.args.fsdp)):
            super().create_accelerator_and_postprocess()

    def _prepare_for_training(self, *words: Any, **named: Any) -> Any:
        prepared = super()._prepare_for_training(*words, **named)
        sharding.check_sharded(self.model, self.spread)
        self.shared_out = self.spread in WEIGHT_SHARDING
        return prepared

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
        loss = self.objective.summed(model, inputs) * (self.args.world_size / num_items_in_batch)
        if (extra := methods.extra_loss(self.model)) is not None:
            loss = loss + extra / self.current_gradient_accumulation_steps
        if not math.isfinite(loss.item()):
            self.not_finite = loss.item()
            if self.args.world_size == 1:
                self._diverged("loss", self.not_finite, self.state.global_step + 1, self.state.global_step - 1)
        return loss

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> torch.Tensor:
        with failures.explain_out_of_memory(self.state.global_step + 1, inputs):
            return super().training_step(model, inputs, *rest, **named)

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.args.world_size > 1:  # of a loss that is no number all processes know before any of them ends
            worst = torch.tensor([self.not_finite], device=self.args.device)
            worst = self.accelerator.reduce(worst, "sum").item()
            if not math.isfinite(worst):
                self._diverged("loss", worst, self.state.global_step + 1, self.state.global_step - 1)
        norm = super()._clip_grad_norm(model)
        value = float(norm) if norm is not None else 0.0
        if not math.isfinite(value) and not self.args.fp16:  # fp16 skips such a step and scales anew
            step = self.state.global_step + 1
            self._diverged("gradient's norm", value, step, step - 1)
        return norm

    def _diverged(self, what: str, value: float, step: int, proven: int) -> None:
        """`proven` is the last step after which the weights still gave a loss that is a number."""
        if self.args.process_index:
            time.sleep(MAIN_PROCESS_HEAD_START_S)
        rows = [self.where(row) for row in self.recorder.rows]
        good = checkpoint.find_newest(self._checkpoints, until=proven)
        raise failures.divergence_error(what, value, step, rows, good)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The mean loss over all labels of the held-out rows."""
        size, world, rank = self.args.eval_batch_size, self.args.world_size, self.args.process_index
        sums = torch.zeros(2, dtype=torch.float64)
        self.model.eval()
        with torch.no_grad():
            for start in range(0, len(self.held_out), world * size):  # as many batches in every process
                mine = self.held_out[start + rank * size : start + (rank + 1) * size]
                items = list(enumerate(mine))
                batch = self._prepare_inputs(self.data_collator(items))
                with failures.explain_out_of_memory(self.state.global_step, batch):
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

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """The weights that processes share out, whole in the first one; None where each has them all."""
        if not self.shared_out:
            return None
        return self.accelerator.get_state_dict(self.model_wrapped)  # type: ignore[no-any-return]

    def take_weights(self, folder: Path) -> None:
        """Take the weights of a checkpoint, before the training or after it."""
        if self.is_deepspeed_enabled and self.deepspeed is not None:
            strict = not isinstance(self.model, PeftModel)
            deepspeed_load_checkpoint(self.model_wrapped, str(folder), load_module_strict=strict)
        elif self.is_fsdp_enabled and not self.shared_out:
            sharding.load_full_weights(self.model, folder)
        else:
            self._load_from_checkpoint(str(folder))

    # checkpoints

    @property
    def _checkpoints(self) -> Path:
        return Path(self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._refuse_broken_weights()
        self.recorder.flush()
        folder = self._checkpoints / f"checkpoint-{self.state.global_step}"
        with checkpoint.atomic_checkpoint(folder, self.args.world_size, self.args.should_save) as temporary:
            with adalora.all_ranks(self.model):
                self.save_model(str(temporary), _internal_call=True)
            self._save_optimizer_and_scheduler(str(temporary))
            self._save_scaler(str(temporary))
            checkpoint.save_rng_state(
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
            loss, self._globalstep_last_logged = checkpoint.load_rng_state(path, self.args.process_index)
            self._tr_loss += loss
