"""Who the server is, and who we are: host keys and private keys, as OpenSSH takes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from paramiko import Agent, AgentKey, MissingHostKeyPolicy, PKey, SSHClient
from paramiko.auth_strategy import AuthFailure, AuthStrategy, InMemoryPrivateKey
from paramiko.hostkeys import HostKeyEntry, InvalidHostKey
from paramiko.ssh_exception import BadHostKeyException, PasswordRequiredException, SSHException

from src.errors import RemoteError
from src.remote.target import SSH_PORT, RemoteTarget
from src.utils.logs import log


class HostKeyCheck(MissingHostKeyPolicy):  # type: ignore[misc]
    """Refuses a server that is not known, unless a person has accepted just this key."""

    def __init__(self, target: RemoteTarget) -> None:
        self.target = target

    def missing_host_key(self, client: SSHClient, hostname: str, key: PKey) -> None:
        """Raises: RemoteError unless the key was accepted; it is written to known_hosts then."""
        target, found = self.target, key.fingerprint
        said = f"its {key.get_name()} key is {found}"
        if target.accept == found or target.strict in {"accept-new", "off", "no", "false"}:
            reason = (
                "REMOTE_FINGERPRINT" if target.accept == found else "StrictHostKeyChecking of ssh's configuration"
            )
            line = f"{hostname} {key.get_name()} {key.get_base64()}\n"
            written = "".join(f"; written to {file}" for file in target.known_hosts[:1] if _append(file, line))
            log.info("accepted %s by %s: %s%s", hostname, reason, said, written)
            return
        if target.accept:
            raise RemoteError(
                f"{hostname} is another than REMOTE_FINGERPRINT={target.accept} says: {said}",
                hint="compare that with what its administrator says",
            )
        raise RemoteError(
            f"{hostname} is not a known host: {said}",
            hint=f"compare that with what its administrator says, and accept it by REMOTE_FINGERPRINT={found}",
        )


def _append(file: Path, line: str) -> bool:
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as known:
            known.write(line)
    except OSError:  # the server is asked after again the next time
        return False
    return True


def trust_known(client: SSHClient, target: RemoteTarget) -> None:
    """Have a client trust the keys of known servers; as ssh does, it passes over what it does not understand."""
    texts = [Path(file).read_text("utf-8", errors="replace") for file in known_hosts(target)]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    revoked = {line.split()[3] for line in lines if line.startswith("@revoked") and len(line.split()) > 3}
    for line in reversed(lines):  # the first of several for one name is what counts
        with suppress(SSHException, InvalidHostKey, ValueError):
            if (entry := HostKeyEntry.from_line(line)) and entry.key.get_base64() not in revoked:
                for name in entry.hostnames:
                    client.get_host_keys().add(name, entry.key.get_name(), entry.key)


def known_hosts(target: RemoteTarget) -> Iterator[str]:
    """The files that hold the keys of known servers."""
    return (str(file) for file in target.known_hosts if file.is_file())


def name_of_key(target: RemoteTarget) -> tuple[str, int]:
    """Under which name and port the server's key is known."""
    return (target.key_name, SSH_PORT) if target.key_name else (target.hostname, target.port)


def changed(error: BadHostKeyException, target: RemoteTarget) -> RemoteError:
    files = " or ".join(known_hosts(target))
    return RemoteError(
        f"the host key of {error.hostname} has changed: it is {error.key.fingerprint}, and was "
        f"{error.expected_key.fingerprint}; somebody may listen in",
        hint=f"ask its administrator; if it is right, remove the old key from {files}",
    )


class KeyAuth(AuthStrategy):  # type: ignore[misc]
    """The private keys that ssh would try: its configuration's, by agent or file, then the agent's others."""

    def __init__(self, target: RemoteTarget) -> None:
        super().__init__(ssh_config=None)
        self.target = target
        self.locked: list[Path] = []  # protected by a passphrase, and in no agent
        self.unreadable: list[Path] = []

    def get_sources(self) -> Iterator[Any]:
        held = _agent_keys(self.target.agent)
        for path in self.target.keys:
            wanted = _public(path)
            if wanted and (key := next((k for k in held if k.get_base64() == wanted), None)):
                held.remove(key)
                yield InMemoryPrivateKey(self.target.user, key)
            elif (loaded := self._loaded(path)) is not None:
                yield InMemoryPrivateKey(self.target.user, loaded)
        if not self.target.only_these_keys:
            yield from (InMemoryPrivateKey(self.target.user, key) for key in held)

    def _loaded(self, path: Path) -> PKey | None:
        try:
            return PKey.from_path(path)  # with its certificate, where one lies beside it
        except (
            PasswordRequiredException,
            TypeError,
        ):  # the second is cryptography's, of a key without its passphrase
            self.locked.append(path)
        except (OSError, SSHException, ValueError):
            self.unreadable.append(path)
        return None

    def refusal(self, error: AuthFailure) -> RemoteError:
        """Why nobody was let in, in a sentence."""
        if self.locked:
            names = " ".join(map(str, self.locked))
            return RemoteError(
                f"{self.target} lets nobody in: {names} is protected by a passphrase, and no agent holds it",
                hint=f"run ssh-add {names}",
            )
        tried = [str(path) for path in self.target.keys if path not in self.unreadable]
        said = f"it takes none of {', '.join(tried)}" if tried else "there is no key to show it"
        broken = f" ({', '.join(map(str, self.unreadable))} cannot be read)" if self.unreadable else ""
        return RemoteError(
            f"{self.target} refuses {self.target.user}: {said}{broken}",
            hint=f"check REMOTE_USER and REMOTE_KEY, or have it take your key: ssh-copy-id {self.target}",
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


def _public(path: Path) -> str | None:
    """The public part of a private key, where it lies beside it."""
    with suppress(OSError, IndexError):
        return path.with_name(f"{path.name}.pub").read_text().split()[1]
    return None
