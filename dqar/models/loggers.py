"""Quiet loggers for the command and the notebooks, whose processes are dqar's own; ``import dqar`` touches none."""

import logging


def silence_torchao() -> None:
    """No warnings about kernels of GPUs that aren't here: diffusers loads torchao wherever it is installed."""
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(name).setLevel(logging.ERROR)
