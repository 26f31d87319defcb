"""Arguments arrive on the server as they were typed, and secrets reach only the process that needs them."""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
from pathlib import Path

import pytest

from tests.remote.client import Client, borrow_environment
from tests.remote.server import Server, needs_ssh, until

pytest_plugins = ["tests.remote.server", "tests.remote.client"]
pytestmark = needs_ssh

SPECIAL = [*"'\"\\$`!#&|;<>()[]{}*?~%^=,:@ \t\n\r/-+.é🙂", "$(id)", "${HOME}", "\\n", "'\\''", "--", "-o", "日本"]
BYTES = [os.fsdecode(bytes([n])) for n in (0x01, 0x1B, 0x7F, 0x80, 0xFF)]


def words(chance: random.Random, count: int) -> list[str]:
    pieces = [*SPECIAL, *BYTES, *"abcXYZ019_"]
    made = ["".join(chance.choices(pieces, k=chance.randrange(0, 12))) for _ in range(count)]
    return [chance.choice(("", "lr=", "data_source.type=", "+x=")) + word for word in made]


@pytest.mark.parametrize("seed", range(3))
def test_arguments_arrive_as_they_were_typed(user: Client, recorded_args: Path, seed: int) -> None:
    typed = words(random.Random(seed), 150)
    done = user.start("ssh-train", *typed)
    _, error = done.communicate(timeout=60)
    assert done.returncode == 0, error.decode(errors="replace")
    assert json.loads(recorded_args.read_text())["words"] == ["-m", "src.main", "train", *typed]


def test_flags_of_the_client_may_be_anywhere(user: Client, recorded_args: Path) -> None:
    done = user("ssh-eval", "split=dev", "--detach", "--also=", "--config-name", "mine")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("next: make ssh-attach RUN=")
    while not recorded_args.exists() or not recorded_args.read_text():
        pass
    assert json.loads(recorded_args.read_text())["words"] == [
        "-m",
        "src.main",
        "eval",
        "split=dev",
        "--config-name",
        "mine",
    ]


@pytest.mark.parametrize("name", ["it's $HOME", "~/é [x]", "~"])
def test_a_folder_may_have_a_special_name(sshd: Server, user: Client, name: str) -> None:
    home = sshd.home / "homes" / hashlib.sha256(name.encode()).hexdigest()[:8]
    folder = home / name.removeprefix("~").lstrip("/")
    folder.mkdir(parents=True)
    borrow_environment(folder)
    before = sshd.outside(folder)
    given = name if name.startswith("~") else str(folder)
    with sshd.session(HOME=str(home)):
        done = user("ssh-check-data", "--cfg", "job", REMOTE_DIR=given)
        assert done.returncode == 0, done.stderr
        assert "dataset_path" in done.stdout
        shown = user("ssh-status", REMOTE_DIR=given).stdout
        assert shown.count("finished") == 1 and given in shown.replace("\n", "")
    assert (folder / "outputs/remote/jobs").is_dir() and (folder / "src/main.py").is_file()
    assert sshd.outside(folder) == before


def test_secrets_reach_only_the_process_that_needs_them(
    sshd: Server, user: Client, recorded_args: Path, tmp_path: Path
) -> None:
    user = user.copy(tmp_path / "mine")
    canary = {name: f"canary-{name}-{random.SystemRandom().randbytes(8).hex()}" for name in (
        "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "LAKEFS_SECRET_KEY", "MY_OWN", "OF_A_WORD",
    )}  # fmt: skip
    given = {name: canary[name] for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OF_A_WORD")}
    dotenv = "".join(f"export {name}='{canary[name]}'\n" for name in ("LAKEFS_SECRET_KEY", "MY_OWN"))
    (user.project / ".env").write_text(dotenv)
    typed = [f"hf_token={canary['HF_TOKEN']}", "x=${oc.env:OF_A_WORD}"]
    (recorded_args.parent / "wait").touch()
    seen, over = set[str](), threading.Event()
    watching = threading.Thread(target=watch, args=(canary, seen, over))
    watching.start()
    try:
        starting = user.start("ssh-train", "--detach", typed[1], **given)
        out, error = starting.communicate(timeout=60)
        assert starting.returncode == 0, error
        until(lambda: recorded_args.exists() and recorded_args.read_text())
    finally:
        over.set()
        watching.join()
        (recorded_args.parent / "wait").unlink()
    recorded = json.loads(recorded_args.read_text())
    assert (
        recorded["have"].items() >= {n: hashlib.sha256(v.encode()).hexdigest() for n, v in canary.items()}.items()
    )
    assert recorded["words"][3:] == [typed[1]]
    assert seen == set()
    canary["ASSAY_URL_PART_1"] = f"canary-{random.SystemRandom().randbytes(8).hex()}"
    signed = "data_source.url=https://host/rows.jsonl?sig="
    done = user("ssh-train", typed[0], signed + canary["ASSAY_URL_PART_1"], **given)  # secrets that are typed
    assert done.returncode == 0, done.stderr
    recorded = json.loads(recorded_args.read_text())
    assert recorded["words"][3:] == ["hf_token=${oc.env:HF_TOKEN}", signed + "${oc.env:ASSAY_URL_PART_1}"]
    assert recorded["have"]["ASSAY_URL_PART_1"] == hashlib.sha256(canary["ASSAY_URL_PART_1"].encode()).hexdigest()
    status = user("ssh-status", **given)
    printed = [out.decode(), error.decode(), done.stdout, done.stderr, status.stdout, status.stderr]
    assert [name for name, value in canary.items() if any(value in each for each in printed)] == []
    places = [recorded_args.parent, user.project, sshd.home, sshd.tmp, Path(user.environment["HOME"])]
    files = {path for place in places for path in place.rglob("*") if path.is_file() and path.name != ".env"}
    holding = [(n, path) for path in files for n, value in canary.items() if value.encode() in path.read_bytes()]
    assert holding == []
    assert not (recorded_args.parent / ".env").exists()


def watch(canary: dict[str, str], seen: set[str], over: threading.Event) -> None:
    """Record the variables whose value is on the command line of any process."""
    while not over.is_set():
        for process in filter(str.isdigit, os.listdir("/proc")):
            try:
                line = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            seen |= {name for name, value in canary.items() if value in line}
