"""The documents say what is true: generated pages are fresh, and what the README names exists."""

import re
from pathlib import Path

from scripts.make_docs import TARGET, settings_page

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_settings_page_is_what_the_code_says() -> None:
    assert TARGET.read_text(encoding="utf-8") == settings_page(), "run python scripts/make_docs.py"


def test_every_make_target_is_in_the_readme_and_the_other_way_round() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*##", makefile, re.MULTILINE))
    named = set(re.findall(r"`(?:make )?([a-z-]+)`", README)) | set(re.findall(r"make ([a-z-]+)", README))
    assert targets <= named
    assert {
        t for t in re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", README, re.MULTILINE) for t in t if t
    } <= targets


def test_every_relative_link_and_listed_path_of_the_readme_exists() -> None:
    links = [x for x in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in x]
    files = README.split("## Files")[1].split("```")[1]
    listed = [line.split()[0] for line in files.strip().splitlines()]
    assert links and listed
    assert [p for p in links + listed if not (ROOT / p).exists()] == []


def test_the_example_of_an_error_in_the_readme_is_what_is_printed() -> None:
    from src import cli, cli_args
    from src.errors import ConfigError

    told = README.split("$ make train epochz=2 lr=abc\n")[1].split("```")[0].strip()
    try:
        cli.run(cli_args.parse("train", "train", ["epochz=2", "lr=abc"]), lambda _: 0)
    except ConfigError as error:
        assert str(error) == told
    else:
        raise AssertionError("nothing was refused")
