"""Error rates of the gate: how often it promotes a model that is not better, and one with the reported gain.

    python bench/gate.py [--tries 1000] [--resamples 2000]

Each try draws two models that are alike (bench/simulated.py), judges them as `publish` does, and notes the
difference that the verdict says it would have seen. A second draw is of a model that is truly better by that.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.simulated import KINDS, improved  # noqa: E402
from src.eval import significance  # noqa: E402
from src.eval.significance import Comparison, PairedScores  # noqa: E402
from src.eval.verdict import MetricComparison, decide_outcome  # noqa: E402
from src.schema import GateArgs  # noqa: E402

EXAMPLES = (20, 60, 100, 500)
TOGETHER = 100  # pairs that share their draws of resamples


def judged(pairs: list[PairedScores], gate: GateArgs, seed: int) -> tuple[float, list[Comparison]]:
    """The share of `pairs` that is promoted, and what was found of each."""
    found: list[Comparison] = []
    for start in range(0, len(pairs), TOGETHER):
        found += significance.compare(
            pairs[start : start + TOGETHER],
            confidence=gate.confidence,
            resamples=gate.resamples,
            seed=seed + start,
        )
    outcomes = [decide_outcome(MetricComparison("", "", 3, 1, f), gate) for f in found]
    return outcomes.count("promoted") / len(found), found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tries", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=2000)
    asked = parser.parse_args()
    gate = GateArgs(resamples=asked.resamples)
    print(f"{asked.tries} tries each, {gate.resamples} resamples, confidence {gate.confidence}")
    print(f"{'metric':<12} {'examples':>8} {'alike, promoted':>16} {'told, median':>13} {'better, promoted':>17}")
    failed, began = False, time.monotonic()
    for kind in KINDS:
        for examples in EXAMPLES:
            draw = np.random.default_rng([examples, len(kind)])
            size, alike = judged([KINDS[kind](draw, examples) for _ in range(asked.tries)], gate, 1)
            told = [f.detectable for f in alike]
            power, _ = judged([improved(kind, draw, examples, d) for d in told], gate, 2)
            print(f"{kind:<12} {examples:>8} {size:>16.1%} {np.median(told):>13.3g} {power:>17.1%}", flush=True)
            failed |= size > 0.05 or power < 0.8
    kept = "FAILED" if failed else "kept"
    print(f"{kept}: at most 5 % of those alike, at least 80 % of those better; {time.monotonic() - began:.0f} s")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
