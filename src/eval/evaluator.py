"""Evaluation of a tuned model and of its untouched base: the same prompts, decoding and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src import runs
from src.config import BaselineConfig, EvalArgs, EvalConfig, to_yaml
from src.data import loader
from src.data.chat import IDENTITY, Chat
from src.data.formats import RowError
from src.data.rows import MOST_SHOWN, Row
from src.errors import DataError, ModelError
from src.eval import compare, metrics
from src.model.source import Source, locate, locate_tuned
from src.utils import environment
from src.utils.curves import Curves
from src.utils.files import read_json, sha256, whole_folder, write_json, write_jsonl, write_text
from src.utils.logs import log, log_to
from src.utils.secrets import redact

Splits = dict[str, list[Row]]


def evaluate(cfg: EvalConfig) -> int:
    """Answer the splits with a tuned model, write its metrics, and compare with the base where it is known.

    A run's evaluation goes into its directory; that of a bare model folder into a new one.
    """
    folder, run = runs.find(cfg.model_path, cfg.output_dir)
    if run and run.status != runs.FINISHED:
        log.warning("run %s is %s; its model is evaluated all the same", run.id, run.status)
    log.info("evaluating %s", folder if run is None else f"run {run.id} ({run.model})")
    tuned = locate_tuned(folder)
    splits, dtype, device = _prepare(cfg)

    from src.model import load  # torch and its like start loading here

    model, tokenizer, base = load.load_tuned(
        tuned, dtype.value, device.value, trust_remote_code=cfg.trust_remote_code
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
        result = _result(answers, _conditions(cfg, chat, dtype, device), cfg) | {
            "base_model": _base(base, run.manifest.get("base_model"))
        }
        _write(run, answers, result, to_yaml(cfg))
    _explain(result)
    _compare_with_base(run, result, cfg)
    return 0


def evaluate_baseline(cfg: BaselineConfig) -> int:
    """Answer the splits with the untouched base, keep its metrics, and compare the newest run that fits."""
    splits, dtype, device = _prepare(cfg)
    source = locate(cfg.model_name, cfg.model_revision)
    log.info("evaluating the base model %s", source.name)

    from src.model import load
    from src.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(source.location, cfg.model_revision, cfg.trust_remote_code)
    model, source = load.load_base(source, dtype.value, device.value, trust_remote_code=cfg.trust_remote_code)
    chat = Chat(tokenizer)
    answers = _answer(model, chat, splits, cfg)
    base = _base(source, None)
    result = _result(answers, _conditions(cfg, chat, dtype, device), cfg) | {"base_model": base}
    target = compare.baseline_folder(cfg.artifacts_dir, base, result["conditions"])
    with whole_folder(target) as temporary:
        _write_answers(temporary, answers)
        write_text(temporary / "config_used.yaml", to_yaml(cfg))
        write_json(temporary / "metrics.json", result)
    log.info("baseline kept in %s", target)
    _explain(result)
    _compare_waiting(result, cfg)
    return 0


def read_splits(cfg: EvalArgs, eval_path: str) -> Splits:
    """The rows of each split, prompt and completion.

    Raises: DataError naming missing files and every bad row.
    """
    paths = {name: Path(eval_path) / f"{name}.jsonl" for name in cfg.splits}
    missing = [p for p in paths.values() if not p.is_file()]
    if missing:
        raise DataError(*(f"{p} does not exist" for p in missing), hint="set eval_path or splits")
    return {name: loader.read_rows(path, "prompt_completion")[: cfg.max_examples] for name, path in paths.items()}


def _prepare(cfg: EvalConfig | BaselineConfig) -> tuple[Splits, environment.Reasoned, environment.Reasoned]:
    """Everything that can be refused before torch is imported."""
    metrics.check(cfg.metrics)
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


def _answer(
    model: Any, chat: Chat, splits: Splits, cfg: EvalConfig | BaselineConfig
) -> dict[str, list[dict[str, Any]]]:
    """`{split: [{prompt, reference, prediction, scores, tokens, stop}, ...]}`."""
    from src.eval.generate import answer

    found = {}
    for name, rows in splits.items():
        prompts = _prompts(rows, chat)
        answers = answer(
            model, chat.tokenizer, prompts, batch_size=cfg.eval_batch_size, max_new_tokens=cfg.max_new_tokens,
            seed=cfg.seed, extra=cfg.generation, title=name,
        )  # fmt: skip
        found[name] = [
            {
                "prompt": row.messages[0]["content"],
                "reference": row.messages[-1]["content"],
                "prediction": a.text,
                "prompt_tokens": len(prompt),
                "tokens": a.tokens,
                "stop": a.stop,
            }
            for row, prompt, a in zip(rows, prompts, answers, strict=True)
        ]
    return found


def _prompts(rows: Sequence[Row], chat: Chat) -> list[list[int]]:
    """Raises: DataError naming every row that the chat template refuses."""
    found, refused = [], []
    for row in rows:
        try:
            found.append(chat.prompt(row.messages[:-1], row.tools))
        except RowError as error:
            refused.append(f"{row.file}:{row.line} {error.detail}")
    if refused:
        raise DataError(*refused[:MOST_SHOWN], hint="mend the rows or the model's chat template")
    return found


def _result(
    answers: Mapping[str, Sequence[dict[str, Any]]], conditions: dict[str, Any], cfg: EvalArgs
) -> dict[str, Any]:
    """Score the answers; each row gets its own scores, each split the corpus score of each metric."""
    corpus: dict[str, dict[str, float]] = {}
    for split, rows in answers.items():
        pairs = [row["prediction"] for row in rows], [row["reference"] for row in rows]
        scored = {name: metrics.score(name, *pairs) for name in cfg.metrics}
        corpus[split] = {name: s.corpus for name, s in scored.items()}
        for index, row in enumerate(rows):
            row["scores"] = {name: s.examples[index] for name, s in scored.items()}
    return {"eval": corpus, "metrics": metrics.describe(cfg.metrics), "conditions": conditions}


def _conditions(
    cfg: EvalConfig | BaselineConfig,
    chat: Chat,
    dtype: environment.Reasoned,
    device: environment.Reasoned,
) -> dict[str, Any]:
    """What the scores depend on, the model's weights aside."""
    return {
        "data": {s: sha256(Path(cfg.eval_path) / f"{s}.jsonl") for s in cfg.splits},
        "max_examples": cfg.max_examples,
        "tokenization": chat.identity,
        "decoding": {"max_new_tokens": cfg.max_new_tokens, "seed": cfg.seed} | redact(cfg.generation),
        "eval_batch_size": cfg.eval_batch_size,
        "precision": dtype.value,
        "device": device.value,
        "metrics": {name: about["implementation"] for name, about in metrics.describe(cfg.metrics).items()},
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
    folder = compare.baseline_folder(cfg.artifacts_dir, result["base_model"], result["conditions"])
    if (folder / "metrics.json").exists():
        compare.record(run, read_json(folder / "metrics.json"))
    else:
        compare.show_one(result, f"{run.id}, tuned")
        log.info("make eval-baseline evaluates the base model under these conditions and compares")


def _compare_waiting(base: dict[str, Any], cfg: BaselineConfig) -> None:
    """Compare the newest run that was evaluated under the same conditions on the same base."""
    for run in runs.all_runs(cfg.output_dir):
        path = run.path / "metrics.json"
        result = read_json(path) if path.exists() else {}
        same = result.get("base_model", {}).get("revision") == base["base_model"]["revision"]
        if same and result.get("conditions") == base["conditions"]:
            compare.record(run, base)
            return
    compare.show_one(base, f"{base['base_model']['name']}, base")


def _explain(result: Mapping[str, Any]) -> None:
    for name, about in result["metrics"].items():
        log.info("%s: %s (scale %s)", name, about["implementation"], about["scale"])
