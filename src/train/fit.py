"""Training with transformers' Trainer: the batches and the loss of a model, the training arguments, the loop."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.utils.logging import disable_progress_bar

from ..data.store import Example
from ..errors import ConfigError
from ..model import methods, packed_attention
from ..model.adapters import training_precision
from ..schema import DistributedArgs, LoopArgs, LossArgs, OptimArgs, SpeedArgs, TrainConfig
from ..utils import environment
from ..utils.logs import log, shows_bars
from ..utils.process_info import process_info
from ..utils.secrets import redact
from . import checkpoint
from .batch_sampler import BatchSampler, Schedule
from .callbacks import AdaLoraCallback, RunRecorder, TrainingBar, is_adalora
from .collators import Collator, TokenDataset, build_collator
from .launch_plan import WEIGHT_SHARDING
from .losses import Criterion, Objective, class_weights
from .signals import StopRequest
from .trainer import AssayTrainer, RowLocator

CPU_SHAPE_MULTIPLE = 64
# transformers has renamed this argument, and warns about the former name.
CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in {field.name for field in fields(TrainingArguments)}
    else "gradient_checkpointing"
)


class CollatorAndLoss(NamedTuple):
    """The collator that builds the batches of a model, and their loss."""

    collate: Collator
    objective: Objective

    @classmethod
    def for_model(
        cls, model: Any, tokenizer: Any, dtype: str, *, task: str, method: str, speed: SpeedArgs, loss: LossArgs,
        distributed: str,
    ) -> CollatorAndLoss:  # fmt: skip
        """Raises: ConfigError if the model cannot compute packed batches, or `class_weights` names no class."""
        packed = can_pack(model, task, method, speed)
        objective = Objective(
            model, build_criterion(model, tokenizer, task, loss), dtype, packed,
            fused=distributed not in WEIGHT_SHARDING, noise=loss.neftune_noise_alpha,
        )  # fmt: skip
        # oneDNN compiles and keeps its bfloat16 kernels for each shape: on a CPU, shapes are rounded up
        multiple = 1 if torch.cuda.is_available() else CPU_SHAPE_MULTIPLE
        return cls(build_collator(task, tokenizer, model, packed, multiple), objective)


def can_pack(model: Any, task: str, method: str, speed: SpeedArgs) -> bool:
    """Whether batches are packed into one sequence; the log says why not.

    Raises: ConfigError if `packing` is set and the model cannot compute packed batches.
    """
    reason: str | None = "padding_free=false"
    if task != "causal_lm":
        reason = f"task={task} has no examples that can be concatenated"
    elif speed.padding_free:
        reason = methods.why_padded(method) or packed_attention.why_unsupported(model)
    if reason and speed.packing:
        raise ConfigError(f"packing=true needs batches without padding: {reason}", hint="set packing=false")
    if reason:
        log.info("batches are padded: %s", reason)
    return reason is None


def build_criterion(model: Any, tokenizer: Any, task: str, loss: LossArgs) -> Criterion:
    """Raises: ConfigError if `class_weights` names something other than one class."""
    labels: dict[str, int] = model.config.label2id if task == "classification" else {}

    def ids(name: str) -> list[int]:
        if labels:
            return [labels[name]] if name in labels else []
        return list(tokenizer(name, add_special_tokens=False)["input_ids"])

    classes = len(labels) or model.get_output_embeddings().weight.shape[0]
    return Criterion(loss, class_weights(loss, classes, ids))


def use_custom_kernels(distributed: str, torch_compile: bool) -> bool:
    """Whether adapters use this project's operations: their weights must be local, and torch.compile off."""
    return distributed not in WEIGHT_SHARDING and not torch_compile


def set_numerics(speed: SpeedArgs, cuda_visible_devices: str) -> None:
    """Set torch's global flags for `deterministic` and `tf32`."""
    torch.use_deterministic_algorithms(speed.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads it, and filling takes time
    tf32 = environment.choose_tf32(speed.tf32, cuda_visible_devices).value == "on"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")


def fit(
    model: Any, tokenizer: Any, examples: Sequence[Example], held_out: Sequence[Example], *,
    sampler: BatchSampler, schedule: Schedule, collator_and_loss: CollatorAndLoss, args: TrainingArguments,
    dtype: str, loop: LoopArgs, speed: SpeedArgs, distributed: str, seed: int,
    recorder: RunRecorder, locate_row: RowLocator, start: Path | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor] | None]:  # fmt: skip
    """Train `model` in place, from the checkpoint `start` if there is one.

    `loop` and `speed` are parts of one TrainConfig, which callers pass as both.

    Returns: the final metrics (loss, steps, seconds, tokens), and the full weights of a sharded model.
    Raises: Stopped after a checkpoint, if a signal requested it; DivergedError; OutOfMemory.
    """
    info = process_info()
    with StopRequest(recorder.run.path, distributed=info.world_size > 1) as stop:
        trainer = AssayTrainer(
            model=model,
            args=args,
            train_dataset=TokenDataset(examples),
            eval_dataset=TokenDataset(held_out) if held_out else None,
            collate=collator_and_loss.collate,
            processing_class=tokenizer,
            sampler=sampler,
            held_out=held_out,
            objective=collator_and_loss.objective,
            stop=stop,
            recorder=recorder,
            locate_row=locate_row,
            distributed=distributed,
        )
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        disable_progress_bar()  # of transformers: it would draw one for each checkpoint
        if info.is_main and shows_bars():
            trainer.add_callback(TrainingBar)
        recorder.prepare(stop, loop, bool(held_out), start)
        if is_adalora(model):
            trainer.add_callback(AdaLoraCallback(model))
        if info.rank:  # every process has built the same weights; dropout and noise must differ between them
            set_seed(seed + info.rank)
        computed = training_precision(model, dtype, use_custom_kernels(distributed, speed.torch_compile))
        with closing(recorder), trainer.objective.attention(model), computed:
            before = fingerprint(model)  # of a run that is resumed, too: its checkpoint is loaded later
            _train(trainer, start, schedule.steps)
    stop.raise_if_stopped(trainer.state.global_step, schedule.steps)
    changed = trainer.sharded or fingerprint(model) != before
    if loop.load_best_model_at_end and trainer.state.best_global_step:
        log.info("the best weights are those of step %d", trainer.state.best_global_step)
        trainer.load_weights(recorder.run.checkpoints / f"checkpoint-{trainer.state.best_global_step}")
    return recorder.final_metrics(trainer.state, loop.load_best_model_at_end, changed), trainer.full_state_dict()


def fingerprint(model: Any) -> list[float]:
    """A sum of each trained tensor, which tells whether a step has changed it."""
    return [float(p.detach().sum(dtype=torch.float64)) for p in model.parameters() if p.requires_grad]


def _train(trainer: AssayTrainer, start: Path | None, steps: int) -> None:
    """Train from `start` to the end. If `start` is the end already, load its weights only."""
    if start is not None:
        state = TrainerState.load_from_json(str(start / checkpoint.STATE))
        if state.global_step >= steps or trainer.recorder.patience_exhausted(state):
            trainer.state = state
            trainer.load_weights(start)
            return
    trainer.train(resume_from_checkpoint=str(start) if start else None)


def build_training_arguments(
    cfg: TrainConfig, dtype: str, schedule: Schedule, evaluates: bool, folder: Path
) -> TrainingArguments:
    """Translate the complete configuration to arguments of the Trainer; checkpoints go to `folder`.

    Raises: ConfigError if the schedule decays longer than it lasts, or the Trainer rejects an argument of
        `trainer: {...}`.
    """
    warmup = round(cfg.warmup_ratio * schedule.steps)
    _check_decay(cfg, schedule.steps - warmup)
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
        # the Trainer's "constant" silently ignores a warm-up
        lr_scheduler_type="constant_with_warmup" if scheduler == "constant" and warmup else scheduler,
        lr_scheduler_kwargs=cfg.lr_scheduler_kwargs,
        max_grad_norm=cfg.max_grad_norm,
        **{CHECKPOINTING: cfg.gradient_checkpointing is True},
        torch_compile=cfg.torch_compile,
        use_liger_kernel=kernels == "liger",
        liger_kernel_config={
            "fused_linear_cross_entropy": False,
            "cross_entropy": False,
        },  # Objective computes these
        fp16=dtype == "float16",  # Objective casts to bfloat16, which needs no loss scaling
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=cfg.logging_steps,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=cfg.eval_steps or max(1, round(cfg.eval_epochs * schedule.steps_per_epoch)),
        save_strategy="steps",
        save_steps=cfg.save_steps or schedule.steps_per_epoch,
        save_total_limit=cfg.save_total_limit,
        metric_for_best_model="eval_loss" if evaluates else None,
        greater_is_better=False,
        seed=cfg.seed,
        data_seed=cfg.seed,
        run_name=str(redact(cfg.run_name or folder.parent.name)),  # trackers show it
        report_to=[r for r in cfg.report_to if r != "tensorboard"],
        include_num_input_tokens_seen="all",
        remove_unused_columns=False,
        prediction_loss_only=True,
        logging_nan_inf_filter=False,  # it would log a non-finite loss as 0
    )
    try:
        return TrainingArguments(**(ours | distributed_arguments(cfg, dtype) | cfg.trainer))
    except (ValueError, TypeError) as error:
        if not cfg.trainer:
            raise
        raise ConfigError(f"trainer={cfg.trainer}: {error}", hint="see transformers.TrainingArguments") from error


def _check_decay(cfg: OptimArgs, steps: int) -> None:
    """Raises: ConfigError if the schedule would decay over more steps than the `steps` after the warm-up."""
    decay = cfg.lr_scheduler_kwargs.get("num_decay_steps", 0)
    if decay > steps:
        raise ConfigError(
            f"lr_scheduler_kwargs.num_decay_steps={decay} is more than the {steps} steps after the warm-up",
            hint="set fewer num_decay_steps, or train longer",
        )


def distributed_arguments(args: DistributedArgs, dtype: str) -> dict[str, Any]:
    """The Trainer's arguments for the setting `distributed`."""
    if args.distributed == "ddp":
        return {}
    # FSDP and DeepSpeed keep fp32 weights and cast to 16 bits themselves
    precision: dict[str, Any] = {"bf16": dtype == "bfloat16", "fp16": dtype == "float16"}
    if args.distributed == "fsdp2":
        settings = {"version": 2, "cpu_offload": args.offload, "state_dict_type": "FULL_STATE_DICT"}
        return precision | {"fsdp": True, "fsdp_config": settings}
    return precision | {"deepspeed": _deepspeed_config(args)}


def _deepspeed_config(args: DistributedArgs) -> dict[str, Any]:
    """DeepSpeed's configuration; "auto" takes the value of the Trainer's arguments."""
    stage = int(args.distributed.removeprefix("zero"))
    cpu_memory = {"device": "cpu", "pin_memory": True}
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True}
    if args.offload:
        zero["offload_optimizer"] = cpu_memory
    if stage == 3:
        zero |= {"stage3_gather_16bit_weights_on_model_save": True}
        zero |= {"offload_param": cpu_memory} if args.offload else {}
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "zero_force_ds_cpu_optimizer": False,
    }
