"""Chat templates that a setting chooses: files in configs/chat_templates by name, or a file of the user.

The setting is checked before anything heavy is imported; `src.model.tokenizer` gives the text to the tokenizer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import config_files
from .errors import did_you_mean
from .utils.limits import LimitExceeded, refuse_endless

FOLDER, SUFFIX = "chat_templates", ".jinja"  # configs/chat_templates/NAME.jinja
TEMPLATE_KWARGS = "chat_template_kwargs"  # a setting, and a key of records where it is set
PROMPT_SUFFIX = "prompt_suffix"  # key of records: an empty think block that a prompt must end with
EMPTY_THOUGHTS = "empty_thoughts"  # likewise: recorded where the template writes empty think blocks
# Arguments of `apply_chat_template` that the program sets, or that are not variables of a template.
RESERVED = {
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length", "messages",
    "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize", "tokenizer_kwargs",
    "tools", "truncation",
}  # fmt: skip
# Names that a template reads and a user does not set: arguments, and what transformers gives every template.
PROVIDED = RESERVED | {"bos_token", "eos_token", "pad_token", "unk_token", "raise_exception", "strftime_now"}
QUESTIONS = {"defined", "undefined", "default", "d"}  # tests and filters that ask whether a name has a value
# The block that marks answers, which transformers adds to Jinja.
GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")


def find(value: str) -> Path | None:
    """The file of a template that is given by its name or by its path; None if there is none."""
    own = config_files.find(f"{FOLDER}/{value}", SUFFIX)
    return own or (path if os.path.isfile(path := Path(value).expanduser()) else None)


def names() -> list[str]:
    """The names of the templates in configs/."""
    return config_files.presets(FOLDER, SUFFIX)


def description(name: str) -> str:
    """The comment at the beginning of a template in configs/; empty without one."""
    found = re.match(r"\{#-?\s*(.*?)\s*-?#\}", read(name))
    return found[1] if found else ""


def read(value: str) -> str:
    """The text of a template that `find` finds, exactly: it is part of what a model is tuned with."""
    path = find(value)
    assert path is not None, value  # `problems` refuses it
    return path.read_text(encoding="utf-8")


def variables(text: str) -> set[str]:
    """The variables that a template reads and that a caller can set. Raises: jinja2.TemplateSyntaxError.

    A name that the template assigns itself counts only if it asks whether the name is defined, or gives a default.
    """
    from jinja2 import Environment, meta, nodes

    tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION_BLOCK.sub("", text))
    assigned = {node.name for node in tree.find_all(nodes.Name) if node.ctx != "load"}
    questions = (each for each in tree.find_all((nodes.Test, nodes.Filter)) if each.name in QUESTIONS)
    asked = {each.node.name for each in questions if isinstance(each.node, nodes.Name)}
    return meta.find_undeclared_variables(tree) - (assigned - asked)


def problems(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the chat settings among composed `values`, one sentence each."""
    template, kwargs = values.get("chat_template"), values.get(TEMPLATE_KWARGS)
    found = _template_problems(template) if isinstance(template, str) and template else []
    reserved = sorted(RESERVED.intersection(kwargs)) if isinstance(kwargs, Mapping) else []
    found += [f"chat_template_kwargs.{key} is not a variable of a template; remove it" for key in reserved]
    task = values.get("task")
    if task in ("seq2seq", "classification"):
        used = [key for key, value in (("chat_template", template), (TEMPLATE_KWARGS, kwargs)) if value]
        found += [f"{key} is not supported with task={task}, which has no chat template" for key in used]
    return found


def _template_problems(value: str) -> list[str]:
    from jinja2 import TemplateSyntaxError

    path = find(value)
    if path is None:
        guess = did_you_mean(value, names())
        return [
            f"chat_template={' '.join(value.split())[:60]} is neither a file nor a name{guess}; "
            f"give PATH.jinja or one of: {', '.join(names())}"
        ]
    try:
        text = read(value)
        refuse_endless(lambda: variables(text), f"reading {path}", "correct it")  # constants are computed then
        if "messages" not in variables(text):
            return [f"chat_template={value}: {path} is not a chat template: it does not read messages"]
    except UnicodeDecodeError:
        return [f"chat_template={value}: {path} is not UTF-8 text"]
    except LimitExceeded as error:
        return [f"chat_template={value}: {error.problems[0]}"]
    except OSError as error:
        return [f"chat_template={value}: {path} cannot be read: {error.strerror}"]
    except TemplateSyntaxError as error:
        return [f"chat_template={value}: line {error.lineno} of {path} is not Jinja: {error.message}"]
    return []
