"""The tables of keys of other tools name settings that exist, and agree with what the command line suggests."""

import re

import pytest

from src import aliases, config
from src.stages import STAGES
from tests.docs.blocks import ROOT

PAGES = ["llamafactory", "axolotl", "trl"]
SETTINGS = {key for stage in STAGES for key in config.flat_keys(config.schema_of(stage))} | {"parallel"}
PASSED_ON = {"peft", "trainer", "generation"}  # peft.NAME is an argument of the library


def rows(tool: str) -> list[tuple[list[str], list[str]]]:
    """For each row of the tables: the keys of the other tool, and our settings as `key` or `key=value`."""
    text = (ROOT / "docs" / f"from-{tool}.md").read_text(encoding="utf-8")
    cells = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    return [(re.findall(r"`([^`]+)`", row[0]), re.findall(r"`([^`]+)`", row[1])) for row in cells]


@pytest.mark.parametrize("tool", PAGES)
def test_every_setting_on_the_right_exists(tool: str) -> None:
    ours = {word.split("=")[0] for _, right in rows(tool) for word in right}
    assert len(ours) > 20
    assert {key for key in ours if key not in SETTINGS and key.split(".")[0] not in PASSED_ON} == set()


def test_what_is_suggested_for_another_tools_key_is_what_the_tables_say() -> None:
    table = {left[0]: {w.split("=")[0] for w in right} for tool in PAGES for left, right in rows(tool) if left}
    said = {key: ours for key, ours in aliases.OTHER_TOOLS.items() if key in table}
    assert len(said) > 10
    assert {key: (ours, table[key]) for key, ours in said.items() if ours.split("=")[0] not in table[key]} == {}


def test_every_key_that_the_tables_rename_is_suggested() -> None:
    """A row with one key on each side, of different names, is what somebody types by habit."""
    renamed = {
        left[0]: right[0]
        for tool in PAGES
        for left, right in rows(tool)
        if len(left) == len(right) == 1 and re.fullmatch(r"\w+", left[0]) and re.fullmatch(r"\w+", right[0])
    }
    missing = {key: ours for key, ours in renamed.items() if key != ours and key not in aliases.OTHER_TOOLS}
    assert missing == {}
