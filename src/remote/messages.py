"""The shape of each message that the agent on the server sends: an answer is checked before it is used."""

from __future__ import annotations

import base64
import json
import os
import re
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    TypeAdapter,
    ValidationError,
    with_config,
)
from typing_extensions import NotRequired, TypedDict

MAX_ID = 100  # characters
ID = re.compile(rf"\w[\w.-]{{0,{MAX_ID - 1}}}")


def _matching(pattern: re.Pattern[str], what: str) -> AfterValidator:
    def check(value: str) -> str:
        if not pattern.fullmatch(value):
            raise ValueError(f"should be {what}")
        return value

    return AfterValidator(check)


def _decode(value: object) -> object:
    return base64.b64decode(value, validate=True) if isinstance(value, str) else value


def _path(value: str) -> str:
    if "\0" in value or not value.startswith("/"):
        raise ValueError("should be an absolute path without NUL")
    os.fsencode(value)  # a lone surrogate: UnicodeEncodeError is a ValueError
    return value


Text = InstanceOf[str]  # not `str`, which rejects the surrogates of file names that are not UTF-8
AbsolutePath = Annotated[Text, AfterValidator(_path)]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Seconds = Annotated[float, Field(ge=-1e11, le=1e11)]  # since the epoch
Id = Annotated[Text, _matching(ID, f"at most {MAX_ID} letters, digits, '.', '_' and '-'")]
Sha256 = Annotated[Text, _matching(re.compile("[0-9a-f]{64}"), "a sha256")]
Data = Annotated[bytes, BeforeValidator(_decode)]  # base64

_shape = with_config(ConfigDict(allow_inf_nan=False, extra="forbid"))
_record = with_config(ConfigDict(allow_inf_nan=False, extra="allow"))  # other versions may have written more


# Jobs, see agent/jobs.py


@_record
class _JobShape(TypedDict):
    id: Id
    stage: Annotated[Text, _matching(re.compile("[a-z-]{1,40}"), "the name of a stage")]
    words: list[Text]
    host: Text
    pid: Count
    started: Seconds
    status: Literal["running", "ended", "interrupted", "elsewhere"]
    run: AbsolutePath | None
    run_status: Any
    code: Annotated[int, Field(ge=-255, le=255)] | None
    ended: Seconds | None
    disk_full: bool
    log_size: Count
    log_time: Seconds | None
    last_line: Text
    now: Seconds


@_record
class _StartedShape(_JobShape):
    existed: bool


@_shape
class _LogShape(TypedDict):
    at: Count
    data: Data


@_shape
class _LogEndShape(TypedDict):
    end: _JobShape


# A run directory, see agent/list_run.py


@_shape
class _RunShape(TypedDict):
    manifest: dict[Text, Any]
    host: Text
    rsync: bool


@_shape
class _FileShape(TypedDict):
    path: Text
    size: Count
    mtime: Seconds
    sha256: Sha256


@_shape
class _LinkShape(TypedDict):
    path: Text
    link: Text


@_shape
class _FolderShape(TypedDict):
    path: Text
    folder: Literal[True]


@_shape
class _OutsideShape(TypedDict):
    path: Text
    outside: Text


# A push, see agent/apply_push.py


@_record
class _ClientShape(TypedDict):
    who: Text
    when: Text


@_record
class _PushShape(TypedDict):
    named: dict[Text, bool]
    rsync: bool
    free: Count
    incoming: Text


@_record
class _LackingShape(_PushShape):
    lacking: dict[Sha256, Count]


@_record
class _ReportShape(_PushShape):
    new: list[Text]
    changed: list[Text]
    removed: list[Text]
    kept: list[Text]
    replaced: list[Text]
    aside: Text
    bytes: Count
    other: NotRequired[_ClientShape | None]


# The server, see agent/host_info.py and agent/sessions.py


@_record
class _PythonShape(TypedDict):
    program: Text
    version: list[Count]


@_record
class _AcceleratorShape(TypedDict):
    kind: Literal["cuda", "rocm", "cpu"]
    gpus: list[Annotated[list[Text | Count | None], Field(min_length=2, max_length=2)]]
    driver: Text | None
    runtime: Text | None
    problem: Text | None
    scheduled: Text | None


@_record
class _ReadyShape(TypedDict):
    accelerator: Text
    torch: Text | None


@_record
class _HostShape(TypedDict):
    root: Text
    system: Text
    python: _PythonShape
    accelerator: _AcceleratorShape
    target: Literal["cuda", "rocm", "cpu"]
    cores: Count
    memory: Count
    free: Count
    rsync: bool
    kills: bool
    user: Text
    ready: _ReadyShape | None
    missing: list[Text]
    torch: Text | None
    init: Id | None
    runs: list[Id]


@_shape
class _ShellShape(TypedDict):
    root: Text
    argv: Annotated[list[Text], Field(min_length=1)]
    environment: dict[Text, Text]


@_shape
class _PortShape(TypedDict):
    port: Annotated[int, Field(ge=1, lt=1 << 16)]


@_shape
class _ErrorShape(TypedDict):
    error: Text
    hint: NotRequired[Text]


ANSWERS: dict[str, Any] = {
    "apply_push:apply": _LackingShape | _ReportShape,
    "fs:folder_size": Count,
    "host_info:collect": _HostShape,
    "jobs:list_jobs": list[_JobShape],
    "jobs:stop": _JobShape,
    "list_run:find_run": AbsolutePath | None,
    "sessions:shell": _ShellShape,
    "start:start": _StartedShape,
}
FRAMES: dict[str, Any] = {  # of the functions that yield; their answer is None
    "jobs:follow": _LogShape | _LogEndShape,
    "list_run:list_run": _RunShape | _FileShape | _LinkShape | _FolderShape | _OutsideShape,
    "sessions:tensorboard": _PortShape,
}


def parse(function: str, line: str) -> dict[str, Any]:
    """One message of a request for `function`: a frame, a heartbeat, the answer or an error.

    Raises: ValueError if it does not have the shape that the function promises.
    """
    try:
        message = json.loads(line, parse_constant=_reject_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(message, dict) or not message.keys() & {"frame", "alive", "answer", "error"}:
        raise ValueError(f"it is no message of the agent: {line[:80]}")
    for kind, shapes in (("frame", FRAMES), ("answer", ANSWERS)):
        if kind in message:
            message[kind] = _checked(shapes.get(function), message[kind], kind)
    return _checked(_ErrorShape, message, "") if "error" in message else message


def _checked(shape: Any, value: Any, name: str) -> Any:
    """The value, if it has the shape. Raises: ValueError, which names a part that has not."""
    try:
        return _adapter(shape).validate_python(value, strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
    first = next((each for each in found if each["type"] not in {"missing", "extra_forbidden"}), found[0])
    parts = [str(part) for part in (name, *first["loc"])]
    where = ".".join(part for part in parts if part and not part.startswith(("_", "list[")))
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    raise ValueError(f"{where or 'it'}: {reason[:1].lower()}{reason[1:]}")


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
