"""Dynamic Quantized Attention Reuse in Diffusion Transformers: see README.md."""

from dqar.attention import DQARSession, apply_dqar, remove_dqar
from dqar.config import CacheFormat, DQARConfig, Probe
from dqar.controller import Decision, DQARController
from dqar.families import describe_model
from dqar.forecast.plan import ForecastPlan, extrapolation
from dqar.plan import ReusePlan

__version__ = "0.1.0"
__all__ = [
    "CacheFormat",
    "DQARConfig",
    "DQARController",
    "DQARSession",
    "Decision",
    "ForecastPlan",
    "Probe",
    "ReusePlan",
    "apply_dqar",
    "describe_model",
    "extrapolation",
    "remove_dqar",
]
