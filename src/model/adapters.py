"""How a base model becomes one that trains, by a method of the table METHODS."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import peft
import torch
from peft.helpers import disable_input_dtype_casting
from torch import nn

from src.errors import ModelError
from src.model import dropout, fused_lora
from src.model.methods import METHODS, Method, refuse_quantised
from src.model.source import Source
from src.model.tasks import TASKS
from src.schema import MethodArgs, Task
from src.utils.logs import log


def apply_method(model: Any, args: MethodArgs, source: Source, *, steps: int, task: Task = "causal_lm") -> Any:
    """Make `model` trainable by `args.method`: freeze it and add an adapter, or leave all weights free.

    `steps` are the optimizer steps that are planned. The caller seeds the random number generators before:
    the adapter's first values are drawn here.
    Raises: ModelError if a target module matches nothing, listing what exists, or peft refuses an argument.
    """
    method = METHODS[args.method]
    quantised = bool(getattr(model, "is_quantized", False))
    refuse_quantised(source.name, args.method, quantised)
    if method.config is None:
        # Small updates vanish in 16 bits: full weights are kept in 32, and computed on in 16 by autocast.
        return model.float()
    if args.lora_target_modules and "lora_target_modules" in method.keys:
        check_target_modules(model, args.lora_target_modules)
    keep_differentiable(model)
    try:
        # a random layer that is not kept would be another one next time
        kept = {"modules_to_save": getattr(model, "untrained_modules", None) or None}
        settings = kept | _arguments(model, args, method, steps) | {"revision": source.revision}
        tuned = peft.get_peft_model(
            model, getattr(peft, method.config)(task_type=TASKS[task].peft_type, **settings)
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        if not args.peft:
            raise
        raise ModelError(f"peft={args.peft}: {error}", hint=f"see peft.{method.config}") from error
    tuned.peft_config["default"].base_model_name_or_path = source.name
    return tuned


def keep_differentiable(model: nn.Module) -> None:
    """Have 4-bit layers stay as they are when nothing is learnt, as in an evaluation.

    On a CPU with bfloat16 instructions bitsandbytes packs their weights anew then, for good, for a product that
    passes no gradient on: from there on only the last layers would learn.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _arguments(model: Any, args: MethodArgs, method: Method, steps: int) -> dict[str, Any]:
    """The method's own arguments, under those of our settings, under those of `peft: {...}`."""
    ours = {argument: getattr(args, key) for key, argument in method.keys.items()}
    if "target_modules" in ours:
        ours["target_modules"] = ours["target_modules"] or "all-linear"
    if unused := [key for key in ("lora_r", "lora_alpha", "lora_dropout") if key not in method.keys]:
        log.info("method=%s has no use for %s", args.method, ", ".join(unused))
    derived = method.derived(model, args, steps) if method.derived else {}
    return {**method.fixed, **ours, **args.peft, **derived}


@contextmanager
def training_precision(model: nn.Module, dtype: str, by_ours: bool = True) -> Iterator[None]:
    """Lets an adapter's layers compute in `dtype` as it suits a training, and not an answer.

    Under autocast the adapter's fp32 weights are computed on in 16 bits: peft would cast the activations to fp32
    and autocast back again. The layers of some methods cast nothing.

    Args:
        by_ours: by operations of this project where they can be: dropout.py, low_rank.py.
    """
    casts = dtype != "float32" and any(hasattr(m, "cast_input_dtype_enabled") for m in model.modules())
    with ExitStack() as stack:
        stack.enter_context(disable_input_dtype_casting(model, active=casts))
        if by_ours:
            stack.enter_context(dropout.use_fast_dropout(model))
            stack.enter_context(fused_lora.use_fused_lora(model, dtype))
        yield


def check_target_modules(model: nn.Module, wanted: list[str]) -> None:
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


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """`(trainable, all)` parameter counts; a 4-bit tensor packs two weights in a byte."""

    def count(p: torch.Tensor) -> int:
        return p.numel() * 2 if p.dtype == torch.uint8 else p.numel()

    parameters = list(model.parameters())
    return sum(count(p) for p in parameters if p.requires_grad), sum(count(p) for p in parameters)
