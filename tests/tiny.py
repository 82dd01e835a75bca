"""Tiny pipelines of diffusers' own classes with random weights, one for each way in which they differ for a plan."""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxControlPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models import AutoencoderKLCogVideoX
from helpers import random_transformer, silent

STEPS = 8


def randomized(module, seed=0, std=0.1):
    """The module with all its parameters drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.copy_(std * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def image_vae(channels):
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8,), latent_channels=channels, norm_num_groups=4, sample_size=8, shift_factor=0.0
    )


def caption(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dit():
    """Class-conditional, learned variances, latents of both branches in the scheduler."""
    transformer = randomized(random_transformer(in_channels=4, out_channels=8, num_layers=2, num_embeds_ada_norm=1000))
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    pipe = silent(DiTPipeline(transformer, image_vae(4), scheduler))
    return pipe, lambda i: {"class_labels": [i, i + 1], "guidance_scale": 3.0}


def _flux(cls, in_channels):
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=in_channels,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    parts = FlowMatchEulerDiscreteScheduler(), image_vae(4), None, None, None, None, randomized(transformer)

    def call(i):
        embeds = {"prompt_embeds": caption(i, 1, 5, 16), "pooled_prompt_embeds": caption(100 + i, 1, 8)}
        return {**embeds, "guidance_scale": 3.5, "height": 16, "width": 8}

    return silent(cls(*parts)), call


def flux():
    """Packed tokens, embedded guidance, one branch, flow matching."""
    return _flux(FluxPipeline, 16)


def flux_control():
    """An image's channels beside the latents' own."""
    pipe, call = _flux(FluxControlPipeline, 32)
    return pipe, lambda i: {**call(i), "control_image": caption(2000 + i, 1, 3, 16, 8).sigmoid()}


def _sd3(cls):
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=16,
    )
    parts = (randomized(transformer), FlowMatchEulerDiscreteScheduler(shift=3.0), image_vae(4), *[None] * 6)
    pipe = cls(*parts)

    def call(i):
        embeds = {
            "prompt_embeds": caption(i, 1, 5, 16),
            "pooled_prompt_embeds": caption(100 + i, 1, 8),
            "negative_prompt_embeds": caption(1000, 1, 5, 16),
            "negative_pooled_prompt_embeds": caption(1001, 1, 8),
        }
        return {**embeds, "guidance_scale": 4.0}

    return silent(pipe), call


def sd3():
    """Joint attention, flow matching, both branches in one call."""
    pipe, call = _sd3(StableDiffusion3Pipeline)
    return pipe, lambda i: {**call(i), "height": 8, "width": 8}


def sd3_img2img():
    """A run that begins late."""
    pipe, call = _sd3(StableDiffusion3Img2ImgPipeline)
    return pipe, lambda i: {**call(i), "image": caption(2000 + i, 1, 3, 8, 8).clamp(-1, 1), "strength": 0.75}


def wan():
    """Video ``[B, C, F, H, W]``, guidance by two calls, a multistep solver."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=16,
    )
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(None, None, vae, scheduler, randomized(transformer))

    def call(i):
        embeds = {"prompt_embeds": caption(i, 1, 5, 16), "negative_prompt_embeds": caption(1000, 1, 5, 16)}
        return {**embeds, "height": 32, "width": 32, "num_frames": 9, "guidance_scale": 4.0}

    return silent(pipe), call


def cogvideox():
    """Video with channels after frames ``[B, F, C, H, W]``, v prediction."""
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=5,
    )
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        temporal_compression_ratio=4,
    )
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")
    pipe = CogVideoXPipeline(None, None, vae, randomized(transformer), scheduler)

    def call(i):
        embeds = {"prompt_embeds": caption(i, 1, 5, 16), "negative_prompt_embeds": caption(1000, 1, 5, 16)}
        return {**embeds, "height": 32, "width": 32, "num_frames": 9, "guidance_scale": 3.0}

    return silent(pipe), call


TINY = {maker.__name__: maker for maker in (dit, flux, flux_control, sd3, sd3_img2img, wan, cogvideox)}


def drawn(pipe, call, steps=STEPS, seed=0):
    """Latents of a run, from the noise that ``fit_plan`` gives the call of this seed."""
    accepts_latent = type(pipe) is not DiTPipeline
    result = pipe(
        **call,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent" if accepts_latent else "pt",
        return_dict=False,
    )
    return torch.as_tensor(result[0])
