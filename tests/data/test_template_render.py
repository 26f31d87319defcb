"""A plain conversation is rendered exactly as transformers renders it, by the templates of all families."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from src.data.formats import Conversation
from src.data.template_render import PlainTemplate, is_plain
from tests.data import families
from tests.data.tokenizers import CONVERSATIONS, FAMILIES, WITH_TOOLS, assistant, system, tokenizer, user

pytestmark = pytest.mark.usefixtures("frozen")
pytest_plugins = ["tests.data.tokenizers"]

Variables = dict[str, Any]
PLAIN = [
    *(turns for turns in CONVERSATIONS.values() if is_plain(Conversation(turns))),
    [system("Be brief."), user("<b>&amp;</b> ' \" \\ {{ x }}"), {**assistant("Yes."), "name": "ada"}],
    [user("Twice?"), user("Twice.")],  # which some templates reject
    [assistant("First.")],
]


def outcome(render: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    """What is rendered, or the error."""
    try:
        return render(*arguments, **more)
    except Exception as error:  # whatever a template raises
        return type(error), str(error)


@pytest.mark.parametrize("name", families.TEMPLATES)
def test_a_plain_conversation_has_the_text_and_the_answers_that_transformers_renders(name: str) -> None:
    own = families.template(name).tokenizer
    for variables in ({}, {"enable_thinking": False, "bos_token": "<other>"}):
        template = PlainTemplate.of(own, variables)
        assert template
        given = {"chat_template": own.chat_template, **own.special_tokens_map, **variables}

        for turns in PLAIN:
            for prompt in (False, True):
                ours = outcome(template.render, turns, prompt)
                asked = {"tokenize": False, "add_generation_prompt": prompt, **variables}
                assert ours == outcome(own.apply_chat_template, turns, **asked)
            marked = outcome(render_jinja_template, [turns], return_assistant_tokens_mask=True, **given)
            found = outcome(template.answers, turns)
            assert found == (marked if isinstance(marked[0], type) else tuple(each[0] for each in marked))


def test_only_texts_are_plain() -> None:
    assert is_plain(Conversation([system("."), user("."), {**assistant("."), "weight": 0}]))
    more: list[Any] = [
        {**assistant("."), "reasoning_content": "Hm."},
        {**assistant("."), "name": date(2026, 1, 1)},
        {"role": "user", "content": [{"type": "text", "text": "."}]},
        {"role": "user", "content": None},
        *(turn for turn in WITH_TOOLS if "tool_calls" in turn),
    ]
    assert not any(is_plain(Conversation([turn])) for turn in more)
    assert not is_plain(Conversation([user(".")], tools=[{}]))
    assert not is_plain(Conversation([user(".")], template_kwargs={"x": 1}))


def test_a_tokenizer_that_renders_in_another_way_is_left_to_transformers() -> None:
    made = tokenizer(FAMILIES["chatml"])
    assert PlainTemplate.of(made, {"documents": []}) is None  # an argument, not a variable
    made.chat_template = {"default": made.chat_template, "tool_use": made.chat_template}
    assert PlainTemplate.of(made, {}) is None
    made.chat_template = made.chat_template["default"]
    assert PlainTemplate.of(made, {})
    made.__class__ = type("Own", (type(made),), {"apply_chat_template": lambda *_, **__: "own"})
    assert PlainTemplate.of(made, {}) is None
