"""The mirror of a run in a bucket: complete, bounded, harmless to the run, and enough to resume elsewhere."""

from __future__ import annotations

import json
import logging
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from src import runs
from src.runs import Run
from src.schema import TrainConfig
from src.train import checkpoint
from src.train.checkpoint import COMPLETE
from src.train.mirror import CheckpointMirror, MirrorStore, list_mirrored_runs, mirror_checkpoints, open_store
from src.utils.logs import log
from tests.conftest import HEAVY
from tests.data.bucket import BUCKET
from tests.fixtures import tree
from tests.fork_server import KillPoint
from tests.train.resume_cases import Stage, end_of

pytest_plugins = ["tests.fixtures", "tests.fork_server", "tests.train.resume_cases", "tests.data.bucket"]

ADDRESS = f"s3://{BUCKET}/copies/of"
PREFIX = "copies/of/"


def keys(client: Any) -> list[str]:
    return [each["Key"] for each in client.list_objects_v2(Bucket=BUCKET).get("Contents", [])]


# --- from one machine to another -------------------------------------------------------------------------


@pytest.fixture
def lost(stage: Stage, client: Any, moto: str) -> tuple[Stage, Run, tuple[str, ...]]:
    """A mirrored training on a machine that died after two checkpoints were copied: its stage, run and words."""
    words = (f"checkpoint_mirror={ADDRESS}", f"checkpoint_mirror_endpoint={moto}")
    code, said = stage(
        *words, moment=KillPoint("src.train.mirror:CheckpointMirror._upload_checkpoint", nth=2, after=True)
    )
    assert code == -signal.SIGKILL, said
    run = stage.world.newest
    manifest = {"Bucket": BUCKET, "Key": f"{PREFIX}{run.id}/manifest.json"}
    there = json.loads(client.get_object(**manifest)["Body"].read())
    there["process"]["host"] = "another"
    client.put_object(**manifest, Body=json.dumps(there).encode())
    return stage, run, words


@pytest.fixture
def fresh(stage: Stage, tmp_path: Path) -> Stage:
    return Stage(stage.world.elsewhere(tmp_path / "fresh"), stage.fork_server)


@pytest.mark.parametrize("wanted", ["auto", "latest", "RUN", "ID"])
def test_a_fresh_machine_resumes_to_the_same_bytes(lost: Any, fresh: Stage, undisturbed: Any, wanted: str) -> None:
    _, run, words = lost
    there = f"{fresh.world.output}/runs/{run.id}"
    code, said = fresh(*words, f"resume={ {'RUN': there, 'ID': run.id[:-1]}.get(wanted, wanted) }")
    assert code == 0, said
    assert f"run {run.id} was downloaded from the mirror" in said
    assert re.search(r"resuming after step (6|9|12), from ", said)
    (ours,) = fresh.world.runs
    assert str(ours.path) == there
    assert end_of(ours) == undisturbed["plain"]


def test_a_damaged_copy_is_passed_over(lost: Any, fresh: Stage, client: Any, undisturbed: Any) -> None:
    _, run, words = lost
    markers = sorted((k for k in keys(client) if k.endswith(COMPLETE)), key=lambda k: int(k.split("-")[-1][:-9]))
    assert len(markers) == 2
    newest = markers[1].removesuffix(COMPLETE)
    assert f"{PREFIX}{run.id}/checkpoints/checkpoint-" in newest
    key = f"{newest}optimizer.pt"
    body = bytearray(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    body[len(body) // 2] ^= 1
    client.put_object(Bucket=BUCKET, Key=key, Body=bytes(body))
    code, said = fresh(*words)
    assert code == 0, said
    assert f"/{newest.split('/')[-2]} is damaged and is skipped" in said
    assert f"resuming after step {markers[0].split('-')[-1].removesuffix('/' + COMPLETE)}," in said
    assert end_of(fresh.world.newest) == undisturbed["plain"]


def test_a_mirror_without_complete_checkpoint_is_not_resumed(lost: Any, fresh: Stage, client: Any) -> None:
    _, run, words = lost
    for key in keys(client):
        if key.endswith(COMPLETE):
            client.delete_object(Bucket=BUCKET, Key=key)
    code, said = fresh(*words, "resume=latest")
    assert code == 2
    assert f"run {run.id} cannot be downloaded: run {run.id} has no complete checkpoint in the mirror" in said
    assert list((fresh.world.output).rglob("*.tmp")) == []
    assert fresh.world.runs == []


def test_a_mirrored_run_with_other_settings_is_not_resumed(lost: Any, fresh: Stage) -> None:
    _, run, words = lost
    said = fresh(*words, "lr=0.5", moment=KillPoint("src.train.fit:fit"))[1]
    assert f"not resuming run {run.id}: it had other settings: lr=0.003\n" in said
    assert [r.id for r in fresh.world.runs] != [run.id]


def test_the_copy_is_what_the_run_keeps_and_says_how_it_ended(
    stage: Stage, fresh: Stage, client: Any, moto: str, undisturbed: Any
) -> None:
    words = (f"checkpoint_mirror={ADDRESS}", f"checkpoint_mirror_endpoint={moto}")
    run = stage.train(*words)
    assert end_of(run) == undisturbed["plain"]
    kept = {f"{PREFIX}{run.id}/{name}" for name in tree(run.path) if name.startswith("checkpoints/")}
    there = set(keys(client))
    assert {key for key in there if "/checkpoints/" in key} == kept
    files = {"config_used.yaml", "manifest.json", "data_report.json", "logs/samples.jsonl"}
    assert {f"{PREFIX}{run.id}/{name}" for name in files} <= there
    body = client.get_object(Bucket=BUCKET, Key=f"{PREFIX}{run.id}/manifest.json")["Body"].read()
    assert json.loads(body)["status"] == runs.FINISHED
    assert b"secret-of-the-test" not in b"".join(tree(stage.world.output).values())
    code, said = fresh(*words, moment=KillPoint("src.train.fit:fit"))
    assert code == -signal.SIGKILL, said
    assert "fetched" not in said
    assert fresh.world.newest.id != run.id


def test_what_a_signal_stopped_is_copied_before_the_end(stage: Stage, client: Any, moto: str) -> None:
    moment = KillPoint("src.train.fit:AssayTrainer.compute_loss", nth=9, send=signal.SIGTERM)
    code, _ = stage(f"checkpoint_mirror={ADDRESS}", f"checkpoint_mirror_endpoint={moto}", moment=moment)
    assert code == 75
    run = stage.world.newest
    assert f"{PREFIX}{run.id}/checkpoints/checkpoint-5/{COMPLETE}" in keys(client)
    body = client.get_object(Bucket=BUCKET, Key=f"{PREFIX}{run.id}/manifest.json")["Body"].read()
    assert json.loads(body)["status"] == runs.INTERRUPTED


# --- copying ---------------------------------------------------------------------------------------------


@pytest.fixture
def store(client: Any, moto: str) -> MirrorStore:
    found = open_store(TrainConfig(checkpoint_mirror=ADDRESS, checkpoint_mirror_endpoint=moto))
    assert found is not None
    return found


@pytest.fixture
def run(tmp_path: Path) -> Run:
    found = runs.create(tmp_path, "train", "lr: 1\n", {})
    (found.path / "data_report.json").write_text("{}")
    (found.logs / "samples.jsonl").write_text("")
    found.unlock()
    return found


def save(run: Run, step: int, content: str = "x") -> None:
    with checkpoint.atomic_checkpoint(run.checkpoints / f"checkpoint-{step}") as folder:
        (folder / "weights").write_text(content)


def test_a_copy_that_fails_is_a_warning_and_made_with_the_next_checkpoint(
    store: MirrorStore, run: Run, client: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    client.delete_bucket(Bucket=BUCKET)
    save(run, 1)
    with caplog.at_level(logging.WARNING), mirror_checkpoints(store, run) as mirror:
        assert mirror is not None
        mirror.copy_now()
    assert f"not mirrored; the next checkpoint tries again: there is no S3 bucket {BUCKET}" in caplog.text
    client.create_bucket(Bucket=BUCKET)
    save(run, 2)
    with mirror_checkpoints(store, run) as mirror:
        assert mirror is not None
        mirror.copy_now()
    markers = [k for k in keys(client) if k.endswith(COMPLETE)]
    assert markers == [f"{PREFIX}{run.id}/checkpoints/checkpoint-{n}/{COMPLETE}" for n in (1, 2)]
    assert list(run.path.rglob("*.tmp")) == []


class Held(CheckpointMirror):
    """Whose first copy waits."""

    def __init__(self, store: MirrorStore, run: Run) -> None:
        self.begun, self.gate, self.copied = threading.Event(), threading.Event(), list[list[str]]()
        super().__init__(store, run)

    def _upload(self, staged: Path) -> None:
        self.copied.append(sorted(p.name for p in (staged / "checkpoints").iterdir()))
        self.begun.set()
        assert self.gate.wait(60)
        super()._upload(staged)


def test_one_copy_waits_at_most_and_the_newest_is_it(store: MirrorStore, run: Run, client: Any) -> None:
    mirror = Held(store, run)
    save(run, 1)
    mirror.copy_now()
    assert mirror.begun.wait(60)
    for step in (2, 3, 4):  # training continues, and removes old checkpoints
        save(run, step)
        checkpoint.rotate(run.checkpoints, 1, None)
        mirror.copy_now()
    assert len(list(run.path.glob(".mirror-*.tmp"))) == 2
    mirror.gate.set()
    mirror.close()
    assert mirror.copied == [["checkpoint-1"], ["checkpoint-4"]]
    assert {key.split("/")[4] for key in keys(client) if "/checkpoints/" in key} == {"checkpoint-4"}


def test_the_marker_comes_last_and_goes_first(store: MirrorStore, run: Run, client: Any) -> None:
    """Of a checkpoint that is made anew, with other bytes, no copy has the marker of the one before."""
    calls: list[str] = []

    class Recording(MirrorStore):
        def put(self, file: Path, key: str) -> None:
            calls.append(f"put {key.rpartition('/')[2]}")
            super().put(file, key)

        def remove(self, key: str) -> None:
            calls.append(f"remove {key.rpartition('/')[2]}")
            super().remove(key)

    for content in ("x", "y"):
        save(run, 1, content)
        calls.clear()
        with mirror_checkpoints(Recording(*store), run) as mirror:
            assert mirror is not None
            mirror.copy_now()
        order = [call for call in calls if call.split()[1] in {"weights", COMPLETE}]
        assert order == [f"remove {COMPLETE}", "put weights", f"put {COMPLETE}"]
    calls.clear()
    with mirror_checkpoints(Recording(*store), run) as mirror:  # it is uploaded already
        assert mirror is not None
        mirror.copy_now()
    assert [call for call in calls if call.split()[1] in {"weights", COMPLETE}] == []
    save(run, 2)
    checkpoint.rotate(run.checkpoints, 1, None)
    with mirror_checkpoints(Recording(*store), run) as mirror:
        assert mirror is not None
        mirror.copy_now()
    assert calls[-4:-1] == [f"remove {COMPLETE}", "remove weights", "put manifest.json"] or calls[-3:-1] == [
        f"remove {COMPLETE}",
        "remove weights",
    ]
    assert [remote.id for remote in list_mirrored_runs(store)] == [run.id]


# --- what cannot be one ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("bucket/prefix", "checkpoint_mirror is not an address like s3://bucket/prefix; correct it"),
        ("s3:///prefix", "checkpoint_mirror is not an address like s3://bucket/prefix; correct it"),
        ("s3://key:secret@bucket/x", "checkpoint_mirror is not an address like s3://bucket/prefix; correct it"),
        (
            "s3://nowhere/x",
            "there is no S3 bucket nowhere; correct checkpoint_mirror or checkpoint_mirror_endpoint",
        ),
    ],
)
def test_a_mirror_that_cannot_be_is_refused_before_anything_heavy(
    assay: Callable[..., Any], client: Any, moto: str, address: str, said: str
) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "key-of-the-test", "AWS_SECRET_ACCESS_KEY": "secret-of-the-test"}
    words = (f"checkpoint_mirror={address}", f"checkpoint_mirror_endpoint={moto}")
    done = assay("train", *words, forbidden=HEAVY, **keys)
    assert (done.returncode, done.stderr.strip()) == (2, said)
    assert assay.left() == []


def test_a_mirror_without_credentials_or_server_is_refused(assay: Callable[..., Any], moto: str) -> None:
    quiet = {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(assay.cwd), "forbidden": HEAVY}
    done = assay("train", f"checkpoint_mirror={ADDRESS}", f"checkpoint_mirror_endpoint={moto}", **quiet)
    assert done.returncode == 2
    assert f"there are no credentials for the S3 bucket {BUCKET} (NoCredentialsError)" in done.stderr
    done = assay("train", f"checkpoint_mirror={ADDRESS}", "checkpoint_mirror_endpoint=ftp://x", **quiet)
    assert (done.returncode, done.stderr) == (
        2,
        "checkpoint_mirror_endpoint 'ftp://x' is not an http(s) address; correct it\n",
    )
