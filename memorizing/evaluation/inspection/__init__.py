"""What a memory looked up for one document, as data and as a page."""
