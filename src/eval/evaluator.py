"""The recipes `eval` and `eval-baseline`: the same requests, decoding and metrics for tuned and base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .. import outcome, runs
from ..config import to_yaml
from ..data import task_encoding
from ..data.chat import ChatTokenizer
from ..data.eval_rows import Reading
from ..model import source as model_source
from ..model import tasks
from ..model.source import Source, TunedModel, locate, locate_tuned
from ..schema import DEMO_MODEL, BaselineConfig, ChatArgs, EvalConfig, TokenArgs
from ..utils import environment
from ..utils.environment import Reasoned
from ..utils.event_files import Curves
from ..utils.files import atomic_dir, read_json, write_json, write_jsonl, write_text
from ..utils.logs import log, log_to
from ..utils.process_info import block_imports, freeze_gc
from ..utils.units import count
from . import (
    compare,
    eval_data,
    evaluations,
    fingerprint,
    inference,
    inherit,
    metrics,
    partial_results,
    results,
    setup,
    stored_predictions,
    verdict_text,
    vllm_engine,
)
from .inference import GenerationStats, Predictions
from .partial_results import PartialResults
from .report import page as report
from .results import EvalResult
from .setup import EvalContext, EvalSplits


def evaluate(cfg: EvalConfig) -> int:
    """Evaluate a tuned model on the splits, and compare it with its base where the base's result is known.

    The result of a run is written into its directory, that of a bare model folder into a new run.
    """
    folder, run = runs.find_model(cfg.model_path, cfg.output_dir)
    if run and run.status != runs.FINISHED:
        log.warning("run %s is %s; its model is evaluated anyway", run.id, run.status)
    runs.check_writable(*((run.path, "run") if run else (cfg.output_dir,)))
    log.info("evaluating %s", folder if run is None else f"run {run.id} ({run.model})")
    tuned = locate_tuned(folder, cfg.allow_base_mismatch)
    setup.refuse_corrupt(tuned, run)
    setup.refuse_unserved(cfg, tuned)
    task, labels = tasks.detect_task(tuned, cfg.task)
    typed, inherited = cfg, inherit.of_model({"model_path": cfg.model_path, "output_dir": cfg.output_dir})
    cfg = replace(cfg, task=task)
    splits, dtype, device = _read_inputs(cfg, run, folder, inherit.describe(typed, inherited))
    cfg = replace(cfg, metrics=cfg.metrics or setup.default_metrics(task, cfg.engine, splits.rows))
    if labels:
        task_encoding.refuse_unknown_labels([row for rows in splits.rows.values() for row in rows], labels)
    block_imports(*setup.unused_packages(cfg, tuned.base))

    rows = model_source.adapter_rows(tuned.folder)
    context, base = _set_up(
        cfg, splits, dtype, device, tuned.base, str(tuned.folder), None, labels, cfg, rows=rows
    )
    tuned = tuned._replace(base=base)
    recorded = run.manifest.get("tokenization", {}) if run else None
    setup.check_tokenization(folder if run is None else run.model, recorded, context.chat, cfg)
    recorded_base = run.manifest.get("base_model") if run and not tuned.is_adapter else None
    base_info = fingerprint.base_model(base, recorded_base)
    identity = fingerprint.model_identity(context.conditions, base, tuned, cfg.merge_adapter)
    part = "evaluation" if run else None
    run = run or _run_for(folder, typed, identity, base_info)
    log_to(run.logs)
    stats = GenerationStats()
    with run.record_status(part), PartialResults(_partial_path(run), identity, cfg.overwrite_answers) as file:
        if not cfg.overwrite_answers:
            stored_predictions.reuse(
                file, stored_predictions.of_run(run), identity, context.conditions, context.requests
            )
        model = _tuned_model(cfg, context, tuned, stats)
        predictions = _predict(model, context, file, stats)
        result = _result(predictions, context, base_info, stats, identity)
        result |= {"contamination": splits.overlaps} if splits.overlaps else {}
        _write_result(run, predictions, result, to_yaml(typed))
        file.close(remove=True)
    _log_metrics(result)
    comparison = _compare_with_base(run, result, cfg)
    report.write_report(run, cfg.artifacts_dir)
    verdict_text.report(comparison, run, splits.files)
    return 0


def evaluate_baseline(cfg: BaselineConfig) -> int:
    """Evaluate the base model on the splits, and cache its result.

    Also compares it with the newest run that was evaluated under the same conditions.
    """
    runs.check_writable(cfg.artifacts_dir, "artifacts_dir")
    run = inherit.run_of_base(cfg.model_name, cfg.output_dir)
    typed, inherited = cfg, inherit.of_base({"model_name": cfg.model_name, "output_dir": cfg.output_dir})
    model_name = cfg.model_name or DEMO_MODEL
    cfg = replace(cfg, model_name=model_name)
    splits, dtype, device = _read_inputs(cfg, run, None, inherit.describe(typed, inherited))
    cfg = replace(cfg, metrics=cfg.metrics or setup.default_metrics(cfg.task, cfg.engine, splits.rows))
    source = locate(model_name, cfg.model_revision)
    tasks.check_source(source, cfg.task)
    log.info("evaluating the base model %s", source.name)
    block_imports(*setup.unused_packages(cfg, source))

    # as the tuned model is evaluated, whose template may not be that of the base
    chat = ChatArgs(cfg.chat_template or inherit.template_file(run), cfg.chat_template_kwargs)
    revision = cfg.model_revision
    context, source = _set_up(
        cfg, splits, dtype, device, source, source.location, revision, None, chat, tokens=cfg
    )
    model = _base_model(context, source)
    if context.labels:
        _log_labels(model, context.labels, cfg.seed)
    result, folder = _evaluate_base(model, context, source, cfg)
    _log_metrics(result)
    _compare_newest_run(result, folder, cfg, splits)
    return 0


# Setup


def _read_inputs(
    cfg: EvalConfig | BaselineConfig, run: runs.Run | None, folder: Path | None, inherited: str
) -> tuple[EvalSplits, Reasoned, Reasoned]:
    """Rows, precision and device. Rejects whatever can be rejected without torch."""
    setup.check_settings(cfg.task or "causal_lm", cfg)
    files = eval_data.find_files(cfg.eval_path, cfg.splits, run, folder)
    splits = setup.read_splits(files, cfg.max_examples, Reading.of(cfg), eval_data.held_out_file(run))
    log.info("evaluation data: %s", splits.summary)
    metrics.try_on(
        cfg.metrics or [], [row.messages[-1]["content"] for rows in splits.rows.values() for row in rows]
    )
    for name, number in splits.unjudged_calls.items():
        rows = count(number, "row")
        log.warning(
            "%s of %s: tool calls before the last answer are not judged; a row that ends in one is", rows, name
        )
    if run:
        from .overlap import find_overlaps

        splits = splits._replace(overlaps=find_overlaps(run, splits))
    if run and inherited:
        log.info("as run %s was trained or last evaluated: %s", run.id, inherited)
    device = environment.choose_device(cfg.cuda_visible_devices)
    dtype = environment.choose_dtype(cfg.bf16, cfg.cuda_visible_devices)
    log.info("device %s; precision %s", device, dtype)
    return splits, dtype, device


def _set_up(
    cfg: EvalConfig | BaselineConfig, splits: EvalSplits, dtype: Reasoned, device: Reasoned, base: Source,
    tokenizer_path: str, revision: str | None, labels: Sequence[str] | None, template: ChatArgs,
    tokens: TokenArgs | None = None, rows: int = 0,
) -> tuple[EvalContext, Source]:  # fmt: skip
    """Tokenizer, requests and batch plan. Imports torch.

    Args:
        labels: the tuned classifier's labels. None: the base model's labels if they cover the rows' labels, else
            the rows' labels.
        tokens: the tokens that are added to those of the tokenizer.
        rows: the rows of the embedding that an adapter needs.
    Returns: also `base` with its revision resolved.
    """
    from ..model.load import resolve_revision
    from ..model.tokenizer import load_config, load_tokenizer

    task, names = cfg.task or "causal_lm", cfg.metrics or []
    templated = tasks.TASKS[task].chat_template
    tokenizer = load_tokenizer(
        tokenizer_path, revision, cfg.trust_remote_code, templated=templated, chat=template,
        new_tokens=tokens.new_tokens if tokens else (),
    )  # fmt: skip
    if tokens and (tokens.new_tokens or tokens.resize_embeddings):
        rows = max(tokenizer.get_vocab().values()) + 1
        setup.refuse_unserved(cfg, None, rows)
    chat = ChatTokenizer(tokenizer, template.chat_template_kwargs, template.empty_thoughts)
    model_config = load_config(base.location, base.revision, cfg.trust_remote_code)
    config = model_config.to_dict()
    if labels is None:
        labels = (
            tasks.resolve_labels(setup.labels_of_rows(splits.rows), config) if task == "classification" else ()
        )
    requests = inference.encode_requests(splits.rows, chat, task, config, metrics.needs_references(names))
    setup.refuse_missing_rows(requests, chat, config, base.name, rows)
    inference.warn_of_cut_prompts(requests, tasks.max_positions(config))
    if templated:
        inference.warn_of_left_out(requests, chat)
    gpus = cfg.cuda_visible_devices
    plan = inference.plan_batches(requests, task, cfg, config, dtype.value, device.value, gpus)
    conditions = fingerprint.eval_conditions(
        task, cfg, cfg.seed, data=splits.sha256, prompts=requests.prompts, tokenization=chat.identity,
        stop_tokens=setup.extra_stop_tokens(chat, task), batch_sizes=plan.sizes, dtype=dtype.value,
        device=device.value,
    ) | ({"tool_calls": calls} if (calls := requests.calls) else {})  # fmt: skip
    context = EvalContext(
        task, cfg, cfg.seed, cfg.trust_remote_code, chat, requests, dtype, device, plan, labels, conditions, rows
    )
    return context, resolve_revision(base, model_config)


def _partial_path(run: runs.Run) -> Path:
    return run.path / "evals" / f"answers{partial_results.SUFFIX}"


def _run_for(folder: Path, cfg: EvalConfig, identity: Mapping[str, Any], base: Mapping[str, Any]) -> runs.Run:
    """A run for a bare model folder: the one whose evaluation was interrupted, or a new one."""
    for run in runs.all_runs(cfg.output_dir):
        stopped = run.status in (runs.INTERRUPTED, runs.FAILED) and run.manifest.get("model_path") == str(folder)
        resumable = stopped and not cfg.overwrite_answers and partial_results.is_of(_partial_path(run), identity)
        if resumable and run.lock():
            run.reopen()
            return run
    return runs.create(cfg.output_dir, "eval", to_yaml(cfg), {"base_model": dict(base), "model_path": str(folder)})


# Models


def _base_model(context: EvalContext, source: Source) -> Any:
    if context.args.engine == "vllm":
        return _vllm(context, source.location, None)
    model = context.load(source)
    freeze_gc()
    return model


def _tuned_model(cfg: EvalConfig, context: EvalContext, tuned: TunedModel, stats: GenerationStats) -> Any:
    """The tuned model, its adapter merged where that is exact enough.

    Before the adapter is added, the base model is evaluated if its result is not cached yet.
    """
    if context.args.engine == "vllm":
        return _vllm(context, tuned.base.location, tuned)
    from ..model import load
    from . import merge_check

    model = _base_model(context, tuned.base)
    if tuned.is_adapter and cfg.baseline == "auto" and _is_missing_base(cfg.artifacts_dir, context, tuned):
        runs.check_writable(cfg.artifacts_dir, "artifacts_dir")
        log.info("evaluating the base model %s first: its result is not cached yet", tuned.base.name)
        _evaluate_base(model, context, tuned.base, _baseline_config(cfg, tuned.base))
    prompts = [ids for of_split in context.requests.prompts.values() for ids in of_split]
    model, merged = merge_check.merge_for_eval(
        load.attach_adapter(model, tuned), cfg.merge_adapter, context.dtype.value, context.task, context.chat,
        prompts, lambda: load.attach_adapter(context.load(tuned.base), tuned),
    )  # fmt: skip
    log.info("adapter merged: %s", merged)
    stats.details |= {"adapter_merged": merged.value, "adapter_merged_because": merged.reason}
    return model


def _vllm(context: EvalContext, location: str, tuned: TunedModel | None) -> Any:
    return vllm_engine.VllmGenerator(
        location, tuned, context.chat.stop_token_ids, context.dtype.value, context.args, context.seed,
        context.trust_remote_code,
    )  # fmt: skip


def _is_missing_base(artifacts_dir: str, context: EvalContext, tuned: TunedModel) -> bool:
    """Whether the base's result is not cached, and evaluating this loaded base model equals `eval-baseline`."""
    base = fingerprint.base_model(tuned.base)
    if (fingerprint.baseline_folder(artifacts_dir, base, context.conditions) / "metrics.json").exists():
        return False
    if context.labels:  # eval-baseline takes the labels of the rows
        config = read_json(tuned.base.folder / "config.json") if tuned.base.folder else {}
        labels = tasks.resolve_labels(setup.labels_of_rows(context.requests.rows), config)
        return tuple(labels) == tuple(context.labels)
    return True


def _baseline_config(cfg: EvalConfig, base: Source) -> BaselineConfig:
    """The equivalent `eval-baseline` settings."""
    shared = {f.name: getattr(cfg, f.name) for f in fields(BaselineConfig) if hasattr(cfg, f.name)}
    revision = None if base.folder else base.revision
    return BaselineConfig(**shared | {"model_name": base.name, "model_revision": revision})


def _evaluate_base(
    model: Any, context: EvalContext, source: Source, cfg: BaselineConfig
) -> tuple[dict[str, Any], Path]:
    """Evaluate the base model. Returns: its result, and the folder in `artifacts_dir` that caches it."""
    base, stats = fingerprint.base_model(source), GenerationStats()
    folder = fingerprint.baseline_folder(cfg.artifacts_dir, base, context.conditions)
    answers = fingerprint.baseline_folder(cfg.artifacts_dir, base, fingerprint.without_metrics(context.conditions))
    path = answers.with_name(answers.name + partial_results.SUFFIX)
    identity = fingerprint.model_identity(context.conditions, source)
    with PartialResults(path, identity, cfg.overwrite_answers) as file:
        partial_results.remove_others(path, folder.name.rpartition("-")[0] + "-*")
        if not cfg.overwrite_answers:
            stored_predictions.reuse(
                file, stored_predictions.of_base(folder), identity, context.conditions, context.requests
            )
        predictions = _predict(model, context, file, stats)
        result = _result(predictions, context, base, stats, identity)
        target = fingerprint.baseline_folder(cfg.artifacts_dir, base, result["conditions"])
        _write_evaluation(target, predictions, result, to_yaml(cfg))
        file.close(remove=True)
    log.info("baseline cached in %s", target)
    outcome.report(document=_document(result) | {"baseline": str(target)})
    return result, target


# Predictions and results


def _predict(model: Any, context: EvalContext, file: PartialResults, stats: GenerationStats) -> Predictions:
    """Run all requests: a prediction for each row and, where a metric needs it, the reference's likelihood."""
    requests, plan = context.requests, context.plan
    predictor = model
    if context.args.engine != "vllm":
        labels = tasks.labels_of(model.config.to_dict()) if context.task == "classification" else []
        predictor = inference.make_predictor(model, context.chat, context.task, labels, context.args, context.seed)
    predictions = inference.predict(predictor, requests, plan, file, stats)
    scored = inference.score_references(model, context.chat.tokenizer, requests, plan, file)
    for split, rows in scored.items():
        predictions[split] = [row | score for row, score in zip(predictions[split], rows, strict=True)]
    return predictions


def _result(
    predictions: Predictions,
    context: EvalContext,
    base: Mapping[str, Any],
    stats: GenerationStats,
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of metrics.json. Each row of `predictions` gets its own scores.

    `generated` records how the predictions were produced; it is not part of the conditions.
    """
    names, plan = context.args.metrics or [], context.plan
    return {
        "eval": {split: metrics.score_rows(names, rows) for split, rows in predictions.items()},
        "metrics": metrics.describe(names),
        "conditions": context.conditions,
        stored_predictions.ANSWERS: evaluations.fingerprint(identity),
        "base_model": dict(base),
        "generated": {
            "at": runs.now(),
            "engine": fingerprint.engine_version(context.args.engine),
            "batch_size": plan.sizes,
            "batch_size_because": plan.reason,
        }
        | stats.summary(),
    }


def _write_result(run: runs.Run, predictions: Predictions, result: dict[str, Any], config_yaml: str) -> None:
    """Write the evaluation into its folder; then its scores into the run, which is judged by it from now on."""
    evaluations.keep_former(run)
    folder = evaluations.folder_of(run, result["conditions"])
    _write_evaluation(folder, predictions, result, config_yaml)
    before = read_json(run.path / "metrics.json") if (run.path / "metrics.json").exists() else {}
    before.pop("contamination", None)  # of the evaluation that is replaced
    (run.path / "comparison.json").unlink(missing_ok=True)  # it compared the result that is replaced
    write_json(run.path / "metrics.json", before | result | {evaluations.NAME: folder.name})
    outcome.report(run=run.path, document=_document(result))
    curves = Curves(run.logs)
    step = before.get("train", {}).get("steps", 0)
    for split, scores in result["eval"].items():
        for name, value in scores.items():
            curves.add(f"eval_{split}/{name}", value, step)
    curves.close()


def _document(result: Mapping[str, Any]) -> dict[str, Any]:
    """What --json prints of a result."""
    return {"scores": result["eval"], "metrics": result["metrics"], "base_model": result["base_model"]}


def _write_evaluation(folder: Path, predictions: Predictions, result: Mapping[str, Any], config_yaml: str) -> None:
    with atomic_dir(folder) as temporary:
        for split, rows in predictions.items():
            write_jsonl(temporary / f"{split}.predictions.jsonl", rows)
        write_text(temporary / runs.CONFIG, config_yaml)
        write_json(temporary / evaluations.METRICS, result)


# Comparison


def _compare_with_base(run: runs.Run, result: dict[str, Any], cfg: EvalConfig) -> Mapping[str, Any] | None:
    """Compare with the cached result of the base. Returns: the comparison; None if there is no such result."""
    folder = fingerprint.baseline_folder(cfg.artifacts_dir, result["base_model"], result["conditions"])
    if cfg.baseline != "never" and (folder / "metrics.json").exists():
        return compare.record(run, folder, cfg.gate)
    compare.show_one(EvalResult.of_run(run), f"{run.id}, tuned")
    return None


def _compare_newest_run(result: dict[str, Any], folder: Path, cfg: BaselineConfig, splits: EvalSplits) -> None:
    found = results.newest_comparable(cfg.output_dir, result)
    if found is None:
        compare.show_one(EvalResult.of_base(folder), f"{result['base_model']['name']}, base")
        verdict_text.report_uncompared(cfg.output_dir, str(cfg.model_name))
        return
    run, evaluation = found
    comparison = compare.record(run, folder, cfg.gate, evaluation)
    report.write_report(run, cfg.artifacts_dir)
    verdict_text.report(comparison, run, splits.files)


# Log lines


def _log_labels(model: Any, labels: Sequence[str], seed: int) -> None:
    untrained = ", ".join(model.untrained_modules)
    log.info(
        "labels: %s; %s", ", ".join(labels),
        f"the base model has no head for them: {untrained} untrained, drawn with seed={seed}" if untrained
        else "the base model has a head for them",
    )  # fmt: skip


def _log_metrics(result: Mapping[str, Any]) -> None:
    for name, about in result["metrics"].items():
        log.info("%s: %s (scale %s)", name, about["implementation"], about["scale"])
