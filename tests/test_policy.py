import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dqar.policy import ReusePolicy, policy_features, train_policy


def test_the_policy_has_slide_7s_size_and_survives_its_file(tmp_path):
    policy = ReusePolicy()
    sizes = {name: p.numel() for name, p in policy.named_parameters()}
    assert sum(n for name, n in sizes.items() if "weight" in name) == 4480
    assert sum(sizes.values()) == 4609
    policy.mean.fill_(0.3)
    policy.save(tmp_path / "policy.safetensors", {"data": "test"})
    features = torch.randn(7, 5)
    assert torch.equal(ReusePolicy.load(tmp_path / "policy.safetensors")(features), policy(features))
    assert ((policy(features) > 0) & (policy(features) < 1)).all()


def test_a_truncated_policy_file_is_named(tmp_path):
    path = tmp_path / "policy.safetensors"
    ReusePolicy().save(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"policy\.safetensors is not a readable policy file"):
        ReusePolicy.load(path)


def test_the_network_is_slide_7s_formula():
    policy = ReusePolicy()
    torch.nn.init.normal_(policy.layers[0].bias)
    policy.mean.copy_(torch.arange(5.0))
    policy.std.copy_(torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0]))
    features = torch.randn(7, 5)
    weights = {name: p.detach().double().numpy() for name, p in policy.state_dict().items()}
    x = (features.double().numpy() - weights["mean"]) / weights["std"]
    x = np.tanh(x @ weights["layers.0.weight"].T + weights["layers.0.bias"])
    x = np.tanh(x @ weights["layers.2.weight"].T + weights["layers.2.bias"])
    x = 1 / (1 + np.exp(-(x @ weights["layers.4.weight"].T + weights["layers.4.bias"])))
    np.testing.assert_allclose(policy(features).detach().numpy(), x[:, 0], atol=1e-6)


@pytest.mark.parametrize("prompt_length, last", [(0, 0.0), (64, 0.5), (128, 1.0), (500, 1.0)])
def test_features_are_slide_7s(prompt_length, last):
    features = policy_features(1.5, math.e, math.e**2, 7, 15, prompt_length)
    assert features == pytest.approx([1.5, 1.0, 2.0, 0.5, last], abs=1e-6)


def test_features_stay_finite_at_the_ends():
    assert policy_features(0.0, 0.0, 0.0, 0, 1, 0)[:3] == pytest.approx([0.0, math.log(1e-8), math.log(1e-8)])


def test_a_policy_for_other_features_is_refused(tmp_path):
    path = tmp_path / "policy.safetensors"
    save_file({"layers.0.bias": torch.zeros(64)}, path, {"features": "entropy,colour"})
    with pytest.raises(ValueError, match="made for features entropy,colour"):
        ReusePolicy.load(path)


def test_early_stopping_keeps_the_best_network():
    generator = torch.Generator().manual_seed(0)
    x, held_out = (torch.randn(40, 5, generator=generator) for _ in range(2))
    y, other = (torch.randint(0, 2, (40,), generator=generator).float() for _ in range(2))  # nothing to learn
    policy, history = train_policy(x, y, held_out, other, l2=0.0, patience=10)
    losses = [row["held_out"] for row in history]
    with torch.no_grad():
        kept = torch.nn.functional.binary_cross_entropy(policy(held_out), other).item()
    assert kept == pytest.approx(min(losses)) and len(losses) < 300 and losses[-1] > min(losses)
    with_l2 = train_policy(x, y, held_out, other, l2=1e-1, patience=None, max_epochs=50)[0]
    without = train_policy(x, y, held_out, other, l2=0.0, patience=None, max_epochs=50)[0]
    assert with_l2.layers[0].weight.norm() < 0.7 * without.layers[0].weight.norm()


def test_training_names_wrong_input():
    x, y = torch.randn(4, 5), torch.ones(4)
    with pytest.raises(ValueError, match="all of one kind"):
        train_policy(x, y, x, y)
    with pytest.raises(ValueError, match="omit='colour'"):
        train_policy(x, y, x, y, omit="colour")
