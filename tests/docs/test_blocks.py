"""Blocks of the documents that hold no commands: settings compose, data is JSON, programs compile."""

import ast
import json
from pathlib import Path

import pytest
import yaml

from src import cli, cli_args, config, schema
from src.stages import STAGES
from tests.docs.blocks import COMMAND, PAGES, ROOT, Block, blocks, outside

ALL = [block for page in PAGES for block in blocks(page)]
LANGUAGES = {"bash", "console", "yaml", "python", "json", "text", ""}


def of(*languages: str) -> list[object]:
    return [pytest.param(b, id=b.place) for b in ALL if b.language in languages and b.kind != "not run"]


def test_every_block_has_a_language_that_is_tested_and_every_exception_a_reason() -> None:
    assert {b.place for b in ALL if b.language not in LANGUAGES} == set()
    assert {b.place for b in ALL if b.kind == "not run" and not b.reason} == set()
    assert {b.place for b in ALL if b.language == "console" and not b.kind} == set()  # it shows what is printed


def test_commands_are_in_blocks_of_commands() -> None:
    hidden = [b.place for b in ALL if b.language in {"", "text"} and any(map(COMMAND.match, b.text.splitlines()))]
    indented = [
        f"{page.relative_to(ROOT)}: {line}"
        for page in PAGES
        for line in outside(page)
        if line.startswith("    ") and COMMAND.match(line[4:])
    ]
    assert hidden + indented == []


@pytest.mark.parametrize("block", of("json"))
def test_json_is_json(block: Block) -> None:
    try:
        json.loads(block.text)
    except ValueError:
        for line in block.text.splitlines():
            json.loads(line)


@pytest.mark.parametrize("block", of("python"))
def test_programs_compile(block: Block) -> None:
    ast.parse(block.text)


@pytest.mark.parametrize("block", of("yaml"))
def test_settings_are_those_of_a_stage(block: Block, tmp_path: Path) -> None:
    """A file for experiment= or search= composes; other settings are valid for the first stage that has them."""
    values = yaml.safe_load(block.text)
    if "# @package _global_" in block.text:
        (tmp_path / "preset.yaml").write_text(block.text, encoding="utf-8")
        group = "search" if "search" in values else "launch" if "partition" in values else "experiment"
        words = [f"{group}={tmp_path / 'preset.yaml'}", "cuda_visible_devices=''", "--cfg", "job"]
        assert cli.run_jobs(cli_args.parse("train", words), lambda _: 0) == 0
        return
    own = {**{name: config.schema_of(name) for name in STAGES}, "slurm": schema.SlurmConfig}
    stages = [s for s in own.values() if set(values) <= {key.split(".")[0] for key in config.flat_keys(s)}]
    assert stages, f"no stage has all of {sorted(values)}"
    config.validate(stages[0], values)
