"""How each tiny pipeline's outputs lie, plans for it with random weights, and its planned run as a plain loop."""

import dataclasses
import functools
import inspect
import math

import numpy as np
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from scipy.ndimage import correlate
from tiny import TINY, drawn

from dqar import describe_model, extrapolation
from dqar.forecast.fit import KERNELS

COMPUTED = (0, 2, 3)
LAST_LAYER = {"dit": "proj_out_2"}
ONE_BRANCH = ("flux", "flux_control", "hunyuan_video")
PACKED = ("flux", "flux_control", "qwen", "ltx")
TWO_CALLS = ("wan", "wan22", "qwen", "lumina2")
"""Guidance by two calls, the conditional one first."""
UNREAD = ("z_image", "lumina2")
"""Families whose last layer is given captions too, so that nothing is read from its hidden states."""
PATCHES = (4, 4, 2, 2, 4)
IMAGE = ((4, 8, 8), "nhwpqc->nchpwq", PATCHES)
VIDEO = ((4, 3, 4, 4), "nfhwpqc->ncfhpwq", (3, 2, 2, 2, 2, 4))


def packed(tokens, channels):
    return (channels, tokens), "ntc->nct", (tokens, channels)


SHAPE = dict.fromkeys(TINY, IMAGE) | {
    "sana": ((4, 8, 8), "nhwpqc->nchpwq", (8, 8, 1, 1, 4)),
    "flux": packed(32, 16),
    "flux_control": packed(32, 16),
    "qwen": packed(16, 16),
    "ltx": packed(32, 4),
    "latte": ((4, 2, 8, 8), "nfhwpqc->ncfhpwq", (2, 4, 4, 2, 2, 4)),
    **dict.fromkeys(("wan", "wan22", "hunyuan_video", "cogvideox"), VIDEO),
}
"""Of one image, channels first, and of the model's own: how its last layer's numbers are put together."""


def channels_first(name, x):
    return x.transpose(1, 2) if name in (*PACKED, "cogvideox") else x


def scales_of(name, call):
    """The least and the largest guidance scale of a call."""
    if name in ONE_BRANCH:
        return 1.0, 1.0
    if name == "z_image":  # which says how much further than the conditional branch
        return call["guidance_scale"] + 1, call["guidance_scale"] + 1
    scale = call.get("guidance_scale", call.get("true_cfg_scale"))
    return call.get("guidance_scale_2", scale), scale


def models_of(pipe):
    return [pipe.transformer, *([pipe.transformer_2] if getattr(pipe, "transformer_2", None) else [])]


def line(name, pipe, call, computed):
    """The plan that continues a straight line."""
    description = " and ".join(map(describe_model, models_of(pipe)))
    least, largest = scales_of(name, call)
    plan = extrapolation(computed, timesteps_of(pipe, call), largest, description)
    return dataclasses.replace(plan, guidance=(least, largest))


def timesteps_of(pipe, call):
    """Those that a run visits."""
    visited, original = [], pipe.scheduler.step

    @functools.wraps(original)
    def step(output, t, *args, **kwargs):
        visited.append(float(t))
        return original(output, t, *args, **kwargs)

    pipe.scheduler.step = step
    drawn(pipe, call)
    del pipe.scheduler.step
    return visited


def naive(name, pipe, plan, call, seed=0):
    """The planned run in SciPy: the transformer's forward exchanged for a plain loop over what was computed."""
    shape, put_together, patches = SHAPE[name]
    calls, states, handles = [], [], []
    per_step, branches = (2 if name in TWO_CALLS else 1), (1 if name in ONE_BRANCH else 2)
    order = [0, 1] if name in ("dit", "z_image") else [1, 0]
    history, newest = ([], []), [None, None]
    hidden = [None, None]

    def forward(original, hidden_states, *args, **kwargs):
        if name == "z_image":
            [output] = answer(lambda x: (torch.stack(original(list(x[:, :, None]), *args, **kwargs)[0])[:, :, 0],),
                              torch.stack(hidden_states)[:, :, 0])  # fmt: skip
            return (list(output[:, :, None]),)
        output = answer(lambda x: original(x, *args, **kwargs), hidden_states)[0]
        return Transformer2DModelOutput(output) if kwargs.get("return_dict", True) else (output,)

    def answer(model, hidden_states):
        step, which = divmod(len(calls), per_step)
        calls.append(step)
        rows = {which: slice(None)} if per_step == 2 or branches == 1 else {}
        half = len(hidden_states) // 2
        if not rows:
            rows = {order[0]: slice(0, half), order[1]: slice(half, None)}
        if step in plan.computed:
            newest[which] = model(hidden_states)[0]
            for branch, part in rows.items():
                own = channels_first(name, newest[which])[part][:, : shape[0]]
                history[branch].insert(0, own)
                if name not in UNREAD:
                    hidden[branch] = states[-1].reshape(len(hidden_states), -1, states[-1].shape[-1])[part]
        output = newest[which].clone()
        if plan.weights[step]:
            for branch, part in rows.items():
                columns = [*history[branch][: plan.history], channels_first(name, hidden_states)[part][:, : shape[0]]]
                kernels = np.array(plan.weights[step]).reshape(branches, len(columns), *plan.kernel)[branch]
                forecast = np.zeros(columns[0].shape)
                for x, kernel in zip(columns, kernels, strict=True):
                    for image, channel in np.ndindex(*forecast.shape[:2]):
                        plane = x[image, channel].double().numpy()
                        forecast[image, channel] += (
                            correlate(plane, kernel, mode="constant") if plan.kernel else kernel * plane
                        )
                forecast = torch.tensor(forecast)
                if plan.readouts[step]:
                    own = hidden[branch].double()
                    matrices = torch.tensor(plan.readouts[step]).double().view(branches, own.shape[-1], -1)
                    read = (own @ matrices[branch]).view(len(own), *patches)
                    forecast += torch.einsum(put_together, read).reshape(forecast.shape)
                channels_first(name, output)[part][:, : shape[0]] = forecast.float()
        return (output,)

    for model in models_of(pipe):
        if name not in UNREAD:
            layer = getattr(model, LAST_LAYER.get(name, "proj_out"))
            handles.append(layer.register_forward_pre_hook(lambda _module, args: states.append(args[0])))
        model.forward = functools.partial(forward, model.forward)
        signature = inspect.signature(type(model).forward)  # pipelines call it by position or by name
        model.forward = by_position(signature, model.forward)
    try:
        return drawn(pipe, call, seed=seed)
    finally:
        for model in models_of(pipe):
            del model.forward
        for handle in handles:
            handle.remove()


def by_position(signature, forward):
    """``forward`` with its first argument given by position, whatever its name."""
    first = list(signature.parameters)[1]
    return lambda *args, **kwargs: forward(*args, **kwargs) if args else forward(kwargs.pop(first), **kwargs)


def random_plan(name, pipe, call):
    """Weights about those of a line, for every step, and readouts for all but one."""
    plan, kernel = line(name, pipe, call, COMPUTED), KERNELS[len(SHAPE[name][0]) - 1]
    layer = None if name in UNREAD else getattr(pipe.transformer, LAST_LAYER.get(name, "proj_out"))
    width = 0 if layer is None else layer.in_features
    numbers = len(plan.branches) * width * math.prod(SHAPE[name][2][-3:] if kernel else SHAPE[name][2][1:])
    torch.manual_seed(0)
    rows, readouts = [()], [()]
    for step in range(1, len(plan.timesteps)):
        tensors = plan.cached_at(step) + 1
        row = 0.1 / math.prod(kernel) * torch.randn(len(plan.branches), tensors, *kernel)
        row[(slice(None), 0, *(side // 2 for side in kernel))] += 1
        rows.append(tuple(row.flatten().tolist()))
        readouts.append(tuple((0.01 * torch.randn(numbers)).tolist()) if step != 2 else ())
    return dataclasses.replace(plan, weights=tuple(rows), readouts=tuple(readouts), kernel=kernel)


def state(model):
    return type(model), sorted(vars(model)), {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    cls, names, values = state(model)
    return cls is before[0] and names == before[1] and all(torch.equal(values[k], v) for k, v in before[2].items())
