"""The data side: from raw corpora to the batches that training reads.

A room imports only itself and what stands above it:

    documents, errors   what every room knows: a whole document, and what a user can do wrong
    formats             files as they are distributed: archives, JSON lines, LaTeX, Isabelle theories, source code, text
    corpora             a reader for each corpus, which yields whole documents, and the catalogue of all corpora
    tokens              vocabularies, and the token cache that holds tokenised documents on disk
    tasks               which tokens a document becomes (seqio, for published corpora), and which are held out
    streams             the order of the documents, their segments and batches, and the data sources of a run
    prepare             `memorizing prepare`: from a raw corpus to a token cache, in many processes or with Beam
    gin_registry        what gin files can name

Only `tasks.builders` and `tasks.seqio_tasks` import TensorFlow, and only the processes of `prepare` that tokenise a
published corpus import them, where they are installed. Of the library, `documents` to `prepare` import no more than
the words that all sides share, such as `memorizing.batch`.
"""
