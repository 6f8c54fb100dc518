"""Peers that use JAX: Cal-QL's and IQL's authors. JAX itself is imported with the first of them."""

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from authors.importing import import_from
from authors.noise import NoiseQueue
from authors.sides import (
    SHAPE,
    Draws,
    Peer,
    arch,
    check_same_names,
    check_same_shape,
    cql_draws,
    cql_losses,
)
from torch import Tensor


def dense_names(network: str, place: str, layers: int) -> dict[str, str]:
    """Where flax keeps the layers of a network; weights are (in, out) there too."""
    names = {}
    for number in range(layers):
        names[f"{network}.{number}.weight"] = f"{place}/Dense_{number}/kernel"
        names[f"{network}.{number}.bias"] = f"{place}/Dense_{number}/bias"
    return names


class JaxPeer(Peer):
    """A peer whose parameters are in trees, which are replaced, not changed."""

    names: dict[str, dict[str, str]]  # for each tree, our names of weights and where they are

    def __init__(self, folder: Path, args: Any):
        for package in self.needs:  # first: else they would count as modules of the checkout
            importlib.import_module(package)
        self.args = args
        self.jax, self.flax = importlib.import_module("jax"), importlib.import_module("flax")
        self.jax.config.update("jax_enable_x64", True)

    def tree(self, name: str) -> dict:
        raise NotImplementedError

    def set_tree(self, name: str, tree: dict) -> None:
        """Put a tree in place, with an optimizer that has made no step."""
        raise NotImplementedError

    def put(self, weights: dict[str, Tensor]) -> None:
        ours = [name for names in self.names.values() for name in names]
        check_same_names(weights, dict.fromkeys(ours))
        for tree_name, names in self.names.items():
            leaves = self.flax.traverse_util.flatten_dict(self.tree(tree_name), sep="/")
            check_same_names(dict.fromkeys(names.values()), leaves)
            for ours, theirs in names.items():
                check_same_shape(ours, weights[ours].shape, np.shape(leaves[theirs]))
                leaves[theirs] = self.jax.numpy.asarray(weights[ours].numpy())
            self.set_tree(tree_name, self.flax.traverse_util.unflatten_dict(leaves, sep="/"))

    def weights(self) -> dict[str, Tensor]:
        weights = {}
        for tree_name, names in self.names.items():
            leaves = self.flax.traverse_util.flatten_dict(self.tree(tree_name), sep="/")
            for ours, theirs in names.items():
                weights[ours] = torch.from_numpy(np.array(leaves[theirs]))
        return weights

    @contextlib.contextmanager
    def samplers(self, queue: NoiseQueue) -> Iterator[None]:
        """Let JAX's samplers draw from a queue, each time that what was compiled runs."""
        self.queue = queue
        random = self.jax.random
        with (
            mock.patch.object(random, "normal", self.normal),
            mock.patch.object(random, "uniform", self.uniform),
        ):
            yield

    def normal(self, key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        samples, *rest = shape  # of which distrax always asks for one
        return self.draw("normal", tuple(rest)).reshape(samples, *rest)

    def uniform(self, key: Any, shape: tuple[int, ...], minval: float, maxval: float) -> Any:
        return minval + (maxval - minval) * self.draw("uniform", shape)

    def draw(self, kind: str, shape: tuple[int, ...]) -> Any:
        """This call is compiled, into calls of the queue that is there at the time."""
        io_callback = importlib.import_module("jax.experimental").io_callback
        result = self.jax.ShapeDtypeStruct(shape, np.float64)
        return io_callback(lambda: self.queue.draw(kind, shape), result, ordered=True)


# ------------------------------ nakamotoo/Cal-QL
class CalQl(JaxPeer):
    """Cal-QL by its authors."""

    needs = ("jax", "flax", "optax", "distrax", "ml_collections")
    calibrated = True

    def __init__(self, folder: Path, args: Any):
        super().__init__(folder, args)
        names = ("JaxCQL.conservative_sac", "JaxCQL.model", "JaxCQL.jax_utils")
        conservative_sac, model, jax_utils = import_from(folder, *names)
        # It calls jax.numpy.clip with names of arguments that JAX has dropped since.
        numpy = self.jax.numpy
        clip = {"clip": lambda x, a_min, a_max: numpy.clip(x, a_min, a_max)}
        conservative_sac.jnp = SimpleNamespace(**vars(numpy) | clip)
        jax_utils.init_rng(0)
        policy = model.TanhGaussianPolicy(*SHAPE, arch(args.hidden_dim, args.actor_layers))
        critic = model.FullyConnectedQFunction(*SHAPE, arch(args.hidden_dim, args.critic_layers))
        self.learner = conservative_sac.ConservativeSAC(self.config(), policy, critic)
        self.names = self.find_names()
        if not args.cql_lagrange:
            self.unused = ("log_multiplier",)

    def config(self) -> dict[str, Any]:
        args = self.args
        return {
            "discount": args.gamma,
            "target_entropy": -float(SHAPE[1]),
            "policy_lr": args.actor_lr,
            "qf_lr": args.critic_lr,
            "soft_target_update_rate": args.tau,
            "cql_n_actions": args.cql_actions,
            "cql_lagrange": args.cql_lagrange,
            "cql_target_action_gap": args.cql_gap,
            "cql_max_target_backup": args.cql_max_target_backup,
        }

    def find_names(self) -> dict[str, dict[str, str]]:
        policy = dense_names("actor", "params/base_network", self.args.actor_layers + 1)
        policy["actor.log_std_scale"] = "params/log_std_multiplier_module/value"
        policy["actor.log_std_offset"] = "params/log_std_offset_module/value"
        names = {"policy": policy, "log_alpha": {"log_alpha": "params/value"}}
        if self.args.cql_lagrange:
            names["log_alpha_prime"] = {"log_multiplier": "params/value"}
        place, layers = "params/FullyConnectedNetwork_0", self.args.critic_layers + 1
        for j in (1, 2):
            names[f"qf{j}"] = dense_names(f"critics_{j}", place, layers)
            names[f"target qf{j}"] = dense_names(f"target_critics_{j}", place, layers)
        return names

    def draws(self) -> Draws:
        """All of them anew for each loss: it works all losses out to differentiate one."""
        return cql_draws(self.args.cql_max_target_backup) * len(self.learner.model_keys)

    def tree(self, name: str) -> dict:
        if name.startswith("target "):
            return self.learner._target_qf_params[name.removeprefix("target ")]
        return self.learner.train_states[name].params

    def set_tree(self, name: str, tree: dict) -> None:
        if name.startswith("target "):
            self.learner._target_qf_params[name.removeprefix("target ")] = tree
            return
        states = self.learner.train_states
        optimizer_state = states[name].tx.init(tree)
        states[name] = states[name].replace(params=tree, opt_state=optimizer_state)

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        columns = {name: self.jax.numpy.asarray(column.numpy()) for name, column in batch.items()}
        columns["dones"] = columns["terminals"]
        logs = self.learner.train(
            columns,
            use_cql=True,
            cql_min_q_weight=self.args.cql_weight,
            enable_calql=self.calibrated,
        )
        return cql_losses(logs, "cql/", ("cql/qf1_bellman_loss", "cql/qf2_bellman_loss"))


class CqlOfCalQl(CalQl):
    """CQL in the repository of Cal-QL's authors."""

    calibrated = False


# ------------------------------ ikostrikov/implicit_q_learning
def lenient_jit(jit: Callable, function: Callable, static_argnames: tuple[str, ...] = ()):
    """jax.jit as it was in 2022: it passed over names of arguments that are not there."""
    known = inspect.signature(function).parameters
    return jit(function, static_argnames=[name for name in static_argnames if name in known])


class Iql(JaxPeer):
    """IQL by its authors."""

    needs = ("jax", "flax", "optax", "tensorflow_probability.substrates.jax")

    def __init__(self, folder: Path, args: Any):
        super().__init__(folder, args)
        jit = functools.partial(lenient_jit, self.jax.jit)
        with mock.patch.object(self.jax, "jit", jit):
            (module,) = import_from(folder, "learner")
        self.batch = module.Batch
        self.jax.tree_multimap = self.jax.tree_util.tree_map  # as it was called in 2022
        rows = [np.zeros((1, size)) for size in SHAPE]
        with self.flax.config.temp_flip_flag("return_frozendict", True):  # as in 2022
            self.learner = module.Learner(
                *(0, *rows),
                actor_lr=args.actor_lr,
                value_lr=args.critic_lr,
                critic_lr=args.critic_lr,
                hidden_dims=(args.hidden_dim,) * args.actor_layers,
                discount=args.gamma,
                tau=args.tau,
                expectile=args.expectile,
                temperature=args.beta,
                max_steps=args.offline_steps,
                opt_decay_schedule="cosine" if args.actor_lr_schedule == "cosine" else None,
            )
        self.names = self.find_names()

    def find_names(self) -> dict[str, dict[str, str]]:
        hidden = self.args.actor_layers
        actor = dense_names("actor", "MLP_0", hidden) | {"actor.log_std": "log_stds"}
        for kind, leaf in (("weight", "kernel"), ("bias", "bias")):
            actor[f"actor.{hidden}.{kind}"] = f"Dense_0/{leaf}"
        names = {"actor": actor, "value": dense_names("value_network", "MLP_0", hidden + 1)}
        for tree, ours in (("critic", "critics"), ("target_critic", "target_critics")):
            names[tree] = dense_names(f"{ours}_1", "Critic_0/MLP_0", hidden + 1)
            names[tree] |= dense_names(f"{ours}_2", "Critic_1/MLP_0", hidden + 1)
        return names

    def draws(self) -> Draws:
        return []

    @contextlib.contextmanager
    def samplers(self, queue: NoiseQueue) -> Iterator[None]:
        """It samples nothing, so that it may be compiled."""
        yield

    def tree(self, name: str) -> dict:
        return getattr(self.learner, name).params

    def set_tree(self, name: str, tree: dict) -> None:
        model = getattr(self.learner, name)
        optimizer_state = model.tx.init(tree) if model.tx else None
        setattr(self.learner, name, model.replace(params=tree, opt_state=optimizer_state))

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        columns = {name: column.numpy() for name, column in batch.items()}
        columns["masks"] = 1 - columns["terminals"]
        logs = self.learner.update(self.batch(*[columns[name] for name in self.batch._fields]))
        losses = {"losses/td": logs["critic_loss"], "losses/value": logs["value_loss"]}
        losses["losses/actor"] = logs["actor_loss"]
        return {name: float(loss) for name, loss in losses.items()}
