"""Text as token ids, and token ids in files: vocabularies, and the token cache."""
