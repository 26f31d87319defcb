"""check-data, and the first step of a training: read the rows, tokenise them, show what became of them."""

from __future__ import annotations

from pathlib import Path

from src import runs
from src.config import to_yaml
from src.data import prepare, report
from src.data.chat import ChatTokenizer
from src.data.report import print_report
from src.data.store import TokenStore
from src.model import tasks
from src.model.source import Source, locate
from src.schema import TrainConfig
from src.utils.files import write_json, write_text
from src.utils.logs import log


def check_data(cfg: TrainConfig) -> int:
    """Show what a training with these settings would train on; keep the report under OUTPUT_DIR/checks.

    Raises: what that training would refuse, after the report is written.
    """
    runs.check_writable(cfg.output_dir)
    data = prepare.load_training_rows(cfg)
    base = locate(cfg.model_name, cfg.model_revision)
    tasks.check_source(base, cfg.task, cfg.max_length)
    tokens, chat = tokenize(data, base, cfg)
    folder = runs.new_folder(Path(cfg.output_dir) / "checks")
    write_text(folder / "config_used.yaml", to_yaml(cfg))
    write_json(folder / "data_report.json", tokens.report)
    print_report(tokens, chat, cfg.max_length)
    log.info("report in %s", folder / "data_report.json")
    prepare.refuse_bad_rows(data, cfg)
    report.refuse_findings(tokens.report, cfg)
    return 0


def tokenize(data: prepare.TrainingRows, base: Source, cfg: TrainConfig) -> tuple[TokenStore, ChatTokenizer]:
    """The tokens of the rows by the tokenizer of `base`, and that tokenizer."""
    from src.model.tokenizer import load_config  # transformers starts loading here

    config = load_config(base.location, cfg.model_revision, cfg.trust_remote_code).to_dict()
    tasks.check(config, base.name, cfg.task, cfg.max_length)  # of the Hub it was not known before
    chat = load_chat(base, cfg)
    data = data._replace(labels=tasks.labels_for(data.labels, config)) if data.labels else data
    return prepare.tokenize(data, chat, cfg), chat


def load_chat(base: Source, cfg: TrainConfig) -> ChatTokenizer:
    """The tokenizer of `base`, as the task uses it."""
    from src.model.tokenizer import load_tokenizer

    templated = tasks.TASKS[cfg.task].templated
    return ChatTokenizer(
        load_tokenizer(base.location, cfg.model_revision, cfg.trust_remote_code, templated=templated)
    )
