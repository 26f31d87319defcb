"""The fixture `make`: training data from rows to tokens, with the settings of a test."""

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
from src.data.sources import data_cache
from src.data.store import TokenStore
from src.schema import TrainConfig
from tests.fixtures import jsonl


def load_training_rows(cfg: TrainConfig) -> prepare.TrainingRows:
    cache = data_cache(cfg.cache_dir, cfg.output_dir)
    return prepare.load_training_rows(cfg, task=cfg.task, eval_path=cfg.eval_path, cache=cache, seed=cfg.seed)


@dataclass
class Maker:
    """A folder of data files, one of evaluation files, and a private copy of the tokenizer."""

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
        data = load_training_rows(cfg)
        prepare.refuse_bad_rows(data, cfg, cfg.task)
        return data

    def tokens(self, **settings: Any) -> TokenStore:
        """The token store of a training run with these settings."""
        cfg = self.config(**settings)
        data, chat = self.read(**settings), ChatTokenizer(self.tokenizer)
        cache = data_cache(cfg.cache_dir, cfg.output_dir)
        tokens = prepare.tokenize(data, chat, cfg, task=cfg.task, cache=cache, seed=cfg.seed)
        report.refuse_findings(tokens.report, strict=cfg.strict_data)
        return tokens

    def texts(self, tokens: TokenStore) -> list[str]:
        """The text of the tokens with loss of each example."""
        return [self.tokenizer.decode([i for i, on in zip(*e, strict=True) if on]) for e in tokens]


@pytest.fixture
def make(tmp_path: Path, tokenizer: Any) -> Maker:
    return Maker(tmp_path, copy.deepcopy(tokenizer))
