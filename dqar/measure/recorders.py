"""What hooks see while a model samples: changes from step to step, and states of the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dqar.families import family


class ChangeRecorder:
    """How much each attention layer's output changes from one step to the next: the error that reusing it would cause.

    ``‖o_t − o_{t−1}‖ / ‖o_t‖`` per layer and guidance half, measured with forward hooks on the untouched computation;
    and ``layer_change``, the same against the output of the layer before.
    """

    def __init__(self, transformer: torch.nn.Module, num_inference_steps: int):
        self.rows: list[dict] = []
        self._last: dict[int, torch.Tensor] = {}
        self._forwards, self._num_inference_steps = 0, num_inference_steps
        self._branches = family(transformer).branch_order
        blocks: Any = transformer.transformer_blocks
        self._handles = [block.attn1.register_forward_hook(self._see(i)) for i, block in enumerate(blocks)]

    def __enter__(self) -> ChangeRecorder:
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _see(self, layer_id: int) -> Callable:
        def hook(_module: Any, _args: tuple, output: torch.Tensor) -> None:
            self._forwards += layer_id == 0
            run, step = divmod(self._forwards - 1, self._num_inference_steps)
            last = self._last.get(layer_id)
            self._last[layer_id] = output
            if step == 0 or last is None:
                return
            changes = {"change": _relative_change(output, last)}
            if layer_id > 0:
                changes["layer_change"] = _relative_change(output, self._last[layer_id - 1])
            for half, branch in enumerate(self._branches):
                means = {name: change.chunk(2)[half].mean().item() for name, change in changes.items()}
                self.rows.append({"run": run, "step": step, "layer": layer_id, "branch": branch, **means})

        return hook


def _relative_change(output: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    return (output - before).flatten(1).norm(dim=1) / output.flatten(1).norm(dim=1)


class StateRecorder:
    """The latents that the transformer is given at every step (under guidance, the first half of its batch)."""

    def __init__(self, transformer: torch.nn.Module):
        self._seen: dict[float, list[torch.Tensor]] = {}
        self._handle = transformer.register_forward_pre_hook(self._see, with_kwargs=True)

    def __enter__(self) -> StateRecorder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()

    def states(self) -> torch.Tensor:
        """``[steps, images, C, H, W]``."""
        return torch.stack([torch.cat(parts) for parts in self._seen.values()])

    def _see(self, _module: Any, args: tuple, kwargs: dict) -> None:
        latents = args[0] if args else kwargs["hidden_states"]
        self._seen.setdefault(float(kwargs["timestep"].flatten()[0]), []).append(latents.chunk(2)[0].float().cpu())


class StepCounter:
    """Counts the steps of runs: a handler of the model's calls for ``dqar.takeover.take_over``.

    Attributes:
        step: of the call under way, from 0; a timestep that isn't below the last one's begins a new run.
    """

    def __init__(self) -> None:
        self.step, self._timestep = -1, -1.0

    def __call__(self, original: Callable, *args: Any, **named: Any) -> Any:
        timestep = float((named["timestep"] if "timestep" in named else args[1]).flatten()[0])
        self.step = 0 if timestep >= self._timestep else self.step + 1
        self._timestep = timestep
        return original(*args, **named)
