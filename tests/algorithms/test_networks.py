"""The networks that all scripts are built from, against plain PyTorch modules."""

import math

import pytest
import torch
from recompute import linear_layers
from torch import nn

import calql_sera


def plain_network(critics, j):
    """Critic j as nn.Linear layers of the same weights."""
    layers = []
    for layer in linear_layers(critics):
        linear = nn.Linear(*layer.weight.shape[1:])
        linear.weight.data = layer.weight.data[j].T.clone()
        linear.bias.data = layer.bias.data[j, 0].clone()
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("shape", [(5,), (5, 7)])
def test_twin_critics_are_two_plain_networks(layers, shape):
    """Both critics, in one batched product, are what nn.Linear makes of the same weights."""
    torch.manual_seed(1)
    critics = calql_sera.TwinCritics(4, 2, 8, layers)
    assert len(linear_layers(critics)) == layers + 1
    plain = [plain_network(critics, j) for j in (0, 1)]
    observations = torch.randn(*shape, 4)
    actions = torch.randn(*shape, 2)
    inputs = torch.cat([observations, actions], dim=-1)
    expected = torch.stack([network(inputs).squeeze(-1) for network in plain])
    values = critics(observations, actions)
    assert values.shape == expected.shape == (2, *shape)
    torch.testing.assert_close(values, expected)

    values.square().sum().backward()
    expected.square().sum().backward()
    for number, layer in enumerate(linear_layers(critics)):
        for j in (0, 1):
            linear = plain[j][2 * number]
            torch.testing.assert_close(layer.weight.grad[j], linear.weight.grad.T)
            torch.testing.assert_close(layer.bias.grad[j, 0], linear.bias.grad)


def test_twin_critics_start_alike_but_not_equal():
    """Equal shapes by construction, the initial range of nn.Linear, and no number in common."""
    torch.manual_seed(2)
    critics = calql_sera.TwinCritics(11, 3, 256, 2)
    for layer in linear_layers(critics):
        weight, bias = layer.weight, layer.bias
        assert weight.shape[0] == bias.shape[0] == 2
        bound = weight.shape[1] ** -0.5
        assert not torch.isin(weight[0], weight[1]).all()
        assert not torch.equal(bias[0], bias[1])
        assert weight.abs().max() <= bound
        assert bias.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_mlp(layers):
    """That many hidden layers of that width, each with a ReLU, and a last layer without one."""
    torch.manual_seed(3)
    network = calql_sera.mlp(4, 8, layers, 2)
    x = torch.randn(5, 6, 4)
    *hidden, last = [module for module in network if isinstance(module, nn.Linear)]
    expected = x
    for linear in hidden:
        assert linear.out_features == 8
        expected = (expected @ linear.weight.T + linear.bias).clamp(min=0)
    expected = expected @ last.weight.T + last.bias
    assert len(hidden) == layers
    assert expected.shape == (5, 6, 2)
    assert expected.min() < 0
    torch.testing.assert_close(network(x), expected)


def test_move_targets():
    """target := target + tau (source - target), parameter by parameter; the source stays."""
    torch.manual_seed(4)
    target = calql_sera.mlp(4, 8, 2, 2)
    source = calql_sera.mlp(4, 8, 2, 2)
    old_target = [parameter.clone() for parameter in target.parameters()]
    old_source = [parameter.clone() for parameter in source.parameters()]
    calql_sera.move_targets(target, source, 0.25)
    for parameter, old, other in zip(target.parameters(), old_target, old_source, strict=True):
        torch.testing.assert_close(parameter, 0.75 * old + 0.25 * other)
        assert parameter.grad is None
        assert parameter.requires_grad
    for parameter, old in zip(source.parameters(), old_source, strict=True):
        assert torch.equal(parameter, old)
