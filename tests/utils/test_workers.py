"""Work over processes: in order, with bounded memory, and with errors and deaths that are heard of."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from src.errors import DataError, UserError
from src.utils.workers import QUEUED_PER_PROCESS, cores, map_ordered

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_results_come_in_the_order_of_the_input(processes: int) -> None:
    def work(number: int) -> tuple[int, int]:
        time.sleep(0.002 * (number % 3))
        return number, os.getpid()

    found = list(map_ordered(work, range(30), processes))
    assert [number for number, _ in found] == list(range(30))
    assert (os.getpid() in {pid for _, pid in found}) == (processes == 1)


def test_the_input_is_not_read_far_ahead() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for taken in range(1000):  # noqa: UP028 - the variable is what is looked at
            yield taken

    results = map_ordered(abs, items(), 2)
    for _ in range(5):
        next(results)
    assert taken <= 5 + QUEUED_PER_PROCESS * 2
    results.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("processes", [1, 2])
def test_what_the_work_raises_is_raised(processes: int) -> None:
    def work(number: int) -> int:
        if number == 7:
            raise DataError("row 7 is bad", hint="mend it")
        return number

    with pytest.raises(DataError, match="row 7 is bad") as caught:
        list(map_ordered(work, range(20), processes))
    assert caught.value.hint == "mend it"


def test_a_killed_worker_is_reported() -> None:
    def work(number: int) -> int:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(UserError, match="a worker process was killed"):
        list(map_ordered(work, range(20), 2))


def test_no_process_outlives_a_parent_that_is_killed() -> None:
    script = (
        "import os, time\n"
        "from src.utils.workers import map_ordered\n"
        "def work(n):\n    os.write(1, b'%d\\n' % os.getpid())\n    time.sleep(60)\n"
        "list(map_ordered(work, range(9), 2))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        children = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
    psutil.wait_procs([psutil.Process(pid) for pid in children if psutil.pid_exists(pid)], timeout=60)
    alive = [p for p in children if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]
    assert alive == []


def test_the_processes_leave_interrupts_to_their_parent_and_use_one_core_each() -> None:
    def work(_: int) -> tuple[bool, str | None]:
        return signal.getsignal(signal.SIGINT) is signal.SIG_IGN, os.environ.get("TOKENIZERS_PARALLELISM")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        alone = work(0)
        assert not alone[0]
        assert set(map_ordered(work, range(6), 2)) == {(True, "false")}
        assert work(0) == alone
    finally:
        signal.signal(signal.SIGINT, before)


def test_cores_are_those_that_the_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    assert cores() == len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
