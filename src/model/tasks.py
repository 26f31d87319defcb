"""Tasks: what a model is for, the class that loads it, and which base models can be made to do it.

To add a task, enter it in TASKS, name it in Task of src/schema.py, and say in TASKS of src/data/task_encoding.py
how its rows become tokens.
Nothing heavy is imported: a base model that cannot do its task is refused by its config.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from src.errors import ModelError
from src.model.methods import METHODS
from src.model.source import Source, Tuned
from src.schema import Task as Name
from src.utils.files import read_json

TEXT_METRICS = (
    "exact_match",
    "avg_jaccard_overlap",
    "rouge1",
    "rouge2",
    "rougeL",
    "bleu",
    "chrf",
    "token_f1",
    "perplexity",
    "token_accuracy",
    "length_ratio",
)


class Task(NamedTuple):
    """auto: the class of transformers that loads its models.
    peft: its name in peft, as an adapter's settings keep it.
    kinds: base models that can do it, see `kind_of`.
    metrics: what is measured where nothing else is asked for.
    decides: the one of them by which the gate decides where nothing else is asked for.
    hub: its name on the Hub.
    templated: whether its texts are conversations, written by a chat template.
    """

    auto: str
    peft: str
    kinds: frozenset[str]
    metrics: tuple[str, ...]
    decides: str
    hub: str
    templated: bool = False


TASKS: dict[Name, Task] = {
    "causal_lm": Task(
        auto="AutoModelForCausalLM",
        peft="CAUSAL_LM",
        kinds=frozenset({"decoder"}),
        metrics=TEXT_METRICS,
        decides="rougeL",
        hub="text-generation",
        templated=True,
    ),
    "seq2seq": Task(
        auto="AutoModelForSeq2SeqLM",
        peft="SEQ_2_SEQ_LM",
        kinds=frozenset({"encoder-decoder"}),
        metrics=TEXT_METRICS,
        decides="rougeL",
        hub="text2text-generation",
    ),
    "classification": Task(
        auto="AutoModelForSequenceClassification",
        peft="SEQ_CLS",
        kinds=frozenset({"encoder", "decoder", "encoder-decoder"}),
        metrics=("accuracy", "f1_macro"),
        decides="accuracy",
        hub="text-classification",
    ),
}

ENCODER_HEADS = ("ForMaskedLM", "ForPreTraining", "ForTokenClassification", "ForQuestionAnswering")
DECODER_HEADS = ("ForCausalLM", "LMHeadModel")
CLASSIFIER = "ForSequenceClassification"
HEADS_KEPT = {"classifier", "score"}  # layers that peft saves with every adapter of a classifier
# models whose positions begin behind that of the padding token
OFFSET_POSITIONS = {
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "mpnet",
    "longformer",
    "data2vec-text",
}


def kind_of(config: Mapping[str, Any]) -> str | None:
    """encoder-decoder, encoder or decoder, by what a config.json says; None where it does not say."""
    heads = config.get("architectures") or []
    if config.get("is_encoder_decoder"):
        return "encoder-decoder"
    if any(str(head).endswith(ENCODER_HEADS) for head in heads):
        return "encoder"
    return "decoder" if any(str(head).endswith(DECODER_HEADS) for head in heads) else None


def check(config: Mapping[str, Any], name: str, task: Name, max_length: int | None = None) -> None:
    """Refuse a base model that cannot do the task, or cannot read `max_length` tokens, by its config.json.

    Raises: ModelError.
    """
    kind = kind_of(config)
    if kind and kind not in TASKS[task].kinds:
        fit = " or ".join(f"task={name}" for name, t in TASKS.items() if kind in t.kinds)
        heads = ", ".join(config.get("architectures") or [])
        raise ModelError(
            f"{name} has the architecture {heads} ({kind}), which cannot do task={task}",
            hint=f"set {fit}, or choose another model",
        )
    most = positions(config)
    if task != "causal_lm" and max_length and most and max_length > most:
        raise ModelError(
            f"max_length={max_length} is more than the {most} positions of {name}", hint=f"set max_length={most}"
        )


def check_source(source: Source, task: Name, max_length: int | None = None, method: str = "") -> None:
    """`check` and `check_method`, where the model is in a local folder. Raises: ModelError."""
    if source.folder:
        config = read_json(source.folder / "config.json")
        check(config, source.name, task, max_length)
        check_method(config, task, method)


def check_method(config: Mapping[str, Any], task: Name, method: str, untrained: Sequence[str] = ()) -> None:
    """Refuse a method that cannot make a classifier of a base model which lacks the layers `untrained`.

    Raises: ModelError.
    """
    if task != "classification" or not method or METHODS[method].padding_free:
        return
    lost = [layer for layer in untrained if layer not in HEADS_KEPT]
    if kind_of(config) == "encoder-decoder":
        told = f"method={method} adds virtual tokens, which a classifier with an encoder and a decoder cannot take"
    elif lost:
        told = f"method={method} keeps no layer but the head, and the base model lacks {', '.join(lost)} too"
    else:
        return
    raise ModelError(told, hint="choose a method that trains layers, such as lora")


def positions(config: Mapping[str, Any]) -> int | None:
    """The most tokens that an encoder has places for; None where it counts them from one another."""
    most = config.get("max_position_embeddings")
    if kind_of(config) == "decoder" or not isinstance(most, int) or most <= 0:
        return None
    offset = (config.get("pad_token_id") or 0) + 1 if config.get("model_type") in OFFSET_POSITIONS else 0
    return most - offset


def labels_of(config: Mapping[str, Any]) -> list[str]:
    """The labels of a classifier's config.json, by their ids; none where they were never named."""
    named = {int(number): str(label) for number, label in (config.get("id2label") or {}).items()}
    found = [named[number] for number in sorted(named)]
    return [] if all(label == f"LABEL_{number}" for number, label in enumerate(found)) else found


def tuned_for(tuned: Tuned, asked: Name | None) -> tuple[Name, list[str]]:
    """What a tuned model does, and its labels, by the files of its folder.

    Raises: ModelError if it is not the task `asked` for, or cannot be told.
    """
    path = tuned.folder / "config.json"
    config = read_json(path) if path.exists() else {}
    if tuned.is_adapter:
        kept = read_json(tuned.folder / "adapter_config.json").get("task_type")
        found: Name = next((name for name, task in TASKS.items() if task.peft == kept), "causal_lm")
    elif _is_classifier(config):
        found = "classification"
    else:
        found = "seq2seq" if kind_of(config) == "encoder-decoder" else "causal_lm"
    if asked not in (None, found):
        raise ModelError(f"{tuned.folder} was tuned for task={found}, not {asked}", hint="leave task out")
    labels = labels_of(config) if found == "classification" else []
    if found == "classification" and not labels:
        raise ModelError(f"{tuned.folder} does not name its labels", hint="its config.json needs id2label")
    if not tuned.is_adapter:
        check(config, str(tuned.folder), found)
    return found, labels


def labels_for(wanted: Sequence[str], config: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels `wanted`; a base model that is a classifier of all of them keeps its own, in its order."""
    own = labels_of(config) if _is_classifier(config) else []
    return tuple(own) if set(wanted) <= set(own) else tuple(wanted)


def _is_classifier(config: Mapping[str, Any]) -> bool:
    return any(str(head).endswith(CLASSIFIER) for head in config.get("architectures") or [])
