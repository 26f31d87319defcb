"""The installed package: the command `assay` in an environment of its own, far from the checkout."""

from __future__ import annotations

import email
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from src import VERSION
from tests.fixtures import ROOT, World

pytest_plugins = ["tests.fixtures"]

try:
    import hatch_requirements_txt  # noqa: F401
    import hatchling  # noqa: F401
except ImportError:
    pytest.skip(
        "HATCHLING IS NOT INSTALLED: the package is NOT tested (requirements-dev.txt)", allow_module_level=True
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


class Installed:
    """An environment with the package, which sees the libraries of this one; commands run in an empty folder."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        self.programs, self.cwd = folder / "venv/bin", folder / "work"
        self.cwd.mkdir()
        venv.create(folder / "venv", symlinks=True)
        (packages,) = (folder / "venv/lib").glob("python*/site-packages")
        (packages / "libraries.pth").write_text(sysconfig.get_paths()["purelib"])
        command = [sys.executable, "-m", "pip", "--python", str(self.programs / "python"), "install", "--no-deps"]
        done = subprocess.run([*command, "--no-index", str(wheel)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def __call__(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        known = {name: os.environ[name] for name in ("HOME", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
        environment = known | {"PATH": f"{self.programs}:/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            ["assay", *words], cwd=self.cwd, env=environment | variables, capture_output=True, text=True,
            executable=str(self.programs / "assay"),
        )  # fmt: skip


@pytest.fixture(scope="module")
def assay(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(wheel, tmp_path_factory.mktemp("installed"))


def pins(*names: str) -> set[str]:
    """The requirements of files, without spaces and in lower case."""
    lines = [line for name in names for line in (ROOT / name).read_text().splitlines()]
    return {re.sub(r"\s", "", line).lower() for line in lines if line[:1].isalpha()}


def test_the_dependencies_are_those_of_the_requirements_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        about = email.message_from_bytes(archive.read(name))
        files = archive.namelist()
    assert about["Version"] == VERSION and about["Requires-Python"] == ">=3.10"
    found: dict[str, set[str]] = {}
    for text in about.get_all("Requires-Dist", []):
        requirement, _, extra = text.partition("extra == ")
        marker = re.sub(r"\s|;?\s*(and)?\s*$|[()]", "", re.sub(r"(;| and)\s*$", "", requirement.strip()))
        found.setdefault(extra.strip("'"), set()).add(marker.replace("'", '"').lower())
    assert found[""] == pins("requirements.txt")
    assert found["gpu"] == pins("requirements-gpu.txt") and found["onnx"] == pins("requirements-onnx.txt")
    assert found["deepspeed"] == pins("requirements-deepspeed.txt") and found["dev"] > found["onnx"]
    assert {path.split("/")[0] for path in files} == {"assay", f"assay-{VERSION}.dist-info"}
    here = [path for path in (ROOT / "configs").rglob("*") if path.is_file()]
    assert {f"assay/{path.relative_to(ROOT)}" for path in here} <= set(files)


def test_it_says_its_own_name_and_needs_a_checkout_for_a_push(assay: Installed) -> None:
    done = assay("train", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: assay train "), done.stderr
    assert assay("version").stdout.startswith(f"Assay {VERSION} (commit unknown)")
    done = assay("train", "epochz=2")
    assert done.returncode == 2 and "epochz is not a setting; did you mean epochs?" in done.stderr
    done = assay("push", REMOTE_HOST="localhost", REMOTE_DIR="/nowhere")
    assert done.returncode == 2 and "a push sends its code: run it in the checkout" in done.stderr
    done = assay("train", "launch=slurm", PATH=str(assay.programs))
    assert done.returncode == 2 and done.stderr.startswith("launch=slurm needs sbatch"), done.stderr


def test_a_search_trains_in_two_processes_and_its_model_is_evaluated_and_published(
    assay: Installed, world: World
) -> None:
    paths = [f"model_name={world.model}", f"dataset_path={world.data}", f"eval_path={world.splits}"]
    cpu = ["cuda_visible_devices=", "bf16=false"]
    done = assay("train", *paths, *cpu, "epochs=1", "num_processes=2", "search=lora", "search.trials=1")
    assert done.returncode == 0, done.stderr
    assert "next: assay eval 2" in done.stdout and "make " not in done.stdout
    run = assay.cwd / "outputs/runs/latest"
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["command"][:2] == ["assay", "train"] and manifest["code"]["commit"] is None
    done = assay("eval", *cpu, "max_new_tokens=4", "splits=[test]", "gate.guards=[]")
    assert done.returncode == 0 and (run / "comparison.json").is_file(), done.stderr
    done = assay("publish", cpu[0], "force=true")
    assert done.returncode == 0, done.stderr
    assert list((assay.cwd / "artifacts/models").rglob("adapter_model.safetensors"))
