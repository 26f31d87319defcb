"""Load models from safetensors only, and run no code of their repositories unless trust_remote_code is set."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig, set_seed
from transformers.quantizers import AutoHfQuantizer

from ..errors import ModelError
from ..schema import ChatArgs, Task
from ..utils.logs import log
from . import embeddings
from .config_values import unknown_ends
from .folder_check import DAMAGED, weight_shapes
from .source import Source, TunedModel, adapter_rows, is_quantised
from .tasks import TASKS, check_architecture
from .tokenizer import OWN_TEMPLATE, from_pretrained, hub_revision, load_config, load_tokenizer

# load_base logs in its own words what transformers' coloured table lists.
logging.getLogger("transformers.modeling_utils").addFilter(lambda record: "LOAD REPORT" not in record.getMessage())

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, on every device."""
    set_seed(seed)


def load_base(
    source: Source,
    dtype: str,
    device: str,
    *,
    four_bit: bool = False,
    trust_remote_code: bool = False,
    task: Task = "causal_lm",
    labels: Sequence[str] = (),
    weights: Path | None = None,
) -> tuple[Any, Source]:
    """Load the base model onto `device`. Returns: the model, and its source with the revision as a commit.

    The model's attribute `untrained_modules` names the layers without weights in its files, such as the head of a
    new classifier: torch initialises them at random, so the caller seeds its generator.
    `weights`: a folder with tuned weights of the base model, which are loaded in place of its own.
    Raises: ModelError if the model cannot be loaded, or does not support the task.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(
            f"nvidia-smi shows a GPU, but torch {torch.__version__} cannot use it",
            hint="install a CUDA build of torch that fits the driver, or set hardware=cpu",
        )
    kind = getattr(transformers, TASKS[task].auto_class)
    config = _config(source, task, labels, trust_remote_code)
    if weights:  # they may have rows for more tokens
        config.get_text_config().vocab_size = load_config(str(weights)).get_text_config().vocab_size
    quantised: dict[str, Any] = {}
    if four_bit:
        heads = _head_patterns(kind, config) if labels else None
        quantised = {"quantization_config": _nf4_config(dtype, heads), "device_map": {"": device}}
    model, found = from_pretrained(
        kind,
        str(weights or source.location),
        config=config,
        revision=None if weights else hub_revision(source.revision),
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=bool(labels),  # the head of a classifier with other labels
        dtype=DTYPES[dtype],
        **quantised,
    )
    new = [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]
    model.untrained_modules = sorted({_layer_of(key, model.base_model_prefix) for key in new} - {""})
    if model.untrained_modules and not labels:
        log.warning("%s has no weights for %s, which are random", source.name, ", ".join(model.untrained_modules))
    if unused := sorted({key.split(".")[0] for key in found["unexpected_keys"]}):
        log.info("%s: weights that this task does not use: %s", source.name, ", ".join(unused))
    if four_bit and device == "cpu":
        _unmap_file(model)
    return (model if four_bit else model.to(device)), resolve_revision(source, model.config)


def _unmap_file(model: Any) -> None:
    """Copy the parameters that are not packed: as views of the mapped file they keep all of it in memory."""
    for parameter in model.parameters():
        if parameter.dtype != torch.uint8:
            parameter.data = parameter.data.clone()


def resolve_revision(source: Source, config: Any) -> Source:
    """`source` with the commit that `config` was downloaded from as its revision."""
    commit = getattr(config, "_commit_hash", None)
    return replace(source, revision=commit) if source.folder is None and commit else source


def build_meta_model(
    source: Source,
    dtype: str,
    *,
    four_bit: bool = False,
    trust_remote_code: bool = False,
    task: Task = "causal_lm",
    labels: Sequence[str] = (),
) -> Any:
    """The model of `load_base` on the meta device: shapes and dtypes without weights.

    Raises: ModelError if its config.json cannot be loaded, or it does not support the task.
    """
    kind = getattr(transformers, TASKS[task].auto_class)
    config = _config(source, task, labels, trust_remote_code)
    heads = _head_patterns(kind, config) if labels and four_bit else None
    with torch.device("meta"):
        model = _from_config(source, kind, config, dtype, trust_remote_code)
        if four_bit:
            quantizer = AutoHfQuantizer.from_config(_nf4_config(dtype, heads))
            quantizer.preprocess_model(model=model, device_map=None)
            quantizer.postprocess_model(model)
    # only loading shows which layers have no weights: assume that a classifier's head has none
    head = [(n, m) for n, m in model.named_children() if n != model.base_model_prefix] if labels else []
    model.untrained_modules = [name for name, module in head if any(True for _ in module.parameters())]
    return model


def check_shapes(source: Source, task: Task, labels: Sequence[str], trust_remote_code: bool) -> None:
    """Check that the weights of a model folder have the shapes that its config.json makes.

    Quantised weights are packed, and layers of a head are replaced where the labels differ: they are not compared.
    Raises: ModelError if no model can be made of config.json, or a shape differs.
    """
    if source.folder is None:
        return
    model = build_meta_model(source, "float32", trust_remote_code=trust_remote_code, task=task, labels=labels)
    for end in unknown_ends(model.config.to_dict()):
        log.warning(
            "%s: config.json has eos_token_id=%s beyond its vocabulary: no answer ends with it", source.name, end
        )
    if is_quantised(source):
        return
    found = weight_shapes(source.folder)
    wanted = model.state_dict()
    if not {_ending(name) for name in found} & {_ending(name) for name in wanted}:
        raise ModelError(
            f"{source.name}: the files hold none of the weights of the model that config.json describes, such as "
            f"{next(iter(wanted))}; they hold {min(found)}",
            hint=DAMAGED,
        )
    trunk = f"{model.base_model_prefix}." if labels else ""
    wrong = [
        f"{name} is {_by(found[name])} in the files, and {_by(tensor.shape)} by config.json"
        for name, tensor in wanted.items()
        if name.startswith(trunk) and name in found and found[name] != tuple(tensor.shape)
    ]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ModelError(
            f"{source.name}: {wrong[0]}{more}", hint="it is the config.json of another model; restore it"
        )


def _ending(name: str) -> str:
    """The module and parameter of a tensor's name: before them, files of one model differ in prefixes."""
    return ".".join(name.split(".")[-2:])


def _from_config(source: Source, kind: Any, config: Any, dtype: str, trust_remote_code: bool) -> Any:
    """Raises: ModelError if the model's code fails on the values of config.json, in whatever way."""
    try:
        return kind.from_config(config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)
    except ImportError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{source.name}: no model can be made of its config.json ({type(error).__name__}: {reason})",
            hint="restore its config.json",
        ) from error


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def _config(source: Source, task: Task, labels: Sequence[str], trust_remote_code: bool) -> Any:
    """The model's config with the labels. Raises: ModelError if the model does not support the task."""
    config = load_config(source.location, source.revision, trust_remote_code)
    check_architecture(config.to_dict(), source.name, task)
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
    return config


def _nf4_config(dtype: str, skip_modules: list[str] | None) -> BitsAndBytesConfig:
    """nf4 quantisation of all layers except `skip_modules` (patterns; None: the output head)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[dtype],
        llm_int8_skip_modules=skip_modules,
    )


def _head_patterns(kind: Any, config: Any) -> list[str]:
    """Patterns of the layers of a classifier that may be untrained: 4-bit weights cannot be trained."""
    with torch.device("meta"):
        shell = kind.from_config(config)
    return [*(name for name, _ in shell.named_children() if name != shell.base_model_prefix), r".*pooler"]


def _layer_of(key: str, trunk: str) -> str:
    """The layer of the parameter `key`; outside the `trunk` (base_model_prefix) the complete head."""
    head = key.split(".")[0]
    return key.rpartition(".")[0] if head == trunk else head


def set_pad_token(model: Any, tokenizer: Any) -> None:
    """Give a classifier the tokenizer's padding token, by which a decoder finds the end of a text."""
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def load_tuned(
    tuned: TunedModel,
    dtype: str,
    device: str,
    *,
    trust_remote_code: bool = False,
    task: Task = "causal_lm",
    labels: Sequence[str] = (),
    chat: ChatArgs = OWN_TEMPLATE,
) -> tuple[Any, Any, Source]:
    """A tuned model, its tokenizer, and its base model's source (the model's own for full weights).

    Raises: ModelError if the folder, or the base model of the adapter, cannot be loaded.
    """
    tokenizer = load_tokenizer(
        str(tuned.folder), trust_remote_code=trust_remote_code, templated=TASKS[task].chat_template, chat=chat
    )
    model, source = load_base(
        tuned.base, dtype, device, trust_remote_code=trust_remote_code, task=task, labels=labels
    )
    if labels:
        set_pad_token(model, tokenizer)
    return attach_adapter(model, tuned), tokenizer, source


def attach_adapter(model: Any, tuned: TunedModel) -> Any:
    """Add the adapter to its base model, in the base's precision, as in training; full weights stay as they are.

    In fp32, which is peft's default, every layer would cast its input.
    Raises: ModelError if peft cannot read the adapter, or it does not fit.
    """
    if not tuned.is_adapter:
        return model
    embeddings.grow(model, adapter_rows(tuned.folder))
    with warnings.catch_warnings():  # peft reads AdaLoRA's rank_pattern as LoRA's, and warns
        warnings.filterwarnings("ignore", message="The following rank_pattern keys")
        try:
            return PeftModel.from_pretrained(model, str(tuned.folder), autocast_adapter_dtype=False)
        except torch.OutOfMemoryError:
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"the adapter {tuned.folder} cannot be loaded: {reason}", hint=DAMAGED) from error
