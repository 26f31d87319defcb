"""The commands of the documents: each goes through make or the shell, and what reaches Assay is composed or run.

The blocks of a page run in order, in one folder that looks like a fresh checkout with one finished run, RUN.
`python`, `pip`, `assay` and make's Python only record their arguments, and no other program is there but TOOLS: a
block that needs one is marked `not run`. Of the recorded calls,

- a command of a block marked `run` is run, and what it prints is compared with what a `console` block shows;
- any other command is composed and checked, also for a sweep or a cluster, as it is before the first job starts.

Nothing in a command is replaced. A model that a page names is a link to a tiny random one in that folder (LLAMAS,
OTHERS), and the reader's own files are small (Checkout.own_files).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from src import cli, cli_args, gpus
from src.stages import STAGES
from tests.docs.blocks import PAGES, ROOT, Block, blocks, commands
from tests.fixtures import World, call, chat, jsonl, locked

pytest_plugins = ["tests.fixtures"]

RUN = "2026-01-15_10-30-45"  # the run that the documents name
LLAMAS = ("models/SmolLM2-135M-Instruct", "models/tiny-random-llama", "meta-llama/Meta-Llama-3-8B")
OTHERS = {  # what else a page names: architecture and chat template of the random model in its place
    "models/tiny-random-bert": ("bert", None),
    "Qwen/Qwen2.5-7B-Instruct": ("llama", ROOT / "tests" / "data" / "templates" / "qwen2_5.jinja"),
}
CALLS = "calls.jsonl"

TOOLS = ("awk", "bash", "cat", "cp", "grep", "head", "ls", "make", "mkdir", "mv", "rm", "sed", "tail", "touch")

# Takes the place of Python, pip and assay: writes down its arguments, and what make sets.
RECORDER = f"""#!{sys.executable}
import json, os, sys
if sys.argv[1:2] == ["scripts/target.py"]:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
set_by_make = {{name: os.environ[name] for name in ("ASSAY_PROGRAM", "MESSAGE") if name in os.environ}}
given = [os.path.basename(sys.argv[0]), set_by_make, sys.argv[1:]]
with open(os.environ["RECORDED"], "a") as file:
    print(json.dumps(given), file=file)
"""


class Checkout:
    """A folder in which a page's commands are typed."""

    def __init__(self, folder: Path, world: World, models: dict[str, Path]) -> None:
        self.folder = folder
        for name in ("Makefile", "README.md", ".env.example", "zensical.toml", *_requirements()):
            shutil.copy(ROOT / name, folder)
        for name in ("configs", "data"):
            shutil.copytree(ROOT / name, folder / name)
        for name in ("scripts", "src", "docs"):
            (folder / name).symlink_to(ROOT / name)
        for name, model in {**dict.fromkeys(LLAMAS, world.model), **models}.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).symlink_to(model)
        self.own_files()
        self._finished_run(world)
        programs = folder / ".programs"
        programs.mkdir()
        for name in ("python", "pip", "assay"):
            (programs / name).write_text(RECORDER)
            (programs / name).chmod(0o755)
        for name in TOOLS:
            (programs / name).symlink_to(str(shutil.which(name)))
        self.recorded = folder / CALLS
        self.environment = {
            "PATH": str(programs),
            "PY": str(programs / "python"),
            "LANG": "C.UTF-8",
            "HOME": str(folder),
            "RECORDED": str(self.recorded),
        }

    def own_files(self) -> None:
        """The reader's own data, as the pages describe it."""
        topics = ("order", "refund", "login", "invoice", "address", "coupon", "parcel", "card")
        questions = [
            f"{ask} {topic}?" for topic in topics for ask in ("Where is my", "How do I change my", "Why no")
        ]
        rows = [chat(question, f"Your {question.split()[-1][:-1]} is in your account.") for question in questions]
        for name in ("my.jsonl", "my_data/train.jsonl"):
            jsonl(self.folder / name, rows)
        table = "".join(f"{q.split()[-1]},{q},Please see your account.,closed\n" for q in questions)
        for name in ("faq.csv", "tickets.csv", "more.csv"):
            (self.folder / name).write_text(f"subject,question,answer,status\n{table}")
        for split in ("dev", "test"):
            jsonl(self.folder / "my_eval" / f"{split}.jsonl", [{"prompt": split, "completion": "Yes."}])
        labels = [{"text": question, "label": ("how", "where")["Where" in question]} for question in questions]
        jsonl(self.folder / "reviews.jsonl", labels)
        (self.folder / "mine.jinja").write_text("{% for turn in messages %}{{ turn['content'] }}{% endfor %}")

    def _finished_run(self, world: World) -> None:
        outputs = self.folder / "outputs"
        shutil.copytree(world.output, outputs, symlinks=True)
        shutil.copytree(world.artifacts, self.folder / "artifacts", symlinks=True)
        (outputs / "runs" / world.newest.path.name).rename(outputs / "runs" / RUN)
        (outputs / "runs" / "latest").unlink()
        (outputs / "runs" / "latest").symlink_to(RUN)

    def shell(self, line: str, may_fail: bool) -> tuple[str, list[tuple[str, dict[str, str], list[str]]]]:
        """Run a line of a shell. Returns: what it printed, and the recorded calls of Python and assay."""
        self.recorded.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", line], cwd=self.folder, env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, timeout=60,
        )  # fmt: skip
        if done.returncode and not may_fail:
            raise AssertionError(f"this fails: {line}\n{done.stdout}")
        recorded = self.recorded.read_text().splitlines() if self.recorded.exists() else []
        return done.stdout, [tuple(json.loads(found)) for found in recorded]


def _requirements() -> list[str]:
    return [p.name for p in ROOT.glob("requirements*.txt")] + ["pyproject.toml"]


@pytest.fixture(scope="session")
def models(common: Path) -> dict[str, Path]:
    """The folders of OTHERS."""
    from scripts.tiny_model import build

    texts = (ROOT / "data" / "ingot.jsonl").read_text(encoding="utf-8").splitlines()
    found = {}
    for name, (architecture, template) in OTHERS.items():
        found[name] = common / "models" / Path(name).name
        with locked(found[name]):
            if not found[name].is_dir():
                text = {"chat_template": template.read_text(encoding="utf-8")} if template else {}
                build(found[name], texts, architecture=architecture, **text)
    return found


def words_of(program: str, arguments: list[str]) -> list[str] | None:
    """The words of a call of Assay, None if it is a call of something else."""
    if program == "assay":
        return arguments
    return arguments[2:] if arguments[:2] == ["-m", "src.main"] else None


def compose(words: list[str], patch: pytest.MonkeyPatch) -> str:
    """Check the command as is done before its first job starts. Returns: what is printed, which is nothing."""
    stage = words[0]
    if stage in STAGES and not {"--help", "-h"} & set(words):
        for start in ("_run_locally", "_run_sweep", "_run_on_slurm"):  # they follow the checks
            patch.setattr(cli, start, lambda *_, **__: 0)
        patch.setattr(gpus, "missing", lambda visible: [])  # as where the GPUs are that the pages name
        cli.run_jobs(cli_args.parse(stage, words[1:]), lambda _: 0)
    elif call(stage, "--help") != 0:
        raise AssertionError(f"there is no command {stage}")
    return ""


def normal(line: str, numbers_vary: bool) -> str:
    """A printed line without what differs from run to run."""
    line = re.sub(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(-[0-9a-f]{4})?", "RUN", line.rstrip())
    return re.sub(r"[\d.,:]*\d(e-?\d+)?", "0", line) if numbers_vary else line


def compare(expected: list[str], printed: str, block: Block) -> None:
    """Every expected line occurs in this order; lines that are not shown are allowed only where `...` is."""
    left = [normal(line, block.numbers_vary) for line in printed.splitlines()]
    left = [line for line in left if line and not line.startswith("make: ***")]
    gap = False
    for line in (normal(text, block.numbers_vary) for text in expected if text.strip()):
        if line.strip() == "...":
            gap = True
        elif line in left and (gap or left[0] == line):
            del left[: left.index(line) + 1]
            gap = False
        else:
            raise AssertionError(f"{block.place}: this is not printed here: {line}\n--- left:\n" + "\n".join(left))
    assert gap or not left, f"{block.place}: this is printed, but not shown:\n" + "\n".join(left)


PAGES_WITH_COMMANDS = {
    str(page.relative_to(ROOT)): found
    for page in PAGES
    if (found := [b for b in blocks(page) if b.language in {"bash", "console"} and b.kind != "not run"])
}


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS)
def test_the_commands_of_a_page_are_accepted_and_print_what_it_shows(
    page: str,
    finished: World,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    checkout = Checkout(tmp_path, finished, models)
    monkeypatch.chdir(tmp_path)
    for name, value in {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "80", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    for block in PAGES_WITH_COMMANDS[page]:
        may_fail = block.language == "console"  # it may show an error
        for line, expected in commands(block):
            printed, recorded = checkout.shell(line, may_fail)
            for program, variables, arguments in recorded:
                if (words := words_of(program, arguments)) is None:
                    continue
                with monkeypatch.context() as patch:
                    patch.delenv("ASSAY_PROGRAM", raising=False)
                    for name, value in variables.items():
                        patch.setenv(name, value)
                    try:
                        printed += run(words, capfd, may_fail) if block.kind == "run" else compose(words, patch)
                    except Exception as error:
                        raise AssertionError(f"{block.place}: {line}\n{error}") from error
            if block.language == "console":
                compare(expected, printed.replace(f"{tmp_path}/", ""), block)


def run(words: list[str], capfd: pytest.CaptureFixture[str], may_fail: bool) -> str:
    """Run a command in this process. Returns: what it printed, in order."""
    capfd.readouterr()
    with redirect_stderr(sys.stdout):
        code = call(*words)
    printed = capfd.readouterr().out
    if code not in ({0, 2, 3, 4} if may_fail else {0}):
        raise AssertionError(f"exit code {code}: {printed}")
    return printed
