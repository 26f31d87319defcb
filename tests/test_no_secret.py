"""No secret is written down: not from the environment, not from the command line, not from a row of data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.test_from_url import site_serving
from tests.fixtures import ANSWER, ROOT, TRAINED_ON, World, call, chat, evals, jsonl, tree

pytest_plugins = ["tests.fixtures"]

CANARIES = {
    "HF_TOKEN": "hf_canary_Aq7xZ93kLmP",
    "LAKEFS_SECRET_KEY": "canary/lakefs+B8w==",
    "MY_PASSWORD": 'canary "quoted" and\\back\\slashed',
    "AWS_SECRET_ACCESS_KEY": "canary\tof\ntwo lines",
    "OPENAI_API_KEY": "sk-canary-\u00fcn\u00efcode-\U0001f642",
}
TYPED = CANARIES["HF_TOKEN"]


def spellings(secret: str) -> Iterator[bytes]:
    """The secret as it is, and as JSON, YAML, repr and Hydra write it."""
    escaped = secret.replace("\\", "\\\\")
    quoted = {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1], escaped}
    quoted |= {escaped.replace('"', '\\"'), escaped.replace("'", "\\'")}
    quoted |= {json.dumps(text)[1:-1] for text in quoted}
    for text in {secret, *quoted}:
        yield text.encode()
        yield text.encode("utf-16-le")


def leaks(*folders: Path) -> list[str]:
    """Each file whose bytes hold a secret, in whatever spelling."""
    found = []
    for path in (p for folder in folders for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        found += [f"{name} in {path}" for name, v in CANARIES.items() if any(s in content for s in spellings(v))]
    return found


@pytest.fixture
def secretive(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world with secrets in the environment and in each of its rows, worked on from its own folder."""
    for name, value in {**CANARIES, "MY_THING": "", "ASSAY_REFERRED": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    data = jsonl(tmp_path / "data" / "rows.jsonl", rows_with_secrets())
    for split in ("test", "dev", "adversarial"):
        rows = [{"prompt": f"{v} {split}?", "completion": f"{ANSWER} {v}"} for v in CANARIES.values()]
        jsonl(tmp_path / "eval" / f"{split}.jsonl", rows)
    return World(world.model, data.parent, tmp_path / "eval", tmp_path / "outputs", tmp_path / "artifacts")


def rows_with_secrets() -> Iterator[object]:
    """Valid rows, and invalid ones whose faults are in the report."""
    yield from (chat(f"Top of {name}?", ANSWER) for name in TRAINED_ON)
    for value in CANARIES.values():
        yield chat(f"What is {value}?", f"{value} and {ANSWER}")
        yield {value: value}
        yield chat(value * 100, value)


def test_no_secret_reaches_a_file_of_any_stage(secretive: World, capsys: pytest.CaptureFixture[str]) -> None:
    world = secretive
    run = world.train("on_bad_row=skip", f"run_name={TYPED}", f"+checkpoint_mirror_endpoint={TYPED}")
    assert world.call("eval") == 0
    assert world.call("eval-baseline") == 0
    assert world.call("publish", "force=true", f"repo_id={TYPED}") == 0

    # What was looked for is where it should be: it has been replaced, not left out.
    assert "${oc.env:HF_TOKEN}" in (run.path / "config_used.yaml").read_text()
    predictions = (evals(run) / "test.predictions.jsonl").read_text()
    assert all(f"${{oc.env:{name}}}" in predictions for name in CANARIES)

    assert leaks(world.output, world.artifacts) == []
    output = "".join(capsys.readouterr())
    assert [name for name, value in CANARIES.items() if value in output] == []


def test_no_secret_part_of_a_url_reaches_a_file(secretive: World, capsys: pytest.CaptureFixture[str]) -> None:
    """It works where it is used, and what a setting refers to is secret whatever its name."""
    os.environ.update(MY_THING="canary-of-a-thing", ASSAY_REFERRED="")
    world, hidden = secretive, ("canarySIGNATURE", "canary-of-a-thing", "sig=canary")
    with site_serving() as site:
        site.content = (world.data / "rows.jsonl").read_bytes()
        url = f"{site.address}/rows.jsonl?id=1&sig=canarySIGNATURE&of=${{oc.env:MY_THING}}"
        source = ["data_source.type=url", f"data_source.url={url}", "data_source.allow_private=true"]
        run = world.train("on_bad_row=skip", "max_steps=1", "run_name=${oc.env:MY_THING}", *source)
        assert site.requests[0][0] == "/rows.jsonl?id=1&sig=canarySIGNATURE&of=canary-of-a-thing"
    kept = f"{site.address}/rows.jsonl?id=***&sig=***&of=${{oc.env:MY_THING}}"
    used = run.path / "config_used.yaml"
    assert f"url: {kept}" in used.read_text()
    assert world.call("eval") == 0
    assert world.call("eval-baseline") == 0
    used.write_text(used.read_text().replace("sig=***", "sig=canarySIGNATURE"))  # of an earlier version
    assert world.call("publish", "force=true") == 0
    used.write_text(used.read_text().replace("sig=canarySIGNATURE", "sig=***"))
    written = [p for folder in (world.output, world.artifacts) for p in folder.rglob("*") if p.is_file()]
    assert [p for p in written if any(text.encode() in p.read_bytes() for text in hidden)] == []
    output = "".join(capsys.readouterr())
    assert not any(text in output for text in hidden)

    assert (
        call("train", "--config-path", str(run.path), "--config-name", "config_used", "cache_dir=elsewhere") == 2
    )
    assert "set data_source.url to the whole address again" in capsys.readouterr().err


def test_no_secret_typed_out_reaches_a_file_of_a_sweep(secretive: World, tmp_path: Path) -> None:
    words = ["on_bad_row=skip", "max_steps=1", f"run_name={TYPED}", "seed=1,2", "--multirun"]
    child = secretive.start("train", *words, cwd=tmp_path)
    output = child.communicate(timeout=240)[0]
    assert child.returncode == 0, output
    assert [run.status for run in secretive.runs] == ["finished", "finished"]
    assert "run_name=${oc.env:HF_TOKEN}" in secretive.newest.manifest["command"]
    assert list(secretive.output.rglob("multirun.yaml"))
    assert leaks(secretive.output, secretive.artifacts) == []
    assert [name for name, value in CANARIES.items() if value in output] == []


@pytest.mark.parametrize("how", ["a grid", "a search"])
def test_no_secret_of_a_settings_file_reaches_a_file_of_a_sweep(
    secretive: World, tmp_path: Path, how: str
) -> None:
    """A person wrote it into their own configuration, or a preset of theirs, where a reference would do."""
    (tmp_path / "mine.yaml").write_text(f"on_bad_row: skip\nmax_steps: 1\nrun_name: {TYPED}\n")
    (tmp_path / "preset.yaml").write_text(f"checkpoint_mirror_endpoint: {TYPED}\n")
    swept = ["seed=1,2"] if how == "a grid" else ["search.space.lora_r=[4]", "search.trials=1"]
    words = ["--config-name", str(tmp_path / "mine.yaml"), "experiment=preset.yaml", *swept]
    assert secretive.call("train", *words, "--multirun") == 0
    assert {run.status for run in secretive.runs} == {"finished"}
    assert leaks(secretive.output, secretive.artifacts) == []


def test_a_secret_typed_as_a_name_is_not_written(secretive: World) -> None:
    secretive.train("on_bad_row=skip", "max_steps=1")
    for stage in ("eval", "eval-baseline"):
        assert secretive.call(stage, "splits=[test]") == 0
    assert secretive.call("publish", "force=true", "gate.guards=[]", f"publish_name={TYPED}") == 0
    assert len(list((secretive.artifacts / "models").rglob("README.md"))) == 1
    assert leaks(secretive.output, secretive.artifacts) == []


@pytest.mark.parametrize("name", ["HF_TOKEN", "MY_PASSWORD"])
def test_a_secret_in_the_path_of_the_runs_is_not_repeated_inside_them(
    secretive: World, tmp_path: Path, name: str
) -> None:
    here = secretive.elsewhere(tmp_path / CANARIES[name])
    here.train("on_bad_row=skip", "max_steps=1")
    assert leaks(here.output) == []


def test_a_secret_in_the_place_of_a_role_is_not_repeated(secretive: World) -> None:
    rows = [{"messages": [{"role": value, "content": "4"}]} for value in CANARIES.values()]
    jsonl(secretive.data / "rows.jsonl", [*rows, chat("2+2?", "4")])
    secretive.train("on_bad_row=skip", "max_steps=1")
    assert leaks(secretive.output) == []


def test_a_refusal_does_not_repeat_a_secret(secretive: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert secretive.call("train", f"lr={TYPED}", f"metod={TYPED}") == 2
    output = "".join(capsys.readouterr())
    assert "lr=${oc.env:HF_TOKEN}" in output
    assert TYPED not in output


BROKEN = """
import os, threading

def load_dotenv(*_, **__):
    def fail():
        raise OSError("refused: " + os.environ["CANARY_TOKEN"])
    {how}
"""


@pytest.mark.parametrize(
    "how", ["fail()", "thread = threading.Thread(target=fail); thread.start(); thread.join(); raise SystemExit(1)"]
)
def test_an_unexpected_exception_is_printed_without_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """What reads `.env` is broken, and a traceback is printed, by whichever thread."""
    (tmp_path / ".env").touch()
    (tmp_path / "dotenv.py").write_text(BROKEN.format(how=how))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    for value in CANARIES.values():
        monkeypatch.setenv("CANARY_TOKEN", value)
        done = subprocess.run(
            [sys.executable, "-m", "src.main", "train"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert "Traceback" in done.stderr and "OSError: refused: ${oc.env:CANARY_TOKEN}" in done.stderr
        assert value not in done.stdout + done.stderr


def test_a_configuration_with_a_secret_still_repeats_the_run(secretive: World) -> None:
    run = secretive.train("on_bad_row=skip", "max_steps=1", f"run_name={TYPED}")
    assert call("train", "--config-path", str(run.path), "--config-name", "config_used") == 0
    assert secretive.newest.id != run.id
    assert tree(secretive.newest.model) == tree(run.model)
