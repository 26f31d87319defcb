"""The Python API: the blocks of docs/python.md run as they are written; values arrive; errors are raised."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import assay
from src import api, cli_args, compose, runs
from src.errors import ConfigError, UserError
from tests.fixtures import ANSWER, MEASURES, ROOT, TRAINED_ON, chat, jsonl

pytest_plugins = ["tests.fixtures"]

BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/python.md").read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with data and questions, on a CPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    jsonl(tmp_path / "my_data/rows.jsonl", (chat(f"Top of {name}?", ANSWER) for name in TRAINED_ON))
    rows = [{"prompt": f"Top of ore {n}?", "completion": ANSWER} for n in MEASURES]
    jsonl(tmp_path / "my_data/eval/test.jsonl", rows)
    return tmp_path


def test_the_blocks_of_the_page_run_as_they_are_written(
    folder: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "models").mkdir()
    (folder / "models/SmolLM2-135M-Instruct").symlink_to(tiny)
    names: dict[str, object] = {}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"docs/python.md block {number}", "exec"), names)
    said = capsys.readouterr().out
    assert "\n16 rows, 16 of them trained\n" in said and "\nTrue\n" in said
    assert "epochz is not a setting; did you mean epochs?" in said
    run = names["run"]
    assert isinstance(run, runs.Run) and run.report.is_file() and run.comparison["verdict"]
    assert run.manifest["command"][:2] == ["assay", "train"] and "lr=0.001" in run.manifest["command"]
    assert run.settings["peft"] == {"init_lora_weights": "gaussian"}
    assert Path(str(assay.report(run))) == run.report
    assert runs.command()[0] != "assay"  # it is that of a call only while that runs


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, 1e-7, "", "it's", 'say "x"', "a\\", "a, b", "null", "1", "{x}", "[a]", "a#b", "50 %",
        "日本語", "a\nb", "${x}", "it's ${oc.env:HOME}",
        ["q_proj", "v proj"], {"a": {"b c": 1.5, "d:e": ["x", None]}, "very, negative": 2}, {},
    ],
)  # fmt: skip
def test_a_value_arrives_as_it_is(value: object) -> None:
    """Through Hydra, where `peft` takes any value."""
    call = cli_args.parse("train", [f"peft={api.literal({'key': value})}"])
    overrides, problems = compose.prepare_overrides(call)
    compose.register_root(call)
    values, unresolved = compose.compose_values(call, overrides)
    assert (problems, unresolved) == ([], []) and values["peft"] == {"key": value}


def test_wrong_settings_are_raised_all_at_once_and_the_environment_is_kept(folder: Path) -> None:
    import os

    before = dict(os.environ)
    with pytest.raises(ConfigError) as error:
        api.train(epochz=2, lr="abc", gate={"metrik": "bleu"}, dataset_path=folder / "my_data")
    assert {"epochz is not a setting; did you mean epochs?", "lr=abc: should be a number"} <= {
        *error.value.problems
    }
    assert any("metrik" in problem for problem in error.value.problems)
    with pytest.raises(UserError, match="search: train of the Python API trains one run"):
        api.train(search="lora")
    with pytest.raises(UserError, match="object"):
        api.train(lr=object())
    with pytest.raises(UserError, match="no finished run"):
        api.evaluate()
    assert dict(os.environ) == before and not (folder / "outputs").exists()


def test_importing_it_imports_no_library() -> None:
    heavy = "{'torch', 'hydra', 'yaml', 'numpy', 'omegaconf', 'psutil'}"
    script = f"import sys, assay; assert assay.train; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
