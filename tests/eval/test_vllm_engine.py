"""engine=vllm, with a stand-in for vLLM, which has no build for a CPU.

Its names and defaults are those of vLLM 0.33.0, looked up in its sources. It answers with transformers, greedily:
both engines must give the same answers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures import World, evals, read_jsonl

pytest_plugins = ["tests.fixtures"]

VLLM = """
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class SamplingParams:
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0


class LLM:
    def __init__(self, model, *, dtype="auto", seed=0, trust_remote_code=False, enable_lora=False,
                 max_lora_rank=16):
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.takes_adapters = enable_lora

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
        assert sampling_params.temperature == 0.0
        model = self.base
        if lora_request is not None:
            assert self.takes_adapters and lora_request.lora_int_id > 0
            model = PeftModel.from_pretrained(model, lora_request.lora_path)
        found = [self.one(model, prompt["prompt_token_ids"], sampling_params) for prompt in prompts]
        if lora_request is not None:
            model.unload()
        return [SimpleNamespace(outputs=[output]) for output in found]

    def one(self, model, ids, params):
        made = model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=params.max_tokens,
            eos_token_id=params.stop_token_ids, pad_token_id=params.stop_token_ids[0],
        )[0, len(ids):].tolist()
        text = self.tokenizer.decode(made, skip_special_tokens=True)
        ended = made[-1] in params.stop_token_ids
        reason, why = ("stop", None) if ended else ("length", None)
        for stop in params.stop or []:
            if stop in text:
                text, reason, why = text[: text.index(stop)], "stop", stop
        return SimpleNamespace(text=text, token_ids=made, finish_reason=reason, stop_reason=why)
"""
REQUEST = """
from dataclasses import dataclass


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""
"""


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    site = tmp_path / "site"
    for name, content in {
        "vllm/__init__.py": VLLM,
        "vllm/lora/__init__.py": "",
        "vllm/lora/request.py": REQUEST,
        "vllm-0.33.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0\n",
    }.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(content)
    monkeypatch.syspath_prepend(str(site))
    for name in ("vllm", "vllm.lora", "vllm.lora.request"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in ("vllm", "vllm.lora", "vllm.lora.request"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("vllm")
def test_both_engines_give_the_same_predictions_and_are_not_compared(
    copied: World, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied.newest
    kept = {path.name: read_jsonl(path) for path in evals(run).glob("*.predictions.jsonl")}
    assert copied.call("eval", "engine=vllm") == 0
    assert not (run.path / "comparison.json").exists()  # the base has answered by the other engine
    assert '"engine": "vllm 0.33.0"' in (run.path / "metrics.json").read_text()
    keys = ("prompt", "reference", "prediction", "prompt_tokens", "tokens", "stop")
    for name, rows in kept.items():
        assert [[r[k] for k in keys] for r in read_jsonl(evals(run) / name)] == [
            [r[k] for k in keys] for r in rows
        ]

    assert copied.call("eval-baseline", "engine=vllm") == 0
    assert "promoted: rougeL on test rose from 0.000 to 1.000" in capsys.readouterr().out


@pytest.mark.usefixtures("vllm")
def test_a_stop_string_and_the_length_end_a_generation(copied: World) -> None:
    assert copied.call("eval", "engine=vllm", "splits=[test]", "stop=['(a']") == 0
    rows = read_jsonl(evals(copied.newest) / "test.predictions.jsonl")
    assert {(row["prediction"], row["stop"]) for row in rows} == {("TOP", "stop")}
    assert copied.call("eval", "engine=vllm", "splits=[test]", "stop=[]", "max_new_tokens=2") == 0
    rows = read_jsonl(evals(copied.newest) / "test.predictions.jsonl")
    assert {(row["tokens"], row["stop"]) for row in rows} == {(2, "length")}


@pytest.mark.usefixtures("vllm")
def test_settings_that_vllm_does_not_support_are_refused(
    copied: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert copied.call("eval", "engine=vllm", "generation.num_beams=2") == 2
    assert (
        "generation.num_beams is not supported with engine=vllm; set engine=transformers"
        in capsys.readouterr().err
    )
    assert copied.call("eval", "engine=vllm", "metrics=[perplexity]") == 2
    assert "metrics: perplexity: reference answers are not scored with engine=vllm" in capsys.readouterr().err
