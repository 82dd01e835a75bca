"""A queue's images are those that its requests would get alone; nothing is lost, whatever one of them asks for."""

import pytest
import torch
from helpers import image_pipeline, make_dit, make_pixart, state
from tiny import TINY, drawn

from dqar import DQARConfig, RequestQueue, ReusePlan, apply_dqar, describe_model, extrapolation, fit_plan

ASKED = [(0, 1, 8), (1, 2, 8), (2, 3, 6), (3, 1, 8), (4, 5, 6), (5, 7, 8)]
"""Seeds, classes and numbers of steps."""
SHARED = {"guidance_scale": 3.0, "output_type": "pt"}


def alone(pipe, seed, label, steps):
    generator = torch.Generator().manual_seed(seed)
    return pipe([label], num_inference_steps=steps, generator=generator, **SHARED).images[0]


def forecasts(pipe):
    """A plan for each number of steps."""
    plans = {}
    for steps in (6, 8):
        pipe.scheduler.set_timesteps(steps)
        timesteps, model = pipe.scheduler.timesteps.tolist(), describe_model(pipe.transformer)
        plans[steps] = extrapolation(range(0, steps, 2), timesteps, SHARED["guidance_scale"], model)
    return plans


@pytest.mark.parametrize("planned", [False, True])
def test_images_are_those_that_each_request_would_get_alone(planned):
    pipe = image_pipeline()
    plans = forecasts(pipe) if planned else None
    before = state(pipe)
    with RequestQueue(pipe, 2, plans, wait=30, **SHARED) as queue:
        images = [queue.submit(seed, steps, class_labels=label) for seed, label, steps in ASKED]
    assert queue.batches == [2, 2, 2]  # the two of six steps stand between those of eight
    assert state(pipe) == before
    for (seed, label, steps), image in zip(ASKED, images, strict=True):
        plain = expected = alone(pipe, seed, label, steps)
        if planned:
            with apply_dqar(pipe, plans[steps]):
                expected = alone(pipe, seed, label, steps)
            assert not torch.equal(plain, expected)
        torch.testing.assert_close(image.result(), expected, atol=1e-5, rtol=1e-4)
    assert not torch.equal(images[0].result(), images[3].result())  # of one class, from other noise


def test_what_differs_in_any_setting_is_drawn_apart():
    with RequestQueue(image_pipeline(), 8, wait=2, output_type="pt") as queue:
        for number, scale in enumerate((1.0, 3.0, 3.0)):
            queue.submit(number, 4, class_labels=1, guidance_scale=scale)
    assert queue.batches == [1, 2]


@pytest.mark.parametrize(
    "steps, planned, message",
    [
        (0, False, "num_inference_steps=0 is not accepted: an int of 1 or more"),
        (2.5, False, "num_inference_steps=2.5 is not accepted: an int of 1 or more"),
        (1001, False, "num_inference_steps=1001 is not accepted: up to the scheduler's 1000"),
        (7, True, r"num_inference_steps=7 is not accepted: there are plans for \[6, 8\]"),
    ],
)
def test_an_impossible_number_of_steps_is_refused_and_the_others_are_drawn(steps, planned, message):
    pipe = image_pipeline()
    with RequestQueue(pipe, 4, forecasts(pipe) if planned else None, **SHARED) as queue:
        before = queue.submit(0, 6, class_labels=1)
        with pytest.raises(ValueError, match=message):
            queue.submit(1, steps, class_labels=1)
        after = queue.submit(2, 6, class_labels=1)
    assert before.result().shape == after.result().shape == (1, 8, 8)


def test_a_request_that_fails_takes_no_other_with_it():
    pipe = image_pipeline()
    with RequestQueue(pipe, 3, wait=1, **SHARED) as queue:
        first, wrong, last = (queue.submit(n, 4, class_labels=label) for n, label in enumerate((1, 99, 2)))
        torch.testing.assert_close(first.result(), alone(pipe, 0, 1, 4), atol=1e-5, rtol=1e-4)
        with pytest.raises(IndexError):
            wrong.result()
        torch.testing.assert_close(last.result(), alone(pipe, 2, 2, 4), atol=1e-5, rtol=1e-4)
        assert queue.submit(3, 4, class_labels=1).result() is not None  # it goes on
    with pytest.raises(RuntimeError, match="the queue is closed"):
        queue.submit(4, 4, class_labels=1)


def test_whatever_a_request_holds_the_worker_goes_on():
    class Watermarked:
        """A pipeline that takes an array, and draws an image too many where it is long."""

        scheduler = image_pipeline().scheduler

        def __call__(self, class_labels, mark, generator, num_inference_steps):
            return (torch.zeros(len(class_labels) + len(mark) - 1),)

    mark = torch.zeros(1)
    with RequestQueue(Watermarked(), 2, wait=1) as queue:
        images = [queue.submit(n, 4, class_labels=1, mark=own) for n, own in enumerate((mark, mark, torch.ones(2)))]
        twice = queue.submit(4, 4, class_labels=1, mark=[0, 0])
    assert [image.result().item() for image in images[:2]] == [0, 0] and queue.batches == [2]
    for wrong in (images[2], twice):
        with pytest.raises(ValueError, match="the pipeline drew 2 images of 1 requests: ask for one each"):
            wrong.result()


def test_a_cancelled_request_is_not_drawn():
    pipe = image_pipeline()
    with RequestQueue(pipe, 2, wait=30, **SHARED) as queue:
        cancelled = queue.submit(0, 4, class_labels=1)
        assert cancelled.cancel()
        kept = queue.submit(1, 4, class_labels=1)
        assert kept.result() is not None
    assert queue.batches == [1] and cancelled.cancelled()


def test_a_gate_and_a_plan_for_other_steps_are_refused():
    pipe = image_pipeline()
    with pytest.raises(
        ValueError, match="plans='DQARConfig' is not accepted: ReusePlan, .* a gate decides for a whole"
    ):
        RequestQueue(pipe, 2, {8: DQARConfig()})
    with pytest.raises(ValueError, match=r"plans='{8: ...}' is not accepted: this plan was made for 6 steps"):
        RequestQueue(pipe, 2, {8: ReusePlan(frozenset(), 4, 6)})
    with pytest.raises(ValueError, match="batch_size=0 is not accepted"):
        RequestQueue(pipe, 0)


def test_a_plan_of_runs_that_begin_late_serves_the_number_that_is_asked_for():
    """As of img2img, which makes 6 of 8 steps at a strength of 0.75."""
    pipe, call = TINY["sd3_img2img"]()
    plan = fit_plan(pipe, [call(seed) for seed in range(4)], 8, macs=2, refinements=0)
    assert plan.num_inference_steps == 6
    with apply_dqar(pipe, plan):
        want = drawn(pipe, call(0))
    with RequestQueue(pipe, 1, plans={8: plan}, output_type="latent") as queue:
        image = queue.submit(seed=0, num_inference_steps=8, **call(0)).result()
    torch.testing.assert_close(image, want[0])


@pytest.mark.parametrize(
    "given, message",
    [
        ({"num_inference_steps": 6}, "num_inference_steps=6 is not accepted: `submit`"),
        ({"generator": None}, "generator=None is not accepted"),
        ({"wait": "a"}, "wait='a' is not accepted"),
        ({"plans": [1]}, r"plans=\[1\] is not accepted"),
    ],
)
def test_what_a_queue_does_not_take_is_said_at_once(given, message):
    with pytest.raises(ValueError, match=message):
        RequestQueue(make_dit(), 2, **given)


def test_what_a_request_does_not_take_is_said_at_once():
    small = {"height": 8, "width": 8, "use_resolution_binning": False, "clean_caption": False, "output_type": "latent"}
    with RequestQueue(make_pixart(), 2, **small) as queue:
        for wrong in ({"seed": "x"}, {"seed": None}, {"seed": 0, "generator": None}):
            with pytest.raises(ValueError, match="(seed|generator)=.* is not accepted"):
                queue.submit(**wrong, prompt="a cat", num_inference_steps=2)
        left_out, given = (queue.submit(0, 2, prompt="a cat", **more) for more in ({}, {"negative_prompt": None}))
        assert torch.equal(left_out.result(), given.result())
