"""Loading models and tokenizers, safely: safetensors only, no code of the model's repository unless asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed

from src.errors import ModelError
from src.model.source import Source, Tuned
from src.utils.logs import log

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Used, and said so, where a tokenizer has no chat template, as base models have none. Plain words, so that
# no special token is assumed; an answer ends with the tokenizer's own end-of-sequence token.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Request:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ '### Answer:\n' + message['content'] + eos_token + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Answer:\n' }}{% endif %}"
)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, on every device."""
    set_seed(seed)


def load_tokenizer(location: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer with a chat template and a padding token.

    Raises: ModelError if it cannot be had, or has no end-of-sequence token.
    """
    tokenizer = _fetched(
        AutoTokenizer, location, revision=_hub_revision(revision), trust_remote_code=trust_remote_code
    )
    if tokenizer.eos_token is None:
        raise ModelError(f"{location}: the tokenizer has no end-of-sequence token", hint="set eos_token in it")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
        log.warning(
            "%s has no chat template: using the default one (### Request / ### Answer), saved with the model",
            location,
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    source: Source, dtype: str, device: str, *, four_bit: bool = False, trust_remote_code: bool = False
) -> tuple[Any, Source]:
    """The base model on `device`, and its source with the revision resolved to a commit.

    Raises: ModelError if it cannot be had.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            f"nvidia-smi shows a GPU, but torch {torch.__version__} cannot use it",
            hint="install a CUDA build of torch that fits the driver, or set hardware=cpu",
        )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[dtype],
    )
    model = _fetched(
        AutoModelForCausalLM,
        source.location,
        revision=_hub_revision(source.revision),
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        dtype=DTYPES[dtype],
        **({"quantization_config": quantization, "device_map": {"": device}} if four_bit else {}),
    )
    commit = getattr(model.config, "_commit_hash", None)
    if source.folder is None and commit:
        source = replace(source, revision=commit)
    return (model if four_bit else model.to(device)), source


def load_tuned(
    tuned: Tuned, dtype: str, device: str, *, trust_remote_code: bool = False
) -> tuple[Any, Any, Source]:
    """A tuned model, its tokenizer, and the base that it is made of (itself, for full weights).

    Raises: ModelError if the folder, or the adapter's base model, cannot be loaded.
    """
    tokenizer = load_tokenizer(str(tuned.folder), trust_remote_code=trust_remote_code)
    model, source = load_base(tuned.base, dtype, device, trust_remote_code=trust_remote_code)
    if not tuned.is_adapter:
        return model, tokenizer, source
    # in the precision that it was computed in during training, not in fp32 with a cast at every layer
    model = PeftModel.from_pretrained(model, str(tuned.folder), autocast_adapter_dtype=False)
    return model, tokenizer, source


def _hub_revision(revision: str | None) -> str | None:
    """A content hash names a local folder; only the Hub has revisions."""
    return None if revision and revision.startswith("sha256:") else revision


def _fetched(kind: Any, location: str, **arguments: Any) -> Any:
    try:
        return kind.from_pretrained(location, **arguments)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        where = "" if Path(location).exists() else " (it is no folder here, and the Hub did not give it)"
        raise ModelError(f"{location} cannot be loaded{where}: {reason[:300]}", hint=_remedy(reason)) from error


def _remedy(reason: str) -> str:
    if "gated" in reason or "401" in reason or "403" in reason:
        return "ask for access on the model's page and set HF_TOKEN"
    if "trust_remote_code" in reason:
        return "read that code first, then set trust_remote_code=true"
    return "check model_name and the network"
