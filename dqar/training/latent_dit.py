"""The training of a latent Diffusion Transformer: noise prediction that may be stopped at any count of images."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import nn

from dqar.training.checkpoints import cut_log, load_checkpoint, save_checkpoint
from dqar.training.muon import StackedMuon
from dqar.training.stacked_dit import StackedDiT

NOISE_SCHEDULE: dict[str, Any] = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
"""Linear betas, as DiT-XL/2 was trained with."""
MICROBATCH = 32
"""Images of one backward pass on a CPU, which stay in its caches: 128 are 28 images a second and core, 32 are 46."""


@dataclass(frozen=True)
class LatentRecipe:
    """Everything that decides a training run but its length; changing a field makes a different model.

    The learning rate warms up, stays, and then falls with the square root of the steps; the average of the weights
    spans the last ninth of the run, however long that is. So the averaged model is a good one at every count of images.
    """

    num_layers: int = 28
    num_attention_heads: int = 4
    attention_head_dim: int = 32
    in_channels: int = 4
    sample_size: int = 16
    patch_size: int = 2
    num_classes: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-3
    muon_learning_rate: float = 0.02
    """Of the matrices inside the blocks, which Muon trains; AdamW all others."""
    warmup_steps: int = 100
    constant_steps: int = 12000
    kept_tokens: int = 32
    """Of each image, the tokens that go through all blocks in training; the others pass the middle blocks by."""
    routed_steps: tuple[tuple[int, int], ...] = ((0, 10000), (11344, 17600))
    """Ranges of steps in which that is so. At the end all tokens go through all blocks, as when images are drawn; the
    second range belongs to a run that went on from the first one's end."""
    label_dropout: float = 0.1
    min_snr_gamma: float = 5.0
    seed: int = 0

    def build(self, compiled: bool = False) -> StackedDiT:
        """The model as training begins with it."""
        return StackedDiT(
            self.num_layers,
            self.num_attention_heads,
            self.attention_head_dim,
            self.in_channels,
            self.sample_size,
            self.patch_size,
            self.num_classes,
            self.seed,
            compiled,
        )

    def routes(self, step: int) -> bool:
        """Whether some tokens pass the middle blocks by at a step."""
        return any(begin <= step < end for begin, end in self.routed_steps)

    def rate(self, step: int) -> float:
        """The learning rate of a step, as a share of the highest one."""
        return min(1, (step + 1) / self.warmup_steps, (self.constant_steps / (step + 1)) ** 0.5)

    def optimizers(self, model: StackedDiT) -> list[torch.optim.Optimizer]:
        """Muon for the matrices inside the blocks but for the modulations', which begin as zeros; AdamW for the rest.

        On the first 33,000 images it took less than half as many to the same held-out loss as AdamW for all.
        """
        matrices = [model.out_weight, model.up_weight, model.down_weight]
        muon = StackedMuon([{"params": [model.qkv_weight], "parts": 3}, {"params": matrices}], self.muon_learning_rate)
        chosen = {id(parameter) for parameter in (model.qkv_weight, *matrices)}
        others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
        return [muon, torch.optim.AdamW(others, self.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)]


@dataclass(frozen=True)
class Batch:
    """What one step learns from: latents ``[B, C, S, S]``, noise of that shape, timesteps ``[B]``, classes ``[B]``.

    ``kept`` ``[B, K]``: places of the tokens that go through all blocks.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    classes: torch.Tensor
    kept: torch.Tensor

    def to(self, device: str | torch.device) -> Batch:
        """The same on a device."""
        return Batch(*(x.to(device) for x in vars(self).values()))


def draw_batch(recipe: LatentRecipe, latents: torch.Tensor, labels: torch.Tensor, step: int) -> Batch:
    """The batch of a step, which depends on ``(seed, step)`` only.

    Timesteps are spread evenly, one from each of ``batch_size`` equal parts of the schedule: the loss of a batch then
    differs less from the next one's. A label is dropped once, for the whole model.

    Args:
        recipe: batch size, label dropout and seed.
        latents: ``[2, N, C, S, S]`` of the images and of their mirror images.
        labels: ``[N]``.
        step: number of the step.
    """
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    size, total = recipe.batch_size, NOISE_SCHEDULE["num_train_timesteps"]
    chosen = torch.randint(latents.shape[1], (size,), generator=generator)
    mirrored = torch.randint(2, (size,), generator=generator)
    places = (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size
    dropped = torch.rand(size, generator=generator) < recipe.label_dropout
    seen = latents[mirrored, chosen].float()
    noise = torch.randn(seen.shape, generator=generator)
    tokens = (recipe.sample_size // recipe.patch_size) ** 2
    kept = torch.rand(size, tokens, generator=generator).argsort(1)
    return Batch(
        seen,
        noise,
        (places * total).long().clamp(max=total - 1),
        torch.where(dropped, recipe.num_classes, labels[chosen]),
        kept[:, : recipe.kept_tokens] if recipe.routes(step) else kept,
    )


def signal_and_noise(timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of latents and noise at ``timesteps`` ``[B]``: their squares' sum is 1."""
    schedule = NOISE_SCHEDULE
    betas = torch.linspace(schedule["beta_start"], schedule["beta_end"], schedule["num_train_timesteps"])
    kept = (1 - betas).cumprod(0).to(timesteps.device)[timesteps]
    return kept.sqrt(), (1 - kept).sqrt()


def batch_loss(model: StackedDiT, batch: Batch, recipe: LatentRecipe, dtype: torch.dtype) -> torch.Tensor:
    """``min_snr_loss`` of a batch, a scalar."""
    signal, noise = (x[:, None, None, None] for x in signal_and_noise(batch.timesteps))
    predicted = model(signal * batch.latents + noise * batch.noise, batch.timesteps, batch.classes, dtype, batch.kept)
    return min_snr_loss((signal / noise).square().flatten(), predicted, batch.noise, recipe.min_snr_gamma)


def min_snr_loss(snr: torch.Tensor, predicted: torch.Tensor, noise: torch.Tensor, gamma: float) -> torch.Tensor:
    """Mean squared error of the ``predicted`` noise ``[B, ...]``, weighted by min-SNR (Hang et al. 2023) ``[B]``."""
    weight = snr.clamp(max=gamma) / snr
    return (weight * (predicted - noise).square().mean(dim=tuple(range(1, noise.ndim)))).mean()


class Gradients:
    """The gradient of each step's loss, a part of the batch at a time; on a CPU by several processes of one thread.

    A process that has finished a part takes the next one, so one on a busy core holds the others up little: two
    threads in one process wait for each other in every product, and were slower than one beside a third program. Parts
    are added up in their order, so the result doesn't depend on who computed which, or on the number of processes.

    Args:
        recipe, latents, labels: of the batches; shapes as for ``draw_batch``.
        model: its parameters move to memory that the processes share, and get the gradients.
        dtype, compiled: how ``model`` computes.
        workers: processes, this one included.
    """

    def __init__(
        self,
        recipe: LatentRecipe,
        model: StackedDiT,
        latents: torch.Tensor,
        labels: torch.Tensor,
        *,
        dtype: torch.dtype,
        compiled: bool,
        workers: int = 1,
    ):
        self._parameters = list(model.parameters())
        self._device = model.class_table.device.type
        size = MICROBATCH if self._device == "cpu" else recipe.batch_size
        parts = -(-recipe.batch_size // size)
        self._losses = torch.zeros(parts, device=self._device)
        self._parts = [[torch.zeros_like(x) for x in self._parameters] for _ in range(parts)]
        job = (recipe, latents, labels, dtype, size, self._losses, self._parts)
        self._next = torch.multiprocessing.get_context("spawn").Value("i", 0)
        self._work = partial(_compute_parts, *job, model, self._next)
        self._pipes, self._processes = [], []
        if workers > 1:
            for tensor in (
                latents,
                labels,
                self._losses,
                *self._parameters,
                *(x for part in self._parts for x in part),
            ):
                tensor.share_memory_()
            shared = [x.detach() for x in self._parameters]
            context = torch.multiprocessing.get_context("spawn")
            for _ in range(workers - 1):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, job, shared, self._next, compiled), daemon=True)
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)

    def compute(self, step: int) -> float:
        """Sets the parameters' gradients for a step; returns its loss.

        Raises:
            ChildProcessError: another process has ended.
        """
        self._next.value = 0
        try:
            for pipe in self._pipes:
                pipe.send(step)
            self._work(step)
            for pipe in self._pipes:
                pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise ChildProcessError(
                "a process that computed gradients has ended (was it killed, for memory?): the same command goes on "
                "from the last checkpoint"
            ) from error
        for i, parameter in enumerate(self._parameters):
            parameter.grad = torch.stack([part[i] for part in self._parts]).sum(0)
        return self._losses.sum().item()

    def close(self) -> None:
        """Ends the other processes."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.join()


def _compute_parts(recipe, latents, labels, dtype, size, losses, parts, model, counter, step: int) -> None:
    """Computes parts of a step's gradient as long as there are any that nobody has taken."""
    batch = draw_batch(recipe, latents, labels, step).to(losses.device.type)
    while True:
        with counter.get_lock():
            part = counter.value
            counter.value += 1
        if part >= len(parts):
            return
        chosen = Batch(*(x[part * size : (part + 1) * size] for x in vars(batch).values()))
        loss = batch_loss(model, chosen, recipe, dtype) * (len(chosen.classes) / recipe.batch_size)
        for place, gradient in zip(parts[part], torch.autograd.grad(loss, list(model.parameters())), strict=True):
            place.copy_(gradient)
        losses[part] = loss.detach()


def _serve(pipe, job: tuple, shared: list[torch.Tensor], counter, compiled: bool) -> None:
    """Another process: works on each step that the pipe names, until the pipe is closed."""
    torch.set_num_threads(1)
    model = job[0].build(compiled)
    for parameter, tensor in zip(model.parameters(), shared, strict=True):
        parameter.data = tensor
    try:
        while True:
            step = pipe.recv()
            _compute_parts(*job, model, counter, step)  # type: ignore[call-arg]
            pipe.send(None)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return


def train_latent_dit(
    recipe: LatentRecipe,
    latents: torch.Tensor,
    labels: torch.Tensor,
    out: Path,
    *,
    num_images: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    compiled: bool = True,
    workers: int = 1,
    minutes: float = math.inf,
    checkpoint_seconds: float = 300,
    check_steps: int = 1600,
    check: Callable[[StackedDiT, int], dict] | None = None,
) -> StackedDiT:
    """Trains from the checkpoint in ``out``, or from nothing, and returns the averaged model.

    A run that is killed and begun again goes on as if it had not been, to the bit on the same machine.

    Args:
        recipe: how.
        latents, labels: in the shapes that ``draw_batch`` takes.
        out: gets ``checkpoint.pt``, ``loss.jsonl`` with a line a step, and ``checks.jsonl``.
        num_images: stops at the first step that has seen so many, the runs before this one included.
        device, dtype, compiled, workers: where and how it computes; ``workers`` as for ``Gradients``.
        minutes: stops after so many, with a checkpoint.
        checkpoint_seconds: time between checkpoints: what a kill can cost.
        check_steps: steps between two calls of ``check``.
        check: is given the averaged model and the count of images; what it returns is logged.

    Raises:
        ValueError: the checkpoint is unreadable, or another recipe's.
    """
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, log, checks = out / "checkpoint.pt", out / "loss.jsonl", out / "checks.jsonl"
    model, average = (recipe.build(compiled).to(device) for _ in range(2))
    parameters, averages = list(model.parameters()), list(average.requires_grad_(False).parameters())
    optimizers = recipe.optimizers(model)
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    step, seconds = 0, 0.0
    if (state := load_checkpoint(checkpoint, asdict(recipe), device)) is not None:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        step, seconds = state["step"], state["seconds"]
    for path in (log, checks):
        cut_log(path, step)
    gradients = Gradients(recipe, model, latents, labels, dtype=dtype, compiled=compiled, workers=workers)
    started = saved = said = time.monotonic()
    said_step, losses, late = step, [], False
    with log.open("a") as log_file, closing(gradients):
        while step * recipe.batch_size < num_images and not late:
            losses.append(gradients.compute(step))
            nn.utils.clip_grad_norm_(parameters, 1.0)
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * recipe.rate(step)
            for optimizer in optimizers:
                optimizer.step()
            torch._foreach_lerp_(tuple(averages), [x.detach() for x in parameters], 9 / (10 + step))
            log_file.write(json.dumps({"step": step, "loss": round(losses[-1], 6)}) + "\n")
            step += 1
            images, now = step * recipe.batch_size, time.monotonic()
            late = now - started > 60 * minutes
            if now - said > 60:
                rate, mean = (step - said_step) * recipe.batch_size / (now - said), sum(losses) / len(losses)
                print(f"{images:,} images, loss {mean:.4f}, {rate:.0f} images/s", flush=True)
                said, said_step, losses = now, step, []
            checking = check is not None and step % check_steps == 0
            if check is not None and checking:
                checked = {"step": step - 1, "images": images, **check(average, images)}
                with checks.open("a") as file:
                    file.write(json.dumps(checked) + "\n")
                print(checked, flush=True)
            if checking or late or images >= num_images or time.monotonic() - saved > checkpoint_seconds:
                log_file.flush()
                saved = time.monotonic()
                state = {
                    "recipe": asdict(recipe),
                    "step": step,
                    "seconds": seconds + saved - started,
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                }
                save_checkpoint(checkpoint, state)
    return average


@torch.no_grad()
def held_out_loss(model: StackedDiT, recipe: LatentRecipe, latents: torch.Tensor, labels: torch.Tensor) -> float:
    """The loss on ``latents`` ``[N, C, S, S]`` with ``labels`` ``[N]``, N a multiple of ``MICROBATCH``; always the
    same noise and timesteps, no label dropped."""
    device = model.class_table.device
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.arange(len(latents)) * NOISE_SCHEDULE["num_train_timesteps"] // len(latents)
    timesteps = timesteps[torch.randperm(len(latents), generator=generator)]
    tokens = (recipe.sample_size // recipe.patch_size) ** 2
    kept = torch.arange(tokens).expand(len(latents), tokens)
    parts = (x.split(MICROBATCH) for x in (latents.float(), noise, timesteps, labels, kept))
    losses = [batch_loss(model, Batch(*part).to(device), recipe, torch.bfloat16) for part in zip(*parts, strict=True)]
    return torch.stack(losses).mean().item()


@torch.no_grad()
def draw_latents(
    model: StackedDiT, labels: torch.Tensor, guidance_scale: float, num_inference_steps: int, seed: int
) -> torch.Tensor:
    """Guided latents ``[N, C, S, S]`` of classes ``[N]`` by DPM-Solver++, for a quick look in between.

    N is a multiple of half a ``MICROBATCH``, so that the shape is one that is compiled already.
    """
    device = model.class_table.device
    generator = torch.Generator().manual_seed(seed)
    shape = (len(labels), model.in_channels, model.sample_size, model.sample_size)
    drawn = []
    for latents, classes in zip(
        torch.randn(shape, generator=generator).split(MICROBATCH // 2), labels.split(MICROBATCH // 2), strict=True
    ):
        scheduler = DPMSolverMultistepScheduler(**NOISE_SCHEDULE, timestep_spacing="trailing")
        scheduler.set_timesteps(num_inference_steps)
        latents = latents.to(device)
        both = torch.cat([classes, torch.full_like(classes, model.num_classes)]).to(device)
        for t in scheduler.timesteps:
            noise = model(latents.repeat(2, 1, 1, 1), t.to(device).expand(len(both)), both, torch.bfloat16)
            cond, uncond = noise.chunk(2)
            latents = scheduler.step(uncond + guidance_scale * (cond - uncond), t, latents).prev_sample
        drawn.append(latents.cpu())
    return torch.cat(drawn)
