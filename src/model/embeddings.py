"""Rows of the embedding and of the output head for tokens that the base model has no rows for.

A new row starts as the mean of the existing ones (Hewitt 2021, "Initializing New Word Embeddings for Pretrained
Language Models"). An adapter saves the rows of `trainable_token_indices` as they are after training.
"""

from __future__ import annotations

from typing import Any

import torch

from ..schema import TokenArgs


def add_rows(model: Any, tokenizer: Any, args: TokenArgs) -> None:
    """Give every token of `tokenizer` a row, and start those of `args.new_tokens` anew.

    Sets `model.new_token_ids`, the ids whose rows are to be trained, ascending.
    """
    if not (args.new_tokens or args.resize_embeddings):
        return
    rows = model.get_input_embeddings().weight.shape[0]
    ids = {i for i in tokenizer.get_vocab().values() if i >= rows}
    ids |= {int(tokenizer.convert_tokens_to_ids(token)) for token in args.new_tokens}
    model.new_token_ids = sorted(ids)
    if ids:
        grow(model, max(ids) + 1)
        _fill(model, model.new_token_ids)


def grow(model: Any, rows: int) -> None:
    """Give the embedding and the output head at least this number of rows; new ones are means."""
    before = model.get_input_embeddings().weight.shape[0]
    if rows > before:
        model.resize_token_embeddings(rows, mean_resizing=False)
        _fill(model, list(range(before, rows)))


def _fill(model: Any, ids: list[int]) -> None:
    """Set the rows `ids` to the mean of the rows before them."""
    for layer in tables(model).values():
        if layer.weight.device.type != "meta":
            with torch.no_grad():
                layer.weight[ids] = layer.weight[: min(ids)].float().mean(0).to(layer.weight.dtype)


def tables(model: Any) -> dict[str, Any]:
    """The input embedding and, if it has weights of its own for each token, the output head, by their names."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    found = {names[id(embedding)]: embedding}
    if head is not None and head.weight is not embedding.weight:
        found[names[id(head)]] = head
    return found


def token_indices(model: Any) -> dict[str, list[int]] | None:
    """The argument trainable_token_indices of peft for `model.new_token_ids`; None without new tokens."""
    ids = getattr(model, "new_token_ids", None)
    return dict.fromkeys(tables(model), ids) if ids else None
