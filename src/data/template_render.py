"""Render plain conversations by the compiled chat template, without the work that transformers does per call.

`apply_chat_template` copies every value and collects the template's globals for each conversation. This takes
longer than rendering a short one. Turns that hold nothing but texts need neither: the environment is the same
sandbox, in which a template cannot change what it is given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple

from .conversation import Conversation

PLAIN_TYPES = {str, int}  # exact types: a subclass may have methods that a template must not reach
PLAIN_KEYS = {"role", "content", "name", "weight"}  # transformers passes thoughts under several keys


def is_plain(conversation: Conversation) -> bool:
    """Whether all that the template reads of a conversation is the texts of its turns."""
    messages, tools, kwargs = conversation
    return not (tools or kwargs) and all(
        turn.keys() <= PLAIN_KEYS and PLAIN_TYPES.issuperset(map(type, turn.values())) for turn in messages
    )


class Library(NamedTuple):
    """Functions of transformers: render a conversation, compile a template, and reduce values to plain types."""

    apply: Callable[..., Any]
    compile: Callable[[str], Any]
    plain: Callable[[Any], Any]


def _library() -> Library | None:
    """None if transformers, which a tokenizer of it has loaded, is missing or of another version."""
    base: Any = sys.modules.get("transformers.tokenization_utils_base")
    utils: Any = sys.modules.get("transformers.utils.chat_template_utils")
    try:
        standard = base.PreTrainedTokenizerBase.apply_chat_template
        return Library(standard, utils._compile_jinja_template, utils._plain_template_data)
    except AttributeError:
        return None


class PlainTemplate:
    """A compiled chat template with all that it reads besides messages.

    Args:
        template: as transformers compiles it.
        variables: special tokens and variables of the template, of plain types.
    """

    def __init__(self, template: Any, variables: Mapping[str, Any]) -> None:
        self._template = template
        self._shared = {**dict(template.globals), **variables, "tools": None, "documents": None}

    @classmethod
    def of(cls, tokenizer: Any, variables: Mapping[str, Any]) -> PlainTemplate | None:
        """The chat template of a tokenizer; None if the tokenizer has several, or renders in its own way."""
        library = _library()
        if library is None or not isinstance(tokenizer.chat_template, str):
            return None
        overridden = getattr(type(tokenizer), "apply_chat_template", None) is not library.apply
        if overridden or signature(library.apply).parameters.keys() & variables.keys():
            return None
        plain = library.plain({**tokenizer.special_tokens_map, **variables})
        return cls(library.compile(tokenizer.chat_template), plain)

    def render(self, messages: Sequence[Any], prompt: bool = False) -> str:
        """The text of plain messages; with `prompt` it ends where the next answer begins.

        Raises: what the template raises; ValueError without a message.
        """
        return "".join(self._blocks(messages, prompt))

    def answers(self, messages: Sequence[Any]) -> tuple[str, list[tuple[int, int]]]:
        """The text of plain messages, and the start and end of each `{% generation %}` block in it.

        Raises: as `render`.
        """
        blocks: list[str] = []
        spans: list[tuple[int, int]] = []
        with self._template.environment.activate_tracker(blocks, spans):
            for block in self._blocks(messages, prompt=False):
                blocks.append(block)  # the tracker counts their characters
        return "".join(blocks), spans

    def _blocks(self, messages: Sequence[Any], prompt: bool) -> Any:
        if not messages:
            raise ValueError("a conversation without a message")
        values = self._shared | {"messages": list(messages), "add_generation_prompt": prompt}
        return self._template.root_render_func(self._template.new_context(values, shared=True))
