"""Applies a push on the server: compares files, verifies the received ones, and replaces all that differ at once.

outputs/remote/
  pushed.json                {path: sha256 or "-> target"}: files that pushes have created and may remove
  push.json                  the last push that changed files: its id, client, time and report
  also.json                  {path: [sha256, size, mtime in ns]}: files of ALSO, which no push removes
  incoming/<sender>/<sha256> files in transfer, named by their content; an interrupted push resumes with them
  replaced/<time>/<path>     backups of files that were changed on the server and replaced
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from typing import Any, Dict  # noqa: UP035  (an alias is evaluated, by Python 3.8 too)

from . import fs, snapshots
from .bootstrap import AgentError, uninterrupted

HOME = "outputs/remote"
PROTECTED = (".git", ".venv", ".cache", "outputs", "artifacts", ".env")  # never written by a push
LINK = "-> "
Entry = Dict[str, Any]  # noqa: UP006  {"identity": sha256 or "-> target", "size", "mode", "also"}


def apply(folder: str, push: dict[str, str], wanted: dict[str, Entry], named: list[str]) -> dict[str, Any]:
    """Make the folder hold `wanted`, all at once, if the content of every file that differs has arrived.

    Args:
        push: `{"id", "sender", "who"}`, the id of the push, that of its client, and the client's user, host and
            folder; a repeated request with the same id returns the same report.
        named: paths whose existence is reported.
    Returns: `root`, `named` as `{path: whether it exists}`, whether `rsync` is installed, the `free` bytes, the
        folder `incoming`, and either `lacking`, `{sha256: bytes that have arrived}`, or what was done: the `new`,
        `changed`, `removed`, `kept` and `replaced` paths, `aside`, the folder of the backups, and `other`, the
        client and time of the last push if another client made it.
    Raises: AgentError if the folder cannot be created, or a path is protected; OSError.
    """
    root = fs.root(folder)
    _make_root(root)
    operation = _Push(root, push, wanted)
    os.makedirs(operation.incoming, mode=0o700, exist_ok=True)
    operation.check_incoming()
    with open(os.path.join(operation.home, ".lock"), "a") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        report = operation.apply()
        if "lacking" not in report:
            snapshots.prune(root)
    return dict(
        report,
        root=root,
        named={path: os.path.lexists(os.path.join(root, os.path.expanduser(path))) for path in named},
        rsync=shutil.which("rsync") is not None,
        free=shutil.disk_usage(operation.home).free,
        incoming=operation.incoming,
    )


def _make_root(root: str) -> None:
    """Create the project folder; parent folders are created only below the home folder."""
    if os.path.isdir(root):
        return
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(root)  # raises OSError if the name is too long
    if os.path.lexists(root):
        raise AgentError(f"{root} is a file on the server", "REMOTE_DIR should be a folder")
    parent, home = os.path.dirname(root), os.path.expanduser("~")
    if not os.path.isdir(parent) and not root.startswith(os.path.join(home, "")):
        problem = "is a file" if os.path.lexists(parent) else "does not exist"
        raise AgentError(
            f"{parent} {problem} on the server", "choose another REMOTE_DIR, or create this folder on the server"
        )
    try:
        os.makedirs(root, exist_ok=True)
    except FileNotFoundError:  # such as below /proc
        raise AgentError(f"{root} cannot be created on the server", "choose another REMOTE_DIR") from None


class _Push:
    """One push into the project folder `root`."""

    def __init__(self, root: str, push: dict[str, str], wanted: dict[str, Entry]) -> None:
        self.root, self.push, self.wanted = root, push, wanted
        self.home = os.path.join(root, HOME)
        self.incoming = os.path.join(self.home, "incoming", push["sender"])
        self.aside = os.path.join(HOME, "replaced", time.strftime("%Y-%m-%d_%H-%M-%S-") + push["id"][:4])
        self.arrived: dict[str, int] = {}  # bytes by sha256
        self.complete: set[str] = set()
        self.replaced: list[str] = []
        for path in wanted:
            parts = path.split("/")
            below = any(parent in wanted for parent in _parents(path))  # a link would lead elsewhere
            if os.path.isabs(path) or {"", ".", ".."} & set(parts) or parts[0] in PROTECTED or below:
                raise AgentError(f"a push must not write to {path}")

    def check_incoming(self) -> None:
        """Find which files have arrived; remove those that have the right size and another content."""
        sizes = {e["identity"]: e["size"] for e in self.wanted.values() if not _is_link(e["identity"])}
        for name in os.listdir(self.incoming):
            path = os.path.join(self.incoming, name)
            size = os.path.getsize(path)
            if name in sizes and size < sizes[name]:
                self.arrived[name] = size
            elif name in sizes and fs.sha256(path) == name:
                self.arrived[name] = size
                self.complete.add(name)
            else:
                os.unlink(path)

    def apply(self) -> dict[str, Any]:
        """Apply the push, or report what is `lacking`. The caller holds the lock."""
        self.last = fs.read_json(os.path.join(self.home, "push.json")) or {}
        if self.last.get("id") == self.push["id"]:
            return dict(self.last["report"])
        self.pushed = fs.read_json(os.path.join(self.home, "pushed.json")) or {}
        self.also = fs.read_json(os.path.join(self.home, "also.json")) or {}
        before = {path: self.identity(path) for path in {*self.wanted, *self.pushed}}
        differing = [path for path, entry in self.wanted.items() if before[path] != entry["identity"]]
        needed = {self.wanted[path]["identity"] for path in differing} - self.complete
        lacking = {name: self.arrived.get(name, 0) for name in needed if not _is_link(name)}
        if lacking:
            return {"lacking": lacking}
        with uninterrupted:
            return self.replace(differing, before)

    def replace(self, differing: list[str], before: dict[str, str | None]) -> dict[str, Any]:
        """Install the files that differ, remove those no longer pushed, and record both. Returns: the report."""
        gone = [path for path in self.pushed if path not in self.wanted and before[path] is not None]
        removed = [path for path in gone if before[path] == self.pushed[path]]
        for path in removed:
            self.remove(path)
        for path in differing:
            known = self.pushed.get(path) or self.also.get(path, [None])[0]
            if before[path] not in (None, known):
                self.back_up(path)
        for i, path in enumerate(differing):
            identity = self.wanted[path]["identity"]
            self.install(path, last=all(self.wanted[p]["identity"] != identity for p in differing[i + 1 :]))
        report = {
            "new": [path for path in differing if before[path] is None],
            "changed": [path for path in differing if before[path] is not None] + self.set_modes(),
            "removed": removed,
            "kept": [path for path in gone if path not in removed],
            "replaced": self.replaced,
            "aside": self.aside,
            "other": self.other_client(),
            "bytes": sum(self.wanted[path]["size"] for path in differing),
        }
        self.record(report)
        return report

    def other_client(self) -> dict[str, str] | None:
        if self.last.get("sender") in (None, self.push["sender"]):
            return None
        return {key: self.last[key] for key in ("who", "when")}

    def identity(self, path: str) -> str | None:
        """What is at a path: the sha256 of a file, `-> target` of a link, `folder`, or None if nothing is.

        A path below a link that this push removes counts as nothing.
        """
        at = _bytes(self.root, path)
        if any(_is_link(self.pushed.get(p, "")) and p not in self.wanted for p in _parents(path)):
            return None
        try:
            if os.path.islink(at):
                return LINK + os.readlink(at).decode("utf-8", "surrogateescape")
            if not os.path.isfile(at):
                return "folder" if os.path.lexists(at) else None
        except (NotADirectoryError, PermissionError):
            return None
        found = os.stat(at)
        stamp = self.also.get(path)
        if stamp and stamp[1:] == [found.st_size, found.st_mtime_ns]:
            return str(stamp[0])
        return fs.sha256(at)

    def remove(self, path: str) -> None:
        """Remove a file and the folders that are empty without it."""
        at = _bytes(self.root, path)
        os.unlink(at)
        with contextlib.suppress(OSError):
            while at != _bytes(self.root, path.split("/")[0]):
                at = os.path.dirname(at)
                os.rmdir(at)

    def back_up(self, path: str) -> None:
        """Keep a copy of what is at a path; a file also stays in its place until another replaces it."""
        at, backup = _bytes(self.root, path), _bytes(self.root, f"{self.aside}/{path}")
        os.makedirs(os.path.dirname(backup), exist_ok=True)
        if os.path.isdir(at) and not os.path.islink(at):
            with contextlib.suppress(OSError):
                os.rmdir(at)  # an empty folder needs no backup
                return
            shutil.move(os.fsdecode(at), os.fsdecode(backup))
        else:
            try:
                os.link(at, backup, follow_symlinks=False)
            except OSError:
                shutil.copy2(at, backup, follow_symlinks=False)
        self.replaced.append(path)

    def install(self, path: str, last: bool) -> None:
        """Put an arrived file at its path: moved for the `last` path with this content, copied for the others."""
        entry, at = self.wanted[path], _bytes(self.root, path)
        for parent in _parents(path):
            if os.path.lexists(_bytes(self.root, parent)) and not os.path.isdir(_bytes(self.root, parent)):
                self.back_up(parent)
                os.unlink(_bytes(self.root, parent))
        os.makedirs(os.path.dirname(at), exist_ok=True)
        temporary = at + b"." + self.push["id"].encode() + b".tmp"
        try:
            if _is_link(entry["identity"]):
                os.symlink(entry["identity"][len(LINK) :].encode("utf-8", "surrogateescape"), temporary)
            else:
                arrived = os.fsencode(os.path.join(self.incoming, entry["identity"]))
                _move(arrived, temporary) if last else shutil.copyfile(arrived, temporary)
                os.chmod(temporary, _mode(entry["mode"]))
            os.replace(temporary, at)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)

    def set_modes(self) -> list[str]:
        """Set the executable bit of every file as on the client. Returns: the files that were changed."""
        found = []
        for path, entry in self.wanted.items():
            at = _bytes(self.root, path)
            if not _is_link(entry["identity"]) and bool(os.stat(at).st_mode & 0o100) != bool(
                entry["mode"] & 0o100
            ):
                os.chmod(at, _mode(entry["mode"]))
                found.append(path)
        return found

    def record(self, report: dict[str, Any]) -> None:
        """Write pushed.json, also.json and push.json, and remove the received files."""
        pushed = {path: entry["identity"] for path, entry in self.wanted.items() if not entry["also"]}
        also = {path: stamp for path, stamp in self.also.items() if path not in pushed}
        for path, entry in self.wanted.items():
            if entry["also"]:
                found = os.stat(_bytes(self.root, path))
                also[path] = [entry["identity"], found.st_size, found.st_mtime_ns]
        for name, value, old in (("pushed", pushed, self.pushed), ("also", also, self.also)):
            if value != old:
                fs.write_text(os.path.join(self.home, f"{name}.json"), json.dumps(value))
        if any(report[kind] for kind in ("new", "changed", "removed", "kept")):
            when = time.strftime("%Y-%m-%d %H:%M %Z")
            last = dict(self.push, when=when, report=report)
            fs.write_text(os.path.join(self.home, "push.json"), json.dumps(last))
        shutil.rmtree(self.incoming, ignore_errors=True)


def _bytes(root: str, path: str) -> bytes:
    """The absolute path of a project file, byte for byte as on the client, whatever this session's locale is."""
    return os.path.join(os.fsencode(root), path.encode("utf-8", "surrogateescape"))


def _parents(path: str) -> list[str]:
    """The folders that contain a path, the outermost first."""
    parts = path.split("/")
    return ["/".join(parts[:i]) for i in range(1, len(parts))]


def _is_link(identity: str) -> bool:
    return identity.startswith(LINK)


def _mode(mode: int) -> int:
    """The file mode of the client, restricted by this session's umask."""
    umask = os.umask(0)
    os.umask(umask)
    return mode & 0o777 & ~umask | 0o600


def _move(source: bytes, target: bytes) -> None:
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copyfile(source, target)
