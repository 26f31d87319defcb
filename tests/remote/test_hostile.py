"""A malicious or broken server: a fetch writes only into its run, and every invalid answer is one sentence."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from src.errors import RemoteError, UserError
from src.remote import commands, listing
from src.remote import connection as connection_module
from src.remote import fetch as fetching
from src.remote.connection import Connection
from src.stages import STAGES
from tests.remote.hostile import MANIFEST, RUN_ID, HostileServer, file_entry, job, line

pytest_plugins = ["tests.remote.hostile"]

JOB = {"id": "the-job", "status": "ended"}


@pytest.fixture
def victim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of a user, whose current folder is a project in it."""
    home = tmp_path / "home"
    (home / "project").mkdir(parents=True)
    (home / ".ssh").mkdir()
    (home / ".bashrc").write_text("alias ls=ls\n")
    (home / ".ssh/authorized_keys").write_text("ssh-ed25519 AAAA me\n")
    monkeypatch.chdir(home / "project")
    return home


@pytest.fixture
def connection(hostile: HostileServer) -> Iterator[Connection]:
    with hostile.connection() as opened:
        yield opened


def link(path: str, to: str) -> dict[str, Any]:
    return {"path": path, "link": to}


def fetch(connection: Connection, hostile: HostileServer) -> Path | None:
    """The fetched run; None if it was refused."""
    try:
        return fetching.fetch(connection, JOB | {"run": hostile.run})
    except UserError:
        return None


def outside(home: Path) -> dict[str, str]:
    """Everything in a home but the folders of fetches: contents, targets of links, and folders."""
    found = {}
    for at, folders, names in os.walk(home):
        inside = Path(at) == home / "project/outputs"
        folders[:] = [name for name in folders if not (inside and name in {"runs", "fetching", "replaced"})]
        for path in (Path(at, name) for name in (*folders, *names)):
            found[str(path)] = (
                os.readlink(path) if path.is_symlink() else "" if path.is_dir() else path.read_text()
            )
    return {path: text for path, text in found.items() if not path.endswith("project/outputs")}


# Fetching


ATTACKS = {
    "through a link": [
        link("a/b/c/d/up", "../../../.."),
        link("e", "a/b/c/d/up/../../../.."),
        link("e/.bashrc", "x"),
    ],
    "below a link": [link("up", ".."), file_entry("up/up", b"x")],
    "twice": [file_entry("x", b"x"), link("x", "../../../../.bashrc")],
    "absolute": [link("x", "/etc/passwd")],
    "an absolute path": [file_entry("/tmp/x", b"x")],
    "dots": [file_entry("a/../../x", b"x")],
    "the folder itself": [file_entry(".", b"x")],
    "nul": [file_entry("a\0b", b"x")],
    "empty": [file_entry("a//b", b"x")],
    "a surrogate": [file_entry("a\ud800", b"x")],
    "long": [file_entry("a" * 256, b"x")],
    "deep": [file_entry("a/" * 40 + "b", b"x")],
    "a loop": [link("a/b", ".."), link("c", "c")],
    "no manifest": [link("manifest.json", "../../../../.bashrc")],
    "our own files": [link("fetched.json", "../../../../.bashrc"), link(".lock", "manifest.json")],
}


@pytest.mark.parametrize("name", ATTACKS)
def test_no_listing_leads_outside(name: str, victim: Path, hostile: HostileServer, connection: Connection) -> None:
    hostile.serves(ATTACKS[name], {"x": b"x", "up/up": b"x"})
    before = outside(victim)
    run = fetch(connection, hostile)
    assert outside(victim) == before
    assert run is None or not any(path.is_symlink() for path in run.rglob("*"))


def test_what_an_earlier_attempt_left_is_not_followed(
    victim: Path, hostile: HostileServer, connection: Connection
) -> None:
    """Also links in folders, and a link in place of the folder itself."""
    before, place = outside(victim), Path("outputs/fetching") / RUN_ID
    place.mkdir(parents=True)
    (place / "keys").symlink_to(victim / ".ssh/authorized_keys")
    (place / "ssh").symlink_to(victim / ".ssh")
    os.link(victim / ".bashrc", place / "rc")
    content = b"ssh-ed25519 AAAA me\nssh-ed25519 BBBB attacker\n"
    paths = ["keys", "ssh/authorized_keys", "rc"]
    hostile.serves([file_entry(path, content) for path in paths], dict.fromkeys(paths, content))
    run = fetch(connection, hostile)
    assert outside(victim) == before
    assert run is not None and all((run / path).read_bytes() == content for path in paths)
    place.symlink_to(victim / ".ssh")
    hostile.serves([file_entry("authorized_keys", content)], {"authorized_keys": content})
    assert fetch(connection, hostile) == run and outside(victim) == before


NAMES = ["a", "b", "c", "manifest.json", "..", ".", "", "x" * 300, "a\0", "\ud800"]
USUAL = [60, 60, 60, 4, 2, 1, 1, 1, 1, 1]  # how often each is drawn
UP = ["..", "..", "a", "b", ".", "c", ".bashrc", ".ssh/authorized_keys"]


def random_listing(draw: random.Random) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    entries, files = [], {}
    for _ in range(draw.randint(1, 6)):
        path = "/".join(draw.choices(NAMES, USUAL, k=draw.randint(1, 3)))
        content = draw.choice([b"", b"one", b"another one"])
        kind = draw.choices(["file", "link", "folder", "outside"], [4, 6, 1, 1])[0]
        if kind == "file":
            entries.append(file_entry(path, content))
            files[path] = draw.choice([content] * 9 + [content + b" and more", content[:1]])
        elif kind == "link":
            inside = draw.choice([entry["path"] or "a" for entry in entries] or ["a"])
            to = [os.path.relpath(inside, os.path.dirname(path) or "."), "/".join(draw.choices(UP, k=4)), "/etc"]
            entries.append(link(path, draw.choices(to, [3, 3, 1])[0]))
        else:
            entries.append({"path": path, kind: True if kind == "folder" else "/etc/passwd"})
    return entries, files


def test_random_listings_write_nothing_outside(
    victim: Path, hostile: HostileServer, connection: Connection
) -> None:
    """One after the other in the same project, so that each meets what those before it left."""
    draw, before, top = random.Random(5), outside(victim), Path("outputs").absolute()
    runs, links = 0, 0
    for _ in range(50):
        hostile.serves(*random_listing(draw))
        run = fetch(connection, hostile)
        assert outside(victim) == before
        runs += run is not None
        for path in Path("outputs").rglob("*"):
            if path.is_symlink():
                assert path.resolve().is_relative_to(top)
                links += path.name != "latest"
    assert runs > 15 and links > 10  # most of them are refused, not all


def test_a_file_that_does_not_end_is_cut_at_its_size(
    victim: Path, hostile: HostileServer, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile.serves([file_entry("model/weights", b"short")], {"model/weights": b"short" + bytes(1 << 20)})
    sizes = []
    real = fetching.transfer.receive

    def receive(*given: Any) -> None:
        real(*given)
        sizes.append(Path("outputs/fetching", RUN_ID, "model/weights").stat().st_size)

    monkeypatch.setattr(fetching.transfer, "receive", receive)
    run = fetch(connection, hostile)
    assert run is not None and (run / "model/weights").read_bytes() == b"short" and sizes == [5]


VERSION = b"\0\0\0\5\2\0\0\0\3"  # of SFTP, in a packet


@pytest.mark.parametrize(
    "sent",
    [
        b"Welcome to the cluster!\n" * 4,  # a login shell that prints breaks SFTP
        b"\xff" * 100,
        b"\0\0\0\2\2\0",
        VERSION + b"\0\0\0\x0f\x65\0\0\0\1\0\0\0\4\0\0\0\2\xff\xfe",  # a status that is not UTF-8
    ],
)
def test_garbage_in_place_of_sftp_is_one_sentence(
    sent: bytes, victim: Path, hostile: HostileServer, connection: Connection
) -> None:
    hostile.sftp = sent
    hostile.serves([file_entry("x", b"x")], {"x": b"x"})
    with pytest.raises(RemoteError, match="sent an invalid answer, by SFTP: "):
        fetching.fetch(connection, JOB | {"run": hostile.run})


# Answers

JOBS, LIST, LOG = "jobs:list_jobs", "list_run:list_run", "jobs:follow"
HEAD = line(frame={"manifest": MANIFEST, "host": "srv", "rsync": False})


def entries(**changes: Any) -> list[bytes]:
    return [HEAD, line(frame=file_entry("x", b"x") | changes), line(answer=None)]


ANSWERS: dict[str, list[tuple[str, list[bytes]]]] = {  # by command
    "ssh-status": [
        (JOBS, [b"<html>502 Bad Gateway</html>\n"]),
        (JOBS, [b"null\n"]),
        (JOBS, [b"[" * 100_000 + b"\n"]),
        (JOBS, [b'{"answer": ' + b"9" * 5000 + b"}\n"]),
        (JOBS, [line(answer=None)]),
        (JOBS, [line(answer=[None])]),
        (JOBS, [line(answer={"jobs": []})]),
        (JOBS, [line(error=None)]),
        (JOBS, [line(error={"a": 1}, hint=3)]),
        (JOBS, [line(frame={})]),
        (JOBS, [line(answer=[job(id="../x")])]),
        (JOBS, [line(answer=[job(id="\x1b]52;c;AAAA\x07")])]),
        (JOBS, [line(answer=[job(stage="; rm")])]),
        *(
            (JOBS, [line(answer=[job(started=value)])])
            for value in (None, "1", True, float("nan"), 1e300, 10**400)
        ),
        *((JOBS, [line(answer=[job(code=value)])]) for value in ("0", 1e3, 10**9)),
        (JOBS, [line(answer=[{key: value for key, value in job().items() if key != "last_line"}])]),
    ],
    "ssh-fetch": [
        (LIST, [line(answer=None)]),
        (LIST, [HEAD, line(frame=None)]),
        (LIST, [line(frame=file_entry("x", b"x"))]),
        (LIST, [line(frame={"manifest": None, "host": "srv", "rsync": False})]),
        *((LIST, entries(mtime=value)) for value in (None, float("nan"), float("inf"), "1", 1e300)),
        *((LIST, entries(size=value)) for value in (None, -1, 1.5, 1 << 70, "1")),
        *((LIST, entries(sha256=value)) for value in (None, "", "x" * 64, ["a"])),
        *((LIST, entries(path=value)) for value in (None, 3, "a\0b", "\ud800", "../x", "/x")),
        (LIST, entries(more=1)),
        (JOBS, [line(answer=[job(run="/srv/outputs/runs/latest")])]),
        (JOBS, [line(answer=[job(run="/srv/..")])]),
        (JOBS, [line(answer=[job(run="/srv/\x1b[2J")])]),
        *((JOBS, [line(answer=[job(run=value)])]) for value in ("/srv/\0/x", "/\ud800/x", "srv/x", "")),
        (JOBS, [line(answer=[job(run="/srv/" + "a" * 300)])]),
    ],
    "ssh-logs": [
        (LOG, [line(frame={"at": 0, "data": "no base64!"}), line(frame={"end": job()})]),
        (LOG, [line(frame={"at": 5, "data": "AAAA"}), line(frame={"end": job()})]),
        (LOG, [line(frame={"at": 0, "data": None})]),
        (LOG, [line(frame={"end": None})]),
        (LOG, [line(frame={"end": {}})]),
        (LOG, [line(frame={})]),
    ],
}


@pytest.mark.parametrize("command", ANSWERS)
def test_an_answer_that_no_agent_sends_is_one_sentence(
    command: str, victim: Path, hostile: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = outside(victim)
    for name, value in hostile.environment().items():
        monkeypatch.setenv(name, value)
    for function, reply in ANSWERS[command]:
        hostile.replies = {function: reply}
        with pytest.raises(RemoteError) as refused:
            commands.run(command, ["the-job"] if command != "ssh-status" else [], list(STAGES))
        (problem,) = refused.value.problems
        assert "sent an invalid answer" in problem or reply == [line(answer=None)], (reply, problem)
        assert problem.isprintable() and len(problem) < 300, problem
    assert outside(victim) == before


def test_what_does_not_end_is_cut(
    victim: Path, hostile: HostileServer, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An endless line, listing and output of the login shell."""
    monkeypatch.setattr(connection_module, "MAX_LINE", 1 << 16)
    monkeypatch.setattr(connection_module, "MAX_NOISE", 1 << 16)
    monkeypatch.setattr(listing, "MAX_ENTRIES", 50)
    hostile.replies[JOBS] = lambda args: iter(lambda: b"x" * 5000, b"")
    with pytest.raises(RemoteError, match="a line of more than"):
        connection.call(JOBS, folder="/srv")
    frames = (line(frame=file_entry(f"f{i}", b"x")) for i in range(10**9))
    hostile.replies[LIST] = lambda args: (data for each in (iter([HEAD]), frames) for data in each)
    with pytest.raises(RemoteError, match="a run of more than 50 files"):
        listing.list_run(connection, hostile.run)
    hostile.before_mark = b"Welcome!\n" * 10_000
    with pytest.raises(
        RemoteError, match=r"did not start on .*: the session does not stop printing \('Welcome!'\)"
    ):
        connection.call(JOBS, folder="/srv")
