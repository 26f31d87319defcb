"""Merging an adapter into its base model, and how far the merged weights answer as the adapter did."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel

from src.errors import ModelError
from src.eval import reevaluate
from src.eval.adapter_merge import Measurement, mean_kl, measure
from src.model import load, methods, tasks
from src.model.source import Tuned, locate_tuned
from src.runs import Run
from src.schema import PublishConfig
from src.utils import environment
from src.utils.logs import log

SAMPLE = 32  # questions that adapter and merged weights are both asked


class Figures(NamedTuple):
    """Merged weights against the adapter. `kl` in nats a token, `drop` in the metric's units."""

    into: str
    kl: float
    drop: float
    score: float
    positions: int


def write(run: Run, cfg: PublishConfig, folder: Path) -> dict[str, Any]:
    """Write the merged model into `folder`, in the precision that the run computed in.

    An adapter that was trained over 4-bit weights is merged into the base model's own weights, and into what the
    4-bit ones stand for; the merge whose answers are nearer to the adapter's is kept.
    Returns: the facts for manifest and card.
    Raises: ModelError if the adapter cannot be merged, or answers otherwise than before.
    """
    merge = _Merge(run, cfg)
    before = merge.reference()
    tried: list[Figures] = []
    for into, model in merge.candidates():
        found = merge.compared(into, model, before)
        log.info("merged into the %s: mean KL %.3g nats a token, %s", into, found.kl, merge.told(found))
        if not tried or found.kl < min(f.kl for f in tried):
            _save(model, merge.chat, folder)
        tried.append(found)
        del model
        gc.collect()
    best = min(tried, key=lambda f: f.kl)
    merge.refuse(best)
    return merge.facts(best, tried, before)


class _Merge:
    """One adapter, its questions, and the models that it becomes."""

    def __init__(self, run: Run, cfg: PublishConfig) -> None:
        self.run, self.cfg = run, cfg
        self.tuned: Tuned = locate_tuned(run.model)
        self.task, self.labels = tasks.tuned_for(self.tuned, None)
        self.four_bit = methods.METHODS[run.manifest["method"]].four_bit
        self.dtype = run.manifest["precision"]["value"]
        self.device = environment.choose_device(cfg.cuda_visible_devices).value
        asked = reevaluate.of_run(run, cfg.gate, self.labels)
        self.asked = asked._replace(rows=asked.rows[:SAMPLE])
        self.chat = reevaluate.load_chat(run.model, self.task)

    def _base(self, *, four_bit: bool) -> Any:
        model, _ = load.load_base(
            self.tuned.base, self.dtype, self.device, four_bit=four_bit, task=self.task, labels=self.labels,
            trust_remote_code=self.cfg.trust_remote_code,
        )  # fmt: skip
        if self.labels:
            load.pad_alike(model, self.chat.tokenizer)
        return model

    def _adapted(self, base: Any) -> Any:
        with warnings.catch_warnings():  # it takes AdaLoRA's ranks for LoRA's, and says that they were ignored
            warnings.filterwarnings("ignore", message="The following rank_pattern keys")
            return PeftModel.from_pretrained(base, str(self.tuned.folder), autocast_adapter_dtype=False)

    def reference(self) -> Measurement:
        """The adapter over the base as it was trained on."""
        return measure(self._adapted(self._base(four_bit=self.four_bit)), self.chat, self.asked)

    def candidates(self) -> Iterator[tuple[str, Any]]:
        """`(what it was merged into, merged model)`, one in memory at a time."""
        yield f"base model's {self.dtype} weights", methods.merge(self._adapted(self._base(four_bit=False)))
        if self.four_bit:
            base = self._base(four_bit=True).dequantize(load.DTYPES[self.dtype])
            yield "dequantised nf4 weights", methods.merge(self._adapted(base))

    def compared(self, into: str, model: Any, before: Measurement) -> Figures:
        after = measure(model, self.chat, self.asked)
        # below 1e-7 it is rounding, which may differ from one time to the next
        kl = round(mean_kl(before.logits, after.logits), 7)
        return Figures(into, kl, before.score - after.score, after.score, len(before.logits))

    def told(self, found: Figures) -> str:
        return (
            f"{self.asked.metric} {0.0 - found.drop:+.4g} on {len(self.asked.rows)} examples of {self.asked.split}"
        )

    def refuse(self, found: Figures) -> None:
        """Raises: ModelError if the merged weights are further from the adapter than the settings allow."""
        if found.kl <= self.cfg.export_max_kl and found.drop <= self.cfg.export_max_drop:
            return
        raise ModelError(
            f"run {self.run.id} is not published merged: its weights answer otherwise than the adapter, by a mean "
            f"KL of {found.kl:.3g} nats a token (export_max_kl={self.cfg.export_max_kl:g}) and "
            f"{self.told(found)} (export_max_drop={self.cfg.export_max_drop:g})",
            hint="set export=adapter, or allow more",
        )

    def facts(self, best: Figures, tried: list[Figures], before: Measurement) -> dict[str, Any]:
        return {
            "form": "merged",
            "precision": self.dtype,
            "merged_into": best.into,
            "mean_kl": best.kl,
            "positions": best.positions,
            "metric": self.asked.metric,
            "split": self.asked.split,
            "examples": len(self.asked.rows),
            "adapter_score": before.score,
            "merged_score": best.score,
            "tried": [
                {"merged_into": f.into, "mean_kl": f.kl, "merged_score": f.score} for f in tried
            ],
        }  # fmt: skip


def _save(model: Any, chat: Any, folder: Path) -> None:
    """Weights, settings and tokenizer, as transformers alone reads them; over what an earlier try has left."""
    for left in folder.glob("*.safetensors*"):
        left.unlink()
    model.save_pretrained(folder)
    reevaluate.save_tokenizer(chat, folder)
