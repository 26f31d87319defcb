"""Estimates the memory of a run from sizes alone, for a model whose code cannot be simulated.

Parameters are counted on the meta device or, if the model cannot be built there, from the headers of its files.
The activations are those of Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1), term by term: the inputs of
the matrix products, of the non-linearity and of the norms. Their sum is that of GPT. Here a gated block has its
additional terms, and a norm its fp32 copy. The attention matrix counts only with a dropout of its own: other
kernels do not store it (arXiv:2307.08691, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from ...data.store import Example
from ...model import load, methods
from ...model.folder_check import weight_shapes
from ...model.tokenizer import load_config
from ...schema import TrainConfig
from ..losses import chunk_tokens
from .estimate import MemoryEstimator, PlanUnavailable, SimulatedMemory, plan_errors
from .memory import NF4_BYTES, ParameterBytes, PassMemory, factored_bytes

ROUGHNESS = "between 25 % below and 50 % above a simulation without the fixed part, where that is possible"
EMBEDDINGS = ("embed", "wte", "wpe", "shared", "lm_head", "output_layer")
GATES = ("gate", "wi_1", ".w3")
ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "dropout_rate")
DROPOUT = ("resid_pdrop", "hidden_dropout_prob", "dropout_rate")
UNFUSED = ("gelu_new", "gelu_fast", "quick_gelu")  # computed by several operations, which save their inputs


class ArithmeticEstimator(MemoryEstimator):
    """Plans as MemoryEstimator does, with formulas in place of its simulation."""

    estimate, roughness = "arithmetic", ROUGHNESS
    unavailable = "the memory of this run is not checked, because the sizes of its model are unknown: %s"

    def run_simulation(self, cfg: TrainConfig, checkpointing: bool) -> SimulatedMemory:
        """Raises: PlanUnavailable if the sizes of the model are unknown."""
        with plan_errors():
            shapes, config = self._sizes(cfg)
            weights = self._parameters(cfg, shapes, config)
            layers = Layers(config, shapes, cfg, self.dtype, self.device)
            batch = [self.examples[row] for row in self.longest_batch(cfg)]
            backward = layers.backward(batch, cfg, checkpointing, weights)
            held_out = self.longest_held_out(cfg)
            return SimulatedMemory(weights, backward, layers.forward(held_out, cfg) if held_out else None)

    def _sizes(self, cfg: TrainConfig) -> tuple[dict[str, tuple[int, ...]], Any]:
        """The shape of each parameter of the base model by name, and its config."""
        try:
            model = load.build_meta_model(
                self.base, self.dtype, trust_remote_code=cfg.trust_remote_code, task=cfg.task, labels=self.labels
            )
            return {name: tuple(p.shape) for name, p in model.named_parameters()}, model.config
        except Exception:  # remote code may raise anything
            shapes = weight_shapes(self.base.folder) if self.base.folder else {}
            if not shapes:
                raise
            return shapes, load_config(self.base.location, self.base.revision, cfg.trust_remote_code)

    def _parameters(self, cfg: TrainConfig, shapes: Mapping[str, tuple[int, ...]], config: Any) -> ParameterBytes:
        with suppress(PlanUnavailable), plan_errors():
            return self.weights(cfg)[1]
        total, wide = sum(map(math.prod, shapes.values())), _width(self.dtype)
        if cfg.method == "full":
            state = sum(map(factored_bytes, shapes.values()))
            return ParameterBytes(total, total, 4 * total, 0, 4 * total, state)
        trained = sum(_adapter_sizes(cfg, _linear(shapes), config.get_text_config()))
        four_bit = sum(map(math.prod, _linear(shapes).values())) if methods.METHODS[cfg.method].four_bit else 0
        base = round(wide * (total - four_bit) + NF4_BYTES * four_bit)
        return ParameterBytes(total + trained, trained, base, 4 * trained, 4 * trained, 4 * trained)


class Layers:
    """The activations of a model's layers, in bytes."""

    def __init__(
        self, config: Any, shapes: Mapping[str, tuple[int, ...]], cfg: TrainConfig, dtype: str, device: str
    ) -> None:
        text = config.get_text_config()
        self.hidden, self.layers = (
            _size(text, "hidden_size", "d_model"),
            _size(text, "num_hidden_layers", "num_layers"),
        )
        if not (self.hidden and self.layers):
            raise PlanUnavailable("config.json does not give hidden_size and num_hidden_layers")
        self.vocabulary = _size(text, "vocab_size") if cfg.task in ("causal_lm", "seq2seq") else 0
        self.heads = _size(text, "num_attention_heads", "num_heads") or 1
        self.queries, self.keys = self.heads * _head(text), _keys(text)
        experts = _size(text, "num_experts_per_tok")
        one = _size(text, "moe_intermediate_size") if experts else 0
        self.inner = one or _size(text, "intermediate_size", "d_ff", "ffn_dim", "n_inner") or 4 * self.hidden
        self.inner *= experts or 1
        self.gated = any(gate in name for name in shapes for gate in GATES)
        named = getattr(text, "hidden_act", None) or getattr(text, "activation_function", None)
        self.gelu = 3 if named in UNFUSED else 0
        self.dropout = any(getattr(text, name, 0) for name in DROPOUT)
        self.attention_dropout = any(getattr(text, name, 0) for name in ATTENTION_DROPOUT)
        self.width, self.device = _width(dtype), device
        self.residual = 4 if cfg.method == "full" else self.width  # autocast computes in 16 bits on fp32 weights
        self.casts = self.width * sum(map(math.prod, _linear(shapes).values())) * (self.residual > self.width)
        self.adapters = cfg.method != "full"
        self.packed = cfg.task == "causal_lm" and cfg.padding_free and methods.METHODS[cfg.method].padding_free

    def backward(
        self, batch: Sequence[Example], cfg: TrainConfig, checkpointing: bool, weights: ParameterBytes
    ) -> PassMemory:
        """Everything that the forward pass saved, and the gradients of earlier micro-batches."""
        one, tokens = self._of_layer(batch, cfg), self._tokens(batch)
        inputs, logits = self.residual * tokens * self.hidden, self._logits(batch, 3)
        saved = (self.layers + 1) * inputs if checkpointing else self.layers * one + inputs
        if checkpointing and one > logits:  # a layer is recomputed after the logits are freed
            saved, logits = saved + one, 0
        gradients = weights.gradient_bytes if cfg.gradient_accumulation_steps > 1 else 0
        return PassMemory(saved + self.casts, logits, gradients)

    def forward(self, batch: Sequence[Example], cfg: TrainConfig) -> PassMemory:
        """One layer at a time: nothing is saved."""
        return PassMemory(self._of_layer(batch, cfg) + self.casts, self._logits(batch, 2), 0)

    def _tokens(self, batch: Sequence[Example]) -> int:
        lengths = [len(example.ids) for example in batch]
        return sum(lengths) if self.packed else len(lengths) * max(lengths)

    def _of_layer(self, batch: Sequence[Example], cfg: TrainConfig) -> int:
        norms = 2 * self.hidden * (self.residual + 4)
        attention = self.hidden + 3 * self.queries + 2 * self.keys + self.queries
        block = self.hidden + ((4 if self.gated else 2) + self.gelu) * self.inner
        found = self._tokens(batch) * (norms + self.width * (attention + block))
        if self.adapters and cfg.lora_dropout:  # of the input of each adapted layer: a copy, and its mask
            read = 4 * self.hidden + self.queries + (1 + self.gated) * self.hidden + self.inner
            found += self._tokens(batch) * read * (self.width + 1)
        if self.dropout:  # of both blocks' outputs: a mask and a copy
            found += 2 * self._tokens(batch) * self.hidden * (1 + self.width)
        if self.attention_dropout and not (self.packed and self.device == "cuda"):  # else in one kernel
            longest = max(len(example.ids) for example in batch)
            found += len(batch) * self.heads * longest**2 * (2 * self.width + 1)
        return found

    def _logits(self, batch: Sequence[Example], copies: int) -> int:
        """Of one chunk in `copies` of fp32; where examples are padded, all of them once more."""
        labelled = sum(sum(example.loss_mask) for example in batch)
        chunk = min(labelled, chunk_tokens(self.vocabulary or 1, torch.device(self.device)))
        return self.vocabulary * (4 * copies * chunk + (0 if self.packed else self.width * self._tokens(batch)))


def _adapter_sizes(cfg: TrainConfig, linear: Mapping[str, tuple[int, ...]], config: Any) -> Iterator[int]:
    method = methods.METHODS[cfg.method]
    if "lora_target_modules" not in method.keys:
        layers = 2 * _size(config, "num_hidden_layers", "num_layers") if cfg.method == "prefix" else 1
        width = _keys(config) if cfg.method == "prefix" else _size(config, "hidden_size", "d_model")
        yield int(cfg.peft.get("num_virtual_tokens", 20)) * layers * width
        return
    rank = math.ceil(1.5 * cfg.lora_r) if cfg.method == "adalora" else cfg.lora_r
    for name, (outputs, inputs) in linear.items():
        layer = name.removesuffix(".weight")
        if cfg.lora_target_modules and not any(f".{layer}".endswith(f".{t}") for t in cfg.lora_target_modules):
            continue
        extra = outputs if cfg.method == "dora" else 0
        yield extra + rank * (inputs + outputs) if "lora_r" in method.keys else outputs


def _linear(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {n: s for n, s in shapes.items() if len(s) == 2 and not any(part in n for part in EMBEDDINGS)}


def _head(config: Any) -> int:
    """The size of one attention head."""
    heads = _size(config, "num_attention_heads", "num_heads") or 1
    return _size(config, "head_dim", "d_kv") or _size(config, "hidden_size", "d_model") // heads


def _keys(config: Any) -> int:
    """The size of the keys of a token, and of its values."""
    return _size(config, "num_key_value_heads", "num_attention_heads", "num_heads") * _head(config)


def _size(config: Any, *names: str) -> int:
    """The first of these numbers that the config has; 0 if it has none."""
    return next((value for name in names if isinstance(value := getattr(config, name, None), int) and value), 0)


def _width(dtype: str) -> int:
    return int(load.DTYPES[dtype].itemsize)
