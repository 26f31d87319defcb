"""Loading: safetensors only, no foreign code, and always a chat template, a padding and an end-of-turn token."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts import tiny_model
from src.errors import ModelError
from src.model import load
from src.model import tokenizer as tokenizer_of
from src.model.source import Source, locate, locate_tuned
from tests.fixtures import ANSWER, ROOT, World, tree

pytest_plugins = ["tests.fixtures"]


@pytest.fixture
def folder(tmp_path: Path, tiny: Path) -> Path:
    """A copy of the tiny model to be changed."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


def test_without_a_chat_template_the_default_one_is_used_logged_and_saved(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tiny_model.build(tmp_path / "bare", ["Top of feed rate?", ANSWER], chat_template=None)
    run = world.train(f"model_name={bare}", "max_steps=1")
    told = f"{bare} has no chat template: the default one (### Request / ### Answer) is used and saved"
    assert told in capsys.readouterr().out
    assert told in (run.logs / "run.log").read_text()
    assert (run.model / "chat_template.jinja").read_text() == tokenizer_of.DEFAULT_CHAT_TEMPLATE


def test_the_default_chat_template_reads_as_documented(tiny: Path) -> None:
    tokenizer = tokenizer_of.load_tokenizer(str(tiny))
    tokenizer.chat_template = tokenizer_of.DEFAULT_CHAT_TEMPLATE
    turns = [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "3+3?"},
    ]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "Count.\n\n### Request:\n2+2?\n\n### Answer:\n4<|end|>\n\n### Request:\n3+3?\n\n### Answer:\n"
    )


def test_a_tokenizer_without_padding_pads_with_its_end_token(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", pad_token=None)
    tokenizer = tokenizer_of.load_tokenizer(str(folder))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_tokenizer_without_an_end_token_is_refused(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ModelError, match="has no end-of-sequence token"):
        tokenizer_of.load_tokenizer(str(folder))


def test_pickled_weights_are_not_loaded_even_without_an_earlier_check(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load.load_base(Source(str(folder), folder, None), "float32", "cpu")


def foreign(folder: Path) -> Path:
    """Make the model one that needs code from its own repository. Returns the file that this code writes."""
    trace = folder / "was-run"
    auto = {"AutoConfig": "foreign.Foreign", "AutoModelForCausalLM": "foreign.Foreign"}
    edit(folder / "config.json", model_type="foreign", architectures=["Foreign"], auto_map=auto)
    (folder / "foreign.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    return trace


@pytest.mark.parametrize("stage", ["train", "eval-baseline"])
def test_code_of_a_model_repository_is_not_run_by_default(
    world: World, folder: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = foreign(folder)
    assert world.call(stage, f"model_name={folder}") == 2
    assert "review that code, then set trust_remote_code=true" in capsys.readouterr().err
    assert not trace.exists()
    assert not (world.output / "runs").exists()


@pytest.mark.parametrize("dtype", load.DTYPES)
def test_weights_are_loaded_in_the_given_precision(tiny: Path, dtype: str) -> None:
    model, _ = load.load_base(locate(str(tiny)), dtype, "cpu")
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}


def test_an_adapter_with_a_changed_base_is_rejected_unless_allowed(
    world: World, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = world.train(f"model_name={folder}", "max_steps=1")
    was = locate(str(folder)).revision
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    told = rf"the base model \S+ is now (sha256:\w+); the adapter was trained on {was}"
    before = tree(world.output)
    assert world.call("eval", str(run.path)) == 2
    assert re.search(f"{told}; restore the base model, or set allow_base_mismatch=true", capsys.readouterr().err)
    assert tree(world.output) == before
    assert world.call("eval", str(run.path), "allow_base_mismatch=true", "splits=[test]", "max_examples=2") == 0
    found = re.search(told, " ".join(capsys.readouterr().out.split()))
    assert found
    base = json.loads((run.path / "metrics.json").read_text())["base_model"]
    assert base == {"name": str(folder), "revision": found[1]}


def test_an_adapter_whose_base_is_gone_is_refused(
    world: World, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = world.train(f"model_name={folder}", "max_steps=1")
    shutil.rmtree(folder)
    assert world.call("eval", str(run.path)) == 2
    said = capsys.readouterr().err
    assert f"the base model of the adapter {run.model} cannot be used: " in said
    assert f"restore {folder}, which the adapter was trained on" in said


def test_the_base_of_full_weights_is_the_model_itself(tiny: Path) -> None:
    model, _, source = load.load_tuned(locate_tuned(tiny), "float32", "cpu")
    assert source == locate(str(tiny))
    assert not hasattr(model, "peft_config")


def test_a_corrupt_model_is_one_sentence(world: World, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.json").write_text('{"model_type": "no such model"}')
    assert world.call("train", f"model_name={folder}") == 2
    assert f"{folder} cannot be loaded: " in capsys.readouterr().err


@pytest.mark.smollm2
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="NO LINUX HERE: what is mapped is NOT tested")
def test_a_model_in_four_bits_lets_go_of_the_file_with_sixteen(smollm2: Path) -> None:
    """In a child process, since other tests may have the same file open."""
    code = (
        "import sys; from pathlib import Path; from src.model import load; from src.model.source import locate\n"
        "model, _ = load.load_base(locate(sys.argv[1]), 'bfloat16', 'cpu', four_bit=True)\n"
        "print('mapped' if 'model.safetensors' in Path('/proc/self/maps').read_text() else 'let go')"
    )
    done = subprocess.run([sys.executable, "-c", code, smollm2], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "let go", done.stderr
