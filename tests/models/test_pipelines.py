"""The real models' loading code on small pipelines saved locally, and DiT-XL/2 at its full size."""

import hashlib
import io
import json
import math
import shutil
import zipfile
from functools import partial

import pytest
import torch
from diffusers import DiTPipeline

from dqar import DQARConfig, apply_dqar
from dqar.measure import metrics
from dqar.measure.recorders import ChangeRecorder
from dqar.measure.results import Run
from dqar.measure.sampling import LOOK, OPEN, sample
from dqar.models import captions, pipelines, profiles
from dqar.models.captions import coco_captions
from dqar.models.classifier import load_classifier
from dqar.models.pipelines import cached_pipeline, load_pipeline, num_classes, with_parts
from dqar.models.profiles import Weights, get_profile
from dqar.studies import trace
from dqar.studies.compare import Method, compare_all

TINY = {"device": "cpu", "dtype": torch.float32, "num_samples": 3, "num_inference_steps": 4, "repeats": 1}


@pytest.fixture
def coco(monkeypatch):
    """Captions as the tiny tokenizer knows them, and no download."""
    texts = tuple(" ".join(["a", "cat", "on", "the", "mat"][: 2 + i % 4]) for i in range(captions.NUM_CAPTIONS))
    monkeypatch.setattr("dqar.measure.sampling.coco_captions", lambda: texts)
    return texts


def test_pixart_is_loaded_and_traced(pixart_folder, coco, monkeypatch, tmp_path):
    profile = get_profile("pixart", weights=Weights(str(pixart_folder)), transformer=None, batch_size=2, **TINY)
    monkeypatch.setitem(profiles.PROFILES, "pixart", profile)
    run = Run("pixart", 0, tmp_path)
    pipe = load_pipeline(profile)
    assert type(pipe).__name__ == "PixArtAlphaPipeline" and type(pipe.scheduler).__name__.startswith("DPMSolver")
    drawn = sample(pipe, profile, 0)
    assert drawn.images.shape == (3, 3, 8, 8) and drawn.labels.tolist() == [0, 1, 2]
    assert 0 <= drawn.images.min() < drawn.images.max() <= 1
    assert torch.equal(sample(pipe, profile, 0, LOOK).images, drawn.images)
    alone = sample(pipe, profile, 0, first_image=2, num_samples=1)
    torch.testing.assert_close(alone.images, drawn.images[2:], atol=2e-3, rtol=0)  # its own caption, its own noise
    sites = trace.sites(run)
    assert len(sites) == 4 * 3 * 2 and sites.entropy.between(0, math.log(16)).all()
    methods = [Method("closed", config=LOOK), Method("open", config=OPEN), Method("half", num_inference_steps=2)]
    table = compare_all(methods, profile, 0)
    assert table.psnr[0] == math.inf and table.psnr[1] < 100 and "class_accuracy" not in table
    assert table.sites_reused.tolist() == [0, table.sites_reused[1], 0] and 0 < table.sites_reused[1] < 1


def test_changes_are_filed_under_the_right_branch(pixart_folder, coco):
    """PixArt stacks the unconditional half first: its empty caption is the same for all images."""
    profile = get_profile("pixart", weights=Weights(str(pixart_folder)), transformer=None, batch_size=1, **TINY)
    pipe = load_pipeline(profile)
    outputs = []
    pipe.transformer.transformer_blocks[1].attn1.register_forward_hook(lambda _m, _a, out: outputs.append(out))
    with ChangeRecorder(pipe.transformer, 4) as changes:
        sample(pipe, profile, 0, num_samples=1)
    uncond, cond = ((outputs[1] - outputs[0]).flatten(1).norm(dim=1) / outputs[1].flatten(1).norm(dim=1)).tolist()
    by_branch = {row["branch"]: row["change"] for row in changes.rows if row["layer"] == 1 and row["step"] == 1}
    assert by_branch == pytest.approx({"cond": cond, "uncond": uncond}) and cond != pytest.approx(uncond)


def test_another_transformer_goes_into_the_pipeline(pixart_folder, tmp_path, coco):
    whole = get_profile("pixart", weights=Weights(str(pixart_folder)), transformer=None, **TINY)
    other = load_pipeline(whole).transformer
    with torch.no_grad():
        other.proj_out.weight.mul_(2)
    other.save_pretrained(tmp_path / "transformer")
    pipe = load_pipeline(get_profile("pixart", weights=whole.weights, transformer=Weights(str(tmp_path)), **TINY))
    assert torch.equal(pipe.transformer.proj_out.weight, other.proj_out.weight)


@pytest.mark.parametrize("name", ["dit-xl-2", "pixart"])
def test_weights_that_cannot_be_had_are_named(name, tmp_path):
    profile = get_profile(name, weights=Weights(str(tmp_path), "abc"), transformer=None, device="cpu")
    with pytest.raises(OSError, match=f"'{name}' needs {tmp_path} at revision abc from the Hugging Face hub"):
        load_pipeline(profile)


def test_classes_are_those_with_names(dit_folder):
    pipe = DiTPipeline.from_pretrained(dit_folder)
    assert num_classes(pipe) == 1000  # without names, all that it embeds but the null class
    named = DiTPipeline(**pipe.components, id2label={0: "tench, Tinca tinca", 1: "goldfish"})
    assert num_classes(named) == 2
    assert num_classes(load_pipeline(get_profile("digits"))) == 10


def test_pipelines_of_several_samplers_share_the_model_and_keep_its_classes(dit_folder):
    profile = get_profile("dit-xl-2", weights=Weights(str(dit_folder)), **TINY)
    one, other = (cached_pipeline(get_profile("dit-xl-2", weights=profile.weights, scheduler=name, **TINY))
                  for name in ("ddim", "dpm-solver++"))  # fmt: skip
    assert one.transformer is other.transformer and type(one.scheduler) is not type(other.scheduler)
    named = DiTPipeline(**one.components, id2label={0: "tench, Tinca tinca"})
    assert with_parts(named).labels == named.labels == {"tench": 0, "Tinca tinca": 0}


def test_cut_classifier_weights_are_named(tmp_path):
    folder = tmp_path / "digits-classifier"
    shutil.copytree(profiles.WEIGHTS / "digits-classifier", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match=f"the weights in {folder} can't be read"):
        load_classifier("digits", tmp_path)


def test_a_full_gpu_is_named(monkeypatch):
    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipelines.EmbeddedDiTPipeline, "to", full)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tiny GPU")
    with pytest.raises(RuntimeError, match="'digits' doesn't fit into the memory of Tiny GPU.*offload=True"):
        load_pipeline(get_profile("digits"))


def test_dit_xl_2_has_the_published_size():
    """675 M weights, and 118.6 G multiply-accumulates a forward pass at 256²."""
    with torch.device("meta"):
        transformer = pipelines.random_dit_xl_2().transformer
        inputs = {"timestep": torch.tensor([500]), "class_labels": torch.tensor([207])}
        with torch.no_grad():
            macs = metrics.count_macs(lambda: transformer(torch.randn(1, 4, 32, 32), **inputs))
    # diffusers keeps an embedding of timestep and class in every block instead of one for all.
    embedding = 256 * 1152 + 1152 * 1152 + 2 * 1152 + 1001 * 1152
    weights = sum(p.numel() for p in transformer.parameters()) - 27 * embedding
    assert weights == pytest.approx(675e6, rel=0.002) and macs == pytest.approx(118.6e9, rel=0.01)


def test_dit_xl_2_at_full_width(monkeypatch):
    """Two of its blocks, with random weights, through the pipeline."""
    monkeypatch.setattr(pipelines, "random_dit_xl_2", partial(pipelines.random_dit_xl_2, num_layers=2))
    profile = get_profile("dit-xl-2-random", num_inference_steps=2, device="cpu", dtype=torch.float32)
    pipe = load_pipeline(profile)
    assert not profile.trained
    with apply_dqar(pipe, DQARConfig(**vars(OPEN) | {"schedule": "all"})) as session:
        latents = []
        pipe.vae.decode = lambda x: latents.append(x) or type("Decoded", (), {"sample": x[:, :3]})()
        pipe(class_labels=[207], num_inference_steps=2, guidance_scale=7.5, output_type="pt")
    table = session.trace.to_pandas()
    assert latents[0].shape == (1, 4, 32, 32) and latents[0].isfinite().all()
    assert set(table.decision[table.step == 1]) == {"reuse"} and len(table) == 2 * 2 * 2 and set(table.tokens) == {256}
    # K and V of 256 tokens and 1152 channels in INT8, and a float32 scale a channel
    assert set(table.bytes[table.step == 0]) == {2 * (256 * 1152 + 4 * 1152)}


def test_a_random_model_is_not_scored(monkeypatch):
    profile = get_profile("smoke", num_samples=2, num_inference_steps=4)
    monkeypatch.setattr(profiles.Profile, "trained", False)
    monkeypatch.setitem(profiles.PROFILES, "smoke", profile)
    table = compare_all([Method("open", config=OPEN)], profile, 0)
    assert table[["psnr", "ssim"]].isna().all(axis=None)
    assert "class_accuracy" not in table and table.sites_reused[0] > 0 and table.macs_speedup[0] > 1


# --- captions --------------------------------------------------------------------------------------------------------


def archive(annotations, member=captions.MEMBER):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr(member, json.dumps({"annotations": annotations}))
    return content.getvalue()


ANNOTATIONS = [
    {"id": 1000 * k + image, "image_id": image, "caption": f" image {image},\n caption {k} "}
    for k in (3, 1, 2)
    for image in range(300, 0, -1)
]


@pytest.fixture
def served(monkeypatch, tmp_path):
    """Serves an archive in the place of COCO's; returns what was asked for."""
    monkeypatch.setenv("DQAR_CACHE", str(tmp_path / "cache"))
    coco_captions.cache_clear()
    asked = []

    def serve(content, sha1=None):
        def urlopen(url, timeout):
            asked.append(url)
            response = io.BytesIO(content)
            response.headers = {"Content-Length": str(len(content))}
            return response

        monkeypatch.setattr(captions.urllib.request, "urlopen", urlopen)
        monkeypatch.setattr(captions, "ARCHIVE_SHA1", sha1 or hashlib.sha1(content).hexdigest())
        return asked

    yield serve
    coco_captions.cache_clear()


def test_captions_are_downloaded_once_and_chosen_by_seed(served, tmp_path):
    asked = served(archive(ANNOTATIONS))
    first = coco_captions()
    assert len(first) == len(set(first)) == 128 and all(c.endswith(", caption 1") for c in first)  # each image's first
    assert first[0].startswith("image ") and "\n" not in first[0]
    coco_captions.cache_clear()
    assert coco_captions() == first and asked == [captions.ARCHIVE]
    (kept,) = (tmp_path / "cache").iterdir()
    kept.unlink()
    served(archive(ANNOTATIONS[::-1]))  # the order in the file doesn't matter
    coco_captions.cache_clear()
    assert coco_captions() == first
    kept.write_text(kept.read_text()[:100])
    coco_captions.cache_clear()
    with pytest.raises(ValueError, match="captions.json is truncated"):
        coco_captions()


def test_a_wrong_archive_leaves_nothing_behind(served, tmp_path):
    served(archive(ANNOTATIONS)[:-10], sha1="0" * 40)
    with pytest.raises(ValueError, match=r"SHA-1 [0-9a-f]{40}, not 0{40}"):
        coco_captions()
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_network_is_said(monkeypatch, served, tmp_path):
    served(b"")

    def offline(url, timeout):
        raise captions.urllib.error.URLError("no route")

    monkeypatch.setattr(captions.urllib.request, "urlopen", offline)
    with pytest.raises(OSError, match="can't be downloaded from http://images.cocodataset.org.*no route"):
        coco_captions()
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_text_books_pipeline_draws_photographs_of_what_is_asked_for():
    assert sum(path.stat().st_size for path in profiles.WEIGHTS.rglob("*") if path.is_file()) < 45e6
    pipe = DiTPipeline.from_pretrained(profiles.WEIGHTS / "cifar10")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = pipelines.make_scheduler("dpm-solver++", pipe.scheduler)
    asked = pipe.get_label_ids(["ship", "truck", "automobile", "horse"]) * 3
    options = {"guidance_scale": 2.0, "num_inference_steps": 10, "output_type": "np"}
    images = pipe(class_labels=asked, generator=torch.manual_seed(0), **options).images
    predicted, _ = metrics.classify(load_classifier("cifar10"), torch.tensor(images).permute(0, 3, 1, 2))
    assert (predicted == torch.tensor(asked)).double().mean() > 0.5  # of ten classes
