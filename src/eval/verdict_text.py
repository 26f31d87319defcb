"""The verdict in words, or why there is none and the command that gives one. A stage reports it last."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import outcome
from ..errors import UserError
from ..runs import Run
from ..utils.files import read_json
from ..utils.units import count
from . import evaluations, inherit, verdict


def report(comparison: Mapping[str, Any] | None, run: Run, files: Mapping[str, Path] | None = None) -> None:
    """Report the verdict of a comparison (None: the base was not evaluated), and what gives one if there is none.

    Args: files: the evaluation files, by split.
    """
    if comparison is None:
        outcome.report(verdict="no verdict: the base model has not been evaluated under these conditions")
    elif comparison["verdict"] is None:
        why = comparison["no_verdict"]
        outcome.report(verdict=f"no verdict: {why['reason']}; {why['hint']}", decides=_with_settings(why["hint"]))
    else:
        found = comparison["verdict"]
        decides = _more_rows(comparison, run, files or {}) if found["outcome"] == "cannot_tell" else ""
        outcome.report(verdict="\n".join([sentence(found), *found.get("notes", [])]), decides=decides)


def sentence(found: Mapping[str, Any]) -> str:
    """The verdict's sentence, which begins with its outcome."""
    text: str = found["sentence"]
    return text if text.startswith(verdict.PREFIXES) else f"{found['outcome'].replace('_', ' ')}: {text}"


def report_uncompared(output_dir: str, model_name: str) -> None:
    """Report that no run can be compared with the result of a base model, and the command that evaluates one."""
    run = inherit.run_of_base(model_name, output_dir)
    if run is None:
        outcome.report(
            verdict=f"no verdict: no run has the base model {model_name}",
            decides=outcome.Step("train", (f"model_name={model_name}",)),
        )
        return
    try:
        evaluated = evaluations.newest(run) is not None
    except UserError:
        evaluated = False
    how = "was evaluated under other conditions" if evaluated else "has not been evaluated"
    outcome.report(verdict=f"no verdict: run {run.id} {how}", run=run.path, decides=outcome.Step("eval"))


def evaluation_text(run: Run) -> str:
    """The evaluation that a run is judged by: `its newest evaluation (test, 24 rows), not by 2 earlier ones`.

    Empty if the run was not compared with its base.
    """
    path = run.path / evaluations.COMPARISON
    if not path.is_file():
        return ""
    earlier = evaluations.all_of(run)[1:]
    rows: dict[str, int] = {}
    for row in read_json(path).get("rows", []):
        rows[row["split"]] = row.get("examples", 0)
    splits = "; ".join(f"{split}, {count(number, 'row')}" for split, number in rows.items())
    others = f", not by {count(len(earlier), 'earlier one')}" if earlier else ""
    return f"its newest evaluation ({splits}){others}"


def _with_settings(hint: str) -> outcome.Step:
    """The evaluation with the settings that a hint names, as a shell reads them."""
    words = re.findall(r"\bgate\.\w+=(?:'[^']*'|[^\s,;'])+", hint)
    return outcome.Step("eval", tuple(word for quoted in words for word in shlex.split(quoted)))


def _more_rows(comparison: Mapping[str, Any], run: Run, files: Mapping[str, Path]) -> outcome.Step:
    """What makes an inconclusive evaluation conclusive."""
    found = comparison["verdict"]
    split, examples = found["split"], found["examples"]
    if found.get("invalid"):
        return outcome.Step("train", ("on_contamination=reject",), "train without the evaluation rows")
    if comparison["conditions"].get("max_examples"):
        return outcome.Step("eval", ("max_examples=null",))
    file = files.get(split)
    if file is not None and file.is_relative_to(run.path):
        return outcome.Step(
            "train", (f"eval_split={2 * examples}",), f"hold out more than {count(examples, 'row')}"
        )
    lacking = found["gate"]["min_examples"] - examples
    amount = f"at least {count(lacking, 'row')}" if lacking > 0 else "rows"
    return outcome.Step("eval", before=f"add {amount} to {file or f'the file of the split {split}'}")
