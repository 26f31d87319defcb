"""The documentation site: built strictly, in one reading order, and complete without a network."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md"))

needs_generator = pytest.mark.skipif(
    find_spec("zensical") is None, reason="zensical is not installed: pip install -r requirements-docs.txt"
)


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of the site, copied."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "zensical.toml", folder)
    return folder


@needs_generator
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(checkout: Path) -> None:
    built = build(checkout)
    assert built.returncode == 0, built.stdout + built.stderr
    site = checkout / "site"
    assert [page for page in PAGES if not (site / page).with_suffix(".html").is_file()] == []
    pages = "".join(p.read_text(encoding="utf-8") for p in site.rglob("*.html"))
    styles = "".join(p.read_text(encoding="utf-8") for p in site.rglob("*.css"))
    assert re.findall(r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^\">\s]+", pages) == []
    assert re.findall(r"url\([\"']?(?:https?:)?//[^)]*\)", styles) == []


@needs_generator
@pytest.mark.parametrize("link", ["[a page](absent.md)", "[a heading](data.md#absent)"])
def test_a_broken_link_fails_the_build(link: str, checkout: Path) -> None:
    page = checkout / "docs" / "index.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(f"{text}\n{link}\n", encoding="utf-8")
    try:
        assert build(checkout).returncode != 0
    finally:
        page.write_text(text, encoding="utf-8")


def test_the_navigation_is_the_reading_order_of_the_first_page() -> None:
    tomli = pytest.importorskip("tomli")  # comes with the generator; tomllib is there from Python 3.11
    nav = tomli.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]
    first = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- \[[^\]]+\]\(([^)]+)\)", first, re.MULTILINE)
    assert _paths(nav) == ["index.md", *listed]
    assert sorted(_paths(nav)) == PAGES


def _paths(nav: list[dict[str, object]]) -> list[str]:
    found: list[str] = []
    for entry in nav:
        for value in entry.values():
            found += _paths(value) if isinstance(value, list) else [str(value)]
    return found
