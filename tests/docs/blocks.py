"""The fenced blocks of the documents, with the comment above each that says how it is tested.

A block without a comment is tested as its language says (see test_blocks.py and test_commands.py). A comment on
the line above the fence changes that:

    <!-- not run: REASON -->          it is not tested; the reason is required
    <!-- run -->                      its commands are really run, not only checked
    <!-- run, numbers vary -->        the same, and any number equals any other in the output
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"^(?:\$ )?(?:make|assay|python|pip|torchrun|srun|ssh|export|git) [^|]*$")

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S)
_MARK = re.compile(r"<!-- (?P<kind>not run|run)(?P<vary>, numbers vary)?(?:: (?P<reason>[^>]+))? -->\n\s*\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block. `line`: the number of its first line in the page."""

    page: Path
    line: int
    language: str
    text: str
    kind: str = ""
    reason: str = ""
    numbers_vary: bool = False

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("text")) + 1
        body = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        mark = _MARK.search(text[: match.start()])
        kind, reason, vary = (mark["kind"], mark["reason"] or "", bool(mark["vary"])) if mark else ("", "", False)
        found.append(Block(page, line, match["language"], body, kind, reason.strip(), vary))
    return found


def outside(page: Path) -> list[str]:
    """The lines of a page that are in no fenced block."""
    return _FENCE.sub("", page.read_text(encoding="utf-8")).splitlines()


def commands(block: Block) -> list[tuple[str, list[str]]]:
    """The commands of a `bash` or `console` block, each with the lines that it prints (none in `bash`)."""
    found: list[tuple[str, list[str]]] = []
    for line in _logical_lines(block):
        if block.language == "bash":
            found.append((line, []))
        elif line.startswith("$ "):
            found.append((line[2:], []))
        elif found:
            found[-1][1].append(line)
    return found


def _logical_lines(block: Block) -> list[str]:
    """Lines, joined where they end with a backslash or begin a here-document; comments are left out in `bash`."""
    found: list[str] = []
    end = ""
    joined = False
    for line in block.text.splitlines():
        if end or joined:
            found[-1] += f"\n{line}"
            end = "" if line == end else end
            joined = not end and line.endswith("\\")
            continue
        if block.language == "bash" and (not line.strip() or line.lstrip().startswith("#")):
            continue
        found.append(line)
        document = re.search(r"<<-? ?'?(\w+)'?", line)
        end = document[1] if document else ""
        joined = line.endswith("\\")
    return found
