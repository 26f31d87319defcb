"""How many bytes a training takes, part by part: the sums over what simulate.py counts.

| part        | bytes                                                                                         |
|-------------|-----------------------------------------------------------------------------------------------|
| weights     | 4 a parameter in fp32, 2 in 16 bits, 0.516 in nf4 (QLoRA, arXiv:2305.14314, section 3)        |
| adapters    | 4 a parameter of the adapter: peft keeps them in fp32, and autocast computes in 16 bits       |
| gradients   | as many as what is trained: autograd gives a gradient the type of its parameter               |
| optimizer   | see OPTIMIZERS                                                                                |
| activations | what autograd keeps of the longest batch, and what is alive beside it when most is            |
| logits      | tokens of one chunk of the loss x vocabulary: logits, fp32 copy, softmax, gradient            |
| fixed       | of the process before the weights are loaded: libraries, or a GPU's context and workspaces    |

Not all of these are there at once: gradients appear while activations go. The peak is that of the fullest moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "fixed")
MOMENTS = {"backward": "the backward pass of the longest batch", "step": "the optimizer's step",
           "evaluation": "the evaluation"}  # fmt: skip

# Bytes a trained parameter. Adam keeps a mean and a mean square (arXiv:1412.6980, algorithm 1), each in fp32, or
# in 8 bits with an fp32 scale for each block of 256 (arXiv:2110.02861, section 2.1).
OPTIMIZER_BYTES: dict[str, float] = {
    "adamw_torch_fused": 8,
    "adamw_torch": 8,
    "paged_adamw_32bit": 8,
    "adamw_8bit": 2 * (1 + 4 / 256),
    "paged_adamw_8bit": 2 * (1 + 4 / 256),
    "sgd": 0,
}
# adamw_torch works on lists of tensors on a GPU, and makes one more copy of what is trained: torch.optim.AdamW,
# "foreach". The fused one makes none.
STEP_COPY_BYTES = {"adamw_torch": 4}

# A CUDA context with PyTorch's kernels, and cuBLAS's workspaces; the second is PyTorch's own to count.
CUDA_CONTEXT, CUDA_WORKSPACES = 500_000_000, 64 << 20
# What a CPU's process takes later than the plan: kernels that oneDNN compiles, buffers of the libraries. Measured
# as what trainings of 4 steps of a model of 0.1 M parameters took over their own tensors.
CPU_OVERHEAD = 100_000_000


# What processes share out, by `distributed`: ZeRO (arXiv:1910.02054, section 5), stages 2 and 3, and FSDP2 as 3.
# The layer that is put together for its computation is not counted.
ALL_STATES = frozenset({"weights", "adapters", "gradients", "optimizer"})
SHARDED_PARTS = {"zero2": frozenset({"gradients", "optimizer"}), "zero3": ALL_STATES, "fsdp2": ALL_STATES}


@dataclass(frozen=True)
class MemoryByMoment:
    """Bytes by moment and part."""

    moments: Mapping[str, Mapping[str, int]]

    @property
    def at(self) -> str:
        """The fullest moment."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def peak(self) -> int:
        return sum(self.moments[self.at].values())

    @property
    def parts(self) -> dict[str, int]:
        """What the fullest moment is made of."""
        return {part: self.moments[self.at].get(part, 0) for part in PARTS}


def optimizer_bytes(optim: str, trainable: int) -> int:
    """What the optimizer keeps from its first step on; of one that is not known as much as of Adam."""
    return round(OPTIMIZER_BYTES.get(optim, 8) * trainable)


def format_gb(size: float) -> str:
    """Bytes in GB of 10^9, as 1.23."""
    return f"{size / 1e9:,.2f}"
