"""A real OpenSSH server on loopback; its sessions are isolated from this machine as far as the system permits.

A session's home is a folder of the test's; where mounts of its own are permitted (unshare -m), so are /tmp, the
user's entry in /etc/passwd, and the boot id. The machine's own ~/.ssh is neither read nor written.

    sshd.client(folder, "~/assay")       the environment of a client: REMOTE_HOST and so on
    sshd.cut()                           every connection that is open is gone
    sshd.block(), sshd.unblock()         the port is closed, and open again
    sshd.reboot()                        everything that was started is gone, and the boot is another one
    with sshd.session(PATH="/nowhere"):  sessions that begin now find this
"""

from __future__ import annotations

import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
MISSING = [
    name for name, found in (("sshd", SSHD), *((n, shutil.which(n)) for n in ("ssh", "rsync"))) if not found
]
ROOTLESS = os.geteuid() != 0
needs_ssh = [
    pytest.mark.ssh,
    pytest.mark.skipif(bool(MISSING), reason=f"NO {' '.join(MISSING)} HERE: remote runs are NOT tested"),
]
OWN_MOUNTS = not ROOTLESS and bool(shutil.which("unshare")) and not subprocess.call(
    ["unshare", "-m", "true"], stderr=subprocess.DEVNULL
)  # fmt: skip
needs_own_mounts = pytest.mark.skipif(
    not OWN_MOUNTS, reason="NO MOUNTS OF ONE'S OWN HERE (unshare -m): reboots and full disks are NOT tested"
)
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MARK = "TESTS_OF_REMOTE_RUNS"  # in the environment of everything that a session starts
PATIENCE = 30  # seconds, until a server that does not listen fails the test

CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
PidFile {folder}/sshd.pid
AuthorizedKeysFile {folder}/authorized_keys
PermitUserEnvironment yes
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
UseDNS no
MaxStartups 500
MaxSessions 100
Subsystem sftp internal-sftp
"""
GUEST_NAME, GUEST_ID = "guest", 64999  # may write only in /tmp; uses the same authorized keys
GUEST = """\
AuthorizedKeysCommand {cat} {folder}/authorized_keys
AuthorizedKeysCommandUser root
"""

# Mounts for the server and its sessions only, then the server itself, under the same process id.
MOUNTS = """\
set -e
mount --make-rprivate /
mount --bind {boot_id} {real}
mount --bind {passwd} /etc/passwd
for kept in {kept}; do mkdir -p {tmp}"${{kept#/tmp}}"; mount --rbind "$kept" {tmp}"${{kept#/tmp}}"; done
mount --rbind {tmp} /tmp
exec "$@"
"""


class Server:
    """A running sshd. `home` is the home of its sessions, `tmp` their /tmp, both as paths of this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home, self.tmp = folder / "home", folder / "tmp"
        self.host, self.port, self.user = "127.0.0.1", free_port(), getpass.getuser()
        self.key, self.boot_id = folder / "id_ed25519", folder / "boot_id"
        self.mark = uuid.uuid4().hex
        for made in (self.home, self.tmp):
            made.mkdir()
        self.tmp.chmod(0o1777)
        for key in (self.key, folder / "host_key"):
            make_key(key)
        self.boot_id.write_text(f"{uuid.uuid4()}\n")
        (folder / "passwd").write_text("".join(self._passwd()))
        config = CONFIG + GUEST if OWN_MOUNTS else CONFIG
        (folder / "sshd_config").write_text(
            config.format(port=self.port, folder=folder, cat=shutil.which("cat", path="/bin:/usr/bin"))
        )
        self.permit(self.key)
        if not ROOTLESS:
            Path("/run/sshd").mkdir(exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None
        self.unblock()

    # Clients

    def client(self, folder: Path, remote_dir: str, **variables: str) -> dict[str, str]:
        """The environment of a client that knows this server; its home and ssh's configuration are in `folder`.

        The file that REMOTE_SSH_CONFIG names is read instead of ~/.ssh/config: ssh asks passwd where that is,
        whatever HOME says.
        """
        folder.mkdir(parents=True, exist_ok=True)
        config, known = folder / "ssh_config", folder / "known_hosts"
        config.write_text(
            f'Host *\n  UserKnownHostsFile "{known}"\n  GlobalKnownHostsFile /dev/null\n  IdentityAgent none\n'
            f'  IdentityFile "{self.key}"\n'
        )
        known.write_text(self.known_hosts())
        return {
            "HOME": str(folder),
            "REMOTE_HOST": self.host,
            "REMOTE_PORT": str(self.port),
            "REMOTE_USER": self.user,
            "REMOTE_KEY": str(self.key),
            "REMOTE_DIR": remote_dir,
            "REMOTE_SSH_CONFIG": str(config),
            **variables,
        }

    def known_hosts(self, key: Path | None = None) -> str:
        """The line of known_hosts for this server, with its own key or another."""
        public = (key or self.folder / "host_key").with_suffix(".pub").read_text().split()[:2]
        return f"[{self.host}]:{self.port} {' '.join(public)}\n"

    @property
    def fingerprint(self) -> str:
        """SHA256:..., as ssh prints it."""
        command = ["ssh-keygen", "-l", "-f", str(self.folder / "host_key.pub")]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[1]

    def ssh(self, command: str, client: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """Run a command by OpenSSH's own client."""
        words = ["ssh", "-F", client["REMOTE_SSH_CONFIG"], "-p", str(self.port), "-l", self.user, self.host]
        return subprocess.run([*words, command], capture_output=True, text=True, timeout=60)

    # Sessions

    def permit(self, *keys: Path, **variables: str) -> None:
        """Accept `keys`, for sessions with `variables`, from the next login on."""
        found = {"HOME": str(self.home), MARK: self.mark, **variables}
        given = ",".join(f'environment="{name}={value}"' for name, value in found.items())
        lines = [f"{given} {key.with_name(key.name + '.pub').read_text()}" for key in keys]
        written = self.folder / "authorized_keys"
        written.write_text("".join(lines))
        written.chmod(0o600)

    @contextmanager
    def session(self, *more_keys: Path, **variables: str) -> Iterator[None]:
        """Sessions that begin inside have `variables`, and `more_keys` are accepted too."""
        self.permit(self.key, *more_keys, **variables)
        try:
            yield
        finally:
            self.permit(self.key)

    @contextmanager
    def login_shell(self, program: str) -> Iterator[None]:
        """Sessions that begin inside have another shell than bash."""
        passwd = self.folder / "passwd"  # overwritten, not replaced: it is mounted
        before = passwd.read_text()
        passwd.write_text(before.replace(f":{self.home}:/bin/bash\n", f":{self.home}:{program}\n"))
        try:
            yield
        finally:
            passwd.write_text(before)

    def inside(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a shell command with the mounts of the sessions, without ssh."""
        assert self._process and OWN_MOUNTS
        words = ["nsenter", f"--mount=/proc/{self._process.pid}/ns/mnt", "sh", "-ec", command]
        return subprocess.run(words, capture_output=True, text=True)

    def outside(self, folder: Path) -> set[Path]:
        """Everything in the home of sessions and in their /tmp, except what is in `folder`."""
        found = [*self.home.rglob("*"), *self.tmp.rglob("*")]
        return {path for path in found if not path.is_relative_to(folder)}

    # Failures

    def cut(self) -> int:
        """Kill the process of every connection. Returns: how many there were."""
        connections = self.connections()
        for connection in connections:
            with suppress(psutil.NoSuchProcess):
                connection.kill()
        return len(connections)

    def connections(self) -> list[psutil.Process]:
        return psutil.Process(self._process.pid).children() if self._process else []

    def block(self) -> None:
        """Close the port and every connection. Started processes continue."""
        if self._process:
            self._process.send_signal(signal.SIGSTOP)  # no new connection meanwhile
            self.cut()
            self._process.kill()
            self._process.wait()
            self._process = None

    def unblock(self) -> None:
        """Open the port again, with the same keys."""
        if self._process:
            return
        words = [str(SSHD), "-D", "-e", "-f", str(self.folder / "sshd_config")]
        if OWN_MOUNTS:
            words = ["unshare", "-m", "sh", "-c", self._mounts(), "sh", *words]
        with (self.folder / "sshd.log").open("ab") as log:
            self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        end = time.monotonic() + PATIENCE
        while self._process.poll() is None and time.monotonic() < end:
            with suppress(OSError), socket.create_connection((self.host, self.port), timeout=PATIENCE):
                return
            time.sleep(0.01)
        pytest.fail(f"sshd did not start: {(self.folder / 'sshd.log').read_text()}")

    def reboot(self) -> None:
        """Kill every started process, and change the boot id."""
        assert OWN_MOUNTS
        self.block()
        self.kill_all()
        self.boot_id.write_text(f"{uuid.uuid4()}\n")
        self.unblock()

    def started(self) -> list[psutil.Process]:
        """Every running descendant of a session."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def kill_all(self) -> None:
        while processes := self.started():
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.01)

    def close(self) -> None:
        self.block()
        self.kill_all()

    # Setup

    def _passwd(self) -> Iterator[str]:
        yield f"{GUEST_NAME}:x:{GUEST_ID}:{GUEST_ID}::/nowhere:/bin/bash\n"
        for line in Path("/etc/passwd").read_text().splitlines(keepends=True):
            name, *rest = line.rstrip("\n").split(":")
            yield ":".join([name, *rest[:4], str(self.home), "/bin/bash"]) + "\n" if name == self.user else line

    def _mounts(self) -> str:
        """Sessions must see these tests and their Python, even below /tmp."""
        own = self.folder.parent
        base = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own  # shared by several processes
        needed = {base, ROOT, Path(sys.prefix), Path(sys.base_prefix)}
        kept = sorted(str(p) for p in needed if p.is_relative_to("/tmp"))
        kept = [p for p in kept if not any(p != other and Path(p).is_relative_to(other) for other in kept)]
        return MOUNTS.format(
            boot_id=shlex.quote(str(self.boot_id)),
            real=BOOT_ID,
            passwd=shlex.quote(str(self.folder / "passwd")),
            tmp=shlex.quote(str(self.tmp)),
            kept=" ".join(map(shlex.quote, kept)),
        )


def until(true: Callable[[], Any], patience: float = 60) -> Any:
    """Wait until it is true, at most `patience` seconds. Returns: its value."""
    end = time.monotonic() + patience
    while not (found := true()):
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.02)
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def make_key(path: Path, passphrase: str = "") -> Path:
    """Make a private key and its public key."""
    words = ["ssh-keygen", "-q", "-t", "ed25519", "-C", "", "-N", passphrase, "-f", str(path)]
    subprocess.run(words, check=True)
    return path


@contextmanager
def reused_pid(pid: int) -> Iterator[int]:
    """A harmless process with this id, which an ended process had before."""
    last, other = Path("/proc/sys/kernel/ns_last_pid"), None
    end = time.monotonic() + PATIENCE
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:  # until its parent has waited for it
        time.sleep(0.05)
    try:
        for _ in range(200):  # other processes may get the id first
            last.write_text(str(pid - 1))
            other = subprocess.Popen(["sleep", "1000"])
            if other.pid == pid:
                break
            other.kill()
            other.wait()
        else:
            pytest.skip(f"PROCESS {pid} IS TAKEN: that ids are reused is NOT tested")
    except OSError as error:
        pytest.skip(f"THE NEXT PROCESS ID CANNOT BE CHOSEN HERE ({error}): that ids are reused is NOT tested")
    try:
        yield pid
    finally:
        other.kill()
        other.wait()


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("sshd"))
    yield server
    server.close()
