"""The figures and tables of the deck: one file a question, the same word as its notebook."""
