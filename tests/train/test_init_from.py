"""A training run goes on from a tuned model: its weights, its lineage, and combinations that are refused."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from src.data.trained_rows import FILE as TRAINED_ROWS
from src.errors import ModelError
from src.eval.report.lineage import lineage
from src.model import adapters, load, methods
from src.model.source import locate
from src.schema import MethodArgs
from tests.deploy.hub_server import model_hub
from tests.fixtures import World, call
from tests.fork_server import ForkServer, KillPoint
from tests.train.resume_cases import FIT, Stage, assert_resumes, end_of

pytest_plugins = ["tests.fixtures", "tests.fork_server", "tests.train.resume_cases"]

ONE_STEP = ("max_steps=1", "lr=1e-12")
LASTING = [name for name, m in methods.METHODS.items() if m.config and not m.final and not m.four_bit]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


@pytest.mark.parametrize("method", LASTING)
def test_a_model_of_every_method_goes_on_where_it_was(tiny: Path, tmp_path: Path, method: Any) -> None:
    source = locate(str(tiny))
    inputs = torch.arange(3, 12)[None]

    def model(parent: Path | None = None) -> Any:
        args = MethodArgs(method=method, lora_r=4, lora_dropout=0.0 if parent is None else 0.1)
        return adapters.apply_method(
            load.load_base(source, "float32", "cpu")[0], args, source, steps=9, parent=parent
        )

    load.seed_everything(1)
    first = model()
    for parameter in first.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) / 10
    first.save_pretrained(tmp_path)
    second = model(tmp_path)
    assert not torch.allclose(second.eval()(inputs).logits, first.eval()(inputs).logits)
    adapters.load_weights(second, tmp_path)
    assert torch.equal(second.eval()(inputs).logits, first.eval()(inputs).logits)
    assert adapters.count_parameters(second) == adapters.count_parameters(first)


def test_a_new_run_goes_on_from_a_finished_one(finished: World, world: World) -> None:
    parent = finished.newest
    first = world.train(f"init_from={parent.path}", *ONE_STEP)
    before, after = weights(parent.model), weights(first.model)
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[name], before[name], atol=1e-8) for name in before)
    facts = first.manifest
    assert facts["base_model"] == parent.manifest["base_model"]
    assert (facts["init_from"]["run"], facts["init_from"]["init_from"]) == (parent.id, None)
    assert (first.path / TRAINED_ROWS).stat().st_size > (parent.path / TRAINED_ROWS).stat().st_size
    second = world.train("init_from=latest", *ONE_STEP)  # the run just made, under its id: not the second itself
    assert second.settings["init_from"] == first.id != second.id
    shown = dict((label, text) for label, text, _ in lineage(second.manifest, {}))["Goes on from"]
    assert first.id in shown
    assert parent.id in shown


def test_the_parent_determines_the_model_over_the_shipped_file_only(
    finished: World, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of the model is typed. The file train.yaml says lora_r: 16, which is a default, not a wish."""
    own = world.output.parent / "own.yaml"
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text(f"lora_r: 4\nlora_alpha: 16\nmodel_name: {world.model}\n")
    words = [
        f"output_dir={world.output}", "cuda_visible_devices=''", "bf16=false", f"dataset_path={world.data}",
        "eval_path=none", f"init_from={finished.newest.path}", *ONE_STEP,
    ]  # fmt: skip
    assert call("train", *words) == 0
    used = world.newest.settings
    assert (used["lora_r"], used["model_name"]) == (8, str(world.model))
    capsys.readouterr()
    assert call("train", "--config-path", str(own.parent), "--config-name", "own", *words) == 2
    assert "lora_r is 4, but init_from=" in capsys.readouterr().err


def damaged(folder: Path) -> str:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    return f"init_from={folder.parent}"


def pickled(folder: Path) -> str:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    return f"init_from={folder}"


def unknown(folder: Path) -> str:
    return "init_from=nothere"


def without_record(folder: Path) -> str:
    return f"init_from={json.loads((folder / 'adapter_config.json').read_text())['base_model_name_or_path']}"


def other_kind(folder: Path) -> str:
    alone = shutil.copytree(folder, folder.parents[3] / "alone")
    settings = json.loads((alone / "adapter_config.json").read_text())
    (alone / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "VERA"}))
    return f"init_from={alone}"


REFUSED = {
    "rank": (None, ("lora_r=4",), "lora_r is 4, but init_from=RUN was trained with 8; leave lora_r out"),
    "method": (
        None,
        ("method=ia3",),
        "method is ia3, but init_from=RUN was trained with lora; leave method out, or",
    ),
    "full": (None, ("++method=full",), "publish it with export=merged and train with model_name="),
    "peft": (None, ("peft.bias=all",), 'peft is {"bias": "all"}, but init_from=RUN was trained with {}'),
    "task": (None, ("task=seq2seq",), "task is seq2seq, but init_from=RUN was trained with causal_lm"),
    "jobs": (None, ("--multirun", "seed=1,2", "init_from=latest"), "init_from=latest is another run for each job"),
    "damaged": (damaged, (), "have changed since they were trained; restore them"),
    "pickled": (pickled, (), "has no adapter_model.safetensors; pickled weights can run code"),
    "folder": (
        lambda folder: f"init_from={folder.parent.parent}",
        (),
        " has neither adapter_config.json nor config.json",
    ),
    "unknown": (unknown, (), "init_from=nothere: there is no run nothere"),
    "no record": (without_record, (), "is a model without the record of a training run; model_name="),
    "other kind": (other_kind, (), "is an adapter of the type VERA, which no method trains"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_combination_is_refused_before_a_run_is_made(
    copied: World, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words, expected = REFUSED[case]
    run = copied.newest
    word = make(run.model) if make else f"init_from={run.id}"
    given = [w for w in copied.settings("train") if not w.startswith(("lora_r", "lora_alpha"))]

    assert call("train", *given, word, *words) == 2
    error = capsys.readouterr().err
    assert expected.replace("RUN", run.id) in error
    assert "Traceback" not in error
    assert len(copied.runs) == 1


def test_another_base_model_is_refused(finished: World, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    other = shutil.copytree(world.model, world.output.parent / "other")
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"rope_theta": 5e5}))
    assert world.call("train", f"init_from={finished.newest.path}", f"model_name={other}") == 2
    assert "is not the base model of init_from=" in capsys.readouterr().err
    moved = shutil.copytree(world.model, world.output.parent / "moved")  # the same bytes
    world.train(f"init_from={finished.newest.path}", f"model_name={moved}", *ONE_STEP)


def test_weights_of_another_shape_are_refused_by_their_names(tiny: Path, tmp_path: Path) -> None:
    source = locate(str(tiny))

    def model(**settings: Any) -> Any:
        return adapters.apply_method(
            load.load_base(source, "float32", "cpu")[0], MethodArgs(**settings), source, steps=9
        )

    model(lora_r=4, lora_target_modules=["q_proj"]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"k_proj.* on one side only"):
        adapters.load_weights(model(lora_r=4, lora_target_modules=["q_proj", "k_proj"]), tmp_path)
    with pytest.raises(ModelError, match="size mismatch"):
        adapters.load_weights(model(lora_r=2, lora_target_modules=["q_proj"]), tmp_path)


def test_an_adapter_on_the_hub_is_pinned_to_its_commit(
    finished: World, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with model_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        repo = hub.create("me/tuned", private=False)
        files = {p.name: p.read_bytes() for p in finished.newest.model.iterdir()}
        commit = repo.commit(files, frozenset(), "adapter")
        given = [word for word in world.settings("train") if not word.startswith("lora_alpha")]
        assert call("train", *given, "init_from=me/tuned", *ONE_STEP) == 0
        hostile = files | {"adapter_config.json": b'{"base_model_name_or_path": "${oc.env:HOME}"}'}
        repo.commit(hostile, frozenset(), "x")
        capsys.readouterr()
        assert call("train", *given, "init_from=me/tuned@main") == 2
        assert "is an adapter of the type None" in capsys.readouterr().err
        assert call("train", *given, "init_from=me/gone") == 2
        assert "init_from=me/gone is no run and no folder here, and the Hub did not" in capsys.readouterr().err
    assert world.newest.settings["init_from"] == f"me/tuned@{commit}"
    before, after = weights(finished.newest.model), weights(world.newest.model)
    assert all(torch.allclose(after[name], before[name], atol=1e-8) for name in before)


def test_full_weights_go_on_and_are_compared_with_the_first_base(world: World) -> None:
    parent = world.train("method=full", "max_steps=3")
    child = world.train("init_from=latest", "method=full", *ONE_STEP)
    before, after = weights(parent.model), weights(child.model)
    assert all(torch.allclose(after[name], before[name], atol=1e-8) for name in before)
    assert child.manifest["base_model"]["name"] == str(world.model)
    checkpoint = next(parent.checkpoints.glob("checkpoint-*"))
    assert (
        world.train(f"init_from={checkpoint}", "method=full", *ONE_STEP).manifest["init_from"]["run"] == parent.id
    )


def test_a_killed_run_that_goes_on_from_another_resumes_to_the_same_bytes(
    finished: World, world: World, tmp_path: Path, fork_server: ForkServer
) -> None:
    words = (f"init_from={finished.newest.path}", "max_steps=6")
    quiet = Stage(world.elsewhere(tmp_path / "undisturbed"), fork_server)
    assert quiet(*words)[0] == 0
    stage = Stage(world, fork_server)
    code, said = stage(*words, moment=KillPoint(f"{FIT}:AssayTrainer.compute_loss", nth=9))
    assert code == -signal.SIGKILL, said
    assert "resuming after step 3" in assert_resumes(stage, end_of(quiet.world.newest), *words)


def test_a_run_resumes_with_smaller_batches_of_the_same_step(world: World, fork_server: ForkServer) -> None:
    """As after an out-of-memory error. Each step has the examples that it had."""
    from src.train.batch_sampler import BatchSampler, BatchShape

    lengths = [3, 9, 4, 5, 6, 7, 8, 2, 5, 99]  # the last batch of two is short, and has the longest row
    for epoch in (0, 1):
        old = BatchSampler(lengths, 4, 7).epoch_batches(epoch)
        new = BatchSampler(lengths, 2, 7, started_with=BatchShape(4, 1))
        pairs = new.epoch_batches(epoch)
        assert [pairs[i] + pairs[i + 1] for i in range(0, len(pairs), 2)] == old
        assert len(pairs) == len(new)
    stage = Stage(world, fork_server)
    code, said = stage("lora_dropout=0", moment=KillPoint(f"{FIT}:AssayTrainer.compute_loss", nth=9))
    assert code == -signal.SIGKILL, said
    code, said = stage("lora_dropout=0", "resume=latest", "batch_size=1", "gradient_accumulation_steps=3")
    assert code == 2
    assert "batch_size is 1, but the run was started with 2" in said
    code, said = stage("lora_dropout=0", "resume=latest", "batch_size=1", "gradient_accumulation_steps=4")
    assert code == 0, said
    assert "resuming with batch_size=1 x gradient_accumulation_steps=4 in place of 2 x 2" in said
    (run,) = world.runs
    assert run.manifest["resumed_with"] == {"batch_size": 1, "gradient_accumulation_steps": 4}
    assert json.loads((run.path / "metrics.json").read_text())["train"]["steps"] == 12
