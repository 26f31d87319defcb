"""Export of merged weights to an ONNX graph, whose logits onnxruntime and torch must agree on."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import onnx
import torch
import transformers
from onnxruntime import InferenceSession
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

from ..errors import ModelError
from ..eval import reevaluate
from ..model.source import locate_tuned
from ..model.tasks import CLASSIFIER, TASKS, detect_task
from ..runs import Run
from ..schema import GateArgs, Task
from ..utils.files import read_json

MODEL = "model.onnx"
TOLERANCE = 1e-3  # largest difference of a logit in fp32; tiny models differ by 2e-6
MIN_REPEATS, MAX_TRACED = 2, 64  # the first prompt is repeated, and cut to so many tokens, to trace the graph
MAX_PROMPTS = 4


def write_onnx(run: Run, gate: GateArgs, source: Path, folder: Path) -> dict[str, Any]:
    """Export the model in the folder `source` in fp32, and compare its logits on prompts of the run's evaluation.

    Returns: facts for the manifest and the card.
    Raises: ModelError if the model cannot be exported, or onnxruntime and torch compute different logits.
    """
    return export_graph(source, run.manifest["task"], _encode_prompts(run, gate, source), folder)


def export_graph(source: Path, task_name: Task, prompts: list[list[int]], folder: Path) -> dict[str, Any]:
    """As `write_onnx`, with the token ids of the `prompts` that are compared."""
    task = TASKS[task_name]
    model = getattr(transformers, task.auto_class).from_pretrained(source, dtype=torch.float32).eval()
    options = {"use_cache": False} if task.pipeline_tag != "text-classification" else {}
    try:
        with torch.no_grad(), _without_chatter():
            traced: Any = _inputs(model, torch.tensor([(prompts[0] * MIN_REPEATS)[:MAX_TRACED]] * 2)) | options
            exported = OnnxExporter().export(model, traced, config=OnnxConfig(dynamic=True))
    except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"this model cannot be exported to ONNX: {reason}", hint="set export=merged") from error
    exported.save_pretrained(str(folder))
    session = InferenceSession(str(folder / MODEL), providers=["CPUExecutionProvider"])
    difference = max(_largest_difference(model, session, ids, options) for ids in prompts)
    if difference > TOLERANCE:
        raise ModelError(
            f"the logits of onnxruntime and torch differ by {difference:.2g}, and the tolerance is {TOLERANCE:g}",
            hint="set export=merged",
        )  # fmt: skip
    return {
        "form": "onnx", "precision": "float32", "largest_logit_difference": difference, "prompts": len(prompts),
        "opset": _opset(folder / MODEL),
    }  # fmt: skip


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Neither the progress nor the warnings of the exporter, which concern its own code."""
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in ("torch.onnx", "transformers")}
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)


def _encode_prompts(run: Run, gate: GateArgs, source: Path) -> list[list[int]]:
    """The token ids of the first prompts of the gate's split."""
    task, labels = detect_task(locate_tuned(run.model), None)
    chat = reevaluate.load_chat(run.model, task)
    evaluation = reevaluate.of_run(run, gate, labels)
    first = evaluation._replace(rows=evaluation.rows[:MAX_PROMPTS])
    return reevaluate.prompt_ids(read_json(source / "config.json"), chat, first)


def _inputs(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The model's inputs for token ids of shape (batch, length)."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # a classifier makes the input of its decoder from its own input
    if model.config.is_encoder_decoder and not type(model).__name__.endswith(CLASSIFIER):
        inputs["decoder_input_ids"] = ids[:, : max(2, ids.shape[1] // 2)]
    return inputs


def _largest_difference(model: Any, session: InferenceSession, ids: list[int], options: dict[str, bool]) -> float:
    """The largest difference between the logits that torch and onnxruntime compute for one prompt."""
    inputs = _inputs(model, torch.tensor([ids]))
    with torch.no_grad():
        expected = model(**inputs, **options).logits
    names = {i.name for i in session.get_inputs()}
    (found,) = session.run(["logits"], {k: v.numpy() for k, v in inputs.items() if k in names})
    return float((expected - torch.from_numpy(found)).abs().max())


def _opset(path: Path) -> int:
    model = onnx.load(str(path), load_external_data=False)
    return max(o.version for o in model.opset_import if o.domain in {"", "ai.onnx"})
