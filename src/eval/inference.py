"""Evaluation requests (rows of the splits as tokens), and running them: a model's predictions as rows."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from ..data import task_encoding
from ..data.chat import ChatTokenizer
from ..data.encode import EncodingOptions
from ..data.formats import Row, RowError, prompt_text
from ..data.store import Example
from ..errors import MAX_LISTED, DataError
from ..model import tasks
from ..schema import EvalArgs, Task
from ..utils.environment import memory_total
from ..utils.logs import log
from ..utils.units import count
from . import tool_calls
from .partial_results import PartialResults

RowsOfSplits = dict[str, list[Row]]
Predictions = dict[str, list[dict[str, Any]]]
REFERENCES = "/references"  # after the name of a split: the pass over its reference answers
UNLIMITED = 10**9  # tokens
T = TypeVar("T")


class EvalRequests(NamedTuple):
    """By split: rows, prompts as token ids and, where a metric needs them, prompts with reference answers.

    answers: the reference answers as text, which predictions are compared with.
    """

    rows: RowsOfSplits
    prompts: dict[str, list[list[int]]]
    references: dict[str, list[Example]]
    answers: dict[str, list[str]]

    @property
    def calls(self) -> dict[str, str]:
        """The sha256 of the answers of each split of which the chat template writes any."""
        texts = {
            name: json.dumps(self.answers[name])
            for name, rows in self.rows.items()
            if any(map(_is_written_by_template, rows))
        }
        return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


@dataclass
class BatchPlan:
    """The batch size of each part: a split, or the pass over its reference answers."""

    sizes: dict[str, int]
    reason: str


@dataclass
class GenerationStats:
    """Time and token counts of the predictions made in this process.

    reused: predictions of an interrupted evaluation.
    """

    seconds: float = 0.0
    tokens: int = 0
    reused: int = 0
    details: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        speed = {"new_tokens_per_second": round(self.tokens / self.seconds, 1)} if self.tokens else {}
        spent = {
            "seconds": round(self.seconds, 2),
            "new_tokens": self.tokens,
            **speed,
            "answers_kept": self.reused,
        }
        return self.details | spent


# Encoding


def encode_requests(
    splits: RowsOfSplits, chat: ChatTokenizer, task: str, config: Mapping[str, Any], references: bool
) -> EvalRequests:
    """Encode the rows of every split for a model with the settings `config` (its config.json).

    Evaluation, re-evaluation by the gate and merging all encode with this module, so that the tokens are the same.

    Args: references: whether to encode the reference answers too.
    Raises: DataError naming every row that cannot be encoded, of all splits.
    """
    max_tokens = tasks.max_positions(config)
    prompts: dict[str, list[list[int]]] = {}
    examples: dict[str, list[Example]] = {}
    answers: dict[str, list[str]] = {}
    problems: list[str] = []
    for name, rows in splits.items():
        answers[name] = _encoded(rows, answer_texts(rows, chat, task, max_tokens), problems)
        prompts[name] = _encoded(rows, encode_prompts(rows, chat, task, max_tokens), problems)
        if references and not problems:
            examples[name] = _encoded(rows, encode_references(rows, chat, task, max_tokens), problems)
    if problems:
        raise DataError(
            *list(dict.fromkeys(problems))[:MAX_LISTED], hint="fix the rows or the model's chat template"
        )
    return EvalRequests(splits, prompts, examples, answers)


def answer_texts(
    rows: Sequence[Row], chat: ChatTokenizer, task: str, max_tokens: int | None
) -> list[str | RowError]:
    """The reference answer of each row; one with calls or thoughts as the chat template writes it."""
    written = [row for row in rows if _is_written_by_template(row)]
    encoded = iter(encode_references(written, chat, task, max_tokens))
    return [
        _loss_text(next(encoded), chat) if _is_written_by_template(row) else row.messages[-1]["content"]
        for row in rows
    ]


def _is_written_by_template(row: Row) -> bool:
    """Whether the reference answer has parts besides its text, which a model writes in the template's notation."""
    return any(row.messages[-1].get(key) for key in ("tool_calls", "reasoning_content"))


def called(row: Row) -> dict[str, Any]:
    """The calls of the reference answer, as a prediction's row records them: `calls`, if there are any."""
    calls = tool_calls.calls_of(row.messages[-1])
    return {"calls": calls} if calls else {}


def _loss_text(answer: Example | RowError, chat: ChatTokenizer) -> str | RowError:
    if isinstance(answer, RowError):
        return answer
    ids = [token for token, is_answer in zip(answer.ids, answer.loss_mask, strict=True) if is_answer]
    return str(chat.tokenizer.decode(ids, skip_special_tokens=True))


def encode_prompts(
    rows: Sequence[Row], chat: ChatTokenizer, task: str, max_tokens: int | None
) -> list[list[int] | RowError]:
    """The token ids before each row's last answer, cut to `max_tokens`; a RowError for a row that has none."""
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

    `max_tokens` limits the example of a causal model; source and target of an encoder-decoder are each cut to it.
    A RowError stands for a row that cannot be encoded.
    """
    overlength = "truncate" if task == "seq2seq" else "reject"
    options = EncodingOptions(max_tokens or UNLIMITED, "last_turn", overlength, task)  # type: ignore[arg-type]
    found: list[Example | RowError] = []
    for encoded in task_encoding.TASK_ENCODINGS[task].encode(rows, chat, options):
        if isinstance(encoded, RowError):
            found.append(encoded)
        else:
            ids, loss_mask = encoded.examples[-1]
            end = len(loss_mask) - loss_mask[::-1].index(True)
            found.append(Example(ids[:end], loss_mask[:end]))
    return found


def _encoded(rows: Sequence[Row], encoded: Sequence[T | RowError], problems: list[str]) -> list[T]:
    """What could be encoded; `problems` gets a line for each other row."""
    pairs = list(zip(rows, encoded, strict=True))
    problems += [f"{row.file}:{row.line} {e.detail}" for row, e in pairs if isinstance(e, RowError)]
    return [e for e in encoded if not isinstance(e, RowError)]


def warn_of_left_out(requests: EvalRequests, chat: ChatTokenizer) -> None:
    """Log what the chat template leaves out of the requests."""
    for name, rows in requests.rows.items():
        found = Counter(what for row in rows for what in chat.left_out_of_prompt(row.conversation))
        for what, number in found.items():
            log.warning(
                "%s: %s %s that the chat template leaves out", name, count(number, "row has", "rows have"), what
            )


def warn_of_cut_prompts(requests: EvalRequests, max_tokens: int | None) -> None:
    full = sum(len(ids) == max_tokens for prompts in requests.prompts.values() for ids in prompts)
    if full:
        fill = count(full, "prompt fills", "prompts fill")
        log.warning("%s the %d positions of the model; longer ones were cut", fill, max_tokens)


# Running


def plan_batches(
    requests: EvalRequests, task: str, args: EvalArgs, config: Mapping[str, Any], dtype: str, device: str,
    cuda_visible_devices: str,
) -> BatchPlan:  # fmt: skip
    """The batch size of each part, the same for every model with these settings on this machine."""
    from . import batching

    memory = memory_total(device, cuda_visible_devices)
    longest = max(len(ids) for prompts in requests.prompts.values() for ids in prompts)
    new = 0 if task == "classification" else args.max_new_tokens
    size = batching.batch_size(args.eval_batch_size, config, longest, new, dtype, device, memory)
    sizes = dict.fromkeys(requests.prompts, int(size.value))
    for name, examples in requests.references.items():
        answers = [sum(e.loss_mask) for e in examples]
        vocabulary = batching.model_sizes(config)["vocabulary"]
        sizes[name + REFERENCES] = min(int(size.value), batching.reference_batch_size(answers, vocabulary))
    log.info("batch size %s (%s)", size.value, size.reason)
    return BatchPlan(sizes, size.reason)


def make_predictor(
    model: Any, chat: ChatTokenizer, task: Task, labels: Sequence[str], args: EvalArgs, seed: int
) -> Any:
    """A function of (token ids of each prompt, number of the batch) that predicts with transformers."""
    from .generate import Classifier, Generator

    if task == "classification":
        return Classifier(model, chat.tokenizer.pad_token_id, list(labels))
    return Generator(
        model, chat.tokenizer, max_new_tokens=args.max_new_tokens, seed=seed, extra=args.generation,
        stop=args.stop, stop_token_ids=chat.stop_token_ids,
    )  # fmt: skip


def predict(
    predictor: Any, requests: EvalRequests, plan: BatchPlan, file: PartialResults, stats: GenerationStats
) -> Predictions:
    """`{split: [{prompt, reference, prediction, ...}, ...]}`, batch by batch.

    Updates `stats`, and `plan` where memory ran out.
    """
    from .batching import run_batched

    found: Predictions = {}
    for name, prompts in requests.prompts.items():
        part, start = file.part(name), time.monotonic()
        stats.reused += len(part.rows)
        reused = set(part.rows)

        def run(indices: list[int], number: int, prompts: list[list[int]] = prompts) -> list[dict[str, Any]]:
            batch = [prompts[i] for i in indices]
            made = zip(predictor(batch, number), batch, strict=True)
            return [prediction.to_row() | {"prompt_tokens": len(ids)} for prediction, ids in made]

        rows, plan.sizes[name] = run_batched(
            run, [len(ids) for ids in prompts], plan.sizes[name], part, unpadded=predictor.unpadded
        )
        stats.seconds += time.monotonic() - start
        stats.tokens += sum(row.get("tokens", 0) for i, row in enumerate(rows) if i not in reused)
        found[name] = [
            {"prompt": prompt_text(row.messages[:-1]), "reference": answer, **called(row), **prediction}
            for row, answer, prediction in zip(requests.rows[name], requests.answers[name], rows, strict=True)
        ]
    return found


def score_references(
    model: Any, tokenizer: Any, requests: EvalRequests, plan: BatchPlan, file: PartialResults
) -> Predictions:
    """`{split: [{reference_tokens, reference_nll, reference_hits}, ...]}` where a metric needs them."""
    from .batching import run_batched
    from .generate import ReferenceScorer

    found: Predictions = {}
    for split, examples in requests.references.items():
        name, scorer = split + REFERENCES, ReferenceScorer(model, tokenizer, examples)
        lengths = [len(example.ids) for example in examples]
        found[split], plan.sizes[name] = run_batched(
            scorer, lengths, plan.sizes[name], file.part(name), unpadded=scorer.unpadded
        )
    return found
