"""validate: checks that what a training run wrote is complete and works. Prints a table and writes a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from .. import runs
from ..errors import RunError
from ..model.profile import PROFILE, TRAINING_INFO
from ..model.source import LoadArgs
from ..schema import ValidateConfig
from ..utils.files import write_json
from ..utils.logs import SafeConsole, log_verdict
from ..utils.units import count
from .gate import VALIDATE, CheckResult, CheckTarget, run_checks, to_rows

REPORT = "validation_report.json"
FAILED = 3  # the exit code if a check fails


def validate(cfg: ValidateConfig) -> int:
    """Check a run, or the files that the settings name, and write validation_report.json beside them.

    Returns: 0 if every check passed, else 3.
    Raises: RunError if there is nothing to check.
    """
    target = find_target(cfg)
    results = run_checks(target, VALIDATE)
    name = f"run {target.run.id}" if target.run else str(target.model)
    print_results(results, name)
    folder = target.run.path if target.run else (target.training_info or target.model / PROFILE).parent
    found = report(results, target, name)
    write_json(folder / REPORT, found)
    failed = [r for r in results if not r.passed]
    passed = f"{len(results) - len(failed)} of {count(len(results), 'check')} passed"
    log_verdict(
        f"{passed}; report in {folder / REPORT}", run=target.run.path if target.run else None, document=found
    )
    return FAILED if failed else 0


def find_target(cfg: ValidateConfig) -> CheckTarget:
    """The model folder and its run; the two JSON files are taken from beside it unless the settings name them.

    Raises: RunError if a named file does not exist, or a model without a run has no training_info.json.
    """
    named = (cfg.training_info, cfg.profile_path)
    missing = [f"{path} does not exist" for path in named if path and not Path(path).is_file()]
    if missing:
        raise RunError(*missing, hint="name files that a training run wrote")
    model, run = runs.find_model(cfg.model_path, cfg.output_dir)
    folder = run.path if run else model
    info = Path(cfg.training_info) if cfg.training_info else _if_file(folder / TRAINING_INFO)
    if info is None and run is None:
        raise RunError(f"{model} has no {TRAINING_INFO}", hint="name it with --training-info FILE, or name a run")
    return CheckTarget(
        model,
        run,
        training_info=info if cfg.training_info or run is None else None,
        profile=Path(cfg.profile_path) if cfg.profile_path else _if_file(folder / PROFILE),
        max_loss=cfg.max_loss,
        num_prompts=cfg.num_prompts,
        load=LoadArgs(cfg.cuda_visible_devices, cfg.trust_remote_code),
    )


def _if_file(path: Path) -> Path | None:
    return path if path.is_file() else None


def print_results(results: list[CheckResult], title: str) -> None:
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in ("check", "", "result"):
        table.add_column(column)
    for result in results:
        table.add_row(result.name, "[green]passed[/]" if result.passed else "[red]failed[/]", result.sentence)
    SafeConsole().print(table)


def report(results: list[CheckResult], target: CheckTarget, name: str) -> dict[str, Any]:
    """The content of validation_report.json."""
    return {
        "subject": name,
        "run": target.run.id if target.run else None,
        "model_path": str(target.model),
        "validated": runs.now(),
        "passed": all(r.passed for r in results),
        "checks": to_rows(results),
    }
