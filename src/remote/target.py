"""The server of remote commands: REMOTE_* variables and ssh's configuration, host keys, and private keys.

Everything is read as OpenSSH reads it: `ssh -G` resolves aliases, Include and Match; known_hosts decides which
servers are trusted.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paramiko import Agent, AgentKey, MissingHostKeyPolicy, PKey, SSHClient
from paramiko.auth_strategy import AuthFailure, AuthStrategy, InMemoryPrivateKey
from paramiko.hostkeys import HostKeyEntry, InvalidHostKey
from paramiko.ssh_exception import BadHostKeyException, PasswordRequiredException, SSHException

from ..errors import ConfigError, RemoteError
from ..utils.logs import log
from .agent.bootstrap import PYTHON_OPTIONS

REQUIRED = {
    "REMOTE_HOST": "the server's name, its address, or an alias of ~/.ssh/config",
    "REMOTE_DIR": "the project's folder on the server, such as ~/assay",
}
SSH_PORT = 22
SshConfig = Mapping[str, tuple[str, ...]]  # the values of each keyword, as `ssh -G` prints them


@dataclass(frozen=True)
class RemoteTarget:
    """A host and a folder on it. `host` is REMOTE_HOST; ssh's configuration supplies most other fields."""

    host: str
    dir: str  # REMOTE_DIR as it was given; the server expands `~`
    hostname: str
    user: str
    port: int
    keys: tuple[Path, ...] = ()  # private keys to try, without those of an agent
    only_these_keys: bool = False  # IdentitiesOnly: do not try the agent's other keys
    agent: str | None = None  # the socket of an ssh-agent
    proxy: tuple[str, ...] = ()  # a command whose standard streams are the connection
    known_hosts: tuple[Path, ...] = ()
    key_name: str | None = None  # HostKeyAlias
    accept: str | None = None  # REMOTE_FINGERPRINT, the host key that the user has accepted
    strict: str = "ask"  # StrictHostKeyChecking
    options: tuple[str, ...] = ()  # of ssh, for the REMOTE_* variables
    python: str = "python3"

    def __str__(self) -> str:
        return f"{self.user}@{self.host.rpartition('@')[2]}"

    @property
    def ssh_command(self) -> list[str]:
        """The ssh command that connects to this target without prompts."""
        return ["ssh", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", *self.options]

    @property
    def known_as(self) -> tuple[str, int]:
        """The name and port of the host key in known_hosts."""
        return (self.key_name, SSH_PORT) if self.key_name else (self.hostname, self.port)

    def python_command(self, code: str) -> str:
        """A command for any login shell: run `code`, which has no single quote, with the server's Python."""
        quoted = re.sub(r"(?!^~)([^\w./+-])", _escape, self.python)
        return f"{quoted} {' '.join(PYTHON_OPTIONS)} -c '{code}'"

    @staticmethod
    def from_env(environment: Mapping[str, str]) -> RemoteTarget:
        """Raises: ConfigError with everything that is missing; RemoteError if ssh rejects its configuration."""
        problems = [f"{name} is not set: {what}" for name, what in REQUIRED.items() if not environment.get(name)]
        port = environment.get("REMOTE_PORT", "")
        if port and not port.isdecimal():
            problems.append(f"REMOTE_PORT={port}: should be a number")
        key = os.path.expanduser(environment.get("REMOTE_KEY", ""))
        if key and not Path(key).is_file():
            problems.append(f"REMOTE_KEY={key} does not exist")
        if problems:
            raise ConfigError(*problems, hint="set them in .env or in the environment; .env.example shows how")
        host, user = environment["REMOTE_HOST"], environment.get("REMOTE_USER")
        options = _option("-F", os.path.expanduser(environment.get("REMOTE_SSH_CONFIG", "")))
        options += [*_option("-l", user), *_option("-p", port), *_option("-i", key)]
        options += ["-o", "IdentitiesOnly=yes"] if key else []
        config = _ssh_config(host, options)
        keys = (key,) if key else config.get("identityfile", ())
        return RemoteTarget(
            host=host,
            dir=environment["REMOTE_DIR"],
            hostname=_first(config, "hostname") or host,
            user=_first(config, "user") or user or getpass.getuser(),
            port=int(_first(config, "port") or port or SSH_PORT),
            keys=tuple(p for p in (Path(os.path.expanduser(k)) for k in keys) if p.is_file()),
            only_these_keys=_first(config, "identitiesonly") == "yes",
            agent=_agent_socket(_first(config, "identityagent"), environment),
            proxy=_proxy_command(host, config, options),
            known_hosts=_known_hosts(config),
            key_name=_first(config, "hostkeyalias"),
            accept=environment.get("REMOTE_FINGERPRINT") or None,
            strict=_first(config, "stricthostkeychecking") or "ask",
            options=tuple(options),
            python=environment.get("REMOTE_PYTHON") or "python3",
        )


# ssh's configuration


def _option(flag: str, value: str | None) -> list[str]:
    return [flag, value] if value else []


def _ssh_config(host: str, options: list[str]) -> dict[str, tuple[str, ...]]:
    """The configuration of ssh for `host`; where ssh is not installed, its default keys and known_hosts."""
    if host.startswith("-"):
        raise ConfigError(f"REMOTE_HOST={host} is not a host name")
    if not shutil.which("ssh"):
        keys = [f"~/.ssh/id_{kind}" for kind in ("ed25519", "ecdsa", "rsa")]
        return {"identityfile": tuple(keys), "userknownhostsfile": ("~/.ssh/known_hosts",)}
    done = subprocess.run(["ssh", "-G", *options, host], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise RemoteError(f"ssh rejects its configuration for {host}: {lines[0]}")
    found: dict[str, tuple[str, ...]] = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition(" ")
        found[name] = (*found.get(name, ()), value)
    return found


def _escape(found: re.Match[str]) -> str:
    return f"\\{found[0]}" if found[0].isascii() else found[0]


def _first(config: SshConfig, name: str) -> str | None:
    value = config.get(name, ("none",))[0]
    return None if value == "none" else value


def _known_hosts(config: SshConfig) -> tuple[Path, ...]:
    """The user's file comes first: accepted keys are written to it."""
    words = " ".join(v for name in ("userknownhostsfile", "globalknownhostsfile") for v in config.get(name, ()))
    return tuple(Path(os.path.expanduser(w)) for w in words.split() if w != "none")


def _agent_socket(configured: str | None, environment: Mapping[str, str]) -> str | None:
    if configured and configured != "SSH_AUTH_SOCK":
        return os.path.expanduser(configured)
    return environment.get("SSH_AUTH_SOCK") or None


def _proxy_command(host: str, config: SshConfig, options: list[str]) -> tuple[str, ...]:
    """The command for ProxyJump, which is another ssh, or for ProxyCommand."""
    if jump := _first(config, "proxyjump"):
        config_file = options[:2] if options[:1] == ["-F"] else []
        *before, last = jump.split(",")
        user, name, port = _parse_hop(last)
        _check_jump_loop(jump, config_file)
        words = ["ssh", *config_file, "-o", "BatchMode=yes", *_option("-J", ",".join(before))]
        words += [*_option("-l", user), *_option("-p", port)]
        hostname = _first(config, "hostname") or ""
        bracketed = f"[{hostname}]" if ":" in hostname else hostname
        return (*words, "-W", f"{bracketed}:{_first(config, 'port')}", name)
    if not (command := _first(config, "proxycommand")):
        return ()
    keywords = {"h": "hostname", "p": "port", "r": "user"}  # TOKENS of ssh_config(5)
    tokens = {"%": "%", "n": host} | {token: _first(config, keyword) for token, keyword in keywords.items()}
    expanded = re.sub(r"%([%hprn])", lambda found: str(tokens[found[1]]), command)
    return ("/bin/sh", "-c", f"exec {expanded}")


def _parse_hop(jump: str) -> tuple[str, str, str]:
    """User, host and port of one host of ProxyJump, `[ssh://][user@]host[:port]`; a missing part is empty."""
    user, _, place = jump.removeprefix("ssh://").rpartition("@")
    name, colon, port = place.rpartition(":") if place.count(":") == 1 or "]:" in place else (place, "", "")
    return user, (name if colon else place).strip("[]"), port


def _check_jump_loop(jump: str, config_file: list[str]) -> None:
    """Raises: RemoteError if hosts jump through each other: ssh would start ssh without end."""
    seen: list[str] = []
    while jump not in seen:
        seen.append(jump)
        _, name, _ = _parse_hop(jump.split(",")[-1])
        if not (further := _first(_ssh_config(name, config_file), "proxyjump")):
            return
        jump = further
    raise RemoteError(
        f"ssh's configuration makes {name} jump through itself",
        hint=f"add to ssh's configuration: Host {name}, ProxyJump none",
    )


# Host keys


class HostKeyPolicy(MissingHostKeyPolicy):  # type: ignore[misc]
    """Rejects an unknown server unless the user has accepted its key."""

    def __init__(self, target: RemoteTarget) -> None:
        self.target = target

    def missing_host_key(self, client: SSHClient, hostname: str, key: PKey) -> None:
        """Write an accepted key to known_hosts. Raises: RemoteError if the key was not accepted."""
        target, found = self.target, key.fingerprint
        description = f"its {key.get_name()} key is {found}"
        by_fingerprint = target.accept == found
        if by_fingerprint or target.strict in {"accept-new", "off", "no", "false"}:
            reason = "REMOTE_FINGERPRINT" if by_fingerprint else "StrictHostKeyChecking of ssh's configuration"
            line = f"{hostname} {key.get_name()} {key.get_base64()}\n"
            written = "".join(f"; written to {file}" for file in target.known_hosts[:1] if _append(file, line))
            log.info("accepted %s by %s: %s%s", hostname, reason, description, written)
            return
        if target.accept:
            raise RemoteError(
                f"{hostname} does not have the key of REMOTE_FINGERPRINT={target.accept}: {description}",
                hint="compare this fingerprint with the one that the server's administrator gives you",
            )
        raise RemoteError(
            f"{hostname} is not a known host: {description}",
            hint="compare this fingerprint with the one that the server's administrator gives you, and accept "
            f"the key with REMOTE_FINGERPRINT={found}",
        )


def _append(file: Path, line: str) -> bool:
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as known:
            known.write(line)
    except OSError:  # the key has to be accepted again the next time
        return False
    return True


def load_host_keys(client: SSHClient, target: RemoteTarget) -> None:
    """Make a client trust the keys of known_hosts. Lines that cannot be parsed are skipped, as ssh skips them."""
    texts = [file.read_text("utf-8", errors="replace") for file in target.known_hosts if file.is_file()]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    revoked = {line.split()[3] for line in lines if line.startswith("@revoked") and len(line.split()) > 3}
    for line in reversed(lines):  # of several keys for one name, the first is used
        with suppress(SSHException, InvalidHostKey, ValueError):
            if (entry := HostKeyEntry.from_line(line)) and entry.key.get_base64() not in revoked:
                for name in entry.hostnames:
                    client.get_host_keys().add(name, entry.key.get_name(), entry.key)


def changed_host_key(error: BadHostKeyException, target: RemoteTarget) -> RemoteError:
    files = " or ".join(str(file) for file in target.known_hosts if file.is_file())
    return RemoteError(
        f"the host key of {error.hostname} has changed from {error.expected_key.fingerprint} to "
        f"{error.key.fingerprint}; the connection may be intercepted",
        hint=f"ask the server's administrator; if the new key is correct, remove the old key from {files}",
    )


# Private keys


class KeyAuth(AuthStrategy):  # type: ignore[misc]
    """The private keys that ssh would try: those of its configuration, then the agent's others."""

    def __init__(self, target: RemoteTarget) -> None:
        super().__init__(ssh_config=None)
        self.target = target
        self.locked: list[Path] = []  # have a passphrase, and are in no agent
        self.unreadable: list[Path] = []

    def get_sources(self) -> Iterator[Any]:
        held = _agent_keys(self.target.agent)
        for path in self.target.keys:
            public = _public_key(path)
            if public and (key := next((k for k in held if k.get_base64() == public), None)):
                held.remove(key)
                yield InMemoryPrivateKey(self.target.user, key)
            elif (loaded := self._load(path)) is not None:
                yield InMemoryPrivateKey(self.target.user, loaded)
        if not self.target.only_these_keys:
            yield from (InMemoryPrivateKey(self.target.user, key) for key in held)

    def _load(self, path: Path) -> PKey | None:
        try:
            return PKey.from_path(path)  # with its certificate, if there is one
        except (PasswordRequiredException, TypeError):  # TypeError: cryptography's, for a missing passphrase
            self.locked.append(path)
        except (OSError, SSHException, ValueError):
            self.unreadable.append(path)
        return None

    def refusal(self, error: AuthFailure) -> RemoteError:
        """The error for a failed login."""
        if self.locked:
            names = " ".join(map(str, self.locked))
            return RemoteError(
                f"{self.target} accepted no key: {names} has a passphrase, and no ssh-agent holds the key",
                hint=f"run ssh-add {names}",
            )
        tried = [str(path) for path in self.target.keys if path not in self.unreadable]
        reason = f"none of the keys was accepted: {', '.join(tried)}" if tried else "no private key was found"
        broken = f" ({', '.join(map(str, self.unreadable))} cannot be read)" if self.unreadable else ""
        return RemoteError(
            f"{self.target} rejected the login of {self.target.user}: {reason}{broken}",
            hint=f"check REMOTE_USER and REMOTE_KEY, or install your key: ssh-copy-id {self.target}",
        )


def _agent_keys(socket: str | None) -> list[AgentKey]:
    if not socket:
        return []
    before = os.environ.get("SSH_AUTH_SOCK")
    os.environ["SSH_AUTH_SOCK"] = socket  # the only place where paramiko looks
    try:
        return list(Agent().get_keys())
    except (OSError, SSHException):
        return []
    finally:
        os.environ.pop("SSH_AUTH_SOCK")
        if before is not None:
            os.environ["SSH_AUTH_SOCK"] = before


def _public_key(path: Path) -> str | None:
    """The public key in the file beside a private key, if there is one."""
    with suppress(OSError, IndexError):
        return path.with_name(f"{path.name}.pub").read_text().split()[1]
    return None
