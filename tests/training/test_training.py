"""The training of the embedded models, run dry: two blocks, few images, the CPU."""

import dataclasses
import io
import json
import math
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import killed_at
from PIL import Image
from torch import nn

from dqar.__main__ import main
from dqar.commands import train
from dqar.measure import metrics
from dqar.measure.quality import load_reference
from dqar.measure.sampling import sample
from dqar.models import classifier, data, pipelines, profiles
from dqar.models.classifier import CifarClassifier, load_classifier
from dqar.models.pipelines import load_pipeline, num_classes
from dqar.models.profiles import get_profile
from dqar.training import checkpoints, cifar10, digits, latent_dit
from dqar.training.latent_dit import Gradients, LatentRecipe, draw_batch, train_latent_dit
from dqar.training.muon import StackedMuon
from dqar.training.stacked_dit import StackedDiT
from dqar.training.vae import VaeRecipe, build_vae, encode, normalise_latents, train_vae

TINY = LatentRecipe(num_layers=2, num_attention_heads=1, batch_size=40, warmup_steps=5)
TINY_VAE = VaeRecipe(block_out_channels=(8, 8), batch_size=4, num_steps=3, warmup_steps=1)


@dataclasses.dataclass(frozen=True)
class TinyDigits(digits.Recipe):
    num_layers: int = 1
    num_attention_heads: int = 1
    batch_size: int = 4
    warmup_steps: int = 1


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Coloured squares, a colour a class, as parquet of JPEG bytes; a folder for weights."""
    generator = np.random.default_rng(0)
    colors = generator.integers(40, 216, (10, 3))
    for split, number in (("train", 60), ("test", 40)):
        labels = np.arange(number) % 10
        pixels = np.clip(colors[labels][:, None, None] + generator.normal(0, 8, (number, 32, 32, 3)), 0, 255)
        jpegs = []
        for image in pixels.astype(np.uint8):
            Image.fromarray(image).save(buffer := io.BytesIO(), "JPEG")
            jpegs.append(buffer.getvalue())
        table = pa.table({"image": jpegs, "label": pa.array(labels, pa.int8())})
        pq.write_table(table, tmp_path / f"cifar10-jpeg-{split}.parquet")
    monkeypatch.setenv("DQAR_DATA", str(tmp_path))
    for module in (pipelines, classifier):
        monkeypatch.setattr(module, "WEIGHTS", tmp_path / "shipped")
    return colors


@pytest.fixture
def latents():
    """Latents of 50 images and their mirror images, and labels."""
    plain = torch.randn(50, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return torch.stack([plain, plain.flip(-1)]).half(), torch.arange(50) % 10


def plain_training(recipe, latents, out, steps, **options):
    options = {"compiled": False, "dtype": torch.float32, "num_images": steps * recipe.batch_size, **options}
    return train_latent_dit(recipe, *latents, out, **options)


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "loss.jsonl").read_text().splitlines()]


# --- data ------------------------------------------------------------------------------------------------------------


def test_cifar_is_read_as_it_is_stored(cifar):
    images, labels = data.load_split("cifar10", "train")
    assert images.shape == (60, 3, 32, 32) and images.dtype == torch.float32 and labels.tolist() == list(range(10)) * 6
    means = (images.mean(dim=(2, 3)) + 1) * 127.5
    torch.testing.assert_close(means[:10], torch.tensor(cifar).float(), atol=4, rtol=0)


def test_missing_or_truncated_data_is_named(cifar, monkeypatch, tmp_path, capsys):
    path = tmp_path / "cifar10-jpeg-train.parquet"
    path.write_bytes(path.read_bytes()[:500])
    assert main(["train", "cifar10", "--work", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path} can't be read" in line
    monkeypatch.setenv("DQAR_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setattr(data, "CIFAR10_FOLDERS", ())
    with pytest.raises(OSError, match="cifar10-jpeg-test.parquet is in none of .*set DQAR_DATA"):
        data.load_split("cifar10", "test")


# --- autoencoder -----------------------------------------------------------------------------------------------------


def test_normalised_latents_decode_to_the_same_pictures():
    vae, images = build_vae(TINY_VAE).eval(), torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        vae.quant_conv.bias.add_(3)  # a mean to be folded away
        before, posterior = vae.decode(encode(vae, images)).sample, vae.encode(images).latent_dist
        normalise_latents(vae, images)
        latents, after = encode(vae, images), vae.encode(images).latent_dist
        torch.testing.assert_close(vae.decode(latents).sample, before, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    scale = posterior.mean.std(dim=(0, 2, 3))[:, None, None]
    torch.testing.assert_close(after.std, posterior.std / scale)  # its noise is scaled with it
    assert vae.config.scaling_factor == 1  # what DiTPipeline divides latents by


def test_the_autoencoders_training_resumes_as_if_never_interrupted(tmp_path, monkeypatch):
    images = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    straight = train_vae(TINY_VAE, images, tmp_path / "a")

    monkeypatch.setattr("dqar.training.vae.save_checkpoint", killed_at(2))
    with pytest.raises(KeyboardInterrupt):
        train_vae(TINY_VAE, images, tmp_path / "b", checkpoint_seconds=0)
    resumed = train_vae(TINY_VAE, images, tmp_path / "b")
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert (tmp_path / "a/vae-loss.jsonl").read_text() == (tmp_path / "b/vae-loss.jsonl").read_text()


# --- transformer -----------------------------------------------------------------------------------------------------


def random_model(num_layers=3):
    model = StackedDiT(num_layers, 2, 16, in_channels=4, sample_size=16, patch_size=2, num_classes=10)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)  # zeros anywhere would hide what goes where
    return model


def test_the_exported_transformer_is_the_trained_one():
    model, latents = random_model(), torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    timesteps, classes = torch.tensor([0, 1, 5, 400, 900, 999]), torch.tensor([0, 3, 9, 10, 10, 1])
    expected = model(latents, timesteps, classes)
    stock = model.to_stock()
    asked = torch.where(classes == 10, 1000, classes)  # DiTPipeline's null class
    ours = stock(latents, timestep=timesteps, class_labels=asked).sample
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)
    assert expected.std() > 0.1 and (expected[3] - expected[4]).abs().max() > 0.1
    again = StackedDiT(3, 2, 16, in_channels=4, sample_size=16, patch_size=2, num_classes=10, seed=1)
    again.load_stock(stock)
    assert torch.equal(again(latents, timesteps, classes), expected)
    rounded = model(latents, timesteps, classes, torch.bfloat16)
    assert 0 < (rounded - expected).norm() < 0.03 * expected.norm()


def test_routed_tokens_pass_the_middle_blocks_by():
    """Against diffusers' own blocks, which get the kept tokens only."""
    model, generator = random_model(num_layers=8), torch.Generator().manual_seed(1)
    latents, kept = torch.randn(3, 4, 16, 16, generator=generator), torch.rand(3, 64, generator=generator).argsort(1)
    timesteps, classes = torch.tensor([3, 500, 900]), torch.tensor([0, 4, 9])
    stock, rows, whole = model.to_stock(), torch.arange(3)[:, None], []
    plain = stock(latents, timestep=timesteps, class_labels=classes).sample

    def take(_block, args):
        whole.append(args[0].clone())
        return (args[0][rows, kept[:, :20]], *args[1:])

    def put_back(_block, _args, hidden):
        whole[0][rows, kept[:, :20]] = hidden
        return whole[0]

    stock.transformer_blocks[2].register_forward_pre_hook(take)
    stock.transformer_blocks[3].register_forward_hook(put_back)  # the fifth last of eight
    expected = stock(latents, timestep=timesteps, class_labels=classes).sample
    routed = model(latents, timesteps, classes, kept=kept[:, :20])
    torch.testing.assert_close(routed, expected, atol=2e-5, rtol=1e-4)
    assert (expected - plain).norm() > 0.05 * plain.norm()
    torch.testing.assert_close(model(latents, timesteps, classes, kept=kept), plain, atol=2e-5, rtol=1e-4)


def test_routing_ends_at_its_step(latents):
    recipe = dataclasses.replace(TINY, kept_tokens=12, routed_steps=((0, 3),))
    early, late = (draw_batch(recipe, *latents, step).kept for step in (2, 3))
    assert early.shape == (40, 12) and all(len(row.unique()) == 12 for row in early) and len(early.unique()) == 64
    assert torch.equal(late.sort(1).values, torch.arange(64).expand(40, 64))


def test_training_starts_from_the_identity():
    model = TINY.build()
    assert model(torch.randn(2, 4, 16, 16), torch.tensor([3, 4]), torch.tensor([1, 10])).abs().max() == 0
    assert model.modulation_weight.abs().max() == 0 and model.qkv_weight.std() > 0.05


def test_the_shipped_size_stays_below_45_mb():
    model = LatentRecipe().build().to_stock()
    parts = (model, build_vae(VaeRecipe()), CifarClassifier())
    assert 28e6 < 2 * sum(p.numel() for part in parts for p in part.parameters()) < 45e6
    assert len(model.transformer_blocks) == 28 and model.pos_embed.pos_embed.shape == (1, 64, 128)


def test_a_batch_covers_the_schedule_evenly_and_drops_labels_once(latents):
    recipe = dataclasses.replace(TINY, batch_size=500)
    batch = draw_batch(recipe, *latents, step=3)
    assert torch.equal(batch.timesteps.sort().values // 2, torch.arange(500))
    assert not torch.equal(batch.timesteps, batch.timesteps.sort().values)
    assert 0.05 < (batch.classes == 10).float().mean() < 0.15  # the null class
    kept = batch.classes < 10
    plain = latents[0][0].float()
    for latent, label in list(zip(batch.latents[kept], batch.classes[kept], strict=True))[:20]:
        same = [i for i in range(50) if torch.equal(plain[i], latent) or torch.equal(plain[i].flip(-1), latent)]
        assert [i % 10 for i in same] == [label]
    mirrored = sum(any(torch.equal(x, y) for y in plain.flip(-1)) for x in batch.latents[:100])
    assert 30 < mirrored < 70
    again = draw_batch(recipe, *latents, step=3)
    assert torch.equal(again.noise, batch.noise) and not torch.equal(draw_batch(recipe, *latents, 4).noise, batch.noise)


def test_the_learning_rate_lets_a_run_end_anywhere():
    recipe = LatentRecipe(learning_rate=1.0, warmup_steps=100, constant_steps=1000)
    rates = [recipe.rate(step) for step in (0, 49, 99, 500, 999, 3999)]
    assert rates == pytest.approx([0.01, 0.5, 1, 1, 1, 0.5])


def test_training_in_portions_and_by_two_processes_is_training_at_once(latents, tmp_path):
    straight = plain_training(TINY, latents, tmp_path / "a", 5)
    for step in range(1, 4):  # no time: a step, and a checkpoint
        plain_training(TINY, latents, tmp_path / "b", 5, minutes=0)
        assert torch.load(tmp_path / "b/checkpoint.pt", weights_only=True)["step"] == step
    with (tmp_path / "b/loss.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 0.1}\n{"step": 4, "lo')  # what a killed run had written after its checkpoint
    portions = plain_training(TINY, latents, tmp_path / "b", 5, workers=2)
    for one, other in zip(straight.parameters(), portions.parameters(), strict=True):
        assert torch.equal(one, other)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") and len(losses(tmp_path / "a")) == 5


def test_gradients_in_parts_are_those_of_the_batch(latents):
    model = TINY.build()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    gradients = Gradients(TINY, model, *latents, dtype=torch.float32, compiled=False)
    loss = gradients.compute(7)
    whole = latent_dit.batch_loss(model, draw_batch(TINY, *latents, 7), TINY, torch.float32)
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    for parameter, expected in zip(model.parameters(), torch.autograd.grad(whole, model.parameters()), strict=True):
        torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-3)


def test_a_lost_process_is_named(latents):
    gradients = Gradients(TINY, TINY.build(), *latents, dtype=torch.float32, compiled=False, workers=2)
    (process,) = torch.multiprocessing.active_children()
    process.kill()
    process.join()
    with pytest.raises(ChildProcessError, match="a process that computed gradients has ended"):
        gradients.compute(0)


def test_the_loss_falls(latents, tmp_path):
    recipe = dataclasses.replace(TINY, learning_rate=3e-3)
    checks = []
    average = plain_training(recipe, latents, tmp_path, 60, check_steps=25, check=lambda m, n: checks.append(n) or {})
    curve = losses(tmp_path)
    assert len(curve) == 60 and np.mean(curve[-10:]) < 0.5 * np.mean(curve[:3]) and checks == [1000, 2000]
    held_out = latent_dit.held_out_loss(average, recipe, latents[0][0, :32], latents[1][:32])
    assert held_out < 0.7 * np.mean(curve[:3])  # the averaged weights have learned as well


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_kill_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoints.save_checkpoint(path, {"recipe": {"seed": 0}, "step": 1})

    def killed(state, partial):
        partial.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save_checkpoint(path, {"recipe": {"seed": 0}, "step": 2})
    assert checkpoints.load_checkpoint(path, {"seed": 0})["step"] == 1


def test_a_wrong_checkpoint_is_named(latents, tmp_path):
    plain_training(TINY, latents, tmp_path, 1)
    with pytest.raises(ValueError, match=r"made by another recipe \(seed 0 instead of 1\): remove it"):
        plain_training(dataclasses.replace(TINY, seed=1), latents, tmp_path, 1)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="checkpoint.pt can't be read"):
        plain_training(TINY, latents, tmp_path, 1)


def test_from_data_to_card(cifar, tmp_path, capsys, monkeypatch):
    with pytest.raises(OSError, match=r"missing: `dqar train cifar10 --out .*` makes them"):
        load_pipeline(get_profile("cifar10"))
    with pytest.raises(OSError, match=r"missing: `dqar train cifar10-classifier --out .*` makes them"):
        load_classifier("cifar10")
    monkeypatch.setattr(train, "LatentRecipe", lambda **changes: dataclasses.replace(TINY, **changes))
    monkeypatch.setattr(cifar10, "VaeRecipe", lambda: TINY_VAE)
    monkeypatch.setattr(cifar10, "GUIDANCE_SCALES", (2.0,))
    monkeypatch.setattr(cifar10, "CHECK_STEPS", 2)
    monkeypatch.setattr(cifar10, "CHECK_SAMPLES", 160)
    monkeypatch.setattr(torch, "compile", lambda function, **_options: function)
    monkeypatch.setattr(cifar10, "train_latent_dit", lambda *a, **k: train_latent_dit(*a, **k, check_steps=2))
    recipe = dataclasses.replace(train.CLASSIFIER_RECIPES["cifar10"], epochs=20, batch_size=32)
    monkeypatch.setitem(train.CLASSIFIER_RECIPES, "cifar10", recipe)
    monkeypatch.setattr(cifar10, "get_profile", lambda *a, **k: get_profile(*a, **k, num_inference_steps=2))
    work = tmp_path / "work/cifar10"
    command = ["cifar10", "--work", str(tmp_path / "work"), "--heads", "1", "--workers", "1", "--images", "120"]

    assert main(["train", *command, "--export"]) == 2
    assert capsys.readouterr().err == f"dqar train: there is no checkpoint in {work}: `dqar train cifar10` makes one\n"
    assert main(["train", "cifar10-classifier", "--work", str(tmp_path / "work")]) == 0
    accuracy = float(capsys.readouterr().out.split("held-out accuracy")[1].split()[0])
    assert accuracy > 0.9
    reference = load_reference(work / "weights/cifar10-classifier/reference.npz")
    held_out = data.load_split("cifar10", "test")[0] / 2 + 0.5
    _, features = metrics.classify(load_classifier("cifar10", work / "weights"), held_out)
    assert metrics.frechet_distance(features, reference.features) == pytest.approx(0, abs=1e-4)
    assert main(["train", *command, "--minutes", "0"]) == 0 and "40 images; the same command" in capsys.readouterr().out
    monkeypatch.setattr(cifar10, "train_vae", None)  # isn't trained twice
    monkeypatch.setattr(cifar10, "export", lambda *a, export=cifar10.export: export(*a, num_samples=100))
    with monkeypatch.context() as unmeasured:  # once, below, is enough
        unmeasured.setattr(cifar10, "evaluate", lambda *_arguments: {})
        assert main(["train", *command]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"written to {work / 'weights/cifar10'}"
    assert not (tmp_path / "shipped").exists()  # never without --out
    check = json.loads((work / "checks.jsonl").read_text())
    assert check["images"] == 80 and check["FD-cifar10"] > 0 and 0 < check["class_accuracy"] < 1
    assert (work / "samples-00000080.png").stat().st_size > 1000

    assert main(["train", *command, "--export", "--out", str(tmp_path / "shipped")]) == 0
    folder = tmp_path / "shipped/cifar10"
    card, results = (folder / "README.md").read_text(), json.loads((folder / "evaluation.json").read_text())
    assert f"{accuracy:.1%} of the held-out images right" in card and "120 images in steps of 40" in card
    assert max(map(len, card.splitlines())) <= 120 and (folder / "samples.png").stat().st_size > 1000
    assert results["samples"] == 100 and math.isfinite(results["FD-cifar10 to held-out"])
    pipe = load_pipeline(get_profile("cifar10", device="cpu"))
    assert type(pipe).__name__ == "DiTPipeline" and pipe.labels["truck"] == 9 and num_classes(pipe) == 10
    drawn = sample(pipe, get_profile("cifar10", num_inference_steps=2), 0, num_samples=3)
    assert drawn.images.shape == (3, 3, 32, 32) and drawn.labels.tolist() == [0, 1, 2]
    latents, _ = cifar10.prepare_latents(work, pipe.vae)
    assert latents.shape == (2, 60, 4, 16, 16) and latents.float().std().item() == pytest.approx(1, abs=0.02)

    again = tmp_path / "again/cifar10"
    more = [*command[:1], "--work", str(again.parent), *command[3:-1], "400", "--minutes", "0"]
    assert main(["train", *more, "--start", str(tmp_path / "shipped")]) == 0
    assert "stopped at 160 images" in capsys.readouterr().out
    assert [line["step"] for line in map(json.loads, (again / "loss.jsonl").read_text().splitlines())] == [0, 1, 2, 3]
    assert json.loads((again / "checks.jsonl").read_text().splitlines()[0]) == check
    assert main(["train", *more, "--start", str(tmp_path / "nowhere")]) == 0  # its own checkpoint comes first
    (again / "checkpoint.pt").unlink()
    assert main(["train", *more, "--start", str(tmp_path / "nowhere")]) == 2
    assert "nowhere/cifar10 holds no exported model" in capsys.readouterr().err
    monkeypatch.setattr(train, "LatentRecipe", lambda **_changes: dataclasses.replace(TINY, num_layers=1))
    assert main(["train", *more, "--start", str(tmp_path / "shipped")]) == 2
    assert "made by another recipe (num_layers 2 instead of 1" in capsys.readouterr().err

    shard = next((folder / "vae").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(OSError, match=f"the weights in {folder} can't be read"):
        load_pipeline(get_profile("cifar10", device="cpu"))


def test_the_digits_recipe_writes_where_it_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "Recipe", TinyDigits)
    monkeypatch.setattr(train, "get_profile", lambda *a, **k: get_profile(*a, **k, num_inference_steps=2))
    monkeypatch.setattr(train, "evaluate_digits", partial(train.evaluate_digits, num_samples=100))
    shipped = {path: path.stat().st_mtime_ns for path in profiles.WEIGHTS.rglob("*")}
    assert main(["train", "digits", "--steps", "2", "--work", str(tmp_path)]) == 0
    folder = tmp_path / "digits/weights/digits"
    assert capsys.readouterr().out.splitlines()[-1] == f"written to {folder}"
    assert {path: path.stat().st_mtime_ns for path in profiles.WEIGHTS.rglob("*")} == shipped
    card = (folder / "README.md").read_text()
    assert "2 steps of 4 images" in card and "Not memorised" in card and (folder / "samples.png").exists()
    assert json.loads((folder / "training.json").read_text())["images_seen"] == 8
    assert pipelines.load_embedded("digits", folder=folder.parent).labels["nine"] == 9


def test_stacked_muon_moves_each_matrix_as_torch_does():
    torch.manual_seed(0)
    wide, tall = torch.randn(3, 8, 16), torch.randn(2, 24, 8)
    kernel = torch.randn(6, 2, 3, 3)
    stacked = [torch.nn.Parameter(x.clone()) for x in (wide, tall, kernel)]
    singles = [torch.nn.Parameter(x.clone()) for x in (*wide, *tall[0].chunk(3), *tall[1].chunk(3), kernel.flatten(1))]
    groups = [{"params": [stacked[0], stacked[2]]}, {"params": [stacked[1]], "parts": 3}]
    optimizers = [StackedMuon(groups, lr=0.1), torch.optim.Muon(singles, lr=0.1, weight_decay=0.0)]
    for _ in range(3):
        gradients = [torch.randn_like(x) for x in stacked]
        for parameter, gradient in zip(stacked, gradients, strict=True):
            parameter.grad = gradient
        parts = [*gradients[0], *gradients[1][0].chunk(3), *gradients[1][1].chunk(3), gradients[2].flatten(1)]
        for parameter, gradient in zip(singles, parts, strict=True):
            parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = [*stacked[0], *stacked[1][0].chunk(3), *stacked[1][1].chunk(3), stacked[2].flatten(1)]
    for ours, theirs in zip(moved, singles, strict=True):
        assert torch.allclose(ours, theirs, atol=2e-2)  # of about 0.3 in all; both compute in BF16
    assert not torch.allclose(moved[0], wide[0], atol=0.1)
