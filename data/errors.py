"""The one exception of the data side that is the user's to mend."""


class DataError(ValueError):
    """A source, a cache or a setting cannot be used.

    The message says what was given, what was expected and what to do. The command line prints it without a traceback and exits with 2.
    """
