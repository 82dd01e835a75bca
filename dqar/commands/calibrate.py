"""``dqar calibrate``: proposes a gate for a profile's model, and says what it was measured to do."""

from __future__ import annotations

import json
from typing import get_args

from dqar.commands.parser import Parser, asked_profile
from dqar.config import DQARConfig, ReuseTarget
from dqar.measure.calibrate import calibrate
from dqar.models.pipelines import check_device, load_pipeline
from dqar.models.profiles import profile_of


def run(arguments: list[str]) -> int:
    """Prints the trials, the proposed fields of ``DQARConfig`` as JSON, and the base of slide 5's τ(p).

    Raises:
        ValueError: an argument isn't accepted, or the goal is out of reach.
        OSError: the weights can't be read.
    """
    parser = Parser("calibrate", "Proposes entropy threshold and SNR range from a short trace, and tries them.")
    parser.add_profile()
    parser.add_changes("weights", "device", "set")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--share", type=float, help="share of sites to reuse, between 0 and 1")
    goal.add_argument("--psnr", type=float, help="PSNR to full compute that is to be kept, in dB")
    parser.add_argument("--reuse-target", choices=get_args(ReuseTarget), default="output", help="(default: output)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument(
        "--num-samples", type=int, default=4, metavar="N", help="images of the trace and of each trial (default: 4)"
    )
    options = parser.parse_args(arguments)
    profile = profile_of(asked_profile(options))
    check_device(profile)
    base = DQARConfig(schedule="all", reuse_target=options.reuse_target)
    goals = {"share": options.share, "psnr": options.psnr}
    pipe = load_pipeline(profile)
    config, trials = calibrate(pipe, profile, options.seed, **goals, base=base, num_samples=options.num_samples)
    chosen = trials[trials.entropy_threshold == config.entropy_threshold].iloc[-1]
    steps = f"{profile.num_inference_steps} steps of {profile.scheduler}"
    print(f"measured on {options.num_samples} images of profile {profile.label}, {steps}:")
    print(trials.to_string(index=False, float_format="{:.4g}".format))
    fields = ("entropy_threshold", "snr_range", "schedule", "reuse_target")
    proposal = json.dumps({name: getattr(config, name) for name in fields})
    print(f"proposed, {chosen.share:.1%} of sites at {chosen.psnr:.1f} dB: {proposal}")
    print(f"as τ(p) = base·√(p/64) of one-word labels: base = {chosen.entropy_threshold * 8:.4g}")
    return 0
