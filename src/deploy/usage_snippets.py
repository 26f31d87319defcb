"""Python programs for the model card that load a published model and run one prompt, by form and task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..chat_templates import PROMPT_SUFFIX, TEMPLATE_KWARGS
from ..model.profile import base_id, is_local
from ..model.tasks import TASKS

CHAT_PROMPT = """\
messages = [{{"role": "user", "content": {prompt}}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True{variables}
)
"""
SUFFIXED_PROMPT = """\
messages = [{{"role": "user", "content": {prompt}}}]
text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False{variables})
text += {suffix}  # answers were trained after this empty think block
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
"""
PLAIN_PROMPT = """\
inputs = tokenizer({prompt}, return_tensors="pt"{cut})
"""
GENERATE = """\
output = model.generate(**inputs, max_new_tokens=64, do_sample=False, eos_token_id={stop})
answer = tokenizer.decode(output[0{completion}], skip_special_tokens=True)
print(answer)
"""
CLASSIFY = """\
probabilities = model(**inputs).logits.softmax(-1)[0]
answer = model.config.id2label[int(probabilities.argmax())]
print(answer, float(probabilities.max()))
"""
EOS = "tokenizer.eos_token_id"
ONNX_SESSION = """\
session = InferenceSession(f"{folder}/model.onnx")
inputs = {name: value.numpy() for name, value in inputs.items()}
"""
ONNX_CAUSAL_LM = """\
generated = []
for _ in range(64):  # greedy decoding
    logits = session.run(["logits"], inputs)[0]
    token = int(logits[0, -1].argmax())
    if token {is_stop}:
        break
    generated.append(token)
    inputs = {{name: np.append(ids, [[token if name == "input_ids" else 1]], 1) for name, ids in inputs.items()}}
answer = tokenizer.decode(generated, skip_special_tokens=True)
print(answer)
"""
ONNX_SEQ2SEQ = """\
generated = [AutoConfig.from_pretrained(folder).decoder_start_token_id]
for _ in range(64):  # greedy decoding
    logits = session.run(["logits"], inputs | {{"decoder_input_ids": np.array([generated])}})[0]
    token = int(logits[0, -1].argmax())
    if token {is_stop}:
        break
    generated.append(token)
answer = tokenizer.decode(generated[1:], skip_special_tokens=True)
print(answer)
"""
ONNX_CLASSIFY = """\
logits = session.run(["logits"], inputs)[0]
answer = AutoConfig.from_pretrained(folder).id2label[int(logits[0].argmax())]
print(answer)
"""
ONNX = {"causal_lm": ONNX_CAUSAL_LM, "seq2seq": ONNX_SEQ2SEQ, "classification": ONNX_CLASSIFY}
FOLDER = (
    'folder = "."  # the folder of this file; from another directory, write its path, or its name on the Hub\n'
)
LOCAL_FOLDER = 'folder = "."  # the folder of this file; from another directory, write its path\n'


def usage(manifest: Mapping[str, Any], facts: Mapping[str, Any], prompt: str) -> str:
    """Markdown with a program that loads the published model and prints its answer to `prompt`."""
    task = manifest.get("task", "causal_lm")
    ids = facts.get("stop_token_ids")  # of a template that ends its turns with another token than the tokenizer's
    stop, is_stop = (str(ids), f"in {ids}") if ids else (EOS, f"== {EOS}")
    variables = manifest.get("tokenization", {}).get(TEMPLATE_KWARGS)  # with which every prompt was rendered
    suffix = manifest.get("tokenization", {}).get(PROMPT_SUFFIX)
    most = facts.get("max_tokens")  # positions of the model, to which the evaluation cuts as well
    chat = SUFFIXED_PROMPT if suffix else CHAT_PROMPT
    encode = (chat if TASKS[task].chat_template else PLAIN_PROMPT).format(
        prompt=repr(prompt),
        cut=f", truncation=True, max_length={most}" if most else "",
        variables=f",\n    **{variables}," if variables else "",
        suffix=repr(suffix),
    )
    if facts["form"] == "onnx":
        names = "AutoTokenizer" if task == "causal_lm" else "AutoConfig, AutoTokenizer"
        numpy = "" if task == "classification" else "import numpy as np\n"
        imports = f"{numpy}from onnxruntime import InferenceSession\nfrom transformers import {names}\n"
        load = f"{imports}\n{LOCAL_FOLDER}tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        return _fenced(
            f"{load}{encode}{ONNX_SESSION}{ONNX[task].format(is_stop=is_stop)}",
            ["transformers", "torch", "onnxruntime"],
        )
    adapter = facts["form"] == "adapter"
    load = _load_adapter(manifest, facts, task) if adapter else _load_model(task)
    completion = "" if task == "seq2seq" else ', inputs["input_ids"].shape[1]:'
    answer = CLASSIFY if task == "classification" else GENERATE.format(completion=completion, stop=stop)
    return _fenced(f"{load}{encode}{answer}", ["transformers", "torch", *(["peft"] if adapter else [])])


def _load_model(task: str) -> str:
    auto = TASKS[task].auto_class  # type: ignore[index]
    return (
        f"from transformers import {auto}, AutoTokenizer\n\n{FOLDER}"
        f"tokenizer = AutoTokenizer.from_pretrained(folder)\nmodel = {auto}.from_pretrained(folder)\n"
    )


def _load_adapter(manifest: Mapping[str, Any], facts: Mapping[str, Any], task: str) -> str:
    """The adapter of a classifier has its labels in its own config.json.

    A folder that is published on this machine names the folder of its base model.
    """
    auto, base = TASKS[task].auto_class, manifest["base_model"]  # type: ignore[index]
    named = is_local(base) and not facts.get("external", True)
    comment = "  # set this to the folder of the base model" if is_local(base) and not named else ""
    source = "PeftConfig.from_pretrained(folder).base_model_name_or_path" if named else f'"{base_id(base)}"'
    options = [] if is_local(base) else [f'revision="{base["revision"]}"']
    names, first = f"{auto}, AutoTokenizer", ""
    if task == "classification":
        names, first = f"AutoConfig, {names}", "config = AutoConfig.from_pretrained(folder)\n"
        options += ["config=config", "ignore_mismatched_sizes=True"]
    arguments = "".join(f", {option}" for option in options)
    rows = ""
    if facts.get("embedding_rows"):  # rows for added tokens, which the adapter holds
        needed = f"max({facts['embedding_rows']}, model.get_input_embeddings().num_embeddings)"
        rows = f"model.resize_token_embeddings({needed}, mean_resizing=False)\n"
    classes = "PeftConfig, PeftModel" if named else "PeftModel"
    return (
        f"from peft import {classes}\nfrom transformers import {names}\n\n{FOLDER}"
        f"base = {source}{comment}\n{first}"
        f"tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        f"model = {auto}.from_pretrained(base{arguments})\n{rows}"
        f"model = PeftModel.from_pretrained(model, folder)\n"
    )


def _fenced(program: str, packages: list[str]) -> str:
    return f"`pip install {' '.join(packages)}`, then:\n\n```python\n{program}```"
