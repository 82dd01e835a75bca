import pytest
import torch

from dqar.training.policy import train_policy


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
