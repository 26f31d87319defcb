"""The recipe of a training run, top to bottom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from src import runs
from src.config import TrainConfig, to_yaml
from src.data import prepare
from src.data.chat import IDENTITY, Chat
from src.model import tasks
from src.model.source import Source
from src.train import mirror, resume
from src.train.plan import planned, refuse, settled
from src.train.ready import made_ready, tuned_model
from src.utils import environment
from src.utils.files import whole_folder, write_json
from src.utils.logs import log, log_to

SETS = {"target_modules", "exclude_modules"}  # of peft's settings, what it holds as sets


def train(cfg: TrainConfig) -> int:
    """Fine-tune `cfg.model_name` on the training files; leave a run directory with the tuned model.

    All that can be refused is refused before the run directory is made, and most of it before torch is
    imported.
    """
    store = mirror.store_of(cfg)
    unfinished = resume.find(cfg, store)
    ready = made_ready(cfg)
    plan = planned(ready, cfg)
    refuse(plan, cfg)

    from src.train import checkpoint  # torch and its like are loaded by now
    from src.train.callbacks import RunRecorder
    from src.train.fit import Schedule, arguments, batches_of, fit

    data, _, _, dtype, examples, chat, held_out, _ = ready
    asked, cfg = cfg, settled(cfg, plan)
    schedule = Schedule.of(len(batches_of(examples, cfg)), cfg)
    model, base = tuned_model(ready, cfg, schedule.steps)
    arguments(cfg, dtype.value, schedule, bool(held_out), Path("checkpoints"))  # refused here if at all
    facts = _facts(cfg, base, data, chat, examples.report, dtype)
    run = resume.take_up(unfinished, facts, asked)
    run = run or runs.create(cfg.output_dir, "train", to_yaml(asked), facts | {"plan": plan and plan.as_dict()})
    log_to(run.logs)
    log.info("run %s", run.path)
    with mirror.mirrored(store, run) as copy, run.recorded():
        write_json(run.path / "data_report.json", examples.report)
        figures = fit(
            model, chat.tokenizer, examples, held_out, cfg, dtype.value, RunRecorder(run, mirror=copy),
            run.checkpoints, lambda row: data.store.place(examples.row_of(row)),
            checkpoint.newest(run.checkpoints, with_best=cfg.load_best_model_at_end),
        )  # fmt: skip
        save(model, chat, run.model)
        write_json(run.path / "metrics.json", {"train": figures})
    log.info("trained in %.0f s, loss %.4f; model in %s", figures["seconds"], figures["train_loss"], run.model)
    return 0


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
