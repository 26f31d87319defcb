"""The code of this folder, on the server: what differs is sent beside it, proven, and put in its place at once."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import socket
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from src.errors import RemoteError
from src.remote import transfer
from src.remote.connection import Connection
from src.remote.push_files import LINK, PushFiles, never, take
from src.utils.environment import git_state
from src.utils.files import disk_errors, sha256
from src.utils.logs import eprint

CODE = ("src/", "configs/", "hydra_plugins/")  # what a run is made of
TRIES = 3  # to have a file arrive as it is here
SHOWN = 20  # names
LOCK = Path("outputs/remote/push.lock")
PLACES = {"output_dir", "artifacts_dir"}  # settings whose paths are made


def push(connection: Connection, also: Sequence[str] = (), words: Sequence[str] = ()) -> dict[str, Any]:
    """Make REMOTE_DIR hold what git would take of this folder, and the paths of `also`; say what was changed.

    `words` are settings of a command that will run there: a path among them that is only here is told.
    Returns: the code as there/snapshots.py takes it.
    Raises: RemoteError in a sentence; nothing there has changed then.
    """
    with _alone():
        taken, said = _settled(connection, also, values(words))
    for note in taken.notes:
        eprint(note)
    for path, there in said["named"].items():
        if not there:
            eprint(_hint(path))
    _report(connection, said)
    return code(taken)


def _settled(
    connection: Connection, also: Sequence[str], named: Sequence[str]
) -> tuple[PushFiles, dict[str, Any]]:
    """Have the server take what is here. Returns: that, and what agent/apply_push.py `settle` says it did."""
    push = {"id": uuid.uuid4().hex, "sender": _sender()}
    taken = take(also)
    for again in range(TRIES + 1):
        wanted = {
            path: {"is": e.identity, "size": e.size, "mode": e.mode, "also": e.also}
            for path, e in taken.files.items()
        }
        asked = sorted({path for path in named if not _is_taken(path, taken)})
        said = connection.call(
            "apply_push:settle", folder=connection.target.dir, push=push, wanted=wanted, named=asked
        )
        if "lacking" not in said:
            return taken, said
        paths = {e.identity: Path(path) for path, e in taken.files.items()}
        lacking = {name: paths[name] for name in said["lacking"]}
        if again < TRIES:
            size = sum(taken.files[str(path)].size - said["lacking"][name] for name, path in lacking.items())
            _check_room(connection, size, said["free"])
            transfer.send(connection, lacking, said["incoming"], said["rsync"], size)
            taken = take(also)  # something may have changed here meanwhile
    names = ", ".join(sorted(map(str, lacking.values()))[:3])
    raise RemoteError(f"{names}: what arrives is not what was sent, {TRIES} times", hint="push again")


def _check_room(connection: Connection, size: int, free: int) -> None:
    if size > free:
        raise RemoteError(
            f"{connection.target} has {megabytes(free)} left, and {megabytes(size)} are to be sent",
            hint="free some space there",
        )


@contextmanager
def _alone() -> Iterator[None]:
    """Wait for another push of this folder, if there is one."""
    with disk_errors(LOCK):
        LOCK.parent.mkdir(parents=True, exist_ok=True)
        file = LOCK.open("a")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            eprint("another push of this folder is going on; this one waits for it")
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _sender() -> str:
    """This folder of this machine, as nobody else is called."""
    return hashlib.sha256(f"{socket.gethostname()}:{Path.cwd()}".encode(errors="surrogateescape")).hexdigest()[:16]


def code(taken: PushFiles) -> dict[str, Any]:
    """What a run is made of, by name, and what git says of it."""
    files = {}
    for path, entry in taken.files.items():
        if path.startswith(CODE) and not entry.also and Path(path).is_file():
            files[path] = sha256(Path(path)) if entry.identity.startswith(LINK) else entry.identity
    made = {"files": files, "state": git_state()}
    return {"digest": hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest(), **made}


# What is said


def values(words: Sequence[str]) -> list[str]:
    """The paths that exist here among the values of settings."""
    found = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key.lstrip("+~") in PLACES:
            continue
        for part in re.split(r"[,\[\]]", value):
            path = part.strip().strip("'\"")
            if path and os.path.exists(os.path.expanduser(path)):
                found.append(path if os.path.isabs(path) else os.path.normpath(path))
    return list(dict.fromkeys(found))


def _is_taken(path: str, taken: PushFiles) -> bool:
    return path == "." or any(p == path or p.startswith(f"{path}/") for p in taken.files)


def _hint(path: str) -> str:
    if os.path.isabs(path) or path.startswith(("../", "~")):
        return f"{path} is not on the server: it lies outside of this folder"
    if never(path):
        return f"{path} is not on the server: it is never pushed"
    return f"{path} is not on the server: git ignores it; ALSO={path} sends it"


def _report(connection: Connection, said: Mapping[str, Any]) -> None:
    where = f"{connection.target}:{connection.target.dir}"
    counts = [f"{len(said[kind])} {kind}" for kind in ("changed", "new", "removed") if said[kind]]
    if not counts:
        print(f"nothing to push: {where} is as this folder is", flush=True)
    else:
        print(f"pushed to {where}: {', '.join(counts)} ({megabytes(said['bytes'])})")
    names = [(kind, path) for kind in ("changed", "new", "removed") for path in sorted(said[kind])]
    for kind, path in names[:SHOWN]:
        print(f"  {kind:<8} {shown(path)}")
    if len(names) > SHOWN:
        print(f"  and {len(names) - SHOWN} more")
    sys.stdout.flush()
    for path in said["kept"]:
        eprint(f"{shown(path)} is no more here, and was changed on the server: it is kept there")
    if said["replaced"]:
        listed = ", ".join(map(shown, said["replaced"][:SHOWN]))
        more = f" and {len(said['replaced']) - SHOWN} more" if len(said["replaced"]) > SHOWN else ""
        eprint(f"changed on the server since, and replaced: {listed}{more}; what was there is in {said['aside']}")


def megabytes(size: int) -> str:
    """`14.2 MB`, in the unit that fits."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}" if size < 100 * unit else f"{size / unit:.0f} {name}"
    return f"{size} bytes"


def shown(path: str) -> str:
    """A path as a terminal can show it."""
    return path if path.isprintable() else ascii(path)
