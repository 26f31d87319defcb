"""validate: is what a training left whole, and does it work? A table, a report, and an exit code for a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from src import runs
from src.deploy.checks import VALIDATE, checked
from src.deploy.findings import Finding, Subject, as_rows
from src.errors import RunError
from src.model.profile import PROFILE, TRAINING_INFO
from src.runs import Run
from src.schema import ValidateConfig
from src.utils.files import write_json
from src.utils.logs import SafeConsole, log

REPORT = "validation_report.json"
FAILED = 3  # the exit code where a check did not pass


def validate(cfg: ValidateConfig) -> int:
    """Check a run, or the files that the settings name, and write the report beside them.

    Returns: 0 if every check passed, 3 if not.
    Raises: RunError if there is nothing to check.
    """
    about = subject(cfg)
    found = checked(about, VALIDATE)
    name = f"run {about.run.id}" if about.run else str(about.model)
    show(found, name)
    path = (about.run.path if about.run else (about.info or about.model / PROFILE).parent) / REPORT
    write_json(path, report(found, about, name))
    failed = [f for f in found if not f.ok]
    log.info("%d of %d checks passed; report in %s", len(found) - len(failed), len(found), path)
    return FAILED if failed else 0


def subject(cfg: ValidateConfig) -> Subject:
    """What the settings name: the model's folder, its run, and the two files, found beside it where not named.

    Raises: RunError if one that is named does not exist.
    """
    named = (cfg.training_info, cfg.profile_path)
    missing = [f"{path} does not exist" for path in named if path and not Path(path).is_file()]
    if missing:
        raise RunError(*missing, hint="give the files that a training has left")
    model, run = runs.find(cfg.model_path, cfg.output_dir)
    beside = run.path if run else model
    info = Path(cfg.training_info) if cfg.training_info else _there(beside / TRAINING_INFO)
    if info is None and run is None:
        raise RunError(f"{model} has no {TRAINING_INFO}", hint="name it with --training-info FILE, or give a run")
    return Subject(
        model, run, info if cfg.training_info or run is None else None,
        Path(cfg.profile_path) if cfg.profile_path else _there(beside / PROFILE),
        cuda_visible_devices=cfg.cuda_visible_devices, trust_remote_code=cfg.trust_remote_code,
        max_loss=cfg.max_loss, questions=cfg.num_prompts,
    )  # fmt: skip


def _there(path: Path) -> Path | None:
    return path if path.is_file() else None


def show(found: list[Finding], title: str) -> None:
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in ("check", "", "found"):
        table.add_column(column)
    for finding in found:
        table.add_row(finding.name, "[green]passed[/]" if finding.ok else "[red]failed[/]", finding.sentence)
    SafeConsole().print(table)


def report(found: list[Finding], about: Subject, name: str) -> dict[str, Any]:
    """What validation_report.json holds."""
    run: Run | None = about.run
    return {
        "subject": name,
        "run": run.id if run else None,
        "model_path": str(about.model),
        "validated": runs.now(),
        "passed": all(f.ok for f in found),
        "checks": as_rows(found),
    }
