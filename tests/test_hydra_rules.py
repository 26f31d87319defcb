"""A configuration file of somebody else cannot run code or set variables through Hydra's settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from src import cli, cli_args
from src.errors import ConfigError

REFUSED = {
    "hydra: {callbacks: {x: {_target_: os.system, command: touch pwned}}}": "hydra.callbacks.x._target_",
    "hydra: {job_logging: {handlers: {a: {'()': os.system}}}}": "hydra.job_logging.handlers.a.()",
    "hydra: {hydra_logging: {version: 1}}": "hydra.hydra_logging.version",
    "hydra: {job: {env_set: {LD_PRELOAD: x}, chdir: true}}": "hydra.job.env_set.LD_PRELOAD",
    "hydra: {searchpath: ['pkg://antigravity']}": "hydra.searchpath",
    "hydra: {launcher: {_target_: a.b}}": "hydra.launcher._target_",
    "hydra: {sweeper: {params: {seed: '1,2'}}}": "hydra.sweeper.params.seed",
    "hydra: text": "hydra",
    "defaults: [override /hydra/job_logging: disabled]": "override /hydra/job_logging",
    "defaults: [{override hydra/callbacks: evil}]": "override hydra/callbacks",
    "defaults: [{/model@hydra.callbacks: x}]": "/model@hydra.callbacks",
    "# @package hydra.callbacks\nx: {_target_: a.b}": "hydra.callbacks.x._target_",
}


@pytest.mark.parametrize("content", REFUSED)
@pytest.mark.parametrize("how", ["preset by its path", "preset by its name", "stage file"])
def test_what_runs_code_is_refused_with_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, how: str
) -> None:
    monkeypatch.chdir(tmp_path)
    by_path = how == "preset by its path"
    if content.startswith("#") and how != "preset by its name":
        pytest.skip("only a preset that is found by its name has a package")
    package = "# @package _global_\n" if how == "preset by its name" and not content.startswith("#") else ""
    file = tmp_path / ("configs/experiment/mine.yaml" if how == "preset by its name" else "mine.yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{package}{content}\n")
    words = (
        ["--config-name", "mine.yaml"]
        if how == "stage file"
        else [f"experiment={'mine.yaml' if by_path else 'mine'}"]
    )
    with pytest.raises(ConfigError) as refused:
        cli.run_jobs(cli_args.parse("train", words), lambda _: 0)
    assert any(f"mine.yaml sets {REFUSED[content]}" in problem for problem in refused.value.problems)


def test_a_group_of_hydra_beside_a_stage_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hydra" / "callbacks").mkdir(parents=True)
    (tmp_path / "hydra/callbacks/evil.yaml").write_text("x: {_target_: a.b}\n")
    (tmp_path / "mine.yaml").write_text("lr: 1e-3\n")
    words = ["--config-path", str(tmp_path), "--config-name", "mine", "hydra/callbacks=evil"]
    with pytest.raises(ConfigError, match="the folder hydra of configuration files"):
        cli.run_jobs(cli_args.parse("train", words), lambda _: 0)


def test_harmless_settings_of_hydra_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(
        "hydra: {sweep: {dir: out, subdir: '${hydra.job.num}'}, job: {name: x}}\nlr: 0.5\n"
    )
    seen: list[float] = []
    cli.run_jobs(cli_args.parse("train", ["experiment=mine.yaml"]), lambda config: seen.append(config.lr))
    assert seen == [0.5]
