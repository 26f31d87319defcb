"""The table of next commands: what a person does after a stage, by how it ended.

The functions read the files of a run, and import neither torch nor a package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import config
from .errors import Inconclusive, NotPromoted, Stopped
from .outcome import Outcome, Step
from .precedence import GROUPS
from .runs import FINISHED, Run, newest_finished
from .stages import STAGES
from .utils.commands import command
from .utils.files import read_json
from .utils.secrets import redact
from .utils.urls import REDACTED

STOPPED_CODES = {Stopped.exit_code, 130, 143}
OUTPUT_DIR = "outputs"
FOLDERS = {"output_dir", "artifacts_dir"}
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
    text = _next(outcome, code, words)
    return f"with the whole address where *** stands, {text}" if REDACTED in redact(text) else text


def _next(outcome: Outcome, code: int, words: Sequence[str]) -> str:
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
        return command("train", resume=_run_word(ended, ended.run), **_folders(ended, "train"))
    return command(ended.stage, *_same_words(ended, ended.stage))


def _train(ended: Ended) -> str:
    """After check-data and plan: training with the same settings."""
    return command("train", *_same_words(ended, "train"))


def _after_train(ended: Ended) -> str:
    if best := ended.facts.get("best_run"):
        return after_run(ended._replace(run=Run(Path(best))))
    return command("runs", **_folders(ended, "runs")) if "sweep" in ended.facts else after_run(ended)


def after_run(ended: Ended) -> str:
    """What follows for a run, by its state: evaluation, comparison, publication, or what would decide."""
    run = ended.run
    if run is None or run.status != FINISHED:
        return ""
    comparison = _read(run.path / "comparison.json")
    if not _read(run.path / "metrics.json").get("eval"):
        return _evaluate(ended, run)
    if not comparison:
        base = (run.manifest.get("base_model") or {}).get("name")  # not that of a run that is newer by now
        return command("eval-baseline", model_name=base, **_folders(ended, "eval-baseline"))
    verdict = comparison.get("verdict") or {}
    if decides := ended.facts.get("decides"):
        return _step(ended, decides)
    if not verdict:
        return _step(ended, Step("eval", before="set gate.metric and gate.split to what was evaluated"))
    if verdict.get("outcome") == "promoted":
        return _of_run(ended, "publish", run)
    return _undecided(ended, run, verdict)


def _evaluate(ended: Ended, run: Run) -> str:
    """Evaluate the run; without evaluation data, train with rows held out."""
    data = run.manifest.get("evaluation_data")
    if data is not None and not (data.get("path") or data.get("held_out")):
        return _train_again(ended, run, "eval_split=0.1")
    return _of_run(ended, "eval", run)


def _undecided(ended: Ended, run: Run, verdict: Mapping[str, Any]) -> str:
    """What would decide: more examples, or other settings."""
    split, examples = verdict.get("split", "test"), verdict.get("examples")
    if verdict.get("outcome") == "cannot_tell":
        return _step(ended, Step("eval", before=f"evaluate more rows than the {examples} of the split {split}"))
    runs = command("runs", **_folders(ended, "runs"))
    return f"read {_shown(run.path / 'report.html')}, train with other settings, and compare: {runs}"


def _step(ended: Ended, step: Step) -> str:
    """A step that a stage reported, as this person types it."""
    if step.stage == "train" or ended.run is None:
        text = _train_again(ended, ended.run, *step.words)
    else:
        text = _of_run(ended, step.stage, ended.run, *step.words)
    return f"{step.before}, then {text}" if step.before else text


def _of_run(ended: Ended, stage: str, run: Run, *words: str) -> str:
    """A stage that acts on a run."""
    return command(stage, _run_word(ended, run), *words, **_folders(ended, stage))


def _train_again(ended: Ended, run: Run | None, *words: str) -> str:
    """The training of a run with other `words`, by what was typed then, else by its record of settings."""
    if run is None:
        return command("train", *_same_words(ended, "train"), *words)
    replaced = {*OWN_HINT, *(word.partition("=")[0] for word in words)}
    typed = _typed_for(run) if ended.stage != "train" else ended.words
    if typed is None or any(word.startswith("resume=") for word in typed):
        return command("train", "--config-name", _shown(run.path / "config_used.yaml"), *words)
    same = _same_words(ended._replace(stage="train", words=tuple(typed)), "train")
    return command("train", *(word for word in same if word.partition("=")[0] not in replaced), *words)


def _typed_for(run: Run) -> list[str] | None:
    """The words after `train` that made a run; None if its manifest does not have them."""
    recorded = [*run.manifest.get("attempts", []), run.manifest][0].get("command")
    if not isinstance(recorded, list) or "train" not in recorded:
        return None
    return [str(word) for word in recorded[recorded.index("train") + 1 :]]


def _run_word(ended: Ended, run: Run) -> str:
    """A run by its id where the command finds it so, else by its directory."""
    output_dir = _folders(ended, "eval").get("output_dir", OUTPUT_DIR)
    found = run.path.parent.resolve() == Path(output_dir).expanduser().resolve() / "runs"
    return run.id if found else _shown(run.path)


def _after_eval_baseline(ended: Ended) -> str:
    if decides := ended.facts.get("decides"):
        return _step(ended, decides)
    if ended.run:
        return after_run(ended)
    output_dir = ended.facts.get("output_dir") or "outputs"
    try:
        run = newest_finished(output_dir)
    except Exception:  # no run, or one that cannot be read: the hint is not worth an error
        return command("train", *_same_words(ended, "train"))
    return command("eval", _run_word(ended, run), *_same_words(ended, "eval"))


def _after_publish(ended: Ended) -> str:
    if not ended.code:
        where = ended.facts.get("published", "")
        return f"use the model: {_shown(where)}/README.md shows how" if where else ""
    if ended.run is None:
        return ""
    verdict = ended.facts.get("judged") or _read(ended.run.path / "comparison.json").get("verdict") or {}
    if verdict and verdict.get("outcome") != "promoted":
        return _undecided(ended, ended.run, verdict)
    return _of_run(ended, "validate", ended.run)  # a health check failed


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
    left = iter(_split_config(ended.words)[1])
    for word in left:
        key = word.lstrip("+~").partition("=")[0]
        is_positional = positionals and "=" not in word and not word.startswith(("-", "~"))
        if is_positional:
            positionals.pop(0)
            words += [word] if stage == ended.stage else []
        elif word.startswith("-"):
            words += [word] if stage == ended.stage or word in {"--multirun", "-m"} else []
        elif {key, key.split(".")[0]} & {*known, *GROUPS} or key.startswith("hydra"):
            words.append(word)
    return words


CONFIG_FLAGS = {"--config-name": "--config-name", "-cn": "--config-name", "--config-path": "--config-path"}
CONFIG_FLAGS["-cp"] = "--config-path"


def _split_config(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The flags that choose the configuration file with their values, and the other words."""
    chosen: dict[str, str] = {}
    kept: list[str] = []
    left = iter(words)
    for word in left:
        flag, equals, value = word.partition("=")
        if flag in CONFIG_FLAGS:
            chosen[CONFIG_FLAGS[flag]] = value if equals else next(left, "")
        else:
            kept.append(word)
    return chosen, kept


def _file_words(ended: Ended) -> list[str]:
    """`--config-name NAME`, unless it is the stage's own file, and `--config-path FOLDER`."""
    chosen, _ = _split_config(ended.words)
    if "--config-path" not in chosen and chosen.get("--config-name") == STAGES[ended.stage].config_name:
        return []
    return [word for flag in sorted(chosen) for word in (flag, chosen[flag])]


def _folders(ended: Ended, stage: str) -> dict[str, str]:
    """`output_dir` and `artifacts_dir` as they were typed, if `stage` has them: it looks there."""
    known = FOLDERS & set(config.flat_keys(config.schema_of(stage))) if stage in STAGES else {"output_dir"}
    pairs = (word.lstrip("+").partition("=") for word in ended.words)
    return {key: value for key, _, value in pairs if key in known}


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
