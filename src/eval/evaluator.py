"""Evaluation of a tuned model and of its untouched base: the same prompts, decoding and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from src import runs
from src.config import BaselineConfig, EvalArgs, EvalConfig, to_yaml
from src.data import loader, pairs
from src.data.chat import IDENTITY, Chat
from src.data.formats import RowError
from src.data.rows import MOST_SHOWN, Row
from src.errors import ConfigError, DataError, ModelError
from src.eval import compare, metrics, pairing
from src.model import tasks
from src.model.source import Source, locate, locate_tuned
from src.utils import environment
from src.utils.curves import Curves
from src.utils.files import read_json, sha256, whole_folder, write_json, write_jsonl, write_text
from src.utils.logs import log, log_to
from src.utils.secrets import redact

Splits = dict[str, list[Row]]
Settings = EvalConfig | BaselineConfig


def evaluate(cfg: EvalConfig) -> int:
    """Answer the splits with a tuned model, write its metrics, and compare with the base where it is known.

    A run's evaluation goes into its directory; that of a bare model folder into a new one.
    """
    folder, run = runs.find(cfg.model_path, cfg.output_dir)
    if run and run.status != runs.FINISHED:
        log.warning("run %s is %s; its model is evaluated all the same", run.id, run.status)
    log.info("evaluating %s", folder if run is None else f"run {run.id} ({run.model})")
    tuned = locate_tuned(folder)
    task, labels = tasks.tuned_for(tuned, cfg.task)
    cfg = replace(cfg, task=task, metrics=cfg.metrics or list(tasks.TASKS[task].metrics))
    splits, dtype, device = _prepare(cfg)
    pairs.refuse_unknown_labels([row for rows in splits.values() for row in rows] if labels else [], labels)

    from src.model import load  # torch and its like start loading here

    model, tokenizer, base = load.load_tuned(
        tuned, dtype.value, device.value, trust_remote_code=cfg.trust_remote_code, task=task, labels=labels
    )
    chat = Chat(tokenizer)
    _check_tokenization(folder if run is None else run.model, run, chat, cfg)
    part = "evaluation" if run else None
    if run is None:
        facts = {"base_model": _base(base, None), "model_path": str(folder)}
        run = runs.create(cfg.output_dir, "eval", to_yaml(cfg), facts)
    log_to(run.logs)
    with run.recorded(part):
        answers = _answer(model, chat, splits, cfg)
        result = _result(answers, _conditions(cfg, chat, dtype, device), cfg.metrics or []) | {
            "base_model": _base(base, run.manifest.get("base_model"))
        }
        _write(run, answers, result, to_yaml(cfg))
    _explain(result)
    _compare_with_base(run, result, cfg)
    return 0


def evaluate_baseline(cfg: BaselineConfig) -> int:
    """Answer the splits with the untouched base, keep its metrics, and compare the newest run that fits."""
    task = tasks.TASKS[cfg.task]
    cfg = replace(cfg, metrics=cfg.metrics or list(task.metrics))
    splits, dtype, device = _prepare(cfg)
    source = locate(cfg.model_name, cfg.model_revision)
    tasks.check_source(source, cfg.task)
    log.info("evaluating the base model %s", source.name)

    from src.model import load
    from src.model.tokenizer import load_config, load_tokenizer

    tokenizer = load_tokenizer(
        source.location, cfg.model_revision, cfg.trust_remote_code, templated=task.templated
    )
    config = load_config(source.location, cfg.model_revision, cfg.trust_remote_code)
    labels = tasks.labels_for(_labels(splits), config.to_dict()) if cfg.task == "classification" else ()
    load.seed_everything(cfg.seed)
    model, source = load.load_base(
        source, dtype.value, device.value, trust_remote_code=cfg.trust_remote_code, task=cfg.task, labels=labels
    )
    if labels:
        load.pad_alike(model, tokenizer)
        _say_head(model, labels, cfg.seed)
    chat = Chat(tokenizer)
    answers = _answer(model, chat, splits, cfg)
    base = _base(source, None)
    result = _result(answers, _conditions(cfg, chat, dtype, device), cfg.metrics or []) | {"base_model": base}
    target = pairing.baseline_folder(cfg.artifacts_dir, base, result["conditions"])
    with whole_folder(target) as temporary:
        _write_answers(temporary, answers)
        write_text(temporary / "config_used.yaml", to_yaml(cfg))
        write_json(temporary / "metrics.json", result)
    log.info("baseline kept in %s", target)
    _explain(result)
    _compare_waiting(result, target, cfg)
    return 0


def read_splits(cfg: EvalArgs, eval_path: str) -> Splits:
    """The rows of each split, prompt and completion.

    Raises: DataError naming missing files and every bad row.
    """
    paths = {name: Path(eval_path) / f"{name}.jsonl" for name in cfg.splits}
    missing = [p for p in paths.values() if not p.is_file()]
    if missing:
        raise DataError(*(f"{p} does not exist" for p in missing), hint="set eval_path or splits")
    return {name: loader.read_rows(path)[: cfg.max_examples] for name, path in paths.items()}


def _labels(splits: Splits) -> list[str]:
    """The labels of the evaluation rows, sorted: a base model has learned none.

    Raises: DataError if there are fewer than two.
    """
    found = sorted({label for rows in splits.values() for row in rows for label in pairs.answers(row)})
    if len(found) < 2:
        raise DataError(f"every row has the label {found}", hint="a classification needs two labels or more")
    return found


def _say_head(model: Any, labels: Sequence[str], seed: int) -> None:
    drawn = ", ".join(model.untrained_modules)
    log.info(
        "labels: %s; %s", ", ".join(labels),
        f"the base model has no head for them: {drawn} untrained, drawn with seed={seed}" if drawn
        else "the base model's own head chooses",
    )  # fmt: skip


def _prepare(cfg: Settings) -> tuple[Splits, environment.Reasoned, environment.Reasoned]:
    """Everything that can be refused before torch is imported."""
    metrics.check(cfg.metrics or [])
    if cfg.task == "classification" and cfg.generation:
        raise ConfigError("generation: {...} has no meaning with task=classification, which generates nothing")
    splits = read_splits(cfg, cfg.eval_path)
    device = environment.choose_device(cfg.cuda_visible_devices)
    dtype = environment.choose_dtype(cfg.bf16, cfg.cuda_visible_devices)
    log.info("device %s; precision %s", device, dtype)
    return splits, dtype, device


def _check_tokenization(folder: Path, run: runs.Run | None, chat: Chat, cfg: EvalConfig) -> None:
    """Raises: ModelError if the model was tuned with another tokenizer or template, unless that is allowed."""
    recorded = [run.manifest.get("tokenization", {})] if run else []
    if (folder / IDENTITY).exists():
        recorded.append(read_json(folder / IDENTITY))
    names = {"chat_template_sha256": "chat template", "tokenizer_sha256": "tokenizer"}
    other = [
        what
        for key, what in names.items()
        if any(r.get(key, chat.identity[key]) != chat.identity[key] for r in recorded)
    ]
    for what in other:
        said = f"{folder} holds another {what} than its model was tuned with"
        if not cfg.allow_other_tokenizer:
            raise ModelError(said, hint="restore the folder, or set allow_other_tokenizer=true")
        log.warning("%s", said)


def _answer(model: Any, chat: Chat, splits: Splits, cfg: Settings) -> dict[str, list[dict[str, Any]]]:
    """`{split: [{prompt, reference, prediction, scores, tokens, stop}, ...]}`."""
    predict = _choices if cfg.task == "classification" else _generated
    most = tasks.positions(model.config.to_dict())
    found = {}
    for name, rows in splits.items():
        prompts = _prompts(rows, chat, str(cfg.task), most)
        predictions = predict(model, chat, prompts, cfg, name)
        found[name] = [
            {"prompt": row.messages[0]["content"], "reference": row.messages[-1]["content"], **predicted}
            for row, predicted in zip(rows, predictions, strict=True)
        ]
    return found


def _generated(
    model: Any, chat: Chat, prompts: Sequence[list[int]], cfg: Settings, title: str
) -> list[dict[str, Any]]:
    from src.eval.generate import answer

    made = answer(
        model, chat.tokenizer, prompts, batch_size=_batch_size(cfg), max_new_tokens=cfg.max_new_tokens,
        seed=cfg.seed, extra=cfg.generation, title=title,
    )  # fmt: skip
    return [
        {"prediction": a.text, "prompt_tokens": len(prompt), "tokens": a.tokens, "stop": a.stop}
        for prompt, a in zip(prompts, made, strict=True)
    ]


def _batch_size(cfg: Settings) -> int:
    return 32 if cfg.eval_batch_size == "auto" else cfg.eval_batch_size


def _choices(
    model: Any, chat: Chat, prompts: Sequence[list[int]], cfg: Settings, title: str
) -> list[dict[str, Any]]:
    from src.eval.classify import classify

    labels = tasks.labels_of(model.config.to_dict())
    made = classify(model, chat.tokenizer.pad_token_id, prompts, labels, _batch_size(cfg), title)
    return [
        {"prediction": choice.label, "probability": choice.probability, "prompt_tokens": len(prompt)}
        for prompt, choice in zip(prompts, made, strict=True)
    ]


def _prompts(rows: Sequence[Row], chat: Chat, task: str, most: int | None) -> list[list[int]]:
    """Raises: DataError naming every row that the chat template refuses."""
    found, refused = [], []
    for row in rows:
        try:
            found.append(pairs.TASKS[task].prompt(chat, row, most))
        except RowError as error:
            refused.append(f"{row.file}:{row.line} {error.detail}")
    if refused:
        raise DataError(*refused[:MOST_SHOWN], hint="mend the rows or the model's chat template")
    full = sum(len(ids) == most for ids in found)
    if full:
        log.warning("%d prompts fill the %d positions of the model; what is longer was cut at its end", full, most)
    return found


def _result(
    answers: Mapping[str, Sequence[dict[str, Any]]], conditions: dict[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """Score the answers; each row gets its own scores, each split the corpus score of each metric."""
    corpus = {split: metrics.score_rows(names, rows) for split, rows in answers.items()}
    return {"eval": corpus, "metrics": metrics.describe(names), "conditions": conditions}


def _conditions(
    cfg: Settings,
    chat: Chat,
    dtype: environment.Reasoned,
    device: environment.Reasoned,
) -> dict[str, Any]:
    """What the scores depend on, the model's weights aside."""
    return {
        "task": cfg.task,
        "data": {s: sha256(Path(cfg.eval_path) / f"{s}.jsonl") for s in cfg.splits},
        "max_examples": cfg.max_examples,
        "tokenization": chat.identity,
        "decoding": {"max_new_tokens": cfg.max_new_tokens, "seed": cfg.seed} | redact(cfg.generation),
        "eval_batch_size": _batch_size(cfg),
        "precision": dtype.value,
        "device": device.value,
        "metrics": {name: about["implementation"] for name, about in metrics.describe(cfg.metrics or []).items()},
    }


def _base(source: Source, recorded: Mapping[str, Any] | None) -> dict[str, Any]:
    """The base model's identity; a full fine-tune knows its base only from its run's manifest."""
    return dict(recorded or {"name": source.name, "revision": source.revision})


def _write(run: runs.Run, answers: Mapping[str, Any], result: dict[str, Any], config_yaml: str) -> None:
    _write_answers(run.path / "evals", answers)
    write_text(run.path / "evals" / "config_used.yaml", config_yaml)
    before = read_json(run.path / "metrics.json") if (run.path / "metrics.json").exists() else {}
    (run.path / "comparison.json").unlink(missing_ok=True)  # it compared what is now replaced
    write_json(run.path / "metrics.json", before | result)
    curves = Curves(run.logs)
    step = before.get("train", {}).get("steps", 0)
    for split, scores in result["eval"].items():
        for name, value in scores.items():
            curves.add(f"eval_{split}/{name}", value, step)
    curves.close()


def _write_answers(folder: Path, answers: Mapping[str, Any]) -> None:
    for split, rows in answers.items():
        write_jsonl(folder / f"{split}.predictions.jsonl", rows)


def _compare_with_base(run: runs.Run, result: dict[str, Any], cfg: EvalConfig) -> None:
    folder = pairing.baseline_folder(cfg.artifacts_dir, result["base_model"], result["conditions"])
    if (folder / "metrics.json").exists():
        compare.record(run, folder, cfg.gate)
    else:
        compare.show_one(result, f"{run.id}, tuned")
        log.info("make eval-baseline evaluates the base model under these conditions and compares")


def _compare_waiting(base: dict[str, Any], folder: Path, cfg: BaselineConfig) -> None:
    """Compare the newest run that was evaluated under the same conditions on the same base."""
    for run in runs.all_runs(cfg.output_dir):
        path = run.path / "metrics.json"
        result = read_json(path) if path.exists() else {}
        same = result.get("base_model", {}).get("revision") == base["base_model"]["revision"]
        if same and result.get("conditions") == base["conditions"]:
            compare.record(run, folder, cfg.gate)
            return
    compare.show_one(base, f"{base['base_model']['name']}, base")


def _explain(result: Mapping[str, Any]) -> None:
    for name, about in result["metrics"].items():
        log.info("%s: %s (scale %s)", name, about["implementation"], about["scale"])
