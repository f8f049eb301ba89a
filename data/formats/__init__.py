"""Files as they are distributed: archives, JSON lines, LaTeX sources, Isabelle theories, source code and its licences."""
