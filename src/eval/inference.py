"""What is asked, and the answers to it: the rows of the splits as tokens, a model's answers as rows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from src.data import task_encoding
from src.data.chat import Chat
from src.data.encode import Rules
from src.data.formats import RowError
from src.data.rows import MOST_SHOWN, Example, Row
from src.errors import DataError
from src.eval import layout
from src.eval.partial_results import Unfinished
from src.model import tasks
from src.schema import BaselineConfig, EvalConfig
from src.utils.environment import memory_total
from src.utils.logs import log

Splits = dict[str, list[Row]]
Settings = EvalConfig | BaselineConfig
Answers = dict[str, list[dict[str, Any]]]
REFERENCES = "/references"  # behind the name of a split: the pass over its reference answers
UNLIMITED = 10**9  # tokens


class Questions(NamedTuple):
    """The rows of each split, their prompts as token ids and, where a metric needs them, prompt and reference
    answer as one example."""

    rows: Splits
    prompts: dict[str, list[list[int]]]
    references: dict[str, list[Example]]


@dataclass
class Layout:
    """How many rows are in a batch of each part (a split, or the pass over its references)."""

    sizes: dict[str, int]
    reason: str


@dataclass
class Effort:
    """What the answers took, in this process."""

    seconds: float = 0.0
    tokens: int = 0
    kept: int = 0  # answers of a stopped evaluation
    facts: dict[str, Any] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        speed = {"new_tokens_per_second": round(self.tokens / self.seconds, 1)} if self.tokens else {}
        spent = {"seconds": round(self.seconds, 2), "new_tokens": self.tokens, **speed, "answers_kept": self.kept}
        return self.facts | spent


def questions(splits: Splits, chat: Chat, task: str, config: Mapping[str, Any], references: bool) -> Questions:
    """Raises: DataError naming every row that the chat template refuses, of all splits."""
    most = tasks.positions(config)
    prompts: dict[str, list[list[int]]] = {}
    examples: dict[str, list[Example]] = {}
    refused: list[str] = []
    for name, rows in splits.items():
        prompts[name] = _prompts(rows, chat, task, most, refused)
        if references and not refused:
            examples[name] = _references(rows, chat, task, most, refused)
    if refused:
        raise DataError(*refused[:MOST_SHOWN], hint="mend the rows or the model's chat template")
    full = sum(len(ids) == most for asked in prompts.values() for ids in asked)
    if full:
        log.warning("%d prompts fill the %d positions of the model; what is longer was cut at its end", full, most)
    return Questions(splits, prompts, examples)


def _prompts(rows: Sequence[Row], chat: Chat, task: str, most: int | None, refused: list[str]) -> list[list[int]]:
    found = []
    for row in rows:
        try:
            found.append(task_encoding.TASKS[task].prompt(chat, row, most))
        except RowError as error:
            refused.append(f"{row.file}:{row.line} {error.detail}")
    return found


def _references(rows: Sequence[Row], chat: Chat, task: str, most: int | None, refused: list[str]) -> list[Example]:
    """Each row as in training, up to the end of its last answer."""
    overlength = "truncate" if task == "seq2seq" else "reject"
    rules = Rules(most or UNLIMITED, "last_turn", overlength, task)  # type: ignore[arg-type]
    found = []
    for row, encoded in zip(rows, task_encoding.TASKS[task].encode(rows, chat, rules), strict=True):
        if isinstance(encoded, RowError):
            refused.append(f"{row.file}:{row.line} {encoded.detail}")
        else:
            ids, learnt = encoded.examples[-1]
            end = len(learnt) - learnt[::-1].index(True)
            found.append(Example(ids[:end], learnt[:end]))
    return found


def laid_out(asked: Questions, cfg: Settings, config: Mapping[str, Any], dtype: str, device: str) -> Layout:
    """The batch size of each part, the same for every model of these settings on this machine."""
    memory = memory_total(device, cfg.cuda_visible_devices)
    longest = max(len(ids) for prompts in asked.prompts.values() for ids in prompts)
    new = 0 if cfg.task == "classification" else cfg.max_new_tokens
    size = layout.batch_size(cfg.eval_batch_size, config, longest, new, dtype, device, memory)
    sizes = dict.fromkeys(asked.prompts, int(size.value))
    for name, examples in asked.references.items():
        answers = [sum(e.learnt) for e in examples]
        vocabulary = layout.sizes_of(config)["vocabulary"]
        sizes[name + REFERENCES] = min(int(size.value), layout.most_answers(answers, vocabulary))
    log.info("%s at once (%s)", size.value, size.reason)
    return Layout(sizes, size.reason)


def answers(
    model: Any, chat: Chat, asked: Questions, cfg: Settings, plan: Layout, file: Unfinished, effort: Effort
) -> Answers:
    """`{split: [{prompt, reference, prediction, tokens, stop, ...}, ...]}`; `plan` is made true where memory ran
    out."""
    from src.eval.batches import in_batches

    labels = tasks.labels_of(model.config.to_dict()) if cfg.task == "classification" else []
    write = model if cfg.engine == "vllm" else writer(model, chat, cfg.task, labels, cfg)
    found: Answers = {}
    for name, prompts in asked.prompts.items():
        part, began = file.part(name), time.monotonic()
        effort.kept += len(part.rows)
        known = set(part.rows)

        def ask(places: list[int], number: int, prompts: list[list[int]] = prompts) -> list[dict[str, Any]]:
            texts = [prompts[i] for i in places]
            return [told(a) | {"prompt_tokens": len(t)} for a, t in zip(write(texts, number), texts, strict=True)]

        rows, plan.sizes[name] = in_batches(
            ask, [len(ids) for ids in prompts], plan.sizes[name], part, unpadded=write.unpadded
        )
        effort.seconds += time.monotonic() - began
        effort.tokens += sum(row.get("tokens", 0) for i, row in enumerate(rows) if i not in known)
        found[name] = [
            {"prompt": row.messages[0]["content"], "reference": row.messages[-1]["content"], **answer}
            for row, answer in zip(asked.rows[name], rows, strict=True)
        ]
    for name, examples in asked.references.items():
        read = _read(model, chat, examples, plan, file, name + REFERENCES)
        found[name] = [row | more for row, more in zip(found[name], read, strict=True)]
    return found


def _read(
    model: Any, chat: Chat, examples: Sequence[Example], plan: Layout, file: Unfinished, name: str
) -> list[dict[str, Any]]:
    """What the model thinks of each reference answer."""
    from src.eval.batches import in_batches
    from src.eval.loglikelihood import Reader

    reader = Reader(model, chat.tokenizer, examples)
    lengths = [len(example.ids) for example in examples]
    rows, plan.sizes[name] = in_batches(
        reader, lengths, plan.sizes[name], file.part(name), unpadded=reader.unpadded
    )
    return rows


def writer(model: Any, chat: Chat, task: str | None, labels: Sequence[str], cfg: Settings) -> Any:
    """What answers a batch of prompts: a function of (token ids of each, number of the batch)."""
    if task == "classification":
        from src.eval.classify import Chooser

        return Chooser(model, chat.tokenizer.pad_token_id, list(labels))
    from src.eval.generate import Writer

    return Writer(
        model,
        chat.tokenizer,
        max_new_tokens=cfg.max_new_tokens,
        seed=cfg.seed,
        extra=cfg.generation,
        stop=cfg.stop,
    )


def told(answer: Any) -> dict[str, Any]:
    """An Answer or a Choice as a part of a row."""
    if hasattr(answer, "label"):
        return {"prediction": answer.label, "probability": answer.probability}
    return {"prediction": answer.text, "tokens": answer.tokens, "stop": answer.stop}
