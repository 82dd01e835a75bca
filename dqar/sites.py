"""Sites: for each reuse target one class, that says what of a block it takes over, what it keeps and what it restores.

A site holds nothing of a run; that is in the ``OpenCall``, which is there while the transformer's forward pass is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dqar import stats
from dqar.cache import Name, recall
from dqar.config import DQARConfig
from dqar.controller import Choice, DQARController
from dqar.families import check_processor
from dqar.run import Call
from dqar.takeover import Handler

Rows = dict[str, slice]


@dataclass
class OpenCall:
    """The forward pass that is under way, for its sites to look things up."""

    controller: DQARController
    call: Call
    batch: int
    step: int
    choices: list[Choice]
    """By layer; empty: every site is computed, as ever."""
    constants: dict[int, torch.Tensor] | None = None
    """What doesn't depend on the latents, by module; ``None``: to be computed as ever."""
    waiting: dict[int, Any] = field(default_factory=dict)
    """By layer, what a site's first part leaves to its last."""

    def rows(self, hidden_states: torch.Tensor, layer_id: int) -> Rows:
        """The branches' rows of ``hidden_states`` ``[B, N, C]``: of Latte's, ``B`` is samples times frames."""
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
        """A cached tensor of these branches, one below the other, at the open step."""
        return recall([self.controller.cache.get(layer_id, branch) for branch in branches], self.step, name)

    def reused(self, layer_id: int, branches: tuple[str, ...]) -> None:
        """Records that these branches' entries serve."""
        for branch in branches:
            self.controller.reuse(self.controller.cache.get(layer_id, branch))

    def keep(
        self, layer_id: int, rows: Rows, entropy: torch.Tensor | None, tokens: int, **tensors: torch.Tensor
    ) -> None:
        """Records computed branches, and caches their ``rows`` of the tensors if they may be drawn on later."""
        if not rows:
            return
        if self.controller.wants_commit(layer_id):
            self.controller.commit_together(layer_id, rows, entropy, tokens, **tensors)
        else:
            self.controller.record_together(layer_id, rows, entropy, tokens)


class Site:
    """A layer's attention, whose output is kept: ``reuse_target="output"``.

    Args:
        opened: a function that returns this thread's ``OpenCall``, if there is one.
        layer_id: of the block.
        block: with a diffusers ``attn1``.
        config: of the session.
    """

    def __init__(
        self, opened: Callable[[], OpenCall | None], layer_id: int, block: torch.nn.Module, config: DQARConfig
    ):
        self.opened, self.layer_id, self.block, self.config = opened, layer_id, block, config
        self.attention: Attention = block.attn1

    def handlers(self) -> list[tuple[torch.nn.Module, Handler]]:
        """The modules to take over, and who answers their calls."""
        return [(self.attention, self.attend)]

    def attend(
        self,
        original: Callable,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Answers the attention's calls."""
        opened = self.opened()
        if opened is None or not opened.choices:
            return original(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        if encoder_hidden_states is not None or attention_mask is not None:
            given = "attention_mask" if encoder_hidden_states is None else "encoder_hidden_states"
            raise ValueError(f"layer {self.layer_id} was given {given}: DQAR takes unmasked self-attention only")
        check_processor(self.attention, self.layer_id)
        choice = opened.choices[self.layer_id]
        if self._is_plain(opened, choice):
            output = original(hidden_states, **kwargs)
            self._computed(opened, opened.rows(hidden_states, self.layer_id), None, hidden_states.shape[1], output)
            return output
        return _answer(self.attention, original, hidden_states, lambda x: self._attend(opened, choice, x))

    def _is_plain(self, opened: OpenCall, choice: Choice) -> bool:
        """Whether the layer is computed for all branches, as ever."""
        return not (choice.cached or choice.shared or opened.controller.wants_entropy(self.layer_id))

    def _attend(self, opened: OpenCall, choice: Choice, hidden_states: torch.Tensor) -> torch.Tensor:
        if not choice.fresh and not choice.shared:
            output = self._restored(opened, choice.cached, hidden_states)
            opened.reused(self.layer_id, choice.cached)
            return output
        rows, tokens = opened.rows(hidden_states, self.layer_id), hidden_states.shape[1]
        if not choice.cached and not choice.shared:
            output, entropy = self._compute(opened, hidden_states)
            self._computed(opened, rows, entropy, tokens, output)
            return output
        parts = {b: self._restored(opened, (b,), hidden_states[rows[b]]) for b in choice.cached}
        for branch in choice.fresh:
            parts[branch], entropy = self._compute(opened, hidden_states[rows[branch]])
            self._computed(opened, {branch: slice(None)}, entropy, tokens, parts[branch])
        for branch in choice.shared:
            parts[branch] = parts["cond"]
            self._computed(opened, {branch: slice(None)}, None, tokens, parts["cond"])
        opened.reused(self.layer_id, choice.cached)
        return torch.cat([parts[branch] for branch in rows])

    def _restored(self, opened: OpenCall, branches: tuple[str, ...], hidden_states: torch.Tensor) -> torch.Tensor:
        return opened.cached(self.layer_id, branches)

    def _computed(
        self, opened: OpenCall, rows: Rows, entropy: torch.Tensor | None, tokens: int, output: torch.Tensor
    ) -> None:
        opened.keep(self.layer_id, rows, entropy, tokens, output=output)

    def _compute(self, opened: OpenCall, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The attention ``[B, N, C]`` and, if it is due, its entropy ``[B, H]``."""
        attn = self.attention
        if not opened.controller.wants_entropy(self.layer_id):
            return attn.processor(attn, hidden_states), None
        query, key, value = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        return self._weighted(query, key, value, measure=True)

    def _weighted(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, measure: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``AttnProcessor2_0``'s operations, bit for bit, on projections ``[B, N, C]``; and the entropy ``[B, H]``."""
        attn = self.attention
        query, key, value = (_by_head(x, attn) for x in (query, key, value))
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if measure:
            queries = self.config.probe.queries
            output, entropy = stats.fused_attention_with_entropy(query, key, value, num_queries=queries)
        else:
            output, entropy = F.scaled_dot_product_attention(query, key, value), None
        return _project_out(attn, output), entropy


class KeysAndValues(Site):
    """The attention's keys and values are kept, its queries are fresh: ``reuse_target="kv"`` (slide 9)."""

    def _is_plain(self, opened: OpenCall, choice: Choice) -> bool:
        return super()._is_plain(opened, choice) and not opened.controller.wants_commit(self.layer_id)

    def _attend(self, opened: OpenCall, choice: Choice, hidden_states: torch.Tensor) -> torch.Tensor:
        attn, layer_id, controller = self.attention, self.layer_id, opened.controller
        rows, tokens = opened.rows(hidden_states, layer_id), hidden_states.shape[1]
        query = attn.to_q(hidden_states)
        if not choice.cached and not choice.shared:
            key, value = attn.to_k(hidden_states), attn.to_v(hidden_states)
        elif not choice.fresh and not choice.shared:
            key, value = (opened.cached(layer_id, choice.cached, name) for name in ("k", "v"))
        else:
            parts = {b: tuple(opened.cached(layer_id, (b,), name) for name in ("k", "v")) for b in choice.cached}
            for branch in choice.fresh:
                part = hidden_states[rows[branch]]
                parts[branch] = attn.to_k(part), attn.to_v(part)
            parts |= dict.fromkeys(choice.shared, parts.get("cond"))
            key, value = (torch.cat([parts[branch][which] for branch in rows]) for which in (0, 1))
        measure = bool(choice.fresh) and controller.wants_entropy(layer_id)
        output, entropy = self._weighted(query, key, value, measure)
        kept = {"keys": key, "values": value}
        if self.config.balance and (choice.fresh or choice.shared):
            kept["key_partner"] = query.abs().amax(dim=1, keepdim=True)
            kept["value_partner"] = _largest_weights(attn.to_out[0], value).expand(len(value), 1, -1)
        if not choice.cached and not choice.shared:
            opened.keep(layer_id, rows, entropy, tokens, **kept)
            return output
        for branch in (*choice.fresh, *choice.shared):
            part = rows[branch]
            own = None if entropy is None or branch in choice.shared else entropy[part]
            opened.keep(layer_id, {branch: slice(None)}, own, tokens, **{name: x[part] for name, x in kept.items()})
        opened.reused(layer_id, choice.cached)
        return output


class AttentionAndFeedForward(Site):
    """The outputs of attention and feed-forward are kept, by one decision: ``reuse_target="block"``."""

    def __init__(
        self, opened: Callable[[], OpenCall | None], layer_id: int, block: torch.nn.Module, config: DQARConfig
    ):
        super().__init__(opened, layer_id, block, config)
        if not isinstance(getattr(block, "ff", None), FeedForward):
            target = config.reuse_target
            raise ValueError(
                f"layer {layer_id} has no diffusers `ff`: reuse_target={target!r} takes one in every block"
            )

    def handlers(self) -> list[tuple[torch.nn.Module, Handler]]:
        """See ``Site``."""
        return [(self.attention, self.attend), (self.block.ff, self.feed_forward)]

    def attend(self, original: Callable, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See ``Site``."""
        opened = self.opened()
        if opened is not None and opened.choices:
            opened.waiting[self.layer_id] = _Waiting(hidden_states.shape[:-1], opened.choices[self.layer_id])
        return super().attend(original, hidden_states, *args, **kwargs)

    def _computed(
        self, opened: OpenCall, rows: Rows, entropy: torch.Tensor | None, tokens: int, output: torch.Tensor
    ) -> None:
        opened.waiting[self.layer_id].computed.append((rows, entropy, output))

    def feed_forward(self, original: Callable, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Answers the feed-forward's calls: computed, restored or shared where the attention just was."""
        opened = self.opened()
        waiting = opened.waiting.pop(self.layer_id, None) if opened is not None else None
        if waiting is None:  # called by itself, not by its block
            return original(hidden_states, *args, **kwargs)
        waiting.check_whole(hidden_states, self.layer_id)
        choice, rows = waiting.choice, opened.rows(hidden_states, self.layer_id)
        if not choice.fresh:
            return opened.cached(self.layer_id, tuple(rows), "feed_forward")
        if not choice.cached and not choice.shared:
            output = original(hidden_states, *args, **kwargs)
            parts = {branch: output[part] for branch, part in rows.items()}
        else:
            parts = {branch: opened.cached(self.layer_id, (branch,), "feed_forward") for branch in choice.cached}
            parts |= {branch: original(hidden_states[rows[branch]], *args, **kwargs) for branch in choice.fresh}
            parts |= dict.fromkeys(choice.shared, parts.get("cond"))
            output = torch.cat([parts[branch] for branch in rows])
        for computed, entropy, attention in waiting.computed:
            whole = output if len(computed) == len(rows) else parts[next(iter(computed))]
            opened.keep(self.layer_id, computed, entropy, hidden_states.shape[1], output=attention, feed_forward=whole)
        return output


class Residual(AttentionAndFeedForward):
    """All that a block adds to its input is kept: ``reuse_target="residual"``.

    Where only one branch computes, attention and feed-forward leave the other out, and its rows are dropped.
    """

    def handlers(self) -> list[tuple[torch.nn.Module, Handler]]:
        """See ``Site``."""
        return [(self.block, self.whole), *super().handlers()]

    def whole(self, original: Callable, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Answers the block's calls."""
        opened = self.opened()
        if opened is None or not opened.choices:
            return original(hidden_states, *args, **kwargs)
        layer_id, choice = self.layer_id, opened.choices[self.layer_id]
        rows = opened.rows(hidden_states, layer_id)
        if not choice.fresh:
            change = opened.cached(layer_id, tuple(rows))
            opened.reused(layer_id, choice.cached)
            return hidden_states + change
        waiting = opened.waiting[layer_id] = _Waiting(hidden_states.shape[:-1], choice)
        try:
            output = original(hidden_states, *args, **kwargs)
        finally:
            opened.waiting.pop(layer_id, None)
        change, tokens = output - hidden_states, hidden_states.shape[1]
        if not choice.cached and not choice.shared:
            for _, entropy, _ in waiting.computed:
                opened.keep(layer_id, rows, entropy, tokens, output=change)
            return output
        changes = {branch: opened.cached(layer_id, (branch,)) for branch in choice.cached}
        changes |= {branch: change[rows[branch]] for branch in choice.fresh}
        changes |= dict.fromkeys(choice.shared, changes.get("cond"))
        for computed, entropy, _ in waiting.computed:
            opened.keep(layer_id, computed, entropy, tokens, output=changes[next(iter(computed))])
        opened.reused(layer_id, choice.cached)
        return torch.cat([output[r] if b in choice.fresh else hidden_states[r] + changes[b] for b, r in rows.items()])

    def attend(self, original: Callable, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See ``Site``; what isn't computed is left zero, and its rows are dropped by the block."""
        opened = self.opened()
        if opened is None or self.layer_id not in opened.waiting:  # called by itself, not by its block
            return original(hidden_states, *args, **kwargs)
        return Site.attend(self, original, hidden_states, *args, **kwargs)

    def _attend(self, opened: OpenCall, choice: Choice, hidden_states: torch.Tensor) -> torch.Tensor:
        if not choice.cached:
            return super()._attend(opened, choice, hidden_states)
        rows = opened.rows(hidden_states, self.layer_id)
        output = torch.zeros_like(hidden_states)
        for branch in choice.fresh:
            part, entropy = self._compute(opened, hidden_states[rows[branch]])
            self._computed(opened, {branch: slice(None)}, entropy, hidden_states.shape[1], part)
            output[rows[branch]] = part
        return output

    def feed_forward(self, original: Callable, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See ``AttentionAndFeedForward``; what isn't computed is left zero."""
        opened = self.opened()
        waiting = opened.waiting.get(self.layer_id) if opened is not None else None
        if waiting is None:
            return original(hidden_states, *args, **kwargs)
        waiting.check_whole(hidden_states, self.layer_id)
        choice = waiting.choice
        if not choice.cached and not choice.shared:
            return original(hidden_states, *args, **kwargs)
        rows, output = opened.rows(hidden_states, self.layer_id), torch.zeros_like(hidden_states)
        for branch in choice.fresh:
            output[rows[branch]] = original(hidden_states[rows[branch]], *args, **kwargs)
        return output


SITES: dict[str, type[Site]] = {
    "kv": KeysAndValues,
    "output": Site,
    "block": AttentionAndFeedForward,
    "residual": Residual,
}
"""By ``reuse_target``."""


@dataclass
class _Waiting:
    """What a layer's attention leaves to its feed-forward, or its block."""

    shape: torch.Size
    choice: Choice
    computed: list[tuple[Rows, torch.Tensor | None, torch.Tensor]] = field(default_factory=list)

    def check_whole(self, hidden_states: torch.Tensor, layer_id: int) -> None:
        """Raises ``ValueError`` for a feed-forward of chunks."""
        if hidden_states.shape[:-1] != self.shape:
            raise ValueError(
                f"layer {layer_id}'s feed-forward was given {tuple(hidden_states.shape)} after an attention of "
                f"{tuple(self.shape)}: DQAR takes it whole, without feed_forward_chunk_size"
            )


class CrossAttention:
    """A cross-attention: its K and V are the caption's, the same all run.

    With ``cache.cross_attention`` they are computed at a call's first step only, to the bit what they would be at any.
    """

    def __init__(self, opened: Callable[[], OpenCall | None], layer_id: int, attention: Attention, config: DQARConfig):
        self.opened, self.layer_id, self.attention, self.config = opened, layer_id, attention, config

    def attend(
        self,
        original: Callable,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Answers the attention's calls."""
        opened, attn = self.opened(), self.attention
        # Without a caption it attends to itself after all; another's processor does what it does.
        if opened is None or encoder_hidden_states is None or type(attn.processor) is not AttnProcessor2_0:
            return original(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        return _answer(
            attn,
            original,
            hidden_states,
            lambda x: self._attend(opened, x, encoder_hidden_states, attention_mask),
            encoder_hidden_states,
            attention_mask,
        )

    def _attend(
        self,
        opened: OpenCall,
        hidden_states: torch.Tensor,
        caption: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        attn, kept, keeps = self.attention, opened.call.caption, self.config.cache.cross_attention
        fresh = self.layer_id not in kept
        if fresh:
            caption = attn.norm_encoder_hidden_states(caption) if attn.norm_cross else caption
            key, value = (_by_head(layer(caption), attn) for layer in (attn.to_k, attn.to_v))
            key = key if attn.norm_k is None else attn.norm_k(key)
            if keeps:
                kept[self.layer_id] = key, value
        else:
            key, value = kept[self.layer_id]
        query = _by_head(attn.to_q(hidden_states), attn)
        query = query if attn.norm_q is None else attn.norm_q(query)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, key.shape[2], len(key))
            attention_mask = attention_mask.view(len(key), attn.heads, -1, attention_mask.shape[-1])
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        entropy = None
        if self.config.probe.record:
            scores = query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5
            weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
            entropy = stats.attention_entropy(weights, reduction="none")
        rows = opened.rows(hidden_states, self.layer_id)
        nbytes = (key.nbytes + value.nbytes) // len(rows) if keeps else 0
        opened.controller.record_cross_attention(self.layer_id, rows, fresh, nbytes, entropy, hidden_states.shape[1])
        return _project_out(attn, output)


class _Answer:
    """An attention processor for one call: answers with what is decided, in the place where others' hooks see it."""

    def __init__(self, answer: Callable[[torch.Tensor], torch.Tensor]):
        self.answer = answer

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.answer(hidden_states)


def _answer(
    attn: Attention,
    original: Callable,
    hidden_states: torch.Tensor,
    answer: Callable[[torch.Tensor], torch.Tensor],
    *more: torch.Tensor | None,
) -> torch.Tensor:
    """The attention's answer; through the module where others' hooks are on it, past it where there are none."""
    if not (attn._forward_hooks or attn._forward_pre_hooks or "forward" in vars(attn)):
        return answer(hidden_states)
    processor = attn.processor

    def with_the_original(x: torch.Tensor) -> torch.Tensor:
        attn.processor = processor
        return answer(x)

    attn.processor = _Answer(with_the_original)
    try:
        return original(hidden_states, *more)
    finally:
        attn.processor = processor


def _by_head(x: torch.Tensor, attn: Attention) -> torch.Tensor:
    """``[B, N, C]`` as ``[B, H, N, C / H]``."""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _project_out(attn: Attention, output: torch.Tensor) -> torch.Tensor:
    """``[B, H, N, C / H]`` as the module's output ``[B, N, C]``."""
    output = attn.to_out[1](attn.to_out[0](output.transpose(1, 2).flatten(2)))
    return output if attn.rescale_output_factor == 1 else output / attn.rescale_output_factor


class _LargestWeights(TorchFunctionMode):
    """max |w| of each input channel ``[C]`` of a linear layer, seen where the layer has its weights: when it is called.

    Offloaded weights are nowhere else.
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.linear:
            self.weights = args[1].dequantize().abs().amax(dim=0)
        return func(*args, **(kwargs or {}))


def _largest_weights(linear: torch.nn.Module, like: torch.Tensor) -> torch.Tensor:
    with _LargestWeights() as seen:
        linear(like[:1, :1])
    return seen.weights
