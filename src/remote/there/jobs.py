"""The jobs of a server: started apart from every connection, watched, stopped.

REMOTE_DIR/outputs/remote/jobs/<id>/
  job.json   what was started, as which process of which boot; written before it runs
  log        all that it says
  exit.json  how it ended
  run        the run directory that it works in
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, Dict  # noqa: UP035  (an alias is evaluated, by Python 3.8 too)

from src.remote.there import files, venv
from src.remote.there.wire import Refused, send

HOME = "outputs/remote"
POLL = 0.1  # seconds
CHUNK = 1 << 16  # bytes
LASTS = 1.0  # seconds without news after which a follower asks whether the process is still there
CACHE = ".cache"
CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "MPLCONFIGDIR": "matplotlib"}
LONGEST_TMP = 60  # of a socket's path, 108 bytes, multiprocessing needs the rest

Job = Dict[str, Any]  # noqa: UP006

# To start


def start(folder: str, job: Job, environment: dict[str, str], code: dict[str, Any] | None) -> Job:
    """Start `job` unless its id is there already, apart from this connection.

    `job` is `{"id", "stage", "words", "argv"}`, `environment` what it gets besides; `code` what it runs from:
    see files.snapshot.
    Returns: its record, as `look` gives it, and in `again` whether it was there before.
    """
    root = files.root(folder)
    place = os.path.join(root, HOME, "jobs", job["id"])
    try:
        os.makedirs(place, exist_ok=True)
    except FileNotFoundError:  # as below /proc
        raise Refused(
            f"{root} cannot be made", "REMOTE_DIR must be a folder that REMOTE_USER may write to"
        ) from None
    with open(os.path.join(root, HOME, ".lock"), "a") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # ends with this process, however that ends; no child inherits it
        if os.path.exists(os.path.join(place, "job.json")):
            return dict(look(root, job["id"]), again=True)
        try:
            _ready(root, job)
            snapshot = files.snapshot(root, code) if code else None
            _apart("supervise", root=root, job=job, environment=environment, snapshot=snapshot)
        except Refused:
            shutil.rmtree(place, ignore_errors=True)
            raise
    return dict(look(root, job["id"]), again=False)


def _ready(root: str, job: Job) -> None:
    """What runs in the environment waits until that is there; what makes it does not."""
    if not os.path.isabs(job["argv"][0]):
        venv.check(root)


def _apart(function: str, **given: Any) -> None:
    """Call `function` of this file in a process that no connection ends; back once it has sent its first frame."""
    here: Any = sys.modules["src.remote.there"]
    boot = "import json,sys;request=json.loads(sys.stdin.readline());exec(request['boot'])"
    other = subprocess.Popen(
        [sys.executable, "-c", boot],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd="/",
    )
    request = {"boot": here.boot, "sources": here.sources, "mark": "-", "beat": False, "given": given}
    request["call"] = "jobs:" + function
    assert other.stdin and other.stdout and other.stderr
    other.stdin.write(json.dumps(request).encode() + b"\n")
    other.stdin.flush()
    for line in other.stdout:
        if b'"frame"' in line:
            return
        if b'"refused"' in line:
            told = json.loads(line.decode())
            raise Refused(told["refused"], told.get("hint", ""))
    raise RuntimeError(other.stderr.read().decode())


def supervise(root: str, job: Job, environment: dict[str, str], snapshot: str | None) -> None:
    """Start the process of a job, wait for its end, and write down how it ended.

    The process is its own session's first, and waits until its record is on disk: what runs is recorded.
    """
    place = os.path.join(root, HOME, "jobs", job["id"])
    surroundings = _environment(root, place, job, environment, snapshot)
    argv = [os.path.join(root, job["argv"][0]), *job["argv"][1:]]
    typed = "utf-8", "surrogateescape"  # whatever this session's locale is
    with open(os.path.join(place, "log"), "ab") as log:
        child = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r go && exec "$@" </dev/null', "sh", *(word.encode(*typed) for word in argv)],
            cwd=root,
            env={name.encode(*typed): value.encode(*typed) for name, value in surroundings.items()},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    record = {key: job[key] for key in ("id", "stage", "words")}
    record.update(
        pid=child.pid,
        ticks=ticks(child.pid),
        boot_id=boot_id(),
        host=socket.gethostname(),
        started=time.time(),
        snapshot=os.path.basename(snapshot) if snapshot else None,
    )
    # Whoever asked for this may be gone, and another, asked again, may have started the job meanwhile.
    ours = files.write(os.path.join(place, "job.json"), json.dumps(record), new=True)
    assert child.stdin
    if ours:
        child.stdin.write(b"\n")
    child.stdin.close()  # and the process ends that was not told to go
    _alone()
    code = child.wait()
    if not ours:
        return
    files.write(os.path.join(place, "exit.json"), json.dumps({"code": code, "ended": time.time()}))


def _alone() -> None:
    """Tell who waits in `_apart` that this process goes on by itself, and hold no end of any connection."""
    with contextlib.suppress(OSError):  # who waited is gone: the connection was cut just now
        send(frame={})
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)


def _environment(root: str, place: str, job: Job, given: dict[str, str], snapshot: str | None) -> dict[str, str]:
    """What a job finds: nothing it does by itself is written outside of the project's folder."""
    found = {k: v for k, v in os.environ.items() if not k.startswith("SSH_")}
    cache = os.path.join(root, CACHE)
    found.setdefault("HF_HOME", os.path.join(cache, "huggingface"))
    found["XDG_CACHE_HOME"] = cache
    temporary = os.path.join(cache, "tmp")
    if len(temporary) <= LONGEST_TMP:
        os.makedirs(temporary, exist_ok=True)
        found["TMPDIR"] = temporary
    found.update({name: os.path.join(cache, folder) for name, folder in CACHES.items()})
    found.update(given)
    found.update(PYTHONUNBUFFERED="1", PYTHONUTF8="1")
    found.update(ASSAY_RUN_ID=job["id"], ASSAY_RUN_FILE=os.path.join(place, "run"))
    if snapshot:
        found.update(PYTHONPATH=snapshot, PYTHONSAFEPATH="1")
    return found


# To watch


def look(folder: str, id: str) -> Job:
    """The record of a job and what became of it.

    Returns: besides the record `status` (running, ended, interrupted, elsewhere), the exit `code` and when it
    `ended`, the `run` directory and the status that its manifest claims, the `size` of the log in bytes, when it
    was last `heard` of and its `last` line.
    """
    place = _place(folder, id)
    record = _read(os.path.join(place, "job.json"))
    if record is None:
        return {"id": id, "status": "never started", "started": None}
    size, heard, last = _tail(os.path.join(place, "log"))
    status = "running" if alive(record) else "interrupted"  # before its end is looked for: it may come just now
    ended = _read(os.path.join(place, "exit.json")) or {"code": None, "ended": None}
    if ended["code"] is not None:
        status = "ended"
    elif record["host"] != socket.gethostname():
        status = "elsewhere"  # as on another login node, whose processes are not seen from here
    run = _text(os.path.join(place, "run")).strip() or None
    manifest = _read(os.path.join(run, "manifest.json")) if run else None
    return dict(
        record,
        status=status,
        run=run,
        run_status=(manifest or {}).get("status"),
        size=size,
        heard=heard,
        last=last,
        **ended,
    )


def alive(record: Job) -> bool:
    """Whether the process of a record still runs: a pid is reused, its start and the boot are not."""
    if record["host"] != socket.gethostname() or record["boot_id"] != boot_id():
        return False
    return ticks(record["pid"]) == record["ticks"]


def boot_id() -> str:
    return _text("/proc/sys/kernel/random/boot_id").strip()


def ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since the boot (proc(5), field 22); None of one that has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def known(folder: str) -> list[Job]:
    """Every job, the newest first, as `look` gives it."""
    jobs = os.path.join(files.root(folder), HOME, "jobs")
    found = [look(folder, id) for id in (os.listdir(jobs) if os.path.isdir(jobs) else [])]
    return sorted((job for job in found if job["started"]), key=lambda job: job["started"], reverse=True)


def follow(folder: str, id: str, offset: int, wait: bool = True) -> Iterator[dict[str, Any]]:
    """The log from `offset` bytes on: `{"at", "data"}` in base64, and at last `{"end"}` with the job's record.

    With `wait` it goes on until the job has ended.
    """
    place = _place(folder, id)
    path = os.path.join(place, "log")
    asked = time.monotonic()
    while True:
        over = not wait or os.path.exists(os.path.join(place, "exit.json"))
        if not over and time.monotonic() - asked > LASTS:
            asked = time.monotonic()
            over = look(folder, id)["status"] not in ("running", "elsewhere")
        for data in _from(path, offset):
            yield {"at": offset, "data": base64.b64encode(data).decode()}
            offset += len(data)
        if over:  # known before the last of the log was read
            yield {"end": look(folder, id)}
            return
        time.sleep(POLL)


def _from(path: str, offset: int) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            while True:
                data = file.read(CHUNK)
                if not data:
                    return
                yield data
    except FileNotFoundError:
        return


# To stop


def stop(folder: str, id: str, grace: float) -> Job:
    """Ask a job to end, and see to it that it has ended after `grace` seconds, whoever is connected then.

    Returns: its record.
    """
    record = look(folder, id)
    if record["status"] == "running":
        _apart("end", root=files.root(folder), id=id, grace=grace)
    return look(folder, id)


def end(root: str, id: str, grace: float) -> None:
    """TERM to the job's process, which checkpoints; KILL to all of its session after `grace` seconds."""
    record = look(root, id)
    slurm = _read(os.path.join(_place(root, id), "slurm.json")) or {"ids": []}
    _cancel(["--signal=TERM"], slurm["ids"])  # to the steps: --full ends srun, which kills what it has started
    if not slurm["ids"]:
        _signal(record["pid"], signal.SIGTERM)
    _alone()
    until = time.monotonic() + grace
    while time.monotonic() < until:
        if not alive(record):
            return
        time.sleep(POLL)
    _cancel([], slurm["ids"])
    for pid in _session(record["pid"]):
        _signal(pid, signal.SIGKILL)


def _cancel(how: list[str], ids: list[str]) -> None:
    """Pass a signal to the jobs that a job has submitted to Slurm."""
    if ids and shutil.which("scancel"):
        subprocess.call(["scancel", *how, *ids], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _session(leader: int) -> list[int]:
    """The processes of the session that `leader` began, and those that they have started, whatever theirs is."""
    parents, found = {}, []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(name)] = int(fields[1])
            if int(fields[3]) == leader:
                found.append(int(name))
    for pid in parents:
        above = pid
        while above in parents and above not in found:
            above = parents[above]
        if above in found and pid not in found:
            found.append(pid)
    return found


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


# Files


def _place(folder: str, id: str) -> str:
    return os.path.join(files.root(folder), HOME, "jobs", id)


def _read(path: str) -> Any:
    text = _text(path)
    return json.loads(text) if text else None


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def _tail(path: str) -> tuple[int, float | None, str]:
    """The size of a log, when it was written last, and its last line that is not empty."""
    try:
        with open(path, "rb") as file:
            size, heard = file.seek(0, os.SEEK_END), os.fstat(file.fileno()).st_mtime
            file.seek(max(0, size - 2000))
            lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    except FileNotFoundError:
        return 0, None, ""
    return size, heard, next((line.strip() for line in reversed(lines) if line.strip()), "")
