"""Other names of settings: former names, which are accepted, and names of other tools, which are suggested.

Whatever reads settings replaces former names first: the command line and YAML files in `src.compose`, recorded
settings in `runs.Run.settings`, `config.load`, resume and sweep. All other code knows today's names only.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping
from typing import Any

import yaml

from .errors import ConfigError

# Former name -> today's. A dotted name stays in its group: gate.OLD -> gate.NEW.
RENAMED = {
    "allow_other_base": "allow_base_mismatch",
    "allow_other_tokenizer": "allow_tokenizer_mismatch",
    "data_workers": "num_proc",
    "fresh": "overwrite_answers",
    "gate.reload_examples": "gate.verify_examples",
    "mirror": "checkpoint_mirror",
    "mirror_endpoint": "checkpoint_mirror_endpoint",
    "near_threshold": "dedup_threshold",
    "plan_for": "plan_device",
    "questions": "num_prompts",
}

# What LLaMA-Factory, Axolotl, TRL, Unsloth and the Trainer call settings whose names are too far from ours to be
# guessed: a setting, or one with its value. They are suggested, not accepted: a value may mean something else.
OTHER_TOOLS = {
    "adapter_name_or_path": "init_from",
    "lora_model_dir": "init_from",
    "adapter": "method",
    "add_tokens": "new_tokens",
    "assistant_only_loss": "train_on",
    "auto_resume_from_checkpoints": "resume",
    "base_model": "model_name",
    "batch": "batch_size",
    "chat_template_file": "chat_template",
    "chat_template_jinja": "chat_template",
    "chat_template_path": "chat_template",
    "completion_only_loss": "train_on",
    "cutoff_len": "max_length",
    "data_seed": "seed",
    "dataset": "dataset_path",
    "dataset_dir": "dataset_path",
    "dataset_name": "dataset_path",
    "dataset_num_proc": "num_proc",
    "dataset_prepared_path": "cache_dir",
    "dataset_processes": "num_proc",
    "dataset_test_split": "eval_path",
    "deepspeed": "distributed",
    "default_system_message": "system_prompt",
    "devices": "cuda_visible_devices",
    "dtype": "bf16",
    "enable_liger_kernel": "use_liger_kernel",
    "enable_thinking": "chat_template_kwargs",
    "eval_dataset": "eval_path",
    "eval_strategy": "eval_steps",
    "evals_per_epoch": "eval_epochs",
    "evaluation_strategy": "eval_steps",
    "finetuning_type": "method",
    "fp16": "bf16=false",
    "fsdp": "distributed=fsdp2",
    "gpus": "cuda_visible_devices",
    "gradient_clipping": "max_grad_norm",
    "hub_model_id": "repo_id",
    "hub_private_repo": "private",
    "interleave_probs": "datasets",
    "learning_rate": "lr",
    "liger_kernel": "use_liger_kernel",
    "load_in_4bit": "method=qlora",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "lora_target_linear": "lora_target_modules",
    "lr_scheduler": "lr_scheduler_type",
    "mask_history": "train_on",
    "max_completion_length": "max_new_tokens",
    "max_samples": "max_examples",
    "max_seq_len": "max_length",
    "max_seq_length": "max_length",
    "max_tokens": "max_new_tokens",
    "micro_batch_size": "batch_size",
    "model_id": "model_name",
    "model_max_length": "max_length",
    "model_name_or_path": "model_name",
    "neat_packing": "packing",
    "num_epochs": "epochs",
    "num_gpus": "num_processes",
    "num_train_epochs": "epochs",
    "num_workers": "num_proc",
    "optimizer": "optim",
    "per_device_eval_batch_size": "eval_batch_size",
    "per_device_train_batch_size": "batch_size",
    "preprocessing_num_workers": "num_proc",
    "quantization_bit": "method=qlora",
    "resize_vocab": "resize_embeddings",
    "resume_from_checkpoint": "resume",
    "revision_of_model": "model_revision",
    "sample_packing": "packing",
    "save_strategy": "save_steps",
    "saves_per_epoch": "save_steps",
    "sequence_len": "max_length",
    "system": "system_prompt",
    "target_modules": "lora_target_modules",
    "temperature": "generation.temperature",
    "template": "chat_template",
    "test_datasets": "eval_path",
    "tokens": "new_tokens",
    "test_size": "eval_split",
    "top_p": "generation.top_p",
    "torch_dtype": "bf16",
    "train_batch_size": "batch_size",
    "train_file": "dataset_path",
    "train_on_inputs": "train_on",
    "train_on_prompt": "train_on",
    "use_dora": "method=dora",
    "use_peft": "method",
    "use_rslora": "method=rslora",
    "val_set_size": "eval_split",
    "val_size": "eval_split",
    "validation_file": "eval_path",
    "wandb_name": "run_name",
    "wandb_run_name": "run_name",
    "warmup_steps": "warmup_ratio",
}
# Settings of other tools that are something else here.
ELSEWHERE = {
    "attn_implementation": "attention kernels are chosen for the model and the device",
    "do_eval": "write eval",
    "do_train": "write train",
    "flash_attention": "attention kernels are chosen for the model and the device",
    "flash_attn": "attention kernels are chosen for the model and the device",
    "hf_hub_token": "set the environment variable HF_TOKEN",
    "hub_token": "set the environment variable HF_TOKEN",
    "load_in_8bit": "a base model is loaded in 4 bits with method=qlora",
    "logging_dir": "curves are in the run directory",
    "overwrite_output_dir": "each run has its own directory",
    "push_to_hub": "write publish-hf after eval",
    "stage": "training is supervised fine-tuning",
    "wandb_entity": "set the environment variable WANDB_ENTITY",
    "wandb_project": "set the environment variable WANDB_PROJECT",
}

SPACE = "search.space"  # holds settings of the run, by their names
_announced: set[str] = set()


def current_settings(
    values: Mapping[str, Any],
    announce: bool = False,
    known: Collection[str] | None = None,
    group: str = "",
    resolved: bool = False,
) -> dict[str, Any]:
    """`values` with today's names, in their order, also in references such as `${near_threshold}`.

    Args:
        announce: write a line to stderr for each name that was replaced, once per process.
        known: the settings of the stage; others keep their names. None: every former name is replaced.
        group: the group that `values` belong to, such as `gate`.
        resolved: the references are resolved, so that `${near_threshold}` is a text.
    Raises: ConfigError if a setting has two values, one under each of its names.
    """
    return _rename(values, _table(known), f"{group}." if group else "", announce, resolved)


def former_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with their former names: what the identity of an older sweep was computed from."""
    return _rename(values, {new: old for old, new in RENAMED.items()}, "")


def current_override(text: str, known: Collection[str] | None = None) -> str:
    """An override (`key=value`, `+key=value`, `~key`) with today's names, also in a value like `{key: ...}`.

    Raises: ConfigError if such a value has both names of a setting.
    """
    table = _table(known)
    marks, key, rest = re.fullmatch(r"([+~]*)([^=]*)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    rest = _current_references(rest, table)
    scope, name = _scope(key)
    if name in table:
        _announce(name)
        return f"{marks}{scope}{table[name]}{rest}"
    group = "" if key == SPACE else name
    for old, new in table.items():
        parent, _, leaf = old.rpartition(".")
        if parent == group and rest.startswith("={") and re.search(_key_pattern(leaf), rest):
            if re.search(_key_pattern(new.rpartition(".")[2]), rest):
                raise ConfigError(f"{text} has {old} and {new}, which are one setting", hint=f"write {new} only")
            _announce(old)
            rest = re.sub(_key_pattern(leaf), new.rpartition(".")[2], rest)
    return f"{marks}{key}{rest}"


def _table(known: Collection[str] | None) -> dict[str, str]:
    return {old: new for old, new in RENAMED.items() if known is None or new in known}


def _key_pattern(name: str) -> str:
    """Matches a key of a dictionary in Hydra's grammar."""
    return rf"(?<=[{{,\s]){name}(?=\s*:)"


def _current_references(value: Any, table: Mapping[str, str]) -> Any:
    r"""A value with today's names in `${...}`, but not in `\${...}`, which is text."""
    if isinstance(value, str):
        return re.sub(r"(?<!\\)((?:\\\\)*\$\{)([\w.]+)(?=\})", lambda m: m[1] + table.get(m[2], m[2]), value)
    return [_current_references(v, table) for v in value] if isinstance(value, list) else value


def conflicts(overrides: list[str]) -> list[str]:
    """One sentence for each setting that the command line gives two values, one under each of its names."""
    typed = dict(text.lstrip("+").partition("=")[::2] for text in overrides)
    return [
        f"{_two_names(old, typed[old], typed[new])}; write {new} only"
        for old, new in RENAMED.items()
        if old in typed and new in typed and not _equal(typed[old], typed[new])
    ]


def _rename(
    values: Mapping[str, Any],
    table: Mapping[str, str],
    prefix: str,
    announce: bool = False,
    resolved: bool = False,
) -> dict[str, Any]:
    """`values` with each name in `table` replaced; `prefix` is the dotted name of the group that they are in."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        current = value if resolved else _current_references(value, table)
        if new := table.get(name):
            leaf = new.removeprefix(prefix)
            if leaf in values and values[leaf] != value:
                raise ConfigError(_two_names(name, value, values[leaf]), hint=f"write {new} only")
            if announce:
                _announce(name)
            found[leaf] = current
        elif isinstance(value, Mapping):
            inner = "" if name == SPACE else f"{name}."
            found[key] = _rename(value, table, inner, announce, resolved)
        else:
            found[key] = current
    return found


def _scope(key: str) -> tuple[str, str]:
    """A key of the search space as its scope and the setting that it draws; any other without a scope."""
    start = f"{SPACE}."
    return (start, key.removeprefix(start)) if key.startswith(start) else ("", key)


def _equal(a: str, b: str) -> bool:
    """Whether two texts are one YAML value, as 0.7 and 0.70 are."""
    try:
        return bool(yaml.safe_load(a) == yaml.safe_load(b))
    except yaml.YAMLError:
        return a == b


def _two_names(old: str, value: Any, other: Any) -> str:
    return f"{old}={value} and {RENAMED.get(old, old)}={other} are one setting with two values"


def _announce(old: str) -> None:
    if old not in _announced:
        _announced.add(old)
        print(f"{old} is now {RENAMED[old]}", file=sys.stderr, flush=True)
