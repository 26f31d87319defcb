"""A program that loops or takes all memory is ended and named, whatever it does; others run as without limits."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from src.data.chat import ChatTokenizer
from src.data.conversation import Conversation
from src.model.tokenizer import load_tokenizer
from src.schema import ChatArgs
from src.utils import limits
from src.utils.limits import LimitExceeded, limited, refuse_endless
from tests.fixtures import chat

pytest_plugins = ["tests.fixtures"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CPU_S", 1)
    monkeypatch.setattr(limits, "MEMORY_BYTES", 200 << 20)


@pytest.fixture
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CPU_S", 0.2)


def loop() -> None:
    while True:
        pass


def grow() -> None:
    held = [b"x" * 1000]
    while True:
        held = held + held


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (lambda: 10 ** (10**9), "it takes more than"),
        (lambda: "x" * 10**10, "GB of memory"), (grow, "GB of memory"),
    ],
)  # fmt: skip
def test_work_that_does_not_end_is_refused_before_this_process_does_it(
    work: Callable[[], object], told: str
) -> None:
    with pytest.raises(LimitExceeded, match=told):
        refuse_endless(work, "it", "stop it")


def test_work_that_ends_or_fails_by_itself_is_not_refused() -> None:
    refuse_endless(lambda: "x" * 10**6, "it", "")
    refuse_endless(lambda: 1 / 0, "it", "")


@pytest.mark.parametrize(("work", "told"), [(loop, "s of computing"), (grow, "GB of memory")])
def test_a_call_that_does_not_end_is_interrupted(work: Callable[[], object], told: str) -> None:
    assert limited("it", lambda n: n + 1, 2) == 3
    with pytest.raises(LimitExceeded, match=f"it takes more than .* {told}"):
        limited("it", work)
    with pytest.raises(ZeroDivisionError):
        limited("it", lambda: 1 / 0)


def test_a_forked_process_has_the_limit_too(shorter: None) -> None:
    limited("it", int)
    with multiprocessing.get_context("fork").Pool(1) as pool, pytest.raises(LimitExceeded):
        pool.apply(limited, ("it", loop))


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("body", [LOOP, "{{ 'x' * (10000000000 + messages | length) }}"])
def test_a_chat_template_that_does_not_end_is_refused_as_the_tokenizer_is_loaded(
    tiny: Any, tmp_path: Any, body: str
) -> None:
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}" + body)
    settings = ChatArgs(chat_template=str(tmp_path / "bad.jinja"))
    with pytest.raises(LimitExceeded, match=r"by the chat template .*bad\.jinja takes more than"):
        load_tokenizer(str(tiny), chat=settings)


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "f"}}]])
def test_a_chat_template_that_loops_for_one_row_only_is_stopped_there(
    shorter: None, tiny: Path, tools: Any
) -> None:
    """By the compiled template, and by the rendering of transformers, which rows with tools have."""
    tokenizer = load_tokenizer(str(tiny))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}{{ m.content }}{% if 'trap' in m.content %}" + LOOP + "{% endif %}"
        "{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    )
    found = ChatTokenizer(tokenizer)
    assert "4" in found.render(Conversation(chat("2+2?", "4")["messages"], tools))
    with pytest.raises(LimitExceeded, match="rendering one conversation by the chat template takes more than"):
        found.render(Conversation(chat("2+2?", "a trap")["messages"], tools))


def test_a_process_that_ends_slowly_is_not_killed_by_the_timer() -> None:
    program = """
import time
from src.utils.limits import limited
class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(0.3)
slow = Slow()
limited("a call", int)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
