"""The entry point: it answers quickly, and refuses what it can before a heavy import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from src.main import UTILITIES
from src.remote.commands import COMMANDS
from src.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]
TORCH_FAMILY = ("torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "accelerate", "safetensors")
SSH = ("fabric", "paramiko", "invoke")
GOOD = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
PAIR = {"prompt": "2+2?", "completion": "4"}


def rows(path: Path, *values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(v) + "\n" for v in values))


def refused(done: subprocess.CompletedProcess[str], *sentences: str) -> None:
    """Exit code 2, every sentence, and no traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for sentence in sentences:
        assert sentence in done.stderr


# Quick answers


def test_the_guard_of_these_tests_notices_a_forbidden_import(assay: Any) -> None:
    done = assay(module="numpy", forbidden=["numpy"])
    assert done.returncode == 99 and "forbidden import: numpy" in done.stderr


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_help_lists_every_stage(assay: Any, word: str) -> None:
    done = assay(word)
    assert done.returncode == 0
    for name in [*STAGES, *UTILITIES, *COMMANDS, "ssh-STAGE"]:
        assert f"  {name} " in done.stdout


def test_no_argument_shows_the_help_and_is_an_error(assay: Any) -> None:
    done = assay()
    assert done.returncode == 2 and "usage:" in done.stdout


def test_version_names_assay_and_its_libraries(assay: Any) -> None:
    done = assay("version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Assay ")
    assert "torch " in done.stdout and "hydra-core " in done.stdout and "Python " in done.stdout


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_lists_its_settings(assay: Any, name: str) -> None:
    done = assay(name, "--help")
    assert done.returncode == 0, done.stderr
    assert STAGES[name].summary in done.stdout
    assert ("output_dir" if name != "data-push" else "message") in done.stdout and "presets:" in done.stdout


@pytest.mark.parametrize("name", UTILITIES)
def test_a_utility_says_what_it_does(assay: Any, name: str) -> None:
    done = assay(name, "--help")
    assert done.returncode == 0 and UTILITIES[name] in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_about_a_server_says_what_it_does(assay: Any, name: str) -> None:
    done = assay(name, "--help", forbidden=(*TORCH_FAMILY, *SSH))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m src.main {name}") and COMMANDS[name].summary in done.stdout
    assert all(flag in done.stdout for flag in COMMANDS[name].flags)


def test_a_stage_on_a_server_lists_its_settings_and_its_flags(assay: Any) -> None:
    done = assay("ssh-train", "--help", forbidden=(*TORCH_FAMILY, *SSH))
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m src.main ssh-train [--detach]")
    assert all(
        word in done.stdout for word in (STAGES["train"].summary, "lora_r", "--detach ", "--also=", "--run=")
    )


def test_a_command_without_a_server_is_refused_before_anything_is_loaded(assay: Any) -> None:
    refused(assay("ssh-trian", "--help"), "ssh-trian is not a command; did you mean ssh-train?")
    refused(assay("ssh-stop", forbidden=SSH), "ssh-stop needs a run; make ssh-stop RUN=id")
    refused(assay("ssh-status"), "REMOTE_HOST is not set", "REMOTE_DIR is not set", ".env.example shows how")


def test_runs_of_an_empty_folder(assay: Any) -> None:
    done = assay("runs")
    assert done.returncode == 0 and "no runs in outputs/runs" in done.stdout
    assert assay.left() == []


def test_two_runs_are_compared_without_a_heavy_import(assay: Any) -> None:
    for name, rate in (("a", 0.1), ("b", 0.2)):
        folder = assay.cwd / "outputs/runs" / name
        rows(folder / "manifest.json", {"stage": "train", "started": name, "status": "finished"})
        rows(folder / "config_used.yaml", {"lr": rate})
    assert assay("runs", "diff", "a", "b").stdout.splitlines()[-1].split() == ["lr", "0.1", "->", "0.2", "(+0.1)"]
    assert assay("runs", "--sort", "started").stdout.splitlines()[1].startswith("b  ")
    assert [line.split()[0] for line in assay("runs", "--run=a").stdout.splitlines()] == ["run", "a"]
    refused(assay("runs", "diff", "a", "c"), "there is no run c in outputs/runs")


def test_configurations_are_found_from_any_working_directory_and_those_in_it_come_first(assay: Any) -> None:
    assert "\nlora_r: 16\n" in assay("train", "--cfg", "job").stdout
    (assay.cwd / "configs/method").mkdir(parents=True)
    (assay.cwd / "configs/method/lora.yaml").write_text("# @package _global_\nmethod: lora\nlora_r: 5\n")
    (assay.cwd / "configs/method/mine.yaml").write_text("# @package _global_\n# mine\nmethod: dora\nlora_r: 6\n")
    (assay.cwd / "configs/eval.yaml").write_text("seed: 7\n")
    for words, line in (
        (["train", "method=lora"], "lora_r: 5"),
        (["train", "method=mine"], "lora_r: 6"),
        (["train", "method=qlora"], "method: qlora"),
        (["eval"], "seed: 7"),
        (["publish"], "force: false"),
    ):
        assert f"\n{line}\n" in assay(*words, "--cfg", "job").stdout
    assert "  mine                        mine [./configs]\n" in assay("list-configs").stdout
    refused(assay("train", "method=minee"), "method=minee is not a preset; did you mean mine?")
    (assay.cwd / "configs/train.yaml").symlink_to("nowhere")
    refused(assay("train"), "configs/train.yaml is no file; write it again, or remove it")


# Quick refusals


def test_an_unknown_stage_is_answered_with_a_guess(assay: Any) -> None:
    refused(assay("trian"), "trian is not a stage; did you mean train?")


def test_a_stage_similar_to_no_other_is_answered_with_the_list(assay: Any) -> None:
    refused(assay("xyzzy"), "xyzzy is not a stage; there are: check-data, plan, train, data-push, eval, ")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "epochz=2"], "epochz is not a setting; did you mean epochs?"),
        (["train", "+epochz=2"], "epochz is not a setting; did you mean epochs?"),
        (["train", "lr=abc"], "lr=abc: should be a number"),
        (["train", "epochs=-1"], "epochs=-1: should be greater than 0"),
        (["train", "method=qlorra"], "method=qlorra is not a preset; did you mean qlora?"),
        (["eval-baseline", "epochs=3"], "epochs is not a setting"),
        (["publish", "gate.metrics=bleu"], "gate.metrics is not a setting; did you mean gate.metric?"),
    ],
)
def test_wrong_words_are_refused(assay: Any, words: list[str], sentence: str) -> None:
    refused(assay(*words), sentence)
    assert assay.left() == []


def test_all_problems_are_reported_together(assay: Any) -> None:
    done = assay(
        "train", "epochz=2", "+lorar=3", "lr=abc", "epochs=-1", "--foo", "metod=x", "peft.alpha_patern={}"
    )
    refused(
        done,
        "epochz is not a setting; did you mean epochs?",
        "lorar is not a setting; did you mean lora_r?",
        "lr=abc: should be a number",
        "epochs=-1: should be greater than 0",
        "--foo is not a flag of train",
        "metod is not a setting; did you mean method?",
        "peft.alpha_patern is not an argument of LoraConfig; did you mean alpha_pattern?",
    )
    assert done.stderr.count("train ARGS=--help lists every setting") == 1
    assert assay.left() == []


# Refusals of stages before their heavy imports


@pytest.mark.parametrize(
    ("words", "sentences"),
    [
        (["dataset_path=rows", "dataset_pattern=bad.jsonl"], ["bad.jsonl:2 ", "bad.jsonl:3 "]),
        (["dataset_path=empty"], ["no file in empty matches *.jsonl: it is empty"]),
        (["dataset_path=rows", "dataset_pattern=*.csv"], ["no file in rows matches *.csv: it holds bad.jsonl"]),
        (["dataset_path=nowhere"], ["dataset_path nowhere is not a folder"]),
        (["dataset_path=rows", "dataset_pattern=good.jsonl", "model_name=models/nope"], ["models/nope"]),
        (["data_source.type=lakefs"], ["data_source.type=lakefs names no server"]),
        (
            ["dataset_path=rows", "dataset_pattern=good.jsonl", "model_name=./rounded", "method=full"],
            ["method=full cannot train ./rounded, whose weights are quantised"],
        ),
    ],
)
def test_training_is_refused_before_torch(assay: Any, words: list[str], sentences: list[str]) -> None:
    rows(assay.cwd / "rows/good.jsonl", GOOD)
    rows(assay.cwd / "rows/bad.jsonl", GOOD, {"messages": []}, {"messages": [GOOD["messages"][0]]})
    (assay.cwd / "empty").mkdir()
    (assay.cwd / "rounded").mkdir()
    header = b'{"w": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'
    (assay.cwd / "rounded/model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (assay.cwd / "rounded/config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    before = assay.left()
    # a local model is looked at before the rows
    refused(assay("train", "model_name=org/model", *words, forbidden=TORCH_FAMILY), *sentences)
    assert [path for path in assay.left() if not f"{path}/".startswith(("outputs/", "outputs/cache/"))] == before
    assert not (assay.cwd / "outputs" / "runs").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["eval"], "no finished run in outputs/runs"),
        (["eval-baseline", "metrics=[nope]"], "nope"),
        (["eval-baseline", "splits=[test]", "model_name=models/nope"], "models/nope"),
        (["publish"], "no finished run in outputs/runs"),
        (["compare"], "no runs in outputs/runs; make train makes one"),
    ],
)
def test_the_other_stages_are_refused_before_torch(assay: Any, words: list[str], sentence: str) -> None:
    rows(assay.cwd / "data/eval/test.jsonl", PAIR)
    before = assay.left()
    refused(assay(*words, forbidden=TORCH_FAMILY), sentence)
    assert assay.left() == before


# The environment and arguments of a stage

PROBED = """
import sys
from src import main
main.STAGES["train"] = main.STAGES["train"]._replace(function="probe:train", check="")
sys.exit(main.main(["train", *sys.argv[1:]]))
"""


def probe(assay: Any, body: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the stage `train` with the function of `body` instead of the real one."""
    (assay.site / "probed.py").write_text(PROBED)
    (assay.site / "probe.py").write_text(body)
    tool = assay.site / "nvidia-smi"
    tool.write_text(EVERY_GPU)
    tool.chmod(0o755)
    variables.setdefault("PATH", f"{assay.site}{os.pathsep}{os.environ['PATH']}")
    return assay(*words, module="probed", **variables)


EVERY_GPU = (  # an nvidia-smi that reports every GPU of the query
    "#!/bin/sh\nfor each in $(echo ${1#--id=} | tr , ' '); do echo 'NVIDIA H100, 81559, 9.0, 580'; done\n"
)


SEEN = """
import os
seen = os.environ["CUDA_VISIBLE_DEVICES"]
def train(config):
    print(repr((seen, config.cuda_visible_devices)))
"""


@pytest.mark.parametrize(
    ("words", "devices"),
    [([], "0"), (["cuda_visible_devices='2,3'"], "2,3"), (["cuda_visible_devices="], ""), (["hardware=cpu"], "")],
)
def test_the_gpus_are_chosen_before_the_stage_is_imported(assay: Any, words: list[str], devices: str) -> None:
    done = probe(assay, SEEN, *words)
    assert done.stdout == repr((devices, devices)) + "\n", done.stderr


@pytest.mark.parametrize(("words", "seen"), [([], None), (["deterministic=true"], ":4096:8")])
def test_cublas_is_made_deterministic_before_the_stage_is_imported(
    assay: Any, words: list[str], seen: str | None
) -> None:
    body = "import os\nseen = os.environ.get('CUBLAS_WORKSPACE_CONFIG')\ndef train(config):\n    print(seen)\n"
    done = probe(assay, body, *words)
    assert done.stdout == f"{seen}\n", done.stderr


def test_the_environment_chooses_the_gpus_where_nobody_else_does(assay: Any) -> None:
    assert probe(assay, SEEN, CUDA_VISIBLE_DEVICES="5").stdout == repr(("5", "5")) + "\n"
    assert probe(assay, SEEN, "cuda_visible_devices=1", CUDA_VISIBLE_DEVICES="5").stdout == repr(("1", "1")) + "\n"


def test_dotenv_is_loaded_and_the_environment_wins_over_it(assay: Any) -> None:
    (assay.cwd / ".env").write_text('export CUDA_VISIBLE_DEVICES="7"\nexport HF_TOKEN=hf_from_the_file\n')
    body = SEEN + "    print(os.environ['HF_TOKEN'], os.environ['HF_TOKEN'][::-1])\n"
    assert probe(assay, body).stdout == repr(("7", "7")) + "\n${oc.env:HF_TOKEN} elif_eht_morf_fh\n"
    done = probe(assay, body, CUDA_VISIBLE_DEVICES="1", HF_TOKEN="hf_from_outside")
    assert done.stdout == repr(("1", "1")) + "\n${oc.env:HF_TOKEN} edistuo_morf_fh\n"


def test_the_older_name_of_the_cache_is_honoured(assay: Any) -> None:
    body = "import os\ndef train(config): print(os.environ['HF_HUB_CACHE'])"
    assert probe(assay, body, TRANSFORMERS_CACHE="/old").stdout == "/old\n"
    assert probe(assay, body, TRANSFORMERS_CACHE="/old", HF_HUB_CACHE="/new").stdout == "/new\n"


def test_the_stage_decides_the_exit_code(assay: Any) -> None:
    assert probe(assay, "def train(config): return 3").returncode == 3


def test_a_sweep_ends_with_the_worst_exit_code_of_its_jobs(assay: Any) -> None:
    body = "def train(config): return 3 if config.seed == 2 else 0"
    assert probe(assay, body, "-m", "seed=1,2,3").returncode == 3


def test_a_user_error_is_one_sentence_without_secrets(assay: Any) -> None:
    body = (
        "import os\nfrom src.errors import DataError\n"
        "def train(config): raise DataError('no ' + os.environ['MY_TOKEN'], hint='give it')"
    )
    done = probe(assay, body, MY_TOKEN="correct-horse-battery")
    refused(done)
    assert done.stderr == "no ${oc.env:MY_TOKEN}; give it\n"


def test_an_interrupted_stage_is_no_crash(assay: Any) -> None:
    done = probe(assay, "def train(config): raise KeyboardInterrupt")
    assert done.returncode == 130 and done.stderr == "interrupted\nnext: make train\n"


def test_an_unexpected_exception_keeps_its_traceback(assay: Any) -> None:
    done = probe(assay, "def train(config): return 1 / 0")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "probe.py" in done.stderr and "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(
    ("word", "unbuffered"),
    [
        ("--help", ""),
        ("--help", "1"),
        ("version", ""),
        ("version", "1"),
    ],
)
def test_a_closed_pipe_is_no_crash(assay: Any, word: str, unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        done = assay(word, stdout=pipe, PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("words", [["runs"], ["runs", "--json"]])
def test_a_full_disk_is_one_sentence(assay: Any, words: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = assay(*words, stdout=full)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    where = "" if "--json" in words else " to /dev/full"
    assert done.stderr.splitlines()[-1].lower() == f"the output cannot be written{where}: no space left on device"


@pytest.mark.parametrize(
    "script", ["python -m src.main runs >&-", "PYTHONIOENCODING=ascii python -m src.main runs"]
)
def test_a_stdout_that_cannot_show_the_text_is_no_crash(tmp_path: Path, script: str) -> None:
    """A closed one, and one that knows ASCII only; a file name may also hold bytes that are no text."""
    run = tmp_path / "outputs" / "runs" / os.fsdecode(b"\xe6\xbc\xa2\xff")
    run.mkdir(parents=True)
    (run / "manifest.json").write_text("{}")
    done = subprocess.run(
        ["sh", "-c", script.replace("python", sys.executable)],
        cwd=tmp_path, env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    shown = "" if ">&-" in script else "\\u6f22\\udcff  its manifest.json cannot be read\n"
    assert done.stdout.endswith(shown) and bool(done.stdout) == bool(shown)
