"""The rules of docs/architecture.md: which package imports which, where heavy libraries are imported, and names.

Each table of the code has the entries that the schema names.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import pytest

from src import schema
from src.model.tasks import TASKS
from src.stages import STAGES, Stage

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "accelerate"}
HEAVY_PACKAGES = {"model", "train", "eval", "deploy"}  # the others work without torch

CORE = {
    "stages",
    "aliases",
    "src",
    "config",
    "chat_templates",
    "config_files",
    "optuna_sweeper",
    "schema",
    "cli",
    "cli_args",
    "compose",
    "help",
    "hydra_rules",
    "json_schema",
    "completion",
    "shell_scripts",
    "launch",
    "learning",
    "next_command",
    "outcome",
    "secret_references",
    "run_names",
    "run_summaries",
    "runs",
    "runs_table",
    "override_values",
    "precedence",
    "search_space",
    "sweep",
    "errors",
    "gpus",
    "utils",
}
PACKAGES: dict[str, set[str]] = {  # package -> the packages that it may import in addition to the core modules
    "data": set(),
    "model": set(),
    "train": {"data", "model"},
    "eval": {"data", "model"},
    "deploy": {"model", "eval"},
    "remote": set(),
    "convert": {"data"},
}

PRIVATE = {
    *("told", "said", "tell", "ask", "asked", "asking", "answers", "taught", "learnt", "whole", "torn", "taken"),
    *("carried", "handed", "mend", "door", "room", "ground", "there", "here", "place", "apart", "wire", "visit"),
    *("watch", "first", "joined", "together", "exam", "questions", "way", "ready", "trouble", "settled", "kept"),
    *("desk", "worst", "received", "pushed", "fetched", "findings", "house"),
}
PARTICIPLES = {"distributed"}  # the field's own word


class Import(NamedTuple):
    module: str
    line: int
    inside: bool  # of a function, a class or a branch


def name_of(path: Path) -> str:
    parts = path.relative_to(SRC.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(p): p for p in sorted(SRC.rglob("*.py"))}


def imports_of(path: Path) -> Iterator[Import]:
    """Every import of a file, relative ones resolved; `from src import runs` imports src.runs."""
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        inside = node not in tree.body
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            modules = {f"{module}.{alias.name}" for alias in node.names} & MODULES.keys()
            yield from (Import(found, node.lineno, inside) for found in modules or {module})


IMPORTS = {name: list(imports_of(path)) for name, path in MODULES.items()}


def part_of(module: str) -> str:
    """`src.data.loader` -> data; `src` itself is a core module."""
    return [*module.split("."), "src"][1]


def crossings(module: str) -> Iterator[tuple[str, str]]:
    """`(place, package)` of each import from another part of src."""
    for found in IMPORTS[module]:
        if found.module.split(".")[0] == "src" and part_of(found.module) != part_of(module):
            yield f"{module}:{found.line} imports {found.module}", part_of(found.module)


# Imports between packages


def test_every_part_of_src_is_known() -> None:
    assert {part_of(m) for m in MODULES} <= {*PACKAGES, *CORE, "main", "api"}


@pytest.mark.parametrize("package", [r for r in PACKAGES if (SRC / r).is_dir()])
def test_a_package_imports_only_core_modules_and_the_packages_that_it_may(package: str) -> None:
    mine = [m for m in MODULES if part_of(m) == package]
    assert [place for m in mine for place, to in crossings(m) if to not in CORE | PACKAGES[package]] == []


def test_core_modules_import_no_package() -> None:
    mine = [m for m in MODULES if part_of(m) in CORE]
    assert [place for m in mine for place, to in crossings(m) if to not in CORE] == []


def test_the_entry_point_imports_no_package_at_its_top() -> None:
    assert [place for place, to in crossings("src.main") if to not in CORE] == []
    assert [place for place, to in crossings("src.api") if to not in {*CORE, "main"}] == []


def test_the_entry_point_imports_only_the_standard_library_at_its_top() -> None:
    utils = ("commands", "secrets", "terminal", "units", "urls")
    light = ("src", "src.main", "src.outcome", "src.stages", *(f"src.utils.{name}" for name in utils))
    tops = {i.module for m in light for i in IMPORTS[m] if not i.inside}
    assert {top for top in tops if top.split(".")[0] not in sys.stdlib_module_names} <= set(light)


def test_the_functions_of_the_stages_exist() -> None:
    for place in {p for stage in STAGES.values() for p in (stage.function, stage.check) if p}:
        module, function = resolve_name(place, "src").split(":")
        tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
        assert function in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}


def test_no_import_circle() -> None:
    graph = {m: {i.module for i in found if i.module in MODULES} for m, found in IMPORTS.items()}
    graph["src.main"] |= {f"src{p.split(':')[0]}" for s in STAGES.values() for p in (s.function, s.check) if p}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


# The package may have another name


def test_a_copy_of_the_package_under_another_name_works(tmp_path: Path) -> None:
    """As in a wheel, where the package is `assay`: nothing in it imports `src`."""
    shutil.copytree(SRC, tmp_path / "assay", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    script = (
        "import sys, importlib\n"
        "sys.modules['src'] = None\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "from assay.main import main\n"
        "sys.exit(main(['train', '--help']) or main(['train', 'lr=abc']))"
    )
    heavy = heavy_files()
    names = [f"assay{m[3:]}" for m in MODULES if m not in heavy and m != "src.remote.agent.install"]
    done = subprocess.run([sys.executable, "-c", script, *names], cwd=tmp_path, capture_output=True, text=True)
    assert "lr=abc: should be a number" in done.stderr, done.stderr
    assert done.returncode == 2 and "lora_r" in done.stdout


def test_imports_in_the_package_are_relative() -> None:
    absolute = [
        f"{module}:{node.lineno}"
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "src" and not node.level
    ]
    assert absolute == []


# What is sent to a server

THERE = sorted(m for m in MODULES if m.startswith("src.remote.agent."))


def test_the_agent_needs_only_the_standard_library_of_an_old_python() -> None:
    assert THERE
    for module in THERE:
        ast.parse(MODULES[module].read_text(encoding="utf-8"), feature_version=(3, 8))
        found = {i.module for i in IMPORTS[module]}
        strange = {m for m in found if m.split(".")[0] not in sys.stdlib_module_names and m not in THERE}
        assert strange - {"src.remote.agent"} == set(), module


def test_each_module_of_the_agent_is_sent_after_those_that_it_imports() -> None:
    tree = ast.parse(MODULES["src.remote.connection"].read_text(encoding="utf-8"))
    (sent,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == "AGENT_MODULES"
    )
    assert {f"src.remote.agent.{name}" for name in (*sent, "install")} | {"src.remote.agent"} == {
        m for m in MODULES if m.startswith("src.remote.agent")
    }
    for i, name in enumerate(sent):
        needed = {i.module.rpartition(".")[2] for i in IMPORTS[f"src.remote.agent.{name}"] if i.module in THERE}
        assert needed <= set(sent[:i]), name


# Heavy libraries


def heavy_files() -> dict[str, list[Import]]:
    found = {m: [i for i in imports if i.module.split(".")[0] in HEAVY] for m, imports in IMPORTS.items()}
    return {m: imports for m, imports in found.items() if imports}


def test_heavy_libraries_are_imported_at_the_top_of_modules_of_the_packages_that_need_them() -> None:
    assert heavy_files()
    assert [module for module in heavy_files() if part_of(module) not in HEAVY_PACKAGES] == []
    assert [f"{m}:{i.line}" for m, imports in heavy_files().items() for i in imports if i.inside] == []


@pytest.mark.parametrize("stage", STAGES)
def test_importing_a_stage_reaches_no_heavy_library(stage: str) -> None:
    places = (STAGES[stage].function, STAGES[stage].check)
    waiting, reached = [f"src{place.split(':')[0]}" for place in places if place], set[str]()
    while waiting:
        module = waiting.pop()
        reached.add(module)
        waiting += [i.module for i in IMPORTS[module] if not i.inside and i.module in MODULES.keys() - reached]
    assert reached & heavy_files().keys() == set()


# Names

PATHS = sorted(path.relative_to(SRC) for path in SRC.rglob("*.py"))


def words(path: Path) -> list[str]:
    """The words in the names of a module and of its packages."""
    return [word for part in path.with_suffix("").parts for word in part.strip("_").split("_")]


def test_no_module_has_a_private_word_in_its_name() -> None:
    assert {str(path): PRIVATE & set(words(path)) for path in PATHS if PRIVATE & set(words(path))} == {}


def test_no_module_is_named_by_a_participle() -> None:
    last = {str(path): words(path)[-1] for path in PATHS if path.stem != "__init__"}
    assert {
        path for path, word in last.items() if re.search(r"[^e]ed$", word) and word not in PARTICIPLES
    } == set()


def test_no_two_public_classes_have_one_name() -> None:
    found = defaultdict(list)
    for path in PATHS:
        for node in ast.parse((SRC / path).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(str(path))
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


# Tables


def choices(mixin: type, key: str) -> set[str | None]:
    """The values that a setting may have, null included."""
    found: set[str | None] = set()
    for part in get_args(get_type_hints(mixin)[key]):
        found |= {None} if part is type(None) else set(get_args(part)) or {part}
    return found


@pytest.mark.parametrize(
    ("mixin", "key", "place", "others"),
    [
        (schema.MethodArgs, "method", "src.model.methods:METHODS", set()),
        (schema.LossArgs, "loss", "src.train.losses:LOSSES", set()),
        (schema.DataArgs, "data_format", "src.data.formats:FORMATS", {"auto"}),
        (schema.Dataset, "format", "src.data.formats:FORMATS", {"auto"}),
        (schema.DataSource, "type", "src.data.sources:SOURCES", set()),
        (schema.DataSource, "type", "src.schema:SOURCE_KEYS", set()),
        (schema.PublishArgs, "target", "src.deploy.push:TARGETS", set()),
        (schema.PublishArgs, "export", "src.deploy.export:FORMS", {"gguf", None}),
    ],
)  # fmt: skip
def test_the_choices_of_a_setting_are_the_entries_of_its_table(
    mixin: type, key: str, place: str, others: set[str | None]
) -> None:
    assert choices(mixin, key) == {*table(*place.split(":")), *others}


def test_the_column_strategies_of_the_configuration_are_those_of_the_table() -> None:
    assert set(get_args(schema.Strategy)) == set(table("src.data.column_mapping", "STRATEGIES"))


def test_the_kinds_of_file_that_a_source_takes_are_those_that_can_be_read() -> None:
    from src.data.readers import READERS, is_data_file

    assert set(READERS) == set(table("src.data.readers", "READERS"))
    assert all(is_data_file(Path(f"rows{name}")) != kind.by_name for name, kind in READERS.items())


def test_every_schema_of_a_stage_is_in_the_table_of_stages() -> None:
    without_stage = {"SweepConfig", "SlurmConfig"}  # of a multirun, and of launch=slurm
    configs = {name for name in vars(schema) if name.endswith("Config") and is_dataclass(getattr(schema, name))}
    assert {stage.schema for stage in STAGES.values()} == configs - without_stage


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_a_stage_has_its_file_and_names_settings_of_its_schema(stage: Stage) -> None:
    assert (ROOT / "configs" / f"{stage.config_name}.yaml").is_file()
    settings = {item.name for item in fields(getattr(schema, stage.schema))}
    assert {*stage.positionals, *(flag.setting for flag in stage.flags.values())} <= settings


def test_each_key_of_a_data_source_is_read_by_one_at_least() -> None:
    read = {key for keys in schema.SOURCE_KEYS.values() for key in keys}
    assert read | {"type"} == set(schema.DataSource.__dataclass_fields__)


def test_the_metrics_of_the_configuration_are_in_the_table() -> None:
    metrics = set(table("src.eval.metrics", "METRICS"))
    assert {name for task in TASKS.values() for name in task.metrics} <= metrics
    assert all(task.gate_metric in task.metrics for task in TASKS.values())


def test_the_tasks_of_the_configuration_are_those_of_every_table_of_tasks() -> None:
    from src.data import task_encoding

    tasks = choices(schema.ModelArgs, "task")
    assert tasks == TASKS.keys() == task_encoding.TASK_ENCODINGS.keys()
    assert tasks == {*table("src.train.collators", "COLLATORS"), "causal_lm"}


def table(module: str, name: str) -> Iterator[Any]:
    """Keys of a dict literal, read without running the module."""
    for node in ast.parse(MODULES[module].read_text(encoding="utf-8")).body:
        target = node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(target, ast.Name) and target.id == name:
            assert isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict)
            yield from (ast.literal_eval(key) for key in node.value.keys if key)


# Old runs without the trainer


def test_evaluation_and_publishing_work_without_the_package_train(tmp_path: Path) -> None:
    shutil.copytree(SRC, tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(tmp_path / "src/train")
    script = (
        "import src, src.eval.evaluator, src.deploy.push, sys\n"
        f"assert src.__file__.startswith({str(tmp_path)!r}), src.__file__\n"
        "from src.main import main\n"
        "sys.exit(main(['version']))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Assay ")


# The tests


def test_no_two_plugins_of_the_tests_have_a_fixture_of_one_name() -> None:
    """Theirs count in all of a session: one would hide the other, or not, by the order of loading."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path.name.startswith("test_"):  # theirs are their own
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any("fixture" in ast.unparse(d) for d in node.decorator_list):
                found.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert "sshd" in found
    assert {name: places for name, places in found.items() if len(places) > 1} == {}
