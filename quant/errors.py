"""The errors that users see. Everything else is an error of ours (exit code 70)."""

INPUT_ERROR = 2
"""Exit code of `InputError`."""

HANDED_OVER = 75
"""Exit code of a job that has offered its evaluation to others, and waits to be started again (EX_TEMPFAIL)."""


class InputError(Exception):
    """Wrong use, or an input that is missing or broken: exit code 2, one sentence, no traceback.

    The message says what is wrong, where, and how to mend it.
    """


class NotTrainable(InputError):
    """A network, or a part of it, that training cannot take: there is no differentiable counterpart of something."""


class Unavailable(InputError):
    """A model, data set or artifact that could not be had.

    Args:
        reason: what is missing and why, without a full stop.
        fix: what to do about it, ideally a command.
    """

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(f"{reason}. {fix}" if fix else reason)
        self.reason = reason
        self.fix = fix


class HandedOver(Exception):
    """No error: evaluations of many samples were left for others, as it was asked for (see `quant.shards`)."""
