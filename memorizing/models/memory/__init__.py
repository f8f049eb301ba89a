"""The external memory, and the search for its nearest slots."""
