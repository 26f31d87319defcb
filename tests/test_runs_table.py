"""The command `runs`: columns, order and width of the table, and the differences between two runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from src import run_summaries
from src.errors import UserError
from src.run_names import data_name
from src.runs import FAILED, FINISHED, RUNNING, Run, find_run, this_process
from src.runs_table import format_runs, runs_output

ABOUT = {"rougeL": {"better": "higher"}, "perplexity": {"better": "lower"}}


def run_of(out: Path, day: int, scores: dict[str, float] | None = None, **facts: Any) -> Run:
    """A run of January; `scores`: of the split test. Settings are those of `settings`."""
    run = Run(out / "runs" / f"2026-01-{day:02}_10-00-00")
    run.path.mkdir(parents=True)
    settings = facts.pop("settings", {"lr": 0.001, "gate": {"split": "test"}})
    outcome = facts.pop("outcome", "promoted")
    told = {
        "run": run.id,
        "stage": "train",
        "status": FINISHED,
        "started": f"2026-01-{day:02}T10:00:00+00:00",
        "method": "lora",
        "base_model": {"name": "some/base-model"},
        "data": {
            "sources": [{"type": "local"}],
            "files": [{"file": "x/tickets.jsonl", "sha256": "0123456789abcdef"}],
        },
    }
    (run.path / "manifest.json").write_text(json.dumps(told | facts))
    (run.path / "config_used.yaml").write_text(yaml.safe_dump(settings))
    result: dict[str, Any] = {"train": {"train_loss": 1 / day, "seconds": 3.0}}
    if scores:
        result |= {"eval": {"test": scores}, "metrics": ABOUT}
        verdict = {"outcome": outcome, "metric": "rougeL", "split": "test"}
        (run.path / "comparison.json").write_text(json.dumps({"verdict": verdict}))
    (run.path / "metrics.json").write_text(json.dumps(result))
    return run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    run_of(tmp_path, 1, {"rougeL": 0.5, "perplexity": 9.0}, run_name="mine")
    run_of(tmp_path, 2, {"rougeL": 0.75, "perplexity": 12.0}, method="dora", outcome="not_better")
    run_of(tmp_path, 3, status=FAILED, error="OutOfMemoryError: 1 GiB", data={"commit": "c0ffee" * 5})
    return tmp_path


def test_the_index_of_runs_is_current_whatever_becomes_of_it(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed, removed, new and dead runs; an index that is damaged, changed by hand, or cannot be written."""
    running = {"status": RUNNING, "process": this_process()}
    run_of(out, 4, **running)
    (out / "runs/damaged").mkdir()
    (out / "runs/damaged/manifest.json").write_text("{")
    monkeypatch.setattr(run_summaries, "MIN_INDEXED", 1)
    index = out / "runs" / run_summaries.INDEX
    first = format_runs(out, width=200)
    assert index.is_file() and "damaged  its manifest.json cannot be read" in first

    monkeypatch.setattr(run_summaries, "_entry", lambda run: pytest.fail(f"{run} is read again"))
    assert format_runs(out, width=200) == first
    monkeypatch.undo()
    monkeypatch.setattr(run_summaries, "MIN_INDEXED", 1)

    def listed(**changed: Any) -> str:
        told = json.loads((out / "runs/2026-01-04_10-00-00/manifest.json").read_text())
        (out / "runs/2026-01-04_10-00-00/manifest.json").write_text(json.dumps(told | changed))
        return format_runs(out, width=200)

    assert " interrupted" in listed(process=running["process"] | {"boot_id": "earlier"})
    assert " failed: a b" in listed(status=FAILED, error="a\nb")
    shutil.rmtree(out / "runs/2026-01-04_10-00-00")
    expected = format_runs(out, width=200)
    assert len(expected.splitlines()) == 5
    for damage in ("", "[]", '{"code"', index.read_text().replace('"facts"', '"fact"')):
        index.write_text(damage)
        assert format_runs(out, width=200) == expected
        assert index.read_text() != damage
    index.unlink()
    index.mkdir()
    assert format_runs(out, width=200) == expected


def days(text: str) -> list[int]:
    return [int(line[8:10]) for line in text.splitlines()[1:]]


def test_each_run_is_listed_once_with_its_scores_and_its_error(out: Path) -> None:
    head, third, second, first = (line.split() for line in format_runs(out).splitlines())
    assert head == [
        "run",
        "name",
        "status",
        "method",
        "base",
        "data",
        "lr",
        "verdict",
        "test/rougeL",
        "train_loss",
    ]
    failed = ["failed:", "OutOfMemoryError:", "1", "GiB"]
    assert third == ["2026-01-03_10-00-00", "lora-1e-3", *failed, "lora", "base-model", "1e-3", "0.3333"]
    more = ["base-model", "tickets", "1e-3"]
    assert second[1:] == ["dora-1e-3-tickets", "finished", "dora", *more, "not", "better", "0.75", "0.5"]
    assert first[1:] == ["mine", "finished", "lora", *more, "promoted", "0.5", "1"]


@pytest.mark.parametrize(
    ("key", "order"),
    [
        ("test/rougeL", [2, 1, 3]),  # the best first, and last who has none
        ("test/perplexity", [1, 2, 3]),  # the lower, the better
        ("train_loss", [3, 2, 1]),
        ("started", [3, 2, 1]),
        ("method", [2, 3, 1]),
        ("verdict", [2, 1, 3]),
    ],
)
def test_runs_are_sorted_by_the_given_key(out: Path, key: str, order: list[int]) -> None:
    for words in ([str(out), "--sort", key], [f"--sort={key}", f"output_dir={out}"]):
        said = runs_output(words)
        assert days(said) == order
    assert key not in {"test/perplexity"} or key in said.splitlines()[0]


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_the_table_fits_its_width_and_drops_optional_columns(out: Path, width: int) -> None:
    run_of(out, 4, {"rougeL": 0.1, "perplexity": 3.0}, status=FAILED, error="a long story " * 30)
    lines = format_runs(out, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert all(word in lines[0] for word in ("run", "name", "status", "test/rougeL", "verdict"))
    assert ("base" in lines[0].split()) is (width > 120)
    assert "…" in lines[1] and len(lines) == 5
    run_of(out, 7, run_name="客服对话" * 6)
    (line,) = format_runs(out, width=width, run="2026-01-07").splitlines()[1:]
    assert len(line) + len(re.findall(r"[\u4e00-\u9fff]", line)) <= width


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"files": [{"file": "data/my.tickets.jsonl.gz"}]}, "my.tickets"),
        ({"files": [{"file": "data/a.jsonl"}, {"file": "data/b.csv"}]}, "data"),
        ({"files": [{"file": "a.jsonl"}, {"file": "b.csv"}]}, "a+1"),
        ({"sources": [{"type": "hub", "repo": "user/set", "commit": "c"}], "files": [{"file": "x"}]}, "set"),
        ({"sources": [{"type": "url", "url": "https://x.org/d/rows.jsonl?k=1"}, {"repo": "b"}]}, "rows+1"),
        ({"commit": "c0ffee"}, ""),  # of an older version
    ],
)
def test_data_are_named_without_path_and_extension(data: dict[str, Any], name: str) -> None:
    assert data_name(data) == name


def test_a_run_is_found_by_its_name_if_only_one_has_it(out: Path) -> None:
    assert find_run("mine", out).id == "2026-01-01_10-00-00"
    run_of(out, 6, run_name="mine")
    with pytest.raises(UserError, match="mine is the name of 2 runs: 2026-01-06_10-00-00, 2026-01-01_10-00-00"):
        find_run("mine", out)


def test_a_run_with_corrupt_files_is_listed(out: Path) -> None:
    (out / "runs" / "2026-01-01_10-00-00" / "metrics.json").write_text("{")
    (out / "runs" / "2026-01-02_10-00-00" / "manifest.json").write_text("{")
    said = format_runs(out)
    assert said.splitlines()[-1] == "2026-01-02_10-00-00  its manifest.json cannot be read"
    (out / "runs/2026-01-02_10-00-00/manifest.json").unlink()
    (out / "runs/2026-01-02_10-00-00/manifest.json").mkdir()
    assert format_runs(out) == said
    (out / "runs/2026-01-01_10-00-00/metrics.json").write_text('{"eval": {"test": []}}')
    lines = runs_output([str(out)]).splitlines()
    assert "2026-01-01_10-00-00  its metrics.json or comparison.json is damaged" in lines
    assert len(lines) == len(said.splitlines())
    with pytest.raises(UserError, match="is damaged"):
        runs_output(["diff", "2026-01-01", "2026-01-03", str(out)])
    assert "2026-01-01_10-00-00" in said


def test_no_runs_say_how_to_make_one(tmp_path: Path) -> None:
    assert format_runs(tmp_path) == f"no runs in {tmp_path}/runs; make train makes one"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["--sort", "test/rogueL"],
            "--sort test/rogueL: no run has that key; did you mean test/rougeL?; the keys",
        ),
        (["--sort"], "--sort needs a key; such as --sort test/rougeL"),
        (["--order", "x"], "--order is not a flag of runs"),
        (["more"], "runs does not take more"),
        (["diff", "2026-01-01"], "diff takes two runs; write runs diff RUN RUN"),
        (["diff", "newest", "2026-01-01"], "there is no run newest in "),
        (
            ["diff", "2026-01-01", "2026-01-09_10-00-00"],
            "no run 2026-01-09_10-00-00 in .*; did you mean 2026-0",
        ),
        (["diff", "2026-01-01", "2026-01-01"], "both arguments are the run 2026-01-01_10-00-00; name two"),
    ],
)
def test_an_invalid_request_is_one_message(out: Path, words: list[str], told: str) -> None:
    place = [] if words == ["diff", "2026-01-01"] else [str(out)]
    with pytest.raises(UserError, match=told.replace("?", r"\?")) as caught:
        runs_output([*words, *place] if words[0] == "diff" else [*place, *words])
    assert caught.value.exit_code == 2


def test_a_diff_shows_only_the_differences(out: Path) -> None:
    settings = {"lr": 0.01, "gate": {"split": "dev"}, "stop": ["x"]}
    run_of(out, 5, {"rougeL": 0.75, "perplexity": 9.0}, settings=settings)
    said = [line.split() for line in runs_output(["diff", "2026-01-01", "2026-01-05", str(out)]).splitlines()]
    assert said == [
        ["2026-01-01_10-00-00", "->", "2026-01-05_10-00-00"],
        [],
        ["settings"],
        ["gate.split", "test", "->", "dev"],
        ["lr", "0.001", "->", "0.01", "(+0.009)"],
        ["stop", "-", "->", "['x']"],
        [],
        ["scores"],
        ["train_loss", "1", "->", "0.2", "(-0.8)"],
        ["test/rougeL", "0.5", "->", "0.75", "(+0.25)"],
    ]


def test_runs_that_are_alike_say_so(tmp_path: Path) -> None:
    one, other = run_of(tmp_path, 1), run_of(tmp_path, 2)
    (other.path / "metrics.json").write_bytes((one.path / "metrics.json").read_bytes())
    assert runs_output(["diff", one.id, other.id, str(tmp_path)]).endswith(
        "no difference in settings, data or scores"
    )
