"""`make` passes words on unchanged, and builds the model that they name."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from src.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]
CALLS = "calls.jsonl"

DOCUMENTED = [
    *("help", "venv", "install", "convert", "train", "eval", "eval-baseline", "report", "publish", "publish-hf"),
    *("push", "ssh-init", "ssh-status", "ssh-logs", "ssh-attach", "ssh-stop", "ssh-fetch"),
    *("ssh-shell", "ssh-tensorboard", *(f"ssh-{stage}" for stage in STAGES)),
    *("demo", "test", "lint", "format", "clean"),
]

# Takes the place of Python: writes down the words that it gets, one JSON list a call.
PYTHON = f"""#!{sys.executable}
import json, sys
with open({CALLS!r}, "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
"""
DEMO = ["scripts/build_demo_model.py"]
TINY = ["scripts/build_demo_model.py", "--tiny", "llama"]


class Make:
    """The Makefile in a folder without models, and a Python that only records its arguments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copy(ROOT / "Makefile", folder)
        (folder / "scripts").mkdir()
        (folder / "scripts/build_demo_model.py").touch()
        (folder / "python").write_text(PYTHON)
        (folder / "python").chmod(0o755)

    def __call__(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}  # and nothing of a make around this one
        environment |= variables
        return subprocess.run(["make", *words], cwd=self.folder, env=environment, capture_output=True, text=True)

    def calls(self, *words: str, **variables: str) -> list[list[str]]:
        """Every call of Python that `make WORDS` does."""
        (self.folder / CALLS).unlink(missing_ok=True)
        done = self("PY=./python", *words, **variables)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in (self.folder / CALLS).read_text().splitlines()]

    def environment(self, *words: str) -> dict[str, str]:
        """What the command finds that `make WORDS` runs."""
        (self.folder / "python").write_text(PYTHON + 'import os\njson.dump(dict(os.environ), open("env", "w"))\n')
        self.calls(*words)
        return json.loads((self.folder / "env").read_text())

    def stage(self, *words: str, **variables: str) -> list[str]:
        """The words of the one call of the command line that `make WORDS` does."""
        (call,) = [c for c in self.calls(*words, **variables) if c[:2] == ["-m", "src.main"]]
        return call[2:]

    def built(self, *words: str) -> list[list[str]]:
        return [c for c in self.calls(*words) if c[:1] == DEMO]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return Make(tmp_path)


# Commands


def test_make_alone_lists_every_documented_command(make: Make) -> None:
    done = make()
    assert done.returncode == 0
    assert done.stdout == make("help").stdout
    listed = dict(re.findall(r"^  make (\S+) +(.*)$", done.stdout, re.MULTILINE))
    assert set(DOCUMENTED) <= set(listed)
    assert all(listed.values())


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_documented_command_exists(make: Make, name: str) -> None:
    (make.folder / "requirements.txt").write_text("torch==0\n")
    (make.folder / "requirements-dev.txt").touch()
    done = make("-n", name)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train", ["train", "--config-name", "train"]),
        ("eval", ["eval", "--config-name", "eval"]),
        ("eval-baseline", ["eval-baseline", "--config-name", "eval_baseline"]),
        ("report", ["report", "--config-name", "report"]),
        ("publish", ["publish", "--config-name", "publish"]),
        ("publish-hf", ["publish-hf", "--config-name", "publish"]),
        ("compare", ["compare", "--config-name", "compare"]),
        ("runs", ["runs"]),
    ],
)
def test_a_command_is_one_stage_with_its_configuration(make: Make, name: str, words: list[str]) -> None:
    assert make.stage(name) == words


@pytest.mark.parametrize("name", [name for name in STAGES if name != "data-push"])
def test_a_stage_on_the_server_gets_the_words_of_the_local_stage(make: Make, name: str) -> None:
    config = STAGES[name].config_name.upper().removeprefix("EVAL_")  # TRAIN, EVAL, BASELINE ...
    words = ["lr=it's 1 $x", f"{config}_CONFIG=mine", "ARGS=--multirun 'a=b c'"]
    here, there = make.stage(name, *words), make.stage(f"ssh-{name}", *words)
    assert here[:3] == [name, "--config-name", "mine"] and "lr=it's 1 $x" in here
    assert there == [f"ssh-{name}", *here[1:]]


def test_two_runs_are_compared_on_the_server(make: Make) -> None:
    assert make.stage("ssh-compare", "A=it-1", "B=baseline")[3:] == ["it-1", "baseline"]


def test_a_message_for_lakefs_is_passed_in_the_environment(make: Make) -> None:
    words = ["ssh-data-push", "MESSAGE=it's $new"]
    assert make.stage(*words) == ["ssh-data-push", "message=${oc.env:MESSAGE}"]
    assert make.environment(*words)["MESSAGE"] == "it's $new"


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["push"], ["push"]),
        (["push", "ALSO=a b,c"], ["push", "--also=a b,c"]),
        (["ssh-init"], ["ssh-init"]),
        (["ssh-status"], ["ssh-status"]),
        (["ssh-status", "ALL=1"], ["ssh-status", "--all"]),
        (["ssh-logs"], ["ssh-logs"]),
        (["ssh-logs", "RUN=it's"], ["ssh-logs", "it's"]),
        (["ssh-attach", "RUN=a;b $c"], ["ssh-attach", "a;b $c"]),
        (["ssh-stop", "RUN=1", "GRACE=60"], ["ssh-stop", "--grace=60", "1"]),
        (["ssh-fetch", "RUN=latest"], ["ssh-fetch", "latest"]),
        (["ssh-shell"], ["ssh-shell"]),
        (["ssh-tensorboard"], ["ssh-tensorboard"]),
        (["ssh-tensorboard", "PORT=7000"], ["ssh-tensorboard", "--port=7000"]),
        (
            ["ssh-train", "DETACH=1", "ALSO=a b", "RUN=x", "lr=1"],
            ["ssh-train", "--config-name", "train", "--detach", "--also=a b", "--run=x", "lr=1"],
        ),
        (["ssh-train", "DETACH=0"], ["ssh-train", "--config-name", "train"]),
        (
            ["ssh-eval-baseline", "BASELINE_CONFIG=mine"],
            ["ssh-eval-baseline", "--config-name", "mine"],
        ),
    ],
)
def test_a_command_about_the_server_takes_its_words(make: Make, typed: list[str], words: list[str]) -> None:
    assert make.stage(*typed) == words


def test_a_variable_of_the_environment_is_not_passed_to_the_server(make: Make) -> None:
    found = {"RUN": "1", "PORT": "8000", "DETACH": "1", "ALSO": "x", "GRACE": "1", "ALL": "1"}
    assert make.stage("ssh-train", **found) == ["ssh-train", "--config-name", "train"]
    assert make.stage("ssh-tensorboard", **found) == ["ssh-tensorboard"]


def test_the_server_can_be_named_on_the_command_line_of_make(make: Make) -> None:
    found = make.environment("ssh-train", "REMOTE_HOST=a", "REMOTE_DIR=~/it's here", "lr=1")
    assert found["REMOTE_HOST"] == "a" and found["REMOTE_DIR"] == "~/it's here"
    assert make.stage("ssh-train", "REMOTE_HOST=a", "lr=1")[3:] == ["lr=1"]


def test_two_runs_are_compared_by_name(make: Make) -> None:
    words = ["compare", "--config-name", "compare", "it-1", "baseline", "gate.split=dev"]
    assert make.stage("compare", "A=it-1", "B=baseline", "gate.split=dev") == words
    assert make.stage("runs", "ARGS=diff it-1 it-2") == ["runs", "diff", "it-1", "it-2"]


def test_the_demo_is_the_full_pipeline(make: Make) -> None:
    calls = make.calls("demo", "lr=1")
    assert calls[0] == DEMO
    assert [c[2] for c in calls[1:]] == ["train", "eval", "publish"]
    assert calls[1][2:] == ["train", "lr=1"]


def test_a_failed_stage_ends_the_demo(make: Make) -> None:
    (make.folder / "python").write_text(PYTHON + "sys.exit('train' in sys.argv)\n")
    assert make("PY=./python", "demo").returncode != 0
    output = [json.loads(line) for line in (make.folder / CALLS).read_text().splitlines()]
    assert output == [DEMO, ["-m", "src.main", "train"]]


def test_the_checks_are_lint_types_and_tests(make: Make) -> None:
    calls = [" ".join(c) for c in make.calls("test", "ARGS=-k 'a or b'")]
    tests = "-m pytest -n auto --dist worksteal -k a or b"
    assert calls == ["-m ruff check .", "-m ruff format --check .", "-m mypy", tests]


def test_conversion_takes_its_files(make: Make) -> None:
    assert make.calls("convert", "ARGS='my export.json' --out x") == [
        ["scripts/convert_data.py", "my export.json", "--out", "x"]
    ]


# Words


def test_lower_case_words_are_settings(make: Make) -> None:
    words = make.stage("train", "lr=1e-4", "method=qlora", "data_source.type=local")
    assert words[:3] == ["train", "--config-name", "train"]
    assert sorted(words[3:]) == ["data_source.type=local", "lr=1e-4", "method=qlora"]


@pytest.mark.parametrize("name", ["eval", "eval-baseline", "publish", "publish-hf"])
def test_every_stage_takes_settings(make: Make, name: str) -> None:
    assert make.stage(name, "output_dir=x")[3:] == ["output_dir=x"]


def test_the_target_of_a_publication_is_a_setting(make: Make) -> None:
    assert make.stage("publish", "target=hub") == ["publish", "--config-name", "publish", "target=hub"]


def test_upper_case_words_are_not(make: Make) -> None:
    words = ["HF_TOKEN=hf_secret", "CUDA_VISIBLE_DEVICES=1", "YES=1", "lr=1"]
    assert make.stage("train", *words)[3:] == ["lr=1"]


def test_a_misspelt_upper_case_setting_is_not_lost(make: Make) -> None:
    assert sorted(make.stage("train", "Lr=1", "data_source.Type=x")[3:]) == ["Lr=1", "data_source.Type=x"]


def test_a_setting_is_no_variable_of_the_environment(make: Make) -> None:
    found = make.environment("train", "question_key=question", "lr=1", "HF_TOKEN=hf_secret")
    assert found.keys().isdisjoint({"question_key", "lr"})  # question would be the secret of question_key
    assert found["HF_TOKEN"] == "hf_secret"


def test_the_configuration_is_chosen_by_name(make: Make) -> None:
    assert make.stage("train", "TRAIN_CONFIG=train_custom") == ["train", "--config-name", "train_custom"]
    assert make.stage("eval", "EVAL_CONFIG=mine")[2] == "mine"
    assert make.stage("eval-baseline", "BASELINE_CONFIG=mine")[2] == "mine"
    assert make.stage("publish", "PUBLISH_CONFIG=mine")[2] == "mine"


@pytest.mark.parametrize(
    "value",
    [
        "/a b/c  d",
        "it's 'here'",
        'say "x"',
        "[q_proj, v_proj]",
        "{a: 1, b.c: 2}",
        "*",
        "~/x",
        "a;b&c|d>e",
        "a#b",
        "50%",
        "`id`",
        "(a",
        "a=b",
        "é",
        "",
        r"C:\data",
        "${oc.env:X}",
    ],
)
def test_a_value_arrives_as_it_was_typed(make: Make, value: str) -> None:
    assert make.stage("train", f"dataset_path={value}", "lr=1")[3:] in (
        [f"dataset_path={value}", "lr=1"],
        ["lr=1", f"dataset_path={value}"],
    )


def test_args_are_words_of_the_shell(make: Make) -> None:
    args = """--multirun lr=1e-4,1e-3 'dataset_path=/a b/c' "model_name=it's" """
    assert make.stage("train", "seed=1", f"ARGS={args}")[3:] == [
        "seed=1", "--multirun", "lr=1e-4,1e-3", "dataset_path=/a b/c", "model_name=it's",
    ]  # fmt: skip


# Models


@pytest.mark.parametrize(
    ("words", "built"),
    [
        (["train"], [DEMO]),
        (["train", "lr=1", "data=ingot", "method=dora"], [DEMO]),
        (["train", "resume=auto"], [DEMO]),
        (["train", "resume=latest"], []),
        (["train", "experiment=smoke"], [TINY]),
        (["train", "ARGS=experiment=smoke"], [TINY]),
        (["train", "model_name=models/tiny-random-llama"], [TINY]),
        (["train", "experiment=smoke_seq2seq"], [[*TINY[:-1], "t5"]]),
        (["train", "experiment=smoke_classification"], [[*TINY[:-1], "bert"]]),
        (["eval-baseline", "model_name=models/tiny-random-bert", "task=classification"], [[*TINY[:-1], "bert"]]),
        (["train", "model_name=some/other"], []),
        (["train", "model=llama3_8b"], []),
        (["train", "experiment=custom_dsl_llama3_8b"], []),
        (["train", "TRAIN_CONFIG=train_custom"], []),
        (["train", "ARGS=--config-name mine"], []),
        (["eval-baseline"], [DEMO]),
        (["eval-baseline", "model_name=models/tiny-random-llama"], [TINY]),
        (["eval-baseline", "model_name=some/other"], []),
        (["eval-baseline", "BASELINE_CONFIG=mine"], []),
        (["eval"], []),
        (["publish"], []),
        (["demo"], [DEMO]),
        (["model"], [DEMO]),
        (["tiny-model"], [TINY]),
    ],
)
def test_only_the_model_that_the_settings_name_is_built(
    make: Make, words: list[str], built: list[list[str]]
) -> None:
    assert make.built(*words) == built


def test_an_existing_model_is_not_built_again(make: Make) -> None:
    for name in ("SmolLM2-135M-Instruct", "tiny-random-llama"):
        (make.folder / "models" / name).mkdir(parents=True)
        (make.folder / "models" / name / "config.json").touch()
    assert make.built("train") == make.built("train", "experiment=smoke") == []


# Set-up


def test_a_given_python_installs_nothing(make: Make) -> None:
    done = make("-n", "PY=python", "train")
    assert done.returncode == 0, done.stderr
    assert "pip install" not in done.stdout and "venv" not in done.stdout


def test_otherwise_the_environment_is_made_first_and_torch_is_installed_first(make: Make) -> None:
    (make.folder / "requirements.txt").write_text("numpy==1\ntorch==2.13.0\n")
    done = make("-n", "train")
    assert done.returncode == 0, done.stderr
    steps = [
        "-m venv .venv",
        "pip install .* torch==2.13.0",
        "pip install .* -r requirements.txt",
        "-m src.main train",
    ]
    found = [re.search(step, done.stdout) for step in steps]
    assert all(found)
    assert [m.start() for m in found if m] == sorted(m.start() for m in found if m)
