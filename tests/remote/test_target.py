"""REMOTE_* and ssh's configuration: how a target is resolved."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from src.errors import ConfigError, RemoteError
from src.remote.target import RemoteTarget

pytestmark = pytest.mark.skipif(not shutil.which("ssh"), reason="SKIPPED: no OpenSSH client is installed")

PLACE = {"REMOTE_HOST": "box", "REMOTE_DIR": "~/assay"}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "config"


def target(config: Path, text: str, **more: str) -> RemoteTarget:
    config.write_text(text)
    return RemoteTarget.from_env(PLACE | {"REMOTE_SSH_CONFIG": str(config)} | more)


def test_every_missing_variable_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        RemoteTarget.from_env({"REMOTE_PORT": "22x", "REMOTE_KEY": str(tmp_path / "none")})
    text = str(error.value)
    assert all(name in text for name in ("REMOTE_HOST", "REMOTE_DIR", "REMOTE_PORT=22x", "none does not exist"))
    assert ".env" in text


def test_an_alias_is_resolved_by_ssh(config: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("")
    found = target(
        config,
        f"Host box\n HostName 10.0.0.7\n Port 2200\n User ada\n IdentityFile {key}\n IdentitiesOnly yes\n"
        f" UserKnownHostsFile {tmp_path}/known\n HostKeyAlias rack\n",
    )
    assert (found.hostname, found.port, found.user, found.keys) == ("10.0.0.7", 2200, "ada", (key,))
    assert found.only_these_keys and found.key_name == "rack" and found.known_hosts[0] == tmp_path / "known"
    assert str(found) == "ada@box"


def test_the_variables_override_the_configuration(config: Path, tmp_path: Path) -> None:
    key = tmp_path / "my key"
    key.write_text("")
    text = "Host box\n HostName 10.0.0.7\n Port 2200\n User ada\n IdentityFile /nowhere\n"
    found = target(config, text, REMOTE_USER="bob", REMOTE_PORT="2201", REMOTE_KEY=str(key))
    assert (found.user, found.port, found.keys, found.only_these_keys) == ("bob", 2201, (key,), True)
    assert str(key) in found.ssh_command and "2201" in found.ssh_command and "bob" in found.ssh_command


def test_an_included_configuration_applies(config: Path, tmp_path: Path) -> None:
    (tmp_path / "more").write_text("Host box\n HostName 10.1.1.1\n")
    assert target(config, f"Include {tmp_path}/more\n").hostname == "10.1.1.1"


def test_a_match_block_applies(config: Path) -> None:
    assert target(config, "Match host box exec true\n Port 2345\n").port == 2345


@pytest.mark.parametrize(
    ("jump", "words"),
    [
        ("gate", ["-W", "10.0.0.7:22", "gate"]),
        ("eve@gate:2222", ["-l", "eve", "-p", "2222", "-W", "10.0.0.7:22", "gate"]),
        ("one,two", ["-J", "one", "-W", "10.0.0.7:22", "two"]),
        ("[fe80::1]:99", ["-p", "99", "-W", "10.0.0.7:22", "fe80::1"]),
        ("ssh://eve@gate:99", ["-l", "eve", "-p", "99", "-W", "10.0.0.7:22", "gate"]),
    ],
)
def test_a_jump_host_is_ssh_again(config: Path, jump: str, words: list[str]) -> None:
    found = target(config, f"Host box\n HostName 10.0.0.7\n ProxyJump {jump}\n")
    assert found.proxy[0] == "ssh" and list(found.proxy[-len(words) :]) == words
    assert str(config) in found.proxy  # it defines the jump host


def test_a_jump_host_that_jumps_through_itself_is_refused(config: Path) -> None:
    with pytest.raises(RemoteError, match="hop jump through itself"):
        target(config, "Host hop\n Port 2222\nHost *\n ProxyJump hop\n")


def test_jump_hosts_that_jump_through_each_other_are_refused(config: Path) -> None:
    text = "Host box\n ProxyJump one\nHost one\n ProxyJump me@two:22\nHost two\n ProxyJump one\n"
    with pytest.raises(RemoteError, match="jump through itself"):
        target(config, text)


def test_a_jump_host_behind_another_is_reached(config: Path) -> None:
    found = target(config, "Host box\n ProxyJump one\nHost one\n ProxyJump two\n")
    assert found.proxy[-1] == "one"


def test_a_proxy_command_is_run_by_a_shell(config: Path) -> None:
    found = target(config, "Host box\n ProxyCommand nc -x proxy:1080 %h %p\n")
    assert found.proxy == ("/bin/sh", "-c", "exec nc -x proxy:1080 box 22")


def test_no_proxy_is_none(config: Path) -> None:
    assert target(config, "Host box\n ProxyJump none\n ProxyCommand none\n").proxy == ()


def test_an_invalid_configuration_is_reported_in_sshs_words(config: Path) -> None:
    with pytest.raises(RemoteError, match="Bad configuration option"):
        target(config, "Host box\n Colour blue\n")


def test_a_host_is_no_option_of_ssh() -> None:
    with pytest.raises(ConfigError, match="is not a host"):
        RemoteTarget.from_env(PLACE | {"REMOTE_HOST": "-oProxyCommand=touch /tmp/owned"})
