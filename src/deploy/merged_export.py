"""Merges an adapter into its base model, and measures how closely the merged model reproduces the adapter's."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ModelError
from ..eval import reevaluate
from ..eval.merge_check import Measurement, mean_kl, measure
from ..model import load, methods, stop_tokens, tasks
from ..model.source import LoadArgs, locate_tuned
from ..runs import Run
from ..schema import GateArgs
from ..utils import environment
from ..utils.logs import log
from ..utils.units import count

MAX_EXAMPLES = 32  # of the gate's split, on which both models are compared


class Limits(NamedTuple):
    """How far a merged model may be from the adapter: mean KL in nats per token, drop in the metric's units."""

    max_kl: float
    max_drop: float


class MergeResult(NamedTuple):
    """A merged model against the adapter. `kl` in nats per token, `drop` and `score` in the metric's units."""

    into: str
    kl: float
    drop: float
    score: float
    positions: int


def write_merged(run: Run, gate: GateArgs, load_args: LoadArgs, limits: Limits, folder: Path) -> dict[str, Any]:
    """Write the merged model into `folder`, in the precision that the run computed in.

    An adapter that was trained over 4-bit weights is merged twice: into the base model's own weights, and into
    the dequantised 4-bit weights. The merge with the smaller KL divergence from the adapter is kept.
    Returns: facts for the manifest and the card.
    Raises: ModelError if the adapter cannot be merged, or a limit is exceeded.
    """
    comparison = _MergeComparison(run, gate, load_args)
    reference = comparison.reference()
    results: list[MergeResult] = []
    for into, model in comparison.candidates():
        result = comparison.compare(into, model, reference)
        log.info("merged into the %s: mean KL %.3g nats per token, %s", into, result.kl, comparison.change(result))
        if not results or result.kl < min(r.kl for r in results):
            _save(model, comparison.chat, folder)
        results.append(result)
        del model
        gc.collect()
    best = min(results, key=lambda r: r.kl)
    comparison.check(best, limits)
    return comparison.facts(best, results, reference)


class _MergeComparison:
    """One adapter, the examples that it is compared on, and its merged models."""

    def __init__(self, run: Run, gate: GateArgs, load_args: LoadArgs) -> None:
        self.run, self.load_args = run, load_args
        self.tuned = locate_tuned(run.model)
        self.task, self.labels = tasks.detect_task(self.tuned, None)
        self.four_bit = methods.METHODS[run.manifest["method"]].four_bit
        self.dtype = run.manifest["precision"]["value"]
        self.device = environment.choose_device(load_args.cuda_visible_devices).value
        evaluation = reevaluate.of_run(run, gate, self.labels)
        self.evaluation = evaluation._replace(rows=evaluation.rows[:MAX_EXAMPLES])
        self.chat = reevaluate.load_chat(run.model, self.task)

    def _base(self, *, four_bit: bool) -> Any:
        model, _ = load.load_base(
            self.tuned.base, self.dtype, self.device, four_bit=four_bit, task=self.task, labels=self.labels,
            trust_remote_code=self.load_args.trust_remote_code,
        )  # fmt: skip
        if self.labels:
            load.set_pad_token(model, self.chat.tokenizer)
        return model

    def reference(self) -> Measurement:
        """The outputs of the adapter over the base as it was trained on."""
        return measure(
            load.attach_adapter(self._base(four_bit=self.four_bit), self.tuned), self.chat, self.evaluation
        )

    def candidates(self) -> Iterator[tuple[str, Any]]:
        """`(weights that the adapter is merged into, merged model)`, one model in memory at a time."""
        yield (
            f"base model's {self.dtype} weights",
            methods.merge(load.attach_adapter(self._base(four_bit=False), self.tuned)),
        )
        if self.four_bit:
            base = self._base(four_bit=True).dequantize(load.DTYPES[self.dtype])
            yield "dequantised nf4 weights", methods.merge(load.attach_adapter(base, self.tuned))

    def compare(self, into: str, model: Any, reference: Measurement) -> MergeResult:
        merged = measure(model, self.chat, self.evaluation)
        # below 1e-7 it is rounding error, which may differ between runs
        kl = round(mean_kl(reference.logits, merged.logits), 7)
        return MergeResult(into, kl, reference.score - merged.score, merged.score, len(reference.logits))

    def change(self, result: MergeResult) -> str:
        """`rougeL -0.01 on 32 examples of test`"""
        where = f"{count(len(self.evaluation.rows), 'example')} of {self.evaluation.split}"
        return f"{self.evaluation.metric} {0.0 - result.drop:+.4g} on {where}"

    def check(self, result: MergeResult, limits: Limits) -> None:
        """Raises: ModelError if the merged model is further from the adapter than `limits`."""
        if result.kl <= limits.max_kl and result.drop <= limits.max_drop:
            return
        raise ModelError(
            f"run {self.run.id} is not published merged: the merged model differs from the adapter by a mean "
            f"KL of {result.kl:.3g} nats per token (export_max_kl={limits.max_kl:g}) and "
            f"{self.change(result)} (export_max_drop={limits.max_drop:g})",
            hint="set export=adapter, or raise the limit",
        )

    def facts(self, best: MergeResult, results: list[MergeResult], reference: Measurement) -> dict[str, Any]:
        """For the manifest and the model card: precision, KL divergence, scores, and every candidate."""
        return {
            "form": "merged",
            "precision": self.dtype,
            "merged_into": best.into,
            "mean_kl": best.kl,
            "positions": best.positions,
            "metric": self.evaluation.metric,
            "split": self.evaluation.split,
            "examples": len(self.evaluation.rows),
            "adapter_score": reference.score,
            "merged_score": best.score,
            "tried": [{"merged_into": r.into, "mean_kl": r.kl, "merged_score": r.score} for r in results],
        }


def _save(model: Any, chat: Any, folder: Path) -> None:
    """Write weights, configuration and tokenizer, replacing the weights of an earlier candidate."""
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    model.save_pretrained(folder)
    reevaluate.save_tokenizer(chat, folder)
    stop_tokens.save(model, chat.stop_token_ids, folder)
