"""A base model whose template ends turns with another token than its tokenizer's: once tuned, it stops there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from src.data.chat import ChatTokenizer
from src.model.tokenizer import load_tokenizer
from tests.fixtures import ANSWER, World, evals, read_jsonl

pytest_plugins = ["tests.fixtures"]


@pytest.fixture(scope="module")
def base_like(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a base model: its text ends with the padding token, which no turn ends with."""
    folder = tmp_path_factory.mktemp("base") / "tiny-base"
    shutil.copytree(tiny, folder)
    tokenizer = load_tokenizer(str(tiny))
    tokenizer.eos_token = tokenizer.pad_token
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | {"eos_token_id": tokenizer.eos_token_id}))
    return folder


def test_a_tuned_base_model_stops_at_the_end_of_its_turn(
    world: World, base_like: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = replace(world, model=base_like)
    run = world.train("system_prompt=Name it.")
    chat = ChatTokenizer(load_tokenizer(str(run.model)))
    both = chat.stop_token_ids
    assert chat.tokenizer.convert_ids_to_tokens(both) == ["<|pad|>", "<|end|>"]
    assert json.loads((run.model / "generation_config.json").read_text())["eos_token_id"] == both
    assert json.loads((run.path / "data_report.json").read_text())["no_end_of_turn"] == 0

    assert world.call("eval", "splits=[test]") == 0
    rows = read_jsonl(evals(run) / "test.predictions.jsonl")
    assert {(row["prediction"], row["stop"]) for row in rows} == {(ANSWER, "end")}
    assert rows[0]["prompt"].startswith("system: Name it.\nuser: Top of ore"), (
        "rows are asked as the run was trained"
    )
    result = json.loads((run.path / "metrics.json").read_text())
    assert result["conditions"]["decoding"]["stop_tokens"] == ["<|pad|>", "<|end|>"]

    for form in ("adapter", "merged"):
        assert world.call("publish", f"export={form}", "force=true", f"publish_name={form}") == 0, (
            capsys.readouterr()
        )
        (folder,) = (world.artifacts / "models" / form).glob("2*")
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == both
        assert f"eos_token_id={both})" in (folder / "README.md").read_text()
