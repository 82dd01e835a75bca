import pytest
import torch
from helpers import LATENT, NULL, random_transformer

from dqar.models.frozen_dit import FrozenDiT
from dqar.models.pipelines import cached_pipeline
from dqar.models.profiles import get_profile


def results(predict, latents, timestep, classes):
    """The prediction, and its gradients to latents and timestep."""
    latents, timestep = latents.clone().requires_grad_(), timestep.clone().requires_grad_()
    noise = predict(latents, timestep, classes)
    (noise * torch.linspace(-1, 2, noise.numel()).view_as(noise)).sum().backward()
    return noise.detach(), latents.grad, timestep.grad


def assert_same(model, channels, size, classes):
    latents = torch.randn(len(classes), channels, size, size, generator=torch.Generator().manual_seed(0))

    def stock(latents, timestep, classes):
        out = model(latents, timestep=timestep.expand(len(classes)), class_labels=classes).sample
        return out[:, :channels]

    for t in (0.0, 431.25, 999.0):
        pairs = zip(*(results(f, latents, torch.tensor(t), classes) for f in (stock, FrozenDiT(model))), strict=True)
        for theirs, ours in pairs:
            # Both are in float32, whose sums differ in order; on one CPU by 3e-5 of a gradient.
            assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_it_predicts_as_the_embedded_model_does_and_has_its_gradients():
    model = cached_pipeline(get_profile("digits")).transformer
    assert_same(model, 1, 8, torch.tensor([3, 7, 10]))


def test_patches_and_predicted_variances_are_as_in_the_stock_class():
    assert_same(random_transformer(**LATENT, num_embeds_ada_norm=NULL), 4, 8, torch.tensor([3, NULL]))


def test_another_activation_is_refused():
    with pytest.raises(ValueError, match="activation_fn='gelu' is not accepted"):
        FrozenDiT(random_transformer(activation_fn="gelu"))
