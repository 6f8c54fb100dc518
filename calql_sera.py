"""Cal-QL with SERA: calibrated conservative Q-learning on a dataset, then online with a bonus.

    python calql_sera.py --env hopper-medium-v2
    uv run calql_sera.py --env hopper-medium-v2      # installs what it needs by itself

Cal-QL: Nakamoto et al. 2023, arXiv 2303.05479, on top of CQL: Kumar et al. 2020, arXiv 2006.04779.
SERA: Sample Efficient Reward Augmentation, arXiv 2310.19805, later renamed QCSE.

j = 1, 2 numbers the critics Q_j and their targets Q'_j, pi is the policy, |A| = dim(a), and
m = 1 - terminal: timeouts bootstrap, terminals do not.

(1) target        y = r + gamma m min_j Q'_j(s', a'),  a' ~ pi(s')
                  (--cql-max-target-backup: the best of 10 a')
(2) conservatism  C_j = mean[ logsumexp_a( Q_j(s, a) - log mu(a) ) - Q_j(s, a_data) ]
                  over 10 uniform a, 10 from pi(s), 10 from pi(s') taken at s; mu: their density
(3) calibration   inside C_j, for policy actions:  Q_j(s, a) := max( Q_j(s, a), return-to-go )
(4) critics       L_Q = sum_j [ mean (Q_j(s, a) - y)^2 + w C_j ]
    Lagrange      w' w (C_j - g) in place of w C_j,  L_w' = -1/2 sum_j w' w (C_j - g)
(5) policy        L_pi = mean( alpha log pi(a|s) - min_j Q_j(s, a) ),  a ~ pi(s)
(6) temperature   L_alpha = -mean( log alpha (log pi(a|s) - |A|) )

SERA, online only, puts r + lambda tanh(H) in place of r in (1), never in stored rewards, returns or
scores. Here i and j are rows of the batch, psi is the digamma function, |s_i - s_j| is Euclidean, d
counts the dimensions of s that vary, and q_i = min(Q_1, Q_2)(s_i, a_i) by the critics as they were
before the online phase (--sera-critic), or, with --sera-bonus v, the same at the policy's mean
action:

(S1) rho_i = k-th smallest over j != i of max( |s_i - s_j|, |q_i - q_j| )
(S2) n_i   = #{ j != i : |q_i - q_j| < rho_i }
(S3) H_i   = psi(n_i + 1) / d + log(2 rho_i)
"""

# ------------------------------ requirements (shared)
# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "filelock==4.3.1", "gymnasium[mujoco]==1.4.0", "h5py==3.16.0", "mujoco==3.17.0",
#   "numpy==2.4.6", "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# ///

# ------------------------------ imports (shared)
import collections
import contextlib
import copy
import csv
import ctypes
import difflib
import errno
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import platform
import re
import secrets
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

# Before torch is imported. Threads that wait should sleep: else busy neighbours on the cores make
# two threads many times slower. And oneDNN should not round float32 products to bfloat16.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")

import filelock
import gymnasium
import h5py
import mujoco
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# ------------------------------ arguments
@dataclass
class Args:
    """Cal-QL with SERA: train on a D4RL dataset, then go on online.

    Defaults depend on --env: --env ID --help shows those of ID.
    """

    # ------------------------------ experiment arguments (shared)
    env: str = "hopper-medium-v2"  # D4RL dataset, or any environment that Gymnasium knows
    dataset_path: str | None = None  # HDF5 file in D4RL's format, in place of the dataset's own
    clip_actions: bool = False  # take a dataset with actions beyond [-1, 1], and clip them
    physics: Literal["d4rl", "gymnasium"] = "d4rl"  # Gym-MuJoCo only: as in D4RL, or -v4 as shipped
    seed: int = 1  # seed of networks, batches and environment
    device: Literal["auto", "cpu", "cuda"] = "auto"  # CUDA_VISIBLE_DEVICES=1 is the second GPU
    threads: int | None = None  # of the CPU; by default one or a few, whichever is faster at start
    cudagraphs: bool = True  # on a GPU record each kind of training step once, and replay it
    compile: Literal["auto", "yes", "no"] = "auto"  # torch.compile the update; auto: on a GPU only
    run_dir: str | None = None  # output folder; by default runs/<env>__<script>__<seed>__<time>
    resume: bool = False  # go on from the checkpoint in --run-dir; start if there is none yet
    track: bool = False  # send all that TensorBoard gets to Weights & Biases too
    wandb_project: str = "sera"  # project of --track
    wandb_entity: str | None = None  # user or team of --track; by default yours
    capture_video: bool = False  # film the first episode of every evaluation, into <run_dir>/videos

    # ------------------------------ training arguments (shared)
    offline_steps: int = 250_000  # updates on the dataset before the first online step
    online_steps: int = 250_000  # environment steps
    updates_per_step: int = 1  # updates for each environment step
    learning_starts: int = 5_000  # random first steps, if --offline-steps and --mixing-ratio are 0
    eval_every: int = 5_000  # steps between evaluations; also where a phase ends, or online begins
    eval_episodes: int = 10  # episodes of an evaluation
    log_every: int = 500  # steps between the losses that TensorBoard gets
    checkpoint_every: int = 25_000  # steps between checkpoints; online, when an episode then ends
    batch_size: int = 256  # transitions of a batch
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # Polyak rate of the target networks
    mixing_ratio: float = 0.5  # dataset's share of a mix; 0 with --offline-steps 0: no dataset
    normalize_observations: bool = True  # to mean 0, standard deviation 1 over the dataset
    normalize_rewards: bool = False  # times 1000 / (best - worst return of the dataset)
    reward_scale: float = 1.0  # then rewards are multiplied by this
    reward_bias: float = 0.0  # and this is added; scores and episode returns keep the raw rewards

    # ------------------------------ SERA arguments (shared)
    sera_coef: float = 1.0  # lambda, the weight of the bonus; 0 is exactly the plain algorithm
    sera_k: int = 10  # which nearest neighbour sets the radius
    sera_pool: int = 0  # transitions drawn for each batch as its neighbours; 0: the batch itself
    sera_bonus: Literal["q", "v", "state", "constant"] = "q"  # SERA's Q, a V(s), no value, lambda
    sera_critic: Literal["offline", "current", "random"] = "offline"  # frozen, learning, untrained
    sera_scale: Literal["none", "dim"] = "none"  # as printed, or states / dim and standardised q

    # ------------------------------ Cal-QL arguments
    online_sampling: Literal["append", "mix"] = "mix"  # all alike, or shares of --mixing-ratio
    actor_lr: float = 1e-4  # learning rate of policy and temperature
    critic_lr: float = 3e-4  # learning rate of critics and Lagrange multiplier
    hidden_dim: int = 256  # width of the hidden layers
    actor_layers: int = 2  # hidden layers of the policy
    critic_layers: int = 2  # hidden layers of a critic
    cql_weight: float = 5.0  # w, weight of the conservative term
    cql_actions: int = 10  # actions from each of the three sources in the conservative term
    cql_lagrange: bool = False  # tune w' so that the conservative term comes to --cql-gap
    cql_gap: float = 0.8  # g, with --cql-lagrange
    cql_max_target_backup: bool = False  # back up the best of --cql-actions next actions


# What differs from the defaults, by the start of --env; longer starts win. The defaults are WSRL's
# for Gym-MuJoCo (arXiv 2412.07762), the only ones published, without its max target backup.
# AntMaze: the authors'. Adroit: the authors' for its binary tasks, without the max target backup
# that they have on, and with states normalised; nothing that learns is published for the dense
# ones (CORL's fine-tuning runs fail), so they get the same w and networks. sera_k: the SERA
# paper's best on walker2d and antmaze-large-diverse.
ADROIT = {
    "offline_steps": 1_000_000,
    "eval_every": 25_000,
    "hidden_dim": 512,
    "critic_layers": 3,
    "cql_weight": 1.0,
}
BINARY = {"offline_steps": 20_000, "eval_every": 2_000, "reward_scale": 10.0, "reward_bias": 5.0}
PRESETS = {
    "hopper-medium-mini": {"offline_steps": 3_000, "online_steps": 1_500, "eval_every": 500},
    "pendulum-mini": {
        "offline_steps": 4_000,
        "online_steps": 5_000,
        "eval_every": 500,
        "actor_lr": 3e-4,
        "critic_lr": 1e-3,
        "hidden_dim": 64,
        "cql_weight": 1.0,
        "cql_actions": 4,
    },
    "walker2d-": {"sera_k": 20},
    "antmaze-": {
        "offline_steps": 1_000_000,
        "eval_every": 25_000,
        "eval_episodes": 100,
        "normalize_observations": False,
        "reward_scale": 10.0,
        "reward_bias": -5.0,
        "sera_k": 25,
        "critic_layers": 4,
        "cql_lagrange": True,
        "cql_max_target_backup": True,
    },
    "pen-": ADROIT,
    "door-": ADROIT,
    "hammer-": ADROIT,
    "relocate-": ADROIT,
    "pen-binary": BINARY,
    "door-binary": BINARY,
    "relocate-binary": BINARY,
}


# ------------------------------ networks: building blocks (shared)
class EnsembleLinear(nn.Module):
    """nn.Linear for several networks at once: (ensemble, B, in) -> (ensemble, B, out)."""

    def __init__(self, ensemble: int, in_features: int, out_features: int):
        super().__init__()
        bound = 1 / math.sqrt(in_features)  # as nn.Linear
        weight = torch.empty(ensemble, in_features, out_features).uniform_(-bound, bound)
        bias = torch.empty(ensemble, 1, out_features).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.shape[-1] == 1:  # libraries are slow at products of one column
            return (x * self.weight.mT).sum(-1, keepdim=True) + self.bias
        return torch.baddbmm(self.bias, x, self.weight)


def mlp(input_dim: int, hidden_dim: int, layers: int, output_dim: int, linear=nn.Linear):
    """A plain network with that many hidden layers: (..., input_dim) -> (..., output_dim)."""
    modules = []
    for _ in range(layers):
        modules += [linear(input_dim, hidden_dim), nn.ReLU(inplace=True)]
        input_dim = hidden_dim
    return nn.Sequential(*modules, linear(input_dim, output_dim))


class TwinCritics(nn.Module):
    """Q_1 and Q_2 in one call: observations (..., d), actions (..., a) -> (2, ...)."""

    def __init__(self, observation_dim: int, action_dim: int, hidden_dim: int, layers: int):
        super().__init__()
        linear = functools.partial(EnsembleLinear, 2)
        self.layers = mlp(observation_dim + action_dim, hidden_dim, layers, 1, linear)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        inputs = torch.cat([observations, actions], dim=-1)
        rows = inputs.reshape(1, -1, inputs.shape[-1]).expand(2, -1, -1)
        return self.layers(rows).reshape(2, *inputs.shape[:-1])


@torch.no_grad()
def move_targets(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Polyak averaging, in one call: target := target + tau (source - target)."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


# ------------------------------ agent
class Actor(nn.Module):
    """Gaussian before the tanh: observations (..., d) -> mean (..., a), log_std (..., a)."""

    def __init__(self, observation_dim: int, action_dim: int, hidden_dim: int, layers: int):
        super().__init__()
        self.layers = mlp(observation_dim, hidden_dim, layers, 2 * action_dim)
        self.log_std_scale = nn.Parameter(torch.tensor(1.0))  # trained, as in JaxCQL
        self.log_std_offset = nn.Parameter(torch.tensor(-1.0))

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.layers(observations).chunk(2, dim=-1)
        log_std = self.log_std_scale * log_std + self.log_std_offset
        return mean, log_std.clamp(-20, 2)


def sample_tanh_gaussian(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Actions tanh(u), u = mean + std noise (..., a), and their exact log-density (...)."""
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    actions = torch.tanh(u)
    # log(1 - tanh(u)^2), exact for all u; the usual log(1 - a^2 + 1e-6) fails beyond |u| = 7
    log_slope = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
    return actions, (log_normal - log_slope).sum(-1)


class Agent(nn.Module):
    """All that is trained, and the target networks; its state_dict is what a checkpoint holds."""

    def __init__(self, observation_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.actor = Actor(observation_dim, action_dim, args.hidden_dim, args.actor_layers)
        self.critics = TwinCritics(observation_dim, action_dim, args.hidden_dim, args.critic_layers)
        # Small last layers keep the first values and actions near 0: a variance of 1e-2 / width.
        bound = math.sqrt(3 * 1e-2 / args.hidden_dim)
        for last in (self.actor.layers[-1], self.critics.layers[-1]):
            nn.init.uniform_(last.weight, -bound, bound)
            nn.init.zeros_(last.bias)
        self.target_critics = copy.deepcopy(self.critics)
        self.log_alpha = nn.Parameter(torch.tensor(0.0))
        self.log_multiplier = nn.Parameter(torch.tensor(1.0))  # log w', with --cql-lagrange

    def act(self, observations: Tensor, deterministic: bool) -> Tensor:
        """Actions (B, a) for normalised observations (B, d): the squashed mean, or a sample."""
        mean, log_std = self.actor(observations)
        if deterministic:
            return torch.tanh(mean)
        return torch.tanh(mean + log_std.exp() * torch.randn_like(mean))

    def value(self, observations: Tensor) -> Tensor:
        """V(s) for --sera-bonus v: min_j Q_j at the policy's mean action, (B, d) -> (B,)."""
        return self.critics(observations, self.act(observations, deterministic=True)).amin(0)


def make_optimizer(agent: Agent, args: Args) -> tuple[Optimizer, LRScheduler | None]:
    """Adam for all that is trained, and the schedule of its rates: none here."""
    groups = [
        {"params": [*agent.actor.parameters(), agent.log_alpha], "lr": args.actor_lr},
        {"params": [*agent.critics.parameters(), agent.log_multiplier], "lr": args.critic_lr},
    ]
    return torch.optim.Adam(groups, fused=True), None


# ------------------------------ SERA bonus (shared)
def pairwise_distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances between rows, (n, d), (m, d) -> (n, m), without products of matrices.

    Their shortcut |x|^2 - 2 x y + |y|^2 loses 10 to 30 % on close neighbours. On a GPU cdist's
    exact form is slow, and torch.compile fuses the difference into what follows.
    """
    if x.is_cuda:
        return (x[:, None] - y).square().sum(-1).sqrt()
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


@torch.compiler.disable  # a compiled digamma has been wrong (PyTorch issues 143648 and 152205)
@functools.cache
def psi_table(size: int, dimension: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """psi(n + 1) / dimension of eq. (S3) for n = 0 ... size - 1, rounded once."""
    n = torch.arange(size, dtype=torch.float64, device=device)
    return (torch.digamma(n + 1) / dimension).to(dtype)


def q_conditioned_entropy(
    observations: Tensor,
    q_values: Tensor,
    k: int,
    pool: tuple[Tensor, Tensor] | None = None,
    block: int = 2**24,
) -> tuple[Tensor, Tensor, Tensor]:
    """H_i, rho_i and n_i of eqs. (S1) to (S3), without scaling or tanh: (B, d), (B,) -> 3 x (B,).

    Up to a constant, d mean(H_i) - psi(k) is the KSG estimate (Kraskov et al. 2004) of the entropy
    of states given their value, in nats. pool: observations (N, d) and q_values (N,) among which
    neighbours are sought; by default they are the other rows of the batch. In a pool all rows
    count, a copy of the row itself too. block: about so many numbers are held at a time. ValueError
    unless 1 <= k < B, or k <= N with a pool.
    """
    batch_size, dimension = observations.shape
    pool_observations, pool_q_values = pool or (observations, q_values)
    pool_size = len(pool_q_values)
    largest_k = pool_size if pool else batch_size - 1
    if not 1 <= k <= largest_k:
        raise ValueError(f"k is {k}, but {pool_size} rows allow 1 to {largest_k}")

    radii, counts = [], []
    numbers_per_row = pool_size * (dimension if observations.is_cuda else 1)
    rows_at_a_time = max(1, block // numbers_per_row)
    for first in range(0, batch_size, rows_at_a_time):
        rows = slice(first, first + rows_at_a_time)
        distances = pairwise_distances(observations[rows], pool_observations)
        q_distances = (q_values[rows, None] - pool_q_values).abs()
        if not pool:
            q_distances.diagonal(first).fill_(torch.inf)  # no row is its own neighbour
        joint = torch.maximum(distances, q_distances)
        radius = joint.topk(k, largest=False, sorted=False).values.amax(1)
        radius = radius.clamp_min(1e-6)  # of equal rows: log stays finite
        # Strictly less, as in KSG: the q distance that sets a radius is the very same float.
        counts.append((q_distances < radius[:, None]).sum(1))
        radii.append(radius)
    radii, counts = torch.cat(radii), torch.cat(counts)

    psi = psi_table(pool_size + 1, dimension, radii.dtype, radii.device)
    return psi[counts] + torch.log(2 * radii), radii, counts


@torch.no_grad()
def conditioning_value(agent: nn.Module, batch: dict[str, Tensor], args: Args) -> Tensor:
    """q_i of eqs. (S1) and (S2), (B,): what states are conditioned on, by --sera-bonus."""
    if args.sera_bonus == "q":
        return agent.critics(batch["observations"], batch["actions"]).amin(0)
    if args.sera_bonus == "v":
        return agent.value(batch["observations"])
    return torch.zeros_like(batch["rewards"])  # all alike: the entropy of states alone


def conditioned_states(
    agent: nn.Module, batch: dict[str, Tensor], args: Args, varying_dims: Tensor
) -> tuple[Tensor, Tensor]:
    """States (B, d) and their q (B,): as stored beside them under frozen critics, else asked now.

    Without the dimensions that cannot vary, such as 84 of ant's 111: they are no part of d.
    """
    observations = batch["observations"]
    if "bonus_q" in batch:
        q_values = batch["bonus_q"]
    else:
        q_values = conditioning_value(agent, batch, args)
    if len(varying_dims) < observations.shape[1]:
        observations = observations[:, varying_dims]
    return observations, q_values


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of values (B,) where weights (B,) of 0 and 1 are 1; 0 where none is."""
    return (values * weights).sum() / weights.sum().clamp_min(1)


@torch.no_grad()
def intrinsic_reward(
    agent: nn.Module,
    batch: dict[str, Tensor],
    varying_dims: Tensor,
    args: Args,
    log: bool,
    pool: dict[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """lambda tanh(H) for every row (B,), and, if log, numbers to watch.

    agent is the one whose critics give q, unless that is stored with the transitions (bonus_q).
    varying_dims are the state dimensions whose bounds differ. pool: a batch for the neighbours.
    """
    if args.sera_bonus == "constant":
        return torch.full_like(batch["rewards"], args.sera_coef), {}
    observations, q_values = conditioned_states(agent, batch, args, varying_dims)
    pool_states = conditioned_states(agent, pool, args, varying_dims) if pool else None
    if args.sera_scale == "dim":  # as VCSE's SAC does
        mean = q_values.mean()
        std = torch.sqrt(q_values.var(correction=0) + 1e-5)
        observations = observations / len(varying_dims)
        q_values = (q_values - mean) / std
        if pool_states:
            pool_observations, pool_q_values = pool_states
            pool_q_values = (pool_q_values - mean) / std
            pool_states = (pool_observations / len(varying_dims), pool_q_values)

    entropy, radii, counts = q_conditioned_entropy(observations, q_values, args.sera_k, pool_states)
    bonus = torch.tanh(entropy)
    if not log:
        return args.sera_coef * bonus, {}
    online = batch["online"]
    return args.sera_coef * bonus, {
        "sera/entropy": entropy.mean(),  # before tanh, which would hide an infinite q
        "sera/bonus_mean": bonus.mean(),
        "sera/bonus_sd": bonus.std(),
        "sera/bonus_data": weighted_mean(bonus, 1 - online),
        "sera/bonus_online": weighted_mean(bonus, online),
        "sera/above_0.95": (bonus > 0.95).float().mean(),
        "sera/neighbours": counts.float().mean(),
        "sera/floored": (radii <= 1e-6).float().mean(),
    }


# ------------------------------ losses and update
WAIT_FOR_EPISODE_END = True  # an online transition has a return-to-go once its episode has ended


def mc_returns(
    rewards: np.ndarray, episode_ends: np.ndarray, gamma: float, failure_reward: float | None = None
) -> np.ndarray:
    """The discounted return-to-go of eq. (3), (N,) -> (N,) float32.

    Nothing follows the end of a trajectory, terminal or timeout. One whose rewards are all
    failure_reward, if that is given, counts as endless, as the authors have it.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    returns = np.zeros(len(rewards))
    following = 0.0
    for row in reversed(range(len(rewards))):
        if episode_ends[row]:
            following = 0.0
        following = rewards[row] + gamma * following
        returns[row] = following
    if failure_reward is not None and gamma < 1:
        first_rows_after_an_end = np.flatnonzero(episode_ends) + 1
        for episode in np.split(np.arange(len(rewards)), first_rows_after_an_end):
            if np.all(rewards[episode] == failure_reward):
                returns[episode] = failure_reward / (1 - gamma)
    return returns.astype(np.float32)


def added_columns(
    transitions: dict[str, np.ndarray], args: Args, reward_scale: float
) -> dict[str, np.ndarray]:
    """What the buffer stores beside whole trajectories, whose rewards are scaled already."""
    failure_reward = None
    if args.env.startswith("antmaze-"):  # a step that does not arrive has reward 0
        failure_reward = args.reward_bias
    if args.env in ("pen-binary-v0", "door-binary-v0", "relocate-binary-v0"):  # -1 there
        failure_reward = -reward_scale + args.reward_bias
    rewards, episode_ends = transitions["rewards"], transitions["episode_ends"]
    return {"mc_returns": mc_returns(rewards, episode_ends, args.gamma, failure_reward)}


def sample_cql_actions(
    policy: tuple[Tensor, Tensor], next_policy: tuple[Tensor, Tensor], n: int
) -> tuple[Tensor, Tensor]:
    """The actions of eq. (2), n uniform, n of pi(s), n of pi(s'), (B, 3n, a), and log mu (B, 3n).

    policy and next_policy: mean and log_std (B, a) at s and at s'.
    """
    mean, log_std = policy
    mean = mean[:, None]  # (B, 1, a): one more axis, for the n actions of a state
    log_std = log_std[:, None]
    next_mean, next_log_std = next_policy
    next_mean = next_mean[:, None]
    next_log_std = next_log_std[:, None]
    batch_size, _, action_dim = mean.shape
    noise = torch.randn(2, batch_size, n, action_dim, device=mean.device)
    uniform_actions = torch.rand_like(noise[0]) * 2 - 1
    policy_actions, policy_log_prob = sample_tanh_gaussian(mean, log_std, noise[0])
    next_actions, next_log_prob = sample_tanh_gaussian(next_mean, next_log_std, noise[1])
    uniform_log_prob = torch.full_like(policy_log_prob, -action_dim * math.log(2))
    actions = torch.cat([uniform_actions, policy_actions, next_actions], dim=1)
    log_densities = torch.cat([uniform_log_prob, policy_log_prob, next_log_prob], dim=1)
    return actions, log_densities


def conservative_term(
    q_data: Tensor, q_sampled: Tensor, log_densities: Tensor, returns: Tensor
) -> Tensor:
    """C_j of eqs. (2) and (3), (2,).

    q_data (2, B); q_sampled (2, B, 3n) and log_densities (B, 3n) in the order of
    sample_cql_actions; returns: the return-to-go of each row, (B,).
    """
    n = log_densities.shape[1] // 3
    q_uniform, q_policy = q_sampled.split([n, 2 * n], dim=-1)
    calibrated = torch.maximum(q_policy, returns[:, None])
    q_sampled = torch.cat([q_uniform, calibrated], dim=-1)
    return ((q_sampled - log_densities).logsumexp(-1) - q_data).mean(1)


def policy_is_due(update_number: int, args: Args) -> bool:
    """Whether the policy learns in this update: always."""
    return True


def update(
    agent: Agent, optimizer: Optimizer, batch: dict[str, Tensor], args: Args, kind: "StepKind"
) -> dict[str, Tensor]:
    """One step of every network on one batch; returns what to log, left on the device."""
    observations, actions = batch["observations"], batch["actions"]
    next_observations = batch["next_observations"]
    n = args.cql_actions

    # Policy and temperature, eqs. (5) and (6). Frozen critics only pass the gradient on.
    mean, log_std = agent.actor(observations)
    new_actions, log_prob = sample_tanh_gaussian(mean, log_std, torch.randn_like(mean))
    agent.critics.requires_grad_(False)
    q_new = agent.critics(observations, new_actions).amin(0)  # (B,)
    agent.critics.requires_grad_(True)
    actor_loss = (agent.log_alpha.detach().exp() * log_prob - q_new).mean()
    target_entropy = -actions.shape[1]
    alpha_loss = -(agent.log_alpha * (log_prob.detach() + target_entropy)).mean()

    # Target, eq. (1), and the actions of the conservative term, eq. (2).
    with torch.no_grad():
        next_mean, next_log_std = agent.actor(next_observations)
        sampled_actions, log_densities = sample_cql_actions(
            (mean, log_std), (next_mean, next_log_std), n
        )
        if args.cql_max_target_backup:  # the same next actions serve both uses
            next_actions = sampled_actions[:, 2 * n :]
            repeated = next_observations[:, None].expand(-1, n, -1)
            next_q = agent.target_critics(repeated, next_actions).amin(0).amax(1)
        else:
            noise = torch.randn_like(next_mean)
            next_actions, _ = sample_tanh_gaussian(next_mean, next_log_std, noise)
            next_q = agent.target_critics(next_observations, next_actions).amin(0)
        target_q = batch["rewards"] + args.gamma * (1 - batch["terminals"]) * next_q  # (B,)

    # Critics, eqs. (2) to (4): both of them, on all 1 + 3n actions, in one call.
    all_actions = torch.cat([actions[:, None], sampled_actions], dim=1)
    repeated = observations[:, None].expand(-1, 1 + 3 * n, -1)
    q_values = agent.critics(repeated, all_actions)  # (2, B, 1 + 3n)
    q_data, q_sampled = q_values[..., 0], q_values[..., 1:]
    td_loss = (q_data - target_q).square().mean(1).sum()
    returns = batch["mc_returns"]
    conservative = conservative_term(q_data, q_sampled, log_densities, returns)
    if args.cql_lagrange:
        weight = agent.log_multiplier.exp().clamp(0, 1e6) * args.cql_weight
        cql_loss = (weight.detach() * (conservative - args.cql_gap)).sum()
        multiplier_loss = -0.5 * (weight * (conservative.detach() - args.cql_gap)).sum()
        cql_loss = cql_loss + multiplier_loss
    else:
        cql_loss = args.cql_weight * conservative.sum()

    # The losses share no parameter, so that one backward pass and one step serve all of them.
    optimizer.zero_grad()
    (actor_loss + alpha_loss + td_loss + cql_loss).backward()
    optimizer.step()
    move_targets(agent.target_critics, agent.critics, args.tau)

    if not kind.log:
        return {}
    q_policy = q_sampled.detach()[..., n:]  # at pi(s), then at pi(s')
    return {
        "losses/td": td_loss.detach(),
        "losses/conservative": conservative.detach().mean(),
        "losses/calibrated_share": (q_policy < returns[:, None]).float().mean(),
        "losses/actor": actor_loss.detach(),
        "losses/entropy": -log_prob.detach().mean(),
        "losses/alpha": agent.log_alpha.detach().exp(),
        "losses/q_data": q_data.detach().mean(),
        "losses/q_policy": q_policy[..., :n].mean(),
    }


# ------------------------------ training (shared)
class BatchRows(NamedTuple):
    """How many transitions of a batch are drawn from where."""

    dataset: int = 0
    online: int = 0
    both: int = 0  # from all of them alike


class StepKind(NamedTuple):
    """All that makes one training step differ from another."""

    online: bool
    rows: BatchRows
    policy_due: bool
    log: bool  # whether numbers to log are wanted


def train(run: "Run", args: Args) -> None:
    """Both phases, or what is left of them, and the closing words."""
    if run.phase == "offline" and args.offline_steps:
        offline_phase(run, args)
    if args.online_steps:
        if run.phase == "offline":
            start_online_phase(run, args)
        online_phase(run, args)
    run.writer.close()
    column = EVAL_COLUMNS.index("return")
    returns = [row[column] for row in run.evals[-args.eval_episodes :]]
    say(f"final {result_of(args.env, returns)}")


def offline_phase(run: "Run", args: Args) -> None:
    """Updates on batches of the dataset."""
    with progress_bar(run, args.offline_steps):
        while run.step < args.offline_steps:
            run.step += 1
            policy_due = policy_is_due(run.step, args)
            rows = BatchRows(dataset=args.batch_size)
            logs = train_step(run, args, StepKind(False, rows, policy_due, log_is_due(run, args)))
            end_of_step(run, args, logs, between_episodes=True)


def start_online_phase(run: "Run", args: Args) -> None:
    """Networks and optimizer simply go on; the critics behind the bonus are frozen as they are."""
    run.phase = "online"
    run.step = 0
    if args.sera_critic == "offline":
        run.bonus_agent.load_state_dict(run.agent.state_dict())
    elif args.sera_critic == "current":
        run.bonus_agent = run.agent
    store_bonus_q(run, args, 0, run.buffer.size)


def online_phase(run: "Run", args: Args) -> None:
    """Environment steps with updates on dataset and online transitions."""
    episode = []  # transitions that are not in the buffer yet
    done = True
    with progress_bar(run, args.online_steps):
        if run.step == 0:
            run_evaluation(run, args)
        while run.step < args.online_steps:
            run.step += 1
            if done:  # seeded once; then the environment's own generator draws the start states
                observation, _ = run.env.reset(seed=args.seed if run.step == 1 else None)
            action = explore(run, args, observation)
            logs = online_updates(run, args)  # first: a GPU is at it while the environment steps
            next_observation, reward, terminated, truncated, info = run.env.step(action)
            done = terminated or truncated
            last = run.step == args.online_steps
            transition = (observation, action, reward, next_observation, terminated, done or last)
            episode.append(transition)
            observation = next_observation
            if done or last or not WAIT_FOR_EPISODE_END:
                run.buffer.append(stack_transitions(episode))
                store_bonus_q(run, args, run.buffer.size - len(episode), run.buffer.size)
                episode = []
            if done:
                log_episode(run, args, info["episode"]["r"])
            end_of_step(run, args, logs, between_episodes=done)


def is_random_step(run: "Run", args: Args) -> bool:
    """From scratch, without a dataset, the first steps only gather transitions."""
    return run.buffer.offline_size == 0 and run.step <= args.learning_starts


def explore(run: "Run", args: Args, observation: np.ndarray) -> np.ndarray:
    """An action (a,) to learn from: the policy's, with its noise, or a random one."""
    if is_random_step(run, args):
        return (2 * torch.rand(run.env.action_space.shape) - 1).numpy()
    return act(run, observation[None], deterministic=False)[0]


def online_updates(run: "Run", args: Args) -> dict[str, Tensor]:
    """The updates that belong to one environment step; the logs of the last, if any are due."""
    rows = online_batch(run.buffer, args)
    if rows is None or is_random_step(run, args):
        return {}
    for number in range(args.updates_per_step):
        policy_due = policy_is_due((run.step - 1) * args.updates_per_step + number + 1, args)
        log = log_is_due(run, args) and number == args.updates_per_step - 1
        logs = train_step(run, args, StepKind(True, rows, policy_due, log))
    return logs


def online_batch(buffer: "ReplayBuffer", args: Args) -> BatchRows | None:
    """Where the transitions of a batch come from, by --online-sampling; None if it is too early.

    A mix is of the dataset alone until there are enough online transitions for their share.
    """
    if args.online_sampling == "append":
        return BatchRows(both=args.batch_size) if buffer.size >= args.batch_size else None
    dataset_rows = round(args.batch_size * args.mixing_ratio)
    online_rows = args.batch_size - dataset_rows
    if buffer.online_size >= online_rows:
        return BatchRows(dataset_rows, online_rows)
    if dataset_rows:
        return BatchRows(dataset=args.batch_size)
    return None


def train_step(run: "Run", args: Args, kind: StepKind) -> dict[str, Tensor]:
    """One training step; then the schedule of learning rates, if there is one, moves on."""
    if run.recorded_step:
        logs = run.recorded_step(kind)
    else:
        logs = sample_and_update(run, args, kind)
    if run.scheduler:
        run.scheduler.step()
    return logs


def sample_and_update(run: "Run", args: Args, kind: StepKind) -> dict[str, Tensor]:
    """A batch, the bonus, and one update: all of it on the device, and all that varies in kind."""
    bonus_function, update_function = intrinsic_reward, update
    if run.compiled and not kind.log:  # numbers to log are wanted too seldom to compile them
        bonus_function, update_function = run.compiled
    batch = run.buffer.sample(kind.rows)
    logs = {}
    if kind.online and args.sera_coef:
        pool = None  # neighbours are sought in the batch itself
        if args.sera_pool and args.sera_bonus != "constant":
            pool = run.buffer.sample_as(kind.rows, args.sera_pool)
        bonus, logs = bonus_function(run.bonus_agent, batch, run.varying_dims, args, kind.log, pool)
        batch["rewards"] = batch["rewards"] + bonus  # the buffer keeps its own
    return logs | update_function(run.agent, run.optimizer, batch, args, kind)


def log_is_due(run: "Run", args: Args) -> bool:
    """Every --log-every steps, and with the last of a phase."""
    return run.step % args.log_every == 0 or run.step == run.steps_of_phase(args)


def end_of_step(run: "Run", args: Args, logs: dict, between_episodes: bool) -> None:
    """Logs, evaluation and checkpoint, where they are due."""
    last = run.step == run.steps_of_phase(args)
    run.save_due |= bool(run.received) or run.step % args.checkpoint_every == 0
    saving = last or (run.save_due and between_episodes)  # so that it resumes as the very same run
    if logs or saving:  # only now do numbers leave the device
        check_finite(run, logs)
        for name, value in logs.items():
            run.writer.add_scalar(name, float(value), run.total_step(args))
    run.progress.update()
    if last or run.step % args.eval_every == 0:
        run_evaluation(run, args)
    if saving:
        run.writer.flush()  # first: what the checkpoint is ahead of would be lost in a crash
        save_checkpoint(run, args)
        run.save_due = False
        if run.received:
            sys.exit(f"{run.received[0]}: go on with --run-dir {run.run_dir} --resume")


# ------------------------------ recording on a GPU (shared)
class Recording:
    """A function of tensors on the GPU, recorded and replayed: one launch instead of hundreds.

    A recording repeats its kernels on the same memory and with the same Python numbers. So there is
    one for each key, of which the function may make what it likes, and for each shape of inputs;
    and all that varies otherwise has to be a tensor. What it returns is overwritten by the next
    replay with that key. The first three calls with a key run as they are.
    """

    def __init__(self, function: Callable):
        self.function = function  # (key, *inputs) -> tensors
        self.calls = collections.Counter()
        self.graphs = {}
        self.inputs = {}
        self.outputs = {}
        self.stream = torch.cuda.Stream()
        self.works = True

    def __call__(self, key, *inputs: Tensor):
        case = (key, *(x.shape for x in inputs))
        if case not in self.inputs:
            self.inputs[case] = [x.to("cuda", copy=True) for x in inputs]
        for static, given in zip(self.inputs[case], inputs):
            static.copy_(given, non_blocking=True)
        self.calls[case] += 1
        if self.works and self.calls[case] > 3:
            if case not in self.graphs:
                self.record(case)
            if case in self.graphs:
                self.graphs[case].replay()
                return self.outputs[case]
        return self.run_as_it_is(case)

    def run_as_it_is(self, case):
        """On a stream of its own, as recording asks for before it begins."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = self.function(case[0], *self.inputs[case])
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def record(self, case) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.outputs[case] = self.function(case[0], *self.inputs[case])
            self.graphs[case] = graph
        except RuntimeError as error:  # whatever the driver or an operation may refuse
            self.works = False
            cause = error.__context__ or error  # the end of a recording fails once more
            say(f"CUDA graphs do not work here ({first_line(cause)}): going on without")


def first_line(error: Exception) -> str:
    """What it says, in short, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def prepare_optimizer(optimizer: Optimizer, device: torch.device) -> None:
    """Keep on the device what changes from step to step, for recorded steps, or off it."""
    for group in optimizer.param_groups:
        on_gpu = device.type == "cuda"
        group["capturable"] = on_gpu
        group["lr"] = torch.as_tensor(group["lr"], device=device) if on_gpu else float(group["lr"])


def record_steps(run: "Run", args: Args) -> None:
    """Training steps and the policy as recordings."""
    prepare_optimizer(run.optimizer, run.device)

    def step(kind: StepKind) -> dict[str, Tensor]:
        try:
            return sample_and_update(run, args, kind)
        except RuntimeError:
            # An update that was cut short may have left them frozen.
            run.agent.critics.requires_grad_(True)
            raise

    if args.cudagraphs:
        run.recorded_step = Recording(step)
        run.recorded_policy = Recording(
            lambda deterministic, observations: run.agent.act(observations, deterministic)
        )


def compile_functions(run: "Run") -> tuple[Callable, Callable]:
    """intrinsic_reward and update, whose small operations torch.compile fuses."""
    # The optimizer's step is one kernel already, and stays out of it.
    run.optimizer.step = torch.compiler.disable(run.optimizer.step)
    run.optimizer.zero_grad = torch.compiler.disable(run.optimizer.zero_grad)

    def compiled(function: Callable) -> Callable:
        fast_function = torch.compile(function, dynamic=False)

        def fast_function_or_say_why(*inputs):
            if run.compiled is None:
                return function(*inputs)
            try:
                return fast_function(*inputs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # no Triton, no C++ compiler, a fault of the compiler
                if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                    raise  # a fault of the recording, which says so
                run.agent.critics.requires_grad_(True)  # as in record_steps
                say(f"torch.compile does not work here ({first_line(error)}): going on without")
                run.compiled = None
                return function(*inputs)

        return fast_function_or_say_why

    return compiled(intrinsic_reward), compiled(update)


# ------------------------------ tasks (shared)
class Task(NamedTuple):
    """An environment, how D4RL scores its returns, and the data file of a dataset."""

    env_id: str  # Gymnasium's
    observation_dim: int
    action_dim: int
    random_return: float | None = None  # which D4RL scores as 0; None: there are no scores
    expert_return: float | None = None  # which D4RL scores as 100
    horizon: int | None = None  # no trajectory of the dataset is longer
    file: str | None = None  # below SERVER, or in the repository
    sha256: str | None = None  # how it begins


TASKS = {
    "hopper": Task("Hopper-v4", 11, 3, -20.272305, 3234.3, 1000),
    "halfcheetah": Task("HalfCheetah-v4", 17, 6, -280.178953, 12135.0, 1000),
    "walker2d": Task("Walker2d-v4", 17, 6, 1.629008, 4592.3, 1000),
    "ant": Task("Ant-v4", 111, 8, -325.6, 3879.7, 1000),
}
KINDS = ("random", "medium", "expert", "medium-expert", "medium-replay", "full-replay")
BUNDLED = {  # come with the repository
    "hopper-medium-mini": TASKS["hopper"]._replace(file="data/hopper-medium-mini.hdf5"),
    "pendulum-mini": Task("Pendulum-v1", 3, 1, horizon=200, file="data/pendulum-mini.hdf5"),
}
FAMILIES = {  # by how an id begins: the module in envs/ that registers them
    "antmaze": "antmaze",
    "pen": "adroit",
    "door": "adroit",
    "hammer": "adroit",
    "relocate": "adroit",
}
UNSUPPORTED = ("kitchen", "maze2d", "minigrid", "flow", "carla", "bullet")  # families of D4RL's
SERVER = "rail.eecs.berkeley.edu/datasets/offline_rl"
# A copy at Hugging Face, where some files are cut off: hence the checksums and the other sources.
MIRROR = "datasets/imone/D4RL/resolve/9ed58d8a76c12f4c1cb5db51fa71389e703d2ec5"
CHECKSUMS = {  # SHA-256 of D4RL's files, the first 16 digits
    "ant-random-v2": "93cc10893eed2b8e",
    "ant-medium-v2": "461c03b9f70f40d6",
    "ant-expert-v2": "fa22531ca79ea051",
    "ant-medium-expert-v2": "8cfb64e62d8944b5",
    "ant-medium-replay-v2": "844c4e5743ef5109",
    "ant-full-replay-v2": "b95b0a7f34b1d5d1",
    "halfcheetah-random-v2": "25407aef85b5d16c",
    "halfcheetah-medium-v2": "41324e8487a9556d",
    "halfcheetah-expert-v2": "d9fe53bb994eb1e2",
    "halfcheetah-medium-expert-v2": "015db75dae5bbe8e",
    "halfcheetah-medium-replay-v2": "48d494a4770c11f4",
    "halfcheetah-full-replay-v2": "27fdf7ea86e5a2cb",
    "hopper-random-v2": "63103ef7059db4c0",
    "hopper-medium-v2": "5bdf1bc4a713c829",
    "hopper-expert-v2": "01aa219a5f8eea5e",
    "hopper-medium-expert-v2": "9d51ad87f8c905be",
    "hopper-medium-replay-v2": "e121c5f7c9857a30",
    "hopper-full-replay-v2": "56baf95963c51c1e",
    "walker2d-random-v2": "4e863bb6090cf4a4",
    "walker2d-medium-v2": "cf00f43add04c17f",
    "walker2d-expert-v2": "2985dc3d436a8baa",
    "walker2d-medium-expert-v2": "6b8d7f868c45bbae",
    "walker2d-medium-replay-v2": "e75de96a4f77acf7",
    "walker2d-full-replay-v2": "f2720f9d27b2acef",
}


def find_task(dataset_id: str) -> Task:
    """The task of --env: one of D4RL's datasets, or an environment that Gymnasium knows.

    ValueError if it is neither.
    """
    if dataset_id in BUNDLED:
        return BUNDLED[dataset_id]
    family = FAMILIES.get(dataset_id.partition("-")[0])
    if family:
        datasets = import_from_envs(family, dataset_id).DATASETS
        if dataset_id in datasets:
            return Task(dataset_id, **datasets[dataset_id])
    match = re.fullmatch(r"([a-z0-9]+)-(.+)-v([012])", dataset_id)
    known = match and match[1] in TASKS and match[2] in KINDS
    if not known or match[0].endswith("full-replay-v0"):
        return own_task(dataset_id)
    robot, kind, version = match.groups()
    name = f"{robot}_{kind.replace('-', '_')}"
    file = f"gym_mujoco_v{version}/{name}-v{version}.hdf5"
    if version == "0":
        file = f"gym_mujoco/{name}.hdf5"
    if version == "0" and kind == "medium-replay":  # has older names
        robot_then = "walker" if robot == "walker2d" else robot
        file = f"gym_mujoco/{robot_then}_mixed.hdf5"
    return TASKS[robot]._replace(file=file, sha256=CHECKSUMS.get(dataset_id))


def import_from_envs(name: str, dataset_id: str) -> ModuleType:
    """A module of envs/, which registers its environments. ValueError where it is not there."""
    try:
        return importlib.import_module(f"envs.{name}")
    except ImportError:
        fix = f"needs the file envs/{name}.py beside the script"
        raise ValueError(f"--env {dataset_id} {fix}") from None
    except gymnasium.error.DependencyNotInstalled as error:
        raise ValueError(f"--env {dataset_id}: {error}") from None


@functools.cache
def own_task(env_id: str) -> Task:
    """An environment that Gymnasium knows, also as module:Name-v0. ValueError if it is none."""
    family = env_id.partition("-")[0]
    if family in UNSUPPORTED:
        raise ValueError(f"--env {env_id}: {family} of D4RL is not supported: give another task")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            env = gymnasium.make(env_id, disable_env_checker=True)
    except Exception as error:  # whatever an environment or an import may raise
        others = [known for known in known_ids() if known != env_id]
        close = difflib.get_close_matches(env_id, others, n=1)
        unknown = "is no dataset that is supported, and Gymnasium cannot make it"
        fix = f"did you mean {close[0]}?" if close else "give one such as hopper-medium-v2"
        raise ValueError(f"--env {env_id} {unknown} ({first_line(error)}): {fix}") from None
    states, actions = env.observation_space, env.action_space
    env.close()
    for name, space in (("states", states), ("actions", actions)):
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            fix = "give one whose states and actions are vectors of numbers"
            raise ValueError(f"--env {env_id} has the {name} {space}: {fix}")
    if not actions.is_bounded():
        raise ValueError(f"--env {env_id} has actions without bounds ({actions}): give some bounds")
    if env.spec.max_episode_steps is None:
        fix = "register it with max_episode_steps, unless it ends every episode itself"
        say(f"--env {env_id} has no time limit: {fix}")
    return Task(env_id, states.shape[0], actions.shape[0], horizon=env.spec.max_episode_steps)


def known_ids() -> list[str]:
    """What one may have meant: D4RL's ids of the latest version, and Gymnasium's."""
    for family in set(FAMILIES.values()):
        # Registers its ids, where its file and what that needs are there.
        with contextlib.suppress(ImportError, gymnasium.error.DependencyNotInstalled):
            importlib.import_module(f"envs.{family}")
    robots = [f"{robot}-{kind}-v2" for robot in TASKS for kind in KINDS]
    return [*BUNDLED, *robots, *gymnasium.registry]


# ------------------------------ data (shared)
def fetch_dataset(dataset_id: str, dataset_path: str | None = None) -> Path:
    """The HDF5 file: dataset_path, else bundled, else in D4RL's cache, else downloaded into that.

    FileNotFoundError if there is none.
    """
    task = find_task(dataset_id)
    bundled = Path(__file__).resolve().parent / (task.file or "")
    if dataset_path or dataset_id in BUNDLED:
        path = Path(dataset_path or bundled)
        if path.is_dir():
            fix = f"python data/convert.py {path} OUT.hdf5 may make a file of it"
            raise FileNotFoundError(f"{path} is a folder: {fix}")
        if not path.is_file():
            raise FileNotFoundError(f"there is no data file {path}: name one with --dataset-path")
        return path
    if task.file is None:
        fix = "give --dataset-path, or --offline-steps 0 --mixing-ratio 0 to learn without"
        raise FileNotFoundError(f"--env {dataset_id} has no dataset of its own: {fix}")
    return fetch_from_d4rl(task)


def fetch_from_d4rl(task: Task) -> Path:
    """A file of D4RL's, from its cache, else from the first source that has it whole.

    Runs that start at the same time download the file once. FileNotFoundError if no source has it.
    """
    cache = os.path.expanduser(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets")
    if cache.startswith("~"):
        fix = "set D4RL_DATASET_DIR to a folder, or give --dataset-path"
        raise FileNotFoundError(f"there is no home folder to keep {task.file} in: {fix}")
    name = task.file.rpartition("/")[2]
    path = Path(cache, name)
    if path.is_file():
        return path
    hub = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    urls = (
        f"{hub}/{MIRROR}/{name}",
        f"https://{SERVER}/{task.file}",
        f"http://{SERVER}/{task.file}",
    )
    lock = filelock.FileLock(path.with_name(f"{name}.lock"), fallback_to_soft=False)
    reasons = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        acquire(lock)
        for url in urls:
            if path.is_file():  # somebody else was faster
                break
            try:
                download(url, path, task.sha256)
            except Exception as error:  # whatever the network may raise
                reasons.append(f"{url}: {first_line(error)}")
    except OSError as error:
        reasons.append(f"{cache}: {error.strerror}")
    finally:
        lock.release()
    if path.is_file():
        return path
    fix = f"put {name} into {cache}, or name it with --dataset-path"
    raise FileNotFoundError(f"could not download {name} ({'; '.join(reasons)}): {fix}")


def download(url: str, path: Path, sha256: str | None, timeout: float = 30) -> None:
    """Put what url has at path, if that is whole, else raise whatever went wrong.

    timeout: in seconds, of each answer.
    """
    for left in path.parent.glob(f"{path.name}.part*"):  # by a download that was killed
        left.unlink()
    part = path.with_name(f"{path.name}.part")
    usual_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)
    say(f"downloading {url}")
    try:
        torch.hub.download_url_to_file(url, str(part), sha256)
        # Where no checksum is known, this refuses a page of text and half a file.
        h5py.File(part, locking=False).close()
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
        socket.setdefaulttimeout(usual_timeout)


FORMATS = {  # of other libraries, and what their files hold
    "robomimic": ("data/demo_0",),
    "minari": ("episode_0",),
    "d3rlpy": ("observations_0", "episode_terminals"),
}


def read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Those of the named arrays that an HDF5 file has, whatever their shape.

    ValueError if the file or one of them cannot be read.
    """
    try:
        with h5py.File(path, locking=False) as file:
            for name, signs in FORMATS.items():
                if any(sign in file for sign in signs):
                    fix = f"python data/convert.py {path} OUT.hdf5 makes one in D4RL's"
                    raise ValueError(f"{path} is in {name}'s format: {fix}")
            arrays = {}
            for name in names:
                if name not in file:
                    continue
                if not isinstance(file.get(name), h5py.Dataset):
                    raise ValueError(f"{name} in {path} is no array: give a file in D4RL's format")
                arrays[name] = np.asarray(file[name])
    except (OSError, RuntimeError, MemoryError, TypeError) as error:
        fix = "fetch it again, or let data/convert.py make one of it"
        if "already open" in str(error) or "locking flag" in str(error):
            fix = "close it first: this process has it open"
        raise ValueError(f"{path} cannot be read as HDF5 ({first_line(error)}): {fix}") from None
    return arrays


def load_d4rl(
    dataset_id: str, path: Path | str, clip_actions: bool = False
) -> dict[str, np.ndarray]:
    """The transitions of a data file: exactly those of d4rl.qlearning_dataset, in its order.

    observations, next_observations (N, d), actions (N, a), rewards (N,) float32; terminals and
    episode_ends (N,) bool. Timeouts and the last row have no next state and are left out;
    episode_ends marks a trajectory's last kept row. After a terminal, next_observations is the
    next episode's first: mask it. clip_actions: take actions beyond [-1, 1] too, which the buffer
    clips. ValueError for a file that is not like that.
    """
    task = find_task(dataset_id)
    raw = read_arrays(path, ("observations", "actions", "rewards", "terminals", "timeouts"))
    check_arrays(raw, task, dataset_id, path)
    raw = {name: array.astype(TYPES[name]) for name, array in raw.items()}
    if "timeouts" not in raw:
        raw["timeouts"] = counted_timeouts(raw["terminals"], task.horizon)
    largest = np.abs(raw["actions"]).max()
    if largest > 1 + 1e-6 and not clip_actions:
        fix = "--clip-actions clips them, and data/convert.py rescales them"
        raise ValueError(f"{path} has actions up to {largest:g}, not within [-1, 1]: {fix}")

    keep = np.flatnonzero(~raw["timeouts"][:-1])
    if len(keep) == 0:
        raise ValueError(f"{path} has 0 transitions, as every row is a timeout: fix the file")
    episode_ends = raw["terminals"][keep] | raw["timeouts"][keep + 1]
    episode_ends[-1] = True
    return {
        "observations": raw["observations"][keep],
        "actions": raw["actions"][keep],
        "rewards": raw["rewards"][keep],
        "next_observations": raw["observations"][keep + 1],
        "terminals": raw["terminals"][keep],
        "episode_ends": episode_ends,
    }


TYPES = {
    "observations": np.float32,
    "actions": np.float32,
    "rewards": np.float32,
    "terminals": bool,
    "timeouts": bool,
}


def check_arrays(raw: dict[str, np.ndarray], task: Task, dataset_id: str, path: Path | str) -> None:
    """Drop a last dimension of 1 in place. ValueError for arrays that are missing or no good."""
    for name in ("observations", "actions", "rewards", "terminals"):
        if name not in raw:
            fix = "give a file in D4RL's format, see docs/own_task.md"
            raise ValueError(f"{path} has no array '{name}': {fix}")
    if "timeouts" not in raw and task.horizon is None:
        fix = "give a file that marks the last row of each trajectory without a terminal"
        raise ValueError(f"{path} has no array 'timeouts': {fix}")
    widths = {"observations": (task.observation_dim,), "actions": (task.action_dim,)}
    rows = raw["observations"].shape[:1]
    for name, array in raw.items():
        shape = rows + widths.get(name, ())
        if array.shape == (*shape, 1):  # rewards of v1 medium-replay
            array = array[..., 0]
        if array.shape != shape or array.dtype.kind not in "fbiu":
            found = f"{array.dtype} {array.shape}, but {dataset_id} needs numbers, {shape}"
            raise ValueError(f"{name} in {path} is {found}: give a file in D4RL's format")
        if len(array) < 2:
            raise ValueError(f"{path} has {len(array)} rows: give a file with at least 2")
        if TYPES[name] is bool:
            good = np.isin(array, (0, 1))
            wrong = "flags other than 0 and 1"
        else:
            good = np.abs(array) <= np.finfo(np.float32).max
            wrong = "NaN or infinity"
        if not good.all():
            raise ValueError(f"{name} in {path} has {wrong}: fix the file")
        raw[name] = array


def counted_timeouts(terminals: np.ndarray, horizon: int) -> np.ndarray:
    """The timeouts (N,) of a file that has none, counted as d4rl does.

    Every horizon-th step is one; but after a terminal d4rl counts from 1, so one comes earlier.
    """
    timeouts = np.zeros(len(terminals), dtype=bool)
    step = 0
    for row, terminal in enumerate(terminals):
        timeouts[row] = step == horizon - 1
        step = 0 if timeouts[row] else step + 1
        if terminal and not timeouts[row]:
            step = 1
    return timeouts


def check_trajectories(data: dict[str, np.ndarray], task: Task, path: Path) -> None:
    """ValueError for a file that is not D4RL's own and contradicts itself, or the task.

    Its own next_observations, if it has some, have to be the next rows, and no trajectory may be
    longer than the task's horizon.
    """
    raw = read_arrays(path, ("observations", "next_observations", "timeouts", "terminals"))
    given = raw.get("next_observations", np.empty(0))
    if given.shape == raw["observations"].shape and given.dtype.kind in "fiu":
        terminals = raw["terminals"].reshape(-1) != 0
        if "timeouts" in raw:
            timeouts = raw["timeouts"].reshape(-1) != 0
        else:
            timeouts = counted_timeouts(terminals, task.horizon)
        differs = np.abs(given[:-1] - raw["observations"][1:]).max(1) > 1e-3
        wrong = np.flatnonzero(differs & ~(terminals | timeouts)[:-1])
        if len(wrong):
            found = f"next_observations of row {wrong[0]} is not the next row's observation"
            share = f"and so in {len(wrong)} of {len(given)} rows"
            fix = f"python data/convert.py {path} OUT.hdf5 --format arrays keeps them apart"
            raise ValueError(f"{path}: {found} ({share}): {fix}")
    if task.horizon is None:
        return
    ends = np.flatnonzero(data["episode_ends"])
    lengths = np.diff(ends, prepend=-1)
    if lengths.max() > task.horizon:
        first = ends[lengths.argmax()] - lengths.max() + 1
        found = f"a trajectory of {lengths.max()} steps, from transition {first}"
        fix = "mark the last row of each trajectory in 'timeouts'"
        raise ValueError(f"{path} has {found}, but an episode has {task.horizon} at most: {fix}")


def return_range(data: dict[str, np.ndarray]) -> float:
    """Best minus worst return of the trajectories; 1000, which scales nothing, if all are alike."""
    first_rows = np.flatnonzero(np.append(True, data["episode_ends"][:-1]))
    returns = np.add.reduceat(data["rewards"], first_rows, dtype=np.float64)
    return float(np.ptp(returns)) or 1000.0


class ReplayBuffer:
    """Transitions as the networks see them, on the training device: dataset first, then online.

    They are rows of one table, so that a batch is one gather.
    """

    def __init__(self, data: dict[str, np.ndarray] | None, args: Args, device: torch.device):
        self.args = args
        self.device = device
        self.columns: dict[str, slice | int] = {}  # where in a row each quantity stands
        self.table = torch.empty(0)  # laid out by the first append
        self.size = 0
        self.online_count = torch.zeros((), dtype=torch.float64, device=device)  # online_size
        self.capacity = args.online_steps
        self.mean = np.float64(0)
        self.std = np.float64(1)
        self.reward_scale = args.reward_scale
        if data is not None:  # without data there is nothing to normalise by
            self.capacity += len(data["rewards"])
            if args.normalize_observations:
                self.mean = data["observations"].mean(0, dtype=np.float64)
                self.std = data["observations"].std(0, dtype=np.float64) + 1e-3
            if args.normalize_rewards:
                self.reward_scale *= 1000 / return_range(data)
            self.append(data, online=False)
        self.offline_size = self.size
        self.online_count.zero_()

    @property
    def online_size(self) -> int:
        return self.size - self.offline_size

    def normalize(self, observations: np.ndarray) -> np.ndarray:
        return ((observations - self.mean) / self.std).astype(np.float32)

    def append(self, transitions: dict[str, np.ndarray], online: bool = True) -> None:
        """Add transitions, named as by load_d4rl; the one way in for dataset and online ones."""
        rewards = self.reward_scale * transitions["rewards"].astype(np.float64)
        rewards += self.args.reward_bias
        columns = {
            "observations": self.normalize(transitions["observations"]),
            "actions": transitions["actions"].clip(-1 + 1e-5, 1 - 1e-5),  # atanh(1) is infinite
            "rewards": rewards,
            "next_observations": self.normalize(transitions["next_observations"]),
            "terminals": transitions["terminals"],
            "online": np.full(len(rewards), online),
        }
        columns |= added_columns(transitions | {"rewards": rewards}, self.args, self.reward_scale)
        if bonus_q_is_stored(self.args):
            columns["bonus_q"] = np.full(len(rewards), np.nan)  # until store_bonus_q
        if not self.columns:
            self.make_table(columns)
        rows = np.zeros((len(rewards), self.table.shape[1]), dtype=np.float32)
        for name, position in self.columns.items():
            rows[:, position] = columns[name]
        self.append_rows(torch.from_numpy(rows))

    def make_table(self, columns: dict[str, np.ndarray]) -> None:
        width = 0
        for name, values in columns.items():
            if values.ndim == 1:
                self.columns[name] = width
                width += 1
            else:
                self.columns[name] = slice(width, width + values.shape[1])
                width += values.shape[1]
        # As wide without bonus_q as with it: on some CPUs the distance between rows changes how
        # products round, and the offline phase is to be the same, bit for bit, under every bonus.
        if "bonus_q" not in columns:
            width += 1
        self.table = torch.zeros(self.capacity, width, device=self.device)

    def append_rows(self, rows: Tensor) -> None:
        """Add rows (n, width) laid out as the table; older checkpoints lack its unused column."""
        end = self.size + len(rows)
        self.table[self.size : end, : rows.shape[1]].copy_(rows, non_blocking=True)
        self.size = end
        self.online_count += len(rows)

    def as_columns(self, rows: Tensor) -> dict[str, Tensor]:
        """The quantities in rows (n, width), by name, as views: (n, width of it) or (n,)."""
        return {name: rows[:, position] for name, position in self.columns.items()}

    def sample(self, rows: BatchRows) -> dict[str, Tensor]:
        """A batch of copies, drawn on the device with replacement, dataset transitions first.

        A recorded step has Python's numbers for good: what grows is a number on the device.
        """
        draws = torch.rand(sum(rows), dtype=torch.float64, device=self.device)
        if rows.both:
            draws.mul_(self.online_count + self.offline_size)
        if rows.dataset:
            draws[: rows.dataset].mul_(self.offline_size)
        if rows.online:
            draws[rows.dataset :].mul_(self.online_count)
        drawn = draws.long()
        if rows.online:  # only now: a sum of floats could be rounded up to the end of the table
            drawn[rows.dataset :].add_(self.offline_size)
        return self.as_columns(self.table[drawn])

    def sample_as(self, rows: BatchRows, count: int) -> dict[str, Tensor]:
        """A batch of another size, from the same places in the same shares."""
        if rows.both:
            return self.sample(BatchRows(both=count))
        dataset_rows = round(count * rows.dataset / sum(rows))
        return self.sample(BatchRows(dataset_rows, count - dataset_rows))


def stack_transitions(transitions: list[tuple]) -> dict[str, np.ndarray]:
    """A list of transitions as the columns that load_d4rl gives."""
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "episode_ends")
    columns = zip(*transitions)
    return {name: np.array(values) for name, values in zip(names, columns)}


def no_transitions(task: Task) -> dict[str, np.ndarray]:
    """The columns that load_d4rl gives, without a row."""
    vectors = {"observations": task.observation_dim, "next_observations": task.observation_dim}
    vectors |= {"actions": task.action_dim}
    columns = {name: np.empty((0, width), dtype=np.float32) for name, width in vectors.items()}
    for name in ("rewards", "terminals", "episode_ends"):
        columns[name] = np.empty(0, dtype=np.float32)
    return columns


def bonus_q_is_stored(args: Args) -> bool:
    """Whether the bonus asks for a q that does not change."""
    has_q = args.sera_coef != 0 and args.sera_bonus in ("q", "v")
    return has_q and args.sera_critic != "current"


@torch.no_grad()
def store_bonus_q(run: "Run", args: Args, first: int, end: int) -> None:
    """Under frozen critics the q of a transition never changes, and is stored with it."""
    if not bonus_q_is_stored(args):
        return
    for start in range(first, end, 10_000):
        batch = run.buffer.as_columns(run.buffer.table[start : min(start + 10_000, end)])
        batch["bonus_q"].copy_(conditioning_value(run.bonus_agent, batch, args))


# ------------------------------ environment and evaluation (shared)
def use_d4rl_physics(env: gymnasium.Env) -> None:
    """Give a MujocoEnv the inertias and margins of D4RL's MuJoCo (before 2.1.2), in place.

    There a capsule of radius r and half length h weighed as a cylinder of length 2h + r, so
    compile that; and of the margins of two touching geoms the larger counted, where since 3.5.0
    they add up.
    """
    spec = mujoco.MjSpec.from_file(env.fullpath)
    for geom in spec.geoms:
        if geom.type != mujoco.mjtGeom.mjGEOM_CAPSULE:
            continue
        geom.type = mujoco.mjtGeom.mjGEOM_CYLINDER
        radius = geom.size[0]
        if np.isfinite(geom.fromto).all():  # given by its ends: move each out by r / 2
            start, end = geom.fromto[:3], geom.fromto[3:]
            shift = (end - start) / np.linalg.norm(end - start) * radius / 2
            geom.fromto = np.concatenate([start - shift, end + shift])
        else:
            geom.size[1] += radius / 2
    old_model = spec.compile()
    for name in ("body_mass", "body_inertia", "body_ipos", "body_iquat"):
        getattr(env.model, name)[:] = getattr(old_model, name)
    if mujoco.mj_version() >= 350:
        env.model.geom_margin[:] *= 0.5
    mujoco.mj_setConst(env.model, env.data)


def pad_observations(env: gymnasium.Env, observation_dim: int) -> gymnasium.Env:
    """Zeros behind ant's 27 dimensions: D4RL's data has 84 in place of contact forces."""
    space = env.observation_space
    missing = (0, observation_dim - space.shape[0])
    low = np.pad(space.low, missing)
    high = np.pad(space.high, missing)
    padded = gymnasium.spaces.Box(low, high, dtype=space.dtype)
    return gymnasium.wrappers.TransformObservation(env, lambda s: np.pad(s, missing), padded)


def rescale_actions(env: gymnasium.Env) -> gymnasium.Env:
    """Actions in [-1, 1] become those between the bounds of one's own environment."""
    space = env.action_space
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)

    def rescaled(action: np.ndarray) -> np.ndarray:
        inside = np.clip(low + (action + 1) / 2 * (high - low), low, high)
        return inside.astype(space.dtype)

    unit = gymnasium.spaces.Box(-1, 1, space.shape, np.float32)
    return gymnasium.wrappers.TransformAction(env, rescaled, unit)


def plain_values(env: gymnasium.Env) -> gymnasium.Env:
    """States as copies: some environments go on writing in theirs. Rewards as numbers, not (1,)."""
    env = gymnasium.wrappers.TransformObservation(env, np.array, env.observation_space)
    return gymnasium.wrappers.TransformReward(env, lambda reward: float(np.squeeze(reward)))


def is_of_gym_mujoco(task: Task) -> bool:
    """Whether it is D4RL's hopper, halfcheetah, walker2d or ant, and not one's own."""
    robots = {robot.env_id for robot in TASKS.values()}
    return task.env_id in robots and task.random_return is not None


def make_env(
    dataset_id: str, physics: str = "d4rl", video_dir: Path | None = None
) -> gymnasium.Env:
    """The task's environment, for actions in [-1, 1], which are clipped to that.

    D4RL's robots are Gymnasium's -v4, as -v5 changed rewards. physics: "d4rl", or "gymnasium" for
    the model as shipped. video_dir: film its episodes there.
    """
    task = find_task(dataset_id)
    mujoco.set_mju_user_warning(warnings.warn)  # else MuJoCo writes MUJOCO_LOG.TXT
    options = {"render_mode": "rgb_array"} if video_dir else {}  # some know no such option
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # -v4 is deprecated, as is an attribute it uses
        env = gymnasium.make(task.env_id, disable_env_checker=True, **options)
        if physics == "d4rl" and is_of_gym_mujoco(task):  # the others have it built in
            use_d4rl_physics(env.unwrapped)
        if env.observation_space.shape[0] < task.observation_dim:
            env = pad_observations(env, task.observation_dim)
        if video_dir:
            env = film(env, video_dir)
    if task.random_return is None:
        env = plain_values(rescale_actions(env))
    env = gymnasium.wrappers.ClipAction(env)
    return gymnasium.wrappers.RecordEpisodeStatistics(env)


def film(env: gymnasium.Env, video_dir: Path) -> gymnasium.Env:
    """Film all its episodes. ValueError where that needs something to be installed."""
    try:
        env.reset(seed=0)
        env.render()
        return gymnasium.wrappers.RecordVideo(env, str(video_dir), lambda episode: True)
    except Exception as error:  # of OpenGL, of the display, or the lack of MoviePy
        fix = "pip install moviepy; without a display set MUJOCO_GL=egl and install libegl1"
        raise ValueError(f"--capture-video does not work here ({error}): {fix}") from None


def normalized_score(dataset_id: str, returns: float | np.ndarray) -> float | np.ndarray | None:
    """D4RL's score of undiscounted returns, in percent: 0 is a random policy, 100 an expert.

    None for a task of one's own, which has no scores.
    """
    task = find_task(dataset_id)
    if task.random_return is None:
        return None
    above_random = np.asarray(returns) - task.random_return
    return 100 * above_random / (task.expert_return - task.random_return)


def result_of(dataset_id: str, returns: np.ndarray) -> str:
    """Mean score or, without scores, mean return, in words."""
    scores = normalized_score(dataset_id, returns)
    if scores is None:
        return f"return {np.mean(returns):.1f}"
    return f"score {np.mean(scores):.1f}"


@torch.no_grad()
def act(run: "Run", observations: np.ndarray, deterministic: bool) -> np.ndarray:
    """Actions (E, a) for observations (E, d) as the environment gives them."""
    inputs = torch.from_numpy(run.buffer.normalize(observations))
    if run.recorded_policy:
        actions = run.recorded_policy(deterministic, inputs)
    else:
        actions = run.agent.act(inputs.to(run.device), deterministic)
    return actions.cpu().numpy()


def evaluate(
    policy: Callable, envs: list[gymnasium.Env], seeds
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns, lengths and successes, each (E,), of an episode in each environment.

    policy: (E, d) -> (E, a). A success is one at any step, by the environment's info["success"];
    NaN where it tells nothing of the kind.
    """
    starts = [env.reset(seed=int(seed))[0] for env, seed in zip(envs, seeds)]
    observations = np.stack(starts, dtype=np.float64)  # a start of whole numbers takes others too
    returns = np.zeros(len(envs))
    lengths = np.zeros(len(envs), dtype=int)
    successes = np.full(len(envs), np.nan)
    running = list(range(len(envs)))
    while running:
        actions = policy(observations)
        for i in running.copy():
            observations[i], _, terminated, truncated, info = envs[i].step(actions[i])
            if "success" in info:
                successes[i] = np.fmax(successes[i], info["success"])
            if terminated or truncated:
                returns[i] = info["episode"]["r"]
                lengths[i] = info["episode"]["l"]
                running.remove(i)
    return returns, lengths, successes


EVAL_COLUMNS = ("phase", "step", "episode", "return", "length", "normalized_score")


def run_evaluation(run: "Run", args: Args) -> None:
    """Evaluate, log, and rewrite evals.csv. Start states depend on phase and step alone."""
    seeds = np.random.SeedSequence([run.phase == "online", run.step])
    seeds = seeds.generate_state(args.eval_episodes)
    if args.capture_video:
        run.eval_envs[0].set_wrapper_attr("name_prefix", f"{run.phase}-step-{run.step}")
        run.eval_envs[0].set_wrapper_attr("episode_id", -1)  # the name ends in it, from 0

    policy = functools.partial(act, run, deterministic=True)
    returns, lengths, successes = evaluate(policy, run.eval_envs, seeds)
    if args.capture_video:
        run.eval_envs[0].get_wrapper_attr("stop_recording")()
    scores = normalized_score(args.env, returns)
    cells = [None] * len(returns) if scores is None else scores.tolist()  # None: an empty one
    for episode, row in enumerate(zip(returns.tolist(), lengths.tolist(), cells)):
        run.evals.append((run.phase, run.step, episode, *row))
    with open(run.run_dir / "evals.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(EVAL_COLUMNS)
        writer.writerows(run.evals)
    step = run.total_step(args)
    run.writer.add_scalar("eval/return", returns.mean(), step)
    run.writer.add_scalar("eval/length", lengths.mean(), step)
    if not np.isnan(successes).any():
        run.writer.add_scalar("eval/success", successes.mean(), step)
    if scores is not None:
        run.writer.add_scalar("eval/normalized_score", scores.mean(), step)
    run.progress.set_postfix_str(result_of(args.env, returns))


# ------------------------------ run and checkpoint (shared)
@dataclass
class Run:
    """All that a run works on; what the first block holds is saved in checkpoints."""

    agent: nn.Module
    bonus_agent: nn.Module  # whose critics stand behind the bonus
    optimizer: Optimizer
    scheduler: LRScheduler | None  # of learning rates
    buffer: ReplayBuffer
    env: gymnasium.Env  # of the online phase
    phase: str = "offline"
    step: int = 0  # within the phase
    evals: list[tuple] = field(default_factory=list)  # rows of evals.csv
    train_scores: list[float] = field(default_factory=list)  # of online episodes

    device: torch.device | None = None
    threads: int = 1  # of the CPU
    run_dir: Path | None = None
    data_sha256: str | None = None
    varying_dims: Tensor | None = None  # dimensions of observations whose bounds differ
    recorded_step: "Recording | None" = None  # on a GPU: sample_and_update
    recorded_policy: "Recording | None" = None  # on a GPU: agent.act
    compiled: tuple[Callable, Callable] | None = None  # intrinsic_reward and update
    eval_envs: list[gymnasium.Env] = field(default_factory=list)
    writer: SummaryWriter | None = None
    progress: tqdm | None = None
    lock: filelock.BaseFileLock | None = None  # on run_dir; freed when the process ends
    save_due: bool = False
    received: list[str] = field(default_factory=list)  # names of signals that ask it to stop

    def steps_of_phase(self, args: Args) -> int:
        return args.offline_steps if self.phase == "offline" else args.online_steps

    def total_step(self, args: Args) -> int:
        """The step in TensorBoard. Online step 0 has one of its own, after the last offline one."""
        if self.phase == "offline" or args.offline_steps == 0:
            return self.step
        return args.offline_steps + 1 + self.step


def save_checkpoint(run: Run, args: Args) -> None:
    """Write a sealed file beside the old one, then rename: a crash leaves the old one whole."""
    buffer = run.buffer
    checkpoint = {
        "script": Path(__file__).stem,
        "args": asdict(args),
        "data_sha256": run.data_sha256,
        "phase": run.phase,
        "step": run.step,
        "evals": run.evals,
        "train_scores": run.train_scores,
        "agent": run.agent.state_dict(),
        "bonus_agent": run.bonus_agent.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict() if run.scheduler else None,
        "normalizer": {"mean": torch.as_tensor(buffer.mean), "std": torch.as_tensor(buffer.std)},
        "online_rows": buffer.table[buffer.offline_size : buffer.size].clone(),
        "threads": run.threads,
        "rng_cpu": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state(run.device) if run.device.type == "cuda" else None,
        "rng_env": run.env.unwrapped.np_random.bit_generator.state,
    }
    content = io.BytesIO()
    torch.save(checkpoint, content)
    part = run.run_dir / "checkpoint.tmp"
    try:
        with open(part, "wb") as file:
            file.write(content.getbuffer())
            file.write(hashlib.sha256(content.getbuffer()).digest())  # torch notices little damage
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, run.run_dir / "checkpoint.pt")
    except OSError as error:
        fix = f"make room, then go on with --run-dir {run.run_dir} --resume"
        raise OSError(f"{part} cannot be written ({error.strerror}): {fix}") from None


def read_checkpoint(path: Path) -> dict:
    """What save_checkpoint wrote. ValueError unless it is whole and one of this script."""
    content = path.read_bytes()
    body, seal = content[:-32], content[-32:]
    if hashlib.sha256(body).digest() != seal:
        raise ValueError(f"--resume: {path} is damaged: start anew in another --run-dir")
    try:
        checkpoint = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        script, known_args = checkpoint["script"], set(checkpoint["args"])
    except Exception:  # whatever unpickling may raise
        fix = "start anew in another --run-dir"
        raise ValueError(f"--resume: {path} is no checkpoint of a run: {fix}") from None
    if script != Path(__file__).stem:
        raise ValueError(f"--resume: {path} is one of {script}.py: go on with that script")
    if known_args != {field.name for field in fields(Args)}:
        fix = "go on with that version, or start anew in another --run-dir"
        raise ValueError(f"--resume: {path} is one of another version of this script: {fix}")
    return checkpoint


def restore(run: Run, args: Args, checkpoint: dict) -> None:
    """Put a checkpoint into a freshly made run. ValueError if that has other data."""
    if checkpoint["data_sha256"] != run.data_sha256:
        fix = "name its own with --dataset-path"
        raise ValueError(f"--resume: the run in {args.run_dir} has another data file: {fix}")
    run.phase = checkpoint["phase"]
    run.step = checkpoint["step"]
    run.evals = checkpoint["evals"]
    run.train_scores = checkpoint["train_scores"]
    if run.phase == "online" and args.sera_critic == "current":
        run.bonus_agent = run.agent
    try:
        run.bonus_agent.load_state_dict(checkpoint["bonus_agent"])
        run.agent.load_state_dict(checkpoint["agent"])
        run.optimizer.load_state_dict(checkpoint["optimizer"])
    except (RuntimeError, ValueError):
        found = f"the networks in {args.run_dir} are not those of this script"
        fix = "undo what changed them, or start anew in another --run-dir"
        raise ValueError(f"--resume: {found}: {fix}") from None
    prepare_optimizer(run.optimizer, run.device)  # the checkpoint may come from another device
    if run.scheduler:
        run.scheduler.load_state_dict(checkpoint["scheduler"])
    if len(checkpoint["online_rows"]):
        run.buffer.append_rows(checkpoint["online_rows"])
    run.threads = args.threads or checkpoint["threads"]
    run.env.unwrapped.np_random.bit_generator.state = checkpoint["rng_env"]
    torch.set_rng_state(checkpoint["rng_cpu"])
    if run.device.type == "cuda" and checkpoint["rng_cuda"] is not None:
        torch.cuda.set_rng_state(checkpoint["rng_cuda"], run.device)


# ------------------------------ logs (shared)
class ProgressBar(tqdm):
    """A bar with steps per second and time left, which a closed terminal does not stop."""

    def display(self, *args, **options):
        with contextlib.suppress(OSError):
            return super().display(*args, **options)

    def close(self):
        with contextlib.suppress(OSError):
            super().close()


def progress_bar(run: "Run", steps: int) -> ProgressBar:
    """The bar of a phase, wherever in it the run is."""
    options = {"desc": run.phase, "unit": " steps", "mininterval": 1}
    run.progress = ProgressBar(total=steps, initial=run.step, **options)
    return run.progress


def say(text: str) -> None:
    """Print a line; a closed terminal is no reason to stop."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def check_finite(run: "Run", logs: dict[str, Tensor]) -> None:
    """FloatingPointError if a number to log or a parameter is NaN or infinite."""
    for name, value in (logs | dict(run.agent.named_parameters())).items():
        if not value.isfinite().all():
            raise FloatingPointError(
                f"{name} became NaN or infinite by {run.phase} step {run.step}: "
                f"{run.run_dir} has the last good checkpoint"
            )


def log_episode(run: "Run", args: Args, episode_return: float) -> None:
    """Return and score of an online episode, exploration included, and the regret so far."""
    run.writer.add_scalar("train/return", float(episode_return), run.total_step(args))
    score = normalized_score(args.env, episode_return)
    if score is None:
        return
    run.train_scores.append(float(score))
    regret = 1 - np.mean(run.train_scores) / 100
    run.writer.add_scalar("train/score", run.train_scores[-1], run.total_step(args))
    run.writer.add_scalar("train/regret", regret, run.total_step(args))


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for module in (torch, gymnasium, mujoco, np, h5py):
        found[module.__name__] = module.__version__
    return found


def start_logs(run: Run, args: Args, config: dict) -> None:
    """Weights & Biases if wanted, config.json, and TensorBoard, with the arguments as a table."""
    if args.track:
        track(run, args, config)  # first: it can fail, and then there is no run yet
    save_checkpoint(run, args)  # from here on --resume finds one
    (run.run_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    wait_for_next_second(run.run_dir)
    purge_step = run.total_step(args) + 1 if run.step else 0  # what a killed run wrote after that
    run.writer = SummaryWriter(run.run_dir, purge_step=purge_step)
    rows = "\n".join(f"|{name}|{value}|" for name, value in asdict(args).items())
    table = f"|argument|value|\n|-|-|\n{rows}"
    run.writer.add_text("arguments", table, run.total_step(args))


def wait_for_next_second(run_dir: Path) -> None:
    """Files of events are read in the order of their names, and those begin with the second."""
    seconds = [int(path.name.split(".")[3]) for path in run_dir.glob("events.out.tfevents.*")]
    if seconds:
        wait = max(seconds) + 1 - time.time()
        time.sleep(min(max(wait, 0), 5))  # no longer, if the clock of another machine was ahead


def track(run: Run, args: Args, config: dict) -> None:
    """Send to Weights & Biases what TensorBoard gets; a resumed run continues its own curve."""
    import wandb  # its presence was checked with the arguments

    id_file = run.run_dir / "wandb_id.txt"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    try:
        wandb.init(
            project=args.wandb_project,
            entity=args.wandb_entity,
            name=run.run_dir.name,
            id=id_file.read_text(),
            resume="allow",
            config=config["args"] | {"versions": config["versions"]},
            dir=run.run_dir,
            sync_tensorboard=True,
        )
    except wandb.errors.Error as error:
        fix = "run wandb login, or set WANDB_MODE=offline"
        raise ValueError(f"--track: {error}: {fix}") from None


# ------------------------------ setting up and main (shared)
# What --resume lets change: these alter no result but by chance, as another device rounds and draws
# differently, and compiled code too; the others none before the online phase.
RESUME_MAY_CHANGE = {
    "run_dir",
    "resume",
    "dataset_path",
    "device",
    "threads",
    "cudagraphs",
    "compile",
    "checkpoint_every",
    "log_every",
    "track",
    "wandb_project",
    "wandb_entity",
    "capture_video",
}
OFFLINE_RESUME_MAY_CHANGE = {
    "updates_per_step",
    "online_sampling",
    "mixing_ratio",
    "bc_online",  # this and the next are TD3+BC's
    "bc_anneal_steps",
    "sera_coef",
    "sera_k",
    "sera_pool",
    "sera_bonus",
    "sera_critic",
    "sera_scale",
}


def parse_args(argv: list[str] | None = None, checkpoint: dict | None = None) -> Args:
    """Defaults, the preset of --env (or a resumed run's arguments), then the user's."""
    if checkpoint:
        default = Args(**checkpoint["args"])
    else:
        first_look, _ = tyro.cli(Args, args=argv, add_help=False, return_unknown_args=True)
        default = Args(env=first_look.env)
        for start in sorted(PRESETS, key=len):
            if first_look.env.startswith(start):
                vars(default).update(PRESETS[start])
    args = tyro.cli(Args, args=argv, default=default)
    expand_paths(args)
    check_args(args)
    if checkpoint:
        check_resumed_args(args, checkpoint)
    return args


def expand_paths(args: Args) -> None:
    """A ~ in a path is the home folder, also where the shell leaves it, as in --run-dir=~/a."""
    for name in ("dataset_path", "run_dir"):
        value = getattr(args, name)
        setattr(args, name, value and os.path.expanduser(value))


# Arguments, or the ends of their names; no script has all of them.
FROM_0_TO_1 = ("gamma", "tau", "mixing_ratio", "actor_dropout", "expectile")
AT_LEAST_0 = ("_lr", "_noise", "noise_clip", "weight_decay")


def check_args(args: Args) -> None:
    """ValueError for values that would fail late, or silently do something else."""
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')}"
        if type(value) is int:
            least = 0 if name.endswith(("_steps", "seed", "_starts", "_pool")) else 1
            if value < least:
                raise ValueError(f"{flag} is {value}: give a whole number of at least {least}")
        elif name in FROM_0_TO_1 and not 0 <= value <= 1:
            raise ValueError(f"{flag} is {value}: give a number from 0 to 1")
        elif name.endswith(AT_LEAST_0) and not 0 <= value < math.inf:
            raise ValueError(f"{flag} is {value}: give a finite number of at least 0")
        elif name == "awac_lambda" and not 0 < value < math.inf:
            raise ValueError(f"{flag} is {value}: give a finite number above 0")
        elif type(value) is float and not math.isfinite(value):
            raise ValueError(f"{flag} is {value}: give a finite number")
    if args.seed >= 2**63:
        raise ValueError(f"--seed is {args.seed}: give a whole number of at most {2**63 - 1}")
    if args.offline_steps + args.online_steps == 0:
        raise ValueError("--offline-steps and --online-steps are both 0: raise one of them")
    from_scratch = args.offline_steps == 0 and args.mixing_ratio == 0
    if from_scratch and args.online_steps <= args.learning_starts:
        fix = f"give less than --online-steps {args.online_steps}, or nothing is learned"
        raise ValueError(f"--learning-starts is {args.learning_starts}: {fix}")
    if from_scratch and args.online_steps <= args.batch_size:
        fix = f"give less than --online-steps {args.online_steps}, or nothing is learned"
        raise ValueError(f"--batch-size is {args.batch_size}: {fix}")
    needs_neighbours = args.sera_coef and args.sera_bonus != "constant"
    if needs_neighbours and args.sera_pool == 0 and args.sera_k >= args.batch_size:
        fix = f"give less than --batch-size {args.batch_size}"
        raise ValueError(f"--sera-k is {args.sera_k}: {fix}")
    if needs_neighbours and 0 < args.sera_pool < args.sera_k:
        fix = f"give at most --sera-pool {args.sera_pool}"
        raise ValueError(f"--sera-k is {args.sera_k}: {fix}")
    if args.track and importlib.util.find_spec("wandb") is None:
        raise ValueError("--track needs Weights & Biases: pip install wandb")
    if args.device == "cuda" and not torch.cuda.is_available():
        fix = "use --device cpu or auto"
        raise ValueError(f"--device is cuda, but torch finds no GPU here: {fix}")


def check_resumed_args(args: Args, checkpoint: dict) -> None:
    """ValueError, naming them all, for arguments that would make it another run than it was."""
    allowed = RESUME_MAY_CHANGE
    offline = checkpoint["phase"] == "offline"
    if offline:
        allowed = allowed | OFFLINE_RESUME_MAY_CHANGE
    changed = []
    for name, old in checkpoint["args"].items():
        new = getattr(args, name)
        longer = name == "online_steps" or (name == "offline_steps" and offline)
        more_steps = longer and new > old
        if new != old and name not in allowed and not more_steps:
            changed.append(f"--{name.replace('_', '-')} {old}")
    if changed:
        has = ", ".join(changed)
        raise ValueError(f"--resume: this run has {has}: keep that, or start anew")


def find_checkpoint(
    argv: list[str] | None,
) -> tuple[dict, filelock.BaseFileLock] | tuple[None, None]:
    """With --resume, the checkpoint in --run-dir and the lock on that folder, if a run is there.

    The lock comes first: a run that still lives there may be about to write a newer one.
    """
    args, _ = tyro.cli(Args, args=argv, add_help=False, return_unknown_args=True)
    expand_paths(args)
    if not args.resume:
        return None, None
    if args.run_dir is None:
        raise ValueError("--resume needs --run-dir, the folder of the run to go on with")
    path = Path(args.run_dir, "checkpoint.pt")
    if not path.exists():
        if Path(args.run_dir, "config.json").exists():
            raise ValueError(f"--resume: there is no checkpoint {path}: name another --run-dir")
        say(f"--resume: no run in {args.run_dir} yet, so one starts there")
        return None, None
    lock = lock_run_dir(Path(args.run_dir))
    return read_checkpoint(path), lock


def lock_run_dir(run_dir: Path) -> filelock.BaseFileLock:
    """Keep all other runs out of a folder until this process ends. ValueError if one is in it."""
    lock = filelock.FileLock(run_dir / "in_use_by_a_run.lock", fallback_to_soft=False)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        acquire(lock, timeout=0)
    except filelock.Timeout:
        found = f"--run-dir {run_dir} is in use by another run ({lock.lock_file})"
        raise ValueError(f"{found}: wait for it, or name another folder") from None
    except OSError as error:
        found = f"--run-dir {run_dir} cannot be used ({error.strerror})"
        raise ValueError(f"{found}: name another folder") from None
    return lock


# What a file system without locks answers; the last two are one number on Linux and two on macOS.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


def acquire(lock: filelock.BaseFileLock, timeout: float = -1) -> None:
    """Take a lock, or go on with a warning where the file system has none."""
    try:
        lock.acquire(timeout=timeout)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        folder = Path(lock.lock_file).parent
        say(f"{folder} has no locks ({error.strerror}): going on, let no other run use it")


def new_run_dir(args: Args) -> Path:
    """A folder that no other run has, also if that starts in the same second."""
    env = re.sub(r"[^\w.-]+", "-", args.env)  # as in module:Name-v0
    name = f"runs/{env}__{Path(__file__).stem}__{args.seed}__{int(time.time())}"
    for number in range(1, 1000):
        run_dir = Path(name if number == 1 else f"{name}_{number}")
        try:
            run_dir.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            found = f"{run_dir} cannot be made ({error.strerror})"
            raise ValueError(f"{found}: name another folder with --run-dir") from None
        return run_dir
    raise ValueError(f"{name} and a thousand others are there: name a folder with --run-dir")


def choose_matmul(device: torch.device) -> None:
    """Let the faster library multiply float32 matrices.

    On a GPU that is TF32, as the authors' JAX code has it on such cards. On a CPU, MKL is slow on
    all processors but Intel's, and "medium" means oneDNN, held to float32 by ONEDNN_MAX_CPU_ISA.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        return
    cpu = Path("/proc/cpuinfo")
    if not cpu.exists() or "GenuineIntel" in cpu.read_text():
        return
    torch.set_float32_matmul_precision("medium")
    x = torch.linspace(-1, 1, 256 * 256).reshape(256, 256).sin()
    exact = x.double() @ x.double()
    bound = (x.abs() @ x.abs()).max()  # rounding is relative to this, whatever cancels
    error = (x @ x - exact).abs().max() / bound
    if error > 1e-5:
        torch.set_float32_matmul_precision("highest")
        say(f"oneDNN rounds float32 products (error {error:.0e}): going on with MKL")


def choose_threads(run: Run, args: Args) -> int:
    """CPU threads: as --threads or OMP_NUM_THREADS say, else by timing updates with a few numbers.

    More threads are taken only if they are a fifth faster; four at most.
    """
    if args.threads:
        return args.threads
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    if run.device.type == "cuda" or run.buffer.size == 0:
        return 1
    rng_state = torch.get_rng_state()
    rates = {}
    for threads in (1, 2, 4):
        if threads <= torch.get_num_threads() or threads == 1:
            rates[threads] = updates_per_second(run, args, threads)
    torch.set_rng_state(rng_state)
    best = 1
    for threads, rate in rates.items():
        if rate > 1.2 * rates[best]:
            best = threads
    timed = ", ".join(f"{threads}: {rate:.0f}/s" for threads, rate in rates.items())
    say(f"threads: {best} (updates with {timed})")
    return best


def updates_per_second(run: Run, args: Args, threads: int, seconds: float = 0.4) -> float:
    """Speed of updates of a copy of the agent, which is thrown away."""
    all_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    agent, optimizer = copy.deepcopy((run.agent, run.optimizer))
    kind = StepKind(False, BatchRows(dataset=args.batch_size), policy_due=True, log=False)

    def one_update() -> None:
        update(agent, optimizer, run.buffer.sample(kind.rows), args, kind)

    for _ in range(2):  # these warm up
        one_update()
    count = 0
    start = time.perf_counter()
    while count < 2 or time.perf_counter() - start < seconds:
        one_update()
        count += 1
    rate = count / (time.perf_counter() - start)
    torch.set_num_threads(all_threads)
    return rate


def keep_large_blocks() -> None:
    """Make glibc keep freed memory: what the kernel hands out anew, it clears, which takes time."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    if not libc.mallopt(mmap_threshold, 2**30):
        libc.mallopt(mmap_threshold, 2**25)  # the most that older versions take
    libc.mallopt(trim_threshold, 2**31 - 1)


def set_up(
    args: Args, checkpoint: dict | None = None, lock: filelock.BaseFileLock | None = None
) -> Run:
    """Data, networks, environments, folder: all that bad input can make fail, before training."""
    keep_large_blocks()
    # Adam's moments of idle units fade to numbers below 1e-38, which a CPU multiplies many times
    # more slowly. Before any thread is started: threads inherit it.
    torch.set_flush_denormal(True)
    if args.run_dir and Path(args.run_dir, "config.json").exists() and not checkpoint:
        fix = "add --resume, or name another folder"
        raise ValueError(f"--run-dir {args.run_dir} already holds a run: {fix}")
    use_cuda = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if use_cuda else "cpu")

    data, data_file, data_sha256 = load_data(args)
    choose_matmul(device)
    torch.manual_seed(args.seed)
    task = find_task(args.env)
    agent = Agent(task.observation_dim, task.action_dim, args).to(device)
    optimizer, scheduler = make_optimizer(agent, args)
    run = Run(
        agent=agent,
        bonus_agent=copy.deepcopy(agent),
        optimizer=optimizer,
        scheduler=scheduler,
        buffer=ReplayBuffer(data, args, device),
        env=make_env(args.env, args.physics),
        device=device,
        data_sha256=data_sha256,
    )
    if data is None:
        run.buffer.append(no_transitions(task))  # lays out the table, also for rows of a checkpoint
    # By the bounds of the space, not by the data: of ant's 111, 84 have low = high = 0.
    space = run.env.observation_space
    run.varying_dims = torch.from_numpy(np.flatnonzero(space.low < space.high)).to(device)
    if checkpoint:
        restore(run, args, checkpoint)
    else:
        run.threads = choose_threads(run, args)
    torch.set_num_threads(run.threads)  # first: another number rounds differently
    if run.phase == "online":
        store_bonus_q(run, args, 0, run.buffer.offline_size)
    if device.type == "cuda":
        record_steps(run, args)
    if args.compile == "yes" or (args.compile == "auto" and device.type == "cuda"):
        run.compiled = compile_functions(run)
    run.run_dir = Path(args.run_dir) if args.run_dir else new_run_dir(args)
    run.lock = lock or lock_run_dir(run.run_dir)
    video_dirs = [None] * args.eval_episodes
    if args.capture_video:
        video_dirs[0] = run.run_dir / "videos"
    run.eval_envs = [make_env(args.env, args.physics, video_dir) for video_dir in video_dirs]
    config = {
        "script": Path(__file__).stem,
        "env_id": task.env_id,
        "args": asdict(args),
        "data_file": data_file,
        "data_sha256": data_sha256,
        "device": device.type,
        "threads": run.threads,
        "versions": versions(),
    }
    start_logs(run, args, config)
    say_what_runs(run, args)
    return run


def say_what_runs(run: Run, args: Args) -> None:
    """The first line of a run, and a second one if its bonus comes from untrained critics."""
    parts = [f"{args.env}: {run.buffer.offline_size:,} transitions"]
    if is_of_gym_mujoco(find_task(args.env)):
        parts.append(f"physics of {args.physics}, mujoco {mujoco.__version__}")
    parts.append("cuda" if run.device.type == "cuda" else f"cpu, threads {run.threads}")
    parts.append(str(run.run_dir))
    say("; ".join(parts))
    if args.offline_steps == 0 and args.sera_critic == "offline" and bonus_q_is_stored(args):
        fix = "--sera-critic current has those that learn"
        say(f"--offline-steps 0: the critics behind the bonus are untrained and stay so: {fix}")


def load_data(args: Args) -> tuple[dict[str, np.ndarray] | None, str | None, str | None]:
    """The dataset, its file and that file's SHA-256, if the run has any use for one."""
    if args.offline_steps == 0 and args.mixing_ratio == 0:
        return None, None, None
    task = find_task(args.env)
    path = fetch_dataset(args.env, args.dataset_path)
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    genuine = bool(task.sha256) and sha256.startswith(task.sha256)
    if task.sha256 and not args.dataset_path and not genuine:
        fix = "delete it, and it will be fetched again"
        raise ValueError(f"{path} is not D4RL's file (its SHA-256 is another): {fix}")
    data = load_d4rl(args.env, path, args.clip_actions)
    if args.dataset_path and not genuine:
        check_trajectories(data, task, path)
    if args.env.startswith("antmaze-") and not (data["rewards"] > 0).any():
        fix = "give a file with successes"
        raise ValueError(f"{path} never reaches the goal (no reward > 0): {fix}")
    return data, str(path), sha256


def stop_on_signals(run: Run) -> None:
    """Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 ask for a checkpoint, then an end.

    Online the checkpoint waits for the end of the episode, as environments cannot be saved.
    SIGUSR1 is what clusters send some time before the end, if they are asked to.
    """

    def remember(number, frame):
        when = "after this update" if run.phase == "offline" else "at the end of the episode"
        run.received.append(signal.Signals(number).name)
        say(f"\n{run.received[-1]}: a checkpoint follows {when}")

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        number = getattr(signal, name, None)  # not every system has all of them
        if number and signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, remember)


def main(argv: list[str] | None = None) -> None:
    """Run the script. Bad input ends in one sentence on stderr and exit code 2."""
    try:
        checkpoint, lock = find_checkpoint(argv)
        args = parse_args(argv, checkpoint)
        run = set_up(args, checkpoint, lock)
    except (ValueError, OSError, gymnasium.error.Error) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit("stopped before training began")
    if argv is None:  # a program of its own; else signals belong to the caller
        stop_on_signals(run)
    try:
        train(run, args)
    except (OSError, FloatingPointError) as error:  # full disk, NaN; all else is a bug: show where
        fail(error)
    finally:
        for env in run.eval_envs:
            env.close()


def fail(error: Exception) -> None:
    """One line on stderr, below the bar if there is one, and exit code 2."""
    with contextlib.suppress(OSError):
        tqdm.write(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(2) from None


if __name__ == "__main__":
    main()
