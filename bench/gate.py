"""Error rates of the gate: how often it promotes a model that is not better, and one with the reported gain.

    python bench/gate.py [--tries 1000] [--resamples 2000]

Each try draws two equal models (bench/simulated.py) and decides about them as `publish` does. A second draw has a
model that is better by the smallest difference that the first verdict could have detected.
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
PAIRS_PER_CALL = 100  # pairs that share their resamples


def promotion_rate(pairs: list[PairedScores], gate: GateArgs, seed: int) -> tuple[float, list[Comparison]]:
    """The share of `pairs` that is promoted, and the comparison of each."""
    found: list[Comparison] = []
    for start in range(0, len(pairs), PAIRS_PER_CALL):
        found += significance.compare(
            pairs[start : start + PAIRS_PER_CALL],
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
    args = parser.parse_args()
    gate = GateArgs(resamples=args.resamples)
    print(f"{args.tries} tries each, {gate.resamples} resamples, confidence {gate.confidence}")
    print(f"{'metric':<12} {'examples':>8} {'equal, promoted':>16} {'detectable':>13} {'better, promoted':>17}")
    failed, began = False, time.monotonic()
    for kind in KINDS:
        for examples in EXAMPLES:
            draw = np.random.default_rng([examples, len(kind)])
            size, equal = promotion_rate([KINDS[kind](draw, examples) for _ in range(args.tries)], gate, 1)
            detectable = [f.detectable for f in equal]
            power, _ = promotion_rate([improved(kind, draw, examples, d) for d in detectable], gate, 2)
            median = np.median(detectable)
            print(f"{kind:<12} {examples:>8} {size:>16.1%} {median:>13.3g} {power:>17.1%}", flush=True)
            failed |= size > 0.05 or power < 0.8
    result = "FAILED" if failed else "passed"
    print(f"{result}: at most 5 % of equal, at least 80 % of better models; {time.monotonic() - began:.0f} s")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
