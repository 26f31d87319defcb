"""A damaged base model is one sentence, from its headers, before any data is read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from src.errors import ModelError
from src.model import load
from src.model.config_values import layer_problems
from src.model.source import locate
from src.model.tokenizer import load_config
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


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")


def pipe(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


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
    "no positions": (
        edit("config.json", max_position_embeddings=-5),
        "has max_position_embeddings=-5, which should",
    ),
    "endless layers": (
        edit("config.json", num_hidden_layers=10**11),
        "num_hidden_layers=100000000000, which should",
    ),
    "an endless part": (
        edit("config.json", text_config={"n_layer": 10**11}),
        "text_config.n_layer=100000000000, ",
    ),
    "endless experts": (edit("config.json", num_experts=10**9), "has num_experts=1000000000, which should be"),
    "layers without weights": (edit("config.json", num_hidden_layers=3), "hold the weights of 2"),
    "no weights": (empty, "model.safetensors holds no weights"),
    "a FIFO": (pipe("model.safetensors"), "model.safetensors is not a regular file"),
    "a FIFO for a config": (pipe("config.json"), "config.json is not a regular file"),
    "an unknown start": (edit("config.json", decoder_start_token_id=512), "which is not in its vocabulary of 512"),
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


def test_the_config_of_a_model_on_the_hub_is_checked_before_its_lists_are_made(folder: Path) -> None:
    edit("config.json", num_hidden_layers=10**11)(folder)
    with pytest.raises(ModelError, match="num_hidden_layers=100000000000, which should be a whole number from 1"):
        load_config(str(folder))


def test_weights_of_another_model_are_one_sentence(folder: Path) -> None:
    save_file({"encoder.0.kernel": np.zeros((2, 2))}, folder / "model.safetensors")
    edit("config.json", num_hidden_layers=1)(folder)
    with pytest.raises(ModelError, match=r"the files hold none of the weights .* they hold encoder.0.kernel"):
        load.check_shapes(locate(str(folder)), "causal_lm", (), False)


def test_an_end_beyond_the_vocabulary_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit("config.json", eos_token_id=[2, 99999])(folder)
    load.check_shapes(locate(str(folder)), "causal_lm", (), False)
    assert "eos_token_id=99999 beyond its vocabulary" in caplog.text and "=2 " not in caplog.text


def test_layers_that_share_weights_are_no_damage() -> None:
    albert = {"num_hidden_layers": 12, "num_hidden_groups": 1}
    assert not [*layer_problems(albert, ["encoder.albert_layer_groups.0.ffn.weight"])]


def test_the_shapes_of_a_whole_model_fit(folder: Path) -> None:
    load.check_shapes(locate(str(folder)), "causal_lm", (), False)
    load.check_shapes(locate(str(folder)), "classification", ("a", "b", "c"), False)


def test_a_plan_needs_no_weights(world: World, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors").unlink()
    words = [*world.settings("train"), f"model_name={folder}"]
    assert [call(stage, *words) for stage in ("check-data", "plan", "train")] == [0, 0, 2]
    said = "".join(capsys.readouterr())
    assert "\nfits: " in said
    assert "has no safetensors weights; download its model.safetensors" in said
    assert f"{folder} has no safetensors weights: download them before you train" in said
