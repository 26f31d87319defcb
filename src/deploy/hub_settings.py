"""The Hub's address and token, and the checks of target=hub that need no network. Imports no heavy library."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, get_args
from urllib.parse import urlsplit

from ..errors import ConfigError
from ..schema import PublishArgs, TargetName

PUBLIC = "https://huggingface.co"
PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
REPO_ID = re.compile(rf"(?=.{{1,96}}\Z)(?!.*(?:--|\.\.))(?!.*\.git\Z){PART}/{PART}")
RESUME = "run the same command again to resume"


def problems(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the settings of a publication, one sentence each. Only target=hub reads `repo_id`."""
    repo = values.get("repo_id")
    if values.get("target") != "hub" or repo is None or (isinstance(repo, str) and REPO_ID.fullmatch(repo)):
        return []
    return [f"repo_id={repo}: should be USER/NAME, each of letters, digits and single - _ . between them"]


def publish_hf_problems(values: Mapping[str, Any]) -> list[str]:
    """As `problems`, for publish-hf, whose target is always the Hub."""
    target = values.get("target", "hub")
    others = {name for name in get_args(TargetName) if name != "hub"}
    wrong = [f"target={target}: publish-hf publishes to the Hub; write publish target={target}"]
    return (wrong if target in others else []) + problems({**values, "target": "hub"})


def check(args: PublishArgs) -> None:
    """Raises: ConfigError naming all of these that apply: no repository, no token, an invalid HF_ENDPOINT."""
    wrong = []
    if args.repo_id is None:
        wrong.append("no repository is named; set repo_id=USER/NAME (publish-hf: --repo USER/NAME), or HF_REPO_ID")
    if is_invalid_endpoint(endpoint()):
        wrong.append("HF_ENDPOINT is not a plain http(s) address; correct it, or unset it for huggingface.co")
    if not token():
        wrong.append("no token for the Hub was found; set HF_TOKEN, or run hf auth login")
    if wrong:
        raise ConfigError(*wrong)


def endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or PUBLIC).rstrip("/")


def is_invalid_endpoint(address: str) -> bool:
    """Whether `address` is not http(s)://HOST[:PORT][/PATH]. A password in it would be written to files."""
    try:
        parts = urlsplit(address)
        return (
            parts.scheme not in {"http", "https"} or not parts.hostname or parts.port == 0 or "@" in parts.netloc
        )
    except ValueError:
        return True


def token() -> str:
    """The token of HF_TOKEN, or the one that `hf auth login` stored; empty if there is none."""
    from huggingface_hub import get_token

    found = get_token() or ""
    if found:
        os.environ.setdefault("HF_TOKEN", found)  # the redaction of secrets reads it there
    return found


def new_token_hint() -> str:
    """The remedy if the token is not sufficient."""
    return f"create one with write permission at {endpoint()}/settings/tokens; set HF_TOKEN or run hf auth login"
