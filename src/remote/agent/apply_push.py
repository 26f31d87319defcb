"""A push, as the server sees it: what differs, what has arrived, and what takes its place.

outputs/remote/
  pushed.json                {path: sha256 or "-> target"}: what pushes put here, and may take away again
  also.json                  {path: [sha256, size, mtime in ns]}: what ALSO brought; no push takes that away
  incoming/<sender>/<sha256> what is on its way, named by its content: a push that was cut goes on with it
  replaced/<time>/<path>     what was changed here and had to make room
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

from src.remote.agent import fs, snapshots
from src.remote.agent.protocol import AgentError, unbroken

HOME = "outputs/remote"
NEVER = (".git", ".venv", ".cache", "outputs", "artifacts", ".env")  # no push writes there, whatever it says
LINK = "-> "
Entry = Dict[str, Any]  # noqa: UP006  {"is": sha256 or "-> target", "size", "mode", "also"}


def settle(folder: str, push: dict[str, str], wanted: dict[str, Entry], named: list[str]) -> dict[str, Any]:
    """Make the folder hold `wanted`, all at once, if the content of everything that differs has arrived.

    `push` is `{"id", "sender"}`: one that is repeated is answered as it was; `named` are paths to be asked after.
    Returns: the folder as `root`, `named` as `{path: whether it is here}`, whether there is an `rsync`, the bytes
    `free`, and either what is `lacking`, `{sha256: bytes that are here}`, or what was done: `new`, `changed`,
    `removed`, `kept` and `replaced` paths, and `aside`, where the last are now.
    Raises: Refused if the folder cannot be made; OSError.
    """
    root = fs.root(folder)
    _make(root)
    work = _Work(root, push, wanted)
    os.makedirs(work.incoming, mode=0o700, exist_ok=True)
    work.check()
    with open(os.path.join(work.home, ".lock"), "a") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        done = work.done()
        if "lacking" not in done:
            snapshots.prune(root)
    return dict(
        done,
        root=root,
        named={path: os.path.lexists(os.path.join(root, os.path.expanduser(path))) for path in named},
        rsync=shutil.which("rsync") is not None,
        free=shutil.disk_usage(work.home).free,
        incoming=work.incoming,
    )


def _make(root: str) -> None:
    """Make the project's folder: below the home with all above it, elsewhere in a folder that is there."""
    if os.path.isdir(root):
        return
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(root)  # may say that it is too long
    if os.path.lexists(root):
        raise AgentError(f"{root} is a file on the server", "REMOTE_DIR should be a folder")
    above, home = os.path.dirname(root), os.path.expanduser("~")
    if not os.path.isdir(above) and not root.startswith(os.path.join(home, "")):
        said = "is a file" if os.path.lexists(above) else "does not exist"
        raise AgentError(f"{above} {said} on the server", "choose another REMOTE_DIR, or make its folder there")
    try:
        os.makedirs(root, exist_ok=True)
    except FileNotFoundError:  # as below /proc
        raise AgentError(f"{root} cannot be made on the server", "choose another REMOTE_DIR") from None


class _Work:
    """One push into `root`."""

    def __init__(self, root: str, push: dict[str, str], wanted: dict[str, Entry]) -> None:
        self.root, self.push, self.wanted = root, push, wanted
        self.home = os.path.join(root, HOME)
        self.incoming = os.path.join(self.home, "incoming", push["sender"])
        self.aside = os.path.join(HOME, "replaced", time.strftime("%Y-%m-%d_%H-%M-%S-") + push["id"][:4])
        self.here: dict[str, int] = {}  # bytes, of each content that is on its way
        self.whole: set[str] = set()
        self.replaced: list[str] = []
        for path in wanted:
            parts = path.split("/")
            if os.path.isabs(path) or ".." in parts or "" in parts or parts[0] in NEVER:
                raise AgentError(f"{path} is no place for a push")

    def check(self) -> None:
        """Look at what has arrived; what is whole in size and not in content is removed."""
        sizes = {entry["is"]: entry["size"] for entry in self.wanted.values() if not _is_link(entry["is"])}
        for name in os.listdir(self.incoming):
            path = os.path.join(self.incoming, name)
            size = os.path.getsize(path)
            if name in sizes and size < sizes[name]:
                self.here[name] = size
            elif name in sizes and fs.sha256(path) == name:
                self.here[name] = size
                self.whole.add(name)
            else:
                os.unlink(path)

    def done(self) -> dict[str, Any]:
        """What `settle` returns. The caller holds the lock."""
        last = fs.read(os.path.join(self.home, "push.json")) or {}
        if last.get("id") == self.push["id"]:
            return dict(last["report"])
        self.pushed = fs.read(os.path.join(self.home, "pushed.json")) or {}
        self.also = fs.read(os.path.join(self.home, "also.json")) or {}
        before = {path: self.identity(path) for path in {*self.wanted, *self.pushed}}
        differing = [path for path, entry in self.wanted.items() if before[path] != entry["is"]]
        needed = {self.wanted[path]["is"] for path in differing} - self.whole
        lacking = {name: self.here.get(name, 0) for name in needed if not _is_link(name)}
        if lacking:
            return {"lacking": lacking}
        with unbroken:
            return self.take_place(differing, before)

    def take_place(self, differing: list[str], before: dict[str, str | None]) -> dict[str, Any]:
        """Put all that differs in its place, remove what is no more, and record that. Returns: what was done."""
        gone = [path for path in self.pushed if path not in self.wanted and before[path] is not None]
        removed = [path for path in gone if before[path] == self.pushed[path]]
        for path in removed:
            self.remove(path)
        for path in differing:
            known = self.pushed.get(path) or self.also.get(path, [None])[0]
            if before[path] not in (None, known):
                self.put_aside(path)
        for i, path in enumerate(differing):
            self.place(path, last=all(self.wanted[p]["is"] != self.wanted[path]["is"] for p in differing[i + 1 :]))
        report = {
            "new": [path for path in differing if before[path] is None],
            "changed": [path for path in differing if before[path] is not None] + self.set_modes(),
            "removed": removed,
            "kept": [path for path in gone if path not in removed],
            "replaced": self.replaced,
            "aside": self.aside,
            "bytes": sum(self.wanted[path]["size"] for path in differing),
        }
        self.record(report)
        return report

    def identity(self, path: str) -> str | None:
        """What is at a path: the content's sha256, a link's target, `folder`, or None for nothing.

        What is seen through a link that this push removes is not there.
        """
        at = _at(self.root, path)
        if any(_is_link(self.pushed.get(p, "")) and p not in self.wanted for p in _above(path)):
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
        """Remove a file, and the folders that are empty without it."""
        at = _at(self.root, path)
        os.unlink(at)
        with contextlib.suppress(OSError):
            while at != _at(self.root, path.split("/")[0]):
                at = os.path.dirname(at)
                os.rmdir(at)

    def put_aside(self, path: str) -> None:
        """Keep what is at a path; a file stays there too, until another takes its place."""
        at, kept = _at(self.root, path), _at(self.root, f"{self.aside}/{path}")
        os.makedirs(os.path.dirname(kept), exist_ok=True)
        if os.path.isdir(at) and not os.path.islink(at):
            with contextlib.suppress(OSError):
                os.rmdir(at)  # it may be empty
                return
            shutil.move(os.fsdecode(at), os.fsdecode(kept))
        else:
            try:
                os.link(at, kept, follow_symlinks=False)
            except OSError:
                shutil.copy2(at, kept, follow_symlinks=False)
        self.replaced.append(path)

    def place(self, path: str, last: bool) -> None:
        """Put what has arrived at its path; the `last` that needs a content takes it."""
        entry, at = self.wanted[path], _at(self.root, path)
        for above in _above(path):
            if os.path.lexists(_at(self.root, above)) and not os.path.isdir(_at(self.root, above)):
                self.put_aside(above)
                os.unlink(_at(self.root, above))
        os.makedirs(os.path.dirname(at), exist_ok=True)
        temporary = at + b"." + self.push["id"].encode() + b".tmp"
        try:
            if _is_link(entry["is"]):
                os.symlink(entry["is"][len(LINK) :].encode("utf-8", "surrogateescape"), temporary)
            else:
                arrived = os.fsencode(os.path.join(self.incoming, entry["is"]))
                _move(arrived, temporary) if last else _copy(arrived, temporary)
                os.chmod(temporary, _mode(entry["mode"]))
            os.replace(temporary, at)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)

    def set_modes(self) -> list[str]:
        """Make files executable, or not, as they are wanted. Returns: those that were not."""
        found = []
        for path, entry in self.wanted.items():
            at = _at(self.root, path)
            if not _is_link(entry["is"]) and bool(os.stat(at).st_mode & 0o100) != bool(entry["mode"] & 0o100):
                os.chmod(at, _mode(entry["mode"]))
                found.append(path)
        return found

    def record(self, report: dict[str, Any]) -> None:
        ours = {path: entry["is"] for path, entry in self.wanted.items() if not entry["also"]}
        also = {path: stamp for path, stamp in self.also.items() if path not in ours}
        for path, entry in self.wanted.items():
            if entry["also"]:
                found = os.stat(_at(self.root, path))
                also[path] = [entry["is"], found.st_size, found.st_mtime_ns]
        for name, value, old in (("pushed", ours, self.pushed), ("also", also, self.also)):
            if value != old:
                fs.write(os.path.join(self.home, f"{name}.json"), json.dumps(value))
        if any(report[kind] for kind in ("new", "changed", "removed", "kept")):
            said = {"id": self.push["id"], "report": report}
            fs.write(os.path.join(self.home, "push.json"), json.dumps(said))
        shutil.rmtree(self.incoming, ignore_errors=True)


def _at(root: str, path: str) -> bytes:
    """A path of the project: its bytes are those that it has at home, whatever this session's locale is."""
    return os.path.join(os.fsencode(root), path.encode("utf-8", "surrogateescape"))


def _above(path: str) -> list[str]:
    """The folders that a path is in, the outermost first."""
    parts = path.split("/")
    return ["/".join(parts[:i]) for i in range(1, len(parts))]


def _is_link(identity: str) -> bool:
    return identity.startswith(LINK)


def _mode(mode: int) -> int:
    """A file's mode as it is at home, as far as this session's umask lets it."""
    umask = os.umask(0)
    os.umask(umask)
    return mode & 0o777 & ~umask | 0o600


def _move(source: bytes, target: bytes) -> None:
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy(source, target)


def _copy(source: bytes, target: bytes) -> None:
    shutil.copyfile(source, target)
