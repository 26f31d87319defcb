"""aim_profile.json and training_info.json, in the format of serving platforms. Imports no torch.

aim_profile.json holds the requirements for serving the model:

    {"model_id": "Qwen/Qwen2.5-7B-Instruct-finetuned", "base_model_id": "Qwen/Qwen2.5-7B-Instruct",
     "fine_tuning_method": "lora", "precision": "fp16", "memory_gb": 15.0, "recommended_partition_gb": 18.75,
     "parameters": "7B"}

training_info.json describes how it was trained. Both are computed from the records of the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..runs import Run
from ..utils.files import read_json, write_json
from ..utils.logs import log
from .methods import METHODS

PROFILE, TRAINING_INFO = "aim_profile.json", "training_info.json"
PROFILE_KEYS: dict[str, type] = {
    "model_id": str,
    "base_model_id": str,
    "fine_tuning_method": str,
    "precision": str,
    "memory_gb": float,
    "recommended_partition_gb": float,
    "parameters": str,
}
PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
HEADROOM = 1.25  # memory of a partition relative to the weights: room for activations and the KV cache
# our setting -> its name in transformers.TrainingArguments or peft
NAMES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "max_steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "lr_scheduler_type": "lr_scheduler_type",
    "warmup_ratio": "warmup_ratio",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "optim": "optim",
    "max_length": "max_length",
    "seed": "seed",
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
}
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "safetensors")


def write_profile(run: Run) -> None:
    """Write both files into the directory of a trained run."""
    write_json(run.path / TRAINING_INFO, training_info(run))
    found = profile(run.manifest)
    if found is None:
        log.warning("%s is not written: the run has no memory plan that counts its weights", PROFILE)
    else:
        write_json(run.path / PROFILE, found)


def profile(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """The content of aim_profile.json; None if the run has no memory plan that counts its weights.

    Memory is that of the weights when the model is served: the base's (in nf4 after QLoRA) and the adapter's, or
    full weights in the precision of the computation. 1 GB is 10^9 bytes.
    """
    plan = manifest.get("plan") or {}
    if "weights" not in plan:
        return None
    method, dtype = METHODS[manifest["method"]], manifest["precision"]["value"]
    if method.config is None:
        parameters = plan["parameters"]
        size = parameters * BYTES[dtype]
    else:
        parameters = plan["parameters"] - plan["trainable"]
        size = plan["weights"]["base"] + plan["weights"]["adapters"]
    base = base_id(manifest["base_model"])
    return {
        "model_id": f"{base}-finetuned",
        "base_model_id": base,
        "fine_tuning_method": manifest["method"],
        "precision": "nf4" if method.four_bit else PRECISIONS[dtype],
        "memory_gb": _four_digits(size / 1e9),
        "recommended_partition_gb": _four_digits(HEADROOM * size / 1e9),
        "parameters": format_count(parameters),
    }


def is_local(base: Mapping[str, Any]) -> bool:
    """Whether a base model in a manifest is a local folder, whose revision is the hash of its content."""
    return str(base["revision"]).startswith("sha256:")


def base_id(base: Mapping[str, Any]) -> str:
    """The base model's id on the Hub, or the name of its folder without its path, which is private."""
    name = str(base["name"])
    return Path(name).name if is_local(base) else name


def format_count(parameters: int) -> str:
    """Format a count as 7B, 7.6B, 135M or 94K."""
    for letter, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if parameters >= size:
            shown = parameters / size
            return (f"{shown:.1f}".removesuffix(".0") if shown < 10 else f"{shown:.0f}") + letter
    return str(parameters)


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")


def training_info(run: Run) -> dict[str, Any]:
    """The content of training_info.json: settings, steps, losses, data and versions."""
    manifest = run.manifest
    settings = run.settings
    figures = read_json(run.path / "metrics.json")["train"]
    history = loss_history(run)
    found = [loss for _, loss in history]
    takes = METHODS[manifest["method"]].keys
    ours = {k: n for k, n in NAMES.items() if not k.startswith("lora_") or k in takes}
    files = manifest["data"]["files"]
    base = base_id(manifest["base_model"])
    return {
        "run_id": run.id,
        "model_id": f"{base}-finetuned",
        "base_model_id": base,
        "base_model_revision": manifest["base_model"]["revision"],
        "fine_tuning_method": manifest["method"],
        "task": manifest["task"],
        "hyperparameters": {name: settings.get(key) for key, name in ours.items()},
        "precision": PRECISIONS[manifest["precision"]["value"]],
        "world_size": manifest["processes"],
        "global_step": figures["steps"],
        "num_train_epochs": settings["epochs"],
        "train_loss": figures["train_loss"],
        "eval_loss": figures.get("eval_loss"),
        "first_loss": found[0] if found else None,
        "final_loss": found[-1] if found else None,
        "best_loss": min(found, default=None),
        "log_history": [{"step": step, "loss": loss} for step, loss in history],
        "train_runtime": figures["seconds"],
        "num_input_tokens_seen": figures["tokens"],
        "dataset": {
            "num_rows": sum(f["rows_trained"] for f in files),
            "files": [
                {"name": Path(f["file"]).name} | {k: f[k] for k in ("sha256", "rows_in", "rows_trained")}
                for f in files
            ],
        },
        "versions": {p: manifest["packages"][p] for p in PACKAGES if p in manifest["packages"]},
        "commit": manifest["code"]["commit"],
        "started": manifest["started"],
    }


def loss_history(run: Run) -> list[tuple[int, float]]:
    """`(step, loss)` of the logged steps, from the newest readable checkpoint, else from the TensorBoard curves.

    The curves lack non-finite losses.
    """
    for state in sorted(run.checkpoints.glob("checkpoint-*/trainer_state.json"), key=_step, reverse=True):
        with suppress(RunError, KeyError, TypeError):  # skip a damaged one
            history = read_json(state)["log_history"]
            if found := [(int(h["step"]), float(h["loss"])) for h in history if "loss" in h]:
                return found
    from ..utils.event_files import Curves  # imports TensorBoard

    return Curves.read(run.logs).get("train/loss", [])


def _step(state: Path) -> int:
    number = state.parent.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else -1


def problems(found: Any) -> list[str]:
    """The errors in the content of an aim_profile.json, one message each."""
    if not isinstance(found, Mapping):
        return ["it is not a JSON object"]
    errors = [f"{key} is missing" for key in PROFILE_KEYS if key not in found]
    errors += [f"{key} is not a key of the format" for key in found if key not in PROFILE_KEYS]
    for key, kind in PROFILE_KEYS.items():
        value = found.get(key)
        if key not in found:
            continue
        if kind is str and not (isinstance(value, str) and value):
            errors.append(f"{key}={value!r} should be a text")
        if kind is float and not _is_size(value):
            errors.append(f"{key}={value!r} should be a number above 0")
    memory: Any = found.get("memory_gb")
    partition: Any = found.get("recommended_partition_gb")
    if _is_size(memory) and _is_size(partition) and not math.isclose(partition, HEADROOM * memory, rel_tol=1e-3):
        errors.append(f"recommended_partition_gb={partition} should be {HEADROOM} x memory_gb={memory}")
    if (precision := found.get("precision")) not in {None, "nf4", *PRECISIONS.values()}:
        errors.append(f"precision={precision!r} should be one of nf4, {', '.join(PRECISIONS.values())}")
    if (method := found.get("fine_tuning_method")) is not None and method not in METHODS:
        errors.append(f"fine_tuning_method={method!r} should be one of {', '.join(METHODS)}")
    return errors


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
