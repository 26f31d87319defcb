"""CPU seconds of commands that must respond quickly: `python bench/command_line.py`.

User and system time of the child process, the minimum of five runs; the limit is 0.6.
"""

import os
import subprocess
import sys

COMMANDS = ["--help", "version", "list-configs", "train --help", "train epochz=2", "train +epochz=2 lr=abc",
            "train epochs=-1 method=lorra", "train --cfg job"]  # fmt: skip


def cpu_seconds(words: list[str]) -> float:
    before = os.times()
    subprocess.run([sys.executable, "-m", "src.main", *words], capture_output=True)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


for command in COMMANDS:
    print(f"{command:<32} {min(cpu_seconds(command.split()) for _ in range(5)):.2f} s")
