"""Where metrics are shown: TensorBoard, and Weights & Biases for who asks for it.

A tracker has `write(step, values)`, values by name, and `close()`.
"""
