"""The layers of a model: what one is, how they repeat, and how a segment passes through them."""
