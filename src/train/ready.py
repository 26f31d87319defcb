"""What a training needs, made ready: its data, its tokens, its device; then its model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from src import runs
from src.config import TrainConfig
from src.data import checks, loader, prepare
from src.data.chat import Chat
from src.data.encode import Rules, encode
from src.data.formats import RowError
from src.data.rows import Example, Row
from src.data.show import show
from src.data.store import TokenStore
from src.errors import NotYetError
from src.model.source import Source, locate
from src.train import check
from src.utils import environment
from src.utils.environment import Reasoned
from src.utils.logs import log


class Ready(NamedTuple):
    """Everything but the model. `examples` are trained on, `held_out` are for the evaluation loss."""

    data: prepare.Data
    base: Source
    device: Reasoned
    dtype: Reasoned
    examples: TokenStore
    chat: Chat
    held_out: list[Example]


def made_ready(cfg: TrainConfig, device: Reasoned | None = None, dtype: Reasoned | None = None) -> Ready:
    """Refuse what can be refused, most of it before torch is imported; then tokenise the rows."""
    if "," in cfg.cuda_visible_devices:  # the Trainer would multiply the batch by them without a word
        raise NotYetError("training on several GPUs is not available in this version", hint="name one GPU")
    environment.give_memory_back()
    runs.check_writable(cfg.output_dir)
    data = prepare.read(cfg)
    prepare.refuse_bad_rows(data, cfg)
    dev = _dev_rows(cfg)
    base = locate(cfg.model_name, cfg.model_revision)
    device = device or environment.choose_device(cfg.cuda_visible_devices)
    dtype = dtype or environment.choose_dtype(cfg.bf16, cfg.cuda_visible_devices)
    log.info("%s usable rows in %d files; base model %s", f"{len(data.store):,}", len(data.store.files), base.name)
    log.info("device %s; precision %s", device, dtype)
    examples, chat = check.tokenised(data, base, cfg)  # transformers starts loading here
    show(examples, chat, cfg.max_length)
    checks.refuse_findings(examples.report, cfg)
    return Ready(data, base, device, dtype, examples, chat, _held_out(dev, chat, cfg.max_length))


def tuned_model(ready: Ready, cfg: TrainConfig) -> tuple[Any, Source]:
    """The base model with the tuning method applied, and its source with the revision resolved."""
    from src.model import load, methods  # torch and its like

    load.seed_everything(cfg.seed)
    model, base = load.load_base(
        ready.base, ready.dtype.value, ready.device.value,
        four_bit=methods.METHODS[cfg.method].four_bit, trust_remote_code=cfg.trust_remote_code,
    )  # fmt: skip
    load.seed_everything(cfg.seed)
    model = methods.apply(model, cfg, base, cfg.gradient_checkpointing is True)
    trainable, total = methods.trainable_parameters(model)
    log.info("%s: %s of %s parameters are trained (%.2f %%)", cfg.method, f"{trainable:,}", f"{total:,}",
             100 * trainable / total)  # fmt: skip
    return model, base


def _dev_rows(cfg: TrainConfig) -> list[Row]:
    """The dev split, for the evaluation loss; none where there is no such file."""
    path = Path(cfg.eval_path) / "dev.jsonl"
    if not path.is_file():
        log.warning("%s does not exist: no evaluation loss", path)
        return []
    return loader.read_rows(path, "prompt_completion")


def _held_out(rows: Sequence[Row], chat: Chat, max_length: int) -> list[Example]:
    """Rows for the evaluation loss; what does not fit is said."""
    found: list[Example] = []
    for row, encoded in zip(rows, encode(rows, chat, Rules(max_length)), strict=True):
        if isinstance(encoded, RowError):
            log.warning("left out of the evaluation loss: %s:%d %s", row.file, row.line, encoded.detail)
        else:
            found += encoded.examples
    return found
