"""The two ways in which a command can fail, and the exit code of each."""


class UsageError(Exception):
    """Something the user can mend by changing the command, the configuration or the data path: exit code 2.

    The message is one line: the setting, its value, what is allowed, one fix. Raised before anything is created.
    """

    exit_code = 2


class RunError(Exception):
    """A run that failed while running: exit code 1. The run directory stays resumable."""

    exit_code = 1


class SupersededError(RunError):
    """A newer attempt has taken over the run directory: this process must write nothing there any more."""
