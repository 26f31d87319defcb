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

from src.remote.commands import COMMANDS
from src.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]
CALLS = "calls.jsonl"

DOCUMENTED = [
    *(
        "help",
        "venv",
        "install",
        "convert",
        "model",
        "tiny-model",
        *STAGES,
        "runs",
        "list-configs",
        "demo",
        *COMMANDS,
    ),
    *(f"ssh-{stage}" for stage in STAGES),
    *("test", "lint", "format", "docs", "clean"),
]

# Takes the place of Python: writes down the words that it gets, one JSON list a call. The real one runs target.py.
PYTHON = f"""#!{sys.executable}
import json, os, sys
if sys.argv[1] == "scripts/target.py":
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
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
        for name in ("src", "configs", "scripts"):
            (folder / name).symlink_to(ROOT / name)
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

    def refusal(self, *words: str) -> str:
        """What `make WORDS` says when it runs nothing, in a folder where nothing is installed."""
        for name in ("requirements.txt", "requirements-dev.txt", "requirements-docs.txt"):
            (self.folder / name).write_text("torch==0\n")
        done = self(*words)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stdout + done.stderr
        assert not (self.folder / CALLS).exists() and not (self.folder / ".venv").exists()
        return done.stderr

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
    assert max(map(len, done.stdout.splitlines())) <= 86
    assert all(listed.values())


def test_the_commands_that_prepare_and_check_exist(make: Make) -> None:
    for name in ("", "-dev", "-docs"):
        (make.folder / f"requirements{name}.txt").write_text("torch==0\n")
    done = make("-n", "venv", "install", "lint", "format", "docs", "clean")
    assert done.returncode == 0, done.stderr
    for word in ("venv .venv", "-r requirements.txt", "-m mypy", "ruff format .", "zensical build", "clean.py"):
        assert word in done.stdout


@pytest.mark.parametrize("name", [*STAGES, "runs", "list-configs"])
def test_a_command_is_one_stage(make: Make, name: str) -> None:
    assert make.stage(name) == [name]


@pytest.mark.parametrize("name", [name for name in STAGES if name != "data-push"])
def test_a_stage_on_the_server_gets_the_words_of_the_local_stage(make: Make, name: str) -> None:
    config = STAGES[name].config_name.upper().removeprefix("EVAL_")  # TRAIN, EVAL, BASELINE ...
    words = ["lr=it's 1 $x", f"{config}_CONFIG=mine", "ARGS=--multirun 'a=b c'"]
    words += ["RUN=it"] if STAGES[name].positionals else []
    here, there = make.stage(name, *words), make.stage(f"ssh-{name}", *words)
    assert here[:3] == [name, "--config-name", "mine"] and "lr=it's 1 $x" in here
    assert ("it" in here) == bool(STAGES[name].positionals)
    assert there == [f"ssh-{name}", *here[1:]]


def test_two_runs_are_compared_on_the_server(make: Make) -> None:
    assert make.stage("ssh-compare", "A=it-1", "B=baseline")[1:] == ["it-1", "baseline"]


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
            ["ssh-train", "--detach", "--also=a b", "--run=x", "lr=1"],
        ),
        (["ssh-train", "DETACH=0"], ["ssh-train"]),
        (["ssh-publish", "RUN=x"], ["ssh-publish", "x"]),
        (
            ["ssh-eval-baseline", "BASELINE_CONFIG=mine"],
            ["ssh-eval-baseline", "--config-name", "mine"],
        ),
    ],
)
def test_a_command_about_the_server_takes_its_words(make: Make, typed: list[str], words: list[str]) -> None:
    assert make.stage(*typed) == words


def test_a_variable_of_the_environment_is_not_passed_to_the_server(make: Make) -> None:
    found = {"RUN": "1", "PORT": "8000", "DETACH": "1", "ALSO": "x", "GRACE": "1", "ALL": "1", "A": "a", "B": "b"}
    found |= {"ARGS": "--multirun", "TRAIN_CONFIG": "mine", "MESSAGE": "x", "lr": "1"}
    for name in ("ssh-train", "ssh-tensorboard", "publish", "compare", "data-push", "train"):
        assert make.stage(name, **found) == [name]


def test_the_server_can_be_named_on_the_command_line_of_make(make: Make) -> None:
    found = make.environment("ssh-train", "REMOTE_HOST=a", "REMOTE_DIR=~/it's here", "lr=1")
    assert found["REMOTE_HOST"] == "a" and found["REMOTE_DIR"] == "~/it's here"
    assert make.stage("ssh-train", "REMOTE_HOST=a", "lr=1")[1:] == ["lr=1"]


def test_two_runs_are_compared_by_name(make: Make) -> None:
    words = ["compare", "it-1", "baseline", "gate.split=dev"]
    assert make.stage("compare", "B=baseline", "A=it-1", "gate.split=dev") == words
    assert make.stage("compare", "RUN=it-1") == ["compare", "it-1"]
    assert make.stage("runs", "RUN=it-1") == ["runs", "--run=it-1"]
    assert make.stage("runs", "A=it-1", "B=it-2") == ["runs", "diff", "it-1", "it-2"]
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
    words = ["train", "lr=1e-4", "method=qlora", "data_source.type=local"]
    assert make.stage(*words) == words


@pytest.mark.parametrize("name", ["eval", "eval-baseline", "publish", "publish-hf"])
def test_every_stage_takes_settings(make: Make, name: str) -> None:
    assert make.stage(name, "output_dir=x")[1:] == ["output_dir=x"]


def test_the_target_of_a_publication_is_a_setting(make: Make) -> None:
    assert make.stage("publish", "target=hub") == ["publish", "target=hub"]


def test_variables_of_the_environment_are_not(make: Make) -> None:
    words = ["HF_TOKEN=hf_secret", "CUDA_VISIBLE_DEVICES=1", "lr=1"]
    assert make.stage("train", *words)[1:] == ["lr=1"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "LR=1e-4"], "LR is not a variable of make train; did you mean lr=1e-4?"),
        (["check-data", "DATASET_PATH=a b"], "did you mean dataset_path='a b'?"),
        (["train", "TRAIN_CONFIGS=x"], "did you mean TRAIN_CONFIG?"),
        (["train", "RUN=x"], "RUN is not a variable of make train; resume=x continues a run"),
        (["eval", "TRAIN_CONFIG=x"], "TRAIN_CONFIG is not a variable of make eval; did you mean EVAL_CONFIG?"),
        (["ssh-train", "DETATCH=1", "lr=1"], "did you mean DETACH?"),
        (["ssh-train", "REMOTE_HOTS=1"], "did you mean REMOTE_HOST?"),
        (["train", "NCCL_DEBUG=INFO"], "is written before make: NCCL_DEBUG=... make train"),
        (["publish", "RUN="], "RUN= names no run"),
        (["push", "lr=1"], "lr=1: make push takes no settings"),
        (["lr=1"], "lr=1: make help takes no settings"),
        *(
            ([name, "FOO=1"], f"FOO is not a variable of make {name}")
            for name in ("install", "venv", "test", "docs")
        ),
        *(
            ([name, "FOO=1"], f"FOO is not a variable of make {name}")
            for name in ("help", "clean", "model", "runs")
        ),
        (["train", "ARGS='"], "ARGS=' opens a quotation that it does not close"),
        (["train", "epochs:2"], "epochs:2 is not a command of make; a setting is written epochs=2"),
        (["train", "lr", "1e-4"], "lr is not a command of make; a setting is written lr=1e-4"),
        (["eval", "2026-11-30"], "2026-11-30 is not a command of make; a run is written RUN=2026-11-30"),
        (["trian"], "trian is not a command of make; did you mean make train?"),
        (["train", "$(touch x)"], "$(touch is not a command of make"),
        (["train", "a'b\";touch x"], "a'b\";touch is not a command of make"),
        (["train", "-lr=1e-4"], "-lr: make reads this as flags of its own; write lr=1e-4, without the dash"),
        (["train", "-output_dir=a b"], "write output_dir='a b', without the dash"),
        (["train", "-lr", "1e-4"], "-lr: make reads this"),
        (["train", "eval", "RUN=x"], "RUN is not a variable of make train; resume=x continues a run"),
        (["compare", "B=it"], "B=it is the second of two runs; write A=RUN B=it"),
    ],
)
def test_an_unknown_name_is_refused_before_anything_is_installed(
    make: Make, words: list[str], sentence: str
) -> None:
    assert sentence in make.refusal(*words)


def test_all_unknown_names_are_reported_at_once_and_those_of_another_goal_are_known(make: Make) -> None:
    said = make.refusal("train", "eval", "LR=1", "EPOCHS=2", "EVAL_CONFIG=x")
    assert "did you mean lr=1?" in said and "did you mean epochs=2?" in said
    assert "EVAL_CONFIG is not" not in said


def test_what_may_be_a_secret_is_not_printed(make: Make) -> None:
    token = "hf_" + "abcDEF123" * 3
    for words in (["train", f"MYPW={token}"], ["train", f"LR={token}"], ["lint", f"hf_token={token}"],
                  ["train", f"-lr={token}"], ["train", "QUESTION_KEY=letmein"]):  # fmt: skip
        assert not re.search("hf_abc|letmein", make.refusal(*words))


def test_every_documented_variable_of_the_environment_may_be_typed(make: Make) -> None:
    documented = re.findall(r"export (\w+)=", (ROOT / ".env.example").read_text())
    page = (ROOT / "docs/commands.md").read_text().partition("## Environment variables")[2]
    documented += re.findall(r"`([A-Z][A-Z0-9_]{3,})`", page)
    assert make.stage("train", *(f"{name}=x" for name in documented)) == ["train"]


def test_make_n_prints_the_command(make: Make) -> None:
    done = make("-n", "PY=./python", "train", "lr=1", "model_name=a b")
    assert done.stdout.endswith("./python -m src.main train lr=1 'model_name=a b'\n")
    assert not (make.folder / CALLS).exists()


def test_outside_of_the_folder_one_sentence_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "-f", str(ROOT / "Makefile"), "train"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "is not the folder of Assay; run make in it" in done.stderr


def test_a_misspelt_upper_case_setting_is_not_lost(make: Make) -> None:
    assert make.stage("train", "Lr=1", "data_source.Type=x")[1:] == ["Lr=1", "data_source.Type=x"]


def test_a_setting_is_no_variable_of_the_environment(make: Make) -> None:
    found = make.environment("train", "question_key=question", "lr=1", "HF_TOKEN=hf_secret")
    assert found.keys().isdisjoint({"question_key", "lr"})  # question would be the secret of question_key
    assert found["HF_TOKEN"] == "hf_secret" and found["ASSAY_PROGRAM"] == "make" and "MAKEFLAGS" not in found


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
        "$(HOME) $$ $x",
        "a\nb\n",
        "a \\ \t ",
        "-- x=1",
        "日本語, “x”",
    ],
)
def test_a_value_arrives_as_it_was_typed(make: Make, value: str) -> None:
    assert make.stage("train", f"dataset_path={value}", "lr=1")[1:] == [f"dataset_path={value}", "lr=1"]


def test_nothing_that_is_typed_runs_as_a_command(make: Make) -> None:
    words = ["run_name=$(shell touch ran)", "user_prompt=$(x", "stop=$(error x)", "HF_TOKEN=$(shell touch ran)"]
    assert make.stage("train", *words, "ARGS='seed=$(shell touch ran)'")[1:] == [
        *words[:3], "seed=$(shell touch ran)",
    ]  # fmt: skip
    assert make.stage("eval", "RUN=$(shell touch ran)", "EVAL_CONFIG=$(shell touch ran)")[3] == words[3][9:]
    make("PY=./python", "train", "$(shell touch ran)", "`touch ran`", "';touch ran;'")
    assert not (make.folder / "ran").exists()


def test_flags_of_make_and_of_other_goals_do_not_reach_a_command(make: Make) -> None:
    assert make.stage("-k", "-j4", "-l", "3", "train", "lr=1") == ["train", "lr=1"]
    both = make.calls("ssh-train", "eval", "DETACH=1", "EVAL_CONFIG=mine")
    assert [call[2:] for call in both] == [["ssh-train", "--detach"], ["eval", "--config-name", "mine"]]


def test_args_are_words_of_the_shell(make: Make) -> None:
    args = """--multirun lr=1e-4,1e-3 'dataset_path=/a b/c' "model_name=it's" 'user_prompt=$x ${y}' """
    assert make.stage("train", "seed=1", f"ARGS={args}")[1:] == [
        "seed=1", "--multirun", "lr=1e-4,1e-3", "dataset_path=/a b/c", "model_name=it's", "user_prompt=$x ${y}",
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
        (["train", "TRAIN_CONFIG=smoke", "ARGS=--config-path configs/experiment"], [TINY]),
        (["train", "model=smollm2_135m"], [DEMO]),
        (["train", "model=smollm2_135m", "model_name=some/other"], []),
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


def test_the_base_model_of_a_run_is_not_built(make: Make) -> None:
    (make.folder / "outputs/runs/it").mkdir(parents=True)
    (make.folder / "outputs/runs/it/manifest.json").touch()
    assert make.built("eval-baseline") == [] and make.built("eval-baseline", "output_dir=other") == [DEMO]


# Set-up


def test_a_given_python_installs_nothing(make: Make) -> None:
    done = make("-n", "PY=python", "train")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "python -m src.main train" and "build_demo_model" in done.stdout
    assert "pip install" not in done.stdout and "venv" not in done.stdout


def test_otherwise_the_environment_is_made_first_and_torch_is_installed_first(make: Make) -> None:
    (make.folder / "requirements.txt").write_text("numpy==1\ntorch==2.13.0\n")
    done = make("-n", "train", "lr=1")
    assert done.returncode == 0, done.stderr
    steps = [
        "-m venv .venv",
        "pip install .* torch==2.13.0",
        "pip install .* -r requirements.txt",
        "-m src.main train lr=1",
    ]
    found = [re.search(step, done.stdout) for step in steps]
    assert all(found)
    assert [m.start() for m in found if m] == sorted(m.start() for m in found if m)
