"""SIGKILL between any two steps of a publication: no partial model, and the same command completes it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.direct import REPO, locally, to_hub
from tests.deploy.hub_server import DROP, ModelHub, User, model_hub
from tests.fixtures import World, tree
from tests.fork_server import ForkServer, KillPoint

pytest_plugins = ["tests.fixtures", "tests.fork_server"]

TOKEN = "hf_token-of-the-tests"
NO_RELOAD = "gate.verify_examples=0"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    with model_hub() as server:
        server.users = {TOKEN: User("me")}
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


# On the Hub

# (step, number of its requests that succeed first, whether the request that kills the process takes effect)
KILLS = [
    ("whoami", 0, False),
    ("create", 0, False),
    ("create", 0, True),
    ("validate", 0, False),
    ("preupload", 0, True),
    ("put", 0, False),
    ("put", 0, True),
    ("verify", 0, True),
    ("commit", 0, False),
    ("commit", 0, True),
    ("tree", 1, False),  # the verification
    ("tag", 0, False),
    ("tag", 0, True),
    ("refs", 1, True),  # the last check before the record
]


@pytest.mark.parametrize(("step", "skip", "after"), KILLS)
def test_a_killed_publication_is_completed_by_the_same_command(
    copied: World, hub: ModelHub, fork_server: ForkServer, step: str, skip: int, after: bool
) -> None:
    words = ["publish-hf", *copied.settings("publish-hf"), "--repo", REPO, NO_RELOAD]
    pids: list[int] = []
    kind = "" if after else DROP
    hub.fault(step, kind, call=lambda: os.kill(pids[0], signal.SIGKILL), skip=skip, after=after)
    variables = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN}
    pids.append(fork_server.start(*words, **variables))
    assert fork_server.end()[0] == -signal.SIGKILL

    run = copied.newest
    assert "published" not in run.manifest
    assert to_hub(copied) == 0
    repo = hub.repos[REPO]
    assert len(repo.published) == 1 and repo.tags == {run.id: repo.head}
    assert [note["commit"] for note in run.manifest["published"]] == [repo.head]
    assert hub.steps().count("put") == (2 if (step, after) == ("put", False) else 1)
    assert not list(run.path.glob(".publish*"))


def test_a_publication_killed_before_its_record_is_recorded_later(
    copied: World, hub: ModelHub, fork_server: ForkServer
) -> None:
    words = ["publish-hf", *copied.settings("publish-hf"), "--repo", REPO, NO_RELOAD]
    moment = KillPoint("src.deploy.push:record")
    code, _ = fork_server(*words, kill_points=(moment,), HF_ENDPOINT=hub.endpoint, HF_TOKEN=TOKEN)
    assert code == -signal.SIGKILL
    assert hub.repos[REPO].tags.keys() == {copied.newest.id}
    hub.requests.clear()
    assert to_hub(copied) == 0
    assert set(hub.steps()) == {"whoami", "info", "refs", "tree"}
    assert len(copied.newest.manifest["published"]) == 1


# Locally

FIRST = [
    KillPoint("src.deploy.model_card:render_card"),  # the model is copied, its card is missing
    KillPoint("src.deploy.push:assemble", after=True),
    KillPoint("src.utils.files:replace_dir", after=True),
    KillPoint("src.deploy.push:switch_link", after=True),
    KillPoint("src.deploy.push:switch_link", nth=2, after=True),
    KillPoint("src.deploy.push:record", after=True),
]
AGAIN = [KillPoint("src.deploy.model_card:render_card"), KillPoint("src.utils.files:replace_dir", after=True)]
# The two folders are exchanged, and the old one is not deleted yet.
AGAIN += [KillPoint("src.utils.files:_exchange", after=True)]


def state(models: Path) -> tuple[dict[str, str], dict[str, dict[str, bytes]]]:
    """The targets of the links, and the files of each published model."""
    links = {p.name: os.readlink(p) for p in models.iterdir() if p.is_symlink()}
    folders = [p for p in models.iterdir() if p.is_dir() and not p.is_symlink() and not p.name.startswith(".")]
    return links, {p.name: tree(p) for p in folders}


@pytest.mark.parametrize(
    ("moment", "again"),
    [*((moment, False) for moment in FIRST), *((moment, True) for moment in AGAIN)],
    ids=lambda value: value.function if isinstance(value, KillPoint) else ("again" if value else "first"),
)
def test_a_killed_copy_leaves_no_partial_model(
    copied: World, fork_server: ForkServer, moment: KillPoint, again: bool
) -> None:
    """Every link points to a complete model at any time, and the same command completes the publication."""
    run, models = copied.newest, copied.artifacts / "models" / "tiny-lora"
    if again:
        assert locally(copied) == 0
        (models / run.id / "left over").touch()
    words = ["publish", *copied.settings("publish"), NO_RELOAD]
    assert fork_server(*words, kill_points=(moment,))[0] == -signal.SIGKILL
    links, folders = state(models)
    assert set(links.values()) <= folders.keys()
    complete = {*tree(run.model), "README.md", "manifest.json", "comparison.json"}
    assert all(files.keys() >= complete for files in folders.values())

    assert locally(copied) == 0
    links, folders = state(models)
    assert links == {"latest": run.id, "promoted": run.id}
    assert set(folders) == {run.id} and "left over" not in folders[run.id]
    assert sorted(p.name for p in models.iterdir()) == sorted([run.id, "latest", "promoted"])
    assert len(run.manifest["published"]) == 1
