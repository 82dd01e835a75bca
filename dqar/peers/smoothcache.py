"""SmoothCache: a schedule made from the outputs' measured changes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention import BasicTransformerBlock

from dqar.peers.rival import Rival
from dqar.peers.shared import COMPONENTS, block_modules, calibrate, check_range, load_package, watched


@contextmanager
def smoothcache(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    threshold: float = 0.18,
    lookahead: int = 3,
    components: tuple[str, ...] = COMPONENTS,
    calibration_images: int = 8,
    guidance_scale: float = 4.0,
) -> Iterator[None]:
    """SmoothCache (Liu et al. 2024, arXiv 2411.10510): one schedule a component, from errors measured beforehand.

    ``dit-smoothcache``'s ``SmoothCacheHelper`` reuses. Its wheel comes without the calibration of its repository
    (Roblox/SmoothCache), so that this is own code for the same measure and the same scan. It needed: the feed-forward
    as a component (its helper for diffusers wraps ``attn1`` only, the one for the original DiT, and the paper, both),
    its counters reset between runs, and silence: it prints a line for every module at every step.

    Args:
        threshold: of the relative L1 change, averaged over blocks, up to which an output is reused.
        lookahead: most steps in a row that reuse.
        components: of a block: ``attn1``, ``ff``.
        calibration_images, guidance_scale: of the run that it is calibrated on; once per model and sampler.

    Raises:
        ValueError: a setting out of range.
        ImportError: no dit-smoothcache.
    """
    check_range(
        threshold=(threshold, 0, math.inf),
        lookahead=(lookahead, 1, num_inference_steps),
        calibration_images=(calibration_images, 1, math.inf),
    )
    if not components or set(components) - set(COMPONENTS):
        raise ValueError(f"components={components!r} is out of range: some of {', '.join(COMPONENTS)}")
    with contextlib.redirect_stdout(None):  # it prints what else it would like to have
        package = load_package("SmoothCache", "dit-smoothcache")

    def measure(draw: Callable[[], object]) -> dict[str, list[list[float]]]:
        with watched(pipe, num_inference_steps):
            seen = [ChangeMeter(module, lookahead) for module in block_modules(pipe.transformer)]
            draw()
        count = len(COMPONENTS)
        return {name: _mean_changes([meter.changes for meter in seen[i::count]]) for i, name in enumerate(COMPONENTS)}

    what = f"SmoothCache {lookahead}"
    changes = calibrate(pipe, num_inference_steps, guidance_scale, calibration_images, what, measure)
    schedule = {name: smoothcache_schedule(changes[name], threshold, num_inference_steps) for name in components}
    with watched(pipe, num_inference_steps) as run:
        helper = package.SmoothCacheHelper(pipe.transformer, BasicTransformerBlock, list(components), schedule)
        helper.enable()
        for block in pipe.transformer.transformer_blocks:
            for component in components:
                module = getattr(block, component)
                module.forward = _silent(module.forward)
        run.on_start.append(helper.reset_state)
        try:
            yield
        finally:
            helper.disable()


class ChangeMeter:
    """Relative L1 change of a module's output against the ones 1, 2, ... ``lookahead`` steps before.

    ``changes[k][s]`` is ``‖o_{s+k+1} − o_s‖₁ / ‖o_{s+k+1}‖₁``, over the whole batch, as SmoothCache measures it.
    """

    def __init__(self, module: torch.nn.Module, lookahead: int):
        self.changes: list[list[float]] = [[] for _ in range(lookahead)]
        self._seen: list[torch.Tensor] = []
        self._forward = module.forward
        module.forward = self

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        output = self._forward(*args, **kwargs)
        now = output.float()
        for before, changes in zip(self._seen, self.changes, strict=False):
            changes.append(((now - before).norm(p=1) / now.norm(p=1)).item())
        self._seen = [now, *self._seen][: len(self.changes)]
        return output


def _mean_changes(changes: list[list[list[float]]]) -> list[list[float]]:
    """The mean over modules of their ``changes[k][s]``."""
    return [torch.tensor(rows).mean(0).tolist() for rows in zip(*changes, strict=True)]


def smoothcache_schedule(changes: list[list[float]], threshold: float, num_inference_steps: int) -> list[int]:
    """SmoothCache's schedule: 1 for a step that is computed, 0 for one that reuses.

    From a computed step on, as many steps reuse as the change against it allows, tried from the most to one; the first
    and the last step are always computed.

    Args:
        changes: ``[k][s]``, the mean change from step ``s`` to step ``s + k + 1``.
        threshold: up to which a step reuses.
        num_inference_steps: of the schedule.
    """
    schedule, step = [1] * num_inference_steps, 0
    while step < num_inference_steps:
        allowed = (
            k + 1 for k in reversed(range(len(changes))) if step < len(changes[k]) and changes[k][step] <= threshold
        )
        reused = next(allowed, 0)
        schedule[step + 1 : step + 1 + reused] = [0] * reused
        step += reused + 1
    schedule[-1] = 1
    return schedule


def _silent(forward: Callable) -> Callable:
    """What ``forward`` prints itself is dropped."""

    def silent(*args, **kwargs):
        with contextlib.redirect_stdout(None):
            return forward(*args, **kwargs)

    return silent


RIVALS = (
    Rival(
        "SmoothCache",
        keeps="attention and feed-forward of every block, each on a schedule of its own",
        source="Liu et al. 2024, arXiv 2411.10510; dit-smoothcache",
        adapter=smoothcache,
        sweep=(
            *({"threshold": threshold, "lookahead": 3} for threshold in (0.08, 0.1, 0.12, 0.15, 0.18, 0.25, 0.35)),
            {"threshold": 0.35, "lookahead": 5},
            {"threshold": 0.6, "lookahead": 5},
            {"threshold": 0.6, "lookahead": 7},
        ),
        calibration_images=8,
    ),
)
