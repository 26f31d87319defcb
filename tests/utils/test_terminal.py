"""Text of files, models and servers cannot control the terminal that shows it."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from src import outcome
from src.utils.logs import SafeConsole, log, start_logging
from src.utils.terminal import let_bars_move, printable, printable_streams
from tests.fixtures import ROOT, chat, jsonl

HOSTILE = "\x1b]52;c;aGk=\x07 \x1b[2J \x9b31m \u202egnp.exe \r\u2066 \u2028 \x00 \ud800"
ESCAPED = (
    r"\x1b]52;c;aGk=\x07 \x1b[2J \x9b31m \u202egnp.exe \r\u2066 \u2028 \x00 \ud800"
)  # fmt: skip


VISIBLE = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD}  # signs of numbers and marks


def test_control_characters_become_escapes() -> None:
    assert printable(HOSTILE) == ESCAPED
    assert printable(ESCAPED) == ESCAPED
    kept = "a\tb\r\nc\n漢字 naïve 👩‍💻 نمی‌دانم \xa0\u3000"
    assert printable(kept) == kept


def test_every_control_character_is_escaped_or_visible() -> None:
    kinds = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    found = {c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in kinds}
    kept = {ord(c) for c in found if printable(c) == c}
    assert kept - set(range(0x13430, 0x13440)) == {*b"\t\n", 0x200C, 0x200D, *VISIBLE}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def colour_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """Within it, stdout and stderr are one filtered terminal with colours."""
    terminal = Terminal()
    for name, value in (("TERM", "xterm-256color"), ("COLUMNS", "200")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    with redirect_stdout(terminal), redirect_stderr(terminal), printable_streams():
        yield terminal


def test_each_way_to_the_terminal_is_filtered(monkeypatch: pytest.MonkeyPatch) -> None:
    with colour_terminal(monkeypatch) as screen:
        start_logging()
        print(HOSTILE)
        sys.stderr.writelines([HOSTILE, "\n"])
        log.warning("%s", HOSTILE)
        outcome.show(HOSTILE)
        outcome.warn(HOSTILE)
        outcome.print_end(HOSTILE, HOSTILE)
        table = Table(HOSTILE.replace("\ud800", ""), title=HOSTILE.replace("\ud800", ""))
        table.add_row(Text(HOSTILE.replace("\ud800", ""), style="red"))
        SafeConsole().print(table)
    shown = screen.getvalue()
    assert not set("\x07\x9b\u202e\u2066\u2028\x00") & set(shown)
    assert "\x1b]" not in shown and "\x1b[2J" not in shown
    assert "\x1b[31m" in shown or "\x1b[38;" in shown  # the style of the cell is ours
    assert shown.count(r"\x1b[2J") >= 9


def test_a_bar_moves_the_cursor_and_its_text_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    let_bars_move()
    with colour_terminal(monkeypatch) as screen:
        for _ in tqdm([1, 2], desc=f"fetching {HOSTILE}", mininterval=0):
            tqdm.write("a line \x1b[2J", file=sys.stdout)
    shown = screen.getvalue()
    assert shown.count("\r") > 2 and r"fetching \x1b]52" in shown and r"a line \x1b[2J" in shown
    assert "\x1b]" not in shown and "\x1b[2J" not in shown
    assert "\r" + " " * 20 in shown  # the bar was cleared before the line was written


def on_a_terminal(*argv: str, cwd: Path) -> str:
    """The output of a command whose standard streams are a terminal."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "src.main", *argv], cwd=cwd, stdout=theirs, stderr=theirs, stdin=theirs,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(theirs)
    found = b""
    while True:
        try:
            block = os.read(ours, 1 << 16)
        except OSError:  # the terminal is closed: the command has ended
            break
        found += block
    child.wait()
    os.close(ours)
    return found.decode(errors="replace")


def test_a_command_on_a_real_terminal_shows_names_and_settings_as_text(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "rows\x1b]52;c;aGk=\x07.jsonl", [chat("a", "b")])
    shown = on_a_terminal("check-data", f"dataset_path={tmp_path}/none\x1b[31m", f"lr={data.name}", cwd=tmp_path)
    assert r"\x1b]52;c;aGk=\x07" in shown and "\x1b]" not in shown and "\x07" not in shown


def test_json_keeps_the_text(capsys: Any) -> None:
    with printable_streams():
        outcome.output.json = True
        try:
            with outcome.streams() as documents:
                print(json.dumps({"a": HOSTILE}), file=documents)
        finally:
            outcome.output.json = False
    assert json.loads(capsys.readouterr().out) == {"a": HOSTILE}
