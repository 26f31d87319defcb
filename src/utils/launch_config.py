"""A validated configuration handed from a launcher to the processes that it starts, through the environment.

So that each of them has the very same one, and no command line and no file holds it. Secrets are handed as
references to the environment variables that hold them, which the processes inherit.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from src.utils.secrets import redact, restore_secrets

LAUNCH_CONFIG = "ASSAY_LAUNCH_CONFIG"


def to_env(settings: Mapping[str, Any], command: Sequence[str]) -> dict[str, str]:
    """The environment variable that hands `settings`, and the command line that a person typed."""
    text = json.dumps(redact({"settings": settings, "command": list(command), "launcher": os.getpid()}))
    return {LAUNCH_CONFIG: base64.b64encode(zlib.compress(text.encode())).decode()}


def inherited_settings() -> dict[str, Any] | None:
    """The settings that this process was handed, None if it was started by a person."""
    found = _inherited()
    return dict(restore_secrets(found["settings"])) if found else None


def launcher_command() -> list[str] | None:
    """The command line that the launcher was started with."""
    found = _inherited()
    return list(found["command"]) if found else None


def launcher_pid() -> int | None:
    """The process that started this one."""
    found = _inherited()
    return int(found["launcher"]) if found else None


def _inherited() -> dict[str, Any] | None:
    if LAUNCH_CONFIG not in os.environ:
        return None
    return dict(json.loads(zlib.decompress(base64.b64decode(os.environ[LAUNCH_CONFIG]))))
