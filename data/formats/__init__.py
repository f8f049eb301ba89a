"""Files as they are distributed: archives, JSON lines, LaTeX, Isabelle theories, source code and its licences.

And what people have: folders of text in any encoding, HTML, EPUB, PDF, Parquet.
"""
