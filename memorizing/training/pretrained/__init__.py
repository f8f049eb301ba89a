"""Other people's models as runs of ours, and back."""
