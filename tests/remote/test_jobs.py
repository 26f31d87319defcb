"""Jobs on the server: started once, followed byte for byte, found, stopped. They are small shell scripts."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from src.errors import RemoteError, Stopped
from src.remote import jobs, status_table
from src.remote.agent.start import CACHES
from src.remote.connection import Connection
from src.remote.target import RemoteTarget
from src.utils.terminal import printable_streams
from tests.remote.server import Server, needs_own_mounts, needs_ssh, until

pytest_plugins = ["tests.remote.server"]
pytestmark = needs_ssh


@pytest.fixture
def place(sshd: Server, tmp_path: Path) -> Path:
    """REMOTE_DIR, with spaces in its name and an environment whose python is a shell."""
    folder = sshd.home / f"{tmp_path.name} and more"
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to("/bin/sh")
    return folder


@pytest.fixture
def connection(sshd: Server, place: Path, tmp_path: Path) -> Iterator[Connection]:
    with Connection(RemoteTarget.from_env(sshd.client(tmp_path / "person", f"~/{place.name}"))) as connection:
        yield connection


def start(
    connection: Connection, script: str, *words: str, stage: str = "train", id: str | None = None, **more: str
) -> jobs.Job:
    return jobs.start(connection, stage, [jobs.PYTHON, "-c", script, "sh", *words], words, more, None, id)


def look(connection: Connection, job: jobs.Job) -> jobs.Job:
    return jobs.find_job(connection, job["id"])


def folder_of(place: Path, job: jobs.Job) -> Path:
    return place / "outputs" / "remote" / "jobs" / str(job["id"])


def supervisor_of(job: jobs.Job) -> psutil.Process:
    found = psutil.Process(job["pid"]).parent()
    assert found is not None
    return found


# Starting


def test_a_job_runs_in_the_folder_and_its_output_is_followed(
    connection: Connection, place: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    job = start(connection, 'echo "in $PWD"; printf "\\033]52;c;aGk=\\007 no end\\377" >&2')
    with printable_streams():
        ended = jobs.follow(connection, job["id"])
    assert capfdbinary.readouterr().out == f"in {place}\n".encode() + rb"\x1b]52;c;aGk=\x07 no end\xff"
    assert (ended["status"], ended["code"], jobs.format_status(ended)) == ("ended", 0, "finished")


def test_output_in_small_pieces_is_followed_once(
    connection: Connection, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    job = start(connection, "i=0; while test $i -lt 25; do i=$((i+1)); echo $i; sleep 0.03; done")
    jobs.follow(connection, job["id"])
    assert capfdbinary.readouterr().out == b"".join(b"%d\n" % i for i in range(1, 26))


@pytest.mark.parametrize(
    ("code", "meaning"),
    [(2, "invalid input"), (3, "not promoted"), (75, "stopped, with a checkpoint"), (9, "failed (exit code 9)")],
)
def test_the_exit_code_is_that_of_the_command(connection: Connection, code: int, meaning: str) -> None:
    job = start(connection, f"exit {code}")
    assert jobs.follow_to_end(connection, job["id"]) == code
    assert jobs.format_status(look(connection, job)) == meaning


def test_a_start_that_is_repeated_starts_nothing(connection: Connection, place: Path) -> None:
    for again in (False, True, True):
        job = start(connection, "echo once >> count; exec sleep 1000", id="the-one")
        assert (job["id"], job["existed"]) == ("the-one", again)
    jobs.stop(connection, job)
    assert start(connection, "echo once >> count", id="the-one")["status"] == "ended"
    assert (place / "count").read_text() == "once\n"
    assert len(jobs.list_jobs(connection)) == 1


def test_an_invalid_id_is_refused(connection: Connection) -> None:
    for name in ("../../up", "a b", "latest", "x" * 101, ".."):
        with pytest.raises(RemoteError, match="is not a valid run id"):
            start(connection, "true", id=name)


def test_a_start_with_the_id_of_another_command_is_refused(connection: Connection) -> None:
    job = start(connection, "exit 5", "lr=1", id="taken")
    jobs.follow(connection, job["id"])
    assert start(connection, "exit 5", "lr=1", id="taken")["existed"]
    for words, stage in ((["lr=2"], "train"), (["lr=1"], "eval")):
        with pytest.raises(RemoteError, match="run taken already exists, with a different command: train lr=1"):
            start(connection, "exit 5", *words, stage=stage, id="taken")


def test_foreign_files_among_the_records_hide_no_run(connection: Connection, place: Path) -> None:
    job = start(connection, "exit 5")
    jobs.follow(connection, job["id"])
    others = place / "outputs/remote/jobs"
    (others / "a file").touch()
    (others / "corrupt").mkdir()
    (others / "corrupt/job.json").write_text('{"id": "corrupt", ')
    (others / "empty").mkdir()
    (others / "list").mkdir()
    (others / "list/job.json").write_text("[1]")
    (others / "object").mkdir()
    (others / "object/job.json").write_text('{"id": "object", "started": 1, "host": null}')
    assert [each["id"] for each in jobs.list_jobs(connection)] == [job["id"]]


def test_without_an_environment_nothing_is_started_or_left_behind(connection: Connection, place: Path) -> None:
    (place / ".venv" / "bin" / "python").unlink()
    with pytest.raises(RemoteError, match=r"the environment .* does not exist; run make ssh-init"):
        start(connection, "true")
    assert jobs.list_jobs(connection) == [] and not any((place / "outputs" / "remote" / "jobs").iterdir())


def test_a_refused_start_removes_no_files_of_an_earlier_one(connection: Connection, place: Path) -> None:
    (place / ".venv" / "bin" / "python").unlink()
    log = folder_of(place, {"id": "same"}) / "log"
    log.parent.mkdir(parents=True)
    log.touch()
    with pytest.raises(RemoteError, match=r"the environment .* does not exist"):
        start(connection, "true", id="same")
    assert log.exists()


def test_arguments_arrive_as_they_were_typed_whatever_the_locale(
    sshd: Server, connection: Connection, place: Path
) -> None:
    words = [
        "a b",
        "'",
        '"',
        "$HOME",
        "`id`",
        "[1, 2]",
        "ünïcodé 漢字 🜚",
        "line\nline",
        "\\",
        "*",
        "",
        "-n",
        "{x: 1}",
    ]
    with sshd.session(LC_ALL="POSIX", LANG="de_DE.ISO-8859-1"):
        connection.close()
        job = start(connection, 'for word; do printf "%s\\0" "$word"; done > words', *words)
        jobs.follow_to_end(connection, job["id"])
    assert (place / "words").read_bytes().decode().split("\0")[:-1] == words


def test_output_of_the_login_shell_is_no_answer(sshd: Server, connection: Connection) -> None:
    (sshd.home / ".bashrc").write_text("echo '{\"answer\": 1}'; echo welcome >&2\n")
    try:
        assert jobs.follow_to_end(connection, start(connection, "exit 5")["id"]) == 5
    finally:
        (sshd.home / ".bashrc").unlink()


def test_variables_reach_the_job_and_no_command_line(connection: Connection, place: Path) -> None:
    secret = "s3cret-of-the-canary"
    job = start(connection, "env > found; exec sleep 1000", HF_TOKEN=secret)
    until((place / "found").exists)
    lines = [p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines if secret in " ".join(line)]
    jobs.stop(connection, job)
    found = dict(line.partition("=")[::2] for line in (place / "found").read_text().splitlines())
    assert found["HF_TOKEN"] == secret
    assert len(CACHES) > 3
    caches = ("HF_HOME", "XDG_CACHE_HOME", *CACHES)
    assert all(Path(found[name]).is_relative_to(place) for name in caches)
    assert not [name for name in found if name.startswith("SSH_")]
    (place / "found").unlink()
    assert not [p for p in place.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]


# States


def test_a_reused_process_id_of_another_boot_does_not_count_as_running(
    connection: Connection, place: Path
) -> None:
    job = start(connection, "exec sleep 1000")
    assert look(connection, job)["status"] == "running"
    record = folder_of(place, job) / "job.json"
    then = json.loads(record.read_text())
    supervisor, since = then["supervisor"]
    for changed in ({"boot_id": "another"}, {"ticks": then["ticks"] + 1, "supervisor": [supervisor, since + 1]}):
        record.write_text(json.dumps(then | changed))
        assert look(connection, job)["status"] == "interrupted"
    record.write_text(json.dumps(then | {"host": "login2"}))
    assert jobs.format_status(look(connection, job)) == "on login2, cannot be checked from this host"
    record.write_text(json.dumps(then))
    jobs.stop(connection, job)


def test_a_job_counts_as_running_until_its_exit_code_is_recorded(connection: Connection, place: Path) -> None:
    job = start(connection, "while ! test -e go; do sleep 0.02; done; exit 3")
    supervisor = supervisor_of(job)
    supervisor.suspend()
    until(lambda: supervisor.status() == psutil.STATUS_STOPPED)
    (place / "go").touch()
    until(lambda: psutil.Process(job["pid"]).status() == psutil.STATUS_ZOMBIE)
    assert look(connection, job)["status"] == "running"
    supervisor.resume()
    assert jobs.follow_to_end(connection, job["id"]) == 3


@needs_own_mounts
def test_the_exit_code_is_recorded_on_a_full_disk(
    sshd: Server, connection: Connection, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = sshd.inside(
        f"cd '{place.parent}'; mount -t tmpfs -o size=1m none '{place}'; mkdir -p '{place}/.venv/bin';"
        f"ln -s /bin/sh '{place}/.venv/bin/python'"
    )
    assert made.returncode == 0, made.stderr
    job = start(connection, "while ! test -e go; do sleep 0.02; done; exit 3")
    stopped = start(connection, "trap 'exit 75' TERM; while :; do sleep 0.02; done")
    sshd.inside(f"cd '{place}'; dd if=/dev/zero of=big bs=4k 2>/dev/null || touch go")
    assert jobs.format_status(look(connection, stopped)) == "running, disk full"
    assert jobs.follow_to_end(connection, job["id"]) == 3
    assert f"was full when run {job['id']} ended: its log and files may be incomplete" in capsys.readouterr().err
    assert jobs.format_status(jobs.stop(connection, stopped)) == "stopped, with a checkpoint"
    left = sshd.inside(f"ls '{place}/outputs/remote/jobs/{job['id']}'").stdout.split()
    assert left == ["exit.json", "job.json", "log"]
    with pytest.raises(RemoteError, match="no space left on device"):
        start(connection, "true")


def test_following_an_interrupted_job_prints_the_command_to_resume_it(connection: Connection) -> None:
    job = start(connection, "exec sleep 1000")
    supervisor_of(job).kill()
    os.kill(job["pid"], signal.SIGKILL)
    with pytest.raises(Stopped, match=f"interrupted.*make ssh-train resume={job['id']}"):
        jobs.follow_to_end(connection, job["id"])


def test_without_its_supervisor_the_manifest_tells_how_a_job_ended(connection: Connection, place: Path) -> None:
    run = place / "outputs" / "runs" / "r1"
    run.mkdir(parents=True)
    job = start(
        connection, f"echo '{run}' > \"$ASSAY_RUN_FILE\"; while ! test -e go; do sleep 0.02; done; echo over"
    )
    supervisor_of(job).kill()
    until(lambda: look(connection, job)["run"])
    assert look(connection, job)["status"] == "running"
    (run / "manifest.json").write_text('{"status": "finished"}')
    (place / "go").touch()
    assert jobs.follow_to_end(connection, job["id"]) == 0
    assert jobs.format_status(look(connection, job)) == "finished"
    (run / "manifest.json").write_text('{"status": "failed"}')
    assert jobs.format_status(look(connection, job)) == "interrupted"


def test_a_job_is_found_by_a_prefix_and_by_its_run_directory(connection: Connection, place: Path) -> None:
    printed = 'echo /x/r7 > "$ASSAY_RUN_FILE"'
    first = start(connection, printed, id="2026-01-02_a")
    second = start(connection, f"{printed}; exec sleep 1000", id="2026-01-02_b")
    third = start(connection, "true", id="2026-01-03_c")
    until(
        lambda: jobs.find_job(connection, "2026-01-02_b")["run"] and look(connection, first)["status"] == "ended"
    )
    until(lambda: look(connection, third)["status"] == "ended")

    def named(word: str | None, **how: bool) -> str:
        return str(jobs.find_job(connection, word, **how)["id"])

    assert named("2026-01-03") == named(None) == named("latest") == third["id"]
    assert named(None, running=True) == second["id"]
    assert named("r7") == second["id"]  # the one that is running
    with pytest.raises(RemoteError, match="matches 2 runs"):
        named("2026-01-02")
    with pytest.raises(RemoteError, match="did you mean 2026-01-03_c"):
        named("2026-01-03_d")
    jobs.stop(connection, second)
    assert named("r7") == second["id"]  # the newest


def test_a_long_list_shows_the_newest_and_running_jobs(
    connection: Connection, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_table, "MAX_JOBS", 1)
    running = start(connection, "exec sleep 1000", id="running")
    for id in ("old", "new"):
        jobs.follow_to_end(connection, start(connection, "true", id=id)["id"])
    capsys.readouterr()
    status_table.print_table(jobs.list_jobs(connection), str(connection.target), connection.target.dir)
    shown = capsys.readouterr().out
    assert "new" in shown and "running" in shown and "old " not in shown and "1 older run not shown" in shown
    jobs.stop(connection, running)


# Stopping


def test_a_stopped_job_may_save_a_checkpoint(connection: Connection, capfd: pytest.CaptureFixture[str]) -> None:
    job = start(connection, 'trap "echo saved; exit 75" TERM; echo up; while :; do sleep 0.02; done')
    until(lambda: look(connection, job)["last_line"] == "up")
    ended = jobs.stop(connection, look(connection, job))
    assert jobs.format_status(ended) == "stopped, with a checkpoint"
    assert capfd.readouterr().out == "saved\n"  # the output since the request


def test_a_job_that_does_not_end_is_killed_with_its_descendants(connection: Connection, place: Path) -> None:
    away = 'import os, time; os.setsid(); open("child", "w").write(str(os.getpid())); time.sleep(1000)'
    detached = f"{sys.executable} -c '{away}'"
    job = start(connection, f'trap "" TERM; {detached} & while :; do sleep 0.02; done')
    child = int(until(lambda: (place / "child").exists() and (place / "child").read_text()))
    ended = jobs.stop(connection, job, grace=0.2)
    assert jobs.format_status(ended) == "killed (signal 9)"
    until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)


def test_an_ended_job_is_not_stopped(connection: Connection) -> None:
    job = start(connection, "true")
    jobs.follow_to_end(connection, job["id"])
    with pytest.raises(RemoteError, match=r"is not running \(status: finished\)"):
        jobs.stop(connection, look(connection, job))


def test_a_folder_without_jobs_is_reported(connection: Connection) -> None:
    with pytest.raises(RemoteError, match="no runs in"):
        jobs.find_job(connection, None)
