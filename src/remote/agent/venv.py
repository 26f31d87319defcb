"""The server's Python environment, REMOTE_DIR/.venv: its accelerator, and what is missing from it.

.venv/
  .ready.json   {"python", "accelerator", "requirements", "torch"}: what was installed; written last
  .installing   exists during an installation, and after one was killed
  .installed    the file that the Makefile looks for
"""

from __future__ import annotations

import hashlib
import os
from typing import Any, Dict  # noqa: UP035  (an alias is evaluated, by Python 3.8 too)

from . import fs
from .bootstrap import AgentError

FOLDER = ".venv"
READY, INSTALLING, INSTALLED = ".ready.json", ".installing", ".installed"
REQUIREMENTS = "requirements.txt"
EXTRA_REQUIREMENTS = {"cuda": ["requirements-gpu.txt"]}  # by accelerator

State = Dict[str, Any]  # noqa: UP006


def path(root: str, *names: str) -> str:
    return os.path.join(root, FOLDER, *names)


def interpreter(root: str) -> str | None:
    """The environment's Python, None if there is none that can be executed."""
    program = path(root, "bin", "python")
    return program if os.access(program, os.X_OK) else None


def requirements(root: str, accelerator: str) -> list[str]:
    """The names of its requirements files."""
    names = [REQUIREMENTS, *EXTRA_REQUIREMENTS.get(accelerator, [])]
    return [name for name in names if os.path.isfile(os.path.join(root, name))]


def requirements_hash(root: str, accelerator: str) -> str:
    found = hashlib.sha256()
    for name in requirements(root, accelerator):
        with open(os.path.join(root, name), "rb") as file:
            found.update(f"{name}\n".encode() + file.read())
    return found.hexdigest()


def read_state(root: str) -> State | None:
    """What ssh-init has installed; None if it never completed."""
    return fs.read_json(path(root, READY))


def accelerator(root: str, detected: str) -> str:
    """The accelerator that the environment is for, given the one that is detected now.

    An environment created for a GPU is kept while no GPU is detected: the driver may be broken for a day.
    """
    recorded = (read_state(root) or {}).get("accelerator", "cpu")
    return str(recorded) if detected == "cpu" else detected


def missing(root: str, detected: str) -> list[str]:
    """Why the environment must be created or completed, as a list of sentences; empty if it is complete."""
    state = read_state(root)
    if not interpreter(root):
        return ["the environment does not exist yet"]
    if os.path.exists(path(root, INSTALLING)):
        return ["the last installation was not completed"]
    if state is None:
        return [f"{FOLDER} was not created by make ssh-init"]
    wanted = accelerator(root, detected)
    if state["accelerator"] != wanted:
        return [f"the environment was created for {state['accelerator']}, but the server has {wanted}"]
    if state["requirements"] != requirements_hash(root, wanted):
        return [f"{' or '.join(requirements(root, wanted))} has changed"]
    return []


def check(root: str) -> None:
    """Raises: AgentError if the environment is missing, incomplete or out of date.

    An environment that ssh-init did not create is not checked for its packages.
    """
    state = read_state(root)
    if os.path.exists(path(root, INSTALLING)):
        raise AgentError(f"the environment {path(root)} is not complete", "run make ssh-init to complete it")
    if not interpreter(root):
        raise AgentError(f"the environment {path(root)} does not exist", "run make ssh-init to create it")
    if state and state["requirements"] != requirements_hash(root, state["accelerator"]):
        raise AgentError(f"{REQUIREMENTS} has changed since make ssh-init", "run make ssh-init again")
