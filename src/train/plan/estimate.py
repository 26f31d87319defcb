"""What a training would take, found from its settings, its tokens and the shape of its model."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE

from src.data.sources import cache_of
from src.data.store import Example
from src.errors import RunError, UserError
from src.model import methods
from src.model.source import Source
from src.schema import TrainConfig
from src.train import launch_plan
from src.train.plan import memory, simulate
from src.train.plan.memory import MemoryByMoment
from src.train.resume import NEUTRAL_KEYS
from src.train.training_args import Schedule, build_batch_sampler, build_training_arguments
from src.utils import environment
from src.utils.environment import Capacity, Reasoned
from src.utils.files import code_hash, disk_free, read_json, write_json
from src.utils.process_info import ProcessInfo, process_info

# The share of the memory from which on `auto` recomputes activations: the estimate may be a tenth too low.
CHECKPOINTING_THRESHOLD = 0.9


class PlanUnavailable(Exception):
    """The model's own code needs numbers where only shapes are, as a router of experts may."""


class DiskNeed(NamedTuple):
    """Bytes that `what` takes on the disk of `place`."""

    what: str
    place: Path
    bytes: int


class Alternative(NamedTuple):
    """A change of settings and the peak that it would give."""

    change: str
    peak: int


@dataclass(frozen=True)
class MemoryPlan:
    """A training before it is paid for. `peak` and the like are bytes."""

    method: str
    device: str
    dtype: str
    parameters: int
    trainable: int
    rows: int
    steps_an_epoch: int
    steps: int
    tokens_an_epoch: int
    tokens: int
    longest_batch: tuple[int, int]  # rows, tokens
    evaluations: int
    checkpoints: int
    checkpointing: Reasoned
    memory: MemoryByMoment
    available: Capacity
    disk: tuple[DiskNeed, ...]
    weights: simulate.ParameterBytes

    @property
    def fits_memory(self) -> bool:
        return self.memory.peak <= self.available.bytes

    @property
    def full_disks(self) -> list[tuple[Path, int, int]]:
        """`(place, needed, free)` of every disk that has too little room."""
        needs = [(p, sum(n.bytes for n in self.disk if n.place == p)) for p in {n.place: 0 for n in self.disk}]
        return [(place, needed, disk_free(place)) for place, needed in needs if needed > disk_free(place)]

    @property
    def fits(self) -> bool:
        return self.fits_memory and not self.full_disks

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "method": self.method, "device": self.device, "precision": self.dtype,
            "parameters": self.parameters, "trainable": self.trainable,
            "weights": {"base": self.weights.base_bytes, "adapters": self.weights.adapter_bytes},
            "rows": self.rows, "steps_an_epoch": self.steps_an_epoch, "steps": self.steps,
            "tokens_an_epoch": self.tokens_an_epoch, "tokens": self.tokens,
            "evaluations": self.evaluations, "checkpoints": self.checkpoints,
            "longest_batch": {"rows": self.longest_batch[0], "tokens": self.longest_batch[1]},
            "gradient_checkpointing": self.checkpointing._asdict(),
            "memory": {"peak": self.memory.peak, "at": self.memory.at, "parts": self.memory.parts},
            "available": self.available._asdict(),
            "disk": [{"what": n.what, "place": str(n.place), "bytes": n.bytes} for n in self.disk],
            "fits": self.fits,
        }  # fmt: skip


class SimulatedMemory(NamedTuple):
    """What a simulation says: of the weights, of the longest batch's backward pass, of the evaluation."""

    weights: simulate.ParameterBytes
    backward: simulate.PassMemory
    evaluated: simulate.PassMemory | None

    @classmethod
    def of(cls, kept: dict[str, Any]) -> SimulatedMemory:
        evaluated = kept["evaluated"] and simulate.PassMemory(**kept["evaluated"])
        return cls(simulate.ParameterBytes(**kept["weights"]), simulate.PassMemory(**kept["backward"]), evaluated)

    def as_dict(self) -> dict[str, Any]:
        return {name: each and each._asdict() for name, each in self._asdict().items()}


SIMULATED_CODE = (Path(__file__).parents[1], Path(simulate.load.__file__).parent)


class MemoryEstimator:
    """Plans of one base model and one set of rows, under settings that may differ."""

    def __init__(
        self, base: Source, examples: Sequence[Example], held_out: Sequence[Example], dtype: str, device: str,
        tokenizer: Any, fixed: int, labels: Sequence[str] = (), with_liger: bool = False,
    ) -> None:  # fmt: skip
        """
        Args:
            fixed: bytes that are taken before the weights are loaded.
        """
        self.base, self.examples, self.held_out = base, examples, held_out
        self.dtype, self.device, self.tokenizer, self.fixed = dtype, device, tokenizer, fixed
        self.labels, self.with_liger = labels, with_liger
        lengths = getattr(examples, "lengths", None)
        self.lengths = np.array([len(e.ids) for e in examples] if lengths is None else lengths)
        self._skeleton = cache(self._built)

    def _built(self, method: str, cfg_key: str) -> tuple[Any, simulate.ParameterBytes]:
        model = simulate.build_meta_model(
            self._cfg, self.base, self.dtype, self.schedule(self._cfg).steps, self.labels
        )
        return model, simulate.measure_parameters(model)

    def weights(self, cfg: TrainConfig) -> tuple[Any, simulate.ParameterBytes]:
        """The skeleton of the tuned model, and what its parameters take."""
        self._cfg = cfg
        return self._skeleton(cfg.method, repr((cfg.lora_r, cfg.lora_dropout, cfg.lora_target_modules, cfg.peft)))

    def schedule(self, cfg: TrainConfig) -> Schedule:
        return Schedule.of(len(build_batch_sampler(self.examples, cfg, planned_process(cfg))), cfg)

    def longest_batch(self, cfg: TrainConfig) -> list[int]:
        """The rows of the batch with the most tokens of the whole training; rows over max_length are left out."""
        kept = np.flatnonzero(self.lengths <= cfg.max_length)
        kept = kept if len(kept) else np.arange(len(self.lengths))
        batches = build_batch_sampler(_Lengths(self.lengths[kept]), cfg, planned_process(cfg))
        schedule = Schedule.of(len(batches), cfg)
        epochs = math.ceil(schedule.steps / schedule.steps_an_epoch)
        best = max((b for epoch in range(epochs) for b in batches.of_epoch(epoch)), key=batches.tokens)
        return [int(kept[row]) for row in best]

    def memory(self, cfg: TrainConfig, checkpointing: bool) -> MemoryByMoment:
        """What the training would hold with and without recomputed activations."""
        weights, backward, evaluated = self.figures(cfg, checkpointing)
        always = {"weights": weights.base_bytes, "adapters": weights.adapter_bytes, "fixed": self.fixed,
                  "optimizer": memory.optimizer_bytes(cfg.optim, weights.trainable)}  # fmt: skip
        copies = memory.STEP_COPY_BYTES.get(cfg.optim, 0) * weights.trainable if self.device == "cuda" else 0
        moments = {
            "backward": always | backward._asdict(),
            "step": always | {"gradients": weights.gradient_bytes, "activations": copies},
        }
        if evaluated:
            moments["evaluation"] = always | evaluated._asdict()
        return MemoryByMoment({name: self._of_one_process(cfg, parts) for name, parts in moments.items()})

    def _of_one_process(self, cfg: TrainConfig, parts: dict[str, int]) -> dict[str, int]:
        """What is left of the parts where processes share them out, or keep them in main memory."""
        shared = memory.SHARDED_PARTS.get(cfg.distributed, frozenset())
        away = cfg.offload and self.device == "cuda"
        share = 0 if away else 1 / planned_process(cfg).world_size
        return {part: math.ceil(size * share) if part in shared else size for part, size in parts.items()}

    def figures(self, cfg: TrainConfig, checkpointing: bool) -> SimulatedMemory:
        """What the simulation says, from the cache where it was made for these settings before."""
        batch = [self.examples[row] for row in self.longest_batch(cfg)]
        held_out = self._longest_held_out(cfg.batch_size) if self.held_out else []
        path = cache_of(cfg) / "plans" / f"{self._key(cfg, checkpointing, batch, held_out)}.json"
        with suppress(RunError, TypeError, KeyError):
            return SimulatedMemory.of(read_json(path))
        with _plan_errors():
            model, weights = self.weights(cfg)
        how: dict[str, Any] = {
            "dtype": self.dtype, "device": self.device, "tokenizer": self.tokenizer, "with_liger": self.with_liger
        }  # fmt: skip
        with _plan_errors():
            backward = simulate.backward_pass(model, batch, cfg, checkpointing=checkpointing, **how)
            evaluated = simulate.forward_pass(model, held_out, cfg, **how) if held_out else None
        found = SimulatedMemory(weights, backward, evaluated)
        write_json(path, found.as_dict())
        return found

    def _key(
        self, cfg: TrainConfig, checkpointing: bool, batch: Sequence[Example], held_out: Sequence[Example]
    ) -> str:
        """A name for all that the simulation depends on: more than it needs, where that is simpler."""
        settings = {k: v for k, v in asdict(cfg).items() if k not in NEUTRAL_KEYS}
        shapes = [[(len(e.ids), sum(e.loss_mask)) for e in rows] for rows in (batch, held_out)]
        installed = [version(package) for package in ("torch", "transformers", "peft")]
        made_of = [
            settings, shapes, installed, checkpointing, self.base.name, self.base.revision, self.dtype,
            self.device, self.labels, self.with_liger, code_hash(*SIMULATED_CODE),
        ]  # fmt: skip
        return hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]

    def _longest_held_out(self, size: int) -> Sequence[Example]:
        starts = range(0, len(self.held_out), size)
        return max((self.held_out[i : i + size] for i in starts), key=lambda rows: sum(len(e.ids) for e in rows))

    def plan(self, cfg: TrainConfig, available: Capacity) -> MemoryPlan:
        """The whole plan, `gradient_checkpointing=auto` decided by it."""
        weights = self.figures(cfg, cfg.gradient_checkpointing is True).weights
        schedule, longest = self.schedule(cfg), self.longest_batch(cfg)
        plain = replace(cfg, use_liger_kernel=False)  # Liger may not be here, where only steps are asked for
        told = build_training_arguments(plain, self.dtype, schedule, bool(self.held_out), Path(cfg.output_dir))
        checkpoints = math.ceil(schedule.steps / told.save_steps)
        checkpointing, needed = self._checkpointing(cfg, available)
        tokens = int(self.lengths.sum())
        return MemoryPlan(
            cfg.method, self.device, self.dtype, weights.parameters, weights.trainable, len(self.examples),
            schedule.steps_an_epoch, schedule.steps, tokens,
            round(tokens * schedule.steps / schedule.steps_an_epoch),
            (len(longest), int(self.lengths[longest].sum())),
            math.ceil(schedule.steps / told.eval_steps) if self.held_out else 0, checkpoints,
            checkpointing, needed, available, tuple(disk_needs(cfg, self.base, weights, checkpoints)), weights,
        )  # fmt: skip

    def _checkpointing(self, cfg: TrainConfig, available: Capacity) -> tuple[Reasoned, MemoryByMoment]:
        """Whether activations are recomputed, and what is needed then."""
        if cfg.gradient_checkpointing != "auto":
            chosen = bool(cfg.gradient_checkpointing)
            said = str(chosen).lower()
            return Reasoned(said, f"gradient_checkpointing={said}"), self.memory(cfg, chosen)
        without = self.memory(cfg, False)
        if not methods.METHODS[cfg.method].checkpointing:
            return Reasoned("false", f"auto, method={cfg.method} does not train with it"), without
        of = f"{memory.format_gb(without.peak)} GB without, of {memory.format_gb(available.bytes)} GB"
        if without.peak <= CHECKPOINTING_THRESHOLD * available.bytes:
            return Reasoned("false", f"auto, not needed: {of}"), without
        return Reasoned("true", f"auto, needed: {of}"), self.memory(cfg, True)

    def instead(self, plan: MemoryPlan, cfg: TrainConfig) -> Iterator[Alternative]:
        """Changes that lower the peak, each alone, and all at once where none alone is enough."""
        enough = False
        all_of: dict[str, Any] = {}
        for change in self._changes(plan, cfg):
            try:
                peak = self._peak(plan, replace(cfg, **change))
            except PlanUnavailable:  # a training leaves out what only other methods need, such as bitsandbytes
                continue
            if peak >= plan.memory.peak:
                continue
            all_of |= change
            enough |= peak <= plan.available.bytes
            yield Alternative(_format_change(change), peak)
        if not enough and len(all_of) > 1:
            yield Alternative(_format_change(all_of), self._peak(plan, replace(cfg, **all_of)))

    def _peak(self, plan: MemoryPlan, cfg: TrainConfig) -> int:
        chosen = cfg.gradient_checkpointing
        return self.memory(cfg, plan.checkpointing.value == "true" if chosen == "auto" else chosen).peak

    def _changes(self, plan: MemoryPlan, cfg: TrainConfig) -> Iterator[dict[str, Any]]:
        if plan.checkpointing.value == "false" and methods.METHODS[cfg.method].checkpointing:
            yield {"gradient_checkpointing": True}
        room = plan.available.bytes

        def halved(value: int, least: int, change: Callable[[int], dict[str, Any]]) -> Iterator[dict[str, Any]]:
            """The largest half, quarter ... of `value` that fits, or the least."""
            while value // 2 >= least:
                value //= 2
                if value // 2 < least or self._peak(plan, replace(cfg, **change(value))) <= room:
                    yield change(value)
                    return

        times = cfg.batch_size * cfg.gradient_accumulation_steps
        yield from halved(
            cfg.batch_size, 1, lambda n: {"batch_size": n, "gradient_accumulation_steps": times // n}
        )
        longest = min(cfg.max_length, int(self.lengths.max()))
        shortest = max(8, int(self.lengths.min()), longest // 8)
        yield from halved(longest, shortest, lambda n: {"max_length": n})
        method = methods.METHODS[cfg.method]
        if cfg.method == "full":
            yield {"method": "lora"}
        if method.config is None or not method.four_bit:
            yield {"method": "qlora"}
        if memory.OPTIMIZER_BYTES.get(cfg.optim, 8) > memory.OPTIMIZER_BYTES["paged_adamw_8bit"]:
            yield {"optim": "paged_adamw_8bit"}


@contextmanager
def _plan_errors() -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever the code of a model of unknown make answers
        raise PlanUnavailable(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


class _Lengths(Sequence[Example]):
    """Rows of which only the lengths are asked."""

    def __init__(self, lengths: Any) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        raise NotImplementedError


def _format_change(change: dict[str, Any]) -> str:
    return " ".join(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in change.items())


def disk_needs(
    cfg: TrainConfig, base: Source, weights: simulate.ParameterBytes, checkpoints: int
) -> Iterator[DiskNeed]:
    """What the training will write. A checkpoint holds what is trained and the optimizer's state of it."""
    output = Path(cfg.output_dir)
    trained = weights.gradient_bytes
    one = trained + memory.optimizer_bytes(cfg.optim, weights.trainable)
    kept = min(checkpoints, cfg.save_total_limit + 1)  # a new one is whole before an old one goes
    yield DiskNeed(f"{kept} checkpoints of {memory.format_gb(one)} GB", output, kept * one)
    yield DiskNeed("the tuned model", output, trained)
    if base.folder is None:
        held = [try_to_load_from_cache(base.name, f"model.safetensors{end}") for end in ("", ".index.json")]
        if not any(isinstance(path, str) for path in held):
            yield DiskNeed("the base model from the Hub", Path(HF_HUB_CACHE), 2 * weights.parameters)


def available_memory(cfg: TrainConfig, device: str) -> Capacity:
    """The memory to plan with."""
    if cfg.memory_gb is not None:
        return Capacity(round(cfg.memory_gb * 1e9), f"memory_gb={cfg.memory_gb:g}")
    found, several = environment.memory_available(device, cfg.cuda_visible_devices), _local_processes(cfg)
    if device == "cuda" or several == 1:
        return found
    return Capacity(found.bytes // several, f"{found.reason}, shared by {several} processes")


def planned_process(cfg: TrainConfig) -> ProcessInfo:
    """The first process of as many as train, or would."""
    now, several = process_info(), launch_plan.plan_launch(cfg)
    return now if now.launched else ProcessInfo(world_size=several.world if several else 1)


def _local_processes(cfg: TrainConfig) -> int:
    """Processes that train on this machine, or would."""
    several = launch_plan.plan_launch(cfg)
    return several.processes if several else int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def fixed_bytes(device: str) -> int:
    """What is taken before the weights are loaded."""
    if device == "cuda":
        return memory.CUDA_CONTEXT + memory.CUDA_WORKSPACES
    return environment.resident_bytes() + memory.CPU_OVERHEAD
