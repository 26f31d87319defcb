"""Kill points: interrupts the server at any step of a request.

A sitecustomize of the server's Python does it. A kill point is an audit event of Python that changes the project
folder or starts a process. The variable KILL_POINT is `WHO NTH ACT`: WHO is `starter`, which answers requests, or
`supervisor`, which that one has started; ACT is `kill` (this process), `cut` (its connection) or `wait` (until the
file KILL_POINT_RELEASE exists). The file KILL_POINT_REACHED is made when it happens, which it does once.
"""

from __future__ import annotations

from pathlib import Path

SITE = """
import os, signal, sys, time

who, nth, act = os.environ["KILL_POINT"].split()
folder, reached, release = (os.environ[f"KILL_POINT_{name}"] for name in ("FOLDER", "REACHED", "RELEASE"))
parent = open(f"/proc/{os.getppid()}/comm").read().strip()
seen = [0, False]


def happen():
    try:
        os.close(os.open(reached, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return
    if act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "cut":
        os.kill(os.getppid(), signal.SIGKILL)
    while act == "wait" and not os.path.exists(release):
        time.sleep(0.01)


def changes(event, args):
    if event == "subprocess.Popen":
        return True
    reads = event in {"os.listdir", "os.scandir"} or event == "open" and str(args[1]).startswith("r")
    return not reads and any(folder in str(arg) for arg in args)


def watch(event, args):
    if seen[1] or not changes(event, args):
        return
    seen[0] += 1
    if seen[0] == int(nth):
        seen[1] = True
        happen()


if sys.argv[:1] == ["-c"] and (parent == "sshd") == (who == "starter"):
    sys.addaudithook(watch)
"""


class KillPoints:
    """`variables` are those of a session with a kill point."""

    def __init__(self, folder: Path, project: Path) -> None:
        self.site, self.project = folder / "site", project
        self.reached, self.release = folder / "came", folder / "go"
        self.site.mkdir()
        (self.site / "sitecustomize.py").write_text(SITE)

    def variables(self, who: str, nth: int, act: str) -> dict[str, str]:
        self.reached.unlink(missing_ok=True)
        return {
            "PYTHONPATH": str(self.site),
            "KILL_POINT": f"{who} {nth} {act}",
            "KILL_POINT_FOLDER": str(self.project),
            "KILL_POINT_REACHED": str(self.reached),
            "KILL_POINT_RELEASE": str(self.release),
        }
