"""What base and tuned model have in common in an evaluation, made before either is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from src import runs
from src.data import loader, task_encoding
from src.data.chat import IDENTITY_FILE, ChatTokenizer
from src.errors import ConfigError, DataError, ModelError
from src.eval import inference, metrics, vllm_engine
from src.eval.fingerprint import conditions
from src.eval.inference import BatchPlan, EvalRequests, Settings, Splits
from src.model import tasks
from src.model.source import Source, is_quantised
from src.schema import EvalArgs, EvalConfig, Task
from src.utils import environment
from src.utils.environment import Reasoned
from src.utils.files import read_json, sha256
from src.utils.logs import log
from src.utils.process_info import OPTIONAL


class EvalSplits(NamedTuple):
    """The rows of each split, and the sha256 of the file that they were read from."""

    rows: Splits
    sha256: dict[str, str]


class EvalContext(NamedTuple):
    """All that two models have in common that are to be compared."""

    cfg: Any
    chat: ChatTokenizer
    asked: EvalRequests
    dtype: Reasoned
    device: Reasoned
    plan: BatchPlan
    labels: Sequence[str]
    fixed: Mapping[str, Any]  # the conditions, save that memory may yet run out

    @property
    def conditions(self) -> dict[str, Any]:
        return {**self.fixed, "batch_size": dict(self.plan.sizes)}

    def load(self, source: Source) -> Any:
        """The model at `source`, as the task has it."""
        from src.model import load

        load.seed_everything(self.cfg.seed)  # a head that the files lack is drawn
        trust = self.cfg.trust_remote_code
        model, _ = load.load_base(
            source, self.dtype.value, self.device.value, trust_remote_code=trust, task=self.cfg.task,
            labels=self.labels,
        )  # fmt: skip
        if self.labels:
            load.pad_alike(model, self.chat.tokenizer)
        return model


def read_splits(cfg: EvalArgs, eval_path: str) -> EvalSplits:
    """The rows of each split, prompt and completion.

    Raises: DataError naming missing and empty files, and every bad row of all of them.
    """
    paths = {name: Path(eval_path) / f"{name}.jsonl" for name in cfg.splits}
    missing = [p for p in paths.values() if not p.is_file()]
    if missing:
        raise DataError(*(f"{p} does not exist" for p in missing), hint="set eval_path or splits")
    found, hashes = Splits(), dict[str, str]()
    bad: list[DataError] = []
    for name, path in paths.items():
        try:
            hashes[name] = sha256(path)
            found[name] = loader.read_rows(path)[: cfg.max_examples]
        except DataError as error:
            bad.append(error)
    if bad:
        raise DataError(*(problem for error in bad for problem in error.problems), hint=bad[0].hint)
    if empty := [paths[name] for name, rows in found.items() if not rows]:
        raise DataError(*(f"{p} holds no rows" for p in empty), hint="fill it, or leave it out of splits")
    return EvalSplits(found, hashes)


def prepare(cfg: Settings) -> tuple[EvalSplits, Reasoned, Reasoned]:
    """Everything that can be refused before torch is imported."""
    metrics.check(cfg.metrics or [])
    if cfg.task == "classification" and (cfg.generation or cfg.stop):
        key = "generation: {...}" if cfg.generation else "stop: [...]"
        raise ConfigError(f"{key} has no meaning with task=classification, which generates nothing")
    if cfg.engine == "vllm":
        vllm_engine.refuse(str(cfg.task), cfg.generation)
    if metrics.needs_references(cfg.metrics or []) and (cfg.task == "classification" or cfg.engine == "vllm"):
        why = f"engine={cfg.engine}" if cfg.engine == "vllm" else f"task={cfg.task}"
        raise ConfigError(f"metrics: with {why} no metric can read the reference answers token by token")
    splits = read_splits(cfg, cfg.eval_path)
    device = environment.choose_device(cfg.cuda_visible_devices)
    dtype = environment.choose_dtype(cfg.bf16, cfg.cuda_visible_devices)
    log.info("device %s; precision %s", device, dtype)
    return splits, dtype, device


def default_metrics(task: Task, engine: str) -> list[str]:
    """Those of the task; vLLM says nothing of the reference answers' tokens."""
    usual = tasks.TASKS[task].metrics
    return [name for name in usual if engine != "vllm" or not metrics.needs_references([name])]


def unused_packages(cfg: Settings, base: Source) -> list[str]:
    """Large packages that this evaluation does not need; a metric from outside may need any."""
    if any(":" in name for name in cfg.metrics or []) or cfg.engine == "vllm":
        return []
    return [*OPTIONAL, *([] if is_quantised(base) is not False else ["bitsandbytes"])]


def set_up(
    cfg: Settings, splits: EvalSplits, dtype: Reasoned, device: Reasoned, base: Source, tokenizer_at: str,
    revision: str | None, labels: Sequence[str] | None,
) -> tuple[EvalContext, Source]:  # fmt: skip
    """The prompts as tokens and the layout of their batches; torch and its like are imported here.

    Args: labels: of a tuned classifier; None: those of the rows, or of a base model that knows them all.
    Returns: also the base with its revision resolved.
    """
    from src.model import load
    from src.model.tokenizer import load_config, load_tokenizer

    trust = cfg.trust_remote_code
    tokenizer = load_tokenizer(
        tokenizer_at, revision, trust, templated=tasks.TASKS[cfg.task or "causal_lm"].templated
    )
    settings = load_config(base.location, base.revision, trust)
    config = settings.to_dict()
    if labels is None:
        labels = tasks.labels_for(labels_of_rows(splits.rows), config) if cfg.task == "classification" else ()
    chat = ChatTokenizer(tokenizer)
    asked = inference.encode_requests(
        splits.rows, chat, str(cfg.task), config, metrics.needs_references(cfg.metrics or [])
    )
    inference.warn_of_cut_prompts(asked, tasks.positions(config))
    plan = inference.plan_batches(asked, cfg, config, dtype.value, device.value)
    fixed = conditions(cfg, splits.sha256, asked, chat, dtype, device, plan)
    return EvalContext(cfg, chat, asked, dtype, device, plan, labels, fixed), load.resolved(base, settings)


def labels_of_rows(splits: Splits) -> list[str]:
    """The labels of the evaluation rows, sorted: a base model has learned none.

    Raises: DataError if there are fewer than two.
    """
    found = sorted(
        {label for rows in splits.values() for row in rows for label in task_encoding.trained_answers(row)}
    )
    if len(found) < 2:
        raise DataError(f"every row has the label {found}", hint="a classification needs two labels or more")
    return found


def check_tokenization(folder: Path, run: runs.Run | None, chat: ChatTokenizer, cfg: EvalConfig) -> None:
    """Raises: ModelError if the model was tuned with another tokenizer or template, unless that is allowed."""
    recorded = [run.manifest.get("tokenization", {})] if run else []
    if (folder / IDENTITY_FILE).exists():
        recorded.append(read_json(folder / IDENTITY_FILE))
    names = {"chat_template_sha256": "chat template", "tokenizer_sha256": "tokenizer"}
    other = [
        what
        for key, what in names.items()
        if any(r.get(key, chat.identity[key]) != chat.identity[key] for r in recorded)
    ]
    for what in other:
        said = f"{folder} holds another {what} than its model was tuned with"
        if not cfg.allow_tokenizer_mismatch:
            raise ModelError(said, hint="restore the folder, or set allow_tokenizer_mismatch=true")
        log.warning("%s", said)
