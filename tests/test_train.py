"""The recipe of the CIFAR-10 model, run dry: two blocks, few images, the CPU."""

import dataclasses
import io
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dqar import data, models, train
from dqar.models import get_profile, load_classifier, load_pipeline
from dqar.sampling import sample
from dqar.train import RECIPES, train_transformer

TINY = dataclasses.replace(
    RECIPES["cifar10"], num_layers=2, num_attention_heads=1, attention_head_dim=16, batch_size=8, warmup_steps=5
)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Coloured squares, a colour a class, as parquet of JPEG bytes; a folder for weights."""
    generator = np.random.default_rng(0)
    colors = generator.integers(40, 216, (10, 3))
    for split, number in (("train", 60), ("test", 30)):
        labels = np.arange(number) % 10
        pixels = np.clip(colors[labels][:, None, None] + generator.normal(0, 8, (number, 32, 32, 3)), 0, 255)
        jpegs = []
        for image in pixels.astype(np.uint8):
            Image.fromarray(image).save(buffer := io.BytesIO(), "JPEG")
            jpegs.append(buffer.getvalue())
        table = pa.table({"image": jpegs, "label": pa.array(labels, pa.int8())})
        pq.write_table(table, tmp_path / f"cifar10-jpeg-{split}.parquet")
    monkeypatch.setenv("DQAR_DATA", str(tmp_path))
    for module in (models, train):
        monkeypatch.setattr(module, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setitem(train.RECIPES, "cifar10", TINY)
    return colors


def test_cifar_is_read_as_it_is_stored(cifar):
    images, labels = data.load_split("cifar10", "train")
    assert images.shape == (60, 3, 32, 32) and images.dtype == torch.float32 and labels.tolist() == list(range(10)) * 6
    means = (images.mean(dim=(2, 3)) + 1) * 127.5
    torch.testing.assert_close(means[:10], torch.tensor(cifar).float(), atol=4, rtol=0)


def test_missing_data_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("DQAR_DATA", str(tmp_path))
    monkeypatch.setattr(data, "CIFAR10_FOLDERS", ())
    with pytest.raises(OSError, match="cifar10-jpeg-test.parquet is in none of .*set DQAR_DATA"):
        data.load_split("cifar10", "test")


def test_the_shipped_size_stays_below_45_mb():
    model = train.build_transformer(RECIPES["cifar10"])
    parameters = sum(p.numel() for p in model.parameters())
    assert len(model.transformer_blocks) == 28 and 40e6 < 2 * parameters < 45e6
    assert model.pos_embed.pos_embed.shape[1] == 256  # tokens, as DiT-XL/2 has them


def test_training_in_portions_is_training_at_once(cifar, tmp_path):
    recipe = dataclasses.replace(TINY, num_steps=6)
    straight = train_transformer(recipe, tmp_path / "a")
    for step in range(1, 6):  # no time: a step, and a checkpoint
        assert train_transformer(recipe, tmp_path / "b", minutes=0) is None
        assert torch.load(tmp_path / "b/checkpoint.pt", weights_only=True)["step"] == step
    portions = train_transformer(recipe, tmp_path / "b", minutes=0)
    for one, other in zip(straight.parameters(), portions.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_loss_falls(cifar, tmp_path):
    recipe = dataclasses.replace(TINY, num_steps=150, learning_rate=3e-3, ema_decay=0.9)
    train_transformer(recipe, tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "loss.jsonl").read_text().splitlines()]
    assert len(losses) == 150 and np.mean(losses[-20:]) < 0.5 * np.mean(losses[:5])
    train_transformer(dataclasses.replace(recipe, flip=False), tmp_path / "other")
    others = [json.loads(line)["loss"] for line in (tmp_path / "other/loss.jsonl").read_text().splitlines()]
    assert others[0] == losses[0] and others[-1] != losses[-1]  # at first the model's output is zero, whatever it sees


def test_from_data_to_card(cifar, tmp_path, capsys, monkeypatch):
    with pytest.raises(OSError, match=r"missing: `python -m dqar.train cifar10` makes them"):
        load_pipeline(get_profile("cifar10"))
    monkeypatch.setattr(
        train, "train_classifier", lambda *a, classify=train.train_classifier: classify("cifar10", 0, 40)
    )
    assert train.main(["cifar10-classifier"]) == 0
    accuracy = float(capsys.readouterr().out.split()[-1])
    assert accuracy > 0.9 and type(load_classifier("cifar10")).__name__ == "CifarClassifier"
    command = ["cifar10", "--steps", "3", "--work", str(tmp_path / "work")]
    assert train.main([*command, "--minutes", "0"]) == 0 and "same command continues" in capsys.readouterr().out
    monkeypatch.setattr(train, "evaluate", lambda *a, evaluate=train.evaluate, **k: evaluate(*a, num_samples=100, **k))
    monkeypatch.setitem(models.PROFILES, "cifar10", get_profile("cifar10", num_inference_steps=2))
    assert train.main(command) == 0
    folder = tmp_path / "weights/cifar10"
    assert "FD-cifar10" in (folder / "README.md").read_text() and (folder / "samples.png").stat().st_size > 1000
    results = json.loads((folder / "evaluation.json").read_text())
    assert results["samples"] == 100 and all(math.isfinite(value) for value in results.values())
    pipe = load_pipeline(get_profile("cifar10"))
    assert pipe.config.id2label["9"] == "truck"
    drawn = sample(pipe, get_profile("cifar10", num_inference_steps=2), 0, num_samples=3)
    assert drawn.images.shape == (3, 3, 32, 32) and drawn.labels.tolist() == [0, 1, 2]
