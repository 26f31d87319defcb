"""Commands of Assay, written as this person types them: for hints, messages and the `next:` line.

`make` and the console script `assay` say so in ASSAY_PROGRAM; without it, commands begin with python -m src.main.
"""

from __future__ import annotations

import os
import re
import shlex

from .. import MAIN

PROGRAM = "ASSAY_PROGRAM"
_NAME = re.compile(r"[A-Za-z][\w.\-/@]*=")  # what make takes as NAME=VALUE
_CONFIG_VARIABLES = {"eval-baseline": "BASELINE_CONFIG", "check-data": "TRAIN_CONFIG", "plan": "TRAIN_CONFIG"}


def program() -> str:
    """How this program is called in a usage line: `assay`, or `python -m src.main`."""
    return "assay" if os.environ.get(PROGRAM) == "assay" else f"python -m {MAIN}"


def command(stage: str, *words: str, **settings: object) -> str:
    """The command line of a stage, quoted for a shell: `make eval RUN=2026-01-15_10-30-45`.

    Args:
        words: positionals (a run, the two runs of `compare`), flags, and settings as `key=value`; empty ones are
            left out.
        settings: more settings; one that is None is left out.
    """
    given = [word for word in words if word]
    given += [f"{key}={_text(value)}" for key, value in settings.items() if value is not None]
    program = os.environ.get(PROGRAM, "")
    if program == "make":
        return _joined(["make", stage, *_make_words(stage, given)])
    return _joined([*([program] if program else ["python", "-m", MAIN]), stage, *given])


def _joined(words: list[str]) -> str:
    """One line for a shell; of NAME=VALUE, only the value is quoted."""
    return " ".join(_quoted(word) for word in words)


def _quoted(word: str) -> str:
    name = _NAME.match(word)
    return name[0] + shlex.quote(word[name.end() :]) if name and name.end() < len(word) else shlex.quote(word)


def _make_words(stage: str, words: list[str]) -> list[str]:
    """Positionals as RUN=, A= and B=, the configuration file as its variable, the rest but settings in ARGS."""
    names = ["A", "B"] if stage.endswith("compare") else ["RUN"] if stage not in {"runs", "list-configs"} else []
    variables: list[str] = []
    settings: list[str] = []
    rest: list[str] = []
    left = iter(words)
    for word in left:
        if word == "--config-name":
            variables.append(f"{config_variable(stage)}={next(left, '')}")
        elif _NAME.match(word):
            settings.append(word)
        elif names and not rest and not word.startswith("-"):
            variables.append(f"{names.pop(0)}={word}")
        else:
            rest.append(word)
    return [*variables, *settings, *([f"ARGS={shlex.join(rest)}"] if rest else [])]


def config_variable(stage: str) -> str:
    """The variable of make that names the configuration file of a stage, or of a stage on a server.

    scripts/make_words.py calls it in any Python from 3.8: it is called before the version is refused.
    """
    name = re.sub("^ssh-|-hf$", "", stage)
    return _CONFIG_VARIABLES.get(name, f"{name.upper()}_CONFIG")


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
