"""Raw corpora as whole documents: a reader for each corpus, and the catalogue of all corpora by name."""
