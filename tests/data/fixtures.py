"""`make`: training data from rows to tokens, with the settings that a test names."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from src.config import load
from src.data import prepare, report
from src.data.chat import ChatTokenizer
from src.data.store import TokenStore
from src.schema import TrainConfig
from tests.fixtures import jsonl


@dataclass
class Maker:
    """A folder of data files and one of evaluation files, and a tokenizer of the test's own."""

    folder: Path
    tokenizer: Any

    def file(self, name: str, rows: Iterable[object]) -> Path:
        return jsonl(self.folder / "data" / name, rows)

    def held_out(self, rows: Iterable[object], name: str = "test") -> Path:
        return jsonl(self.folder / "eval" / f"{name}.jsonl", rows)

    def config(self, **settings: Any) -> TrainConfig:
        ours = {
            "dataset_path": str(self.folder / "data"),
            "eval_path": str(self.folder / "eval"),
            "output_dir": str(self.folder / "outputs"),
            "on_bad_row": "skip",
        }
        found: TrainConfig = load("train", ours | settings)
        return found

    def read(self, **settings: Any) -> prepare.TrainingRows:
        cfg = self.config(**settings)
        data = prepare.load_training_rows(cfg)
        prepare.refuse_bad_rows(data, cfg)
        return data

    def tokens(self, **settings: Any) -> TokenStore:
        """What a training with these settings would train on."""
        cfg = self.config(**settings)
        tokens = prepare.tokenize(self.read(**settings), ChatTokenizer(self.tokenizer), cfg)
        report.refuse_findings(tokens.report, cfg)
        return tokens

    def texts(self, tokens: TokenStore) -> list[str]:
        """The text of what each example teaches."""
        return [self.tokenizer.decode([i for i, on in zip(*e, strict=True) if on]) for e in tokens]


@pytest.fixture
def make(tmp_path: Path, tokenizer: Any) -> Maker:
    return Maker(tmp_path, copy.deepcopy(tokenizer))
