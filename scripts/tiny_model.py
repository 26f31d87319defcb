"""Tiny random models with tokenizers of their own, made in a second: for `experiment=smoke` and the tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from src.utils.files import atomic_dir

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


class Plan(NamedTuple):
    """How a tiny model is made.

    config, model: names of its classes in transformers.
    sizes: arguments of `config`.
    specials: the tokenizer's special tokens, by their names there, in the order of their ids.
    around: a text with its marks, `$A` being the text; empty where a chat template writes them.
    """

    config: str
    model: str
    sizes: Mapping[str, Any]
    specials: Mapping[str, str]
    around: str = ""


ENCODER_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
    "initializer_range": 0.1,  # random weights as small as 0.02 hardly tell one text from another
}
MARKED = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "mask_token": "<mask>"}

PLANS: dict[str, Plan] = {
    "llama": Plan(
        "LlamaConfig",
        "LlamaForCausalLM",
        {**ENCODER_SIZES, "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.02},
        {"pad_token": "<|pad|>", "additional": "<|start|>", "eos_token": "<|end|>"},
    ),
    "t5": Plan(
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        {"pad_token": "<pad>", "eos_token": "</s>"},
        "$A </s>",
    ),
    "bart": Plan(
        "BartConfig",
        "BartForConditionalGeneration",
        {
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "max_position_embeddings": 128,
            "init_std": 0.1,
        },
        MARKED,
        "<s> $A </s>",
    ),
    "bert": Plan(
        "BertConfig",
        "BertForMaskedLM",
        {**ENCODER_SIZES, "max_position_embeddings": 128},
        {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"},
        "[CLS] $A [SEP]",
    ),
    "roberta": Plan("RobertaConfig", "RobertaForMaskedLM", ENCODER_SIZES, MARKED, "<s> $A </s>"),
}


def build(
    folder: Path,
    texts: Iterable[str],
    seed: int = 0,
    chat_template: str | None = CHAT_TEMPLATE,
    architecture: str = "llama",
) -> Path:
    """Write a model of 2 layers and 64 dimensions, and a byte-level BPE of at most 512 tokens from `texts`."""
    torch.manual_seed(seed)
    plan = PLANS[architecture]
    tokenizer = _tokenizer(texts, plan)
    tokenizer.chat_template = None if plan.around else chat_template
    ids = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in ("pad_token", "bos_token", "eos_token")}
    config = getattr(transformers, plan.config)(vocab_size=len(tokenizer), **ids, **plan.sizes)
    model = getattr(transformers, plan.model)(config)
    with atomic_dir(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def _tokenizer(texts: Iterable[str], plan: Plan) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(plan.specials.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if plan.around:
        marks = [(token, bpe.token_to_id(token)) for token in plan.around.split() if token != "$A"]
        bpe.post_processor = processors.TemplateProcessing(single=plan.around, special_tokens=marks)
    named = {name: token for name, token in plan.specials.items() if name != "additional"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **named)
