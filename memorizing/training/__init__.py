"""Training: an experiment, its step, its checkpoints, and the loop that joins them."""
