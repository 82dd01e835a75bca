"""The command line of the forecast engine: ``dqar plan`` makes a plan for a profile, or any pipeline and prompts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import DiffusionPipeline
from rich.console import Console

from dqar.config import check
from dqar.forecast.fit import Calibration, Target
from dqar.forecast.plan import ForecastPlan
from dqar.measure.results import provenance
from dqar.measure.sampling import conditions, noise_generators
from dqar.models.pipelines import load_pipeline
from dqar.models.profiles import SCHEDULERS, Profile, get_profile

PLAN_SEED = 500
"""Of the calibration images: of none that is compared later."""
BATCH = 8
"""Images of one calibration call of a profile."""


def profile_calls(
    pipe: DiffusionPipeline, profile: Profile, num_images: int, seed: int = PLAN_SEED
) -> list[dict[str, Any]]:
    """Calls for calibration images of all classes or captions in turn, with noises that ``sample`` draws them from."""
    return [
        {
            **conditions(pipe, images),
            "guidance_scale": profile.guidance_scale,
            "generator": noise_generators(seed, images),
        }
        for images in torch.arange(num_images).split(BATCH)
    ]


def calibrate_profile(
    pipe: DiffusionPipeline, profile: Profile, target: Target, num_images: int, work: Path | None = None
) -> Calibration:
    """The profile's calibration images, followed in full compute."""
    calls = profile_calls(pipe, profile, num_images)
    return Calibration(pipe, calls, profile.num_inference_steps, target, work=work)


def with_provenance(plan: ForecastPlan, profile: Profile) -> ForecastPlan:
    """The plan, saying also which profile it was made for."""
    return dataclasses.replace(plan, provenance={**plan.provenance, **provenance(profile, PLAN_SEED)})


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 for a wrong argument."""
    parser = argparse.ArgumentParser(prog="dqar plan", description=__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--profile", default="digits", help="see dqar/models/profiles.py (default: digits)")
    source.add_argument("--pipeline", help="a folder, or a repository of the Hugging Face hub, in place of a profile")
    parser.add_argument("--prompts", type=Path, help="with --pipeline: a text file, one prompt a line")
    parser.add_argument("--steps", type=int, default=50, help="with --pipeline: denoising steps (default: 50)")
    parser.add_argument("--call", default="{}", help="with --pipeline: its other arguments, as JSON")
    parser.add_argument("--dtype", default="bfloat16", help="with --pipeline: of the weights (default: bfloat16)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="with --pipeline")
    parser.add_argument("--offload", action="store_true", help="with --pipeline: what isn't at work leaves the GPU")
    parser.add_argument("--scheduler", help=f"in place of the profile's: one of {', '.join(SCHEDULERS)}")
    parser.add_argument("--macs", type=float, default=3.0, help="full compute's over the plan's, at least (default: 3)")
    parser.add_argument("--target", default="reference", help=f"{' or '.join(get_args(Target))} (default: reference)")
    parser.add_argument("--images", type=int, default=120, help="calibration images, at most (default: 120)")
    parser.add_argument("--refinements", type=int, default=12, help="neighbouring sets of steps to try (default: 12)")
    parser.add_argument("--start", type=Path, help="an earlier plan with as many computed steps, to be improved")
    parser.add_argument("--work", type=Path, help="keeps what was computed here: an interrupted fit goes on from there")
    parser.add_argument("--out", type=Path, default=Path("plan.json"))
    options = parser.parse_args(arguments)
    console = Console()
    try:
        plan = _plan_of_pipeline(options) if options.pipeline else _plan_of_profile(options)
        plan.save(options.out)
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        return 2
    error = min(trial["measured"] for trial in plan.provenance["trials"])
    # Latents in [-1, 1] have four times the squared error of images in [0, 1].
    quality = f"{-10 * math.log10(max(error / 4, 1e-12)):.1f} dB to the {options.target} on images not fitted on"
    console.print(
        f"{options.out}: computes {len(plan.computed)} of {plan.num_inference_steps} steps, "
        f"{plan.macs_speedup:.2f}× fewer MACs; {quality}",
        highlight=False,
    )
    return 0


def _plan_of_profile(options: argparse.Namespace) -> ForecastPlan:
    if options.prompts is not None:
        raise ValueError("--prompts is for a --pipeline: a profile has its own")
    changes = {"scheduler": options.scheduler} if options.scheduler else {}
    profile = get_profile(options.profile, **changes)
    number, starts = _budget(options, profile.num_inference_steps)
    pipe = load_pipeline(profile)
    calibration = calibrate_profile(pipe, profile, options.target, options.images, options.work)
    return with_provenance(calibration.plan(number, options.refinements, starts), profile)


def _plan_of_pipeline(options: argparse.Namespace) -> ForecastPlan:
    if options.prompts is None:
        raise ValueError("--pipeline needs --prompts, a text file with one prompt a line")
    if options.scheduler:
        raise ValueError("--scheduler is for a --profile: save the pipeline with the scheduler it is used with")
    number, starts = _budget(options, options.steps)
    try:
        shared = dict(json.loads(options.call))
    except (ValueError, TypeError):
        raise ValueError(f"--call={options.call} is not accepted: a JSON object of the pipeline's arguments") from None
    dtype = getattr(torch, options.dtype, None)
    check("--dtype", options.dtype, isinstance(dtype, torch.dtype), "a dtype of torch, such as bfloat16")
    prompts = [line.strip() for line in options.prompts.read_text().splitlines() if line.strip()][: options.images]
    check("--prompts", str(options.prompts), len(prompts) >= 2, "two prompts or more, better 60 to 120")
    pipe = DiffusionPipeline.from_pretrained(options.pipeline, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    if options.offload:
        pipe.enable_model_cpu_offload(device=options.device)
    else:
        pipe.to(options.device)
    calls: Sequence[dict[str, Any]] = [{"prompt": prompt, **shared} for prompt in prompts]
    calibration = Calibration(pipe, calls, options.steps, options.target, work=options.work)
    return calibration.plan(number, options.refinements, starts)


def _budget(options: argparse.Namespace, steps: int) -> tuple[int, list[tuple[int, ...]]]:
    """How many steps the plan computes, and the sets of steps to begin with."""
    check("--macs", options.macs, 1 <= options.macs <= steps / 2, "from 1 to half the steps")
    check("--images", options.images, options.images >= 2, "2 or more")
    check("--refinements", options.refinements, options.refinements >= 0, "0 or more")
    number = int(steps / options.macs)
    starts = [] if options.start is None else [tuple(sorted(ForecastPlan.load(options.start).computed))]
    if starts and len(starts[0]) != number:
        raise ValueError(f"{options.start} computes {len(starts[0])} steps, {number} are wanted")
    return number, starts
