"""Tiny random models, each with its tokenizer, built in a second for `experiment=smoke` and the tests."""

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


class TinyModelSpec(NamedTuple):
    """The architecture of a tiny model, and the special tokens of its tokenizer.

    config, model: names of the transformers classes.
    sizes: arguments of `config`.
    specials: the tokenizer's special tokens by name, in the order of their ids.
    template: adds special tokens to a text `$A`; empty where the chat template adds them.
    """

    config: str
    model: str
    sizes: Mapping[str, Any]
    specials: Mapping[str, str]
    template: str = ""


ENCODER_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
    "initializer_range": 0.1,  # with 0.02, outputs of different texts are nearly equal
}
SENTENCE_TOKENS = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "mask_token": "<mask>"}

SPECS: dict[str, TinyModelSpec] = {
    "llama": TinyModelSpec(
        "LlamaConfig",
        "LlamaForCausalLM",
        {**ENCODER_SIZES, "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.02},
        {"pad_token": "<|pad|>", "additional": "<|start|>", "eos_token": "<|end|>"},
    ),
    "t5": TinyModelSpec(
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        {"pad_token": "<pad>", "eos_token": "</s>"},
        "$A </s>",
    ),
    "bart": TinyModelSpec(
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
        SENTENCE_TOKENS,
        "<s> $A </s>",
    ),
    "bert": TinyModelSpec(
        "BertConfig",
        "BertForMaskedLM",
        {**ENCODER_SIZES, "max_position_embeddings": 128},
        {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"},
        "[CLS] $A [SEP]",
    ),
    "roberta": TinyModelSpec("RobertaConfig", "RobertaForMaskedLM", ENCODER_SIZES, SENTENCE_TOKENS, "<s> $A </s>"),
}


def build(
    folder: Path,
    texts: Iterable[str],
    seed: int = 0,
    chat_template: str | None = CHAT_TEMPLATE,
    architecture: str = "llama",
) -> Path:
    """Write a model of 2 layers and hidden size 64, and a byte-level BPE tokenizer of at most 512 tokens, trained
    on `texts`, to `folder`."""
    torch.manual_seed(seed)
    spec = SPECS[architecture]
    tokenizer = _tokenizer(texts, spec)
    tokenizer.chat_template = None if spec.template else chat_template
    ids = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in ("pad_token", "bos_token", "eos_token")}
    config = getattr(transformers, spec.config)(vocab_size=len(tokenizer), **ids, **spec.sizes)
    model = getattr(transformers, spec.model)(config)
    with atomic_dir(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def _tokenizer(texts: Iterable[str], spec: TinyModelSpec) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(spec.specials.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if spec.template:
        special_tokens = [(token, bpe.token_to_id(token)) for token in spec.template.split() if token != "$A"]
        bpe.post_processor = processors.TemplateProcessing(single=spec.template, special_tokens=special_tokens)
    named = {name: token for name, token in spec.specials.items() if name != "additional"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **named)
