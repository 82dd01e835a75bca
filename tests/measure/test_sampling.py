"""Images that don't fit into the GPU's memory at once."""

import dataclasses
import warnings

import pytest
import torch

from dqar.measure import sampling
from dqar.measure.sampling import LOOK, OPEN, sample
from dqar.measure.sensitivity import site_errors
from dqar.models.profiles import get_profile
from dqar.studies import compare
from dqar.studies.compare import Method


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(sampling, "_FITS", {})


def limited(pipe, most):
    """Lets the transformer run out of memory with more than so many rows; returns what was tried."""
    tried = []

    def see(_module, args, kwargs):
        rows = len(args[0] if args else kwargs["hidden_states"])
        tried.append(rows)
        if rows > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = pipe.transformer.register_forward_pre_hook(see, with_kwargs=True)
    return tried, handle


@pytest.mark.parametrize("config", [None, LOOK])
def test_out_of_memory_halves_the_batch_by_itself_and_says_so_once(pipe, config):
    profile = get_profile("digits", num_inference_steps=4, num_samples=8, batch_size=8)
    whole = sample(pipe, profile, 0, config)
    tried, handle = limited(pipe, most=4)  # two guided images
    with pytest.warns(UserWarning, match="the GPU's memory is too small for 8 images at once") as said:
        halved = sample(pipe, profile, 0, config)
        again = sample(pipe, profile, 0, config)
    assert len(said) == 1 and set(tried) == {16, 8, 4} and tried.count(16) == 1
    torch.testing.assert_close(halved.images, whole.images, atol=1e-5, rtol=0)
    assert torch.equal(again.images, halved.images)
    if config is not None:  # the trace is of what was drawn, not of what was tried
        assert len(halved.trace.to_pandas()) == 4 * len(whole.trace.to_pandas())
    handle.remove()


def test_what_was_begun_with_too_many_at_once_is_not_counted(pipe, monkeypatch):
    profile = get_profile("digits", num_inference_steps=4, num_samples=4, batch_size=2)
    static = Method("static", config=dataclasses.replace(OPEN, schedule="static"))
    monkeypatch.setattr(Method, "pipeline", lambda *_args: pipe)
    whole = compare.draw(static, profile, 0)
    _, handle = limited(pipe, most=4)
    with pytest.warns(UserWarning, match="too small for 4 images"):
        halved = compare.draw(static, dataclasses.replace(profile, batch_size=4), 0)
    handle.remove()
    assert halved.macs == whole.macs and halved.cache_bytes == whole.cache_bytes > 0


def test_an_image_that_does_not_fit_alone_is_refused(pipe):
    _, handle = limited(pipe, most=1)
    profile = get_profile("digits", num_inference_steps=4, num_samples=2, batch_size=2)
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="not even one image fits.*offload=true"):
        warnings.simplefilter("ignore")
        sample(pipe, profile, 0)
    handle.remove()


def test_reuses_are_tried_on_fewer_images_at_once(pipe):
    profile = get_profile("digits", num_inference_steps=4, batch_size=1)
    tried, handle = limited(pipe, most=4)
    with pytest.warns(UserWarning, match="2 reuses of each image"):
        table = site_errors(pipe, profile, 0, "output", first_image=0, num_images=4, sites_per_step=2)
    handle.remove()
    assert len(table) == 3 * 4 * 2 and sorted(set(table.image)) == [0, 1, 2, 3] and max(tried[-20:]) <= 4
    halves = [site_errors(pipe, profile, 0, "output", i, 1, 2).error for i in range(4)]
    assert table.error.tolist() == pytest.approx(
        torch.cat([torch.tensor(x.to_numpy()) for x in halves]).tolist(), rel=1e-3
    )
