"""Files as they are distributed: archives, JSON lines, LaTeX, Isabelle theories, source code and its licences."""
