"""Load tokenizers and configs by `from_pretrained`, with one clear message if that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from ..errors import ModelError
from ..utils.logs import log

# For tokenizers without a chat template, as those of base models. It uses plain words instead of special tokens;
# an answer ends with the tokenizer's end-of-sequence token.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Request:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ '### Answer:\n' + message['content'] + eos_token + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Answer:\n' }}{% endif %}"
)


def load_tokenizer(
    location: str, revision: str | None = None, trust_remote_code: bool = False, *, templated: bool = True
) -> Any:
    """The tokenizer with a padding token, and with a chat template if it is `templated`.

    Raises: ModelError if it cannot be loaded, or has no end-of-sequence token although one is needed.
    """
    tokenizer = from_pretrained(
        AutoTokenizer, location, revision=hub_revision(revision), trust_remote_code=trust_remote_code
    )
    if tokenizer.eos_token is None and (templated or tokenizer.pad_token is None):
        raise ModelError(f"{location}: the tokenizer has no end-of-sequence token", hint="set eos_token in it")
    if templated and tokenizer.chat_template is None:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
        log.warning(
            "%s has no chat template: the default one (### Request / ### Answer) is used and saved with the model",
            location,
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(location: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's config, without its weights. Raises: ModelError if it cannot be loaded."""
    return from_pretrained(
        AutoConfig, location, revision=hub_revision(revision), trust_remote_code=trust_remote_code
    )


def hub_revision(revision: str | None) -> str | None:
    """`revision` if it is one of the Hub; None for the content hash of a local folder."""
    return None if revision and revision.startswith("sha256:") else revision


def from_pretrained(kind: Any, location: str, **arguments: Any) -> Any:
    """`kind.from_pretrained(location)`. Raises: ModelError if that fails."""
    try:
        return kind.from_pretrained(location, **arguments)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        where = "" if Path(location).exists() else " (it is not a local folder, and the Hub did not provide it)"
        raise ModelError(f"{location} cannot be loaded{where}: {reason[:300]}", hint=_remedy(reason)) from error


def _remedy(reason: str) -> str:
    if "gated" in reason or "401" in reason or "403" in reason:
        return "request access on the model's page and set HF_TOKEN"
    if "trust_remote_code" in reason:
        return "review that code, then set trust_remote_code=true"
    return "check model_name and the network"
