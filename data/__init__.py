"""The data side: corpora, vocabularies, the token cache and the streams that training reads.

A raw corpus becomes whole documents (`corpora`, with a reader each), which a TFDS builder and a seqio Task turn into
tokens (`builders`, `tasks`), which are kept in a token cache (`token_cache`), from which documents are streamed segment
by segment (`streams`). Only `builders` and `tasks` import TensorFlow; only `prepare` imports them.
"""
