"""Load tokenizers and configs by `from_pretrained`, with one clear message if that fails."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from .. import chat_templates
from ..errors import ConfigError, ModelError, did_you_mean
from ..schema import ChatArgs
from ..utils.limits import refuse_endless
from ..utils.logs import log
from ..utils.network import network_cause
from .config_values import config_problems
from .folder_check import DAMAGED

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

HUB = "https://huggingface.co"
NAME_ANOTHER = "review it, or set chat_template to another one"
_tried: set[tuple[str, str]] = set()  # chat templates that have passed
OWN_TEMPLATE = ChatArgs()


def load_tokenizer(
    location: str, revision: str | None = None, trust_remote_code: bool = False, *, templated: bool = True,
    chat: ChatArgs = OWN_TEMPLATE, new_tokens: Sequence[str] = (),
) -> Any:  # fmt: skip
    """The tokenizer with a padding token, and with a chat template if it is `templated`.

    Args:
        chat: the template in place of the tokenizer's own, and variables that the template must read.
        new_tokens: tokens to add. Those that the template writes are special; the others stay in decoded text.
    Raises: ModelError if it cannot be loaded, or has no end-of-sequence token although one is needed; ConfigError
        if the template does not read a variable of `chat`, or if it has one of `new_tokens` already.
    """
    tokenizer = from_pretrained(
        AutoTokenizer, location, revision=hub_revision(revision), trust_remote_code=trust_remote_code
    )
    if tokenizer.eos_token is None and (templated or tokenizer.pad_token is None):
        raise ModelError(f"{location}: the tokenizer has no end-of-sequence token", hint="set eos_token in it")
    if templated:
        _set_template(tokenizer, location, chat)
    _add_tokens(tokenizer, location, new_tokens)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _add_tokens(tokenizer: Any, location: str, tokens: Sequence[str]) -> None:
    vocabulary = tokenizer.get_vocab() if tokens else {}
    if known := [token for token in tokens if token in vocabulary]:
        raise ConfigError(
            *(f"new_tokens: {token} is a token of {location} already" for token in known), hint="leave it out"
        )
    template = str(tokenizer.chat_template or "")
    tokenizer.add_tokens([AddedToken(token, special=token in template, normalized=False) for token in tokens])


def _set_template(tokenizer: Any, location: str, chat: ChatArgs) -> None:
    if chat.chat_template is not None:
        own, tokenizer.chat_template = tokenizer.chat_template, chat_templates.read(chat.chat_template)
        if own is not None and own != tokenizer.chat_template:
            log.info("chat template: %s, in place of that of %s", chat.chat_template, location)
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
        log.warning(
            "%s has no chat template: the default one (### Request / ### Answer) is used and saved with the "
            "model; chat_template=NAME chooses another",
            location,
        )
    _try_template(tokenizer, location, chat)
    if chat.chat_template_kwargs:
        _check_variables(tokenizer.chat_template, chat.chat_template_kwargs)


def _try_template(tokenizer: Any, location: str, chat: ChatArgs) -> None:
    """Raises: LimitExceeded if the chat template takes too long or too much memory for a short conversation."""
    turns = [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "user", "assistant")]
    cases = [(turns[i:j], prompt) for i, j in ((1, 2), (1, 3), (0, 3), (0, 4), (0, 5)) for prompt in (False, True)]

    def render() -> None:
        for messages, prompt in cases:
            try:
                tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt, **chat.chat_template_kwargs or {}
                )
            except MemoryError:
                raise
            except Exception:  # a template may reject a conversation, as those with a system turn
                continue

    key = (str(tokenizer.chat_template), str(chat.chat_template_kwargs))
    if key not in _tried:
        name = chat.chat_template or f"of {location}"
        refuse_endless(render, f"rendering a short conversation by the chat template {name}", NAME_ANOTHER)
        _tried.add(key)


def _check_variables(template: str | dict[str, str], variables: Iterable[str]) -> None:
    """Raises: ConfigError for variables that the template does not read, which would have no effect."""
    texts = template.values() if isinstance(template, dict) else [template]
    known = set().union(*map(chat_templates.variables, texts)) - chat_templates.PROVIDED
    problems = [
        f"chat_template_kwargs.{name} is not a variable of the chat template{did_you_mean(name, known)}"
        for name in variables
        if name not in known
    ]
    if problems:
        raise ConfigError(*problems, hint=f"its variables: {', '.join(sorted(known)) or 'none'}")


def load_config(location: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's config, without its weights. Raises: ModelError if it cannot be loaded."""
    arguments = {"revision": hub_revision(revision), "trust_remote_code": trust_remote_code}
    if wrong := list(config_problems(from_pretrained(_RawConfig, location, **arguments))):
        raise ModelError(*(f"{location}: {problem}" for problem in wrong), hint=DAMAGED)
    return from_pretrained(AutoConfig, location, **arguments)


class _RawConfig:
    """config.json as a dict: AutoConfig makes lists as long as the model has layers, however many it names."""

    @staticmethod
    def from_pretrained(location: str, **arguments: Any) -> dict[str, Any]:
        return PretrainedConfig.get_config_dict(location, **arguments)[0]


def hub_revision(revision: str | None) -> str | None:
    """`revision` if it is one of the Hub; None for the content hash of a local folder."""
    return None if revision and revision.startswith("sha256:") else revision


def from_pretrained(kind: Any, location: str, **arguments: Any) -> Any:
    """`kind.from_pretrained(location)`. Raises: ModelError if that fails."""
    try:
        return kind.from_pretrained(location, **arguments)
    except (OSError, ValueError, KeyError, ImportError) as error:
        is_local = os.path.exists(location)
        cause = None if is_local else network_cause(error, os.environ.get("HF_ENDPOINT") or HUB)
        if isinstance(error, ImportError) and not cause:
            raise
        where = "" if is_local else " (it is not a local folder, and the Hub did not provide it)"
        text = " ".join(str(error).split())
        reason, remedy = cause or (text[:300], _remedy(text))
        raise ModelError(f"{location} cannot be loaded{where}: {reason}", hint=remedy) from error
    except Exception as error:  # the libraries in Rust raise classes of their own, and Exception itself
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or not Path(location).exists():
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ModelError(f"{location} cannot be loaded: {reason}", hint=DAMAGED) from error


def _remedy(reason: str) -> str:
    if "gated" in reason or "401" in reason or "403" in reason:
        return "request access on the model's page and set HF_TOKEN"
    if "trust_remote_code" in reason:
        return "review that code, then set trust_remote_code=true"
    return "check model_name and the network"
