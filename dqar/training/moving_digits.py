"""Trains the embedded video model (``dqar train moving-digits``): handwritten digits that bounce in a small frame.

A diffusers ``LatteTransformer3DModel`` (Ma et al. 2024, arXiv 2401.03048), whose blocks attend in turn within each
frame and along time; its caption is one token, the digit's class as a one-hot vector. Noise prediction, min-SNR
weighting, label dropout, average of the weights, checkpoints and log are those of ``dqar.training.digits``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, LatteTransformer3DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.training_utils import compute_snr
from torch import nn

from dqar.files import write_json
from dqar.measure.sampling import sample
from dqar.models.classifier import load_classifier
from dqar.models.data import load_split, moving_digits
from dqar.models.pipelines import EmbeddedLattePipeline, class_captions, load_pipeline
from dqar.models.profiles import CLASS_NAMES, Profile
from dqar.training.card import pipeline_parts, quality, save_grid, wrapped, write_card
from dqar.training.digits import Recipe, export_pipeline, init_linears, train_steps
from dqar.training.latent_dit import NOISE_SCHEDULE, min_snr_loss
from dqar.training.muon import StackedMuon


@dataclass(frozen=True)
class VideoRecipe(Recipe):
    """Everything that decides the video model's training; changing a field makes a different model."""

    num_layers: int = 3
    """Pairs of a block within frames and a block along time."""
    sample_size: int = 12
    patch_size: int = 3
    video_length: int = 8
    batch_size: int = 24
    cycle_steps: int = 1200
    """After which the learning rate, fallen to 0, starts anew."""
    learning_rate: float = 2e-3
    muon_learning_rate: float = 0.02
    """Of the matrices inside the blocks, which Muon trains; AdamW all others."""
    warmup_steps: int = 50
    ema_decay: float = 0.99


def build_transformer(recipe: VideoRecipe) -> LatteTransformer3DModel:
    """The model as training begins with it: Xavier weights, and zeros where adaLN-Zero wants them.

    Each block starts as the identity and the model's first output is exactly zero (Peebles & Xie 2023).
    """
    torch.manual_seed(recipe.seed)
    width = recipe.num_attention_heads * recipe.attention_head_dim
    model = LatteTransformer3DModel(
        num_attention_heads=recipe.num_attention_heads,
        attention_head_dim=recipe.attention_head_dim,
        in_channels=recipe.in_channels,
        out_channels=recipe.in_channels,
        num_layers=recipe.num_layers,
        cross_attention_dim=width,
        attention_bias=True,
        sample_size=recipe.sample_size,
        patch_size=recipe.patch_size,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=recipe.num_classes,
        video_length=recipe.video_length,
    )
    init_linears(model)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.scale_shift_table)
    nn.init.zeros_(model.adaln_single.linear.weight)
    for block in (*model.transformer_blocks, *model.temporal_transformer_blocks):
        nn.init.zeros_(block.scale_shift_table)
        if block.attn2 is not None:
            nn.init.zeros_(block.attn2.to_out[0].weight)
    return model.eval()


def optimizers(recipe: VideoRecipe, model: LatteTransformer3DModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest, as in ``LatentRecipe.optimizers``."""
    blocks = (*model.transformer_blocks, *model.temporal_transformer_blocks)
    matrices = [p for block in blocks for name, p in block.named_parameters() if p.ndim == 2 and "table" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    adam = torch.optim.AdamW(others, recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    return [StackedMuon(matrices, recipe.muon_learning_rate), adam]


def batch_loss(
    recipe: VideoRecipe, model: LatteTransformer3DModel, images: torch.Tensor, labels: torch.Tensor, step: int
) -> torch.Tensor:
    """Mean min-SNR-weighted squared error of the noise predicted in the videos of a step, which ``(seed, step)`` draws.

    Timesteps are spread evenly, one from each of ``batch_size`` equal parts of the schedule. Products are in BF16.

    Args:
        recipe: of the model.
        model: to train.
        images: digits ``[N, 1, 8, 8]`` in [-1, 1].
        labels: ``[N]``.
        step: number of the step.
    """
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    size, scheduler = recipe.batch_size, DDPMScheduler(**NOISE_SCHEDULE)
    chosen = torch.randint(len(images), (size,), generator=generator)
    videos = moving_digits(images[chosen], recipe.video_length, recipe.sample_size, generator)
    noise = torch.randn(videos.shape, generator=generator)
    places = (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size
    timesteps = (places * 1000).long().clamp(max=999)
    dropped = torch.rand(size, generator=generator) < recipe.label_dropout
    captions = class_captions(torch.where(dropped, recipe.num_classes, labels[chosen]), recipe.num_classes)
    noisy = scheduler.add_noise(videos, noise, timesteps)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = model(noisy, timesteps, captions, return_dict=False)[0].float()
    return min_snr_loss(compute_snr(scheduler, timesteps), predicted, noise, recipe.min_snr_gamma)


def train_video(recipe: VideoRecipe, out: Path, checkpoint_every: int = 100) -> LatteTransformer3DModel:
    """Trains from the last checkpoint in ``out``, or from nothing, and returns the averaged model: ``train_steps``."""
    images, labels = load_split("digits", "train")
    model = build_transformer(recipe)
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    for attention in attentions:
        # Plain products: the backward of the CPU's bfloat16 scaled_dot_product_attention takes a third of a step.
        attention.set_processor(AttnProcessor())

    def loss(step: int) -> torch.Tensor:
        return batch_loss(recipe, model, images, labels, step)

    train_steps(asdict(recipe), model, optimizers(recipe, model), loss, out, checkpoint_every)
    for attention in attentions:
        attention.set_processor(AttnProcessor2_0())
    return model


def export_video(model: LatteTransformer3DModel, recipe: VideoRecipe, work: Path, weights: Path) -> None:
    """Saves the pipeline in FP16 in small shards, and how it was trained."""
    pipe = EmbeddedLattePipeline(transformer=model.half(), **pipeline_parts("digits"))
    export_pipeline(pipe, asdict(recipe), work, weights / "moving-digits")


# --- what it is shipped with -----------------------------------------------------------------------------------------


def cut_out(frames: torch.Tensor, side: int) -> torch.Tensor:
    """The digit of each frame: windows ``[N, 1, side, side]`` of frames ``[N, 1, S, S]`` in [0, 1].

    The window with the most ink; where several hold as much but for 1 %, the one in their middle.
    """
    windows = frames.unfold(2, side, 1).unfold(3, side, 1).squeeze(1)  # [N, places, places, side, side]
    ink = windows.sum((3, 4))
    as_much = ink >= 0.99 * ink.amax((1, 2), keepdim=True)
    places = torch.arange(ink.shape[1], dtype=torch.float32)
    counts = as_much.sum((1, 2))
    top, left = (((as_much.sum(axis) * places).sum(1) / counts).round().long() for axis in (2, 1))
    return windows[torch.arange(len(frames)), top, left][:, None]


def unexplained(videos: torch.Tensor) -> float:
    """Share of a frame's energy that no move of the frame before by a pixel at most explains; mean over frames.

    Args:
        videos: ``[N, F, 1, S, S]`` in [0, 1].
    """
    before, after = (x.flatten(0, 1).squeeze(1) for x in (videos[:, :-1], videos[:, 1:]))
    padded = F.pad(before, (1, 1, 1, 1))
    size = before.shape[-1]
    moved = [padded[:, y : y + size, x : x + size] for y in range(3) for x in range(3)]
    errors = torch.stack([(frame - after).square().sum((1, 2)) for frame in moved]).amin(0)
    return float((errors / after.square().sum((1, 2))).mean())


def evaluate_video(weights: Path, profile: Profile, num_samples: int = 60) -> dict[str, float]:
    """Measures guided videos of the exported model; writes ``evaluation.json``, contact sheet, GIF and model card.

    Each frame's digit is cut out and judged as the digits model's are; so are held-out digits that really move.
    """
    folder = weights / "moving-digits"
    facts = json.loads((folder / "training.json").read_text())
    recipe = VideoRecipe(**facts["recipe"])
    drawn = sample(load_pipeline(profile, weights), profile, seed=1, num_samples=num_samples)
    held_out, labels = load_split("digits", "test")
    generator = torch.Generator().manual_seed(1)
    real = moving_digits(held_out, recipe.video_length, recipe.sample_size, generator).transpose(1, 2) / 2 + 0.5
    results = dict[str, float]()
    for name, videos, asked in (("", drawn.images, drawn.labels), ("held-out: ", real, labels)):
        digits = cut_out(videos.flatten(0, 1), held_out.shape[-1])
        judged = quality(digits, asked.repeat_interleave(recipe.video_length), "digits", load_classifier("digits"))
        judged |= {"samples": len(videos), "unexplained by a move of a pixel": unexplained(videos)}
        results |= {name + key: value for key, value in judged.items()}
    write_json(folder / "evaluation.json", results, indent=1)
    shown = drawn.images[: len(CLASS_NAMES["digits"])]
    save_grid(shown.flatten(0, 1), folder / "samples.png", recipe.video_length)
    about = (
        "Class-conditional video Diffusion Transformer (diffusers `LatteTransformer3DModel`; its caption is the class) "
        f"of handwritten digits that bounce in {recipe.video_length} frames of {recipe.sample_size}×"
        f"{recipe.sample_size} pixels: {recipe.num_layers} blocks within frames and {recipe.num_layers} along time, "
        f"{recipe.num_attention_heads} heads of {recipe.attention_head_dim}, {facts['parameters']:,} parameters, FP16."
    )
    items = wrapped(
        "- **Data:** the training digits of `digits`, moved by a pixel a frame and turned round at the edges. Weights: "
        "MIT, as the project.",
        f"- **Training:** `dqar train moving-digits`, {recipe.num_steps:,} steps of {recipe.batch_size} videos in "
        f"cycles of {recipe.cycle_steps:,}, noise prediction, min-SNR weighting, label dropout {recipe.label_dropout}, "
        f"EMA {recipe.ema_decay}, Muon, seed {recipe.seed}; {facts['hours']} hours on one thread of "
        f"{facts['hardware']}, torch {facts['torch']}. Loss and recipe: `training.json`.",
        f"- **Sampling:** {profile.num_inference_steps} steps of DPM-Solver++, guidance {profile.guidance_scale:g}, no "
        "clipping.",
        f"- **Quality** of {num_samples} videos (`evaluation.json`): the digit cut out of each frame is classified as "
        f"asked in {results['class_accuracy']:.1%} of frames by `digits-classifier` (held-out digits, moved and cut "
        f"out alike: {results['held-out: class_accuracy']:.1%}); FD-digits {results['FD-digits to held-out']:.1f} to "
        f"held-out digits (those, moved and cut out: {results['held-out: FD-digits to held-out']:.1f}).",
        f"- **Motion:** a move of the frame before by at most a pixel leaves "
        f"{results['unexplained by a move of a pixel']:.1%} of a frame's energy unexplained (real videos: 0).",
    )
    write_card(folder, about, items, "10 guided samples, a row each, frame by frame")
    return results
