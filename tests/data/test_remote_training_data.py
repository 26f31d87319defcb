"""Remote training data, from the source to the manifest, which records the version that was read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from src.config import load
from src.schema import TrainConfig
from tests.data.fixtures import Maker, load_training_rows
from tests.data.hub_server import hub_serving
from tests.data.lake import Lake
from tests.data.test_column_mapping import PRINTED
from tests.fixtures import World, chat

pytest_plugins = ["tests.fixtures", "tests.data.fixtures", "tests.data.lake"]


def jsonl(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def config(make: Maker, **settings: Any) -> TrainConfig:
    found: TrainConfig = load(
        "train", {"output_dir": str(make.folder / "outputs"), "eval_path": "none", **settings}
    )
    return found


def test_the_printed_train_data_config_is_trained_on_word_for_word(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The YAML file of the chart, its text block unchanged, against a server shaped like the Hub."""
    block = "trainDataConfig: |\n" + "".join(f"  {line}\n" for line in PRINTED.splitlines())
    with hub_serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.repo = "HuggingFaceH4/instruction-dataset"
        commit = hub.commit(**{"data__train.jsonl": jsonl({"prompt": "2+2?", "completion": "4", "meta": {}})})
        data = load_training_rows(config(make, **yaml.safe_load(block)))
    said = "A chat between a curious user and an artificial intelligence assistant."
    assert data.store.row(0).messages == chat("2+2?", "4", system=said)["messages"]
    (source,) = data.version["sources"]
    assert (source["type"], source["repo"], source["commit"]) == ("hub", hub.repo, commit)


def test_a_training_on_lakefs_names_the_commit_that_it_read(own: Lake, world: World) -> None:
    rows = [chat(f"Top of {n} rate?", "TOP(a)") for n in ("kiln", "mill")]
    commit = own.commit(
        {"train/a.jsonl": jsonl(*rows), "train/deep/b.jsonl": jsonl(chat("2+2?", "4")), "x.csv": b""}
    )
    keys = [
        f"data_source.{k}={v}" for k, v in {"type": "lakefs", "endpoint": own.endpoint, "repo": own.name}.items()
    ]
    run = world.train(*keys, "data_source.path=train", "max_steps=1")
    (source,) = run.manifest["data"]["sources"]
    assert (source["type"], source["repo"], source["commit"]) == ("lakefs", own.name, commit)
    assert sorted(Path(f["file"]).name for f in run.manifest["data"]["files"]) == ["a.jsonl", "b.jsonl"]
    assert json.loads((run.path / "data_report.json").read_text())["rows_in"] == 3
    own.commit({"train/a.jsonl": jsonl(chat("9+9?", "18"))})
    own.own.__exit__()
    again = world.train(*keys, "data_source.branch=null", f"data_source.commit={commit}", "data_source.path=train",
                        "max_steps=1")  # fmt: skip
    weights = "adapter_model.safetensors"
    assert (again.model / weights).read_bytes() == (run.model / weights).read_bytes()
