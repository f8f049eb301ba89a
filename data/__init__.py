"""The data side: corpora, vocabularies, the token cache and the streams that training reads.

A raw corpus becomes whole documents (`corpora`, with a reader each). `pipeline` reads them twice: `survey` finds out what
there is, `splits` and `vocabulary` are settled, and `tokenising` gives the documents to the seqio Task (`tasks`), whose
tokens go into a token cache (`cache_writer`, `token_cache`). From there documents are streamed segment by segment
(`streams`), in an order that is computed (`order`), for training (`sources`). Only `builders` and `tasks` import
TensorFlow, and only `prepare`'s processes import them.
"""
