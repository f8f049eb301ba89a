"""What the TPU compiler estimates of programs for slices of TPUs, without a TPU."""
