"""The version of the data that a manifest records is read again, whatever its source holds by now."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from src import runs
from src.data.sources import RECORDED, SOURCES, fetch_parts, fetch_recorded
from src.errors import DataError, RunError
from src.schema import Dataset, DataSource, TrainConfig, TrainDataArgs
from src.train.resume import pin_data, refuse_older_data
from src.utils import environment
from src.utils.files import write_json
from tests.data.bucket import BUCKET
from tests.data.hub_server import hub_serving
from tests.data.lake import connected, use
from tests.data.lakefs_server import LakeFS
from tests.data.test_from_url import Site, site_serving
from tests.fixtures import chat
from tests.fork_server import KillPoint
from tests.train.resume_cases import FIT, Stage

pytest_plugins = [
    "tests.fixtures", "tests.fork_server", "tests.train.resume_cases", "tests.data.bucket",
]  # fmt: skip

Change = Callable[[bytes], None]  # makes the source hold one file with this content


@pytest.fixture
def site() -> Iterator[Site]:
    with site_serving() as site:
        yield site


@pytest.fixture(params=["url", "hub", "s3", "lakefs"])
def changing(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[DataSource, Change, bool]]:
    """A source, what changes it, and whether it keeps its old versions."""
    kind = request.param
    if kind == "url":
        with site_serving() as site:
            site.etag = None
            yield _url(site), lambda content: setattr(site, "content", content), False
    if kind == "hub":
        with hub_serving() as hub:
            source = DataSource("hub", endpoint=hub.endpoint, repo=hub.repo)
            yield source, lambda content: _nothing(hub.commit(**{"a.jsonl": content})), True
    if kind == "s3":
        client, moto = request.getfixturevalue("client"), request.getfixturevalue("moto")
        client.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
        source = DataSource("s3", endpoint=moto, bucket=BUCKET, path="x")
        put = partial(client.put_object, Bucket=BUCKET, Key="x/a.jsonl")
        yield source, lambda content: _nothing(put(Body=content)), True
    if kind == "lakefs":
        with LakeFS("local") as server:
            lake = use(connected(server.url, server.access, server.secret, server), monkeypatch)
            yield lake.source(path="x"), lambda content: _nothing(lake.commit({"x/a.jsonl": content})), True


def _nothing(_: object) -> None:
    pass


def _url(site: Site) -> DataSource:
    return DataSource("url", url=f"{site.address}/a.jsonl", allow_private=True)


def _content(args: TrainDataArgs, cache: Path, *versions: Any) -> bytes:
    (part,) = fetch_parts(args, cache, versions)
    (file,) = [file for file in part.files if file.name == "a.jsonl"]
    return file.read_bytes()


def test_a_recorded_version_is_read_after_its_source_has_changed(
    changing: tuple[DataSource, Change, bool], tmp_path: Path
) -> None:
    source, change, keeps_versions = changing
    args, cache = TrainDataArgs(datasets=[Dataset(data_source=source)]), tmp_path / "cache"
    change(b'{"n": 1}\n')
    old = {**fetch_parts(args, cache)[0].version, "weight": 1.0}
    change(b'{"n": 2}\n')
    assert _content(args, cache) == b'{"n": 2}\n'
    (part,) = fetch_parts(args, cache, [old])
    assert part.version | {"weight": 1.0} == old
    assert _content(args, cache, old) == b'{"n": 1}\n'
    if keeps_versions:  # without the cache too
        assert _content(args, tmp_path / "other", old) == b'{"n": 1}\n'
    else:
        with pytest.raises(DataError, match="SHA-256"):
            fetch_recorded(args, tmp_path / "other", [old])
    cfg = TrainConfig(datasets=args.datasets, cache_dir=str(cache))
    refuse_older_data(cfg, [part.version | {"weight": part.weight} for part in fetch_parts(args, cache)])
    with pytest.raises(RunError, match="holds a newer version; resume=never"):
        refuse_older_data(cfg, [old])
    assert _content(args, cache, {"type": "local"}) == b'{"n": 2}\n'  # of another kind of source: pins nothing


def test_a_stopped_run_resumes_with_the_file_that_it_was_started_with(stage: Stage, site: Site) -> None:
    """The url holds another file by now. Without the old one, the run is refused by name and else left alone."""

    def hold(*names: str) -> None:
        rows = [chat(f"Top of {name} rate?", f"TOP({name})") for name in names]
        site.content, site.etag = "".join(json.dumps(row) + "\n" for row in rows).encode(), f'"{names}"'

    hold("kiln", "mill", "saw", "lathe")
    words = [
        "data_source.type=url", f"data_source.url={site.address}/a.jsonl", "data_source.allow_private=true",
        "max_steps=2", "save_steps=1",
    ]  # fmt: skip
    killed = stage(*words, moment=KillPoint(f"{FIT}:AssayTrainer.compute_loss", nth=3))
    assert killed[0] == -signal.SIGKILL, killed[1]
    (run,) = stage.world.runs
    digest = run.manifest["data"]["sources"][0]["sha256"]
    hold("furnace", "press")
    cache, kept = stage.world.output / "cache", stage.world.output / "kept"
    cache.rename(kept)
    code, said = stage(*words, "resume=latest")
    assert (code, "was started with data that cannot be fetched again" in said) == (2, True), said
    code, said = stage(*words, moment=KillPoint(f"{FIT}:fit"))  # resume=auto: a new run, with the new file
    assert f"not resuming run {run.id}: it was started with data" in said
    assert len(stage.world.runs) == 2
    shutil.rmtree(stage.world.newest.path)
    shutil.copytree(kept, cache, dirs_exist_ok=True)
    requests = len(site.requests)
    code, said = stage(*words)
    assert code == 0, said
    assert f"run {run.id} resumes with url {site.address}/a.jsonl at sha256 {digest[:12]}" in said
    assert (len(stage.world.runs), run.status, len(site.requests)) == (1, runs.FINISHED, requests)
    assert run.manifest["data"]["sources"][0]["sha256"] == digest


def test_another_query_is_another_address(site: Site, tmp_path: Path) -> None:
    """The run that another query was typed for is not resumed by itself: only the content tells them apart."""
    source = replace(_url(site), url=f"{site.address}/a.jsonl?id=1")
    cfg = TrainConfig(data_source=source, cache_dir=str(tmp_path / "cache"), output_dir=str(tmp_path))
    site.content, site.etag = b'{"n": 1}\n', None
    (part,) = fetch_parts(cfg, tmp_path / "cache")
    run = runs.Run(tmp_path / "runs" / "1")
    run.path.mkdir(parents=True)
    facts = {"sources": [{**part.version, "weight": part.weight}]}
    write_json(run.path / "manifest.json", {"run": "1", "data": facts, "packages": environment.versions()})
    assert pin_data([run], cfg)[0] == [run]
    site.content = b'{"n": 2}\n'
    assert pin_data([run], cfg)[0] == [run]  # of the address itself, the recorded version is in the cache
    other = replace(cfg, data_source=replace(source, url=f"{site.address}/a.jsonl?id=2"))
    assert pin_data([run], other) == ([], [])
    assert pin_data([run], replace(other, resume="1"))[0] == [run]


def test_every_remote_source_reads_recorded_versions() -> None:
    assert RECORDED.keys() == SOURCES.keys() - {"local"}
