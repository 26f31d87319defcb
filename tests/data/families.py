# ruff: noqa: RUF001 - these bars are in the names of tokens
"""Templates of the model families of 2026, of our own writing: a file of tests/data/families for each.

The first line of a file holds its facts: the family's name, how its tokenizer is built, where its answers stop.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from src.data.chat import ChatTokenizer
from tests.data import tokenizers as built

FOLDER = Path(__file__).parent / "families"
HEADER = re.compile(r"\{#- (?P<title>.+?) \| build: (?P<build>\w+) \| stops: (?P<stops>.+?) -#\}\n")
BUILDS: dict[str, Callable[[], Tokenizer]] = {
    make.__name__: make
    for make in (built.gpt2, built.llama3, built.qwen, built.prepended, built.metaspace, built.gemma)
}
# Added tokens: by their brackets or, in brackets of other kinds, by their names
SPECIAL = re.compile(
    r"<[|｜][^<>|｜\s]+[|｜]?>|<\w+[|｜]>|\]~!?b[\]\[]|\[e~\[|\[gMASK\]|<sop>|\[\|\w+\|\]|<seed:[be]os>|<SPECIAL_\d+>"
    r"|<\w+_of_\w+>|\[/?(?:INST|THINK|ARGS|SYSTEM_PROMPT|TOOL_\w+|AVAILABLE_TOOLS)\]|</?assistant>"
)
PLAIN = re.compile(r"</?(?:seed:)?(?:think|tool_call|tool_response|arg_key|arg_value)>")
# The families of tests/data/templates, whose facts are in tokenizers.py
TITLES = {
    "chatml": "ChatML", "chatml_marked": "ChatML, generation marks", "chatml_text": "ChatML without its tokens",
    "llama2": "Llama 2", "llama3": "Llama 3", "llama3_marked": "Llama 3, generation marks",
    "llama3_1": "Llama 3.1 and 3.3", "llama3_2": "Llama 3.2", "mistral_v01": "Mistral 7B 0.1",
    "mistral_v03": "Mistral 7B 0.3", "qwen2_5": "Qwen2.5", "qwen3": "Qwen3", "gemma2": "Gemma 2", "phi3": "Phi-3",
    "phi4": "Phi-4", "phi4_mini": "Phi-4-mini", "smollm2": "SmolLM2", "smollm3": "SmolLM3",
    "deepseek_v2": "DeepSeek V2", "deepseek_v3": "DeepSeek V3", "r1_distill": "R1-Distill",
    "r1_distill_think": "R1-Distill, open think tag", "falcon": "Falcon", "zephyr": "Zephyr", "vicuna": "Vicuna",
    "granite3": "Granite 3", "olmo2": "OLMo 2", "command_r": "Command R", "command_r7b": "Command R7B",
    "gpt_oss": "gpt-oss, texts only",
}  # fmt: skip


class Template(NamedTuple):
    """A template text with its tokenizer. stops: the tokens at which the family's inference stops."""

    title: str
    tokenizer: PreTrainedTokenizerBase
    stops: tuple[str, ...]


def _of_file(path: Path) -> Template:
    text = path.read_text(encoding="utf-8")
    header = HEADER.match(text)
    assert header, f"{path} does not begin with its facts"
    stops = tuple(header["stops"].split())
    specials = tuple(sorted({*SPECIAL.findall(text.replace("<｜DSML｜", "")), *stops}))
    family = built.Family(
        path.stem, BUILDS[header["build"]], stops[0], stops[0], ("<s>", "<pad>", *specials), bos="<s>",
        pad="<pad>", plain=tuple(sorted({*PLAIN.findall(text)})),
    )  # fmt: skip
    return Template(header["title"], built.tokenizer(family, text), stops)


def _of_table(name: str) -> Template:
    family = (built.FAMILIES | {built.REFUSED.name: built.REFUSED})[name]
    return Template(TITLES[name], built.tokenizer(family), tuple(filter(None, (family.eot.strip(), family.eos))))


TEMPLATES: dict[str, Callable[[], Template]] = {
    **{name: lambda name=name: _of_table(name) for name in TITLES},  # type: ignore[misc]
    **{path.stem: lambda path=path: _of_file(path) for path in sorted(FOLDER.glob("*.jinja"))},  # type: ignore[misc]
}


@cache
def template(name: str) -> Template:
    """The template with this name, to be read only."""
    return TEMPLATES[name]()


@cache
def chat(name: str) -> ChatTokenizer:
    return ChatTokenizer(template(name).tokenizer)


def render(name: str, turns: list[Any], tools: list[Any] | None, **variables: Any) -> str | None:
    """A conversation as transformers renders it; None if the template rejects it."""
    try:
        return str(template(name).tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, **variables))
    except Exception:  # whatever a template raises
        return None
