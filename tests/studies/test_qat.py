"""Every tuned model draws with every cache; gains and verdicts follow from tables worked out by hand."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import image_pipeline

from dqar.figures import qat as figures
from dqar.measure.metrics import Gaussian, frechet_distance
from dqar.measure.quality import Reference, reference_of
from dqar.measure.results import Run, load_table
from dqar.models.profiles import Weights, get_profile
from dqar.studies import arena, compare, conclusions, qat
from dqar.studies.compare import FULL
from dqar.studies.recording import Recording, Sizes
from dqar.training import quantized_reuse

PROFILE = get_profile("smoke", num_inference_steps=4, num_samples=2, images=2)
IMAGES = 5
DECIBELS = {  # to the shipped model's full compute, drawn with INT4 and with INT2
    qat.SHIPPED: (42.0, 36.0),
    qat.UNQUANTIZED: (42.5, 37.0),
    "tuned, INT4": (43.0, 38.0),
    "tuned, INT2": (41.0, 39.5),
}


def drawn(decibels):
    """Rows of two caches by model; images vary by 0, ±1 and ±2 dB, in all models alike."""
    rows = [
        (model, bits, image, 10 ** (-(level + image - 2) / 10))
        for model, levels in decibels.items()
        for bits, level in zip((4, 2), levels, strict=True)
        for image in range(IMAGES)
    ]
    return pd.DataFrame(rows, columns=["family", "bits", "image", "mse_shipped"])


def history(*gains):
    rows = [
        (bits, fitted_in, image, 10 ** (-(50 + (fitted_in != 16) * gain + image) / 10))
        for bits, gain in zip((16, 8, 4), (0, *gains), strict=True)
        for fitted_in in dict.fromkeys((16, bits))
        for image in range(3)
    ]
    return pd.DataFrame(rows, columns=["bits", "fitted_in", "image", "mse"])


def test_gains_are_over_the_shipped_model_and_over_the_same_tuning_without_the_quantizer():
    gains = qat.gains(drawn(DECIBELS), history(0.25, 1.5)).set_index(["what", "over", "bits"])
    expected = {
        (qat.TUNED, qat.SHIPPED, 4): 1.0,
        (qat.TUNED, qat.WITHOUT, 4): 0.5,
        (qat.TUNED, qat.SHIPPED, 2): 3.5,
        (qat.TUNED, qat.WITHOUT, 2): 2.5,
        (qat.FITTED, qat.WITHOUT, 8): 0.25,
        (qat.FITTED, qat.WITHOUT, 4): 1.5,
    }
    assert gains.gain.to_dict() == pytest.approx(expected)
    for end in ("low", "high"):  # every image gains alike, so every resample does
        assert gains[end].to_dict() == pytest.approx(expected)
    assert gains.images.tolist() == [IMAGES] * 4 + [3] * 2
    assert len(qat.gains(drawn(DECIBELS), None)) == 4


def test_an_interval_is_that_of_a_plain_bootstrap():
    generator = np.random.default_rng(1)
    before, after = generator.lognormal(-8, 1, (2, 12))
    gain, low, high = arena.gain(before, after)
    psnr, draws = -10 * np.log10([before, after]), np.random.default_rng(0).integers(0, 12, (5000, 12))
    trials = [np.median(psnr[1][row]) - np.median(psnr[0][row]) for row in draws]
    assert gain == pytest.approx(np.median(psnr[1]) - np.median(psnr[0]))
    assert (low, high) == pytest.approx(tuple(np.quantile(trials, (0.025, 0.975))))


@pytest.mark.parametrize("images", [3, 4])
def test_a_distance_needs_as_many_images_as_features(images):
    features = np.random.default_rng(0).normal(size=(2, images, 4))
    rows = [
        {"method": method, "family": method, "bits": bits, "image": image, "features": list(features[which, image])}
        for which, (method, bits) in enumerate(((FULL.name, np.nan), ("INT4", 4)))
        for image in range(images)
    ]
    table = pd.DataFrame(rows).assign(label=1, predicted=[1, 0] * images, macs_speedup=1.0)
    table["mse"] = table["mse_shipped"] = table.bits.fillna(0) * 1e-4
    real = Gaussian.of(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
    points = qat.summary(table, Reference(real)).set_index("method")
    assert points["median"]["INT4"] == pytest.approx(-10 * np.log10(4e-4)) and np.isnan(points["median"][FULL.name])
    if images < 4:
        assert points.fd.isna().all() and points.fd_growth.isna().all()
    else:
        assert points.fd["INT4"] == pytest.approx(frechet_distance(torch.tensor(features[1]), real), rel=1e-6)
        assert points.fd_growth["INT4"] == points.fd["INT4"] - points.fd[FULL.name]
        assert (points.class_accuracy == 0.5).all()


@pytest.mark.parametrize(
    "model, levels, verdict",
    [
        ("tuned, INT4", (43.0, 38.0), "holds"),
        ("tuned, INT4", (42.2, 38.0), "does not hold"),  # the same tuning without the quantizer is better
        ("tuned, INT2", (41.0, 35.5), "does not hold"),  # the shipped model is better
    ],
)
def test_slide_16_holds_where_the_quantizer_gains_over_both(model, levels, verdict):
    table = drawn({**DECIBELS, model: levels})
    whole = [
        (qat.SHIPPED, bits, image, 10 ** (-level / 10))
        for bits, level in ((16, 43.02), (8, 42.98))
        for image in range(IMAGES)
    ]
    table = pd.concat([table, pd.DataFrame(whole, columns=table.columns)], ignore_index=True)
    judged, words = conclusions.by_tuning(table, history(0.25, 1.5))
    assert judged == verdict
    four, _, two, _ = (f"{gain:+.1f}" for gain in qat.gains(table, None).gain)  # all images gain alike
    tuned = f"INT4 {four} dB ({four} to {four}), INT2 {two} dB ({two} to {two}); n = {IMAGES}"
    assert words.startswith(f"INT8 costs 0.04 dB. Tuning: {tuned}. A plan's weights")
    assert words.endswith("fitted through INT4: +1.5 dB; n = 3")
    assert conclusions.by_tuning(table, None)[1] == words.split(". A plan")[0]


def test_what_is_not_recorded_is_not_judged(tmp_path):
    assert conclusions.by_tuning(None, None) == ("not testable here", "not measured yet: make results")
    run = Run("smoke", 0, tmp_path)
    assert figures.slide16_qat(run, None, history(1, 1)).get_suptitle() == ""


def test_another_model_than_the_digits_is_left_out(tmp_path):
    profile = get_profile("dit-xl-2", weights=Weights("here/tiny"), device="cpu")
    assert qat.record_qat(Recording(profile, tmp_path / "work", tmp_path / "out")) is None


def test_every_model_draws_with_every_cache_and_the_figure_says_what_the_table_says(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "cached_pipeline", lambda profile: image_pipeline())
    monkeypatch.setattr(quantized_reuse, "load_embedded", lambda name: image_pipeline())
    recording = Recording(PROFILE, tmp_path / "work", tmp_path / "out")
    recording.sizes = dataclasses.replace(Sizes.of(PROFILE), tuning_steps=2, tuning_batch=2)
    monkeypatch.setattr(qat, "CACHES", {None: FULL.name, 4: "INT4", 2: "INT2"})
    table = qat.record_qat(recording)
    assert len(table) == len(qat.MODELS) * 3 * 2 and set(table.family) == set(qat.MODELS)
    assert set(table.mse[table.bits.isna()]) == {0.0} and (table.mse[table.bits.notna()] > 0).all()
    shipped = table.family == qat.SHIPPED
    assert (table.mse == table.mse_shipped)[shipped].all() and not (table.mse == table.mse_shipped)[~shipped].any()
    by_cache = table[table.bits == 2].pivot(index="family", columns="image", values="mse_shipped")
    assert by_cache[0].nunique() == len(qat.MODELS)  # each tuning makes a model of its own
    points = qat.summary(table, reference_of("digits", recording.folder)).set_index("method")
    assert points.loc[FULL.name, ["median", "reuse_median"]].isna().all()
    assert points.fd.isna().all()  # of two images there is none
    one = table[table.method == "tuned, INT2, INT4"]
    for column, errors in (("median", one.mse_shipped), ("reuse_median", one.mse)):
        assert points.loc["tuned, INT2, INT4", column] == pytest.approx((-10 * np.log10(errors)).median())
    assert points.macs_speedup.drop(FULL.name)[points.bits.drop(FULL.name).notna()].between(1.8, 2).all()

    def again(*_arguments, **_options):
        raise AssertionError("measured again")

    monkeypatch.setattr(qat, "draw", again)
    assert qat.record_qat(recording).equals(load_table(recording.folder / "qat.parquet"))
    run = Run({"name": "smoke", "num_inference_steps": 4, "num_samples": 2, "images": 2}, 0, tmp_path)
    figure = figures.slide16_qat(run, table, history(0.25, 1.5))
    title = " ".join(figure.get_suptitle().split()).replace("−", "-")
    assert title == qat.in_words(table, history(0.25, 1.5)) and title.endswith("through INT4 by +1.5")
