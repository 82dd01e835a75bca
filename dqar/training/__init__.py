"""The training of the embedded models, one file a subject; ``dqar train`` is the command."""
