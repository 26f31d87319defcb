"""Tokens that the embedding has no rows for: refused before the model is loaded, or added, trained and saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from scripts.tiny_model import build
from src import config
from src.errors import ConfigError
from src.model import adapters, embeddings, load, methods
from src.model.source import locate, locate_tuned
from src.model.tokenizer import load_tokenizer
from src.schema import ChatArgs, MethodArgs
from tests.deploy.cards import answer_of
from tests.fixtures import World, call, chat, jsonl

pytest_plugins = ["tests.fixtures"]

TOKENS = ["<|call|>", "<|slot|>"]
ADDED = f"new_tokens={json.dumps(TOKENS)}"
SHORT = ("max_steps=4", "lr=0.02", "epochs=1")


@pytest.fixture
def with_tokens(world: World, tmp_path: Path) -> World:
    """A world whose rows hold new tokens."""
    rows = [chat(f"Call {name} <|slot|>", f"<|call|> {name}") for name in ("feed", "kiln", "mill", "tank")]
    data = jsonl(tmp_path / "data" / "lessons.jsonl", rows * 2).parent
    jsonl(tmp_path / "eval" / "test.jsonl", [chat(f"Call {n} <|slot|> now", "<|call|> it") for n in range(2)])
    return World(world.model, data, tmp_path / "eval", world.output, world.artifacts)


def added(folder: Path, name: str) -> torch.Tensor:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        (key,) = (key for key in list(file.keys()) if name in key)
        return file.get_tensor(key)


def test_new_tokens_are_trained_evaluated_and_published(with_tokens: World, tmp_path: Path) -> None:
    run = with_tokens.train(*SHORT, ADDED)
    rows = {name: added(run.model, name) for name in ("embed_tokens", "lm_head")}  # these rows and no others
    assert all(table.shape == (2, 64) and not torch.equal(table[0], table[1]) for table in rows.values())
    assert with_tokens.call("eval", "eval_batch_size=2") == 0  # of base and tuned model, with the same tokens
    assert with_tokens.call("eval-baseline", "eval_batch_size=2") == 0
    assert len(list((with_tokens.artifacts / "metrics").iterdir())) == 1
    texts = [row for path in run.path.glob("evals/*/test.predictions.jsonl") for row in [path.read_text()]]
    assert "<|call|> it" in texts[0]  # an answer keeps a token that is no part of the chat template

    child = with_tokens.train(*SHORT, f"init_from={run.id}")  # its tokens are not typed again
    assert child.settings["new_tokens"] == TOKENS
    assert added(child.model, "embed_tokens").shape == (2, 64)

    assert with_tokens.call("publish", run.id, "force=true") == 0
    folder = with_tokens.artifacts / "models" / "tiny-lora" / run.id
    assert isinstance(answer_of((folder / "README.md").read_text(), folder, with_tokens.model), str)
    assert with_tokens.call("publish", run.id, "force=true", "export=merged") == 0
    merged = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(merged.get_input_embeddings().weight[512:], rows["embed_tokens"])
    torch.testing.assert_close(merged.get_output_embeddings().weight[512:], rows["lm_head"])


def test_a_full_model_with_new_tokens_goes_on_from_its_rows(with_tokens: World) -> None:
    parent = with_tokens.train("max_steps=1", "lr=0.02", ADDED, "method=full")
    child = with_tokens.train("max_steps=1", "lr=1e-9", "method=full", f"init_from={parent.id}")
    before, after = (
        AutoModelForCausalLM.from_pretrained(run.model).get_input_embeddings().weight for run in (parent, child)
    )
    assert before.shape == (514, 64)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize(("architecture", "tied"), [("llama", True), ("llama", False), ("t5", True)])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_new_rows_come_back_from_disk_and_merge(
    tmp_path: Path, architecture: str, tied: bool, method: str
) -> None:
    folder = build(tmp_path / "base", [f"a text of {n} words" for n in range(9)], architecture=architecture)
    if architecture == "llama":
        settings = AutoConfig.from_pretrained(folder, tie_word_embeddings=tied)
        AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    task: Any = "seq2seq" if architecture == "t5" else "causal_lm"
    tokenizer = load_tokenizer(str(folder), templated=False, new_tokens=TOKENS)
    args, source = MethodArgs(method=method, new_tokens=TOKENS, lora_r=2), locate(str(folder))  # type: ignore[arg-type]
    model, _ = load.load_base(source, "float32", "cpu", task=task)
    embeddings.add_rows(model, tokenizer, args)
    model = adapters.apply_method(model, args, source, steps=3, task=task).train()
    ids = torch.tensor([[*tokenizer.convert_tokens_to_ids(TOKENS), 7, 9]])
    inputs = {"input_ids": ids, "labels": ids}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        model(**inputs).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path / "tuned")
    expected = model(**inputs).logits
    tuned = locate_tuned(tmp_path / "tuned")
    again = load.attach_adapter(load.load_base(tuned.base, "float32", "cpu", task=task)[0], tuned)
    for found in (again, methods.merge(again)):
        torch.testing.assert_close(found.eval()(**inputs).logits, expected, rtol=0, atol=1e-4)


def test_a_token_of_the_chat_template_is_special(tiny: Path) -> None:
    tokenizer = load_tokenizer(
        str(tiny), chat=ChatArgs("chatml"), new_tokens=["<|im_start|>", "<|im_end|>", "<|x|>"]
    )
    ids = tokenizer("<|im_start|>a<|x|><|im_end|>")["input_ids"]
    assert len(ids) == 4 and tokenizer.decode(ids, skip_special_tokens=True) == "a<|x|>"
    with pytest.raises(ConfigError, match=r"new_tokens: <\|end\|> is a token of .* already; leave it out"):
        load_tokenizer(str(tiny), new_tokens=["<|end|>"])


# A tokenizer that is larger than the embedding


def test_a_token_without_a_row_is_refused_before_the_model_is_loaded(
    with_tokens: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(with_tokens.model)
    tokenizer.add_tokens(TOKENS)
    folder = tmp_path / "larger"
    AutoModelForCausalLM.from_pretrained(with_tokens.model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    named = f"model_name={folder}"
    fact = f"has the token <|slot|> (id 513), and the embedding of {folder} has 512 rows; so have 7 more rows"
    for stage in ("check-data", "plan", "train"):
        words = [f"output_dir={with_tokens.output}", f"dataset_path={with_tokens.data}", named, "eval_path=none"]
        capsys.readouterr()
        assert call(stage, *words, "cuda_visible_devices=''") == 2
        said = capsys.readouterr().err
        assert f"lessons.jsonl:1 {fact}" in said
        assert "resize_embeddings=true adds the missing rows and trains them" in said
    assert with_tokens.call("eval-baseline", named) == 2
    assert "test.jsonl:1 has the token " in capsys.readouterr().err
    run = with_tokens.train(*SHORT, named, "resize_embeddings=true")
    assert added(run.model, "embed_tokens").shape == (2, 64)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"new_tokens": [" "]}, "new_tokens: ' ' is only white space"),
        ({"new_tokens": ["a", "a"]}, "new_tokens: a is listed twice"),
        ({"method": "ia3"}, "whose adapter holds no rows of the embedding; choose one of lora, rslora, dora"),
        ({"distributed": "zero3"}, "new_tokens is not supported with distributed=zero3; set distributed=ddp"),
        (
            {"peft": {"trainable_token_indices": [3]}},
            "peft.trainable_token_indices is not supported with new_tokens",
        ),
    ],
)
def test_what_cannot_hold_new_rows_is_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load("train", {"new_tokens": TOKENS} | values, methods.problems)
    assert reason in str(caught.value)
