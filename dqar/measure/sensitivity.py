"""What a single reuse does to the finished image: the policy's labels and the oracle's errors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from dqar.config import ReuseTarget
from dqar.measure.sampling import LOOK, class_labels, first_latents, sample
from dqar.models.guidance import guided_prediction
from dqar.models.pipelines import to_images
from dqar.models.profiles import Profile
from dqar.plan import BRANCHES


def site_errors(
    pipe: DiffusionPipeline,
    profile: Profile,
    seed: int,
    target: ReuseTarget,
    first_image: int,
    num_images: int,
    sites_per_step: int,
) -> pd.DataFrame:
    """Reuses one site at a time, everything else computed afresh, and measures what that alone does.

    At every step but the first, ``sites_per_step`` sites (layer and branch) of each image are drawn at random. A site's
    trial takes the reference's state before the step, gives the site what it had computed a step before (unquantized),
    and finishes the denoising; trials of one step share a batch.

    Args:
        pipe: from ``load_pipeline``, without DQAR.
        target: what is reused.
        first_image, num_images: images of the set that ``sample`` draws with this seed; classes in turn.

    Returns:
        One row per trial: ``image``, ``label``, ``step``, ``layer``, ``branch``, what the controller knows when it
        decides (``entropy`` of the cached result, ``snr``, ``latent_norm``), ``change`` (relative error of the site's
        own output) and ``error`` (mean squared error of the finished image in [0, 1], against full compute).
    """
    steps = profile.num_inference_steps
    features = _features(pipe, profile, seed, first_image, num_images)
    numbers = torch.arange(first_image, first_image + num_images)
    labels = class_labels(pipe, numbers)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    states = [_State(first_latents(pipe, scheduler, seed, numbers), scheduler)]
    for _ in tqdm(range(steps), desc="reference", leave=False):
        states.append(states[-1].advance(pipe, labels, profile.guidance_scale))
    finished = to_images(pipe, states[-1].latents)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + first_image)
    blocks = pipe.transformer.transformer_blocks
    rows = []
    for step in tqdm(range(1, steps), desc=f"{target} sites, by step", leave=False):
        sites = [torch.randperm(2 * len(blocks), generator=generator)[:sites_per_step] for _ in range(num_images)]
        images = torch.arange(num_images).repeat_interleave(sites_per_step)
        layers, branches = torch.cat(sites) % len(blocks), torch.cat(sites) // len(blocks)
        with _replaced(blocks, target) as swap:
            states[step - 1].advance(pipe, labels, profile.guidance_scale)
            swap.replay(images, layers, branches)
            state = states[step].select(images).advance(pipe, labels[images], profile.guidance_scale)
            changes = swap.changes
        for _ in range(step + 1, steps):
            state = state.advance(pipe, labels[images], profile.guidance_scale)
        errors = (to_images(pipe, state.latents) - finished[images]).square().flatten(1).mean(1)
        table = pd.DataFrame({"image": images + first_image, "label": labels[images], "step": step, "layer": layers})
        rows.append(table.assign(branch=[BRANCHES[b] for b in branches], change=changes.numpy(), error=errors.numpy()))
    return pd.concat(rows, ignore_index=True).merge(features, on=["image", "step", "layer", "branch"])


def _features(pipe: DiffusionPipeline, profile: Profile, seed: int, first_image: int, num_images: int) -> pd.DataFrame:
    """The policy's features at every site: what a trace of the image alone, nothing reused, says before the site."""
    tables = []
    for image in tqdm(range(first_image, first_image + num_images), desc="traces", leave=False):
        trace = sample(pipe, profile, seed, LOOK, first_image=image, num_samples=1).traced.to_pandas()
        by_site = trace.sort_values("step").groupby(["layer", "branch"])
        trace["entropy"] = by_site.entropy.shift(1)  # of the result that would be reused
        tables.append(
            trace.assign(image=image)[["image", "step", "layer", "branch", "entropy", "snr_gate", "latent_norm"]]
        )
    return pd.concat(tables).dropna().rename(columns={"snr_gate": "snr"})


@dataclass(frozen=True)
class _State:
    """A denoising before one of its steps: latents ``[M, C, H, W]``, and the scheduler with all that it remembers."""

    latents: torch.Tensor
    scheduler: Any
    step: int = 0

    @torch.no_grad()
    def advance(self, pipe: DiffusionPipeline, labels: torch.Tensor, guidance_scale: float) -> _State:
        """The state one step later; this one stays as it is."""
        scheduler = copy.deepcopy(self.scheduler)
        null = torch.full_like(labels, pipe.transformer.config.num_embeds_ada_norm)
        t = scheduler.timesteps[self.step]
        noise = guided_prediction(
            pipe.transformer, scheduler, self.latents, t, torch.cat([labels, null]), guidance_scale
        )
        return _State(scheduler.step(noise, t, self.latents).prev_sample, scheduler, self.step + 1)

    def select(self, images: torch.Tensor) -> _State:
        """The state of a batch made of these rows, each as often as it is named."""
        scheduler = copy.deepcopy(self.scheduler)
        if hasattr(scheduler, "model_outputs"):  # a multistep solver's memory
            scheduler.model_outputs = [x[images] if x is not None else None for x in scheduler.model_outputs]
        return _State(self.latents[images], scheduler, self.step)


class _Swap:
    """Forward hooks that first keep what every layer computes, then hand chosen rows of it back in the next pass."""

    def __init__(self, num_layers: int):
        self.kept: dict[tuple[int, int], torch.Tensor] = {}
        self.rows: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self.num_layers = num_layers

    def replay(self, images: torch.Tensor, layers: torch.Tensor, branches: torch.Tensor) -> None:
        """From now on, batch item ``i`` gets what image ``images[i]`` computed at its one site."""
        num_images = len(next(iter(self.kept.values()))) // 2
        source, destination = branches * num_images + images, branches * len(images) + torch.arange(len(images))
        self.rows = [(source[layers == i], destination[layers == i]) for i in range(self.num_layers)]
        self.changes = torch.zeros(len(images))

    def hook(self, layer: int, part: int, whole: bool):
        """For the ``part``-th reused module of a layer; ``whole``: a block, of which its input's change is reused."""

        def see(_module, args, output):
            result = output
            output = output - args[0] if whole else output
            if self.rows is None:
                self.kept[layer, part] = output
                return result
            source, destination = self.rows[layer]
            if len(source) == 0:
                return result
            old, new = self.kept[layer, part][source], output[destination]
            error = (new - old).flatten(1).norm(dim=1) / new.flatten(1).norm(dim=1)
            items = destination % len(self.changes)
            self.changes[items] = torch.maximum(self.changes[items], error)
            result = result.clone()
            result[destination] = old + args[0][destination] if whole else old
            return result

        return see


@contextmanager
def _replaced(blocks: Any, target: ReuseTarget) -> Iterator[_Swap]:
    swap = _Swap(len(blocks))
    handles = []
    for layer, block in enumerate(blocks):
        attn = block.attn1
        modules = {"kv": (attn.to_k, attn.to_v), "output": (attn,), "block": (attn, block.ff), "residual": (block,)}
        for part, module in enumerate(modules[target]):
            handles.append(module.register_forward_hook(swap.hook(layer, part, target == "residual")))
    try:
        yield swap
    finally:
        for handle in handles:
            handle.remove()
