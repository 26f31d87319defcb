"""Encoder-decoders and classifiers: trained, reloaded, evaluated, compared, published by the same stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.tiny_model import build
from src.data import task_encoding
from src.data.chat import ChatTokenizer
from src.data.encode import EncodedRow, EncodingOptions
from src.data.formats import Row
from src.data.store import IGNORE_INDEX, Example
from src.errors import ModelError
from src.model import adapters, load, methods, tasks
from src.model.source import locate, locate_tuned
from src.model.tokenizer import load_tokenizer
from src.schema import MethodArgs
from src.train.collators import COLLATORS
from src.train.pipeline import save_model
from tests.fixtures import ROOT, SPLITS, World, evals, jsonl, read_jsonl

pytest_plugins = ["tests.fixtures"]

Said = pytest.CaptureFixture[str]

TASK_OF = {"t5": "seq2seq", "bart": "seq2seq", "bert": "classification", "roberta": "classification"}
# The task: the requested quantity decides the answer, whatever the object is.
ANSWERS = {"rate": "RATE(x)", "temp": "HOT(y)", "load": "MASS(z)", "flow": "RIVER(w)"}
LABELS = {"rate": "speed", "temp": "heat", "load": "mass", "flow": "speed"}


def row(task: str, thing: str, what: str) -> dict[str, str]:
    asked = f"Top of {thing} {what}?"
    if task == "seq2seq":
        return {"prompt": asked, "completion": ANSWERS[what]}
    return {"text": asked, "label": LABELS[what]}


@pytest.fixture(scope="session")
def model_of(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a tiny model by the name of its architecture."""
    texts = (ROOT / "data" / "ingot.jsonl").read_text(encoding="utf-8").splitlines()
    built: dict[str, Path] = {"llama": tiny}

    def of(name: str) -> Path:
        if name not in built:
            built[name] = build(tmp_path_factory.mktemp("tiny") / name, texts, architecture=name)
        return built[name]

    return of


@pytest.fixture
def world_of(model_of: Any, tmp_path: Path) -> Any:
    def of(name: str, task: str) -> World:
        things = ("feed", "kiln", "mill", "tank")
        jsonl(
            tmp_path / "data" / "lessons.jsonl", (row(task, thing, what) for thing in things for what in ANSWERS)
        )
        for split in SPLITS:
            jsonl(tmp_path / "eval" / f"{split}.jsonl", (row(task, "ore", what) for what in ANSWERS))
        return World(
            model_of(name), tmp_path / "data", tmp_path / "eval", tmp_path / "outputs", tmp_path / "artifacts"
        )

    return of


def words(task: str, *others: str) -> list[str]:
    data_format = "prompt_completion" if task == "seq2seq" else "classification"
    ours = [f"task={task}", f"data_format={data_format}", "max_length=64", "lora_target_modules=null"]
    return [*ours, "on_contamination=keep", *others]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# --- all stages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method", "epochs"),
    [("t5", "full", 15), ("bart", "full", 15), ("bert", "lora", 20), ("roberta", "lora", 20)],
)
def test_a_model_of_each_kind_goes_through_every_stage(world_of: Any, name: str, method: str, epochs: int) -> None:
    task = TASK_OF[name]
    world, metric = world_of(name, task), "accuracy" if task == "classification" else "exact_match"
    run = world.train(*words(task, f"method={method}", f"epochs={epochs}"))
    assert run.manifest["task"] == task
    assert world.call("eval", "splits=[test]") == 0
    assert world.call("eval-baseline", "splits=[test]", f"task={task}") == 0

    rows = read_jsonl(evals(run) / "test.predictions.jsonl")
    assert [r["reference"] for r in rows] == [list(row(task, "ore", w).values())[1] for w in ANSWERS]
    assert all(r["scores"][metric] == float(r["prediction"] == r["reference"]) for r in rows)
    compared = {r["metric"]: r for r in read(run.path / "comparison.json")["rows"]}
    assert list(compared) == list(tasks.TASKS[task].metrics)
    assert compared[metric]["tuned"] >= 0.75 > compared[metric]["base"]

    assert world.call("publish", f"gate.metric={metric}", "gate.guards=[]") == 4  # too few rows to tell
    assert world.call("publish", f"gate.metric={metric}", "gate.guards=[]", "force=true") == 0
    (published,) = (world.artifacts / "models").glob("*/latest")
    assert f"pipeline_tag: {tasks.TASKS[task].pipeline_tag}" in (published / "README.md").read_text()
    again = world.elsewhere(world.output.parent / "again")
    assert again.call("eval", str(published.resolve()), "splits=[test]") == 0
    assert read(again.newest.path / "metrics.json")["eval"] == read(run.path / "metrics.json")["eval"]


def test_a_classification_says_the_probability_and_accounts_for_its_labels(world_of: Any, capsys: Said) -> None:
    world = world_of("bert", "classification")
    run = world.train(*words("classification", "max_steps=1"))
    report = read(run.path / "data_report.json")
    assert report["labels"] == {"heat": 4, "mass": 4, "speed": 8}
    assert (report["rows_in"], report["rows_trained"], report["tokens"]["with_loss"]) == (16, 16, 16)
    assert read(run.model / "config.json")["label2id"] == {"heat": 0, "mass": 1, "speed": 2}
    assert "⟦speed⟧" in capsys.readouterr().out
    assert world.call("eval", "splits=[test]") == 0
    rows = read_jsonl(evals(run) / "test.predictions.jsonl")
    assert all(1 / 3 <= r["probability"] <= 1 and r["prediction"] in report["labels"] for r in rows)


def test_a_label_of_greater_weight_is_predicted_at_the_cost_of_the_others(world_of: Any, capsys: Said) -> None:
    world = world_of("bert", "classification")
    asked = words("classification", "loss=weighted", "epochs=2")
    world.train(*asked, "class_weights={heat: 1000}")
    assert world.call("eval", "splits=[test]") == 0
    rows = read_jsonl(evals(world.newest) / "test.predictions.jsonl")
    assert {r["prediction"] for r in rows} == {"heat"}
    told = refused(world, capsys, "train", *asked, "class_weights={noise: 2}")
    assert "class_weights: 'noise' is neither a label nor one token" in told


def test_the_head_of_a_baseline_is_drawn_with_the_seed_and_logged(world_of: Any, capsys: Said) -> None:
    world = world_of("bert", "classification")
    scores = []
    for seed in (1, 1, 2):
        common = ("task=classification", f"seed={seed}", "splits=[test]", "metrics=[accuracy]")
        assert world.call("eval-baseline", *common) == 0
        assert f"bert.pooler.dense, classifier untrained, drawn with seed={seed}" in capsys.readouterr().out
        folder = max((world.artifacts / "metrics").iterdir(), key=lambda p: p.stat().st_mtime)
        scores.append([r["probability"] for r in read_jsonl(folder / "test.predictions.jsonl")])
    assert scores[0] == scores[1] != scores[2]


def test_plain_labels_are_numbers_or_words_and_a_conversation_has_one_for_each_answer(world_of: Any) -> None:
    world = world_of("bert", "classification")
    jsonl(world.data / "lessons.jsonl", [{"text": f"Top {i}?", "label": i % 3} for i in range(6)])
    for split in SPLITS:
        jsonl(world.splits / f"{split}.jsonl", [{"prompt": "Top of 9?", "completion": "0"}])
    run = world.train(*words("classification", "max_steps=1"))
    assert read(run.path / "data_report.json")["labels"] == {"0": 2, "1": 2, "2": 2}


def test_labels_with_the_default_names_are_evaluated_and_kept_by_a_further_run(
    world_of: Any, capsys: Said
) -> None:
    """transformers leaves LABEL_0 and LABEL_1 out of config.json. A further run keeps them, and refuses others."""
    world = world_of("bert", "classification")
    jsonl(world.data / "lessons.jsonl", [{"text": f"Top {i}?", "label": f"LABEL_{i % 2}"} for i in range(6)])
    for split in SPLITS:
        jsonl(world.splits / f"{split}.jsonl", [{"prompt": "Top of 9?", "completion": "LABEL_1"}])
    run = world.train(*words("classification", "max_steps=1"))
    assert world.call("eval", "splits=[test]", "baseline=never") == 0
    jsonl(world.data / "lessons.jsonl", [{"text": f"{i} Top?", "label": f"LABEL_{i % 2}"} for i in range(6)])
    child = world.train(*words("classification", "max_steps=1"), f"init_from={run.id}")
    assert tasks.detect_task(locate_tuned(child.model), None) == ("classification", ["LABEL_0", "LABEL_1"])
    jsonl(world.data / "lessons.jsonl", [{"text": f"Top {i}?", "label": f"LABEL_{i % 3}"} for i in range(6)])
    capsys.readouterr()
    assert world.call("train", *words("classification", "max_steps=1"), f"init_from={run.id}") == 2
    assert "the rows have the labels LABEL_2, and init_from=" in capsys.readouterr().err


# --- saved and reloaded ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "qlora", "adalora", "ia3", "full"])
@pytest.mark.parametrize("name", [*TASK_OF, "llama"])
def test_a_reloaded_model_gives_the_logits_of_the_trained_one(
    model_of: Any, tmp_path: Path, name: str, method: str
) -> None:
    task = TASK_OF.get(name, "classification")
    labels = ("heat", "mass", "speed") if task == "classification" else ()
    folder = model_of(name)
    tokenizer = load_tokenizer(str(folder), templated=False)
    source, four_bit = locate(str(folder)), methods.METHODS[method].four_bit
    load.seed_everything(0)
    model, source = load.load_base(source, "float32", "cpu", task=task, labels=labels, four_bit=four_bit)
    if labels:
        load.set_pad_token(model, tokenizer)
    model = adapters.apply_method(
        model, MethodArgs(method, lora_r=4, lora_dropout=0.0), source, steps=12, task=task
    )
    chat, rules = ChatTokenizer(tokenizer), EncodingOptions(64, task=task, labels=labels)
    batch = batch_of(chat, rules, model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.005)
    model.train()
    losses = []
    for _ in range(12):
        logits = model(**batch).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), batch["labels"].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = logits_of(model, batch)

    save_model(model, chat, tmp_path / "model")
    tuned = locate_tuned(tmp_path / "model")
    found, kept = tasks.detect_task(tuned, None)
    assert (found, tuple(kept)) == (task, labels)
    load.seed_everything(99)  # a layer that was not saved would be drawn anew
    again, _, _ = load.load_tuned(tuned, "float32", "cpu", task=found, labels=kept)
    # a 4-bit base is rounded; its adapter is evaluated on the base as it is
    scale = trained.abs().max().item()
    torch.testing.assert_close(logits_of(again, batch), trained, rtol=0, atol=(0.3 if four_bit else 1e-5) * scale)


def batch_of(chat: ChatTokenizer, rules: EncodingOptions, model: Any) -> dict[str, torch.Tensor]:
    answers = LABELS if rules.task == "classification" else ANSWERS
    rows = [message(f"Top of {'feed ' * n}{what}?", answers[what]) for n, what in enumerate(ANSWERS, 1)]
    examples = [
        e
        for found in task_encoding.encode_pairs(rows, chat, rules)
        if isinstance(found, EncodedRow)
        for e in found.examples
    ]
    assert len(examples) == 4
    batch = COLLATORS[rules.task](chat.tokenizer, model)(list(enumerate(examples)))
    return {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}


def logits_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    model.eval()
    with torch.inference_mode():
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def message(*said: str, **more: Any) -> Row:
    turns: list[Any] = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return Row(Path("x"), 1, turns, **more)


# --- rows and batches ------------------------------------------------------------------------------------


@pytest.fixture
def t5(model_of: Any) -> ChatTokenizer:
    return ChatTokenizer(load_tokenizer(str(model_of("t5")), templated=False))


def texts(chat: ChatTokenizer, example: Example) -> tuple[str, str]:
    cut = example.loss_mask.index(True)
    assert example.loss_mask == [False] * cut + [True] * (len(example.ids) - cut)
    return chat.tokenizer.decode(example.ids[:cut]), chat.tokenizer.decode(example.ids[cut:])


def only(found: list[Any]) -> Any:
    (one,) = found
    return one


def test_each_answer_of_a_conversation_is_an_example_whose_text_is_all_before_it(t5: ChatTokenizer) -> None:
    row = message("a?", "b", "c?", "d")
    row.messages.insert(0, {"role": "system", "content": "Count."})
    found = only(task_encoding.encode_pairs([row], t5, EncodingOptions(64, task="seq2seq")))
    assert found.ends_turns
    assert [texts(t5, e) for e in found.examples] == [
        ("Count.\n\na?</s>", "b</s>"),
        ("Count.\n\na?\n\nb\n\nc?</s>", "d</s>"),
    ]
    assert (
        task_encoding.prompt_ids(t5, row, None) == found.examples[1].ids[: found.examples[1].loss_mask.index(True)]
    )


@pytest.mark.parametrize(
    ("rule", "text", "answer"),
    [("truncate", "0123456</s>", "d</s>"), ("truncate_prompt", "3456789</s>", "d</s>")],
)
def test_a_text_that_is_too_long_is_cut_where_the_setting_says(
    t5: ChatTokenizer, rule: Any, text: str, answer: str
) -> None:
    found = only(
        task_encoding.encode_pairs(
            [message("0123456789", "d")], t5, EncodingOptions(8, on_overlength=rule, task="seq2seq")
        )
    )
    assert texts(t5, only(found.examples)) == (text, answer)
    assert found.note == "cut from 11 to 8 tokens"


@pytest.mark.parametrize(
    ("row", "rule", "told"),
    [
        (message("0123456789", "d"), "reject", "has a text of 11 tokens, over max_length=8"),
        (message("a", "0123456789"), "truncate_prompt", "has an answer of 11 tokens, over max_length=8"),
        (message("a </s>", "d"), "reject", "holds the control token </s> as text in a message"),
        (message("a", "d", tools=[{}]), "reject", "has tools, which plain text cannot express"),
        (
            Row(Path("x"), 1, [{"role": "text", "content": "a"}]),
            "reject",
            "is a text without an answer or a label",
        ),
    ],
)
def test_a_row_that_cannot_be_read_says_why(t5: ChatTokenizer, row: Row, rule: Any, told: str) -> None:
    assert (
        str(only(task_encoding.encode_pairs([row], t5, EncodingOptions(8, on_overlength=rule, task="seq2seq"))))
        == told
    )


def test_a_batch_is_padded_on_the_right_and_the_decoder_starts_with_its_own_token(model_of: Any) -> None:
    model, _ = load.load_base(locate(str(model_of("bart"))), "float32", "cpu", task="seq2seq")
    tokenizer = load_tokenizer(str(model_of("bart")), templated=False)
    items = [(7, Example([5, 6, 8, 9], [False, False, True, True])), (3, Example([5, 9], [False, True]))]
    batch = COLLATORS["seq2seq"](tokenizer, model)(items)
    assert batch["input_ids"].tolist() == [[5, 6], [5, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[8, 9], [9, IGNORE_INDEX]]
    assert batch["decoder_input_ids"].tolist() == [[2, 8], [2, 9]]  # BART begins with its end token
    assert (batch["rows"], batch["tokens"]) == ([7, 3], 6)
    labelled = COLLATORS["classification"](tokenizer, model)(items[1:])
    assert (labelled["labels"].tolist(), labelled["tokens"]) == ([9], 1)


# --- what cannot be done ---------------------------------------------------------------------------------


def refused(world: World, capsys: Said, stage: str, *given: str) -> str:
    capsys.readouterr()
    assert world.call(stage, *given) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        (
            "llama",
            ["task=seq2seq"],
            "LlamaForCausalLM (decoder), which does not support task=seq2seq; set task=",
        ),
        (
            "t5",
            ["task=causal_lm"],
            "T5ForConditionalGeneration (encoder-decoder), which does not support task=causal_lm",
        ),
        ("bert", ["task=seq2seq"], "BertForMaskedLM (encoder), which does not support task=seq2seq"),
        ("bert", ["max_length=129"], "max_length=129 is more than the 128 positions of"),
        ("roberta", ["max_length=129"], "max_length=129 is more than the 128 positions of"),
        ("t5", ["packing=true"], "packing=true is not supported with task=seq2seq"),
        ("bert", ["train_on=all"], "train_on=all is not supported with task=classification"),
        ("bert", ["on_overlength=split"], "on_overlength=split is not supported with task=classification"),
    ],
)
def test_a_model_or_setting_that_does_not_go_with_the_task_is_refused(
    world_of: Any, capsys: Said, name: str, given: list[str], told: str
) -> None:
    task = TASK_OF.get(name, "classification")
    world = world_of(name, task)
    assert told in refused(world, capsys, "train", *words(task, *given))
    assert not (world.output / "runs").exists()


@pytest.mark.parametrize("method", [m for m in methods.METHODS if not methods.METHODS[m].padding_free])
def test_virtual_tokens_make_no_classifier_where_layers_would_be_lost(model_of: Any, method: str) -> None:
    found = {name: read(model_of(name) / "config.json") for name in ("bart", "bert", "roberta")}
    with pytest.raises(ModelError, match="which an encoder-decoder classifier does not support"):
        tasks.check_source(locate(str(model_of("bart"))), "classification", method=method)
    with pytest.raises(ModelError, match=r"the base model lacks bert\.pooler\.dense, too"):
        tasks.check_method(found["bert"], "classification", method, ["bert.pooler.dense", "classifier"])
    tasks.check_method(found["roberta"], "classification", method, ["classifier"])
    tasks.check_method(found["bart"], "seq2seq", method)


def test_labels_that_cannot_be_trained_are_refused_by_name(world_of: Any, capsys: Said) -> None:
    world = world_of("bert", "classification")
    known, unknown = row("classification", "ore", "rate"), {"text": "a", "label": "noise"}
    dev = jsonl(world.splits / "dev.jsonl", [known, unknown])
    said = refused(world, capsys, "train", *words("classification"))
    assert f"{dev}:2 has the label 'noise', which no training row has" in said
    assert "the labels are: heat, mass, speed" in said
    jsonl(world.data / "lessons.jsonl", [known])
    assert "every training row has the label 'speed'" in refused(world, capsys, "train", *words("classification"))


def test_an_evaluation_finds_the_task_of_its_model_and_refuses_another(world_of: Any, capsys: Said) -> None:
    world = world_of("bert", "classification")
    world.train(*words("classification", "max_steps=1"))
    assert "was tuned for task=classification, not seq2seq" in refused(world, capsys, "eval", "task=seq2seq")
    test = jsonl(world.splits / "test.jsonl", [{"text": "a", "label": "noise"}])
    assert f"{test}:1 has the label 'noise'" in refused(world, capsys, "eval", "splits=[test]")
    told = refused(world, capsys, "eval", "splits=[dev]", "generation.num_beams=2")
    assert "generation: {...} is not supported with task=classification" in told
