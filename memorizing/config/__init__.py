"""From gin files to an experiment: what gin can configure, where its files are, what its errors mean."""
