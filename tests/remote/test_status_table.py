"""The table of ssh-status: what is never truncated, and where the last line of a log is printed."""

from __future__ import annotations

from typing import Any

import pytest

from src.remote import jobs, status_table

ID, RUN = "2026-11-26_21-40-43-3a22", "2026-11-26_21-40-29-6f7e"
LAST = "step 1234/20000  epoch 15.00  loss 1.234  eval_loss 5.91  12,345 tokens/s  3 h 12 min to go, 日本語"


def job(**changes: Any) -> jobs.Job:
    then = 1_800_000_000.0  # independent of the local time
    known = {"id": ID, "stage": "train", "status": "running", "code": None, "started": then, "ended": None}
    seen = {"log_time": then, "now": then + 4000, "last_line": LAST, "run": None, "run_status": None, "host": "a"}
    return {**known, **seen, **changes}


STOPPED = job(
    status="ended", code=75, ended=1_800_004_000.0, run=f"/home/me/outputs/runs/{RUN}", last_line="saved"
)
FINISHED = job(status="ended", code=0, ended=1_800_004_000.0, last_line="\x1b[32mtrained\x1b[0m\tin 3 s")
ELSEWHERE = job(id="a-long-name-" * 4, stage="eval-baseline", status="elsewhere", host="login2.example.org")


def shown(
    found: list[jobs.Job], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int | None
) -> list[str]:
    """The lines below the name of the folder."""
    monkeypatch.setenv("COLUMNS", str(columns)) if columns else monkeypatch.delenv("COLUMNS", raising=False)
    status_table.print_table(found, "me@server", "~/assay")
    return capsys.readouterr().out.splitlines()[1:]


@pytest.mark.parametrize("columns", [1, 60, 80, 100, 200])
def test_only_the_last_line_of_a_log_is_truncated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    lines = shown([job(), STOPPED, FINISHED, ELSEWHERE], monkeypatch, capsys, columns)
    assert max(map(status_table.cell_len, lines)) <= max(columns, status_table.MIN_WIDTH)
    printed = " ".join(line.strip() for line in lines)
    for each in (
        ID,
        RUN,
        "running",
        "stopped, with a checkpoint",
        "finished",
        "eval-baseline",
        "cannot be checked from this host",
    ):
        assert each in printed
    assert any(LAST[:24] in line for line in lines)
    assert "trained in 3 s" in "\n".join(lines)
    assert any(line.endswith(f"in {RUN}: saved") for line in lines) or columns == 200
    assert ELSEWHERE["id"] in "".join(line.strip() for line in lines)


def test_the_last_line_is_beside_the_rest_if_it_fits_and_below_otherwise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown([job(), FINISHED], monkeypatch, capsys, 80) == [
        "run                       stage  status    for        last log line",
        f"{ID}  train  running   1 h 6 min  step 1234/20000  epoch 15…",
        f"{ID}  train  finished  1 h 6 min  trained in 3 s",
    ]
    assert shown([job(), STOPPED | {"run": None}], monkeypatch, capsys, 80) == [
        "run                       stage  status                      for",
        "  last log line",
        f"{ID}  train  running                     1 h 6 min",
        "  step 1234/20000  epoch 15.00  loss 1.234  eval_loss 5.91  12,345 tokens/s  3…",
        f"{ID}  train  stopped, with a checkpoint  1 h 6 min",
        "  saved",
    ]


def test_without_a_terminal_each_run_is_one_full_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, *lines = shown([job(), STOPPED, ELSEWHERE], monkeypatch, capsys, None)
    assert all(line.endswith(last) for line, last in zip(lines, (LAST, "saved", LAST), strict=True))


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (59.6, "1 min"), (3725, "1 h 2 min"), (90000, "1 d 1 h"), (-5, "0 s")]
)
def test_a_duration_has_its_two_largest_units(seconds: float, words: str) -> None:
    assert status_table.format_duration(seconds) == words
