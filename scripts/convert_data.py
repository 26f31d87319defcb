#!/usr/bin/env python3
"""Turn JSON files of any layout, and ChatGPT and Claude exports, into JSONL; see docs/convert.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src.convert.files import convert_tree, exit_code, summary
from src.utils.streams import guard
from src.utils.terminal import printable_streams

PATHS = "files, or folders to search with their subfolders (default: data)"
CHECK = "report what would be done and write nothing; exit code 1 if there is something to do"
FORCE = "replace an x.jsonl that differs from x.json; the old one is kept as x.jsonl.orig"
NOTHING = "No .json or .jsonl files found. Put your data there or give a PATH."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", metavar="PATH", nargs="*", type=Path, default=[Path("data")], help=PATHS)
    parser.add_argument("--check", action="store_true", help=CHECK)
    parser.add_argument("--force", action="store_true", help=FORCE)
    args = parser.parse_args()
    results = convert_tree(args.paths, force=args.force, check=args.check)
    with printable_streams():
        for result in results:
            print(result, file=sys.stderr if result.status == "refused" else sys.stdout, flush=True)
        print(summary(results) if results else NOTHING)
    return exit_code(results)


if __name__ == "__main__":
    guard()
    sys.exit(main())
