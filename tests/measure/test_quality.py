"""Scores by networks: what they are compared with, and what happens where a network or a file isn't there."""

import dataclasses
import types

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import nn
from transformers import BatchFeature, CLIPConfig, CLIPModel

from dqar.__main__ import main
from dqar.measure import metrics, quality
from dqar.measure.metrics import Gaussian
from dqar.measure.quality import Inception, Reference, StandIn, load_reference
from dqar.models.classifier import load_classifier
from dqar.models.profiles import get_profile
from dqar.studies.reference import check_reference

RECORD = ["record", "--profile", "dit-xl-2", "--device", "cpu", "--set", "rehearsal=true"]


def images(number, seed=0):
    return torch.rand(number, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def statistics(features):
    x = features.double().numpy()
    return {"mu": x.mean(0), "sigma": np.cov(x.T)}


def cut_in_half(path):
    np.savez(path, mu=np.zeros(12), sigma=np.eye(12))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("number", [6, 40])  # fewer and more images than features
def test_the_distance_to_statistics_is_scipys(number, tmp_path):
    a, b = torch.randn(number, 12, generator=torch.Generator().manual_seed(1)), StandIn()(images(90))["features"]
    np.savez(tmp_path / "b.npz", **statistics(b))
    other, mine = statistics(b), statistics(a)
    root = scipy.linalg.sqrtm(mine["sigma"] @ other["sigma"]).real
    expected = ((mine["mu"] - other["mu"]) ** 2).sum() + np.trace(mine["sigma"] + other["sigma"] - 2 * root)
    reference = load_reference(tmp_path / "b.npz", StandIn.widths)
    assert metrics.frechet_distance(a, reference.features) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="11 features can't be compared with a reference of 12"):
        metrics.frechet_distance(a[:, :11], reference.features)


def test_a_reference_keeps_both_kinds_of_features(tmp_path):
    gaussian, spatial = Gaussian.of(images(9).flatten(1)[:, :5]), Gaussian.of(images(9, 1).flatten(1)[:, :3])
    Reference(gaussian, spatial).save(tmp_path / "r.npz")
    again = load_reference(tmp_path / "r.npz")
    torch.testing.assert_close(again.features.covariance, gaussian.covariance, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(again.spatial.mean, spatial.mean, rtol=1e-6, atol=1e-7)


def test_a_folder_is_cropped_and_resized_as_pillow_does_it(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "deep").mkdir()
    for name, shape in (("a.png", (8, 8, 3)), ("deep/b.JPG", (12, 20, 3))):
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    files = quality.image_files(tmp_path)
    features = quality.features_of_files(StandIn(), files, 8)["features"]
    first = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1)[None] / 255
    assert features.shape == (2, 12) and torch.allclose(features[:1], StandIn()(first)["features"])
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(OSError, match=r"broken\.png can't be read as an image"):
        quality.features_of_files(StandIn(), quality.image_files(tmp_path), 8)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, r"has mu \(5,\) and sigma \(5, 5\): those of 12 features are needed"),
        ({"mu": np.zeros(12), "sigma": np.eye(3)}, r"has mu \(12,\) and sigma \(3, 3\): those of 12 features"),
        ({"mean": np.zeros(12)}, "has the arrays of none: needs mu and sigma"),
    ],
)
def test_statistics_of_other_features_are_refused_before_anything_is_written(arrays, message, tmp_path, capsys):
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_reference(tmp_path / "other.npz", StandIn.widths)
    folders = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert main([*RECORD, "--reference", str(tmp_path / "other.npz"), *folders]) == 2
    assert "other.npz has" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, "isn't there: an .npz with mu and sigma, or a folder of images"),
        (lambda path: path.write_bytes(b"PK cut"), "can't be read"),
        (cut_in_half, "can't be read"),
        (lambda path: path.mkdir(), "has 0 images: two or more of .png, .jpg, .jpeg, .webp"),
    ],
)
def test_a_reference_that_is_none_is_named(make, message, tmp_path, capsys):
    make(tmp_path / "r.npz")
    assert main([*RECORD, "--reference", str(tmp_path / "r.npz"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_what_cannot_be_downloaded_is_left_out_and_said_once(monkeypatch):
    def offline(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", offline)
    profile = get_profile("dit-xl-2", device="cpu")
    quality.inception.cache_clear()
    with pytest.warns(UserWarning, match="no FID and sFID by Inception-v3; all else goes on.*no route") as said:
        for _ in range(2):
            assert quality.scores(profile, images(2), torch.arange(2), images(2)) == {}
    assert len(said) == 1
    with pytest.raises(OSError, match=r"r\.npz is for FID, and Inception-v3 can't be had"):
        check_reference(dataclasses.replace(profile, reference="r.npz"))
    quality.inception.cache_clear()


@torch.no_grad()
def test_clip_scores_are_the_cosines_of_the_towers():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 20, "max_position_embeddings": 5, "eos_token_id": 19}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    words = torch.randint(1, 19, (60, 5), generator=torch.Generator().manual_seed(0))
    asked = []

    def processor(text, images, max_length, **_options):
        asked.append((len(text), max_length))
        pixels = torch.stack(images).float() / 255
        first = int(text[0])
        return BatchFeature({"input_ids": words[first : first + len(text)], "pixel_values": pixels})

    drawn = images(60)
    scored = quality.clip_scores(model, processor, drawn, [str(i) for i in range(60)])
    seen = model.visual_projection(model.vision_model((drawn * 255).round() / 255).pooler_output)
    read = model.text_projection(model.text_model(words).pooler_output)
    expected = [max(0, 100 * torch.cosine_similarity(a, b, dim=0).item()) for a, b in zip(seen, read, strict=True)]
    assert scored.tolist() == pytest.approx(expected, abs=1e-3) and asked == [(50, 5), (10, 5)]
    assert scored.min() == 0 < scored.max()


def test_random_weights_are_scored_in_a_rehearsal_only():
    drawn = images(2), torch.arange(2), images(2)
    assert quality.scores(get_profile("dit-xl-2-random"), *drawn) == {}
    scored = quality.scores(get_profile("dit-xl-2", rehearsal=True), *drawn)
    assert list(scored) == ["features"] and scored["features"][0].shape == (12,)


def test_inception_is_asked_in_batches_for_pooled_and_spatial_features(monkeypatch):
    """A network with Inception's places, which keeps the first pixel's value."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.Mixed_6d = nn.Module()
            self.Mixed_6d.branch1x1 = nn.Conv2d(3, 192, 1)

        def forward(self, x):
            assert x.dtype == torch.uint8
            self.Mixed_6d.branch1x1(nn.functional.interpolate(x.float(), (17, 17)))
            return x[:, 0, 0, 0, None].float().expand(-1, 2048)

    monkeypatch.setattr(quality, "AT_ONCE", 2)
    drawn, network = images(5), Network()
    columns = Inception(network)(drawn)
    assert {name: x.shape[1] for name, x in columns.items()} == Inception.widths
    assert columns["features"][:, 7].tolist() == (drawn[:, 0, 0, 0] * 255).round().tolist()
    with torch.no_grad():
        places = network.Mixed_6d.branch1x1(nn.functional.interpolate((drawn * 255).round(), (17, 17)))
    torch.testing.assert_close(columns["spatial"][:, 7 * 20 + 3], places[:, 3, 1, 3])  # row 1, column 3, channel 3


def test_an_embedded_model_keeps_its_classifier():
    drawn = torch.rand(2, 1, 8, 8)
    scored = quality.scores(get_profile("digits"), drawn, torch.arange(2), drawn)
    assert list(scored) == ["predicted", "features"] and isinstance(scored["predicted"], np.ndarray)
    assert quality.reference_of("digits", types.SimpleNamespace()).features.mean.shape == (64,)


def test_the_photograph_model_has_its_reference_without_the_photographs(monkeypatch, tmp_path):
    try:
        data = quality.load_split("cifar10", "test")[0]
    except OSError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(quality, "load_split", None)
    reference = quality.reference_of("cifar10", tmp_path)
    features = metrics.classify(load_classifier("cifar10"), data[::10] / 2 + 0.5)[1].double()
    expected = features.mean(0)  # of a tenth of them: they are sorted by class
    assert ((reference.features.mean - expected).abs() < 5 * features.std(0) / 1000**0.5).all()
