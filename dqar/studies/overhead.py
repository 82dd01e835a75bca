"""What the mechanism itself costs: process CPU time of one thread, beside hand-written floors that do nothing else.

``dqar benchmark --overhead`` measures it on the digits model at batch 1, where a step is short and Python
weighs most: every method draws one guided image in 20 steps, the methods in turn, again and again.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from dqar.attention import apply_dqar
from dqar.config import CacheFormat, DQARConfig

STEPS, GUIDANCE = 20, 2.0


HALF = {"entropy_threshold": None, "snr_range": None, "schedule": "static"}
"""Computes every second step, reuses at the others."""


PLAIN = "plain"


METHODS: dict[str, tuple[dict[str, Any], str | None, float]] = {
    "closed gate, nothing asked": ({"schedule": "none"}, None, 0.99),
    "attention output, 16 bit": ({**HALF, "reuse_target": "output", "quantize_bits": 16}, "attention", 0.97),
    "attention output, INT8": ({**HALF, "reuse_target": "output"}, "attention", 0.93),
    "attention and feed-forward, INT8": ({**HALF, "reuse_target": "block"}, "attention and feed-forward", 0.93),
    "whole blocks, INT8": ({**HALF, "reuse_target": "residual"}, "whole blocks", 0.95),
    "K and V, INT8": ({**HALF, "reuse_target": "kv"}, None, 1.0),
    "the deck's default gate": ({}, None, 0.88),
}
"""By name: the configuration, its floor, and the goal: a share of the floor or, without one, of plain."""


class _Kept:
    """A floor: keeps a module's output at even steps, in 16 bit or what the model has, and returns it at odd ones."""

    def __init__(self, steps: list[int], module: torch.nn.Module, residual: bool = False):
        self.steps, self.forward, self.residual, self.kept = steps, module.forward, residual, None

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.steps[0] % 2:
            return hidden_states + self.kept if self.residual else self.kept
        output = self.forward(hidden_states, *args, **kwargs)
        self.kept = output - hidden_states if self.residual else output
        return output


class _KeptAttention:
    """The floor of an attention processor."""

    def __init__(self, steps: list[int], original: Callable):
        self.steps, self.original, self.kept = steps, original, None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not self.steps[0] % 2:
            self.kept = self.original(attn, hidden_states, encoder_hidden_states, attention_mask)
        return self.kept


@contextlib.contextmanager
def floor(transformer: torch.nn.Module, kind: str) -> Iterator[None]:
    """The hand-written reuse at every second step: of ``"attention"``, ``"attention and feed-forward"`` or
    ``"whole blocks"``. Nothing is decided, quantized, traced or checked."""
    steps = [-1]
    blocks = transformer.transformer_blocks

    def count(*_args: Any) -> None:
        steps[0] += 1

    handle = transformer.register_forward_pre_hook(count)
    processors = [block.attn1.processor for block in blocks]
    for block, processor in zip(blocks, processors, strict=True):
        if kind == "whole blocks":
            block.forward = _Kept(steps, block, residual=True)
            continue
        block.attn1.processor = _KeptAttention(steps, processor)
        if kind == "attention and feed-forward":
            block.ff.forward = _Kept(steps, block.ff)
    try:
        yield
    finally:
        handle.remove()
        for block, processor in zip(blocks, processors, strict=True):
            block.attn1.processor = processor
            for module in (block, block.ff):
                vars(module).pop("forward", None)


def calls(pipe: DiffusionPipeline) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """By name, what puts a method on the pipeline, as a context, and what draws the image.

    Each of DQAR's twice: ``"…, modulations anew"`` leaves what doesn't depend on the latents to the model; without that
    it is kept from the run before, of the same label, as by default.
    """

    def draw() -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipe([7], GUIDANCE, generator, STEPS, output_type="latent").images

    made: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {PLAIN: (contextlib.nullcontext, draw)}
    for kind in dict.fromkeys(kind for _, kind, _ in METHODS.values() if kind is not None):
        made[f"floor: {kind}"] = (lambda kind=kind: floor(pipe.transformer, kind), draw)
    for name, (options, _, _) in METHODS.items():
        for suffix, keeps in (("", {}), (", modulations anew", {"cache": CacheFormat(modulations=False)})):
            config = DQARConfig(**options, **keeps)
            made[name + suffix] = (lambda config=config: apply_dqar(pipe, config), draw)
    return made


def measure(pipe: DiffusionPipeline, repeats: int) -> pd.DataFrame:
    """Tidy: ``method``, ``repeat``, ``seconds``, of process CPU time with one thread, warm-up left out.

    Within a repeat the methods come in an order of their own, so that none is always after the same other one.
    """
    methods, threads = calls(pipe), torch.get_num_threads()
    torch.set_num_threads(1)
    order, rows = list(methods), []
    shuffle = random.Random(0).shuffle
    try:
        for repeat in tqdm(range(repeats), desc="overhead"):
            shuffle(order)
            for name in order:
                context, draw = methods[name]
                with context():
                    draw()  # warm, and what is kept for the next run is there
                    start = time.process_time()
                    draw()
                    rows.append({"method": name, "repeat": repeat, "seconds": time.process_time() - start})
    finally:
        torch.set_num_threads(threads)
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row per method of ``METHODS``: ``speedup`` over plain (median and quartiles of paired repeats), with
    modulations made ``anew`` and ``kept``; ``floor``, ``goal``, ``share`` (of the goal's floor), ``met``."""
    wide = table.pivot(index="repeat", columns="method", values="seconds")
    speedup = wide.rdiv(wide[PLAIN], axis=0)
    rows = []
    for name, (_, kind, goal) in METHODS.items():
        anew = speedup[f"{name}, modulations anew"]
        base = 1.0 if kind is None else speedup[f"floor: {kind}"].median()
        rows.append(
            {
                "method": name,
                "anew": anew.median(),
                "anew_low": anew.quantile(0.25),
                "anew_high": anew.quantile(0.75),
                "kept": speedup[name].median(),
                "floor": None if kind is None else base,
                "goal": goal,
                "share": anew.median() / base,
                "share_kept": speedup[name].median() / base,
                "met": anew.median() / base >= goal,
                "met_kept": speedup[name].median() / base >= goal,
            }
        )
    return pd.DataFrame(rows)
