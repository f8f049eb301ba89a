"""What the command line does, one command a file.

Each has `add_arguments(parser)`, and `run(options, bindings)`, which returns the exit code.
"""
