"""Asking a model the questions of its evaluation again: the same rows, tokens, decoding and batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from omegaconf import OmegaConf

from src import config
from src.data.chat import IDENTITY, Chat
from src.data.formats import Row
from src.data.store import Example
from src.errors import RunError
from src.eval import inference, metrics
from src.eval.layout import batches
from src.eval.setup import read_splits
from src.model import tasks
from src.model.methods import merge
from src.model.source import Tuned
from src.runs import Run
from src.schema import EvalConfig, GateArgs, Task
from src.utils import environment
from src.utils.files import read_json, sha256, write_json

AT_ONCE = 32  # questions that no evaluation has asked before


class Asker(Protocol):
    """What says where a model is loaded, and whether code of its repository may run."""

    @property
    def cuda_visible_devices(self) -> str: ...
    @property
    def trust_remote_code(self) -> bool: ...


class Questions(NamedTuple):
    """Rows of a split, and how the run's evaluation asked them. `batch` is the number asked at once."""

    rows: list[Row]
    split: str
    metric: str
    task: Task
    labels: list[str]
    cfg: EvalConfig
    batch: int


def questions(run: Run, gate: GateArgs, labels: Sequence[str]) -> Questions:
    """The rows of the gate's split, as the run was asked them.

    Raises: RunError if it was not evaluated on that split, or the file is not what it was then.
    """
    settings = run.path / "evals" / "config_used.yaml"
    if not settings.is_file():
        raise RunError(f"run {run.id} has not been evaluated", hint="make eval does that")
    values: Any = OmegaConf.to_container(OmegaConf.load(settings), resolve=True)
    cfg: EvalConfig = config.load("eval", values)
    conditions = read_json(run.path / "metrics.json")["conditions"]
    path = Path(cfg.eval_path) / f"{gate.split}.jsonl"
    if gate.split not in conditions["data"]:
        known = ", ".join(conditions["data"])
        raise RunError(
            f"run {run.id} was not evaluated on {gate.split}", hint=f"set gate.split to one of: {known}"
        )
    if not path.is_file() or sha256(path) != conditions["data"][gate.split]:
        raise RunError(
            f"{path} is not the file that run {run.id} was evaluated on", hint="restore it, or run make eval again"
        )
    cfg.splits = [gate.split]
    task: Task = run.manifest.get("task", "causal_lm")
    rows = read_splits(cfg, cfg.eval_path).rows[gate.split]
    return Questions(
        rows, gate.split, gate.metric or tasks.TASKS[task].decides, task, list(labels), cfg,
        conditions["batch_size"][gate.split],
    )  # fmt: skip


def chat_of(folder: Path, task: Task) -> Chat:
    """The tokenizer in a model's folder. transformers is imported here at the earliest."""
    from src.model.tokenizer import load_tokenizer

    return Chat(load_tokenizer(str(folder), templated=tasks.TASKS[task].templated))


def save_tokenizer(chat: Chat, folder: Path) -> None:
    """Write the tokenizer beside a model, with the hashes by which an evaluation knows it again."""
    chat.tokenizer.save_pretrained(folder)
    write_json(folder / IDENTITY, chat.identity)


def prompts(settings: Mapping[str, Any], chat: Chat, asked: Questions) -> list[list[int]]:
    """The token ids of each question, for a model of these settings (its config.json)."""
    return _encoded(settings, chat, asked, references=False).prompts[asked.split]


def _encoded(
    settings: Mapping[str, Any], chat: Chat, asked: Questions, *, references: bool
) -> inference.Questions:
    return inference.questions({asked.split: asked.rows}, chat, asked.task, settings, references)


def first_asked(prompts: Sequence[list[int]], batch: int, count: int) -> list[int]:
    """The places of the questions in the first batches that hold `count` of them: the longest are asked first."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    return order[: -(-count // batch) * batch]


def answers(model: Any, chat: Chat, asked: Questions) -> list[dict[str, Any]]:
    """`{prediction, reference, ...}` of each question, in their order; with `reference_*` where the metric of
    `asked` reads those."""
    found = _made(model, chat, asked)
    references = [row.messages[-1]["content"] for row in asked.rows]
    rows = [row | {"reference": r} for row, r in zip(found, references, strict=True)]
    if not metrics.needs_references([asked.metric]):
        return rows
    return [{**row, **more} for row, more in zip(rows, _read(model, chat, asked), strict=True)]


def _made(model: Any, chat: Chat, asked: Questions) -> list[dict[str, Any]]:
    """`{prediction, ...}` of each question, batch by batch."""
    ids = prompts(model.config.to_dict(), chat, asked)
    writer = inference.writer(model, chat, asked.task, asked.labels, asked.cfg, asked.cfg.seed)
    made: dict[int, dict[str, Any]] = {}
    for number, places in enumerate(batches([len(i) for i in ids], asked.batch, unpadded=writer.unpadded)):
        made |= zip(places, map(inference.told, writer([ids[i] for i in places], number)), strict=True)
    return [made[i] for i in range(len(ids))]


def _read(model: Any, chat: Chat, asked: Questions) -> list[Mapping[str, Any]]:
    """What the model thinks of each reference answer, one by one."""
    from src.eval.loglikelihood import Reader

    examples = _encoded(model.config.to_dict(), chat, asked, references=True).references[asked.split]
    reader = Reader(model, chat.tokenizer, examples)
    return [row for i in range(len(examples)) for row in reader([i], i)]


def references(settings: Mapping[str, Any], chat: Chat, asked: Questions) -> list[Example]:
    """Each question with its reference answer as tokens, the answer marked as in training; unusable rows aside."""
    made = inference.encode_references(asked.rows, chat, asked.task, tasks.positions(settings))
    return [example for example in made if isinstance(example, Example)]


def loaded(
    about: Asker, tuned: Tuned, task: Task, labels: Sequence[str], dtype: str, *, merged: bool = False
) -> tuple[Any, Chat]:
    """The tuned model in the precision `dtype`, its adapter `merged` or over the base, and its tokenizer.

    torch is imported here at the earliest.
    """
    from src.model import load

    device = environment.choose_device(about.cuda_visible_devices).value
    model, tokenizer, _ = load.load_tuned(
        tuned, dtype, device, trust_remote_code=about.trust_remote_code, task=task, labels=labels
    )
    return (merge(model) if merged else model), Chat(tokenizer)


def plain(texts: Sequence[str], task: Task, labels: Sequence[str], cfg: EvalConfig) -> Questions:
    """Questions of one's own, without reference answers."""
    rows = [
        Row(Path("question"), n, [{"role": "user", "content": t}, {"role": "assistant", "content": ""}])
        for n, t in enumerate(texts)
    ]
    return Questions(rows, "question", tasks.TASKS[task].decides, task, list(labels), cfg, AT_ONCE)
