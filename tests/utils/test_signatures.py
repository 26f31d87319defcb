"""What the libraries take, read from their source text, is what their classes take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from src.model.methods import METHODS, PEFT_OWNED_BY_SETTING
from src.utils.signatures import (
    OWNED_BY_SETTING,
    PASSTHROUGH,
    LibraryClass,
    check_passthrough,
    class_arguments,
    peft_arguments,
)

# the parent of LoHaConfig is defined outside of a config.py
PEFT_CLASSES = sorted({"LoHaConfig", *(m.config for m in METHODS.values() if m.config)})

FILLED_IN_BY_PEFT = {"peft_version", "auto_mapping"}  # not set by users

ASK = """
import inspect, json, sys
import peft
from transformers import GenerationConfig, TrainingArguments

accepted = {name: list(inspect.signature(getattr(peft, name)).parameters) for name in sys.argv[1:]} | {
    "trainer": list(inspect.signature(TrainingArguments).parameters),
    "generation": [name for name in vars(GenerationConfig()) if not name.startswith("_")],
}
print("ACCEPTED", json.dumps(accepted))
"""


def test_the_parsed_arguments_are_those_of_the_classes() -> None:
    done = subprocess.run([sys.executable, "-c", ASK, *PEFT_CLASSES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ACCEPTED")]
    accepted = {key: set(names) for key, names in json.loads(line.removeprefix("ACCEPTED")).items()}
    for name in PEFT_CLASSES:
        assert peft_arguments(name) == accepted[name] - FILLED_IN_BY_PEFT
    assert class_arguments(PASSTHROUGH["trainer"]) == accepted["trainer"]
    assert class_arguments(PASSTHROUGH["generation"]) == accepted["generation"]


@pytest.mark.parametrize("key", OWNED_BY_SETTING)
def test_every_argument_that_a_setting_determines_exists(key: str) -> None:
    assert set(OWNED_BY_SETTING[key]) <= class_arguments(PASSTHROUGH[key])


@pytest.mark.parametrize("method", [m for m in METHODS.values() if m.config])
def test_every_argument_that_a_method_sets_exists(method: Any) -> None:
    known = peft_arguments(method.config)
    assert {*method.fixed, *method.keys.values()} <= known
    assert set(PEFT_OWNED_BY_SETTING) <= peft_arguments("LoraConfig")


def test_a_class_that_peft_does_not_have_is_named() -> None:
    with pytest.raises(LookupError, match="peft has no NoSuchConfig"):
        peft_arguments("NoSuchConfig")


def test_reading_imports_nothing_heavy() -> None:
    script = (
        "import sys; from src.utils.signatures import check_passthrough as c\n"
        "from src.model.methods import METHODS, problems\n"
        "assert all(problems({'method': m, 'peft': {'x': 1}}) for m in METHODS)\n"
        "assert c('generation', {'generation': {'x': 1}})\n"
        "from src.train.arguments import problems\n"
        "assert problems({'trainer': {'x': 1, 'seed': 1, 'eval_delay': 'x'}})\n"
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
    assert class_arguments(LibraryClass("somelib", "config.py", "Config")) == {"a", "b", "c", "d"}


def test_a_library_that_is_not_installed_is_named() -> None:
    with pytest.raises(ModuleNotFoundError, match="nolib is not installed; make install installs it"):
        class_arguments(LibraryClass("nolib", "x.py", "X"))


def test_nothing_to_check_is_no_problem() -> None:
    assert check_passthrough("generation", {}) == check_passthrough("generation", {"generation": {}}) == []
    assert check_passthrough("generation", {"generation": 3}) == []  # the schema says so
