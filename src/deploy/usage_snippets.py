"""How a published model is loaded and asked, as Python that stands in its card: by the form, and by the task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from src.model.profile import base_id, is_local
from src.model.tasks import TASKS

CHAT = """\
messages = [{{"role": "user", "content": {question}}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
"""
PLAIN = """\
inputs = tokenizer({question}, return_tensors="pt")
"""
GENERATED = """\
made = model.generate(**inputs, max_new_tokens=64, do_sample=False, eos_token_id=tokenizer.eos_token_id)
answer = tokenizer.decode(made[0{behind}], skip_special_tokens=True)
print(answer)
"""
CHOSEN = """\
chances = model(**inputs).logits.softmax(-1)[0]
answer = model.config.id2label[int(chances.argmax())]
print(answer, float(chances.max()))
"""
RUN = """\
session = InferenceSession(f"{folder}/model.onnx")
inputs = {name: value.numpy() for name, value in inputs.items()}
"""
ONNX_TEXT = """\
written = []
for _ in range(64):  # the most likely token, again and again
    logits = session.run(["logits"], inputs)[0]
    token = int(logits[0, -1].argmax())
    if token == tokenizer.eos_token_id:
        break
    written.append(token)
    inputs = {name: np.append(ids, [[token if name == "input_ids" else 1]], 1) for name, ids in inputs.items()}
answer = tokenizer.decode(written, skip_special_tokens=True)
print(answer)
"""
ONNX_PAIR = """\
start = AutoConfig.from_pretrained(folder).decoder_start_token_id
written = [start]
for _ in range(64):  # the most likely token, again and again
    logits = session.run(["logits"], inputs | {"decoder_input_ids": np.array([written])})[0]
    token = int(logits[0, -1].argmax())
    if token == tokenizer.eos_token_id:
        break
    written.append(token)
answer = tokenizer.decode(written[1:], skip_special_tokens=True)
print(answer)
"""
ONNX_LABEL = """\
logits = session.run(["logits"], inputs)[0]
answer = AutoConfig.from_pretrained(folder).id2label[int(logits[0].argmax())]
print(answer)
"""
ONNX = {"causal_lm": ONNX_TEXT, "seq2seq": ONNX_PAIR, "classification": ONNX_LABEL}
FOLDER = 'folder = "."  # the files of this repository, or its name on the Hub\n'
FILES = 'folder = "."  # the files of this repository\n'


def snippet(manifest: Mapping[str, Any], facts: Mapping[str, Any], question: str) -> str:
    """Markdown with a program that loads the model in the folder and prints its answer to `question`."""
    task = manifest.get("task", "causal_lm")
    asked = (CHAT if TASKS[task].templated else PLAIN).format(question=repr(question))
    if facts["form"] == "onnx":
        names = "AutoTokenizer" if task == "causal_lm" else "AutoConfig, AutoTokenizer"
        numpy = "" if task == "classification" else "import numpy as np\n"
        imports = f"{numpy}from onnxruntime import InferenceSession\nfrom transformers import {names}\n"
        program = f"{imports}\n{FILES}tokenizer = AutoTokenizer.from_pretrained(folder)\n{asked}{RUN}{ONNX[task]}"
        return _fenced(program, ["transformers", "torch", "onnxruntime"])
    adapter = facts["form"] == "adapter"
    load = _adapter(manifest, task) if adapter else _whole(task)
    behind = "" if task == "seq2seq" else ', inputs["input_ids"].shape[1]:'
    told = CHOSEN if task == "classification" else GENERATED.format(behind=behind)
    return _fenced(f"{load}{asked}{told}", ["transformers", "torch", *(["peft"] if adapter else [])])


def _whole(task: str) -> str:
    auto = TASKS[task].auto  # type: ignore[index]
    return (
        f"from transformers import {auto}, AutoTokenizer\n\n{FOLDER}"
        f"tokenizer = AutoTokenizer.from_pretrained(folder)\nmodel = {auto}.from_pretrained(folder)\n"
    )


def _adapter(manifest: Mapping[str, Any], task: str) -> str:
    """An adapter of a classifier keeps its labels in its own config.json."""
    auto, base = TASKS[task].auto, manifest["base_model"]  # type: ignore[index]
    where = "  # where the folder with the base model is" if is_local(base) else ""
    more = ["" if is_local(base) else f'revision="{base["revision"]}"']
    names, first = f"{auto}, AutoTokenizer", ""
    if task == "classification":
        names, first = f"AutoConfig, {names}", "config = AutoConfig.from_pretrained(folder)\n"
        more += ["config=config", "ignore_mismatched_sizes=True"]
    arguments = "".join(f", {argument}" for argument in more if argument)
    return (
        f"from peft import PeftModel\nfrom transformers import {names}\n\n{FOLDER}"
        f'base = "{base_id(base)}"{where}\n{first}'
        f"tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        f"model = {auto}.from_pretrained(base{arguments})\nmodel = PeftModel.from_pretrained(model, folder)\n"
    )


def _fenced(program: str, packages: list[str]) -> str:
    return f"`pip install {' '.join(packages)}`, and then:\n\n```python\n{program}```"
