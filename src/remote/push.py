"""Pushes this folder's code to the server: send the files that differ, verify them, replace all at once.

A push sends the files that git tracks or would add, and those of ALSO; never secrets, outputs or environments,
even if git tracks them.
"""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RemoteError
from ..utils.environment import git_state
from ..utils.files import disk_errors, sha256, write_text
from ..utils.logs import eprint
from ..utils.units import count, format_size
from . import transfer
from .connection import Connection
from .listing import parents
from .transfer import printable

CODE = ("src/", "configs/")  # what a snapshot holds
ATTEMPTS = 3  # to transfer a file correctly
MAX_NAMES = 20  # printed
LOCK = Path("outputs/remote/push.lock")
OUTPUT_SETTINGS = {"output_dir", "artifacts_dir"}  # their folders are made, and need not be pushed
GIT_NEEDED = "a push needs git to list the files"
NEVER_AT_THE_TOP = {".venv", ".cache", "outputs", "artifacts"}
HASHES = Path("outputs/remote/hashes.json")  # of ALSO's files, which may be large
RECENT_NS = 2_000_000_000  # a file changed so recently may change again without a new time stamp
LINK = "-> "


class PushedFile(NamedTuple):
    identity: str  # the sha256 of a file, `-> target` of a link
    size: int
    mode: int
    also: bool  # from ALSO, not from git


class PushFiles(NamedTuple):
    """The files to push by path, and a note on each path that a user might expect among them."""

    files: dict[str, PushedFile]
    notes: list[str]


def push(connection: Connection, also: Sequence[str] = (), words: Sequence[str] = ()) -> dict[str, Any]:
    """Make REMOTE_DIR hold this folder's code and the paths `also`, and print what was changed.

    `words`: settings of the command to run on the server; paths among them that the server lacks are reported.
    Returns: the code, as agent/snapshots.py `create` takes it.
    Raises: RemoteError; nothing on the server has changed then.
    """
    with _push_lock():
        found, report = _send(connection, also, local_paths(words))
    for note in found.notes:
        eprint(note)
    for path, exists in report["named"].items():
        if not exists:
            eprint(_missing_path(path))
    _print_report(f"{connection.target}:{connection.target.dir}", report)
    return code(found.files)


def _send(connection: Connection, also: Sequence[str], named: Sequence[str]) -> tuple[PushFiles, dict[str, Any]]:
    """Send missing files and repeat until the server accepts the push. Returns: the files, and its report."""
    push = {"id": uuid.uuid4().hex, "sender": _sender_id(), "who": _sender_name()}
    found = collect_files(also)
    for attempt in range(ATTEMPTS + 1):
        wanted = {path: file._asdict() for path, file in found.files.items()}
        unpushed = sorted({path for path in named if not _is_pushed(path, found.files)})
        folder = connection.target.dir
        report = connection.call("apply_push:apply", folder=folder, push=push, wanted=wanted, named=unpushed)
        if "lacking" not in report:
            return found, report
        paths = {file.identity: Path(path) for path, file in found.files.items()}
        if strange := report["lacking"].keys() - paths.keys():
            raise connection.invalid_answer(f"a request for a file that is not pushed: {min(strange)}")
        lacking = {name: paths[name] for name in report["lacking"]}
        if attempt < ATTEMPTS:
            size = sum(found.files[str(path)].size - report["lacking"][name] for name, path in lacking.items())
            _check_space(str(connection.target), size, report["free"])
            transfer.send(connection, lacking, report["incoming"], report["rsync"], size)
            found = collect_files(also)  # a file may have changed meanwhile
    names = ", ".join(sorted(map(str, lacking.values()))[:3])
    raise RemoteError(f"{names}: checksum mismatch after {ATTEMPTS} attempts", hint="push again")


def _check_space(server: str, size: int, free: int) -> None:
    if size > free:
        raise RemoteError(
            f"{server} has {format_size(free)} of free space, but the push needs {format_size(size)}",
            hint="free some space on the server",
        )


@contextmanager
def _push_lock() -> Iterator[None]:
    """Wait until another push of this folder has ended."""
    with disk_errors(LOCK):
        LOCK.parent.mkdir(parents=True, exist_ok=True)
        file = LOCK.open("a")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            eprint("another push of this folder is in progress; waiting until it ends")
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _sender_id() -> str:
    """An id for this folder on this machine."""
    return hashlib.sha256(f"{socket.gethostname()}:{Path.cwd()}".encode(errors="surrogateescape")).hexdigest()[:16]


def _sender_name() -> str:
    return f"{getpass.getuser()}@{socket.gethostname()}:{Path.cwd()}".encode(errors="backslashreplace").decode()


def code(files: Mapping[str, PushedFile]) -> dict[str, Any]:
    """The files that a snapshot holds with their hashes, the state of git, and the digest of both."""
    hashes = {}
    for path, file in files.items():
        if path.startswith(CODE) and not file.also and Path(path).is_file():
            hashes[path] = sha256(Path(path)) if file.identity.startswith(LINK) else file.identity
    content = {"files": hashes, "state": git_state()}
    return {"digest": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(), **content}


# Which files are pushed


def collect_files(also: Sequence[str] = ()) -> PushFiles:
    """The files of the current folder that a push sends.

    Raises: RemoteError if it is not the project or not a git checkout, or a path of `also` cannot be pushed.
    """
    if not Path("src/main.py").is_file():
        raise RemoteError(
            f"{Path.cwd()} is not a checkout of Assay (no src/main.py)",
            hint="a push sends its code: run it in the checkout",
        )
    notes: list[str] = []
    files: dict[str, PushedFile] = {}
    environments = _VirtualEnvironments()
    for path in sorted(_git_files()):
        if is_never_pushed(path) or path in environments or any(map(os.path.islink, parents(path))):
            continue  # git, too, counts what is below a link as deleted
        try:
            if file := _pushed_file(path, notes):
                files[path] = file
        except FileNotFoundError:  # deleted, and still in git's index
            continue
        except PermissionError:
            raise RemoteError(
                f"{path} cannot be read", hint="make the file readable, or add it to .gitignore"
            ) from None
    if "src/main.py" not in files:
        raise RemoteError("git ignores src/main.py", hint="run git check-ignore -v src/main.py to see why")
    hashes = _HashCache()
    for path in _also_files(also, notes, environments):
        found = os.stat(path)
        files[path] = PushedFile(hashes.sha256(path, found), found.st_size, found.st_mode & 0o777, True)
        for parent in parents(path):
            files.pop(parent, None)  # a link that ALSO follows arrives as a folder
    hashes.save()
    return PushFiles(files, notes)


def _git_files() -> set[str]:
    """The paths that git tracks or would add. Raises: RemoteError without git or a checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, env=os.environ | {"LC_ALL": "C"})
    except FileNotFoundError:
        raise RemoteError(f"git is not installed, but {GIT_NEEDED}", hint="install git") from None
    if done.returncode == 0:
        return {os.fsdecode(path) for path in done.stdout.split(b"\0") if path}
    lines = os.fsdecode(done.stderr).strip().splitlines() or [f"exit code {done.returncode}"]
    reason = lines[0].removeprefix("fatal: ").split(" (or any")[0]
    if reason.startswith("not a git repository"):
        raise RemoteError(
            f"{Path.cwd()} is not a git checkout, but {GIT_NEEDED}",
            hint="run git init in this folder; no commit is needed",
        )
    raise RemoteError(f"git does not list the files of {Path.cwd()}: {reason}")


def is_never_pushed(path: str) -> bool:
    """Whether a path is a secret, an output, or in a folder that git or the server manages."""
    parts = path.split("/")
    return parts[0] in NEVER_AT_THE_TOP or any(part == ".git" or _is_secret(part) for part in parts)


def _is_secret(name: str) -> bool:
    return name == ".env" or (name.startswith(".env.") and name != ".env.example")


class _VirtualEnvironments:
    """Membership test: whether a path is in a folder with a pyvenv.cfg."""

    def __init__(self) -> None:
        self.known: dict[str, bool] = {"": False}

    def __contains__(self, path: str) -> bool:
        folder = os.path.dirname(path)
        if folder not in self.known:
            self.known[folder] = os.path.exists(f"{folder}/pyvenv.cfg") or folder in self
        return self.known[folder]


def _pushed_file(path: str, notes: list[str]) -> PushedFile | None:
    """A path of git's as it is pushed. Returns: None if it is not pushed; `notes` says why."""
    if os.path.islink(path):
        target = os.readlink(path)
        if why := _leads_outside(path, target):
            notes.append(f"{path} is not pushed: the link leads to {target}, {why}")
            return None
        return PushedFile(LINK + target, 0, 0o777, False)
    if os.path.isdir(path):
        name = path.rstrip("/")
        notes.append(f"{name} is not pushed, because it is a separate git repository; ALSO={name} pushes it")
        return None
    found = os.stat(path)
    if not os.path.isfile(path):
        return None  # a socket, a pipe
    return PushedFile(sha256(Path(path)), found.st_size, found.st_mode & 0o777, False)


def _leads_outside(path: str, target: str) -> str:
    """Why a link would not lead to the same file on the server; empty if it would."""
    if os.path.isabs(target):
        return "an absolute path"
    to = os.path.normpath(os.path.join(os.path.dirname(path), target))
    if to.split("/")[0] == "..":
        return "outside of this folder"
    return "which is never pushed" if is_never_pushed(to) else ""


def _also_files(also: Sequence[str], notes: list[str], environments: _VirtualEnvironments) -> Iterator[str]:
    """The files of ALSO's paths. Links are followed, so that a model made of links arrives complete."""
    for given in also:
        path = os.path.normpath(os.path.relpath(given) if os.path.isabs(given) else os.path.expanduser(given))
        if path.split("/")[0] == ".." or os.path.isabs(path):
            raise RemoteError(
                f"ALSO={given} is outside of this folder", hint="copy or link the path into this folder"
            )
        if is_never_pushed(path) or f"{path}/x" in environments:
            raise RemoteError(f"ALSO={given} is never pushed", hint="copy the path to another folder to push it")
        if not os.path.exists(path):
            raise RemoteError(f"ALSO={given} does not exist", hint="check the path")
        if path == ".":
            raise RemoteError(f"ALSO={given} is the entire folder", hint="list the paths to push")
        for found in [path] if os.path.isfile(path) else _walk(path):
            if is_never_pushed(found) or _is_secret(os.path.basename(os.path.realpath(found))):
                notes.append(f"{found} is never pushed")
            elif found not in environments:
                yield found


def _walk(folder: str) -> Iterator[str]:
    """Every regular file below a folder; links are followed, except to a folder that contains the link."""
    for at, folders, names in os.walk(folder, followlinks=True):
        above = {os.path.realpath(at), *(str(p) for p in Path(os.path.realpath(at)).parents)}
        folders[:] = sorted(
            f for f in folders if f != ".git" and os.path.realpath(os.path.join(at, f)) not in above
        )
        yield from (path for name in sorted(names) if os.path.isfile(path := os.path.join(at, name)))


class _HashCache:
    """The sha256 of large files, cached by size, times and inode."""

    def __init__(self) -> None:
        self.old: dict[str, list[object]] = {}
        self.new: dict[str, list[object]] = {}
        with suppress(OSError, ValueError):  # a missing or corrupt cache is made again
            self.old = dict(json.loads(HASHES.read_text(encoding="utf-8")))

    def sha256(self, path: str, found: os.stat_result) -> str:
        stamp = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        known = self.old.get(path, [""])
        digest = str(known[0]) if known[1:] == stamp else sha256(Path(path))
        if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) > RECENT_NS:
            self.new[path] = [digest, *stamp]
        return digest

    def save(self) -> None:
        if any(self.old.get(path) != stamp for path, stamp in self.new.items()):
            write_text(HASHES, json.dumps(self.old | self.new))


# What is printed


def local_paths(words: Sequence[str]) -> list[str]:
    """The paths that exist on this machine among the values of settings."""
    found = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key.lstrip("+~") in OUTPUT_SETTINGS:
            continue
        for part in re.split(r"[,\[\]]", value):
            path = part.strip().strip("'\"")
            if path and os.path.exists(os.path.expanduser(path)):
                found.append(path if os.path.isabs(path) else os.path.normpath(path))
    return list(dict.fromkeys(found))


def _is_pushed(path: str, files: Mapping[str, PushedFile]) -> bool:
    return path == "." or any(p == path or p.startswith(f"{path}/") for p in files)


def _missing_path(path: str) -> str:
    if os.path.isabs(path) or path.startswith(("../", "~")):
        return f"{path} is not on the server: paths outside of this folder are not pushed"
    if is_never_pushed(path):
        return f"{path} is not on the server: such paths are never pushed"
    return f"{path} is not on the server: git ignores it; ALSO={path} pushes it"


def _print_report(where: str, report: Mapping[str, Any]) -> None:
    counts = [f"{len(report[kind])} {kind}" for kind in ("changed", "new", "removed") if report[kind]]
    if not counts:
        print(f"nothing to push: {where} is up to date", flush=True)
    else:
        print(f"pushed to {where}: {', '.join(counts)} ({format_size(report['bytes'])})")
    names = [(kind, path) for kind in ("changed", "new", "removed") for path in sorted(report[kind])]
    for kind, path in names[:MAX_NAMES]:
        print(f"  {kind:<8} {printable(path)}")
    if len(names) > MAX_NAMES:
        print(f"  and {len(names) - MAX_NAMES} more")
    sys.stdout.flush()
    other, hit = report.get("other"), len(report["changed"]) + len(report["removed"])
    if other and hit:
        eprint(
            printable(f"{other['who']} made the last push to this folder, on {other['when']}: ")
            + f"{count(hit, 'file')} that it held {'is' if hit == 1 else 'are'} replaced or removed; "
            "give each client its own REMOTE_DIR"
        )
    for path in report["kept"]:
        eprint(f"{printable(path)} was deleted locally but modified on the server: not removed")
    if report["replaced"]:
        listed = transfer.join_names(report["replaced"], MAX_NAMES)
        eprint(f"replaced although modified on the server: {listed}; backups on the server: {report['aside']}")
