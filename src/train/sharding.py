"""Weights, gradients and optimizer spread over processes: what the engines are told, and a check of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from src.errors import ModelError
from src.schema import TrainConfig


def engine_arguments(cfg: TrainConfig, dtype: str) -> dict[str, Any]:
    """Arguments of the Trainer for `cfg.distributed`."""
    if cfg.distributed == "ddp":
        return {}
    # FSDP and DeepSpeed hold the weights in fp32 and compute in 16 bits by themselves
    told: dict[str, Any] = {"bf16": dtype == "bfloat16", "fp16": dtype == "float16"}
    if cfg.distributed == "fsdp2":
        settings = {"version": 2, "cpu_offload": cfg.offload, "state_dict_type": "FULL_STATE_DICT"}
        return told | {"fsdp": True, "fsdp_config": settings}
    return told | {"deepspeed": _deepspeed_config(cfg)}


def _deepspeed_config(cfg: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's configuration; "auto" is what the Trainer's own arguments say."""
    stage = int(cfg.distributed.removeprefix("zero"))
    place = {"device": "cpu", "pin_memory": True}
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True}
    if cfg.offload:
        zero["offload_optimizer"] = place
    if stage == 3:
        zero |= {"stage3_gather_16bit_weights_on_model_save": True}
        zero |= {"offload_param": place} if cfg.offload else {}
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "zero_force_ds_cpu_optimizer": False,
    }


@contextmanager
def fsdp_on_cpu(wanted: bool) -> Iterator[None]:
    """Let an Accelerator that is made inside shard on CPUs as well.

    It does so for GPUs alone, and takes DDP for CPUs without a word.
    """
    state = PartialState._shared_state
    if wanted and state.get("distributed_type") == DistributedType.MULTI_CPU:
        state["distributed_type"] = DistributedType.MULTI_GPU
    yield


def load_full_weights(model: Any, folder: Path) -> None:
    """Load a checkpoint's weights into a model that has not been shared out."""
    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), "default", is_trainable=True)
        return
    for file in sorted(folder.glob("model*.safetensors")):
        model.load_state_dict(load_file(file), strict=False)  # tied weights are stored once


def check_sharded(model: Any, distributed: str) -> None:
    """Raises: ModelError if the engine has left the weights whole where they were to be shared out."""
    if distributed == "fsdp2":
        whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    elif distributed == "zero3":
        whole = [name for name, p in model.named_parameters() if not hasattr(p, "ds_id")]
    else:
        whole = []
    if whole:
        raise ModelError(
            f"distributed={distributed} left {len(whole)} weights whole in every process, {whole[0]} first",
            hint="set distributed=ddp",
        )
