"""Profiles changed on the command line, and what their results are called."""

import pytest
import torch
from diffusers import DDIMScheduler
from peers.test_bespoke import predict, solution

from dqar.__main__ import main
from dqar.commands.parser import Parser, asked_profile
from dqar.models.pipelines import make_scheduler
from dqar.models.profiles import PROFILES, SCHEDULERS, Weights, get_profile, profile_of


def asked(*arguments):
    parser = Parser("record", "")
    parser.add_profile()
    parser.add_changes()
    return asked_profile(parser.parse_args(list(arguments)))


def test_the_command_line_changes_any_field(tmp_path):
    given = asked("--profile", "pixart", "--weights", str(tmp_path), "--device", "cpu", "--images", "3",
                  "--set", "dtype=bfloat16", "--set", "guidance_scale=4.0", "--set", "offload=true")  # fmt: skip
    assert all(isinstance(value, str) for value in given.values())  # as papermill takes them
    profile = profile_of(given)
    assert profile.weights == Weights(str(tmp_path.resolve())) and profile.transformer is None
    assert (profile.device, profile.dtype, profile.guidance_scale) == ("cpu", torch.bfloat16, 4.0)
    assert profile.offload is True and profile.images == profile.num_samples == 3
    assert asked() == {"name": "digits"} and profile_of("digits") == PROFILES["digits"]


def test_a_repository_has_a_revision_a_folder_has_none(tmp_path, monkeypatch):
    assert Weights.parse("facebook/DiT@abc") == Weights("facebook/DiT", "abc")
    (tmp_path / "a@b").mkdir()
    monkeypatch.chdir(tmp_path)  # notebooks run in another folder
    assert Weights.parse("a@b") == Weights(str(tmp_path.resolve() / "a@b"))


def test_results_of_other_settings_have_another_label():
    usual = get_profile("dit-xl-2")
    assert (
        usual.label == "dit-xl-2" and get_profile("dit-xl-2", device="cpu", batch_size=4, repeats=9).label == "dit-xl-2"
    )
    others = [
        {"guidance_scale": 4.0},
        {"dtype": "bfloat16"},
        {"images": "10"},
        {"weights": "me/DiT"},
        {"rehearsal": "true"},
    ]
    labels = [get_profile("dit-xl-2", **changes).label for changes in others]
    assert labels == [
        *("dit-xl-2-guidance-scale-4-0", "dit-xl-2-dtype-bfloat16", "dit-xl-2-images-10", "dit-xl-2-weights-dit"),
        "dit-xl-2-rehearsal-true",
    ]


def test_a_distance_is_called_after_what_was_measured():
    names = {get_profile("digits").distance, get_profile("dit-xl-2").distance}
    assert names == {"FD-digits", "FID to full compute"}
    assert get_profile("pixart", reference="coco.npz").distance == "FID"
    assert "FID" not in get_profile("dit-xl-2", rehearsal=True).distance


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--set", "stpes=3"],
            "profile field 'stpes' is unknown: choose from batch_size, device, dtype, guidance_scale, ",
        ),
        (["--set", "dtype=int3"], "profile field dtype=int3 is not accepted: float16, bfloat16, float32"),
        (["--set", "scheduler=plms"], "profile field scheduler=plms is not accepted: ddim, "),
        (["--set", "num_inference_steps=4.5"], "profile field num_inference_steps=4.5 is not accepted: a whole number"),
        (["--set", "guidance_scale"], "--set guidance_scale is not accepted: FIELD=VALUE, such as guidance_scale=4.0"),
        (["--images", "0"], "profile field images=0 is not accepted: a whole number > 0"),
        (["--device", "tpu"], "profile field device=tpu is not accepted: cpu, cuda"),
        (["--set", "rehearsal=perhaps"], "profile field rehearsal=perhaps is not accepted: true, false"),
        (["--weights", "somewhere"], "profile 'digits' takes no weights: it is an embedded model, with its own"),
    ],
)
def test_wrong_changes_are_named_before_anything_is_written(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["record", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"dqar record: {message}") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_converges_to_the_exact_solution_of_gaussian_data(name):
    """And twice alike: none adds noise."""
    noise = torch.randn(3, 4, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scheduler, drawn = make_scheduler(name, DDIMScheduler()), []
    for _ in range(2):
        scheduler.set_timesteps(100)
        latents = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            latents = scheduler.step(predict(scheduler.scale_model_input(latents, t), t), t, latents).prev_sample
        drawn.append(latents)
    assert torch.equal(*drawn)
    assert (drawn[0] - solution(noise)).abs().max() < 0.15
