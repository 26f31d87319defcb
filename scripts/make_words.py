"""What is typed after `make`: its words, and what is wrong with them. scripts/target.py runs what is right.

A NAME with a lower-case letter is a setting. The others are variables: each target takes its own, and those of
ENVIRONMENT. Only what is typed on make's command line counts, not what the shell exports: names such as RUN are
common. Values come from MAKEFLAGS, where make quotes them, so that every character arrives as it was typed.

Standard library only, in Python 3.8's grammar: it runs before anything is installed, to refuse a misspelt name.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from src.stages import STAGES
from src.utils.commands import config_variable

SUPPORTED = (3, 10)  # the oldest Python that requirements.txt can be installed in
SETUP = {"PY", "PYTHON", "VENV"}  # read by the Makefile itself
ENVIRONMENT = {
    *("HF_TOKEN", "HF_REPO_ID", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_CACHE"),
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TMPDIR", "ASSAY_RUN_ID", "ASSAY_RUN_FILE", "ASSAY_QUIET"),
    *("REMOTE_HOST", "REMOTE_DIR", "REMOTE_USER", "REMOTE_PORT", "REMOTE_KEY", "REMOTE_SSH_CONFIG", "REMOTE_ENV"),
    *("REMOTE_FINGERPRINT", "REMOTE_PYTHON", "REMOTE_TORCH_INDEX", "REMOTE_ALSO"),
    *("LAKEFS_ENDPOINT", "LAKEFS_ACCESS_KEY", "LAKEFS_SECRET_KEY"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"),
    *(
        "WANDB_PROJECT",
        "WANDB_ENTITY",
        "WANDB_API_KEY",
        "WANDB_MODE",
        "MLFLOW_TRACKING_URI",
        "MLFLOW_EXPERIMENT_NAME",
    ),
}
REMOTE = {
    "push": ("ALSO",), "ssh-init": (), "ssh-status": ("ALL",), "ssh-logs": ("RUN",), "ssh-attach": ("RUN",),
    "ssh-stop": ("RUN", "GRACE"), "ssh-fetch": ("RUN",), "ssh-shell": (), "ssh-tensorboard": ("PORT",),
}  # fmt: skip
OTHERS = {
    "runs": ("RUN", "A", "B"), "list-configs": (), "convert": (), "test": (), "demo": (), "clean": ("YES",),
    "model": (), "tiny-model": (),
}  # fmt: skip
PREPARING = ("help", "venv", "install", "lint", "format", "docs")
WITHOUT_ARGS = {"clean", "model", "tiny-model"}
RUNS = ("RUN", "A", "B")


def read_makeflags(text: str) -> tuple[str, dict[str, str]]:
    """The one-letter flags of make, and NAME=VALUE as typed, in their order."""
    words = re.findall(r"(?:\\.|[^\\ \t])+", text, re.DOTALL)
    flags = words[0] if words and not words[0].startswith("-") and not text.startswith(" ") else ""
    typed = {}
    for word in reversed(words[words.index("--") + 1 :] if "--" in words else []):
        name, _, value = re.sub(r"\\(.)", r"\1", word, flags=re.DOTALL).replace("$$", "$").partition("=")
        typed[name.rstrip(":")] = value
    return flags, typed


def flag_problems() -> list[str]:
    """Settings that make took for flags of its own: of `-lr=1e-4` it makes `-l r=1e-4`, a limit on the load."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:  # not Linux: MAKEFLAGS has what is left of -l
        words = ["make", "-lr"] if "-l0" in os.environ.get("MAKEFLAGS", "").split() else []
    names = {name for name in setting_names() if len(name) > 1}
    found = []
    for word in words[1:]:
        name, equals, value = word[1:].partition("=")
        if word.startswith("-") and not word.startswith("--") and (name in names or equals):
            setting = f"{name}={shown(name, value) if equals else 'VALUE'}"
            found.append(f"-{name}: make reads this as flags of its own; write {setting}, without the dash")
    return found


def is_setting(name: str) -> bool:
    return any(letter.islower() for letter in name)


def variables(target: str) -> list[str]:
    """The variables that a target takes, in addition to SETUP and ENVIRONMENT."""
    args = [] if target in WITHOUT_ARGS else ["ARGS"]
    if target in REMOTE:
        return [*REMOTE[target], *args]
    if target in OTHERS:
        return [*OTHERS[target], *args]
    stage = target[4:] if target.startswith("ssh-") else target
    if stage not in STAGES:  # venv, install, lint ...
        return []
    found = [] if stage == "data-push" else [config_variable(stage)]
    found += ["MESSAGE"] if stage == "data-push" else []
    found += ["A", "B", "RUN"] if stage == "compare" else ["RUN"] if STAGES[stage].positionals else []
    if stage != target:
        found += ["DETACH", "ALSO", *([] if "RUN" in found else ["RUN"])]
    return [*found, *args]


def takes_settings(target: str) -> bool:
    return target in {"demo", "runs"} or target in STAGES or (target.startswith("ssh-") and target[4:] in STAGES)


def problems(goals: Sequence[str], typed: dict[str, str]) -> list[str]:
    """What is wrong with the names that were typed: one sentence each, then the remedy."""
    if found := [*(unknown_goal(goal, goals, typed) for goal in goals if not is_goal(goal)), *flag_problems()]:
        return found
    called = "make " + " ".join(goals)
    known = {*SETUP, *(name for goal in goals for name in variables(goal))}
    found = []
    for name, value in typed.items():
        if is_setting(name):
            if not any(map(takes_settings, goals)):
                found.append(f"{name}={shown(name, value)}: {called} takes no settings")
        elif name not in known | ENVIRONMENT:
            found.append(f"{name} is not a variable of {called}{guess(name, value, goals, known)}")
        elif name in RUNS and (others := [goal for goal in goals if name not in variables(goal)]):
            found.append(f"{name} is not a variable of make {others[0]}{guess(name, value, others, known)}")
        elif name in RUNS and not value.strip():
            found.append(f"{name}= names no run")
        elif name == "B" and not {"A", "RUN"} & set(typed):
            found.append(f"B={value} is the second of two runs; write A=RUN B={shlex.quote(value)}")
        elif name == "ARGS" and split_args(value) is None:
            found.append(f"ARGS={value} opens a quotation that it does not close")
    if found:
        settings = "settings in lower case (lr=1e-4), and " if any(map(takes_settings, goals)) else ""
        found.append(f"{called} takes {settings}{listed(known - SETUP) or 'no variables'}")
    return found


def is_goal(word: str) -> bool:
    """Whether make has a rule for a word; the environment's files are among them."""
    known = {*REMOTE, *OTHERS, *PREPARING, *STAGES, *(f"ssh-{stage}" for stage in STAGES)}
    return word in known or bool(re.search(r"(^|/)(\.installed(-\w+)?|bin/python)$", word))


def unknown_goal(word: str, goals: Sequence[str], typed: dict[str, str]) -> str:
    """A sentence about a word that is neither NAME=VALUE nor a command, with what was probably meant."""
    commands = [goal for goal in goals if is_goal(goal)]
    settings = setting_names() if any(map(takes_settings, commands)) else []
    name, _, value = word.partition(":")
    if name in settings:
        value = value or "".join(goals[goals.index(word) + 1 :][:1]) or "VALUE"
        return f"{word} is not a command of make; a setting is written {name}={value}"
    if close := difflib.get_close_matches(word, [*REMOTE, *OTHERS, *PREPARING, *STAGES], n=1, cutoff=0.7):
        return f"{word} is not a command of make; did you mean make {close[0]}?"
    if commands and "RUN" in variables(commands[0]) and "RUN" not in typed:
        return f"{word} is not a command of make; a run is written RUN={shlex.quote(word)}"
    return f"{word} is not a command of make; make help lists them, and a setting is written NAME=VALUE"


def guess(name: str, value: str, goals: Sequence[str], known: Iterable[str]) -> str:
    """`; did you mean lr=1e-4?`, or what else to write."""
    settings = setting_names() if any(map(takes_settings, goals)) else []
    given = shown(name, value)
    if name.lower() in settings:
        return f"; did you mean {name.lower()}={given}?"
    if name in RUNS:
        return f"; resume={given} continues a run" if "train" in goals else ", which acts on no run by name"
    if close := difflib.get_close_matches(name, {*known, *ENVIRONMENT}, n=1, cutoff=0.65):
        return f"; did you mean {close[0]}?"
    if close := difflib.get_close_matches(name.lower(), settings, n=1, cutoff=0.7):
        return f"; did you mean {close[0]}={given}?"
    return f"; a variable of the environment is written before make: {name}=... make {' '.join(goals)}"


def setting_names() -> list[str]:
    """The names of all settings, read from their file: its libraries may not be installed yet."""
    schema = Path(__file__).resolve().parents[1] / "src" / "schema.py"
    presets = [folder.name for folder in (schema.parents[1] / "configs").iterdir() if folder.is_dir()]
    return [*re.findall(r"^    (\w+): ", schema.read_text(encoding="utf-8"), re.MULTILINE), *presets]


SECRET = re.compile(r"TOKEN|SECRET|KEY|PASSW|PW$|CREDENTIAL", re.IGNORECASE)  # in a name
TOKEN = re.compile(r"hf_|sk-|gh[a-z]_|glpat-|AKIA|eyJ|[\w+/=-]{32,}$")  # the beginning of a value


def shown(name: str, value: str) -> str:
    """A value quoted for a shell; `...` where it may be a secret."""
    return "..." if SECRET.search(name) or TOKEN.match(value) else shlex.quote(value)


def listed(names: Iterable[str]) -> str:
    *most, last = sorted(names) or [""]
    return f"{', '.join(most)} and {last}" if most else last


def python_problems(target: list[str]) -> list[str]:
    """A Python in which the requirements cannot be installed, unless the target needs none."""
    if sys.version_info >= SUPPORTED or target in (["clean"], ["help"]):
        return []
    version = ".".join(map(str, sys.version_info[:2]))
    return [
        f"{sys.executable} is Python {version}, and Assay needs 3.10 or newer; write make PYTHON=python3.12 ..."
    ]


def split_args(text: str) -> list[str] | None:
    """The words of ARGS, split as a shell does, with nothing in them replaced; None if a quotation is open."""
    try:
        return shlex.split(text)
    except ValueError:
        return None
