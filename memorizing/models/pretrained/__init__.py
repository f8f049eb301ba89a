"""Other people's checkpoints: what their configurations say, and the names and shapes of their tensors.

Pure: files are read in `memorizing.runtime.weight_files`.
"""
