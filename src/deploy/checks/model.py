"""Health checks of what a model answers, which is loaded for them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

from src.deploy.findings import PROMPTS, Subject
from src.model.source import locate_tuned
from src.model.tasks import tuned_for
from src.runs import Run
from src.utils import environment
from src.utils.files import read_json

NEAR = 0.01  # a label is chosen again if its probability is as near as this
ONE_IN = 8  # of the answers in 16 bits that may differ where kernels do
LOOPS = 4.0  # a text that zlib makes as many times shorter repeats itself
SHORT = 64  # characters of a text that is too short to tell


def reload(about: Subject) -> tuple[bool, str]:
    """Whether the saved model gives the answers that were scored.

    In float32, on the kind of device that the evaluation ran on, an answer does not depend on the others of its
    batch: the longest questions are asked, and every answer must be the same. In 16 bits it may: the first
    batches are asked whole, as they were, and one answer in eight may still differ, as other kernels round in
    other ways.
    """
    if not about.gate.verify_examples:
        return True, "gate.verify_examples=0: no answer was asked for again"
    assert about.run is not None
    from src.eval import reevaluate

    tuned = locate_tuned(about.model)
    task, labels = tuned_for(tuned, None)
    asked = reevaluate.of_run(about.run, about.gate, labels)
    result = read_json(about.run.path / "metrics.json")
    conditions, merged = result["conditions"], result["generated"].get("adapter_merged") == "yes"
    before = _predictions(about.run, asked.split)
    model, chat = reevaluate.load_model(about, tuned, task, labels, conditions["precision"], merged=merged)
    device = environment.choose_device(about.cuda_visible_devices).value
    alone = conditions["precision"] == "float32" and not asked.args.generation.get("do_sample")
    exact = alone and device == conditions["device"]
    prompts = reevaluate.prompt_ids(model.config.to_dict(), chat, asked)
    places = reevaluate.first_batches(prompts, 1 if exact else asked.batch_size, about.gate.verify_examples)
    now = reevaluate.predict(model, chat, asked._replace(rows=[asked.rows[i] for i in places]))
    others = [i for i, row in zip(places, now, strict=True) if not _same(row, before[i])]
    told = f"the saved model gives {len(places) - len(others)} of {len(places)} answers of {asked.split} again"
    return len(others) <= (0 if exact else len(places) // ONE_IN), told


def _predictions(run: Run, split: str) -> list[dict[str, Any]]:
    path = run.path / "evals" / f"{split}.predictions.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def _same(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    apart = abs(now.get("probability", 0.0) - before.get("probability", 0.0))
    return bool(now["prediction"] == before["prediction"] and apart <= NEAR)


def output(about: Subject) -> tuple[bool, str]:
    """Whether the saved model loads, and most of its answers say something."""
    from src.eval import reevaluate

    tuned = locate_tuned(about.model)
    task, labels = tuned_for(tuned, None)
    files = sorted((about.run.path / "evals").glob("*.predictions.jsonl")) if about.run else []
    texts = [row["prompt"] for f in files for row in map(json.loads, f.read_bytes().splitlines())] or PROMPTS
    dtype = environment.choose_dtype("auto", about.cuda_visible_devices).value
    precision = about.run.manifest["precision"]["value"] if about.run else dtype
    model, chat = reevaluate.load_model(about, tuned, task, labels, precision)
    asked = reevaluate.of_texts(texts[: about.questions], task, labels)
    said = [row["prediction"] for row in reevaluate.predict(model, chat, asked)]
    dull = [text for text in said if task != "classification" and says_nothing(text)]
    told = f"{len(said) - len(dull)} of {len(said)} answers say something, such as {said[0][:60]!r}"
    return len(dull) * 2 <= len(said), told


def says_nothing(text: str) -> bool:
    """Whether a text is empty, or repeats itself: looped texts compress far better than what is written."""
    if not text.strip():
        return True
    content = text.encode()
    return len(text) >= SHORT and len(content) / len(zlib.compress(content)) > LOOPS
