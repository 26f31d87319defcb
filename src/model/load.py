"""Loading models, safely: safetensors only, no code of the model's repository unless asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

from src.errors import ModelError
from src.model.source import Source, Tuned
from src.model.tokenizer import fetched, hub_revision, load_tokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, on every device."""
    set_seed(seed)


def nf4(dtype: str) -> BitsAndBytesConfig:
    """4-bit weights that are computed on in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[dtype],
    )


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
    model = fetched(
        AutoModelForCausalLM,
        source.location,
        revision=hub_revision(source.revision),
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        dtype=DTYPES[dtype],
        **({"quantization_config": nf4(dtype), "device_map": {"": device}} if four_bit else {}),
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
