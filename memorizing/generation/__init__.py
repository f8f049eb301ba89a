"""A finished run as a model of texts: reading, scoring, generating, sessions."""
