"""Tuning methods: how a base model becomes one that trains.

To add a method, enter it in METHODS, name it in config.MethodArgs.method and give it a preset in
configs/method/; its arguments are checked against peft's own signature, and the tests run over the table.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn

from src.config import MethodArgs, Task
from src.errors import ModelError
from src.model.source import Source
from src.model.tasks import TASKS


class Method(NamedTuple):
    """`adapter`: extra arguments of LoraConfig, None to train every weight; `four_bit`: nf4 base weights."""

    adapter: dict[str, Any] | None
    four_bit: bool = False


METHODS: dict[str, Method] = {
    "lora": Method({}),
    "rslora": Method({"use_rslora": True}),
    "dora": Method({"use_dora": True}),
    "qlora": Method({}, four_bit=True),
    "full": Method(None),
}


def apply(
    model: Any, args: MethodArgs, source: Source, gradient_checkpointing: bool = False, task: Task = "causal_lm"
) -> Any:
    """Make `model` trainable by `args.method`: freeze it and add an adapter, or leave all weights free.

    The caller seeds the random number generators before: the adapter's first values are drawn here.
    Raises: ModelError if a target module matches nothing, listing what exists.
    """
    method = METHODS[args.method]
    if method.adapter is None:
        # Small updates vanish in 16 bits: full weights are kept in 32, and computed on in 16 by autocast.
        return model.float()
    if args.lora_target_modules:
        check_targets(model, args.lora_target_modules)
    if method.four_bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)
    try:
        tuned = get_peft_model(model, _adapter(args, method, source, task, model.untrained_modules))
    except (ValueError, TypeError, NotImplementedError) as error:
        if not args.peft:
            raise
        raise ModelError(f"peft={args.peft}: {error}", hint="see peft.LoraConfig") from error
    tuned.peft_config["default"].base_model_name_or_path = source.name
    return tuned


def _adapter(args: MethodArgs, method: Method, source: Source, task: Task, untrained: list[str]) -> LoraConfig:
    return LoraConfig(
        task_type=TASKS[task].peft,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules or "all-linear",
        revision=source.revision,
        modules_to_save=untrained or None,  # a random layer that is not kept would be another one next time
        **((method.adapter or {}) | args.peft),
    )


def check_targets(model: nn.Module, wanted: list[str]) -> None:
    """Raises: ModelError naming every target that matches no linear layer, and the layers that exist."""
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or "Conv1D" in type(m).__name__]
    missing = [w for w in wanted if not any(n == w or n.endswith("." + w) for n in layers)]
    if missing:
        existing = sorted({n.rsplit(".", 1)[-1] for n in layers})
        raise ModelError(
            f"lora_target_modules: {', '.join(missing)} matches no layer of this model, which has "
            f"{', '.join(existing)}",
            hint="name some of these, or set lora_target_modules=null for all of them",
        )


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """`(trainable, all)` parameter counts; a 4-bit tensor packs two weights in a byte."""

    def count(p: torch.Tensor) -> int:
        return p.numel() * 2 if p.dtype == torch.uint8 else p.numel()

    parameters = list(model.parameters())
    return sum(count(p) for p in parameters if p.requires_grad), sum(count(p) for p in parameters)
