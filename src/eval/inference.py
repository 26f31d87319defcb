"""What is asked, and the answers to it: the rows of the splits as tokens, a model's answers as rows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from src.data import task_encoding
from src.data.chat import ChatTokenizer
from src.data.encode import EncodingOptions
from src.data.formats import Row, RowError
from src.data.store import Example
from src.errors import MAX_LISTED, DataError
from src.eval import batching
from src.eval.partial_results import PartialResults
from src.model import tasks
from src.schema import BaselineConfig, EvalArgs, EvalConfig
from src.utils.environment import memory_total
from src.utils.logs import log

Splits = dict[str, list[Row]]
Settings = EvalConfig | BaselineConfig
Answers = dict[str, list[dict[str, Any]]]
REFERENCES = "/references"  # behind the name of a split: the pass over its reference answers
UNLIMITED = 10**9  # tokens
T = TypeVar("T")


class EvalRequests(NamedTuple):
    """The rows of each split, their prompts as token ids and, where a metric needs them, prompt and reference
    answer as one example."""

    rows: Splits
    prompts: dict[str, list[list[int]]]
    references: dict[str, list[Example]]


@dataclass
class BatchPlan:
    """How many rows are in a batch of each part (a split, or the pass over its references)."""

    sizes: dict[str, int]
    reason: str


@dataclass
class GenerationStats:
    """What the answers took, in this process."""

    seconds: float = 0.0
    tokens: int = 0
    kept: int = 0  # answers of a stopped evaluation
    facts: dict[str, Any] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        speed = {"new_tokens_per_second": round(self.tokens / self.seconds, 1)} if self.tokens else {}
        spent = {"seconds": round(self.seconds, 2), "new_tokens": self.tokens, **speed, "answers_kept": self.kept}
        return self.facts | spent


def encode_requests(
    splits: Splits, chat: ChatTokenizer, task: str, config: Mapping[str, Any], references: bool
) -> EvalRequests:
    """Encode the rows of every split for a model with the settings `config` (its config.json).

    Evaluation, re-evaluation by the gate and merging all encode with this module, so that the tokens are the same.

    Args: references: whether to encode the reference answers too.
    Raises: DataError naming every row that cannot be encoded, of all splits.
    """
    max_tokens = tasks.positions(config)
    prompts: dict[str, list[list[int]]] = {}
    examples: dict[str, list[Example]] = {}
    problems: list[str] = []
    for name, rows in splits.items():
        prompts[name] = _usable(rows, encode_prompts(rows, chat, task, max_tokens), problems)
        if references and not problems:
            examples[name] = _usable(rows, encode_references(rows, chat, task, max_tokens), problems)
    if problems:
        raise DataError(*problems[:MAX_LISTED], hint="fix the rows or the model's chat template")
    return EvalRequests(splits, prompts, examples)


def encode_prompts(
    rows: Sequence[Row], chat: ChatTokenizer, task: str, max_tokens: int | None
) -> list[list[int] | RowError]:
    """The token ids before each row's last answer, cut to `max_tokens`; a RowError where a row has none."""
    found: list[list[int] | RowError] = []
    for row in rows:
        try:
            found.append(task_encoding.TASK_ENCODINGS[task].prompt_ids(chat, row, max_tokens))
        except RowError as error:
            found.append(error)
    return found


def encode_references(
    rows: Sequence[Row], chat: ChatTokenizer, task: str, max_tokens: int | None
) -> list[Example | RowError]:
    """Prompt and reference answer of each row as in training, up to the end of the last answer.

    `max_tokens` limits the example of a causal model, and source and target each of an encoder-decoder, which are
    cut to it. A RowError stands for a row that cannot be encoded.
    """
    overlength = "truncate" if task == "seq2seq" else "reject"
    rules = EncodingOptions(max_tokens or UNLIMITED, "last_turn", overlength, task)  # type: ignore[arg-type]
    found: list[Example | RowError] = []
    for encoded in task_encoding.TASK_ENCODINGS[task].encode(rows, chat, rules):
        if isinstance(encoded, RowError):
            found.append(encoded)
        else:
            ids, learnt = encoded.examples[-1]
            end = len(learnt) - learnt[::-1].index(True)
            found.append(Example(ids[:end], learnt[:end]))
    return found


def _usable(rows: Sequence[Row], encoded: Sequence[T | RowError], problems: list[str]) -> list[T]:
    """What could be encoded; `problems` gets a line for every other row."""
    pairs = list(zip(rows, encoded, strict=True))
    problems += [f"{row.file}:{row.line} {e.detail}" for row, e in pairs if isinstance(e, RowError)]
    return [e for e in encoded if not isinstance(e, RowError)]


def warn_of_cut_prompts(asked: EvalRequests, max_tokens: int | None) -> None:
    full = sum(len(ids) == max_tokens for prompts in asked.prompts.values() for ids in prompts)
    if full:
        log.warning(
            "%d prompts fill the %d positions of the model; what is longer was cut at its end", full, max_tokens
        )


def plan_batches(
    asked: EvalRequests, cfg: Settings, config: Mapping[str, Any], dtype: str, device: str
) -> BatchPlan:
    """The batch size of each part, the same for every model of these settings on this machine."""
    memory = memory_total(device, cfg.cuda_visible_devices)
    longest = max(len(ids) for prompts in asked.prompts.values() for ids in prompts)
    new = 0 if cfg.task == "classification" else cfg.max_new_tokens
    size = batching.batch_size(cfg.eval_batch_size, config, longest, new, dtype, device, memory)
    sizes = dict.fromkeys(asked.prompts, int(size.value))
    for name, examples in asked.references.items():
        answers = [sum(e.loss_mask) for e in examples]
        vocabulary = batching.model_sizes(config)["vocabulary"]
        sizes[name + REFERENCES] = min(int(size.value), batching.reference_batch_size(answers, vocabulary))
    log.info("%s at once (%s)", size.value, size.reason)
    return BatchPlan(sizes, size.reason)


def evaluate_requests(
    model: Any,
    chat: ChatTokenizer,
    asked: EvalRequests,
    cfg: Settings,
    plan: BatchPlan,
    file: PartialResults,
    effort: GenerationStats,
) -> Answers:
    """`{split: [{prompt, reference, prediction, tokens, stop, ...}, ...]}`; `plan` is made true where memory ran
    out."""
    from src.eval.batches import run_batched

    labels = tasks.labels_of(model.config.to_dict()) if cfg.task == "classification" else []
    write = model if cfg.engine == "vllm" else make_predictor(model, chat, cfg.task, labels, cfg, cfg.seed)
    found: Answers = {}
    for name, prompts in asked.prompts.items():
        part, began = file.part(name), time.monotonic()
        effort.kept += len(part.rows)
        known = set(part.rows)

        def ask(places: list[int], number: int, prompts: list[list[int]] = prompts) -> list[dict[str, Any]]:
            texts = [prompts[i] for i in places]
            return [
                to_row(a) | {"prompt_tokens": len(t)} for a, t in zip(write(texts, number), texts, strict=True)
            ]

        rows, plan.sizes[name] = run_batched(
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
    model: Any, chat: ChatTokenizer, examples: Sequence[Example], plan: BatchPlan, file: PartialResults, name: str
) -> list[dict[str, Any]]:
    """What the model thinks of each reference answer."""
    from src.eval.batches import run_batched
    from src.eval.loglikelihood import ReferenceScorer

    reader = ReferenceScorer(model, chat.tokenizer, examples)
    lengths = [len(example.ids) for example in examples]
    rows, plan.sizes[name] = run_batched(
        reader, lengths, plan.sizes[name], file.part(name), unpadded=reader.unpadded
    )
    return rows


def make_predictor(
    model: Any, chat: ChatTokenizer, task: str | None, labels: Sequence[str], args: EvalArgs, seed: int
) -> Any:
    """What answers a batch of prompts: a function of (token ids of each, number of the batch)."""
    if task == "classification":
        from src.eval.classify import Classifier

        return Classifier(model, chat.tokenizer.pad_token_id, list(labels))
    from src.eval.generate import Generator

    return Generator(
        model,
        chat.tokenizer,
        max_new_tokens=args.max_new_tokens,
        seed=seed,
        extra=args.generation,
        stop=args.stop,
    )


def to_row(answer: Any) -> dict[str, Any]:
    """An Answer or a Choice as a part of a row."""
    if hasattr(answer, "label"):
        return {"prediction": answer.label, "probability": answer.probability}
    return {"prediction": answer.text, "tokens": answer.tokens, "stop": answer.stop}
