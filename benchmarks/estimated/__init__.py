"""Benchmarks of machines that are not here, as a compiler estimates them."""
