"""What is measured can be measured: each bench finds in the house what it takes from it."""

import importlib
from pathlib import Path

import pytest

BENCHES = sorted(path.stem for path in (Path(__file__).parents[1] / "bench").glob("*.py"))


@pytest.mark.parametrize("name", BENCHES)
def test_a_bench_finds_what_it_takes_from_the_house(name: str) -> None:
    importlib.import_module(f"bench.{name}")
