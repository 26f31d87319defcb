"""`push` and `ssh-...`: what a person types, and which part of this room does it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from src.errors import ConfigError, did_you_mean

if TYPE_CHECKING:  # Fabric is imported by commands that run, not by help
    from src.remote.connection import Connection

PREFIX = "ssh-"


class CommandLine(NamedTuple):
    """A command line: its flags with their values, and the rest as it was typed."""

    flags: dict[str, str]
    rest: list[str]

    @property
    def run(self) -> str | None:
        return self.rest[0] if self.rest else None


class Command(NamedTuple):
    """`flags` are those that it takes; `least` and `most` how many other words; `more` is what --help adds."""

    act: Callable[[Connection, CommandLine], int]
    summary: str
    flags: tuple[str, ...] = ()
    most: int = 0
    least: int = 0
    more: str = ""


def push(connection: Connection, words: CommandLine) -> int:
    from src.remote import push

    push.push(connection, also=_also(words))
    return 0


def init(connection: Connection, words: CommandLine) -> int:
    from src.remote import setup

    return setup.init(connection)


def status(connection: Connection, words: CommandLine) -> int:
    from src.remote import jobs, status_table

    status_table.print_table(jobs.known(connection), connection, everything="--all" in words.flags)
    return 0


def logs(connection: Connection, words: CommandLine) -> int:
    from src.remote import jobs

    jobs.follow(connection, jobs.named(connection, words.run)["id"], wait=False)
    return 0


def attach(connection: Connection, words: CommandLine) -> int:
    from src.remote import jobs

    return jobs.followed(connection, jobs.named(connection, words.run, running=True)["id"])


def stop(connection: Connection, words: CommandLine) -> int:
    from src.remote import jobs

    grace = words.flags.get("--grace") or str(jobs.GRACE)
    try:
        seconds = float(grace)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < float("inf"):
        raise ConfigError(f"GRACE={grace}: should be a number of seconds")
    print(jobs.told(jobs.stop(connection, jobs.named(connection, words.run, running=True), seconds)))
    return 0


def fetch(connection: Connection, words: CommandLine) -> int:
    from src.remote import fetch

    fetch.fetch(connection, fetch.named(connection, words.run))
    return 0


def shell(connection: Connection, words: CommandLine) -> int:
    from src.remote import tunnel

    return tunnel.shell(connection)


def tensorboard(connection: Connection, words: CommandLine) -> int:
    from src.remote import tunnel

    return tunnel.tensorboard(connection, words.flags.get("--port"))


def stage(name: str) -> Callable[[Connection, CommandLine], int]:
    """The command that runs the stage `name` on the server."""

    def act(connection: Connection, words: CommandLine) -> int:
        from src.remote import env_forwarding, jobs
        from src.remote import push as pushing
        from src.utils.secrets import redact_argv

        typed = redact_argv(words.rest)
        environment = env_forwarding.carried(typed, os.environ) | env_forwarding.columns()
        code = pushing.push(connection, also=_also(words), words=typed)
        argv = [jobs.PYTHON, "-m", "src.main", name, *typed]
        job = jobs.start(connection, name, argv, typed, environment, code, words.flags.get("--run"))
        done = "is there already:" if job["again"] else "started:"
        print(f"run {job['id']} {done} {connection.target}, process {job['pid']}", flush=True)
        if "--detach" in words.flags:
            print(f"make ssh-attach RUN={job['id']} follows it, make ssh-status lists all")
            return 0
        return jobs.followed(connection, job["id"])

    return act


def _also(words: CommandLine) -> list[str]:
    """Paths that are pushed though git ignores them: of ALSO, and of REMOTE_ALSO."""
    given = [words.flags.get("--also", ""), os.environ.get("REMOTE_ALSO", "")]
    return [path for listed in given for path in listed.split(",") if path]


RUN = "RUN is the id that ssh-status shows, of the run or of its directory, or the beginning of one"
COMMANDS = {
    "push": Command(
        push,
        "Sync the code to the server: what git would take, and nothing else.",
        ("--also",),
        more="--also=PATHS, or REMOTE_ALSO, adds paths that git ignores, with commas between.",
    ),
    "ssh-init": Command(
        init,
        "Make the server's environment, or what of it is missing.",
        more="Pushes, tells what the server is, and installs requirements.txt into REMOTE_DIR/.venv, torch "
        "first and\nmade for its GPU. REMOTE_PYTHON is the Python to use, REMOTE_TORCH_INDEX torch's index.",
    ),
    "ssh-status": Command(
        status,
        "List the runs on the server.",
        ("--all",),
        more="Those that run and the newest; --all lists every one.",
    ),
    "ssh-logs": Command(
        logs, "Print what a run on the server has said so far.", most=1, more=f"{RUN};\nthe newest without."
    ),
    "ssh-attach": Command(
        attach,
        "Follow a run on the server to its end.",
        most=1,
        more=f"{RUN};\nthe newest that runs without. Ctrl-C ends the following, not the run. "
        "The exit code is the run's.",
    ),
    "ssh-stop": Command(
        stop,
        "Have a run on the server save a checkpoint and end.",
        ("--grace",),
        most=1,
        least=1,
        more=f"{RUN}.\n--grace=SECONDS is how long it may take until it is killed, 300 without.",
    ),
    "ssh-fetch": Command(
        fetch,
        "Fetch a run, and prove that it arrived whole.",
        most=1,
        least=1,
        more=f"{RUN}, or latest.",
    ),
    "ssh-shell": Command(shell, "Open a shell in the server's folder, its environment activated."),
    "ssh-tensorboard": Command(
        tensorboard,
        "Show the server's TensorBoard here.",
        ("--port",),
        more="At http://localhost:6006, or the next free port, or --port=N; it ends with Ctrl-C, there too.",
    ),
}
STAGE_HELP = """\
on the server: pushes the code, starts the run apart from the connection, and follows it to its end.
  --detach      start it and come back
  --also=PATHS  push these too though git ignores them, with commas between
  --run=ID      the id of an earlier start: nothing is started that was"""
STAGE_FLAGS = ("--detach", "--also", "--run")
BARE = {"--detach", "--all"}


def run(name: str, argv: Sequence[str], stages: Sequence[str]) -> int:
    """Run one remote command. Returns: its exit code; that of the stage where one is followed to its end.

    Raises: UserError in a sentence.
    """
    command = _command(name, stages)
    words = _read(name, command, argv, strict=name in COMMANDS)
    from src.remote.connection import Connection
    from src.remote.target import RemoteTarget
    from src.utils.logs import start_logging

    start_logging()
    with Connection(RemoteTarget.of(os.environ)) as connection:
        return command.act(connection, words)


def _command(name: str, stages: Sequence[str]) -> Command:
    wanted = name.removeprefix(PREFIX)
    if name in COMMANDS:
        return COMMANDS[name]
    if name.startswith(PREFIX) and wanted in stages:
        return Command(stage(wanted), f"Run {wanted} on the server.", STAGE_FLAGS)
    known = [*COMMANDS, *(PREFIX + each for each in stages)]
    raise ConfigError(f"{name} is not a command{did_you_mean(name, known) or '; there are: ' + ', '.join(known)}")


def _read(name: str, command: Command, argv: Sequence[str], strict: bool) -> CommandLine:
    """Split a command line. What a stage takes is judged by the stage, on the server."""
    flags: dict[str, str] = {}
    rest: list[str] = []
    for word in argv:
        flag, equals, value = word.partition("=")
        if flag in command.flags and (equals or flag in BARE):
            flags[flag] = value
        elif word in command.flags:
            raise ConfigError(f"{word} needs a value: {word}=...")
        elif strict and not word:  # as of a variable that is not set
            continue
        elif strict and word.startswith("-"):
            raise ConfigError(f"{word} is not a flag of {name}; it takes: {', '.join(command.flags) or 'none'}")
        else:
            rest.append(word)
    if strict and len(rest) > command.most:
        raise ConfigError(f"{name} does not take {rest[-1]}")
    if strict and len(rest) < command.least:
        raise ConfigError(f"{name} needs a run", hint=f"make {name} RUN=id; make ssh-status lists them")
    return CommandLine(flags, rest)


# Help


def summaries() -> Iterator[tuple[str, str]]:
    """Every command with what it does."""
    for name, command in COMMANDS.items():
        yield name, command.summary
        if name == "ssh-init":
            yield "ssh-STAGE", "Run any of the stages there, as ssh-train lr=1e-4, and follow it."


def help_of(name: str, stages: Mapping[str, Any]) -> str:
    """What `NAME --help` says; `stages` is the door's table. Raises: ConfigError if there is no such command."""
    command = _command(name, list(stages))
    if name not in COMMANDS:
        from src.help import help_text

        stage = name.removeprefix(PREFIX)
        told = help_text(stage)
        return f"{told.replace(f'src.main {stage}', f'src.main {name} [--detach]', 1)}\n\n{STAGE_HELP}"
    words = [f"[{flag}]" if flag in BARE else f"[{flag}=...]" for flag in command.flags]
    words += ["RUN" if command.least else "[RUN]"] if command.most else []
    usage = " ".join(["usage: python -m src.main", name, *words])
    return "\n".join(filter(None, (usage, "", command.summary, command.more))).replace(usage, f"{usage}\n", 1)
