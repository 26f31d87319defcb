"""What a training needs, made ready: its data, its tokens, its device; then its model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from src import runs
from src.data import loader, prepare, report, task_encoding
from src.data.chat import ChatTokenizer
from src.data.encode import EncodingOptions
from src.data.formats import Row, RowError
from src.data.report import print_report
from src.data.store import Example, TokenStore
from src.errors import ConfigError
from src.model import methods, tasks
from src.model.source import Source, is_quantised, locate
from src.schema import PlanConfig, TrainConfig
from src.train import check_data
from src.utils import environment
from src.utils.environment import Reasoned
from src.utils.logs import log
from src.utils.process_info import OPTIONAL, block_imports, freeze_gc


class RawData(NamedTuple):
    """What is known without torch: the rows as texts, those of the dev split, and where the model is."""

    data: prepare.TrainingRows
    dev: list[Row]
    base: Source


class PreparedData(NamedTuple):
    """Everything but the model. `examples` are trained on, `held_out` are for the evaluation loss."""

    data: prepare.TrainingRows
    base: Source
    device: Reasoned
    dtype: Reasoned
    examples: TokenStore
    chat: ChatTokenizer
    held_out: list[Example]
    labels: tuple[str, ...]  # of a classifier


def load_rows(cfg: TrainConfig) -> RawData:
    """Refuse what can be refused before torch is imported."""
    environment.release_freed_memory()
    runs.check_writable(cfg.output_dir)
    data = prepare.load_training_rows(cfg)
    prepare.refuse_bad_rows(data, cfg)
    dev = _read_dev_rows(cfg, data.labels)
    base = locate(cfg.model_name, cfg.model_revision)
    tasks.check_source(base, cfg.task, cfg.max_length, cfg.method)
    methods.check_base(base, cfg.method)
    return RawData(data, dev, base)


def prepare_training(
    cfg: TrainConfig, device: Reasoned | None = None, dtype: Reasoned | None = None
) -> PreparedData:
    """Refuse what can be refused, most of it before torch is imported; then tokenise the rows."""
    data, dev, base = load_rows(cfg)
    device = device or environment.choose_device(cfg.cuda_visible_devices)
    dtype = dtype or environment.choose_dtype(cfg.bf16, cfg.cuda_visible_devices)
    log.info("%s usable rows in %d files; base model %s", f"{len(data.store):,}", len(data.store.files), base.name)
    tf32 = environment.choose_tf32(cfg.tf32, cfg.cuda_visible_devices)
    kernels = environment.choose_kernels(cfg.use_liger_kernel, cfg.cuda_visible_devices, device.value)
    log.info("device %s; precision %s; TF32 %s; kernels %s", device, dtype, tf32, kernels)
    block_imports(*_unused_packages(cfg, base))
    examples, chat = check_data.tokenize(data, base, cfg)  # transformers, torch and their like start loading here
    print_report(examples, chat, cfg.max_length)
    report.refuse_findings(examples.report, cfg)
    labels = tuple(examples.report.get("labels", ()))
    held_out = _encode_dev_rows(dev, chat, prepare.encoding_options(cfg, labels))
    return PreparedData(data, base, device, dtype, examples, chat, held_out, labels)


def build_model(ready: PreparedData, cfg: TrainConfig, steps: int) -> tuple[Any, Source]:
    """The base model with the method applied for so many steps, and its source with the revision resolved."""
    from src.model import adapters, load  # torch and its like

    load.seed_everything(cfg.seed)
    model, base = load.load_base(
        ready.base, ready.dtype.value, ready.device.value,
        four_bit=methods.METHODS[cfg.method].four_bit, trust_remote_code=cfg.trust_remote_code,
        task=cfg.task, labels=ready.labels,
    )  # fmt: skip
    tasks.check_method(model.config.to_dict(), cfg.task, cfg.method, model.untrained_modules)
    if ready.labels:
        load.pad_alike(model, ready.chat.tokenizer)
    load.seed_everything(cfg.seed)
    model = adapters.apply(model, cfg, base, steps=steps, task=cfg.task)
    trainable, total = adapters.trainable_parameters(model)
    log.info("%s: %s of %s parameters are trained (%.2f %%)", cfg.method, f"{trainable:,}", f"{total:,}",
             100 * trainable / total)  # fmt: skip
    freeze_gc()
    return model, base


def _unused_packages(cfg: TrainConfig, base: Source) -> list[str]:
    """Large packages that this training does not need."""
    in_bits = methods.METHODS[cfg.method].four_bit or is_quantised(base) is not False
    in_bits = in_bits or "8bit" in cfg.optim or "paged" in cfg.optim
    in_bits = in_bits or isinstance(cfg, PlanConfig) or cfg.memory_gb is not None  # which looks at qlora as well
    unused = [*OPTIONAL, *([] if in_bits else ["bitsandbytes"])]
    return [package for package in unused if package not in cfg.report_to]


def _read_dev_rows(cfg: TrainConfig, labels: Sequence[str]) -> list[Row]:
    """The dev split, for the evaluation loss; none where there is no such file.

    Raises: DataError if a row of it cannot be read, or has a label that is not one of `labels`.
    """
    path = Path(cfg.eval_path) / "dev.jsonl"
    if not path.is_file() and (cfg.load_best_model_at_end or cfg.early_stopping_patience):
        what = "load_best_model_at_end" if cfg.load_best_model_at_end else "early_stopping_patience"
        raise ConfigError(f"{what} needs an evaluation loss, and {path} does not exist", hint="set eval_path")
    if not path.is_file():
        log.warning("%s does not exist: no evaluation loss", path)
        return []
    rows = loader.read_rows(path)
    if cfg.task == "classification":
        task_encoding.refuse_unknown_labels(rows, labels)
    return rows


def _encode_dev_rows(rows: Sequence[Row], chat: ChatTokenizer, rules: EncodingOptions) -> list[Example]:
    """Rows for the evaluation loss; what does not fit is said."""
    found: list[Example] = []
    rules = rules._replace(train_on="completion", on_overlength="reject")
    for row, encoded in zip(rows, task_encoding.TASK_ENCODINGS[rules.task].encode(rows, chat, rules), strict=True):
        if isinstance(encoded, RowError):
            log.warning("left out of the evaluation loss: %s:%d %s", row.file, row.line, encoded.detail)
        else:
            found += encoded.examples
    return found
