"""Publishing: the whole model with its card and its hashes, or nothing."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from src import runs
from tests.fixtures import World, tree

pytest_plugins = ["tests.fixtures"]

Said = pytest.CaptureFixture[str]


@pytest.fixture
def published(copied: World) -> Path:
    assert copied.call("publish") == 0
    return copied.artifacts / "models" / "tiny-lora" / copied.newest.id


def manifest(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())


def test_the_whole_model_is_copied_with_its_papers(copied: World, published: Path) -> None:
    run = copied.newest
    model, there = tree(run.model), tree(published)
    del model["README.md"]  # peft's own; the card takes its place
    assert {k: v for k, v in there.items() if k in model} == model
    papers = (
        "config_used.yaml", "comparison.json", "metrics.json", "data_report.json", "aim_profile.json",
        "training_info.json",
    )  # fmt: skip
    assert all(there[name] == (run.path / name).read_bytes() for name in papers)
    assert set(there) == {*model, *papers, "README.md", "manifest.json"}


def test_the_manifest_holds_the_hash_of_every_file(published: Path) -> None:
    there = tree(published)
    del there["manifest.json"]
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in there.items()}
    assert manifest(published)["sha256"] == hashes


def test_the_manifest_is_that_of_the_run_with_the_publication(copied: World, published: Path) -> None:
    found = manifest(published)
    assert copied.newest.manifest.items() <= found.items()
    assert found["published"]["name"] == "tiny-lora"
    assert found["published"]["promoted"] is True
    assert "rougeL on test went from 0 to 1" in found["published"]["sentence"]
    assert datetime.fromisoformat(found["published"]["at"]) >= datetime.fromisoformat(found["ended"])


def test_the_card_of_full_weights_asks_for_no_peft(world: World) -> None:
    world.train("method=full", "max_steps=1")
    for stage in ("eval", "eval-baseline"):
        assert world.call(stage, "splits=[test]") == 0
    assert world.call("publish", "--force") == 0
    card = (world.artifacts / "models" / "tiny-full" / "latest" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "transformers"


def test_latest_points_to_what_was_published_last(copied: World, published: Path) -> None:
    latest = published.parent / "latest"
    assert latest.is_symlink()
    assert latest.resolve() == published.resolve()
    copied.train("max_steps=20")
    assert copied.call("eval") == 0
    assert copied.call("publish", "--force") == 0
    assert latest.resolve().name == copied.newest.id
    assert published.is_dir()


def test_publishing_again_replaces_the_folder_whole(copied: World, published: Path) -> None:
    (published / "left over").touch()
    before = set(tree(published))
    assert copied.call("publish") == 0
    assert set(tree(published)) == before - {"left over"}
    assert sorted(p.name for p in published.parent.iterdir()) == [published.name, "latest"]


def test_the_name_and_the_run_are_those_asked_for(copied: World) -> None:
    run = copied.newest
    copied.train("max_steps=1")
    assert copied.call("publish", str(run.path), "publish_name=ingot") == 0
    folder = copied.artifacts / "models" / "ingot" / "latest"
    assert folder.resolve().name == run.id
    assert "\n# ingot\n" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", ["..", "../../escaped", "{absolute}"])
def test_a_name_that_leads_elsewhere_is_refused(copied: World, tmp_path: Path, name: str) -> None:
    before = tree(tmp_path)
    assert copied.call("publish", f"publish_name={name.format(absolute=tmp_path / 'escaped')}") == 2
    assert tree(tmp_path) == before


@pytest.mark.parametrize("status", [runs.FAILED, runs.INTERRUPTED, runs.RUNNING])
def test_an_unfinished_run_is_not_published(copied: World, status: str, capsys: Said) -> None:
    run = copied.newest
    run.update(status=status)
    assert copied.call("publish", str(run.path)) == 2
    assert f"run {run.id} is {status}, not finished; publish a finished run" in capsys.readouterr().err
    assert copied.call("publish") == 2
    assert not (copied.artifacts / "models").exists()


def test_a_run_that_has_not_been_compared_is_not_published(world: World, capsys: Said) -> None:
    run = world.train("max_steps=1")
    assert world.call("publish", "--force") == 2
    assert f"run {run.id} has not been compared with its base model" in capsys.readouterr().err
    assert not world.artifacts.exists()


def test_a_folder_that_is_no_run_is_not_published(world: World, tiny: Path, capsys: Said) -> None:
    assert world.call("publish", str(tiny)) == 2
    assert f"{tiny} is not a run directory" in capsys.readouterr().err


def test_an_interrupted_copy_leaves_what_was_published_before(
    copied: World, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    before = tree(published.parent)
    monkeypatch.setattr("src.deploy.describe.model_card", broken)
    assert copied.call("publish") == 130
    assert tree(published.parent) == before


def test_publish_hf_passes_the_gate_and_says_that_it_is_not_available(copied: World, capsys: Said) -> None:
    before = tree(copied.artifacts)
    assert copied.call("publish-hf", "--repo", "someone/something") == 2
    captured = capsys.readouterr()
    assert "promoted: rougeL on test went from 0 to 1" in captured.out
    assert "not available in this version; the gate was passed, nothing was sent" in captured.err
    assert tree(copied.artifacts) == before
