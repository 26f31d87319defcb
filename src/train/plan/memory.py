"""How many bytes a training run needs, part by part: the types of a plan and the sums over its simulation.

| part        | bytes                                                                                         |
|-------------|-----------------------------------------------------------------------------------------------|
| weights     | 4 per parameter in fp32, 2 in 16 bits, 0.516 in nf4 (QLoRA, arXiv:2305.14314, section 3)      |
| adapters    | 4 per parameter of the adapter: peft keeps them in fp32, autocast computes in 16 bits         |
| gradients   | those of the trained parameters: autograd gives a gradient the dtype of its parameter         |
| optimizer   | see OPTIMIZER_BYTES                                                                           |
| activations | what autograd saves of the longest batch, and temporary tensors at the peak                   |
| logits      | tokens of one chunk of the loss x vocabulary: logits, fp32 copy, softmax, gradient            |
| fixed       | of the process before the weights are loaded: libraries, or a GPU's context and workspaces    |

Not all of these exist at the same time: gradients appear while activations are freed. The peak is the largest sum
of any moment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...utils.environment import Capacity, Reasoned
from ...utils.files import disk_free
from ...utils.units import format_size

PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "fixed")
MOMENTS = {"backward": "the backward pass of the longest batch", "step": "the optimizer's step",
           "evaluation": "the evaluation"}  # fmt: skip

# Bytes per trained parameter. Adam keeps a mean and a mean square (arXiv:1412.6980, algorithm 1), each in fp32, or
# in 8 bits with an fp32 scale for each block of 256 (arXiv:2110.02861, section 2.1). Lion keeps the mean only.
OPTIMIZER_BYTES: dict[str, float] = {
    "adamw_torch_fused": 8,
    "adamw_torch": 8,
    "paged_adamw_32bit": 8,
    "adamw_8bit": 2 * (1 + 4 / 256),
    "paged_adamw_8bit": 2 * (1 + 4 / 256),
    "lion_32bit": 4,
    "lion_8bit": 1 + 4 / 256,
    "paged_lion_8bit": 1 + 4 / 256,
    "sgd": 0,
}
# On a GPU, adamw_torch works on lists of tensors (torch.optim.AdamW, "foreach") and copies the trained parameters
# once more. The fused implementation does not.
STEP_COPY_BYTES = {"adamw_torch": 4}

# A CUDA context with PyTorch's kernels, and cuBLAS's workspaces. PyTorch counts only the second as its own.
CUDA_CONTEXT, CUDA_WORKSPACES = 500_000_000, 64 << 20
# What a process on a CPU allocates after the plan: kernels that oneDNN compiles, buffers of the libraries. It was
# measured in runs of 4 steps of a model with 0.1 M parameters, as the memory beyond their tensors.
CPU_OVERHEAD = 100_000_000
# nf4 keeps half a byte per weight, 8 bits for each block of 64, and 32 bits for each 256 blocks: QLoRA
# (arXiv:2305.14314), section 3, "Double Quantization".
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)

# What the engines shard over processes: ZeRO (arXiv:1910.02054, section 5), stages 2 and 3; FSDP2 as stage 3.
# The one layer that is gathered for its computation is not counted.
ALL_STATES = frozenset({"weights", "adapters", "gradients", "optimizer"})
SHARDED_PARTS = {"zero2": frozenset({"gradients", "optimizer"}), "zero3": ALL_STATES, "fsdp2": ALL_STATES}


class ParameterBytes(NamedTuple):
    """Parameters, trained parameters, and bytes: base, adapter, all gradients, state of Adafactor."""

    parameters: int
    trainable: int
    base_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    factored_bytes: int


class PassMemory(NamedTuple):
    """Bytes at the peak of a forward or backward pass, in addition to the weights."""

    activations: int
    logits: int
    gradients: int


@dataclass(frozen=True)
class MemoryByMoment:
    """Bytes by moment and part."""

    moments: Mapping[str, Mapping[str, int]]

    @property
    def at(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def peak(self) -> int:
        return sum(self.moments[self.at].values())

    @property
    def parts(self) -> dict[str, int]:
        """The parts of the peak."""
        return {part: self.moments[self.at].get(part, 0) for part in PARTS}


class DiskNeed(NamedTuple):
    """Bytes that `what` takes on the disk of `place`."""

    what: str
    place: Path
    bytes: int


class Alternative(NamedTuple):
    """A change of settings, and its peak in bytes."""

    change: str
    peak: int


class ProbeResult(NamedTuple):
    """Number of steps; seconds per step, evaluation and checkpoint; tokens per second; the peak in bytes."""

    steps: int
    step: float
    evaluation: float
    checkpoint: float
    tokens_per_second: float
    peak: int


@dataclass(frozen=True)
class MemoryPlan:
    """What a training run needs, before it starts."""

    method: str
    device: str
    dtype: str
    parameters: int
    trainable: int
    rows: int
    steps_per_epoch: int
    steps: int
    tokens_per_epoch: int
    tokens: int
    longest_batch: tuple[int, int]  # examples, tokens
    evaluations: int
    checkpoints: int
    checkpointing: Reasoned
    memory: MemoryByMoment
    available: Capacity
    disk: tuple[DiskNeed, ...]
    weights: ParameterBytes
    estimate: str  # simulation or arithmetic
    roughness: str = ""  # of arithmetic

    @property
    def fits_memory(self) -> bool:
        return self.memory.peak <= self.available.bytes

    @property
    def full_disks(self) -> list[tuple[Path, int, int]]:
        """`(place, needed, free)` of every disk with too little space, in bytes."""
        needs = [(p, sum(n.bytes for n in self.disk if n.place == p)) for p in {n.place: 0 for n in self.disk}]
        return [(place, needed, disk_free(place)) for place, needed in needs if needed > disk_free(place)]

    @property
    def fits(self) -> bool:
        return self.fits_memory and not self.full_disks

    def as_dict(self) -> dict[str, Any]:
        """The plan as the manifest records it."""
        return {
            "method": self.method, "device": self.device, "precision": self.dtype,
            "parameters": self.parameters, "trainable": self.trainable,
            "weights": {"base": self.weights.base_bytes, "adapters": self.weights.adapter_bytes},
            "rows": self.rows, "steps_an_epoch": self.steps_per_epoch, "steps": self.steps,
            "tokens_an_epoch": self.tokens_per_epoch, "tokens": self.tokens,
            "evaluations": self.evaluations, "checkpoints": self.checkpoints,
            "longest_batch": {"rows": self.longest_batch[0], "tokens": self.longest_batch[1]},
            "gradient_checkpointing": self.checkpointing._asdict(),
            "estimate": self.estimate, "roughness": self.roughness or None,
            "memory": {"peak": self.memory.peak, "at": self.memory.at, "parts": self.memory.parts},
            "available": self.available._asdict(),
            "disk": [{"what": n.what, "place": str(n.place), "bytes": n.bytes} for n in self.disk],
            "fits": self.fits,
        }  # fmt: skip


def measure_parameters(model: Any) -> ParameterBytes:
    """The sizes of a model's parameters, which may be on the meta device."""
    total = sum(p.numel() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    trainable = sum(p.numel() for p in trained)
    gradient = sum(parameter_bytes(p) for p in trained)
    all_bytes = sum(parameter_bytes(p) for p in model.parameters())
    adapter = 0 if trainable == total else gradient
    factored = sum(factored_bytes(p.shape) for p in trained)
    return ParameterBytes(total, trainable, all_bytes - adapter, adapter, gradient, factored)


def factored_bytes(shape: Sequence[int]) -> int:
    """Adafactor (arXiv:1804.04235, section 3) keeps the row and the column sums of a matrix, all of a vector."""
    size = math.prod(shape)
    return 4 * (size if len(shape) < 2 else size // shape[-1] + size // shape[-2])


def parameter_bytes(parameter: Any) -> int:
    if is_four_bit(parameter):
        return int(parameter.numel() * NF4_BYTES)
    return int(parameter.numel() * parameter.element_size())


def is_four_bit(parameter: Any) -> bool:
    return type(parameter).__name__ == "Params4bit"


def optimizer_bytes(optim: str, weights: ParameterBytes, momentum: bool = False) -> int:
    """The state of the optimizer after its first step. `momentum`: of SGD, an fp32 number per parameter."""
    if optim == "adafactor":
        return weights.factored_bytes
    return round((OPTIMIZER_BYTES[optim] + 4 * momentum) * weights.trainable)


def format_bytes(size: float) -> str:
    """Bytes in GB with two decimals, such as 1.23 GB; less than 10 MB in the unit that fits."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else format_size(size)


def format_of(part: float, whole: float) -> str:
    """`0.57 of 24.75 GB`, or `0.57 GB of 1.0 kB`."""
    first, second = format_bytes(part), format_bytes(whole)
    same = first.rpartition(" ")[2] == second.rpartition(" ")[2]
    return f"{first.rpartition(' ')[0] if same else first} of {second}"
