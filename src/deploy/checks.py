"""Health checks of a trained model: the table CHECKS. The gate asks some of them, `validate` others.

Each takes a Subject and says in one sentence what it found. Those of the end load the model; no other imports
torch. To add a check, enter it in CHECKS, and name it in GATE, GATE_LOADED or VALIDATE.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import yaml

from src.config import EvalConfig, GateArgs, PublishConfig
from src.deploy.secret_scan import scan
from src.errors import NotPromoted, RunError, UserError
from src.model import profile
from src.model.source import locate_tuned
from src.model.tasks import tuned_for
from src.runs import Run
from src.utils import environment
from src.utils.files import read_json, sha256, write_json
from src.utils.weights import problems as weight_problems

KEPT = "gate_checks.json"
COMPLETE = "COMPLETE"  # the marker of a checkpoint, with the hash of each of its files
MOST_LOSS = 10.0  # nats a token: near what guessing among 22,000 tokens would cost
PART = 5  # the first and the last fifth of the logged losses are compared
NEAR = 0.01  # a label is chosen again if its probability is as near as this
ONE_IN = 8  # of the answers in 16 bits that may differ where kernels do
LOOPS = 4.0  # a text that zlib makes as many times shorter repeats itself
SHORT = 64  # characters of a text that is too short to tell
SHOWN = 3
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


def require(run: Run, findings: Sequence[Finding], force: bool) -> None:
    """Refuse a run of which not all findings are well, unless `force` overrides them; keep them for the card.

    Raises: NotPromoted (exit code 3), which names all that are not.
    """
    failed = [f for f in findings if not f.ok]
    if failed and not force:
        told = (f"not published: {f.sentence}" for f in failed)
        raise NotPromoted(*told, hint="mend that, or publish anyway with force=true")
    write_json(run.path / KEPT, {"checks": as_rows(findings)})


def as_rows(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    return [{"name": f.name, "passed": f.ok, "message": f.sentence} for f in findings]


def failed(run: Run) -> list[str]:
    """The sentences of the checks that force=true overrode when the run was published."""
    path = run.path / KEPT
    return [c["message"] for c in read_json(path)["checks"] if not c["passed"]] if path.is_file() else []


# Without torch


def loss(about: Subject) -> tuple[bool, str]:
    """Whether the logged losses are finite, fell, and ended where a loss can end."""
    values = _losses(about)
    if not values:
        return False, "no training loss was logged"
    bad = next((step for step, value in values if not math.isfinite(value)), None)
    if bad is not None:
        return False, f"the training loss is not finite at step {bad}"
    part = max(1, len(values) // PART)
    first, last = (median(v for _, v in some) for some in (values[:part], values[-part:]))
    told = f"the training loss went from {first:.4g} to {last:.4g} in {values[-1][0]} steps"
    if not 0 <= last <= about.max_loss:
        return False, f"{told}, and should end between 0 and {about.max_loss:g}"
    if len(values) == 1:
        return True, f"the training loss is {last:.4g}; it was logged once, which shows no fall"
    return (True, told) if last < first else (False, f"{told}: it did not fall")


def _losses(about: Subject) -> list[tuple[int, float]]:
    """`(step, loss)`, of training_info.json where that is named, else of the run. Raises: RunError."""
    if about.info is None:
        return profile.losses(about.run) if about.run else []
    kept = read_json(about.info)
    try:
        logged = [(int(h["step"]), float(h["loss"])) for h in kept.get("log_history") or [] if "loss" in h]
        mean = kept.get("train_loss", kept.get("final_loss"))
        return logged or ([] if mean is None else [(int(kept.get("global_step") or 0), float(mean))])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise RunError(f"{about.info} is no training_info.json: its losses cannot be read") from None


def model_files(about: Subject) -> tuple[bool, str]:
    """Whether the files are those that were written, by hash, and the weights readable and finite."""
    recorded = _recorded(about)
    told = _differing(about.model, recorded)
    files = sorted(about.model.glob("*.safetensors"))
    if not files:
        told.append("there are no weights")
    told += [problem for file in files for problem in weight_problems(file)]
    if told:
        return False, f"the model is damaged: {_some(told)}"
    by = f"{len(recorded)} files are as they were written" if recorded else "no hashes of its files were recorded"
    return True, f"{by}, and all weights are finite"


def _recorded(about: Subject) -> Mapping[str, str]:
    """The hashes of the model's files: of its run's manifest, or of the manifest that it was published with."""
    if about.run is not None:
        return dict(about.run.manifest.get("model_files", {}))
    manifest = about.model / "manifest.json"
    return dict(read_json(manifest).get("sha256", {})) if manifest.is_file() else {}


def _differing(folder: Path, recorded: Mapping[str, str]) -> list[str]:
    return [
        f"{name} is missing" if not (folder / name).is_file() else f"{name} is not what was written"
        for name, digest in recorded.items()
        if not (folder / name).is_file() or sha256(folder / name) != digest
    ]


def checkpoints(about: Subject) -> tuple[bool, str]:
    """Whether each checkpoint that is kept has its marker, and the files of which that speaks."""
    folders = sorted(about.run.checkpoints.glob("checkpoint-*")) if about.run else []
    told: list[str] = []
    for folder in folders:
        marker = folder / COMPLETE
        found = _differing(folder, read_json(marker)["files"]) if marker.is_file() else [f"{COMPLETE} is missing"]
        told += [f"{folder.name}: {problem}" for problem in found]
    if told:
        return False, f"checkpoints are damaged: {_some(told)}"
    return True, f"{len(folders)} checkpoints are complete" if folders else "no checkpoints are kept"


def data(about: Subject) -> tuple[bool, str]:
    """Whether rows that occur in the evaluation files were kept out of the training."""
    assert about.run is not None
    found = read_json(about.run.path / "data_report.json").get("contamination")
    settings = yaml.safe_load((about.run.path / "config_used.yaml").read_text(encoding="utf-8"))
    if not found:
        return True, "the training rows were not compared with the evaluation files"
    counts = {kind: found[kind] for kind in ("exact", "normalised", "near") if found.get(kind)}
    if not counts:
        return True, f"no training row occurs in {len(found['files'])} evaluation files"
    told = f"{sum(counts.values())} training rows occur in the evaluation files"
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    if settings.get("on_contamination") == "keep":
        return False, f"{told} ({kinds}) and were trained on (on_contamination=keep): the scores tell nothing"
    return True, f"{told} ({kinds}) and were left out"


def secrets(about: Subject) -> tuple[bool, str]:
    """Whether any file of the model holds what looks like a credential."""
    found = scan(about.model)
    return (False, f"the model holds secrets: {_some(found)}") if found else (True, "no file holds a secret")


def profile_format(about: Subject) -> tuple[bool, str]:
    """Whether aim_profile.json is what serving platforms read."""
    if about.profile is None:
        return False, f"there is no {profile.PROFILE}"
    found = read_json(about.profile)
    told = profile.problems(found)
    if told:
        return False, f"{about.profile.name}: {_some(told)}"
    return True, f"{found['memory_gb']:g} GB in {found['precision']}, a partition of at least " + (
        f"{found['recommended_partition_gb']:g} GB"
    )


def _some(told: Sequence[str]) -> str:
    more = len(told) - SHOWN
    return "; ".join(told[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


# With the model loaded


def reload(about: Subject) -> tuple[bool, str]:
    """Whether the saved model gives the answers that were scored.

    In float32, on the kind of device that the evaluation ran on, an answer does not depend on the others of its
    batch: the longest questions are asked, and every answer must be the same. In 16 bits it may: the first
    batches are asked whole, as they were, and one answer in eight may still differ, as other kernels round in
    other ways.
    """
    if not about.gate.reload_examples:
        return True, "gate.reload_examples=0: no answer was asked for again"
    assert about.run is not None
    from src.eval import ask

    tuned = locate_tuned(about.model)
    task, labels = tuned_for(tuned, None)
    asked = ask.questions(about.run, about.gate, labels)
    result = read_json(about.run.path / "metrics.json")
    conditions, merged = result["conditions"], result["generated"].get("adapter_merged") == "yes"
    before = _predictions(about.run, asked.split)
    model, chat = ask.loaded(about, tuned, task, labels, conditions["precision"], merged=merged)
    device = environment.choose_device(about.cuda_visible_devices).value
    alone = conditions["precision"] == "float32" and not asked.cfg.generation.get("do_sample")
    exact = alone and device == conditions["device"]
    prompts = ask.prompts(model.config.to_dict(), chat, asked)
    places = ask.first_asked(prompts, 1 if exact else asked.batch, about.gate.reload_examples)
    now = ask.answers(model, chat, asked._replace(rows=[asked.rows[i] for i in places]))
    others = [i for i, row in zip(places, now, strict=True) if not _same(row, before[i])]
    told = f"the saved model gives {len(places) - len(others)} of {len(places)} answers of {asked.split} again"
    return len(others) <= (0 if exact else len(places) // ONE_IN), told


def _predictions(run: Run, split: str) -> list[dict[str, Any]]:
    path = run.path / "evals" / f"{split}.predictions.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def _same(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    apart = abs(now.get("probability", 0.0) - before.get("probability", 0.0))
    return bool(now["prediction"] == before["prediction"] and apart <= NEAR)


def output(about: Subject) -> tuple[bool, str]:
    """Whether the saved model loads, and most of its answers say something."""
    from src.eval import ask

    tuned = locate_tuned(about.model)
    task, labels = tuned_for(tuned, None)
    files = sorted((about.run.path / "evals").glob("*.predictions.jsonl")) if about.run else []
    texts = [row["prompt"] for f in files for row in map(json.loads, f.read_bytes().splitlines())] or PROMPTS
    dtype = environment.choose_dtype("auto", about.cuda_visible_devices).value
    precision = about.run.manifest["precision"]["value"] if about.run else dtype
    model, chat = ask.loaded(about, tuned, task, labels, precision)
    asked = ask.plain(texts[: about.questions], task, labels, EvalConfig())
    said = [row["prediction"] for row in ask.answers(model, chat, asked)]
    dull = [text for text in said if task != "classification" and says_nothing(text)]
    told = f"{len(said) - len(dull)} of {len(said)} answers say something, such as {said[0][:60]!r}"
    return len(dull) * 2 <= len(said), told


def says_nothing(text: str) -> bool:
    """Whether a text is empty, or repeats itself: looped texts compress far better than what is written."""
    if not text.strip():
        return True
    content = text.encode()
    return len(text) >= SHORT and len(content) / len(zlib.compress(content)) > LOOPS


CHECKS: dict[str, Callable[[Subject], tuple[bool, str]]] = {
    "training loss": loss,
    "model files": model_files,
    "checkpoints": checkpoints,
    "data": data,
    "secrets": secrets,
    "profile": profile_format,
    "reload": reload,
    "model output": output,
}
GATE = ("training loss", "model files", "checkpoints", "data", "secrets")
GATE_LOADED = ("reload",)
LOADED = {"reload", "model output"}
VALIDATE = ("training loss", "model files", "checkpoints", "profile", "model output")
