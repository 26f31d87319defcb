"""The recipe of a training run, top to bottom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from src import runs
from src.config import DataArgs, TrainConfig, to_yaml
from src.data import checks, loader, sources
from src.errors import DataError, NotYetError
from src.model.source import Source, locate
from src.utils import environment
from src.utils.files import whole_folder, write_json
from src.utils.logs import log, log_to


def train(cfg: TrainConfig) -> int:
    """Fine-tune `cfg.model_name` on the training files; leave a run directory with the tuned model.

    All that can be refused is refused before the run directory is made, and most of it before torch is
    imported.
    """
    if "," in cfg.cuda_visible_devices:  # the Trainer would multiply the batch by them without a word
        raise NotYetError("training on several GPUs is not available in this version", hint="name one GPU")
    runs.check_writable(cfg.output_dir)
    data = sources.fetch(cfg)
    checks.refuse_evaluation_files(data.files, cfg.eval_path)
    rows, bad_rows = loader.read_rows(data.files, cfg)
    dev = _dev_rows(cfg)
    base = locate(cfg.model_name, cfg.model_revision)
    device = environment.choose_device(cfg.cuda_visible_devices)
    dtype = environment.choose_dtype(cfg.bf16, cfg.cuda_visible_devices)
    log.info("%d rows in %d files; base model %s", len(rows) + len(bad_rows), len(data.files), base.name)
    log.info("device %s; precision %s", device, dtype)

    from src.model import load, methods  # torch and its like start loading here
    from src.train.fit import arguments, fit

    tokenizer = load.load_tokenizer(base.location, cfg.model_revision, cfg.trust_remote_code)
    examples, unfit = loader.encode(rows, tokenizer, cfg.max_length)
    if not examples:
        told = [str(r) for r in unfit[: loader.MOST_SHOWN]]
        raise DataError(*told, hint="no row is left to train on; raise max_length")
    report = checks.report(data.files, examples, [*bad_rows, *unfit])
    _say_data(report)
    held_out, too_long = loader.encode(dev, tokenizer, cfg.max_length)
    for row in too_long:
        log.warning("left out of the evaluation loss: %s", row)

    load.seed_everything(cfg.seed)
    model, base = load.load_base(
        base, dtype.value, device.value,
        four_bit=methods.METHODS[cfg.method].four_bit, trust_remote_code=cfg.trust_remote_code,
    )  # fmt: skip
    load.seed_everything(cfg.seed)
    model = methods.apply(model, cfg, base, cfg.gradient_checkpointing)
    trainable, total = methods.trainable_parameters(model)
    log.info("%s: %s of %s parameters are trained (%.2f %%)", cfg.method, f"{trainable:,}", f"{total:,}",
             100 * trainable / total)  # fmt: skip

    arguments(cfg, dtype.value, len(examples), bool(held_out), Path("checkpoints"))  # refused here if at all
    run = runs.create(cfg.output_dir, "train", to_yaml(cfg), _facts(cfg, base, data, report, dtype))
    log_to(run.logs)
    log.info("run %s", run.path)
    with run.recorded():
        write_json(run.path / "data_report.json", report)
        figures = fit(model, tokenizer, examples, held_out, cfg, dtype.value, run)
        save(model, tokenizer, run.model)
        write_json(run.path / "metrics.json", {"train": figures})
    log.info("trained in %.0f s, loss %.4f; model in %s", figures["seconds"], figures["train_loss"], run.model)
    return 0


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the adapter or full weights with the tokenizer: the whole folder, or nothing of it."""
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        settings = temporary / "adapter_config.json"
        if settings.exists():  # peft lists sets in an order that changes from process to process
            found = json.loads(settings.read_text(encoding="utf-8"))
            found = {
                k: sorted(v) if k == "target_modules" and isinstance(v, list) else v for k, v in found.items()
            }
            write_json(settings, found)


def _dev_rows(cfg: TrainConfig) -> list[loader.Row]:
    """The dev split, for the evaluation loss; none where there is no such file."""
    path = Path(cfg.eval_path) / "dev.jsonl"
    if not path.is_file():
        log.warning("%s does not exist: no evaluation loss", path)
        return []
    return loader.read_rows([path], DataArgs(data_format="prompt_completion"))[0]


def _say_data(report: dict[str, Any]) -> None:
    tokens = report["tokens"]
    log.info(
        "%d rows in = %d trained + %d rejected; %s tokens, %s of them with loss",
        report["rows_in"], report["rows_trained"], len(report["rejected"]),
        f"{tokens['total']:,}", f"{tokens['with_loss']:,}",
    )  # fmt: skip
    for r in report["rejected"][: loader.MOST_SHOWN]:
        log.warning("rejected: %s:%s %s", r["file"], r["line"], r["detail"])
    if len(report["rejected"]) > loader.MOST_SHOWN:
        log.warning("... and %d more, all in data_report.json", len(report["rejected"]) - loader.MOST_SHOWN)


def _facts(
    cfg: TrainConfig, base: Source, data: sources.Pinned, report: dict[str, Any], dtype: environment.Reasoned
) -> dict[str, Any]:
    return {
        "method": cfg.method,
        "base_model": {"name": base.name, "revision": base.revision},
        "data": data.version | {"files": report["files"]},
        "seed": cfg.seed,
        "precision": dtype._asdict(),
        "code": environment.git_state(),
        "hardware": environment.hardware(cfg.cuda_visible_devices),
        "packages": environment.versions(),
    }
