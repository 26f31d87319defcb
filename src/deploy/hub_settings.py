"""Where the Hub is, whose token opens it, and what is wrong with the settings before anything is asked of it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, get_args
from urllib.parse import urlsplit

from src.errors import ConfigError
from src.schema import PublishConfig, TargetName

PUBLIC = "https://huggingface.co"
PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
REPO_ID = re.compile(rf"(?=.{{1,96}}\Z)(?!.*(?:--|\.\.))(?!.*\.git\Z){PART}/{PART}")
GO_ON = "the same command goes on from there"


def problems(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the settings of a publication, one sentence each. Only target=hub reads `repo_id`."""
    repo = values.get("repo_id")
    if values.get("target") != "hub" or repo is None or (isinstance(repo, str) and REPO_ID.fullmatch(repo)):
        return []
    return [f"repo_id={repo}: should be USER/NAME, each of letters, digits and single - _ . between them"]


def publish_hf_problems(values: Mapping[str, Any]) -> list[str]:
    """As `problems`, for publish-hf: its target is the Hub and no other."""
    target = values.get("target", "hub")
    known = get_args(TargetName)
    wrong = [f"target={target}: publish-hf publishes to the Hub; write publish target={target}"]
    return (wrong if target in known and target != "hub" else []) + problems({**values, "target": "hub"})


def check(cfg: PublishConfig) -> None:
    """Raises: ConfigError if repository or token are missing, or HF_ENDPOINT is no address: all at once."""
    wrong = []
    if cfg.repo_id is None:
        wrong.append("no repository is named; write --repo USER/NAME, or set HF_REPO_ID")
    if wrong_endpoint(endpoint()):
        wrong.append("HF_ENDPOINT is not a plain http(s) address; correct it, or unset it for huggingface.co")
    if not token():
        wrong.append("there is no token for the Hub; set HF_TOKEN, or run hf auth login")
    if wrong:
        raise ConfigError(*wrong)


def endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or PUBLIC).rstrip("/")


def wrong_endpoint(address: str) -> bool:
    """Whether `address` is not http(s)://HOST[:PORT][/PATH]; a password in it would be written down."""
    try:
        parts = urlsplit(address)
        return (
            parts.scheme not in {"http", "https"} or not parts.hostname or parts.port == 0 or "@" in parts.netloc
        )
    except ValueError:
        return True


def token() -> str:
    """The token of HF_TOKEN, or the one that `hf auth login` has kept; empty if there is none."""
    from huggingface_hub import get_token

    found = get_token() or ""
    if found:
        os.environ.setdefault("HF_TOKEN", found)  # where every writer of the house looks for what it must hide
    return found


def new_token() -> str:
    """The remedy where a token does not do."""
    return f"make one with write permission at {endpoint()}/settings/tokens; set HF_TOKEN or run hf auth login"
