"""A damaged base model is one sentence, from its headers, before any data is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from src.errors import ModelError
from src.model import load
from src.model.source import locate
from tests.fixtures import World, call

pytest_plugins = ["tests.fixtures"]


@pytest.fixture
def folder(tmp_path: Path, tiny: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def cut(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[: len(raw) // 2])

    return change


def overwrite(start: int, new: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        path.write_bytes(raw[:start] + new + raw[start + len(new) :])

    return change


def shard(folder: Path) -> None:
    """The first of two files, and an index that names both."""
    (folder / "model.safetensors").rename(folder / "model-1-of-2.safetensors")
    places = {"model.norm.weight": "model-1-of-2.safetensors", "lm_head.weight": "model-2-of-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def wrong_index(folder: Path) -> None:
    shard(folder)
    places = {"model.norm.weight": "model-1-of-2.safetensors", "model.other.weight": "model-1-of-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def no_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1-of-2.safetensors")


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights cut in half": (cut("model.safetensors"), "of its header"),
    "no JSON in the header": (overwrite(8, b"xxxx"), "model.safetensors is not a readable safetensors file"),
    "a header longer than the file": (overwrite(0, b"\xff" * 7), "is longer than the file"),
    "an empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "safetensors file: it has 0 bytes"),
    "a header that is a list": (overwrite(8, b"[1]" + b" " * 9), "is not a readable safetensors file"),
    "a shard is missing": (shard, "model-2-of-2.safetensors is missing, which model.safetensors.index.json names"),
    "a tensor is missing": (wrong_index, "model-1-of-2.safetensors lacks model.other.weight, which "),
    "no index": (no_index, "model.safetensors.index.json is missing"),
    "a negative size": (edit("config.json", hidden_size=-8), "config.json has hidden_size=-8, which should be"),
    "a size in words": (edit("config.json", vocab_size="many"), 'config.json has vocab_size="many", which should'),
    "no layers": (
        edit("config.json", num_hidden_layers=0),
        "config.json has num_hidden_layers=0, which should be",
    ),
    "endless layers": (edit("config.json", num_hidden_layers=10**11), "which should be at most 10,000"),
    "more layers than tensors": (edit("config.json", num_hidden_layers=900), "config.json has 900 layers"),
    "no tensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}"),
        "the weights have 0 tensors",
    ),
    "uneven groups": (edit("config.json", num_key_value_heads=3), "is no multiple of num_key_value_heads=3"),
    "half a config": (cut("config.json"), "config.json is not JSON"),
    "half a tokenizer": (cut("tokenizer.json"), "tokenizer.json is not JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_folder_is_one_sentence(folder: Path, damage: str) -> None:
    locate(str(folder))
    change, told = DAMAGES[damage]
    change(folder)
    with pytest.raises(ModelError) as refused:
        locate(str(folder))
    (problem,) = refused.value.problems
    assert problem.startswith(f"{folder}: ") and told in problem
    assert refused.value.hint == "it is damaged: copy or download it again"


def test_damage_comes_before_the_data(world: World, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rows could not be read either."""
    overwrite(8, b"xxxx")(folder)
    cut("config.json")(folder)
    for stage in ("train", "plan", "check-data"):
        code = call(stage, *world.settings("train"), f"model_name={folder}", "dataset_path=nowhere")
        assert code == 2 and "config.json is not JSON" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"intermediate_size": 512},
            r"mlp.gate_proj.weight is \d+ x \d+ in the files, and 512 x \d+ by config.json",
        ),
        ({"hidden_act": "foo"}, r"no model can be made of its config.json \(KeyError: 'foo'\)"),
        ({"rms_norm_eps": "abc"}, "rms_norm_eps"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_one_sentence(
    folder: Path, changes: dict[str, Any], told: str
) -> None:
    edit("config.json", **changes)(folder)
    with pytest.raises(ModelError, match=told):
        load.check_shapes(locate(str(folder)), "causal_lm", (), False)


def test_the_shapes_of_a_whole_model_fit(folder: Path) -> None:
    load.check_shapes(locate(str(folder)), "causal_lm", (), False)
    load.check_shapes(locate(str(folder)), "classification", ("a", "b", "c"), False)


def test_a_plan_needs_no_weights(world: World, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors").unlink()
    words = [*world.settings("train"), f"model_name={folder}"]
    assert [call(stage, *words) for stage in ("check-data", "plan", "train")] == [0, 0, 2]
    said = "".join(capsys.readouterr())
    assert "\nfits: " in said
    assert "has no safetensors weights (it has: none); download its model.safetensors" in said
