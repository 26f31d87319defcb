"""The table of next commands: what a person does after a stage, by how it ended.

The functions read the files of a run, and import neither torch nor a package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import config
from .compose import GROUPS
from .errors import Inconclusive, NotPromoted, Stopped
from .outcome import Outcome
from .runs import FINISHED, Run, newest_finished
from .stages import STAGES
from .utils.commands import command
from .utils.files import read_json

STOPPED_CODES = {Stopped.exit_code, 130, 143}
OWN_HINT = {"resume", "eval_split"}  # settings that a next command replaces


class Ended(NamedTuple):
    """How a stage ended.

    Args:
        words: what was typed after the stage, without the flags of every command.
        facts: what the stage reported beyond its run: see outcome.report.
    """

    stage: str
    code: int
    words: tuple[str, ...]
    run: Run | None
    facts: Mapping[str, Any]


def next_line(outcome: Outcome, code: int, words: Sequence[str]) -> str:
    """What comes after `next: `: a command, or what to do and a command; empty where nothing follows."""
    run = Run(outcome.run) if outcome.run else None
    run = run if run and run.readable else None
    ended = Ended(outcome.stage, code, tuple(words), run, outcome.facts)
    if code in STOPPED_CODES:
        return _after_stopped_job(ended) if outcome.stage.startswith("ssh-") else _resume(ended)
    if fitting := ended.facts.get("fitting"):
        changed = {word.partition("=")[0] for word in fitting.split()}
        kept = [word for word in _same_words(ended, "train") if word.partition("=")[0] not in changed]
        return command("train", *kept, *fitting.split())
    if code and code not in {NotPromoted.exit_code, Inconclusive.exit_code}:
        return ""
    follows = NEXT.get(outcome.stage)
    if outcome.stage.startswith("ssh-"):
        follows = NEXT.get(outcome.stage, _after_stage_on_server)
    return follows(ended) if follows else ""


def _resume(ended: Ended) -> str:
    """The command that continues an interrupted stage: a training run by its id, the others as they were typed."""
    if ended.stage == "train" and ended.run and "sweep" not in ended.facts:
        return command("train", resume=ended.run.id, **_folders(ended))
    return command(ended.stage, *_same_words(ended, ended.stage))


def _train(ended: Ended) -> str:
    """After check-data and plan: training with the same settings."""
    return command("train", *_same_words(ended, "train"))


def _after_train(ended: Ended) -> str:
    if preset := ended.facts.get("best_preset"):
        return command("train", *_file_words(ended), f"experiment={preset}")
    return command("runs") if "sweep" in ended.facts else after_run(ended)


def after_run(ended: Ended) -> str:
    """What follows for a run, by its state: evaluation, comparison, publication, or what would decide."""
    run = ended.run
    if run is None or run.status != FINISHED:
        return ""
    comparison = _read(run.path / "comparison.json")
    if not _read(run.path / "metrics.json").get("eval"):
        return _evaluate(ended, run)
    if not comparison:
        return command("eval-baseline", **_folders(ended))
    verdict = comparison.get("verdict") or {}
    if decides := ended.facts.get("decides"):
        return str(decides)
    if not verdict:
        return f"set gate.metric and gate.split to what was evaluated, then {command('eval', run.id)}"
    if verdict.get("outcome") == "promoted":
        return command("publish", run.id, **_folders(ended))
    return _undecided(run, verdict)


def _evaluate(ended: Ended, run: Run) -> str:
    """Evaluate the run; without evaluation data, train with rows held out."""
    data = run.manifest.get("evaluation_data")
    if data is not None and not (data.get("path") or data.get("held_out")):
        words = [w for w in _same_words(ended, "train") if w.split("=", 1)[0] not in OWN_HINT]
        return command("train", *words, eval_split=0.1)
    return command("eval", run.id, **_folders(ended))


def _undecided(run: Run, verdict: Mapping[str, Any]) -> str:
    """What would decide: more examples, or other settings."""
    split, examples = verdict.get("split", "test"), verdict.get("examples")
    if verdict.get("outcome") == "cannot_tell":
        return f"evaluate more rows than the {examples} of the split {split}, then {command('eval', run.id)}"
    return f"read {_shown(run.path / 'report.html')}, train with other settings, and compare: {command('runs')}"


def _after_eval_baseline(ended: Ended) -> str:
    if decides := ended.facts.get("decides"):
        return str(decides)
    if ended.run:
        return after_run(ended)
    output_dir = ended.facts.get("output_dir") or "outputs"
    try:
        run = newest_finished(output_dir)
    except Exception:  # no run, or one that cannot be read: the hint is not worth an error
        return command("train", *_same_words(ended, "train"))
    return command("eval", run.id, *_same_words(ended, "eval"))


def _after_publish(ended: Ended) -> str:
    if not ended.code:
        where = ended.facts.get("published", "")
        return f"use the model: {_shown(where)}/README.md shows how" if where else ""
    if ended.run is None:
        return ""
    verdict = _read(ended.run.path / "comparison.json").get("verdict") or {}
    if verdict and verdict.get("outcome") != "promoted":
        return _undecided(ended.run, verdict)
    return command("validate", ended.run.id, **_folders(ended))  # a health check failed


def _after_validate(ended: Ended) -> str:
    return after_run(ended) if not ended.code else ""


def _after_data_push(ended: Ended) -> str:
    commit = ended.facts.get("commit")
    words = [word for word in ended.words if word.startswith("data_source.") and "branch=" not in word]
    return command("check-data", *words, *([f"data_source.commit={commit}"] if commit else []))


# On a server


def _after_setup(ended: Ended) -> str:
    return command("ssh-train")


def _after_stage_on_server(ended: Ended) -> str:
    """After a job has ended, or was started in the background. Its fact `stage` is that of the job."""
    job, stage = ended.facts.get("job"), str(ended.facts.get("stage") or ended.stage.removeprefix("ssh-"))
    if job is None:
        return ""
    if ended.facts.get("detached"):
        return command("ssh-attach", job)
    if stage in {"check-data", "plan"}:
        return command("ssh-train", *_same_words(ended._replace(stage=stage), "train"))
    return command("ssh-fetch", ended.facts.get("remote_run") or job)


def _after_stopped_job(ended: Ended) -> str:
    """After a job has stopped with a checkpoint, or the person has stopped following it (exit code 130)."""
    job, stage = ended.facts.get("job"), ended.facts.get("stage")
    if job is None:
        return ""
    if ended.facts.get("running"):
        return command("ssh-attach", job)
    if stage is None:
        return ""
    return command(f"ssh-{stage}", *([f"resume={ended.facts['remote_run']}"] if stage == "train" else []))


NEXT: dict[str, Callable[[Ended], str]] = {
    "check-data": _train,
    "plan": _train,
    "train": _after_train,
    "data-push": _after_data_push,
    "eval": after_run,
    "eval-baseline": _after_eval_baseline,
    "compare": after_run,
    "report": after_run,
    "validate": _after_validate,
    "publish": _after_publish,
    "publish-hf": _after_publish,
    "push": _after_setup,
    "ssh-init": _after_setup,
    "ssh-fetch": after_run,
    "ssh-stop": _after_stopped_job,
}


# The words of a command


def _same_words(ended: Ended, stage: str) -> list[str]:
    """The typed words that another stage accepts: its settings, presets, and the configuration file it shares."""
    known = set(config.flat_keys(config.schema_of(stage)))
    words = _file_words(ended) if STAGES[ended.stage].config_name == STAGES[stage].config_name else []
    positionals = list(STAGES[ended.stage].positionals)
    left = iter(_without_file(ended.words))
    for word in left:
        key = word.lstrip("+~").partition("=")[0]
        is_positional = positionals and "=" not in word and not word.startswith(("-", "~"))
        if is_positional:
            positionals.pop(0)
            words += [word] if stage == ended.stage else []
        elif word.startswith("-"):
            words += [word] if stage == ended.stage or word in {"--multirun", "-m"} else []
        elif key in known or key.split(".")[0] in known or key in GROUPS or key.startswith("hydra"):
            words.append(word)
    return words


def _file_words(ended: Ended) -> list[str]:
    """`--config-name NAME`, unless it is the stage's own file."""
    words = list(ended.words)
    for flag in ("--config-name", "-cn"):
        if flag in words[:-1]:
            name = words[words.index(flag) + 1]
            return ["--config-name", name] if name != STAGES[ended.stage].config_name else []
    inline = [word.split("=", 1)[1] for word in words if word.startswith(("--config-name=", "-cn="))]
    return ["--config-name", inline[0]] if inline and inline[0] != STAGES[ended.stage].config_name else []


def _without_file(words: Sequence[str]) -> list[str]:
    kept, left = [], iter(words)
    for word in left:
        if word in {"--config-name", "-cn"}:
            next(left, None)
        elif not word.startswith(("--config-name=", "-cn=")):
            kept.append(word)
    return kept


def _folders(ended: Ended) -> dict[str, str]:
    """`output_dir` and `artifacts_dir` as they were typed: later stages look there."""
    pairs = (word.lstrip("+").partition("=") for word in ended.words)
    return {key: value for key, _, value in pairs if key in {"output_dir", "artifacts_dir"}}


def _shown(path: Path | str) -> str:
    """A path below the working directory without it; URLs stay."""
    found = Path(path)
    below = found.is_absolute() and found.resolve().is_relative_to(Path.cwd())
    return str(found.resolve().relative_to(Path.cwd())) if below else str(path)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return dict(read_json(path)) if path.is_file() else {}
    except Exception:  # a corrupt file must not hide how the stage ended
        return {}
