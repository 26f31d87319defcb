"""Evaluation of a tuned model and of its untouched base: the same prompts, decoding and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from src import runs
from src.config import to_yaml
from src.data import task_encoding
from src.errors import RunError
from src.eval import compare, inference, metrics, partial_results, results, vllm_engine
from src.eval.fingerprint import base_model, engine, identity
from src.eval.inference import GenerationStats
from src.eval.partial_results import PartialResults
from src.eval.report import page as report
from src.eval.setup import (
    EvalContext,
    check_tokenization,
    default_metrics,
    labels_of_rows,
    prepare,
    set_up,
    unused_packages,
)
from src.model import tasks
from src.model.source import Source, Tuned, locate, locate_tuned
from src.schema import BaselineConfig, EvalConfig
from src.utils.event_files import Curves
from src.utils.files import atomic_dir, read_json, write_json, write_jsonl, write_text
from src.utils.logs import log, log_to
from src.utils.process_info import block_imports, freeze_gc
from src.utils.weights import find_corruption


def evaluate(cfg: EvalConfig) -> int:
    """Answer the splits with a tuned model, write its metrics, and compare with the base where it is known.

    A run's evaluation goes into its directory; that of a bare model folder into a new one.
    """
    folder, run = runs.find_model(cfg.model_path, cfg.output_dir)
    if run and run.status != runs.FINISHED:
        log.warning("run %s is %s; its model is evaluated all the same", run.id, run.status)
    runs.check_writable(*((run.path, "run") if run else (cfg.output_dir,)))
    log.info("evaluating %s", folder if run is None else f"run {run.id} ({run.model})")
    tuned = locate_tuned(folder, cfg.allow_base_mismatch)
    _refuse_damaged(tuned, run)
    task, labels = tasks.tuned_for(tuned, cfg.task)
    cfg = replace(cfg, task=task, metrics=cfg.metrics or default_metrics(task, cfg.engine))
    splits, dtype, device = prepare(cfg)
    task_encoding.refuse_unknown_labels(
        [row for rows in splits.rows.values() for row in rows] if labels else [], labels
    )
    block_imports(*unused_packages(cfg, tuned.base))

    exam, base = set_up(cfg, splits, dtype, device, tuned.base, str(tuned.folder), None, labels)
    tuned = tuned._replace(base=base)
    check_tokenization(folder if run is None else run.model, run, exam.chat, cfg)
    part = "evaluation" if run else None
    recorded = run.manifest.get("base_model") if run and not tuned.is_adapter else None
    of_base = base_model(base, recorded)
    who = identity(exam.conditions, base, tuned, cfg.merge_adapter)
    run = run or _run_for(folder, cfg, who, of_base)
    log_to(run.logs)
    effort = GenerationStats()
    with (
        run.record_status(part),
        _partial_results(
            run.path / "evals" / f"answers{partial_results.SUFFIX}", who, cfg.overwrite_answers
        ) as file,
    ):
        model = _tuned_model(exam, tuned, effort)
        answers = inference.evaluate_requests(model, exam.chat, exam.asked, cfg, exam.plan, file, effort)
        result = _result(answers, exam.conditions, cfg.metrics or []) | {
            "base_model": of_base,
            "generated": _generated(exam, effort),
        }
        _write(run, answers, result, to_yaml(cfg))
        file.close(remove=True)
    _explain(result)
    _compare_with_base(run, result, cfg)
    report.write(run, cfg.artifacts_dir)
    return 0


def _refuse_damaged(tuned: Tuned, run: runs.Run | None) -> None:
    """Raises: RunError if the weights, or the figures that the scores are added to, cannot be read."""
    files = sorted(tuned.folder.glob("*.safetensors"))
    told = [problem for file in files if (problem := find_corruption(file))]
    if told or not files:
        what = f"the model in {tuned.folder} is damaged: {'; '.join(told) or 'there are no weights'}"
        raise RunError(what, hint="restore it, or give another run")
    if run and (run.path / "metrics.json").exists():
        read_json(run.path / "metrics.json")


def evaluate_baseline(cfg: BaselineConfig) -> int:
    """Answer the splits with the untouched base, keep its metrics, and compare the newest run that fits."""
    runs.check_writable(cfg.artifacts_dir, "artifacts_dir")
    cfg = replace(cfg, metrics=cfg.metrics or default_metrics(cfg.task, cfg.engine))
    splits, dtype, device = prepare(cfg)
    source = locate(cfg.model_name, cfg.model_revision)
    tasks.check_source(source, cfg.task)
    log.info("evaluating the base model %s", source.name)
    block_imports(*unused_packages(cfg, source))
    exam, source = set_up(cfg, splits, dtype, device, source, source.location, cfg.model_revision, None)
    model = _base_model(exam, source)
    if exam.labels:
        _say_head(model, exam.labels, cfg.seed)
    result, target = _answer_as_base(model, exam, source, cfg)
    _explain(result)
    _compare_waiting(result, target, cfg)
    return 0


def _say_head(model: Any, labels: Sequence[str], seed: int) -> None:
    drawn = ", ".join(model.untrained_modules)
    log.info(
        "labels: %s; %s", ", ".join(labels),
        f"the base model has no head for them: {drawn} untrained, drawn with seed={seed}" if drawn
        else "the base model's own head chooses",
    )  # fmt: skip


def _base_model(exam: EvalContext, source: Source) -> Any:
    if exam.cfg.engine == "vllm":
        return vllm_engine.VllmGenerator(source.location, None, exam.chat.tokenizer, exam.dtype.value, exam.cfg)
    model = exam.load(source)
    freeze_gc()
    return model


def _tuned_model(exam: EvalContext, tuned: Tuned, effort: GenerationStats) -> Any:
    """The tuned model, its adapter merged where that is exact enough. Before the adapter stands over it, the base
    answers, if nobody knows its answers yet."""
    if exam.cfg.engine == "vllm":
        return vllm_engine.VllmGenerator(
            tuned.base.location, tuned, exam.chat.tokenizer, exam.dtype.value, exam.cfg
        )
    from src.eval import adapter_merge
    from src.model import load

    model = exam.load(tuned.base)
    freeze_gc()
    if tuned.is_adapter and _is_missing_base(exam, tuned):
        runs.check_writable(exam.cfg.artifacts_dir, "artifacts_dir")
        log.info("the base model %s answers first: its answers are not kept yet", tuned.base.name)
        _answer_as_base(model, exam, tuned.base, _as_baseline(exam.cfg, tuned.base))
    prompts = [ids for asked in exam.asked.prompts.values() for ids in asked]
    model, how = adapter_merge.merge_for_eval(
        load.attach(model, tuned), exam.cfg.merge_adapter, exam.dtype.value, exam.cfg.task, exam.chat, prompts,
        lambda: load.attach(exam.load(tuned.base), tuned),
    )  # fmt: skip
    log.info("adapter merged: %s", how)
    effort.facts |= {"adapter_merged": how.value, "adapter_merged_because": how.reason}
    return model


def _is_missing_base(exam: EvalContext, tuned: Tuned) -> bool:
    """Whether the base is to be asked in the same load, as `baseline` says."""
    kept = results.baseline_folder(exam.cfg.artifacts_dir, base_model(tuned.base), exam.conditions)
    if exam.cfg.baseline != "auto" or (kept / "metrics.json").exists():
        return False
    if exam.labels:  # alone, a base model would choose among the labels of the rows
        config = read_json(tuned.base.folder / "config.json") if tuned.base.folder else {}
        return tuple(tasks.labels_for(labels_of_rows(exam.asked.rows), config)) == tuple(exam.labels)
    return True


def _as_baseline(cfg: EvalConfig, base: Source) -> BaselineConfig:
    """The settings by which eval-baseline would do the same."""
    shared = {f.name: getattr(cfg, f.name) for f in fields(BaselineConfig) if hasattr(cfg, f.name)}
    revision = None if base.folder else base.revision
    return BaselineConfig(**shared | {"model_name": base.name, "model_revision": revision})


def _answer_as_base(
    model: Any, exam: EvalContext, source: Source, cfg: BaselineConfig
) -> tuple[dict[str, Any], Path]:
    """Answer as the untouched base. Returns: its metrics, and the folder among the artifacts that keeps them."""
    base, effort = base_model(source), GenerationStats()
    folder = results.baseline_folder(cfg.artifacts_dir, base, exam.conditions)
    path = folder.with_name(folder.name + partial_results.SUFFIX)
    with _partial_results(path, identity(exam.conditions, source), cfg.overwrite_answers) as file:
        partial_results.remove_others(path, folder.name.rpartition("-")[0] + "-*")
        answers = inference.evaluate_requests(model, exam.chat, exam.asked, exam.cfg, exam.plan, file, effort)
        result = _result(answers, exam.conditions, cfg.metrics or []) | {
            "base_model": base,
            "generated": _generated(exam, effort),
        }
        target = results.baseline_folder(cfg.artifacts_dir, base, result["conditions"])
        with atomic_dir(target) as temporary:
            _write_answers(temporary, answers)
            write_text(temporary / "config_used.yaml", to_yaml(cfg))
            write_json(temporary / "metrics.json", result)
        file.close(remove=True)
    log.info("baseline kept in %s", target)
    return result, target


@contextmanager
def _partial_results(path: Path, who: Mapping[str, Any], fresh: bool) -> Any:
    """The file that holds the answers until they stand elsewhere."""
    file = PartialResults(path, who, fresh)
    try:
        yield file
    finally:
        file.close()


def _generated(exam: EvalContext, effort: GenerationStats) -> dict[str, Any]:
    """How the answers were made, which decides nothing."""
    plan = exam.plan
    return {
        "engine": engine(exam.cfg),
        "batch_size": plan.sizes,
        "batch_size_because": plan.reason,
    } | effort.told()


def _run_for(folder: Path, cfg: EvalConfig, who: Mapping[str, Any], base: Mapping[str, Any]) -> runs.Run:
    """A run for a bare model folder: the one whose evaluation was stopped, or a new one."""
    for run in runs.all_runs(cfg.output_dir):
        stopped = run.status in (runs.INTERRUPTED, runs.FAILED) and run.manifest.get("model_path") == str(folder)
        path = run.path / "evals" / f"answers{partial_results.SUFFIX}"
        if stopped and not cfg.overwrite_answers and partial_results.is_of(path, who) and run.lock():
            run.reopen()
            return run
    return runs.create(cfg.output_dir, "eval", to_yaml(cfg), {"base_model": dict(base), "model_path": str(folder)})


def _result(
    answers: Mapping[str, Sequence[dict[str, Any]]], conditions: dict[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """Score the answers; each row gets its own scores, each split the corpus score of each metric."""
    corpus = {split: metrics.score_rows(names, rows) for split, rows in answers.items()}
    return {"eval": corpus, "metrics": metrics.describe(names), "conditions": conditions}


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
    folder = results.baseline_folder(cfg.artifacts_dir, result["base_model"], result["conditions"])
    if cfg.baseline != "never" and (folder / "metrics.json").exists():
        compare.record(run, folder, cfg.gate)
        return
    compare.show_one(result, f"{run.id}, tuned")
    if cfg.baseline != "never":
        log.info("make eval-baseline evaluates the base model under these conditions and compares")


def _compare_waiting(base: dict[str, Any], folder: Path, cfg: BaselineConfig) -> None:
    """Compare the newest run that was evaluated under the same conditions on the same base."""
    for run in runs.all_runs(cfg.output_dir):
        path = run.path / "metrics.json"
        try:
            result = read_json(path) if path.exists() else {}
        except RunError as error:
            log.warning("%s", error.problems[0])
            continue
        same = result.get("base_model", {}).get("revision") == base["base_model"]["revision"]
        if same and result.get("conditions") == base["conditions"]:
            compare.record(run, folder, cfg.gate)
            report.write(run, cfg.artifacts_dir)
            return
    compare.show_one(base, f"{base['base_model']['name']}, base")


def _explain(result: Mapping[str, Any]) -> None:
    for name, about in result["metrics"].items():
        log.info("%s: %s (scale %s)", name, about["implementation"], about["scale"])
