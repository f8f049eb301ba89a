"""The one exception for a user's mistake, and the exit codes."""

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_START_AGAIN = 42


class UserError(ValueError):
    """Something the user gave cannot work.

    The message says what was given, what was expected and what to do, and names the flag or gin binding. The command line prints it without a traceback and exits with 2.
    """
