"""The first of what is sent to the server: it makes the sent sources importable and calls one function of them.

Nothing is installed there, and nothing stands on a command line: the sources and the request are one line of JSON
on the standard input, which stays open as long as the client is there.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
import types
from typing import Any

PACKAGE = "src.remote.agent"
HEARTBEAT_S = 3.0  # seconds between two signs of life
MIN_PYTHON = (3, 8)
FULL = "free some space there and run the command again; nothing is lost"
CLOSED = "REMOTE_DIR must be a folder that REMOTE_USER may write to"
OS_ERROR_HINTS = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EACCES: CLOSED,
    errno.EPERM: CLOSED,
    errno.EROFS: CLOSED,
    errno.ENOTDIR: CLOSED,
    errno.EEXIST: CLOSED,
    errno.ENAMETOOLONG: "choose a shorter name, or another REMOTE_DIR",
    errno.ELOOP: CLOSED,
}


def serve(request: dict[str, Any]) -> None:
    """Answer one request: `{"sources", "mark", "call", "given"}`."""
    sys.stdout.write("\n" + request["mark"] + "\n")  # what the login shell may have printed ends here
    sys.stdout.flush()
    if sys.version_info < MIN_PYTHON:
        version = ".".join(map(str, sys.version_info[:3]))
        fact = f"Python is {version} there, and 3.8 is the oldest that will do"
        sys.stdout.write(f'{{"refused": "{fact}", "hint": "say by REMOTE_PYTHON where a newer one is"}}\n')
        return
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what is begun is ended, whether or not somebody listens
    load(request["sources"])
    for name in ("boot", "sources"):  # for those who start others in the same way
        setattr(sys.modules[PACKAGE], name, request[name])
    protocol: Any = sys.modules[PACKAGE + ".protocol"]
    if request.get("beat", True):
        threading.Thread(target=_beat, args=(protocol,), daemon=True).start()
    module, name = request["call"].split(":")
    try:
        answer = getattr(sys.modules[f"{PACKAGE}.{module}"], name)(**request["given"])
        if isinstance(answer, types.GeneratorType):
            for frame in answer:
                protocol.send(frame=frame)
            answer = None
        protocol.send(answer=answer)
    except protocol.AgentError as refused:
        protocol.send(refused=refused.problem, hint=refused.hint)
    except BrokenPipeError:  # nobody listens any more
        os._exit(0)
    except OSError as error:
        if error.errno is None or error.errno not in OS_ERROR_HINTS:
            raise
        protocol.send(
            refused=f"{error.filename or request['call']}: {os.strerror(error.errno).lower()}",
            hint=OS_ERROR_HINTS[error.errno],
        )


def load(sources: dict[str, str]) -> None:
    """Import each of `{name: source}` as a module of PACKAGE; one may import those before it."""
    parts = PACKAGE.split(".")
    for i in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    for name, source in sources.items():
        module = types.ModuleType(f"{PACKAGE}.{name}")
        sys.modules[module.__name__] = module
        setattr(sys.modules[PACKAGE], name, module)
        exec(compile(source, f"<{name}>", "exec"), module.__dict__)


def _beat(protocol: Any) -> None:
    while True:
        time.sleep(HEARTBEAT_S)
        try:
            protocol.send(alive=True)
        except OSError:
            protocol.unbroken.acquire()
            os._exit(0)


if "request" in globals():  # executed as it was sent
    serve(globals()["request"])
