"""The server's environment, REMOTE_DIR/.venv: what it was made for, and what of it is missing.

.venv/
  .ready.json   what was installed: {"python", "accelerator", "requirements", "torch"}; written last
  .installing   there while something is being installed, and after that was killed
  .installed    what the Makefile looks at
"""

from __future__ import annotations

import hashlib
import os
from typing import Any, Dict  # noqa: UP035  (an alias is evaluated, by Python 3.8 too)

from src.remote.agent import fs
from src.remote.agent.protocol import AgentError

FOLDER = ".venv"
READY, INSTALLING, INSTALLED = ".ready.json", ".installing", ".installed"
REQUIREMENTS = "requirements.txt"
MORE = {"cuda": ["requirements-gpu.txt"]}  # besides, by accelerator

Ready = Dict[str, Any]  # noqa: UP006


def path(root: str, *names: str) -> str:
    return os.path.join(root, FOLDER, *names)


def python(root: str) -> str | None:
    """The environment's interpreter, where there is one that can be run."""
    program = path(root, "bin", "python")
    return program if os.access(program, os.X_OK) else None


def requirements(root: str, accelerator: str) -> list[str]:
    """The names of the files that say what belongs into it."""
    return [
        name for name in (REQUIREMENTS, *MORE.get(accelerator, [])) if os.path.isfile(os.path.join(root, name))
    ]


def digest(root: str, accelerator: str) -> str:
    """Of the text of those files."""
    found = hashlib.sha256()
    for name in requirements(root, accelerator):
        with open(os.path.join(root, name), "rb") as file:
            found.update(f"{name}\n".encode() + file.read())
    return found.hexdigest()


def ready(root: str) -> Ready | None:
    """What ssh-init wrote when it was done; None where it never was."""
    return fs.read(path(root, READY))


def accelerator(root: str, found: str) -> str:
    """What the environment is to be made for, where `found` is what answers now.

    A GPU that does not answer today is no reason to throw away what was made for it.
    """
    made = (ready(root) or {}).get("accelerator", "cpu")
    return str(made) if found == "cpu" else found


def missing(root: str, found: str) -> list[str]:
    """Why it is not as it should be, in words; nothing where it is."""
    made = ready(root)
    if not python(root):
        return ["there is no environment yet"]
    if os.path.exists(path(root, INSTALLING)):
        return ["what was begun has not been finished"]
    if made is None:
        return [f"{FOLDER} was not made by ssh-init"]
    wanted = accelerator(root, found)
    if made["accelerator"] != wanted:
        return [f"it was made for {made['accelerator']}, and {wanted} answers now"]
    if made["requirements"] != digest(root, wanted):
        return [f"{' or '.join(requirements(root, wanted))} has changed"]
    return []


def check(root: str) -> None:
    """Raises: Refused where a run would not find what it needs. A person's own environment is theirs to judge."""
    made = ready(root)
    if os.path.exists(path(root, INSTALLING)):
        raise AgentError(f"the environment in {path(root)} is not finished", "make ssh-init goes on with it")
    if not python(root):
        raise AgentError(f"there is no environment in {path(root)}", "make ssh-init makes it")
    if made and made["requirements"] != digest(root, made["accelerator"]):
        raise AgentError(f"{REQUIREMENTS} has changed since make ssh-init", "run it again")
