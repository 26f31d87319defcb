"""What `make TARGET NAME=VALUE ...` runs: the Makefile calls `python scripts/target.py GOALS TARGET PYTHON`.

The words are read and checked by scripts/make_words.py. Standard library only, in Python 3.8's grammar.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.make_words import (
    ENVIRONMENT,
    RUNS,
    is_setting,
    problems,
    python_problems,
    read_makeflags,
    split_args,
    variables,
)
from src.stages import STAGES
from src.utils.commands import config_variable

SWITCHES = {"ALL": "--all", "DETACH": "--detach", "YES": "--yes"}  # on unless OFF
OFF = {"", "0", "no", "false"}
FLAGS = {"ALSO": "--also", "GRACE": "--grace", "PORT": "--port"}  # --also=VALUE

DEMO = "models/SmolLM2-135M-Instruct"
TINY = "models/tiny-random-"
BUILD = ["scripts/build_demo_model.py"]
ON_BASE_MODELS = {"check-data", "plan", "train", "eval-baseline"}
DEMO_SETTINGS = {  # of `make demo`: each of its stages takes some of the settings
    "eval": {"output_dir", "artifacts_dir", "bf16", "cuda_visible_devices"},
    "publish": {"output_dir", "artifacts_dir", "cuda_visible_devices"},
}


def main(argv: list[str]) -> int:
    """Check the words of make for all its `goals`; then run the target, if one is given, with `python`."""
    goals, target, python = (argv[0] or "help").split(), argv[1:2], argv[2:]
    flags, typed = read_makeflags(os.environ.get("MAKEFLAGS", ""))
    found = problems(goals, typed) or python_problems(target)
    if found:
        print("\n".join(found), file=sys.stderr)
        return 2
    if not target:
        return 0
    set_environment(target[0], typed)
    commands = [[*python, *command] for command in commands_of(target[0], typed)]
    return run(commands, dry=bool(set("nqt") & set(flags)))


# What runs


def set_environment(target: str, typed: dict[str, str]) -> None:
    """Export the variables of ENVIRONMENT that were typed, exactly so; remove what make exported besides."""
    for name, value in typed.items():
        os.environ.pop(name, None)
        if name in ENVIRONMENT or name == "MESSAGE":
            os.environ[name] = value  # a setting is never exported: question_key would be redacted as a secret
    for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):
        os.environ.pop(name, None)
    if target != "test":
        os.environ["ASSAY_PROGRAM"] = "make"  # messages name commands as make TARGET


def commands_of(target: str, typed: dict[str, str]) -> list[list[str]]:
    """The calls of Python that a target makes, one after the other."""
    settings = [f"{name}={value}" for name, value in typed.items() if is_setting(name)]
    typed = {name: value for name, value in typed.items() if name in variables(target)}  # not those of other goals
    args = split_args(typed.get("ARGS", "")) or []
    if target == "convert":
        return [["scripts/convert_data.py", *(path for word in args for path in expanded(word))]]
    if target == "test":
        tools = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"])
        return [*(["-m", *tool] for tool in tools), ["-m", "pytest", "-n", "auto", "--dist", "worksteal", *args]]
    if target == "clean":
        return [["scripts/clean.py", *switches(typed, "YES")]]
    if target == "model":
        return build(DEMO)
    if target == "tiny-model":
        return build(f"{TINY}llama")
    if target == "demo":
        stages = [["train", *settings, *args]]
        for stage, kept in DEMO_SETTINGS.items():
            stages.append([stage, *(setting for setting in settings if setting.split("=")[0] in kept)])
        return [*build(DEMO), *(["-m", "src.main", *words] for words in stages)]
    words = [*stage_words(target, typed), *settings, *args]
    models = base_models(target, words) if target in ON_BASE_MODELS else []
    return [*(call for model in models for call in build(model)), ["-m", "src.main", target, *words]]


def stage_words(target: str, typed: dict[str, str]) -> list[str]:
    """The words that the variables of a target stand for."""
    stage = target[4:] if target.startswith("ssh-") else target
    words = []
    if typed.get(config_variable(stage)):
        words += ["--config-name", typed[config_variable(stage)]]
    words += switches(typed, "ALL", "DETACH")
    words += [f"{flag}={typed[name]}" for name, flag in FLAGS.items() if typed.get(name)]
    if stage == "data-push" and typed.get("MESSAGE"):
        words.append("message=${oc.env:MESSAGE}")  # Hydra's grammar does not accept an apostrophe
    named = [typed[name] for name in RUNS if name in typed]
    if stage == "runs":
        words += ["diff", *named] if "A" in typed or "B" in typed else [f"--run={run}" for run in named]
    elif stage != target and stage in STAGES and not STAGES[stage].positionals:
        words += [f"--run={run}" for run in named]  # the id of the new run
    else:
        words += named
    return words


def switches(typed: dict[str, str], *names: str) -> list[str]:
    return [SWITCHES[name] for name in names if typed.get(name, "").lower() not in OFF]


def expanded(word: str) -> list[str]:
    """The files that a word of `make convert` matches."""
    return sorted(glob.glob(os.path.expanduser(word))) or [word]


def base_models(stage: str, words: list[str]) -> list[str]:
    """The base models that the settings name: by the stage's file, then presets, then the command line.

    None if that is not known without Hydra: for a resumed or named run, and a file that does not exist.
    """
    folder, name, settings = "configs", STAGES[stage].config_name, {}
    left = iter(words)
    for word in left:
        key, equals, value = word.partition("=")
        if key in {"--config-name", "-cn"}:
            name = value or next(left, "")
        elif key in {"--config-path", "-cp"}:
            folder = value or next(left, "")
        elif equals:
            settings[key.lstrip("+")] = value.strip("'\"")
    if settings.get("resume", "auto") not in {"auto", "never"} or "model_path" in settings:
        return []
    models = [DEMO]  # the default of the schema
    files = [[name if name.endswith((".yaml", ".yml")) else f"{folder}/{name}.yaml"]]
    for group in ("model", "experiment"):
        presets = settings.get(group, "").split(",") if group in settings else []
        files.append([p if p.endswith((".yaml", ".yml")) else f"configs/{group}/{p}.yaml" for p in presets])
    for several in files:
        if not all(map(os.path.isfile, several)):
            return []
        texts = [Path(path).read_text(encoding="utf-8", errors="replace") for path in several]
        found = [m for text in texts for m in re.findall(r"^model_name:\s*['\"]?([^\s'\"#]+)", text, re.M)]
        if "null" in found and glob.glob(f"{settings.get('output_dir', 'outputs')}/runs/*/manifest.json"):
            return []  # the base model of the newest run
        models = [model for model in found if model != "null"] or models
    return settings["model_name"].split(",") if "model_name" in settings else models


def build(model: str) -> list[list[str]]:
    """The call that builds one of the demo's models, unless it is there or another model is meant."""
    model = os.path.normpath(model)
    if os.path.isfile(f"{model}/config.json"):
        return []
    if model == DEMO:
        return [BUILD]
    return [[*BUILD, "--tiny", model[len(TINY) :]]] if model.startswith(TINY) else []


def run(commands: Sequence[list[str]], dry: bool) -> int:
    """Run commands until one fails; the last replaces this process. `dry`: only print them. Returns: exit code."""
    if dry:
        print("\n".join(map(join, commands)))
        return 0
    for number, command in enumerate(commands, 1):
        if len(commands) > 1:
            print(join(command), flush=True)
        try:
            if number == len(commands):
                os.execvp(command[0], command)
            code = wait(subprocess.Popen(command))
        except OSError as error:
            print(f"{command[0]} cannot be run: {error.strerror}; make install makes .venv", file=sys.stderr)
            return 2
        if code:
            return code if code > 0 else 128 - code
    return 0


def wait(child: subprocess.Popen[bytes]) -> int:
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:  # the child gets it too, and ends in its own way
            continue


def join(command: list[str]) -> str:
    return " ".join(map(shlex.quote, command))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
