"""The exception of the data side that is the user's to mend."""

from memorizing.errors import UserError


class DataError(UserError):
    """A source, a cache or a setting of the data side cannot be used."""
