"""How what runs on the server speaks: one JSON object a line, after a line that only the client knows."""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

BOOTSTRAP = 'import json,sys;request=json.loads(sys.stdin.readline());exec(request["boot"])'  # for python3 -c
PYTHON_OPTIONS = ("-X", "utf8")  # of it: names of files are UTF-8, whatever the locale is

_lock = threading.Lock()
unbroken = threading.Lock()  # held by what is to be ended once it is begun, though nobody listens any more


class AgentError(Exception):
    """What a person can mend: the fact, and the remedy."""

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint


def send(**frame: Any) -> None:
    line = json.dumps(frame) + "\n"  # ASCII: no locale can spoil it
    with _lock:
        sys.stdout.write(line)
        sys.stdout.flush()
