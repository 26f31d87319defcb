"""Make a base model trainable by a method of the table METHODS."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn

from ..errors import ModelError
from ..schema import MethodArgs, Task
from ..utils.logs import log
from . import embeddings, fused_lora
from .methods import METHODS, Method, refuse_quantised
from .peft_arguments import ModelNames, check_matches
from .source import Source, adapter_rows
from .tasks import TASKS


def apply_method(
    model: Any,
    args: MethodArgs,
    source: Source,
    *,
    steps: int,
    task: Task = "causal_lm",
    parent: Path | None = None,
) -> Any:
    """Make `model` trainable by `args.method`: freeze it and add an adapter, or unfreeze all weights.

    `steps` is the planned number of optimizer steps. The adapter is initialised here: the caller seeds the random
    number generators before. `parent`: the folder of an adapter, whose shape the new one has; `load_weights` then
    gives it the weights.
    Raises: ModelError if a target module matches no layer, or peft rejects an argument.
    """
    method = METHODS[args.method]
    quantised = bool(getattr(model, "is_quantized", False))
    refuse_quantised(source.name, args.method, quantised)
    if method.config is None:
        # Small updates round to zero in 16 bits: the weights are fp32, and autocast computes in 16 bits.
        return model.float()
    if args.lora_target_modules and "lora_target_modules" in method.keys:
        check_target_modules(model, args.lora_target_modules, embeddings=method.embeddings)
        _check_new_rows(model, args.lora_target_modules)
    keep_differentiable(model)
    check_matches(args.peft, _names(model))
    _check_parameters(args.peft, model)
    try:
        # these layers have random weights, which the adapter must save
        kept = {"modules_to_save": getattr(model, "untrained_modules", None) or None}
        if parent:
            embeddings.grow(model, adapter_rows(parent))
            config = _config_of(parent, args, source)
        else:
            settings = kept | _arguments(model, args, method, steps) | {"revision": source.revision}
            config = getattr(peft, method.config)(task_type=TASKS[task].peft_type, **settings)
        with warnings.catch_warnings():  # that a name matches nothing, which is refused below
            warnings.filterwarnings("ignore", category=RuntimeWarning, module="peft")
            tuned = peft.get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        if not args.peft:
            raise
        raise ModelError(f"peft={args.peft}: {error}", hint=f"see peft.{method.config}") from error
    check_matches(args.peft, ModelNames(adapted=_adapted(tuned)))
    for parameter in tuned.parameters():  # peft leaves biases and rows of tokens in the precision of the base
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    tuned.peft_config["default"].base_model_name_or_path = source.name
    # peft would look for the base model's size on the Hub at each save, and save the complete embedding
    tuned.save_pretrained = partial(tuned.save_pretrained, save_embedding_layers=False)
    return tuned


def _config_of(parent: Path, args: MethodArgs, source: Source) -> Any:
    """The configuration of the adapter in `parent`, to be trained over `source` with the dropout of `args`."""
    config = peft.PeftConfig.from_pretrained(str(parent))
    config.inference_mode, config.revision = False, source.revision
    for key, value in (("lora_dropout", args.lora_dropout), ("init_lora_weights", True)):
        if hasattr(config, key):
            setattr(config, key, value)
    return config


def load_weights(model: Any, folder: Path) -> None:
    """Give an adapted model the weights of the adapter in `folder`, which has its shape.

    Raises: ModelError if the weights cannot be read, or do not fit.
    """
    try:
        found = peft.load_peft_weights(str(folder), device="cpu")
        expected = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
        unused: Any = peft.set_peft_model_state_dict(model, found).unexpected_keys  # type: ignore[attr-defined]
        if model.active_peft_config.is_prompt_learning:  # peft reports its only tensor, which it has loaded
            unused = []
    except (OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"the adapter in {folder} does not fit its base model: {' '.join(str(error).split())[:300]}",
            hint="restore its files, or choose another run",
        ) from error
    if missing := sorted(expected - found.keys()) + sorted(unused):
        raise ModelError(
            f"the adapter in {folder} does not fit its base model: {', '.join(missing[:3])} "
            f"{'is' if len(missing) == 1 else 'are'} on one side only",
            hint="choose another run, or another model_name",
        )


def _names(model: nn.Module) -> ModelNames:
    """The names in a base model."""
    modules = dict(model.named_modules())
    layers = [n for n, m in modules.items() if getattr(m, "weight", None) is not None and m.weight.ndim > 1]
    return ModelNames(list(modules), layers, [name for name, _ in model.named_parameters()])


def _check_parameters(given: Mapping[str, Any], model: Any) -> None:
    """Raises: ModelError if `peft: {...}` names rows or biases that the model does not have."""
    rows = model.get_input_embeddings().weight.shape[0]
    wanted = given.get("trainable_token_indices") or []
    ids = {i for each in wanted.values() for i in each} if isinstance(wanted, Mapping) else set(wanted)
    if wrong := sorted(i for i in ids if not (isinstance(i, int) and 0 <= i < rows)):
        shown = ", ".join(map(str, wrong))
        raise ModelError(
            f"peft.trainable_token_indices: {shown} is no row of the embedding, which has {rows:,}",
            hint="choose ids below that; new_tokens adds rows",
        )
    tied = model.config.get_text_config().tie_word_embeddings
    if tied and isinstance(wanted, Mapping) and len(set(map(tuple, wanted.values()))) > 1:
        raise ModelError(
            "peft.trainable_token_indices: the embedding and the output head of this model share their weights",
            hint="name the same ids for both",
        )
    if given.get("bias", "none") != "none" and not any(n.endswith(".bias") for n, _ in model.named_parameters()):
        raise ModelError(f"peft.bias={given['bias']}: this model has no bias", hint="remove the argument")


def _check_new_rows(model: Any, wanted: list[str]) -> None:
    """Raises: ModelError if `new_tokens` and `lora_target_modules` would train the same layer."""
    layers = embeddings.token_indices(model) or {}
    both = [w for w in wanted if any(f".{n}".endswith(f".{w}") for n in layers)]
    if both:
        raise ModelError(
            f"lora_target_modules names {', '.join(both)}, of which new_tokens or resize_embeddings trains rows; "
            "peft supports one of the two for a layer",
            hint=f"remove {', '.join(both)} from lora_target_modules",
        )


def _adapted(tuned: Any) -> list[str]:
    """The names of the layers with an adapter, as the base model has them."""
    modules = tuned.get_base_model().named_modules()
    return [name for name, module in modules if isinstance(module, BaseTunerLayer)]


def keep_differentiable(model: nn.Module) -> None:
    """Keep 4-bit layers differentiable across evaluations.

    In its first forward pass without gradients on a CPU with AVX512-bf16 instructions, bitsandbytes repacks their
    weights permanently for a kernel that has no backward pass: earlier layers would receive no gradient any more.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _arguments(model: Any, args: MethodArgs, method: Method, steps: int) -> dict[str, Any]:
    """Arguments of the peft class: the method's defaults, overridden by our settings and by `peft: {...}`."""
    arguments = {argument: getattr(args, key) for key, argument in method.keys.items()}
    if "target_modules" in arguments:
        by_layer = args.peft.get("layers_to_transform") is not None  # which peft accepts with a list only
        arguments["target_modules"] = arguments["target_modules"] or (_linear(model) if by_layer else "all-linear")
    if unused := [key for key in ("lora_r", "lora_alpha", "lora_dropout") if key not in method.keys]:
        log.info("method=%s does not use %s", args.method, ", ".join(unused))
    derived = method.derived(model, args, steps) if method.derived else {}
    if indices := embeddings.token_indices(model):
        derived |= {"trainable_token_indices": indices}
    return deepcopy({**method.fixed, **arguments, **args.peft, **derived})  # peft changes some of them in place


@contextmanager
def training_precision(model: nn.Module, dtype: str, fused: bool = True) -> Iterator[None]:
    """Compute the adapter's layers in `dtype` inside, for training only.

    Without this, peft casts the activations to the fp32 of the adapter's weights, and autocast casts them back.

    Args:
        fused: use this project's operations for dropout and LoRA where they apply, see fused_lora.py.
    """
    with ExitStack() as stack:
        stack.enter_context(_without_casts(model, active=dtype != "float32"))
        if fused:
            stack.enter_context(fused_lora.use_fast_dropout(model))
            stack.enter_context(fused_lora.use_fused_lora(model, dtype))
        yield


@contextmanager
def _without_casts(model: nn.Module, active: bool) -> Iterator[None]:
    """peft.helpers.disable_input_dtype_casting, which fails on a model with trained rows of tokens."""
    casting = [m for m in model.modules() if active and getattr(m, "cast_input_dtype_enabled", False)]
    for module in casting:
        module.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for module in casting:
            module.cast_input_dtype_enabled = True


def check_target_modules(model: nn.Module, wanted: list[str], *, embeddings: bool = False) -> None:
    """Raises: ModelError that lists the targets without a matching layer, and the existing layers.

    Args:
        embeddings: whether the method can adapt embeddings, in addition to linear layers.
    """
    layers = [n for n, m in model.named_modules() if _is_linear(m) or (embeddings and isinstance(m, nn.Embedding))]
    missing = [w for w in wanted if not any(n == w or n.endswith("." + w) for n in layers)]
    if missing:
        existing = sorted({n.rsplit(".", 1)[-1] for n in layers})
        raise ModelError(
            f"lora_target_modules: {', '.join(missing)} matches no layer of this model, which has "
            f"{', '.join(existing)}",
            hint="choose from these, or set lora_target_modules=null for all of them",
        )


def _linear(model: Any) -> list[str]:
    """The short names of the linear layers without the output head, as "all-linear" of peft."""
    head = model.get_output_embeddings()
    layers = [n for n, m in model.named_modules() if _is_linear(m) and m is not head]
    return sorted({name.rpartition(".")[2] for name in layers})


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or "Conv1D" in type(module).__name__


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """`(trainable, all)` parameter counts; a byte of a 4-bit tensor counts as two."""

    def count(p: torch.Tensor) -> int:
        return p.numel() * 2 if p.dtype == torch.uint8 else p.numel()

    parameters = list(model.parameters())
    return sum(count(p) for p in parameters if p.requires_grad), sum(count(p) for p in parameters)
