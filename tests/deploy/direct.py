"""The publishing stages as the command line runs them, but without composing a configuration, which is slow."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from src import config
from src.deploy import hub_settings, push
from src.errors import UserError
from src.utils.logs import start_logging
from src.utils.secrets import redact
from tests.fixtures import World

REPO = "me/ingot"


def to_hub(world: World, path: Path | None = None, repo: str = REPO, **settings: Any) -> int:
    """Run publish-hf. Returns: the exit code. A refusal is printed as the command line does."""
    values = _settings(world, path, settings) | {"repo_id": repo}
    return _run("publish-hf", values)


def locally(world: World, path: Path | None = None, **settings: Any) -> int:
    return _run("publish", _settings(world, path, settings))


def _settings(world: World, path: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    folders = {"output_dir": str(world.output), "artifacts_dir": str(world.artifacts)}
    return {**folders, "model_path": str(path) if path else None, "gate": {"verify_examples": 0}, **settings}


def _run(stage: str, values: dict[str, Any]) -> int:
    start_logging()
    try:
        check = hub_settings.problems if stage == "publish" else hub_settings.publish_hf_problems
        return push.publish(config.load(stage, values, check))
    except UserError as error:
        print(redact(str(error)), file=sys.stderr)
        return error.exit_code
