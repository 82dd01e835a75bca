"""A run of DDIM with a DiT, written out in plain Python: what the rivals' numbers are compared with."""

import torch


def compute_it(*arguments):
    return arguments[-1]()


def of_second_order(first, second):
    """``forecast`` for ``reference``: steps 0, 1, 4, 7, … are computed; at x steps after the last of them it gives the
    value, ``first(x)`` times the last slope, and ``second(x)`` times the change from the slope before to it."""
    history = {}

    def forecast(site, step, compute):
        seen = history.setdefault(site, [])
        if step in (0, 1) or (step - 1) % 3 == 0:
            seen.append((step, compute()))
            return seen[-1][1]
        (last, value), x = seen[-1], step - seen[-1][0]
        slopes = [(b - a) / (t - s) for (s, a), (t, b) in zip(seen, seen[1:], strict=False)]
        forecast = value + first(x) * slopes[-1]
        if len(slopes) > 1:
            forecast = forecast + second(x) * (slopes[-1] - slopes[-2]) / (last - seen[-2][0])
        return forecast

    return forecast


def reference(pipe, forecast=compute_it, blocks=None, output=compute_it, steps=12, labels=(1, 2), guidance=3.0, seed=0):
    """The last latents.

    ``forecast(site, step, compute)`` gives a site's output, ``output(step, compute)`` the model's, and
    ``blocks(step, h, compute)`` the last hidden states, of which ``compute()`` is the full computation.
    """
    model, scheduler = pipe.transformer, pipe.scheduler
    blocks = blocks or (lambda _step, _h, compute: compute())
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(labels))]
    x = torch.stack([torch.randn((1, 8, 8), generator=generator, dtype=model.dtype) for generator in generators])
    classes = torch.tensor([*labels, *[10] * len(labels)])
    scheduler.set_timesteps(steps)
    for step, t in enumerate(scheduler.timesteps):
        timestep = t.expand(len(classes))

        def through_blocks(h, step=step, timestep=timestep):
            for i, block in enumerate(model.transformer_blocks):
                norm, gate, shift, scale, gate_ff = block.norm1(h, timestep, classes, hidden_dtype=h.dtype)
                h = h + gate[:, None] * forecast((i, "attn"), step, lambda block=block, norm=norm: block.attn1(norm))
                norm = block.norm3(h) * (1 + scale[:, None]) + shift[:, None]
                h = h + gate_ff[:, None] * forecast((i, "ff"), step, lambda block=block, norm=norm: block.ff(norm))
            return h

        def whole(step=step, timestep=timestep, x=x, through_blocks=through_blocks):
            h = model.pos_embed(torch.cat([x, x]))
            h = blocks(step, h, lambda: through_blocks(h))
            emb = model.transformer_blocks[0].norm1.emb(timestep, classes, hidden_dtype=h.dtype)
            shift, scale = model.proj_out_1(torch.nn.functional.silu(emb)).chunk(2, dim=1)
            out = model.proj_out_2(model.norm_out(h) * (1 + scale[:, None]) + shift[:, None])
            return out.unflatten(1, (4, 4)).unflatten(-1, (2, 2)).permute(0, 1, 3, 2, 4).reshape(-1, 1, 8, 8)

        cond, uncond = output(step, whole).chunk(2)
        x = scheduler.step(uncond + guidance * (cond - uncond), t, x).prev_sample
    return x
