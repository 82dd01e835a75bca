"""``dqar calibrate``: proposes a gate, or the bits of each layer, and says what that was measured to do."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any, get_args

from diffusers import DiffusionPipeline

from dqar.commands.parser import Parser, asked_profile
from dqar.config import CacheFormat, DQARConfig, ReuseTarget
from dqar.measure.bits import calibrate_bits
from dqar.measure.calibrate import calibrate
from dqar.measure.sampling import OPEN
from dqar.models.pipelines import check_device, load_pipeline
from dqar.models.profiles import Profile, profile_of


def run(arguments: list[str]) -> int:
    """Prints what was tried and the proposed fields of ``DQARConfig`` as JSON.

    Raises:
        ValueError: an argument isn't accepted, or the goal is out of reach.
        OSError: the weights can't be read.
    """
    parser = Parser(
        "calibrate", "Proposes a gate for a share of reuse or for a quality, or bits by layer for a cache's size."
    )
    parser.add_profile()
    parser.add_changes("weights", "device", "set")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--share", type=float, help="share of sites to reuse, between 0 and 1")
    goal.add_argument("--psnr", type=float, help="PSNR to full compute that is to be kept, in dB")
    goal.add_argument("--bytes", type=float, metavar="SHARE", help="of a 16-bit cache's, every second step reused")
    parser.add_argument("--reuse-target", choices=get_args(ReuseTarget), default="output", help="(default: output)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--num-samples", type=int, default=4, metavar="N", help="images of each trial (default: 4)")
    options = parser.parse_args(arguments)
    profile = profile_of(asked_profile(options))
    check_device(profile)
    pipe = load_pipeline(profile)
    steps = f"{profile.num_inference_steps} steps of {profile.scheduler}"
    print(f"measured on {options.num_samples} images of profile {profile.label}, {steps}:")
    propose = _gate if options.bytes is None else _bits
    propose(pipe, profile, options)
    return 0


def _gate(pipe: DiffusionPipeline, profile: Profile, options: argparse.Namespace) -> None:
    """Entropy threshold and SNR range from a short trace, and the base of slide 5's τ(p)."""
    base = DQARConfig(schedule="all", reuse_target=options.reuse_target)
    goals = {"share": options.share, "psnr": options.psnr}
    config, trials = calibrate(pipe, profile, options.seed, **goals, base=base, num_samples=options.num_samples)
    chosen = trials[trials.entropy_threshold == config.entropy_threshold].iloc[-1]
    print(trials.to_string(index=False, float_format="{:.4g}".format))
    proposal = _fields(config, "entropy_threshold", "snr_range", "schedule", "reuse_target")
    print(f"proposed, {chosen.share:.1%} of sites at {chosen.psnr:.1f} dB: {json.dumps(proposal)}")
    print(f"as τ(p) = base·√(p/64) of one-word labels: base = {chosen.entropy_threshold * 8:.4g}")


def _bits(pipe: DiffusionPipeline, profile: Profile, options: argparse.Namespace) -> None:
    """The bits of each layer, beside uniform ones, on other images than they were chosen by."""
    cache = CacheFormat(fitted=True)
    base = dataclasses.replace(OPEN, schedule="static", reuse_target=options.reuse_target, cache=cache)
    config, table = calibrate_bits(pipe, profile, options.seed, base, options.bytes, options.num_samples)
    print(table.to_string(index=False, float_format="{:.4g}".format))
    proposal = _fields(config, "entropy_threshold", "snr_range", "schedule", "reuse_target", "quantize_bits")
    proposal["cache"] = {"fitted": config.cache.fitted, "layer_bits": config.cache.layer_bits}
    print(f"proposed, {table.share[0]:.3f} of a 16-bit cache at {table['median'][0]:.1f} dB: {json.dumps(proposal)}")


def _fields(config: DQARConfig, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}
