"""A run among processes, devices and files: how it starts, is watched, ends, and what it leaves behind."""
