"""Sites: for each reuse target one class, that says what of a block it takes over, what it keeps and what it restores.

A site holds nothing of a run; that is in the ``OpenCall``, which is there while the transformer's forward pass is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dqar import stats
from dqar.cache import Name, Tensors, recall
from dqar.config import DQARConfig
from dqar.controller import Choice, DQARController
from dqar.families import Layer, check_processor
from dqar.run import Call
from dqar.takeover import Handler
from dqar.unchanged import Unchanged

Rows = dict[str, slice]
"""The branches' rows of a tensor ``[B, N, C]``."""
Streams = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""What an attention is given, and returns: tokens ``[B, N, C]``, or those of image and caption of a joint attention."""
SAMPLED_QUERIES = 32
"""Whose products fitted levels of K and V keep: of the digits' 64, half cost a third and give 1 dB less."""


@dataclass
class Waiting:
    """State that a layer's attention passes on to its feed-forward or block."""

    shape: torch.Size
    choice: Choice
    computed: list[tuple[Rows, torch.Tensor | None, torch.Tensor]] = field(default_factory=list)
    """Branches, their entropy ``[B, H]`` if it was measured, and the attention's output ``[B, N, C]``."""
    projected: Tensors = field(default_factory=dict)
    """A joint attention's keys and values ``[B, N, C]``."""

    def check_whole(self, hidden_states: torch.Tensor, layer_id: int) -> None:
        """Raises ``ValueError`` for a feed-forward of chunks, of ``hidden_states`` ``[B, N, C]``."""
        if hidden_states.shape[:-1] != self.shape:
            raise ValueError(
                f"layer {layer_id}'s feed-forward was given {tuple(hidden_states.shape)} after an attention of "
                f"{tuple(self.shape)}: DQAR takes it whole, without feed_forward_chunk_size"
            )


@dataclass
class OpenCall:
    """The forward pass that is under way, for its sites to look things up."""

    controller: DQARController
    call: Call
    batch: int
    step: int
    choices: list[Choice]
    """By layer; empty: every site is computed, as ever."""
    constants: dict[int, torch.Tensor] | None
    """What doesn't depend on the latents, by module; ``None``: to be computed as ever."""
    words: int = 0
    """Tokens of the caption that the model is given."""
    waiting: dict[int, Waiting] = field(default_factory=dict)
    """By layer, what a site's first part leaves to its last."""

    def rows(self, hidden_states: torch.Tensor, layer_id: int) -> Rows:
        """The branches' rows of ``hidden_states`` ``[B, N, C]``: of Latte's, ``B`` is samples times frames.

        Raises:
            ValueError: a part of the batch.
        """
        rows, batch = self.call.slices, self.batch
        if len(hidden_states) == batch:
            return rows
        times, rest = divmod(len(hidden_states), batch)
        if rest or not times:
            raise ValueError(
                f"layer {layer_id} was given {len(hidden_states)} samples in a forward pass of {batch}: DQAR takes "
                "whole batches, without chunks"
            )
        return {branch: slice(part.start * times, part.stop * times) for branch, part in rows.items()}

    def cached(self, layer_id: int, branches: tuple[str, ...], name: Name = "output") -> torch.Tensor:
        """A cached tensor ``[B, N, C]`` of these branches, one below the other, at the open step."""
        return recall(self.controller.cache.entries(layer_id, branches), self.step, name)

    def reused(self, layer_id: int, branches: tuple[str, ...]) -> None:
        """Records that these branches' entries are reused."""
        for entry in self.controller.cache.entries(layer_id, branches):
            self.controller.reuse(entry)


@dataclass(slots=True)
class Given:
    """What an attention is called with: ``[B, N, C]``, and of a cross- or joint attention ``[B, words, C]``."""

    original: Callable[..., Any]
    hidden_states: torch.Tensor
    caption: torch.Tensor | None
    mask: torch.Tensor | None
    others: dict[str, Any]
    """Such as rotary embeddings."""

    def computed(self) -> Any:
        """The output as ever."""
        return self.original(self.hidden_states, self.caption, self.mask, **self.others)

    def part(self, rows: slice) -> Given:
        """Some rows of it."""
        caption = None if self.caption is None else self.caption[rows]
        return dataclasses.replace(self, hidden_states=self.hidden_states[rows], caption=caption)


class _TakenAttention:
    """An attention whose calls are answered here, with ``AttnProcessor2_0``'s operations.

    Args:
        opened: a function that returns this thread's ``OpenCall``, if there is one.
        layer_id: of the block.
        attention: of diffusers.
        config: of the session.
    """

    def __init__(self, opened: Callable[[], OpenCall | None], layer_id: int, attention: Any, config: DQARConfig):
        self.opened, self.layer_id, self.attention, self.config = opened, layer_id, attention, config

    def attend(
        self,
        original: Callable[..., Any],
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answers the attention's calls."""
        given = Given(original, hidden_states, encoder_hidden_states, attention_mask, kwargs)
        opened = self.opened()
        output = None if opened is None else self._answer(opened, given)
        return given.computed() if output is None else output

    def _answer(self, opened: OpenCall, given: Given) -> Streams | None:
        """The attention's output; ``None``: it is computed as ever."""
        raise NotImplementedError

    def _seen_by_hooks(self, given: Given, answer: Callable[[Given], Any]) -> Any:
        """The answer; through the module where others' hooks are on it, past it where there are none."""
        attn = self.attention
        if not (attn._forward_hooks or attn._forward_pre_hooks or "forward" in vars(attn)):
            return answer(given)
        processor = attn.processor

        def with_the_original(*arguments: Any) -> Any:
            attn.processor = processor
            return answer(Given(given.original, *arguments))

        attn.processor = _Answer(with_the_original)
        try:
            return given.computed()
        finally:
            attn.processor = processor

    def _heads(self, x: torch.Tensor, norm: torch.nn.Module | None = None) -> torch.Tensor:
        """``[B, N, C]`` as ``[B, H, N, C / H]``, normalised where the model does."""
        x = x.unflatten(-1, (self.attention.heads, -1)).transpose(1, 2)
        return x if norm is None else norm(x)

    def _project_out(self, output: torch.Tensor) -> torch.Tensor:
        """``[B, H, N, C / H]`` as the module's output ``[B, N, C]``."""
        attn = self.attention
        output = attn.to_out[1](attn.to_out[0](output.transpose(1, 2).flatten(2)))
        return output if attn.rescale_output_factor == 1 else output / attn.rescale_output_factor


class _Answer:
    """An attention processor for one call that returns the decided output, so that others' hooks still see it."""

    def __init__(self, answer: Callable[..., Any]):
        self.answer = answer

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
        **others: Any,
    ) -> Any:
        if image_rotary_emb is not None:
            others["image_rotary_emb"] = image_rotary_emb
        return self.answer(hidden_states, encoder_hidden_states, attention_mask, others)


class Site(_TakenAttention):
    """A layer's attention, whose output is kept: ``reuse_target="output"``.

    Args:
        opened: a function that returns this thread's ``OpenCall``, if there is one.
        layer_id, layer: its number, and what it is in the model.
        config: of the session.
    """

    takes_captions = False
    """Whether the attention may be given the caption's tokens."""

    def __init__(self, opened: Callable[[], OpenCall | None], layer_id: int, layer: Layer, config: DQARConfig):
        super().__init__(opened, layer_id, layer.attention, config)
        self.layer, self.block = layer, layer.block

    def handlers(self) -> list[tuple[torch.nn.Module, Handler]]:
        """The modules to take over, and who answers their calls."""
        return [(self.attention, self.attend)]

    def _answer(self, opened: OpenCall, given: Given) -> Streams | None:
        if not opened.choices:
            return None
        if given.mask is not None or (given.caption is not None and not self.takes_captions):
            name = "encoder_hidden_states" if given.mask is None else "attention_mask"
            raise ValueError(f"layer {self.layer_id} was given {name}: DQAR takes unmasked self-attention only")
        check_processor(self.layer, self.layer_id)
        choice = opened.choices[self.layer_id]
        if self._is_plain(opened, choice):
            output, rows = given.computed(), opened.rows(given.hidden_states, self.layer_id)
            self._computed(opened, rows, None, output)
            return output
        return self._seen_by_hooks(given, functools.partial(self._attend, opened, choice))

    def _is_plain(self, opened: OpenCall, choice: Choice) -> bool:
        """Whether the layer is computed for all branches, as ever."""
        return choice.all_fresh and not opened.controller.wants_entropy(self.layer_id)

    def _attend(self, opened: OpenCall, choice: Choice, given: Given) -> Streams:
        layer_id = self.layer_id
        if not choice.fresh:
            output = self._cached(opened, choice.cached)
            opened.reused(layer_id, choice.cached)
            return output
        rows = opened.rows(given.hidden_states, layer_id)
        if choice.all_fresh:
            output, entropy = self._compute(opened, given)
            self._computed(opened, rows, entropy, output)
            return output
        fresh = {branch: self._compute(opened, given.part(rows[branch])) for branch in choice.fresh}
        parts = choice.parts(lambda b: fresh[b][0], lambda b: self._cached(opened, (b,)))
        for branch in (*choice.fresh, *choice.shared):
            entropy = fresh[branch][1] if branch in fresh else None
            self._computed(opened, {branch: slice(None)}, entropy, parts[branch])
        opened.reused(layer_id, choice.cached)
        return self._joined([parts[branch] for branch in rows])

    def _computed(self, opened: OpenCall, rows: Rows, entropy: torch.Tensor | None, output: Any) -> None:
        opened.controller.keep(self.layer_id, rows, entropy, output.shape[1], {"output": output})

    def _cached(self, opened: OpenCall, branches: tuple[str, ...]) -> Any:
        return opened.cached(self.layer_id, branches)

    def _joined(self, parts: list[Any]) -> Any:
        """The branches' outputs as one."""
        return torch.cat(parts)

    def _compute(self, opened: OpenCall, given: Given) -> tuple[Any, torch.Tensor | None]:
        """The attention's output and, if it is due, its entropy ``[B, H]``."""
        attn, hidden_states = self.attention, given.hidden_states
        if not opened.controller.wants_entropy(self.layer_id):
            return attn.processor(attn, hidden_states), None
        query, key, value = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        return self._weighted(query, key, value, measure=True)

    def _weighted(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, measure: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``AttnProcessor2_0``'s operations, bit for bit, on projections ``[B, N, C]``; and the entropy ``[B, H]``."""
        attn = self.attention
        query, key, value = self._heads(query, attn.norm_q), self._heads(key, attn.norm_k), self._heads(value)
        if not measure:
            return self._project_out(F.scaled_dot_product_attention(query, key, value)), None
        output, entropy = stats.fused_attention_with_entropy(query, key, value, num_queries=self.config.probe.queries)
        return self._project_out(output), entropy


class KeysAndValues(Site):
    """The attention's keys and values are kept, its queries are fresh: ``reuse_target="kv"`` (slide 9)."""

    def _is_plain(self, opened: OpenCall, choice: Choice) -> bool:
        return super()._is_plain(opened, choice) and not opened.controller.wants_commit(self.layer_id)

    def _attend(self, opened: OpenCall, choice: Choice, given: Given) -> torch.Tensor:
        attn, layer_id, hidden_states = self.attention, self.layer_id, given.hidden_states
        rows, tokens = opened.rows(hidden_states, layer_id), hidden_states.shape[1]

        def fresh(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return attn.to_k(part), attn.to_v(part)

        def cached(branches: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
            return opened.cached(layer_id, branches, "k"), opened.cached(layer_id, branches, "v")

        query = attn.to_q(hidden_states)
        if choice.all_fresh:
            key, value = fresh(hidden_states)
        elif not choice.fresh:
            key, value = cached(choice.cached)
        else:
            parts = choice.parts(lambda b: fresh(hidden_states[rows[b]]), lambda b: cached((b,)))
            key, value = (torch.cat([parts[branch][which] for branch in rows]) for which in (0, 1))
        measure = bool(choice.fresh) and opened.controller.wants_entropy(layer_id)
        output, entropy = self._weighted(query, key, value, measure)
        kept: Tensors = {"k": key, "v": value}
        partners: Tensors = {}
        quantized = bool(choice.fresh) and self.config.bits_of(layer_id) < 16
        if quantized and self.config.balance:
            weights = _largest_weights(attn.to_out[0], value).expand(len(value), 1, -1)
            partners = {"k": query.abs().amax(dim=1, keepdim=True), "v": weights}
        elif quantized and self.config.spares_products and attn.norm_k is None:
            some = stats.spread(self._heads(query, attn.norm_q), SAMPLED_QUERIES).float()
            scores = some @ self._heads(key).float().mT * some.shape[-1] ** -0.5
            partners = {"k": some, "v": scores.softmax(-1)}
        self._keep(opened, choice, rows, entropy, tokens, kept, partners)
        return output

    def _keep(
        self,
        opened: OpenCall,
        choice: Choice,
        rows: Rows,
        entropy: torch.Tensor | None,
        tokens: int,
        kept: Tensors,
        partners: Tensors | None = None,
    ) -> None:
        """Keeps what fresh branches computed, of tensors of all branches."""
        if choice.all_fresh:
            opened.controller.keep(self.layer_id, rows, entropy, tokens, kept, partners)
            return
        for branch in (*choice.fresh, *choice.shared):
            part = rows[branch]
            measured = None if entropy is None or branch in choice.shared else entropy[part]
            ours, theirs = ({name: x[part] for name, x in tensors.items()} for tensors in (kept, partners or {}))
            opened.controller.keep(self.layer_id, {branch: slice(None)}, measured, tokens, ours, theirs)
        opened.reused(self.layer_id, choice.cached)


class AttentionAndFeedForward(Site):
    """The outputs of attention and feed-forward are kept, by one decision: ``reuse_target="block"``.

    Raises:
        ValueError: a block without diffusers' feed-forward.
    """

    def __init__(self, opened: Callable[[], OpenCall | None], layer_id: int, layer: Layer, config: DQARConfig):
        super().__init__(opened, layer_id, layer, config)
        if not isinstance(getattr(self.block, "ff", None), FeedForward):
            target = config.reuse_target
            raise ValueError(
                f"layer {layer_id} has no diffusers `ff`: reuse_target={target!r} takes one in every block"
            )

    def handlers(self) -> list[tuple[torch.nn.Module, Handler]]:
        """See ``Site``."""
        return [(self.attention, self.attend), (self.block.ff, self.feed_forward)]

    def _answer(self, opened: OpenCall, given: Given) -> Streams | None:
        if opened.choices:
            shape = given.hidden_states.shape[:-1]
            opened.waiting[self.layer_id] = Waiting(shape, opened.choices[self.layer_id])
        return super()._answer(opened, given)

    def _computed(self, opened: OpenCall, rows: Rows, entropy: torch.Tensor | None, output: Any) -> None:
        opened.waiting[self.layer_id].computed.append((rows, entropy, output))

    def feed_forward(
        self, original: Callable[..., torch.Tensor], hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Answers the feed-forward's calls on ``[B, N, C]``: computed, restored or shared as the attention just was."""
        opened, layer_id = self.opened(), self.layer_id
        if opened is None or layer_id not in opened.waiting:  # called by itself, not by its block
            return original(hidden_states, *args, **kwargs)
        waiting = opened.waiting.pop(layer_id)
        waiting.check_whole(hidden_states, layer_id)
        choice, rows = waiting.choice, opened.rows(hidden_states, layer_id)
        if not choice.fresh:
            return opened.cached(layer_id, choice.cached, "feed_forward")
        if choice.all_fresh:
            output = original(hidden_states, *args, **kwargs)
            parts = {branch: output[part] for branch, part in rows.items()}
        else:
            parts = choice.parts(
                lambda b: original(hidden_states[rows[b]], *args, **kwargs),
                lambda b: opened.cached(layer_id, (b,), "feed_forward"),
            )
            output = torch.cat([parts[branch] for branch in rows])
        for computed, entropy, attention in waiting.computed:
            whole = output if len(computed) == len(rows) else parts[next(iter(computed))]
            kept: Tensors = {"output": attention, "feed_forward": whole}
            opened.controller.keep(layer_id, computed, entropy, hidden_states.shape[1], kept)
        return output


class Residual(AttentionAndFeedForward):
    """All that a block adds to its input is kept: ``reuse_target="residual"``.

    Where only one branch computes, attention and feed-forward leave the other out, and its rows are dropped.
    """

    def handlers(self) -> list[tuple[torch.nn.Module, Handler]]:
        """See ``Site``."""
        return [(self.block, self.whole), *super().handlers()]

    def whole(
        self, original: Callable[..., torch.Tensor], hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Answers the block's calls on ``[B, N, C]``."""
        opened = self.opened()
        if opened is None or not opened.choices:
            return original(hidden_states, *args, **kwargs)
        layer_id, choice = self.layer_id, opened.choices[self.layer_id]
        rows = opened.rows(hidden_states, layer_id)
        if not choice.fresh:
            change = opened.cached(layer_id, choice.cached)
            opened.reused(layer_id, choice.cached)
            return hidden_states + change
        waiting = opened.waiting[layer_id] = Waiting(hidden_states.shape[:-1], choice)
        try:
            output = original(hidden_states, *args, **kwargs)
        finally:
            opened.waiting.pop(layer_id, None)
        change, tokens = output - hidden_states, hidden_states.shape[1]
        if choice.all_fresh:
            for _, entropy, _ in waiting.computed:
                opened.controller.keep(layer_id, rows, entropy, tokens, {"output": change})
            return output
        changes = choice.parts(lambda b: change[rows[b]], lambda b: opened.cached(layer_id, (b,)))
        for computed, entropy, _ in waiting.computed:
            opened.controller.keep(layer_id, computed, entropy, tokens, {"output": changes[next(iter(computed))]})
        opened.reused(layer_id, choice.cached)
        return torch.cat([output[r] if b in choice.fresh else hidden_states[r] + changes[b] for b, r in rows.items()])

    def _answer(self, opened: OpenCall, given: Given) -> Streams | None:
        if self.layer_id not in opened.waiting:  # called by itself, not by its block
            return None
        return Site._answer(self, opened, given)

    def _attend(self, opened: OpenCall, choice: Choice, given: Given) -> Streams:
        """What isn't computed is left zero, and its rows are dropped by the block."""
        if not choice.cached:
            return super()._attend(opened, choice, given)
        rows = opened.rows(given.hidden_states, self.layer_id)
        output = torch.zeros_like(given.hidden_states)
        for branch in choice.fresh:
            part, entropy = self._compute(opened, given.part(rows[branch]))
            self._computed(opened, {branch: slice(None)}, entropy, part)
            output[rows[branch]] = part
        return output

    def feed_forward(
        self, original: Callable[..., torch.Tensor], hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """See ``AttentionAndFeedForward``; what isn't computed of ``[B, N, C]`` is left zero."""
        opened, layer_id = self.opened(), self.layer_id
        if opened is None or layer_id not in opened.waiting:
            return original(hidden_states, *args, **kwargs)
        waiting = opened.waiting[layer_id]
        waiting.check_whole(hidden_states, layer_id)
        if waiting.choice.all_fresh:
            return original(hidden_states, *args, **kwargs)
        rows, output = opened.rows(hidden_states, layer_id), torch.zeros_like(hidden_states)
        for branch in waiting.choice.fresh:
            output[rows[branch]] = original(hidden_states[rows[branch]], *args, **kwargs)
        return output


SITES: dict[str, type[Site]] = {
    "kv": KeysAndValues,
    "output": Site,
    "block": AttentionAndFeedForward,
    "residual": Residual,
}
"""By ``reuse_target``, of attentions with ``AttnProcessor2_0``."""


@dataclass(slots=True)
class Caption:
    """A caption's K and V ``[B, H, words, C / H]``, and what made them."""

    key: torch.Tensor
    value: torch.Tensor
    made_by: Unchanged


class CrossAttention(_TakenAttention):
    """A cross-attention: its K and V are the caption's, the same all run.

    With ``cache.cross_attention`` they are computed at a call's first step only, unless something else than their
    plain projections makes them. Exact.
    """

    def _answer(self, opened: OpenCall, given: Given) -> torch.Tensor | None:
        # Without a caption it attends to itself after all; another's processor does what it does.
        if given.caption is None or type(self.attention.processor) is not AttnProcessor2_0:
            return None
        return self._seen_by_hooks(given, functools.partial(self._attend, opened))

    def _attend(self, opened: OpenCall, given: Given) -> torch.Tensor:
        attn, captions = self.attention, opened.call.caption
        hidden_states, mask = given.hidden_states, given.mask
        kept: Any = captions.get(self.layer_id)
        projections = tuple(m for m in (attn.to_k, attn.to_v, attn.norm_k, attn.norm_cross) if m is not None)
        fresh = kept is None or kept.made_by.roots != projections or not kept.made_by.still()
        if fresh:
            kept = self._projected(given.caption, Unchanged(projections))
        key, value = kept.key, kept.value
        keeps = self.config.cache.cross_attention and kept.made_by.known
        if keeps:
            captions[self.layer_id] = kept
        query = self._heads(attn.to_q(hidden_states), attn.norm_q)
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, key.shape[2], len(key))
            mask = mask.view(len(key), attn.heads, -1, mask.shape[-1])
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        entropy = None
        if self.config.probe.record:
            scores = query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            entropy = stats.attention_entropy(weights, reduction="none")
        rows = opened.rows(hidden_states, self.layer_id)
        nbytes = (key.nbytes + value.nbytes) // len(rows) if keeps else 0
        opened.controller.record_cross_attention(self.layer_id, rows, fresh, nbytes, entropy, hidden_states.shape[1])
        return self._project_out(output)

    def _projected(self, caption: Any, made_by: Unchanged) -> Caption:
        attn = self.attention
        caption = attn.norm_encoder_hidden_states(caption) if attn.norm_cross else caption
        return Caption(self._heads(attn.to_k(caption), attn.norm_k), self._heads(attn.to_v(caption)), made_by)


class _LargestWeights(TorchFunctionMode):
    """max |w| of each input channel ``[C]`` of a linear layer, seen where the layer has its weights: when it is called.

    Offloaded weights are nowhere else.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            self.weights = args[1].dequantize().abs().amax(dim=0)
        return func(*args, **(kwargs or {}))


def _largest_weights(linear: torch.nn.Module, like: torch.Tensor) -> torch.Tensor:
    with _LargestWeights() as seen:
        linear(like[:1, :1])
    return seen.weights
