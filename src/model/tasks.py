"""The table of tasks: the class that loads a model, suitable base models, default metrics. Imports no torch.

To add a task, enter it in TASKS, name it in Task of src/schema.py, and add its encoding to TASK_ENCODINGS in
src/data/task_encoding.py and its collator to COLLATORS in src/train/collators.py. A base model that does not
support its task is rejected by its config.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import ModelError
from ..schema import Task as Name
from ..utils.files import read_json
from .methods import METHODS
from .source import Source, TunedModel

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
    """What a model is trained for.

    auto_class: transformers class that loads its models.
    peft_type: its `task_type` in peft.
    architectures: suitable base models, see `architecture_kind`.
    metrics: default metrics of an evaluation.
    gate_metric: the one of them that the gate compares by default.
    pipeline_tag: its name on the Hub.
    chat_template: whether its prompts are conversations, rendered by a chat template.
    """

    auto_class: str
    peft_type: str
    architectures: frozenset[str]
    metrics: tuple[str, ...]
    gate_metric: str
    pipeline_tag: str
    chat_template: bool = False


TASKS: dict[Name, Task] = {
    "causal_lm": Task(
        auto_class="AutoModelForCausalLM",
        peft_type="CAUSAL_LM",
        architectures=frozenset({"decoder"}),
        metrics=TEXT_METRICS,
        gate_metric="rougeL",
        pipeline_tag="text-generation",
        chat_template=True,
    ),
    "seq2seq": Task(
        auto_class="AutoModelForSeq2SeqLM",
        peft_type="SEQ_2_SEQ_LM",
        architectures=frozenset({"encoder-decoder"}),
        metrics=TEXT_METRICS,
        gate_metric="rougeL",
        pipeline_tag="text2text-generation",
    ),
    "classification": Task(
        auto_class="AutoModelForSequenceClassification",
        peft_type="SEQ_CLS",
        architectures=frozenset({"encoder", "decoder", "encoder-decoder"}),
        metrics=("accuracy", "f1_macro"),
        gate_metric="accuracy",
        pipeline_tag="text-classification",
    ),
}

ENCODER_HEADS = ("ForMaskedLM", "ForPreTraining", "ForTokenClassification", "ForQuestionAnswering")
DECODER_HEADS = ("ForCausalLM", "LMHeadModel")
CLASSIFIER = "ForSequenceClassification"
DEFAULT_LABELS = {0: "LABEL_0", 1: "LABEL_1"}
HEADS_KEPT = {"classifier", "score"}  # layers that peft saves with every adapter of a classifier
# model types whose positions start after the id of the padding token
OFFSET_POSITIONS = {
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "mpnet",
    "longformer",
    "data2vec-text",
}


def architecture_kind(config: Mapping[str, Any]) -> str | None:
    """encoder-decoder, encoder or decoder according to a config.json; None if it does not say."""
    heads = config.get("architectures") or []
    if config.get("is_encoder_decoder"):
        return "encoder-decoder"
    if any(str(head).endswith(ENCODER_HEADS) for head in heads):
        return "encoder"
    return "decoder" if any(str(head).endswith(DECODER_HEADS) for head in heads) else None


def check_architecture(config: Mapping[str, Any], name: str, task: Name, max_length: int | None = None) -> None:
    """Check by its config.json that a base model supports the task and `max_length` tokens.

    Raises: ModelError.
    """
    kind = architecture_kind(config)
    if kind and kind not in TASKS[task].architectures:
        fit = " or ".join(f"task={name}" for name, t in TASKS.items() if kind in t.architectures)
        heads = ", ".join(config.get("architectures") or [])
        raise ModelError(
            f"{name} has the architecture {heads} ({kind}), which does not support task={task}",
            hint=f"set {fit}, or choose another model",
        )
    most = max_positions(config)
    if task != "causal_lm" and max_length and most and max_length > most:
        raise ModelError(
            f"max_length={max_length} is more than the {most} positions of {name}", hint=f"set max_length={most}"
        )


def check_source(source: Source, task: Name, max_length: int | None = None, method: str = "") -> None:
    """`check_architecture` and `check_method` for a model in a local folder. Raises: ModelError."""
    if source.folder:
        config = read_json(source.folder / "config.json")
        check_architecture(config, source.name, task, max_length)
        check_method(config, task, method)


def check_method(config: Mapping[str, Any], task: Name, method: str, untrained: Sequence[str] = ()) -> None:
    """Check that the method can train a classifier from a base model without weights for the layers `untrained`.

    Raises: ModelError.
    """
    if task != "classification" or not method or METHODS[method].padding_free:
        return
    lost = [layer for layer in untrained if layer not in HEADS_KEPT]
    if architecture_kind(config) == "encoder-decoder":
        problem = f"method={method} adds virtual tokens, which an encoder-decoder classifier does not support"
    elif lost:
        problem = f"method={method} saves no layer but the head, and the base model lacks {', '.join(lost)}, too"
    else:
        return
    raise ModelError(problem, hint="choose a method that trains layers, such as lora")


def max_positions(config: Mapping[str, Any]) -> int | None:
    """How many tokens an encoder has positions for; None if its positions are relative, and for decoders."""
    most = config.get("max_position_embeddings")
    if architecture_kind(config) == "decoder" or not isinstance(most, int) or most <= 0:
        return None
    offset = (config.get("pad_token_id") or 0) + 1 if config.get("model_type") in OFFSET_POSITIONS else 0
    return most - offset


def embedding_rows(config: Mapping[str, Any]) -> int | None:
    """The number of rows of the input embedding by a config.json; None if it does not say."""
    rows = (config.get("text_config") or config).get("vocab_size")
    return rows if isinstance(rows, int) else None


def missing_row(token: str, number: int, model: str, rows: int) -> str:
    """The fact that a token has no row in the embedding of a model, for a sentence that begins with its place."""
    return f"has the token {token} (id {number}), and the embedding of {model} has {rows:,} rows"


def labels_of(config: Mapping[str, Any]) -> list[str]:
    """The labels of a classifier in the order of their ids, from its config.json.

    transformers leaves two labels out that have its default names.
    """
    named = {int(number): str(label) for number, label in (config.get("id2label") or DEFAULT_LABELS).items()}
    return [named[number] for number in sorted(named)]


def detect_task(tuned: TunedModel, expected: Name | None) -> tuple[Name, list[str]]:
    """The task and the labels of a tuned model, from the files in its folder.

    Raises: ModelError if the task differs from `expected`, or a classifier has no named labels.
    """
    path = tuned.folder / "config.json"
    config = read_json(path) if path.exists() else {}
    if tuned.is_adapter:
        task_type = read_json(tuned.folder / "adapter_config.json").get("task_type")
        found: Name = next((name for name, task in TASKS.items() if task.peft_type == task_type), "causal_lm")
    elif _is_classifier(config):
        found = "classification"
    else:
        found = "seq2seq" if architecture_kind(config) == "encoder-decoder" else "causal_lm"
    if expected not in (None, found):
        raise ModelError(f"{tuned.folder} was tuned for task={found}, not {expected}", hint="remove task")
    labels = labels_of(config) if found == "classification" and config else []
    if found == "classification" and not labels:
        raise ModelError(f"{tuned.folder} does not name its labels", hint="its config.json needs id2label")
    if not tuned.is_adapter:
        check_architecture(config, str(tuned.folder), found)
    return found, labels


def resolve_labels(wanted: Sequence[str], config: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels `wanted`, or those of a base model that already classifies into all of them, in its order."""
    own = labels_of(config) if _is_classifier(config) else []
    return tuple(own) if set(wanted) <= set(own) else tuple(wanted)


def _is_classifier(config: Mapping[str, Any]) -> bool:
    return any(str(head).endswith(CLASSIFIER) for head in config.get("architectures") or [])
