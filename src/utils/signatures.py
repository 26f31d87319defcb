"""The arguments that classes of heavy libraries accept, parsed from their source: importing them takes seconds."""

import ast
import importlib.util
from collections.abc import Mapping, Set
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import did_you_mean


class LibraryClass(NamedTuple):
    package: str
    file: str
    cls: str


TRAINER = LibraryClass("transformers", "training_args.py", "TrainingArguments")
GENERATION = LibraryClass("transformers", "generation/configuration_utils.py", "GenerationConfig")

PASSTHROUGH = {"trainer": TRAINER, "generation": GENERATION}

# Arguments that a setting of ours determines: of two values for one thing, one would be ignored.
OWNED_BY_SETTING = {
    "generation": {"max_new_tokens": "max_new_tokens", "max_length": "max_new_tokens"},
}


def check_passthrough(key: str, values: Mapping[str, Any]) -> list[str]:
    """The errors in the arguments under `key` (`trainer`, `generation`), one message each."""
    given = values.get(key) or {}
    if not isinstance(given, Mapping) or not given:
        return []  # the schema reports a wrong type
    target = PASSTHROUGH[key]
    return check_arguments(key, given, target.cls, class_arguments(target), OWNED_BY_SETTING[key])


def check_arguments(
    key: str, given: Mapping[str, Any], owner: str, known: Set[str], owned: Mapping[str, str]
) -> list[str]:
    """The errors in arguments of the class `owner`: unknown ones, and those that a setting of ours determines."""
    found = []
    for name in given:
        if name not in known:
            found.append(f"{key}.{name} is not an argument of {owner}{did_you_mean(str(name), known)}")
        elif name in owned:
            found.append(f"{key}.{name} is not supported: use {owned[name]}")
    return found


@cache
def peft_arguments(cls: str) -> frozenset[str]:
    """Argument names of a configuration class of peft, including those of its parents.

    Raises: ModuleNotFoundError if peft is not installed; LookupError if it has no such class.
    """
    if cls == "PeftConfigMixin":
        return frozenset({"peft_type", "task_type"})  # peft sets the others
    folder = package_folder("peft")
    patterns = ("config.py", "tuners/*/config.py", "tuners/*.py")
    for path in (path for pattern in patterns for path in sorted(folder.glob(pattern))):
        if f"\nclass {cls}(" in (text := path.read_text(encoding="utf-8")):
            found = _class_node(text, cls)
            parents = (base.id for base in found.bases if isinstance(base, ast.Name))
            return frozenset(_argument_names(found)).union(*map(peft_arguments, parents))
    raise LookupError(f"peft has no {cls}")


def class_arguments(target: LibraryClass) -> set[str]:
    """Argument names of a class: its annotated fields, and what `__init__` accepts or pops from kwargs.

    Raises: ModuleNotFoundError if the package is not installed.
    """
    path = package_folder(target.package) / target.file
    return _argument_names(_class_node(path.read_text(encoding="utf-8"), target.cls))


def package_folder(package: str) -> Path:
    """The folder of an installed package, found without importing it. Raises: ModuleNotFoundError."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed; make install installs it")
    return Path(spec.submodule_search_locations[0])


def _class_node(text: str, name: str) -> ast.ClassDef:
    return next(n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ClassDef) and n.name == name)


def _argument_names(cls: ast.ClassDef) -> set[str]:
    names = {n.target.id for n in cls.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    for init in (n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"):
        names |= {a.arg for a in [*init.args.args[1:], *init.args.kwonlyargs]}
        names |= {
            call.args[0].value
            for call in ast.walk(init)
            if isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr == "pop"
            and call.args
            and isinstance(call.args[0], ast.Constant)
            and isinstance(call.args[0].value, str)
        }
    return {name for name in names if not name.startswith("_")}
