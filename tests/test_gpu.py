"""The pipeline on an NVIDIA GPU: precision, 4-bit weights and answers. Skipped loudly where there is none."""

import shutil
import subprocess
from pathlib import Path

import pytest

from bench.plan_memory import case, measured
from tests.fixtures import World

pytest_plugins = ["tests.fixtures"]

HAS_GPU = bool(shutil.which("nvidia-smi")) and subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="NO NVIDIA GPU HERE: training and answering on a GPU is NOT tested"),
]

ON_GPU = ("cuda_visible_devices=0", "bf16=auto")


@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_the_peak_of_a_training_on_the_gpu_is_the_one_planned(
    smollm2: Path, tmp_path: Path, method: str, checkpointing: str
) -> None:
    words = (f"method={method}", f"gradient_checkpointing={checkpointing}", *ON_GPU)
    found = measured(case(str(smollm2), 400, 16, *words), tmp_path)
    assert abs(found.error) < 0.1, found


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_run_on_the_gpu_trains_in_bfloat16_and_is_evaluated(world: World, method: str) -> None:
    training = world.start("train", *ON_GPU, f"method={method}")
    said, _ = training.communicate()
    assert training.returncode == 0, said
    manifest = world.newest.manifest
    assert manifest["precision"]["value"] in {"bfloat16", "float16"}
    assert manifest["hardware"]["gpus"]
    answering = world.start("eval", *ON_GPU)
    said, _ = answering.communicate()
    assert answering.returncode == 0, said
