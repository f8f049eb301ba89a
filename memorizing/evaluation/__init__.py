"""Evaluation: what a model is worth on held-out documents, while it trains and afterwards."""
