"""Where remote runs go: REMOTE_* of the environment, and what ssh's own configuration says of that host."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from src.errors import ConfigError, RemoteError
from src.remote.agent.protocol import PYTHON_OPTIONS

NEEDED = {
    "REMOTE_HOST": "the server's name, its address, or an alias of ~/.ssh/config",
    "REMOTE_DIR": "the project's folder there, as ~/assay",
}
SSH_PORT = 22


@dataclass(frozen=True)
class RemoteTarget:
    """A host and a folder on it. `host` is as the user named it; the rest is what that means."""

    host: str
    dir: str  # as it was given, `~` and all: the host expands it
    hostname: str
    user: str
    port: int
    keys: tuple[Path, ...] = ()  # private keys to try, those of an agent aside
    only_these_keys: bool = False  # an agent's other keys are not tried
    agent: str | None = None  # socket
    proxy: tuple[str, ...] = ()  # a command whose standard streams are the connection
    known_hosts: tuple[Path, ...] = ()
    key_name: str | None = None  # HostKeyAlias
    accept: str | None = None  # the fingerprint of a host key that a person has accepted
    strict: str = "ask"  # StrictHostKeyChecking
    options: tuple[str, ...] = ()  # what was given besides the configuration, as ssh's options
    python: str = "python3"  # there

    def __str__(self) -> str:
        return f"{self.user}@{self.host.rpartition('@')[2]}"

    @property
    def ssh(self) -> list[str]:
        """The words of ssh that connect as this does, for rsync and a shell; they ask for nothing."""
        return ["ssh", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", *self.options]

    def command(self, code: str) -> str:
        """What any login shell there takes for: run `code`, which has no single quote, by its Python."""
        spelt = re.sub(r"(?!^~)([^\w./+-])", _escaped, self.python)
        return f"{spelt} {' '.join(PYTHON_OPTIONS)} -c '{code}'"

    @staticmethod
    def of(environment: Mapping[str, str]) -> RemoteTarget:
        """Raises: ConfigError naming all that is missing; RemoteError where ssh refuses its configuration."""
        missing = [f"{name} is not set: {what}" for name, what in NEEDED.items() if not environment.get(name)]
        port = environment.get("REMOTE_PORT", "")
        if port and not port.isdecimal():
            missing.append(f"REMOTE_PORT={port}: should be a number")
        key = os.path.expanduser(environment.get("REMOTE_KEY", ""))
        if key and not Path(key).is_file():
            missing.append(f"REMOTE_KEY={key} does not exist")
        if missing:
            raise ConfigError(*missing, hint="write them to .env or into the environment; .env.example shows how")
        host = environment["REMOTE_HOST"]
        options: list[str] = []
        if file := environment.get("REMOTE_SSH_CONFIG"):
            options += ["-F", os.path.expanduser(file)]
        if user := environment.get("REMOTE_USER"):
            options += ["-l", user]
        if port:
            options += ["-p", port]
        if key:
            options += ["-i", key, "-o", "IdentitiesOnly=yes"]
        said = _asked(host, options)
        keys = (key,) if key else said.get("identityfile", ())
        return RemoteTarget(
            host=host,
            dir=environment["REMOTE_DIR"],
            hostname=_one(said, "hostname") or host,
            user=_one(said, "user") or user or _own_name(),
            port=int(_one(said, "port") or port or SSH_PORT),
            keys=tuple(p for p in (Path(os.path.expanduser(k)) for k in keys) if p.is_file()),
            only_these_keys=_one(said, "identitiesonly") == "yes",
            agent=_agent(_one(said, "identityagent"), environment),
            proxy=_proxy(host, said, options),
            known_hosts=_known_hosts(said),
            key_name=_one(said, "hostkeyalias"),
            accept=environment.get("REMOTE_FINGERPRINT") or None,
            strict=_one(said, "stricthostkeychecking") or "ask",
            options=tuple(options),
            python=environment.get("REMOTE_PYTHON") or "python3",
        )


def _asked(host: str, options: list[str]) -> dict[str, tuple[str, ...]]:
    """What ssh would do for `host`: `ssh -G` reads Include, Match and all else as ssh does.

    Where there is no ssh, the host is what it is called, and the keys are where they always are.
    """
    if host.startswith("-"):
        raise ConfigError(f"REMOTE_HOST={host} is not a host")
    if not shutil.which("ssh"):
        keys = [f"~/.ssh/id_{kind}" for kind in ("ed25519", "ecdsa", "rsa")]
        return {"identityfile": tuple(keys), "userknownhostsfile": ("~/.ssh/known_hosts",)}
    done = subprocess.run(["ssh", "-G", *options, host], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it says nothing"]
        raise RemoteError(f"ssh refuses its configuration for {host}: {said[0]}")
    found: dict[str, tuple[str, ...]] = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition(" ")
        found[name] = (*found.get(name, ()), value)
    return found


def _escaped(found: re.Match[str]) -> str:
    return f"\\{found[0]}" if found[0].isascii() else found[0]


def _one(said: Mapping[str, tuple[str, ...]], name: str) -> str | None:
    value = said.get(name, ("none",))[0]
    return None if value == "none" else value


def _known_hosts(said: Mapping[str, tuple[str, ...]]) -> tuple[Path, ...]:
    """The user's file first: what is accepted is written there."""
    words = " ".join(v for name in ("userknownhostsfile", "globalknownhostsfile") for v in said.get(name, ()))
    return tuple(Path(os.path.expanduser(w)) for w in words.split() if w != "none")


def _agent(said: str | None, environment: Mapping[str, str]) -> str | None:
    if said and said != "SSH_AUTH_SOCK":
        return os.path.expanduser(said)
    return environment.get("SSH_AUTH_SOCK") or None


def _proxy(host: str, said: Mapping[str, tuple[str, ...]], options: list[str]) -> tuple[str, ...]:
    """The command of ProxyJump, which is ssh again, or of ProxyCommand."""
    if jump := _one(said, "proxyjump"):
        config = options[:2] if options[:1] == ["-F"] else []
        *before, last = jump.split(",")
        user, name, port = _hop(last)
        _refuse_loop(jump, config)
        words = ["ssh", *config, "-o", "BatchMode=yes", *(["-J", ",".join(before)] if before else [])]
        words += [*(["-l", user] if user else []), *(["-p", port] if port else [])]
        where = _one(said, "hostname") or ""
        bracketed = f"[{where}]" if ":" in where else where
        return (*words, "-W", f"{bracketed}:{_one(said, 'port')}", name)
    if not (command := _one(said, "proxycommand")):
        return ()
    tokens = {"%": "%", "h": _one(said, "hostname"), "p": _one(said, "port"), "r": _one(said, "user"), "n": host}
    spelt = re.sub(r"%([%hprn])", lambda found: str(tokens[found[1]]), command)  # TOKENS of ssh_config(5)
    return ("/bin/sh", "-c", f"exec {spelt}")


def _hop(jump: str) -> tuple[str, str, str]:
    """User, host and port of one of the hosts of ProxyJump, `[ssh://][user@]host[:port]`; empty where not said."""
    user, _, place = jump.removeprefix("ssh://").rpartition("@")
    name, colon, port = place.rpartition(":") if place.count(":") == 1 or "]:" in place else (place, "", "")
    return user, (name if colon else place).strip("[]"), port


def _refuse_loop(jump: str, config: list[str]) -> None:
    """Raises: RemoteError if hosts jump through one another: ssh would start ssh without end."""
    met: list[str] = []
    while jump not in met:
        met.append(jump)
        _, name, _ = _hop(jump.split(",")[-1])
        if not (further := _one(_asked(name, config), "proxyjump")):
            return
        jump = further
    raise RemoteError(
        f"ssh's configuration has {name} jump through itself", hint=f"give it: Host {name}, ProxyJump none"
    )


def _own_name() -> str:
    import getpass

    return getpass.getuser()
