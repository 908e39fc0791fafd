"""The errors a user can meet, each with its exit code.

Every message is one clear sentence. Anything else that escapes is a bug and shows a traceback only with ``--debug``.
"""


class KvcliError(Exception):
    """Any failure that is not the user's input: a full disk, a port taken, an engine that stopped."""

    exit_code = 1


class UsageError(KvcliError):
    """Options that contradict one another or lie outside their range."""

    exit_code = 2


class InputError(KvcliError):
    """A model, data set or artifact that cannot be used."""

    exit_code = 3


class BudgetError(KvcliError):
    """A bit budget or a memory limit that cannot be met."""

    exit_code = 4
