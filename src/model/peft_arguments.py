"""The arguments of `peft: {...}`: those that are accepted, and whether the names in them match the model.

An argument is accepted if the adapter computes the same after it is saved and reloaded, and can be merged where
its method can. The tests train an adapter with each accepted argument, reload and merge it. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from annotated_types import Ge, Gt, Lt
from pydantic import AllowInfNan

from ..config import fits
from ..errors import ModelError

BY_PEFT = "peft sets it by the model"
CHANGES_BASE = "it changes weights of the base model, which are not saved with the adapter"
UNMERGEABLE = "its adapter cannot be merged, and servers do not load it"
NEEDS_DATA = "it needs batches of data before the training starts"
NO_EFFECT = "it would have no effect"


class Typed(NamedTuple):
    """Values of a type, which pydantic checks, and the type in words."""

    hint: Any
    words: str


# argument -> its accepted values, or their type
Accepted = Mapping[str, tuple[Any, ...] | Typed]
_Count = Annotated[int, Ge(1)]
_Index = Annotated[int, Ge(0)]
_Positive = Annotated[float, Gt(0), AllowInfNan(False)]
COUNT = Typed(_Count, "a whole number from 1")
STEP = Typed(_Index, "a whole number from 0")
SHARE = Typed(Annotated[float, Ge(0), Lt(1)], "a number from 0 to below 1")
WEIGHT = Typed(Annotated[float, Ge(0), AllowInfNan(False)], "a number from 0")
TEXT = Typed(str, "a text")
NAMES_OR_PATTERN = Typed(str | list[str], "a list of names, or a regular expression")
SAVED = Typed(list[str], "a list, such as [lm_head]")
TOKENS = Typed(
    list[_Index] | dict[str, list[_Index]], "a list of token ids, or one for each layer, as {embed_tokens: [3, 4]}"
)
LORA: Accepted = {
    "exclude_modules": NAMES_OR_PATTERN,
    "layers_to_transform": Typed(_Index | list[_Index], "the number of a layer, or a list of them"),
    "layers_pattern": NAMES_OR_PATTERN,
    "modules_to_save": SAVED,
    "trainable_token_indices": TOKENS,
    "target_parameters": Typed(list[str], "a list, such as [mlp.experts.down_proj]"),
    "rank_pattern": Typed(dict[str, _Count], "names with whole numbers from 1, such as {q_proj: 8}"),
    "alpha_pattern": Typed(dict[str, _Positive], "names with numbers above 0, such as {q_proj: 8}"),
    "bias": ("none", "all", "lora_only"),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "mica"),
    "ensure_weight_tying": (True, False),
}
# vLLM refuses an adapter that was made with these, or applies it without them. Merged weights can be served.
UNSERVED = (
    "modules_to_save", "trainable_token_indices", "target_parameters", "rank_pattern", "alpha_pattern", "bias"
)  # fmt: skip
SCHEDULE: Accepted = {
    "init_r": COUNT, "tinit": STEP, "tfinal": STEP, "deltaT": COUNT, "beta1": SHARE, "beta2": SHARE,
    "orth_reg_weight": WEIGHT, "total_step": COUNT,
}  # fmt: skip
VIRTUAL_TOKENS: Accepted = {"num_virtual_tokens": COUNT, "modules_to_save": SAVED}
ACCEPTED: dict[str, Accepted] = {
    "LoraConfig": LORA,
    "AdaLoraConfig": {
        **{k: v for k, v in LORA.items() if k not in {"rank_pattern", "alpha_pattern", "target_parameters"}},
        **SCHEDULE,
        "init_lora_weights": (True, False),
    },
    "IA3Config": {
        "exclude_modules": NAMES_OR_PATTERN, "feedforward_modules": NAMES_OR_PATTERN, "modules_to_save": SAVED,
        "init_ia3_weights": (True, False),
    },
    "PrefixTuningConfig": {
        **VIRTUAL_TOKENS,
        "encoder_hidden_size": COUNT, "prefix_projection": (True, False), "init_weights": ("zero",),
    },
    "PromptEncoderConfig": {
        **VIRTUAL_TOKENS,
        "encoder_reparameterization_type": ("MLP", "LSTM"), "encoder_hidden_size": COUNT,
        "encoder_num_layers": COUNT, "encoder_dropout": SHARE,
    },
    "PromptTuningConfig": {
        **VIRTUAL_TOKENS,
        "prompt_tuning_init": ("SAMPLE_VOCAB", "RANDOM", "TEXT"), "prompt_tuning_init_text": TEXT,
        "tokenizer_name_or_path": TEXT,
    },
}  # fmt: skip
REFUSED: dict[str, str] = {
    **dict.fromkeys(("fan_in_fan_out", "auto_mapping", "peft_version", "token_dim", "num_layers"), BY_PEFT),
    **dict.fromkeys(("num_transformer_submodules", "num_attention_heads"), BY_PEFT),
    **dict.fromkeys(("loftq_config", "corda_config", "lora_ga_config", "kasa_config"), CHANGES_BASE),
    **dict.fromkeys(("layer_replication", "alora_invocation_tokens", "lora_bias", "arrow_config"), UNMERGEABLE),
    **dict.fromkeys(("monteclora_config", "use_bdlora", "velora_config"), UNMERGEABLE),
    **dict.fromkeys(("use_qalora", "qalora_group_size", "megatron_config", "megatron_core"), NO_EFFECT),
    **dict.fromkeys(("alpha_pattern", "target_parameters"), NO_EFFECT),  # where a class does not accept them
    "rank_pattern": "the method distributes the ranks itself",
    "eva_config": NEEDS_DATA,
    "runtime_config": "it is not saved with the adapter",
    "tokenizer_kwargs": "the tokenizer is read as it is",
}
REFUSED_VALUES = {
    "eva": NEEDS_DATA,
    **dict.fromkeys(("pissa", "olora", "corda", "loftq", "lora_ga"), CHANGES_BASE),
}


def check_supported(given: Mapping[str, Any], cls: str) -> list[str]:
    """The errors in arguments of the peft class `cls`, one message each; they exist and no setting owns them."""
    return [problem for name, value in given.items() if (problem := _problem(name, value, ACCEPTED[cls]))]


def _problem(name: str, value: Any, accepted: Accepted) -> str:
    if value is None:
        return ""
    if name not in accepted:
        return f"peft.{name} is not supported: {REFUSED.get(name, 'it is not known to be saved with the adapter')}"
    values = accepted[name]
    if isinstance(values, Typed) and not fits(value, values.hint):
        return f"peft.{name}={_shown(value)}: should be {values.words}"
    if broken := _broken_pattern(name, value):
        return f"peft.{name}: {broken}"
    if isinstance(values, Typed) or any(value == v and type(value) is type(v) for v in values):
        return ""
    reason = REFUSED_VALUES.get(re.sub("_niter_.*", "", str(value)))
    because = f" is not supported: {reason};" if reason else ":"
    return f"peft.{name}={_shown(value)}{because} should be one of {', '.join(map(_shown, values))}"


def _broken_pattern(argument: str, value: Any) -> str:
    """The error in a regular expression of an argument; empty if there is none."""
    patterns = value if argument.endswith("_pattern") and isinstance(value, Mapping) else [value]
    try:
        if argument in REGULAR_EXPRESSIONS or isinstance(value, Mapping):
            [re.compile(pattern) for pattern in patterns if isinstance(pattern, str)]
    except re.error as error:
        return f"{error.pattern!r} is not a regular expression: {error}"
    return ""


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def why_unserved(config: Mapping[str, Any]) -> str:
    """Why vLLM cannot serve an adapter with this adapter_config.json as it was trained; empty if it can."""
    if config.get("peft_type") != "LORA":
        return f"vLLM loads LoRA adapters only, and this is {config.get('peft_type')}"
    names = [name for name in UNSERVED if config.get(name) not in (None, "none", [], {})]
    names += ["use_dora"] if config.get("use_dora") else []
    return f"vLLM does not support {', '.join(names)} of an adapter" if names else ""


# Names that match nothing


class ModelNames(NamedTuple):
    """Names in a model: all modules, those with a matrix of weights, parameters, and layers with an adapter."""

    modules: Sequence[str] = ()
    layers: Sequence[str] = ()
    parameters: Sequence[str] = ()
    adapted: Sequence[str] = ()


class NamesOf(NamedTuple):
    """How an argument names parts of a model.

    what: what it names, a field of ModelNames.
    listed: the field whose names a message lists.
    matches: whether a name in the argument means a name in the model.
    short: a name in the model as a message lists it.
    """

    what: str
    listed: str
    matches: Callable[[str, str], bool]
    short: Callable[[str], str] = lambda name: name.rpartition(".")[2]


def _is_suffix(wanted: str, name: str) -> bool:
    return name == wanted or name.endswith("." + wanted)


def _is_pattern(wanted: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({wanted})$", name) is not None


def _is_index(wanted: str, name: str) -> bool:
    return wanted == _index(name)


def _index(name: str) -> str:
    """The number of the layer in a name, `3` of `model.layers.3.mlp`; empty if it has none."""
    return next((part for part in name.split(".") if part.isdigit()), "")


NAMES: dict[str, NamesOf] = {
    "modules_to_save": NamesOf("modules", "layers", _is_suffix),
    "exclude_modules": NamesOf("layers", "layers", _is_suffix),
    "trainable_token_indices": NamesOf("layers", "layers", _is_suffix),
    "target_parameters": NamesOf("parameters", "parameters", _is_suffix, lambda n: ".".join(n.split(".")[-2:])),
    "feedforward_modules": NamesOf("adapted", "adapted", _is_suffix),
    "rank_pattern": NamesOf("adapted", "adapted", _is_pattern),
    "alpha_pattern": NamesOf("adapted", "adapted", _is_pattern),
    "layers_to_transform": NamesOf("layers", "layers", _is_index, _index),
}
REGULAR_EXPRESSIONS = {"exclude_modules", "feedforward_modules"}  # one, or a list of names
KINDS = {
    "modules": "module", "layers": "layer", "parameters": "parameter", "adapted": "layer with an adapter"
}  # fmt: skip


def check_matches(given: Mapping[str, Any], model: ModelNames) -> None:
    """Check the names in arguments against those of the fields of `model` that are not empty.

    Raises: ModelError for all that match nothing, with the names that exist.
    """
    problems = []
    for argument, named in NAMES.items():
        existing: Sequence[str] = getattr(model, named.what)
        wanted = _names_in(argument, given.get(argument)) if existing else []
        if missing := [name for name in wanted if not _has(existing, argument, name)]:
            known = sorted({named.short(n) for n in getattr(model, named.listed)} - {""}, key=_natural)
            fact = f"matches no {KINDS[named.what]} of this model, which has {', '.join(known)}"
            problems.append(f"peft.{argument}: {', '.join(missing)} {fact}")
    if problems:
        raise ModelError(*problems, hint="choose from these, or remove the names")


def _names_in(argument: str, value: Any) -> list[str]:
    """The names in the value of an argument: a list, the keys of a mapping, a number, or a regular expression."""
    if argument == "trainable_token_indices" and not isinstance(value, Mapping):
        return []  # of the input embedding
    if value is None or isinstance(value, str | int):
        return [] if value is None else [str(value)]
    return [str(each) for each in value]


def _has(existing: Sequence[str], argument: str, wanted: str) -> bool:
    if argument in REGULAR_EXPRESSIONS and not re.fullmatch(r"[\w.]+", wanted):
        return any(re.fullmatch(wanted, name) for name in existing)
    return any(NAMES[argument].matches(wanted, name) for name in existing)


def _natural(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdigit() else (0, name)
