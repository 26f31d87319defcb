# ruff: noqa: RUF001 - these bars and blocks are in the names of tokens
"""Small tokenizers that are built like those of real model families, each with the chat template of its family.

The loss mask is verified for each family: how its tokenizer splits text, which tokens it has, and how its template
renders a conversation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from src.data.chat import ChatTokenizer
from src.data.formats import Message, Row

TEMPLATES = Path(__file__).parent / "templates"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

# Trained so that some tokens span the edges of answers: runs of spaces and newlines, a colon with a space.
CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "You are a helpful assistant. User: hello Assistant: hello\n\n\nUSER: what is it? ASSISTANT: It is a user.",
    "<|im_start|>system\nToday Date: 26 July 2024\n\n<|im_end|>\n<|start_header_id|>\n\n  Hello  there\n\n\n",
    "[INST] What is two and two? [/INST] Four. [INST] And three? [/INST] Five, naturally.\n",
    "<think>\nLet me think about it.\n</think>\n\nThe answer is forty two, I think.  \n",
    '{"name": "weather", "arguments": {"city": "Bern"}}\n<tool_call>\n</tool_call>\n```json\n',
    "a b c d e f g h i j k l m n o p q r s t u v w x y z A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
    "0 1 2 3 4 5 6 7 8 9 . , : ; ! ? ' \" ( ) [ ] { } < > | / \\ _ - + * = # @ & % $ ~ ` ^",
]


def byte_level(pattern: str) -> Tokenizer:
    """BPE over bytes after a split by `pattern`, as of GPT-2, Llama 3 and Qwen."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC() if pattern == QWEN else None
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS * 2, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    return made


def sentencepiece(kind: str) -> Tokenizer:
    """BPE over characters with bytes to fall back on.

    Args:
        kind: `prepend`, a normaliser that puts a space before every stretch between special tokens (Llama 2,
            Phi-3); `metaspace`, a space before the text only (newer Mistral); `plain`, no space put (Gemma).
    """
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    texts = [f" {text}" for text in CORPUS * 2]
    learnt.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=450, show_progress=False))
    model = json.loads(learnt.to_str())["model"]
    kept = {"\n"} if kind == "plain" else set()  # Gemma knows newlines; Llama 2 writes them as bytes
    words = [word for word in model["vocab"] if "\n" not in word or word in kept]
    merges = [tuple(pair) for pair in model["merges"] if not any("\n" in part for part in pair)]
    words += ["▁▁"] + (["\n\n", "\n\n\n"] if kept else [])
    merges += [("▁", "▁")] + ([("\n", "\n"), ("\n\n", "\n")] if kept else [])
    vocabulary = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(words)]
    numbered = {word: number for number, word in enumerate(vocabulary)}
    made = Tokenizer(models.BPE(numbered, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    space = decoders.Replace("▁", " ")
    taken = [decoders.ByteFallback(), decoders.Fuse()]
    if kind == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Replace(" ", "▁")
        made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([space, *taken, *([] if kind == "plain" else [decoders.Strip(" ", 1, 0)])])
    return made


@dataclass(frozen=True)
class Family:
    """A model family.

    eot: what the template writes where a turn of the assistant ends.
    bos: what the tokenizer puts before a text; writes_bos: whether the template writes it too.
    specials, plain: added tokens, special and not. swallows: special tokens that take the space after them.
    system: whether a system turn is accepted. tools: whether calls of tools are. writes: what the template makes
    of an answer. one_text: whether a conversation of two answers is one text. reasoning: whether thoughts under
    their own key are rendered. thoughts: whether those within an answer are.
    """

    name: str
    make: Callable[[], Tokenizer]
    eos: str | None
    eot: str
    specials: tuple[str, ...]
    bos: str | None = None
    writes_bos: bool = False
    pad: str | None = None
    plain: tuple[str, ...] = ()
    swallows: tuple[str, ...] = ()
    system: bool = True
    tools: bool = False
    one_text: bool = True
    writes: Callable[[str], str] = str
    reasoning: bool = False
    thoughts: bool = True

    def renders(self, title: str) -> bool:
        """Whether the template renders all of a conversation of CONVERSATIONS."""
        known = {
            "system": self.system,
            "tools": self.tools,
            "reasoning": self.reasoning,
            "thoughts": self.thoughts,
        }
        return known.get(title, True)


def gpt2() -> Tokenizer:
    return byte_level(GPT2)


def llama3() -> Tokenizer:
    return byte_level(LLAMA3)


def qwen() -> Tokenizer:
    return byte_level(QWEN)


def prepended() -> Tokenizer:
    return sentencepiece("prepend")


def metaspace() -> Tokenizer:
    return sentencepiece("metaspace")


def gemma() -> Tokenizer:
    return sentencepiece("plain")


def spaced(content: str) -> str:
    return f" {content.strip()}"


def falcon_writes(content: str) -> str:
    return spaced(content).replace("\r\n", "\n").replace("\n\n", "\n")


def without_thoughts(content: str) -> str:
    return content.split("</think>")[-1]


def qwen3_writes(content: str) -> str:
    thought, tag, said = content.rpartition("</think>")
    thought = thought.removeprefix("<think>").strip("\n")
    return (f"<think>\n{thought}\n</think>\n\n" if tag else "") + said.lstrip("\n")


IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HEADERS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
)
SP = ("<s>", "</s>", "<unk>")
CALLS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
PHI3 = ("<|assistant|>", "<|end|>", "<|user|>", "<|system|>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
DEEPSEEK_CALLS = tuple(
    f"<｜tool▁{kind}▁{edge}｜>" for kind in ("calls", "call", "outputs", "output") for edge in ("begin", "end")
)
COHERE = (
    "<BOS_TOKEN>", "<EOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>",
)  # fmt: skip
OSS = ("<|startoftext|>", "<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>")
GRANITE = ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>", "<filename>")
GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")

FAMILIES = {
    family.name: family
    for family in [
        Family("chatml", gpt2, "<|im_end|>", "<|im_end|>", IM, pad="<|endoftext|>"),
        Family("chatml_marked", gpt2, "<|endoftext|>", "<|im_end|>", IM, pad="<|endoftext|>"),
        Family("chatml_text", prepended, "</s>", "<|im_end|>", SP, bos="<s>", pad="</s>"),
        Family("llama2", prepended, "</s>", " </s>", SP, bos="<s>", writes_bos=True, pad="</s>", writes=spaced),
        Family(
            "llama3", llama3, "<|end_of_text|>", "<|eot_id|>", HEADERS, bos="<|begin_of_text|>", writes_bos=True,
            pad="<|end_of_text|>", writes=str.strip,
        ),
        Family(
            "llama3_marked", llama3, "<|eot_id|>", "<|eot_id|>", HEADERS, bos="<|begin_of_text|>", writes_bos=True,
            pad="<|eot_id|>", writes=str.strip,
        ),
        Family(
            "llama3_1", llama3, "<|eot_id|>", "<|eot_id|>", HEADERS, bos="<|begin_of_text|>", writes_bos=True,
            pad="<|eot_id|>", tools=True, writes=str.strip,
        ),
        Family(
            "llama3_2", llama3, "<|eot_id|>", "<|eot_id|>", HEADERS, bos="<|begin_of_text|>", writes_bos=True,
            pad="<|eot_id|>", tools=True, writes=str.strip,
        ),
        Family("mistral_v01", prepended, "</s>", "</s>", SP, bos="<s>", writes_bos=True, pad="</s>", system=False),
        Family(
            "mistral_v03", metaspace, "</s>", "</s>",
            (*SP, "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
             "[/TOOL_RESULTS]"),
            bos="<s>", writes_bos=True, pad="</s>", system=False, tools=True, writes=spaced,
        ),
        Family("qwen2_5", qwen, "<|im_end|>", "<|im_end|>", IM, pad="<|endoftext|>", plain=CALLS[:2], tools=True),
        Family(
            "qwen3", qwen, "<|endoftext|>", "<|im_end|>", IM, pad="<|endoftext|>", plain=CALLS, tools=True,
            one_text=False, writes=qwen3_writes, reasoning=True,
        ),
        Family("gemma2", gemma, "<eos>", "<end_of_turn>", GEMMA, bos="<bos>", writes_bos=True, pad="<pad>",
               system=False, writes=str.strip),
        Family("phi3", prepended, "<|endoftext|>", "<|end|>", (*SP, "<|endoftext|>", *PHI3), bos="<s>",
               pad="<|endoftext|>", swallows=PHI3),
        Family("phi4", gpt2, "<|im_end|>", "<|im_end|>", (*IM, "<|im_sep|>"), bos="<|endoftext|>",
               pad="<|endoftext|>", swallows=("<|im_start|>", "<|im_sep|>", "<|im_end|>")),
        Family("phi4_mini", llama3, "<|endoftext|>", "<|end|>", ("<|endoftext|>", *PHI3), bos="<|endoftext|>",
               pad="<|endoftext|>"),
        Family("smollm2", gpt2, "<|im_end|>", "<|im_end|>", (*IM, "<filename>"), bos="<|im_start|>",
               pad="<|im_end|>"),
        Family("smollm3", llama3, "<|im_end|>", "<|im_end|>", IM, pad="<|im_end|>", plain=CALLS,
               writes=lambda content: content.lstrip("\n"), reasoning=True),
        Family("deepseek_v2", gpt2, DEEPSEEK[1], DEEPSEEK[1], DEEPSEEK[:2], bos=DEEPSEEK[0], writes_bos=True,
               pad=DEEPSEEK[1], writes=lambda content: f" {content}"),
        Family("deepseek_v3", gpt2, DEEPSEEK[1], DEEPSEEK[1], (*DEEPSEEK, *DEEPSEEK_CALLS, "<｜tool▁sep｜>"),
               bos=DEEPSEEK[0], writes_bos=True, pad=DEEPSEEK[1], tools=True),
        Family("r1_distill", qwen, DEEPSEEK[1], DEEPSEEK[1], DEEPSEEK, bos=DEEPSEEK[0], writes_bos=True,
               pad=DEEPSEEK[1], plain=CALLS[2:], writes=without_thoughts, thoughts=False),
        Family("falcon", gpt2, "<|endoftext|>", "<|endoftext|>", ("<|endoftext|>", "<filename>"),
               pad="<|endoftext|>", one_text=False, writes=falcon_writes),
        Family("zephyr", prepended, "</s>", "</s>", SP, bos="<s>", pad="</s>"),
        Family("vicuna", prepended, "</s>", "</s>", SP, bos="<s>", writes_bos=True, pad="<unk>", writes=spaced),
        Family("granite3", gpt2, "<|end_of_text|>", "<|end_of_text|>", GRANITE, pad="<|end_of_text|>", tools=True),
        Family("olmo2", llama3, "<|endoftext|>", "<|endoftext|>", ("<|endoftext|>", "<|pad|>"),
               bos="<|endoftext|>", writes_bos=True, pad="<|pad|>"),
        Family("command_r", gpt2, "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", COHERE[:7], bos="<BOS_TOKEN>",
               writes_bos=True, pad="<EOS_TOKEN>", writes=str.strip),
        Family("command_r7b", gpt2, "<|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", COHERE,
               bos="<BOS_TOKEN>", writes_bos=True, pad="<EOS_TOKEN>",
               writes=lambda content: f"<|START_RESPONSE|>{content}"),
        Family("gpt_oss", gpt2, "<|return|>", "<|return|>", OSS, bos="<|startoftext|>", pad="<|return|>",
               one_text=False, writes=lambda content: f"<|channel|>final<|message|>{content}", reasoning=True),
    ]
}  # fmt: skip
REFUSED = Family(
    "r1_distill_think", qwen, DEEPSEEK[1], DEEPSEEK[1], DEEPSEEK, bos=DEEPSEEK[0], writes_bos=True, plain=CALLS[2:]
)


@cache
def _model(make: Callable[[], Tokenizer]) -> str:
    return make().to_str()


def tokenizer(family: Family, template: str | None = None) -> Any:
    """A new tokenizer of the family, with its chat template, or with the given one."""
    backend = Tokenizer.from_str(_model(family.make))
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.pad,
        clean_up_tokenization_spaces=False,
    )
    tokens = [
        AddedToken(text, special=True, normalized=False, rstrip=text in family.swallows)
        for text in family.specials
    ]
    made.add_tokens(tokens, special_tokens=True)
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in family.plain])
    if family.bos:  # as most do: it begins a text that no template is put around
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, made.bos_token_id)]
        )
    made.chat_template = template or (TEMPLATES / f"{family.name}.jinja").read_text(encoding="utf-8")
    return made


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}  # type: ignore[typeddict-item]


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def called(city: str, number: str = "abcdefgh1") -> Message:
    """A call of the only tool."""
    call = {"id": number, "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
    return assistant("", tool_calls=[call])


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Looks out of the window.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
WITH_TOOLS: list[Message] = [
    user("Weather in Bern?"),
    called("Bern"),
    {"role": "tool", "content": "rain", "name": "weather", "tool_call_id": "abcdefgh1"},
    assistant("It rains in Bern."),
    user("Thanks."),
    assistant("You are welcome."),
]
CONVERSATIONS: dict[str, list[Message]] = {
    "single turn": [user("What is two and two?"), assistant("Four.")],
    "several turns": [
        user("Hi"),
        assistant("Hello there"),
        user("3?"),
        assistant("Five."),
        user("Bye"),
        assistant("So long"),
    ],
    "words of the template": [
        user("a"),
        assistant("assistant"),
        user("user"),
        assistant("user"),
        user("system"),
        assistant("a"),
    ],
    "space around": [user(" x "), assistant("\n  Hello  there \n"), user("b\n"), assistant("  ok\n\n")],
    "newlines before": [user("x"), assistant("\n\nHello"), user("y"), assistant(" \nHello")],
    "unicode": [user("É 漢字?"), assistant("漢字 🙂 naïve e\u0301"), user("?"), assistant("🙂")],
    "a tag first": [user("Bold?"), assistant("<b>Yes</b>"), user("And?"), assistant("<|no|>")],
    "empty thoughts": [
        user("q"),
        assistant("<think>\n\n</think>\n\nyes"),
        user("q"),
        assistant("<think>\n\n</think>\n\nno"),
    ],
    "thoughts": [user("q"), assistant("<think>\nLet me see.\n</think>\n\nyes"), user("q"), assistant("no")],
    "reasoning": [
        user("q"),
        assistant("yes", reasoning_content="Let me see."),
        user("q"),
        assistant("no", reasoning_content="Hm."),
    ],
    "weights": [
        user("q"),
        assistant("bad", weight=0),
        user("q"),
        assistant("good"),
        user("q"),
        assistant("ugly", weight=0),
    ],
    "system": [system("Be brief."), user("Hi"), assistant("Hello"), user("More"), assistant("No")],
    "tools": WITH_TOOLS,
}


def texts(turns: Sequence[Message]) -> list[str]:
    """What the answers of a conversation say."""
    return [turn["content"] for turn in turns if turn["role"] == "assistant"]


def row(turns: Sequence[Message], tools: list[Any] | None = None) -> Row:
    return Row(Path("rows.jsonl"), 1, list(turns), tools)


@cache
def chat(name: str) -> ChatTokenizer:
    """The family's tokenizer and template, to be read only."""
    return ChatTokenizer(tokenizer((FAMILIES | {REFUSED.name: REFUSED})[name]))


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates render a fixed date."""

    class Frozen(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Frozen:
            return cls(2026, 1, 15)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Frozen)
