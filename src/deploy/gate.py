"""The promotion gate, and the table CHECKS of health checks: the gate runs some of them, `validate` others.

The gate refuses to publish a model that does not beat its base beyond chance, or whose run fails a health check.

A check returns whether it passed and one sentence. To add a check, enter it in CHECKS and name it in GATE,
GATE_WITH_MODEL or VALIDATE. Only the checks of checks/model.py load the model and import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .. import learning, outcome
from ..errors import Inconclusive, NotPromoted, UserError
from ..eval.verdict import Verdict, judge
from ..model.source import LoadArgs
from ..runs import Run
from ..schema import GateArgs
from ..utils.files import read_json, write_json
from .checks import files
from .checks.model import PROMPTS, check_output, check_reload

RESULTS = "gate_checks.json"
MAX_LOSS = 10.0  # nats per token: about the loss of a uniform guess among 22,000 tokens


class CheckResult(NamedTuple):
    """`sentence` is complete without the name of the check."""

    name: str
    passed: bool
    sentence: str


@dataclass(frozen=True)
class CheckTarget:
    """What is checked: a model folder, and the records of its training that exist.

    Args:
        run: the run that the model belongs to.
        training_info: the training_info.json to read instead of the run's log.
        profile: the aim_profile.json to check.
        num_prompts: how many prompts the check of the model's output generates from.
    """

    model: Path
    run: Run | None = None
    training_info: Path | None = None
    profile: Path | None = None
    gate: GateArgs = field(default_factory=GateArgs)
    max_loss: float = MAX_LOSS
    num_prompts: int = len(PROMPTS)
    load: LoadArgs = field(default_factory=LoadArgs)


CHECKS: dict[str, Callable[[CheckTarget], tuple[bool, str]]] = {
    "training loss": lambda t: files.check_loss(
        files.logged_losses(t.run, t.training_info), t.max_loss, learning.note(t.run.metrics) if t.run else []
    ),
    "model files": lambda t: files.check_model_files(t.model, files.recorded_hashes(t.model, t.run)),
    "checkpoints": lambda t: files.check_checkpoints(t.run),
    "data": lambda t: files.check_contamination(t.run),
    "secrets": lambda t: files.check_secrets(t.model),
    "profile": lambda t: files.check_profile(t.profile),
    "reload": lambda t: check_reload(t.run, t.gate, t.load),
    "model output": lambda t: check_output(t.model, t.run, t.num_prompts, t.load),
}
GATE = ("training loss", "model files", "checkpoints", "data", "secrets")
GATE_WITH_MODEL = ("reload",)
VALIDATE = ("training loss", "model files", "checkpoints", "profile", "model output")
LOADS_MODEL = {"reload", "model output"}


def run_checks(target: CheckTarget, names: Sequence[str]) -> list[CheckResult]:
    """Run the checks `names` in order.

    A check that raises a UserError has failed with its message. A model whose files are damaged is not loaded.
    """
    results: list[CheckResult] = []
    for name in names:
        if name in LOADS_MODEL and any(r.name == "model files" and not r.passed for r in results):
            results.append(CheckResult(name, False, "the model was not loaded because its files are damaged"))
            continue
        try:
            passed, sentence = CHECKS[name](target)
        except UserError as error:
            passed, sentence = False, "; ".join(error.problems)
        results.append(CheckResult(name, passed, sentence))
    return results


def to_rows(results: Sequence[CheckResult]) -> list[dict[str, Any]]:
    """The results as they are written to JSON files."""
    return [{"name": r.name, "passed": r.passed, "message": r.sentence} for r in results]


def save_results(run: Run, results: Sequence[CheckResult]) -> None:
    """Write the results of a publication into the run, where the model card reads them."""
    write_json(run.path / RESULTS, {"checks": to_rows(results)})


def overridden_failures(run: Run) -> list[str]:
    """The sentences of the checks that had failed when the run was published with force=true."""
    path = run.path / RESULTS
    return [c["message"] for c in read_json(path)["checks"] if not c["passed"]] if path.is_file() else []


def check_gate(
    run: Run, gate: GateArgs, force: bool, results: Sequence[CheckResult] = (), artifacts_dir: str | None = None
) -> Verdict:
    """Return the verdict on the run, if it and the check `results` allow publishing, or `force` overrides them.

    Raises: NotPromoted (exit code 3) or Inconclusive (4); RunError (2), even with `force`, if the run cannot be
    judged because it was not compared with its base.
    """
    verdict = judge(run, gate, artifacts_dir)
    outcome.report(judged={**verdict.facts, "outcome": verdict.outcome})
    reasons = [] if verdict.promoted else [f"not published: {verdict.sentence}"]
    if verdict.outcome == "cannot_tell" and all(r.passed for r in results) and not force:
        raise Inconclusive(*reasons, hint="evaluate more examples, or publish anyway with force=true")
    check_health(results, force, reasons)
    return verdict


def check_health(results: Sequence[CheckResult], force: bool, reasons: Sequence[str] = ()) -> None:
    """Raises: NotPromoted (exit code 3) with `reasons` and every failed check, unless `force` overrides them."""
    problems = [*reasons, *(f"not published: {r.sentence}" for r in results if not r.passed)]
    if problems and not force:
        raise NotPromoted(*problems, hint="publish anyway with force=true")
