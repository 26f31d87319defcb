"""Times of remote commands: `python bench/remote.py`, with REMOTE_HOST and REMOTE_DIR in the environment or .env.

Seconds of the complete command, median of five: a push without changes; until the run's id is printed, with the
push; the list of runs. Then the delay of a log line from the server, and the rate of a fetch, which verifies every
file, and of scp, which does not.
"""

from __future__ import annotations

import base64
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.remote import fetch, jobs  # noqa: E402
from src.remote.connection import Connection  # noqa: E402
from src.remote.target import RemoteTarget  # noqa: E402

TIMES = 5
MEGABYTES = 256


def main() -> None:
    from dotenv import load_dotenv

    load_dotenv(".env")
    target = RemoteTarget.from_env(os.environ)
    show("push, nothing changed", "s", *measure_times(lambda: command("push")))
    show("until the run's id is printed", "s", *measure_times(first_line))
    show("ssh-status", "s", *measure_times(lambda: command("ssh-status")))
    with Connection(target) as connection:
        show("delay of a log line", "s", *log_delays(connection))
        fetched, copied = rates(connection)
    show("fetch, verified", "MB/s", *fetched)
    show("scp", "MB/s", *copied)


def measure_times(act: Callable[[], float]) -> list[float]:
    act()
    return [act() for _ in range(TIMES)]


def command(*words: str) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "src.main", *words], check=True, capture_output=True)
    return time.perf_counter() - begun


def first_line() -> float:
    """Seconds until `ssh-eval` prints the run that it has started; the stage itself rejects the setting."""
    begun = time.perf_counter()
    words = [sys.executable, "-m", "src.main", "ssh-eval", "no_such_setting=1"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("run "):
                found = time.perf_counter() - begun
        process.wait()
    return found


def start_script(connection: Connection, text: str) -> jobs.Job:
    return jobs.start(connection, "bench", [jobs.PYTHON, "-c", text], [], {}, None)


def log_delays(connection: Connection) -> list[float]:
    """Seconds between the printing of a line and its arrival: on one machine, by one clock."""
    job = start_script(
        connection, "import time\nfor _ in range(50): print(time.time(), flush=True); time.sleep(0.1)"
    )
    found: list[float] = []
    for frame in connection.stream("jobs:follow", folder=connection.target.dir, id=job["id"], offset=0):
        if "data" in frame:
            times = base64.b64decode(frame["data"]).decode().split()
            found += [time.time() - float(printed) for printed in times]
    return found


MAKE = f"""
import json, os, pathlib
run = pathlib.Path("outputs/runs") / os.environ["ASSAY_RUN_ID"]
(run / "model").mkdir(parents=True)
(run / "model" / "weights").write_bytes(os.urandom({MEGABYTES} << 20))
(run / "manifest.json").write_text(json.dumps(dict(run=run.name, stage="train", status="finished",
    started="2026-01-01T00:00:00+00:00", process=dict(host="other", pid=1, created=0))))
pathlib.Path(os.environ["ASSAY_RUN_FILE"]).write_text(str(run.absolute()))
"""


def rates(connection: Connection) -> tuple[list[float], list[float]]:
    """MB/s of fetching a run, and of copying its one large file."""
    fetched, copied = [], []
    for _ in range(3):
        job = start_script(connection, MAKE)
        jobs.follow(connection, job["id"])
        job = jobs.find_job(connection, job["id"])
        fetched.append(rate(lambda job=job: fetch.fetch(connection, job)))  # type: ignore[misc]
        shutil.rmtree(Path("outputs/runs") / job["id"])
        with tempfile.TemporaryDirectory() as folder:
            words = [
                *connection.target.ssh_command[1:],
                f"{connection.target.host}:{job['run']}/model/weights",
                folder,
            ]
            copied.append(rate(lambda words=words: subprocess.run(["scp", "-q", *words], check=True)))  # type: ignore[misc]
    return fetched, copied


def rate(act: Callable[[], object]) -> float:
    begun = time.perf_counter()
    act()
    return MEGABYTES * 1.048576 / (time.perf_counter() - begun)


def show(what: str, unit: str, *values: float) -> None:
    print(f"{what:<32} {statistics.median(values):8.3f} {unit}   (of {len(values)}, at most {max(values):.3f})")


if __name__ == "__main__":
    main()
