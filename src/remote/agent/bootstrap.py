"""The first code that runs on the server: it loads the modules that the client sent and calls a function of them.

Nothing is installed for it, and no command line holds a secret: the sources and the request are one line of JSON
on the standard input, which stays open while the client is connected. The output begins with a line that only the
client knows, since a login shell may print text of its own; then each line is one JSON object:

    {"frame": value}                  a value that a generator yields
    {"alive": true}                   a heartbeat
    {"answer": value}                 the result; the last line
    {"error": fact, "hint": remedy}   a failure that the user can fix; the last line
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Sequence
from typing import Any

PACKAGE = "src.remote.agent"
# The argument of `python3 -c`: runs this file, which then registers itself as a module for the other modules.
BOOTSTRAP = 'import json,sys;request=json.loads(sys.stdin.readline());exec(request["sources"]["bootstrap"])'
PYTHON_OPTIONS = ("-X", "utf8")  # file names are UTF-8 whatever the locale is
HEARTBEAT_S = 3.0
MIN_PYTHON = (3, 8)

DISK_FULL = "free some space on the server and run the command again; nothing is lost"
NOT_WRITABLE = "REMOTE_DIR must be a folder that REMOTE_USER may write to"
OS_ERROR_HINTS = {
    errno.ENOSPC: DISK_FULL,
    errno.EDQUOT: DISK_FULL,
    errno.EACCES: NOT_WRITABLE,
    errno.EPERM: NOT_WRITABLE,
    errno.EROFS: NOT_WRITABLE,
    errno.ENOTDIR: NOT_WRITABLE,
    errno.EEXIST: NOT_WRITABLE,
    errno.ELOOP: NOT_WRITABLE,
    errno.ENAMETOOLONG: "choose a shorter name, or another REMOTE_DIR",
}

uninterrupted = threading.Lock()  # held while an operation must complete even if the client disconnects
_output = threading.Lock()
_sources: dict[str, str] = {}  # of all modules, for run_detached


class AgentError(Exception):
    """A failure that the user can fix: the fact and the remedy."""

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint


# The request


def serve(request: dict[str, Any]) -> None:
    """Load the modules of a request `{"sources", "mark", "call", "args"}` and run it."""
    sys.stdout.write("\n" + request["mark"] + "\n")
    sys.stdout.flush()
    if sys.version_info < MIN_PYTHON:
        version = ".".join(map(str, sys.version_info[:3]))
        fact = f"the server's Python is {version}, but 3.8 or newer is required"
        sys.stdout.write(f'{{"error": "{fact}", "hint": "set REMOTE_PYTHON to the path of a newer Python"}}\n')
        return
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a disconnected client does not end an operation halfway
    load_modules(request["sources"])
    sys.modules[f"{PACKAGE}.bootstrap"].run(request)


def load_modules(sources: dict[str, str]) -> None:
    """Import each of `{name: source}` as a module of PACKAGE; a module may import those before it."""
    parts = PACKAGE.split(".")
    for i in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    for name, source in sources.items():
        module = types.ModuleType(f"{PACKAGE}.{name}")
        module.__package__ = PACKAGE  # for relative imports
        sys.modules[module.__name__] = module
        setattr(sys.modules[PACKAGE], name, module)
        exec(compile(source, f"<{name}>", "exec"), module.__dict__)


def run(request: dict[str, Any]) -> None:
    """Call `module:function` of a request and send what it yields or returns."""
    _sources.update(request["sources"])
    if request.get("heartbeat", True):
        threading.Thread(target=_send_heartbeats, daemon=True).start()
    module, name = request["call"].split(":")
    try:
        answer = getattr(sys.modules[f"{PACKAGE}.{module}"], name)(**request["args"])
        if isinstance(answer, types.GeneratorType):
            for frame in answer:
                send(frame=frame)
            answer = None
        send(answer=answer)
    except AgentError as error:
        send(error=error.problem, hint=error.hint)
    except BrokenPipeError:  # the client has disconnected
        os._exit(0)
    except OSError as error:
        if error.errno is None or error.errno not in OS_ERROR_HINTS:
            raise
        fact = f"{error.filename or request['call']}: {os.strerror(error.errno).lower()}"
        send(error=fact, hint=OS_ERROR_HINTS[error.errno])


def send(**message: Any) -> None:
    line = json.dumps(message) + "\n"  # ASCII, whatever the locale is
    with _output:
        sys.stdout.write(line)
        sys.stdout.flush()


def _send_heartbeats() -> None:
    """Send heartbeats; exit when the client has disconnected, after any operation that holds `uninterrupted`."""
    while True:
        time.sleep(HEARTBEAT_S)
        try:
            send(alive=True)
        except OSError:
            uninterrupted.acquire()
            os._exit(0)


# Detached processes


def run_detached(function: str, inherited: Sequence[int] = (), **args: Any) -> None:
    """Call `module:function` in a process that outlives the connection; return once it has called `detach`.

    The process keeps the file descriptors `inherited` open until it ends.
    Raises: AgentError if the function raises it before.
    """
    child = subprocess.Popen(
        [sys.executable, *PYTHON_OPTIONS, "-c", BOOTSTRAP],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd="/",
        pass_fds=inherited,
    )
    request = {"sources": _sources, "mark": "-", "heartbeat": False, "call": function, "args": args}
    assert child.stdin and child.stdout and child.stderr
    child.stdin.write(json.dumps(request).encode() + b"\n")
    child.stdin.flush()
    for line in child.stdout:
        if b'"frame"' in line:
            return
        if b'"error"' in line:
            message = json.loads(line.decode())
            raise AgentError(message["error"], message.get("hint", ""))
    raise RuntimeError(child.stderr.read().decode())


def detach() -> None:
    """Let `run_detached` return in the parent process, and close this process's ends of the connection."""
    with contextlib.suppress(OSError):  # the parent has just been killed
        send(frame={})
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)


if "request" in globals():  # run by BOOTSTRAP, not imported
    serve(globals()["request"])
