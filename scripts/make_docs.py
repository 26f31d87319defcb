"""Write the pages that come from the code: `python scripts/make_docs.py`. A test fails when one is stale.

docs/settings.md is what `--help` prints; the tree in docs/architecture.md has the first sentence of each module;
configs/schemas describes the YAML files to editors; README.md and docs/demo.svg show what `make demo` reached.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.demo_figures import figures, picture  # noqa: E402
from src.help import help_text, list_configs  # noqa: E402
from src.json_schema import schema_files  # noqa: E402
from src.stages import STAGES  # noqa: E402

SETTINGS, ARCHITECTURE = ROOT / "docs" / "settings.md", ROOT / "docs" / "architecture.md"
SAME = {"check-data": "train", "plan": "train", "publish-hf": "publish"}  # a stage with the settings of another
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_REPO_ID", "ASSAY_PROGRAM")
SCHEMAS = ROOT / "configs" / "schemas"
README, PICTURE = ROOT / "README.md", ROOT / "docs" / "demo.svg"
TREE = "<!-- the tree, by scripts/make_docs.py -->\n", "<!-- end of the tree -->"
FIGURES = "<!-- the figures, by scripts/make_docs.py -->\n", "<!-- end of the figures -->"


def settings_page() -> str:
    """The page: what each stage's `--help` prints, and the configurations shipped."""
    parts = ["# Settings", "Made from the code by `python scripts/make_docs.py`."]
    parts += [f"## {name}\n\n```\n{help_text(name, beyond=SAME.get(name, ''))}\n```" for name in STAGES]
    parts.append(f"## Configurations and presets\n\n```\n{list_configs()}\n```")
    return "\n\n".join(parts) + "\n"


def architecture_page() -> str:
    """docs/architecture.md with the tree of today's modules."""
    return _between(ARCHITECTURE, TREE, f"```\n{_tree(ROOT / 'src')}\n```\n")


def readme() -> str:
    """README.md with the figures of the recorded demo."""
    return _between(README, FIGURES, figures())


def _between(page: Path, marks: tuple[str, str], text: str) -> str:
    """The page with `text` between two marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(marks[0])
    return f"{before}{marks[0]}{text}{marks[1]}{rest.partition(marks[1])[2]}"


def _tree(package: Path, depth: int = 0) -> str:
    """A line for the package, then one for each of its modules and subpackages."""
    indent = "  " * depth
    lines = [f"{indent + package.name + '/':<28}{_summary(package / '__init__.py')}".rstrip()]
    for module in sorted(package.glob("*.py")):
        if module.stem != "__init__":
            lines.append(f"{indent + '  ' + module.name:<28}{_summary(module)}")
    lines += [_tree(sub, depth + 1) for sub in sorted(package.iterdir()) if (sub / "__init__.py").is_file()]
    return "\n".join(lines)


def _summary(module: Path) -> str:
    """The first paragraph of a module's docstring, in one line."""
    text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def generated_files() -> dict[Path, str]:
    """The content of every file that this script writes, whatever the environment says."""
    with _plain_environment():
        return _generated_files()


@contextmanager
def _plain_environment() -> Iterator[None]:
    """No variable that is the default of a setting, or the way in which a command is typed."""
    kept = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _generated_files() -> dict[Path, str]:
    schemas = {SCHEMAS / name: text for name, text in schema_files().items()}
    pages = {SETTINGS: settings_page(), ARCHITECTURE: architecture_page(), README: readme(), PICTURE: picture()}
    return {**pages, **schemas}


if __name__ == "__main__":
    SCHEMAS.mkdir(exist_ok=True)
    for file, content in generated_files().items():
        file.write_text(content, encoding="utf-8")
        print(f"wrote {file.relative_to(ROOT)}")
