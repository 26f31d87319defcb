"""Remove caches and, after confirmation, the runs under outputs/. Standard library only."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHES = (".pytest_cache", ".ruff_cache", ".mypy_cache", ".cache", "site")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--yes", action="store_true", help="remove outputs/ without asking")
    args = parser.parse_args()
    for cache in [*(ROOT / c for c in CACHES), *(p for p in _sources() for p in p.rglob("__pycache__"))]:
        shutil.rmtree(cache, ignore_errors=True)
    print("removed caches")
    outputs = ROOT / "outputs"
    if not outputs.exists():
        return 0
    runs = [p.parent.name for p in sorted(outputs.glob("runs/*/manifest.json")) if not p.parent.is_symlink()]
    size = sum(p.lstat().st_size for p in outputs.rglob("*")) / 1e6
    contents = f"outputs/ ({len(runs)} runs, {size:.0f} MB)"
    if not args.yes and not _confirm(f"remove {contents}? [y/N] "):
        print(f"kept {contents}; make clean YES=1 removes it")
        return 0
    shutil.rmtree(outputs.resolve())  # outputs/ may be a link to a larger disk
    if outputs.is_symlink():
        outputs.unlink()
    print(f"removed {contents}")
    return 0


def _sources() -> list[Path]:
    return [ROOT / name for name in ("src", "scripts", "tests", "bench")]


def _confirm(question: str) -> bool:
    return sys.stdin.isatty() and input(question).strip().lower() in {"y", "yes"}


if __name__ == "__main__":
    sys.exit(main())
