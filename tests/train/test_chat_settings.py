"""chat_template and chat_template_kwargs: one model is trained, evaluated, compared and published with both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from src.eval import reevaluate
from src.schema import GateArgs
from tests.fixtures import World

pytest_plugins = ["tests.fixtures"]

Capture = pytest.CaptureFixture[str]
TEMPLATE = """\
{#- A template of one's own -#}
{%- for message in messages -%}
{{- message.role + (' (' + tone + ')' if tone is defined else '') + ': ' + message.content -}}
{{- eos_token + '\n' if message.role == 'assistant' else '\n' -}}
{%- endfor -%}
{{- 'assistant' + (' (' + tone + ')' if tone is defined else '') + ': ' if add_generation_prompt -}}
"""
CALM = {"tone": "calm"}


def test_a_run_keeps_its_template_and_its_variables_to_the_end(
    world: World, tmp_path: Path, capsys: Capture
) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(TEMPLATE)
    run = world.train(f"chat_template={own}", "chat_template_kwargs={tone: calm}")
    assert "user (calm): Top of " in capsys.readouterr().out  # the example of the report
    own.unlink()  # the model folder has its text
    assert (run.model / "chat_template.jinja").read_text() == TEMPLATE  # its last newline too
    recorded = json.loads((run.model / "tokenization.json").read_text())
    assert recorded["chat_template_kwargs"] == CALM and run.manifest["tokenization"] == recorded

    assert world.call("eval") == 0
    assert 'chat_template_kwargs={"tone": "calm"}' in capsys.readouterr().out
    conditions = json.loads((run.path / "metrics.json").read_text())["conditions"]
    assert conditions["tokenization"] == recorded
    (cached,) = (world.artifacts / "metrics").iterdir()  # the base model, with the template of the run
    shutil.rmtree(cached)
    assert world.call("eval-baseline") == 0
    assert f"chat template: {run.model}/chat_template.jinja, in place of that of" in capsys.readouterr().out
    assert list((world.artifacts / "metrics").iterdir()) == [cached]
    assert (run.path / "comparison.json").is_file()

    assert world.call("eval", "chat_template_kwargs={tone: loud}") == 2
    sentence = 'chat_template_kwargs is {"tone": "loud"}, and the model was tuned with {"tone": "calm"}; '
    assert sentence + "remove the setting, or set allow_tokenizer_mismatch=true" in capsys.readouterr().err
    assert world.call("eval", "chat_template=alpaca") == 2
    assert "chat_template=alpaca differs from the one that the model was tuned with" in capsys.readouterr().err

    assert world.call("publish", "publish_name=calm") == 0  # the saved model reproduces the predictions
    published = world.artifacts / "models" / "calm" / run.id
    card = (published / "README.md").read_text()
    assert 'Its chat template is rendered with `{"tone": "calm"}`.' in card
    assert "return_dict=True,\n    **{'tone': 'calm'},\n)" in card
    assert "chat_template: own.jinja" in card
    assert reevaluate.load_chat(published, "causal_lm").template_kwargs == CALM
    assert world.call("eval", str(published), "splits=[test]") == 0  # a model without a run

    words = (
        "chat_template_kwargs={tone: loud}",
        "allow_tokenizer_mismatch=true",
        "splits=[test]",
        "baseline=never",
    )
    assert world.call("eval", *words) == 0
    assert "warning: chat_template_kwargs is" in capsys.readouterr().out
    again = reevaluate.of_run(run, GateArgs(metric="exact_match", split="test"), [])
    assert again.chat and again.chat.chat_template_kwargs == {"tone": "loud"}  # as publish repeats it

    run.update(status="failed")
    resumed = ("train", f"resume={run.id}", f"chat_template={own}")
    own.write_text(TEMPLATE)
    assert world.call(*resumed, "chat_template_kwargs={tone: loud}") == 2
    assert "chat_template_kwargs is {'tone': 'loud'}, but the run was started with" in capsys.readouterr().err
    own.write_text(TEMPLATE + "{# changed #}")
    assert world.call(*resumed, "chat_template_kwargs={tone: calm}") == 2
    assert f"run {run.id} was started with another tokenization" in capsys.readouterr().err


def test_a_variable_that_the_template_does_not_read_is_refused(world: World, capsys: Capture) -> None:
    assert world.call("train", "chat_template_kwargs={enable_thinking: false}") == 2
    said = capsys.readouterr().err
    assert "enable_thinking is not a variable of the chat template; its variables: none" in said
    assert world.runs == []


def test_a_named_template_whose_end_is_no_token_is_refused(world: World, capsys: Capture) -> None:
    assert world.call("train", "chat_template=gemma") == 2
    said = capsys.readouterr().err
    assert "chat_template=gemma ends an answer with <end_of_turn>, which is no token of" in said
    assert "choose one that ends with the tokenizer's own token: alpaca, mistral, vicuna, zephyr" in said
    assert world.runs == []
