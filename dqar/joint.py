"""Sites of joint attentions, where image and caption attend to both at once, as in SD3 and Flux.

Their processors do all the work. What is decided about is taken over around and inside them: the attention's outputs,
or the projections of keys and values.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dqar import stats
from dqar.cache import Name
from dqar.config import DQARConfig
from dqar.controller import Choice
from dqar.families import Layer
from dqar.sites import Given, KeysAndValues, OpenCall, Rows, Site, Waiting
from dqar.takeover import Handler, original_class

OUTPUTS: tuple[Name, Name] = ("output", "text_output")


class JointSite(Site):
    """An attention of image and caption together, whose outputs for both are kept.

    Its processor does all the work, and its queries and keys are seen where they are attended with: after all norms and
    rotary embeddings, whatever these are.
    """

    takes_captions = True

    def __init__(self, opened: Callable[[], OpenCall | None], layer_id: int, layer: Layer, config: DQARConfig):
        super().__init__(opened, layer_id, layer, config)
        self._names = OUTPUTS if layer.attention.added_kv_proj_dim is not None else OUTPUTS[:1]
        """Names of the outputs; one only where the caption's tokens came merged with the image's."""

    def _computed(self, opened: OpenCall, rows: Rows, entropy: torch.Tensor | None, output: Any) -> None:
        outputs = _streams(output)
        opened.controller.keep(
            self.layer_id, rows, entropy, _tokens(output), dict(zip(self._names, outputs, strict=True))
        )

    def _cached(self, opened: OpenCall, branches: tuple[str, ...]) -> Any:
        outputs = tuple(opened.cached(self.layer_id, branches, name) for name in self._names)
        return outputs if len(outputs) > 1 else outputs[0]

    def _joined(self, parts: list[Any]) -> Any:
        return torch.cat(parts) if len(self._names) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))

    def _compute(self, opened: OpenCall, given: Given) -> tuple[Any, torch.Tensor | None]:
        return self._measured(opened, given, opened.controller.wants_entropy(self.layer_id))

    def _measured(self, opened: OpenCall, given: Given, measure: bool) -> tuple[Any, torch.Tensor | None]:
        """The processor's output, and ``stats.entropy_by_modality``."""
        attention_class: Any = original_class(self.attention)
        forward = attention_class.forward  # past others' hooks, which are through
        given = dataclasses.replace(given, original=functools.partial(forward, self.attention))
        if not measure:
            return given.computed(), None
        with _SeenAttentions() as seen:
            output = given.computed()
        if len(seen.attentions) != 1:
            raise ValueError(
                f"layer {self.layer_id} calls F.scaled_dot_product_attention {len(seen.attentions)} times: DQAR "
                "measures the entropy of one call, as after set_attention_backend('native')"
            )
        [(query, key)] = seen.attentions
        text, queries = self.layer.place.text, self.config.probe.queries
        if text is None:
            return output, stats.mean_query_entropy(query, key, num_queries=queries)
        words = opened.words if given.caption is None else given.caption.shape[1]
        tokens = query.shape[2] - words
        images, texts = (slice(words, None), slice(words)) if text == "first" else (slice(tokens), slice(tokens, None))
        return output, stats.entropy_by_modality(query, key, images, texts, queries)


class JointKeysAndValues(KeysAndValues, JointSite):
    """The keys and values of image and caption are kept as they are projected, before norms and rotary embeddings."""

    def __init__(self, opened: Callable[[], OpenCall | None], layer_id: int, layer: Layer, config: DQARConfig):
        super().__init__(opened, layer_id, layer, config)
        attn = layer.attention
        self._projections: dict[Name, torch.nn.Module] = {"k": attn.to_k, "v": attn.to_v}
        if len(self._names) > 1:
            self._projections |= {"text_k": attn.add_k_proj, "text_v": attn.add_v_proj}

    def handlers(self) -> list[tuple[torch.nn.Module, Handler]]:
        """See ``Site``."""
        projections = self._projections.items()
        return [*super().handlers(), *((module, functools.partial(self.project, name)) for name, module in projections)]

    def _attend(self, opened: OpenCall, choice: Choice, given: Given) -> Any:
        waiting = opened.waiting[self.layer_id] = Waiting(given.hidden_states.shape[:-1], choice)
        measure = bool(choice.fresh) and opened.controller.wants_entropy(self.layer_id)
        try:
            output, entropy = self._measured(opened, given, measure)
        finally:
            del opened.waiting[self.layer_id]
        if waiting.projected.keys() != self._projections.keys():
            raise ValueError(
                f"layer {self.layer_id} has other projections than when DQAR was applied, or fused ones: call "
                "remove_dqar first, and unfuse_qkv_projections"
            )
        rows = opened.rows(given.hidden_states, self.layer_id)
        self._keep(opened, choice, rows, entropy, _tokens(output), waiting.projected)
        return output

    def project(self, name: Name, original: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Answers a projection's calls on ``[B, N, C]``: computed, restored or shared as its attention just is."""
        opened, layer_id = self.opened(), self.layer_id
        if opened is None or layer_id not in opened.waiting:
            return original(x)
        waiting = opened.waiting[layer_id]
        choice = waiting.choice
        if choice.all_fresh:
            projected = original(x)
        elif not choice.fresh:
            projected = opened.cached(layer_id, choice.cached, name)
        else:
            rows = opened.rows(x, layer_id)
            parts = choice.parts(lambda b: original(x[rows[b]]), lambda b: opened.cached(layer_id, (b,), name))
            projected = torch.cat([parts[branch] for branch in rows])
        waiting.projected[name] = projected
        return projected


def _streams(output: Any) -> tuple[torch.Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def _tokens(output: Any) -> int:
    """Of all streams."""
    return sum(stream.shape[1] for stream in _streams(output))


class _SeenAttentions(TorchFunctionMode):
    """The queries and keys ``[B, H, N, D]`` of all attentions meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key"), args, strict=False)) | (kwargs or {})
            self.attentions.append((named["query"], named["key"]))
        return func(*args, **(kwargs or {}))


JOINT_SITES: dict[str, type[Site]] = {"kv": JointKeysAndValues, "output": JointSite}
"""By ``reuse_target``."""
