"""Commands in messages are written as the person types them."""

import pytest

from src.utils.commands import command

RUN = "2026-01-15_10-30-45"
SETTINGS = ("--config-name", "own", "dataset_path=my data.jsonl", "--multirun", "+lora_r=8")


@pytest.mark.parametrize(
    ("program", "stage", "words", "expected"),
    [
        ("", "eval", (RUN,), f"python -m src.main eval {RUN}"),
        ("assay", "eval", (RUN,), f"assay eval {RUN}"),
        ("make", "eval", (RUN,), f"make eval RUN={RUN}"),
        ("make", "compare", (RUN, "baseline"), f"make compare A={RUN} B=baseline"),
        ("make", "runs", ("diff", "a", "b"), "make runs ARGS='diff a b'"),
        (
            "make",
            "train",
            SETTINGS,
            "make train TRAIN_CONFIG=own dataset_path='my data.jsonl' ARGS='--multirun +lora_r=8'",
        ),
        (
            "assay",
            "train",
            SETTINGS,
            "assay train --config-name own dataset_path='my data.jsonl' --multirun +lora_r=8",
        ),
        ("make", "ssh-eval-baseline", ("--config-name", "x"), "make ssh-eval-baseline BASELINE_CONFIG=x"),
    ],
)
def test_a_command_is_written_as_the_person_types_it(program, stage, words, expected, monkeypatch):
    monkeypatch.setenv("ASSAY_PROGRAM", program)
    assert command(stage, *words) == expected


def test_settings_are_quoted_and_none_is_left_out(monkeypatch):
    monkeypatch.delenv("ASSAY_PROGRAM", raising=False)
    assert command("train", resume=True, lr=1e-4, data=None) == "python -m src.main train resume=true lr=0.0001"
