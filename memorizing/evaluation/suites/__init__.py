"""Recall suites: what a finished run remembers, how far back, and against which controls."""
