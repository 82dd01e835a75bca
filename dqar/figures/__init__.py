"""The figures and tables of the deck: one file a question, the same word as its notebook."""

from dqar.models.loggers import silence_torchao

silence_torchao()  # Every notebook imports its figures first.
