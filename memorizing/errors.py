"""The one exception for a user's mistake, an error in one line, and the exit codes."""

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_START_AGAIN = 42


class UserError(ValueError):
    """Something the user gave cannot work.

    The message says what was given, what was expected and what to do, and names the flag or gin binding.
    The command line prints it without a traceback and exits with 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
