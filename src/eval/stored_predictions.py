"""The answers of a finished evaluation, scored by other metrics: a mended or added metric generates nothing.

They are reused if everything that they depend on is equal: the model, the requests, the decoding, the libraries.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..runs import Run
from ..utils.files import read_json
from . import evaluations
from .evaluations import fingerprint
from .inference import REFERENCES, EvalRequests
from .partial_results import PartialResults

ANSWERS = "answers"  # key of metrics.json: the hash of what the answers depend on
REQUEST = {"prompt", "reference", "calls"}
JUDGEMENT = {"scores", "statistics"}
Candidate = tuple[Path, Mapping[str, Any]]  # the folder of an evaluation, and its result


def of_run(run: Run) -> list[Candidate]:
    """The evaluations of a run, the newest first."""
    return [(found.folder, found.result) for found in evaluations.all_of(run)]


def of_base(folder: Path) -> list[Candidate]:
    """The cached evaluations of a base model. `folder`: that of one of them, which need not exist."""
    pattern = folder.name.rpartition("-")[0] + f"-*/{evaluations.METRICS}"
    return [(path.parent, read_json(path)) for path in sorted(folder.parent.glob(pattern))]


def reuse(
    file: PartialResults, candidates: Iterable[Candidate], identity: Mapping[str, Any],
    conditions: Mapping[str, Any], requests: EvalRequests,
) -> None:  # fmt: skip
    """Fill an empty file with the answers of an evaluation that differs in its metrics only.

    The same metrics are no reason to reuse answers: who evaluates again wants to see it again.
    """
    if any(part.rows for part in file.parts.values()):
        return
    for folder, result in candidates:
        same = result.get(ANSWERS) == fingerprint(identity)
        others = result.get("conditions", {}).get("metrics") != conditions["metrics"]
        if same and others and (found := _rows(folder, requests)):
            file.fill(found, folder)
            return


def _rows(folder: Path, requests: EvalRequests) -> dict[str, dict[int, dict[str, Any]]]:
    """The stored rows by part and index, without what is computed again; empty if a split is not complete."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for split, prompts in requests.prompts.items():
        path = folder / f"{split}.predictions.jsonl"
        rows = [json.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else []
        if len(rows) != len(prompts):
            return {}
        likelihoods = [{k: v for k, v in row.items() if k.startswith("reference_")} for row in rows]
        found[split] = {
            index: {k: v for k, v in row.items() if k not in REQUEST | JUDGEMENT | likelihoods[index].keys()}
            for index, row in enumerate(rows)
        }
        if split in requests.references and all(likelihoods):
            found[split + REFERENCES] = dict(enumerate(likelihoods))
    return found
