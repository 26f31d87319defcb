"""Interactive sessions on the server: a shell in the project folder, and TensorBoard."""

from __future__ import annotations

import os
import pwd
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Dict  # noqa: UP035  (an alias is evaluated, by Python 3.8 too)

from . import fs, venv
from .bootstrap import AgentError

RUNS = "outputs/runs"
# It ends when its standard input is closed, even if its parent process was killed.
TENSORBOARD = (
    "import os,threading;"
    "threading.Thread(target=lambda:(os.read(0,1),os._exit(0)),daemon=True).start();"
    "from tensorboard.main import run_main;run_main()"
)
ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")
POLL_S = 0.5


def shell(folder: str) -> Dict[str, Any]:  # noqa: UP006
    """How to start the user's login shell with the environment activated: `{"root", "argv", "environment"}`.

    The environment is activated after the shell's own startup files, so that its programs come first on PATH.
    Raises: AgentError if the folder does not exist.
    """
    root = fs.root(folder)
    if not os.path.isdir(root):
        raise AgentError(f"the folder {root} does not exist on the server", "run make push to create it")
    program = pwd.getpwuid(os.getuid()).pw_shell or "/bin/sh"
    argv, found = [program, "-i"], {"HF_HOME": os.path.join(root, ".cache", "huggingface")}
    if "HF_HOME" in os.environ:
        del found["HF_HOME"]
    if not venv.interpreter(root):
        return {"root": root, "argv": argv, "environment": found}
    found["VIRTUAL_ENV"] = venv.path(root)
    found["PATH"] = os.pathsep.join([venv.path(root, "bin"), os.environ.get("PATH", os.defpath)])
    name = os.path.basename(program)
    activate = venv.path(root, "bin", "activate")
    if name == "bash" and os.path.exists(activate):
        os.makedirs(os.path.join(root, ".cache"), exist_ok=True)
        start = os.path.join(root, ".cache", "bashrc")
        quoted = "'" + activate.replace("'", "'\\''") + "'"
        fs.write_text(start, f"[ -f ~/.bashrc ] && . ~/.bashrc\n. {quoted}\n")
        argv = [program, "--rcfile", start, "-i"]
    elif name == "fish" and os.path.exists(activate + ".fish"):
        argv = [program, "-C", 'source "$VIRTUAL_ENV/bin/activate.fish"']
    return {"root": root, "argv": argv, "environment": found}


def tensorboard(folder: str) -> Iterator[Dict[str, Any]]:  # noqa: UP006
    """Run TensorBoard on the server's loopback until the client disconnects; yield `{"port"}` once it listens.

    Raises: AgentError if there is no environment, or TensorBoard ends.
    """
    root = fs.root(folder)
    python = venv.interpreter(root)
    if not python:
        raise AgentError(f"the environment {venv.path(root)} does not exist", "run make ssh-init to create it")
    temporary = os.path.join(root, ".cache", "tmp")
    os.makedirs(temporary, exist_ok=True)
    process = subprocess.Popen(
        [python, "-c", TENSORBOARD, "--logdir", os.path.join(root, RUNS), "--host", "127.0.0.1", "--port", "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=root,
        env=dict(os.environ, TMPDIR=temporary, PYTHONUNBUFFERED="1"),
    )
    assert process.stdin and process.stderr
    try:
        output = ""
        while True:
            ready = select.select([process.stderr, sys.stdin], [], [], POLL_S)[0]
            if sys.stdin in ready and not os.read(0, 1):  # the client has disconnected
                return
            if process.stderr in ready:
                data = os.read(process.stderr.fileno(), 1 << 16).decode(errors="replace")
                if not data:
                    lines = output.strip().splitlines()
                    raise AgentError(f"TensorBoard on the server ended: {lines[-1] if lines else 'no output'}")
                output = (output + data)[-4000:]
                found = ADDRESS.search(output)
                if found:
                    output = ""
                    yield {"port": int(found[1])}
    finally:
        process.stdin.close()
        process.kill()
        process.wait()
