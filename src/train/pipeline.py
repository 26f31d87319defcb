"""The recipe of a training run, top to bottom."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from src import runs
from src.config import to_yaml
from src.data import prepare
from src.data.chat import IDENTITY_FILE, ChatTokenizer
from src.data.store import Example, RowStore, TokenStore
from src.errors import RunError, Stopped
from src.model import profile, tasks
from src.model.source import Source
from src.runs import Run
from src.schema import TrainConfig
from src.train import check_data, launch_plan, mirror, resume
from src.train.plan import check_fits, plan_memory, resolve_checkpointing
from src.train.prepare import PreparedData, build_model, load_rows, prepare_training
from src.utils import environment
from src.utils.environment import Reasoned
from src.utils.files import atomic_dir, hash_files, write_json
from src.utils.logs import log, log_to
from src.utils.process_info import ProcessInfo, process_info

SET_VALUED_KEYS = {"target_modules", "exclude_modules"}  # of peft's settings, what it holds as sets


class BroadcastState(NamedTuple):
    """What the first process has prepared for all of them, in a form that can be sent."""

    cfg: TrainConfig  # as the plan has settled it
    tokens: Path
    rows: Path
    labels: tuple[str, ...]
    held_out: list[Example]
    base: Source
    dtype: Reasoned


class MainProcessState(NamedTuple):
    """What only the first process needs, which makes the run directory."""

    ready: PreparedData
    plan: dict[str, Any] | None
    store: mirror.MirrorStore | None
    unfinished: list[Run | mirror.MirroredRun]  # that could be gone on with


def train(cfg: TrainConfig) -> int:
    """Fine-tune `cfg.model_name` on the training files; leave a run directory with the tuned model.

    All that can be refused is refused before the run directory is made, and most of it before torch is
    imported. Where several processes train, this one starts them, and each of them comes here again.
    """
    start = launch_plan.plan_launch(cfg)
    if start is None:
        return _train(cfg, process_info())
    if start.node_rank == 0:
        resume.find_resumable(cfg, mirror.open_store(cfg))
        load_rows(cfg)

    from src.train import launcher  # torch starts loading here

    return launcher.launch(cfg, start)


def _train(cfg: TrainConfig, now: ProcessInfo) -> int:
    """The training of this process, alone or with others."""
    environment.release_freed_memory()
    device = environment.choose_device(cfg.cuda_visible_devices)
    prepared = None if now.launched else _prepare(cfg)

    from src.train import distributed  # torch and its like are loaded by now, or others wait for this process

    try:
        with distributed.process_group(device.value) as where, distributed.ignore_sigterm_on_error():
            if now.launched and now.is_main:
                prepared = _prepare(cfg)
            first, mine = prepared or (None, None)
            shared = distributed.broadcast_from_main(mine)
            ready = first.ready if first else _open_prepared(shared, device)
            return _fit_and_save(cfg, shared, now, first, ready._replace(device=Reasoned(where, device.reason)))
    except Stopped:
        if now.local_rank == 0:  # one voice a machine
            raise
        return 0


def _prepare(cfg: TrainConfig) -> tuple[MainProcessState, BroadcastState]:
    store = mirror.open_store(cfg)
    unfinished = resume.find_resumable(cfg, store)
    ready = prepare_training(cfg)
    plan = plan_memory(ready, cfg)
    check_fits(plan, cfg)
    rows = ready.data.store.folder
    shared = BroadcastState(
        resolve_checkpointing(cfg, plan),
        ready.examples.folder,
        rows,
        ready.labels,
        ready.held_out,
        ready.base,
        ready.dtype,
    )
    return MainProcessState(ready, plan and plan.as_dict(), store, unfinished), shared


def _open_prepared(shared: BroadcastState, device: Reasoned) -> PreparedData:
    """What is prepared, as the other processes read it.

    Raises: RunError if this machine does not see what the first process has written.
    """
    for folder in (shared.tokens, shared.rows):
        if not folder.is_dir():
            raise RunError(
                f"{folder} is not on this machine", hint="all machines must share output_dir and cache_dir"
            )
    data = prepare.TrainingRows([], RowStore(shared.rows), [], [], shared.labels)
    examples, chat = TokenStore(shared.tokens), check_data.load_chat(shared.base, shared.cfg)
    return PreparedData(data, shared.base, device, shared.dtype, examples, chat, shared.held_out, shared.labels)


def _fit_and_save(
    asked: TrainConfig,
    shared: BroadcastState,
    now: ProcessInfo,
    first: MainProcessState | None,
    ready: PreparedData,
) -> int:
    """Make the model, train it, save it."""
    from src.train import distributed
    from src.train.callbacks import RunRecorder
    from src.train.fit import BatchStrategy, fit
    from src.train.training_args import Schedule, build_batch_sampler, build_training_arguments

    cfg, examples, held_out, dtype = shared.cfg, ready.examples, ready.held_out, ready.dtype.value
    schedule = Schedule.of(len(build_batch_sampler(examples, cfg, now)), cfg)
    model, base = build_model(ready, cfg, schedule.steps)
    build_training_arguments(
        cfg, dtype, schedule, bool(held_out), Path("checkpoints")
    )  # refused here if at all, both
    way = BatchStrategy.of(model, ready.chat.tokenizer, cfg, dtype)
    run, start = distributed.broadcast_from_main(_open_run(asked, cfg, base, first) if first else None)
    with (
        mirror.mirror_checkpoints(first and first.store, run) as copy,
        run.record_status() if now.is_main else nullcontext(),
        distributed.ignore_sigterm_on_error(),
    ):
        figures, weights = fit(
            model, ready.chat.tokenizer, examples, held_out, cfg, dtype, RunRecorder(run, now.is_main, copy),
            run.checkpoints, lambda row: ready.data.store.location(examples.row_of(row)), start, way,
        )  # fmt: skip
        if now.is_main:
            save_model(model, ready.chat, run.model, weights)
            write_json(run.path / "metrics.json", {"train": figures})
            run.update(model_files=hash_files(run.model))  # by which later damage is seen
            profile.write(run)
    log.info("trained in %.0f s, loss %.4f; model in %s", figures["seconds"], figures["train_loss"], run.model)
    return 0


def _open_run(
    asked: TrainConfig, cfg: TrainConfig, base: Source, first: MainProcessState
) -> tuple[Run, Path | None]:
    """The run directory, new or taken up again, and the checkpoint to start from."""
    from src.train import checkpoint

    facts = _manifest_facts(cfg, base, first.ready)
    run = resume.resume_first(first.unfinished, facts, asked)
    run = run or runs.create(cfg.output_dir, "train", to_yaml(asked), facts | {"plan": first.plan})
    log_to(run.logs)
    log.info("run %s", run.path)
    write_json(run.path / "data_report.json", first.ready.examples.report)
    return run, checkpoint.find_newest(run.checkpoints, with_best=cfg.load_best_model_at_end)


def save_model(model: Any, chat: ChatTokenizer, folder: Path, weights: dict[str, Any] | None = None) -> None:
    """Write the adapter or full weights with the tokenizer: the whole folder, or nothing of it.

    `weights` are taken in place of the model's own, of which it may hold a part only.
    """
    with atomic_dir(folder) as temporary:
        model.save_pretrained(temporary, **({"state_dict": weights} if weights is not None else {}))
        chat.tokenizer.save_pretrained(temporary)
        write_json(temporary / IDENTITY_FILE, chat.identity)
        settings = temporary / "adapter_config.json"
        if settings.exists() and tasks.labels_of(model.config.to_dict()):
            model.config.save_pretrained(temporary)  # an adapter of a classifier keeps the names of its labels
        if settings.exists():  # peft lists sets in an order that changes from process to process
            found = json.loads(settings.read_text(encoding="utf-8"))
            found = {k: sorted(v) if k in SET_VALUED_KEYS and isinstance(v, list) else v for k, v in found.items()}
            write_json(settings, found)


def _manifest_facts(cfg: TrainConfig, base: Source, ready: PreparedData) -> dict[str, Any]:
    return {
        "method": cfg.method,
        "task": cfg.task,
        "base_model": {"name": base.name, "revision": base.revision},
        "tokenization": ready.chat.identity,
        "data": ready.data.version | {"files": ready.examples.report["files"]},
        "seed": cfg.seed,
        "precision": ready.dtype._asdict(),
        "processes": process_info().world_size,
        "code": environment.git_state(),
        "hardware": environment.hardware(cfg.cuda_visible_devices),
        "packages": environment.versions(),
    }
