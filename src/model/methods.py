"""The table of tuning methods: what each trains, which settings it takes, what it supports. Imports no torch.

To add a method, enter it in METHODS, add its name to MethodArgs.method in src/schema.py, a preset to
configs/method/ and a row to docs/methods.md. Its arguments are checked against peft's signature, and the tests run
over the table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ..errors import ModelError
from ..schema import MethodArgs
from ..utils.signatures import check_arguments, peft_arguments
from .peft_arguments import ACCEPTED, check_supported
from .source import Source, is_quantised

ADDED_TOKENS = "its virtual tokens are added to the input, and no weight of the base model can hold them"

NOT_SAVED = "the network that makes its virtual tokens is not saved with it"

LORA_KEYS = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
             "lora_target_modules": "target_modules"}  # fmt: skip

# peft argument -> the setting that determines it, in addition to those of Method.keys
PEFT_OWNED_BY_SETTING = {
    "r": "lora_r",
    "use_dora": "method=dora",
    "use_rslora": "method=rslora",
    "base_model_name_or_path": "model_name",
    "revision": "model_revision",
    "peft_type": "method",
    "task_type": "method",
    "inference_mode": "method",
}


class Method(NamedTuple):
    """A tuning method.

    trains: what it trains, for the documentation.
    config: name of the peft class that configures the adapter; None if all weights are trained.
    fixed: default arguments of that class; settings and `peft: {...}` override them.
    keys: our setting -> argument of that class.
    derived: computes further arguments from (model, settings, planned optimizer steps), including `peft: {...}`.
    four_bit: the base weights are loaded in 4-bit nf4.
    unmergeable: why the adapter cannot be merged into the base model; empty if it can.
    padding_free: examples may be packed into one row. False for virtual tokens, which precede each row of a batch.
    checkpointing: it supports gradient_checkpointing.
    shardable: its weights may be divided among processes (distributed=fsdp2 or zero3).
    final: why a trained adapter cannot be trained further; empty if it can.
    embeddings: it can adapt embeddings, if lora_target_modules names them.
    """

    trains: str
    config: str | None = None
    fixed: Mapping[str, Any] = {}
    keys: Mapping[str, str] = {}
    derived: Callable[[Any, MethodArgs, int], dict[str, Any]] | None = None
    four_bit: bool = False
    unmergeable: str = ""
    padding_free: bool = True
    checkpointing: bool = True
    shardable: bool = True
    final: str = ""
    embeddings: bool = False


def _adalora_schedule(model: Any, args: MethodArgs, steps: int) -> dict[str, Any]:
    """AdaLoRA's ranks and its three phases, in optimizer steps (Zhang et al. 2023, arXiv:2303.10512).

    Every layer starts with rank 1.5 x lora_r. The ranks are constant for the first tenth of the steps, shrink to
    lora_r on average until half of the steps, and are constant again. `peft: {...}` overrides all of these.
    Raises: ModelError if no step remains to shrink the ranks, or the initial rank is not above the final one.
    """
    total = int(args.peft.get("total_step", steps))
    final = int(args.peft.get("tfinal", max(min(total // 2, total - 2), 0)))
    found = {
        "init_r": max(args.lora_r + 1, math.ceil(1.5 * args.lora_r)),
        "total_step": total,
        "tinit": min(total // 10, max(total - final - 1, 0)),
        "tfinal": final,
    } | args.peft
    if total - final < 2 or found["tinit"] >= total - final:
        raise ModelError(
            f"method=adalora has no step to shrink the ranks in: of {total} steps, they are constant in the first "
            f"{found['tinit']} and the last {final}",
            hint="train for more steps, or lower peft.tinit and peft.tfinal",
        )
    if found["init_r"] <= args.lora_r:
        raise ModelError(
            f"peft.init_r={found['init_r']} is not above lora_r={args.lora_r}, the final rank of method=adalora",
            hint="raise peft.init_r or lower lora_r",
        )
    return found


def _ia3_feedforward(model: Any, args: MethodArgs, steps: int) -> dict[str, Any]:
    """The layers of which IA3 scales the input instead of the output (Liu et al. 2022, arXiv:2205.05638).

    These are the last layers of the feed-forward blocks, unless `peft.feedforward_modules` names others. Returns a
    regular expression, not a list: on saving, peft shortens the list of targets, and on loading it rejects a list
    that is not a subset of the targets.
    """
    named = args.peft.get("feedforward_modules")
    if named is None:
        paths = {re.sub(r"(?<=\.)\d+(?=\.)", "@", name) for name in feed_forward_outputs(model)}
        pattern = "|".join(re.escape(path).replace("@", r"\d+") for path in sorted(paths))
    else:
        pattern = named if isinstance(named, str) else "|".join(rf"(.*\.)?{re.escape(n)}" for n in named)
    return {"feedforward_modules": pattern}


def feed_forward_outputs(model: Any) -> list[str]:
    """Names of the linear layers with the hidden size as output that belong neither to attention nor to the head.

    For example Llama's down_proj, GPT-2's mlp.c_proj and OPT's fc2.
    """
    hidden = model.config.get_text_config().hidden_size
    modules = dict(model.named_modules())
    return [
        name
        for name, module in modules.items()
        if (getattr(module, "out_features", None) or getattr(module, "nf", None)) == hidden
        and module is not model.get_output_embeddings()
        and not any("attention" in type(modules[parent]).__name__.lower() for parent in _parents(name))
    ]


def _parents(name: str) -> list[str]:
    """`a.b.c` to `a.b`, `a`."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


def _encoder_width(model: Any, args: MethodArgs, steps: int) -> dict[str, Any]:
    """The encoder of the virtual tokens has the hidden size of the model."""
    width = model.config.get_text_config().hidden_size
    return {"encoder_hidden_size": args.peft.get("encoder_hidden_size", width)}


METHODS: dict[str, Method] = {
    "lora": Method("low-rank updates of linear layers", "LoraConfig", keys=LORA_KEYS, embeddings=True),
    "rslora": Method(
        "low-rank updates, scaled by alpha / sqrt(r)", "LoraConfig", {"use_rslora": True}, LORA_KEYS,
        embeddings=True,
    ),
    "dora": Method(
        "low-rank updates of the direction of each weight, and its magnitude", "LoraConfig", {"use_dora": True},
        LORA_KEYS, embeddings=True,
    ),
    "qlora": Method(
        "low-rank updates over base weights in 4-bit nf4", "LoraConfig", keys=LORA_KEYS, four_bit=True,
        shardable=False, embeddings=True,
    ),
    "adalora": Method(
        "low-rank updates whose ranks move to the layers that use them", "AdaLoraConfig",
        keys=LORA_KEYS | {"lora_r": "target_r"}, derived=_adalora_schedule, shardable=False,
        final="the ranks of an adalora adapter are fixed when its training ends",
    ),
    "ia3": Method(
        "one factor for each output of a linear layer, or input of a feed-forward one", "IA3Config",
        keys={"lora_target_modules": "target_modules"}, derived=_ia3_feedforward,
    ),
    "prefix": Method(
        "virtual keys and values before each layer's own", "PrefixTuningConfig",
        {"num_virtual_tokens": 20, "init_weights": "zero"},
        derived=_encoder_width, unmergeable=ADDED_TOKENS, padding_free=False, checkpointing=False,
        shardable=False,
    ),
    "p_tuning": Method(
        "virtual tokens before the input, made by a small network", "PromptEncoderConfig",
        {"num_virtual_tokens": 20}, derived=_encoder_width, unmergeable=ADDED_TOKENS, padding_free=False,
        shardable=False, final=NOT_SAVED,
    ),
    "prompt": Method(
        "virtual tokens before the input", "PromptTuningConfig",
        {"num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"},
        unmergeable=ADDED_TOKENS, padding_free=False, shardable=False,
    ),
    "full": Method("every weight"),
}  # fmt: skip


def problems(values: Mapping[str, Any]) -> list[str]:
    """The contradictions between composed training settings and their method, one message each."""
    name = values.get("method", "lora")
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        return []  # the schema reports it
    found = []
    if values.get("lora_target_modules") and "lora_target_modules" not in method.keys:
        found.append(
            f"lora_target_modules is not supported with method={name}, which adapts no single layers; "
            "set lora_target_modules=null"
        )
    if values.get("gradient_checkpointing") is True and not method.checkpointing:
        found.append(f"gradient_checkpointing=true is not supported with method={name}; set it to false")
    if values.get("packing") is True and not method.padding_free:
        found.append(f"packing=true is not supported: {why_padded(name)}; set packing=false")
    sharding = values.get("distributed")
    if sharding in {"fsdp2", "zero3"} and not method.shardable:
        others = ", ".join(other for other, entry in METHODS.items() if entry.shardable)
        found.append(f"method={name} is not supported with distributed={sharding}; choose one of {others}")
    found += _token_problems(values, name, method)
    given = values.get("peft")
    if not isinstance(given, Mapping) or not given:
        return found
    if method.config is None:
        return [*found, f"peft: {{...}} is not supported with method={name}, which has no adapter; remove it"]
    owned = PEFT_OWNED_BY_SETTING | {argument: key for key, argument in method.keys.items()}
    known = peft_arguments(method.config)
    found += check_arguments("peft", given, method.config, known, owned)
    others = {name: value for name, value in given.items() if name in known and name not in owned}
    return found + check_supported(others, method.config)


def _token_problems(values: Mapping[str, Any], name: str, method: Method) -> Iterator[str]:
    """Why rows cannot be added to the embedding with these settings."""
    tokens = [str(token) for token in values.get("new_tokens") or []]
    yield from (f"new_tokens: {token!r} is only white space" for token in tokens if token and not token.strip())
    yield from (f"new_tokens: {token} is listed twice" for token in {t: 0 for t in tokens if tokens.count(t) > 1})
    for key in ("new_tokens", "resize_embeddings"):
        if not values.get(key):
            continue
        if method.config and "trainable_token_indices" not in ACCEPTED[method.config]:
            able = [
                n for n, m in METHODS.items() if not m.config or "trainable_token_indices" in ACCEPTED[m.config]
            ]
            yield (
                f"{key} is not supported with method={name}, whose adapter holds no rows of the embedding; "
                f"choose one of {', '.join(able)}"
            )
        if (sharding := values.get("distributed")) in {"fsdp2", "zero3"}:
            yield f"{key} is not supported with distributed={sharding}; set distributed=ddp"
        given = values.get("peft")
        if isinstance(given, Mapping) and given.get("trainable_token_indices"):
            yield f"peft.trainable_token_indices is not supported with {key}, which sets it"


def why_padded(name: str) -> str | None:
    """Why the batches of a method are padded; None if examples may be packed."""
    return None if METHODS[name].padding_free else f"method={name} adds virtual tokens before each row of a batch"


def check_base(source: Source, name: str) -> None:
    """Raises: ModelError if the method trains the weights of a quantised model folder, which have no gradient."""
    refuse_quantised(source.name, name, bool(is_quantised(source)))


def refuse_quantised(model_name: str, name: str, quantised: bool) -> None:
    """Raises: ModelError if the method `name` trains all weights and the model is quantised."""
    if METHODS[name].config is not None or not quantised:
        return
    raise ModelError(
        f"method={name} cannot train {model_name}, whose weights are quantised",
        hint="choose a method with an adapter, such as lora, or the unquantised model",
    )


# peft_type in an adapter_config.json -> the peft class
PEFT_CLASSES = {
    "LORA": "LoraConfig",
    "ADALORA": "AdaLoraConfig",
    "IA3": "IA3Config",
    "PREFIX_TUNING": "PrefixTuningConfig",
    "P_TUNING": "PromptEncoderConfig",
    "PROMPT_TUNING": "PromptTuningConfig",
}


def adapter_of(name: str) -> tuple[str | None, Mapping[str, Any]]:
    """What makes the adapters of two methods of one kind: the peft class and its switches."""
    method = METHODS[name]
    return method.config, {key: value for key, value in method.fixed.items() if isinstance(value, bool)}


def method_of(config: Mapping[str, Any]) -> str | None:
    """The first method that trains an adapter with this adapter_config.json; None if there is none."""
    switches = {key for name in METHODS for key in adapter_of(name)[1]}
    on = {key: True for key in sorted(switches) if config.get(key)}
    kind = PEFT_CLASSES.get(str(config.get("peft_type")))
    return next((name for name in METHODS if kind and adapter_of(name) == (kind, on)), None)


def why_final(name: str, peft: Mapping[str, Any]) -> str:
    """Why a trained adapter of the method cannot be trained further; empty if it can."""
    return METHODS[name].final or (NOT_SAVED if peft.get("prefix_projection") else "")


def mergeability(name: str) -> str:
    """A sentence for users: whether the method's adapter can be merged into the base model."""
    method = METHODS[name]
    if method.unmergeable:
        return f"A {name} adapter cannot be merged into its base model: {method.unmergeable}."
    if method.config is None:
        return "These are full weights: there is nothing to merge."
    return f"The {name} adapter can be merged into its base model."


def merge(model: Any) -> Any:
    """Merge the adapter of a model from `load.load_tuned` into its base, in place; full weights stay as they are.

    Raises: ModelError if the method cannot be merged, or the base weights are quantised or tied.
    """
    adapter = getattr(model, "peft_config", {}).get("default")
    if adapter is None:
        return model
    for method in METHODS.values():
        if method.config == type(adapter).__name__ and method.unmergeable:
            raise ModelError(
                f"this adapter cannot be merged into its base model: {method.unmergeable}",
                hint="use it as an adapter",
            )
    if getattr(model.get_base_model(), "is_quantized", False):
        raise ModelError(
            "an adapter cannot be merged into quantised weights: rounding them again would lose a part of it",
            hint="load the adapter over the base model's own weights",
        )
    if tied := _adapted_tied_weights(model.get_base_model()):
        raise ModelError(
            f"this adapter cannot be merged into its base model: {tied} is adapted, and shares its weights with a "
            "layer that is not adapted",
            hint="use it as an adapter",
        )
    return model.merge_and_unload()


def _adapted_tied_weights(base: Any) -> str:
    """The adapted layer with tied weights, the output head or the input embedding; empty if there is none."""
    if not base.config.get_text_config().tie_word_embeddings:
        return ""
    ends = {"output head": base.get_output_embeddings(), "input embedding": base.get_input_embeddings()}
    return next((f"the {name}" for name, layer in ends.items() if hasattr(layer, "base_layer")), "")


def has_virtual_tokens(model: Any) -> bool:
    """Whether the model has an adapter that adds virtual tokens before each row of a batch."""
    adapter = getattr(model, "peft_config", {}).get("default")
    return bool(adapter is not None and adapter.is_prompt_learning)


def extra_loss(model: Any) -> Any | None:
    """The method's regularisation term for the loss of an optimizer step, a scalar; None if it has none.

    AdaLoRA's regulariser keeps the update P diag(E) Q close to a singular value decomposition:
    orth_reg_weight x mean over layers of |P'P - I| and |QQ' - I| in Frobenius norms (Zhang et al. 2023, eq. 4,
    where they are squared; peft, which adds the same term to the model's own loss, does not square them).
    With N accumulated batches, the caller adds 1/N of it for each.
    """
    adapter = getattr(model, "peft_config", {}).get("default")
    weight = getattr(adapter, "orth_reg_weight", 0)
    if not weight:
        return None
    norms = []
    for name, p in model.named_parameters():
        if ("lora_A" in name or "lora_B" in name) and "default" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            norms.append((gram - gram.new_ones(len(gram)).diag()).norm())
    return weight * sum(norms) / len(norms)
