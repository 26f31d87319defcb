"""What the README shows of `make demo`: the picture of its table, and the figures. Used by `make_docs.py`.

docs/figures/demo.json is the comparison.json of a run of `make demo`. After another run, copy its comparison.json
there and run `python scripts/make_docs.py`.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from src.eval.compare import table
from src.utils.units import count

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "figures" / "demo.json"
WIDTH = 80
SHOWN = {"exact_match": "exact match", "rougeL": "ROUGE-L, by which the gate decides"}
ABOUT = {
    "test": "new requests",
    "dev": "new requests",
    "adversarial": "paraphrases, distractors and unseen nesting",
}


def record() -> dict[str, Any]:
    return dict(json.loads(RECORD.read_text(encoding="utf-8")))


def figures() -> str:
    """A Markdown table: base and tuned model on each split, by the metrics of SHOWN."""
    found = record()
    rows = {(row["split"], row["metric"]): row for row in found["rows"]}
    lines = [
        "| base → tuned | " + " | ".join(SHOWN.values()) + " |",
        "|---|" + "---:|" * len(SHOWN),
    ]
    for split in dict.fromkeys(row["split"] for row in found["rows"]):
        cells = [rows[split, metric] for metric in SHOWN]
        requests = f"`{split}`, {cells[0]['examples']} {ABOUT[split]}"
        lines.append(
            f"| {requests} | " + " | ".join(f"{c['base']:.3f} → **{c['tuned']:.3f}**" for c in cells) + " |"
        )
    return "\n".join(lines) + "\n"


def picture() -> str:
    """The table of the split that the gate decides by, as SVG, as `make eval` prints it, and the verdict."""
    found = record()
    split = found["verdict"]["split"]
    others = [count(row["examples"], "row") for row in found["rows"] if row["split"] != split]
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(
        table({**found, "rows": [row for row in found["rows"] if row["split"] == split]}, ("base", "tuned"))
    )
    if others:
        console.print("... and the other splits", style="dim")
    console.print()
    console.print(found["verdict"]["sentence"], highlight=False)
    svg = console.export_svg(title="make demo")
    return re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # without a web font: the viewer's font is used
