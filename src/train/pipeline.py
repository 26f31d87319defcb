"""The recipe of a training run, top to bottom."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src import runs
from src.config import TrainConfig, to_yaml
from src.data import checks, loader, pairs, prepare
from src.data.chat import IDENTITY, Chat
from src.data.encode import Rules
from src.data.formats import RowError
from src.data.rows import Example, Row
from src.data.show import show
from src.errors import ConfigError, NotYetError
from src.model import methods, tasks
from src.model.source import Source, is_quantised, locate
from src.train import check, mirror, resume
from src.utils import environment
from src.utils.files import whole_folder, write_json
from src.utils.imports import OPTIONAL, without
from src.utils.logs import log, log_to

SETS = {"target_modules", "exclude_modules"}  # of peft's settings, what it holds as sets


def train(cfg: TrainConfig) -> int:
    """Fine-tune `cfg.model_name` on the training files; leave a run directory with the tuned model.

    All that can be refused is refused before the run directory is made, and most of it before torch is
    imported.
    """
    if "," in cfg.cuda_visible_devices:  # the Trainer would multiply the batch by them without a word
        raise NotYetError("training on several GPUs is not available in this version", hint="name one GPU")
    runs.check_writable(cfg.output_dir)
    store = mirror.store_of(cfg)
    unfinished = resume.find(cfg, store)
    data = prepare.read(cfg)
    prepare.refuse_bad_rows(data, cfg)
    dev = _dev_rows(cfg, data.labels)
    base = locate(cfg.model_name, cfg.model_revision)
    methods.check_base(base, cfg.method)
    tasks.check_source(base, cfg.task, cfg.max_length, cfg.method)
    device = environment.choose_device(cfg.cuda_visible_devices)
    dtype = environment.choose_dtype(cfg.bf16, cfg.cuda_visible_devices)
    log.info("%s usable rows in %d files; base model %s", f"{len(data.store):,}", len(data.store.files), base.name)
    tf32 = environment.choose_tf32(cfg.tf32, cfg.cuda_visible_devices)
    kernels = environment.choose_kernels(cfg.use_liger_kernel, cfg.cuda_visible_devices)
    log.info("device %s; precision %s; TF32 %s; kernels %s", device, dtype, tf32, kernels)

    with without(*_unused(cfg, base)):
        from src.model import adapters, load  # torch and its like start loading here
        from src.train import checkpoint
        from src.train.callbacks import RunRecorder
        from src.train.fit import Schedule, arguments, batches_of, fit

        examples, chat = check.tokenised(data, base, cfg)
        show(examples, chat, cfg.max_length)
        checks.refuse_findings(examples.report, cfg)
        labels = tuple(examples.report.get("labels", ()))
        held_out = _held_out(dev, chat, prepare.rules_of(cfg, labels))

        load.seed_everything(cfg.seed)
        model, base = load.load_base(
            base, dtype.value, device.value,
            four_bit=methods.METHODS[cfg.method].four_bit, trust_remote_code=cfg.trust_remote_code,
            task=cfg.task, labels=labels,
        )  # fmt: skip
        tasks.check_method(model.config.to_dict(), cfg.task, cfg.method, model.untrained_modules)
        if labels:
            load.pad_alike(model, chat.tokenizer)
        load.seed_everything(cfg.seed)
        schedule = Schedule.of(len(batches_of(examples, cfg)), cfg)
        checkpointing = cfg.gradient_checkpointing is True
        model = adapters.apply(
            model, cfg, base, steps=schedule.steps, gradient_checkpointing=checkpointing, task=cfg.task
        )
    trainable, total = adapters.trainable_parameters(model)
    log.info("%s: %s of %s parameters are trained (%.2f %%)", cfg.method, f"{trainable:,}", f"{total:,}",
             100 * trainable / total)  # fmt: skip

    arguments(cfg, dtype.value, schedule, bool(held_out), Path("checkpoints"))  # refused here if at all
    facts = _facts(cfg, base, data, chat, examples.report, dtype)
    run = resume.take_up(unfinished, facts, cfg)
    run = run or runs.create(cfg.output_dir, "train", to_yaml(cfg), facts)
    log_to(run.logs)
    log.info("run %s", run.path)
    with mirror.mirrored(store, run) as copy, run.recorded():
        write_json(run.path / "data_report.json", examples.report)
        figures = fit(
            model, chat.tokenizer, examples, held_out, cfg, dtype.value, RunRecorder(run, mirror=copy),
            run.checkpoints,
            lambda row: data.store.place(examples.row_of(row)),
            checkpoint.newest(run.checkpoints, with_best=cfg.load_best_model_at_end),
        )  # fmt: skip
        save(model, chat, run.model)
        write_json(run.path / "metrics.json", {"train": figures})
    log.info("trained in %.0f s, loss %.4f; model in %s", figures["seconds"], figures["train_loss"], run.model)
    return 0


def _unused(cfg: TrainConfig, base: Source) -> list[str]:
    """Large packages that this training does not need."""
    in_bits = methods.METHODS[cfg.method].four_bit or is_quantised(base) is not False
    in_bits = in_bits or "8bit" in cfg.optim or "paged" in cfg.optim
    unused = [*OPTIONAL, *([] if in_bits else ["bitsandbytes"])]
    return [package for package in unused if package not in cfg.report_to]


def save(model: Any, chat: Chat, folder: Path) -> None:
    """Write the adapter or full weights with the tokenizer: the whole folder, or nothing of it."""
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        chat.tokenizer.save_pretrained(temporary)
        write_json(temporary / IDENTITY, chat.identity)
        settings = temporary / "adapter_config.json"
        if settings.exists() and tasks.labels_of(model.config.to_dict()):
            model.config.save_pretrained(temporary)  # an adapter of a classifier keeps the names of its labels
        if settings.exists():  # peft lists sets in an order that changes from process to process
            found = json.loads(settings.read_text(encoding="utf-8"))
            found = {k: sorted(v) if k in SETS and isinstance(v, list) else v for k, v in found.items()}
            write_json(settings, found)


def _dev_rows(cfg: TrainConfig, labels: Sequence[str]) -> list[Row]:
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
        pairs.refuse_unknown_labels(rows, labels)
    return rows


def _held_out(rows: Sequence[Row], chat: Chat, rules: Rules) -> list[Example]:
    """Rows for the evaluation loss; what does not fit is said."""
    found: list[Example] = []
    rules = rules._replace(train_on="completion", on_overlength="reject")
    for row, encoded in zip(rows, pairs.TASKS[rules.task].encode(rows, chat, rules), strict=True):
        if isinstance(encoded, RowError):
            log.warning("left out of the evaluation loss: %s:%d %s", row.file, row.line, encoded.detail)
        else:
            found += encoded.examples
    return found


def _facts(
    cfg: TrainConfig, base: Source, data: prepare.Data, chat: Chat, report: dict[str, Any],
    dtype: environment.Reasoned,
) -> dict[str, Any]:  # fmt: skip
    return {
        "method": cfg.method,
        "task": cfg.task,
        "base_model": {"name": base.name, "revision": base.revision},
        "tokenization": chat.identity,
        "data": data.version | {"files": report["files"]},
        "seed": cfg.seed,
        "precision": dtype._asdict(),
        "code": environment.git_state(),
        "hardware": environment.hardware(cfg.cuda_visible_devices),
        "packages": environment.versions(),
    }
