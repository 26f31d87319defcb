"""Former names of settings: read wherever settings are read, and replaced by today's names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from src import aliases, cli, cli_args, compose, config, runs, schema, search_space, sweep
from src.errors import ConfigError
from src.eval.report import lineage
from src.runs import Run
from src.stages import STAGES
from src.train import resume
from src.utils.files import write_json

FORMER = [  # a stage, a setting's former name, and a value that is not the default
    ("train", "near_threshold", 0.7),
    ("train", "data_workers", 3),
    ("train", "mirror", "s3://bucket/runs"),
    ("train", "mirror_endpoint", "https://s3.example.org"),
    ("plan", "plan_for", "cuda"),
    ("eval", "fresh", True),
    ("eval", "allow_other_base", True),
    ("eval", "allow_other_tokenizer", True),
    ("publish", "gate.reload_examples", 3),
    ("validate", "questions", 2),
]


@pytest.fixture(autouse=True)
def fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(aliases, "_announced", set())
    yield


def load(stage: str, *words: str) -> Any:
    """The only configuration that a command line starts a job with."""
    found: list[Any] = []
    cli.run_jobs(cli_args.parse(stage, list(words)), found.append)
    (only,) = found
    return only


def value_of(cfg: Any, key: str) -> Any:
    for part in key.split("."):
        cfg = getattr(cfg, part)
    return cfg


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def write(path: str, values: dict[str, Any], head: str = "") -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(head + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


# The table


def test_every_former_name_leads_to_a_setting_and_is_none_itself() -> None:
    settings = {key for stage in STAGES for key in config.flat_keys(config.schema_of(stage))}
    assert set(aliases.RENAMED.values()) <= settings
    assert not set(aliases.RENAMED) & settings
    assert not set(aliases.RENAMED) & set(aliases.OTHER_TOOLS)
    assert {key for _, key, _ in FORMER} == set(aliases.RENAMED)


def test_a_renamed_setting_stays_in_its_group() -> None:
    for old, new in aliases.RENAMED.items():
        assert old.rpartition(".")[0] == new.rpartition(".")[0]
    assert len(set(aliases.RENAMED.values())) == len(aliases.RENAMED)


# Where it is read


@pytest.mark.parametrize(("stage", "old", "value"), FORMER)
def test_a_former_name_on_the_command_line(
    stage: str, old: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert value_of(load(stage, f"{old}={str(value).lower()}"), aliases.RENAMED[old]) == value
    assert capsys.readouterr().err == f"{old} is now {aliases.RENAMED[old]}\n"


@pytest.mark.parametrize(("stage", "old", "value"), FORMER)
def test_a_former_name_in_a_file_of_the_stage(
    stage: str, old: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write("mine.yaml", nested(old, value))
    assert value_of(load(stage, "--config-name", file), aliases.RENAMED[old]) == value
    assert capsys.readouterr().err == f"{old} is now {aliases.RENAMED[old]}\n"


@pytest.mark.parametrize("named", ["experiment=mine/best.yaml", "experiment=best"])
def test_a_former_name_in_a_preset(named: str, capsys: pytest.CaptureFixture[str]) -> None:
    head = "# @package _global_\n"
    write("mine/best.yaml", {"near_threshold": 0.7}, head)
    write("own/experiment/best.yaml", {"near_threshold": 0.7}, head)
    write("own/train.yaml", {"seed": 1})
    cfg = load("train", "--config-path", "own", named)
    assert (cfg.dedup_threshold, cfg.seed) == (0.7, 1)
    assert capsys.readouterr().err == "near_threshold is now dedup_threshold\n"


def test_a_former_name_in_a_preset_that_another_one_includes() -> None:
    head = "# @package _global_\n"
    write("own/experiment/base.yaml", {"near_threshold": 0.7, "seed": 3}, head)
    write("own/experiment/more.yaml", {"defaults": ["base", "_self_"], "seed": 4}, head)
    write("own/train.yaml", {})
    cfg = load("train", "--config-path", "own", "experiment=more")
    assert (cfg.dedup_threshold, cfg.seed) == (0.7, 4)


@pytest.mark.parametrize(("stage", "old", "value"), FORMER)
def test_the_recorded_settings_of_an_older_run_repeat_it_without_a_word(
    stage: str, old: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write("run/config_used.yaml", older(stage) | nested(old, value))
    assert value_of(load(stage, "--config-name", file), aliases.RENAMED[old]) == value
    assert value_of(config.load(stage, nested(old, value)), aliases.RENAMED[old]) == value
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("stage", "word", "key", "value"),
    [
        ("train", "+near_threshold=0.7", "dedup_threshold", 0.7),
        ("train", "++near_threshold=0.7", "dedup_threshold", 0.7),
        ("train", "mirror=s3://bucket/a, b", "checkpoint_mirror", "s3://bucket/a, b"),
        ("publish", "gate={reload_examples: 3, min_delta: 0.1}", "gate.verify_examples", 3),
        ("publish", "gate={min_delta: 0.1,reload_examples:3}", "gate.verify_examples", 3),
        ("train", "~near_threshold", "dedup_threshold", 0.8),
    ],
)
def test_a_former_name_however_it_is_typed(stage: str, word: str, key: str, value: Any) -> None:
    assert value_of(load(stage, word), key) == value


def test_a_former_name_that_is_swept(capsys: pytest.CaptureFixture[str]) -> None:
    found: list[Any] = []
    cli.run_jobs(cli_args.parse("train", ["-m", "near_threshold=0.7,0.9"]), found.append)
    assert [cfg.dedup_threshold for cfg in found] == [0.7, 0.9]
    captured = capsys.readouterr()
    assert captured.err == "near_threshold is now dedup_threshold\n"
    assert "trial 0: dedup_threshold=0.7\n" in captured.out


def test_a_former_name_as_a_flag_is_answered_with_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"--near-threshold is not a flag of train; write dedup_threshold=0\.7"):
        load("train", "--near-threshold=0.7")


# Precedence


def test_what_is_typed_wins_over_a_file_under_either_name() -> None:
    old = write("old.yaml", {"near_threshold": 0.7})
    new = write("new.yaml", {"dedup_threshold": 0.7})
    for file in (old, new):
        for name in ("near_threshold", "dedup_threshold"):
            assert load("train", "--config-name", file, f"{name}=0.9").dedup_threshold == 0.9


def test_both_names_with_one_value_are_accepted() -> None:
    assert load("train", "near_threshold=0.7", "dedup_threshold=0.7").dedup_threshold == 0.7


def test_both_names_with_two_values_are_refused() -> None:
    sentence = (
        "near_threshold=0.7 and dedup_threshold=0.9 are one setting with two values; write dedup_threshold only"
    )
    with pytest.raises(ConfigError) as typed:
        load("train", "near_threshold=0.7", "dedup_threshold=0.9", "lr=abc")
    assert list(typed.value.problems) == [sentence, "lr=abc: should be a number"]
    with pytest.raises(ConfigError) as written:
        load("train", "--config-name", write("a.yaml", {"near_threshold": 0.7, "dedup_threshold": 0.9}))
    assert str(written.value) == sentence


# An older run


def older(stage: str) -> dict[str, Any]:
    """The default settings of a stage under their former names."""
    return aliases.former_settings(config.defaults(stage))


def test_the_former_names_of_all_settings() -> None:
    assert aliases.current_settings(older("train")) == config.defaults("train")
    assert "near_threshold" in older("train") and "dedup_threshold" not in older("train")
    assert "reload_examples" in older("publish")["gate"]


def test_an_older_run_has_the_settings_of_today() -> None:
    write("run/config_used.yaml", older("train") | {"near_threshold": 0.7})
    settings = Run(Path("run")).settings
    assert settings == config.defaults("train") | {"dedup_threshold": 0.7}
    assert list(settings) == list(config.defaults("train"))


def test_an_older_run_is_resumed_with_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load("train", "near_threshold=0.7", "resume=auto")
    recorded = aliases.former_settings(yaml.safe_load(config.to_yaml(cfg)))
    run = runs.create(cfg.output_dir, "train", yaml.safe_dump(recorded), {})
    write_json(run.path / "manifest.json", run.manifest | {"status": runs.INTERRUPTED})
    run.unlock()
    assert [found.id for found in resume.find_resumable(cfg)] == [run.id]
    assert resume.find_resumable(load("train", "dedup_threshold=0.8", "resume=auto")) == []


def test_the_report_of_an_older_run_shows_what_differs_from_the_defaults() -> None:
    text = yaml.safe_dump(older("train") | {"near_threshold": 0.7})
    assert lineage.settings(text)["changed"] == [("dedup_threshold", "0.7", "0.8")]


def test_an_older_sweep_goes_on_with_its_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["-m", "near_threshold=0.7,0.9", "lr=1e-3"]
    plan = sweep_of(words)
    assert plan.identity != plan.former_identity
    trial = {
        "number": 0,
        "settings": {"near_threshold": "0.7"},
        "status": "finished",
        "objective": 1.0,
        "run": None,
    }
    folder = Path(plan.output_dir) / "sweeps" / "old"
    folder.mkdir(parents=True)
    process = runs.this_process() | {"created": 0}
    record = {"identity": plan.former_identity, "status": "running", "process": process, "trials": [trial]}
    (folder / "trials.json").write_text(json.dumps(record))
    found = sweep.Sweep(plan)
    assert found.folder == folder
    assert found.start_trial(0, {"dedup_threshold": "0.7"}) is False
    assert found.start_trial(1, {"dedup_threshold": "0.9"}) is True


def sweep_of(words: list[str]) -> sweep.SweepPlan:
    call = cli_args.parse("train", words)
    overrides, problems = compose.prepare_overrides(call)
    assert problems == []
    compose.register_root(call)
    fixed, _ = search_space.split(overrides)
    return sweep.plan_sweep(compose.compose_values(call, fixed)[0], {}, overrides, schema.SearchArgs(), [])


def test_a_reference_to_a_former_name_is_the_value_of_todays(tmp_path: Path) -> None:
    cfg = load("train", "near_threshold=0.7", "focal_gamma=${near_threshold}")
    assert (cfg.dedup_threshold, cfg.focal_gamma) == (0.7, 0.7)
    file = tmp_path / "own.yaml"
    file.write_text("near_threshold: 0.6\nfocal_gamma: ${near_threshold}\n")
    assert load("train", "--config-name", str(file)).focal_gamma == 0.6


def test_a_preset_of_a_group_may_have_a_former_name(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "strict.yaml").write_text("# @package gate\nreload_examples: 4\n")
    (tmp_path / "publish.yaml").write_text("{}")
    cfg = load("publish", "--config-path", str(tmp_path), "--config-name", "publish", "experiment=strict")
    assert cfg.gate.verify_examples == 4


@pytest.mark.parametrize(
    ("stage", "word", "problem"),
    [
        ("train", "datta_workers=3", "datta_workers is not a setting; did you mean num_proc?"),
        (
            "publish",
            "gate.reload_example=3",
            "gate.reload_example is not a setting; did you mean gate.verify",
        ),
        ("train", "fresh=true", "fresh is not a setting; did you mean force?"),
        ("eval", "near_threshold=0.7", "near_threshold is not a setting"),
    ],
)
def test_a_problem_names_what_was_typed_and_a_setting_of_the_stage(
    stage: str, word: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        load(stage, word)
    assert str(error.value).startswith(problem)
    assert capsys.readouterr().err == ""


def test_both_names_of_a_setting_in_one_value_are_a_problem_among_the_others() -> None:
    with pytest.raises(ConfigError) as error:
        load("publish", "gate={reload_examples:5,verify_examples:4}", "max_shard_gb=x")
    assert "which are one setting" in error.value.problems[0] and len(error.value.problems) == 2


def test_one_value_may_be_written_in_two_ways() -> None:
    assert load("train", "near_threshold=0.70", "dedup_threshold=0.7").dedup_threshold == 0.7
