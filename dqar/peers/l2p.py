"""L2P: the model's output as a learned linear combination of all outputs so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline

from dqar.families import family
from dqar.models.guidance import guide
from dqar.peers.linear import Weights, forecast_output, number_computed, output_of, spread_steps
from dqar.peers.rival import Rival
from dqar.peers.shared import calibrate, check_range, watched

RIDGE = 1e-6
"""Of the outputs' mean square: outputs of neighbouring steps are nearly the same."""


@contextmanager
def l2p(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    speedup: float = 3.0,
    first: int = 1,
    last: int = 4,
    calibration_images: int = 32,
    guidance_scale: float = 4.0,
) -> Iterator[None]:
    """L2P (Shen et al., CVPR 2026, arXiv 2604.26365): each step has learned weights of all earlier outputs.

    Own code after its repository (Aredstone/L2P-Cache), which has a FLUX of its own: the same site, which is the
    model's output, and the same loss, the squared error on the outputs of full computation. They learn by Adam to
    forecast each step from all steps before it, and forecast from forecasts; here the weights of the computed steps
    alone are solved for in closed form, for the very steps that are computed, and for the guided output (a sum of both
    branches, so that both have the same weights). Their computed steps are lists for 50 steps, from 4.5 times fewer
    on, dense in the beginning; here the first ones, the last ones and evenly spread ones in between. They report, for
    FLUX.1-dev, 31.5 dB to full computation at 4.55 times fewer FLOPs.

    Args:
        speedup: the number of steps over that of computed steps, at least.
        first, last: steps that are all computed at the start and at the end.
        calibration_images, guidance_scale: of the run that it is fitted to; once per model and sampler.

    Raises:
        ValueError: a setting out of range.
    """
    check_range(
        speedup=(speedup, 1, num_inference_steps),
        first=(first, 1, math.inf),
        last=(last, 0, math.inf),
        calibration_images=(calibration_images, 1, 10_000),
    )

    def measure(draw: Callable[[], object]) -> torch.Tensor:
        return mean_products(guided_outputs(pipe, num_inference_steps, guidance_scale, draw))

    products = calibrate(pipe, num_inference_steps, guidance_scale, calibration_images, "L2P", measure)
    computed = spread_steps(num_inference_steps, number_computed(num_inference_steps, speedup), first, last)
    with watched(pipe, num_inference_steps) as run:
        forecast_output(pipe.transformer, run, l2p_weights(products, computed))
        yield


def guided_outputs(
    pipe: DiffusionPipeline, num_inference_steps: int, guidance_scale: float, draw: Callable[[], object]
) -> torch.Tensor:
    """The guided noise ``[steps, values]`` of a run of full computation, float64."""
    transformer, outputs = pipe.transformer, list[torch.Tensor]()
    cond_first = family(transformer).branch_order[0] == "cond"

    def watch(_module: torch.nn.Module, _args: tuple, output: object) -> None:
        noise = output_of(output)[:, : transformer.config.in_channels].double()  # DiT-XL/2 predicts variances too
        if guidance_scale > 1:
            cond, uncond = noise.chunk(2) if cond_first else reversed(noise.chunk(2))
            noise = guide(cond, uncond, guidance_scale)
        outputs.append(noise.flatten())

    with watched(pipe, num_inference_steps), transformer.register_forward_hook(watch):
        draw()
    return torch.stack(outputs)


def mean_products(outputs: torch.Tensor) -> torch.Tensor:
    """The mean product ``[steps, steps]`` of the outputs ``[steps, values]`` of every two steps."""
    return outputs @ outputs.T / outputs.shape[1]


def l2p_weights(products: torch.Tensor, computed: Collection[int]) -> Weights:
    """Of every skipped step, the weights of the computed ones before it with the least squared error.

    Args:
        products: ``mean_products`` ``[steps, steps]``, float64.
        computed: steps, the first one among them.
    """
    weights = {}
    for step in sorted(set(range(len(products))) - set(computed)):
        before = [c for c in sorted(computed) if c < step]
        gram = products[before][:, before]
        gram = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(before), dtype=gram.dtype, device=gram.device)
        weights[step] = dict(zip(before, torch.linalg.solve(gram, products[before, step]).tolist(), strict=True))
    return weights


RIVALS = (
    Rival(
        "L2P",
        keeps="the model's output, as a learned sum of all computed ones",
        source="Shen et al., CVPR 2026, arXiv 2604.26365",
        adapter=l2p,
        sweep=tuple(
            {"speedup": speedup, "first": first, "last": last}
            for speedup, first, last in (
                (1.25, 1, 8),
                (1.5, 1, 8),
                (2.0, 1, 8),
                (2.0, 3, 4),
                (2.5, 1, 6),
                (3.0, 1, 4),
                (3.0, 3, 1),
                (4.0, 1, 3),
                (4.0, 3, 1),
                (5.5, 1, 2),
            )
        ),
        calibration_images=32,
        strong=True,
    ),
)
