"""Data and model of a training run: load the rows, tokenize them, build the model. The stage check-data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .. import chat_templates, runs
from ..config import to_yaml
from ..data import loader, prepare, report, task_encoding
from ..data.chat import ChatTokenizer
from ..data.encode import EncodingOptions
from ..data.eval_files import (
    NO_DATA,
    ONLY_SPLIT,
    eval_path_of,
    foreign_eval_path,
    mixed_files,
    split_files,
    why_no_eval_loss,
)
from ..data.eval_rows import Reading
from ..data.formats import Row, RowError
from ..data.report import HELD_OUT
from ..data.report_text import print_report
from ..data.sources import Version, data_cache
from ..data.store import Example, TokenStore
from ..errors import ConfigError, DataError
from ..model import methods, tasks
from ..model.source import Source, is_quantised, locate
from ..schema import PlanConfig, TrainConfig
from ..utils import environment
from ..utils.environment import Reasoned
from ..utils.files import write_json, write_text
from ..utils.logs import log, log_verdict
from ..utils.process_info import OPTIONAL, block_imports, freeze_gc
from ..utils.units import count
from ..utils.usage_lock import hold
from .arguments import BITSANDBYTES_OPTIMIZERS
from .parent import check_labels, check_parent, find_parent, with_parent

Config = TypeVar("Config", bound=TrainConfig)


class RawData(NamedTuple):
    """What is known without torch: the training rows and dev rows as text, and where the base model is."""

    rows: prepare.TrainingRows
    dev: list[Row]
    base: Source


class PreparedData(NamedTuple):
    """All that a run needs except the model. `held_out` are the examples of the evaluation loss."""

    rows: prepare.TrainingRows
    base: Source
    device: Reasoned
    dtype: Reasoned
    examples: TokenStore
    chat: ChatTokenizer
    held_out: list[Example]
    labels: tuple[str, ...]  # of a classifier


def with_eval_path(cfg: Config) -> Config:
    """The settings with `eval_path` resolved; null if there is no evaluation folder for the training data.

    Raises: ConfigError if `eval_path` does not exist.
    """
    path = eval_path_of(cfg, cfg.eval_path)
    if path not in (None, NO_DATA) and not Path(str(path)).exists():
        hint = f"set it to a folder with test.jsonl, or to {NO_DATA} to train without evaluation data"
        raise ConfigError(f"eval_path {path} is not a folder or a file", hint=hint)
    return replace(cfg, eval_path=path)


def warn_of_missing_evaluation(cfg: TrainConfig) -> None:
    """Say what a run with these settings cannot be judged by, and what makes its verdict optimistic."""
    if cfg.eval_path is None and not cfg.eval_split:
        foreign = foreign_eval_path(cfg.dataset_path, cfg.datasets)
        skipped = f" ({foreign} belongs to other training files)" if foreign else ""
        ways = "eval_split=0.1 holds rows out for it, or eval_path names a folder with test.jsonl"
        log.warning("no evaluation data%s: the run cannot be judged; %s", skipped, ways)
    elif reason := why_no_eval_loss(cfg):
        log.info("no evaluation loss: %s", reason)
    if mixed := mixed_files(cfg.eval_path, cfg):
        names = ", ".join(str(file) for file in mixed)
        log.warning("%s: evaluation files of other training files among yours; remove them", names)
    judge = cfg.gate.split or ONLY_SPLIT
    if (chooses := _chooses_by_loss(cfg)) and cfg.dev_split == judge:
        log.warning("%s chooses the model on the split %s, by which the gate judges it: an optimistic verdict",
                    chooses, judge)  # fmt: skip


def _chooses_by_loss(cfg: TrainConfig) -> str:
    """The setting that chooses the model by its evaluation loss; empty if there is none."""
    if cfg.load_best_model_at_end:
        return "load_best_model_at_end"
    return "early_stopping_patience" if cfg.early_stopping_patience else ""


def load_rows(cfg: TrainConfig, versions: Sequence[Version] = ()) -> RawData:
    """Load and check the data files, and locate the base model, without importing torch.

    Args:
        versions: recorded versions of the data sets, to read instead of the newest ones.
    Raises: UserError for everything that can be validated without a tokenizer.
    """
    environment.release_freed_memory()
    runs.check_writable(cfg.output_dir)
    cache = data_cache(cfg.cache_dir, cfg.output_dir)
    base = locate(cfg.model_name, cfg.model_revision, weights=_needs_weights(cfg))
    tasks.check_source(base, cfg.task, cfg.max_length, cfg.method)
    methods.check_base(base, cfg.method)
    rows = prepare.load_training_rows(cfg, task=cfg.task, eval_path=cfg.eval_path, cache=cache, seed=cfg.seed,
                                      reference_turn=cfg.reference_turn, versions=versions)  # fmt: skip
    prepare.refuse_bad_rows(rows, cfg, cfg.task)
    dev = _read_dev_rows(cfg, rows.labels, rows.reading)
    check_parent(cfg, base)
    return RawData(rows, dev, base)


def _needs_weights(cfg: TrainConfig) -> bool:
    """Whether the run computes with the weights of the base model: a plan reads none of them."""
    return not isinstance(cfg, PlanConfig) or cfg.probe


def tokenize(
    raw: RawData, cfg: TrainConfig, device: Reasoned | None = None, dtype: Reasoned | None = None
) -> PreparedData:
    """Choose the device and the precision if they are not given, and tokenize the rows.

    Raises: DataError if the data report has a finding that the settings do not allow.
    """
    hold(cfg.output_dir)  # load_rows has created it
    rows, dev, base = raw
    device = device or environment.choose_device(cfg.cuda_visible_devices)
    dtype = dtype or environment.choose_dtype(cfg.bf16, cfg.cuda_visible_devices)
    usable = f"{count(len(rows.store), 'usable row')} in {count(len(rows.store.files), 'file')}"
    log.info("%s; base model %s", usable, base.name)
    warn_of_missing_evaluation(cfg)
    tf32 = environment.choose_tf32(cfg.tf32, cfg.cuda_visible_devices)
    kernels = environment.choose_kernels(cfg.use_liger_kernel, cfg.cuda_visible_devices, device.value)
    log.info("device %s; precision %s; TF32 %s; kernels %s", device, dtype, tf32, kernels)
    block_imports(*_unused_packages(cfg, base))
    from ..model import load  # imports transformers and torch

    if _needs_weights(cfg):
        load.check_shapes(base, cfg.task, rows.labels, cfg.trust_remote_code)
    examples, chat = _tokenize_rows(rows, base, cfg)
    print_report(examples, chat, cfg.max_length)
    report.refuse_findings(examples.report, strict=cfg.strict_data)
    labels = tuple(examples.report.get("labels", ()))
    if cfg.dev_split == rows.held_out_split:
        dev = loader.read_rows(examples.folder / prepare.HELD_OUT_FILE)
    held_out = _encode_dev_rows(dev, chat, prepare.encoding_options(cfg, cfg.task, labels))
    _refuse_missing_rows(rows, examples, held_out, base, chat, cfg)
    return PreparedData(rows, base, device, dtype, examples, chat, held_out, labels)


def build_model(data: PreparedData, cfg: TrainConfig, steps: int) -> tuple[Any, Source]:
    """The base model with the tuning method applied, and its source with the resolved revision.

    `steps`: optimizer steps of the run, which some methods schedule by.
    """
    from ..model import adapters, embeddings, load  # imports torch

    load.seed_everything(cfg.seed)
    parent = find_parent(cfg)
    full = None if parent is None or parent.is_adapter else parent.folder
    model, base = load.load_base(
        data.base, data.dtype.value, data.device.value,
        four_bit=methods.METHODS[cfg.method].four_bit, trust_remote_code=cfg.trust_remote_code,
        task=cfg.task, labels=data.labels, weights=full,
    )  # fmt: skip
    tasks.check_method(model.config.to_dict(), cfg.task, cfg.method, model.untrained_modules)
    if data.labels:
        load.set_pad_token(model, data.chat.tokenizer)
        new = "" if parent else ", ".join(model.untrained_modules)
        log.info("labels: %s%s", ", ".join(data.labels), f"; {new} starts from random weights" if new else "")
    if full is None:  # which has trained rows for them
        embeddings.add_rows(model, data.chat.tokenizer, cfg)
    load.seed_everything(cfg.seed)
    adapter = parent.folder if parent and parent.is_adapter else None
    model = adapters.apply_method(model, cfg, base, steps=steps, task=cfg.task, parent=adapter)
    if adapter:
        adapters.load_weights(model, adapter)
    trainable, total = adapters.count_parameters(model)
    log.info("%s: %s of %s parameters are trained (%.2f %%)", cfg.method, f"{trainable:,}", f"{total:,}",
             100 * trainable / total)  # fmt: skip
    freeze_gc()
    return model, base


def check_data(cfg: TrainConfig) -> int:
    """Print which data a run with these settings trains on, and write the report to OUTPUT_DIR/checks.

    Raises: the errors of that run, after the report is written.
    """
    cfg = with_parent(with_eval_path(cfg))
    runs.check_writable(cfg.output_dir)
    cache = data_cache(cfg.cache_dir, cfg.output_dir)
    base = locate(cfg.model_name, cfg.model_revision, weights=False)
    tasks.check_source(base, cfg.task, cfg.max_length)
    rows = prepare.load_training_rows(cfg, task=cfg.task, eval_path=cfg.eval_path, cache=cache, seed=cfg.seed,
                                      reference_turn=cfg.reference_turn)  # fmt: skip
    check_parent(cfg, base)
    warn_of_missing_evaluation(cfg)
    examples, chat = _tokenize_rows(rows, base, cfg)
    folder = runs.new_folder(Path(cfg.output_dir) / "checks")
    write_text(folder / "config_used.yaml", to_yaml(cfg))
    write_json(folder / "data_report.json", examples.report)
    copy_held_out(examples, folder)
    print_report(examples, chat, cfg.max_length)
    report_path = folder / "data_report.json"
    counts = f"{examples.report['rows_trained']:,} of {count(examples.report['rows_in'], 'row')} would be trained"
    log_verdict(f"{counts}; report in {report_path}",
                document={"data": examples.report, "report": str(report_path)})  # fmt: skip
    prepare.refuse_bad_rows(rows, cfg, cfg.task)
    report.refuse_findings(examples.report, strict=cfg.strict_data)
    _refuse_missing_rows(rows, examples, [], base, chat, cfg)
    return 0


def copy_held_out(examples: TokenStore, folder: Path) -> None:
    """Write the rows that `eval_split` holds out to `folder`/held_out, as the evaluation file of their split."""
    if HELD_OUT in examples.report:
        split = examples.report[HELD_OUT]["split"]
        rows = (examples.folder / prepare.HELD_OUT_FILE).read_text(encoding="utf-8")
        write_text(folder / HELD_OUT / f"{split}.jsonl", rows)


def load_chat(base: Source, cfg: TrainConfig) -> ChatTokenizer:
    """The tokenizer of the base model, with a chat template if the task needs one.

    Raises: ConfigError if `chat_template` names a template whose answers the tokenizer has no token to end with.
    """
    from ..model.tokenizer import load_tokenizer

    templated = tasks.TASKS[cfg.task].chat_template
    parent = find_parent(cfg)
    location, revision = base.location, cfg.model_revision
    new_tokens = cfg.new_tokens
    if parent and parent.tokenizer:
        location, revision, new_tokens = str(parent.tokenizer), None, []  # it has those of the parent
    tokenizer = load_tokenizer(
        location, revision, cfg.trust_remote_code, templated=templated, chat=cfg, new_tokens=new_tokens
    )
    chat = ChatTokenizer(tokenizer, cfg.chat_template_kwargs, cfg.empty_thoughts)
    named = templated and cfg.chat_template in chat_templates.names()
    end = chat.markup.end_of_turn if named else ""
    if named and not chat.special.search(end):
        plain = ", ".join(name for name in chat_templates.names() if "eos_token" in chat_templates.read(name))
        raise ConfigError(
            f"chat_template={cfg.chat_template} ends an answer with {end}, which is no token of "
            f"{base.name}: the model could not stop",
            hint=f"choose one that ends with the tokenizer's own token: {plain}",
        )
    return chat


def _tokenize_rows(rows: prepare.TrainingRows, base: Source, cfg: TrainConfig) -> tuple[TokenStore, ChatTokenizer]:
    from ..model.tokenizer import load_config  # imports transformers

    config = load_config(base.location, cfg.model_revision, cfg.trust_remote_code).to_dict()
    # also done here, since tasks.check_source knows only local models
    tasks.check_architecture(config, base.name, cfg.task, cfg.max_length)
    chat = load_chat(base, cfg)
    parent = find_parent(cfg)
    if parent and rows.labels:
        check_labels(parent, rows.labels)
        rows = rows._replace(labels=tuple(parent.labels))
    elif rows.labels:
        rows = rows._replace(labels=tasks.resolve_labels(rows.labels, config))
    cache = data_cache(cfg.cache_dir, cfg.output_dir)
    tokens = prepare.tokenize(rows, chat, cfg, task=cfg.task, cache=cache, seed=cfg.seed)
    chat.record_prompt_settings(trained_thoughts=tokens.report["rows_with_thoughts"] > 0)
    _log_prompt_settings(chat)
    return tokens, chat


def _refuse_missing_rows(
    data: prepare.TrainingRows, examples: TokenStore, dev: Sequence[Example], base: Source, chat: ChatTokenizer,
    cfg: TrainConfig,
) -> None:  # fmt: skip
    """Raises: DataError if a token of the examples has no row in the embedding, and the settings add none."""
    from ..model.tokenizer import load_config

    rows = tasks.embedding_rows(load_config(base.location, cfg.model_revision, cfg.trust_remote_code).to_dict())
    if rows is None or cfg.new_tokens or cfg.resize_embeddings:
        return
    name = chat.tokenizer.convert_ids_to_tokens
    hint = "resize_embeddings=true adds the missing rows and trains them"
    if found := examples.tokens_beyond(rows):
        row, number, times = found
        more = f"; so have {times - 1:,} more rows" if times > 1 else ""
        raise DataError(
            f"{data.store.location(row)} {tasks.missing_row(name(number), number, base.name, rows)}{more}",
            hint=hint,
        )
    if number := max((i for example in dev for i in example.ids if i >= rows), default=0):
        fact = tasks.missing_row(name(number), number, base.name, rows)
        raise DataError(f"the split {cfg.dev_split} {fact}", hint=hint)


def _log_prompt_settings(chat: ChatTokenizer) -> None:
    """Say that the answers had no thoughts, if the model needs another prompt than its template's own."""
    settings = chat.prompt_settings
    if variables := settings.get(chat_templates.TEMPLATE_KWARGS):
        shown = json.dumps(variables)
        log.info("no answer has thoughts: the model is evaluated, and is to be used, with the variables %s", shown)
    elif suffix := settings.get(chat_templates.PROMPT_SUFFIX):
        log.warning(
            "no answer has thoughts, and no variable of the chat template switches thinking off: a program that "
            "uses the model must add %r to the prompt, as the model card does; empty_thoughts=loss trains without",
            suffix,
        )


def _unused_packages(cfg: TrainConfig, base: Source) -> list[str]:
    """Large optional packages that this run does not need."""
    bitsandbytes = (
        methods.METHODS[cfg.method].four_bit
        or is_quantised(base) is not False
        or cfg.optim in BITSANDBYTES_OPTIMIZERS
        or isinstance(cfg, PlanConfig)  # the planner considers qlora as well
        or cfg.memory_gb is not None
    )
    unused = [*OPTIONAL, *([] if bitsandbytes else ["bitsandbytes"])]
    return [package for package in unused if package not in cfg.report_to]


def _read_dev_rows(cfg: TrainConfig, labels: Sequence[str], reading: Reading) -> list[Row]:
    """The rows of the file of `dev_split`, for the evaluation loss; empty if there is none.

    Raises: DataError if a row cannot be read, or has a label that is not in `labels`; ConfigError if a setting
        needs the evaluation loss and there is none.
    """
    if (chooses := _chooses_by_loss(cfg)) and (reason := why_no_eval_loss(cfg)):
        raise ConfigError(f"{chooses} needs an evaluation loss, and {reason}")
    path = split_files(cfg.eval_path).get(cfg.dev_split)
    rows = loader.read_rows(path, reading=reading) if path else []
    if cfg.task == "classification":
        task_encoding.refuse_unknown_labels(rows, labels)
    return rows


def _encode_dev_rows(rows: Sequence[Row], chat: ChatTokenizer, options: EncodingOptions) -> list[Example]:
    """The examples of the evaluation loss; a warning names each row that does not fit."""
    examples: list[Example] = []
    options = options._replace(train_on="completion", on_overlength="reject")
    encode = task_encoding.TASK_ENCODINGS[options.task].encode
    for row, encoded in zip(rows, encode(rows, chat, options), strict=True):
        if isinstance(encoded, RowError):
            log.warning("left out of the evaluation loss: %s:%d %s", row.file, row.line, encoded.detail)
        else:
            examples += encoded.examples
    return examples
