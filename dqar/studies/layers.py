"""Notebook 09's panel on cross-layer sharing: how alike layers' attention maps are, and what sharing them saves."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention

from dqar.families import taken_layers
from dqar.measure.recorders import StepCounter
from dqar.measure.results import Run
from dqar.models.profiles import Profile
from dqar.studies import arena
from dqar.studies.compare import FULL, Method, compare, only
from dqar.studies.recording import LABEL_SEED, SWEEP_SEED, Recording
from dqar.takeover import taken_over

THETAS = (0.9, 0.8, 0.7, 0.6, 0.0)
"""Overlaps of two layers' maps from which on the upper one takes the lower one's; 0: every other layer does."""
IMAGES = 4
"""On which overlaps are measured."""
ALONE, STEPWISE = "sharing alone", "sharing on step reuse"


def similarity(run: Run) -> pd.DataFrame:
    """How alike every two layers' attention is at every step: ``measure_similarity`` of the run's own images."""
    return run.table("layer_similarity", lambda: measure_similarity(run.profile, run.seed))


def measure_similarity(profile: Profile, seed: int) -> pd.DataFrame:
    """How alike every two layers' attention is at every step of untouched denoisings.

    Two maps overlap by ``Σ_j min(A_ij, B_ij)``, mean over queries, images and branches: 1 where they are equal, 0 where
    they look at different places. Heads have no order, so each head is compared with the most alike one of the other
    layer, which favours sharing.

    Returns:
        ``step``, ``layer``, ``other``; ``overlap``, mean over the layer's heads; ``heads``, the other layer's most
        alike head for each; ``output_change``, ``‖o_layer − o_other‖ / ‖o_layer‖`` of the attentions' outputs.
    """
    pipe, rows = FULL.pipeline(profile), list[dict[str, Any]]()
    layers = [layer.attention for layer in taken_layers(pipe.transformer)]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    counter = StepCounter()

    def look(layer_id: int, original: Callable, hidden_states: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        output = original(hidden_states, *args, **named)
        seen.append((attention_map(layers[layer_id], hidden_states), output))
        if layer_id == len(layers) - 1:
            rows.extend({"step": counter.step, **row} for row in layer_pairs(seen))
            seen.clear()
        return output

    with taken_over({pipe.transformer: counter, **{x: functools.partial(look, i) for i, x in enumerate(layers)}}):
        FULL.draw(profile, seed, num_samples=min(IMAGES, profile.num_samples))
    table = pd.DataFrame(rows)
    by = table.groupby(["step", "layer", "other"])  # one row a batch of images
    return by.agg(
        overlap=("overlap", "mean"), heads=("heads", "first"), output_change=("output_change", "mean")
    ).reset_index()


def layer_pairs(seen: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[dict[str, Any]]:
    """A row for every two layers, each way, of their attention maps ``[B, H, Nq, Nk]`` and outputs ``[B, N, C]``."""
    for (i, (map_i, out_i)), (j, (map_j, out_j)) in itertools.combinations(enumerate(seen), 2):
        overlaps = torch.minimum(map_i[:, :, None], map_j[:, None]).sum(-1).mean((0, 3))  # [heads of i, heads of j]
        distance = (out_i - out_j).norm().item()
        for layer, other, by_head, output in ((i, j, overlaps, out_i), (j, i, overlaps.T, out_j)):
            best = by_head.max(1)
            yield {
                "layer": layer,
                "other": other,
                "overlap": best.values.mean().item(),
                "heads": best.indices.tolist(),
                "output_change": distance / output.norm().item(),
            }


def attention_map(attn: Attention, hidden_states: torch.Tensor) -> torch.Tensor:
    """The whole map ``[B, H, N, N]`` of a self-attention given ``[B, N, C]``."""
    query, key = (_heads(attn, layer(hidden_states)) for layer in (attn.to_q, attn.to_k))
    return (query @ key.transpose(-1, -2) * attn.scale).softmax(-1)


def attended(attn: Any, weights: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """The self-attention's output ``[B, N, C]``, by a map ``[B, H, N, N]`` of whatever origin."""
    return attn.to_out[0]((weights @ _heads(attn, attn.to_v(hidden_states))).transpose(1, 2).flatten(2))


def _heads(attn: Attention, x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


# --- sharing ---------------------------------------------------------------------------------------------------------


def shared_maps(table: pd.DataFrame, theta: float) -> dict[tuple[int, int], list[int]]:
    """The sites ``(step, layer)`` that take the map of the layer below, and which of its heads for each of theirs.

    From the bottom up, where maps overlap by ``theta`` or more; a map that was taken isn't passed on.

    Args:
        table: of ``measure_similarity``.
        theta: the least overlap.
    """
    taken: dict[tuple[int, int], list[int]] = {}
    below = table[table.other == table.layer - 1].sort_values(["step", "layer"])
    for row in below.itertuples():
        if row.overlap >= theta and (row.step, row.layer - 1) not in taken:
            taken[row.step, row.layer] = list(row.heads)
    return taken


@contextmanager
def sharing(pipe: DiffusionPipeline, sites: dict[tuple[int, int], list[int]], interval: int = 1) -> Iterator[None]:
    """Computes these sites' attention from the map of the layer below; values are their own.

    Args:
        pipe: with a diffusers transformer of self-attentions.
        sites: of ``shared_maps``.
        interval: every so manieth step computes attention; at the others each layer's last output is reused.
    """
    layers, counter = [layer.attention for layer in taken_layers(pipe.transformer)], StepCounter()
    kept: dict[int, torch.Tensor] = {}
    below: dict[int, torch.Tensor] = {}

    def attend(
        layer_id: int, original: Callable, hidden_states: torch.Tensor, *args: Any, **named: Any
    ) -> torch.Tensor:
        attn: Any = layers[layer_id]
        heads = sites.get((counter.step, layer_id))
        if counter.step % interval:
            return kept[layer_id]
        if heads is not None:
            weights = below.pop(layer_id - 1)[:, heads]
        elif (counter.step, layer_id + 1) in sites:
            weights = below[layer_id] = attention_map(attn, hidden_states)
        else:
            kept[layer_id] = original(hidden_states, *args, **named)
            return kept[layer_id]
        kept[layer_id] = attended(attn, weights, hidden_states)
        return kept[layer_id]

    with taken_over({pipe.transformer: counter, **{x: functools.partial(attend, i) for i, x in enumerate(layers)}}):
        yield


def record_layers(recording: Recording) -> pd.DataFrame:
    """Maps shared between neighbouring layers, alone and on top of every second step's attention reused.

    Overlaps are measured on other images.

    Returns:
        The columns of ``compare``, with ``theta`` (NaN: nothing is shared), ``interval`` of the computed steps, and
        ``shared``, the share of all maps that are taken from the layer below.
    """
    profile = recording.many_at_once

    @functools.cache
    def overlaps() -> pd.DataFrame:
        return measure_similarity(profile, LABEL_SEED)

    def part(method: Method, interval: int, theta: float) -> pd.DataFrame:
        sites = {} if np.isnan(theta) else shared_maps(overlaps(), theta)
        sites = {(step, layer): heads for (step, layer), heads in sites.items() if step % interval == 0}
        reference = recording.drawn(FULL, SWEEP_SEED, 0, recording.sizes.sweep_images)
        every = profile.num_inference_steps * len(taken_layers(method.pipeline(profile).transformer))
        with sharing(method.pipeline(profile), sites, interval):
            rows = compare(method, reference, profile, SWEEP_SEED)
        return rows.assign(theta=theta, interval=interval, shared=len(sites) / every)

    parts = {}
    for interval, family in ((1, ALONE), (2, STEPWISE)):
        for theta in (*([np.nan] if interval > 1 else []), *THETAS):
            name = f"every {interval}, nothing shared" if np.isnan(theta) else f"every {interval}, θ = {theta:g}"
            parts[name] = functools.partial(part, Method(name, family), interval, theta)
    return recording.growing("layers", parts, SWEEP_SEED, recording.sizes.sweep_images)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row a method of ``record_layers``: ``method``, ``family``, ``theta``, ``interval``, ``shared``,
    ``macs_speedup``, and PSNR (dB) by each of ``arena.MEASURES``."""
    return arena.standings(table, "reference", ("family", "theta", "interval", "shared", "macs_speedup"))


def in_words(table: pd.DataFrame) -> str:
    """The finding of ``record_layers``: the most that sharing saves, beside step reuse alone."""
    points = summary(table)
    most, steps = only(points, family=ALONE, theta=0.0), only(points[points.theta.isna()], family=STEPWISE)
    return (
        f"Sharing every other layer's map, the most there is, saves {1 - 1 / most.macs_speedup:.0%} of the MACs at "
        f"{most['median']:.1f} dB; reusing every other step's attention {1 - 1 / steps.macs_speedup:.0%} at "
        f"{steps['median']:.1f} dB"
    )
