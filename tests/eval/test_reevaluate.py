"""Gate and export repeat a run's evaluation: the same requests, cut to the positions of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.tiny_model import build
from tests.fixtures import ROOT, SPLITS, World, evals, jsonl, read_jsonl

pytest_plugins = ["tests.fixtures"]

TASKS = {"bart": "seq2seq", "bert": "classification"}
LONG = "Top of ore rate? " * 60  # several times the 128 positions of both models


def row(task: str, text: str, number: int) -> dict[str, str]:
    if task == "seq2seq":
        return {"prompt": text, "completion": LONG if text == LONG else f"RATE({number})"}
    return {"text": text, "label": ("speed", "heat")[number % 2]}


@pytest.fixture(scope="module")
def evaluated(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A world by the name of an architecture: a run of one step, evaluated on rows of which one is too long."""
    texts = (ROOT / "data" / "ingot.jsonl").read_text(encoding="utf-8").splitlines()
    made: dict[str, World] = {}

    def of(name: str) -> World:
        if name not in made:
            folder, task = tmp_path_factory.mktemp(name), TASKS[name]
            model = build(folder / "model", texts, architecture=name)
            jsonl(folder / "data" / "rows.jsonl", (row(task, f"Top of feed {n}?", n) for n in range(8)))
            for split in SPLITS:
                jsonl(
                    folder / "eval" / f"{split}.jsonl", (row(task, t, n) for n, t in enumerate(["a?", LONG, "b?"]))
                )
            world = World(model, folder / "data", folder / "eval", folder / "outputs", folder / "artifacts")
            data_format = "prompt_completion" if task == "seq2seq" else "classification"
            world.train(
                f"task={task}", f"data_format={data_format}", "max_length=64", "lora_target_modules=null",
                "on_contamination=keep", "max_steps=1",
            )  # fmt: skip
            assert world.call("eval", "splits=[test]") == 0
            made[name] = world
        return made[name]

    return of


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bart", ["export=merged"]),
        ("bart", ["gate.metric=perplexity"]),
        ("bert", ["export=merged"]),
    ],
)
def test_a_text_longer_than_the_positions_is_published_as_it_is_evaluated(
    evaluated: Any, tmp_path: Path, name: str, words: list[str]
) -> None:
    world = evaluated(name).copy(tmp_path)
    assert world.call("publish", *words, "gate.guards=[]", "force=true") == 0


def test_a_merged_model_is_scored_by_perplexity_as_in_the_evaluation(copied: World) -> None:
    run = copied.newest
    rows = read_jsonl(evals(run) / "test.predictions.jsonl")
    assert copied.call("publish", "export=merged", "gate.metric=perplexity", "gate.guards=[]", "force=true") == 0
    (folder,) = (copied.artifacts / "models").glob("*/latest")
    manifest = json.loads((folder / "manifest.json").read_text())
    expected = json.loads((run.path / "metrics.json").read_text())["eval"]["test"]["perplexity"]
    assert len(rows) == 24
    assert manifest["export"]["adapter_score"] == pytest.approx(expected, rel=1e-5)
