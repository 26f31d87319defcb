"""The recipe of a training run, top to bottom."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from src import runs
from src.config import TrainConfig, to_yaml
from src.data import checks, loader, pairs, prepare
from src.data.chat import IDENTITY, Chat
from src.data.encode import Rules
from src.data.formats import RowError
from src.data.rows import Example, Row
from src.data.show import show
from src.data.store import RowStore, TokenStore
from src.errors import ConfigError, RunError, Stopped
from src.model import methods, tasks
from src.model.source import Source, is_quantised, locate
from src.runs import Run
from src.train import check, mirror, processes, resume
from src.utils import environment
from src.utils.files import whole_folder, write_json
from src.utils.imports import OPTIONAL, without
from src.utils.logs import log, log_to
from src.utils.place import Here, here

SETS = {"target_modules", "exclude_modules"}  # of peft's settings, what it holds as sets


class Ready(NamedTuple):
    """What a training is made of, before anything heavy is loaded."""

    data: prepare.Data
    dev: list[Row]
    base: Source
    dtype: environment.Reasoned
    store: mirror.Store | None
    unfinished: list[Run | mirror.Remote]  # that could be gone on with


class Shared(NamedTuple):
    """What the first process has prepared for all of them, in a form that can be sent."""

    tokens: Path
    rows: Path
    labels: tuple[str, ...]
    held_out: list[Example]
    base: Source
    dtype: environment.Reasoned


class Prepared(NamedTuple):
    """What is shared, as the first process has it open."""

    shared: Shared
    opened: tuple[TokenStore, Chat, RowStore]


def train(cfg: TrainConfig) -> int:
    """Fine-tune `cfg.model_name` on the training files; leave a run directory with the tuned model.

    All that can be refused is refused before the run directory is made, and most of it before torch is
    imported. Where several processes train, this one starts them, and each of them comes here again.
    """
    plan = processes.plan(cfg)
    if plan is None:
        return _train(cfg, here())
    if plan.node_rank == 0:
        _ready(cfg)

    from src.train import launcher  # torch starts loading here

    return launcher.launch(cfg, plan)


def _ready(cfg: TrainConfig) -> Ready:
    """Everything that is known without torch. Raises: what can be refused by now."""
    runs.check_writable(cfg.output_dir)
    store = mirror.store_of(cfg)
    unfinished = resume.find(cfg, store)
    data = prepare.read(cfg)
    prepare.refuse_bad_rows(data, cfg)
    dev = _dev_rows(cfg, data.labels)
    base = locate(cfg.model_name, cfg.model_revision)
    tasks.check_source(base, cfg.task, cfg.max_length, cfg.method)
    methods.check_base(base, cfg.method)
    dtype = environment.choose_dtype(cfg.bf16, cfg.cuda_visible_devices)
    return Ready(data, dev, base, dtype, store, unfinished)


def _train(cfg: TrainConfig, now: Here) -> int:
    """The training of this process, alone or with others."""
    device = environment.choose_device(cfg.cuda_visible_devices)
    ready = _ready(cfg) if now.first else None
    if ready:
        store = ready.data.store
        log.info("%s usable rows in %d files; base model %s", f"{len(store):,}", len(store.files), ready.base.name)
        tf32 = environment.choose_tf32(cfg.tf32, cfg.cuda_visible_devices)
        kernels = environment.choose_kernels(cfg.use_liger_kernel, cfg.cuda_visible_devices)
        log.info("device %s; precision %s; TF32 %s; kernels %s", device, ready.dtype, tf32, kernels)

    with without(*_unused(cfg, ready)):
        from src.train import fit, together  # noqa: F401, torch and its like start loading here

    try:
        with together.joined(device.value) as where, together.last_words():
            return _fitted(cfg, now, ready, where)
    except Stopped:
        if now.local_rank == 0:  # one voice a machine
            raise
        return 0


def _fitted(cfg: TrainConfig, now: Here, ready: Ready | None, device: str) -> int:
    """Prepare or take over what is prepared, train, save."""
    from src.model import adapters, load
    from src.train import together
    from src.train.callbacks import RunRecorder
    from src.train.fit import Schedule, arguments, batches_of, fit

    with without(*_unused(cfg, ready)):
        made = _prepared(ready, cfg) if ready else None
        shared = together.first(made and made.shared)
        examples, chat, store = made.opened if made else _opened(shared, cfg)
        load.seed_everything(cfg.seed)
        model, base = load.load_base(
            shared.base, shared.dtype.value, device,
            four_bit=methods.METHODS[cfg.method].four_bit, trust_remote_code=cfg.trust_remote_code,
            task=cfg.task, labels=shared.labels,
        )  # fmt: skip
        tasks.check_method(model.config.to_dict(), cfg.task, cfg.method, model.untrained_modules)
        if shared.labels:
            load.pad_alike(model, chat.tokenizer)
        load.seed_everything(cfg.seed)
        schedule = Schedule.of(len(batches_of(examples, cfg, now)), cfg)
        model = adapters.apply(
            model, cfg, base, steps=schedule.steps, gradient_checkpointing=cfg.gradient_checkpointing is True,
            task=cfg.task,
        )  # fmt: skip
    trainable, total = adapters.trainable_parameters(model)
    log.info("%s: %s of %s parameters are trained (%.2f %%)", cfg.method, f"{trainable:,}", f"{total:,}",
             100 * trainable / total)  # fmt: skip

    held_out = shared.held_out
    arguments(cfg, shared.dtype.value, schedule, bool(held_out), Path("checkpoints"))  # refused here if at all
    run, start = together.first(_run(cfg, base, ready, chat, examples.report) if ready else None)
    with (
        mirror.mirrored(ready and ready.store, run) as copy,
        run.recorded() if now.first else nullcontext(),
        together.last_words(),
    ):
        figures, weights = fit(
            model, chat.tokenizer, examples, held_out, cfg, shared.dtype.value,
            RunRecorder(run, now.first, copy), run.checkpoints,
            lambda row: store.place(examples.row_of(row)), start,
        )  # fmt: skip
        if now.first:
            save(model, chat, run.model, weights)
            write_json(run.path / "metrics.json", {"train": figures})
    log.info("trained in %.0f s, loss %.4f; model in %s", figures["seconds"], figures["train_loss"], run.model)
    return 0


def _prepared(ready: Ready, cfg: TrainConfig) -> Prepared:
    """Tokenise what is ready. Raises: what is wrong with the rows."""
    examples, chat = check.tokenised(ready.data, ready.base, cfg)
    show(examples, chat, cfg.max_length)
    checks.refuse_findings(examples.report, cfg)
    labels = tuple(examples.report.get("labels", ()))
    held_out = _held_out(ready.dev, chat, prepare.rules_of(cfg, labels))
    store = ready.data.store
    shared = Shared(examples.folder, store.folder, labels, held_out, ready.base, ready.dtype)
    return Prepared(shared, (examples, chat, store))


def _opened(shared: Shared, cfg: TrainConfig) -> tuple[TokenStore, Chat, RowStore]:
    """The prepared rows, as each process reads them.

    Raises: RunError if this machine does not see what the first process has written.
    """
    for folder in (shared.tokens, shared.rows):
        if not folder.is_dir():
            raise RunError(
                f"{folder} is not on this machine", hint="all machines must share output_dir and cache_dir"
            )
    return TokenStore(shared.tokens), check.chat_of(shared.base, cfg), RowStore(shared.rows)


def _run(
    cfg: TrainConfig, base: Source, ready: Ready, chat: Chat, report: dict[str, Any]
) -> tuple[Run, Path | None]:
    """The run directory, new or taken up again, and the checkpoint to start from."""
    from src.train import checkpoint

    facts = _facts(cfg, base, ready, chat, report)
    run = resume.take_up(ready.unfinished, facts, cfg)
    run = run or runs.create(cfg.output_dir, "train", to_yaml(cfg), facts)
    log_to(run.logs)
    log.info("run %s", run.path)
    write_json(run.path / "data_report.json", report)
    return run, checkpoint.newest(run.checkpoints, with_best=cfg.load_best_model_at_end)


def _unused(cfg: TrainConfig, ready: Ready | None) -> list[str]:
    """Large packages that this training does not need."""
    in_bits = methods.METHODS[cfg.method].four_bit or ready is None or is_quantised(ready.base) is not False
    in_bits = in_bits or "8bit" in cfg.optim or "paged" in cfg.optim
    unused = [*OPTIONAL, *([] if in_bits else ["bitsandbytes"])]
    return [package for package in unused if package not in cfg.report_to]


def save(model: Any, chat: Chat, folder: Path, weights: dict[str, Any] | None = None) -> None:
    """Write the adapter or full weights with the tokenizer: the whole folder, or nothing of it.

    `weights` are taken in place of the model's own, of which it may hold a part only.
    """
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary, **({"state_dict": weights} if weights is not None else {}))
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


def _facts(cfg: TrainConfig, base: Source, ready: Ready, chat: Chat, report: dict[str, Any]) -> dict[str, Any]:
    return {
        "method": cfg.method,
        "task": cfg.task,
        "base_model": {"name": base.name, "revision": base.revision},
        "tokenization": chat.identity,
        "data": ready.data.version | {"files": report["files"]},
        "seed": cfg.seed,
        "precision": ready.dtype._asdict(),
        "processes": here().world,
        "code": environment.git_state(),
        "hardware": environment.hardware(cfg.cuda_visible_devices),
        "packages": environment.versions(),
    }
