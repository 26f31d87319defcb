"""ONNX: merged weights as a graph that onnxruntime computes, checked against torch on real prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import torch
import transformers
from onnxruntime import InferenceSession
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

from src.errors import ModelError
from src.eval import reevaluate
from src.model.source import locate_tuned
from src.model.tasks import TASKS, tuned_for
from src.runs import Run
from src.schema import GateArgs
from src.utils.files import read_json

MODEL = "model.onnx"
TOLERANCE = 1e-3  # of a logit in fp32; measured are 2e-6 on tiny models
LEAST, MOST = 2, 64  # tokens of a prompt with which the graph is traced
PROMPTS = 4


def write(run: Run, gate: GateArgs, source: Path, folder: Path) -> dict[str, Any]:
    """Export the model in the folder `source` in fp32, and compare its logits on questions that the run was asked.

    Returns: the facts for manifest and card.
    Raises: ModelError if onnxruntime computes other logits than torch, or the model cannot be exported.
    """
    prompts, task = _prompts(run, gate, source), TASKS[run.manifest["task"]]
    model = getattr(transformers, task.auto).from_pretrained(source, dtype=torch.float32).eval()
    cached = {"use_cache": False} if task.hub != "text-classification" else {}
    try:
        with torch.no_grad():
            traced: Any = _inputs(model, torch.tensor([(prompts[0] * LEAST)[:MOST]] * 2)) | cached
            made = OnnxExporter().export(model, traced, config=OnnxConfig(dynamic=True))
    except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
        said = " ".join(str(error).split())[:200]
        raise ModelError(f"this model cannot be exported to ONNX: {said}", hint="set export=merged") from error
    made.save_pretrained(str(folder))
    session = InferenceSession(str(folder / MODEL), providers=["CPUExecutionProvider"])
    furthest = max(_difference(model, session, ids, cached) for ids in prompts)
    if furthest > TOLERANCE:
        raise ModelError(
            f"onnxruntime computes other logits than torch: they differ by {furthest:.2g}, and {TOLERANCE:g} is "
            "allowed", hint="set export=merged",
        )  # fmt: skip
    return {
        "form": "onnx", "precision": "float32", "largest_logit_difference": furthest, "prompts": len(prompts),
        "opset": _opset(folder / MODEL),
    }  # fmt: skip


def _prompts(run: Run, gate: GateArgs, source: Path) -> list[list[int]]:
    """Token ids of questions of the run's evaluation."""
    task, labels = tuned_for(locate_tuned(run.model), None)
    chat = reevaluate.load_chat(run.model, task)
    asked = reevaluate.of_run(run, gate, labels)
    few = asked._replace(rows=asked.rows[:PROMPTS])
    return reevaluate.prompt_ids(read_json(source / "config.json"), chat, few)


def _inputs(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder and "decoder_input_ids" in model.forward.__code__.co_varnames:
        found["decoder_input_ids"] = ids[:, : max(2, ids.shape[1] // 2)]
    return found


def _difference(model: Any, session: InferenceSession, ids: list[int], cached: dict[str, bool]) -> float:
    """The largest difference between the logits that torch and onnxruntime compute for one prompt."""
    inputs = _inputs(model, torch.tensor([ids]))
    with torch.no_grad():
        expected = model(**inputs, **cached).logits
    takes = {i.name for i in session.get_inputs()}
    (found,) = session.run(["logits"], {k: v.numpy() for k, v in inputs.items() if k in takes})
    return float((expected - torch.from_numpy(found)).abs().max())


def _opset(path: Path) -> int:
    model = onnx.load(str(path), load_external_data=False)
    return max(o.version for o in model.opset_import if o.domain in {"", "ai.onnx"})
