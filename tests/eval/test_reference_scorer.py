"""The log-likelihood of reference answers in a batch is that of each row's own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.tiny_model import build
from src.data.chat import ChatTokenizer
from src.data.formats import Row, RowError
from src.errors import DataError
from src.eval import inference
from src.eval.generate import ReferenceScorer, _score
from src.model import adapters, load
from src.model.source import locate
from src.model.tokenizer import load_tokenizer
from src.schema import MethodArgs
from tests.fixtures import ANSWER, ROOT

pytest_plugins = ["tests.fixtures"]

TEXTS = ["Top of ore rate?", "?", "Top " * 30, "Feed of the mill"]
REFERENCES = [ANSWER, "TOP", "TOP(a) and more of" + " it" * 9, "x"]


def rows() -> list[Row]:
    turns = [
        [{"role": "user", "content": t}, {"role": "assistant", "content": s}]
        for t, s in zip(TEXTS, REFERENCES, strict=True)
    ]
    return [Row(Path("test.jsonl"), n, list(each), None) for n, each in enumerate(turns, 1)]  # type: ignore[arg-type]


def examples(tokenizer: Any, task: str, config: dict[str, Any]) -> Any:
    found = inference.encode_requests({"test": rows()}, ChatTokenizer(tokenizer), task, config, references=True)
    return found.references["test"], found.prompts["test"]


@pytest.mark.parametrize("method", ["", "lora", "prefix", "p_tuning"])
def test_a_batch_has_the_likelihoods_of_single_rows(tiny: Path, tokenizer: Any, method: str) -> None:
    model, source = load.load_base(locate(str(tiny)), "float32", "cpu")
    if method:
        load.seed_everything(0)
        model = adapters.apply_method(model, MethodArgs(method=method), source, steps=1)  # type: ignore[arg-type]
        for _, p in model.named_parameters():
            if p.requires_grad:
                p.data.add_(torch.randn_like(p) * 0.1)
    encoded, prompts = examples(tokenizer, "causal_lm", {"architectures": ["LlamaForCausalLM"]})
    scorer = ReferenceScorer(model, tokenizer, encoded)
    groups = [[i] for i in range(4)] if scorer.unpadded else [[2, 0, 3, 1]]
    found = {i: row for group in groups for i, row in zip(group, scorer(group, 0), strict=True)}
    for i, (example, prompt, reference) in enumerate(zip(encoded, prompts, REFERENCES, strict=True)):
        answer = example.ids[len(prompt) :]
        assert example.ids[: len(prompt)] == prompt
        assert tokenizer.decode(answer) == reference + "<|end|>"
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([example.ids])).logits[0]
        shift = logits.log_softmax(-1)[-len(answer) - 1 : -1]
        targets = torch.tensor(answer)
        assert found[i]["reference_tokens"] == len(answer)
        nll = -shift[torch.arange(len(answer)), targets].sum()
        assert found[i]["reference_nll"] == pytest.approx(float(nll), rel=1e-4)
        assert found[i]["reference_hits"] == int((shift.argmax(-1) == targets).sum())


def test_a_hit_is_the_most_likely_token() -> None:
    logits = torch.tensor([[0.0, 1, 2], [5, 0, 0], [0, 9, 1]], dtype=torch.bfloat16)
    found = _score(logits, [2, 1, 1])
    assert (found["reference_hits"], found["reference_tokens"]) == (2, 3)


def test_no_logits_are_computed_for_the_prompts(
    tiny: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load.load_base(locate(str(tiny)), "float32", "cpu")
    encoded, _ = examples(tokenizer, "causal_lm", {"architectures": ["LlamaForCausalLM"]})
    seen = []
    plain = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: seen.append(hidden.shape[:2]) or plain(hidden))
    ReferenceScorer(model, tokenizer, encoded)([0, 1, 2, 3], 0)
    assert seen == [(4, max(sum(e.loss_mask) for e in encoded) + 1)]


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_an_encoder_decoder_scores_what_its_decoder_would_generate(tmp_path: Path, architecture: str) -> None:
    texts = (ROOT / "data" / "ingot.jsonl").read_text(encoding="utf-8").splitlines()
    folder = build(tmp_path / "model", texts, architecture=architecture)
    model, _ = load.load_base(locate(str(folder)), "float32", "cpu", task="seq2seq")
    tokenizer = load_tokenizer(str(folder), templated=False)
    encoded, _ = examples(tokenizer, "seq2seq", model.config.to_dict())
    found = ReferenceScorer(model, tokenizer, encoded)([3, 1, 0, 2], 0)
    for i, row in zip([3, 1, 0, 2], found, strict=True):
        labels = torch.tensor([tokenizer(text_target=REFERENCES[i])["input_ids"]])
        with torch.inference_mode():
            out = model(**tokenizer(TEXTS[i], return_tensors="pt"), labels=labels)
        assert row["reference_tokens"] == labels.shape[1]
        assert row["reference_nll"] == pytest.approx(float(out.loss) * labels.shape[1], rel=1e-4)
        assert row["reference_hits"] == int((out.logits[0].argmax(-1) == labels[0]).sum())


def test_every_row_that_a_template_refuses_is_named(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise RowError("no", "is refused")

    monkeypatch.setattr(ChatTokenizer, "prompt_ids", refused)
    with pytest.raises(DataError) as error:
        inference.encode_requests(
            {"a": rows()[:1], "b": rows()[1:2]}, ChatTokenizer(tokenizer), "causal_lm", {}, references=False
        )
    assert error.value.problems == ("test.jsonl:1 is refused", "test.jsonl:2 is refused")
