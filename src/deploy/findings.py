"""What a health check is asked about, and what it found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from src.config import GateArgs
from src.runs import Run
from src.utils.files import read_json, write_json

KEPT = "gate_checks.json"
MOST_LOSS = 10.0  # nats a token: near what guessing among 22,000 tokens would cost
# Asked where a model was never evaluated.
PROMPTS = ("What can you do?", "Name three colours.", "Write one sentence about the sea.", "What is 2 + 2?")


class Finding(NamedTuple):
    """What a check found, in a sentence that stands by itself."""

    name: str
    ok: bool
    sentence: str


@dataclass(frozen=True)
class Subject:
    """What is checked: a model folder, and what else there is of its training.

    run: the run that it belongs to. info, profile: its training_info.json and aim_profile.json.
    questions: how many it is asked.
    """

    model: Path
    run: Run | None = None
    info: Path | None = None
    profile: Path | None = None
    gate: GateArgs = field(default_factory=GateArgs)
    cuda_visible_devices: str = ""
    trust_remote_code: bool = False
    max_loss: float = MOST_LOSS
    questions: int = len(PROMPTS)


def keep(run: Run, findings: Sequence[Finding]) -> None:
    """Write down what was found of a run that is published, for its card."""
    write_json(run.path / KEPT, {"checks": as_rows(findings)})


def as_rows(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    return [{"name": f.name, "passed": f.ok, "message": f.sentence} for f in findings]


def failed(run: Run) -> list[str]:
    """The sentences of the checks that force=true overrode when the run was published."""
    path = run.path / KEPT
    return [c["message"] for c in read_json(path)["checks"] if not c["passed"]] if path.is_file() else []
