"""Device and precision, chosen by what the hardware says of itself, each with its reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from src.errors import ConfigError
from src.utils import environment
from src.utils.environment import Gpu, choose_device, choose_dtype, choose_kernels, choose_tf32, gpus

ROOT = Path(__file__).resolve().parents[2]
H100 = "NVIDIA H100 80GB HBM3, 81559, 9.0, 550.54.15"
T4 = "Tesla T4, 15360, 7.5, 550.54.15"
A100 = "NVIDIA A100-SXM4-40GB, 40960, 8.0, 550.54.15"

# Answers as the real one does: the rows of --id, and an error for a number that no GPU has.
NVIDIA_SMI = """#!{python}
import sys
rows = {rows!r}
words = dict(w.split("=", 1) for w in sys.argv[1:])
assert words["--query-gpu"] == "name,memory.total,compute_cap,driver_version", words
assert words["--format"] == "csv,noheader,nounits", words
for number in words["--id"].split(","):
    if not number.strip().isdigit() or int(number) >= len(rows):
        print("No devices were found")
        sys.exit(6)
    print(rows[int(number)])
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`machine(*rows, flags)`: a machine with these GPUs and CPU flags."""

    def build(*rows: str, flags: str = "") -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        if rows:
            (folder / "nvidia-smi").write_text(NVIDIA_SMI.format(python=sys.executable, rows=rows))
            (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        monkeypatch.setattr(environment, "cpu_flags", lambda: frozenset(flags.split()))

    return build


def test_a_gpu_says_what_it_is(machine) -> None:
    machine(H100, T4)
    assert gpus("0") == [Gpu("NVIDIA H100 80GB HBM3", 81559, 9.0, "550.54.15")]
    assert [g.name for g in gpus("1,0")] == ["Tesla T4", "NVIDIA H100 80GB HBM3"]


def test_the_gpus_are_queried_once(machine, tmp_path: Path) -> None:
    machine(H100)
    asked = tmp_path / "bin" / "nvidia-smi"
    first = gpus("0")
    asked.write_text("#!/bin/sh\nexit 1\n")
    assert gpus("0") == first


@pytest.mark.parametrize("visible", ["", " ", "-1", "7"])
def test_a_gpu_that_is_not_visible_is_not_listed(machine, visible: str) -> None:
    machine(H100)
    assert gpus(visible) == []
    device = choose_device(visible)
    assert device.value == "cpu" and repr(visible) in device.reason


def test_a_machine_without_the_driver_has_no_gpu(machine) -> None:
    machine()
    assert gpus("0") == []
    assert choose_device("0").value == "cpu"


def test_the_gpu_is_chosen_with_its_name_and_memory(machine) -> None:
    machine(H100)
    device = choose_device("0")
    assert device.value == "cuda"
    assert "NVIDIA H100 80GB HBM3" in str(device) and "79 GiB" in str(device)


def test_a_gpu_that_shares_the_memory_of_its_cpu_is_a_gpu(machine) -> None:
    machine("NVIDIA GB10, [N/A], 12.1, 580.95.05")
    assert choose_device("0").value == "cuda"


@pytest.mark.parametrize(
    ("rows", "visible", "flags", "bf16", "dtype"),
    [
        ([H100], "0", "", "auto", "bfloat16"),
        ([H100], "0", "", True, "bfloat16"),
        ([H100], "0", "", False, "float16"),
        ([A100], "0", "", "auto", "bfloat16"),
        ([T4], "0", "", "auto", "float16"),
        ([T4], "0", "amx_bf16", "auto", "float16"),
        ([T4], "0", "", False, "float16"),
        ([H100, T4], "0,1", "", "auto", "float16"),
        ([H100, T4], "0", "", "auto", "bfloat16"),
        ([H100], "", "", "auto", "float32"),
        ([], "0", "avx2 avx512f", "auto", "float32"),
        ([], "0", "", False, "float32"),
        ([], "0", "avx2 avx512_bf16", "auto", "bfloat16"),
        ([], "0", "amx_bf16 avx2", True, "bfloat16"),
        ([], "0", "fp asimd bf16", "auto", "bfloat16"),
        ([], "0", "amx_bf16", False, "float32"),
    ],
)
def test_the_precision_is_what_the_weakest_part_can_do(
    machine, rows: list[str], visible: str, flags: str, bf16: bool | str, dtype: str
) -> None:
    machine(*rows, flags=flags)
    chosen = choose_dtype(bf16, visible)
    assert chosen.value == dtype
    assert f"bf16={str(bf16).lower()}" in chosen.reason


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([T4], "bf16=true is not supported by the hardware (Tesla T4, compute capability 7.5); set bf16=auto or "
               "bf16=false to use float16"),
        ([H100, T4], "Tesla T4, compute capability 7.5"),
        ([], "this CPU has no bfloat16 instructions); set bf16=auto or bf16=false to use float32"),
    ],
)  # fmt: skip
def test_bfloat16_is_refused_where_the_hardware_has_none(machine, rows: list[str], told: str) -> None:
    machine(*rows, flags="avx2")
    with pytest.raises(ConfigError) as caught:
        choose_dtype(True, ",".join(str(n) for n in range(len(rows))) or "0")
    assert told in str(caught.value)


def test_the_manifest_gets_the_hardware(machine) -> None:
    machine(A100)
    found = environment.hardware("0")
    assert found["gpus"] == [
        dict(name="NVIDIA A100-SXM4-40GB", memory_mib=40960, capability=8.0, driver="550.54.15")
    ]
    assert found["cores"] == len(os.sched_getaffinity(0)) and found["cpu"] and found["memory_gib"] > 0


def test_the_manifest_gets_the_versions_in_the_order_of_their_names() -> None:
    found = environment.versions()
    assert found["pytest"] == pytest.__version__
    assert list(found) == sorted(found, key=str.lower)


def test_without_git_the_commit_is_unknown(machine) -> None:
    machine()
    assert environment.git_state() == {"commit": None, "diff_sha256": None}


CALLER = "import json; from src.utils.environment import git_state; print(json.dumps(git_state()))"


def test_a_copy_of_the_code_knows_the_commit_that_it_was_made_of(tmp_path: Path) -> None:
    """Although it lies within the checkout of another project, and only where it is no checkout itself."""

    def git(*words: str, folder: Path = tmp_path) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)

    def told() -> dict[str, str | None]:
        done = subprocess.run([sys.executable, "-c", CALLER], cwd=copy, capture_output=True, text=True, check=True)
        return dict(json.loads(done.stdout))

    copy = tmp_path / "deep" / "copy"
    (copy / "src" / "utils").mkdir(parents=True)
    for name in ("__init__.py", "errors.py", "utils/__init__.py", "utils/environment.py"):
        shutil.copy(ROOT / "src" / name, copy / "src" / name)
    assert told() == {"commit": None, "diff_sha256": None}
    git("init")
    git("commit", "--allow-empty", "-m", "another project")
    state = {"commit": "c0ffee", "diff_sha256": "0ddba11"}
    (copy / "src" / "code.json").write_text(json.dumps(state))
    assert told() == state
    git("init", folder=copy)
    git("commit", "--allow-empty", "-m", "this project", folder=copy)
    own = told()
    assert own["commit"] not in (None, "c0ffee") and own["diff_sha256"] is None


def test_tf32_is_used_where_the_weakest_gpu_has_it(machine) -> None:
    machine(A100, T4)
    assert choose_tf32("auto", "0") == ("on", "tf32=auto, NVIDIA A100-SXM4-40GB has it")
    assert choose_tf32("auto", "0,1").value == "off"
    assert choose_tf32(False, "0") == ("off", "tf32=false")
    with pytest.raises(ConfigError, match="needs a GPU with TF32"):
        choose_tf32(True, "1")
    assert choose_tf32("auto", "").value == "off"


def test_liger_kernels_need_a_gpu_and_the_package(machine, tmp_path: Path, monkeypatch) -> None:
    machine(A100)
    assert choose_kernels("auto", "0") == ("plain", "liger-kernel is not installed")
    with pytest.raises(ConfigError, match="is not installed"):
        choose_kernels(True, "0")
    (tmp_path / "liger_kernel").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert choose_kernels("auto", "0") == ("liger", "installed")
    assert choose_kernels(False, "0").value == "plain"
    assert choose_kernels("auto", "").value == "plain"
    with pytest.raises(ConfigError, match="it needs a GPU"):
        choose_kernels(True, "")


def test_a_plan_for_another_machine_assumes_liger_only_if_the_setting_says_so(machine) -> None:
    machine()
    for setting, kernels in ((True, "liger"), ("auto", "plain"), (False, "plain")):
        assert choose_kernels(setting, "", planned_for="cuda").value == kernels


def test_the_memory_left_is_what_the_process_holds_and_may_still_take(machine) -> None:
    import psutil

    machine()
    left = environment.memory_available("cpu", "")
    assert environment.resident_bytes() < left.bytes <= psutil.virtual_memory().total
    assert "this process uses" in left.reason


def test_a_container_may_take_what_its_limit_leaves_and_its_cache_gives_up(tmp_path: Path) -> None:
    assert environment._cgroup_available(tmp_path) is None
    for name, text in (
        ("memory.max", "1000"),
        ("memory.current", "700"),
        ("memory.stat", "anon 1\ninactive_file 50\n"),
    ):
        (tmp_path / name).write_text(text)
    assert environment._cgroup_available(tmp_path) == 350
    (tmp_path / "memory.max").write_text("max\n")
    assert environment._cgroup_available(tmp_path) is None
