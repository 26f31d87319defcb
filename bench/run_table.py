"""CPU seconds of `runs` over 2,000 runs: `python bench/run_table.py RUN`, the directory of any finished run.

The first listing builds the index; the limit of the later ones is 0.5 s.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

RUNS = 2000
FILES = ("config_used.yaml", "metrics.json", "comparison.json")


def copy_run(source: Path, folder: Path) -> None:
    manifest = json.loads((source / "manifest.json").read_text(encoding="utf-8"))
    for number in range(RUNS):
        run = folder / "runs" / f"{source.resolve().name}-{number}"
        run.mkdir(parents=True)
        for name in FILES:
            if (source / name).is_file():
                shutil.copy(source / name, run)
        (run / "manifest.json").write_text(json.dumps(manifest | {"run": run.name}), encoding="utf-8")


def cpu_seconds(folder: Path) -> float:
    before = os.times()
    subprocess.run([sys.executable, "-m", "src.main", "runs", folder], stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        copy_run(Path(sys.argv[1]), Path(name))
        for what in ("first", "second", "third"):
            print(f"{what:<8} {cpu_seconds(Path(name)):.2f} s")
