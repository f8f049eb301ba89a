"""What is computed: pure functions and modules. No files, no processes, no clock on the wall."""
