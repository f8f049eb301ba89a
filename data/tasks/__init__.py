"""The seqio Tasks: which tokens a document becomes, and which documents are held out."""
