"""What a person looks at on the server: a shell in the project's folder, and TensorBoard."""

from __future__ import annotations

import os
import pwd
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Dict  # noqa: UP035  (an alias is evaluated, by Python 3.8 too)

from src.remote.agent import fs, venv
from src.remote.agent.protocol import AgentError

LOGS = "outputs/runs"
# It ends with its standard input, whatever became of who started it.
BOARD = (
    "import os,threading;"
    "threading.Thread(target=lambda:(os.read(0,1),os._exit(0)),daemon=True).start();"
    "from tensorboard.main import run_main;run_main()"
)
ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")
POLL = 0.5  # seconds


def shell(folder: str) -> Dict[str, Any]:  # noqa: UP006
    """How to begin a person's own shell there with the environment activated: `{"root", "argv", "environment"}`.

    What their shell reads at its start comes first, so that the environment's programs win.
    """
    root = fs.root(folder)
    if not os.path.isdir(root):
        raise AgentError(f"there is no folder {root}", "make push makes it")
    program = pwd.getpwuid(os.getuid()).pw_shell or "/bin/sh"
    argv, found = [program, "-i"], {"HF_HOME": os.path.join(root, ".cache", "huggingface")}
    if "HF_HOME" in os.environ:
        del found["HF_HOME"]
    if not venv.python(root):
        return {"root": root, "argv": argv, "environment": found}
    found["VIRTUAL_ENV"] = venv.path(root)
    found["PATH"] = os.pathsep.join([venv.path(root, "bin"), os.environ.get("PATH", os.defpath)])
    name = os.path.basename(program)
    activated = venv.path(root, "bin", "activate")
    if name == "bash" and os.path.exists(activated):
        os.makedirs(os.path.join(root, ".cache"), exist_ok=True)
        start = os.path.join(root, ".cache", "bashrc")
        spelt = "'" + activated.replace("'", "'\\''") + "'"
        fs.write(start, f"[ -f ~/.bashrc ] && . ~/.bashrc\n. {spelt}\n")
        argv = [program, "--rcfile", start, "-i"]
    elif name == "fish" and os.path.exists(activated + ".fish"):
        argv = [program, "-C", 'source "$VIRTUAL_ENV/bin/activate.fish"']
    return {"root": root, "argv": argv, "environment": found}


def tensorboard(folder: str) -> Iterator[Dict[str, Any]]:  # noqa: UP006
    """Run TensorBoard over the runs, on this machine's loopback, for as long as the client is there: `{"port"}`.

    Raises: Refused where it does not start, or has ended.
    """
    root = fs.root(folder)
    python = venv.python(root)
    if not python:
        raise AgentError(f"there is no environment in {venv.path(root)}", "make ssh-init makes it")
    temporary = os.path.join(root, ".cache", "tmp")
    os.makedirs(temporary, exist_ok=True)
    board = subprocess.Popen(
        [python, "-c", BOARD, "--logdir", os.path.join(root, LOGS), "--host", "127.0.0.1", "--port", "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=root,
        env=dict(os.environ, TMPDIR=temporary, PYTHONUNBUFFERED="1"),
    )
    assert board.stdin and board.stderr
    try:
        last = ""
        watched = [board.stderr, sys.stdin]
        while True:
            ready = select.select(watched, [], [], POLL)[0]
            if sys.stdin in ready and not os.read(0, 1):  # the client is gone
                return
            if board.stderr in ready:
                data = os.read(board.stderr.fileno(), 1 << 16).decode(errors="replace")
                if not data:
                    said = last.strip().splitlines()
                    raise AgentError(f"TensorBoard has ended there: {said[-1] if said else 'it says nothing'}")
                last = (last + data)[-4000:]
                found = ADDRESS.search(last)
                if found:
                    last = ""
                    yield {"port": int(found[1])}
    finally:
        board.stdin.close()
        board.kill()
        board.wait()
