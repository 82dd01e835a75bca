"""Small models with random weights: enough to tell one computation from another, never scored for quality."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    LatteTransformer3DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from dqar.models.pipelines import EmbeddedDiTPipeline, make_scheduler
from dqar.training import checkpoints

# --- models -----------------------------------------------------------------------------------------------------------

NULL = 1000
"""The class of the unconditional branch in ``make_dit``'s pipeline."""
LAYERS = 2
"""Of ``make_dit``'s transformer, unless others are asked for."""
SMALL = {"num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "patch_size": 2}
LATENT = {**SMALL, "in_channels": 4, "out_channels": 8}
TEXT = {"cross_attention_dim": 16, "caption_channels": 16}


def randomize(module, std=0.2):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)  # zeros anywhere would make comparisons void
    return module.eval()


def random_transformer(seed=0, **options):
    torch.manual_seed(seed)
    defaults = {**SMALL, "in_channels": 1, "num_layers": 4, "num_embeds_ada_norm": 10}
    return randomize(DiTTransformer2DModel(**{**defaults, **options}))


def embedded_pipeline(seed=0, **options):
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    return silent(EmbeddedDiTPipeline(random_transformer(seed, **options), scheduler))


def image_pipeline(scheduler="ddim"):
    """Predicts the image: a random model that predicts noise draws black and white, in which no error shows."""
    pipe = embedded_pipeline()
    like = DDIMScheduler(prediction_type="sample", clip_sample=False, timestep_spacing="trailing")
    pipe.scheduler = make_scheduler(scheduler, like)
    return pipe


def silent(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_vae(channels=4):
    torch.manual_seed(0)
    sizes = {"latent_channels": channels, "norm_num_groups": 4, "sample_size": 8, "shift_factor": 0.0}
    return AutoencoderKL(block_out_channels=(8,), **sizes)


def make_dit(seed=0, scheduler=None, **options):
    """A ``DiTPipeline``, VAE and all."""
    transformer = random_transformer(seed, **{**LATENT, "num_embeds_ada_norm": NULL, "num_layers": LAYERS, **options})
    scheduler = scheduler or DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    return silent(DiTPipeline(transformer, make_vae(), scheduler))


def save_dit(folder, **options):
    """``make_dit``'s pipeline, with a class's name, as ``save_pretrained`` leaves it in ``folder``."""
    components = make_dit(scheduler=DDIMScheduler(clip_sample=False), **options).components
    DiTPipeline(**components, id2label={"0": "tench, Tinca tinca"}).save_pretrained(folder)
    return folder


WORDS = ("a", "cat", "dog", "on", "the", "red", "mat", "runs", "sits", "in", "park", "with", "two", "big")
PROMPTS = ("a cat", "two big red dog runs in the park")  # 2 and 8 words, and the end of the text


def make_pixart(seed=0, scheduler=None, num_layers=3):
    """A ``PixArtAlphaPipeline``, T5, tokenizer and VAE and all."""
    torch.manual_seed(seed)
    transformer = randomize(PixArtTransformer2DModel(**LATENT, **TEXT, num_layers=num_layers))
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    sizes = T5Config(vocab_size=len(vocabulary), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    text_encoder = randomize(T5EncoderModel(sizes))
    scheduler = scheduler or DPMSolverMultistepScheduler()
    return silent(PixArtAlphaPipeline(tokenizer, text_encoder, make_vae(), transformer, scheduler))


def killed_at(step):
    """``save_checkpoint`` for a training that is killed once this step is saved."""

    def save(path, state):
        checkpoints.save_checkpoint(path, state)
        if state["step"] == step:
            raise KeyboardInterrupt

    return save


def make_latte(seed=0):
    torch.manual_seed(seed)
    return randomize(
        LatteTransformer3DModel(
            **LATENT,
            **TEXT,
            num_layers=2,
            video_length=2,
            attention_bias=True,
            activation_fn="gelu-approximate",
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
        )
    )


# --- drawing ----------------------------------------------------------------------------------------------------------


def generators(n, seed=0):
    """One noise an image."""
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def draw(pipe, labels=(1, 2), steps=8, guidance=3.0, seed=0):
    """What the pipeline's own loop draws: latents where there is no VAE, images in [0, 1] where there is one."""
    return pipe(
        class_labels=list(labels),
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators(len(labels), seed),
        output_type="pt" if hasattr(pipe, "vae") else "latent",
    ).images


def draw_text(pipe, prompts=PROMPTS, steps=6, guidance=4.5, seed=0, **options):
    """Latents of a text-to-image run."""
    options = {
        "height": 8,
        "width": 8,
        "output_type": "latent",
        "use_resolution_binning": False,
        "clean_caption": False,
        "num_inference_steps": steps,
        **options,
    }
    return pipe(list(prompts), guidance_scale=guidance, generator=generators(len(prompts), seed), **options).images


# --- looking ----------------------------------------------------------------------------------------------------------


def state(pipe):
    """Everything that applying DQAR could leave behind."""
    modules = {name: set(vars(module)) for name, module in pipe.transformer.named_modules()}
    processors = [id(module.processor) for module in pipe.transformer.modules() if hasattr(module, "processor")]
    return modules, processors, set(vars(pipe.scheduler)) - {"num_inference_steps"}


def entries_of(pipe, session):
    """What the session's cache holds when the newest step's blocks are through: at a run's end it is emptied."""
    entries = {}

    def look(*_args):
        entries.clear()
        entries.update({(entry.layer_id, entry.branch): entry for entry in session.controller.cache})

    last = getattr(pipe.transformer, "proj_out_2", None) or pipe.transformer.proj_out
    last.register_forward_pre_hook(look)
    return entries


def sites_of(table):
    """Step, layer and branch of what a trace says was reused."""
    reused = table[table.decision == "reuse"]
    return set(zip(reused.step, reused.layer, reused.branch, strict=True))
