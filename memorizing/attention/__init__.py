"""One mechanism a file: a frozen dataclass that configures it, its state, its layer."""
