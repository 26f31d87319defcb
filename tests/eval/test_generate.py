"""Generation does not depend on the other rows of a batch, and ends where the model ends its turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from src.data.chat import ChatTokenizer
from src.data.formats import Conversation
from src.eval.batching import batch_indices
from src.eval.generate import Generation, Generator, end_tokens
from src.model import adapters, load
from src.model.source import locate_tuned
from src.schema import MethodArgs
from tests.fixtures import ANSWER, ROOT, World, read_jsonl

pytest_plugins = ["tests.fixtures"]

REQUESTS = [row["prompt"] for row in read_jsonl(ROOT / "data" / "eval" / "test.jsonl")[:12]]
REQUESTS += ["Top of ore rate?", "?", "Top " * 60]


@pytest.fixture(scope="module")
def base(tiny: Path) -> Any:
    return load.load_tuned(locate_tuned(tiny), "float32", "cpu")[0]


@pytest.fixture(scope="module")
def tuned(finished: World) -> Any:
    return load.load_tuned(locate_tuned(finished.newest.model), "float32", "cpu")[0]


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    return [
        ChatTokenizer(tokenizer).prompt_ids(Conversation([{"role": "user", "content": text}])) for text in REQUESTS
    ]


def generate(model: Any, tokenizer: Any, prompts: list[list[int]], **others: Any) -> list[Generation]:
    size = others.pop("batch_size", 4)
    generator = Generator(model, tokenizer, **({"max_new_tokens": 12, "seed": 42, "extra": {}} | others))
    found: dict[int, Generation] = {}
    for number, places in enumerate(batch_indices([len(p) for p in prompts], size, unpadded=generator.unpadded)):
        found |= zip(places, generator([prompts[i] for i in places], number), strict=True)
    return [found[i] for i in range(len(prompts))]


@pytest.mark.parametrize("batch_size", [2, 4, 64])
def test_a_batch_gives_the_generations_of_single_prompts(
    base: Any, tokenizer: Any, prompts: list[list[int]], batch_size: int
) -> None:
    alone = [generate(base, tokenizer, [prompt], batch_size=1)[0] for prompt in prompts]
    assert len({a.text for a in alone}) > len(prompts) / 2
    assert generate(base, tokenizer, prompts, batch_size=batch_size) == alone


def test_a_row_that_ends_early_does_not_change_the_others(
    base: Any, tokenizer: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [a.text for a in generate(base, tokenizer, prompts)]
    ids = [set(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    in_some = sorted(t for t in set().union(*ids) if 1 < sum(t in i for i in ids) < len(ids) - 1)
    monkeypatch.setattr(base.generation_config, "eos_token_id", in_some[:3])
    alone = [generate(base, tokenizer, [prompt], batch_size=1)[0] for prompt in prompts]
    assert {a.stop for a in alone} == {"end", "length"}
    assert generate(base, tokenizer, prompts, batch_size=64) == alone


def test_generations_are_in_the_order_of_their_prompts(
    base: Any, tokenizer: Any, prompts: list[list[int]]
) -> None:
    forward = generate(base, tokenizer, prompts)
    assert generate(base, tokenizer, prompts[::-1]) == forward[::-1]


def test_a_model_that_ends_its_turn_stops_there(tuned: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    (found,) = generate(tuned, tokenizer, [prompts[REQUESTS.index("Top of ore rate?")]])
    length = len(tokenizer(ANSWER, add_special_tokens=False)["input_ids"])
    assert found == Generation(ANSWER, length, "end")


@pytest.mark.parametrize("most", [1, 7])
def test_a_model_that_does_not_end_is_cut_at_the_limit(
    base: Any, tokenizer: Any, prompts: list[list[int]], most: int
) -> None:
    found = generate(base, tokenizer, prompts, max_new_tokens=most)
    assert {(a.tokens, a.stop) for a in found if a.stop == "length"} == {(most, "length")}
    assert all(a.tokens < most for a in found if a.stop == "end")


def test_every_end_token_that_the_model_names_ends_the_turn(
    tuned: Any, tokenizer: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompts[REQUESTS.index("Top of ore rate?")]
    bracket = tokenizer("(", add_special_tokens=False)["input_ids"][0]
    monkeypatch.setattr(tuned.generation_config, "eos_token_id", [bracket])
    assert end_tokens(tuned, tokenizer) == {bracket, tokenizer.eos_token_id}
    (found,) = generate(tuned, tokenizer, [prompt])
    assert (found.text, found.stop) == (ANSWER.split("(")[0], "end")


def test_greedy_answers_do_not_depend_on_the_seed(base: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    assert generate(base, tokenizer, prompts, seed=1) == generate(base, tokenizer, prompts, seed=2)


def test_sampled_answers_depend_on_the_seed_alone(base: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    def sampled(seed: int) -> list[Generation]:
        return generate(base, tokenizer, prompts, seed=seed, extra={"do_sample": True, "temperature": 2.0})

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_dropout_is_off(tuned: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    expected = generate(tuned, tokenizer, prompts)
    tuned.train()
    assert generate(tuned, tokenizer, prompts) == expected
    assert not tuned.training


@pytest.mark.parametrize("method", ["prefix", "p_tuning", "prompt"])
def test_virtual_tokens_are_next_to_every_prompt_of_a_batch(
    tiny: Path, tokenizer: Any, prompts: list[list[int]], method: str
) -> None:
    model, source = load.load_base(locate_tuned(tiny).base, "float32", "cpu")
    load.seed_everything(0)
    model = adapters.apply_method(model, MethodArgs(method=method), source, steps=1)
    for name, p in model.named_parameters():
        if p.requires_grad or "q_proj" in name:
            p.data.mul_(40)  # so that it counts where a token is
    alone = [generate(model, tokenizer, [prompt], batch_size=1)[0] for prompt in prompts]
    assert generate(model, tokenizer, prompts, batch_size=64) == alone


# --- stop strings ----------------------------------------------------------------------------------------


@pytest.fixture
def forwards(base: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each forward pass of the base model."""
    seen: list[int] = []
    plain = type(base).forward

    def counted(self: Any, *args: Any, **named: Any) -> Any:
        seen.append(len(named["input_ids"]))
        return plain(self, *args, **named)

    monkeypatch.setattr(type(base), "forward", counted)
    return seen


def test_a_stop_string_ends_the_answer_before_it_and_the_generation_with_it(
    base: Any, tokenizer: Any, prompts: list[list[int]], forwards: list[int]
) -> None:
    (full,) = generate(base, tokenizer, prompts[:1], max_new_tokens=30)
    assert len(forwards) == 30
    stop = full.text[7:10]
    cut = full.text.index(stop)
    forwards.clear()
    (found,) = generate(base, tokenizer, prompts[:1], max_new_tokens=30, stop=["never", stop])
    assert (found.text, found.stop) == (full.text[:cut], "stop")
    assert found.tokens == len(forwards) < 30


def test_a_batch_ends_with_its_last_row(
    base: Any, tokenizer: Any, prompts: list[list[int]], forwards: list[int]
) -> None:
    full = generate(base, tokenizer, prompts[:3], max_new_tokens=30)
    stop = [answer.text[4 * n + 1 : 4 * n + 4] for n, answer in enumerate(full)]  # one for each, at other places
    alone = [generate(base, tokenizer, [prompt], max_new_tokens=30, stop=stop)[0] for prompt in prompts[:3]]
    forwards.clear()
    assert generate(base, tokenizer, prompts[:3], max_new_tokens=30, stop=stop) == alone
    assert len(forwards) == max(answer.tokens for answer in alone) < 30


def test_a_special_token_can_be_a_stop_string(
    base: Any, tokenizer: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tokenizer.convert_tokens_to_ids("<|start|>")
    rows = [[5, 6, start, 7], [5, tokenizer.eos_token_id, start, 7], [5, 6, 7, 8]]
    generator = Generator(base, tokenizer, max_new_tokens=4, seed=0, extra={}, stop=["<|start|>"])
    assert start in generator.settings.eos_token_id
    monkeypatch.setattr(generator, "_generate", lambda _: rows)
    assert [(a.tokens, a.stop) for a in generator(prompts[:3], 0)] == [(2, "stop"), (1, "end"), (4, "length")]


def test_samples_of_a_batch_depend_only_on_its_number(base: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    generator = Generator(base, tokenizer, max_new_tokens=8, seed=3, extra={"do_sample": True, "temperature": 2.0})
    first, second = generator(prompts[:2], 0), generator(prompts[:2], 1)
    assert first != second
    assert (generator(prompts[:2], 1), generator(prompts[:2], 0)) == (second, first)
