"""Which layers may reuse their cached attention at which denoising step (slide 8)."""

from __future__ import annotations

from typing import Literal, get_args

from dqar.checks import check_choice

ScheduleKind = Literal["depth_aware", "all", "none", "linear", "linear_reverse", "static"]

# Slide 8 names layers 0-2, 0-12 and all of 28; as fractions of depth the schedule fits any model.
SHALLOW, MIDDLE = 3 / 28, 13 / 28


def eligible_layers(
    step: int, total_steps: int, num_layers: int, kind: ScheduleKind = "depth_aware", static_interval: int = 2
) -> range:
    """The layers that may reuse at ``step``; ``progress = step / (total_steps - 1)``.

    - ``"depth_aware"`` (slide 8): the first 3/28 of the layers while progress < 0.3, the first 13/28 while < 0.7,
      then all;
    - ``"linear"``: the first ``progress`` of the layers; ``"linear_reverse"``: the last ``progress`` of them;
    - ``"static"``: all layers, except at every ``static_interval``-th step from the first on;
    - ``"all"`` and ``"none"``.

    Raises:
        ValueError: for an unknown kind, a step outside the run, or counts below 1.
    """
    check_choice("kind", kind, get_args(ScheduleKind))
    if num_layers < 1 or total_steps < 1 or not 0 <= step < total_steps:
        raise ValueError(
            f"step={step} of total_steps={total_steps} with num_layers={num_layers} is not accepted: "
            "needs num_layers >= 1 and 0 <= step < total_steps"
        )
    progress = step / max(total_steps - 1, 1)
    if kind == "depth_aware":
        fraction = SHALLOW if progress < 0.3 else MIDDLE if progress < 0.7 else 1.0
        return range(max(1, round(fraction * num_layers)))
    if kind == "linear":
        return range(round(progress * num_layers))
    if kind == "linear_reverse":
        return range(num_layers - round(progress * num_layers), num_layers)
    if kind == "static":
        return range(0 if step % static_interval == 0 else num_layers)
    return range(num_layers if kind == "all" else 0)
