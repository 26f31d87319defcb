"""Every error that is the user's to mend, drawn at the top:

    UserError            exit code 2: one sentence of fact, one of remedy, no traceback
    ├── ConfigError      a setting is unknown, of the wrong type or out of range
    ├── DataError        a file or row cannot be used; names file:line
    ├── ModelError       a model, tokenizer or method cannot be used
    ├── RunError         a run directory is missing, unfinished or cannot be written
    │   ├── DivergedError  the loss is no number any more; to resume would end there again
    │   ├── OutOfMemory   the device has no room for a batch
    │   └── PeerLost       exit code 76: another process of the training ended; its error is the one to read
    ├── RemoteError      the server cannot be reached, or refuses
    │   └── LostConnection  it was reached, and is no more
    ├── Stopped          exit code 75: a signal ended the training after a checkpoint
    ├── NotPromoted      exit code 3: the tuned model is not better than its base
    └── Inconclusive       exit code 4: whether it is better cannot be told from these examples

Whatever is not a UserError nobody foresaw, and it keeps its traceback.
"""

from collections.abc import Iterable

MAX_LISTED = 20  # problems of one kind that an error or a log lists


class UserError(Exception):
    """Facts that the user can act on, and what to do about them.

    Args:
        problems: one sentence each, all that are wrong at once.
        hint: the remedy, said once after the facts.
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
