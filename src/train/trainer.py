"""The training loop: transformers' Trainer with this project's batches, loss and checkpoints."""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from ..data.store import Example
from ..errors import MAX_LISTED, DivergedError, ModelError, OutOfMemory, RunError
from ..model import methods
from ..utils.units import count
from . import callbacks, checkpoint
from .batch_sampler import BatchSampler
from .callbacks import RunRecorder
from .collators import Collator
from .launch_plan import WEIGHT_SHARDING
from .losses import Objective
from .signals import StopRequest

RowLocator = Callable[[int], str]  # the file:line of an example, by its index
# Seconds that the other processes wait with an error that all have found, so that the main process reports it.
MAIN_PROCESS_HEAD_START_S = 5.0


class AssayTrainer(Trainer):  # type: ignore[misc]
    """Records the examples of each batch, and divides the loss by the target tokens of a step on all devices."""

    def __init__(
        self, *, sampler: BatchSampler, held_out: Sequence[Example], objective: Objective, stop: StopRequest,
        recorder: RunRecorder, collate: Collator, locate_row: RowLocator, distributed: str,
        **trainer_args: Any,
    ) -> None:  # fmt: skip
        """
        Args:
            held_out: examples for the evaluation loss.
            distributed: how the processes share the model; a value of the setting `distributed`.
            trainer_args: arguments of transformers.Trainer.
        """
        self.distributed = distributed
        self.sharded = False  # whether the weights are distributed over the processes
        super().__init__(data_collator=collate, callbacks=[recorder], **trainer_args)
        self.sampler, self.held_out, self.objective, self.stop = sampler, held_out, objective, stop
        self.recorder, self.locate_row = recorder, locate_row
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the labels of all micro-batches
        self.step_tokens = 0
        self.nonfinite_loss = 0.0  # the loss, if it was infinite or NaN

    def create_accelerator_and_postprocess(self) -> None:
        with allow_fsdp_on_cpu(bool(self.args.fsdp)):
            super().create_accelerator_and_postprocess()

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        check_sharded(self.model, self.distributed)
        self.sharded = self.distributed in WEIGHT_SHARDING
        return prepared

    # batches

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader: Any = DataLoader(
            self.train_dataset,
            batch_sampler=self.sampler,  # type: ignore[arg-type]
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            persistent_workers=self.args.dataloader_persistent_workers,
            multiprocessing_context="fork" if self.args.dataloader_num_workers else None,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            generator=torch.Generator(),  # the default draws from the global one, as dropout does
        )
        loader.set_epoch = self.sampler.set_epoch
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """The micro-batches of a step, and the total weight of their labels over all devices."""
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        weight = sum((self.objective.criterion.total_weight(b["labels"]) for b in batches), torch.zeros(()))
        counts = torch.tensor([float(weight), sum(b["tokens"] for b in batches), *self.stop.local_flags()])
        rows = [b.pop("rows") for b in batches]
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts.to(device), "sum").cpu()
            gathered: list[Any] = [None] * self.args.world_size
            torch.distributed.all_gather_object(gathered, rows)
            rows = [micro_batch for devices in zip(*gathered, strict=True) for micro_batch in devices]
        self.stop.agree((counts[2:] > 0).tolist())
        self.step_tokens = int(counts[1])
        self.recorder.record_samples(self.state.global_step + 1, [row for batch in rows for row in batch])
        return batches, counts[0].clamp(min=1e-9).to(device)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count the tokens of the step once; get_batch_samples has summed them over the devices."""
        self.state.num_input_tokens_seen += self.step_tokens
        self.step_tokens = 0

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0

    # loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """This device's part of the mean loss over all labels of the step.

        The gradients of the devices are averaged, hence the factor world_size.
        """
        loss = self.objective.summed_loss(model, inputs) * (self.args.world_size / num_items_in_batch)
        if (extra := methods.extra_loss(self.model)) is not None:
            loss = loss + extra / self.current_gradient_accumulation_steps
        if not math.isfinite(loss.item()):
            self.nonfinite_loss = loss.item()
            if self.args.world_size == 1:
                self._diverged("loss", self.nonfinite_loss, self.state.global_step + 1, self.state.global_step - 1)
        return loss

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        with explain_out_of_memory(self.state.global_step + 1, inputs):
            return super().training_step(model, inputs, *args, **kwargs)

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.args.world_size > 1:  # share a non-finite loss before any process exits
            total = torch.tensor([self.nonfinite_loss], device=self.args.device)
            total = self.accelerator.reduce(total, "sum").item()
            if not math.isfinite(total):
                self._diverged("loss", total, self.state.global_step + 1, self.state.global_step - 1)
        norm = super()._clip_grad_norm(model)
        value = float(norm) if norm is not None else 0.0
        if not math.isfinite(value) and not self.args.fp16:  # fp16 skips such a step and changes its loss scale
            step = self.state.global_step + 1
            self._diverged("gradient norm", value, step, step - 1)
        return norm

    def _diverged(self, what: str, value: float, step: int, last_good: int) -> None:
        """`last_good`: the last step after which the weights gave a finite loss."""
        if self.args.process_index:
            time.sleep(MAIN_PROCESS_HEAD_START_S)
        rows = [self.locate_row(index) for index in self.recorder.indices]
        good = checkpoint.find_newest(self._checkpoints, until=last_good)
        raise divergence_error(what, value, step, rows, good)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The mean loss over all labels of the held-out examples."""
        size, world, rank = self.args.eval_batch_size, self.args.world_size, self.args.process_index
        sums = torch.zeros(2, dtype=torch.float64)
        self.model.eval()
        with torch.no_grad():
            for start in range(0, len(self.held_out), world * size):  # the same number of batches in every process
                mine = self.held_out[start + rank * size : start + (rank + 1) * size]
                items = list(enumerate(mine))
                batch = self._prepare_inputs(self.data_collator(items))
                with explain_out_of_memory(self.state.global_step, batch):
                    sums[0] += self.objective.summed_loss(self.model, batch).item()
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

    def full_state_dict(self) -> dict[str, torch.Tensor] | None:
        """The full weights, on the main process; None if they are not sharded."""
        if not self.sharded:
            return None
        return self.accelerator.get_state_dict(self.model_wrapped)  # type: ignore[no-any-return]

    def load_weights(self, folder: Path) -> None:
        """Load the weights of a checkpoint, before training or after it."""
        if self.is_deepspeed_enabled and self.deepspeed is not None:
            strict = not isinstance(self.model, PeftModel)
            deepspeed_load_checkpoint(self.model_wrapped, str(folder), load_module_strict=strict)
        elif self.is_fsdp_enabled and not self.sharded:
            load_full_weights(self.model, folder)
        else:
            self._load_from_checkpoint(str(folder))

    # checkpoints

    @property
    def _checkpoints(self) -> Path:
        return Path(self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._check_finite_weights()
        self.recorder.flush()
        folder = self._checkpoints / f"checkpoint-{self.state.global_step}"
        with checkpoint.atomic_checkpoint(folder, self.args.world_size, self.args.should_save) as temporary:
            with callbacks.save_all_ranks(self.model):
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
                callbacks.save_adalora_state(self.model, temporary)
        if self.args.should_save:
            best = self.state.best_global_step if self.recorder.args.load_best_model_at_end else None
            checkpoint.rotate(self._checkpoints, self.args.save_total_limit, best)

    def _check_finite_weights(self) -> None:
        trained = (p for p in self.model.parameters() if p.requires_grad)
        if not all(bool(torch.isfinite(p).all()) for p in trained):
            self._diverged("weight", math.nan, self.state.global_step, self.state.global_step - 1)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        callbacks.load_adalora_state(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (pickle.UnpicklingError, EOFError) as error:
            raise RunError(
                f"the state of the optimizer in {checkpoint} cannot be read", hint="remove this checkpoint"
            ) from error

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            path = Path(checkpoint_folder) / checkpoint.RNG
            loss, self._globalstep_last_logged = checkpoint.load_rng_state(path, self.args.process_index)
            self._tr_loss += loss


@contextmanager
def explain_out_of_memory(step: int, batch: dict[str, Any]) -> Iterator[None]:
    """Raises: OutOfMemory in place of the allocator's error, with settings that need less memory."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        shape = batch["input_ids"].shape
        rows = len(batch.get("lengths", range(shape[0])))
        raise OutOfMemory(
            f"out of memory at step {step}, in a batch of {count(rows, 'example')} and {shape.numel():,} tokens",
            hint="set gradient_checkpointing=true, half the batch_size with twice the "
            "gradient_accumulation_steps, a smaller max_length, method=qlora or optim=paged_adamw_8bit; "
            "the stage plan shows what each needs",
        ) from error


def divergence_error(what: str, value: float, step: int, rows: Sequence[str], good: Path | None) -> DivergedError:
    """The error of a loss that is not finite: it names the step, its rows and the last good checkpoint."""
    more = f" and {len(rows) - MAX_LISTED} more" if len(rows) > MAX_LISTED else ""
    return DivergedError(
        f"training diverged: the {what} is {value} at step {step}, in the batch of "
        f"{', '.join(rows[:MAX_LISTED])}{more}; the last good checkpoint is {good or 'none'}",
        hint="lower lr, or look for errors in these rows",
    )


@contextmanager
def allow_fsdp_on_cpu(fsdp: bool) -> Iterator[None]:
    """Make an Accelerator that is created inside shard on CPUs, too, where it silently uses DDP."""
    state = PartialState._shared_state
    if fsdp and state.get("distributed_type") == DistributedType.MULTI_CPU:
        state["distributed_type"] = DistributedType.MULTI_GPU
    yield


def load_full_weights(model: Any, folder: Path) -> None:
    """Load a checkpoint's weights into a model that is not sharded."""
    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), "default", is_trainable=True)
        return
    for file in sorted(folder.glob("model*.safetensors")):
        model.load_state_dict(load_file(file), strict=False)  # tied weights are stored once


def check_sharded(model: Any, distributed: str) -> None:
    """Raises: ModelError if `distributed` should have sharded the weights and has not."""
    if distributed == "fsdp2":
        unsharded = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    elif distributed == "zero3":
        unsharded = [name for name, p in model.named_parameters() if not hasattr(p, "ds_id")]
    else:
        unsharded = []
    if unsharded:
        raise ModelError(
            f"distributed={distributed} left {len(unsharded)} weights unsharded, the first is {unsharded[0]}",
            hint="set distributed=ddp",
        )
