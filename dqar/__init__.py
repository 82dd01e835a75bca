"""Dynamic Quantized Attention Reuse in Diffusion Transformers: see README.md."""

from dqar.attention import DQARSession, apply_dqar, remove_dqar
from dqar.config import DQARConfig
from dqar.controller import Decision, DQARController

__version__ = "0.1.0"
__all__ = ["DQARConfig", "DQARController", "DQARSession", "Decision", "apply_dqar", "remove_dqar"]
