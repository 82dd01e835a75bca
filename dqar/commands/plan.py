"""``dqar plan``: fits a forecast plan to a profile's model, sampler and number of steps, and saves it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

from dqar.commands.parser import Parser
from dqar.config import check
from dqar.forecast.fit import make_plan
from dqar.forecast.plan import ForecastPlan
from dqar.forecast.steps import measure_gains
from dqar.forecast.trajectories import Target, trajectories
from dqar.models.pipelines import load_pipeline
from dqar.models.profiles import SCHEDULERS, get_profile


def run(arguments: list[str]) -> int:
    """Makes the plan and says what it saves and how near it comes, on images that it wasn't fitted on.

    Raises:
        ValueError: an argument isn't accepted, or ``--start`` has another number of steps.
        OSError: the weights or ``--start`` can't be read, or ``--out`` can't be written.
    """
    parser = Parser("plan", "Fits a forecast plan: which steps to compute, and the weights that forecast the others.")
    parser.add_profile()
    parser.add_argument("--scheduler", choices=SCHEDULERS, help="in place of the profile's")
    parser.add_argument("--macs", type=float, default=3.0, help="full compute's over the plan's, at least (default: 3)")
    targets = "all steps computed, or the converged solution of five times the steps (default: reference)"
    parser.add_argument("--target", choices=get_args(Target), default="reference", help=targets)
    parser.add_argument("--images", type=int, default=120, help="calibration images (default: 120)")
    parser.add_argument("--refinements", type=int, default=12, help="neighbouring sets of steps to try (default: 12)")
    parser.add_argument("--start", type=Path, help="an earlier plan with as many computed steps, to be improved")
    parser.add_argument("--out", type=Path, default=Path("plan.json"), help="the file to write (default: plan.json)")
    options = parser.parse_args(arguments)
    profile = get_profile(options.profile, **({"scheduler": options.scheduler} if options.scheduler else {}))
    check("--macs", options.macs, 1 <= options.macs <= profile.num_inference_steps / 2, "from 1 to half the steps")
    check("--images", options.images, options.images >= 2, "2 or more")
    check("--refinements", options.refinements, options.refinements >= 0, "0 or more")
    number = int(profile.num_inference_steps / options.macs)
    starts = [] if options.start is None else [tuple(sorted(ForecastPlan.load(options.start).computed))]
    if starts and len(starts[0]) != number:
        raise ValueError(f"{options.start} computes {len(starts[0])} steps, {number} are wanted")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(profile)
    states = trajectories(pipe, profile, options.target, options.images)
    gains = measure_gains(pipe, profile, states.first(8))
    plan = make_plan(pipe, profile, number, states, gains, options.refinements, starts)
    plan.save(options.out)
    # Images in [-1, 1] have four times the squared error of those in [0, 1].
    error = min(trial["measured"] for trial in plan.provenance["trials"]) / 4
    quality = f"{-10 * math.log10(max(error, 1e-12)):.1f} dB to the {options.target} on images not fitted on"
    print(
        f"{options.out}: computes {len(plan.computed)} of {plan.num_inference_steps} steps, "
        f"{plan.macs_speedup:.2f}× fewer MACs; {quality}"
    )
    return 0
