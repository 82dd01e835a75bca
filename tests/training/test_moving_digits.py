"""The video model's data and training, run dry: one pair of blocks, few steps."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from helpers import killed_at

from dqar.__main__ import main
from dqar.commands import train
from dqar.models import pipelines
from dqar.models.data import load_split, moving_digits
from dqar.models.pipelines import class_captions
from dqar.training.digits import learning_rate
from dqar.training.moving_digits import VideoRecipe, batch_loss, build_transformer, cut_out, train_video, unexplained


@dataclasses.dataclass(frozen=True)
class TinyVideo(VideoRecipe):
    num_layers: int = 1
    num_attention_heads: int = 1
    attention_head_dim: int = 16
    patch_size: int = 6
    batch_size: int = 4
    num_steps: int = 4
    warmup_steps: int = 1


TINY = TinyVideo()


def test_digits_move_by_a_pixel_a_frame_and_turn_round_at_the_edges():
    digits = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    digits[:, :, 0, 0] = 1  # the brightest, so that the corner can be found
    videos = moving_digits(digits, 20, 12, torch.Generator().manual_seed(1))
    assert videos.shape == (40, 1, 20, 12, 12)
    corners = videos[:, 0].flatten(2).argmax(-1)
    top, left = corners // 12, corners % 12
    for digit, video, ys, xs in zip(digits, videos, top.tolist(), left.tolist(), strict=True):
        for frame, (y, x) in enumerate(zip(ys, xs, strict=True)):
            expected = torch.full((12, 12), -1.0)
            expected[y : y + 8, x : x + 8] = digit[0]
            assert torch.equal(video[0, frame], expected)
        for places in (ys, xs):
            moves = {abs(b - a) for a, b in zip(places, places[1:], strict=False)}
            assert moves in ({0}, {1}) and (moves == {0} or set(range(5)) == set(places))  # all the way, both ways
    assert ((top.diff() != 0).any(1) | (left.diff() != 0).any(1)).all()
    assert len({(int(y), int(x)) for y, x in zip(top[:, 0], left[:, 0], strict=True)}) > 10


def test_a_cut_out_digit_is_the_one_that_moves():
    images, labels = load_split("digits", "test")
    chosen = images[labels == 0][:20]  # zeros are as wide and high as their window
    videos = moving_digits(chosen, 8, 12, torch.Generator().manual_seed(0)).transpose(1, 2) / 2 + 0.5
    digits = cut_out(videos.flatten(0, 1), 8).unflatten(0, (20, 8))
    errors = (digits - (chosen / 2 + 0.5)[:, None]).square().mean(dim=(2, 3, 4))
    assert (errors < 1e-6).double().mean() > 0.6
    assert unexplained(videos) == 0
    assert unexplained(videos.flip(0)[:, torch.tensor([0, 3, 1, 6, 2, 7, 4, 5])]) > 0.1  # frames in disorder


def test_the_null_class_is_no_class_of_its_own():
    assert class_captions(torch.tensor([2, 3]), 3).tolist() == [[[0, 0, 1]], [[0, 0, 0]]]


def test_the_models_first_output_is_zero_and_all_its_parameters_learn():
    model, (images, labels) = build_transformer(TINY), load_split("digits", "train")
    with torch.no_grad():
        output = model(torch.randn(1, 1, 8, 12, 12), torch.tensor([5]), class_captions(torch.tensor([1]), 10)).sample
    assert output.eq(0).all()
    for parameter in model.parameters():
        parameter.data += 0.05
    batch_loss(TINY, model, images, labels, 0).backward()
    # Nothing attends to another word than the one, so that the cross-attention's queries and keys have no say.
    silent = {name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0}
    assert all(".attn2.to_q." in name or ".to_k." in name for name in silent), silent


def test_the_training_goes_on_as_if_never_interrupted(tmp_path, monkeypatch):
    straight = train_video(TINY, tmp_path / "a")

    monkeypatch.setattr("dqar.training.digits.save_checkpoint", killed_at(2))
    with pytest.raises(KeyboardInterrupt):
        train_video(TINY, tmp_path / "b", checkpoint_every=2)
    monkeypatch.undo()
    resumed = train_video(TINY, tmp_path / "b")
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert (tmp_path / "a/loss.jsonl").read_text() == (tmp_path / "b/loss.jsonl").read_text()


def test_the_learning_rate_is_diffusers_cosine_in_every_cycle():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    expected = get_cosine_schedule_with_warmup(optimizer, 3, 20).lr_lambdas[0]
    for step in range(60):
        assert learning_rate(3, 20)(step) == pytest.approx(expected(step % 20), abs=1e-12)


def test_the_command_writes_pipeline_card_and_measurements(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "VideoRecipe", TinyVideo)
    monkeypatch.setattr(train, "evaluate_video", partial(train.evaluate_video, num_samples=10))
    assert main(["train", "moving-digits", "--work", str(tmp_path), "--seed", "3"]) == 0
    folder = tmp_path / "moving-digits/weights/moving-digits"
    measured = json.loads((folder / "evaluation.json").read_text())
    assert measured["held-out: unexplained by a move of a pixel"] == 0 and measured["held-out: class_accuracy"] > 0.9
    assert (folder / "samples.png").exists() and "4 steps of 4 videos" in " ".join(
        (folder / "README.md").read_text().split()
    )
    pipe = pipelines.load_embedded("moving-digits", folder=folder.parent)
    assert pipe.labels["nine"] == 9 and str(folder.parent / "moving-digits") in capsys.readouterr().out
