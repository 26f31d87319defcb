"""Tuning methods: what each trains, what it takes and what it can do. No torch here: all of it is asked before.

To add a method, enter it in METHODS, name it in MethodArgs.method of src/schema.py and give it a preset in
configs/method/; its arguments are checked against peft's own signature, and the tests run over the table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from src.errors import ModelError
from src.model.source import Source, is_quantised
from src.schema import MethodArgs
from src.utils.signatures import check_arguments, peft_arguments

ADDED_TOKENS = "its virtual tokens are added to the input, and no weight of the base model can hold them"

LORA_KEYS = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
             "lora_target_modules": "target_modules"}  # fmt: skip

# Arguments of peft that are said by other settings than those of Method.keys.
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
    """One way to tune a model.

    trains: what is trained, in words.
    config: name of the peft class that configures the adapter; None: every weight is trained.
    fixed: arguments of that class; those that a setting or `peft: {...}` names come over them.
    keys: our setting -> its argument.
    derived: further arguments, from (model, settings, planned optimizer steps), `peft: {...}` heeded.
    four_bit: the base weights are held in 4-bit nf4.
    unmergeable: why it cannot be merged into the base model; empty where it can.
    padding_free: rows may be laid end to end. Virtual tokens stand before each row of a batch, so there
        each row is a row of the batch.
    checkpointing: it trains under gradient_checkpointing.
    shardable: its weights may be divided among processes (distributed=fsdp2 or zero3).
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


def _adalora_schedule(model: Any, args: MethodArgs, steps: int) -> dict[str, Any]:
    """AdaLoRA's ranks and its three phases, in optimizer steps (Zhang et al. 2023, arXiv:2303.10512).

    Every layer starts at 1.5 x lora_r. The ranks stay for the first tenth of the steps, shrink to lora_r on
    the average until half of them, and stay again for the rest. Whatever `peft: {...}` says comes first.
    Raises: ModelError where no step is left to shrink in, or the first rank is not above the last.
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
            f"method=adalora has no step in which ranks shrink: of {total} steps, the first {found['tinit']} and "
            f"the last {final} leave them as they are",
            hint="train for more steps, or lower peft.tinit and peft.tfinal",
        )
    if found["init_r"] <= args.lora_r:
        raise ModelError(
            f"peft.init_r={found['init_r']} is not above lora_r={args.lora_r}, to which method=adalora shrinks it"
        )
    return found


def _ia3_feedforward(model: Any, args: MethodArgs, steps: int) -> dict[str, Any]:
    """Of IA3's layers, those whose input is scaled instead of their output (Liu et al. 2022, arXiv:2205.05638).

    These lead from a feed-forward block back to the hidden size. `peft.feedforward_modules` names others.
    A pattern, not a list: peft shortens the list of targets when it saves, and refuses a list that no longer
    is a part of it when it loads.
    """
    named = args.peft.get("feedforward_modules")
    if named is None:
        paths = {re.sub(r"(?<=\.)\d+(?=\.)", "@", name) for name in feed_forward_outputs(model)}
        pattern = "|".join(re.escape(path).replace("@", r"\d+") for path in sorted(paths))
    else:
        pattern = named if isinstance(named, str) else "|".join(rf"(.*\.)?{re.escape(n)}" for n in named)
    return {"feedforward_modules": pattern}


def feed_forward_outputs(model: Any) -> list[str]:
    """Names of the linear layers that end at the hidden size and are a part neither of attention nor the head.

    Of Llama's down_proj, GPT-2's mlp.c_proj, OPT's fc2 this is true, and of no other layer of theirs.
    """
    hidden = model.config.get_text_config().hidden_size
    modules = dict(model.named_modules())
    return [
        name
        for name, module in modules.items()
        if (getattr(module, "out_features", None) or getattr(module, "nf", None)) == hidden
        and module is not model.get_output_embeddings()
        and not any("attention" in type(modules[above]).__name__.lower() for above in _parents(name))
    ]


def _parents(name: str) -> list[str]:
    """`a.b.c` to `a.b`, `a`."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


def _encoder_width(model: Any, args: MethodArgs, steps: int) -> dict[str, Any]:
    """The network that makes the virtual tokens is as wide as the model."""
    width = model.config.get_text_config().hidden_size
    return {"encoder_hidden_size": args.peft.get("encoder_hidden_size", width)}


METHODS: dict[str, Method] = {
    "lora": Method("low-rank updates of linear layers", "LoraConfig", keys=LORA_KEYS),
    "rslora": Method(
        "low-rank updates, scaled by alpha / sqrt(r)", "LoraConfig", {"use_rslora": True}, LORA_KEYS
    ),
    "dora": Method(
        "low-rank updates of the direction of each weight, and its magnitude", "LoraConfig", {"use_dora": True},
        LORA_KEYS,
    ),
    "qlora": Method(
        "low-rank updates over base weights in 4-bit nf4", "LoraConfig", keys=LORA_KEYS, four_bit=True,
        shardable=False,
    ),
    "adalora": Method(
        "low-rank updates whose ranks move to the layers that use them", "AdaLoraConfig",
        keys=LORA_KEYS | {"lora_r": "target_r"}, derived=_adalora_schedule, shardable=False,
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
        shardable=False,
    ),
    "prompt": Method(
        "virtual tokens before the input", "PromptTuningConfig",
        {"num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"},
        unmergeable=ADDED_TOKENS, padding_free=False, shardable=False,
    ),
    "full": Method("every weight"),
}  # fmt: skip


def problems(values: Mapping[str, Any]) -> list[str]:
    """What of a training's settings (`values` as composed) contradicts its method, one sentence each."""
    name = values.get("method", "lora")
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        return []  # the schema says so
    found = []
    if values.get("lora_target_modules") and "lora_target_modules" not in method.keys:
        found.append(
            f"lora_target_modules has no meaning with method={name}, which adds nothing to single layers; "
            "set lora_target_modules=null"
        )
    if values.get("gradient_checkpointing") is True and not method.checkpointing:
        found.append(f"method={name} does not train with gradient_checkpointing=true; set it to false")
    if values.get("packing") is True and not method.padding_free:
        found.append(f"packing=true needs rows laid end to end: {why_padded(name)}; set packing=false")
    sharding = values.get("distributed")
    if sharding in {"fsdp2", "zero3"} and not method.shardable:
        others = ", ".join(other for other, entry in METHODS.items() if entry.shardable)
        found.append(f"method={name} is not supported with distributed={sharding}; choose one of {others}")
    given = values.get("peft")
    if not isinstance(given, Mapping) or not given:
        return found
    if method.config is None:
        return [*found, f"peft: {{...}} has no meaning with method={name}, which makes no adapter"]
    owned = PEFT_OWNED_BY_SETTING | {argument: key for key, argument in method.keys.items()}
    return found + check_arguments("peft", given, method.config, peft_arguments(method.config), owned)


def why_padded(name: str) -> str | None:
    """Why the batches of a method are padded; None where rows may be laid end to end."""
    return None if METHODS[name].padding_free else f"method={name} puts virtual tokens before each row of a batch"


def check_base(source: Source, name: str) -> None:
    """Raises: ModelError if all weights of a quantised model folder are to be trained: they have no gradient."""
    refuse_quantised(source.name, name, bool(is_quantised(source)))


def refuse_quantised(model_name: str, name: str, quantised: bool) -> None:
    """Raises: ModelError if the method `name` trains every weight of a model that is quantised."""
    if METHODS[name].config is not None or not quantised:
        return
    raise ModelError(
        f"method={name} cannot train {model_name}, whose weights are quantised",
        hint="choose a method that makes an adapter, such as lora, or the model that it was quantised from",
    )


def mergeability(name: str) -> str:
    """Whether an adapter of this method can become a part of the base weights, in one sentence."""
    method = METHODS[name]
    if method.unmergeable:
        return f"A {name} adapter cannot be merged into its base model: {method.unmergeable}."
    if method.config is None:
        return "These are full weights: there is nothing to merge."
    return f"The {name} adapter can be merged into its base model."


def merge(model: Any) -> Any:
    """A tuned model as load.load_tuned gives it, its adapter made a part of the weights; full weights as they are.

    Merging changes the base model in place.
    Raises: ModelError if the method cannot be merged, or the weights to merge into are rounded or tied.
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
            "an adapter is not merged into quantised weights: rounding them again would lose a part of it",
            hint="load the adapter over the base model's own weights",
        )
    if tied := _adapted_tied_weights(model.get_base_model()):
        raise ModelError(
            f"this adapter cannot be merged into its base model: {tied} is adapted, and shares its weights with a "
            "layer that is not",
            hint="use it as an adapter",
        )
    return model.merge_and_unload()


def _adapted_tied_weights(base: Any) -> str:
    """The name of an adapted layer whose weights another layer has too: the output head or the embedding."""
    if not base.config.get_text_config().tie_word_embeddings:
        return ""
    ends = {"output head": base.get_output_embeddings(), "input embedding": base.get_input_embeddings()}
    return next((f"the {name}" for name, layer in ends.items() if hasattr(layer, "base_layer")), "")


def has_virtual_tokens(model: Any) -> bool:
    """Whether an adapter puts virtual tokens before each row of a batch."""
    adapter = getattr(model, "peft_config", {}).get("default")
    return bool(adapter is not None and adapter.is_prompt_learning)


def extra_loss(model: Any) -> Any | None:
    """What a method adds to the loss of each optimizer step, a scalar; None where it adds nothing.

    AdaLoRA's regulariser keeps the update P diag(E) Q near a singular value decomposition:
    orth_reg_weight x mean over layers of |P'P - I| and |QQ' - I|, Frobenius norms (Zhang et al. 2023, eq. 4;
    squares there, plain norms in peft, whose forward adds the same to the model's own loss).
    A step of N accumulated batches adds an N-th of it with each.
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
