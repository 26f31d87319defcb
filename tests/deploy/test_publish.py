"""Publishing to a local folder: the complete model with its card and hashes, or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from src import runs
from src.deploy.push import publication_lock
from tests.deploy.cards import program
from tests.fixtures import World, tree

pytest_plugins = ["tests.fixtures"]

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def published(copied: World) -> Path:
    assert copied.call("publish") == 0
    return copied.artifacts / "models" / "tiny-lora" / copied.newest.id


def manifest(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())


def test_the_complete_model_is_copied_with_its_records(copied: World, published: Path) -> None:
    run = copied.newest
    model, copy = tree(run.model), tree(published)
    del model["README.md"]  # peft's; the card replaces it
    assert {k: v for k, v in copy.items() if k in model} == model
    records = (
        "config_used.yaml", "comparison.json", "metrics.json", "data_report.json", "aim_profile.json",
        "training_info.json",
    )  # fmt: skip
    assert all(copy[name] == (run.path / name).read_bytes() for name in records)
    assert set(copy) == {*model, *records, "README.md", "manifest.json"}
    assert len({p.stat().st_mode for p in published.iterdir()}) == 1  # a server under another user reads them all


def test_a_changed_record_of_the_run_is_published(copied: World) -> None:
    (copied.newest.path / "aim_profile.json").write_text("{}")
    assert copied.call("publish") == 0
    assert (copied.artifacts / "models" / "tiny-lora" / "latest" / "aim_profile.json").read_text() == "{}"


def test_an_adapter_loads_from_any_directory(copied: World, tmp_path: Path) -> None:
    run = copied.newest
    settings = run.model / "adapter_config.json"
    relative = os.path.relpath(copied.model)
    settings.write_text(settings.read_text().replace(str(copied.model), relative))
    run.update(base_model=run.manifest["base_model"] | {"name": relative})
    assert copied.call("publish", "force=true") == 0
    (folder,) = copied.artifacts.glob(f"models/*/{run.id}")
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named).is_absolute() and Path(named).samefile(copied.model)
    text = program((folder / "README.md").read_text()).replace('folder = "."', f'folder = "{folder}"')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        scope: dict[str, Any] = {}
        exec(compile(text, "README.md", "exec"), scope)
    assert isinstance(scope["answer"], str) and str(copied.model) not in text


def test_the_manifest_holds_the_hash_of_every_file(published: Path) -> None:
    copy = tree(published)
    del copy["manifest.json"]
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in copy.items()}
    assert manifest(published)["sha256"] == hashes


def test_the_manifest_is_that_of_the_run_without_private_keys(copied: World, published: Path) -> None:
    found, run = manifest(published), copied.newest.manifest
    private = {"process", "evaluation", "published"}
    assert {k: v for k, v in run.items() if k not in private}.items() <= found.items()
    assert not private & found.keys()
    assert found["publication"]["name"] == "tiny-lora"
    assert found["publication"]["promoted"] is True
    assert "rougeL on test rose from 0.000 to 1.000" in found["publication"]["verdict"]


def test_the_run_records_its_publication(copied: World, published: Path) -> None:
    (note,) = copied.newest.manifest["published"]
    assert (note["target"], note["where"], note["promoted"]) == ("local", str(published), True)
    assert note["files"] == len(tree(published))
    assert datetime.fromisoformat(note["at"]) >= datetime.fromisoformat(copied.newest.manifest["ended"])


def test_a_run_always_publishes_the_same_bytes(copied: World, published: Path) -> None:
    before = tree(published)
    assert copied.call("publish") == 0
    assert tree(published) == before
    assert len(copied.newest.manifest["published"]) == 1


def test_the_card_of_full_weights_needs_no_peft(world: World) -> None:
    world.train("method=full", "max_steps=1")
    for stage in ("eval", "eval-baseline"):
        assert world.call(stage, "splits=[test]") == 0
    assert world.call("publish", "--force", "gate.guards=[]") == 0
    card = (world.artifacts / "models" / "tiny-full" / "latest" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "transformers"


def test_latest_points_to_the_last_publication(copied: World, published: Path) -> None:
    latest = published.parent / "latest"
    assert latest.is_symlink()
    assert latest.resolve() == published.resolve()
    later = copied.newest.path.with_name("2099-01-01_00-00-00")
    shutil.copytree(copied.newest.path, later)
    assert copied.call("publish", str(later), "gate.min_delta=2", "--force") == 0
    assert latest.resolve().name == later.name
    assert published.is_dir()


def test_promoted_points_to_the_last_run_that_passed_the_gate(copied: World, published: Path) -> None:
    promoted = published.parent / "promoted"
    assert promoted.is_symlink() and promoted.resolve() == published.resolve()
    later = copied.newest.path.with_name("2099-01-01_00-00-00")
    shutil.copytree(copied.newest.path, later)
    assert copied.call("publish", str(later), "gate.min_delta=2", "--force") == 0
    assert promoted.resolve() == published.resolve()
    assert copied.call("publish", str(later)) == 0
    assert promoted.resolve().name == later.name


def test_a_promoted_run_is_not_replaced_by_a_forced_publication(
    copied: World, published: Path, capsys: Capture
) -> None:
    before = tree(published.parent)
    assert copied.call("publish", "gate.min_delta=2", "--force") == 2
    assert "which passed the gate; a forced publication would replace it; set publish_name" in (
        capsys.readouterr().err
    )
    assert tree(published.parent) == before


def test_a_forced_publication_is_not_promoted(copied: World) -> None:
    assert copied.call("publish", "gate.min_delta=2", "--force") == 0
    assert not (copied.artifacts / "models" / "tiny-lora" / "promoted").is_symlink()


def test_a_secret_in_the_model_is_not_copied(
    copied: World, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("MY_PASSWORD", "correct-horse-7")
    (copied.newest.model / "notes.txt").write_text("log in with correct-horse-7")
    (copied.newest.model / "id_rsa").write_text("-----BEGIN RSA " + "PRIVATE KEY-----")
    assert copied.call("publish") == 3
    assert "the model contains secrets: id_rsa contains a private key; notes.txt" in capsys.readouterr().err
    assert copied.call("publish", "--force") == 2  # force does not override this
    error = capsys.readouterr().err
    assert error.splitlines()[:2] == [
        "not published: id_rsa contains a private key",
        "not published: notes.txt contains the value of MY_PASSWORD",
    ]
    assert "correct-horse-7" not in error
    assert list((copied.artifacts / "models" / "tiny-lora").iterdir()) == []


def test_two_publications_do_not_run_at_once(copied: World, published: Path, capsys: Capture) -> None:
    before = tree(published.parent)
    with publication_lock(published.parent, leftovers="nothing"):
        assert copied.call("publish") == 2
    assert (
        f"another process is publishing in {published.parent}; wait until it has ended" in capsys.readouterr().err
    )
    assert tree(published.parent) == before


def test_a_form_that_cannot_be_written_leaves_nothing(copied: World) -> None:
    assert copied.call("publish", "export=gguf") == 2
    assert not (copied.artifacts / "models").exists()


def test_publishing_again_replaces_the_folder(copied: World, published: Path) -> None:
    (published / "left over").touch()
    before = set(tree(published))
    assert copied.call("publish") == 0
    assert set(tree(published)) == before - {"left over"}
    assert sorted(p.name for p in published.parent.iterdir()) == [published.name, "latest", "promoted"]


def test_name_and_run_can_be_chosen(copied: World) -> None:
    run = copied.newest
    shutil.copytree(run.path, run.path.with_name("2099-01-01_00-00-00"))
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
def test_an_unfinished_run_is_not_published(copied: World, status: str, capsys: Capture) -> None:
    run = copied.newest
    run.update(status=status)
    assert copied.call("publish", str(run.path)) == 2
    assert f"run {run.id} is {status}, not finished; publish a finished run" in capsys.readouterr().err
    assert copied.call("publish") == 2
    assert not (copied.artifacts / "models").exists()


def test_a_run_that_has_not_been_compared_is_not_published(world: World, capsys: Capture) -> None:
    run = world.train("max_steps=1")
    assert world.call("publish", "--force") == 2
    assert f"run {run.id} has not been compared with its base model" in capsys.readouterr().err
    assert not world.artifacts.exists()


def test_a_run_without_its_settings_is_not_published(copied: World, capsys: Capture) -> None:
    (copied.newest.path / "config_used.yaml").unlink()
    assert copied.call("publish", "--force") == 2
    assert "config_used.yaml does not exist; restore it, or start a new run" in capsys.readouterr().err
    assert not list(copied.artifacts.glob("models/*/*"))


def test_a_folder_that_is_no_run_is_not_published(world: World, tiny: Path, capsys: Capture) -> None:
    assert world.call("publish", str(tiny)) == 2
    assert f"{tiny} is not a run directory" in capsys.readouterr().err


def test_an_interrupted_copy_leaves_the_earlier_publication(
    copied: World, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    before = tree(published.parent)
    monkeypatch.setattr("src.deploy.model_card.render_card", broken)
    assert copied.call("publish") == 130
    assert tree(published.parent) == before
