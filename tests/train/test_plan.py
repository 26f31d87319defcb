"""plan: the memory of a run is computed without its weights, and a run that does not fit is refused."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.plan_memory import case, measure_peak
from src.data.store import Example
from src.model import adapters, load, methods
from src.model.source import locate
from src.model.tokenizer import load_tokenizer
from src.schema import TrainConfig
from src.train.batch_sampler import build_sampler
from src.train.plan import arithmetic, memory, simulate
from src.train.plan.estimate import SIMULATED_CODE, MemoryEstimator, PlanUnavailable, available_memory
from src.utils.environment import Capacity
from src.utils.process_info import ProcessInfo
from src.utils.workers import cores
from tests.fixtures import ROOT, STEPS, TRAINED_ON, World, call

pytest_plugins = ["tests.fixtures"]

ROWS = [Example([1] * n, [False] * (n // 2) + [True] * (n - n // 2)) for n in (40, 60, 50, 30, 64, 20)]


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.train.plan.estimate.data_cache", lambda *_: tmp_path / "cache")


def plan(world: World, *words: str) -> int:
    return call("plan", *world.settings("train"), *words)


def estimator(tiny: Path, dtype: str = "float32", device: str = "cpu") -> MemoryEstimator:
    return MemoryEstimator(locate(str(tiny)), ROWS, ROWS[:2], dtype, device, load_tokenizer(str(tiny)), fixed=0)


def settings(**others: Any) -> TrainConfig:
    return TrainConfig(**{"method": "lora", "lora_dropout": 0.0, "batch_size": 2, **others})


# --- without weights -------------------------------------------------------------------------------------


def test_a_plan_needs_no_weights_and_leaves_no_run(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(world.model, tmp_path / "model")
    for weights in folder.glob("*.safetensors"):
        weights.write_bytes(b"no weights at all")
    assert plan(world, f"model_name={folder}") == 0
    shown = capsys.readouterr().out
    assert {p.name for p in world.output.iterdir()} == {"cache"}
    assert re.search(rf"steps +{STEPS}, {STEPS // 10} per epoch", shown)
    assert all(re.search(rf"  {part} +[\d.]+ (GB|MB|kB|bytes)", shown) for part in memory.PARTS)
    assert "memory" in shown and "fits: " in shown


@pytest.mark.parametrize("method", methods.METHODS)
def test_parameters_are_counted_as_they_will_be(tiny: Path, method: str) -> None:
    cfg, source = settings(method=method, lora_r=4), locate(str(tiny))
    four_bit = methods.METHODS[method].four_bit
    model, _ = load.load_base(source, "float32", "cpu", four_bit=four_bit)
    real = adapters.count_parameters(adapters.apply_method(model, cfg, source, steps=10))
    found = memory.measure_parameters(simulate.build_tuned_meta_model(cfg, source, "float32", 100))
    assert (found.trainable, found.parameters) == real


def test_the_bytes_of_weights_gradients_and_optimizer_are_those_of_their_types(tiny: Path) -> None:
    held = estimator(tiny, "bfloat16").memory(settings(lora_r=4), checkpointing=False).moments["step"]
    real, _ = load.load_base(locate(str(tiny)), "bfloat16", "cpu")
    linear = [m for n, m in real.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    linear = [m for n, m in real.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    adapter = sum(4 * (m.in_features + m.out_features) for m in linear)
    assert held["weights"] == 2 * sum(p.numel() for p in real.parameters())
    assert (held["adapters"], held["gradients"], held["optimizer"]) == (4 * adapter, 4 * adapter, 8 * adapter)


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_method_has_a_plan_on_both_kinds_of_device(tiny: Path, method: str, device: str) -> None:
    for checkpointing in {False, methods.METHODS[method].checkpointing}:
        found = estimator(tiny, "bfloat16", device).memory(settings(method=method), checkpointing)
        assert found.moments["backward"]["activations"] > 0
        assert found.peak >= found.parts["weights"] + found.parts["adapters"]


def test_what_was_simulated_once_is_known_until_anything_of_it_changes(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = estimator(tiny).memory(settings(), False)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("simulated again")

    monkeypatch.setattr(simulate, "backward_pass", never)
    again = settings(resume="never", output_dir="elsewhere")
    assert estimator(tiny).memory(again, False).moments == first.moments
    for other in ({"batch_size": 3}, {"lora_r": 5}, {"method": "dora"}):
        with pytest.raises(PlanUnavailable, match="simulated again"):
            estimator(tiny).memory(settings(**other), False)
    with pytest.raises(PlanUnavailable, match="simulated again"):
        estimator(tiny, "bfloat16").memory(settings(), False)
    with pytest.raises(PlanUnavailable, match="simulated again"):
        estimator(tiny).memory(settings(), True)


@pytest.mark.skipif(cores() < 2, reason="ONE CORE: the plan of two processes is NOT tested")
def test_two_processes_take_half_the_steps_and_shard_what_their_engine_shards(tiny: Path) -> None:
    found = estimator(tiny)
    assert found.schedule(settings()).steps_per_epoch == 3  # of 6 rows, 2 a batch
    assert found.schedule(settings(num_processes=2)).steps_per_epoch == 2
    alone = found.memory(settings(method="full"), False).moments["step"]
    for engine, shared in memory.SHARDED_PARTS.items():
        if find_spec("deepspeed") or engine == "fsdp2":
            both = settings(method="full", num_processes=2, distributed=engine)
            for part, size in found.memory(both, False).moments["step"].items():
                assert size == pytest.approx(alone[part] / 2 if part in shared else alone[part], abs=1), part
    one, two = (available_memory(settings(num_processes=n), "cpu").bytes for n in (1, 2))
    assert two == pytest.approx(one / 2, rel=0.05)


def test_a_process_of_its_own_says_what_would_need_less(world: World) -> None:
    """What such a process leaves out to start quickly is not missed by the plan."""
    child = world.start("train", "memory_gb=0.05", "cache_dir=" + str(world.output / "elsewhere"))
    said = child.communicate(timeout=300)[0]
    assert child.returncode == 2, said
    assert "this run needs" in said and "Traceback" not in said
    assert "method=qlora" in said


def test_activations_grow_with_the_tokens_and_shrink_with_checkpointing(tiny: Path) -> None:
    def activations(checkpointing: bool, size: int) -> int:
        rows = [Example([1] * size, [False] * (size - 1) + [True])] * 4
        found = MemoryEstimator(locate(str(tiny)), rows, [], "float32", "cpu", None, 0)
        return found.memory(settings(batch_size=4), checkpointing).moments["backward"]["activations"]

    assert activations(False, 512) == pytest.approx(4 * activations(False, 128), rel=0.1)
    assert activations(True, 512) < 0.75 * activations(False, 512)  # one of two layers is kept


def test_accumulated_batches_keep_their_gradients_meanwhile(tiny: Path) -> None:
    once, twice = (
        estimator(tiny).memory(settings(method="full", gradient_accumulation_steps=n), False) for n in (1, 2)
    )
    assert twice.peak > once.peak
    assert twice.moments["backward"]["gradients"] >= once.moments["step"]["gradients"]


# --- the prediction against the truth --------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_counted_is_what_a_real_step_holds(tiny: Path, method: str) -> None:
    """The same count over real tensors of the real model."""
    cfg, source = settings(method=method), locate(str(tiny))
    expected = simulate.backward_pass(
        simulate.build_tuned_meta_model(cfg, source, "float32", 100), ROWS, cfg, "float32", "cpu", False, None
    )
    model = adapters.apply_method(load.load_base(source, "float32", "cpu")[0], cfg, source, steps=10)
    model.train()
    from src.train import collators
    from src.train.fit import CPU_SHAPE_MULTIPLE
    from src.train.losses import Criterion, Objective

    objective = Objective(model, Criterion(cfg), "float32", packed=True)
    batch = collators.PackedCollator(CPU_SHAPE_MULTIPLE)(list(enumerate(ROWS)))
    with objective.attention(model), simulate._StorageTracker(model) as seen:
        objective.summed_loss(model, batch).backward()
    real = seen.at_peak(set())
    assert sum(expected) == pytest.approx(sum(real), rel=0.02)


def test_the_peak_of_a_training_is_the_one_predicted(tiny: Path, tmp_path: Path) -> None:
    found = measure_peak(
        case(str(tiny), 100, 16, "method=lora", "bf16=false", "cuda_visible_devices=''"), tmp_path
    )
    assert abs(found.error) < 0.25, found


# --- what does not fit -----------------------------------------------------------------------------------


def test_what_cannot_fit_is_refused_before_a_run_is_made_and_forced_on_demand(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.call("train", "memory_gb=0.01", "max_steps=1") == 2
    said = capsys.readouterr()
    assert "0.01 GB are available (memory_gb=0.01)" in said.err and "force=true" in said.err
    assert {p.name for p in world.output.iterdir()} == {"cache"}
    run = world.train("memory_gb=0.01", "max_steps=1", "force=true")
    assert run.status == "finished"
    assert run.manifest["plan"]["fits"] is False


def test_a_plan_that_does_not_fit_ends_with_two_and_says_what_needs_less(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(world, "memory_gb=0.01", "method=full", "gradient_checkpointing=false") == 2
    shown = capsys.readouterr().out
    assert "DOES NOT FIT" in shown
    for change in ("method=lora", "optim=paged_adamw_8bit"):
        assert re.search(rf"[\d.]+ GB is still too much +{change}", shown), change


def test_an_alternative_has_the_peak_that_is_printed(tiny: Path) -> None:
    found, cfg = estimator(tiny), settings(method="full", gradient_checkpointing=False)
    peak = found.memory(cfg, False).peak
    plan = found.plan(cfg, Capacity(peak - 1, "a byte too few"))
    offered = {i.change: i.peak for i in found.alternatives(plan, cfg)}
    assert not plan.fits_memory
    assert offered["optim=paged_adamw_8bit"] == found.memory(replace(cfg, optim="paged_adamw_8bit"), False).peak
    assert max(offered.values()) < peak


@pytest.mark.parametrize(("short", "expected"), [(False, "false"), (True, "true")])
def test_checkpointing_is_chosen_only_if_it_is_needed(tiny: Path, short: bool, expected: str) -> None:
    found, cfg = estimator(tiny), settings(gradient_checkpointing="auto")
    peak = found.memory(cfg, False).peak
    plan = found.plan(cfg, Capacity(peak if short else 2 * peak, "given"))
    assert plan.checkpointing.value == expected
    assert "auto, needed" in plan.checkpointing.reason or not short
    assert plan.memory.peak == found.memory(cfg, short).peak


def test_the_choice_reaches_the_training_and_its_manifest(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls = [0]
    forward = LlamaMLP.forward

    def counted(self: Any, *words: Any) -> Any:
        calls[0] += torch.is_grad_enabled() and not isinstance(words[0], simulate.FakeTensor)
        return forward(self, *words)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    once = world.train("gradient_checkpointing=auto", "max_steps=2")
    without, calls[0] = calls[0], 0
    short = ("memory_gb=0.01", "force=true")
    twice = world.train("gradient_checkpointing=auto", "max_steps=2", "resume=never", *short)
    assert calls[0] == 2 * without > 0
    assert once.manifest["plan"]["gradient_checkpointing"]["value"] == "false"
    assert twice.manifest["plan"]["gradient_checkpointing"]["value"] == "true"


# --- steps, tokens, probe --------------------------------------------------------------------------------


def test_steps_and_tokens_are_those_of_the_training(finished: World) -> None:
    run = finished.newest
    planned, figures = run.manifest["plan"], json.loads((run.path / "metrics.json").read_text())["train"]
    assert (planned["steps"], planned["tokens"]) == (figures["steps"], figures["tokens"])
    assert planned["rows"] == len(TRAINED_ON)
    assert planned["fits"] is True


def test_the_longest_batch_is_the_longest_of_every_epoch(tiny: Path) -> None:
    cfg = settings(epochs=3)
    sampler = build_sampler(ROWS, cfg, cfg.seed, None, ProcessInfo())
    every = [sampler.count_tokens(b) for epoch in range(3) for b in sampler.epoch_batches(epoch)]
    found = estimator(tiny)
    assert found.lengths[found.longest_batch(cfg)].sum() == max(every)


def test_a_probe_leaves_no_files(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    assert plan(world, "probe=true") == 0
    shown = capsys.readouterr().out
    assert "probe of 20 steps" in shown
    for said in (
        r"tokens/s +[\d,]+",
        r"[\d.]+ s per step",
        r"complete run +[\d.]+ (s|min|h)",
        r"[\d.]+ GB measured",
    ):
        assert re.search(said, shown), said
    assert {p.name for p in world.output.iterdir()} == {"cache"}
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_plan_for_a_gpu_needs_no_gpu(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(world, "plan_device=cuda", "memory_gb=24") == 0
    shown = capsys.readouterr().out
    assert re.search(r"of 24.00 GB \(memory_gb=24\)", shown)
    assert re.search(rf"fixed +{(memory.CUDA_CONTEXT + memory.CUDA_WORKSPACES) / 1e9:.2f} GB", shown)
    assert plan(world, "plan_device=cuda", "memory_gb=24", "use_liger_kernel=true") == 0
    assert "kernels liger" in capsys.readouterr().out
    alone = re.search(r"steps +(\d+)", shown)
    assert plan(world, "plan_device=cuda", "memory_gb=24", "cuda_visible_devices=0,1", "distributed=fsdp2") == 0
    two = re.search(r"steps +(\d+)", capsys.readouterr().out)
    assert alone and two and int(alone[1]) == 2 * int(two[1])  # one process for each GPU that is named


def test_a_model_that_cannot_be_simulated_is_planned_by_arithmetic(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward

    def routed(self: Any, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) if x.nonzero().numel() else x

    monkeypatch.setattr(LlamaMLP, "forward", routed)
    assert plan(world) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "cannot be simulated (DynamicOutputShapeException" in shown and "estimate arithmetic: between" in shown
    assert "of memory (a rough estimate by arithmetic)" in shown
    assert plan(world, "memory_gb=0.000001") == 2  # the memory is checked
    found = world.train("max_steps=1").manifest["plan"]
    assert (found["estimate"], found["roughness"]) == ("arithmetic", arithmetic.ROUGHNESS)
    monkeypatch.setattr(arithmetic.Layers, "__init__", lambda *_: {}["size"])
    assert plan(world) == 2
    assert "is not checked, because the sizes of its model are unknown: KeyError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("dtype", "others"),
    [("float32", {}), ("bfloat16", {"method": "full"}), ("bfloat16", {"gradient_checkpointing": True})],
)
def test_arithmetic_is_as_near_to_the_simulation_as_it_says(
    tiny: Path, dtype: str, others: dict[str, Any]
) -> None:
    cfg, recomputed = settings(**others), "gradient_checkpointing" in others
    simulated, rough = (
        kind(locate(str(tiny)), ROWS, ROWS[:2], dtype, "cpu", load_tokenizer(str(tiny)), fixed=0)
        .memory(cfg, recomputed).peak
        for kind in (MemoryEstimator, arithmetic.ArithmeticEstimator)
    )  # fmt: skip
    low, high = map(int, re.findall(r"(\d+) %", arithmetic.ROUGHNESS))
    assert 1 - low / 100 <= rough / simulated <= 1 + high / 100


@pytest.mark.parametrize("method", ["full", "dora", "qlora", "ia3", "prefix"])
def test_parameters_are_counted_from_the_headers_of_a_model_that_cannot_be_built(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def count() -> memory.ParameterBytes:
        kind = arithmetic.ArithmeticEstimator
        found = kind(locate(str(tiny)), ROWS, [], "float32", "cpu", load_tokenizer(str(tiny)), fixed=0)
        return found.run_simulation(settings(method=method), False).weights

    built = count()
    monkeypatch.setattr(load, "build_meta_model", lambda *_, **__: {}["code"])
    counted = count()
    assert counted.trainable == pytest.approx(built.trainable, rel=0.15)
    assert counted.base_bytes == pytest.approx(built.base_bytes, rel=0.05)


def test_a_cached_simulation_is_of_the_code_of_both_packages_that_it_runs() -> None:
    assert [folder.relative_to(ROOT).as_posix() for folder in SIMULATED_CODE] == ["src/train", "src/model"]


# --- tied weights, units -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_target_modules": ["q_proj", "lm_head"]},
        {"lora_target_modules": ["embed_tokens"]},
        {"peft": {"modules_to_save": ["lm_head"]}},
        {"peft": {"trainable_token_indices": [5, 6]}},
        {"method": "full"},
    ],
)
def test_the_parameters_of_a_tied_model_are_those_of_its_training(
    tiny: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "tied"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(folder / "model.safetensors")
    weights.pop("lm_head.weight", None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    base, cfg = locate(str(folder)), TrainConfig(**settings)
    planned = simulate.build_tuned_meta_model(cfg, base, "bfloat16", 5)
    loaded, _ = load.load_base(base, "bfloat16", "cpu")
    trained = adapters.apply_method(loaded, cfg, base, steps=5)
    assert adapters.count_parameters(planned) == adapters.count_parameters(trained)


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (570_000_000, 24_750_000_000, "0.57 of 24.75 GB"),
        (0, 10_000_000, "0 bytes of 0.01 GB"),
        (570_000_000, 1000, "0.57 GB of 1.0 kB"),
        (9_200, 39_900, "9.2 of 39.9 kB"),
    ],
)
def test_a_size_has_the_unit_that_fits_it(part: int, whole: int, text: str) -> None:
    assert memory.format_of(part, whole) == text
