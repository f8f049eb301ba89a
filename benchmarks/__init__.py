"""What the figures in the README come from. `memorizing bench NAME` runs one of them."""
