"""Small models with random weights: enough to tell one computation from another, never scored for quality."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from dqar.models.pipelines import EmbeddedDiTPipeline

torch.set_num_threads(1)


def random_transformer(seed=0, **options):
    torch.manual_seed(seed)
    defaults = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 1,
        "num_layers": 4,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 10,
    }
    model = DiTTransformer2DModel(**{**defaults, **options}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # zeros anywhere would make comparisons void
    return model


def embedded_pipeline(seed=0, **options):
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    pipe = EmbeddedDiTPipeline(random_transformer(seed, **options), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe():
    return embedded_pipeline()


@pytest.fixture(scope="session")
def dit_folder(tmp_path_factory):
    """A tiny DiTPipeline, VAE and all, as ``save_pretrained`` leaves it."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8)
    transformer = random_transformer(in_channels=4, out_channels=8, num_embeds_ada_norm=1000)
    scheduler = DDIMScheduler(clip_sample=False)
    folder = tmp_path_factory.mktemp("dit")
    DiTPipeline(transformer, vae, scheduler, id2label={"0": "tench, Tinca tinca"}).save_pretrained(folder)
    return folder


WORDS = ("a", "cat", "dog", "on", "the", "red", "mat", "runs", "sits", "in", "park", "with", "two", "big")


@pytest.fixture(scope="session")
def pixart_folder(tmp_path_factory):
    """A tiny PixArtAlphaPipeline, T5 and tokenizer and all, as ``save_pretrained`` leaves it."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=len(vocabulary), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        patch_size=2,
    )
    for parameter in (*transformer.parameters(), *text_encoder.parameters()):
        torch.nn.init.normal_(parameter, std=0.2)
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8)
    folder = tmp_path_factory.mktemp("pixart")
    scheduler = DPMSolverMultistepScheduler()
    PixArtAlphaPipeline(tokenizer, text_encoder.eval(), vae, transformer.eval(), scheduler).save_pretrained(folder)
    return folder


def draw(pipe, labels=(1, 2), steps=8, guidance=3.0, seed=0, output_type="latent"):
    """Latents of a run, one noise an image."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(labels))]
    return pipe(
        class_labels=list(labels),
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        output_type=output_type,
    ).images


def entries_of(pipe, session):
    """What the session's cache holds when the newest step's blocks are through: at a run's end it is emptied."""
    entries = {}

    def look(*_args):
        entries.clear()
        entries.update({(entry.layer_id, entry.branch): entry for entry in session.controller.cache})

    last = getattr(pipe.transformer, "proj_out_2", None) or pipe.transformer.proj_out
    last.register_forward_pre_hook(look)
    return entries
