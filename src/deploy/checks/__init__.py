"""Health checks of a trained model: the table CHECKS. The gate asks some of them, `validate` others.

Each takes a Subject and says in one sentence what it found. Those of model.py load the model; no other
imports torch. To add a check, enter it in CHECKS, and name it in GATE, GATE_LOADED or VALIDATE.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from src.deploy.checks import files, model
from src.deploy.findings import Finding, Subject
from src.errors import UserError
from src.runs import Run
from src.schema import GateArgs, PublishConfig

CHECKS: dict[str, Callable[[Subject], tuple[bool, str]]] = {
    "training loss": files.loss,
    "model files": files.model_files,
    "checkpoints": files.checkpoints,
    "data": files.data,
    "secrets": files.secrets,
    "profile": files.profile_format,
    "reload": model.reload,
    "model output": model.output,
}
GATE = ("training loss", "model files", "checkpoints", "data", "secrets")
GATE_LOADED = ("reload",)
LOADED = {"reload", "model output"}
VALIDATE = ("training loss", "model files", "checkpoints", "profile", "model output")


def run_checks(run: Run, gate: GateArgs) -> list[Finding]:
    """What the gate asks of a run's files, besides its scores. Imports no torch."""
    return checked(Subject(run.model, run, gate=gate), GATE)


def ask_again(run: Run, cfg: PublishConfig) -> list[Finding]:
    """What the gate asks of a run's model, which is loaded for it."""
    about = Subject(
        run.model, run, gate=cfg.gate, cuda_visible_devices=cfg.cuda_visible_devices,
        trust_remote_code=cfg.trust_remote_code,
    )  # fmt: skip
    return checked(about, GATE_LOADED)


def checked(about: Subject, names: Sequence[str]) -> list[Finding]:
    """The findings of the checks `names`; what a check cannot go on without is a finding too."""
    found: list[Finding] = []
    for name in names:
        if name in LOADED and any(f.name == "model files" and not f.ok for f in found):
            found.append(Finding(name, False, "the model was not loaded: its files are damaged"))
            continue
        try:
            ok, sentence = CHECKS[name](about)
        except UserError as error:
            ok, sentence = False, "; ".join(error.problems)
        found.append(Finding(name, ok, sentence))
    return found
