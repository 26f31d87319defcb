"""The end of a command: warnings, verdict and next command; --json, --quiet; on a terminal and in a pipe."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shlex
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from src import outcome
from src.next_command import next_line
from src.outcome import Outcome
from src.utils.units import count, format_duration, format_rate, format_size

ROOT = Path(__file__).resolve().parents[1]
RUN = "2026-01-15_10-30-45"
STAGE = """
import sys
from src import outcome
from src.utils.logs import log, log_verdict
from src.utils.progress import progress

def train(config):
    print("a library prints")
    for _ in range(2):
        log.warning("the same %s", "warning " + "with many words " * 8)
    log.info("a line in between")
    with progress("test", 3, "row") as bar:
        bar.bar.delay = 0
        for _ in range(3):
            bar.add(1)
            bar.bar.refresh()
    log_verdict("trained", document={"metrics": {"loss": 1.5}}, run=a_run())

def a_run():
    from pathlib import Path
    run = Path("outputs/runs/x")
    run.mkdir(parents=True)
    (run / "manifest.json").write_text('{"stage": "train", "started": "now", "status": "finished"}')
    return run
"""


def ended(assay: Any, *words: str, body: str = STAGE, **variables: str) -> subprocess.CompletedProcess[str]:
    (assay.site / "probe.py").write_text(body)
    (assay.site / "probed.py").write_text(PROBED)
    done: subprocess.CompletedProcess[str] = assay("train", *words, module="probed", **variables)
    return done


PROBED = """
import sys
from src import main
main.STAGES["train"] = main.STAGES["train"]._replace(function="probe:train", check="")
main.import_function = lambda path: getattr(__import__("probe"), path.split(":")[1])
sys.exit(main.main())
"""


def test_warnings_then_the_verdict_then_the_next_command_come_last(assay: Any) -> None:
    done = ended(assay, "lr=1e-4")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == ""
    assert [line[:30] for line in lines[:2]] == ["a library prints", "warning: the same warning with"]
    assert lines[-5:][:2] == ["a line in between", "1 warning:"] and lines[-3].startswith("  the same warning")
    assert lines[-2:] == ["trained", "next: make eval RUN=x"]
    assert "\r" not in done.stdout


def test_json_is_one_document_and_everything_else_goes_to_stderr(assay: Any) -> None:
    body = STAGE.replace(
        'print("a library prints")', 'print("a library prints")\n    import os; os.system("echo a child prints")'
    )
    done = ended(assay, "--json", body=body)
    found = json.loads(done.stdout)
    assert (found["stage"], found["exit_code"], found["metrics"]) == ("train", 0, {"loss": 1.5})
    assert found["verdict"] == "trained" and found["next"] == "make eval RUN=x" and len(found["warnings"]) == 1
    assert "a library prints" in done.stderr and "a child prints" in done.stderr


def test_an_error_is_a_document_too_and_keeps_its_exit_code(assay: Any) -> None:
    done = assay("train", "epochz=2", "lr=x", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_code"] == 2
    assert len(found["error"]) == 2 and found["hint"] == "make train ARGS=--help lists every setting"
    assert "epochz is not a setting" in done.stderr


def test_quiet_leaves_warnings_and_the_verdict(assay: Any) -> None:
    lines = ended(assay, "--quiet").stdout.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["a", "warning:", "warning:", "trained", "next:"]


@pytest.mark.parametrize("columns", [80, 200])
def test_a_terminal_breaks_lines_between_words_and_shows_a_bar(assay: Any, columns: int) -> None:
    (assay.site / "probe.py").write_text(STAGE)
    (assay.site / "probed.py").write_text(PROBED)
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    variables = {k: v for k, v in os.environ.items() if k not in {"COLUMNS", "LINES"}}
    variables |= {"TERM": "xterm", "FORBIDDEN_IMPORTS": ""}
    process = subprocess.Popen(
        [sys.executable, "-m", "probed", "train"], cwd=assay.cwd, stdout=terminal, stderr=terminal,
        env=variables | {"PYTHONPATH": f"{assay.site}{os.pathsep}{ROOT}"},
    )  # fmt: skip
    os.close(terminal)
    text = _read_all(main)
    assert process.wait() == 0, text
    shown = [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]
    assert max(map(len, shown)) <= columns and "test: 100%" in text
    warned = shown[1 : shown.index("a line in between")]
    assert {word for line in warned for word in line.split()} == {
        "warning:",
        *["the", "same", "with", "many", "words", "warning"],
    }
    assert len(warned) == (4 if columns == 80 else 2)


def _read_all(descriptor: int) -> str:
    found = b""
    while True:
        try:
            block = os.read(descriptor, 65536)
        except OSError:  # the terminal was closed
            return found.decode()
        if not block:
            return found.decode()
        found += block


# The table of next commands


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs/runs" / RUN
    folder.mkdir(parents=True)
    write(folder / "manifest.json", stage="train", started="2026-01-15", status="finished", run=RUN)
    return folder


def write(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(values))


def after(name: str, /, *words: str, run: Path | None = None, code: int = 0, **facts: Any) -> str:
    return next_line(Outcome(name, run, facts=facts), code, words)


def test_checked_and_planned_data_are_trained_with_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--config-name", "train", "dataset_path=my data.jsonl", "method=qlora", "lora_r=4")
    assert after("check-data", *words) == "make train dataset_path='my data.jsonl' method=qlora lora_r=4"
    assert after("plan", "probe=true", "plan_device=cuda", "lr=1e-4") == "make train lr=1e-4"
    own = ("--config-path", "/own", "--config-name=train", "lr=1")
    assert after("plan", *own) == "make train TRAIN_CONFIG=train lr=1 ARGS='--config-path /own'"
    fitting = {"fitting": "batch_size=1 gradient_accumulation_steps=8"}
    expected = "make train lr=1e-4 batch_size=1 gradient_accumulation_steps=8"
    assert after("plan", "batch_size=8", "lr=1e-4", code=2, **fitting) == expected
    signed = after("check-data", "data_source.url=https://host/a.jsonl?sig=secret")
    assert signed.startswith("with the whole address where *** stands, make train data_source.url=")
    monkeypatch.setenv("ASSAY_PROGRAM", "assay")
    assert after("check-data", "--config-name", "own", "lr=1e-4") == "assay train --config-name own lr=1e-4"


def test_a_run_is_evaluated_then_compared_then_published(run: Path) -> None:
    assert after("train", run=run) == f"make eval RUN={RUN}"
    assert after("train", "output_dir=outputs", run=run) == f"make eval RUN={RUN} output_dir=outputs"
    assert after("eval", "output_dir=x", run=run).startswith(f"make eval RUN=outputs/runs/{RUN}")
    write(run / "metrics.json", eval={"test": {"rougeL": 0.5}})
    facts = json.loads((run / "manifest.json").read_text())
    write(run / "manifest.json", **facts, base_model={"name": "a/b"})
    assert after("eval", RUN, run=run) == "make eval-baseline model_name=a/b"
    write(run / "comparison.json", verdict={"outcome": "promoted"})
    for stage in ("eval", "eval-baseline", "compare", "report", "validate", "ssh-fetch"):
        assert after(stage, run=run) == f"make publish RUN={RUN}"
    assert after("publish", run=run, published="artifacts/models/x/1").startswith(
        "use the model: artifacts/models/x"
    )


def test_a_run_without_evaluation_data_is_trained_with_rows_held_out(run: Path) -> None:
    facts = json.loads((run / "manifest.json").read_text())
    write(run / "manifest.json", **facts, evaluation_data={"path": None})
    assert after("train", "dataset_path=x.jsonl", run=run) == "make train dataset_path=x.jsonl eval_split=0.1"


@pytest.mark.parametrize(
    ("outcome", "code", "says"), [("cannot_tell", 4, "evaluate more rows"), ("not_better", 3, "read ")]
)
def test_a_refused_run_says_what_would_decide(run: Path, outcome: str, code: int, says: str) -> None:
    write(run / "metrics.json", eval={"test": {"rougeL": 0.5}})
    write(run / "comparison.json", verdict={"outcome": outcome, "split": "test", "examples": 24})
    assert after("publish", run=run, code=code).startswith(says)
    assert after("eval", run=run).startswith(says)
    judged = {"judged": {"outcome": outcome, "split": "test", "examples": 24}}  # publish judges once more
    write(run / "comparison.json", verdict={"outcome": "promoted", "split": "test", "examples": 24})
    assert after("publish", run=run, code=code, **judged).startswith(says)


def test_what_would_decide_keeps_the_folders_and_the_settings_of_the_run(run: Path) -> None:
    facts = json.loads((run / "manifest.json").read_text())
    words = ["dataset_path=a b.jsonl", "eval_split=15", "model_name=m", "output_dir=outputs"]
    write(run / "manifest.json", **facts, command=["python", "-m", "src.main", "train", *words])
    write(run / "metrics.json", eval={"test": {"rougeL": 0.5}})
    write(run / "comparison.json", verdict={"outcome": "cannot_tell", "split": "test", "examples": 24})
    more = {"decides": outcome.Step("train", ("eval_split=30",), "hold out more")}
    again = "make train dataset_path='a b.jsonl' model_name=m output_dir=outputs eval_split=30"
    assert after("eval", RUN, "gate.split=test", run=run, **more) == f"hold out more, then {again}"
    write(run / "manifest.json", **facts)
    own = f"make train TRAIN_CONFIG=outputs/runs/{RUN}/config_used.yaml eval_split=30"
    assert after("eval", run=run, **more).endswith(own)
    split = {"decides": outcome.Step("eval", ("gate.split=Test set (v2)",))}
    found = after("eval", "output_dir=outputs", run=run, **split)
    assert found == f"make eval RUN={RUN} gate.split='Test set (v2)' output_dir=outputs"


def test_what_was_interrupted_is_resumed(run: Path) -> None:
    assert after("train", "lr=1", run=run, code=75) == f"make train resume={RUN}"
    assert after("eval", RUN, "splits=[test]", run=run, code=130) == f"make eval RUN={RUN} splits='[test]'"
    assert after("train", "-m", "lr=1,2", code=130, sweep=True) == "make train lr=1,2 ARGS=-m"
    words = ("search=lora", "search.trials=3")
    assert after("train", *words, code=130, sweep=True) == "make train search=lora search.trials=3"
    assert after("train", *words, sweep=True, best_run=str(run)) == f"make eval RUN={RUN}"


def test_what_ran_on_a_server_is_fetched_followed_or_resumed() -> None:
    done = {"job": "job-1", "remote_run": RUN, "running": False}
    assert after("ssh-train", stage="train", **done) == f"make ssh-fetch RUN={RUN}"
    assert after("ssh-train", job="job-1", detached=True) == "make ssh-attach RUN=job-1"
    assert after("ssh-attach", stage="train", code=75, **done) == f"make ssh-train resume={RUN}"
    assert after("ssh-train", job="job-1", running=True, code=130) == "make ssh-attach RUN=job-1"
    assert after("ssh-plan", "lr=1", "--detach", stage="plan", **done) == "make ssh-train lr=1"
    assert after("push") == "make ssh-train"
    assert after("ssh-status") == ""


def test_a_failed_stage_has_its_remedy_in_the_error() -> None:
    assert after("train", "lr=1", code=2) == ""


# Numbers


def test_numbers_are_written_as_people_write_them() -> None:
    assert [count(n, "row") for n in (0, 1, 2, 22520)] == ["0 rows", "1 row", "2 rows", "22,520 rows"]
    assert [format_duration(s) for s in (0.42, 12, 59.7, 200, 3600, 7500, 273_600)] == [
        "0.4 s", "12 s", "1 min", "3 min 20 s", "1 h", "2 h 5 min", "3 d 4 h",
    ]  # fmt: skip
    assert [format_size(b) for b in (1, 512, 1500, 1.2e9, 15e12)] == [
        "1 byte", "512 bytes", "1.5 kB", "1.2 GB", "15.0 TB",
    ]  # fmt: skip
    assert [format_rate(r) for r in (22519.6, 412, 3.14)] == ["22,520", "412", "3.1"]


def test_a_command_on_a_narrow_terminal_continues_as_a_shell_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "40")
    for before, setting in (
        ("next: ", "output_dir=/somewhere/else"),
        ("add rows, then ", "user_prompt='a  b'\"'\"'c'"),
    ):
        line = f"{before}make eval RUN={RUN} {setting} batch_size=4"
        shown = outcome.fit(line, Terminal())  # type: ignore[arg-type]
        assert len(shown) > 40 and max(map(len, shown.split("\n"))) <= 40
        command = shown[shown.index("make") :]
        assert shlex.split(command.replace("\\\n", "")) == shlex.split(line[len(before) :])
    shown = outcome.fit("the words are so many; run make compare RUN=latest", Terminal())  # type: ignore[arg-type]
    assert shown == "the words are so many; run\n  make compare RUN=latest"
