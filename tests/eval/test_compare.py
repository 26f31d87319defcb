"""The comparison: difference by difference under the same conditions, or a refusal that says what differs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from src.errors import RunError
from src.eval.compare import baseline_folder, compare, fingerprint, record
from src.runs import Run

CONDITIONS = {
    "data": {"test": "sha-of-test", "dev": "sha-of-dev"},
    "max_examples": None,
    "chat_template": "sha-of-template",
    "decoding": {"max_new_tokens": 64, "seed": 42},
    "eval_batch_size": 32,
    "precision": "float32",
    "device": "cpu",
    "metrics": {"exact_match": "assay", "bleu": "sacrebleu"},
}
OTHERS: dict[str, Any] = {
    "data": {"test": "sha-of-another-test", "dev": "sha-of-dev"},
    "max_examples": 8,
    "chat_template": "sha-of-another-template",
    "decoding": {"max_new_tokens": 64, "seed": 42, "do_sample": True},
    "eval_batch_size": 16,
    "precision": "bfloat16",
    "device": "cuda",
    "metrics": {"exact_match": "assay", "bleu": "sacrebleu, newer"},
}


def result(test: float, dev: float, **conditions: Any) -> dict[str, Any]:
    return {
        "eval": {
            "test": {"exact_match": test, "bleu": 100 * test},
            "dev": {"exact_match": dev, "bleu": 100 * dev},
        },
        "metrics": {
            "exact_match": {"scale": "0-1", "implementation": "assay"},
            "bleu": {"scale": "0-100", "implementation": "sacrebleu"},
        },
        "conditions": copy.deepcopy(CONDITIONS) | conditions,
        "base_model": {"name": "models/x", "revision": "sha256:1"},
    }


def test_each_metric_of_each_split_is_compared() -> None:
    made = compare(result(0.75, 0.25), result(0.25, 0.5))
    rows = [tuple(row.values()) for row in made["rows"]]
    assert list(made["rows"][0]) == ["split", "metric", "base", "tuned", "difference", "scale"]
    assert rows == [
        ("test", "exact_match", 0.25, 0.75, 0.5, "0-1"),
        ("test", "bleu", 25.0, 75.0, 50.0, "0-100"),
        ("dev", "exact_match", 0.5, 0.25, -0.25, "0-1"),
        ("dev", "bleu", 50.0, 25.0, -25.0, "0-100"),
    ]
    assert made["conditions"] == CONDITIONS
    assert made["base_model"]["name"] == "models/x"


@pytest.mark.parametrize("name", CONDITIONS)
def test_under_another_condition_there_is_no_comparison_and_it_is_named(name: str) -> None:
    with pytest.raises(RunError, match=f"under different {name}; run make eval-baseline") as caught:
        compare(result(1, 1, **{name: OTHERS[name]}), result(0, 0))
    assert caught.value.exit_code == 2


def test_all_that_differs_is_named() -> None:
    with pytest.raises(RunError, match="under different device, max_examples, precision;"):
        compare(result(1, 1, device="cuda", precision="bfloat16", max_examples=8), result(0, 0))


def test_a_condition_that_only_one_of_them_knows_differs() -> None:
    with pytest.raises(RunError, match="under different temperature"):
        compare(result(1, 1), result(0, 0, temperature=1))


@pytest.mark.parametrize("name", CONDITIONS)
def test_each_condition_has_a_baseline_of_its_own(name: str) -> None:
    base = {"name": "models/x", "revision": "sha256:1"}
    other = CONDITIONS | {name: OTHERS[name]}
    assert fingerprint(other) != fingerprint(CONDITIONS)
    assert baseline_folder("a", base, other) != baseline_folder("a", base, CONDITIONS)


def test_the_order_of_the_conditions_does_not_matter() -> None:
    assert fingerprint(dict(reversed(CONDITIONS.items()))) == fingerprint(CONDITIONS)


def test_each_revision_of_the_base_has_a_baseline_of_its_own() -> None:
    folders = {
        baseline_folder("a", {"name": "org/x", "revision": r}, CONDITIONS) for r in ("sha256:1", "sha256:2", None)
    }
    assert len(folders) == 3
    assert all(f.parent == Path("a/metrics") and f.name.startswith("x-") for f in folders)


def test_a_comparison_is_kept_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(result(0.75, 0.25)))
    made = record(Run(tmp_path), result(0.25, 0.5))
    assert json.loads((tmp_path / "comparison.json").read_text()) == made
    lines = [line.split() for line in capsys.readouterr().out.replace("│", " ").splitlines()]
    assert ["test", "exact_match", "0-1", "0.250", "0.750", "+0.500"] in lines
    assert ["bleu", "0-100", "25.0", "75.0", "+50.0"] in lines
    assert ["dev", "exact_match", "0-1", "0.500", "0.250", "-0.250"] in lines
