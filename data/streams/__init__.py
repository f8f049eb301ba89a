"""Batches from a token cache: the order of the documents, their segments, and the data sources of a run."""
