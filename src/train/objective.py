"""The loss of a batch: a forward pass that computes logits only where there is a label."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from src.model import packed_attention
from src.train.losses import Criterion, capture_hidden_states, find_plain_head


class NeftuneNoise:
    """NEFTune: in training, uniform noise of alpha / sqrt(L d) on the d embeddings of each of a row's L tokens.

    Jain et al. 2023 (arXiv:2310.05914), algorithm 1. The Trainer's own takes the whole batch for one row.
    """

    def __init__(self, model: Any, alpha: float) -> None:
        self.alpha = alpha
        self.lengths: list[int] = []
        model.get_input_embeddings().register_forward_hook(self._add)

    def _add(self, module: torch.nn.Module, _: Any, embedded: torch.Tensor) -> torch.Tensor | None:
        if not module.training:
            return None
        lengths = torch.tensor(self.lengths, device=embedded.device)
        each = lengths.repeat_interleave(lengths)[None, :, None] if len(embedded) == 1 else lengths[:, None, None]
        size = self.alpha / (each * embedded.shape[-1]).sqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * size.to(embedded.dtype)


AUTOCAST_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
MODEL_INPUTS = ("input_ids", "attention_mask", "decoder_input_ids")  # of a padded batch, what the model is given


class Objective:
    """How a model's batches are computed: laid end to end where it can take that, and with a fused head."""

    def __init__(
        self, model: Any, criterion: Criterion, dtype: str, end_to_end: bool, fused: bool = True,
        noise: float | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            end_to_end: whether batches are rows laid end to end.
            fused: whether the output head may be computed together with the loss. It may not where its
                weights are spread over devices.
            noise: alpha of NEFTune.
        """
        self.noise = NeftuneNoise(model, noise) if noise else None
        self.criterion, self.end_to_end = criterion, end_to_end
        self.device_type, self.autocast_to = model.device.type, AUTOCAST_DTYPES.get(dtype)
        self.head = find_plain_head(model) if fused and end_to_end else None

    def autocast(self) -> AbstractContextManager[Any]:
        if self.autocast_to is None:
            return nullcontext()
        return torch.autocast(self.device_type, self.autocast_to)

    def attention(self, model: Any) -> AbstractContextManager[None]:
        """What `model` has to be in while it is given batches."""
        return packed_attention.laid_end_to_end(model) if self.end_to_end else nullcontext()

    def summed(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """The sum of the losses of all labels of a batch; a scalar."""
        if self.noise:
            self.noise.lengths = batch.get("lengths") or batch["attention_mask"].sum(1).tolist()
        with self.autocast():
            if not self.end_to_end:
                return self._padded(model, batch)
            packed_attention.lay_out(batch["lengths"])
            asked = {key: batch[key] for key in ("input_ids", "position_ids")}
            asked |= {"logits_to_keep": batch["kept"], "use_cache": False}
            if self.head is None:
                logits = model(**asked).logits
                return self.criterion.of_logits(logits.flatten(0, 1), batch["labels"])
            with capture_hidden_states(self.head) as caught:
                model(**asked)
            return self.criterion.of_hidden(caught[0].flatten(0, 1), self.head, batch["labels"])

    def _padded(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        labels = batch["labels"]
        logits = model(**{key: batch[key] for key in MODEL_INPUTS if key in batch}).logits
        if labels.dim() == 1:  # one label a row
            return self.criterion.of_logits(logits, labels)
        logits = logits[:, -labels.shape[1] :]  # virtual tokens stand before the row
        return self.criterion.of_logits(logits.flatten(0, 1), labels.flatten())
