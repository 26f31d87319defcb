"""Render and tokenize conversations, by one code path for training and evaluation.

A conversation is rendered as text, which segments.py tokenizes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import date
from functools import cached_property
from typing import Any

from .. import chat_templates
from ..chat_templates import EMPTY_THOUGHTS, PROMPT_SUFFIX, TEMPLATE_KWARGS
from ..schema import EmptyThoughts
from ..utils.limits import LimitExceeded, limited
from .answer_text import AnswerText, CharSpan, answer_text
from .content_check import ContentCheck
from .formats import TEMPLATE_KEYS, TEXT, Conversation, Message, RowError
from .segments import RenderedChat, SegmentTokenizer
from .template_forms import Adapted
from .template_profile import TemplateProfile
from .template_render import PlainTemplate, is_plain
from .turn_markup import TurnMarkup

RENDERING = "rendering one conversation by the chat template"
IDENTITY_FILE = "tokenization.json"  # holds ChatTokenizer.identity, in the model folder
THINKING_SWITCHES: tuple[dict[str, Any], ...] = (
    {"enable_thinking": False},
    {"thinking": False},
    {"skip_think": True},
)


class ChatTokenizer(SegmentTokenizer):
    """A tokenizer with its chat template.

    Args:
        template_kwargs: variables of the template for every conversation. Those of a conversation win.
        empty_thoughts: whether the empty think block that the template writes before an answer without thoughts
            is part of the prompt (`context`) or of the answer (`loss`).
    """

    def __init__(
        self,
        tokenizer: Any,
        template_kwargs: Mapping[str, Any] | None = None,
        empty_thoughts: EmptyThoughts = "context",
    ) -> None:
        super().__init__(tokenizer)
        self.empty_thoughts = empty_thoughts
        self.prompt_settings: dict[str, Any] = {}  # what `record_prompt_settings` adds to the identity
        self.template_kwargs = dict(template_kwargs or {})
        self._profiles: dict[str, TemplateProfile] = {}

    # Text

    def render(self, conversation: Conversation, *, prompt: bool = False) -> str:
        """The text of a conversation. With `prompt` it ends where the next answer begins.

        Raises: RowError if the chat template rejects the turns.
        """
        adapted = self.adapt(conversation)
        return adapted.restore(self._render(adapted.conversation, prompt))

    def _render(self, conversation: Conversation, prompt: bool = False) -> str:
        """The text of a conversation that has the form that the template reads."""
        try:
            if self.plain_template and is_plain(conversation):
                return str(limited(RENDERING, self.plain_template.render, conversation.messages, prompt))
            return str(
                limited(
                    RENDERING, self.tokenizer.apply_chat_template, list(conversation.messages), tokenize=False,
                    add_generation_prompt=prompt, **self.template_arguments(conversation),
                )
            )  # fmt: skip
        except LimitExceeded:
            raise
        except Exception as error:  # a template is a program, and may fail in any way
            reason = str(error) or type(error).__name__
            if type(error).__name__ == "SecurityError":  # of jinja2.sandbox
                reason += " (transformers forbids it: set chat_template to a template without it)"
            raise RowError("template", f"is rejected by the chat template: {reason}") from error

    @cached_property
    def plain_template(self) -> PlainTemplate | None:
        """The chat template for conversations without tools, thoughts or variables of their own."""
        return PlainTemplate.of(self.tokenizer, self.template_kwargs)

    def template_arguments(self, conversation: Conversation) -> dict[str, Any]:
        """The arguments of `apply_chat_template` that follow from a conversation: its tools and variables."""
        tools = list(conversation.tools) if conversation.tools else None
        return self.template_kwargs | dict(conversation.template_kwargs or {}) | {"tools": tools}

    def adapt(self, conversation: Conversation) -> Adapted:
        """The conversation in the form that the chat template reads.

        Raises: RowError if it has none.
        """
        return self.profile(conversation.template_kwargs).adapt(conversation)

    def profile(self, template_kwargs: Mapping[str, Any] | None = None) -> TemplateProfile:
        """What the chat template wants, with these variables of a conversation."""
        key = json.dumps(template_kwargs, sort_keys=True, default=str) if template_kwargs else ""
        if key not in self._profiles:
            self._profiles[key] = TemplateProfile(self._render, str(self.tokenizer.chat_template), template_kwargs)
        return self._profiles[key]

    @cached_property
    def content_check(self) -> ContentCheck:
        return ContentCheck(self.render)

    @cached_property
    def markup(self) -> TurnMarkup:
        """What the chat template writes around answers."""
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values()]
        return TurnMarkup(
            self.render, str(self.tokenizer.chat_template), [*self.special_tokens, *added],
            self.tokenizer.eos_token, self.profile().tools_for_probes,
        )  # fmt: skip

    def training_texts(self, conversation: Conversation) -> list[RenderedChat]:
        """The texts to train on. Each answer of the conversation has loss in exactly one text.

        One text is enough if the text of each answer is the beginning of the next one's. A template that renders
        earlier answers differently (for example without their thoughts) gives one text per answer, as the model
        sees it at inference.

        Raises: RowError if the template rejects the turns, or does not render an answer after its prompt.
        """
        first = conversation.messages[0]
        if first["role"] == TEXT:
            return [self._document(first["content"])]
        answers = self._answer_texts(conversation)
        spans = [a.locate_in(answers[-1].text) for a in answers]
        if all(spans):
            return [RenderedChat(answers[-1].text, tuple(filter(None, spans)), tuple(a.turn for a in answers))]
        return [
            RenderedChat(answer.text, (answer.span,), (answer.turn,), self._earlier(answers[:number], answer.text))
            for number, answer in enumerate(answers)
        ]

    def _earlier(self, answers: Sequence[AnswerText], text: str) -> tuple[CharSpan, ...]:
        return tuple(filter(None, (answer.locate_in(text) for answer in answers)))

    def _document(self, text: str) -> RenderedChat:
        """A document between the tokenizer's BOS and EOS tokens, with loss on all of it except BOS."""
        bos, eos = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
        start = bos if bos and self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id] else ""
        text = ("" if text.startswith(start) else start) + text + ("" if text.endswith(eos) else eos)
        return RenderedChat(text, (CharSpan(len(start), len(text)),), (0,))

    def _answer_texts(self, conversation: Conversation) -> list[AnswerText]:
        turns = [i for i, turn in enumerate(conversation.messages) if turn["role"] == "assistant"]
        return [self._answer_text(conversation, i) for i in turns]

    def _answer_text(self, conversation: Conversation, turn: int) -> AnswerText:
        return answer_text(self, conversation, turn, train_empty_thoughts=self.empty_thoughts == "loss")

    def has_end_of_turn(self, rendered: RenderedChat) -> bool:
        """Whether every answer ends with one of `stop_tokens`, so that the model learns to stop."""
        ends = tuple(self.stop_tokens)
        return all(rendered.text.endswith(ends, s.start, s.end) for s in rendered.answer_spans)

    def refuse_control_tokens(self, conversation: Conversation) -> None:
        """Raises: RowError if a message or a tool contains a control token of the template as text.

        It would be tokenized as that token, and end a turn or begin another inside the message. Special tokens
        that the template does not use, such as the <filename> of a code model, are harmless.
        """
        turns = [_rendered_fields(turn) for turn in conversation.messages if turn["role"] != TEXT]
        tools = [json.dumps(tool, ensure_ascii=False, default=str) for tool in conversation.tools or ()]
        for texts, place in ((turns, "a message"), (tools, "its tools")):
            held = next((token for token in self._control_tokens for text in texts if token in text), None)
            if held:
                raise RowError("control_token", f"holds the control token {held} as text in {place}")

    @cached_property
    def _control_tokens(self) -> list[str]:
        turns: list[Message] = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
        probe = Conversation(turns, self.profile().tools_for_probes)
        shown = self.render(probe) + self.render(probe.upto(1), prompt=True) + str(self.tokenizer.chat_template)
        with suppress(RowError):  # the template may not allow a system turn
            shown += self.render(probe._replace(messages=[{"role": "system", "content": "."}, *turns]))
        used = {*self.special.findall(shown), *filter(None, (self.tokenizer.bos_token, self.tokenizer.eos_token))}
        return sorted(used, key=len, reverse=True)

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """The token ids of a conversation up to where its answer begins: its last message, or the next one.

        These are the tokens that precede the answer in training.

        Raises: RowError if the chat template rejects the turns.
        """
        *before, last = conversation.messages
        if last["role"] == "assistant" and (last["content"].strip() or last.get("tool_calls")):
            text = self._text_before_answer(conversation)
        else:
            conversation = conversation._replace(
                messages=before if last["role"] == "assistant" else [*before, last]
            )
            text = self.render(conversation, prompt=True)
        earlier = self._earlier(self._answer_texts(conversation._replace(messages=before)), text)
        ids = self.tokenize(self.segments(RenderedChat(text, (), (), earlier)))
        return [token for segment in ids for token in segment]

    def _text_before_answer(self, conversation: Conversation) -> str:
        """What precedes the last answer in training, or its prompt where the answer could not be trained."""
        turn = len(conversation.messages) - 1
        try:
            answer = self._answer_text(conversation, turn)
        except RowError:
            return self.render(conversation.upto(turn), prompt=True)
        return answer.text[: answer.span.start]

    @cached_property
    def stop_tokens(self) -> list[str]:
        """The tokens that end an answer or a call: the end-of-sequence token, and those of the template."""
        ends = [self.markup.end_of_turn, self.markup.end_of_call] if self.tokenizer.chat_template else []
        found = [token for end in ends for token in self.special_tokens if end.endswith(token)]
        return list(dict.fromkeys(filter(None, [self.tokenizer.eos_token, *found])))

    @property
    def stop_token_ids(self) -> list[int]:
        """The ids of `stop_tokens`."""
        return [int(self.tokenizer.convert_tokens_to_ids(token)) for token in self.stop_tokens]

    @cached_property
    def template_variables(self) -> frozenset[str]:
        """The variables that the chat template reads, besides those that the program sets."""
        template = self.tokenizer.chat_template
        texts = template.values() if isinstance(template, dict) else [template or ""]
        return frozenset().union(*map(chat_templates.variables, texts)) - chat_templates.PROVIDED

    def unread_variables(self, conversation: Conversation) -> tuple[str, ...]:
        """The variables of a conversation that its chat template does not read, as reports name them."""
        unread = [name for name in conversation.template_kwargs or () if name not in self.template_variables]
        return tuple(f"{TEMPLATE_KWARGS}.{name}" for name in unread)

    def left_out_of_prompt(self, conversation: Conversation) -> tuple[str, ...]:
        """The kinds of content before the last answer that the chat template leaves out."""
        before = conversation.upto(len(conversation.messages) - 1)
        text, answer = self.render(before, prompt=True), len(before.messages)
        rendered = RenderedChat(text, (CharSpan(len(text), len(text)),), (answer,))
        return self.content_check.dropped(before, [rendered], frozenset()).context

    # Identity

    @property
    def identity(self) -> dict[str, Any]:
        """The tokenization that a model is tuned with, and must be used with."""
        found: dict[str, Any] = {
            "chat_template_sha256": self.template_hash,
            "tokenizer_sha256": self.tokenizer_hash,
        }
        if self.template_kwargs:
            found[TEMPLATE_KWARGS] = self.template_kwargs
        if self.empty_thoughts == "context" and self.writes_empty_thoughts:
            found[EMPTY_THOUGHTS] = self.empty_thoughts
        return {key: value for key, value in (found | self.prompt_settings).items() if value is not None}

    def record_prompt_settings(self, *, trained_thoughts: bool) -> None:
        """Record how the model is to be prompted, once the training rows are tokenized.

        After answers with thoughts, the prompt lets the model think. After answers without, which follow an empty
        think block, thinking is switched off by the variable of the template that makes this block part of the
        prompt. Where there is none, the block is recorded, to be added to the prompt.
        """
        if self.empty_thoughts == "loss" or not self.writes_empty_thoughts:
            return
        if trained_thoughts:
            self.prompt_settings = {EMPTY_THOUGHTS: None}
            return
        probe = Conversation(
            [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}],
            self.profile().tools_for_probes,
        )
        asked, prompt = self._text_before_answer(probe), self.render(probe.upto(1), prompt=True)
        for switch in THINKING_SWITCHES:
            variables = switch | self.template_kwargs
            other = probe._replace(template_kwargs=variables)
            if asked != prompt and self.render(other.upto(1), prompt=True) == asked:
                self.prompt_settings = {TEMPLATE_KWARGS: variables}
                return
        if asked != prompt:
            self.prompt_settings = {PROMPT_SUFFIX: asked.removeprefix(prompt)}

    @cached_property
    def writes_empty_thoughts(self) -> bool:
        """Whether an empty think block precedes an answer without thoughts."""
        if not self.tokenizer.chat_template:
            return False
        try:
            return self.markup.writes_empty_thoughts
        except RowError:  # which each row then raises
            return False

    @property
    def template_date(self) -> str | None:
        """Today's date if the template renders it, since cached texts are then valid for a day."""
        dated = "strftime_now" in str(self.tokenizer.chat_template)
        return date.today().isoformat() if dated else None

    @property
    def template_hash(self) -> str:
        """sha256 of the chat template."""
        return hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()

    @cached_property
    def tokenizer_hash(self) -> str:
        """sha256 of everything that determines token ids: vocabulary, rules, added and special tokens."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = json.loads(backend.to_str()) if backend else {"vocabulary": self.tokenizer.get_vocab()}
        rules |= {"padding": None, "truncation": None}  # state that any call may set
        rules["special"] = self.tokenizer.special_tokens_map
        return hashlib.sha256(json.dumps(rules, sort_keys=True, default=str).encode()).hexdigest()


def _rendered_fields(turn: Message) -> str:
    """Every field of a turn that a template may render, as one text."""
    extra = {key: turn.get(key) for key in TEMPLATE_KEYS if key in turn}
    return turn["content"] + (json.dumps(extra, ensure_ascii=False, default=str) if extra else "")
