"""The questions: one file each, the same word as its notebook, returning tidy tables of this run."""
