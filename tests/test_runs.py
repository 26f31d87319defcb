"""The run directory: what it says is true at every moment, for every process that looks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from src import runs
from src.errors import RunError
from src.runs import FAILED, FINISHED, INTERRUPTED, RUNNING, Run
from src.utils.files import switch_link

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def child(script: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that has printed its first line."""
    with subprocess.Popen(
        [sys.executable, "-c", script, *words],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout and process.stdout.readline()
            yield process
        finally:
            process.kill()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def create(out: Path, **facts: Any) -> Run:
    return runs.create(out, "train", "seed: 1\n", {"method": "lora", "base_model": {"name": "some/base"}, **facts})


def finished(out: Path, **facts: Any) -> Run:
    run = create(out, **facts)
    with run.record_status():
        run.model.mkdir()
    return run


# Making one


def test_a_new_run_says_what_it_is(out: Path) -> None:
    run = create(out, seed=7)
    manifest = json.loads((run.path / "manifest.json").read_text(encoding="utf-8"))
    assert manifest == run.manifest
    assert (manifest["run"], manifest["stage"], manifest["status"]) == (run.id, "train", RUNNING)
    assert (manifest["seed"], manifest["ended"]) == (7, None)
    assert manifest["process"]["pid"] == os.getpid()
    assert (run.path / "config_used.yaml").read_text(encoding="utf-8") == "seed: 1\n"
    assert run.logs.is_dir()
    assert (out / "runs/latest").resolve() == run.path.resolve()


def test_latest_is_relative_so_that_the_folder_can_move(out: Path) -> None:
    run = create(out)
    assert os.readlink(out / "runs/latest") == run.id


MAKER = """
import sys
from src import runs
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[2])):
    runs.create(sys.argv[1], "train", "", {"number": number})
"""


def test_processes_that_start_runs_at_once_get_a_directory_each_and_latest_always_points_to_one(out: Path) -> None:
    each, latest, looks = 15, out / "runs/latest", 0
    with (
        child(MAKER, str(out), str(each)) as a,
        child(MAKER, str(out), str(each)) as b,
        child(MAKER, str(out), str(each)) as c,
    ):
        for process in (a, b, c):
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        while any(process.poll() is None for process in (a, b, c)):
            if latest.is_symlink():
                assert json.loads((latest / "manifest.json").read_text(encoding="utf-8"))["run"]
                looks += 1
        assert [process.returncode for process in (a, b, c)] == [0, 0, 0]
    assert looks > 0
    found = runs.all_runs(out)
    assert len({run.id for run in found}) == 3 * each
    assert {run.manifest["run"] for run in found} == {run.id for run in found}
    assert any(run.id.endswith("-2") for run in found)  # some second had more than one
    assert latest.resolve() in {run.path.resolve() for run in found}
    assert [p.name for p in (out / "runs").iterdir() if p.name.startswith(".")] == []


def test_threads_that_make_folders_at_once_get_one_each(out: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(runs.new_folder, [out / "runs"] * 40))
    assert len(set(folders)) == 40


def test_the_first_run_is_named_as_the_environment_wishes(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for expected in ("job-7", "job-7-2"):
        monkeypatch.setenv("ASSAY_RUN_ID", "job-7")
        assert runs.new_folder(out / "sweeps").name != "job-7"  # that is no run
        run = create(out)
        assert (run.id, run.manifest["run"], os.readlink(out / "runs/latest")) == (expected, expected, expected)
        assert create(out).id.startswith("20")


@pytest.mark.parametrize("name", ["../up", "a/b", "latest", ".hidden"])
def test_a_wish_that_is_no_name_is_refused(out: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("ASSAY_RUN_ID", name)
    with pytest.raises(RunError, match=f"ASSAY_RUN_ID={name} is not a valid run id; use letters"):
        create(out)
    assert not out.exists()


def test_a_command_writes_the_path_of_its_run_to_the_run_file(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = create(out)
    told = tmp_path / "there" / "run"
    monkeypatch.setenv("ASSAY_RUN_FILE", str(told))
    second = create(out)
    assert told.read_text() == f"{second.path.absolute()}\n"
    first.reopen()
    assert told.read_text() == f"{first.path.absolute()}\n"
    with second.record_status("evaluation"):
        assert told.read_text() == f"{second.path.absolute()}\n"
    with first.record_status():
        pass
    assert os.listdir(told.parent) == ["run"]
    monkeypatch.chdir(tmp_path)
    assert told.read_text() != f"{create(Path('out')).path}\n"
    assert Path(told.read_text().strip()).is_absolute()


def test_a_file_in_the_place_of_the_folder_is_one_sentence(out: Path) -> None:
    out.write_text("")
    with pytest.raises(RunError, match="out"):
        create(out)


# Its status


@pytest.mark.parametrize("status", [FINISHED, FAILED, INTERRUPTED])
def test_an_ended_run_is_what_it_ended_as(out: Path, status: str) -> None:
    run = create(out)
    run.update(status=status)
    assert run.status == status


STARTED = """
import sys
from src import runs
print(runs.create(sys.argv[1], "train", "", {}).id, flush=True)
sys.stdin.read()
"""


def test_a_run_of_a_living_process_is_running(out: Path) -> None:
    with child(STARTED, str(out)):
        (run,) = runs.all_runs(out)
        assert run.manifest["process"]["pid"] != os.getpid()
        assert run.status == RUNNING
    assert run.status == INTERRUPTED


def test_a_run_of_a_process_that_is_gone_was_interrupted(out: Path) -> None:
    run = create(out)
    gone = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True)
    run.update(process=run.manifest["process"] | {"pid": int(gone.stdout)})
    assert run.status == INTERRUPTED


def test_a_process_number_that_another_process_got_does_not_bring_a_run_back(out: Path) -> None:
    run = create(out)
    process = run.manifest["process"]
    run.update(process=process | {"created": process["created"] - 3600})
    assert run.status == INTERRUPTED


def test_a_run_of_before_the_machine_was_started_again_was_interrupted(out: Path) -> None:
    run = create(out)
    process = run.manifest["process"]
    assert process["boot_id"] == runs.boot_id()
    run.update(process=process | {"boot_id": "another"})
    assert run.status == INTERRUPTED
    run.update(process=process | {"boot_id": "another", "host": "another.example.org"})
    assert run.status == RUNNING


@pytest.mark.parametrize("unknown", [{"boot_id": None}, {}])
def test_a_run_that_does_not_know_its_boot_is_judged_by_its_process(out: Path, unknown: dict[str, None]) -> None:
    run = create(out)
    process = {k: v for k, v in run.manifest["process"].items() if k != "boot_id"}
    run.update(process=process | unknown)
    assert run.status == RUNNING
    run.update(process=process | unknown | {"created": process["created"] - 3600})
    assert run.status == INTERRUPTED


def test_a_process_that_waits_to_be_buried_does_not_run(out: Path) -> None:
    run = create(out)
    with subprocess.Popen(["true"], stdout=subprocess.PIPE) as dead:
        assert dead.stdout and dead.stdout.read() == b""  # closed at its exit; no process has waited for it yet
        os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
        seen = psutil.Process(dead.pid)
        assert seen.status() == psutil.STATUS_ZOMBIE
        run.update(process=run.manifest["process"] | {"pid": dead.pid, "created": seen.create_time()})
        assert run.status == INTERRUPTED


def test_a_process_of_another_host_is_believed(out: Path) -> None:
    run = create(out)
    run.update(process={"pid": 2**22 + 1, "created": 1.0, "host": "another.example.org"})
    assert run.status == RUNNING


def test_an_earlier_attempt_of_the_same_slurm_job_has_ended(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it ran: the job that was queued again is this process's."""
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    run = create(out)
    process = run.manifest["process"]
    assert (process["slurm"]["job"], process["slurm"]["restart"]) == ("12_1", 0)
    run.update(process=process | {"host": "another.example.org"})
    assert run.status == RUNNING
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run.status == INTERRUPTED
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert run.status == RUNNING


# How it ended


def test_work_that_ends_is_finished(out: Path) -> None:
    run = create(out)
    with run.record_status():
        assert run.status == RUNNING
    assert run.status == FINISHED and run.manifest["ended"]


def test_failed_work_is_recorded_and_its_error_propagates(out: Path) -> None:
    run = create(out)
    with pytest.raises(ZeroDivisionError), run.record_status():
        _ = 1 / 0
    assert run.status == FAILED and run.manifest["ended"]
    assert run.manifest["error"] == "ZeroDivisionError: division by zero"


def test_work_that_the_user_stops_is_interrupted(out: Path) -> None:
    run = create(out)
    with pytest.raises(KeyboardInterrupt), run.record_status():
        raise KeyboardInterrupt
    assert (run.status, run.manifest["error"]) == (INTERRUPTED, "stopped by the user")


def test_an_evaluation_has_a_separate_record(out: Path) -> None:
    run = finished(out)
    before = run.manifest
    with run.record_status("evaluation"):
        assert run.status == FINISHED
        assert run.status_text == "finished, evaluation running"
    assert run.status_text == "finished"
    assert run.manifest["evaluation"]["status"] == FINISHED
    assert {k: v for k, v in run.manifest.items() if k != "evaluation"} == before


def test_an_evaluation_that_fails_leaves_the_run_finished(out: Path) -> None:
    run = finished(out)
    with pytest.raises(ValueError), run.record_status("evaluation"):
        raise ValueError("no")
    assert run.status == FINISHED
    assert run.status_text == "finished, evaluation failed"
    assert run.manifest["evaluation"]["error"] == "ValueError: no"
    with run.record_status("evaluation"):
        pass
    assert run.manifest["evaluation"]["error"] is None


def test_a_secret_in_an_error_is_not_written_down(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "correct-horse-battery")
    run = create(out)
    with pytest.raises(ValueError), run.record_status():
        raise ValueError("401 for correct-horse-battery")
    assert run.manifest["error"] == "ValueError: 401 for ${oc.env:MY_TOKEN}"


KILLED = """
import sys
from src import runs
run = runs.create(sys.argv[1], "train", "", {})
with run.record_status():
    print("inside", flush=True)
    while True:
        run.update(step="x" * 100_000)
"""


def test_a_killed_run_is_interrupted_and_its_manifest_is_complete(out: Path) -> None:
    with child(KILLED, str(out)) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    (run,) = runs.all_runs(out)
    assert run.status == INTERRUPTED
    assert json.loads((run.path / "manifest.json").read_text(encoding="utf-8"))["status"] == RUNNING


# Finding one


def test_runs_are_listed_from_the_newest(out: Path) -> None:
    second = "2026-01-15_10-30-45"
    names = [second, *(f"{second}-{n}" for n in range(2, 13)), "2026-01-15_10-30-46"]
    for name in names:
        (out / "runs" / name).mkdir(parents=True)
        started = f"2026-01-15T10:30:{name[17:19]}+00:00"
        (out / "runs" / name / "manifest.json").write_text(
            json.dumps({"started": started, "stage": "train", "status": FINISHED})
        )
    assert [run.id for run in runs.all_runs(out)] == names[::-1]


def test_the_newest_finished_run_is_found(out: Path) -> None:
    finished(out).update(started="2026-01-01T00:00:00+00:00")
    wanted = finished(out)
    wanted.update(started="2026-01-02T00:00:00+00:00")
    create(out).update(started="2026-01-03T00:00:00+00:00")
    assert runs.find_model(None, out) == (wanted.model, wanted)


def test_a_finished_run_that_latest_points_to_comes_before_newer_ones(out: Path) -> None:
    fetched, newer = finished(out), finished(out)
    fetched.update(started="2026-01-01T00:00:00+00:00")
    for run in (newer, fetched):
        switch_link(out / "runs" / "latest", run.path)
        assert runs.find_model(None, out) == (run.model, run)
    fetched.update(status=FAILED)
    assert runs.newest_finished(out) == newer


def test_the_newest_run_is_the_one_that_latest_points_to_in_whatever_state(out: Path) -> None:
    gone_on_with, newer = create(out), finished(out)
    gone_on_with.update(started="2026-01-01T00:00:00+00:00", status=FAILED)
    switch_link(out / "runs" / "latest", gone_on_with.path)
    assert runs.newest(out) == gone_on_with
    assert runs.find_training("latest", out) == runs.training_runs(out)[0] == gone_on_with
    shutil.rmtree(gone_on_with.path)  # by hand, and latest leads nowhere
    assert runs.newest(out) == runs.find_run("latest", out) == newer
    shutil.rmtree(newer.path)
    with pytest.raises(RunError, match=r"no runs in .*/runs; make train makes one"):
        runs.newest(out)


def test_failed_unfinished_and_modelless_runs_are_passed_over(out: Path) -> None:
    wanted = finished(out)
    wanted.update(started="2026-01-01T00:00:00+00:00")
    finished(out).update(status=FAILED)
    finished(out).update(status=RUNNING)
    with create(out).record_status():
        pass
    assert runs.newest_finished(out) == wanted


def test_where_no_run_has_finished_the_newest_is_named(out: Path) -> None:
    with pytest.raises(RunError, match=r"no finished run in .*/runs; make train makes one"):
        runs.newest_finished(out)
    run = create(out)
    run.update(status=FAILED)
    with pytest.raises(RunError, match=f"no finished run in .*; the newest, {run.id}, is failed; make train"):
        runs.find_model(None, out)


def test_a_run_is_found_by_its_name_its_directory_or_its_model(out: Path) -> None:
    run = finished(out)
    latest = out / "runs/latest"
    for path in (run.path, latest, run.model, latest / "model", run.id, run.id[:-1], "latest"):
        folder, owner = runs.find_model(str(path), out)
        assert owner and owner.path.resolve() == run.path.resolve()
        assert folder.resolve() == run.model.resolve()


def test_a_model_folder_belongs_to_no_run(out: Path, tmp_path: Path) -> None:
    for bare in (
        tmp_path / "downloaded",
        finished(out).path / "checkpoints/checkpoint-5",
        tmp_path / "some/model",
    ):
        bare.mkdir(parents=True)
        assert runs.find_model(str(bare), out) == (bare, None)


def test_a_published_model_belongs_to_no_run_although_it_has_its_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert runs.find_model(str(tmp_path), "outputs") == (tmp_path, None)


def test_a_missing_path_is_named(out: Path) -> None:
    with pytest.raises(RunError, match="no/where does not exist; give a run, its directory, or a folder with"):
        runs.find_model("no/where", out)
    with pytest.raises(RunError, match=r"there is no run nowhere in .*/runs; make runs lists them"):
        runs.find_model("nowhere", out)


def test_a_run_without_a_model_is_named_with_its_status(out: Path) -> None:
    run = create(out)
    run.update(status=FAILED)
    with pytest.raises(RunError, match=f"the model of run {run.id} does not exist: the run is failed"):
        runs.find_model(str(run.path), out)
    run.update(status=FINISHED)
    with pytest.raises(RunError, match=f"the model of run {run.id} was removed; give another run"):
        runs.find_model(run.id, out)


def test_a_run_whose_logs_were_removed_is_a_run(out: Path) -> None:
    run = finished(out)
    shutil.rmtree(run.logs)
    assert runs.find_model(str(run.path), out) == (run.model, run)


@pytest.mark.parametrize("manifest", [None, "", '{"run": "20'])
def test_a_run_without_a_manifest_is_reported_as_such(out: Path, manifest: str | None) -> None:
    run = finished(out)
    path = run.path / "manifest.json"
    path.unlink() if manifest is None else path.write_text(manifest)
    for word in (run.id, str(run.path)):
        with pytest.raises(RunError, match=r"has no readable manifest.json; restore it, or start a new run"):
            runs.find_run(word, out)
    with pytest.raises(
        RunError, match=r"manifest.json( is not JSON.*; restore it|; restore it, or give .*/model$)"
    ):
        runs.find_model(str(run.path), out)


@pytest.mark.parametrize("content", [None, "", "a: [", "- 1"])
def test_settings_that_are_lost_are_one_sentence(out: Path, content: str | None) -> None:
    run = create(out)
    assert run.settings == {"seed": 1}
    path = run.path / "config_used.yaml"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(RunError, match=r"config_used.yaml .*; restore it, or start a new run"):
        _ = run.settings


def test_a_run_is_named_by_its_id_the_beginning_of_one_its_directory_or_latest(out: Path) -> None:
    run = finished(out)
    for word in (run.id, run.id[:-1], str(run.path), "latest", str(out / "runs" / "latest")):
        assert runs.find_run(word, out).path == run.path.resolve()


def test_a_name_that_no_run_or_several_have_is_refused_with_what_was_meant(out: Path) -> None:
    run = finished(out)
    with pytest.raises(RunError, match=f"there is no run x{run.id} in .*; did you mean {run.id}"):
        runs.find_run(f"x{run.id}", out)
    with pytest.raises(RunError, match=r"there is no run nope in .*; make runs lists them"):
        runs.find_run("nope", out)
    other = finished(out)
    with pytest.raises(RunError, match=f"20 is a prefix of 2 runs: {other.id}, {run.id}"):
        runs.find_run("20", out)


def test_the_run_to_resume_is_the_newest_training_run_or_the_named_one(out: Path) -> None:
    with pytest.raises(RunError, match=r"there is no training run in .*/runs; set resume=never"):
        runs.find_training("latest", out)
    run = create(out)
    run.update(started="2026-01-01T00:00:00+00:00")
    other = create(out)
    other.update(stage="eval")
    assert runs.find_training("latest", out) == run
    assert runs.find_training(other.id, out).path == other.path.resolve()
