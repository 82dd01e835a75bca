"""What a single reuse does to the finished image: the policy's labels and the oracle's errors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from dqar.config import ReuseTarget
from dqar.families import CONDITIONS, family
from dqar.measure.sampling import LOOK, class_labels, conditions, first_latents, sample, within_memory
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
        decides (``entropy`` of the cached result, ``snr``, ``latent_norm``, of captions ``prompt_length``), ``change``
        (relative error of the site's own output) and ``error`` (mean squared error of the finished image in [0, 1],
        against full compute).
    """

    def trials(at_once: int) -> pd.DataFrame:
        images = torch.arange(first_image, first_image + num_images)
        parts = [_trials(pipe, profile, seed, target, part, sites_per_step) for part in images.split(at_once)]
        return pd.concat(parts, ignore_index=True)

    return within_memory(trials, num_images, f"{profile.label}, {sites_per_step} reuses of each image")


def _trials(
    pipe: DiffusionPipeline,
    profile: Profile,
    seed: int,
    target: ReuseTarget,
    numbers: torch.Tensor,
    sites_per_step: int,
) -> pd.DataFrame:
    """``site_errors`` of the images with these ``numbers``, all at once."""
    steps, labels = profile.num_inference_steps, class_labels(pipe, numbers)
    features, asked = _features(pipe, profile, seed, numbers.tolist()), _Asked.of(pipe, numbers)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    states = [_State(first_latents(pipe, scheduler, seed, numbers), scheduler)]
    for _ in tqdm(range(steps), desc="reference", leave=False):
        states.append(states[-1].advance(pipe, asked, profile.guidance_scale))
    finished = to_images(pipe, states[-1].latents).cpu()
    generator = torch.Generator().manual_seed(seed * 1_000_003 + int(numbers[0]))
    blocks = pipe.transformer.transformer_blocks
    rows = []
    for step in tqdm(range(1, steps), desc=f"{target} sites, by step", leave=False):
        sites = [torch.randperm(2 * len(blocks), generator=generator)[:sites_per_step] for _ in numbers]
        images = torch.arange(len(numbers)).repeat_interleave(sites_per_step)
        layers, branches = torch.cat(sites) % len(blocks), torch.cat(sites) // len(blocks)
        with _replaced(blocks, target) as swap:
            states[step - 1].advance(pipe, asked, profile.guidance_scale)
            swap.replay(images, layers, branches)
            chosen = asked.select(images)
            state = states[step].select(images).advance(pipe, chosen, profile.guidance_scale)
            changes = swap.changes
        for _ in range(step + 1, steps):
            state = state.advance(pipe, chosen, profile.guidance_scale)
        errors = (to_images(pipe, state.latents).cpu() - finished[images]).square().flatten(1).mean(1)
        table = pd.DataFrame({"image": numbers[images], "label": labels[images], "step": step, "layer": layers})
        if asked.prompt_lengths is not None:
            table["prompt_length"] = asked.prompt_lengths[images].numpy()
        rows.append(table.assign(branch=[BRANCHES[b] for b in branches], change=changes.numpy(), error=errors.numpy()))
    return pd.concat(rows, ignore_index=True).merge(features, on=["image", "step", "layer", "branch"])


def _features(pipe: DiffusionPipeline, profile: Profile, seed: int, images: list[int]) -> pd.DataFrame:
    """The policy's features at every site: what a trace of the image alone, nothing reused, says before the site."""
    tables = []
    for image in tqdm(images, desc="traces", leave=False):
        trace = sample(pipe, profile, seed, LOOK, first_image=image, num_samples=1).traced.to_pandas()
        by_site = trace.sort_values("step").groupby(["layer", "branch"])
        trace["entropy"] = by_site.entropy.shift(1)  # of the result that would be reused
        tables.append(
            trace.assign(image=image)[["image", "step", "layer", "branch", "entropy", "snr_gate", "latent_norm"]]
        )
    return pd.concat(tables).dropna().rename(columns={"snr_gate": "snr"})


@dataclass(frozen=True)
class _Asked:
    """What the transformer is given beside latents and timestep: of all images the conditional branch, then the other.

    Attributes:
        arguments: by name, tensors ``[2N, ...]`` or what doesn't depend on the image.
        prompt_lengths: tokens of each caption ``[N]``; ``None`` where there are none.
    """

    arguments: dict[str, Any]
    prompt_lengths: torch.Tensor | None

    @classmethod
    def of(cls, pipe: DiffusionPipeline, images: torch.Tensor) -> _Asked:
        """Of the images of these numbers, as the pipeline itself asks for them."""
        seen: dict[str, Any] = {}
        with pipe.transformer.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.update(kwargs), with_kwargs=True
        ):
            # PixArt's pipeline doesn't get through a run of one step.
            pipe(**conditions(pipe, images), guidance_scale=2.0, num_inference_steps=2)
        order = [family(pipe.transformer).branch_order.index(branch) for branch in BRANCHES]
        rows = torch.cat([torch.arange(len(images)) + half * len(images) for half in order])
        kept = {name: seen[name] for name in (*CONDITIONS, "added_cond_kwargs") if name in seen}
        mask = kept.get("encoder_attention_mask")
        lengths = None if mask is None else mask[rows[: len(images)].to(mask.device)].sum(1).float().cpu()
        return cls(_rows(kept, rows), lengths)

    def select(self, images: torch.Tensor) -> _Asked:
        """Of a batch made of these images, each as often as it is named."""
        count = next(len(x) for x in self.arguments.values() if isinstance(x, torch.Tensor)) // 2
        lengths = None if self.prompt_lengths is None else self.prompt_lengths[images]
        return _Asked(_rows(self.arguments, torch.cat([images, images + count])), lengths)


def _rows(arguments: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """The arguments of these rows of a batch; what is no tensor, or none with rows, as it is."""
    chosen = {}
    for name, value in arguments.items():
        if isinstance(value, dict):
            value = _rows(value, rows)
        chosen[name] = value[rows.to(value.device)] if isinstance(value, torch.Tensor) else value
    return chosen


@dataclass(frozen=True)
class _State:
    """A denoising before one of its steps: latents ``[M, C, H, W]``, and the scheduler with all that it remembers."""

    latents: torch.Tensor
    scheduler: Any
    step: int = 0

    @torch.no_grad()
    def advance(self, pipe: DiffusionPipeline, asked: _Asked, guidance_scale: float) -> _State:
        """The state one step later; this one stays as it is."""
        scheduler = copy.deepcopy(self.scheduler)
        t = scheduler.timesteps[self.step]
        noise = guided_prediction(pipe.transformer, scheduler, self.latents, t, guidance_scale, **asked.arguments)
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
            error = ((new - old).flatten(1).float().norm(dim=1) / new.flatten(1).float().norm(dim=1)).cpu()
            items = destination % len(self.changes)
            self.changes[items] = torch.maximum(self.changes[items], error)
            result = result.clone()
            result[destination] = old + args[0][destination] if whole else old
            return result

        return see


@contextmanager
def _replaced(blocks: Any, target: ReuseTarget) -> Iterator[_Swap]:
    swap = _Swap(len(blocks))
    with ExitStack() as hooks:
        for layer, block in enumerate(blocks):
            attn = block.attn1
            modules = {"kv": (attn.to_k, attn.to_v), "output": (attn,), "block": (attn, block.ff), "residual": (block,)}
            for part, module in enumerate(modules[target]):
                hooks.enter_context(module.register_forward_hook(swap.hook(layer, part, target == "residual")))
        yield swap
