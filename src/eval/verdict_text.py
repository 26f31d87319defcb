"""The verdict in words, or why there is none and the command that gives one. A stage reports it last."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import outcome
from ..errors import UserError
from ..runs import Run
from ..utils.commands import command
from ..utils.units import count
from . import evaluations, inherit, verdict


def report(comparison: Mapping[str, Any] | None, run: Run, files: Mapping[str, Path] | None = None) -> None:
    """Report the verdict of a comparison (None: the base was not evaluated), or what gives one.

    Args: files: the evaluation files, by split.
    """
    outcome.report(verdict=text(comparison, run, files or {}))


def text(comparison: Mapping[str, Any] | None, run: Run, files: Mapping[str, Path]) -> str:
    if comparison is None:
        reason = "the base model was not evaluated under these conditions"
        return f"no verdict: {reason}; {command('eval-baseline')} does that and compares"
    judged = comparison["verdict"]
    if judged is None:
        return f"no verdict: {comparison['no_verdict']}"
    found, sentence = judged["outcome"], judged["sentence"]
    said = sentence if sentence.startswith(verdict.PREFIXES) else f"{found.replace('_', ' ')}: {sentence}"
    more = [_more_rows(comparison, run, files)] if found == "cannot_tell" else []
    return "\n".join([said, *judged.get("notes", []), *more])


def report_uncompared(output_dir: str, model_name: str) -> None:
    """Report that no run can be compared with the result of a base model, and the command that evaluates one."""
    run = inherit.run_of_base(model_name, output_dir)
    if run is None:
        made = command("train", model_name=model_name)
        outcome.report(verdict=f"no verdict: no run has the base model {model_name}; {made} makes one")
        return
    try:
        evaluated = evaluations.newest(run) is not None
    except UserError:
        evaluated = False
    how = "was evaluated under other conditions" if evaluated else "has not been evaluated"
    outcome.report(verdict=f"no verdict: run {run.id} {how}; {command('eval', run.id)} compares it with its base")


def _more_rows(comparison: Mapping[str, Any], run: Run, files: Mapping[str, Path]) -> str:
    """What makes an inconclusive evaluation conclusive."""
    split, gate = comparison["verdict"]["split"], comparison["verdict"]["gate"]
    again = command("eval", run.id)
    if comparison["conditions"].get("max_examples"):
        return f"more rows decide: {command('eval', run.id, max_examples='null')} evaluates all of {split}"
    examples = comparison["verdict"]["examples"]
    lacking = gate["min_examples"] - examples
    amount = f"at least {count(lacking, 'row')} more" if lacking > 0 else "more rows"
    file = files.get(split)
    if file is not None and file.is_relative_to(run.path):
        return f"{amount} of {split} decide: hold more out, as with {command('train', eval_split=2 * examples)}"
    return f"{amount} decide: add them to {file or f'the file of {split}'}, then {again}"
