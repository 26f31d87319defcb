"""What a push takes: the files that git would take, and those that are asked for besides.

Never secrets, outputs, or environments, even where git has them.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from src.errors import RemoteError
from src.utils.files import sha256, write_text

NEVER_AT_THE_TOP = {".venv", ".cache", "outputs", "artifacts"}
HASHES = Path("outputs/remote/hashes.json")  # of ALSO's files, which may be large
RECENT = 2_000_000_000  # ns: a file changed so shortly before it was looked at may change without a trace
LINK = "-> "
GIT_NEEDED = "a push sends the files that git tracks or would add"


class PushedFile(NamedTuple):
    """One file: its sha256, or `-> target` of a link; `also` where it was asked for besides."""

    identity: str
    size: int
    mode: int
    also: bool


class PushFiles(NamedTuple):
    """`{path: entry}` of what is pushed, and in sentences what is not though one might think so."""

    files: dict[str, PushedFile]
    notes: list[str]


def take(also: Sequence[str] = ()) -> PushFiles:
    """What of the current folder is pushed.

    Raises: RemoteError if it is no project, or something in `also` cannot be taken.
    """
    if not Path("src/main.py").is_file():
        raise RemoteError(f"{Path.cwd()} is not the project: it has no src/main.py", hint="run it there")
    paths, notes = _list_files(), list[str]()
    files: dict[str, PushedFile] = {}
    environments = _Environments()
    for path in sorted(paths):
        if never(path) or path in environments:
            continue
        try:
            if entry := _entry(path, notes):
                files[path] = entry
        except FileNotFoundError:  # removed, and git has not been told
            continue
        except PermissionError:
            raise RemoteError(f"{path} cannot be read", hint="have git ignore it, or make it readable") from None
    if "src/main.py" not in files:
        raise RemoteError("git ignores src/main.py", hint="run git check-ignore -v src/main.py to see why")
    known = _Hashes()
    for path in _besides(also, notes, environments):
        found = os.stat(path)
        files[path] = PushedFile(known.of(path, found), found.st_size, found.st_mode & 0o777, True)
    known.keep()
    return PushFiles(files, notes)


def never(path: str) -> bool:
    """Whether a path is pushed in no case: secrets, outputs, the server's own folders, git's."""
    parts = path.split("/")
    return parts[0] in NEVER_AT_THE_TOP or any(part == ".git" or _is_secret(part) for part in parts)


def _is_secret(name: str) -> bool:
    return name == ".env" or (name.startswith(".env.") and name != ".env.example")


class _Environments:
    """Virtual environments: folders with a pyvenv.cfg."""

    def __init__(self) -> None:
        self.known: dict[str, bool] = {"": False}

    def __contains__(self, path: str) -> bool:
        folder = os.path.dirname(path)
        if folder not in self.known:
            self.known[folder] = os.path.exists(f"{folder}/pyvenv.cfg") or folder in self
        return self.known[folder]


def _list_files() -> set[str]:
    """The paths that git tracks or would add.

    Raises: RemoteError if git is not installed, or the current folder is in no checkout.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, env=os.environ | {"LC_ALL": "C"})
    except FileNotFoundError:
        raise RemoteError(f"git is not installed, and {GIT_NEEDED}", hint="install git") from None
    if done.returncode == 0:
        return {os.fsdecode(path) for path in done.stdout.split(b"\0") if path}
    lines = os.fsdecode(done.stderr).strip().splitlines() or [f"exit code {done.returncode}"]
    reason = lines[0].removeprefix("fatal: ").split(" (or any")[0]
    if reason.startswith("not a git repository"):
        raise RemoteError(
            f"{Path.cwd()} is not a git checkout, and {GIT_NEEDED}",
            hint="run git init in it; no commit is needed",
        )
    raise RemoteError(f"git does not list the files of {Path.cwd()}: {reason}")


def _entry(path: str, notes: list[str]) -> PushedFile | None:
    """What a path of git's is. Returns: None of what is not pushed, which `notes` says then."""
    if os.path.islink(path):
        target = os.readlink(path)
        if why := _leads_away(path, target):
            notes.append(f"{path} is a link to {target}, {why}: it is not pushed")
            return None
        return PushedFile(LINK + target, 0, 0o777, False)
    if os.path.isdir(path):
        name = path.rstrip("/")
        notes.append(f"{name} is a repository of its own: it is not pushed; ALSO={name} sends it")
        return None
    found = os.stat(path)
    if not os.path.isfile(path):
        return None  # a socket, a pipe
    return PushedFile(sha256(Path(path)), found.st_size, found.st_mode & 0o777, False)


def _leads_away(path: str, target: str) -> str:
    """Why a link would not lead to the same on the server."""
    if os.path.isabs(target):
        return "an absolute path"
    to = os.path.normpath(os.path.join(os.path.dirname(path), target))
    if to.split("/")[0] == "..":
        return "outside of this folder"
    return "which is never pushed" if never(to) else ""


def _besides(also: Sequence[str], notes: list[str], environments: _Environments) -> Iterator[str]:
    """The files of the paths in `also`: links are followed, so that a model made of them arrives whole."""
    for given in also:
        path = os.path.normpath(os.path.relpath(given) if os.path.isabs(given) else os.path.expanduser(given))
        if path.split("/")[0] == ".." or os.path.isabs(path):
            raise RemoteError(f"ALSO={given} lies outside of this folder", hint="copy it, or link to it from here")
        if never(path) or f"{path}/x" in environments:
            raise RemoteError(f"ALSO={given} is never pushed", hint="copy it to another folder, if it must be")
        if not os.path.exists(path):
            raise RemoteError(f"ALSO={given} does not exist")
        if path == ".":
            raise RemoteError(f"ALSO={given} is everything", hint="name what is to be sent")
        for found in [path] if os.path.isfile(path) else _below(path):
            if never(found) or _is_secret(os.path.basename(os.path.realpath(found))):
                notes.append(f"{found} is never pushed")
            elif found not in environments:
                yield found


def _below(folder: str) -> Iterator[str]:
    """Every regular file below a folder, through links too, but no folder inside of itself."""
    for at, folders, names in os.walk(folder, followlinks=True):
        above = {os.path.realpath(at), *(str(p) for p in Path(os.path.realpath(at)).parents)}
        folders[:] = sorted(
            f for f in folders if f != ".git" and os.path.realpath(os.path.join(at, f)) not in above
        )
        yield from (path for name in sorted(names) if os.path.isfile(path := os.path.join(at, name)))


class _Hashes:
    """The sha256 of large files, remembered by size and times."""

    def __init__(self) -> None:
        self.old: dict[str, list[object]] = {}
        self.new: dict[str, list[object]] = {}
        with suppress(OSError, ValueError):  # they are made again
            self.old = dict(json.loads(HASHES.read_text(encoding="utf-8")))

    def of(self, path: str, found: os.stat_result) -> str:
        stamp = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        known = self.old.get(path, [""])
        digest = str(known[0]) if known[1:] == stamp else sha256(Path(path))
        if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) > RECENT:
            self.new[path] = [digest, *stamp]
        return digest

    def keep(self) -> None:
        if any(self.old.get(path) != stamp for path, stamp in self.new.items()):
            write_text(HASHES, json.dumps(self.old | self.new))
