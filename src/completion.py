"""Tab completion: what can follow on a command line, for bash, zsh and fish.

The shells ask `completion SHELL --line LINE` at each Tab: nothing but the standard library is imported. Settings
and their choices are read from configs/schemas, the files that editors use.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from . import chat_templates, config_files, shell_scripts
from .errors import UserError, did_you_mean
from .outcome import FLAGS as GLOBAL_FLAGS
from .stages import STAGES, import_function

FLAGS = {  # of every stage, with what they are
    "--help": "list the settings", "--config-name": "another configuration file", "--config-path": "its folder",
    "--cfg": "print the configuration", "--multirun": "one job for each combination of key=a,b",
}  # fmt: skip
RUN_WORDS = {"resume": ["auto", "never", "latest"], "run_b": ["baseline", "latest"]}
RUN_SETTINGS = {"model_path", "run_a", *RUN_WORDS}
PATHS = re.compile(r"(_path|_dir|^model_name|^chat_template|^training_info)$")  # settings that name paths
RUN_VARIABLES = {"RUN", "A", "B"}  # of make

Candidate = tuple[str, str]  # a word, and what it is


def completion_command(words: list[str]) -> str:
    """The output of `completion SHELL`, its script; of `completion SHELL --line LINE [BREAKS]`, the candidates.

    Raises: UserError if SHELL is not known.
    """
    shell, *rest = words or [""]
    if shell not in shell_scripts.SCRIPTS:
        guess = did_you_mean(shell, shell_scripts.SCRIPTS) if shell else ""
        raise UserError(
            f"completion {shell}".rstrip() + f" is not known{guess}", hint="write completion bash|zsh|fish"
        )
    if rest[:1] != ["--line"]:
        return shell_scripts.script(shell)
    line, breaks = [*rest[1:], "", ""][:2]
    return "\n".join(_formatted(shell, line, breaks))


def _formatted(shell: str, line: str, breaks: str) -> Iterator[str]:
    """The candidates as a shell reads them. bash replaces only what follows the last of its word breaks."""
    before, word = split_line(line)
    cut = max((word.rfind(mark) + 1 for mark in breaks if mark in "=:"), default=0) if shell == "bash" else 0
    for found, about in dict(candidates(before, word)).items():
        if not found.startswith(word):
            continue
        if shell == "bash":
            yield re.sub(r"([^\w@%+=:,./~-])", r"\\\1", found[cut:]) + ("" if found[-1:] in "=/." else " ")
        else:
            yield f"{found}\t{about}"


def split_line(line: str) -> tuple[list[str], str]:
    """The words before the cursor, without what starts the program, and the word at the cursor."""
    for closing in ("", '"', "'"):
        try:
            words = shlex.split(line + closing)
            break
        except ValueError:
            continue
    else:
        words = line.split()
    word = words.pop() if words and not line[-1:].isspace() else ""
    while words and re.match(r"[A-Za-z_]\w*=", words[0]):  # variables for the command
        words.pop(0)
    if words and "python" in words[0] and "-m" in words:
        words = words[words.index("-m") + 1 :]
    return words, word


def candidates(before: list[str], word: str) -> Iterator[Candidate]:
    """What can follow the words `before` and complete `word`."""
    program, *words = before or [""]
    if Path(program).name == "make":
        yield from _make_candidates([w for w in words if not w.startswith("-")], word)
    elif not words:
        yield from _commands()
    else:
        yield from _command_candidates(words[0], words[1:], word)


def _commands() -> Iterator[Candidate]:
    yield from ((name, stage.summary) for name, stage in STAGES.items())
    yield from import_function(".main:UTILITIES").items()
    yield from ((name, command.summary) for name, command in import_function(".remote.commands:COMMANDS").items())
    yield from ((f"ssh-{name}", f"{stage.summary[:-1]}, on the server.") for name, stage in STAGES.items())


def _command_candidates(name: str, given: list[str], word: str) -> Iterator[Candidate]:
    stage = name.removeprefix("ssh-")
    if stage in STAGES:
        yield from _stage_candidates(stage, given, word)
    if name.startswith("ssh-") or name == "push":
        remote = import_module(".remote.commands", __package__)
        flags = remote.COMMANDS[name].flags if name in remote.COMMANDS else remote.STAGE_FLAGS
        yield from ((flag if flag in remote.BARE_FLAGS else f"{flag}=", "") for flag in flags)
    elif name == "runs":
        yield from [("diff", "compare two runs"), ("--sort", "by a column or a score")] if not given else []
        yield from _runs(given) if given[:1] == ["diff"] else []
    elif name == "schema":
        yield from ((each, stage.summary) for each, stage in STAGES.items())
    elif name == "completion":
        yield from ((shell, "") for shell in shell_scripts.SCRIPTS)


def _stage_candidates(stage: str, given: list[str], word: str) -> Iterator[Candidate]:
    """Settings, presets, positionals and flags of a stage, or the value of what is being typed."""
    own = STAGES[stage].flags
    last = given[-1] if given else ""
    key, equals, _ = word.partition("=")
    if last in FLAGS.keys() - {"--help", "--multirun"} or (last in own and not own[last].value):
        yield from _values(stage, last, given, word)
    elif word.startswith("-"):
        yield from FLAGS.items()
        yield from ((flag, "") for flag in sorted(GLOBAL_FLAGS))
        yield from ((flag, f"sets {about.setting}") for flag, about in own.items())
    elif equals:
        yield from (
            (f"{key}={value}", about)
            for value, about in _values(stage, key.lstrip("+"), given, word[len(key) + 1 :])
        )
    else:
        positionals = STAGES[stage].positionals[sum("=" not in w and not w.startswith("-") for w in given) :]
        yield from _values(stage, positionals[0], given, word) if positionals else []
        yield from _keys(stage, given, word)


def _keys(stage: str, given: list[str], word: str) -> Iterator[Candidate]:
    """`lr=` for each setting and group of presets that is not given yet; `gate.` for what is in the group."""
    typed = {w.partition("=")[0] for w in given}
    groups = {word[: word.rfind(".") + 1]} if "." in word else {""}
    for key, node in _settings(stage).items():
        head, dot, _ = key.rpartition(".")
        if f"{head}{dot}" in groups and key not in typed:
            yield f"{key}=", node.get("description", "")
        elif dot and "" in groups:
            yield f"{head.partition('.')[0]}.", "a group of settings"
    if "" in groups:
        yield from (
            (f"{group}=", f"presets: {', '.join(_presets(group))}") for group in _groups() if group not in typed
        )


def _values(stage: str, key: str, given: list[str], value: str) -> Iterator[Candidate]:
    """Values of a setting, a group of presets or a flag. After a comma, of a sweep, the next one."""
    head, comma, _ = value.rpartition(",")
    flag = STAGES[stage].flags.get(key)
    key = flag.setting if flag else key
    if key == "--config-name":
        yield from ((name, "") for name in _config_files())
    elif key == "--cfg":
        yield from ((name, "") for name in ("job", "hydra", "all"))
    elif key in RUN_SETTINGS:
        yield from ((choice, "") for choice in RUN_WORDS.get(key, ["latest"]))
        yield from _runs(given)
    if key == "chat_template":
        yield from ((f"{head}{comma}{name}", "") for name in chat_templates.names())
    found = _presets(key) or _choices(_settings(stage).get(key, {}))
    yield from ((f"{head}{comma}{choice}", about) for choice, about in found.items())
    if PATHS.search(key) or key.startswith("--config-") or value.startswith(("./", "/", "~")):
        yield from ((path, "") for path in _paths(value))


def _runs(given: list[str]) -> Iterator[Candidate]:
    """The runs of the output folder that is typed, the newest first."""
    typed = dict(word.partition("=")[::2] for word in given)
    folder = Path(typed.get("output_dir", "outputs")) / "runs"
    names = os.listdir(folder) if folder.is_dir() else []
    for name in sorted(names, reverse=True):
        try:
            manifest = json.loads((folder / name / "manifest.json").read_text(encoding="utf-8"))
            yield name, f"{manifest['stage']}, {manifest['status']}"
        except (OSError, ValueError, KeyError, TypeError):  # not a run, or a damaged one
            continue


def _paths(typed: str) -> Iterator[str]:
    """Files and folders that begin with what is typed."""
    head, tail = os.path.split(typed)
    try:
        entries = sorted(os.scandir(os.path.expanduser(head) or "."), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith(tail) and (tail or not entry.name.startswith(".")):
            yield os.path.join(head, entry.name) + ("/" if _is_folder(entry) else "")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that may not be read
        return False


# Settings and presets


@cache
def _settings(stage: str) -> dict[str, Any]:
    """The schema of each setting of a stage, by its dotted name. Former names are left out."""
    schemas = config_files.SHIPPED / "schemas"
    names = (stage.replace("-", "_"), STAGES[stage].config_name)
    path = next(p for p in (schemas / f"{name}.json" for name in names) if p.is_file())
    properties = json.loads(path.read_text(encoding="utf-8"))["properties"]
    return dict(_flat({k: v for k, v in properties.items() if k not in {"hydra", "defaults"}}, ""))


def _flat(properties: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, node in properties.items():
        group = next((option["properties"] for option in node.get("anyOf", []) if "properties" in option), None)
        if not node.get("deprecated"):
            yield from _flat(group, f"{prefix}{key}.") if group else [(prefix + key, node)]


def _choices(node: dict[str, Any]) -> dict[str, str]:
    """The values of a setting that has a fixed choice."""
    found: dict[str, str] = {}
    for option in node.get("anyOf", [node]):
        boolean = ["true", "false"] if option.get("type") == "boolean" else []
        constant = [option["const"]] if "const" in option else []
        found |= dict.fromkeys([*boolean, *constant, *option.get("enum", [])], "")
    return found


def _groups() -> list[str]:
    return sorted({name.partition("/")[0] for name in config_files.names() if "/" in name})


def _presets(group: str) -> dict[str, str]:
    return dict.fromkeys(config_files.presets(group), "")


def _config_files() -> list[str]:
    return [name for name in config_files.names() if "/" not in name]


# make


def _make_candidates(words: list[str], word: str) -> Iterator[Candidate]:
    """Targets; after one, its variables and the settings of its stage."""
    target = next((w for w in words if "=" not in w), None)
    if not Path("scripts/make_words.py").is_file():  # another Makefile, or none
        return
    if target is None:
        text = Path("Makefile").read_text(encoding="utf-8")
        yield from re.findall(r"^([a-z-]+):.*?## (.*)", text, re.MULTILINE)
        return
    targets = import_module("scripts.make_words")  # of the checkout whose Makefile it is
    name, equals, value = word.partition("=")
    stage = "train" if target == "demo" else target.removeprefix("ssh-")
    if equals and name in RUN_VARIABLES:
        yield from ((f"{name}={run}", about) for run, about in [("latest", ""), *_runs(words)])
    elif equals and name.endswith("_CONFIG"):
        yield from ((f"{name}={found}", "") for found in [*_config_files(), *_paths(value)])
    elif not equals:
        yield from ((f"{variable}=", "") for variable in targets.variables(target))
    if stage in STAGES and targets.takes_settings(target) and (equals or not word.startswith("-")):
        yield from (c for c in _stage_candidates(stage, words, word) if "=" in c[0] or c[0].endswith("."))
