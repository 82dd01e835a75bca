"""Batches: speed, quality and what a shared gate changes, from numbers worked out by hand and from a drawn gate."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from helpers import image_pipeline

from dqar.figures import conclusions as figures
from dqar.measure.results import RECORDED, Run, load_table
from dqar.measure.sampling import LOOK, OPEN
from dqar.models.profiles import get_profile
from dqar.studies import batches, compare, conclusions
from dqar.studies.compare import FULL, Method
from dqar.studies.recording import Recording


def recorded():
    """Full compute takes 2 s an image alone and 1 s of two; a gate's images lose 3 dB in twos, a plan's nothing."""
    seconds = {(FULL.name, 1): 2.0, (FULL.name, 2): 1.0, (batches.GATE, 1): 4.0, (batches.GATE, 2): 2.0}
    rows = [
        {"method": method, "together": together, "repeat": repeat, "seconds": own * (1 + repeat)}
        for (method, together), own in seconds.items()
        for repeat in range(3)
    ]
    for method, drop in ((batches.GATE, 3.0), (batches.PLAN, 0.0)):
        for together in (1, 2):
            for image, decibels in enumerate((50.0, 40.0, 30.0)):
                mse = 10 ** (-(decibels - drop * (together - 1)) / 10)
                quality = {"image": image, "mse": mse, "macs_speedup": 1.1, "sites_reused": 0.3}
                rows.append({"method": method, "together": together, **quality})
    return pd.DataFrame(rows)


def test_points_are_ratios_within_a_repeat_and_quality_by_size():
    points = batches.points(recorded()).set_index(["method", "together"])
    assert (
        points.speed[FULL.name, 1] == 1.0 and points.speed[FULL.name, 2] == 2.0 and points.speed[batches.GATE, 1] == 0.5
    )
    assert points["median"][batches.GATE, 1] == pytest.approx(40) and points["median"][
        batches.GATE, 2
    ] == pytest.approx(37)
    assert points.worst[batches.PLAN, 2] == pytest.approx(30) and math.isnan(points.worst[FULL.name, 2])


def test_the_interval_of_what_sharing_changes_is_that_of_paired_images():
    table = recorded()
    assert batches.sharing(table) == pytest.approx((-3, -3, -3))  # every image loses 3 dB: nothing is uncertain
    one = (table.method == batches.GATE) & (table.together == 2) & (table.image == 0)
    change, low, high = batches.sharing(table.assign(mse=table.mse.where(~one, 1.0)))
    assert change == pytest.approx(-13) and low < change <= high  # 47, 37, 27 became 0, 37, 27


def test_the_documented_numbers_are_the_recorded_ones():
    table = load_table(RECORDED / "digits/batches.parquet")
    points = batches.points(table).set_index(["method", "together"])
    change, low, high = batches.sharing(table)
    said = " ".join((RECORDED.parent / "docs/devices.md").read_text().split())
    assert f"eight at once are drawn {points.speed[FULL.name, 8]:.2f} times as fast" in said
    interval = f"by {change:+.1f} dB (95% interval {low:+.1f} to {high:+.1f})".replace("-", "−")
    assert f"of n = {table.image.nunique()} images {interval}" in said
    worst = points.worst[batches.GATE]
    assert f"the worst one from {worst[1]:.1f} to {worst[8]:.1f} dB" in said


def test_the_figure_and_slide_16_say_what_the_table_says(tmp_path):
    run = Run("smoke", 0, tmp_path)
    title = " ".join(figures.slide16_batches(run, recorded()).get_suptitle().split())
    assert title == (
        "2 images at once are drawn 2.00 times as fast as one by one; one gate for all of them instead of one each "
        "changes their median PSNR by −3.0 dB (−3.0 to −3.0)"
    )
    said = "2 at once: 2.00× as fast; one gate for all: -3.0 dB in the median (-3.0 to -3.0; n = 3)"
    assert conclusions.production(recorded()).startswith(said)
    assert figures.slide16_batches(run, None).get_suptitle() == ""


def test_every_size_is_measured_on_the_same_images(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "cached_pipeline", lambda profile: image_pipeline())
    looked = Method("look", config=LOOK).draw(get_profile("smoke"), 0, num_samples=2, num_inference_steps=6)
    middle = looked.traced.to_pandas().entropy.median()  # where images differ in what they would be let
    gate = Method(batches.GATE, config=dataclasses.replace(OPEN, entropy_threshold=middle, schedule="all"))
    plain = Method(batches.PLAN, num_inference_steps=4)
    monkeypatch.setattr(batches, "methods", lambda recording: [FULL, gate, plain])
    monkeypatch.setattr(batches, "SIZES", (1, 2))
    profile = get_profile("smoke", num_inference_steps=6)
    table = batches.record_batches(Recording(profile, tmp_path / "work", tmp_path / "out"))
    drawn = table[table.image.notna()].pivot(index="image", columns=["method", "together"], values="mse")
    assert drawn.shape == (2, 4) and table[table.repeat.notna()].groupby(["method", "together"]).size().eq(1).all()
    np.testing.assert_allclose(drawn[plain.name, 1], drawn[plain.name, 2], rtol=1e-3)
    assert not np.allclose(drawn[gate.name, 1], drawn[gate.name, 2], rtol=1e-3)  # one gate decides for both images
