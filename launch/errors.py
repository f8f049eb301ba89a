"""The launcher's exception for a user's mistake."""


class LaunchError(ValueError):
    """A job cannot be launched as it was described.

    The command line prints the message without a traceback and exits with 2.
    """
