"""Commands that look at runs, living and finished, without JAX."""
