"""The entry point: `python -m src.main STAGE key=value ...`.

At the top only the standard library is imported, and a package only when its command runs. So `--help`, `version`,
`list-configs` and the rejection of a wrong setting take a fraction of a second.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from typing import IO, Any

from . import NAME, VERSION, outcome
from .stages import STAGES, Stage, import_function
from .utils.commands import program

OLDEST_PYTHON = (3, 10)
UTILITIES = {
    "runs": "List the runs with their scores and verdicts, or compare two of them.",
    "list-configs": "List the configuration files and presets.",
    "completion": "Print the script of tab completion for a shell.",
    "schema": "Print the JSON schema of the YAML files of a stage, or of presets, for an editor.",
    "version": "Print the versions of Assay and of the libraries that it uses.",
}
# Commands whose only result is the text that they print.
PRINTED = {*UTILITIES, "plan", "check-data", "compare", "ssh-status", "ssh-logs"}
# Utilities that take words, with the function that returns their output, and what --help calls the words.
OUTPUT_OF = {
    "completion": (".completion:completion_command", "bash|zsh|fish"),
    "schema": (".json_schema:schema_command", "[STAGE]"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns: its exit code.
        0: done. 2: wrong input.
        3: not published, since the model is not better than its base or damaged; or a check of validate failed.
        4: not published, since the examples are too few to decide.
        75: a signal stopped the training run after a checkpoint; the same command resumes it.
        76: another process of the training run ended; its error is the cause.
        129: the terminal is gone (SIGHUP). 130: interrupted (SIGINT). 143: terminated (SIGTERM).
    """
    if sys.version_info < OLDEST_PYTHON:
        found, oldest = (".".join(map(str, version[:2])) for version in (sys.version_info, OLDEST_PYTHON))
        print(f"{sys.executable} is Python {found}; {NAME} needs {oldest} or newer", file=sys.stderr)
        return 2
    argv = outcome.take_flags(sys.argv[1:] if argv is None else argv)
    previous = _raise_on_signals()
    try:
        with outcome.streams() as documents:
            code, error = _run(argv)
            _end(argv, code, error, documents)
        return _report_lost_output(argv, code)
    except BrokenPipeError:  # of `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a stage names the file that it cannot write
        if error.errno != errno.ENOSPC or error.filename:
            raise
        print(f"the output cannot be written: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _run(argv: list[str]) -> tuple[int, dict[str, Any]]:
    """Run one command. Returns: its exit code and, if it failed, `error` (sentences) and `hint`."""
    from .errors import UserError

    try:
        code = _dispatch(argv[0], argv[1:]) if argv else _print_usage(2)
        sys.stdout.flush()
        return code, {}
    except UserError as error:
        return error.exit_code, {"error": list(error.problems), "hint": error.hint}
    except SystemExit as error:
        if not (outcome.output.ends_elsewhere and isinstance(error.code, int)):
            raise
        return error.code, {}
    except ModuleNotFoundError as error:
        if problem := _missing_library(error):
            return 2, problem
        raise
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return 2, {
            "error": [f"{_cut(error.filename)} is too long for a file name"],
            "hint": "choose a shorter one",
        }
    except Terminated as signalled:
        return 128 + signalled.number, {"error": [signalled.reason]}
    except KeyboardInterrupt:
        return 130, {"error": ["interrupted"]}


def _cut(name: object, most: int = 60) -> str:
    """The path or the word that is too long, as a sentence can show it."""
    text = os.fsdecode(name) if isinstance(name, bytes) else str(name)
    return text if len(text) <= most else f"{text[:most]}... ({len(text.encode(errors='replace')):,} bytes)"


def _missing_library(error: ModuleNotFoundError) -> dict[str, Any]:
    """`error` and `hint` of a library that is not installed; empty if a module of this package is missing."""
    from importlib.util import find_spec

    library = (error.name or "").partition(".")[0]
    if not library or library in sys.modules or library == __package__.partition(".")[0] or find_spec(library):
        return {}
    if os.path.isfile("requirements.txt") and os.path.isfile("src/main.py"):
        here = os.path.isfile(".venv/bin/python") and not sys.prefix.endswith(".venv")
        hint = "use .venv/bin/python" if here else "make install installs everything into .venv"
    else:
        hint = f"{sys.executable} -m pip install {library}"
    return {"error": [f"{library} is not installed for {sys.executable}"], "hint": hint}


def _end(argv: list[str], code: int, error: dict[str, Any], documents: IO[str]) -> None:
    """Print how the command ended: warnings, verdict or error, the next command; with --json the document too."""
    from .errors import UserError
    from .utils.secrets import redact, redact_argv

    text = str(UserError(*error["error"], hint=error.get("hint", ""))) if error else ""
    following = ""
    unfollowed = outcome.FOLLOWED not in os.environ
    if outcome.last_job().stage and not outcome.output.ends_elsewhere and unfollowed:
        from .next_command import next_line

        following = next_line(outcome.last_job(), code, redact_argv(_typed_words(argv)))
    outcome.print_end(str(redact(text)), following)
    if outcome.output.json:
        import json

        found = outcome.document(argv[0] if argv else "", code, error, following)
        print(json.dumps(redact(found), indent=2, default=str), file=documents, flush=True)


def _report_lost_output(argv: list[str], code: int) -> int:
    """Report what could not be printed. Returns: the exit code, which is 2 where the text was the result."""
    import logging

    from .utils import streams

    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if not (lost := streams.lost()):
        return code
    if code == 0 and (argv[0] in PRINTED or {"-h", "--help"} & set(argv)):
        print(f"the output cannot be written to {lost}", file=sys.stderr)
        return 2
    text = f"what was printed is incomplete, the result of the command is not: cannot write to {lost}"
    print(f"warning: {text}", file=sys.stderr)
    if logging.getLogger("assay").handlers:
        logging.getLogger("assay").warning("%s", text)
    return code


def _typed_words(argv: list[str]) -> list[str]:
    """The words after the stage, of this process or of its launcher."""
    from .utils.process_info import launcher_command

    typed = launcher_command() or argv
    typed = typed if argv[0] in typed else argv  # the launcher may be another program that calls `main`
    return [word for word in typed[typed.index(argv[0]) + 1 :] if word not in outcome.FLAGS]


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, handled like Ctrl-C: unfinished files are removed, the run is recorded as interrupted."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.reason = "terminated" if number == signal.SIGTERM else "the terminal is gone"
        super().__init__(self.reason)


def _raise_on_signals() -> dict[int, Any]:
    """Make SIGTERM and SIGHUP raise Terminated. Returns: the previous handlers, none outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return {}

    def terminate(number: int, frame: object) -> None:
        # Slurm sends SIGTERM several times, and SIGKILL after KillWait; shell and kernel both send SIGHUP
        if number == signal.SIGHUP or "SLURM_JOB_ID" in os.environ:
            signal.signal(number, signal.SIG_IGN)
        raise Terminated(number)

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup sets it
        numbers.append(signal.SIGHUP)
    return {number: signal.signal(number, terminate) for number in numbers}


def _print_usage(code: int) -> int:
    print(outcome.fit(usage(), sys.stdout))
    return code


def _dispatch(name: str, rest: list[str]) -> int:
    if name in {"-h", "--help", "help"}:
        return _print_usage(0)
    if name == "push" or name.startswith("ssh-"):
        return _run_remote(name, rest)
    if name not in {**STAGES, **UTILITIES}:
        from .errors import UserError, did_you_mean

        known = [*STAGES, *UTILITIES, "push", *(f"ssh-{stage}" for stage in STAGES)]
        raise UserError(f"{name} is not a stage{did_you_mean(name, known) or '; there are: ' + ', '.join(known)}")
    if name in UTILITIES:
        return _run_utility(name, rest)
    stage = STAGES[name]
    if {"-h", "--help"} & set(rest):
        from .help import help_text

        print(help_text(name, rest))
        return 0
    load_dotenv()
    if (settings := _inherited_settings()) is not None:
        from . import config

        return run_stage(name, stage, config.load(name, settings))
    from . import cli, cli_args

    return cli.run_jobs(cli_args.parse(name, rest), lambda config: run_stage(name, stage, config))


def run_stage(name: str, stage: Stage, config: object) -> int:
    """Set the environment of the libraries, then import and run the stage."""
    outcome.begin(name)
    folders = {
        name: str(getattr(config, name, None) or "") for name in ("output_dir", "artifacts_dir", "cache_dir")
    }
    outcome.report(output_dir=folders["output_dir"], folders={k: v for k, v in folders.items() if v})
    from .utils.logs import start_logging
    from .utils.process_info import process_info

    outcome.output.ends_elsewhere |= not process_info().is_main
    start_logging(silent=not process_info().is_main)
    if hasattr(config, "cuda_visible_devices"):  # before torch is imported
        os.environ["CUDA_VISIBLE_DEVICES"] = config.cuda_visible_devices
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # the order of nvidia-smi
    if getattr(config, "deterministic", False):  # read by cuBLAS at its first call
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # On a shared CPU, threads that spin while they wait make torch several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "TRANSFORMERS_CACHE" in os.environ:  # the former name of HF_HUB_CACHE
        os.environ.setdefault("HF_HUB_CACHE", os.environ["TRANSFORMERS_CACHE"])
    from .utils.usage_lock import using

    with using(*(getattr(config, key, "") or "" for key in ("output_dir", "artifacts_dir", "cache_dir"))):
        return import_function(stage.function)(config) or 0


def _run_utility(name: str, rest: list[str]) -> int:
    if name == "runs":
        from .runs_table import runs_output

        print(runs_output(rest))
        return 0
    if {"-h", "--help"} & set(rest):
        words = OUTPUT_OF[name][1] if name in OUTPUT_OF else ""
        print(f"usage: {program()} {name} {words}".rstrip() + f"\n\n{UTILITIES[name]}")
        return 0
    if name in OUTPUT_OF:
        print(import_function(OUTPUT_OF[name][0])(rest))
        return 0
    if rest:
        from .errors import UserError

        raise UserError(f"{name} does not take {rest[-1]}", hint=f"write {name}")
    if name == "version":
        print(version())
    else:
        from .help import list_configs

        print(list_configs())
    return 0


def _run_remote(name: str, rest: list[str]) -> int:
    """Run a command of src/remote: one about a server, or a stage on it."""
    if {"-h", "--help"} & set(rest):
        print(import_function(".remote.commands:help_of")(name, STAGES))
        return 0
    load_dotenv()
    run = import_function(".remote.commands:run")
    return int(run(name, rest, list(STAGES)))


def version() -> str:
    from .utils.environment import git_state, versions

    commit = git_state()["commit"]
    lines = [f"{NAME} {VERSION} (commit {commit or 'unknown'})"]
    installed = versions()
    python = sys.version.split()[0]
    outcome.report(document={"version": VERSION, "commit": commit, "python": python, "packages": installed})
    for package in ("torch", "transformers", "peft", "hydra-core", "sacrebleu"):
        lines.append(f"{package} {installed.get(package, 'not installed')}")
    return "\n".join([*lines, f"Python {python}"])


def usage() -> str:
    lines = [f"{NAME} {VERSION}: fine-tune a language model, prove that it is better, publish it.", ""]
    lines += [f"usage: {program()} STAGE [key=value ...]", "", "stages:"]
    lines += [f"  {name:<14} {stage.summary}" for name, stage in STAGES.items()]
    lines += [f"  {name:<14} {summary}" for name, summary in UTILITIES.items()]
    lines += ["", "on a server over SSH (REMOTE_HOST, REMOTE_DIR):"]
    lines += [f"  {name:<16} {summary}" for name, summary in import_function(".remote.commands:summaries")()]
    return "\n".join([*lines, "", f"{program()} STAGE --help lists the settings of a stage."])


def _inherited_settings() -> dict[str, object] | None:
    """The settings of the launcher of this process, None without one. The process ends with its launcher."""
    from .utils.process_info import inherited_settings, launcher_pid

    if (launcher := launcher_pid()) is not None:
        from .utils.workers import die_with_parent

        die_with_parent(launcher)
    return inherited_settings()


def load_dotenv() -> None:
    """Set the variables of `.env`, if it exists, unless they are set already."""
    if os.path.exists(".env"):
        from dotenv import load_dotenv

        load_dotenv(".env", override=False)


def run_process() -> int:
    """Run the command line of this process, which ends with it. Returns: the exit code."""
    from .utils import streams
    from .utils.process_info import mark_cli_process
    from .utils.secrets import redact_tracebacks
    from .utils.terminal import printable

    streams.guard()
    redact_tracebacks(printable)
    if not {"-m", "--multirun"} & set(sys.argv):
        mark_cli_process()
    return main()


def console() -> int:
    """The command `assay` of an installed package."""
    os.environ["ASSAY_PROGRAM"] = "assay"  # messages name commands as assay STAGE
    return run_process()


if __name__ == "__main__":
    sys.exit(run_process())
