"""Render recorded terminal output as SVG: `python scripts/terminal_svg.py TYPESCRIPT docs/demo.svg`.

TYPESCRIPT is a recording by `script -qc COMMAND TYPESCRIPT`, with colours. Progress bars are left out:
only the final text of each line is drawn.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("typescript", type=Path)
    parser.add_argument("svg", type=Path)
    parser.add_argument("--title", default="make demo")
    parser.add_argument("--width", type=int, default=100)
    parser.add_argument("--from-line", default="", help="start at the first line that contains this text")
    args = parser.parse_args()
    lines = [x.rstrip("\r").rsplit("\r", 1)[-1] for x in args.typescript.read_text(errors="replace").split("\n")]
    lines = [x for x in lines if x.strip() and not x.startswith(("Script started", "Script done"))]
    start = next((i for i, x in enumerate(lines) if args.from_line in x), 0)
    console = Console(record=True, width=args.width, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi("\n".join(lines[start:])))
    svg = re.sub(r"@font-face \{.*?\}", "", console.export_svg(title=args.title), flags=re.DOTALL)
    args.svg.write_text(svg, encoding="utf-8")  # without a web font: the viewer's font is used


if __name__ == "__main__":
    main()
