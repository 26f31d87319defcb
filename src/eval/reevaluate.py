"""Repeat a run's evaluation on some of its rows: the same requests, decoding and batches.

The gate checks with this that the saved model gives the predictions that were scored, and export that a merged or
converted model does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from .. import config
from ..data import loader
from ..data.chat import IDENTITY_FILE, ChatTokenizer
from ..data.eval_rows import AS_WRITTEN, Reading
from ..data.formats import Row
from ..data.store import Example
from ..errors import RunError, UserError
from ..model import tasks
from ..model.methods import merge
from ..model.source import LoadArgs, TunedModel
from ..runs import CONFIG, Run
from ..schema import ChatArgs, ColumnArgs, EvalArgs, EvalConfig, GateArgs, SeedArgs, Task
from ..utils import environment
from ..utils.commands import command
from ..utils.files import sha256, write_json
from ..utils.references import to_literal
from . import eval_data, evaluations, inference, inherit, metrics, verdict
from .batching import batch_indices
from .inherit import DECODED_BY
from .results import EvalResult
from .setup import read_splits

BATCH_SIZE = 32  # of prompts that no evaluation has batched before


class Reevaluation(NamedTuple):
    """Rows of one split, and how they are evaluated.

    metric: scores the predictions. args, seed: decoding. batch_size: that of the evaluation.
    """

    rows: list[Row]
    split: str
    metric: str
    task: Task
    labels: list[str]
    args: EvalArgs
    seed: int
    batch_size: int
    chat: ChatArgs | None = None  # of the evaluation; None: as the model was tuned


def of_run(run: Run, gate: GateArgs, labels: Sequence[str]) -> Reevaluation:
    """The rows of the gate's split, as the run was evaluated on them.

    Raises: RunError if the run was not evaluated on that split, or the file has changed since.
    """
    evaluation = evaluations.require(run)
    settings = evaluation.folder / CONFIG
    if not settings.is_file():
        raise RunError(f"{settings} does not exist", hint=f"{command('eval', run.word)} makes it")
    values: Any = OmegaConf.to_container(OmegaConf.load(settings), resolve=True)
    cfg: EvalConfig = config.load("eval", values)
    result = evaluation.result
    conditions = result["conditions"]
    gate, _ = verdict.resolve(gate, result)
    split = str(gate.split)
    if split not in conditions["data"]:
        known = ", ".join(conditions["data"])
        raise RunError(f"run {run.id} was not evaluated on {split}", hint=f"set gate.split to one of: {known}")
    (path,) = eval_data.find_files(cfg.eval_path, [split], run).values()
    if sha256(path) != conditions["data"][split]:
        raise RunError(
            f"{path} is not the file that run {run.id} was evaluated on",
            hint=f"restore it, or run {command('eval', run.word)} again",
        )
    task: Task = run.manifest.get("task", "causal_lm")
    splits = read_splits({split: path}, cfg.max_examples, Reading.of(cfg), eval_data.held_out_file(run))
    return Reevaluation(
        rows=splits.rows[split],
        split=split,
        metric=str(gate.metric),
        task=task,
        labels=list(labels),
        args=cfg,
        seed=cfg.seed,
        batch_size=conditions["batch_size"][split],
        chat=cfg,
    )


def prompts_of(run: Run) -> list[str]:
    """The prompts of the run's newest evaluation; without one, of its evaluation data; empty if it has none."""
    if newest := evaluations.newest(run):
        files = sorted(newest.folder.glob("*.predictions.jsonl"))
        result = EvalResult.of_run(run, newest)
        splits = [file.name.removesuffix(".predictions.jsonl") for file in files]
        return [row["prompt"] for split in splits for row in result.rows(split)]
    with suppress(UserError):
        (file, *_) = eval_data.find_files(None, None, run).values()
        columns = ColumnArgs(**inherit.columns_of(run, run.settings))
        reading = AS_WRITTEN if file == eval_data.held_out_file(run) else Reading(columns)
        rows = loader.read_rows(file, reading=reading)
        return [row.messages[-2]["content"] for row in rows if len(row.messages) > 1]
    return []


def of_texts(texts: Sequence[str], task: Task, labels: Sequence[str], run: Run | None = None) -> Reevaluation:
    """Prompts without reference answers, decoded as in the newest evaluation of `run`, else by the defaults."""
    newest = evaluations.newest(run) if run else None
    used = to_literal(newest.settings) if newest else {}
    decoding = {key: value for key, value in used.items() if key in DECODED_BY}
    rows = [
        Row(Path("prompt"), n, [{"role": "user", "content": t}, {"role": "assistant", "content": ""}])
        for n, t in enumerate(texts)
    ]
    metric = tasks.TASKS[task].gate_metric
    args = EvalArgs(**decoding)
    return Reevaluation(rows, "prompt", metric, task, list(labels), args, SeedArgs().seed, BATCH_SIZE)


def load_chat(folder: Path, task: Task, chat: ChatArgs | None = None) -> ChatTokenizer:
    """The tokenizer of a model folder, with the template settings `chat`. Imports transformers.

    chat: None for those that the model was tuned with.
    """
    from ..model.tokenizer import load_tokenizer

    chat = chat or _tuned_chat(folder)
    tokenizer = load_tokenizer(str(folder), templated=tasks.TASKS[task].chat_template, chat=chat)
    return ChatTokenizer(tokenizer, chat.chat_template_kwargs, chat.empty_thoughts)


def _tuned_chat(folder: Path) -> ChatArgs:
    return ChatArgs(**inherit.template_settings(folder))


def save_tokenizer(chat: ChatTokenizer, folder: Path) -> None:
    """Write the tokenizer into a model folder, with the hashes by which an evaluation recognises it."""
    chat.tokenizer.save_pretrained(folder)
    write_json(folder / IDENTITY_FILE, chat.identity)


def load_model(
    load_args: LoadArgs,
    tuned: TunedModel,
    task: Task,
    labels: Sequence[str],
    dtype: str,
    *,
    merged: bool = False,
    chat: ChatArgs | None = None,
) -> tuple[Any, ChatTokenizer]:
    """The tuned model in the precision `dtype`, its adapter `merged` or not, and its tokenizer. Imports torch.

    chat: as in `load_chat`.
    """
    from ..model import load

    device = environment.choose_device(load_args.cuda_visible_devices).value
    chat = chat or _tuned_chat(tuned.folder)
    model, tokenizer, _ = load.load_tuned(
        tuned, dtype, device, trust_remote_code=load_args.trust_remote_code, task=task, labels=labels, chat=chat
    )
    return (merge(model) if merged else model), ChatTokenizer(
        tokenizer, chat.chat_template_kwargs, chat.empty_thoughts
    )


def prompt_ids(config: Mapping[str, Any], chat: ChatTokenizer, evaluation: Reevaluation) -> list[list[int]]:
    """The token ids of each prompt, for a model with the settings `config` (its config.json)."""
    return _requests(config, chat, evaluation, references=False).prompts[evaluation.split]


def reference_examples(config: Mapping[str, Any], chat: ChatTokenizer, evaluation: Reevaluation) -> list[Example]:
    """Each prompt with its reference answer, as in the evaluation; rows that cannot be encoded are left out."""
    encoded = inference.encode_references(evaluation.rows, chat, evaluation.task, tasks.max_positions(config))
    return [example for example in encoded if isinstance(example, Example)]


def first_batches(prompts: Sequence[list[int]], batch_size: int, count: int) -> list[int]:
    """The indices of the prompts in the first batches that hold at least `count`: the longest prompts."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    return order[: -(-count // batch_size) * batch_size]


def predict(model: Any, chat: ChatTokenizer, evaluation: Reevaluation) -> list[dict[str, Any]]:
    """`{prediction, reference, ...}` of each row, in order; with `reference_*` where the metric reads those."""
    predictions = _predictions(model, chat, evaluation)
    references = inference.answer_texts(evaluation.rows, chat, evaluation.task, None)
    pairs = zip(evaluation.rows, predictions, references, strict=True)
    rows = [made | {"reference": text} | inference.called(row) for row, made, text in pairs]
    if not metrics.needs_references([evaluation.metric]):
        return rows
    return [
        {**row, **scores} for row, scores in zip(rows, _score_references(model, chat, evaluation), strict=True)
    ]


def _predictions(model: Any, chat: ChatTokenizer, evaluation: Reevaluation) -> list[dict[str, Any]]:
    prompts = prompt_ids(model.config.to_dict(), chat, evaluation)
    predictor = inference.make_predictor(
        model, chat, evaluation.task, evaluation.labels, evaluation.args, evaluation.seed
    )
    found: dict[int, dict[str, Any]] = {}
    lengths = list(map(len, prompts))
    for number, indices in enumerate(batch_indices(lengths, evaluation.batch_size, unpadded=predictor.unpadded)):
        made = predictor([prompts[i] for i in indices], number)
        found |= zip(indices, (prediction.to_row() for prediction in made), strict=True)
    return [found[i] for i in range(len(prompts))]


def _score_references(model: Any, chat: ChatTokenizer, evaluation: Reevaluation) -> list[Mapping[str, Any]]:
    """The likelihood of each reference answer, one forward pass each."""
    from .generate import ReferenceScorer

    requests = _requests(model.config.to_dict(), chat, evaluation, references=True)
    examples = requests.references[evaluation.split]
    scorer = ReferenceScorer(model, chat.tokenizer, examples)
    return [row for i in range(len(examples)) for row in scorer([i], i)]


def _requests(
    config: Mapping[str, Any], chat: ChatTokenizer, evaluation: Reevaluation, *, references: bool
) -> inference.EvalRequests:
    return inference.encode_requests(
        {evaluation.split: evaluation.rows}, chat, evaluation.task, config, references
    )
