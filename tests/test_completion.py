"""Tab completion: the candidates, and what real shells make of them."""

from __future__ import annotations

import json
import os
import pty
import resource
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from src import completion
from src.main import UTILITIES
from src.remote.commands import COMMANDS
from src.stages import STAGES
from tests.fixtures import ROOT, call


def words(line: str, shell: str = "fish") -> list[str]:
    """The candidates for the end of a line."""
    output = completion.completion_command([shell, "--line", line, "=:"])
    return [found.split("\t")[0] for found in output.splitlines()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two runs, presets and data of a user."""
    for name, status in (("2026-01-01_10-00-00", "finished"), ("2026-01-02_10-00-00", "stopped")):
        run = tmp_path / "outputs" / "runs" / name
        run.mkdir(parents=True)
        (run / "manifest.json").write_text(json.dumps({"stage": "train", "status": status}))
    (tmp_path / "outputs" / "runs" / "unreadable").mkdir()
    (tmp_path / "outputs" / "runs" / "damaged").mkdir()
    (tmp_path / "outputs" / "runs" / "damaged" / "manifest.json").write_text("[]")
    (tmp_path / "configs" / "method").mkdir(parents=True)
    (tmp_path / "configs" / "method" / "mine.yaml").touch()
    (tmp_path / "my data").mkdir()
    (tmp_path / "my data" / "rows.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Candidates


@pytest.mark.parametrize("program", ["assay", "python -m src.main", "LR=1 .venv/bin/python -m src.main"])
def test_the_first_word_is_a_command(program: str) -> None:
    ssh = [f"ssh-{name}" for name in STAGES]
    assert words(f"{program} ") == list(dict.fromkeys([*STAGES, *UTILITIES, *COMMANDS, *ssh]))
    assert words(f"{program} tra") == ["train"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train lora_", ["lora_r=", "lora_alpha=", "lora_dropout=", "lora_target_modules="]),
        ("train lora_r=8 lora_", ["lora_alpha=", "lora_dropout=", "lora_target_modules="]),
        ("train data_source", ["data_source."]),
        ("train data_source.t", ["data_source.type=", "data_source.tag="]),
        ("train data_source.type=l", ["data_source.type=local", "data_source.type=lakefs"]),
        ("train on_bad_row=", ["on_bad_row=refuse", "on_bad_row=skip"]),
        ("train +on_bad_row=s", ["+on_bad_row=skip"]),
        ("train bf16=", ["bf16=true", "bf16=false", "bf16=auto"]),
        ("train report_to=w", ["report_to=wandb"]),
        ("train meth", ["method="]),
        ("train method=q", ["method=qlora"]),
        ("train -m method=dora,q", ["method=dora,qlora"]),
        ("train launch=slurm qo", ["qos="]),
        ("train near_", []),
        ("train --mul", ["--multirun"]),
        ("train --cfg ", ["job", "hydra", "all"]),
        ("train --config-name eval_", ["eval_baseline"]),
        ("plan prob", ["probe="]),
        ("publish gate.conf", ["gate.confidence="]),
        ("publish-hf --p", ["--public"]),
        ("ssh-train --d", ["--detach"]),
        ("ssh-train optim=sg", ["optim=sgd"]),
        ("ssh-stop --g", ["--grace="]),
        ("completion z", ["zsh"]),
        ("schema eval", ["eval", "eval-baseline"]),
        ("nonsense ", []),
    ],
)
def test_what_follows_a_command(line: str, expected: list[str]) -> None:
    assert words(f"assay {line}") == expected


def test_runs_are_offered_the_newest_first(folder: Path) -> None:
    runs = ["latest", "2026-01-02_10-00-00", "2026-01-01_10-00-00"]
    assert words("assay eval ")[:3] == runs
    assert words("assay eval model_path=")[:3] == [f"model_path={run}" for run in runs]
    assert words("assay compare 2026-01-01_10-00-00 b") == ["baseline", "batch_size="][:1]
    assert words("assay train resume=") == [f"resume={run}" for run in ("auto", "never", *runs)]
    assert words("assay runs diff 2026-01-02") == runs[1:2]
    assert words("assay eval output_dir=elsewhere 2026") == []
    assert "2026-01-02_10-00-00\ttrain, stopped" in completion.completion_command(
        ["zsh", "--line", "assay eval 20"]
    )


def test_files_and_presets_of_the_working_directory_are_offered(folder: Path) -> None:
    assert words("assay train method=m") == ["method=mine"]
    assert words("assay train dataset_path=my") == ["dataset_path=my data/"]
    assert words("assay train 'dataset_path=my data/") == ["dataset_path=my data/rows.jsonl"]
    assert words("assay validate --model-path ./out") == ["./outputs/"]
    assert words("assay train --config-path co") == ["configs/"]
    assert words("make ") == words("make train l") == []  # there is no Makefile


def test_bash_gets_what_follows_its_last_word_break(folder: Path) -> None:
    assert words("assay train on_bad_row=s", "bash") == ["skip "]
    assert words("assay train dataset_path=my", "bash") == ["my\\ data/"]
    assert words("assay train lora_r", "bash") == ["lora_r="]


def test_make_takes_settings_and_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert words("make lis") == ["list-configs"]
    assert words("make eval R") == ["RUN="] and words("make eval RUN=la") == ["RUN=latest"]
    assert words("make train method=q") == ["method=qlora"]
    assert words("make train TRAIN_CONFIG=eval_") == ["TRAIN_CONFIG=eval_baseline"]
    assert words("make train --") == [] and words("make lint l") == []


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("completion", "fsh") == 2
    assert "completion fsh is not known; did you mean fish?" in capsys.readouterr().err
    assert call("completion") == 2


def test_an_answer_comes_at_once_and_needs_no_library() -> None:
    """0.15 s of CPU: a person waits for it at each Tab."""
    code = (
        "import sys\n"
        "from src.main import main\n"
        "main(['completion', 'bash', '--line', 'assay train lr', '=:'])\n"
        "assert not {'hydra', 'omegaconf', 'pydantic', 'yaml', 'numpy', 'torch'} & sys.modules.keys()"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout == "lr=\nlr_scheduler_type=\nlr_scheduler_kwargs=\n"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.15


# Real shells

START = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "-i"],
}
SHOW = 'for f in make python assay; do eval "$f() {{ printf \'<%s>\' \\"\\$@\\"; echo; }}"; done'
SETUP = {  # functions show which words a completed line has
    "bash": 'eval "$({script})"; ' + SHOW,
    "zsh": 'eval "$({script})"; ' + SHOW,
    "fish": "{script} | source; for f in make python assay; function $f; printf '<%s>' $argv; echo; end; end",
}
LINES = [  # what is typed, and the words of the completed line
    ("make tra\t meth\tqlo\t\n", "<train><method=qlora>"),
    ("python -m src.main eval-b\t on\t\n", "<-m><src.main><eval-baseline><on>"),
    ("assay train data_source.ty\tlak\t lora_r\t8\n", "<train><data_source.type=lakefs><lora_r=8>"),
    ("assay train dataset_path=dat\tfor\t\n", "<train><dataset_path=data/formats/>"),
]


class Terminal:
    """A shell on a terminal, to which keys are sent."""

    def __init__(self, command: list[str]) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:  # the child
            os.environ.update(TERM="dumb", PS1="$ ", HOME="/nonexistent", XDG_DATA_HOME="/tmp")
            os.chdir(ROOT)
            os.execvp(command[0], command)
        self.seen = ""

    def send(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def wait_for(self, text: str, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while text not in self.seen:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.fd], [], [], left)[0]:
                raise AssertionError(f"{text!r} did not appear in {self.seen!r}")
            self.seen += os.read(self.fd, 65536).decode(errors="replace")

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.close(self.fd)
        os.waitpid(self.pid, 0)


@pytest.mark.parametrize("shell", START)
def test_a_real_shell_completes_the_line(shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    script = f"{shlex.quote(sys.executable)} -m src.main completion {shell}"
    terminal = Terminal(START[shell])
    try:
        terminal.send(SETUP[shell].format(script=script) + "; echo re''ady\n")
        terminal.wait_for("ready\r\n")
        for keys, expected in LINES:
            terminal.seen = ""
            terminal.send(keys)
            terminal.wait_for(expected)
    finally:
        terminal.close()
