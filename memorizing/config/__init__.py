"""Gin files and bindings become an experiment: what gin can configure, where its files are, and its errors in plain words."""
