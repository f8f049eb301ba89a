"""Files of other people's weights, as named tensors: safetensors and GGUF.

Nothing in them is executed, and what their headers say is checked against the size of the file before anything is
allocated. Tensors are read one at a time.
"""
