"""Write docs/settings.md from the schema: `python scripts/make_docs.py`. A test fails when it is stale."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.help import help_text, list_configs  # noqa: E402
from src.stages import STAGES  # noqa: E402

TARGET = ROOT / "docs" / "settings.md"


def settings_page() -> str:
    """The page: what each stage's `--help` prints, and the configurations shipped."""
    parts = ["# Settings", "Made from the code by `python scripts/make_docs.py`."]
    parts += [f"## {name}\n\n```\n{help_text(name)}\n```" for name in STAGES]
    parts.append(f"## Configurations and presets\n\n```\n{list_configs()}\n```")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(settings_page(), encoding="utf-8")
    print(f"wrote {TARGET.relative_to(ROOT)}")
