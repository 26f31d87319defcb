"""Batches: sized by total memory, the same for base and tuned model, smaller where memory runs out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from src.errors import OutOfMemory
from src.eval.batching import (
    batch_indices,
    batch_size,
    parameter_count,
    reference_batch_size,
    run_batched,
    sequence_bytes,
)
from src.eval.partial_results import PartialResults
from src.utils.environment import Capacity
from tests.fixtures import World, evals, read_jsonl

pytest_plugins = ["tests.fixtures"]

LLAMA_3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip


def size(gib: float, setting: int | str = "auto", longest: int = 512, device: str = "cuda") -> int:
    memory = Capacity(int(gib * 2**30), "")
    return int(batch_size(setting, LLAMA_3_8B, longest, 64, "bfloat16", device, memory).value)


def test_parameters_and_cache_of_a_known_model() -> None:
    assert parameter_count(LLAMA_3_8B) == pytest.approx(8.03e9, rel=0.01)
    cache = sequence_bytes(LLAMA_3_8B, 0, 1000, 2) - sequence_bytes(LLAMA_3_8B, 0, 0, 2)
    assert cache == 1000 * 131_072  # 128 KiB a token, as of 8 of 32 heads in 16 bits


def test_auto_is_what_fits_into_memory() -> None:
    assert size(139) == 256
    found = [size(gib) for gib in (24, 36, 40, 48, 80)]
    assert found == sorted(found) and found[0] < found[-1]
    assert size(80, longest=8000) < size(80)
    assert size(1) == 1
    assert size(500, device="cpu") == 64
    assert size(1, setting=48) == 48


def test_logits_of_reference_answers_stay_within_their_limit() -> None:
    assert (
        reference_batch_size([3, 15], 128256) * 16 * 128256 * 12
        <= 1 << 29
        < 2 * reference_batch_size([3, 15], 128256) * 16 * 128256 * 12
    )
    assert reference_batch_size([10_000], 128256) == 1


def test_the_longest_come_first_and_unpadded_batches_hold_one_length() -> None:
    assert list(batch_indices([1, 3, 2, 3], 2, unpadded=False)) == [[1, 3], [2, 0]]
    assert list(batch_indices([1, 3, 2, 3, 3], 2, unpadded=True)) == [[1, 3], [4], [2], [0]]


# --- memory that runs out --------------------------------------------------------------------------------


class LimitedModel:
    """Runs out of memory with more than `most` rows at once."""

    def __init__(self, most: int, error: Exception) -> None:
        self.most, self.error, self.sizes = most, error, list[int]()

    def __call__(self, indices: list[int], number: int) -> Sequence[dict[str, Any]]:
        self.sizes.append(len(indices))
        if len(indices) > self.most:
            raise self.error
        return [{"prediction": str(index)} for index in indices]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 bytes")]
)
def test_a_batch_that_does_not_fit_is_halved_for_the_part(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    file = PartialResults(tmp_path / "x", {})
    model = LimitedModel(2, error)
    rows, size = run_batched(model, [1] * 5, 8, file.part("test"))
    assert ([row["prediction"] for row in rows], size) == (list("01234"), 2)
    assert model.sizes == [5, 4, 2, 2, 1]
    file.close()
    again = PartialResults(tmp_path / "x", {})
    assert run_batched(LimitedModel(0, ValueError()), [1] * 5, 8, again.part("test")) == (rows, 2)
    again.close()


def test_one_prompt_that_does_not_fit_is_reported_in_one_sentence(tmp_path: Path) -> None:
    file = PartialResults(tmp_path / "x", {})
    with pytest.raises(OutOfMemory, match="out of memory with one prompt at a time, in dev"):
        run_batched(LimitedModel(0, torch.OutOfMemoryError("CUDA")), [1] * 5, 8, file.part("dev"))
    with pytest.raises(RuntimeError, match="of another kind"):
        run_batched(LimitedModel(0, RuntimeError("of another kind")), [1], 8, file.part("dev"))
    file.close()


def test_the_batch_size_that_was_used_is_a_condition(
    copied: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = torch.nn.Embedding.forward

    def small(self: Any, ids: torch.Tensor) -> torch.Tensor:
        if len(ids) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, ids)

    monkeypatch.setattr("torch.nn.Embedding.forward", small)
    assert copied.call("eval", "splits=[test]") == 0
    assert "out of memory: test restarts with batches of 8" in capsys.readouterr().out
    comparison = json.loads((copied.newest.path / "comparison.json").read_text())
    sizes = comparison["conditions"]["batch_size"]  # the base's, and so the tuned model's
    assert sizes == {"test": 8, "test/references": 8}
    assert len(read_jsonl(evals(copied.newest) / "test.predictions.jsonl")) == 24
