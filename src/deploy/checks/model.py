"""Health checks that load the model and generate from it. Each returns whether it passed and one sentence."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...eval import evaluations
from ...model.source import LoadArgs, locate_tuned
from ...model.tasks import detect_task
from ...runs import Run
from ...schema import GateArgs
from ...utils import environment

# For a model that was never evaluated.
PROMPTS = ("What can you do?", "Name three colours.", "Write one sentence about the sea.", "What is 2 + 2?")
PROBABILITY_TOLERANCE = 0.01  # a classifier reproduces a label if its probability differs by at most this
MAX_DIFFERING = 1 / 8  # of the predictions, where kernels round differently: 16 bits, or another device
REPETITIVE = 4.0  # a text that zlib compresses by more than this factor repeats itself
MIN_LENGTH = 64  # characters; a shorter text may compress well without repetition


def check_reload(run: Run | None, gate: GateArgs, load: LoadArgs) -> tuple[bool, str]:
    """Whether the saved model reproduces the predictions that were scored.

    In float32, on the kind of device that the evaluation used, a prediction does not depend on the other
    prompts of its batch: the longest prompts are evaluated alone, and every prediction must be equal. Otherwise
    predictions may depend on the batch: the evaluation's first batches are repeated, and one prediction in eight
    may differ.
    """
    if not gate.verify_examples:
        return True, "gate.verify_examples=0: no prediction was reproduced"
    assert run is not None
    from ...eval import reevaluate

    tuned = locate_tuned(run.model)
    task, labels = detect_task(tuned, None)
    evaluation = reevaluate.of_run(run, gate, labels)
    stored = evaluations.require(run)
    result = stored.result
    conditions, merged = result["conditions"], result["generated"].get("adapter_merged") == "yes"
    scored = _predictions(stored.predictions(evaluation.split))
    model, chat = reevaluate.load_model(
        load, tuned, task, labels, conditions["precision"], merged=merged, chat=evaluation.chat
    )
    device = environment.choose_device(load.cuda_visible_devices).value
    deterministic = conditions["precision"] == "float32" and not evaluation.args.generation.get("do_sample")
    exact = deterministic and device == conditions["device"]
    prompts = reevaluate.prompt_ids(model.config.to_dict(), chat, evaluation)
    chosen = reevaluate.first_batches(prompts, 1 if exact else evaluation.batch_size, gate.verify_examples)
    predictions = reevaluate.predict(model, chat, evaluation._replace(rows=[evaluation.rows[i] for i in chosen]))
    equal = sum(_equal(row, scored[i]) for i, row in zip(chosen, predictions, strict=True))
    allowed = 0 if exact else int(len(chosen) * MAX_DIFFERING)
    return len(chosen) - equal <= allowed, (
        f"the saved model reproduces {equal} of {len(chosen)} predictions on {evaluation.split}"
    )


def _predictions(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def _equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    difference = abs(a.get("probability", 0.0) - b.get("probability", 0.0))
    return bool(a["prediction"] == b["prediction"] and difference <= PROBABILITY_TOLERANCE)


def check_output(folder: Path, run: Run | None, num_prompts: int, load: LoadArgs) -> tuple[bool, str]:
    """Whether the saved model loads, and at least half of its generations are neither empty nor repetitive."""
    from ...eval import reevaluate

    tuned = locate_tuned(folder)
    task, labels = detect_task(tuned, None)
    texts = (reevaluate.prompts_of(run) if run else []) or PROMPTS
    dtype = environment.choose_dtype("auto", load.cuda_visible_devices).value
    precision = run.manifest["precision"]["value"] if run else dtype
    model, chat = reevaluate.load_model(load, tuned, task, labels, precision)
    evaluation = reevaluate.of_texts(texts[:num_prompts], task, labels, run)
    generations = [row["prediction"] for row in reevaluate.predict(model, chat, evaluation)]
    bad = sum(task != "classification" and is_degenerate(text) for text in generations)
    return bad * 2 <= len(generations), (
        f"{len(generations) - bad} of {len(generations)} generations are neither empty nor repetitive, "
        f"for example {generations[0][:60]!r}"
    )


def is_degenerate(text: str) -> bool:
    """Whether a text is empty, or repeats itself: a loop compresses far better than written text."""
    if not text.strip():
        return True
    content = text.encode()
    return len(text) >= MIN_LENGTH and len(content) / len(zlib.compress(content)) > REPETITIVE
