"""Estimates steps, memory and disk of a run from its settings, its tokens and the architecture of its model."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE

from ...data.sources import data_cache
from ...data.store import Example
from ...errors import RunError, UserError
from ...model import load, methods
from ...model.source import Source
from ...schema import DistributedArgs, TrainConfig
from ...utils import environment
from ...utils.environment import Capacity, Reasoned
from ...utils.files import code_hash, read_json, write_json
from ...utils.process_info import ProcessInfo, process_info
from ...utils.units import count
from ..batch_sampler import BatchSampler, Schedule, build_sampler
from ..fit import build_training_arguments
from ..launch_plan import plan_launch
from ..resume import NEUTRAL_KEYS
from . import memory, simulate
from .memory import Alternative, DiskNeed, MemoryByMoment, MemoryPlan, ParameterBytes, PassMemory

# gradient_checkpointing=auto recomputes activations above this share of the memory: the estimate may be 10 % low.
CHECKPOINTING_THRESHOLD = 0.9


class PlanUnavailable(Exception):
    """The code of the model needs values where a simulation has only shapes, such as a router of experts."""


class SimulatedMemory(NamedTuple):
    """The results of a simulation: the parameters, the backward pass of the longest batch, the evaluation."""

    weights: ParameterBytes
    backward: PassMemory
    evaluated: PassMemory | None

    @classmethod
    def from_dict(cls, cached: dict[str, Any]) -> SimulatedMemory:
        evaluated = cached["evaluated"] and PassMemory(**cached["evaluated"])
        return cls(ParameterBytes(**cached["weights"]), PassMemory(**cached["backward"]), evaluated)

    def as_dict(self) -> dict[str, Any]:
        return {name: each and each._asdict() for name, each in self._asdict().items()}


SIMULATED_CODE = (Path(__file__).parents[1], Path(load.__file__).parent)


class MemoryEstimator:
    """Plans for one base model and one set of examples, with settings that may differ.

    A plan depends on almost every setting, and alternatives change some of them: methods take the complete
    configuration.
    """

    estimate, roughness = "simulation", ""
    unavailable = "this model cannot be simulated (%s); its memory is estimated by arithmetic, which is rougher"

    def __init__(
        self, base: Source, examples: Sequence[Example], held_out: Sequence[Example], dtype: str, device: str,
        tokenizer: Any, fixed: int, labels: Sequence[str] = (), with_liger: bool = False,
    ) -> None:  # fmt: skip
        """
        Args:
            fixed: bytes that the process takes before the weights are loaded.
        """
        self.base, self.examples, self.held_out = base, examples, held_out
        self.dtype, self.device, self.tokenizer, self.fixed = dtype, device, tokenizer, fixed
        self.labels, self.with_liger = labels, with_liger
        lengths = getattr(examples, "lengths", None)
        self.lengths = np.array([len(e.ids) for e in examples] if lengths is None else lengths)
        self._cached_model = cache(self._build_model)

    def _build_model(self, method: str, cfg_key: str) -> tuple[Any, ParameterBytes]:
        model = simulate.build_tuned_meta_model(
            self._cfg, self.base, self.dtype, self.schedule(self._cfg).steps, self.labels, self.tokenizer
        )
        return model, memory.measure_parameters(model)

    def weights(self, cfg: TrainConfig) -> tuple[Any, ParameterBytes]:
        """The tuned model on the meta device, and the size of its parameters."""
        self._cfg = cfg
        return self._cached_model(
            cfg.method, repr((cfg.lora_r, cfg.lora_dropout, cfg.lora_target_modules, cfg.peft))
        )

    def schedule(self, cfg: TrainConfig) -> Schedule:
        return Schedule.from_batches(len(_sampler(self.examples, cfg)), cfg)

    def longest_batch(self, cfg: TrainConfig) -> list[int]:
        """The examples of the batch with the most tokens of the complete run, without those over max_length."""
        kept = np.flatnonzero(self.lengths <= cfg.max_length)
        kept = kept if len(kept) else np.arange(len(self.lengths))
        sampler = _sampler(_Lengths(self.lengths[kept]), cfg)
        schedule = Schedule.from_batches(len(sampler), cfg)
        epochs = math.ceil(schedule.steps / schedule.steps_per_epoch)
        batches = (batch for epoch in range(epochs) for batch in sampler.epoch_batches(epoch))
        best = max(batches, key=sampler.count_tokens)
        return [int(kept[row]) for row in best]

    def memory(self, cfg: TrainConfig, checkpointing: bool) -> MemoryByMoment:
        """The memory of a run, with or without recomputed activations."""
        weights, backward, evaluated = self.run_simulation(cfg, checkpointing)
        always = {"weights": weights.base_bytes, "adapters": weights.adapter_bytes, "fixed": self.fixed,
                  "optimizer": _optimizer_bytes(cfg, weights)}  # fmt: skip
        copies = memory.STEP_COPY_BYTES.get(cfg.optim, 0) * weights.trainable if self.device == "cuda" else 0
        moments = {
            "backward": always | backward._asdict(),
            "step": always | {"gradients": weights.gradient_bytes, "activations": copies},
        }
        if evaluated:
            moments["evaluation"] = always | evaluated._asdict()
        return MemoryByMoment({name: self._of_one_process(cfg, parts) for name, parts in moments.items()})

    def _of_one_process(self, cfg: TrainConfig, parts: dict[str, int]) -> dict[str, int]:
        """The parts that one process holds if the engine shards them or offloads them to main memory."""
        sharded = memory.SHARDED_PARTS.get(cfg.distributed, frozenset())
        offloaded = cfg.offload and self.device == "cuda"
        share = 0 if offloaded else 1 / _main_process(cfg, cfg.cuda_visible_devices).world_size
        return {part: math.ceil(size * share) if part in sharded else size for part, size in parts.items()}

    def run_simulation(self, cfg: TrainConfig, checkpointing: bool) -> SimulatedMemory:
        """Simulate a training step and an evaluation, or read the result from the cache."""
        batch = [self.examples[row] for row in self.longest_batch(cfg)]
        held_out = self.longest_held_out(cfg)
        path = (
            data_cache(cfg.cache_dir, cfg.output_dir)
            / "plans"
            / f"{self._key(cfg, checkpointing, batch, held_out)}.json"
        )
        with suppress(RunError, TypeError, KeyError):
            return SimulatedMemory.from_dict(read_json(path))
        with plan_errors():
            model, weights = self.weights(cfg)
        options: dict[str, Any] = {
            "dtype": self.dtype, "device": self.device, "tokenizer": self.tokenizer, "with_liger": self.with_liger
        }  # fmt: skip
        with plan_errors():
            backward = simulate.backward_pass(model, batch, cfg, checkpointing=checkpointing, **options)
            evaluated = simulate.forward_pass(model, held_out, cfg, **options) if held_out else None
        found = SimulatedMemory(weights, backward, evaluated)
        write_json(path, found.as_dict())
        return found

    def _key(
        self, cfg: TrainConfig, checkpointing: bool, batch: Sequence[Example], held_out: Sequence[Example]
    ) -> str:
        """A hash of everything that the simulation depends on, and more where that is simpler."""
        settings = {k: v for k, v in asdict(cfg).items() if k not in NEUTRAL_KEYS}
        shapes = [[(len(e.ids), sum(e.loss_mask)) for e in rows] for rows in (batch, held_out)]
        installed = [version(package) for package in ("torch", "transformers", "peft")]
        inputs = [
            settings, shapes, installed, checkpointing, self.base.name, self.base.revision, self.dtype,
            self.device, self.labels, self.with_liger, code_hash(*SIMULATED_CODE),
        ]  # fmt: skip
        return hashlib.sha256(repr(inputs).encode()).hexdigest()[:32]

    def longest_held_out(self, cfg: TrainConfig) -> Sequence[Example]:
        """The batch of the evaluation with the most tokens; empty without an evaluation."""
        size = cfg.trainer.get("per_device_eval_batch_size", cfg.batch_size)
        starts = range(0, len(self.held_out), size)
        batches = (self.held_out[i : i + size] for i in starts)
        return max(batches, key=lambda rows: sum(len(e.ids) for e in rows), default=[])

    def plan(self, cfg: TrainConfig, available: Capacity) -> MemoryPlan:
        """The complete plan, with `gradient_checkpointing=auto` resolved."""
        weights = self.run_simulation(cfg, cfg.gradient_checkpointing is True).weights
        schedule, longest = self.schedule(cfg), self.longest_batch(cfg)
        plain = replace(cfg, use_liger_kernel=False)  # Liger may not be installed, and only the steps matter
        args = build_training_arguments(plain, self.dtype, schedule, bool(self.held_out), Path(cfg.output_dir))
        checkpoints = math.ceil(schedule.steps / args.save_steps)
        checkpointing, needed = self._checkpointing(cfg, available)
        tokens = int(self.lengths.sum())
        needs = disk_needs(cfg, self.base, weights, checkpoints)
        return MemoryPlan(
            cfg.method, self.device, self.dtype, weights.parameters, weights.trainable, len(self.examples),
            schedule.steps_per_epoch, schedule.steps, tokens,
            round(tokens * schedule.steps / schedule.steps_per_epoch),
            (len(longest), int(self.lengths[longest].sum())),
            _evaluations(schedule.steps, args) if self.held_out else 0, checkpoints,
            checkpointing, needed, available, tuple(needs), weights, self.estimate, self.roughness,
        )  # fmt: skip

    def _checkpointing(self, cfg: TrainConfig, available: Capacity) -> tuple[Reasoned, MemoryByMoment]:
        """Whether activations are recomputed, and the memory of the run."""
        if cfg.gradient_checkpointing != "auto":
            chosen = bool(cfg.gradient_checkpointing)
            value = str(chosen).lower()
            return Reasoned(value, f"gradient_checkpointing={value}"), self.memory(cfg, chosen)
        without = self.memory(cfg, False)
        if not methods.METHODS[cfg.method].checkpointing:
            return Reasoned("false", f"auto, method={cfg.method} does not support it"), without
        of = f"{memory.format_bytes(without.peak)} without, of {memory.format_bytes(available.bytes)}"
        if without.peak <= CHECKPOINTING_THRESHOLD * available.bytes:
            return Reasoned("false", f"auto, not needed: {of}"), without
        return Reasoned("true", f"auto, needed: {of}"), self.memory(cfg, True)

    def alternatives(self, plan: MemoryPlan, cfg: TrainConfig) -> Iterator[Alternative]:
        """Changes that lower the peak: each alone, and all together if none alone is enough."""
        enough = False
        combined: dict[str, Any] = {}
        for change in self._changes(plan, cfg):
            changed = replace(cfg, **change)
            if methods.problems(asdict(changed)) or (cfg.init_from and changed.method != cfg.method):
                continue
            try:
                peak = self._peak(plan, changed)
            except (PlanUnavailable, UserError):  # a package that only this method needs may be missing
                continue
            if peak >= plan.memory.peak:
                continue
            combined |= change
            enough |= peak <= plan.available.bytes
            yield Alternative(_format_change(change), peak)
        if not enough and len(combined) > 1:
            yield Alternative(_format_change(combined), self._peak(plan, replace(cfg, **combined)))

    def _peak(self, plan: MemoryPlan, cfg: TrainConfig) -> int:
        chosen = cfg.gradient_checkpointing
        return self.memory(cfg, plan.checkpointing.value == "true" if chosen == "auto" else chosen).peak

    def _changes(self, plan: MemoryPlan, cfg: TrainConfig) -> Iterator[dict[str, Any]]:
        if plan.checkpointing.value == "false" and methods.METHODS[cfg.method].checkpointing:
            yield {"gradient_checkpointing": True}
        limit = plan.available.bytes

        def halve(value: int, least: int, change: Callable[[int], dict[str, Any]]) -> Iterator[dict[str, Any]]:
            """The largest of `value` / 2, / 4 ... that fits, or the least."""
            while value // 2 >= least:
                value //= 2
                if value // 2 < least or self._peak(plan, replace(cfg, **change(value))) <= limit:
                    yield change(value)
                    return

        effective = cfg.batch_size * cfg.gradient_accumulation_steps
        yield from halve(
            cfg.batch_size, 1, lambda n: {"batch_size": n, "gradient_accumulation_steps": effective // n}
        )
        if cfg.gradient_accumulation_steps > 1:  # no gradients of earlier batches are held
            yield {"gradient_accumulation_steps": 1}
        longest = min(cfg.max_length, int(self.lengths.max()))
        shortest = max(8, int(self.lengths.min()), longest // 8)
        yield from halve(longest, shortest, lambda n: {"max_length": n})
        method = methods.METHODS[cfg.method]
        if cfg.method == "full":
            yield {"method": "lora"}
        if not find_spec("bitsandbytes"):
            return
        if method.config is None or not method.four_bit:
            yield {"method": "qlora"}
        if memory.OPTIMIZER_BYTES.get(cfg.optim) == memory.OPTIMIZER_BYTES["adamw_torch"]:
            yield {"optim": "paged_adamw_8bit"}


@contextmanager
def plan_errors() -> Iterator[None]:
    try:
        yield
    except (UserError, PlanUnavailable):
        raise
    except Exception as error:  # remote code may raise anything
        raise PlanUnavailable(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


class _Lengths(Sequence[Example]):
    """Examples of which only the lengths are known."""

    def __init__(self, lengths: Any) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        raise NotImplementedError


def _format_change(change: dict[str, Any]) -> str:
    return " ".join(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in change.items())


def _evaluations(steps: int, args: Any) -> int:
    """The evaluations of a run: every eval_steps, from eval_delay on, and after the last step."""
    before = math.ceil(args.eval_delay / args.eval_steps) - 1 if args.eval_delay else 0
    return max(1, math.ceil(steps / args.eval_steps) - before)


def _optimizer_bytes(cfg: TrainConfig, weights: ParameterBytes) -> int:
    return memory.optimizer_bytes(cfg.optim, weights, momentum="optim_args" in cfg.trainer)


def disk_needs(cfg: TrainConfig, base: Source, weights: ParameterBytes, checkpoints: int) -> Iterator[DiskNeed]:
    """What the run writes. A checkpoint holds the trained parameters and the state of the optimizer."""
    output = Path(cfg.output_dir)
    trained = weights.gradient_bytes
    one = trained + _optimizer_bytes(cfg, weights)
    kept = min(checkpoints, cfg.save_total_limit + 1)  # a new one is complete before an old one is removed
    yield DiskNeed(f"{count(kept, 'checkpoint')} of {memory.format_bytes(one)}", output, kept * one)
    yield DiskNeed("the tuned model", output, trained)
    if base.folder is None:
        cached = [try_to_load_from_cache(base.name, f"model.safetensors{end}") for end in ("", ".index.json")]
        if not any(isinstance(path, str) for path in cached):
            yield DiskNeed("the base model from the Hub", Path(HF_HUB_CACHE), 2 * weights.parameters)


def available_memory(cfg: TrainConfig, device: str) -> Capacity:
    """The memory to plan with."""
    if cfg.memory_gb is not None:
        return Capacity(round(cfg.memory_gb * 1e9), f"memory_gb={cfg.memory_gb:g}")
    found = environment.memory_available(device, cfg.cuda_visible_devices)
    processes = _local_processes(cfg, cfg.cuda_visible_devices)
    if device == "cuda" or processes == 1:
        return found
    return Capacity(found.bytes // processes, f"{found.reason}, shared by {processes} processes")


def _sampler(examples: Sequence[Example], cfg: TrainConfig) -> BatchSampler:
    info = _main_process(cfg, cfg.cuda_visible_devices)
    return build_sampler(examples, cfg, cfg.seed, cfg.max_length if cfg.packing else None, info)


def _main_process(args: DistributedArgs, cuda_visible_devices: str) -> ProcessInfo:
    """The main process of the planned run. A plan for another machine has one for each GPU that is named."""
    if getattr(args, "plan_device", None) == "cuda" and not environment.gpus(cuda_visible_devices):
        named = [gpu for gpu in cuda_visible_devices.split(",") if gpu.strip()]
        return ProcessInfo(world_size=max(1, len(named)) * args.num_nodes)
    info, launch = process_info(), plan_launch(args, cuda_visible_devices)
    return info if info.launched else ProcessInfo(world_size=launch.world_size if launch else 1)


def _local_processes(args: DistributedArgs, cuda_visible_devices: str) -> int:
    """The processes of the planned run on this machine."""
    launch = plan_launch(args, cuda_visible_devices)
    return launch.processes if launch else int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def fixed_bytes(device: str) -> int:
    """What a process takes before the weights are loaded."""
    if device == "cuda":
        return memory.CUDA_CONTEXT + memory.CUDA_WORKSPACES
    return environment.resident_bytes() + memory.CPU_OVERHEAD
