"""The demo's data: reproducible, well-formed, and with nothing of the evaluation in training."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"


def _load_generator() -> Any:
    spec = importlib.util.spec_from_file_location("make_demo_data", ROOT / "scripts" / "make_demo_data.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


demo = _load_generator()
EVAL = [name for name in demo.COUNTS if name.startswith("eval/")]
TRAIN = [name for name in demo.COUNTS if not name.startswith("eval/")]


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def pairs(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The (request, formula) pairs of a row in any of the formats."""
    if "messages" in row:
        said = [message["content"] for message in row["messages"] if message["role"] != "system"]
        yield from zip(said[::2], said[1::2], strict=True)
    elif "prompt" in row:
        yield row["prompt"], row["completion"]
    else:
        yield " ".join(filter(None, (row["instruction"], row["input"]))), row["output"]


def all_pairs(names: list[str]) -> list[tuple[str, str]]:
    return [pair for name in names for row in rows(name) for pair in pairs(row)]


def test_generator_reproduces_the_committed_files(tmp_path: Path) -> None:
    for out in (tmp_path / "one", tmp_path / "two"):
        demo.main(["--seed", "7", "--out", str(out)])
    for name in [*demo.COUNTS, *demo.in_other_shapes(demo.build(7))]:
        first = (tmp_path / "one" / name).read_bytes()
        assert first == (tmp_path / "two" / name).read_bytes()
        assert first == (DATA / name).read_bytes(), f"{name}: run python scripts/make_demo_data.py"


def test_seed_changes_the_rows() -> None:
    assert demo.build(1) != demo.build(2)


@pytest.mark.parametrize("name", demo.COUNTS)
def test_counts(name: str) -> None:
    assert len(rows(name)) == demo.COUNTS[name]


@pytest.mark.parametrize("name", demo.COUNTS)
def test_every_formula_is_well_formed(name: str) -> None:
    for _, formula in all_pairs([name]):
        assert str(demo.parse(formula)) == formula


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("feed_rate", "single call"),
        ("", "too early"),
        ("FLOW(feed_rate, 7d)", "no function FLOW"),
        ("SLIDE(feed_rate, 7d)", "takes 3 arguments"),
        ("SLIDE(feed_rate, 7, BACK)", "7 is no span"),
        ("SLIDE(feed_rate, 07d, BACK)", "07d is no span"),
        ("SLIDE(feed_rate, 7d, back)", "back is no way"),
        ("SLIDE(Feed, 7d, BACK)", "Feed is no value"),
        ("SLIDE(feed_rate,7d, BACK)", "canonical"),
        ("SLIDE(feed_rate, 7d, BACK", "unclosed"),
        ("SLIDE(feed_rate 7d, BACK)", "separated"),
        ("SLIDE(feed_rate, 7d, BACK) SLIDE", "single call"),
        ("ALLOY(feed_rate, ALLOY(a, b, 5), 5)", "is no other"),
        ("ALLOY(feed_rate, air_flow, 100)", "100 is no percent"),
        ("FENCE(feed_rate, 9, 9, PIN)", "low must be below high"),
        ("FLAG(feed_rate, OVER, 1.50, 7d)", "1.50 is no level"),
    ],
)
def test_parse_says_what_is_wrong(formula: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        demo.parse(formula)


def test_evaluation_shares_no_request_and_no_formula_with_training() -> None:
    trained = all_pairs(TRAIN)
    requests = {demo.folded(request) for request, _ in trained}
    formulas = {formula for _, formula in trained}
    for request, formula in all_pairs(EVAL):
        assert demo.folded(request) not in requests
        assert formula not in formulas


def test_no_formula_occurs_twice() -> None:
    formulas = [formula for _, formula in all_pairs(list(demo.COUNTS))]
    assert len(formulas) == len(set(formulas))


def test_training_holds_one_and_two_functions_of_every_kind() -> None:
    calls = [demo.parse(formula) for _, formula in all_pairs(["ingot.jsonl"])]
    assert {call.depth for call in calls} == {1, 2}
    for name in demo.FUNCTIONS:
        assert sum(call.name == name for call in calls) >= 40


def test_only_the_adversarial_set_nests_the_unseen_pairs() -> None:
    others = [name for name in demo.COUNTS if "adversarial" not in name]
    seen = {pair for _, formula in all_pairs(others) for pair in demo.parse(formula).pairs()}
    assert not seen & demo.NEW_PAIRS
    adversarial = [demo.parse(formula) for _, formula in all_pairs(["eval/adversarial.jsonl"])]
    assert {pair for call in adversarial for pair in call.pairs()} >= demo.NEW_PAIRS
    assert max(call.depth for call in adversarial) == 3


def test_every_keyword_has_words_in_both_vocabularies() -> None:
    for kind, words in demo.KEYWORDS.items():
        assert words.keys() == demo.NEW_WORDS[kind].keys()
        spoken = [word for synonyms in words.values() for word in synonyms]
        assert len(spoken) == len(set(spoken)), f"{kind}: a word stands for two keywords"


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("name", demo.FUNCTIONS)
def test_a_request_says_everything_its_formula_holds(name: str, new: bool) -> None:
    rng = Random(0)
    for _ in range(50):
        phrase = demo.Drafter(rng, new=new).apply(name)
        assert "{" not in phrase.english
        call = demo.parse(phrase.formula)
        assert call.name == name
        for word in call.args:
            if word.islower() and not re.match(r"\d", word):
                assert word.replace("_", " ") in phrase.english


def test_readme_documents_every_function_and_file() -> None:
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"`([A-Z]+\([^`]*\))`", readme)
    assert {demo.parse(example).name for example in examples} == set(demo.FUNCTIONS)
    for name, function in demo.FUNCTIONS.items():
        assert f"| `{name}` | {', '.join(function.args)} |" in readme
    for name, count in demo.COUNTS.items():
        assert f"| `{name}` | {count} |" in readme
