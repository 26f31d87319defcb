"""What the libraries take, read from their source text, is what their classes take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from src.utils.signatures import OWNED, PASSTHROUGH, Target, arguments_of, check_passthrough

FILLED_IN_BY_PEFT = {"peft_version", "auto_mapping"}  # no person sets them

ASK = """
import inspect, json
from peft import LoraConfig
from transformers import GenerationConfig, TrainingArguments

taken = {
    "peft": list(inspect.signature(LoraConfig).parameters),
    "trainer": list(inspect.signature(TrainingArguments).parameters),
    "generation": [name for name in vars(GenerationConfig()) if not name.startswith("_")],
}
print("TAKEN", json.dumps(taken))
"""


def read(key: str) -> set[str]:
    return {name for target in PASSTHROUGH[key] for name in arguments_of(target)}


def test_the_arguments_read_are_those_that_the_classes_take() -> None:
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("TAKEN")]
    taken = {key: set(names) for key, names in json.loads(line.removeprefix("TAKEN")).items()}
    assert read("peft") == taken["peft"] - FILLED_IN_BY_PEFT
    assert read("trainer") == taken["trainer"]
    assert read("generation") == taken["generation"]


@pytest.mark.parametrize("key", PASSTHROUGH)
def test_every_argument_with_a_setting_of_its_own_exists(key: str) -> None:
    assert set(OWNED[key]) <= read(key)


def test_reading_imports_nothing_heavy() -> None:
    script = (
        "import sys; from src.utils.signatures import check_passthrough as c\n"
        "assert c('peft', {'peft': {'x': 1}}) and c('trainer', {'trainer': {'x': 1}})\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_arguments_are_fields_parameters_and_what_is_popped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "somelib").mkdir()
    (tmp_path / "somelib/__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "somelib/config.py").write_text(
        "class Other:\n    other: int\n"
        "class Config:\n    a: int = 1\n    _private: int = 2\n    NOT_A_FIELD = 3\n"
        "    def __init__(self, b, *, c=1, **kwargs):\n        self.d = kwargs.pop('d', None)\n"
        "        kwargs.pop('_e')\n"
        "    def method(self, f): self.g = {}.pop('g')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert arguments_of(Target("somelib", "config.py", "Config")) == {"a", "b", "c", "d"}


def test_a_library_that_is_not_installed_is_named() -> None:
    with pytest.raises(ModuleNotFoundError, match="nolib is not installed; make install installs it"):
        arguments_of(Target("nolib", "x.py", "X"))


def test_nothing_to_check_is_no_problem() -> None:
    assert check_passthrough("peft", {}) == check_passthrough("peft", {"peft": {}}) == []
    assert check_passthrough("peft", {"peft": 3}) == []  # the schema says so
