"""The record of a sweep. It is rewritten after each trial, so that an interrupted sweep can be resumed.

outputs/sweeps/2026-01-15_10-30-45/
  trials.json   status, command, settings of the search, every trial with its objective, run and error
  trials.txt    the table that is printed at the end
  best.yaml     the best trial as a preset: make train experiment=outputs/sweeps/.../best.yaml
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from . import aliases, outcome, runs, search_space
from .errors import ConfigError, RunError, Stopped, UserError, did_you_mean
from .runs import FAILED, FINISHED, INTERRUPTED, RUNNING
from .schema import OutputArgs, SearchArgs
from .search_space import Dimension
from .stages import SWEEP_STAGE
from .utils.commands import command
from .utils.files import disk_errors, read_json, write_json, write_text
from .utils.references import dump, to_config
from .utils.secrets import redact, redact_secrets, to_references

TRIALS, TABLE, BEST = "trials.json", "trials.txt", "best.yaml"
STOPPED_CODES = {Stopped.exit_code, 130, 143}  # interrupted, not failed
PATH_KEYS = {"output_dir", "artifacts_dir", "cache_dir"}  # not a part of the best settings

Trial = dict[str, Any]


@dataclass(frozen=True)
class SweepPlan:
    """What is known of a sweep before its first trial.

    search: the settings of schema.SearchArgs.
    searching: a sampler draws the trials, one after the other, and needs the objective of each.
    num_trials: how many trials the sweep has.
    identity: hash that is equal for sweeps of the same command, whatever their number of trials.
    former_identity: that hash under the former names of settings.
    file: the flags that name the configuration file of the command, unless it is the stage's own.
    base: the settings of the command without the sweep.
    """

    output_dir: str
    search: Mapping[str, Any]
    searching: bool
    num_trials: int
    identity: str
    former_identity: str
    file: list[str]
    base: Mapping[str, Any]


def plan_sweep(
    values: Mapping[str, Any],
    base: Mapping[str, Any],
    overrides: list[str],
    search: SearchArgs,
    file: list[str],
) -> SweepPlan:
    """The plan of the sweep over `overrides`; all trials share the settings `values`."""
    _, dimensions = search_space.split(overrides)
    searching = any(text.startswith("hydra/sweeper=") for text in overrides)
    search_settings = asdict(search)
    shared = dict(values) | {"search": search_settings | {"trials": 0, "resume": True}}
    return SweepPlan(
        output_dir=str(values["output_dir"]),
        search=search_settings,
        searching=searching,
        num_trials=search.trials if searching else math.prod(len(d.options) for d in dimensions),
        identity=_identity(shared, dimensions, searching),
        former_identity=_identity(aliases.former_settings(shared), map(_former, dimensions), searching),
        file=file,
        base=base,
    )


def _identity(shared: Mapping[str, Any], dimensions: Iterable[Dimension], searching: bool) -> str:
    same = [shared, *sorted(map(str, dimensions)), searching]
    return hashlib.sha256(json.dumps(redact_secrets(same), sort_keys=True, default=str).encode()).hexdigest()


def _former(dimension: Dimension) -> Dimension:
    """The dimension under the former name of its setting."""
    (former,) = aliases.former_settings({dimension.name: None})
    return replace(dimension, key=dimension.key.replace(dimension.name, former))


class Sweep:
    """A running sweep. It resumes the newest unfinished sweep of the same command, or starts in a new folder.

    Raises: RunError if the folder cannot be written.
    """

    def __init__(self, plan: SweepPlan) -> None:
        self.plan = plan
        runs.check_writable(plan.output_dir)
        root = Path(plan.output_dir) / "sweeps"
        found = _unfinished(root, plan) if plan.search["resume"] else None
        self.folder = found or runs.new_folder(root)
        record = _read(self.folder / TRIALS) if found else {"trials": []}
        self.completed: list[Trial] = _done(record)
        self.submitted: list[Trial] = [t for t in record["trials"] if t.get("slurm") and t["status"] == RUNNING]
        self.trials: list[Trial] = []
        self.status = RUNNING
        if found:
            done = f"{len(self.completed)} of {plan.num_trials} trials are done"
            outcome.show(f"resuming {found}: {done}; search.resume=false starts a new sweep")
        self._save()

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def run_trial(
        self, number: int, settings: Mapping[str, str], output_dir: str, work: Callable[[], Any]
    ) -> float | None:
        """Call `work`, which makes a run in `output_dir`. Returns: the trial's objective; None if it failed.

        Settings that an earlier trial of this sweep has tried are not tried again.
        Raises: KeyboardInterrupt, SystemExit or Stopped, which end the sweep; ConfigError if a search finds no
        objective in the run.
        """
        if self.start_trial(number, settings):
            self._run_work(self.trials[-1], Path(output_dir) / "runs", work)
        return self.trials[-1]["objective"]

    def start_trial(self, number: int, settings: Mapping[str, str]) -> bool:
        """Register a trial. Returns: False if an earlier trial had the same settings.

        The entry of a trial that an earlier process submitted to a cluster has the key `slurm`.
        """
        trial: Trial = {"number": number, "settings": to_references(dict(settings)), "status": RUNNING,
                        "objective": None, "run": None, "error": None, "exit_code": 0}  # fmt: skip
        shown = " ".join(f"{k}={v}" for k, v in trial["settings"].items())
        known = next((t for t in self.trials + self.completed if t["settings"] == trial["settings"]), None)
        outcome.show(f"trial {number}: {shown}" + ("  (done before)" if known else ""))
        submitted = next((t for t in self.submitted if t["settings"] == trial["settings"]), {})
        self.trials.append(trial | (known or submitted) | {"number": number})
        self._save()
        return not known

    def trial(self, number: int) -> Trial:
        return next(t for t in self.trials if t["number"] == number)

    def annotate(self, number: int, **facts: Any) -> None:
        """Add facts to the record of a trial."""
        self.trial(number).update(facts)
        self._save()

    def finish_trial(self, number: int, code: int, reason: str, run: Path | None) -> float | None:
        """Record the end of a trial that ran in a job. Returns: its objective; None if it failed.

        Raises: ConfigError if a search finds no objective in the run.
        """
        trial = self.trial(number)
        if code in STOPPED_CODES:
            trial |= _failure(code, reason) | {"status": INTERRUPTED}
        else:
            trial |= {"status": FINISHED} if code == 0 else _failure(code, reason or f"exit code {code}")
        trial["run"] = os.path.relpath(run, self.folder) if run else None
        if trial["status"] == FINISHED:
            trial["objective"] = self._objective(trial)
        for same in (t for t in self.trials if t["settings"] == trial["settings"]):
            same |= trial | {"number": same["number"]}
        self._save()
        return trial["objective"]

    def _run_work(self, trial: Trial, root: Path, work: Callable[[], Any]) -> None:
        before = _manifest_times(root)
        try:
            code = work() or 0
            trial |= {"status": FINISHED} if code == 0 else _failure(code, f"exit code {code}")
        except (KeyboardInterrupt, SystemExit, Stopped) as error:
            reason = error.problems[0] if isinstance(error, Stopped) else "stopped by the user"
            trial |= {"status": INTERRUPTED, "error": reason}
            raise
        except UserError as error:
            trial |= _failure(error.exit_code, str(error).replace("\n", "; "))
        except Exception as error:  # such as out of memory: the other trials may succeed
            print(redact(traceback.format_exc()), file=sys.stderr, flush=True)
            trial |= _failure(1, f"{type(error).__name__}: {error}".replace("\n", " "))
        finally:
            touched = [
                runs.Run(root / name) for name, mtime in _manifest_times(root).items() if before.get(name) != mtime
            ]
            mine = [run for run in touched if run.readable and _is_ours(run.manifest["process"])]
            if mine:  # the run that it created or resumed
                trial["run"] = os.path.relpath(mine[-1].path, self.folder)
            self._save()
            gc.collect()  # free the trial's model before the next one is loaded
        if trial["status"] == FINISHED:
            trial["objective"] = self._objective(trial)
        self._save()

    def _objective(self, trial: Trial) -> float | None:
        """The value of `search.metric` in the run's metrics.json. If it is not finite, the trial failed: None."""
        name = str(self.plan.search["metric"])
        run = self._run(trial)
        figures = dict(_flat(read_json(run / "metrics.json"))) if run and (run / "metrics.json").exists() else {}
        found = [v for k, v in figures.items() if k == name or k.endswith(f".{name}")]
        if len(found) == 1 and math.isfinite(found[0]):
            return found[0]
        if len(found) == 1:
            trial |= _failure(2, f"{name} is {found[0]}")
        elif self.plan.searching:  # no later trial would have it, either
            short = [k.rsplit(".", 1)[-1] for k in figures]
            known = did_you_mean(name, short) or f"; the keys are: {', '.join(figures) or 'none'}"
            problem = f"search.metric={name} matches {len(found)} keys of the run's metrics.json{known}"
            trial |= _failure(2, problem)
            self._save()
            raise ConfigError(problem)
        return None

    def _run(self, trial: Trial) -> Path | None:
        return Path(os.path.normpath(self.folder / trial["run"])) if trial["run"] else None

    @property
    def best(self) -> Trial | None:
        """The trial with the best objective; the first of equals."""
        ranked = [t for t in self.trials if t["objective"] is not None]
        sign = 1 if self.plan.search["direction"] == "minimize" else -1
        return min(ranked, key=lambda t: sign * t["objective"], default=None)

    def _save(self) -> None:
        """Rewrite trials.json, with the trials of earlier processes that this one has not reached yet."""
        numbers = {t["number"] for t in self.trials}
        write_json(
            self.folder / TRIALS,
            {
                "status": self.status,
                "saved": runs.now(),
                "command": runs.command(),
                "process": runs.this_process(),
                "identity": self.plan.identity,
                "search": dict(self.plan.search),
                "wanted": self.plan.num_trials,
                "best": self.best and self.best["number"],
                "trials": self.trials + [t for t in self.completed + self.submitted if t["number"] not in numbers],
            },
        )

    def _close(self) -> None:
        """Print and write the table, and write the best trial as a preset."""
        complete = len(_done({"trials": self.trials})) >= self.plan.num_trials
        self.status = FINISHED if complete else INTERRUPTED
        self._save()
        best, preset = self.best, None
        verdict = f"no trial has the metric {self.plan.search['metric']}"
        if best:
            preset = self._preset(best)
            kept = self.plan.output_dir != OutputArgs.output_dir
            place = [f"output_dir={self.plan.output_dir}"] if kept else []
            again = command(SWEEP_STAGE, *self.plan.file, f"experiment={preset}", *place)
            verdict = f"best: {self._describe(best)}; train it again with\n  {again}"
        if not complete:
            verdict += "\nunfinished: run the command again to resume it"
        table, verdict = str(redact(self.table())), str(redact(verdict))
        with disk_errors(self.folder):
            write_text(self.folder / TABLE, f"{table}\n{verdict}\n")
        outcome.show(f"\n{table}")
        self._report(verdict, best if complete else None)

    def _report(self, verdict: str, best: Trial | None) -> None:
        """Report the end of the sweep. `best`: the best trial of a complete sweep."""
        record = {"sweep": str(self.folder), "status": self.status, "best": self.best, "trials": self.trials}
        facts = {"sweep": True, "best_run": best and str(self._run(best))}
        outcome.output.ends_elsewhere = outcome.FOLLOWED in os.environ  # not in the workers of a trial
        outcome.output.summary = outcome.Outcome("train", None, verdict, record, facts)

    def table(self) -> str:
        """One line a trial: number, objective, settings, run, status and error."""
        names = list(dict.fromkeys(k for t in self.trials for k in t["settings"]))
        rows = [["trial", str(self.plan.search["metric"]), *names, "run", "status"]]
        for t in self.trials:
            objective = "" if t["objective"] is None else f"{t['objective']:.6g}"
            mark = " *" if t is self.best else ""
            error = f": {t['error']}" if t["error"] else ""
            used = self._used(t)
            settings = [str(used.get(name, "")) for name in names]
            rows.append(
                [f"{t['number']}{mark}", objective, *settings, Path(t["run"] or "").name, t["status"] + error]
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([f"{self.folder}, {self.plan.search['direction']} {self.plan.search['metric']}", *lines])

    def _used(self, trial: Trial) -> dict[str, Any]:
        """The swept settings as the run's config_used.yaml has them; presets and trials without a run as drawn."""
        run, drawn = self._run(trial), trial["settings"]
        path = run and run / runs.CONFIG
        if not path or not path.is_file():
            return dict(drawn)
        recorded = dict(_leaves(runs.read_settings(path, "restore it")))
        differs = {k for k, v in drawn.items() if k in recorded and not _is_value(v, recorded[k])}
        return {k: recorded[k] if k in differs else v for k, v in drawn.items()}

    def _describe(self, trial: Trial) -> str:
        return f"trial {trial['number']}, {self.plan.search['metric']} {trial['objective']:.6g}"

    def _preset(self, best: Trial) -> Path:
        """Write the swept settings, and all others that differ from `plan.base`, as a preset."""
        run = self._run(best)
        assert run is not None
        used = OmegaConf.to_container(OmegaConf.load(run / "config_used.yaml"))
        assert isinstance(used, dict)
        used = aliases.current_settings({str(k): v for k, v in used.items()})
        base = to_config(self.plan.base)
        swept = {name.split(".")[0] for name in best["settings"]}
        found = {k: v for k, v in used.items() if k not in PATH_KEYS and (k in swept or base.get(k) != v)}
        path = self.folder / BEST
        comment = f"# the best of sweep {self.folder.name}: {self._describe(best)}"
        write_text(path, f"# @package _global_\n{comment}\n{dump(found)}")
        return path

    @property
    def exit_code(self) -> int:
        """The highest exit code of the trials; 0 for a search if at least one trial finished."""
        if self.plan.searching and any(t["status"] == FINISHED for t in self.trials):
            return 0
        return max((int(t["exit_code"]) for t in self.trials), default=0)


def _failure(code: int, error: str) -> Trial:
    return {"status": FAILED, "exit_code": code, "error": error}


def _unfinished(root: Path, plan: SweepPlan) -> Path | None:
    """The newest unfinished sweep of the same command that no process is running."""
    for path in sorted(root.glob(f"*/{TRIALS}"), reverse=True):
        try:
            record = read_json(path)
            same = record["identity"] in {plan.identity, plan.former_identity}
            if same and len(_done(record)) < plan.num_trials and runs.status_of(record) != RUNNING:
                return path.parent
        except (RunError, KeyError, TypeError):
            continue  # not a record of this version
    return None


def _read(path: Path) -> dict[str, Any]:
    """The record of a sweep, its settings under today's names."""
    record = read_json(path)
    trials = [trial | {"settings": aliases.current_settings(trial["settings"])} for trial in record["trials"]]
    return {**record, "trials": trials}


def _done(record: Mapping[str, Any]) -> list[Trial]:
    return [t for t in record["trials"] if t["status"] in {FINISHED, FAILED}]


def _is_ours(process: Mapping[str, Any]) -> bool:
    """Whether this process, or a worker that it launched, is the recorded one."""
    own = runs.this_process()
    launched = (process.get("launcher"), process["host"]) == (own["pid"], own["host"])
    return launched or process == own


def _manifest_times(root: Path) -> dict[str, int]:
    """The modification time of each run's manifest, in ns."""
    found = sorted(p for p in root.glob("*/manifest.json") if not p.parent.is_symlink())
    return {p.parent.name: p.stat().st_mtime_ns for p in found}


def _is_value(drawn: str, recorded: Any) -> bool:
    """Whether the text of an override, such as 1e-4, is a recorded value."""
    with suppress(ValueError):
        if isinstance(recorded, int | float) and not isinstance(recorded, bool):
            return float(drawn) == recorded
    value = yaml.safe_load(drawn) if isinstance(drawn, str) else drawn
    return bool(value == recorded or str(drawn) == str(recorded))


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `("train.eval_loss", 2.5)` for each value, at any depth."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield `("train.eval_loss", 2.5)` for each number, at any depth."""
    for key, value in _leaves(values):
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value
