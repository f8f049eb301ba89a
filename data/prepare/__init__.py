"""From a raw corpus to a token cache, with one process or many: `memorizing prepare`."""
