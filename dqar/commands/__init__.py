"""The subcommands of ``dqar``: one file each, with its options and what it prints; ``dqar.__main__`` calls them."""
