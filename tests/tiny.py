"""Tiny pipelines of diffusers' own classes with random weights, one for each way in which they differ for a plan."""

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LattePipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.models import AutoencoderKLCogVideoX
from helpers import LATENT, TEXT, make_latte, make_vae, random_transformer, silent

STEPS = 8


def randomized(module, seed=0, std=0.1):
    """The module with all its parameters drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.copy_(std * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def caption(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dit():
    """Class-conditional, learned variances, latents of both branches in the scheduler."""
    transformer = randomized(random_transformer(in_channels=4, out_channels=8, num_layers=2, num_embeds_ada_norm=1000))
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    pipe = silent(DiTPipeline(transformer, make_vae(4), scheduler))
    return pipe, lambda i: {"class_labels": [i, i + 1], "guidance_scale": 3.0}


def _flux(cls, in_channels, num_layers=1):
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=in_channels,
        out_channels=16,
        num_layers=num_layers,
        num_single_layers=num_layers,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    parts = FlowMatchEulerDiscreteScheduler(), make_vae(4), None, None, None, None, randomized(transformer)

    def call(i):
        embeds = {"prompt_embeds": caption(i, 1, 5, 16), "pooled_prompt_embeds": caption(100 + i, 1, 8)}
        return {**embeds, "guidance_scale": 3.5, "height": 16, "width": 8}

    return silent(cls(*parts)), call


def flux(num_layers=1):
    """Packed tokens, embedded guidance, one branch, flow matching."""
    return _flux(FluxPipeline, 16, num_layers)


def flux_control():
    """An image's channels beside the latents' own."""
    pipe, call = _flux(FluxControlPipeline, 32)
    return pipe, lambda i: {**call(i), "control_image": caption(2000 + i, 1, 3, 16, 8).sigmoid()}


def _sd3(cls, **options):
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
        **options,
    )
    parts = (randomized(transformer), FlowMatchEulerDiscreteScheduler(shift=3.0), make_vae(4), *[None] * 6)
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


def sd3(**options):
    """Joint attention, flow matching, both branches in one call."""
    pipe, call = _sd3(StableDiffusion3Pipeline, **options)
    return pipe, lambda i: {**call(i), "height": 8, "width": 8}


def sd3_img2img():
    """A run that begins late."""
    pipe, call = _sd3(StableDiffusion3Img2ImgPipeline)
    return pipe, lambda i: {**call(i), "image": caption(2000 + i, 1, 3, 8, 8).clamp(-1, 1), "strength": 0.75}


def _wan(seed=0):
    return randomized(
        WanTransformer3DModel(
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
        ),
        seed,
    )


def wan(**parts):
    """Video ``[B, C, F, H, W]``, guidance by two calls, a multistep solver."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(None, None, vae, scheduler, _wan(), **parts)

    def call(i):
        embeds = {"prompt_embeds": caption(i, 1, 5, 16), "negative_prompt_embeds": caption(1000, 1, 5, 16)}
        return {**embeds, "height": 32, "width": 32, "num_frames": 9, "guidance_scale": 4.0}

    return silent(pipe), call


def wan22():
    """Two transformers: of high noise, and of low noise from the fifth step on, each with a guidance of its own."""
    pipe, call = wan(transformer_2=_wan(1), boundary_ratio=0.8)
    return pipe, lambda i: {**call(i), "guidance_scale_2": 3.0}


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


def _embeds(i, mask=None, **shapes):
    """Embeddings of a caption and of the negative one, with their masks where a pipeline wants them."""
    embeds = {name: caption(i + 100 * n, 1, *shape) for n, (name, shape) in enumerate(shapes.items())}
    embeds |= {f"negative_{name}": caption(1000 + n, 1, *shape) for n, (name, shape) in enumerate(shapes.items())}
    masks = {} if mask is None else {mask: torch.ones(1, 5, dtype=torch.long)}
    return {**embeds, **masks, **{f"negative_{name}": value for name, value in masks.items()}}


def sana():
    """Linear attention, patches of one pixel."""
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = SanaPipeline(None, None, None, randomized(transformer), scheduler)
    size = {"height": 256, "width": 256, "use_resolution_binning": False, "negative_prompt": None}

    def call(i):
        embeds = _embeds(i, "prompt_attention_mask", prompt_embeds=(5, 16))
        return {**embeds, **size, "guidance_scale": 4.5}

    return silent(pipe), call


def pixart_sigma():
    """Learned variances, DPM-Solver++."""
    transformer = randomized(PixArtTransformer2DModel(**LATENT, **TEXT, num_layers=2))
    pipe = PixArtSigmaPipeline(None, None, None, transformer, DPMSolverMultistepScheduler())
    size = {"height": 64, "width": 64, "use_resolution_binning": False, "negative_prompt": None}

    def call(i):
        embeds = _embeds(i, "prompt_attention_mask", prompt_embeds=(5, 16))
        return {**embeds, **size, "guidance_scale": 4.5}

    return silent(pipe), call


def ltx():
    """Video as packed tokens, both branches in one call."""
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    )
    pipe = LTXPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, randomized(transformer))
    size = {"height": 128, "width": 128, "num_frames": 9}

    def call(i):
        return {**_embeds(i, "prompt_attention_mask", prompt_embeds=(5, 16)), **size, "guidance_scale": 3.0}

    return silent(pipe), call


def hunyuan_video():
    """Video ``[B, C, F, H, W]``, embedded guidance."""
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 4),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = HunyuanVideoPipeline(None, None, randomized(transformer), None, scheduler, None, None)

    def call(i):
        embeds = {"prompt_embeds": caption(i, 1, 5, 16), "pooled_prompt_embeds": caption(100 + i, 1, 8)}
        embeds |= {"prompt_attention_mask": torch.ones(1, 5, dtype=torch.long)}
        return {**embeds, "height": 32, "width": 32, "num_frames": 9, "guidance_scale": 6.0}

    return silent(pipe), call


def qwen():
    """Packed tokens, guidance by two calls, each token scaled to the length that it has without guidance."""
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    pipe = QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, randomized(transformer))

    def call(i):
        embeds = _embeds(i, "prompt_embeds_mask", prompt_embeds=(5, 16))
        return {**embeds, "height": 64, "width": 64, "true_cfg_scale": 4.0}

    return silent(pipe), call


def z_image():
    """Lists of images and captions, reversed and negated: time runs from 0, and the output points to the noise."""
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[2, 2, 4],
        axes_lens=[64, 16, 16],
    )
    pipe = ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), None, None, None, randomized(transformer))

    def call(i):
        embeds = {"prompt_embeds": [caption(i, 5, 16)], "negative_prompt_embeds": [caption(1000, 4, 16)]}
        return {**embeds, "height": 64, "width": 64, "guidance_scale": 3.0}

    return silent(pipe), call


def lumina2():
    """Guidance by two calls, with each row's length kept, reversed and negated as ``z_image``."""
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(2, 2, 4),
        axes_lens=(16, 16, 16),
        cap_feat_dim=16,
    )
    pipe = Lumina2Pipeline(randomized(transformer), FlowMatchEulerDiscreteScheduler(shift=6.0), None, None, None)

    def call(i):
        embeds = _embeds(i, "prompt_attention_mask", prompt_embeds=(5, 16))
        return {**embeds, "height": 64, "width": 64, "guidance_scale": 4.0}

    return silent(pipe), call


def aura_flow():
    """Joint attention with registers."""
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    pipe = AuraFlowPipeline(None, None, None, randomized(transformer), scheduler)

    def call(i):
        embeds = _embeds(i, "prompt_attention_mask", prompt_embeds=(5, 16))
        return {**embeds, "height": 64, "width": 64, "guidance_scale": 3.5}

    return silent(pipe), call


def hunyuan_dit():
    """Learned variances, two text encoders, v prediction."""
    transformer = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=2,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        text_len=5,
        text_len_t5=5,
    )
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = HunyuanDiTPipeline(None, None, None, randomized(transformer), scheduler, **parts)

    def call(i):
        embeds = _embeds(i, "prompt_attention_mask", prompt_embeds=(5, 16), prompt_embeds_2=(5, 16))
        masks = {name: torch.ones(1, 5) for name in ("prompt_attention_mask_2", "negative_prompt_attention_mask_2")}
        return {**embeds, **masks, "height": 64, "width": 64, "guidance_scale": 5.0, "use_resolution_binning": False}

    return silent(pipe), call


def latte():
    """Video by spatial and temporal attention in turn: hidden states frame by frame."""
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    pipe = LattePipeline(None, None, None, randomized(make_latte()), scheduler)
    size = {"height": 64, "width": 64, "video_length": 2, "negative_prompt": None, "clean_caption": False}

    def call(i):
        return {**_embeds(i, prompt_embeds=(5, 16)), **size, "guidance_scale": 7.5}

    return silent(pipe), call


TINY = {
    maker.__name__: maker
    for maker in (
        dit,
        pixart_sigma,
        hunyuan_dit,
        sd3,
        sd3_img2img,
        sana,
        aura_flow,
        lumina2,
        z_image,
        flux,
        flux_control,
        qwen,
        ltx,
        latte,
        cogvideox,
        wan,
        wan22,
        hunyuan_video,
    )
}


def drawn(pipe, call, steps=STEPS, seed=0):
    """Latents of a run, from the noise that ``fit_plan`` gives the call of this seed."""
    accepts_latent = type(pipe) is not DiTPipeline
    result = pipe(
        **{"generator": torch.Generator().manual_seed(seed), **call},
        num_inference_steps=steps,
        output_type="latent" if accepts_latent else "pt",
        return_dict=False,
    )
    return torch.as_tensor(result[0])
