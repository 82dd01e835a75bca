"""``dqar plan``: fits a forecast plan to a pipeline and prompts, or to a profile, and saves it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import DiffusionPipeline

from dqar.checks import check
from dqar.commands.parser import Parser, asked_profile
from dqar.forecast.fit import Calibration, Target, fit_plan
from dqar.forecast.ladder import PlanLadder
from dqar.forecast.plan import HISTORY_BITS, ForecastPlan
from dqar.forecast.profiles import calibrate_profile, profile_calls, with_provenance
from dqar.forecast.promise import Rule, check_promise
from dqar.models.pipelines import check_device, load_pipeline
from dqar.models.profiles import SCHEDULERS, profile_of

PIPELINE_OPTIONS = {
    "steps": "num_inference_steps=N",
    "call": "guidance_scale=S",
    "dtype": "dtype=NAME",
    "offload": "offload=true",
}
"""Those that say how a ``--pipeline`` is run, and the fields of a profile in their place."""


def run(arguments: list[str]) -> int:
    """Makes the plan and says what it saves and how near it comes, on images that it wasn't fitted on.

    Raises:
        ValueError: an argument isn't accepted, or ``--start`` has another number of steps.
        OSError: the weights, ``--prompts`` or ``--start`` can't be read, or ``--out`` can't be written.
    """
    parser = Parser("plan", "Fits a forecast plan: which steps to compute, and the weights that forecast the others.")
    parser.add_profile()
    parser.add_changes("weights", "device", "set")
    parser.add_argument(
        "--scheduler", choices=SCHEDULERS, metavar="NAME", help=f"{' '.join(SCHEDULERS)} (default: the profile's)"
    )
    pipeline = parser.add_argument_group("any pipeline of diffusers, in place of a profile")
    pipeline.add_argument("--pipeline", help="a folder, or a repository of the Hugging Face hub")
    pipeline.add_argument("--prompts", type=Path, help="a text file, one prompt a line")
    pipeline.add_argument("--steps", type=int, help="denoising steps (default: 50)")
    pipeline.add_argument("--call", help="the pipeline's other arguments, as JSON")
    pipeline.add_argument("--dtype", help="of the weights (default: bfloat16)")
    pipeline.add_argument("--offload", action="store_true", help="keep only the part at work on the GPU")
    parser.add_argument("--work", type=Path, help="a folder from which an interrupted fit goes on")
    parser.add_argument("--macs", type=float, default=3.0, help="least MAC reduction (default: 3)")
    targets = "all steps computed, or the converged solution of five times the steps (default: reference)"
    parser.add_argument("--target", choices=get_args(Target), default="reference", help=targets)
    parser.add_argument(
        "--images", dest="calls", metavar="N", type=int, default=120, help="calibration images, at most (default: 120)"
    )
    parser.add_argument(
        "--refinements", type=int, default=12, metavar="N", help="neighbouring sets of steps to try (default: 12)"
    )
    parser.add_argument(
        "--start", type=Path, metavar="PLAN", help="an earlier plan with as many computed steps, to be improved"
    )
    parser.add_argument(
        "--promise", type=float, nargs=2, metavar=("DB", "SHARE"),
        help="fits a ladder of plans: at least so many dB of PSNR to all steps computed in this share of images",
    )  # fmt: skip
    parser.add_argument(
        "--rule", choices=get_args(Rule),
        help="that chooses each image's plan of a --promise; policy: slide 7's network (default: linear)",
    )  # fmt: skip
    parser.add_argument(
        "--history-bits", type=int, choices=HISTORY_BITS, default=16,
        help="in which a run keeps what it forecasts from; fitted to them (default: 16, not quantized)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("plan.json"), help="the file to write (default: plan.json)")
    options = parser.parse_args(arguments)
    if options.promise:
        check_promise(*options.promise)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.out.is_dir():
        raise ValueError(f"--out {options.out} is not accepted: it is a folder, name a file in it")
    plan = _plan_of_pipeline(options) if options.pipeline else _plan_of_profile(options)
    plan.save(options.out)
    if isinstance(plan, PlanLadder):
        print(
            f"{options.out}: {', '.join(str(len(rung.computed)) for rung in plan.plans)} computed steps; {plan.promise}"
        )
        return 0
    # Latents in [-1, 1] have four times the squared error of images in [0, 1].
    error = min(trial["measured"] for trial in plan.provenance["trials"]) / 4
    quality = f"{-10 * math.log10(max(error, 1e-12)):.1f} dB to the {options.target} on images not fitted on"
    print(
        f"{options.out}: computes {len(plan.computed)} of {plan.num_inference_steps} steps, "
        f"{plan.macs_speedup:.2f}× fewer MACs; {quality}"
    )
    return 0


def _plan_of_profile(options: argparse.Namespace) -> ForecastPlan | PlanLadder:
    if options.prompts is not None:
        raise ValueError("--prompts is for a --pipeline: a profile has its own")
    for name, field in PIPELINE_OPTIONS.items():
        if getattr(options, name):
            raise ValueError(f"--{name} is for a --pipeline: of a profile, --set {field} changes that")
    profile = profile_of(asked_profile(options))
    if options.scheduler:
        profile = dataclasses.replace(profile, scheduler=options.scheduler)
    number, starts = _budget(options, profile.num_inference_steps)
    check_device(profile)
    pipe = load_pipeline(profile)
    if options.promise:
        ladder = _ladder(options, pipe, profile_calls(pipe, profile, options.calls), profile.num_inference_steps)
        return dataclasses.replace(ladder, plans=tuple(with_provenance(plan, profile) for plan in ladder.plans))
    calibration = calibrate_profile(pipe, profile, options.target, options.calls, options.work, options.history_bits)
    return with_provenance(calibration.plan(number, options.refinements, starts), profile)


def _plan_of_pipeline(options: argparse.Namespace) -> ForecastPlan | PlanLadder:
    if options.prompts is None:
        raise ValueError("--pipeline needs --prompts, a text file with one prompt a line")
    if options.scheduler:
        raise ValueError("--scheduler is for a --profile: save the pipeline with the scheduler it is used with")
    if options.weights or options.set:
        raise ValueError(f"--{'weights' if options.weights else 'set'} changes a profile, and --pipeline has none")
    steps = 50 if options.steps is None else options.steps
    number, starts = _budget(options, steps)
    try:
        shared = dict(json.loads(options.call or "{}"))
    except (ValueError, TypeError):
        raise ValueError(f"--call={options.call} is not accepted: a JSON object of the pipeline's arguments") from None
    dtype = getattr(torch, options.dtype or "bfloat16", None)
    check("--dtype", options.dtype, isinstance(dtype, torch.dtype), "a dtype of torch, such as bfloat16")
    prompts = [line.strip() for line in options.prompts.read_text().splitlines() if line.strip()][: options.calls]
    check("--prompts", str(options.prompts), len(prompts) >= 2, "two prompts or more, better 60 to 120")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = DiffusionPipeline.from_pretrained(options.pipeline, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    if options.offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    calls = [{"prompt": prompt, **shared} for prompt in prompts]
    if options.promise:
        return _ladder(options, pipe, calls, steps)
    bits = options.history_bits
    calibration = Calibration(pipe, calls, steps, options.target, work=options.work, history_bits=bits)
    return calibration.plan(number, options.refinements, starts)


def _ladder(options: argparse.Namespace, pipe: Any, calls: list[dict[str, Any]], steps: int) -> PlanLadder:
    """What keeps the promise; half the calls are kept to calibrate it."""
    ladder = fit_plan(
        pipe, calls, steps, options.macs, options.target,
        promise=tuple(options.promise), refinements=options.refinements, work=options.work,
        history_bits=options.history_bits, rule=options.rule or "linear",
    )  # fmt: skip
    assert isinstance(ladder, PlanLadder)
    return ladder


def _budget(options: argparse.Namespace, steps: int) -> tuple[int, list[tuple[int, ...]]]:
    """How many steps the plan computes, and the sets of steps to begin with."""
    check("--macs", options.macs, 1 <= options.macs <= steps / 2, "from 1 to half the steps")
    check("--images", options.calls, options.calls >= 2, "2 or more")
    check("--refinements", options.refinements, options.refinements >= 0, "0 or more")
    number = int(steps / options.macs)
    starts = [] if options.start is None else [tuple(sorted(ForecastPlan.load(options.start).computed))]
    if starts and len(starts[0]) != number:
        raise ValueError(f"{options.start} computes {len(starts[0])} steps, {number} are wanted")
    if options.rule and not options.promise:
        raise ValueError(f"--rule={options.rule} is not accepted: only with --promise, whose plans it chooses from")
    if starts and options.promise:
        raise ValueError("--start is for one plan: leave it out with --promise")
    return number, starts
