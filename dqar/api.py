"""The public names, all of which ``dqar`` offers too."""

from dqar.attention import DQARSession, apply_dqar, remove_dqar
from dqar.config import CacheFormat, DQARConfig, Probe
from dqar.controller import Decision, DQARController
from dqar.families import describe_model
from dqar.forecast.fit import fit_plan
from dqar.forecast.ladder import PlanLadder
from dqar.forecast.plan import ForecastPlan, extrapolation
from dqar.plan import ReusePlan
from dqar.serving import RequestQueue

__all__ = [
    "CacheFormat",
    "DQARConfig",
    "DQARController",
    "DQARSession",
    "Decision",
    "ForecastPlan",
    "PlanLadder",
    "Probe",
    "RequestQueue",
    "ReusePlan",
    "apply_dqar",
    "describe_model",
    "extrapolation",
    "fit_plan",
    "remove_dqar",
]
