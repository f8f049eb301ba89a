"""A run as its folder shows it, while it lives and afterwards: read without JAX, and without the arrays."""
