"""The loss mask of each model family, recorded in tests/data/golden: the rendered text, with ⟦loss⟧.

A change of the rendering shows in the records. If it is intended, write them again and review the difference:

    UPDATE_GOLDEN=1 python -m pytest tests/data/test_templates.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

from src.data.chat import ChatTokenizer
from src.data.encode import EncodedRow, EncodingOptions, encode_chats
from src.data.formats import Conversation, Message, RowError
from src.data.mask_check import MaskVerifier
from src.data.segments import RenderedChat
from src.data.store import Example
from tests.data import tokenizers
from tests.data.tokenizers import CONVERSATIONS, FAMILIES, REFUSED, TEMPLATES, TOOLS, WITH_TOOLS, row

pytest_plugins = ["tests.data.tokenizers"]

GOLDEN = Path(__file__).parent / "golden"
NAMES = [*FAMILIES, REFUSED.name]


def marked(text: RenderedChat, example: Example, weighted: set[int]) -> str:
    """The text with marks around the tokens with loss."""
    assert any(example.loss_mask)
    shown, done = "", 0
    for span, turn in zip(text.answer_spans, text.answer_turns, strict=True):
        inner = text.text[span.start : span.end]
        shown += text.text[done : span.start] + (f"⟦{inner}⟧" if turn in weighted else inner)
        done = span.end
    return shown + text.text[done:]


def differing(chat: ChatTokenizer, example: Example, text: str) -> str:
    """Where tokenizing the complete text gives other tokens than tokenizing its segments."""
    whole = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    if whole == example.ids:
        return "the same"
    names = chat.tokenizer.convert_ids_to_tokens
    specials = set(chat.tokenizer.all_special_ids) | set(chat.tokenizer.added_tokens_decoder)
    stretches = [
        [names(list(found)) for special, found in groupby(ids, key=specials.__contains__) if not special]
        for ids in (example.ids, whole)
    ]
    pairs = [f"{a} for {b}" for a, b in zip(*stretches, strict=True) if a != b]
    return "; ".join(pairs)


def told(name: str, title: str, turns: list[Message]) -> Iterator[str]:
    chat = tokenizers.chat(name)
    tools = TOOLS if turns is WITH_TOOLS else None
    yield f"=== {title}"
    encoded = encode_chats([row(turns, tools)], chat, EncodingOptions(100_000))[0]
    if isinstance(encoded, RowError):
        yield f"--- refused ({encoded.reason}): {encoded}"
        return
    assert isinstance(encoded, EncodedRow)
    weighted = {i for i, turn in enumerate(turns) if turn.get("weight") != 0}
    prover = MaskVerifier(chat)
    for text, whole, example in zip(encoded.texts, encoded.full_examples, encoded.examples, strict=True):
        verdict = prover.verify(Conversation(turns, tools), text, whole)
        agrees = {True: "agrees", False: f"DISAGREES, {verdict.detail}", None: f"not comparable, {verdict.detail}"}
        yield marked(text, example, weighted)
        counts = f"{len(example.ids)} tokens, {sum(example.loss_mask)} with loss"
        yield f"--- {counts}; in one pass: {differing(chat, example, text.text)}"
        yield f"--- second derivation by {prover.method}: {agrees[verdict.agrees]}"


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("name", NAMES)
def test_a_family_is_trained_on_its_golden_record(name: str) -> None:
    found = "\n".join(line for title, turns in CONVERSATIONS.items() for line in told(name, title, turns)) + "\n"
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(found, encoding="utf-8")
    assert path.exists(), f"{name} has no golden file; UPDATE_GOLDEN=1 writes it"
    assert found == path.read_text(encoding="utf-8")
    assert "DISAGREES" not in found


def test_every_template_has_a_family_and_a_golden_record() -> None:
    assert sorted(p.stem for p in TEMPLATES.glob("*.jinja")) == sorted(NAMES)
    assert sorted(p.stem for p in GOLDEN.glob("*.txt")) == sorted(NAMES)
