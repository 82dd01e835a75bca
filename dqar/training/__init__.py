"""The training of the embedded models, one file a subject; ``python -m dqar train`` is the command line."""
