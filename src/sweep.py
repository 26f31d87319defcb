"""The record of a sweep: one entry a trial, rewritten after each, so that whatever ends it keeps what is done.

outputs/sweeps/2026-01-15_10-30-45/
  trials.json   status, command, settings of the search, every trial with its figure, run and error
  trials.txt    the table that is printed at the end
  best.yaml     the best trial as a preset: make train experiment=outputs/sweeps/.../best.yaml
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from src import aliases, runs, search_space
from src.errors import ConfigError, RunError, Stopped, UserError, did_you_mean
from src.runs import FAILED, FINISHED, INTERRUPTED, RUNNING
from src.schema import SearchArgs
from src.search_space import Dimension
from src.utils.files import disk_errors, read_json, write_json, write_text
from src.utils.secrets import redact

TRIALS, TABLE, BEST = "trials.json", "trials.txt", "best.yaml"
STOPPED = {Stopped.exit_code, 130, 143}  # of a trial that nothing is wrong with
PLACES = {"output_dir", "artifacts_dir", "cache_dir"}  # where a run writes is no part of what was found

Trial = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a sweep is before its first trial."""

    output_dir: str
    search: Mapping[str, Any]  # the settings of schema.SearchArgs
    searching: bool  # trials are drawn, one after the other, and each needs its figure
    wanted: int  # trials
    identity: str  # equal for sweeps of the same command, however many trials that asks for
    former_identity: str  # its value where settings still had their former names
    again: list[str]  # the command that a preset is added to
    base: Mapping[str, Any]  # the settings that this command has by itself


def plan(
    values: Mapping[str, Any], base: Mapping[str, Any], overrides: list[str], search: SearchArgs, again: list[str]
) -> Plan:
    """The plan of the sweep that `overrides` span, with `values` for what all of its trials share."""
    _, dimensions = search_space.split(overrides)
    searching = any(text.startswith("hydra/sweeper=") for text in overrides)
    own = asdict(search)
    shared = dict(values) | {"search": own | {"trials": 0, "resume": True}}
    return Plan(
        output_dir=str(values["output_dir"]),
        search=own,
        searching=searching,
        wanted=search.trials if searching else math.prod(len(d.options) for d in dimensions),
        identity=_identity(shared, dimensions, searching),
        former_identity=_identity(aliases.former_settings(shared), map(_former, dimensions), searching),
        again=again,
        base=base,
    )


def _identity(shared: Mapping[str, Any], dimensions: Iterable[Dimension], searching: bool) -> str:
    same = [shared, *sorted(map(str, dimensions)), searching]
    return hashlib.sha256(json.dumps(redact(same), sort_keys=True, default=str).encode()).hexdigest()


def _former(dimension: Dimension) -> Dimension:
    """The dimension under the former name of its setting."""
    (former,) = aliases.former_settings({dimension.name: None})
    return replace(dimension, key=dimension.key.replace(dimension.name, former))


class Sweep:
    """A sweep under way, in the folder of an unfinished one of the same command or in a new one.

    Raises: RunError if nothing can be written there.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        runs.check_writable(plan.output_dir)
        root = Path(plan.output_dir) / "sweeps"
        found = _unfinished(root, plan) if plan.search["resume"] else None
        self.folder = found or runs.new_folder(root)
        record = _read(self.folder / TRIALS) if found else {"trials": []}
        self.before: list[Trial] = _done(record)
        self.submitted: list[Trial] = [t for t in record["trials"] if t.get("slurm") and t["status"] == RUNNING]
        self.trials: list[Trial] = []
        self.status = RUNNING
        if found:
            print(f"going on with {found}: {len(self.before)} of {plan.wanted} trials are done; "
                  "search.resume=false starts anew", flush=True)  # fmt: skip
        self._save()

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def trial(
        self, number: int, settings: Mapping[str, str], output_dir: str, work: Callable[[], Any]
    ) -> float | None:
        """Do `work`, which makes a run in `output_dir`. Returns: the trial's figure; None if it failed.

        Settings that were tried before, in this sweep or in the one that it goes on with, are not tried again.
        Raises: KeyboardInterrupt, SystemExit or Stopped, which end the whole sweep; ConfigError if a search finds
        its figure in no run.
        """
        if self.begin(number, settings):
            self._try(self.trials[-1], Path(output_dir) / "runs", work)
        return self.trials[-1]["objective"]

    def begin(self, number: int, settings: Mapping[str, str]) -> bool:
        """Take up a trial. Returns: False if there is nothing to do, since the same was tried before.

        A trial that is a job of a cluster may have been submitted before, and is known by its `slurm` then.
        """
        trial: Trial = {"number": number, "settings": redact(dict(settings)), "status": RUNNING, "objective": None,
                        "run": None, "error": None, "exit_code": 0}  # fmt: skip
        shown = " ".join(f"{k}={v}" for k, v in trial["settings"].items())
        known = next((t for t in self.trials + self.before if t["settings"] == trial["settings"]), None)
        print(f"trial {number}: {shown}" + ("  (as before)" if known else ""), flush=True)
        under_way = next((t for t in self.submitted if t["settings"] == trial["settings"]), {})
        self.trials.append(trial | (known or under_way) | {"number": number})
        self._save()
        return not known

    def trial_of(self, number: int) -> Trial:
        return next(t for t in self.trials if t["number"] == number)

    def note(self, number: int, **facts: Any) -> None:
        """Keep more about a trial."""
        self.trial_of(number).update(facts)
        self._save()

    def end(self, number: int, code: int, reason: str, run: Path | None) -> float | None:
        """Close a trial that was done elsewhere. Returns: its figure; None if it failed.

        Raises: ConfigError if a search finds its figure in no run.
        """
        trial = self.trial_of(number)
        if code in STOPPED:
            trial |= _failure(code, reason) | {"status": INTERRUPTED}
        else:
            trial |= {"status": FINISHED} if code == 0 else _failure(code, reason or f"exit code {code}")
        trial["run"] = os.path.relpath(run, self.folder) if run else None
        if trial["status"] == FINISHED:
            trial["objective"] = self._figure(trial)
        for same in (t for t in self.trials if t["settings"] == trial["settings"]):
            same |= trial | {"number": same["number"]}
        self._save()
        return trial["objective"]

    def _try(self, trial: Trial, root: Path, work: Callable[[], Any]) -> None:
        older = _states(root)
        try:
            code = work() or 0
            trial |= {"status": FINISHED} if code == 0 else _failure(code, f"exit code {code}")
        except (KeyboardInterrupt, SystemExit, Stopped) as error:
            reason = error.problems[0] if isinstance(error, Stopped) else "stopped by the user"
            trial |= {"status": INTERRUPTED, "error": reason}
            raise
        except UserError as error:
            trial |= _failure(error.exit_code, str(error).replace("\n", "; "))
        except Exception as error:  # one trial out of memory is no reason to lose the others
            print(redact(traceback.format_exc()), file=sys.stderr, flush=True)
            trial |= _failure(1, f"{type(error).__name__}: {error}".replace("\n", " "))
        finally:
            touched = [runs.Run(root / name) for name, state in _states(root).items() if older.get(name) != state]
            mine = [run for run in touched if run.readable and run.manifest["process"] == runs.this_process()]
            if mine:  # a new run, or the interrupted one that it went on with
                trial["run"] = os.path.relpath(mine[-1].path, self.folder)
            self._save()
            gc.collect()  # the trial's model, before the next one is loaded
        if trial["status"] == FINISHED:
            trial["objective"] = self._figure(trial)
        self._save()

    def _figure(self, trial: Trial) -> float | None:
        """The figure by which trials are ranked, from the run's metrics.json."""
        name = str(self.plan.search["metric"])
        run = self._run(trial)
        figures = dict(_flat(read_json(run / "metrics.json"))) if run and (run / "metrics.json").exists() else {}
        found = [v for k, v in figures.items() if k == name or k.endswith(f".{name}")]
        if len(found) == 1 and math.isfinite(found[0]):
            return found[0]
        if len(found) == 1:
            trial |= _failure(2, f"{name} is {found[0]}")
        elif self.plan.searching:  # no later trial would have it either
            short = [k.rsplit(".", 1)[-1] for k in figures]
            known = did_you_mean(name, short) or f"; there are: {', '.join(figures) or 'none'}"
            problem = f"search.metric={name} is not one figure of a run's metrics.json{known}"
            trial |= _failure(2, problem)
            self._save()
            raise ConfigError(problem)
        return None

    def _run(self, trial: Trial) -> Path | None:
        return Path(os.path.normpath(self.folder / trial["run"])) if trial["run"] else None

    @property
    def best(self) -> Trial | None:
        """The trial with the best figure; of equals the first."""
        ranked = [t for t in self.trials if t["objective"] is not None]
        sign = 1 if self.plan.search["direction"] == "minimize" else -1
        return min(ranked, key=lambda t: sign * t["objective"], default=None)

    def _save(self) -> None:
        """Rewrite trials.json. What an earlier process did, and this one has not come to yet, stays in it."""
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
                "wanted": self.plan.wanted,
                "best": self.best and self.best["number"],
                "trials": self.trials + [t for t in self.before + self.submitted if t["number"] not in numbers],
            },
        )

    def _close(self) -> None:
        """Print the table and write it down; keep the best trial as a preset."""
        complete = len(_done({"trials": self.trials})) >= self.plan.wanted
        self.status = FINISHED if complete else INTERRUPTED
        self._save()
        text = self.table()
        if best := self.best:
            preset = self._preset(best)
            command = shlex.join([*self.plan.again, f"experiment={preset}"])
            text += f"\nbest: {self._about(best)}; again with\n  {command}"
        else:
            text += f"\nno trial has the figure {self.plan.search['metric']}"
        if not complete:
            text += "\nunfinished: the same command goes on with it"
        with disk_errors(self.folder):
            write_text(self.folder / TABLE, str(redact(text)) + "\n")
        print(f"\n{redact(text)}", flush=True)

    def table(self) -> str:
        """Every trial as text: number, figure, settings, run, status with what went wrong."""
        names = list(dict.fromkeys(k for t in self.trials for k in t["settings"]))
        rows = [["trial", str(self.plan.search["metric"]), *names, "run", "status"]]
        for t in self.trials:
            figure = "" if t["objective"] is None else f"{t['objective']:.6g}"
            mark = " *" if t is self.best else ""
            error = f": {t['error']}" if t["error"] else ""
            settings = [str(t["settings"].get(name, "")) for name in names]
            rows.append(
                [f"{t['number']}{mark}", figure, *settings, Path(t["run"] or "").name, t["status"] + error]
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([f"{self.folder}, {self.plan.search['direction']} {self.plan.search['metric']}", *lines])

    def _about(self, trial: Trial) -> str:
        return f"trial {trial['number']}, {self.plan.search['metric']} {trial['objective']:.6g}"

    def _preset(self, best: Trial) -> Path:
        """The settings that were swept, and all others that the plain command does not have, as a preset."""
        run = self._run(best)
        assert run is not None
        used = OmegaConf.to_container(OmegaConf.load(run / "config_used.yaml"))
        assert isinstance(used, dict)
        used = aliases.current_settings({str(k): v for k, v in used.items()})
        base = redact(self.plan.base)
        swept = {name.split(".")[0] for name in best["settings"]}
        found = {k: v for k, v in used.items() if k not in PLACES and (k in swept or base.get(k) != v)}
        path = self.folder / BEST
        about = f"# the best of sweep {self.folder.name}: {self._about(best)}"
        write_text(path, f"# @package _global_\n{about}\n{OmegaConf.to_yaml(OmegaConf.create(found))}")
        return path

    @property
    def exit_code(self) -> int:
        """The worst of the trials'; a search has done its work if one of them came to an end."""
        if self.plan.searching and any(t["status"] == FINISHED for t in self.trials):
            return 0
        return max((int(t["exit_code"]) for t in self.trials), default=0)


def _failure(code: int, error: str) -> Trial:
    return {"status": FAILED, "exit_code": code, "error": error}


def _unfinished(root: Path, plan: Plan) -> Path | None:
    """The newest sweep of the same command that lacks trials and that no process is at work on."""
    for path in sorted(root.glob(f"*/{TRIALS}"), reverse=True):
        try:
            record = read_json(path)
            same = record["identity"] in {plan.identity, plan.former_identity}
            if same and len(_done(record)) < plan.wanted and runs.status_of(record) != RUNNING:
                return path.parent
        except (RunError, KeyError, TypeError):
            continue  # no record that this version wrote
    return None


def _read(path: Path) -> dict[str, Any]:
    """The record of a sweep, its settings under today's names."""
    record = read_json(path)
    trials = [trial | {"settings": aliases.current_settings(trial["settings"])} for trial in record["trials"]]
    return {**record, "trials": trials}


def _done(record: Mapping[str, Any]) -> list[Trial]:
    return [t for t in record["trials"] if t["status"] in {FINISHED, FAILED}]


def _states(root: Path) -> dict[str, int]:
    """The runs that are there, each with the time of its last change of state."""
    found = sorted(p for p in root.glob("*/manifest.json") if not p.parent.is_symlink())
    return {p.parent.name: p.stat().st_mtime_ns for p in found}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """`("train.eval_loss", 2.5)` for each number, however deep."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + key, value
