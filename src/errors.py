"""Errors that the user can fix, with their exit codes.

    UserError              exit code 2: a problem and a hint, without a traceback
    ├── ConfigError        a setting is unknown, has the wrong type or is out of range
    ├── DataError          a file or row cannot be used; names file:line
    ├── ModelError         a model, tokenizer or method cannot be used
    ├── RunError           a run directory is missing or incomplete, or cannot be written
    │   ├── DivergedError  the loss is NaN or infinite; resuming would end the same way
    │   ├── OutOfMemory    a batch does not fit into the memory of the device
    │   └── PeerLost       exit code 76: another process of the training run ended; its error is the cause
    ├── RemoteError        the server cannot be reached, or refuses a request
    │   └── LostConnection the connection was interrupted
    ├── Stopped            exit code 75: a signal ended the training run after a checkpoint
    ├── NotPromoted        exit code 3: the tuned model is not better than its base, or a health check failed
    └── Inconclusive       exit code 4: the verdict is inconclusive (too few examples)

Any other exception is a bug and keeps its traceback.
"""

from collections.abc import Iterable

MAX_LISTED = 20  # problems of one kind that an error or a log lists


class UserError(Exception):
    """One or more problems and their remedy.

    Args:
        problems: one sentence each, all problems of one kind.
        hint: the remedy, printed once after the problems.
    """

    exit_code = 2

    def __init__(self, *problems: str, hint: str = "") -> None:
        self.problems = problems
        self.hint = hint
        super().__init__(*problems)

    def __str__(self) -> str:
        parts = [*self.problems, self.hint] if self.hint else list(self.problems)
        return ("; " if len(self.problems) == 1 else "\n").join(parts)


class ConfigError(UserError):
    pass


class DataError(UserError):
    pass


class ModelError(UserError):
    pass


class RunError(UserError):
    pass


class DivergedError(RunError):
    pass


class OutOfMemory(RunError):
    pass


class PeerLost(RunError):
    exit_code = 76  # EX_PROTOCOL of sysexits.h: the remote end broke off


class RemoteError(UserError):
    pass


class LostConnection(RemoteError):
    pass


class Stopped(UserError):
    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class NotPromoted(UserError):
    exit_code = 3


class Inconclusive(UserError):
    exit_code = 4


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean lora_r?` where one of `known` is close to `word`, else an empty string."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
