"""A run as one HTML page: what was configured, what was measured, and where the time went."""
