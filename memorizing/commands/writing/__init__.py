"""Commands that read texts into a memory, and write on."""
