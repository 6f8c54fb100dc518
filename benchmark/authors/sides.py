"""The two sides of a comparison: one of our scripts, and a peer, which is code of others."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from authors.noise import NoiseQueue, torch_samplers
from torch import Tensor, nn

SHAPE = (11, 3)  # dimensions of observations and actions: hopper's
Draws = list[str | tuple[str, ...]]  # names of noise, see NoiseQueue


# ------------------------------ weights
def linear_views(network: str, layers: nn.Module | list[nn.Linear]) -> dict[str, Tensor]:
    """The parameters of a network's nn.Linear, by number: views of weights (in, out), of biases."""
    if isinstance(layers, nn.Module):
        layers = [layer for layer in layers.modules() if isinstance(layer, nn.Linear)]
    views = {}
    for number, layer in enumerate(layers):
        views[f"{network}.{number}.weight"] = layer.weight.detach().mT
        views[f"{network}.{number}.bias"] = layer.bias.detach()
    return views


def twin_views(network: str, layers: list[nn.Module]) -> dict[str, Tensor]:
    """The same for layers of two networks in one, weights (2, in, out) and biases (2, 1, out)."""
    views = {}
    for number, layer in enumerate(layers):
        for twin in (0, 1):
            views[f"{network}_{twin + 1}.{number}.weight"] = layer.weight.detach()[twin]
            views[f"{network}_{twin + 1}.{number}.bias"] = layer.bias.detach()[twin, 0]
    return views


def check_same_names(ours: dict, theirs: dict) -> None:
    """ValueError for a weight that only one side has."""
    only_here, only_there = sorted(ours.keys() - theirs), sorted(theirs.keys() - ours)
    if only_here or only_there:
        raise ValueError(f"only here: {only_here}; only there: {only_there}")


def check_same_shape(name: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> None:
    """ValueError: copying would broadcast."""
    if tuple(ours) != tuple(theirs):
        raise ValueError(f"{name} is {tuple(ours)} here and {tuple(theirs)} there")


# ------------------------------ our side
@torch.no_grad()
def vary(agent: nn.Module) -> None:
    """First weights in which a mistake shows.

    No bias is zero, and targets are not what they follow. Values have mean 0 and deviation 1: else
    one critic would be the lower one in every row, or no advantage large enough to be clipped.
    """
    for parameter in agent.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    observations, actions = torch.randn(1000, SHAPE[0]), 2 * torch.rand(1000, SHAPE[1]) - 1
    for critics in (agent.critics, agent.target_critics):
        last, values = critics.layers[-1], critics(observations, actions)
        last.bias -= values.mean(1)[:, None, None]
        last.weight /= values.std(1)[:, None, None]
        last.bias /= values.std(1)[:, None, None]
    if hasattr(agent, "value_network"):
        agent.value_network[-1].bias -= agent.value_network(observations).mean(0)
    if hasattr(agent.actor, "log_std_logits"):  # AWAC's are so small that no action would be cut
        agent.actor.log_std_logits += 2


class Ours:
    """One of our scripts: an agent, its optimizer, and the update."""

    def __init__(self, script: str, options: dict[str, Any], seed: int):
        self.script = importlib.import_module(script)
        self.args = self.script.Args(**options)
        torch.manual_seed(seed)
        self.agent = self.script.Agent(*SHAPE, self.args)
        vary(self.agent)
        self.optimizer, self.scheduler = self.script.make_optimizer(self.agent, self.args)
        self.updates = 0

    def draws(self) -> Draws:
        """The noise that update asks for, in order."""
        name = self.script.__name__
        if name in ("cql_sera", "calql_sera"):
            draws = ["policy", ("cql policy", "cql next"), "uniform"]
            return draws if self.args.cql_max_target_backup else [*draws, "next"]
        return {"td3bc_sera": ["next"], "iql_sera": []}.get(name, ["next", "policy"])

    def weights(self) -> dict[str, Tensor]:
        """All parameters, as views: each critic by itself, weights as (in, out)."""
        views = {}
        for name, parameter in self.agent.named_parameters():
            if not name.endswith((".weight", ".bias")):  # a log sigma, a temperature
                views[name] = parameter.detach()
        for name, network in self.agent.named_children():
            layers = [each for each in network.modules() if hasattr(each, "weight")]
            views |= linear_views(name, network)
            views |= twin_views(name, [each for each in layers if not isinstance(each, nn.Linear)])
        return views

    def step_kind(self) -> SimpleNamespace:
        """What update reads of a StepKind."""
        policy_due = self.script.policy_is_due(self.updates, self.args)
        return SimpleNamespace(online=False, policy_due=policy_due, log=True)

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """One update and one step of the schedule; what it logs."""
        self.updates += 1
        kind = self.step_kind()
        logs = self.script.update(self.agent, self.optimizer, batch, self.args, kind)
        if self.scheduler:
            self.scheduler.step()
        return {name: float(value) for name, value in logs.items()}


# ------------------------------ their side
class Peer:
    """Networks, optimizers and update of others, set up as the arguments of our script say."""

    needs: tuple[str, ...] = ()  # packages
    unused: tuple[str, ...] = ()  # our parameters that have no part in what is compared
    samplers: Callable[[NoiseQueue], contextlib.AbstractContextManager]

    def __init__(self, folder: Path, args: Any):
        raise NotImplementedError

    def draws(self) -> Draws:
        """The noise that update asks for, in order."""
        raise NotImplementedError

    def ours_as_theirs(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our weights, cut into the pieces that the peer has."""
        return {name: value for name, value in weights.items() if name not in self.unused}

    def put(self, weights: dict[str, Tensor]) -> None:
        """Make all parameters these."""
        raise NotImplementedError

    def weights(self) -> dict[str, Tensor]:
        """All parameters, by the names and in the shapes of ours_as_theirs."""
        raise NotImplementedError

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """One update; those of its losses that ours logs too, by our names."""
        raise NotImplementedError


class TorchPeer(Peer):
    """A peer whose parameters can be had as views in the shapes of ours."""

    def views(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def put(self, weights: dict[str, Tensor]) -> None:
        views = self.views()
        check_same_names(weights, views)
        for name, view in views.items():
            check_same_shape(name, weights[name].shape, view.shape)
            view.copy_(weights[name])

    def weights(self) -> dict[str, Tensor]:
        return self.views()

    @staticmethod
    @contextlib.contextmanager
    def samplers(queue: NoiseQueue) -> Iterator[None]:
        """Also without casts to float32, with which some peers round what is float64 here."""
        double = mock.patch.object(torch.Tensor, "float", torch.Tensor.double)
        with double, torch_samplers(queue):
            yield


def cql_draws(max_target_backup: bool) -> Draws:
    """What CORL and the authors of CQL and Cal-QL ask for.

    They draw anew the actions of which the best is backed up. Ours are those of the conservative
    term, so that theirs get the same noise twice.
    """
    target = "cql next" if max_target_backup else "next"
    return ["policy", target, "uniform", "cql policy", "cql next"]


def cql_losses(logs: dict[str, Any], prefix: str, td: tuple[str, str]) -> dict[str, float]:
    """Losses as CORL and the authors of CQL and Cal-QL log them, by our names."""
    gaps = [float(logs[f"{prefix}cql_qf{j}_diff"]) for j in (1, 2)]
    return {
        "losses/td": float(logs[td[0]]) + float(logs[td[1]]),
        "losses/conservative": sum(gaps) / 2,
        "losses/actor": float(logs["policy_loss"]),
    }


def arch(width: int, layers: int) -> str:
    """Hidden layers as the authors of CQL and Cal-QL write them: 256-256."""
    return "-".join([str(width)] * layers)
