"""What base and tuned model have in common in an evaluation, and the checks before either is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..chat_templates import EMPTY_THOUGHTS, TEMPLATE_KWARGS
from ..data import loader, task_encoding
from ..data.chat import IDENTITY_FILE, ChatTokenizer
from ..data.eval_rows import AS_WRITTEN, Reading
from ..data.formats import TEXT, Row
from ..errors import MAX_LISTED, ConfigError, DataError, ModelError, RunError
from ..model import tasks
from ..model.peft_arguments import why_unserved
from ..model.source import Source, TunedModel, is_quantised
from ..runs import Run
from ..schema import EvalArgs, EvalConfig, Task
from ..utils.environment import Reasoned
from ..utils.files import read_json, sha256
from ..utils.logs import log
from ..utils.process_info import OPTIONAL
from ..utils.units import count
from ..utils.weights import find_weight_corruption
from . import evaluations, metrics, vllm_engine
from .inference import BatchPlan, EvalRequests, RowsOfSplits


class EvalSplits(NamedTuple):
    """The rows of each split, the file that they were read from, and its sha256.

    overlaps: by split, the rows that the run was trained on (see overlap.py).
    """

    rows: RowsOfSplits
    sha256: dict[str, str]
    files: dict[str, Path]
    overlaps: Mapping[str, Any] = {}

    @property
    def unjudged_calls(self) -> dict[str, int]:
        """By split, how many rows call a tool before their last answer, which alone is judged."""
        calling = {name: sum(map(_calls_before, rows)) for name, rows in self.rows.items()}
        return {name: number for name, number in calling.items() if number}

    @property
    def summary(self) -> str:
        """`my/eval/test.jsonl (24 rows), my/eval/hard.jsonl (30 rows)`."""
        return ", ".join(f"{file} ({count(len(self.rows[name]), 'row')})" for name, file in self.files.items())


def _calls_before(row: Row) -> bool:
    return any(turn.get("tool_calls") for turn in row.messages[:-1])


class EvalContext(NamedTuple):
    """Everything that must be equal for two models to be compared.

    labels: of a classifier, in the order of its logits.
    base_conditions: the conditions (see fingerprint.py) before memory ran out, which changes the batch sizes only.
    embedding_rows: those that the tokens need, where a run added tokens; the base model gets untrained ones.
    """

    task: Task
    args: EvalArgs
    seed: int
    trust_remote_code: bool
    chat: ChatTokenizer
    requests: EvalRequests
    dtype: Reasoned
    device: Reasoned
    plan: BatchPlan
    labels: Sequence[str]
    base_conditions: Mapping[str, Any]
    embedding_rows: int = 0

    @property
    def conditions(self) -> dict[str, Any]:
        return {**self.base_conditions, "batch_size": dict(self.plan.sizes)}

    def load(self, source: Source) -> Any:
        """Load the model at `source` with the head of the task."""
        from ..model import embeddings, load

        load.seed_everything(self.seed)  # a head that the files lack is initialised at random
        model, _ = load.load_base(
            source, self.dtype.value, self.device.value, trust_remote_code=self.trust_remote_code, task=self.task,
            labels=self.labels,
        )  # fmt: skip
        if self.labels:
            load.set_pad_token(model, self.chat.tokenizer)
        embeddings.grow(model, self.embedding_rows)
        return model


def check_settings(task: Task, args: EvalArgs) -> None:
    """Raises: ConfigError for every unsupported combination of settings that can be found without torch."""
    names = args.metrics or []
    metrics.check(names)
    if task == "classification" and (args.generation or args.stop):
        key = "generation: {...}" if args.generation else "stop: [...]"
        raise ConfigError(f"{key} is not supported with task=classification, which generates nothing")
    if args.engine == "vllm":
        vllm_engine.check_settings(task, args.generation)
    if metrics.needs_references(names) and (task == "classification" or args.engine == "vllm"):
        setting = f"engine={args.engine}" if args.engine == "vllm" else f"task={task}"
        unsupported = ", ".join(name for name in names if metrics.needs_references([name]))
        raise ConfigError(f"metrics: {unsupported}: reference answers are not scored with {setting}")


def read_splits(
    files: Mapping[str, Path], max_examples: int | None, reading: Reading, held_out: Path | None
) -> EvalSplits:
    """The rows of each split.

    Args:
        reading: how rows are read.
        held_out: the file of the rows that the run held out, which are read as they are written.
    Raises: DataError naming empty files, and every bad row of all of them.
    """
    rows, hashes = RowsOfSplits(), dict[str, str]()
    bad: list[DataError] = []
    for name, path in files.items():
        try:
            hashes[name] = sha256(path)
            found = loader.read_rows(path, reading=AS_WRITTEN if path == held_out else reading)
            rows[name] = _with_answers(found)[:max_examples]
        except DataError as error:
            bad.append(error)
    if bad:
        raise DataError(*(problem for error in bad for problem in error.problems), hint=bad[0].hint)
    if empty := [files[name] for name, found in rows.items() if not found]:
        raise DataError(*(f"{p} holds no rows" for p in empty), hint="fill it, or leave it out of splits")
    return EvalSplits(rows, hashes, dict(files))


def _with_answers(rows: list[Row]) -> list[Row]:
    """Raises: DataError if a row is a document, which has no answer to compare with."""
    documents = [row for row in rows if row.messages[0]["role"] == TEXT]
    if documents:
        fact = "is a text without an answer, and an evaluation asks for answers"
        hint = "leave its file out of splits; training computes the evaluation loss of texts, on dev_split"
        raise DataError(*(f"{row.file}:{row.line} {fact}" for row in documents[:MAX_LISTED]), hint=hint)
    return rows


def default_metrics(task: Task, engine: str, rows: RowsOfSplits) -> list[str]:
    """The metrics of the task, and that of tool calls where a row ends in one.

    With vLLM those that need no likelihood of the reference answers.
    """
    calls = any(row.messages[-1].get("tool_calls") for of_split in rows.values() for row in of_split)
    names = [*tasks.TASKS[task].metrics, *([metrics.CALLS] if calls else [])]
    return [name for name in names if engine != "vllm" or not metrics.needs_references([name])]


def refuse_unserved(args: EvalArgs, tuned: TunedModel | None, added_rows: int = 0) -> None:
    """Raises: ModelError if vLLM cannot load the adapter, or the rows that the tokens need."""
    if args.engine != "vllm":
        return
    settings = read_json(tuned.folder / "adapter_config.json") if tuned and tuned.is_adapter else None
    reason = why_unserved(settings) if settings else ""
    if reason or added_rows:
        raise ModelError(
            f"engine=vllm: {reason or 'vLLM cannot add rows to the embedding of the base model'}",
            hint="set engine=transformers, or evaluate what export=merged has published",
        )


def refuse_missing_rows(
    requests: EvalRequests, chat: ChatTokenizer, config: Mapping[str, Any], model: str, added: int
) -> None:
    """Raises: DataError if a token of a row has no row in the embedding of `model`, with `added` rows at least."""
    rows = max(tasks.embedding_rows(config) or 0, added)
    for split, prompts in requests.prompts.items() if rows else ():
        answers = [example.ids for example in requests.references.get(split, [])] or [[] for _ in prompts]
        for row, *ids in zip(requests.rows[split], prompts, answers, strict=True):
            if number := max((i for each in ids for i in each if i >= rows), default=0):
                token = chat.tokenizer.convert_ids_to_tokens(number)
                raise DataError(
                    f"{row.file}:{row.line} {tasks.missing_row(token, number, model, rows)}",
                    hint="the tokenizer is not that of the model; train with resize_embeddings=true adds the rows",
                )


def extra_stop_tokens(chat: ChatTokenizer, task: Task) -> list[str]:
    """The tokens that end an answer, if the chat template ends turns with another one than the tokenizer's."""
    found = chat.stop_tokens if tasks.TASKS[task].chat_template else []
    return found if len(found) > 1 else []


def unused_packages(args: EvalArgs, base: Source) -> list[str]:
    """Large packages that this evaluation does not import; a metric outside of METRICS may need any."""
    if any(":" in name for name in args.metrics or []) or args.engine == "vllm":
        return []
    return [*OPTIONAL, *([] if is_quantised(base) is not False else ["bitsandbytes"])]


def labels_of_rows(splits: RowsOfSplits) -> list[str]:
    """The labels of the evaluation rows, sorted: those of a base model that has no head for them.

    Raises: DataError if there are fewer than two.
    """
    found = sorted(
        {label for rows in splits.values() for row in rows for label in task_encoding.trained_answers(row)}
    )
    if len(found) < 2:
        raise DataError(f"every row has the label {found}", hint="a classification needs two labels or more")
    return found


def refuse_corrupt(tuned: TunedModel, run: Run | None) -> None:
    """Raises: RunError if the weights, or the metrics.json that the scores are added to, cannot be read."""
    files = sorted(tuned.folder.glob("*.safetensors"))
    problems = [problem for file in files if (problem := find_weight_corruption(file))]
    if problems or not files:
        what = f"the model in {tuned.folder} is corrupt: {'; '.join(problems) or 'it has no weights'}"
        raise RunError(what, hint="restore it, or give another run")
    if run:
        evaluations.newest(run)


def check_tokenization(
    folder: Path, recorded: Mapping[str, Any] | None, chat: ChatTokenizer, cfg: EvalConfig
) -> None:
    """Compare the tokenizer in `folder` with the hashes `recorded` by its run and by the folder itself.

    Raises: ModelError if tokenizer or chat template differ, unless that is allowed.
    """
    records = [] if recorded is None else [recorded]
    if (folder / IDENTITY_FILE).exists():
        records.append(read_json(folder / IDENTITY_FILE))
    names = {"chat_template_sha256": "chat template", "tokenizer_sha256": "tokenizer"}
    for key, name in names.items():
        if all(record.get(key, chat.identity[key]) == chat.identity[key] for record in records):
            continue
        chosen = cfg.chat_template if key.startswith("chat_template") else None
        where = f"chat_template={chosen}" if chosen else f"the {name} in {folder}"
        problem = f"{where} differs from the one that the model was tuned with"
        if not cfg.allow_tokenizer_mismatch:
            remedy = "remove the setting" if chosen else "restore the folder"
            raise ModelError(problem, hint=f"{remedy}, or set allow_tokenizer_mismatch=true")
        log.warning("%s", problem)
    _check_template_settings(records, chat, cfg.allow_tokenizer_mismatch)


def _check_template_settings(records: Sequence[Mapping[str, Any]], chat: ChatTokenizer, allow: bool) -> None:
    """Raises: ModelError if the settings of the chat template differ, unless that is allowed."""
    record = next(filter(None, records), None)
    if record is None:
        return
    pairs: list[tuple[str, Any, Any]] = [(TEMPLATE_KWARGS, chat.template_kwargs, record.get(TEMPLATE_KWARGS, {}))]
    if chat.writes_empty_thoughts:
        pairs.append((EMPTY_THOUGHTS, chat.empty_thoughts, record.get(EMPTY_THOUGHTS, "loss")))
    differing = [
        f"{key} is {json.dumps(now, ensure_ascii=False)}, and the model was tuned with "
        f"{json.dumps(then, ensure_ascii=False)}"
        for key, now, then in pairs
        if now != then
    ]
    if not differing:
        return
    if not allow:
        raise ModelError(*differing, hint="remove the setting, or set allow_tokenizer_mismatch=true")
    for problem in differing:
        log.warning("%s", problem)
