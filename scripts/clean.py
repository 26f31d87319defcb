"""Remove caches and, after confirmation, outputs/, unless a command uses it. Standard library only."""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHES = (".pytest_cache", ".ruff_cache", ".mypy_cache", "site")
# What is locked while it is used: outputs/ by every stage, a run by its training, a snapshot by a job on a server,
# and what a push or a fetch has.
LOCKS: dict[str, Callable[[int, int], object]] = {
    ".": fcntl.flock,
    "runs/*/.lock": fcntl.lockf,
    "remote/code/*/src/code.json": fcntl.flock,
    "remote/push.lock": fcntl.lockf,
    "fetching/.*.lock": fcntl.lockf,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--yes", action="store_true", help="remove outputs/ without asking")
    args = parser.parse_args()
    outputs = ROOT / "outputs"
    users = _users(outputs)
    shared = [] if users else [ROOT / ".cache"]  # a job on a server has its temporary files there
    for cache in [*(ROOT / c for c in CACHES), *shared, *(p for p in _sources() for p in p.rglob("__pycache__"))]:
        shutil.rmtree(cache, ignore_errors=True)
    print("removed caches")
    if users:
        return _keep(users)
    return _remove_outputs(outputs, args.yes) if outputs.exists() else 0


def _remove_outputs(outputs: Path, without_asking: bool) -> int:
    runs = [p.parent.name for p in sorted(outputs.glob("runs/*/manifest.json")) if not p.parent.is_symlink()]
    size = sum(p.lstat().st_size for p in outputs.rglob("*")) / 1e6
    contents = f"outputs/ ({len(runs)} runs, {size:.0f} MB)"
    if not without_asking and not _confirm(f"remove {contents}? [y/N] "):
        print(f"kept {contents}; make clean YES=1 removes it")
        return 0
    if users := _users(outputs):  # since the question was asked
        return _keep(users)
    folder = outputs.resolve()  # outputs/ may be a link to a larger disk
    with suppress(OSError):  # a command that starts now makes its own; a mount cannot be renamed
        folder = folder.rename(folder.with_name(f".{folder.name}.removed-{os.getpid()}"))
    shutil.rmtree(folder)
    if outputs.is_symlink():
        outputs.unlink()
    print(f"removed {contents}")
    return 0


# What is in use


def _keep(users: list[str]) -> int:
    print(f"kept outputs/, which is in use: {'; '.join(users)}", file=sys.stderr)
    print("wait until that ends, or stop it, and run make clean again", file=sys.stderr)
    return 2


def _users(outputs: Path) -> list[str]:
    """The runs and the commands that use outputs/."""
    return list(dict.fromkeys(_find_users(outputs))) if outputs.exists() else []


def _find_users(outputs: Path) -> Iterator[str]:
    for pattern, lock in LOCKS.items():
        for path in [outputs] if pattern == "." else sorted(outputs.glob(pattern)):
            if path.parent.is_symlink() or not _is_locked(path, lock):
                continue
            if path.name == ".lock":
                yield f"run {path.parent.name}{_process_of(path.parent)}"
            else:
                yield from _holders(path) or ["a command of Assay"]


def _is_locked(path: Path, lock: Callable[[int, int], object]) -> bool:
    """Whether another process holds a lock on a file or folder; False where the file system has no locks."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:
        return False
    try:
        lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES)
    finally:
        os.close(handle)
    return False


def _process_of(run: Path) -> str:
    try:
        process = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["process"]
        return f" (process {process['pid']} on {process['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _holders(path: Path) -> list[str]:
    """The commands that hold a lock on a file, as Linux lists them in /proc/locks."""
    inode, found = str(path.stat().st_ino), []
    try:
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if fields[5:6] and fields[5].split(":")[-1] == inode and fields[1] in ("FLOCK", "POSIX"):
                words = Path(f"/proc/{fields[4]}/cmdline").read_bytes().decode(errors="replace").split("\0")
                command = " ".join(words[words.index("src.main") :] if "src.main" in words else words[:1])
                found.append(f"process {fields[4]} ({command.strip().replace('src.main ', '')})")
    except OSError:
        pass
    return found


def _sources() -> list[Path]:
    return [ROOT / name for name in ("src", "scripts", "tests", "bench")]


def _confirm(question: str) -> bool:
    return sys.stdin.isatty() and input(question).strip().lower() in {"y", "yes"}


if __name__ == "__main__":
    sys.exit(main())
