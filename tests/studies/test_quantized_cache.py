"""Which configurations the study of few-bit caches compares."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers import image_pipeline

from dqar.config import CacheFormat
from dqar.figures import findings
from dqar.figures import quantized_cache as figures
from dqar.measure.results import Run, load_table
from dqar.models.profiles import get_profile
from dqar.studies import compare, quantized_cache
from dqar.studies.compare import Method
from dqar.studies.recording import LABEL_SEED, RESULT_SEED, Recording


def test_a_configuration_is_compared_with_itself_unquantized_whatever_its_levels(tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(quantized_cache, "draw", lambda *args, **options: None)
    monkeypatch.setattr(Method, "draw", lambda *args, **options: SimpleNamespace(images=None))
    monkeypatch.setattr(
        quantized_cache, "compare", lambda method, *args, **options: compared.append(method) or pd.DataFrame({"n": [1]})
    )
    monkeypatch.setattr(quantized_cache, "summarized", lambda table: table)
    fitted = quantized_cache.cached("output", 2, cache=CacheFormat(fitted=True, forecast_order=1, keep_channels=2))
    quantized_cache.quantization_quality(Run("smoke", 0, tmp_path), [fitted])
    plain, own = (method.config for method in compared)
    assert own == fitted
    assert plain == quantized_cache.cached("output", 16, cache=CacheFormat(fitted=False, forecast_order=1))


def test_the_quality_is_that_of_the_bits_alone_in_the_median_and_at_the_5th_percentile():
    decibels = [20.0, 30, 40, 50, 60]
    rows = pd.DataFrame({"method": "m", "mse": 0.1, "mse_cache": [10 ** (-x / 10) for x in decibels]})
    found = quantized_cache.summarized(rows).iloc[0]
    assert round(found["median"], 6) == 40 and round(found["5th percentile"], 6) == 22 and round(found.psnr, 6) == 10


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """``record_bits`` on a small random model: its tables by name, and the seeds of its images."""
    folder, tiny, seeds = tmp_path_factory.mktemp("bits"), image_pipeline(), set()
    draw = Method.draw
    with pytest.MonkeyPatch.context() as patch:
        for module in (compare, quantized_cache):
            patch.setattr(module, "cached_pipeline", lambda profile: tiny)
        patch.setattr(Method, "draw", lambda self, profile, seed, **own: seeds.add(seed) or draw(
            self, profile, seed, **own))  # fmt: skip
        recording = Recording(get_profile("smoke"), folder / "work", folder / "out")
        quantized_cache.record_bits(recording)
    return {path.stem: load_table(path) for path in recording.folder.glob("*.parquet")}, seeds


def test_bits_are_chosen_and_judged_on_different_images(recorded):
    tables, seeds = recorded
    assert set(tables) == {f"bits-{kind}{target}" for kind in ("", "layers-", "steps-") for target in ("output", "kv")}
    assert tables["bits-layers-kv"].attrs["provenance"]["seed"] == LABEL_SEED and seeds == {RESULT_SEED}
    assert set(tables["bits-steps-kv"].step) == {0, 2, 4, 6}  # every second one of 8 is computed and kept
    points = tables["bits-output"].drop_duplicates("method").set_index("method")
    mixed, uniform = points[points.family == "mixed"], points[points.family == "uniform"]
    assert len(mixed) == 3 and mixed.share.is_monotonic_decreasing
    assert (mixed.share < uniform.share["INT4"] + 1e-9).all() and (mixed.share > uniform.share["INT2"] - 1e-9).all()
    for row in points.itertuples():  # 2 branches; a layer's values in its bits, two float16 a channel
        widths = [int(bits) for bits in row.layer_bits.split()]
        assert row.cache_bytes == sum(2 * (16 * 16 * bits // 8 + 16 * 4) for bits in widths)
        assert row.share == pytest.approx(row.cache_bytes / (4 * 2 * 16 * 16 * 2))


def test_a_gain_is_that_of_the_same_images_in_decibels():
    mse = {
        "INT4": [1e-4, 1e-5, 1e-3],
        "mixed, 0.28 of 16 bits": [1e-5, 1e-6, 1e-4],
        "mixed, 0.2 of 16 bits": [1e-2] * 3,
    }
    share = {"INT4": 0.28, "mixed, 0.28 of 16 bits": 0.279, "mixed, 0.2 of 16 bits": 0.2}
    rows = [
        {"method": name, "family": "uniform" if name == "INT4" else "mixed", "image": image, "mse": error}
        for name, errors in mse.items()
        for image, error in enumerate(errors)
    ]
    table = pd.DataFrame(rows)
    table["share"] = table.method.map(share)
    row = quantized_cache.of_equal_bytes(table)
    assert (row.mixed, row.uniform, row.measure) == ("mixed, 0.28 of 16 bits", "INT4", "median")
    assert np.allclose([row.gain, row.low, row.high], 10)  # each image gains as much
    worse = quantized_cache.gains(table).query("share == 0.2 and measure == 'median'").iloc[0]
    assert worse.gain == pytest.approx(-20) and worse.low <= worse.gain <= worse.high
    said = quantized_cache.mixed_in_words(table, table)
    assert said.endswith("by +10.0 dB (+10.0 to +10.0) for outputs, +10.0 (+10.0 to +10.0) for K and V")


def test_bits_of_layers_are_drawn_and_said(recorded, tmp_path):
    tables, run = recorded[0], Run("smoke", 0, tmp_path)
    names = ("bits-layers-output", "bits-steps-output", "bits-output", "bits-kv")
    figure = figures.slide06_layers(run, *map(tables.get, names))
    said = quantized_cache.mixed_in_words(tables["bits-output"], tables["bits-kv"])
    assert " ".join(figure.get_suptitle().split()) == said.replace("-", "−")
    assert figures.slide06_layers(run, *map(tables.get, names[:-1]), None).get_suptitle() == ""
    answer = findings.layers_apart(tables["bits-layers-output"], tables["bits-output"])
    output = tables["bits-output"]
    four = -10 * np.log10(output.mse[output.method == "INT4"]).median()
    assert f"where INT4 takes 0.38 for {four:.1f} dB (n = 2)." in answer and "Layers differ" in answer
