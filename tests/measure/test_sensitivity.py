import pytest
import torch
from helpers import embedded_pipeline, image_pipeline

from dqar import DQARConfig, Probe, ReusePlan
from dqar.measure.sampling import sample
from dqar.measure.sensitivity import site_errors
from dqar.models.profiles import get_profile


@pytest.mark.parametrize("target", ["kv", "output", "block", "residual"])
@pytest.mark.parametrize("scheduler", ["ddim", "dpm-solver++", "euler"])
def test_a_trial_is_what_a_run_with_that_one_reuse_does(target, scheduler):
    profile, pipe = get_profile("digits", num_inference_steps=6, batch_size=1), image_pipeline(scheduler)
    table = site_errors(pipe, profile, 3, target, first_image=1, num_images=2, sites_per_step=2)
    assert len(table) == 5 * 2 * 2 and set(table.image) == {1, 2} and (table.label == table.image).all()
    references = {image: sample(pipe, profile, 3, first_image=image, num_samples=1).images for image in (1, 2)}
    for row in table.sample(3, random_state=0).itertuples():
        plan = ReusePlan({(row.step, row.layer, row.branch)}, 4, 6)
        config = DQARConfig(plan=plan, reuse_target=target, quantize_bits=16)
        drawn = sample(pipe, profile, 3, config, first_image=row.image, num_samples=1)
        assert (drawn.trace.to_pandas().decision == "reuse").sum() == 1
        assert (drawn.images - references[row.image]).square().mean().item() == pytest.approx(
            row.error, rel=2e-2, abs=1e-12
        )
    assert (table.change > 0).all() and (table.error > 0).mean() > 0.9


def test_what_is_known_is_what_the_controller_would_know():
    pipe, profile = embedded_pipeline(), get_profile("digits", num_inference_steps=5, batch_size=1)
    table = site_errors(pipe, profile, 0, "output", first_image=0, num_images=1, sites_per_step=4)
    trace = sample(
        pipe, profile, 0, DQARConfig(schedule="none", probe=Probe(record=True)), num_samples=1
    ).trace.to_pandas()
    by_site = trace.set_index(["step", "layer", "branch"])
    for row in table.itertuples():
        before, now = (by_site.loc[(step, row.layer, row.branch)] for step in (row.step - 1, row.step))
        assert (row.entropy, row.snr, row.latent_norm) == pytest.approx((before.entropy, now.snr_gate, now.latent_norm))
    assert torch.isfinite(torch.tensor(table[["entropy", "snr", "latent_norm"]].values)).all()
