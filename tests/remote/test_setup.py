"""ssh-init on a real server with real pip: it installs what is missing, and resumes after any interruption."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.remote.client import Client
from tests.remote.server import Server, needs_own_mounts, needs_ssh
from tests.remote.test_commands import watch

pytest_plugins = ["tests.remote.server", "tests.remote.client"]
pytestmark = needs_ssh

PATIENCE = 30  # seconds
SLOW = """
import pathlib, shutil, time

HERE = pathlib.Path({folder!r})


def build_wheel(folder, config=None, metadata=None):
    (HERE / "begun").touch()
    while not (HERE / "go").exists():
        time.sleep(0.02)
    return shutil.copy(HERE / "slow-1.0-py3-none-any.whl", folder).rpartition("/")[2]
"""


class Shelf:
    """A package index in a folder: generated wheels, and one package whose build the test controls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name, version in (("one", "1.0"), ("one", "1.1"), ("two", "1.0")):
            self.wheel(name, version)

    def wheel(self, name: str, version: str, text: str = "") -> Path:
        info, path = f"{name}-{version}.dist-info", self.folder / f"{name}-{version}-py3-none-any.whl"
        files = {
            f"{name}/__init__.py": text or f"version = {version!r}\n",
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        with zipfile.ZipFile(path, "w") as wheel:
            for each, content in files.items():
                wheel.writestr(each, content)
            wheel.writestr(
                f"{info}/RECORD", "".join(f"{k},,{len(v)}\n" for k, v in files.items()) + f"{info}/RECORD,,\n"
            )
        return path

    def slow(self) -> Path:
        """A package without a wheel, whose build waits for the file `go`."""
        folder = self.folder.with_name("building")
        if not folder.exists():
            (folder / "source").mkdir(parents=True)
            self.wheel("slow", "1.0").rename(folder / "slow-1.0-py3-none-any.whl")
            (folder / "source/backend.py").write_text(SLOW.format(folder=str(folder)))
            (folder / "source/pyproject.toml").write_text(
                '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
            )
        return folder

    def requires(self, *pins: str) -> str:
        """The text of a requirements.txt without any other index."""
        return "\n".join(["--no-index", f"--find-links {self.folder}", *pins, ""])


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "shelf")


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with pip only, to be copied: making one takes seconds."""
    folder = tmp_path_factory.mktemp("bare") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return folder


class Place:
    """A folder on the server with its own requirements.txt, and its user."""

    def __init__(self, user: Client, folder: Path, shelf: Shelf) -> None:
        self.user, self.folder, self.shelf = user, folder, shelf
        self.processes: list[subprocess.Popen[bytes]] = []

    def pins(self, *pins: str) -> None:
        for root in (self.user.project, self.folder):
            (root / "requirements.txt").write_text(self.shelf.requires(*pins))

    def init(self, **variables: str) -> str:
        """The output of a successful ssh-init."""
        done = self.user("ssh-init", **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def started(self, **variables: str) -> subprocess.Popen[bytes]:
        """An ssh-init in the middle of an installation."""
        process = self.user.start("ssh-init", **variables)
        self.processes.append(process)
        wait(lambda: (self.shelf.slow() / "begun").exists() or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        return process

    def another(self, says: str) -> tuple[subprocess.Popen[bytes], Path]:
        """A second ssh-init that has printed `says`, and the file with its output."""
        path = self.shelf.folder / "printed.out"
        process = self.user.start("ssh-init", to=path)
        self.processes.append(process)
        wait(lambda: says in path.read_text())
        return process, path

    @property
    def ready(self) -> dict[str, str]:
        found: dict[str, str] = json.loads((self.folder / ".venv/.ready.json").read_text())
        return found

    def imports(self, name: str) -> str:
        words = [str(self.folder / ".venv/bin/python"), "-Ic", f"import {name}; print({name}.version)"]
        return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def wait(done: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def empty(user: Client, remote_project: Path, shelf: Shelf, sshd: Server, tmp_path: Path) -> Iterator[Place]:
    """The code without an environment."""
    shutil.rmtree(remote_project / ".venv")
    for more in remote_project.glob("requirements-*.txt"):
        more.unlink()
    mine = user.copy(tmp_path / "mine")
    for more in mine.project.glob("requirements-*.txt"):
        more.unlink()
    place = Place(mine, remote_project, shelf)
    yield place
    for process in place.processes:
        process.kill()
        process.communicate()
    sshd.kill_all()


@pytest.fixture
def place(empty: Place, bare: Path) -> Place:
    """The code and an environment without packages."""
    venv = empty.folder / ".venv"
    shutil.copytree(bare, venv, symlinks=True)
    return empty


# Complete installations


def test_an_environment_is_made_and_then_nothing_is_missing(empty: Place, sshd: Server) -> None:
    empty.pins("one==1.0", "two==1.0")
    before = {p.name for p in sshd.home.iterdir()} | {".ssh"}
    printed = empty.init()
    assert "the environment does not exist yet" in printed and "Successfully installed one-1.0 two-1.0" in printed
    assert (empty.imports("one"), empty.imports("two")) == ("1.0", "1.0")
    assert empty.ready["accelerator"] == "cpu" and empty.ready["torch"] is None
    assert (empty.folder / ".venv/.installed").exists() and not (empty.folder / ".venv/.installing").exists()
    assert {p.name for p in sshd.home.iterdir()} <= before  # no ~/.cache, no ~/.local
    jobs = list((empty.folder / "outputs/remote/jobs").iterdir())
    again = empty.init()
    assert again.splitlines()[-2:] == ["the environment is complete", "next: make ssh-train"]
    assert list((empty.folder / "outputs/remote/jobs").iterdir()) == jobs  # nothing was run
    for name in ("Python", "GPU", "cores", "memory", "disk", "rsync"):
        assert any(line.startswith(name) for line in again.splitlines())


def test_a_changed_pin_is_the_only_thing_that_is_installed(place: Place) -> None:
    place.pins("one==1.0", "two==1.0")
    place.init()
    place.pins("one==1.1", "two==1.0")
    message = place.user.refused("ssh-train")
    assert message == "requirements.txt has changed since make ssh-init; run make ssh-init again"
    printed = place.init()
    assert "Successfully installed one-1.1\n" in printed and "two" not in printed
    assert place.imports("one") == "1.1"
    assert place.user("ssh-train", "--detach", "nonsense=1").returncode == 0  # runs start again


def test_an_environment_made_by_hand_is_not_checked(place: Place) -> None:
    place.pins("one==1.0")
    assert place.user("ssh-train", "--detach", "nonsense=1").returncode == 0


def test_an_error_of_pip_is_reported_and_no_run_started(place: Place) -> None:
    place.pins("one==7")
    done = place.user("ssh-init")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert "one==7" in done.stdout and "pip install requirements.txt failed (exit code 1)" in done.stdout
    assert "is not complete; run make ssh-init to complete it" in place.user.refused("ssh-train")
    place.pins("one==1.0")
    assert "Successfully installed one-1.0" in place.init()


# Interruptions


def test_a_killed_installation_is_resumed(place: Place, sshd: Server) -> None:
    place.pins("one==1.0")
    place.init()
    place.pins("one==1.0", "two==1.0", f"slow @ file://{place.shelf.slow()}/source")
    process = place.started()
    assert "is not complete" in place.user.refused("ssh-train")
    sshd.kill_all()
    wait(lambda: sshd.started() == [])
    process.kill()
    process.communicate()
    packages = next((place.folder / ".venv/lib").glob("python*")) / "site-packages"
    (packages / "one/__init__.py").write_text("")  # as after a pip that was killed while writing
    (packages / "~wo").mkdir()
    (place.shelf.slow() / "go").touch()
    printed = place.init()
    assert "one-1.0 was partially installed" in printed
    assert [place.imports(name) for name in ("one", "two", "slow")] == ["1.0"] * 3
    assert not (packages / "~wo").exists()
    assert "the environment is complete" in place.init()


def test_an_installation_outlives_its_connection_and_is_followed_again(place: Place, sshd: Server) -> None:
    place.pins(f"slow @ file://{place.shelf.slow()}/source")
    process = place.started()
    sshd.block()
    assert any("pip" in " ".join(p.cmdline()) for p in sshd.started())
    sshd.unblock()
    (place.shelf.slow() / "go").touch()
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert b"Successfully installed slow-1.0" in out and b"ready: Python" in out
    assert b"reconnected to" in err


def test_a_second_installation_follows_the_first(place: Place) -> None:
    place.pins(f"slow @ file://{place.shelf.slow()}/source")
    first = place.started()
    second, printed = place.another("is already installing the environment")
    (place.shelf.slow() / "go").touch()
    out = first.communicate(timeout=PATIENCE)[0].decode()
    second.communicate(timeout=PATIENCE)
    assert first.returncode == second.returncode == 0
    assert all("Successfully installed slow-1.0" in text for text in (out, printed.read_text()))
    assert len(list((place.folder / "outputs/remote/jobs").iterdir())) == 1


def test_two_concurrent_installations_take_turns(place: Place) -> None:
    place.pins(f"slow @ file://{place.shelf.slow()}/source")
    first = place.started()
    words = [sys.executable, "-m", "src.remote.agent.install"]
    second = subprocess.Popen(words, cwd=place.folder, stdout=subprocess.PIPE, text=True)
    assert second.stdout and "another ssh-init is in progress" in second.stdout.readline()
    (place.shelf.slow() / "go").touch()
    assert second.communicate(timeout=PATIENCE)[0] == "the environment is complete\n"
    first.communicate(timeout=PATIENCE)


def test_a_pip_without_its_installer_is_waited_for(place: Place, sshd: Server) -> None:
    place.pins(f"slow @ file://{place.shelf.slow()}/source")
    first = place.started()
    (installer,) = [p for p in sshd.started() if p.cmdline()[-1:] == ["src.remote.agent.install"] and p.cwd()]
    installer.kill()
    assert first.wait(timeout=PATIENCE) != 0
    first.communicate()
    second, _ = place.another("another ssh-init is in progress")
    (place.shelf.slow() / "go").touch()
    second.communicate(timeout=PATIENCE)
    assert second.returncode == 0 and place.imports("slow") == "1.0"


def test_a_stopped_installation_stops_pip(place: Place, sshd: Server) -> None:
    place.pins(f"slow @ file://{place.shelf.slow()}/source")
    process = place.started()
    (id,) = (p.name for p in (place.folder / "outputs/remote/jobs").iterdir())
    assert place.user("ssh-stop", id).returncode == 0
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert not [p for p in sshd.started() if "pip" in " ".join(p.cmdline())]


# torch


def test_torch_is_installed_first_from_the_named_index(place: Place, tmp_path: Path) -> None:
    text = "__version__ = {!r}\nclass cuda:\n    is_available = bool\nclass version:\n    cuda = hip = None\n"
    place.shelf.wheel("torch", "0.0.9", text.format("0.0.9"))
    index = tmp_path / "index/torch"
    index.mkdir(parents=True)
    place.shelf.wheel("torch", "0.0.9+mine", text.format("0.0.9+mine")).rename(
        index / "torch-0.0.9+mine-py3-none-any.whl"
    )
    name = "torch-0.0.9{}mine-py3-none-any.whl"
    (index / "index.html").write_text(f'<a href="{name.format("%2B")}">{name.format("+")}</a>')
    place.pins("one==1.0", "torch==0.0.9")
    seen, over = set[str](), threading.Event()
    watching = threading.Thread(target=watch, args=({"the index": str(index.parent)}, seen, over))
    watching.start()
    printed = place.init(REMOTE_TORCH_INDEX=f"file://{index.parent}")
    over.set()
    watching.join()
    assert seen == set()  # on no command line: it may hold a password
    assert "installing torch from REMOTE_TORCH_INDEX" in printed
    assert printed.index("Successfully installed torch-0.0.9+mine") < printed.index(
        "Successfully installed one-1.0"
    )
    assert place.ready["torch"] == "0.0.9+mine"
    assert "complete, torch 0.0.9+mine for cpu" in place.init()


@needs_own_mounts
def test_a_full_disk_is_reported_before_anything_is_downloaded(place: Place, sshd: Server) -> None:
    place.pins("torch==0.0.9")
    target = place.folder / "outputs"
    small = f"mount -t tmpfs -o size=60m none {place.folder}"
    keep = place.folder.with_name("kept")
    made = sshd.inside(f"cp -a {place.folder} {keep}; {small}; cp -a {keep}/. {place.folder}")
    assert made.returncode == 0, made.stderr
    try:
        message = place.user.refused("ssh-init")
        assert (
            " MB of free space, but torch for cpu and its dependencies need 3.0 GB; free some space on the server"
            in message
        )
        assert not target.exists() or not list((target / "remote/jobs").glob("*"))
    finally:
        sshd.inside(f"umount {place.folder}")


# Pythons


def test_ssh_init_reports_a_server_without_python(place: Place, sshd: Server) -> None:
    with sshd.session(PATH="/nowhere"):
        message = place.user.refused("ssh-init")
    assert "has no python3; install Python 3.11 or newer on the server" in message


@pytest.mark.parametrize(
    ("programs", "printed"),
    [
        (
            {"python3.10": "[[3,10,2],true]"},
            ["REMOTE_PYTHON=python3.10 is 3.10.2; Python 3.11 or newer is needed"],
        ),
        ({"python3.10": "[[3,12,0],false]"}, ["cannot create an environment", "apt install python3.12-venv"]),
        ({}, ["REMOTE_PYTHON=python3.10 is not a Python"]),
    ],
)
def test_an_unsuitable_python_is_refused(
    programs: dict[str, str], printed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from src.remote.agent import host_info
    from src.remote.agent.bootstrap import AgentError

    monkeypatch.setenv("PATH", str(fakes(tmp_path, programs)))
    with pytest.raises(AgentError) as message:
        host_info.find_python(str(tmp_path), "python3.10")
    assert all(text in f"{message.value.problem}; {message.value.hint}" for text in printed)


def test_the_newest_suitable_python_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from src.remote.agent import host_info

    programs = {"python3.13": "[[3,13,1],false]", "python3.12": "[[3,12,3],true]", "python3": "[[3,10,0],true]"}
    monkeypatch.setenv("PATH", str(fakes(tmp_path, programs)))
    assert host_info.find_python(str(tmp_path), None)["version"] == [3, 12, 3]


def fakes(folder: Path, programs: dict[str, str]) -> Path:
    """A folder of programs that print a text, whatever their arguments are; `!` makes one fail."""
    place = folder / "bin"
    place.mkdir()
    for name, printed in programs.items():
        text = printed.removeprefix("!")
        (place / name).write_text(
            f"#!/bin/sh\n/bin/cat <<'END'\n{text}\nEND\nexit {int(printed.startswith('!'))}\n"
        )
        (place / name).chmod(0o755)
    return place


# Accelerators

NVIDIA = "NVIDIA A100-SXM4-80GB, 81920, 580.82.07\nNVIDIA A100-SXM4-80GB, 81920, 580.82.07"
TOP = "#!/bin/sh\n[ $# = 0 ] && echo '| Driver Version: 580.82.07   CUDA Version: 13.0  |' && exit\n"
AMD = """\
Agent 1
  Name:                    AMD EPYC 7763
  Marketing Name:          AMD EPYC 7763
  Device Type:             CPU
Agent 2
  Name:                    gfx90a
  Marketing Name:          AMD Instinct MI250X
  Device Type:             GPU
"""


def test_an_nvidia_gpu_means_cuda(tmp_path: Path) -> None:
    from src.remote import setup
    from src.remote.agent import host_info

    place = fakes(tmp_path, {"nvidia-smi": NVIDIA, "rocminfo": AMD})
    (place / "nvidia-smi").write_text(TOP + (place / "nvidia-smi").read_text())
    found = host_info.accelerator(str(place))
    assert (found["kind"], found["driver"], found["runtime"]) == ("cuda", "580.82.07", "13.0")
    assert setup.format_gpus(found) == "2 x NVIDIA A100-SXM4-80GB, 86 GB; driver 580.82.07; CUDA 13.0"


def test_an_amd_gpu_means_rocm(tmp_path: Path) -> None:
    from src.remote import setup
    from src.remote.agent import host_info

    place = fakes(tmp_path, {"rocminfo": AMD, "nvidia-smi": "!NVIDIA-SMI has failed"})
    (tmp_path / ".info").mkdir()
    (tmp_path / ".info/version").write_text("7.1.0-55\n")
    found = host_info.accelerator(str(place))
    assert (found["kind"], found["gpus"], found["runtime"]) == ("rocm", [["AMD Instinct MI250X", None]], "7.1.0")
    assert setup.format_gpus(found) == "1 x AMD Instinct MI250X; ROCm 7.1.0"


def test_a_driver_without_gpu_is_reported(tmp_path: Path) -> None:
    from src.remote.agent import host_info

    found = host_info.accelerator(str(fakes(tmp_path, {"nvidia-smi": "!NVIDIA-SMI has failed"})))
    assert found["kind"] == "cpu" and "nvidia-smi is installed but reports no GPU" in found["problem"]


def test_no_gpu_is_a_cpu_and_gpus_of_slurms_nodes_are_cuda(tmp_path: Path) -> None:
    from src.remote.agent import host_info

    assert host_info.accelerator(str(tmp_path))["kind"] == "cpu"
    found = host_info.accelerator(str(fakes(tmp_path, {"sinfo": "(null)\ngpu:a100:4"})))
    assert (found["kind"], found["scheduled"]) == ("cuda", "gpu:a100:4")
    other = fakes(tmp_path / "bin", {"sinfo": "(null)"})
    assert host_info.accelerator(str(other))["kind"] == "cpu"


def test_an_environment_for_a_gpu_is_kept_while_none_is_detected(tmp_path: Path) -> None:
    from src.remote.agent import venv

    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    (tmp_path / "requirements.txt").write_text("one==1\n")
    (tmp_path / "requirements-gpu.txt").write_text("-r requirements.txt\n")

    def made(accelerator: str) -> None:
        ready = {"accelerator": accelerator, "requirements": venv.requirements_hash(str(tmp_path), accelerator)}
        (tmp_path / ".venv/.ready.json").write_text(json.dumps(ready))

    made("cuda")
    assert venv.missing(str(tmp_path), "cpu") == venv.missing(str(tmp_path), "cuda") == []
    made("cpu")
    assert venv.missing(str(tmp_path), "cuda") == ["the environment was created for cpu, but the server has cuda"]
    made("cuda")
    (tmp_path / "requirements-gpu.txt").write_text("-r requirements.txt\ntwo==1\n")
    assert venv.missing(str(tmp_path), "cpu") != []


# torch's package index


def test_pytorchs_own_index_is_used_if_it_has_the_build(tmp_path: Path) -> None:
    from src.remote.agent import install

    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    wheels = [
        f"torch-0.0.9%2B{build}-{tag}-{tag}-manylinux_2_28_x86_64.whl"
        for build in ("cpu", "rocm6.4", "rocm7.1", "rocm7.10", "cu130")
    ]
    wheels += [
        "torch-0.0.9%2Brocm7.2-cp30-cp30-manylinux_2_28_x86_64.whl",
        f"torch-0.0.8%2Bcpu-{tag}-{tag}-manylinux_2_28_x86_64.whl",
    ]
    page = tmp_path / "torch/index.html"
    page.parent.mkdir()
    page.write_text("".join(f'<a href="/whl/{name}#sha256=0">{name}</a>\n' for name in wheels))

    def build(kind: str, version: str = "0.0.9", runtime: str | None = None) -> str | None:
        index, problem = install.pytorch_index(kind, version, runtime, base)
        assert bool(index) != bool(problem)
        return index and index.removeprefix(f"{base}/")

    with serving(tmp_path) as base:
        assert build("cpu") == "cpu"
        assert build("rocm", runtime="7.1.0") == build("rocm", runtime="7.9") == "rocm7.1"
        assert build("rocm") == "rocm7.10"
        assert build("rocm", runtime="5.0") == "rocm6.4"
        assert build("rocm", "0.0.8") is build("cpu", "0.0.7") is None


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of an HTTP server for a folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_an_index_that_does_not_respond_is_reported(free_address: str) -> None:
    from src.remote.agent import install

    index, problem = install.pytorch_index("cpu", "0.0.9", None, f"http://{free_address}/whl")
    assert index is None and problem == f"no response from {free_address}"


@pytest.fixture
def free_address() -> str:
    from tests.remote.server import free_port

    return f"127.0.0.1:{free_port()}"


# logind


def test_the_last_setting_of_logind_applies(tmp_path: Path) -> None:
    from src.remote.agent import host_info

    one, two = tmp_path / "one", tmp_path / "two"
    (one / "logind.conf.d").mkdir(parents=True)
    two.mkdir()
    places = (str(one), str(two))
    assert host_info.logind_setting("KillUserProcesses", places) == ""
    (one / "logind.conf").write_text("[Login]\n#KillUserProcesses=yes\nKillUserProcesses=no\n")
    (one / "logind.conf.d/a.conf").write_text("[Login]\nKillUserProcesses = YES\n")
    assert host_info.logind_setting("KillUserProcesses", places) == "yes"
    (two / "logind.conf").write_text("[Login]\nKillUserProcesses=no\n")
    assert host_info.logind_setting("KillUserProcesses", places) == "no"


def test_a_warning_is_printed_if_logind_kills_processes_at_logout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from src.remote import setup
    from src.remote.agent import host_info

    monkeypatch.setenv("PATH", str(fakes(tmp_path, {"busctl": "b true"})))
    assert host_info.kills_user_processes("ada") and not host_info.kills_user_processes("root")
    facts = {"kills": True, "user": "ada", "accelerator": {"problem": None}}
    assert "loginctl enable-linger" in setup.warnings(facts)[0]


# Variables


def test_pip_gets_its_variables_and_no_tokens() -> None:
    from src.remote import setup

    here = {
        "HF_TOKEN": "hf_1",
        "AWS_SECRET_ACCESS_KEY": "s",
        "PIP_INDEX_URL": "https://index",
        "REMOTE_ENV": "PIP_INDEX_URL",
        "REMOTE_TORCH_INDEX": "https://u:p@torch",
    }
    assert setup.installer_env(here) == {
        "PIP_INDEX_URL": "https://index",
        "ASSAY_TORCH_INDEX": "https://u:p@torch",
    }
