"""The rivals: one file a library or paper, each with its settings and facts."""
