"""The door: `python -m src.main STAGE key=value ...`.

Only the standard library is imported here, and a room of the house only when its command runs, so that
`--help`, `version`, `list-configs` and a wrong key answer at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

from src import NAME, VERSION
from src.stages import STAGES, Stage, import_function

UTILITIES = {
    "runs": "List the runs with their scores and verdicts, or show in what two of them differ.",
    "list-configs": "List the configuration files and presets.",
    "version": "Print the versions of Assay and of what it stands on.",
}


def main(argv: list[str] | None = None) -> int:
    """Run one stage.

    Returns: its exit code. 0 done, or promoted and published; 2 wrong input; 3 not published: no better than the
    base, or unsound, or a check of validate did not pass; 4 not published: too few examples to tell; 75 a training
    that a signal stopped after a checkpoint, and that the same command goes on with; 130 interrupted (SIGINT), 143
    terminated (SIGTERM).
    """
    argv = sys.argv[1:] if argv is None else argv
    from src.errors import UserError

    before = _listen()
    try:
        code = _run(argv[0], argv[1:]) if argv else _usage(2)
        sys.stdout.flush()
        return code
    except UserError as error:
        from src.utils.secrets import redact

        print(redact(str(error)), file=sys.stderr)
        return error.exit_code
    except Terminated:
        print("terminated", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


class Terminated(KeyboardInterrupt):
    """SIGTERM, taken as Ctrl-C is: what is being written is tidied up, and the run says that it was stopped."""


def _listen() -> Any:
    """Have SIGTERM raise Terminated. Returns: what it did before, None where that is not ours to change."""
    if threading.current_thread() is not threading.main_thread():
        return None

    def terminate(number: int, frame: object) -> None:
        if "SLURM_JOB_ID" in os.environ:  # it comes by several ways, and Slurm itself ends what takes too long
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    return signal.signal(signal.SIGTERM, terminate)


def _usage(code: int) -> int:
    print(usage())
    return code


def _run(name: str, rest: list[str]) -> int:
    if name in {"-h", "--help", "help"}:
        return _usage(0)
    if name == "push" or name.startswith("ssh-"):
        return _remote(name, rest)
    if name not in {**STAGES, **UTILITIES}:
        from src.errors import UserError, did_you_mean

        known = [*STAGES, *UTILITIES, "push", *(f"ssh-{stage}" for stage in STAGES)]
        raise UserError(f"{name} is not a stage{did_you_mean(name, known) or '; there are: ' + ', '.join(known)}")
    if name in UTILITIES:
        return _utility(name, rest)
    stage = STAGES[name]
    if {"-h", "--help"} & set(rest):
        from src.help import help_text

        print(help_text(name))
        return 0
    _load_dotenv()
    if (settings := _handed()) is not None:
        from src import config

        return _call(stage, config.load(name, settings))
    from src import cli, cli_args

    return cli.run_jobs(cli_args.parse(name, rest), lambda config: _call(stage, config))


def _call(stage: Stage, config: object) -> int:
    """Import the stage's room and run it."""
    from src.utils.logs import start_logging
    from src.utils.process_info import process_info

    start_logging(silent=not process_info().is_main)
    if hasattr(config, "cuda_visible_devices"):  # has effect only before torch is imported
        os.environ["CUDA_VISIBLE_DEVICES"] = config.cuda_visible_devices
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # the order of nvidia-smi
    if getattr(config, "deterministic", False):  # PyTorch asks for it once, at its first matrix product on a GPU
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Threads that wait by spinning make torch several times slower on a CPU that anything else uses.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "TRANSFORMERS_CACHE" in os.environ:  # the name that this cache had before
        os.environ.setdefault("HF_HUB_CACHE", os.environ["TRANSFORMERS_CACHE"])
    return import_function(stage.function)(config) or 0


def _utility(name: str, rest: list[str]) -> int:
    if name == "runs":
        from src.runs_table import answer

        print(answer(rest))
        return 0
    if {"-h", "--help"} & set(rest):
        print(f"usage: python -m src.main {name}\n\n{UTILITIES[name]}")
        return 0
    if rest:
        from src.errors import UserError

        raise UserError(f"{name} does not take {rest[-1]}", hint=f"write {name}")
    if name == "version":
        print(version())
    else:
        from src.help import list_configs

        print(list_configs())
    return 0


def _remote(name: str, rest: list[str]) -> int:
    """A command about a server, or a stage that runs there."""
    if {"-h", "--help"} & set(rest):
        print(import_function("src.remote.commands:help_of")(name, STAGES))
        return 0
    _load_dotenv()
    run = import_function("src.remote.commands:run")
    return int(run(name, rest, list(STAGES)))


def version() -> str:
    from src.utils.environment import git_state, versions

    lines = [f"{NAME} {VERSION} (commit {git_state()['commit'] or 'unknown'})"]
    installed = versions()
    for package in ("torch", "transformers", "peft", "hydra-core", "sacrebleu"):
        lines.append(f"{package} {installed.get(package, 'not installed')}")
    return "\n".join([*lines, f"Python {sys.version.split()[0]}"])


def usage() -> str:
    lines = [f"{NAME} {VERSION}: fine-tune a language model, prove that it is better, publish it.", ""]
    lines += ["usage: python -m src.main STAGE [key=value ...]", "", "stages:"]
    lines += [f"  {name:<14} {stage.summary}" for name, stage in STAGES.items()]
    lines += [f"  {name:<14} {summary}" for name, summary in UTILITIES.items()]
    lines += ["", "on a server over SSH, which REMOTE_HOST and REMOTE_DIR name:"]
    lines += [f"  {name:<16} {summary}" for name, summary in import_function("src.remote.commands:summaries")()]
    return "\n".join([*lines, "", "python -m src.main STAGE --help lists the settings of a stage."])


def _handed() -> dict[str, object] | None:
    """The settings that a launcher has handed to this process, which then ends with it."""
    from src.utils.process_info import inherited_settings, launcher_pid

    if (launcher := launcher_pid()) is not None:
        from src.utils.workers import die_with_parent

        die_with_parent(launcher)
    return inherited_settings()


def _load_dotenv() -> None:
    """Settings of `.env`, where it is present; the environment wins over it."""
    if os.path.exists(".env"):
        from dotenv import load_dotenv

        load_dotenv(".env", override=False)


if __name__ == "__main__":
    from src.utils.process_info import mark_cli_process
    from src.utils.secrets import redact_tracebacks

    redact_tracebacks()
    if not {"-m", "--multirun"} & set(sys.argv):
        mark_cli_process()
    sys.exit(main())
