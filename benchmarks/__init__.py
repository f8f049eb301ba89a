"""What the figures in docs/ come from. `memorizing bench NAME` runs one of them."""
