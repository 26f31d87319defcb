"""Which model it is: found, refused or fingerprinted before anything heavy is loaded."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from src.errors import ModelError
from src.model.source import adapter_base, content_hash, locate
from src.schema import DEMO_MODEL
from tests.fixtures import ROOT, World

pytest_plugins = ["tests.fixtures"]


@pytest.fixture
def folder(tmp_path: Path, tiny: Path) -> Path:
    """A copy of the tiny model to be changed."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_a_local_model_is_known_by_its_content(folder: Path) -> None:
    source = locate(str(folder))
    assert (source.name, source.folder, source.location) == (str(folder), folder, str(folder))
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", source.revision or "")
    moved = Path(shutil.copytree(folder, folder.with_name("elsewhere")))
    assert locate(str(moved)).revision == source.revision


def test_one_byte_of_the_weights_makes_it_another_model(folder: Path) -> None:
    before = content_hash(folder)
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert content_hash(folder) != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_each_file_that_changes_what_the_model_does_makes_it_another_model(folder: Path, name: str) -> None:
    before = content_hash(folder)
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    assert content_hash(folder) != before


def test_weights_in_another_file_are_another_model(folder: Path) -> None:
    before = content_hash(folder)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert content_hash(folder) != before


def test_a_readme_beside_the_weights_changes_nothing(folder: Path) -> None:
    before = content_hash(folder)
    (folder / "README.md").write_text("# A model\n")
    (folder / "pytorch_model.bin").write_bytes(b"never loaded")
    assert content_hash(folder) == before


@pytest.mark.parametrize("name", ["models/nowhere", "./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere-at-all"])
def test_a_missing_folder_is_rejected(name: str) -> None:
    with pytest.raises(ModelError, match=f"model_name {name} does not exist"):
        locate(name)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        (DEMO_MODEL, "make model builds it"),
        ("models/tiny-random-llama", "make tiny-model builds it"),
        ("models/tiny-random-bert", "make train model_name=models/tiny-random-bert builds it"),
    ],
)
def test_a_missing_demo_model_is_refused_with_the_command_that_builds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, remedy: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="or a Hub id, such as model_name=HuggingFaceTB/SmolLM2-135M-Instruct"):
        locate(name)  # where an installed package runs, there is no make
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    with pytest.raises(ModelError, match=remedy):
        locate(name)
    assert f"{remedy.split()[1]}:" in (ROOT / "Makefile").read_text()


def test_a_folder_without_config_json_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        locate(str(folder))


def test_an_adapter_as_the_base_model_is_refused_with_what_to_do(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"is an adapter without its base model; .*export=merged"):
        locate(str(folder))


def test_pickled_weights_are_refused_and_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no safetensors weights \(it has: pytorch_model\.bin\)"):
        locate(str(folder))


def test_a_name_that_is_not_a_folder_is_a_hub_id_with_the_given_revision() -> None:
    source = locate("nobody/nothing", "v1")
    assert (source.folder, source.location, source.revision) == (None, "nobody/nothing", "v1")
    assert locate("gpt2").folder is None


def test_a_hub_id_without_a_network_is_one_sentence(world: World) -> None:
    child = world.start("train", "model_name=nobody/nothing", HF_HUB_OFFLINE="1")
    said = child.communicate(timeout=300)[0]
    assert child.returncode == 2
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith(
        "nobody/nothing cannot be loaded (it is not a local folder, and the Hub did not provide it): "
        "HF_HUB_OFFLINE is set, which forbids the network; unset HF_HUB_OFFLINE"
    )
    assert not (world.output / "runs").exists()


def test_an_adapter_names_its_base_and_full_weights_have_none(folder: Path, tmp_path: Path) -> None:
    settings = {"base_model_name_or_path": "models/x", "revision": "sha256:1"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert adapter_base(tmp_path) == ("models/x", "sha256:1")
    assert adapter_base(folder) is None
    with pytest.raises(ModelError, match="is not a folder"):
        adapter_base(tmp_path / "nowhere")
    for damaged in ("{", "[]", "null", "{}", '{"revision": "x"}', '{"base_model_name_or_path": ["models/x"]}'):
        (tmp_path / "adapter_config.json").write_text(damaged)
        with pytest.raises(ModelError, match=r"adapter_config\.json"):
            adapter_base(tmp_path)
