"""The first hour of five people in a fresh clone: `make`, their own data, and each command that `next:` names.

A tiny random model stands for theirs, so that an hour takes seconds. The tests ask whether what is judged and
published is theirs, not whether the model wins.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.first_hour.jobs import JOBS
from tests.fixtures import ROOT, locked, read_jsonl

pytest_plugins = ["tests.fixtures"]

DEMO_WORDS = ("INGOT", "TOP(", "SmolLM2", "data/eval")
LESSON = (
    "epochs=6", "batch_size=8", "lr=0.01", "lora_r=8", "lora_target_modules=null", "max_length=256", "bf16=false",
    "cuda_visible_devices=", "logging_steps=5",
)  # fmt: skip
LIMIT = 8  # commands that the chain of `next:` lines may take


@pytest.fixture(scope="session")
def tiny_classifier(common: Path) -> Path:
    """The folder of a tiny random BERT with its tokenizer."""
    from scripts.tiny_model import build

    folder = common / "models" / "tiny-bert"
    with locked(folder):
        if not folder.is_dir():
            build(
                folder,
                (ROOT / "data" / "ingot.jsonl").read_text(encoding="utf-8").splitlines(),
                architecture="bert",
            )
    return folder


class Clone:
    """The tracked files of this repository in a folder of its own, and a person who types `make` there."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        names = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, check=True,
        ).stdout.decode().split("\0")  # fmt: skip
        for name in filter(None, names):
            if (ROOT / name).is_file() and not name.startswith("tests/"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        self.model = model

    def make(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run make through a pipe, as for a terminal of 80 columns."""
        return subprocess.run(
            ["make", *words, f"PY={sys.executable}"], cwd=self.folder, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
            env={k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL"}}
            | {"COLUMNS": "80", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def follow(self, said: str) -> list[tuple[str, subprocess.CompletedProcess[str]]]:
        """Type what each `next:` line says, until one names no command of make or publishing has answered."""
        done = []
        while len(done) < LIMIT and (line := next_line(said)) and line.startswith("make "):
            words = shlex.split(line)[1:]
            result = self.make(*words)
            done.append((line, result))
            said = result.stdout
            if words[0].startswith("publish"):
                break
        return done


def next_line(said: str) -> str:
    """The command that the last line names. Asserts that there is one, and that it is the last line."""
    lines = [line for line in said.splitlines() if line.strip() and not line.startswith("make:")]
    assert lines and lines[-1].startswith("next: "), said[-2000:]
    return lines[-1].removeprefix("next: ").strip()


@pytest.mark.parametrize("name", JOBS)
def test_a_person_reaches_a_verdict_on_their_own_questions(
    name: str, tmp_path: Path, tiny: Path, tiny_classifier: Path
) -> None:
    job = JOBS[name]
    clone = Clone(tmp_path / "clone", tiny_classifier if job.model == "bert" else tiny)
    job.write(clone.folder / "mine" / name)
    settings = (f"model_name={clone.model}", *LESSON, *job.settings)

    checked = clone.make("check-data", *settings)
    assert checked.returncode == 0, checked.stdout
    assert next_line(checked.stdout).startswith("make train ")
    trained = clone.make("train", *settings)
    assert trained.returncode == 0, trained.stdout
    (run,) = [p for p in (clone.folder / "outputs" / "runs").iterdir() if not p.is_symlink()]
    commands = clone.follow(trained.stdout)

    assert commands and commands[0][0].startswith("make eval ")
    assert all(result.returncode in (0, 3, 4) for _, result in commands), commands[-1][1].stdout
    judged = _predictions(run)
    assert {split: len(rows) for split, rows in judged.items()} == job.splits
    texts = json.dumps(judged, ensure_ascii=False)
    assert texts.count(job.own) >= sum(job.splits.values())
    assert not [word for word in DEMO_WORDS if word in texts]
    evaluated = commands[0][1].stdout
    for split, rows in job.splits.items():
        assert re.search(rf"\b{split}, {rows} rows\b", evaluated), evaluated
    assert json.loads((run / "comparison.json").read_text())["verdict"]
    for said in (checked.stdout, trained.stdout, *(result.stdout for _, result in commands)):
        _check_text(said)


def _predictions(run: Path) -> dict[str, list[dict[str, object]]]:
    files = (run / "evals").glob("*/*.predictions.jsonl")
    return {file.name.split(".")[0]: read_jsonl(file) for file in files}


def _check_text(said: str) -> None:
    """What holds for whatever a command prints into a pipe."""
    assert "\r" not in said and "\x1b" not in said
    assert "Traceback" not in said
    assert not re.search(r"(?<![\d.,])1 (rows|files|steps|examples|epochs|warnings)\b", said), said
    for bar in ("Loading weights", "Writing model shards", "it/s"):
        assert bar not in said


def test_what_is_typed_is_heard(tmp_path: Path, tiny: Path) -> None:
    """A misspelt variable of make is refused, and a run that is named is the one that is published."""
    job = JOBS["formula"]
    clone = Clone(tmp_path / "clone", tiny)
    job.write(clone.folder / "mine" / "formula")
    settings = (f"model_name={tiny}", *job.settings, *LESSON, "max_steps=30")
    for typo, meant in (("LR=1e-4", "lr"), ("DATASET_PATH=mine", "dataset_path"), ("RUNS=x", "RUN")):
        refused = clone.make("publish" if typo.startswith("RUN") else "train", *settings, typo)
        assert refused.returncode == 2 and meant in refused.stdout, refused.stdout
        assert not (clone.folder / "outputs").exists()

    for seed in ("1", "2"):
        assert clone.make("train", *settings, f"seed={seed}").returncode == 0
    older, newer = sorted(p for p in (clone.folder / "outputs" / "runs").iterdir() if not p.is_symlink())
    for run in (older, newer):
        assert clone.make("eval", f"RUN={run.name}").returncode == 0
    published = clone.make("publish", f"RUN={older.name}", "force=true")
    assert published.returncode == 0, published.stdout
    folders = list((clone.folder / "artifacts" / "models").glob("*/2*"))
    assert [folder.name for folder in folders] == [older.name]
