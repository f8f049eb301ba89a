"""What a run costs: counted on paper, and as the TPU compiler estimates it."""
