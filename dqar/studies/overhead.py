"""What the mechanism itself costs: process CPU time of one thread, beside hand-written floors that do nothing else.

``dqar benchmark --overhead`` measures it on the digits model at batch 1, where a step is short and Python
weighs most: every method draws one guided image in 20 steps, the methods in turn, again and again.
"""

from __future__ import annotations

import contextlib
import functools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from dqar.attention import apply_dqar
from dqar.config import CacheFormat, DQARConfig

STEPS, GUIDANCE = 20, 2.0
HALF = {"entropy_threshold": None, "snr_range": None, "schedule": "static"}
"""Computes every second step, reuses at the others."""
FLOORS = ("attention", "attention and feed-forward", "whole blocks")
"""What a hand-written floor keeps."""


@dataclass(frozen=True)
class Case:
    """A configuration of DQAR, and what it is held against.

    Attributes:
        name: for people.
        config: fields of ``DQARConfig``.
        floor: one of ``FLOORS``; ``None``: the untouched pipeline.
        goal: least share of its speed.
    """

    name: str
    config: dict[str, Any]
    floor: str | None
    goal: float


CASES = (
    Case("closed gate, nothing asked", {"schedule": "none"}, None, 0.99),
    Case("attention output, 16 bit", {**HALF, "reuse_target": "output", "quantize_bits": 16}, "attention", 0.97),
    Case("attention output, INT8", {**HALF, "reuse_target": "output"}, "attention", 0.93),
    Case("attention and feed-forward, INT8", {**HALF, "reuse_target": "block"}, "attention and feed-forward", 0.93),
    Case("whole blocks, INT8", {**HALF, "reuse_target": "residual"}, "whole blocks", 0.95),
    Case("K and V, INT8", {**HALF, "reuse_target": "kv"}, None, 1.0),
    Case("the deck's default gate", {}, None, 0.88),
)


class _Kept(torch.nn.Module):
    """Stands in a module's place: keeps its output at even steps, in 16 bit or what the model has, and returns it at
    odd ones; of a whole block, what it adds to its input."""

    def __init__(self, module: torch.nn.Module, step: Callable[[], int], residual: bool = False):
        super().__init__()
        self.module, self.step, self.residual = module, step, residual
        self.kept = torch.empty(0)
        if residual:
            self.norm1 = module.norm1  # DiT's last layer asks the first block's for its embedding

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.step() % 2:
            return hidden_states + self.kept if self.residual else self.kept
        output = self.module(hidden_states, *args, **kwargs)
        self.kept = output - hidden_states if self.residual else output
        return output


class _KeptAttention:
    """The same as an attention processor."""

    def __init__(self, original: Callable, step: Callable[[], int]):
        self.original, self.step = original, step
        self.kept = torch.empty(0)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not self.step() % 2:
            self.kept = self.original(attn, hidden_states, encoder_hidden_states, attention_mask)
        return self.kept


@contextlib.contextmanager
def floor(transformer: Any, kind: str) -> Iterator[None]:
    """Reuse at every second step as one would write it by hand: nothing is decided, quantized, traced or checked.

    Args:
        transformer: with diffusers' ``transformer_blocks``. Blocks and feed-forwards are replaced by modules around
            them, attention processors by others; afterwards all are as they were.
        kind: one of ``FLOORS``.
    """
    blocks, steps = transformer.transformer_blocks, [-1]
    originals = list(blocks)
    processors = [block.attn1.processor for block in originals]

    def count(*_args: Any) -> None:
        steps[0] += 1

    def step() -> int:
        return steps[0]

    handle = transformer.register_forward_pre_hook(count)
    for number, (block, processor) in enumerate(zip(originals, processors, strict=True)):
        if kind == "whole blocks":
            blocks[number] = _Kept(block, step, residual=True)
            continue
        block.attn1.set_processor(_KeptAttention(processor, step))
        if kind == "attention and feed-forward":
            block.ff = _Kept(block.ff, step)
    try:
        yield
    finally:
        handle.remove()
        for number, (block, processor) in enumerate(zip(originals, processors, strict=True)):
            blocks[number] = block
            block.attn1.set_processor(processor)
            if isinstance(block.ff, _Kept):
                block.ff = block.ff.module


Contexts = dict[tuple[str, str, str], Callable[[], contextlib.AbstractContextManager[Any]]]


def contexts(pipe: DiffusionPipeline) -> Contexts:
    """By ``kind``, ``method`` and ``modulations``, what puts a method on the pipeline.

    Kinds are ``"plain"``, ``"floor"`` and ``"DQAR"``. Each of DQAR's comes twice: modulations that don't depend on the
    latents are made ``"anew"`` by the model, or ``"kept"`` from the run before of the same label, as by default.
    """
    made: Contexts = {("plain", "plain", "anew"): contextlib.nullcontext}
    for kind in FLOORS:
        made["floor", kind, "anew"] = functools.partial(floor, pipe.transformer, kind)
    for case in CASES:
        for modulations in ("kept", "anew"):
            config = DQARConfig(**case.config, cache=CacheFormat(modulations=modulations == "kept"))
            made["DQAR", case.name, modulations] = functools.partial(apply_dqar, pipe, config)
    return made


def measure(pipe: DiffusionPipeline, repeats: int) -> pd.DataFrame:
    """Tidy: ``kind``, ``method``, ``modulations``, ``repeat``, and ``seconds`` of process CPU time with one thread.

    Warm-up is left out. Within a repeat the methods come in an order of their own, so that none is always after the
    same other one.
    """

    def draw() -> None:
        pipe([7], GUIDANCE, torch.Generator().manual_seed(0), STEPS, output_type="latent")

    methods, threads = contexts(pipe), torch.get_num_threads()
    torch.set_num_threads(1)
    order, rows = list(methods), []
    shuffle = random.Random(0).shuffle
    try:
        for repeat in tqdm(range(repeats), desc="overhead"):
            shuffle(order)
            for key in order:
                with methods[key]():
                    draw()  # warm, and what is kept for the next run is there
                    start = time.process_time()
                    draw()
                    rows.append((*key, repeat, time.process_time() - start))
    finally:
        torch.set_num_threads(threads)
    return pd.DataFrame(rows, columns=["kind", "method", "modulations", "repeat", "seconds"])


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row per case: ``speedup`` over plain (median and quartiles of paired repeats), with modulations made ``anew``
    and ``kept``; ``floor``, ``goal``, ``share`` (of the goal's floor), ``met``."""
    wide = table.pivot(index="repeat", columns=["kind", "method", "modulations"], values="seconds")
    speedup = wide.rdiv(wide["plain", "plain", "anew"], axis=0)
    rows = []
    for case in CASES:
        anew, kept = (speedup["DQAR", case.name, modulations] for modulations in ("anew", "kept"))
        base = 1.0 if case.floor is None else speedup["floor", case.floor, "anew"].median()
        rows.append(
            {
                "method": case.name,
                "anew": anew.median(),
                "anew_low": anew.quantile(0.25),
                "anew_high": anew.quantile(0.75),
                "kept": kept.median(),
                "floor": None if case.floor is None else base,
                "goal": case.goal,
                "share": anew.median() / base,
                "share_kept": kept.median() / base,
                "met": anew.median() / base >= case.goal,
                "met_kept": kept.median() / base >= case.goal,
            }
        )
    return pd.DataFrame(rows)
