"""The number of processes and their rendezvous: from the settings, Slurm or torchrun; and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from src.config import load
from src.errors import ConfigError
from src.schema import TrainConfig
from src.stages import STAGES
from src.train import launch_plan
from src.train.launch_plan import LaunchPlan, expand_hosts, slurm_step
from src.utils.process_info import (
    ProcessInfo,
    inherited_settings,
    launch_env,
    launcher_command,
    launcher_pid,
    process_info,
)
from tests.conftest import AssayCommand
from tests.fixtures import jsonl

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "ENVIRONMENT"}:
            monkeypatch.delenv(name)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine whose nvidia-smi reports every GPU of the query."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\nfor each in $(echo ${1#--id=} | tr , ' '); do echo 'NVIDIA H100, 81559, 9.0, 580'; done\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


def config(**settings: Any) -> TrainConfig:
    found: TrainConfig = load("train", {"cuda_visible_devices": ""} | settings, STAGES["train"].problems)
    return found


def planned(**settings: Any) -> LaunchPlan | None:
    cfg = config(**settings)
    return launch_plan.plan_launch(cfg, cfg.cuda_visible_devices)


def refused(**settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        planned(**settings)
    return str(caught.value)


# --- from the settings -----------------------------------------------------------------------------------


def test_on_a_cpu_one_process_trains_unless_num_processes_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_plan, "cores", lambda: 2)
    assert planned() is None
    assert planned(num_processes=1) is None
    assert planned(num_processes=2) == LaunchPlan(2)
    assert refused(num_processes=3) == (
        "num_processes=3, but this machine has no GPU of cuda_visible_devices='' and 2 cores; "
        "set num_processes to 2 or less"
    )


def test_every_named_gpu_gets_a_process(gpus: None) -> None:
    assert planned(cuda_visible_devices="0") is None
    assert planned(cuda_visible_devices="0,1") == LaunchPlan(2)
    assert planned(cuda_visible_devices="0,1,2,3", num_processes=4) == LaunchPlan(4)
    for wrong in (1, 3):
        told = refused(cuda_visible_devices="0,1", num_processes=wrong)
        assert told.startswith(f"num_processes={wrong}, but cuda_visible_devices=0,1 names 2 GPUs; ")


def test_a_sharding_engine_is_started_by_a_launcher_even_for_one_process() -> None:
    assert planned(distributed="fsdp2", offload=True) == LaunchPlan(1)


def test_several_machines_connect_to_the_first() -> None:
    found = planned(num_nodes=2, node_rank=1, master_addr="gpu7", master_port=1234)
    assert found == LaunchPlan(1, 2, 1, "gpu7", 1234)
    assert planned(num_nodes=2, master_addr="gpu7") == LaunchPlan(1, 2, 0, "gpu7", 29500)
    assert refused(num_nodes=2) == "num_nodes=2 needs master_addr, the address of the machine of node_rank=0"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_processes": 0}, "num_processes=0: should be greater than or equal to 1"),
        ({"num_nodes": 2, "node_rank": 2}, "node_rank=2: should be less than num_nodes=2"),
        ({"offload": True}, "offload=true is not supported with distributed=ddp; choose fsdp2, zero2 or zero3"),
        (
            {"distributed": "fsdp2", "method": "qlora"},
            "method=qlora is not supported with distributed=fsdp2; choose one of lora, rslora, dora, ia3, full",
        ),
        (
            {"distributed": "zero3", "task": "seq2seq", "method": "full"},
            "task=seq2seq is not supported with distributed=zero3; choose ddp or zero2",
        ),
        (
            {"distributed": "fsdp"},
            "distributed=fsdp: should be one of ddp, fsdp2, zero2, zero3; did you mean fsdp2?",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**settings)
    assert caught.value.problems == (sentence,)


def test_deepspeed_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_plan, "find_spec", lambda name: None)
    assert "distributed=zero2 needs DeepSpeed, which is not installed; pip install" in refused(distributed="zero2")


def test_what_can_be_refused_is_refused_before_anything_heavy_is_loaded(assay: AssayCommand) -> None:
    jsonl(assay.cwd / "data" / "x.jsonl", [{"messages": []}])
    for words, sentence in {
        ("num_processes=4096",): "num_processes=4096, but this machine has no GPU",
        ("num_processes=2", "bf16=false", "model_name=somebody/model"): "x.jsonl: none of its 1 rows can be used",
    }.items():
        done = assay("train", "cuda_visible_devices=''", *words, forbidden=("torch", "transformers", "accelerate"))
        assert done.returncode == 2, done.stderr
        assert sentence in done.stderr
    assert not (assay.cwd / "outputs" / "runs").exists()


# --- from torchrun ---------------------------------------------------------------------------------------


def test_a_process_that_torchrun_started_joins(monkeypatch: pytest.MonkeyPatch, gpus: None) -> None:
    assert process_info() == ProcessInfo(0, 1, 0, False)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert process_info() == ProcessInfo(5, 8, 1, True)
    assert not process_info().is_main
    assert planned(num_processes=2, cuda_visible_devices="0,1") is None
    assert "process 1 of this machine has no GPU: cuda_visible_devices=0 names 1" in refused(
        cuda_visible_devices="0"
    )


# --- from Slurm ------------------------------------------------------------------------------------------

SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_NODEID": "1",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NODELIST": "gpu[07-08]",
}


def test_under_srun_machines_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    assert planned() == LaunchPlan(1, 2, 1, "gpu07", 24711)
    assert planned(master_addr="10.0.0.7", master_port=99) == LaunchPlan(1, 2, 1, "10.0.0.7", 99)


def test_a_batch_script_that_has_not_called_srun_trains_alone() -> None:
    batch = {k: v for k, v in SRUN.items() if k != "SLURM_STEP_ID"} | {"ENVIRONMENT": "BATCH"}
    assert slurm_step(batch) is None
    assert slurm_step(SRUN | {"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}) is None
    assert slurm_step({}) is None


def test_the_step_counts_and_not_the_job() -> None:
    smaller = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "b[1,3]"}
    found = slurm_step(SRUN | {"SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "4"} | smaller)
    assert found is not None
    assert (found.nodes, found.first_host) == (2, "b1")


def test_several_tasks_a_machine_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        slurm_step(SRUN | {"SLURM_NTASKS": "16"})
    assert str(caught.value).startswith("srun started 16 tasks on 2 machines; start one task a machine")


@pytest.mark.parametrize(
    ("listed", "names"),
    [
        ("login", ["login"]),
        ("a,b", ["a", "b"]),
        ("gpu[01-03,7],login", ["gpu01", "gpu02", "gpu03", "gpu7", "login"]),
        ("gpu[098-101]", ["gpu098", "gpu099", "gpu100", "gpu101"]),
        ("rack[1-2]n[1,4]-ib", ["rack1n1-ib", "rack1n4-ib", "rack2n1-ib", "rack2n4-ib"]),
        ("dgx-a-[1-2].site", ["dgx-a-1.site", "dgx-a-2.site"]),
        ("", []),
    ],
)
def test_a_list_of_hosts_is_read_as_slurm_writes_it(listed: str, names: list[str]) -> None:
    assert list(expand_hosts(listed)) == names


# --- the settings of the workers ----------------------------------------------------------------------------


def test_the_settings_arrive_unchanged_and_hold_no_secret_in_transit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "hunter2-hunter2")
    weights = {"ä \"' $x": 2.0}
    cfg = config(checkpoint_mirror="s3://hunter2-hunter2/x", loss="weighted", class_weights=weights, seed=7)
    command = ["python", "-m", "src.main", "train", "checkpoint_mirror=s3://hunter2-hunter2/x"]
    packed = launch_env(asdict(cfg), command)
    assert inherited_settings() is None
    for name, value in packed.items():
        monkeypatch.setenv(name, value)
    assert launcher_pid() == os.getpid()
    assert load("train", inherited_settings() or {}) == cfg
    assert "hunter2" not in str(launcher_command())
    monkeypatch.delenv("MY_API_KEY")
    assert "hunter2" not in str(inherited_settings())


def test_a_process_whose_launcher_has_ended_does_nothing() -> None:
    """The process is a grandchild of the test: a shell is between them."""
    script = "import sys; from src.main import main; code = main(['train']); print('went on'); sys.exit(code)"
    orphan = subprocess.run(
        ["sh", "-c", '"$0" -c "$1"; code=$?; exit $code', sys.executable, script],
        env={**os.environ, **launch_env(asdict(config()), ["train"]), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (orphan.returncode, orphan.stdout, orphan.stderr) == (1, "", "")
