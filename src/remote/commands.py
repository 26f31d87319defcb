"""The command line of `push` and `ssh-...`: flags, help, and the function that each command calls."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import outcome
from ..errors import ConfigError, did_you_mean
from ..utils.commands import PROGRAM, program
from ..utils.commands import command as command_line

if TYPE_CHECKING:  # Fabric is imported when a command runs; --help does not need it
    from .connection import Connection

PREFIX = "ssh-"


class CommandLine(NamedTuple):
    """The flags of a command with their values, and the other words as they were typed."""

    flags: dict[str, str]
    rest: list[str]

    @property
    def run(self) -> str | None:
        return self.rest[0] if self.rest else None


class Command(NamedTuple):
    """A remote command.

    flags: accepted flags.
    min_args, max_args: number of positional arguments.
    help: text that --help appends to the summary.
    """

    act: Callable[[Connection, CommandLine], int]
    summary: str
    flags: tuple[str, ...] = ()
    max_args: int = 0
    min_args: int = 0
    help: str = ""


def push(connection: Connection, line: CommandLine) -> int:
    from . import push

    push.push(connection, also=_also_paths(line))
    return 0


def init(connection: Connection, line: CommandLine) -> int:
    from . import setup

    return setup.init(connection, os.environ)


def status(connection: Connection, line: CommandLine) -> int:
    from . import jobs, status_table

    target = connection.target
    status_table.print_table(jobs.list_jobs(connection), str(target), target.dir, everything="--all" in line.flags)
    return 0


def logs(connection: Connection, line: CommandLine) -> int:
    from . import jobs

    jobs.follow(connection, jobs.find_job(connection, line.run)["id"], wait=False)
    return 0


def attach(connection: Connection, line: CommandLine) -> int:
    from . import jobs

    return jobs.follow_to_end(connection, jobs.find_job(connection, line.run, running=True)["id"])


def stop(connection: Connection, line: CommandLine) -> int:
    from . import jobs

    grace = line.flags.get("--grace") or str(jobs.GRACE_S)
    try:
        seconds = float(grace)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < float("inf"):
        raise ConfigError(f"GRACE={grace}: should be a number of seconds")
    job = jobs.stop(connection, jobs.find_job(connection, line.run, running=True), seconds)
    print(jobs.format_job(job))
    jobs.warn_if_full(connection, job)
    jobs.report_end(job)
    return 0


def fetch(connection: Connection, line: CommandLine) -> int:
    from . import fetch, jobs

    outcome.report(run=fetch.fetch(connection, jobs.find_run(connection, line.run)))
    return 0


def shell(connection: Connection, line: CommandLine) -> int:
    from . import tunnel

    return tunnel.shell(connection)


def tensorboard(connection: Connection, line: CommandLine) -> int:
    from . import tunnel

    return tunnel.tensorboard(connection, line.flags.get("--port"))


def stage(name: str) -> Callable[[Connection, CommandLine], int]:
    """The command that runs the stage `name` on the server."""

    def act(connection: Connection, line: CommandLine) -> int:
        from ..utils.secrets import to_references
        from . import jobs
        from .push import push as push_code

        typed = to_references(line.rest)
        environment = jobs.forwarded_env(typed, os.environ) | jobs.terminal_width() | {outcome.FOLLOWED: "1"}
        environment |= {outcome.QUIET: "1"} if outcome.output.quiet else {}
        environment |= {PROGRAM: os.environ[PROGRAM]} if PROGRAM in os.environ else {}
        code = push_code(connection, also=_also_paths(line), words=typed)
        argv = [jobs.PYTHON, "-m", "src.main", name, *typed]
        job = jobs.start(connection, name, argv, typed, environment, code, line.flags.get("--run"))
        what = "was already started on" if job["existed"] else "started on"
        print(f"run {job['id']} {what} {connection.target}, process {job['pid']}", flush=True)
        if "--detach" in line.flags:
            print(f"it runs in the background; {command_line('ssh-status')} lists all runs", flush=True)
            outcome.report(job=job["id"], detached=True)
            return 0
        return jobs.follow_to_end(connection, job["id"])

    return act


def _also_paths(line: CommandLine) -> list[str]:
    """Paths of ALSO and REMOTE_ALSO, which are pushed even if git ignores them."""
    given = [line.flags.get("--also", ""), os.environ.get("REMOTE_ALSO", "")]
    return [path for listed in given for path in listed.split(",") if path]


RUN = "RUN is the id of a run in ssh-status or of a run directory, or the first characters of it"
COMMANDS = {
    "push": Command(
        push,
        "Push the code to the server: the files that git tracks or would add.",
        ("--also",),
        help="--also=PATHS, or REMOTE_ALSO, adds paths that git ignores, separated by commas.",
    ),
    "ssh-init": Command(
        init,
        "Create or complete the server's Python environment.",
        help="Pushes, prints the server's hardware, and installs requirements.txt into REMOTE_DIR/.venv, first\n"
        "the build of torch for its GPU. REMOTE_PYTHON: the Python to use; REMOTE_TORCH_INDEX: torch's index.",
    ),
    "ssh-status": Command(
        status,
        "List the runs on the server.",
        ("--all",),
        help="Lists running runs and the newest ones; --all lists every run.",
    ),
    "ssh-logs": Command(
        logs, "Print the log of a run on the server.", max_args=1, help=f"{RUN}.\nWithout RUN: the newest run."
    ),
    "ssh-attach": Command(
        attach,
        "Follow a run on the server to its end.",
        max_args=1,
        help=f"{RUN}.\nWithout RUN: the newest running run. Ctrl-C stops following, not the run. "
        "The exit code is the run's.",
    ),
    "ssh-stop": Command(
        stop,
        "Stop a run on the server after it has saved a checkpoint.",
        ("--grace",),
        max_args=1,
        min_args=1,
        help=f"{RUN}.\n--grace=SECONDS: time until the run is killed (default 300).",
    ),
    "ssh-fetch": Command(
        fetch,
        "Download a run, and verify every file.",
        max_args=1,
        min_args=1,
        help=f"{RUN}, or latest.",
    ),
    "ssh-shell": Command(shell, "Open a shell in the server's folder, with the environment activated."),
    "ssh-tensorboard": Command(
        tensorboard,
        "Show the server's TensorBoard on this machine.",
        ("--port",),
        help="At http://localhost:6006, or the next free port, or --port=N. Ctrl-C also stops it on the server.",
    ),
}
STAGE_HELP = """\
on the server: pushes the code, starts a run that outlives the connection, and follows it to its end.
  --detach      start the run without following it
  --also=PATHS  also push these paths, even if git ignores them; separated by commas
  --run=ID      the id of the run; a run with this id is not started again"""
STAGE_FLAGS = ("--detach", "--also", "--run")
BARE_FLAGS = {"--detach", "--all"}  # without a value


def run(name: str, argv: Sequence[str], stages: Sequence[str]) -> int:
    """Run one remote command. Returns: its exit code, or that of the stage that it follows. Raises: UserError."""
    command = _command(name, stages)
    line = _parse(name, command, argv, strict=name in COMMANDS)
    from ..utils.logs import start_logging
    from .connection import Connection
    from .target import RemoteTarget

    start_logging()
    outcome.begin(name)
    with Connection(RemoteTarget.from_env(os.environ)) as connection:
        return command.act(connection, line)


def _command(name: str, stages: Sequence[str]) -> Command:
    wanted = name.removeprefix(PREFIX)
    if name in COMMANDS:
        return COMMANDS[name]
    if name.startswith(PREFIX) and wanted in stages:
        return Command(stage(wanted), f"Run {wanted} on the server.", STAGE_FLAGS)
    known = [*COMMANDS, *(PREFIX + each for each in stages)]
    raise ConfigError(
        f"{name} is not a command{did_you_mean(name, known) or '; the commands are: ' + ', '.join(known)}"
    )


def _parse(name: str, command: Command, argv: Sequence[str], strict: bool) -> CommandLine:
    """Split a command line. The settings of a stage (not `strict`) are checked by the stage, on the server."""
    flags: dict[str, str] = {}
    rest: list[str] = []
    for word in argv:
        flag, equals, value = word.partition("=")
        if flag in command.flags and (equals or flag in BARE_FLAGS):
            flags[flag] = value
        elif word in command.flags:
            raise ConfigError(f"{word} needs a value: {word}=...")
        elif strict and not word:  # from make, for a variable that is not set
            continue
        elif strict and word.startswith("-"):
            raise ConfigError(
                f"{word} is not a flag of {name}; its flags are: {', '.join(command.flags) or 'none'}"
            )
        else:
            rest.append(word)
    if strict and len(rest) > command.max_args:
        raise ConfigError(f"{name} does not accept the argument {rest[-1]}")
    if strict and len(rest) < command.min_args:
        raise ConfigError(f"{name} needs a run", hint=f"make {name} RUN=id; make ssh-status lists the ids")
    return CommandLine(flags, rest)


# Help


def summaries() -> Iterator[tuple[str, str]]:
    """Every command with its summary."""
    for name, command in COMMANDS.items():
        yield name, command.summary
        if name == "ssh-init":
            yield "ssh-STAGE", "Run any stage on the server, such as ssh-train lr=1e-4, and follow it."


def help_of(name: str, stages: Mapping[str, Any]) -> str:
    """The text of `NAME --help`; `stages` is the table of src/stages.py. Raises: ConfigError."""
    command = _command(name, list(stages))
    if name not in COMMANDS:
        from ..help import help_text

        stage = name.removeprefix(PREFIX)
        return f"{help_text(stage, shown_name=f'{name} [--detach]')}\n\n{STAGE_HELP}"
    words = [f"[{flag}]" if flag in BARE_FLAGS else f"[{flag}=...]" for flag in command.flags]
    words += ["RUN" if command.min_args else "[RUN]"] if command.max_args else []
    usage = " ".join([f"usage: {program()}", name, *words])
    return "\n".join(filter(None, (usage, "", command.summary, command.help))).replace(usage, f"{usage}\n", 1)
