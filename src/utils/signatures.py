"""Which arguments a heavy library takes, read from its source text: importing it would cost seconds."""

import ast
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from src.errors import did_you_mean


class Target(NamedTuple):
    package: str
    file: str
    cls: str


PEFT_LORA = Target("peft", "tuners/lora/config.py", "LoraConfig")
PEFT_BASE = Target("peft", "config.py", "PeftConfig")
TRAINER = Target("transformers", "training_args.py", "TrainingArguments")
GENERATION = Target("transformers", "generation/configuration_utils.py", "GenerationConfig")

PASSTHROUGH = {"peft": (PEFT_LORA, PEFT_BASE), "trainer": (TRAINER,), "generation": (GENERATION,)}

# Arguments that have a setting of their own: two ways to say one thing end in one of them being lost.
OWNED = {
    "peft": {
        "r": "lora_r",
        "lora_alpha": "lora_alpha",
        "lora_dropout": "lora_dropout",
        "target_modules": "lora_target_modules",
        "use_dora": "method=dora",
        "use_rslora": "method=rslora",
        "base_model_name_or_path": "model_name",
        "revision": "model_revision",
        "task_type": "method",
    },
    "trainer": {
        "output_dir": "output_dir",
        "num_train_epochs": "epochs",
        "max_steps": "max_steps",
        "per_device_train_batch_size": "batch_size",
        "learning_rate": "lr",
        "gradient_accumulation_steps": "gradient_accumulation_steps",
        "warmup_steps": "warmup_ratio",
        "weight_decay": "weight_decay",
        "lr_scheduler_type": "lr_scheduler_type",
        "max_grad_norm": "max_grad_norm",
        "gradient_checkpointing": "gradient_checkpointing",
        "activation_checkpointing": "gradient_checkpointing",
        "bf16": "bf16",
        "fp16": "bf16=false",
        "seed": "seed",
        "data_seed": "seed",
        "logging_steps": "logging_steps",
        "logging_strategy": "logging_steps",
        "eval_strategy": "eval_steps",
        "eval_steps": "eval_steps",
        "save_strategy": "save_steps",
        "save_steps": "save_steps",
        "save_total_limit": "save_total_limit",
        "report_to": "TensorBoard, which is always on",
        "push_to_hub": "publish-hf",
        "hub_token": "the environment variable HF_TOKEN",
    },
    "generation": {"max_new_tokens": "max_new_tokens", "max_length": "max_new_tokens"},
}


def check_passthrough(key: str, values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the arguments under `key` (`peft`, `trainer`, `generation`), one sentence each."""
    given = values.get(key) or {}
    if not isinstance(given, Mapping):
        return []  # of the wrong type; the schema says so
    problems = []
    for name in given:
        if name in OWNED[key]:
            problems.append(f"{key}.{name} has a setting of its own: {OWNED[key][name]}")
        elif name not in (known := _known(key)):
            owner = PASSTHROUGH[key][0].cls
            problems.append(f"{key}.{name} is not an argument of {owner}{did_you_mean(str(name), known)}")
    return problems


@cache
def _known(key: str) -> frozenset[str]:
    return frozenset(name for target in PASSTHROUGH[key] for name in arguments_of(target))


def arguments_of(target: Target) -> set[str]:
    """Argument names of a class: its annotated fields, or what `__init__` takes or pops from kwargs.

    Raises: ModuleNotFoundError if the package is not installed.
    """
    spec = importlib.util.find_spec(target.package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{target.package} is not installed; make install installs it")
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / target.file).read_text(encoding="utf-8"))
    cls = next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == target.cls)
    names = {n.target.id for n in cls.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    for init in (n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"):
        names |= {a.arg for a in [*init.args.args[1:], *init.args.kwonlyargs]}
        names |= {
            call.args[0].value
            for call in ast.walk(init)
            if isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr == "pop"
            and call.args
            and isinstance(call.args[0], ast.Constant)
            and isinstance(call.args[0].value, str)
        }
    return {name for name in names if not name.startswith("_")}
