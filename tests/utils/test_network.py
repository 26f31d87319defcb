"""The cause of a failed request is told by what huggingface_hub and boto3 raise, from real failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from src.utils.network import network_cause, proxy_of
from tests.data.hub_server import Handler, closed_port, serving

ROOT = Path(__file__).resolve().parents[2]
FETCH = """
import json, os, sys
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils import _http
from src.utils.network import network_cause
_http.time.sleep = lambda seconds: None  # between attempts
for variables in json.loads(sys.argv[1]):
    os.environ.update(variables)
    constants.HF_HUB_OFFLINE = "HF_HUB_OFFLINE" in variables
    endpoint = variables.get("HF_ENDPOINT", "https://hub.invalid")
    try:
        hf_hub_download("user/name", "config.json", endpoint=endpoint, cache_dir=sys.argv[2])
    except Exception as error:
        print("; ".join(network_cause(error, endpoint) or ["unknown"]))
    for name in variables:
        del os.environ[name]
    _http.close_session()
"""


class Refusing(Handler):
    """Every path begins with the HTTP status that it is answered with, and perhaps an error code of the Hub."""

    def do_HEAD(self) -> None:
        status, _, code = self.path.split("/")[1].partition("-")
        self.answer(int(status), **({"X_Error_Code": code} if code else {}))

    def do_CONNECT(self) -> None:
        self.answer(407)


def test_the_cause_is_told_and_what_removes_it(tmp_path: Path) -> None:
    dead = f"127.0.0.1:{closed_port()}"
    with serving(Refusing) as server:
        here = f"127.0.0.1:{server.server_port}"
        cases: list[tuple[dict[str, str], str]] = [
            ({"ALL_PROXY": f"socks5://me:hunter2@{dead}"},
             f"the proxy socks5://{dead} (ALL_PROXY) needs the Python package socksio"),
            ({"HTTPS_PROXY": f"htp://{dead}"}, f"the proxy htp://{dead} (HTTPS_PROXY) is not the address of"),
            ({"HTTPS_PROXY": f"http://{dead}"},
             f"the proxy http://{dead} (HTTPS_PROXY) refuses the connection; correct or unset HTTPS_PROXY"),
            ({"https_proxy": "http://proxy.invalid:1"}, "no address is known for the proxy http://proxy.i"),
            ({"HTTPS_PROXY": f"http://{here}"}, f"the proxy http://{here} (HTTPS_PROXY) requires a user"),
            ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, which forbids the network; un"),
            ({"HF_ENDPOINT": "http://hub.invalid"}, "no address is known for hub.invalid; check the network"),
            ({"HF_ENDPOINT": f"http://{dead}", "HTTP_PROXY": "http://proxy.invalid:1", "NO_PROXY": "127.0.0.1"},
             f"{dead} refuses the connection; check the network"),
            ({"HF_ENDPOINT": f"https://{here}"}, f"TLS with {here} failed"),
            ({"HF_ENDPOINT": f"http://{here}/404-RepoNotFound"}, f"{here} has none of this name, or it is"),
            ({"HF_ENDPOINT": f"http://{here}/404-RevisionNotFound"}, "it has no such revision"),
            ({"HF_ENDPOINT": f"http://{here}/403-GatedRepo"}, "it is gated, and HF_TOKEN is not"),
            ({"HF_ENDPOINT": f"http://{here}/403"}, f"{here} denies access, and HF_TOKEN"),
            ({"HF_ENDPOINT": f"http://{here}/503"}, f"{here} is busy or out of order"),
        ]  # fmt: skip
        unset = {"HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "NO_PROXY", "no_proxy"}
        done = subprocess.run(
            [sys.executable, "-c", FETCH, json.dumps([variables for variables, _ in cases]), str(tmp_path)],
            env={k: v for k, v in os.environ.items() if k not in unset} | {"PYTHONPATH": str(ROOT)},
            cwd=ROOT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    said = done.stdout.splitlines()
    assert len(said) == len(cases), done.stderr
    assert [(line, told) for line, (_, told) in zip(said, cases, strict=True) if told not in line] == []
    assert "hunter2" not in done.stdout


def test_boto3_says_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from src.data.from_s3 import fetch_s3
    from src.errors import DataError
    from src.schema import DataSource

    for name in ("KEY_ID", "KEY"):
        monkeypatch.setenv(f"AWS_{'ACCESS' if name == 'KEY_ID' else 'SECRET_ACCESS'}_{name}", "x")
    dead = f"127.0.0.1:{closed_port()}"
    source = DataSource("s3", bucket="rows", endpoint="http://s3.invalid")
    for proxy, told in {
        "": "no address is known for s3.invalid",
        f"http://{dead}": "(http_proxy) refuses the",
    }.items():
        monkeypatch.setenv("http_proxy", proxy)
        with pytest.raises(DataError) as caught:
            fetch_s3(source, tmp_path)
        assert told in str(caught.value)


def test_the_proxy_of_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALL_PROXY", "http://a:b@p:1")
    assert proxy_of("https://x.org/y") == ("ALL_PROXY", "http://p:1")
    monkeypatch.setenv("NO_PROXY", ".org")
    assert proxy_of("https://x.org/y") == ("", "")
    assert network_cause(ValueError("no JSON"), "https://x.org") is None
