"""The documents say what is true: generated pages are fresh, and what the README names exists."""

import re
from pathlib import Path

import pytest

from scripts.make_docs import SCHEMAS, generated_files

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")


def test_every_generated_file_is_what_the_code_says() -> None:
    stale = [file.name for file, text in generated_files().items() if file.read_text(encoding="utf-8") != text]
    assert stale == [], "run python scripts/make_docs.py"
    assert {*SCHEMAS.iterdir()} <= generated_files().keys()


def test_every_make_target_is_documented_and_the_other_way_round() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*##", makefile, re.MULTILINE))
    assert targets <= set(re.findall(r"`(?:make )?([a-z-]+)`", COMMANDS)) | set(
        re.findall(r"make ([a-z-]+)", COMMANDS)
    )
    for page in (README, COMMANDS):
        named = re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", page, re.MULTILINE)
        assert {target for found in named for target in found if target} <= targets


@pytest.mark.parametrize(
    "page", sorted(p.relative_to(ROOT).as_posix() for p in (*ROOT.glob("*.md"), *ROOT.glob("d*/*.md")))
)
def test_every_relative_link_of_a_page_exists(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_example_of_an_error_in_the_readme_is_what_is_printed() -> None:
    from src import cli, cli_args
    from src.errors import ConfigError

    reported = README.split("$ make train epochz=2 lr=abc\n")[1].split("```")[0].strip()
    try:
        cli.run_jobs(cli_args.parse("train", ["epochz=2", "lr=abc"]), lambda _: 0)
    except ConfigError as error:
        assert str(error) == reported
    else:
        raise AssertionError("nothing was refused")
