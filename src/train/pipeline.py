"""The recipe of a training run: load rows, tokenize, plan, build the model, train, save.

All modules that import torch are imported inside the functions, so that wrong input is rejected before that.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from .. import learning, runs
from ..config import to_yaml
from ..data.chat import IDENTITY_FILE, ChatTokenizer
from ..data.eval_files import split_files
from ..data.prepare import TrainingRows
from ..data.report import HELD_OUT
from ..data.sources import Version, data_cache
from ..data.store import Example, RowStore, TokenStore
from ..data.trained_rows import FILE as TRAINED_ROWS
from ..data.trained_rows import keep_trained_rows, write_trained_rows
from ..errors import RunError, Stopped
from ..model import profile, stop_tokens, tasks
from ..model.source import Source
from ..runs import Run
from ..schema import TrainConfig
from ..utils import environment
from ..utils.environment import Reasoned
from ..utils.files import atomic_dir, hash_files, read_json, sha256, write_json
from ..utils.logs import log, log_to, log_verdict
from ..utils.process_info import ProcessInfo, process_info
from ..utils.units import format_duration
from . import launch_plan, mirror, resume
from .arguments import check_packages
from .parent import find_parent, with_parent
from .plan import check_fits, plan_memory, resolve_checkpointing
from .prepare import PreparedData, build_model, copy_held_out, load_chat, load_rows, tokenize, with_eval_path

SET_VALUED_KEYS = {"target_modules", "exclude_modules"}  # peft holds these settings as sets


class BroadcastState(NamedTuple):
    """What the main process sends to the others after it has prepared the data."""

    cfg: TrainConfig  # with `gradient_checkpointing` resolved
    tokens: Path
    rows: Path
    labels: tuple[str, ...]
    held_out: list[Example]
    base: Source
    dtype: Reasoned


class MainProcessState(NamedTuple):
    """What only the main process needs: it creates the run directory."""

    data: PreparedData
    plan: dict[str, Any] | None
    store: mirror.MirrorStore | None
    resumable: list[Run | mirror.MirroredRun]
    versions: list[Version]  # of the data, if it is not read at its newest version
    trained_rows: Path  # fingerprints, see data/trained_rows.py


def train(cfg: TrainConfig) -> int:
    """Fine-tune `cfg.model_name` on the training files; leave a run directory with the tuned model.

    All validation happens before the run directory is created, and most of it before torch is imported. A
    distributed run launches its processes here, and each of them calls this function again.
    """
    cfg = with_parent(with_eval_path(cfg))
    check_packages(cfg.method, cfg.optim)
    launch = launch_plan.plan_launch(cfg, cfg.cuda_visible_devices)
    if launch is None:
        return _train(cfg, process_info())
    if launch.node_rank == 0:
        _, versions = resume.pin_data(resume.find_resumable(cfg, mirror.open_store(cfg), announce=False), cfg)
        load_rows(cfg, versions)

    from . import launcher  # imports torch

    return launcher.launch(launch, asdict(cfg), cfg.output_dir)


def _train(cfg: TrainConfig, info: ProcessInfo) -> int:
    """What each process runs: the main process prepares the data, and all train together."""
    environment.release_freed_memory()
    device = environment.choose_device(cfg.cuda_visible_devices)
    prepared = None if info.launched else _prepare(cfg)

    from . import distributed  # torch is imported by now, or other processes are waiting for this one

    try:
        with distributed.process_group(device.value) as local_device, distributed.ignore_sigterm_on_error():
            if info.launched and info.is_main:
                prepared = _prepare(cfg)
            main, state = prepared or (None, None)
            shared = distributed.broadcast_from_main(state)
            data = main.data if main else _open_data(shared, device)
            data = data._replace(device=Reasoned(local_device, device.reason))
            return _fit_and_save(cfg, shared.cfg, data, info, main)
    except Stopped:
        if info.local_rank == 0:  # one message for each machine
            raise
        return 0


def _prepare(cfg: TrainConfig) -> tuple[MainProcessState, BroadcastState]:
    """Load and tokenize the data, and check that the run fits into memory and disk."""
    store = mirror.open_store(cfg)
    resumable, versions = resume.pin_data(resume.find_resumable(cfg, store), cfg)
    raw = load_rows(cfg, versions)
    data = tokenize(raw, cfg)
    plan = plan_memory(data, cfg)
    check_fits(plan, cfg)
    cfg = resolve_checkpointing(cfg, plan)
    shared = BroadcastState(
        cfg, data.examples.folder, data.rows.store.folder, data.labels, data.held_out, data.base, data.dtype
    )
    cache = data_cache(cfg.cache_dir, cfg.output_dir)
    trained = write_trained_rows(data.rows.store, data.examples, cache, cfg.num_proc)
    return MainProcessState(data, plan.as_dict() if plan else None, store, resumable, versions, trained), shared


def _open_data(shared: BroadcastState, device: Reasoned) -> PreparedData:
    """Open the data that the main process has prepared.

    Raises: RunError if this machine does not see the files of the main process.
    """
    for folder in (shared.tokens, shared.rows):
        if not folder.is_dir():
            raise RunError(
                f"{folder} is not on this machine", hint="all machines must share output_dir and cache_dir"
            )
    rows = TrainingRows([], RowStore(shared.rows), [], [], shared.labels)
    examples, chat = TokenStore(shared.tokens), load_chat(shared.base, shared.cfg)
    return PreparedData(rows, shared.base, device, shared.dtype, examples, chat, shared.held_out, shared.labels)


def _fit_and_save(
    requested: TrainConfig, cfg: TrainConfig, data: PreparedData, info: ProcessInfo, main: MainProcessState | None
) -> int:
    """Build the model, train it, save it. `requested`: the settings before the plan resolved some of them."""
    from . import distributed, fit
    from .batch_sampler import Schedule, build_sampler
    from .callbacks import RunRecorder

    examples, tokenizer, dtype = data.examples, data.chat.tokenizer, data.dtype.value
    sampler = build_sampler(examples, cfg, cfg.seed, cfg.max_length if cfg.packing else None, info,
                            resume.started_with(cfg))  # fmt: skip
    schedule = Schedule.from_batches(len(sampler), cfg)
    model, base = build_model(data, cfg, schedule.steps)
    evaluates = bool(data.held_out)
    fit.build_training_arguments(cfg, dtype, schedule, evaluates, Path("checkpoints"))  # may raise ConfigError
    collator_and_loss = fit.CollatorAndLoss.for_model(
        model, tokenizer, dtype, task=cfg.task, method=cfg.method, speed=cfg, loss=cfg, distributed=cfg.distributed
    )
    run, start = distributed.broadcast_from_main(_open_run(requested, cfg, base, main) if main else None)
    with (
        mirror.mirror_checkpoints(main and main.store, run) as copy,
        run.record_status() if info.is_main else nullcontext(),
        distributed.ignore_sigterm_on_error(),
    ):
        fit.set_numerics(cfg, cfg.cuda_visible_devices)
        metrics, weights = fit.fit(
            model, tokenizer, examples, data.held_out, sampler=sampler, schedule=schedule,
            collator_and_loss=collator_and_loss,
            args=fit.build_training_arguments(cfg, dtype, schedule, evaluates, run.checkpoints), dtype=dtype,
            loop=cfg, speed=cfg, distributed=cfg.distributed, seed=cfg.seed,
            recorder=RunRecorder(run, info.is_main, copy),
            locate_row=lambda index: data.rows.store.location(examples.row_of(index)), start=start,
        )  # fmt: skip
        if info.is_main:
            save_model(model, data.chat, run.model, weights)
            write_json(run.path / "metrics.json", {"train": metrics})
            run.update(model_files=hash_files(run.model))  # to detect later damage
            profile.write_profile(run)
    if info.is_main:
        trained = f"trained in {format_duration(metrics['seconds'])}, loss {metrics['train_loss']:.4f}"
        trained = "; ".join([trained, *learning.note({"train": metrics})])
        log_verdict(f"{trained}; model in {run.model}", document={"metrics": metrics, "model": str(run.model)})
    return 0


def _open_run(
    requested: TrainConfig, cfg: TrainConfig, base: Source, main: MainProcessState
) -> tuple[Run, Path | None]:
    """A new or a resumed run directory, and the checkpoint to start from."""
    from . import checkpoint

    facts = _manifest_facts(cfg, base, main.data)
    run = resume.resume_first(main.resumable, facts, requested, requested.output_dir)
    if run:
        resume.record_batches(run, cfg)
    else:
        resume.refuse_older_data(requested, main.versions)
        resume.log_repetition(requested, facts)
        run = runs.create(cfg.output_dir, "train", to_yaml(requested), facts | {"plan": main.plan})
    if cfg.run_name:
        run.update(run_name=cfg.run_name)
    log_to(run.logs)
    log.info("run %s", run.path)
    write_json(run.path / "data_report.json", main.data.examples.report)
    copy_held_out(main.data.examples, run.path)
    keep_trained_rows(main.trained_rows, run.path, also=_parent_rows(cfg))
    return run, checkpoint.find_newest(run.checkpoints, with_best=cfg.load_best_model_at_end)


def save_model(model: Any, chat: ChatTokenizer, folder: Path, weights: dict[str, Any] | None = None) -> None:
    """Write the adapter or the full weights with the tokenizer; the folder is complete or absent.

    `weights`: the full weights of a sharded model, of which `model` holds a part.
    """
    with atomic_dir(folder) as temporary:
        model.save_pretrained(temporary, **({"state_dict": weights} if weights is not None else {}))
        chat.tokenizer.save_pretrained(temporary)
        stop_tokens.save(model, chat.stop_token_ids, temporary)
        write_json(temporary / IDENTITY_FILE, chat.identity)
        adapter_config = temporary / "adapter_config.json"
        if adapter_config.exists() and _is_classifier(adapter_config):
            model.config.save_pretrained(temporary)  # the adapter of a classifier needs the names of its labels
        if adapter_config.exists():  # peft writes sets in random order
            found = json.loads(adapter_config.read_text(encoding="utf-8"))
            found = {k: sorted(v) if k in SET_VALUED_KEYS and isinstance(v, list) else v for k, v in found.items()}
            write_json(adapter_config, found)


def _is_classifier(adapter_config: Path) -> bool:
    return bool(read_json(adapter_config).get("task_type") == tasks.TASKS["classification"].peft_type)


def _evaluation_data(cfg: TrainConfig, held_out: dict[str, Any] | None) -> dict[str, Any]:
    """The evaluation files of the run, with hashes. `held_out` is relative to the run directory."""
    files = {split: sha256(file) for split, file in split_files(cfg.eval_path).items()}
    path = cfg.eval_path if files else None
    if held_out is None:
        return {"path": path, "held_out": None, "files": files}
    files |= {held_out["split"]: held_out["sha256"]}
    return {"path": path, "held_out": f"{HELD_OUT}/{held_out['split']}.jsonl", "files": files}


def _data_files(report: dict[str, Any]) -> dict[str, Any]:
    """The training files, and the hash of the rows that are held out: both must be the same when a run resumes."""
    held_out = {HELD_OUT: {"sha256": report[HELD_OUT]["sha256"]}} if HELD_OUT in report else {}
    return {"files": report["files"]} | held_out


def _parent_rows(cfg: TrainConfig) -> Path | None:
    """The fingerprints of the rows that the parent was trained on, if it has them."""
    parent = find_parent(cfg)
    return parent.run.path / TRAINED_ROWS if parent and parent.run else None


def _manifest_facts(cfg: TrainConfig, base: Source, data: PreparedData) -> dict[str, Any]:
    parent = find_parent(cfg)
    return {
        "method": cfg.method,
        "task": cfg.task,
        **({"init_from": parent.facts} if parent else {}),
        "base_model": {"name": base.name, "revision": base.revision},
        "tokenization": data.chat.identity,
        "data": data.rows.version | _data_files(data.examples.report),
        "evaluation_data": _evaluation_data(cfg, data.examples.report.get(HELD_OUT))
        | ({"columns": reading} if (reading := data.rows.reading.identity) else {}),
        "seed": cfg.seed,
        "precision": data.dtype._asdict(),
        "processes": process_info().world_size,
        "code": environment.git_state(),
        "hardware": environment.hardware(cfg.cuda_visible_devices),
        "packages": environment.versions(),
    }
