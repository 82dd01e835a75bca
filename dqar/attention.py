"""DQAR on a diffusers transformer: one attention processor per self-attention layer, one hook on the model.

Nothing of the model is edited or subclassed: processors are swapped with ``Attention.set_processor``, the hook sits in
diffusers' ``HookRegistry``, and the scheduler's ``step`` is watched for the guided prediction while a run lasts. With
``reuse_target="block"`` each block's feed-forward has a hook too, that follows its attention's decision; with
``"residual"`` so has the block, which decides for both.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch.nn import functional as F

from dqar import stats
from dqar.cache import CacheEntry
from dqar.config import DQARConfig
from dqar.controller import DQARController
from dqar.forecast import FinalHiddenStates, OutputForecast
from dqar.plan import ForecastPlan, describe_model
from dqar.trace import Trace

HOOK_NAME = "dqar"
# How the pipelines of each model stack the branches of classifier-free guidance in one batch.
BRANCH_ORDER = {"DiTTransformer2DModel": ("cond", "uncond"), "PixArtTransformer2DModel": ("uncond", "cond")}
Condition = tuple[torch.Tensor | None, torch.Tensor | None]
"""Class labels or caption embeddings, and the caption's mask: what a run keeps to."""
Sites = tuple[torch.Size, dict[str, slice], dict[str, CacheEntry], dict[str, slice]]
"""A layer at a step: its ``[B, N]``, the branches that are computed, with their rows, those cached, those shared."""


def apply_dqar(pipe: Any, config: DQARConfig | None = None, prompt_length: int | None = None) -> DQARSession:
    """Attaches DQAR to a diffusers pipeline or transformer; use as context manager, or end with ``remove_dqar``.

    Args:
        pipe: a pipeline with a DiT-like ``transformer``, or the transformer. A transformer alone has no scheduler to
            predict x0 with, so that its SNR is unknown and only an SNR range of ``(0, inf)`` opens the gate; it tells
            the number of steps from the first two timesteps, and reuses from the third step on.
        config: the deck's defaults if left out.
        prompt_length: words of the prompt or label, for slide 5's τ(p). ``None`` takes the caption's tokens (mean over
            the batch) where the model is given a caption with a mask, and else leaves the threshold as it is.

    Returns:
        The session: its ``trace`` and ``controller`` stay readable after removal.

    Raises:
        ValueError: no self-attention that DQAR can take over, DQAR is there already, or a plan for another model.
    """
    transformer = getattr(pipe, "transformer", pipe)
    layers = _self_attention_layers(transformer)
    if config is not None and isinstance(config.plan, ForecastPlan):
        config.plan.check_model(describe_model(transformer))
    if _find_session(transformer) is not None:
        raise ValueError("DQAR is already applied to this transformer: call remove_dqar first")
    return DQARSession(pipe, transformer, layers, config or DQARConfig(), prompt_length)


def remove_dqar(pipe: Any) -> None:
    """Takes DQAR off a pipeline or transformer and frees its cache; does nothing where it isn't applied."""
    session = _find_session(getattr(pipe, "transformer", pipe))
    if session is not None:
        session.remove()


class DQARSession:
    """DQAR on one model: the controller, its trace, and what has to be put back."""

    def __init__(
        self,
        pipe: Any,
        transformer: torch.nn.Module,
        layers: list[Attention],
        config: DQARConfig,
        prompt_length: int | None,
    ):
        self.controller = DQARController(len(layers), config)
        self._pipe, self._transformer, self._prompt_length = pipe, transformer, prompt_length
        self._layers = layers
        plan = self.controller.config.plan
        self._forecast = OutputForecast(plan) if isinstance(plan, ForecastPlan) else None
        processors: list[tuple[Attention, Any]] = []
        hooks: list[tuple[torch.nn.Module, ModelHook]] = [(transformer, _DQARHook(self))]
        if self._forecast is None:  # otherwise, where the model runs at all, it runs untouched
            for layer_id, (layer, block) in enumerate(zip(layers, transformer.transformer_blocks, strict=True)):
                own, cross = DQARAttnProcessor(self, layer_id), getattr(block, "attn2", None)
                processors.append((layer, own))
                if isinstance(cross, Attention) and isinstance(cross.processor, AttnProcessor2_0):
                    processors.append((cross, DQARCrossAttnProcessor(self, layer_id, cross.processor)))
                target = self.controller.config.reuse_target
                if target in ("block", "residual"):
                    hooks.append((_feed_forward(block, layer_id, target), _Follower(own.feed_forward)))
                if target == "residual":
                    hooks.append((block, _Follower(own.block)))
        self._originals = [(layer, layer.processor) for layer, _ in processors]
        self._argument_names = list(inspect.signature(type(transformer).forward).parameters)[1:]
        self._watched: Any = None
        self._forget_run()
        for layer, processor in processors:
            layer.set_processor(processor)
        self._detach = [_attach(module, hook) for module, hook in hooks]
        self._hidden_states: FinalHiddenStates | None = None
        if self._forecast is not None and any(plan.readouts):
            self._hidden_states = FinalHiddenStates(transformer)
            self._detach.append(self._hidden_states.remove)

    def __enter__(self) -> DQARSession:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    @property
    def trace(self) -> Trace:
        """One row per site of every run since DQAR was applied."""
        return self.controller.trace

    def remove(self) -> None:
        """Restores processors, hooks and scheduler, and empties the cache."""
        if _find_session(self._transformer) is not self:
            return
        for layer, original in self._originals:
            layer.set_processor(original)
        for detach in self._detach:
            detach()
        self._watch_scheduler(None)
        self._forget_run()

    # --- the run -----------------------------------------------------------------------------------------------------

    def _forget_run(self) -> None:
        self.controller.reset()
        if self._forecast is not None:
            self._forecast.forget()
        self._step_index = -1
        self._timesteps: torch.Tensor | None = None
        self._run_condition: Condition = (None, None)
        self._caption: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # K and V of each cross-attention
        self._last_timestep = math.inf
        self._inputs: tuple[tuple, dict] | None = None
        self._latents: torch.Tensor | None = None
        # Of the step before, still on the device until the next step brings all its numbers over at once.
        self._output_sum: torch.Tensor | None = None
        self._predicted_clean: torch.Tensor | None = None
        self._predicted_snr: torch.Tensor | None = None

    def begin_forward(self, args: tuple, kwargs: dict) -> None:
        """Finds out which step of which run this forward pass is, and opens it in the controller."""
        named = dict(zip(self._argument_names, args, strict=False)) | kwargs
        latents, timestep = named.get("hidden_states"), named.get("timestep")
        condition = (named.get("class_labels", named.get("encoder_hidden_states")), named.get("encoder_attention_mask"))
        scheduler = getattr(self._pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if self._is_new_run(latents, condition, timesteps, timestep):
            self._forget_run()
            self._begin_run(latents, condition, scheduler)
        norm, snr = self._close_step(latents) if self.controller.config.measures_latents else (None, None)
        self._step_index += 1
        step = self._step_index
        if norm is not None and not math.isfinite(norm):
            raise FloatingPointError(f"the latents hold NaN or inf at step {step}, before layer 0")
        if self._timesteps is not None:
            timestep, total_steps = self._timestep_values[step], len(self._timestep_values)
            alpha_bar = self._alpha_bars[step]
        else:
            timestep = _first_value(timestep)
            if step == 0:
                self._first_timestep, self._guessed_steps = timestep, 1
            elif step == 1:  # evenly spaced timesteps down to zero tell how many there are
                self._guessed_steps = int(self._first_timestep / (self._first_timestep - timestep)) + 1
            plan = self.controller.config.plan
            total_steps = max(step + 1, self._guessed_steps) if plan is None else plan.num_inference_steps
            alpha_bar = None
        self._last_timestep = timestep
        self._latents, self._inputs = latents, (args, kwargs)
        self.controller.begin_step(
            step,
            total_steps,
            snr=snr,
            prompt_length=self._run_prompt_length,
            snr_schedule=None if alpha_bar is None else float(stats.schedule_snr(alpha_bar)),
            latent_norm=norm,
            timestep=timestep,
        )

    def forward(self, original: Callable, args: tuple, kwargs: dict) -> Any:
        """The model's output: its own, or by a ``ForecastPlan`` with the guided noise forecast."""
        if self._forecast is None:
            return original(*args, **kwargs)
        forecast, step, rows = self._forecast, self._step_index, self._slices["cond"]
        fresh = step in forecast.plan.computed
        if fresh:
            computed = original(*args, **kwargs)
            forecast.keep(computed[0], self._slices, self._latents.shape[1])
            if self._hidden_states is not None:
                states, size = self._hidden_states.take(), self._latents[rows].shape
                forecast.read_out(step, states, self._slices, size)
        for branch in self._slices:
            self.controller.record_output(branch, fresh, forecast.nbytes // len(self._slices))
        if fresh and not forecast.plan.weights[step]:
            return computed
        sample = forecast.output(step, self._latents[rows])
        named = dict(zip(self._argument_names, args, strict=False)) | kwargs
        return Transformer2DModelOutput(sample=sample) if named.get("return_dict", True) else (sample,)

    def end_forward(self, output: Any) -> None:
        """Keeps an eye on the output: a run that is no longer finite is stopped, naming step and layer.

        Where nothing else is measured, no step waits for that either: the sum goes on to the run's last step.
        """
        total = output[0].sum(dtype=torch.float32)
        waits = self.controller.config.measures_latents or self._output_sum is None
        self._output_sum = total if waits else self._output_sum + total
        if self._timesteps is None or self._step_index + 1 == len(self._timestep_values):
            self.check_finite(self._output_sum.item())
            self._output_sum = None

    def _close_step(self, latents: torch.Tensor) -> tuple[float, float | None]:
        """Brings over what the step before left on the device, with the norm and SNR of the new latents.

        One transfer: ‖x_t‖₂ and SNR by the newest predicted x0 (means over the batch), the last output's sum and the
        last step's SNR by its own prediction.
        """
        numbers = {"norm": stats.latent_norm(latents).mean()}
        if self._predicted_clean is not None:
            numbers["snr"] = stats.snr(self._predicted_clean, latents[: len(self._predicted_clean)]).mean()
            numbers["last_snr"] = self._predicted_snr
        if self._output_sum is not None:
            numbers["output"] = self._output_sum
        values = dict(zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True))
        self.check_finite(values.get("output", 0.0))
        if "last_snr" in values:
            self.controller.complete_step(values["last_snr"])
        return values["norm"], values.get("snr")

    def check_finite(self, output_sum: float) -> None:
        """Stops the run if a sum over the output, or over what is to be cached, is NaN or inf."""
        if not math.isfinite(output_sum):
            step = self._step_index
            if not self._latents.isfinite().all():  # in a planned run nobody has looked since it began
                raise FloatingPointError(f"NaN or inf before step {step}: a run without the plan tells where it begins")
            layer = self._first_bad_layer()
            raise FloatingPointError(f"the model's output holds NaN or inf at step {step}, {layer}")

    def _is_new_run(self, latents, condition, timesteps, timestep) -> bool:
        if self._latents is None or timesteps is not self._timesteps:
            return True
        if timesteps is not None and self._step_index + 1 >= len(timesteps):
            return True
        if not all(map(_same, condition, self._run_condition)):
            return True
        if timesteps is None and _first_value(timestep) >= self._last_timestep:
            return True
        if latents.shape != self._latents.shape:
            raise ValueError(
                f"the batch changed in mid-run: step {self._step_index + 1} has latents {tuple(latents.shape)}, "
                f"the run began with {tuple(self._latents.shape)}; start a new run with scheduler.set_timesteps"
            )
        return False

    def _begin_run(self, latents: torch.Tensor, condition: Condition, scheduler: Any) -> None:
        self._run_condition = condition
        self._slices = self._branch_slices(latents, condition[0])
        self._run_prompt_length, mask = self._prompt_length, condition[1]
        if self._run_prompt_length is None and mask is not None and mask.ndim == 2:
            self._run_prompt_length = mask[self._slices["cond"]].sum(dim=1, dtype=torch.float32).mean().item()
        self._timesteps = getattr(scheduler, "timesteps", None)
        plan = self.controller.config.plan
        if isinstance(plan, ForecastPlan):
            if scheduler is None:
                raise ValueError("a ForecastPlan needs the timesteps: apply it to the pipeline, not to its transformer")
            plan.check_run(self._timesteps.tolist())
        elif scheduler is not None and plan is not None:
            plan.check_run(len(self._timesteps), type(scheduler).__name__)
        if scheduler is None:
            if self.controller.config.gates_on_snr and self.controller.config.schedule != "none":
                warnings.warn(
                    "DQAR on a bare transformer knows no SNR, so the gate stays closed: apply it to the pipeline, "
                    "or set snr_range=(0, inf) and no policy",
                    stacklevel=2,
                )
            return
        self._timestep_values = [float(t) for t in self._timesteps.tolist()]
        self._alpha_bars = _alpha_bars(scheduler, self._timestep_values)
        self._watch_scheduler(scheduler)

    def _branch_slices(self, latents: torch.Tensor, labels: torch.Tensor | None) -> dict[str, slice]:
        """Which part of the batch is which branch; guidance doubles the batch, with equal latents in both halves."""
        batch = len(latents)
        half = batch // 2
        if batch % 2 == 0 and torch.equal(latents[:half], latents[half:]):
            order = BRANCH_ORDER.get(type(self._transformer).__name__, ("cond", "uncond"))
            null = getattr(self._transformer.config, "num_embeds_ada_norm", None)
            is_class_label = labels is not None and labels.ndim == 1
            if not is_class_label or bool((labels[half:] == null).all()):
                return {order[0]: slice(0, half), order[1]: slice(half, batch)}
        return {"cond": slice(0, batch)}

    def _watch_scheduler(self, scheduler: Any) -> None:
        """Sees each guided prediction on its way into ``scheduler.step``; ``None`` stops watching."""
        if self._watched is scheduler:
            return
        if self._watched is not None:
            _unwatch(self._watched, self, self._watched_step)
        self._watched = scheduler
        if scheduler is not None:
            self._watched_step = _watch(scheduler, self)

    def see_prediction(self, model_output: torch.Tensor) -> None:
        """Notes x0 and SNR by the guided prediction that this session's own run hands to the scheduler."""
        if self._forecast is not None and self._step_index == 0 and self._watched.timesteps is self._timesteps:
            self._forecast.check_guidance(model_output)
        if not self.controller.config.measures_latents:
            return
        if self._latents is None or self._watched.timesteps is not self._timesteps:
            return
        # What reaches the model is variance-preserving under every scheduler, after scale_model_input.
        latents = self._latents[: len(model_output)]
        alpha_bar = self._alpha_bars[self._step_index]
        clean = predicted_clean(latents, model_output, alpha_bar, self._watched.config.prediction_type)
        self._predicted_clean, self._predicted_snr = clean, stats.snr(clean, latents).mean()
        if self._step_index + 1 == len(self._timestep_values):
            self.controller.complete_step(self._predicted_snr.item())

    def _first_bad_layer(self) -> str:
        """Repeats the failed forward pass without DQAR and finds the first block whose output isn't finite."""
        bad: list[int] = []

        def look(layer_id):
            def hook(_module, _args, output):
                if not output.isfinite().all():
                    bad.append(layer_id)

            return hook

        args, kwargs = self._inputs
        transformer = self._transformer
        handles = [b.register_forward_hook(look(i)) for i, b in enumerate(transformer.transformer_blocks)]
        self.remove()
        try:
            with torch.no_grad():
                transformer(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return f"first in layer {bad[0]}" if bad else "after the last layer, or in a reused one"


class DQARAttnProcessor:
    """Takes the place of ``AttnProcessor2_0``: asks the controller, then computes, reuses, or both by branch."""

    def __init__(self, session: DQARSession, layer_id: int):
        self.session, self.layer_id = session, layer_id
        self.original = session._layers[layer_id].processor
        # Where the site is more than the attention: what was decided, and what it is to be cached with.
        self._decided: Sites | None = None
        self._waiting: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}

    @torch.compiler.disable  # decisions are Python's; a compiled block is compiled around them
    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            given = "attention_mask" if encoder_hidden_states is None else "encoder_hidden_states"
            raise ValueError(f"layer {self.layer_id} was given {given}: DQAR takes unmasked self-attention only")
        controller = self.session.controller
        slices, step, target = self.session._slices, self.session._step_index, controller.config.reuse_target
        if target == "residual" and self._decided is None:  # called by itself, not by its block
            return self.original(attn, hidden_states)
        decided = self._decided if target == "residual" else self._decide(hidden_states.shape[:-1])
        _, fresh, cached, shared = decided
        if target == "block":
            self._decided, self._waiting = decided, {}
        if target == "kv":
            output = self._with_keys_and_values(attn, hidden_states, fresh, cached, shared)
        elif not cached and not shared:
            output = self._compute(attn, hidden_states, slices)
        else:
            if target == "residual":
                parts = {branch: torch.zeros_like(hidden_states[slices[branch]]) for branch in cached}
            else:
                parts = {branch: entry.forecast(step) for branch, entry in cached.items()}
            for branch, rows in fresh.items():
                parts[branch] = self._compute(attn, hidden_states[rows], {branch: slice(None)})
            for branch in shared:
                parts[branch] = parts["cond"]
                self._commit({branch: slice(None)}, None, hidden_states.shape[1], output=parts["cond"])
            output = torch.cat([parts[branch] for branch in slices]) if len(parts) > 1 else next(iter(parts.values()))
        for entry in cached.values():
            controller.reuse(entry)
        return output

    @torch.compiler.disable
    def feed_forward(self, original: Callable, hidden_states: torch.Tensor) -> torch.Tensor:
        """The block's feed-forward: computed, forecast or shared where the attention just was."""
        if self._decided is None:  # called by itself, not by its block
            return original(hidden_states)
        session, (shape, fresh, cached, shared), waiting = self.session, self._decided, self._waiting
        whole = session.controller.config.reuse_target == "residual"
        if not whole:
            self._decided, self._waiting = None, {}  # the cache's old entries must not stay alive here
        if hidden_states.shape[:-1] != shape:
            raise ValueError(
                f"layer {self.layer_id}'s feed-forward was given {tuple(hidden_states.shape)} after an attention of "
                f"{tuple(shape)}: DQAR takes it whole, without feed_forward_chunk_size"
            )
        if not cached and not shared:
            output = original(hidden_states)
            parts = {branch: output[rows] for branch, rows in fresh.items()}
        else:
            if whole:
                parts = {branch: torch.zeros_like(hidden_states[session._slices[branch]]) for branch in cached}
            else:
                parts = {b: entry.forecast(session._step_index, "feed_forward") for b, entry in cached.items()}
            parts |= {branch: original(hidden_states[rows]) for branch, rows in fresh.items()}
            parts |= dict.fromkeys(shared, parts.get("cond"))
            output = torch.cat([parts[b] for b in session._slices]) if len(parts) > 1 else next(iter(parts.values()))
        for branch, (attention, entropy) in {} if whole else waiting.items():
            self._keep(branch, entropy, output=attention, feed_forward=parts[branch])
        return output

    @torch.compiler.disable
    def block(self, original: Callable, hidden_states: torch.Tensor) -> torch.Tensor:
        """The whole block: computed, or its input with the change that is cached or shared.

        Where only one branch computes, attention and feed-forward leave the other out, and its rows are dropped.
        """
        session, slices = self.session, self.session._slices
        decided = _, fresh, cached, shared = self._decide(hidden_states.shape[:-1])
        changes = {branch: entry.forecast(session._step_index) for branch, entry in cached.items()}
        if not fresh:
            for entry in cached.values():
                session.controller.reuse(entry)
            return hidden_states + torch.cat([changes[branch] for branch in slices])
        self._decided, self._waiting = decided, {}
        try:
            output, waiting = original(hidden_states), self._waiting
        finally:
            self._decided, self._waiting = None, {}
        change = output - hidden_states
        changes |= {branch: change[rows] for branch, rows in fresh.items()}
        changes |= dict.fromkeys(shared, changes.get("cond"))
        for branch, (_attention, entropy) in waiting.items():
            self._keep(branch, entropy, output=changes[branch])
        if not cached and not shared:
            return output
        return torch.cat([output[r] if b in fresh else hidden_states[r] + changes[b] for b, r in slices.items()])

    def _decide(self, shape: torch.Size) -> Sites:
        """Asks the controller about every branch of this layer at the open step."""
        slices = self.session._slices
        decisions = {branch: self.session.controller.should_reuse(self.layer_id, branch) for branch in slices}
        cached = {branch: d.entry for branch, d in decisions.items() if d.use_cache}
        shared = {branch: rows for branch, rows in slices.items() if decisions[branch].shared}
        fresh = {branch: rows for branch, rows in slices.items() if branch not in cached and branch not in shared}
        return shape, fresh, cached, shared

    def _compute(self, attn: Attention, hidden_states: torch.Tensor, slices: dict[str, slice]) -> torch.Tensor:
        """Full attention for the whole of ``hidden_states``, entropy if wanted, output committed by branch."""
        controller = self.session.controller
        entropy = None
        if controller.wants_entropy(self.layer_id):
            query, key, value = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
            output, entropy = self._attend(attn, query, key, value)
        else:
            output = self.original(attn, hidden_states)
        self._commit(slices, entropy, hidden_states.shape[1], output=output)
        return output

    def _with_keys_and_values(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        fresh: dict[str, slice],
        cached: dict[str, CacheEntry],
        shared: dict[str, slice],
    ) -> torch.Tensor:
        """Fresh queries for all; keys and values from the cache where a branch is reused (slide 9)."""
        controller = self.session.controller
        if not cached and not shared and not controller.wants_commit(self.layer_id):
            return self._compute(attn, hidden_states, fresh)
        query = attn.to_q(hidden_states)
        if not cached and not shared:
            key, value = attn.to_k(hidden_states), attn.to_v(hidden_states)
        else:
            parts = {branch: (entry.k.dequantize(), entry.v.dequantize()) for branch, entry in cached.items()}
            for branch, rows in fresh.items():
                parts[branch] = (attn.to_k(hidden_states[rows]), attn.to_v(hidden_states[rows]))
            parts |= dict.fromkeys(shared, parts.get("cond"))
            keys, values = zip(*(parts[branch] for branch in self.session._slices), strict=True)
            key, value = torch.cat(keys), torch.cat(values)
        measure = bool(fresh) and controller.wants_entropy(self.layer_id)
        output, entropy = self._attend(attn, query, key, value, measure)
        kept = {"keys": key, "values": value}
        if controller.config.balance:
            kept["key_partner"] = query.abs().amax(dim=1, keepdim=True)
            kept["value_partner"] = attn.to_out[0].weight.dequantize().abs().amax(dim=0).expand(len(value), 1, -1)
        self._commit(fresh, entropy, hidden_states.shape[1], **kept)
        self._commit(shared, None, hidden_states.shape[1], **kept)
        return output

    def _attend(
        self, attn: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, measure: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``AttnProcessor2_0``'s operations, bit for bit, on projections ``[B, N, C]``; and the entropy ``[B, H]``."""
        query, key, value = (_by_head(x, attn) for x in (query, key, value))
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if measure:
            queries = self.session.controller.config.entropy_queries
            output, entropy = stats.fused_attention_with_entropy(query, key, value, num_queries=queries)
        else:
            output, entropy = F.scaled_dot_product_attention(query, key, value), None
        output = output.transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](output)), entropy

    def _commit(
        self, slices: dict[str, slice], entropy: torch.Tensor | None, tokens: int, **tensors: torch.Tensor
    ) -> None:
        controller = self.session.controller
        for branch, rows in slices.items():
            measured = None if entropy is None else entropy[rows]
            if controller.wants_commit(self.layer_id):
                kept = {name: tensor[rows] for name, tensor in tensors.items()}
                if controller.config.reuse_target in ("block", "residual"):
                    self._waiting[branch] = kept["output"], measured
                else:
                    self._keep(branch, measured, **kept)
            else:
                controller.record(self.layer_id, branch, measured, tokens)

    def _keep(self, branch: str, entropy: torch.Tensor | None, **tensors: torch.Tensor) -> None:
        try:
            self.session.controller.commit(self.layer_id, branch, entropy=entropy, **tensors)
        except ValueError:  # the quantizer takes no NaN or inf
            self.session.check_finite(sum(tensor.sum(dtype=torch.float32).item() for tensor in tensors.values()))
            raise


class DQARCrossAttnProcessor:
    """Takes the place of a cross-attention's ``AttnProcessor2_0``: its K and V are the caption's, the same all run.

    With ``cache_cross_attention`` they are computed at the run's first step only, to the bit what they would be at any.
    """

    def __init__(self, session: DQARSession, layer_id: int, original: AttnProcessor2_0):
        self.session, self.layer_id, self.original = session, layer_id, original

    @torch.compiler.disable  # decisions are Python's; a compiled block is compiled around them
    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if encoder_hidden_states is None:  # attends to itself after all, which changes from step to step
            return self.original(attn, hidden_states, None, attention_mask, **kwargs)
        session, config = self.session, self.session.controller.config
        fresh = self.layer_id not in session._caption
        if fresh:
            caption = (
                attn.norm_encoder_hidden_states(encoder_hidden_states) if attn.norm_cross else encoder_hidden_states
            )
            key, value = (_by_head(layer(caption), attn) for layer in (attn.to_k, attn.to_v))
            key = key if attn.norm_k is None else attn.norm_k(key)
        else:
            key, value = session._caption[self.layer_id]
        if config.cache_cross_attention:
            session._caption[self.layer_id] = key, value
        query = _by_head(attn.to_q(hidden_states), attn)
        query = query if attn.norm_q is None else attn.norm_q(query)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, key.shape[2], len(key))
            attention_mask = attention_mask.view(len(key), attn.heads, -1, attention_mask.shape[-1])
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        entropy = None
        if config.record_entropy:
            scores = query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5
            weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
            entropy = stats.attention_entropy(weights, reduction="none")
        for branch, rows in session._slices.items():
            nbytes = key[rows].nbytes + value[rows].nbytes if config.cache_cross_attention else 0
            measured = None if entropy is None else entropy[rows]
            session.controller.record_cross_attention(
                self.layer_id, branch, fresh, nbytes, measured, hidden_states.shape[1]
            )
        return attn.to_out[1](attn.to_out[0](output.transpose(1, 2).flatten(2)))


class _DQARHook(ModelHook):
    """Opens and closes a step around the transformer's forward pass."""

    def __init__(self, session: DQARSession):
        super().__init__()
        self.session = session

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        self.session.begin_forward(args, kwargs)
        return args, kwargs

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.session.forward(self.fn_ref.original_forward, args, kwargs)

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        self.session.end_forward(output)
        return output


class _Follower(ModelHook):
    """Lets a layer's processor decide what its feed-forward, or its whole block, computes."""

    def __init__(self, decide: Callable):
        super().__init__()
        self.decide = decide

    def new_forward(self, module: torch.nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.decide(lambda x: self.fn_ref.original_forward(x, *args, **kwargs), hidden_states)


def _attach(module: torch.nn.Module, hook: ModelHook) -> Callable[[], None]:
    """Registers a hook; what is returned takes it off again, and with it all that registering left behind."""
    had_registry = hasattr(module, "_diffusers_hook")
    had_forward = "forward" in vars(module)  # of another library's hook
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(hook, HOOK_NAME)

    def detach() -> None:
        registry.remove_hook(HOOK_NAME, recurse=False)
        if not had_registry and not registry.hooks:
            del module._diffusers_hook
            if not had_forward:
                del module.forward  # the instance attribute; the class's method is underneath

    return detach


def _watch(scheduler: Any, session: DQARSession) -> Any:
    """Lets ``session`` see what goes into ``scheduler.step``; pipelines with one scheduler share one wrapper."""
    original = scheduler.step
    if not hasattr(original, "dqar_sessions"):

        def step(model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            for watching in tuple(step.dqar_sessions):
                watching.see_prediction(model_output)
            return original(model_output, *args, **kwargs)

        step.dqar_sessions, step.dqar_replaced = [], vars(scheduler).get("step")
        scheduler.step = step
    scheduler.step.dqar_sessions.append(session)
    return scheduler.step


def _unwatch(scheduler: Any, session: DQARSession, step: Any) -> None:
    step.dqar_sessions.remove(session)
    if step.dqar_sessions or scheduler.step is not step:  # someone else's wrapper on top stays, over an idle one
        return
    if step.dqar_replaced is None:
        del scheduler.step
    else:
        scheduler.step = step.dqar_replaced


def predicted_clean(
    latents: torch.Tensor, model_output: torch.Tensor, alpha_bar: float, prediction_type: str
) -> torch.Tensor:
    """x0 as the model predicts it, from variance-preserving ``latents`` ``[B, C, H, W]`` at noise level ᾱ."""
    signal, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    if prediction_type == "epsilon":
        return (latents - noise * model_output) / signal
    if prediction_type == "v_prediction":
        return signal * latents - noise * model_output
    if prediction_type == "sample":
        return model_output
    raise ValueError(f"prediction_type={prediction_type!r} is not accepted: epsilon, v_prediction or sample")


def _alpha_bars(scheduler: Any, timesteps: list[float]) -> list[float]:
    """ᾱ at each step: from the scheduler's own sigmas where it has them, else at the (whole) timesteps."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) == len(timesteps) + 1:
        return [1 / (1 + sigma**2) for sigma in sigmas[:-1].tolist()]
    return scheduler.alphas_cumprod[torch.tensor(timesteps).long()].tolist()


def _self_attention_layers(transformer: Any) -> list[Attention]:
    blocks = getattr(transformer, "transformer_blocks", None) or []
    layers = [block.attn1 for block in blocks if isinstance(getattr(block, "attn1", None), Attention)]
    if not layers or len(layers) != len(blocks):
        raise ValueError(
            f"{type(transformer).__name__} has no attention that DQAR can take over: needs `transformer_blocks` with a "
            f"diffusers `attn1` each, as in {' or '.join(BRANCH_ORDER)}"
        )
    for layer_id, layer in enumerate(layers):
        processor = layer.processor
        if not isinstance(processor, (AttnProcessor2_0, DQARAttnProcessor)):
            raise ValueError(
                f"layer {layer_id} has the attention processor {type(processor).__name__}: DQAR takes the place of "
                "AttnProcessor2_0 only"
            )
    return layers


def _feed_forward(block: torch.nn.Module, layer_id: int, target: str) -> FeedForward:
    if not isinstance(getattr(block, "ff", None), FeedForward):
        raise ValueError(f"layer {layer_id} has no diffusers `ff`: reuse_target={target!r} takes one in every block")
    return block.ff


def _find_session(transformer: Any) -> DQARSession | None:
    registry = getattr(transformer, "_diffusers_hook", None)
    hook = registry.get_hook(HOOK_NAME) if registry is not None else None
    return hook.session if hook is not None else None


def _by_head(x: torch.Tensor, attn: Attention) -> torch.Tensor:
    """``[B, N, C]`` as ``[B, H, N, C / H]``."""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    # Pipelines pass the same tensors at every step; only another object has to be looked into.
    return a is b or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b))


def _first_value(timestep: torch.Tensor | float) -> float:
    return float(timestep.flatten()[0]) if isinstance(timestep, torch.Tensor) else float(timestep)
