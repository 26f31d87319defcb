"""Mirror of a run at s3://bucket/prefix/RUN: upload of checkpoints during training, download to resume.

A complete checkpoint is uploaded, its marker last: a checkpoint without a marker, or whose files differ from the
hashes in the marker, is ignored. boto3 finds the credentials, as for the data source `s3`.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from .. import runs
from ..data.download import check_endpoint, run_parallel, safe_path
from ..data.from_s3 import s3_client, s3_errors
from ..errors import ConfigError, RunError, UserError
from ..runs import Run
from ..schema import LoopArgs
from ..utils.files import atomic_dir, read_json, write_json
from ..utils.logs import log

FILES = ("config_used.yaml", "manifest.json", "data_report.json")
COMPLETE = "COMPLETE"


class MirrorStore(NamedTuple):
    """A prefix in a bucket; keys are relative to it."""

    client: Any
    bucket: str
    prefix: str
    endpoint: str | None

    @contextmanager
    def errors(self) -> Iterator[None]:
        with s3_errors(self.bucket, self.endpoint, "checkpoint_mirror", "checkpoint_mirror_endpoint"):
            yield

    def keys(self, under: str) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=self.prefix + under
        )
        return [each["Key"].removeprefix(self.prefix) for page in pages for each in page.get("Contents", [])]

    def folders(self) -> list[str]:
        """The distinct parts of the keys before the first slash."""
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=self.prefix, Delimiter="/"
        )
        found = [each["Prefix"] for page in pages for each in page.get("CommonPrefixes", [])]
        return [each.removeprefix(self.prefix).rstrip("/") for each in found]

    def put(self, file: Path, key: str) -> None:
        from boto3.exceptions import S3UploadFailedError

        try:
            self.client.upload_file(str(file), self.bucket, self.prefix + key)
        except S3UploadFailedError as error:  # its own message hides the server's response
            raise error.__context__ or error from None

    def get(self, key: str, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.client.download_file(self.bucket, self.prefix + key, str(file))

    def read(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=self.bucket, Key=self.prefix + key)["Body"].read())

    def remove(self, key: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=self.prefix + key)


def open_store(args: LoopArgs) -> MirrorStore | None:
    """The bucket and prefix of the mirror, None without one.

    Raises: ConfigError if the address is malformed; DataError if the bucket cannot be listed.
    """
    if args.checkpoint_mirror is None:
        return None
    parts = urlsplit(args.checkpoint_mirror)
    if parts.scheme != "s3" or not parts.netloc or "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError("checkpoint_mirror is not an address like s3://bucket/prefix", hint="correct it")
    endpoint = (
        args.checkpoint_mirror_endpoint
        or os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
    )
    endpoint = endpoint and check_endpoint(endpoint, "checkpoint_mirror_endpoint")
    prefix = parts.path.strip("/")
    with s3_errors(parts.netloc, endpoint, "checkpoint_mirror", "checkpoint_mirror_endpoint"):
        store = MirrorStore(s3_client(endpoint), parts.netloc, f"{prefix}/" if prefix else "", endpoint)
        store.client.list_objects_v2(Bucket=store.bucket, Prefix=store.prefix, MaxKeys=1)
    return store


class CheckpointMirror:
    """Uploads a run in a background thread. A failed upload is logged and does not stop the training.

    One upload runs at a time and one waits; a newer one replaces the waiting one.
    """

    def __init__(self, store: MirrorStore, run: Run) -> None:
        self.store, self.run = store, run
        self.uploaded: dict[str, bytes] = {}  # checkpoint -> its marker, if known to be complete
        self.waiting: Path | None = None
        self.closed = False
        self.change = threading.Condition()
        self.thread = threading.Thread(
            target=self._work, daemon=True
        )  # daemon: a second signal does not wait for it
        self.thread.start()

    def copy_now(self) -> None:
        """Schedule an upload of the current state of the run."""
        try:
            staged = self._stage()
        except OSError as error:
            log.warning("the checkpoint is not mirrored, but the next one will be: %s", error)
            return
        with self.change:
            dropped, self.waiting = self.waiting, staged
            self.change.notify()
        if dropped:
            shutil.rmtree(dropped)

    def close(self) -> None:
        """Wait for pending uploads, then upload the final manifest."""
        with self.change:
            self.closed = True
            self.change.notify()
        self.thread.join()
        with self._log_errors(), self.store.errors():
            self.store.put(self.run.path / "manifest.json", f"{self.run.id}/manifest.json")

    def _stage(self) -> Path:
        """A folder of links to the current files of the run, which training may change or remove."""
        folder = self.run.path / f".mirror-{uuid.uuid4().hex[:12]}.tmp"
        for name in FILES:
            _copy(self.run.path / name, folder / name)
        for file in self.run.logs.iterdir():
            if file.is_file() and not file.name.startswith("."):
                _copy(file, folder / "logs" / file.name)
        for marker in self.run.checkpoints.glob(f"checkpoint-*/{COMPLETE}"):
            for file in (p for p in marker.parent.rglob("*") if p.is_file()):
                _link(file, folder / file.relative_to(self.run.path))
        return folder

    def _work(self) -> None:
        while True:
            with self.change:
                self.change.wait_for(lambda: self.waiting is not None or self.closed)
                staged, self.waiting = self.waiting, None
            if staged is None:
                return
            with self._log_errors(), self.store.errors():
                self._upload(staged)
            shutil.rmtree(staged, ignore_errors=True)

    @contextmanager
    def _log_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # no error of the mirror may stop the training
            text = error.problems[0] if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            log.warning("not mirrored; the next checkpoint tries again: %s", text)

    def _upload(self, staged: Path) -> None:
        """Make the mirror equal to `staged`: the files of the run first, the marker of a checkpoint last."""
        plain = [p for p in staged.rglob("*") if p.is_file() and "checkpoints" not in p.relative_to(staged).parts]
        run_parallel(lambda p: self.store.put(p, self._key(staged, p)), plain)
        folders = {marker.parent.name: marker.parent for marker in staged.glob(f"checkpoints/*/{COMPLETE}")}
        mirrored = self._mirrored_checkpoints()
        for name, folder in sorted(folders.items(), key=lambda item: int(item[0].rpartition("-")[2])):
            marker = (folder / COMPLETE).read_bytes()
            if name not in mirrored or self._mirrored_marker(name) != marker:
                self._upload_checkpoint(staged, folder)
                self.uploaded[name] = marker
        for name in mirrored - folders.keys():
            self._remove(name)

    def _upload_checkpoint(self, staged: Path, folder: Path) -> None:
        marker = self._key(staged, folder / COMPLETE)
        self.uploaded.pop(folder.name, None)
        self.store.remove(marker)  # of an earlier attempt, whose files may differ
        files = [p for p in folder.rglob("*") if p.is_file() and p.name != COMPLETE]
        run_parallel(lambda p: self.store.put(p, self._key(staged, p)), files)
        self.store.put(folder / COMPLETE, marker)
        log.info("%s is mirrored", folder.name)

    def _key(self, staged: Path, file: Path) -> str:
        return f"{self.run.id}/{file.relative_to(staged).as_posix()}"

    def _mirrored_checkpoints(self) -> set[str]:
        return {key.split("/")[2] for key in self.store.keys(f"{self.run.id}/checkpoints/")}

    def _mirrored_marker(self, name: str) -> bytes | None:
        if name not in self.uploaded and (
            key := f"{self.run.id}/checkpoints/{name}/{COMPLETE}"
        ) in self.store.keys(key):
            self.uploaded[name] = self.store.read(key)
        return self.uploaded.get(name)

    def _remove(self, name: str) -> None:
        self.uploaded.pop(name, None)
        folder = f"{self.run.id}/checkpoints/{name}/"
        self.store.remove(folder + COMPLETE)
        for key in self.store.keys(folder):
            self.store.remove(key)


@contextmanager
def mirror_checkpoints(store: MirrorStore | None, run: Run) -> Iterator[CheckpointMirror | None]:
    """A mirror of the run, None without a store. Waits for the last upload, except after KeyboardInterrupt."""
    mirror = CheckpointMirror(store, run) if store else None
    try:
        yield mirror
    except Exception:  # not KeyboardInterrupt
        if mirror:
            mirror.close()
        raise
    if mirror:
        mirror.close()


def _copy(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)


def _link(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, target)
    except OSError:  # the file system has no hard links
        shutil.copyfile(file, target)


class MirroredRun(NamedTuple):
    """A run that exists only in the mirror."""

    store: MirrorStore
    id: str
    manifest: dict[str, Any]
    settings: str  # its config_used.yaml

    def fetch(self, root: Path, with_best: bool) -> Run:
        """Download the run with its newest complete checkpoint to `root`.

        Raises: RunError if it has none.
        """
        with self.store.errors(), atomic_dir(root / self.id) as folder:
            keys = self.store.keys(f"{self.id}/")
            plain = [key for key in keys if "/checkpoints/" not in key]
            run_parallel(lambda key: self.store.get(key, self._local_path(folder, key)), plain)
            write_json(folder / "manifest.json", self.manifest | {"status": runs.INTERRUPTED})
            self._fetch_checkpoint(folder, keys, with_best)
        log.info("run %s was downloaded from the mirror", self.id)
        return Run(root / self.id)

    def _fetch_checkpoint(self, folder: Path, keys: list[str], with_best: bool) -> None:
        from . import checkpoint  # torch

        names = {key.split("/")[2] for key in keys if "/checkpoints/" in key}
        for name in sorted(names, key=lambda name: checkpoint.step_number(Path(name)), reverse=True):
            found = self._download(folder, keys, name)
            if checkpoint.is_complete(found) and with_best:
                best = read_json(found / checkpoint.STATE)["best_global_step"]
                if best not in (None, checkpoint.step_number(found)):
                    self._download(folder, keys, f"checkpoint-{best}")
            if checkpoint.find_newest(folder / "checkpoints", with_best=with_best) == found:
                return
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        raise RunError(
            f"run {self.id} has no complete checkpoint in the mirror", hint="resume=never starts a new run"
        )

    def _download(self, folder: Path, keys: list[str], name: str) -> Path:
        files = [key for key in keys if key.startswith(f"{self.id}/checkpoints/{name}/")]
        run_parallel(lambda key: self.store.get(key, self._local_path(folder, key)), files)
        return folder / "checkpoints" / name

    def _local_path(self, folder: Path, key: str) -> Path:
        return safe_path(folder, key.removeprefix(f"{self.id}/"))


def list_mirrored_runs(store: MirrorStore) -> list[MirroredRun]:
    """The runs in the mirror, newest first."""
    found = []
    with store.errors():
        for name in store.folders():
            keys = store.keys(f"{name}/")
            if {f"{name}/manifest.json", f"{name}/config_used.yaml"} <= set(keys):
                manifest = json.loads(store.read(f"{name}/manifest.json"))
                settings = store.read(f"{name}/config_used.yaml").decode()
                found.append(MirroredRun(store, name, manifest, settings))
    return sorted(found, key=lambda run: str(run.manifest["started"]), reverse=True)
