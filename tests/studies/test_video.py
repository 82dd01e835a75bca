import dataclasses
import math
from collections import defaultdict
from functools import partial

import pandas as pd
import pytest
import torch
from helpers import silent
from tiny import randomized

from dqar import apply_dqar, describe_model, extrapolation, fit_plan
from dqar.figures import video as figures
from dqar.measure import metrics
from dqar.measure.results import Run, provenance
from dqar.measure.sampling import LOOK, OPEN, noise_generators
from dqar.models import pipelines
from dqar.models.pipelines import EmbeddedLattePipeline, make_scheduler
from dqar.models.profiles import get_profile
from dqar.studies import conclusions, video
from dqar.studies.recording import Recording
from dqar.training.card import pipeline_parts
from dqar.training.moving_digits import VideoRecipe, build_transformer

RECIPE = VideoRecipe(num_layers=1, num_attention_heads=1, attention_head_dim=16, patch_size=4)
STEPS, FRAMES = 6, RECIPE.video_length


@pytest.fixture
def pipe():
    pipe = EmbeddedLattePipeline(randomized(build_transformer(RECIPE)), **pipeline_parts("digits"))
    pipe.scheduler = make_scheduler("dpm-solver++", pipe.scheduler)
    return silent(pipe)


def draw(pipe, labels=(3, 8), **options):
    options = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "output_type": "pt", **options}
    return pipe(list(labels), generator=noise_generators(0, torch.arange(len(labels))), **options).frames


def test_videos_are_drawn_class_by_class_and_guided(pipe):
    videos = draw(pipe)
    assert videos.shape == (2, FRAMES, 1, 12, 12)
    torch.testing.assert_close(draw(pipe, (3,))[0], videos[0])  # whatever else is drawn with it
    assert (draw(pipe, (4, 8))[0] != videos[0]).any() and torch.equal(draw(pipe, (4, 8))[1], videos[1])
    assert (draw(pipe, guidance_scale=1.0) != videos).any()
    model, scheduler = pipe.transformer, make_scheduler("ddim", pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    shape = (1, 12, 12)
    x = torch.stack([torch.randn(1, FRAMES, *shape[1:], generator=g) for g in noise_generators(0, torch.arange(2))])
    pipe.scheduler, captions = scheduler, torch.eye(10)[[3, 8]][:, None]
    with torch.no_grad():
        for t in scheduler.timesteps:
            plain, asked = (model(x, t.expand(2), c, return_dict=False)[0] for c in (0 * captions, captions))
            x = scheduler.step(plain + 2 * (asked - plain), t, x).prev_sample
    torch.testing.assert_close(draw(pipe), (x / 2 + 0.5).clamp(0, 1).transpose(1, 2), atol=1e-4, rtol=0)


def test_a_video_of_another_length_is_refused_by_one_message(pipe):
    assert torch.equal(draw(pipe, num_frames=FRAMES), draw(pipe))
    with pytest.raises(ValueError, match=r"^num_frames=16 is not accepted: this model draws 8$"):
        draw(pipe, num_frames=16)


def test_a_plan_of_videos_sees_space_and_time_and_fits_this_length_only(pipe):
    calls = [{"class_labels": [i, i + 5], "guidance_scale": 2.0} for i in range(3)]
    plan = fit_plan(pipe, calls, STEPS, macs=2, refinements=0)
    assert plan.kernel == (3, 3, 3) and plan.latents == (1, FRAMES, 12, 12)
    plain, before = draw(pipe), metrics.count_macs(lambda: draw(pipe))
    with apply_dqar(pipe, plan) as session:
        planned, macs = draw(pipe), metrics.count_macs(lambda: draw(pipe))
    assert (
        macs < 0.8 * before and len(plan.computed) == 3 and session.trace.to_pandas("model").decision.eq("reuse").any()
    )
    assert torch.equal(draw(pipe), plain)
    fewer = draw(pipe, num_inference_steps=STEPS // 2)
    assert metrics.mean_psnr(planned, plain) > metrics.mean_psnr(fewer, plain)
    longer = build_transformer(VideoRecipe(**{**vars(RECIPE), "video_length": 4}))
    other = EmbeddedLattePipeline(randomized(longer), **pipeline_parts("digits"))
    with apply_dqar(silent(other), plan), pytest.raises(ValueError, match="1 x 8 x 12 x 12 latents"):
        draw(other)


def test_dqar_traces_and_reuses_the_video_models_attention(pipe):
    plain = draw(pipe)
    with apply_dqar(pipe, LOOK) as session:
        assert torch.equal(draw(pipe), plain)
    table = session.trace.to_pandas()
    assert (
        set(table.branch) == {"cond", "uncond"} and set(table.step) == set(range(STEPS)) and (table.entropy > 0).all()
    )
    with apply_dqar(pipe, dataclasses.replace(OPEN, schedule="static")) as session:
        assert (draw(pipe) != plain).any()
    assert session.trace.to_pandas().decision.eq("reuse").any() and torch.equal(draw(pipe), plain)


@pytest.mark.parametrize(
    ("interval", "order", "computed", "rows"),
    [
        (2, 0, [0, 2, 4, 6], {1: [1, 0, 0, 0], 4: [0, 0, 1, 0], 7: [0, 0, 0, 1]}),
        (2, 1, [0, 2, 4, 6], {1: [0.5, 0.5, 0, 0], 4: [0, 0, 1, 0], 7: [0, 0, 0, 1]}),
        (4, 1, [1, 5], {0: [1, 0], 2: [0.75, 0.25], 4: [0.25, 0.75], 7: [0, 1]}),
    ],
)
def test_frames_are_made_of_the_computed_ones_beside_them(interval, order, computed, rows):
    steps, weights = video.frame_weights(8, interval, order)
    assert steps == computed and torch.equal(weights.sum(1), torch.ones(8))
    assert torch.equal(weights[computed], torch.eye(len(computed)))
    for frame, row in rows.items():
        assert weights[frame].tolist() == row


def test_reuse_of_every_single_result_changes_nothing_and_leaves_the_model_as_it_was(pipe):
    plain, classes = draw(pipe), [type(module) for module in pipe.transformer.modules()]
    for over in ("steps", "frames"):
        with video.reused_sites(pipe, over, 1, 0):
            assert torch.equal(draw(pipe), plain)
    with video.fewer_frames(pipe, 1, 0):
        torch.testing.assert_close(draw(pipe), plain, atol=1e-4, rtol=0)
    assert [type(module) for module in pipe.transformer.modules()] == classes and torch.equal(draw(pipe), plain)


@pytest.fixture
def answers(monkeypatch):
    """What every attention and feed-forward answered with, by module, call by call."""
    seen = defaultdict(list)

    def spied(handlers, taken_over=video.taken_over):
        def answer(module, *args, **kwargs):
            seen[module].append(handlers[module](*args, **kwargs))
            return seen[module][-1]

        return taken_over({module: partial(answer, module) for module in handlers})

    monkeypatch.setattr(video, "taken_over", spied)
    return seen


def test_reuse_over_frames_takes_the_results_of_the_frame_before(pipe, answers):
    with video.reused_sites(pipe, "frames", 2, 0):
        assert (draw(pipe) != draw(pipe, (3, 9))).any()
    spatial, temporal = pipe.transformer.transformer_blocks[0], pipe.transformer.temporal_transformer_blocks[0]
    assert set(answers) == {spatial.attn1, spatial.attn2, spatial.ff, temporal.attn1, temporal.ff}
    for module, outputs in answers.items():
        along_time = module in (temporal.attn1, temporal.ff)
        frames = outputs[0].movedim(1, 0) if along_time else outputs[0].unflatten(0, (-1, FRAMES)).movedim(1, 0)
        assert len(frames) == FRAMES and torch.equal(frames[1::2], frames[::2])
        if module is not spatial.attn2:  # the caption is the same for all frames
            assert (frames[2] != frames[0]).any()


@pytest.mark.parametrize("order", [0, 1])
def test_reuse_over_steps_takes_the_results_of_the_steps_before(pipe, answers, order):
    plain = draw(pipe)
    with video.reused_sites(pipe, "steps", 2, order):
        draw(pipe)  # nothing of one run is seen by the next
        for outputs in answers.values():
            outputs.clear()
        assert (draw(pipe) != plain).any()
    answers.pop(pipe.transformer)
    assert len(answers) == 5
    for outputs in answers.values():
        assert len(outputs) == STEPS and torch.equal(outputs[1], outputs[0])
        torch.testing.assert_close(outputs[3], outputs[2] + order * (outputs[2] - outputs[0]) / 2)


def test_both_kinds_of_reuse_inside_the_blocks_take_about_as_many_macs(pipe):
    macs = {"": metrics.count_macs(lambda: draw(pipe))}
    for over in ("steps", "frames"):
        with video.reused_sites(pipe, over, 2, 0):
            macs[over] = metrics.count_macs(lambda: draw(pipe))
    assert macs["steps"] < macs["frames"] < 1.2 * macs["steps"] < macs[""]


def test_a_frame_left_out_shows_the_clean_picture_of_the_one_before(pipe):
    model, x, t = pipe.transformer, torch.randn(2, 1, FRAMES, 12, 12), torch.tensor(500)
    captions, kept = torch.eye(10)[[3, 8]][:, None], pipe.scheduler.alphas_cumprod[500]
    with torch.no_grad(), video.fewer_frames(pipe, 2, 0):
        noise = model(x, t.expand(2), captions).sample
    clean = (x - (1 - kept).sqrt() * noise) / kept.sqrt()
    torch.testing.assert_close(clean[:, :, 1::2], clean[:, :, ::2], atol=1e-3, rtol=0)
    assert (clean[:, :, 2] - clean[:, :, 0]).abs().max() > 0.1


def test_every_way_is_recorded_on_the_same_videos(tmp_path, monkeypatch, pipe):
    monkeypatch.setattr(video.FULL.__class__, "pipeline", lambda self, profile: pipe)
    profile = get_profile("smoke", num_inference_steps=STEPS, images=2)
    recording = Recording(profile, tmp_path / "work", tmp_path / "out")
    monkeypatch.setattr(video, "BUDGETS", (2, 3))
    monkeypatch.setattr(video, "KERNELS", {"space": (1, 3, 3)})
    monkeypatch.setattr(video, "INTERVALS", (2,))
    table = video.record_video(recording)
    assert recording.profile is profile and table.attrs["provenance"]["profile"]["name"] == "moving-digits"
    assert table.groupby("method").image.count().eq(2).all() and table.method.nunique() == 1 + 2 * 2 + 1 + 8
    assert {*figures.LOOKS, "plan, space", "full compute"} == set(table.family)
    by = table.groupby(["family", "order"], dropna=False).macs_speedup.first()
    assert by["prediction over steps"].nunique() == by["sites over frames"].nunique() == 1
    assert table[table.method == "full compute"].mse.eq(0).all()
    assert table[table.method != "full compute"].groupby("method").mse.mean().gt(0).all()
    monkeypatch.setattr(video, "draw", None)
    assert len(video.record_video(recording)) == len(table)  # nothing is drawn anew
    assert video.record_video(Recording(get_profile("cifar10"), tmp_path / "work", tmp_path / "out")) is None


def recorded(errors):
    """A table of these PSNRs by family; continuing in a line loses 3 dB over steps, and wins 3 over frames."""
    rows = [
        (f"{family}, order {order}", family, interval, order, 2.0, image, 10 ** (-(decibels + change * order) / 10))
        for family, decibels in errors.items()
        for change in [3 if "frames" in family else -3]
        for interval, order in ([(2, 0), (2, 1)] if "over" in family else [(math.nan, 0)])
        for image in range(4)
    ]
    table = pd.DataFrame(rows, columns=["method", "family", "interval", "order", "macs_speedup", "image", "mse"])
    table.attrs = {"provenance": provenance(get_profile("moving-digits"), 0)}
    return table.assign(budget=2.0)


def test_the_panel_is_drawn_from_what_is_recorded(tmp_path, monkeypatch, pipe):
    monkeypatch.setattr(video.FULL.__class__, "pipeline", lambda self, profile: pipe)
    run = Run("smoke", 0, tmp_path)
    run.recordings = tmp_path
    assert video.shown(run, None) is None
    table = recorded({"plan": 50, "sites over steps": 30, "sites over frames": 20, "full compute": 99})
    best = {"plan, order 0", "sites over steps, order 0", "sites over frames, order 1"}
    assert set(video.summary(table).method) == best
    said = "30.0 dB over steps, 23.0 over frames; a plan of 2.0× fewer MACs: 50.0 dB"
    assert said in figures.slide16_video(run, table).get_suptitle().replace("\n", " ")
    verdict, words = conclusions.across_frames(table)
    assert verdict == "does not hold" and "23.0 dB over frames, 30.0 over steps; a plan 50.0 dB" in words
    assert conclusions.across_frames(None) == ("not testable here", "not recorded yet: make results")
    profile = video.profile_for(run.profile)
    pipe.scheduler.set_timesteps(profile.num_inference_steps)
    timesteps, model = pipe.scheduler.timesteps.tolist(), describe_model(pipe.transformer)
    plan = extrapolation(range(0, len(timesteps), 2), timesteps, profile.guidance_scale, model)
    (path := video.video_plan_path(tmp_path, profile, video.BUDGETS[0])).parent.mkdir()
    plan.save(path)
    orders, reused_sites = [], video.reused_sites

    def noted(*args, order, **named):
        orders.append(order)
        return reused_sites(*args, order=order, **named)

    monkeypatch.setattr(video, "reused_sites", noted)
    drawn = video.shown(run, table, 5)
    assert list(drawn.videos) == ["full compute", "plan", "reuse over steps", "reuse over frames"]
    assert orders == [0, 1] and drawn.costs["median"].tolist() == pytest.approx([50, 30, 23])
    assert all((drawn.videos["full compute"] != drawn.videos[name]).any() for name in drawn.costs.index)
    sheet, gif = figures.slide16_contact_sheet(run, drawn), figures.slide16_moving_digits(run, drawn)
    said = "a plan keeps 50.0 dB, reuse over steps 30.0, over frames 23.0"
    assert said in sheet.get_suptitle().replace("\n", " ") and gif.data[:3] == b"GIF"


def test_missing_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pipelines, "WEIGHTS", tmp_path)
    with pytest.raises(OSError, match="`dqar train moving-digits"):
        pipelines.load_pipeline(get_profile("moving-digits"))
