"""Sweeps: each trial in one table, the best one a preset, nothing lost by a failure, an interruption or a kill.

The trainings of these tests are one sum, in a real run directory; those at the end are real.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from src import cli, cli_args, config, outcome, runs
from src.errors import ConfigError, DataError, Stopped
from src.sweep import TABLE, TRIALS
from tests.fixtures import ROOT, World, tree
from tests.fork_server import ForkServer

pytest_plugins = ["tests.fixtures", "tests.fork_server"]

Said = pytest.CaptureFixture[str]
SPACE = "search.space={lr: 'tag(log, interval(1e-5, 1e-1))', lora_r: [4, 8, 16]}"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working directory with nothing but a dev split, and an environment that is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("src.gpus.missing", lambda visible: [])
    (tmp_path / "data" / "eval").mkdir(parents=True)
    (tmp_path / "data" / "eval" / "dev.jsonl").touch()
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def loss_of(cfg: Any) -> float:
    """Smallest, 0, at lr=0.01 and lora_r=8."""
    return abs(cfg.lr - 0.01) + abs(cfg.lora_r - 8)


class Training:
    """Replaces training: creates a run with its loss, and records the settings that it received."""

    def __init__(self, hook: Callable[[Any, int], None] = lambda cfg, count: None) -> None:
        self.seen: list[Any] = []
        self.hook = hook

    def __call__(self, cfg: Any) -> int:
        self.seen.append(cfg)
        with runs.create(cfg.output_dir, "train", config.to_yaml(cfg), {}).record_status() as run:
            self.hook(cfg, len(self.seen))
            figures = {"train_loss": 2 * loss_of(cfg), "eval_loss": loss_of(cfg), "steps": 3}
            (run.path / "metrics.json").write_text(json.dumps({"train": figures}))
        return 0


def sweep(*words: str, hook: Callable[[Any, int], None] = lambda cfg, count: None) -> tuple[int, Training]:
    training = Training(hook)
    return cli.run_jobs(cli_args.parse("train", list(words)), training), training


def folders() -> list[Path]:
    return sorted(Path("outputs/sweeps").iterdir())


def record(folder: Path | None = None) -> Any:
    return json.loads(((folder or folders()[-1]) / TRIALS).read_text())


def drawn() -> list[Any]:
    return [t["settings"] for t in record()["trials"]]


# The table


def ended(capsys: Said) -> str:
    """The output with what the command prints at its end, without warnings of earlier commands."""
    outcome.output.warnings.clear()
    outcome.print_end("", "")
    return capsys.readouterr().out


def test_a_grid_ends_in_a_table_of_its_trials(capsys: Said) -> None:
    code, training = sweep("--multirun", "lr=0.1,0.01,0.2", "lora_r=8,9", "max_steps=2")
    assert code == 0 and len(training.seen) == 6
    found = record()
    assert (found["status"], found["wanted"], found["best"]) == ("finished", 6, 2)
    assert [t["number"] for t in found["trials"]] == list(range(6))
    assert found["trials"][1]["settings"] == {"lr": "0.1", "lora_r": "9"}
    for trial, cfg in zip(found["trials"], training.seen, strict=True):
        assert trial["objective"] == loss_of(cfg) and trial["status"] == "finished"
        used = yaml.safe_load((folders()[-1] / trial["run"] / "config_used.yaml").read_text())
        assert used["lr"] == cfg.lr and used["lora_r"] == cfg.lora_r and "search" not in used
    said = ended(capsys)
    assert (folders()[-1] / TABLE).read_text() in said
    assert "2 *    0          0.01  8" in said


@pytest.mark.parametrize(
    "words", [["--multirun", "method=lora,dora"], ["search.space.method=[lora, dora]", "search.trials=3"]]
)
def test_a_swept_method_wins_over_that_of_the_experiment(words: list[str], capsys: Said) -> None:
    Path("mine.yaml").write_text("# @package _global_\nmethod: full\nlora_target_modules: null\n")
    _, training = sweep("experiment=mine.yaml", *words)
    assert {cfg.method for cfg in training.seen} == {"lora", "dora"}
    if words[0] == "--multirun":
        return
    assert (
        yaml.safe_load((folders()[-1] / "best.yaml").read_text())["method"]
        == training.seen[record()["best"]].method
    )


def test_the_table_says_what_the_runs_say(capsys: Said) -> None:
    def record_another(cfg: Any, count: int) -> None:
        (used,) = Path("outputs/runs/latest").glob("config_used.yaml")
        used.write_text(used.read_text().replace("lora_r: 8", "lora_r: 9"))

    sweep("--multirun", "lora_r=4,8", "lr=2e-2,1e-3", hook=record_another)
    cells = [line.split()[-4:-2] for line in ended(capsys).splitlines() if line.endswith("finished")]
    assert cells == [["4", "0.02"], ["4", "0.001"], ["9", "0.02"], ["9", "0.001"]]


def test_trials_are_ranked_by_any_metric_in_either_direction() -> None:
    sweep("--multirun", "lr=0.1,0.01,0.2", "search.metric=train_loss", "search.direction=maximize")
    assert record()["best"] == 2
    assert record()["trials"][2]["objective"] == 2 * (0.2 - 0.01 + 8)


def test_a_grid_without_the_metric_is_trained(capsys: Said) -> None:
    code, training = sweep("--multirun", "seed=1,2", "search.metric=bleu")
    assert (code, len(training.seen), record()["best"]) == (0, 2, None)
    assert "no trial has the metric bleu" in ended(capsys)


def test_a_search_without_the_metric_ends_with_its_first_trial() -> None:
    with pytest.raises(ConfigError, match=r"search.metric=trainloss matches 0 keys .*; did you mean train_loss\?"):
        sweep("search=lora", "search.metric=trainloss")
    assert len(record()["trials"]) == 1


def test_a_plain_training_is_no_sweep() -> None:
    code, training = sweep("seed=1")
    assert (code, len(training.seen)) == (0, 1)
    assert not Path("outputs/sweeps").exists()


# The best trial as a preset


@pytest.mark.parametrize("words", [[], ["--config-name", "my own.yaml"]])
def test_the_best_trial_is_a_preset_that_composes_to_its_settings(words: list[str], capsys: Said) -> None:
    Path("my own.yaml").write_text("batch_size: 3\nmax_length: 99\n")
    sweep(
        *words,
        "--multirun",
        "lr=0.1,0.01",
        "method=dora",
        "peft={bias: all}",
        "weight_decay=0.5",
        "seed=42",
    )
    said = ended(capsys)
    preset = folders()[-1] / "best.yaml"
    (again,) = [line for line in said.splitlines() if line.startswith("  make train ")]
    assert f"experiment={preset}" in again and ("--config-path" in again) == bool(words)
    keys = set(yaml.safe_load(preset.read_text()))
    assert {"lr", "method", "peft", "weight_decay"} <= keys and not keys & {"seed", "batch_size", "output_dir"}

    best = Path(os.path.normpath(folders()[-1] / record()["trials"][1]["run"]))
    _, again = sweep(*words, f"experiment={preset}", "output_dir=elsewhere")
    used = yaml.safe_load((best / "config_used.yaml").read_text())
    assert asdict(again.seen[0]) == used | {"output_dir": "elsewhere"}


def test_a_preset_in_a_file_takes_its_place_among_the_others() -> None:
    Path("some where").mkdir()
    Path("some where/it.yaml").write_text("# @package _global_\nlr: 0.5\nseed: 1\n")
    _, training = sweep("method=full", "experiment='some where/it.yaml'", "seed=2")
    _, other = sweep("method=dora", "experiment='some where/it.yaml'")
    found = [(cfg.method, cfg.lr, cfg.seed) for cfg in training.seen + other.seen]
    assert found == [("full", 2e-5, 2), ("dora", 0.5, 1)]


def test_a_preset_in_a_file_is_judged_like_any_other() -> None:
    Path("it.yaml").write_text("lrr: 0.5\n")
    with pytest.raises(ConfigError, match=r"lrr is not a setting; did you mean lr\?"):
        sweep("experiment=it.yaml")
    Path("it.yaml").write_text("lrr: [\n")
    with pytest.raises(ConfigError, match=r"it\.yaml cannot be read as YAML"):
        sweep("experiment=it.yaml")
    with pytest.raises(ConfigError, match=r"experiment=that\.yaml is not a preset"):
        sweep("experiment=that.yaml")


# Failures


def fails(cfg: Any, count: int) -> None:
    if count == 1:
        raise DataError("rows.jsonl:3 is no row", hint="mend it")
    if count == 2:
        raise RuntimeError("out of\nmemory")


def test_a_failed_trial_is_listed_with_its_reason_and_loses_no_other(capsys: Said) -> None:
    code, training = sweep("--multirun", "lora_r=8,9,10", hook=fails)
    assert (code, len(training.seen)) == (2, 3)
    first, second, third = record()["trials"]
    assert (first["status"], first["error"]) == ("failed", "rows.jsonl:3 is no row; mend it")
    assert (second["status"], second["error"]) == ("failed", "RuntimeError: out of memory")
    assert third["status"] == "finished" and record()["best"] == 2
    assert runs.Run(folders()[-1] / second["run"]).manifest["error"] == "RuntimeError: out of\nmemory"
    said = capsys.readouterr()
    assert "failed: rows.jsonl:3 is no row; mend it\n" in said.out
    assert "Traceback" in said.err and "DataError" not in said.err  # of what nobody foresaw only


def test_a_search_has_done_its_work_with_some_failed_trials_and_not_with_all() -> None:
    code, _ = sweep(SPACE, "search.trials=4", hook=fails)
    assert code == 0 and [t["status"] for t in record()["trials"]] == ["failed"] * 2 + ["finished"] * 2

    def always(cfg: Any, count: int) -> None:
        raise DataError("no")

    assert sweep(SPACE, "search.trials=2", "seed=2", hook=always)[0] == 2


def test_a_loss_that_is_no_number_is_a_failed_trial() -> None:
    def diverges(cfg: Any, count: int) -> None:
        if count == 2:
            cfg.lr = float("nan")

    sweep(SPACE, "search.trials=3", hook=diverges)
    assert [t["error"] for t in record()["trials"]] == [None, "eval_loss is nan", None]


# Interruptions


def stops_at(trial: int) -> Callable[[Any, int], None]:
    def hook(cfg: Any, count: int) -> None:
        if count == trial:
            raise KeyboardInterrupt

    return hook


def test_an_interrupted_grid_keeps_its_trials_and_resumes(capsys: Said) -> None:
    words = ["--multirun", "lora_r=10,9,8"]
    with pytest.raises(KeyboardInterrupt):
        sweep(*words, hook=stops_at(2))
    found = record()
    assert [t["status"] for t in found["trials"]] == ["finished", "interrupted"]
    assert (found["status"], found["best"]) == ("interrupted", 0)
    assert "unfinished: run the command again to resume it" in ended(capsys)

    code, training = sweep(*words)
    assert code == 0 and [c.lora_r for c in training.seen] == [9, 8]
    assert len(folders()) == 1
    assert [t["status"] for t in record()["trials"]] == ["finished"] * 3 and record()["best"] == 2
    assert f"resuming {folders()[0]}: 1 of 3 trials are done" in capsys.readouterr().out

    assert len(sweep(*words)[1].seen) == 3  # it is finished: the same command is a new sweep
    assert len(folders()) == 2


@pytest.mark.parametrize("other", [["max_steps=3"], ["search.resume=false"], ["search.metric=train_loss"]])
def test_another_command_does_not_resume_it(other: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        sweep("--multirun", "lora_r=10,9,8", hook=stops_at(2))
    assert len(sweep("--multirun", "lora_r=10,9,8", *other)[1].seen) == 3
    assert len(folders()) == 2


def test_a_search_that_was_interrupted_draws_what_it_would_have_drawn() -> None:
    words = [SPACE, "search.trials=12"]  # more than TPE draws at random
    sweep(*words)
    whole = [(t["settings"], t["objective"]) for t in record()["trials"]]
    with pytest.raises(KeyboardInterrupt):
        sweep(*words, hook=stops_at(11))
    _, training = sweep(*words)
    assert len(folders()) == 2 and len(training.seen) <= 2
    assert [(t["settings"], t["objective"]) for t in record()["trials"]] == whole


def test_a_finished_search_resumes_with_more_trials() -> None:
    sweep(SPACE, "search.trials=3")
    first = drawn()
    _, training = sweep(SPACE, "search.trials=5")
    assert len(training.seen) == 2 and len(folders()) == 1
    assert len(drawn()) == 5 and drawn()[:3] == first


KILLED = """
import os, signal, sys
from src import cli, cli_args
from tests.test_sweep import Training

def hook(cfg, count):
    if count == 2:
        os.kill(os.getpid(), signal.SIGKILL)

cli.run_jobs(cli_args.parse("train", sys.argv[1:]), Training(hook))
"""


def test_a_killed_sweep_resumes_the_trial_that_was_running() -> None:
    words = ["--multirun", "lora_r=10,9,8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [t["status"] for t in record()["trials"]] == ["finished", "running"]
    _, training = sweep(*words)
    assert [c.lora_r for c in training.seen] == [9, 8]
    assert len(folders()) == 1 and len(record()["trials"]) == 3


def test_a_sweep_that_another_process_is_at_work_on_is_left_alone() -> None:
    with pytest.raises(KeyboardInterrupt):
        sweep("--multirun", "lora_r=10,9", hook=stops_at(2))
    path = folders()[0] / TRIALS
    path.write_text(json.dumps(record() | {"status": "running"}))  # by this very process, which is alive
    before = path.read_bytes()
    assert len(sweep("--multirun", "lora_r=10,9")[1].seen) == 2
    assert path.read_bytes() == before and len(folders()) == 2


def test_a_stopped_training_stops_the_sweep() -> None:
    def stop(cfg: Any, count: int) -> None:
        if count == 2:
            raise Stopped("stopped by SIGTERM after step 3 of 9, with a checkpoint")

    with pytest.raises(Stopped):
        sweep(SPACE, "search.trials=3", hook=stop)
    assert [t["status"] for t in record()["trials"]] == ["finished", "interrupted"]
    assert "SIGTERM" in record()["trials"][1]["error"]


def test_a_trial_that_resumes_a_run_records_that_run() -> None:
    def again(cfg: Any, count: int) -> int:
        run = runs.all_runs("outputs")[0]
        run.reopen()
        (run.path / "metrics.json").write_text('{"train": {"eval_loss": 1.5}}')
        return 0

    sweep("--multirun", "lora_r=7,8")
    cli.run_jobs(cli_args.parse("train", ["--multirun", "lora_r=9"]), lambda cfg: again(cfg, 1))
    (trial,) = record()["trials"]
    assert trial["objective"] == 1.5 and trial["run"].endswith(runs.all_runs("outputs")[0].id)


# The search


def test_a_search_needs_one_override_and_finds_the_minimum() -> None:
    code, training = sweep("search=lora", "search.trials=12")
    assert (code, len(record()["trials"])) == (0, 12)
    for cfg in training.seen:
        assert 1e-4 <= cfg.lr <= 1e-2 and cfg.lora_r in {8, 16, 32, 64} and cfg.lora_alpha in {16, 32, 64, 128}
    best = min(training.seen, key=loss_of)
    assert best.lora_r == 8 and record()["trials"][record()["best"]]["objective"] == loss_of(best)


def test_the_seed_decides_what_is_drawn() -> None:
    found = []
    for seed in (1, 1, 2):
        sweep(SPACE, "search.trials=2", f"seed={seed}", "search.resume=false")
        found.append(drawn())
    assert found[0] == found[1] != found[2]


def test_a_search_goes_where_its_direction_says() -> None:
    def best(direction: str) -> float:
        sweep("search.space={lr: 'interval(0.01, 1)'}", "search.trials=14", f"search.direction={direction}")
        return float(drawn()[record()["best"]]["lr"])

    assert best("minimize") < 0.1 < 0.8 < best("maximize")


def test_every_kind_of_dimension_is_drawn_as_it_is_written() -> None:
    space = {
        "search.space.epochs": "range(1,4)", "search.space.lora_r": "tag(log,int(interval(2,64)))",
        "search.space.lora_dropout": "interval(0,0.5)", "search.space.method": "[lora,dora]",
        "search.space.lora_target_modules": "[[q_proj],[k_proj,v_proj],null]",
        "search.space.model_name": "[a b,c]",
        "search.space.lr_scheduler_type": "linear,cosine",
    }  # fmt: skip
    _, training = sweep(*(f"{k}={v}" for k, v in space.items()), "search.trials=16")
    assert {c.epochs for c in training.seen} == {1, 2, 3}
    assert all(isinstance(c.lora_r, int) and 2 <= c.lora_r <= 64 for c in training.seen)
    assert len({c.lora_dropout for c in training.seen}) > 5
    assert all(0 <= c.lora_dropout <= 0.5 and len(str(c.lora_dropout)) <= 7 for c in training.seen)
    assert {c.method for c in training.seen} == {"lora", "dora"}
    assert {str(c.lora_target_modules) for c in training.seen} <= {"['q_proj']", "['k_proj', 'v_proj']", "None"}
    assert {c.model_name for c in training.seen} == {"a b", "c"}
    assert {c.lr_scheduler_type for c in training.seen} == {"linear", "cosine"}


def test_hydras_syntax_starts_a_search_as_well() -> None:
    sweep("--multirun", "lr=interval(0.001,0.1)", "lora_r=8,9", "search.trials=3")
    assert [set(s) for s in drawn()] == [{"lr", "lora_r"}] * 3
    _, training = sweep("--multirun", "hydra/sweeper=optuna", "lora_r=4,8", "search.trials=3")
    assert len(record()["trials"]) == 3 and {c.lora_r for c in training.seen} <= {4, 8}


def test_a_setting_of_the_command_line_is_not_searched_for() -> None:
    _, training = sweep("search=lora", "lr=0.5", "search.trials=3")
    assert {c.lr for c in training.seen} == {0.5}
    assert all(set(s) == {"lora_r", "lora_alpha"} for s in drawn())


def test_the_same_settings_are_not_trained_twice() -> None:
    _, training = sweep("search.space.lora_r=[7,8]", "search.trials=6")
    assert sorted(c.lora_r for c in training.seen) == [7, 8]
    assert len(record()["trials"]) == 6 and len({t["run"] for t in record()["trials"]}) == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["search.space.lrr=[1,2]"], "lrr is not a setting; did you mean lr?"),
        (["search.space.lora_r=[8,16,-1]"], "lora_r=-1: should be greater than or equal to 1"),
        (["search.space.lora_dropout=interval(0,1)"], "lora_dropout=1.0: should be less than 1"),
        (["search.space.method=[lora,lorra]"], "method=lorra is not a preset; did you mean lora?"),
        (["search.space.lr=0.1"], "search.space.lr=0.1 has only one value; write [8, 16]"),
        (["search.space.lr=[0.1]"], "search.space.lr=0.1 has only one value; write [8, 16]"),
        (["search.space.lr='interval(1'"], "search.space.lr=interval(1 cannot be parsed"),
        (["search.space.lr=interval(2,1)"], "lr=interval(2,1): the lower bound should be below the upper bound"),
        (["search.space.lr='tag(log,interval(0,1))'"], "lr=tag(log,interval(0,1)): the lower bound of a"),
        (["search.trialz=3"], "search.trialz is not a setting; did you mean search.trials?"),
        (["search.trials=0"], "search.trials=0: should be greater than or equal to 1"),
        (["search.direction=down"], "search.direction=down: should be one of minimize, maximize"),
        (["search=lorra"], "search=lorra is not a preset; did you mean lora?"),
        (["search=lora", "eval_path=nowhere"], "search.metric=eval_loss needs an evaluation loss, and nowhere"),
        (["-m", "cuda_visible_devices='0','1'"], "cuda_visible_devices differs between jobs of one process"),
    ],
)  # fmt: skip
def test_a_search_with_an_invalid_override_starts_nothing(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(*words)
    (told,) = caught.value.problems
    assert told.startswith(sentence)
    assert not Path("outputs").exists()


def test_a_wrong_key_of_a_search_preset_is_rejected_at_once(assay: Any) -> None:
    (assay.cwd / "mine.yaml").write_text("search:\n  spaces: {lr: [1, 2]}\n  space: {lrr: [1, 2]}\n")
    done = assay("train", "search=mine.yaml")  # where torch, optuna and their like cannot be imported
    assert done.returncode == 2
    assert "search.spaces is not a setting; did you mean search.space?" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and assay.left() == ["mine.yaml"]


def test_only_training_is_searched() -> None:
    with pytest.raises(ConfigError, match="search is not a setting"):
        cli.run_jobs(cli_args.parse("eval", ["search=lora"]), lambda _: 0)


def test_the_configuration_of_a_search_is_printed_without_starting_it(capsys: Said) -> None:
    _, training = sweep("search=lora", "--cfg", "job")
    assert training.seen == [] and not Path("outputs").exists()
    assert yaml.safe_load(capsys.readouterr().out)["search"]["trials"] == 20


def test_a_swept_secret_is_not_written(monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_correct_horse")
    _, training = sweep(
        "--multirun", "model_name=a,hf_correct_horse", "lora_r=7,8", "output_dir=x/hf_correct_horse"
    )
    assert [c.model_name for c in training.seen] == ["a", "a", "hf_correct_horse", "hf_correct_horse"]
    (folder,) = Path("x/hf_correct_horse/sweeps").iterdir()
    assert record(folder)["best"] == 1
    assert record(folder)["trials"][2]["settings"]["model_name"] == "${oc.env:HF_TOKEN}"
    assert {p.name for p in folder.iterdir()} == {TRIALS, TABLE, "best.yaml", "multirun.yaml"}
    assert [p for p in Path("x").rglob("*") if p.is_file() and b"correct_horse" in p.read_bytes()] == []
    assert "correct_horse" not in capsys.readouterr().out


# Real training runs


@pytest.fixture
def repository(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(ROOT)
    return world


def left_by_training(before: set[threading.Thread]) -> list[str]:
    """New threads since `before` (an open event file has one), and open event files."""
    threads = [type(t).__name__ for t in set(threading.enumerate()) - before]
    files = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
    return [t for t in threads if t != "TMonitor"] + [f for f in files if "tfevents" in f]


def test_a_diverged_trial_leaves_no_threads_and_no_open_files(repository: World) -> None:
    before = set(threading.enumerate())
    assert (
        repository.call("train", "--multirun", "max_steps=6", "method=full", "lr=1e38,0.01", "warmup_ratio=0") == 2
    )
    (folder,) = (repository.output / "sweeps").iterdir()
    first, second = record(folder)["trials"]
    assert first["status"] == "failed" and "training diverged" in first["error"] and first["run"]
    assert second["status"] == "finished" and record(folder)["best"] == 1
    assert left_by_training(before) == []


def test_a_trial_of_a_search_is_the_training_that_it_would_be_alone(
    repository: World, fork_server: ForkServer, tmp_path: Path
) -> None:
    """Nothing of a trial reaches the next: the last of them is byte for byte what it is by itself."""
    words = ["max_steps=3", "lora_dropout=0.1"]
    space = "search.space={warmup_ratio: [0, 0.5], method: [lora, dora]}"
    before = set(threading.enumerate())
    assert repository.call("train", *words, space, "search.trials=3") == 0
    assert left_by_training(before) == []
    (folder,) = (repository.output / "sweeps").iterdir()
    trials = record(folder)["trials"]
    assert [t["status"] for t in trials] == ["finished"] * 3
    last = next(t for t in reversed(trials) if t["number"] > 0 and t["run"] != trials[0]["run"])
    run = runs.Run(folder / last["run"])
    assert (folder / TABLE).read_text().count("finished") == 3

    alone = repository.elsewhere(tmp_path / "alone")
    drawn = (f"{k}={v}" for k, v in last["settings"].items())
    code, said = fork_server("train", *alone.settings("train"), *words, *drawn)
    assert code == 0, said
    assert tree(alone.newest.model) == tree(run.model)
    assert (run.path / "metrics.json").read_text().count("eval_loss") == 1

    best = runs.Run(folder / trials[record(folder)["best"]]["run"])
    again = repository.elsewhere(tmp_path / "again").train("max_steps=3", f"experiment={folder / 'best.yaml'}")
    assert tree(again.model) == tree(best.model)


def test_a_rejected_trial_leaves_no_line_in_the_log_of_the_next(repository: World) -> None:
    assert repository.call("train", "--multirun", "max_steps=1", "lora_target_modules=[nope],null") == 2
    (folder,) = (repository.output / "sweeps").iterdir()
    first, second = record(folder)["trials"]
    assert first["status"] == "failed" and first["run"] is None and "nope" in first["error"]
    assert second["status"] == "finished"

    repository.call("train", "max_steps=1", "seed=7")
    logs = [(run.logs / "run.log").read_text() for run in repository.runs]
    assert len(logs) == 2 and all(log.count(" usable rows in ") == 1 for log in logs)
    open_files = {os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")}
    assert str(repository.runs[1].logs / "run.log") not in open_files
