"""How a model reads and writes: of any length, and how fast."""
