# ------------------------------ the algorithm
"""CQL with SERA: conservative Q-learning on a data set, then online with an exploration bonus.

CQL: Kumar et al. 2020, arXiv 2006.04779, in its form CQL(H) with importance sampling.
SERA: Sample Efficient Reward Augmentation, arXiv 2310.19805, later renamed QCSE.

j = 1, 2 numbers the critics Q_j and their targets Q'_j, pi is the policy, d = dim(s), |A| = dim(a), and
m = 1 - terminal: time-outs bootstrap, terminals do not.

(1) target        y = r + gamma m min_j Q'_j(s', a'),  a' ~ pi(s')       (--max-backup: the best of 10 a')
(2) conservatism  C_j = mean[ logsumexp_a( Q_j(s, a) - log mu(a) ) - Q_j(s, a_data) ],  over 30 actions a:
                  10 uniform, 10 from pi(s), 10 from pi(s') but evaluated at s; mu is their density
(3) critics       L_Q = sum_j [ mean (Q_j(s, a) - y)^2 + w C_j ]
    Lagrange      L_Q = sum_j [ mean (Q_j(s, a) - y)^2 + w' w (C_j - g) ],  L_w' = -1/2 sum_j w' w (C_j - g)
(4) policy        L_pi = mean( alpha log pi(a|s) - min_j Q_j(s, a) ),  a ~ pi(s)
(5) temperature   L_alpha = -mean( log alpha (log pi(a|s) - |A|) )

SERA, online only, puts r + lambda tanh(H) in place of r in (1), never in stored rewards or scores. For rows
i, j of the batch and q_i = min_j Q_j(s_i, a_i), or, with --sera-bonus v, the same at tanh(mean of pi):

(S1) rho_i = k-th smallest over j != i of max( |s_i - s_j|, |q_i - q_j| )
(S2) n_i   = #{ j != i : |q_i - q_j| < rho_i }
(S3) H_i   = psi(n_i + 1) / d + log(2 rho_i)
"""

# ------------------------------ imports (shared)
import copy
import ctypes
import hashlib
import io
import itertools
import json
import math
import os
import signal
import sys
import time
import warnings
from collections import namedtuple
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import gymnasium
import h5py
import mujoco
import numpy as np
import torch
import tyro
from filelock import FileLock
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# ------------------------------ arguments
@dataclass
class Args:
    """CQL with SERA: train on a D4RL data set, then go on online."""

    # ------------------------------ common arguments (shared)
    env: str = "hopper-medium-v2"  # D4RL data set of Gym-MuJoCo or AntMaze, or the bundled hopper-medium-mini
    dataset_path: str | None = None  # HDF5 file in D4RL's format, used in place of the data set's own
    physics: Literal["d4rl", "gymnasium"] = "d4rl"  # masses and margins of D4RL's MuJoCo, or -v4 as shipped
    seed: int = 1  # seed of networks, batches and environment
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes a GPU if there is one
    run_dir: str | None = None  # output folder; by default runs/<env>__<script>__<seed>__<time>
    offline_steps: float = 250_000  # updates on the data set before the first online step; 0 skips them
    online_steps: float = 250_000  # environment steps, one update each
    eval_every: float = 5_000  # steps between evaluations; each phase also ends with one
    eval_episodes: int = 10  # episodes of an evaluation
    checkpoint_every: float = 25_000  # steps between checkpoints; each phase also ends with one
    resume: bool = False  # go on from the checkpoint in --run-dir; its arguments are the defaults
    batch_size: int = 256  # rows of a batch
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # Polyak rate of the target networks
    mixing_ratio: float = 0.5  # share of data-set rows in an online batch
    normalize_observations: bool = True  # to mean 0, standard deviation 1 over the data set
    normalize_rewards: bool = False  # multiply rewards by 1000 / (best - worst return of the data set)
    reward_scale: float = 1.0  # then multiply rewards by this
    reward_bias: float = 0.0  # and add this; scores and logged returns keep the environment's own rewards
    sera_coef: float = 1.0  # lambda, the weight of the bonus; 0 is exactly the plain algorithm
    sera_k: int = 10  # which nearest neighbour sets the radius
    sera_bonus: Literal["q", "v", "state", "constant"] = "q"  # SERA, V for Q (VCSE), s alone, lambda itself
    sera_critic: Literal["offline", "current", "random"] = "offline"  # frozen at the switch, live, untrained
    sera_scale: Literal["none", "dim"] = "none"  # the paper's formula, or states / dim and standardised q

    # ------------------------------ CQL arguments
    actor_lr: float = 1e-4  # learning rate of policy and temperature
    critic_lr: float = 3e-4  # learning rate of critics and Lagrange multiplier
    hidden_dim: int = 256  # width of the hidden layers
    actor_layers: int = 2  # hidden layers of the policy
    critic_layers: int = 2  # hidden layers of a critic
    cql_weight: float = 5.0  # w, weight of the conservative term
    cql_actions: int = 10  # actions from each of the three sources in the conservative term
    cql_lagrange: bool = False  # tune w' so that the conservative term comes to --cql-gap
    cql_gap: float = 0.8  # g, with --cql-lagrange
    max_backup: bool = False  # back up the best of --cql-actions next actions in place of a single one


# What differs from the defaults, by the start of the data set's name; longer starts win. Defaults: WSRL's for
# Gym-MuJoCo (arXiv 2412.07762), offline to online. AntMaze: the Cal-QL authors'. sera_k: the SERA paper's.
PRESETS = {
    "hopper-medium-mini": {"offline_steps": 3_000, "online_steps": 1_500, "eval_every": 500},
    "walker2d": {"sera_k": 20},
    "antmaze": {"offline_steps": 1_000_000, "eval_every": 25_000, "eval_episodes": 100, "sera_k": 25}
    | {"normalize_observations": False, "reward_scale": 10.0, "reward_bias": -5.0}
    | {"critic_layers": 4, "cql_lagrange": True, "max_backup": True},
}


# ------------------------------ networks: twin critics (shared)
def mlp(input_dim: int, hidden_dim: int, layers: int, output_dim: int) -> nn.Sequential:
    """A plain network with that many hidden layers: (..., input_dim) -> (..., output_dim)."""
    widths = [input_dim] + [hidden_dim] * layers
    hidden = [m for shape in itertools.pairwise(widths) for m in (nn.Linear(*shape), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(widths[-1], output_dim))


class TwinCritics(nn.Module):
    """Q_1 and Q_2, or Q_1 alone, in one batched product per layer: (..., d), (..., a) -> (count, ...)."""

    def __init__(self, observation_dim: int, action_dim: int, hidden_dim: int, layers: int):
        super().__init__()
        widths = [observation_dim + action_dim] + [hidden_dim] * layers + [1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise(widths):
            bound = 1 / math.sqrt(fan_in)  # as nn.Linear
            self.weights.append(torch.empty(2, fan_in, fan_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(2, 1, fan_out).uniform_(-bound, bound))

    def forward(self, observations: Tensor, actions: Tensor, count: int = 2) -> Tensor:
        inputs = torch.cat([observations, actions], dim=-1)
        x = inputs.reshape(1, -1, inputs.shape[-1]).expand(count, -1, -1)
        *hidden, (last_weight, last_bias) = zip(self.weights, self.biases)
        for weight, bias in hidden:
            x = torch.baddbmm(bias[:count], x, weight[:count]).relu_()
        q_values = (x * last_weight[:count].mT).sum(-1) + last_bias[:count, 0]  # a thin bmm is slower
        return q_values.reshape(count, *inputs.shape[:-1])


# ------------------------------ networks: policy
class Actor(nn.Module):
    """Gaussian before the tanh: observations (..., d) -> mean (..., a), log_std (..., a)."""

    def __init__(self, observation_dim: int, action_dim: int, hidden_dim: int, layers: int):
        super().__init__()
        self.layers = mlp(observation_dim, hidden_dim, layers, 2 * action_dim)
        self.log_std_scale = nn.Parameter(torch.tensor(1.0))  # trained, as in the authors' code
        self.log_std_offset = nn.Parameter(torch.tensor(-1.0))

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.layers(observations).chunk(2, dim=-1)
        return mean, torch.clamp(self.log_std_scale * log_std + self.log_std_offset, -20, 2)


def squash(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Actions tanh(u), u = mean + std noise (..., a), and their exact log-density (...), finite for any u."""
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    # log(1 - tanh(u)^2) in a form that holds for all u; the usual log(1 - a^2 + 1e-6) fails beyond |u| = 7
    return torch.tanh(u), (log_normal - 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))).sum(-1)


def make_networks(observation_dim: int, action_dim: int, args: Args) -> tuple[nn.ModuleDict, Optimizer]:
    """All networks by name, and the optimiser of the trained ones."""
    actor = Actor(observation_dim, action_dim, args.hidden_dim, args.actor_layers)
    critics = TwinCritics(observation_dim, action_dim, args.hidden_dim, args.critic_layers)
    bound = math.sqrt(3 * 1e-2 / args.hidden_dim)  # the authors' last layers: variance 1e-2 / width, no bias
    last = actor.layers[-1]
    for weight, bias in ((last.weight, last.bias), (critics.weights[-1], critics.biases[-1])):
        nn.init.uniform_(weight, -bound, bound)
        nn.init.zeros_(bias)
    networks = nn.ModuleDict({"actor": actor, "critics": critics, "target_critics": copy.deepcopy(critics)})
    networks["temperature"] = nn.ParameterDict({"log_alpha": torch.tensor(0.0)})
    networks["lagrange"] = nn.ParameterDict({"log_multiplier": torch.tensor(1.0)})
    rates = {"actor": args.actor_lr, "critics": args.critic_lr, "temperature": args.actor_lr}
    rates["lagrange"] = args.critic_lr
    groups = [{"params": networks[name].parameters(), "lr": rate} for name, rate in rates.items()]
    return networks.to(args.device), torch.optim.Adam(groups, fused=True)


def act(networks: nn.ModuleDict, observations: Tensor, deterministic: bool) -> Tensor:
    """Actions (B, a) for normalised observations (B, d): the squashed mean, or a sample to explore."""
    mean, log_std = networks["actor"](observations)
    return torch.tanh(mean if deterministic else mean + log_std.exp() * torch.randn_like(mean))


def state_value(networks: nn.ModuleDict, observations: Tensor) -> Tensor:
    """V(s) for --sera-bonus v: min_j Q_j at the policy's mean action, (B, d) -> (B,)."""
    return networks["critics"](observations, act(networks, observations, deterministic=True)).amin(0)


# ------------------------------ SERA bonus (shared)
def q_conditioned_entropy(observations: Tensor, q_values: Tensor, k: int, logs: dict | None = None) -> Tensor:
    """The bare estimate H_i of eqs. (S1) to (S3), without scaling or tanh: float32 (B, d), (B,) -> (B,).

    Up to a constant, d mean(H_i) - psi(k) is the KSG estimate (Kraskov et al. 2004) of the entropy of states
    given their value, in nats. logs, if given, takes numbers to watch. ValueError unless 1 <= k < B.
    """
    batch_size, dimension = observations.shape
    if not 1 <= k < batch_size:
        raise ValueError(f"k is {k}, but {batch_size} rows allow 1 to {batch_size - 1}")
    # Exact distances: cdist's matrix-product shortcut loses 10 to 30% on close neighbours. n compares the
    # very floats that set rho, so that the k-th neighbour itself is not counted (KSG's strict <).
    q_distances = (q_values[:, None] - q_values).abs().fill_diagonal_(torch.inf)  # no row neighbours itself
    distances = torch.cdist(observations, observations, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = torch.maximum(distances, q_distances).topk(k, largest=False, sorted=False).values
    radii = nearest.amax(1).clamp_min(1e-6)  # of equal rows: log stays finite
    counts = (q_distances < radii[:, None]).sum(1)
    if logs is not None:
        logs |= {"sera/neighbours": counts.float().mean(), "sera/floored": radii.le(1e-6).float().mean()}
    psi = torch.arange(1, batch_size + 1, dtype=torch.float64, device=radii.device).digamma()  # psi[n]: n + 1
    return (psi[counts] / dimension).to(radii.dtype) + torch.log(2 * radii)


@torch.no_grad()
def sera_bonus(networks: nn.ModuleDict, batch: dict, live: Tensor, args: Args) -> tuple[Tensor, dict]:
    """lambda tanh(H) for every row (B,), and numbers to log. live: the state dimensions that ever change."""
    if args.sera_bonus == "constant":
        return torch.full_like(batch["rewards"], args.sera_coef), {}
    observations, logs = batch["observations"], {}
    q_values = torch.zeros_like(batch["rewards"])  # one value for all: the entropy of the state alone
    if args.sera_bonus == "q":
        q_values = networks["critics"](observations, batch["actions"]).amin(0)
    elif args.sera_bonus == "v":
        q_values = state_value(networks, observations)
    if args.sera_scale == "dim":  # as VCSE's SAC does; ant has 84 dimensions that never change
        observations = observations[:, live] / len(live)
        q_values = (q_values - q_values.mean()) / torch.sqrt(q_values.var(correction=0) + 1e-5)
    bonus = torch.tanh(q_conditioned_entropy(observations, q_values, args.sera_k, logs))
    logs |= {"sera/bonus_mean": bonus.mean(), "sera/bonus_sd": bonus.std()}
    logs["sera/above_0.95"] = (bonus > 0.95).float().mean()
    return args.sera_coef * bonus, logs


# ------------------------------ losses and update
episode_columns = None  # nothing is added to the rows, and an online row may be sampled at once


def conservative_term(q_values: Tensor, log_densities: Tensor) -> Tensor:
    """C_j of eq. (2), (2,): from Q_j (2, B, 1 + 3n) of the data's and the sampled actions, log mu (B, 3n)."""
    q_data, q_sampled = q_values[..., 0], q_values[..., 1:]
    return ((q_sampled - log_densities).logsumexp(-1) - q_data).mean(1)


def update(state: SimpleNamespace, batch: dict, args: Args) -> dict:
    """One step of every network on one batch; returns what to log, left on the device."""
    networks, optimizer = state.networks, state.optimizer
    actor, critics, target_critics = networks["actor"], networks["critics"], networks["target_critics"]
    log_alpha, log_multiplier = networks["temperature"]["log_alpha"], networks["lagrange"]["log_multiplier"]
    observations, next_observations = batch["observations"], batch["next_observations"]
    batch_size, action_dim, n = *batch["actions"].shape, args.cql_actions

    # Policy and temperature, eqs. (4) and (5), from one sample; frozen critics only pass the gradient on.
    mean, log_std = actor(observations)
    new_actions, log_prob = squash(mean, log_std, torch.randn_like(mean))  # (B, a), (B,)
    critics.requires_grad_(False)
    actor_loss = (log_alpha.detach().exp() * log_prob - critics(observations, new_actions).amin(0)).mean()
    critics.requires_grad_(True)
    alpha_loss = -(log_alpha * (log_prob.detach() - action_dim)).mean()

    # All other actions, from one pass of the policy per state, and the target, eq. (1).
    with torch.no_grad():
        next_mean, next_log_std = actor(next_observations)
        noise = torch.randn(2, batch_size, n, action_dim, device=observations.device)
        uniform_actions = torch.rand_like(noise[0]) * 2 - 1
        policy_actions, policy_log_prob = squash(mean[:, None], log_std[:, None], noise[0])  # (B, n, a)
        next_actions, next_log_prob = squash(next_mean[:, None], next_log_std[:, None], noise[1])
        uniform_log_prob = torch.full_like(policy_log_prob, -action_dim * math.log(2))
        if args.max_backup:  # the same next actions serve both uses, which correlates the noise, no more
            repeated = next_observations[:, None].expand(-1, n, -1)
            next_q = target_critics(repeated, next_actions).amin(0).amax(1)
        else:
            target_actions, _ = squash(next_mean, next_log_std, torch.randn_like(next_mean))
            next_q = target_critics(next_observations, target_actions).amin(0)
        target_q = batch["rewards"] + args.gamma * (1 - batch["terminals"]) * next_q  # (B,)
        all_actions = torch.cat([batch["actions"][:, None], uniform_actions, policy_actions, next_actions], 1)
        log_densities = torch.cat([uniform_log_prob, policy_log_prob, next_log_prob], 1)  # (B, 3n)

    # Critics, eqs. (2) and (3): both on all 1 + 3n actions in one call.
    q_values = critics(observations[:, None].expand(-1, 1 + 3 * n, -1), all_actions)  # (2, B, 1 + 3n)
    td_loss = (q_values[..., 0] - target_q).square().mean(1).sum()
    conservative = conservative_term(q_values, log_densities)  # (2,)
    if args.cql_lagrange:
        weight = log_multiplier.exp().clamp(0, 1e6) * args.cql_weight
        cql_loss = (weight.detach() * (conservative - args.cql_gap)).sum()
        cql_loss = cql_loss - 0.5 * (weight * (conservative.detach() - args.cql_gap)).sum()
    else:
        cql_loss = args.cql_weight * conservative.sum()

    # The losses share no parameter: one backward pass and one step serve all, as of the networks before it.
    optimizer.zero_grad()
    (actor_loss + alpha_loss + td_loss + cql_loss).backward()
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(target_critics.parameters()), list(critics.parameters()), args.tau)
    logs = {"td": td_loss, "conservative": conservative.mean(), "actor": actor_loss}
    logs |= {"entropy": -log_prob.mean(), "alpha": log_alpha.exp()}
    logs |= {"q_data": q_values[..., 0].mean(), "q_policy": q_values[..., 1 + n : 1 + 2 * n].mean()}
    return {f"losses/{name}": value.detach() for name, value in logs.items()}


# ------------------------------ data (shared)
# Gymnasium id, dimensions, and the returns that D4RL scores as 0 and as 100.
Task = namedtuple("Task", "env_id observation_dim action_dim random_return expert_return")
TASKS = {
    "hopper": Task("Hopper-v4", 11, 3, -20.272305, 3234.3),
    "halfcheetah": Task("HalfCheetah-v4", 17, 6, -280.178953, 12135.0),
    "walker2d": Task("Walker2d-v4", 17, 6, 1.629008, 4592.3),
    "ant": Task("Ant-v4", 111, 8, -325.6, 3879.7),
    "antmaze": Task("{}", 29, 8, 0.0, 1.0),  # Gymnasium's id is the data set's
}
SERVER = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
# Every known data set and its file; v0 has no full-replay and calls medium-replay "mixed".
DATASETS = {"hopper-medium-mini": "data/hopper-medium-mini.hdf5"}  # comes with the repository
KINDS = ("random", "medium", "expert", "medium-expert", "medium-replay", "full-replay")
for task, kind in itertools.product(("hopper", "halfcheetah", "walker2d", "ant"), KINDS):
    file = f"{task}_{kind.replace('-', '_')}"
    DATASETS |= {f"{task}-{kind}-v{v}": f"gym_mujoco_v{v}/{file}-v{v}.hdf5" for v in (1, 2)}
    file = file.replace("medium_replay", "mixed").replace("walker2d_mixed", "walker_mixed")
    DATASETS |= {f"{task}-{kind}-v0": f"gym_mujoco/{file}.hdf5"} if kind != "full-replay" else {}
DATASETS["ant-random-expert-v0"] = "gym_mujoco/ant_random_expert.hdf5"


def find_task(env: str) -> Task:
    """The task of a data set id; ValueError for any other."""
    if env.startswith("antmaze"):
        try:
            from envs import antmaze  # registers the environments, and knows ids and files
        except ImportError:
            raise ValueError(f"--env {env} needs the file envs/antmaze.py beside the script") from None
        DATASETS.update(antmaze.DATASETS)
    if env in DATASETS:
        return TASKS[env.split("-")[0]]
    families = "Gym-MuJoCo or AntMaze (Adroit, kitchen and maze2d are not supported)"
    raise ValueError(f"--env {env} is no data set of {families}: give one such as walker2d-medium-replay-v2")


def find_dataset(env: str, dataset_path: str | None = None) -> Path:
    """The HDF5 file: dataset_path, else bundled, else in D4RL's cache folder, else downloaded into that."""
    cache = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()
    bundled = Path(__file__).resolve().parent / DATASETS[env]
    path = Path(dataset_path or (bundled if bundled.is_file() else cache / bundled.name))
    if path.is_file():
        return path
    if dataset_path or env == "hopper-medium-mini":
        raise FileNotFoundError(f"there is no data file {path}: name one with --dataset-path")
    url = f"{SERVER}/{DATASETS[env]}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        torch.hub.download_url_to_file(url, str(part))
        h5py.File(part).close()  # refuses a truncated file
        return part.rename(path)
    except Exception as error:  # whatever the network or the disk may raise
        fix = f"put it into {cache} (mirror: huggingface.co/datasets/imone/D4RL) or use --dataset-path"
        raise FileNotFoundError(f"could not download {env} ({error}), tried {url}: {fix}") from None


def load_d4rl(env: str, dataset_path: str | None = None) -> dict[str, np.ndarray]:
    """The transitions of a data set: exactly those of d4rl.qlearning_dataset, in the order of the file.

    observations, next_observations (N, d), actions (N, a), rewards (N,) float32; terminals, dones (N,) bool.
    Time-outs and the last row have no next state and are left out; dones marks a trajectory's last kept row.
    A terminal's next state is the next episode's: mask it. ValueError, FileNotFoundError.
    """
    task, path = find_task(env), find_dataset(env, dataset_path)
    widths = {"observations": (task.observation_dim,), "actions": (task.action_dim,)}
    names = ("observations", "actions", "rewards", "terminals", "timeouts")
    try:
        with h5py.File(path, locking=False) as file:  # links and virtual arrays may lead into other files
            raw = {x: file[x] for x in names if isinstance(file.get(x, getlink=True), h5py.HardLink)}
            raw = {x: y for x, y in raw.items() if not (getattr(y, "is_virtual", True) or y.external)}
            raw = {x: np.array(y) for x, y in raw.items() if (y.size or 0) <= 2000 * y.id.get_storage_size()}
    except Exception as error:  # h5py raises all kinds
        raise ValueError(f"{path} cannot be read as HDF5 ({error}): fetch it again") from None
    for name in names:
        if name not in raw:
            raise ValueError(f"{path} has no array '{name}': give a file in D4RL's format")
        array, shape = raw[name], raw["observations"].shape[:1] + widths.get(name, ())
        array = array[:, 0] if array.shape == (*shape, 1) else array  # v1 medium-replay has rewards (N, 1)
        if array.shape != shape or len(array) < 2 or array.dtype.kind not in "fbiu":
            raise ValueError(f"{name} in {path} is {array.dtype} {array.shape}: {env} needs numbers, {shape}")
        good = np.isin(array, (0, 1)) if name in names[3:] else np.abs(array) <= np.finfo(np.float32).max
        if not good.all():
            raise ValueError(f"{name} in {path} has NaN or infinity, or flags other than 0 and 1: mend it")
        raw[name] = array.astype(bool if name in ("terminals", "timeouts") else np.float32)
    keep = np.flatnonzero(~raw["timeouts"][:-1])
    if not len(keep) or np.abs(raw["actions"]).max() > 1 + 1e-6:
        found = f"{len(keep)} transitions, actions up to {np.abs(raw['actions']).max():g}"
        raise ValueError(f"{path} holds {found}: at least one is needed, and actions within [-1, 1]")
    dones = raw["terminals"][keep] | raw["timeouts"][keep + 1]
    dones[-1] = True
    kept = {name: raw[name][keep] for name in ("observations", "actions", "rewards", "terminals")}
    return kept | {"next_observations": raw["observations"][keep + 1], "dones": dones}


class ReplayBuffer:
    """Rows as the networks see them, on the training device: the data set's, then online ones."""

    def __init__(self, data: dict[str, np.ndarray] | None, args: Args):
        self.args, self.columns, self.size, self.capacity = args, {}, 0, args.online_steps
        self.mean, self.std, self.reward_scale = np.float64(0), np.float64(1), np.float64(args.reward_scale)
        if data is not None:  # from scratch there is nothing to normalise by
            self.capacity += len(data["rewards"])
            if args.normalize_observations:
                self.mean = data["observations"].mean(0, dtype=np.float64)
                self.std = data["observations"].std(0, dtype=np.float64) + 1e-3
            if args.normalize_rewards:
                first_rows = np.flatnonzero(np.append(True, data["dones"][:-1]))
                spread = np.ptp(np.add.reduceat(data["rewards"], first_rows, dtype=np.float64))
                self.reward_scale *= 1000 / (spread or 1000)  # equal returns have no range: leave them alone
            self.append(data)
        self.offline_size = self.size

    def normalize(self, observations: np.ndarray) -> np.ndarray:
        return ((observations - self.mean) / self.std).astype(np.float32)

    def append(self, transitions: dict[str, np.ndarray]) -> None:
        """Add transitions, named as by load_d4rl; the one way in for data-set and online rows."""
        rewards = self.reward_scale * transitions["rewards"] + self.args.reward_bias
        transitions = transitions | {"rewards": rewards}
        rows = {name: transitions[name].astype(np.float32) for name in ("rewards", "terminals")}
        rows |= {name: self.normalize(transitions[name]) for name in ("observations", "next_observations")}
        rows["actions"] = transitions["actions"].clip(-1 + 1e-5, 1 - 1e-5)  # a tanh has no density at 1
        self.write(rows | (episode_columns(transitions, self.args) if episode_columns else {}))

    def write(self, rows: dict) -> None:
        start, self.size = self.size, self.size + len(rows["rewards"])
        for name, column in rows.items():
            if name not in self.columns:
                self.columns[name] = torch.zeros(self.capacity, *column.shape[1:], device=self.args.device)
            self.columns[name][start : self.size] = torch.as_tensor(column)

    def sample(self, offline_rows: int, online_rows: int) -> dict[str, Tensor]:
        """A batch of copies, drawn on the device with replacement, data-set rows first."""
        ranges = (0, self.offline_size, offline_rows), (self.offline_size, self.size, online_rows)
        indices = torch.cat([torch.randint(*ends, (n,), device=self.args.device) for *ends, n in ranges if n])
        return {name: column[indices] for name, column in self.columns.items()}


# ------------------------------ environment and evaluation (shared)
def use_d4rl_physics(env: gymnasium.Env) -> None:
    """Give a MujocoEnv the inertias and margins of D4RL's MuJoCo (before 2.1.2), in place.

    There a capsule of radius r and half length h weighed as a cylinder of length 2h + r, so compile that; and
    of the margins of two touching geoms the larger counted, where since 3.5.0 they add up.
    """
    spec = mujoco.MjSpec.from_file(env.fullpath)
    for geom in spec.geoms:
        if geom.type == mujoco.mjtGeom.mjGEOM_CAPSULE:
            geom.type = mujoco.mjtGeom.mjGEOM_CYLINDER
            start, end = geom.fromto[:3], geom.fromto[3:]
            if np.isfinite(geom.fromto).all():  # given by its ends: move each out by r / 2
                shift = (end - start) / np.linalg.norm(end - start) * geom.size[0] / 2
                geom.fromto = np.concatenate([start - shift, end + shift])
            else:
                geom.size[1] += geom.size[0] / 2
    old = spec.compile()
    for name in ("body_mass", "body_inertia", "body_ipos", "body_iquat"):
        getattr(env.model, name)[:] = getattr(old, name)
    if mujoco.mj_version() >= 350:
        env.model.geom_margin[:] *= 0.5
    mujoco.mj_setConst(env.model, env.data)


def make_env(env: str, physics: str = "d4rl", render_mode: str | None = None) -> gymnasium.Env:
    """Gymnasium's -v4 (-v5 changed rewards), actions clipped; physics: "d4rl", or "gymnasium" as shipped."""
    task = find_task(env)
    mujoco.set_mju_user_warning(warnings.warn)  # else C code writes MUJOCO_LOG.TXT into the working directory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # -v4 is deprecated, and half_cheetah.xml uses a deprecated attribute
        made = gymnasium.make(task.env_id.format(env), render_mode=render_mode, disable_env_checker=True)
        if physics == "d4rl" and not env.startswith("antmaze"):  # which has it built in
            use_d4rl_physics(made.unwrapped)
    space, pad = made.observation_space, (0, task.observation_dim - made.observation_space.shape[0])
    if pad[1]:  # ant: in D4RL's data 84 zeros follow the 27 dimensions, in place of contact forces
        space = gymnasium.spaces.Box(np.pad(space.low, pad), np.pad(space.high, pad), dtype=space.dtype)
        made = gymnasium.wrappers.TransformObservation(made, lambda s: np.pad(s, pad), space)
    return gymnasium.wrappers.RecordEpisodeStatistics(gymnasium.wrappers.ClipAction(made))


def normalized_score(env: str, returns: float | np.ndarray) -> float | np.ndarray:
    """D4RL's score of undiscounted returns, in percent: 0 is a random policy, 100 an expert."""
    task = find_task(env)
    return 100 * (np.asarray(returns) - task.random_return) / (task.expert_return - task.random_return)


def evaluate(policy, envs: list[gymnasium.Env], seeds: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (E,) and lengths (E,) of an episode in each environment; policy: (E, d) -> actions (E, a)."""
    observations = np.stack([env.reset(seed=int(seed))[0] for env, seed in zip(envs, seeds)])
    returns, lengths, running = np.zeros(len(envs)), np.zeros(len(envs), dtype=int), list(range(len(envs)))
    while running:
        actions = policy(observations)
        for i in running.copy():
            observations[i], _, terminated, truncated, info = envs[i].step(actions[i])
            if terminated or truncated:
                returns[i], lengths[i] = info["episode"]["r"], info["episode"]["l"]
                running.remove(i)
    return returns, lengths


# ------------------------------ checkpoint (shared)
def save_checkpoint(path: Path, state: SimpleNamespace, args: Args) -> None:
    """Write to a temporary file, then rename: a crash or a full disk leaves the previous checkpoint whole."""
    buffer, saved = state.buffer, {"script": Path(__file__).stem, "args": asdict(args)}
    saved |= {x: getattr(state, x) for x in ("phase", "step", "evals", "train_scores", "data_sha256")}
    for part in ("networks", "bonus_networks"):
        saved[part] = {name: network.state_dict() for name, network in getattr(state, part).items()}
    saved["optimizer"] = state.optimizer.state_dict()
    saved["normalizer"] = {x: torch.as_tensor(getattr(buffer, x)) for x in ("mean", "std", "reward_scale")}
    online = slice(buffer.offline_size, buffer.size)
    saved["online_rows"] = {name: column[online].clone() for name, column in buffer.columns.items()}
    saved["rng"] = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
    saved["rng"]["env"] = state.env.unwrapped.np_random.bit_generator.state
    torch.save(saved, data := io.BytesIO())
    with open(path.with_suffix(".tmp"), "wb") as file:
        file.writelines([data.getbuffer(), hashlib.sha256(data.getbuffer()).digest()])  # sealed
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(path: Path, state: SimpleNamespace) -> None:
    """Put a checkpoint into a freshly made state. ValueError if that has other data."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if checkpoint["data_sha256"] != state.data_sha256:
        raise ValueError(f"{path} comes from another data file: name that one with --dataset-path")
    vars(state).update((x, checkpoint[x]) for x in ("phase", "step", "evals", "train_scores"))
    for part in ("bonus_networks", "networks"):  # in this order: they may be the same
        for name, network in getattr(state, part).items():
            network.load_state_dict(checkpoint[part][name])
    state.optimizer.load_state_dict(checkpoint["optimizer"])
    state.buffer.write(checkpoint["online_rows"])
    state.env.unwrapped.np_random.bit_generator.state = checkpoint["rng"]["env"]
    torch.set_rng_state(checkpoint["rng"]["cpu"])
    torch.cuda.set_rng_state_all(checkpoint["rng"]["cuda"])


# ------------------------------ main (shared)
def parse_args(argv: list[str] | None = None) -> Args:
    """Defaults, then the preset of --env (or a resumed run's arguments), then the user's, all checked."""
    first, _ = tyro.cli(Args, args=argv, add_help=False, return_unknown_args=True)  # a first look at --env
    presets = [PRESETS[start] for start in sorted(PRESETS, key=len) if first.env.startswith(start)]
    default = Args(env=first.env, **{name: value for preset in presets for name, value in preset.items()})
    if first.resume:
        try:
            body = Path(first.run_dir, "checkpoint.pt").read_bytes()
            whole = body if hashlib.sha256(body[:-32]).digest() == body[-32:] else b""  # else damaged
            saved = torch.load(io.BytesIO(whole), map_location="cpu", weights_only=True)
            default = {Path(__file__).stem: Args(**saved["args"])}[saved["script"]]
        except Exception:  # no folder, no file, a broken one, or one of another script or version
            raise ValueError(f"--resume: no checkpoint of this script, --run-dir {first.run_dir!r}") from None
    args = tyro.cli(Args, args=argv, default=default)
    for field in fields(Args):
        value, flag = getattr(args, field.name), f"--{field.name.replace('_', '-')}"
        if type(field.default) is int:  # 1e6 is fine, and becomes 1000000
            least = 0 if field.name.endswith(("_steps", "seed")) else 1
            if value < least or value % 1:
                raise ValueError(f"{flag} is {value}: give a whole number of at least {least}")
            setattr(args, field.name, int(value))
        low, high = (0, 1) if field.name in ("gamma", "tau", "mixing_ratio") else (-1e300, 1e300)
        if isinstance(value, float) and not low <= value <= high:
            raise ValueError(f"{flag} is {value}: give a finite number from {low:g} to {high:g}")
    if args.offline_steps + args.online_steps == 0:
        raise ValueError("--offline-steps and --online-steps are both 0: raise one of them")
    if args.sera_coef and args.sera_bonus != "constant" and args.sera_k >= args.batch_size:
        raise ValueError(f"--sera-k is {args.sera_k}: give less than --batch-size {args.batch_size}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch finds no GPU here: use --device cpu or auto")
    args.device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    if args.resume:  # sera_* changes no result before the online phase, more online steps change none at all
        free = ("run_dir", "resume", "dataset_path", "device", "checkpoint_every")
        free += ("sera",) * (saved["phase"] == "offline")
        free += ("online_steps",) * (args.online_steps >= default.online_steps)
        old, new = asdict(default), asdict(args)
        changed = ", ".join(f"--{x} {y}" for x, y in old.items() if y != new[x] and not x.startswith(free))
        if changed:
            raise ValueError(f"--resume: this run has {changed.replace('_', '-')}: keep that, or start anew")
    return args


def set_up(args: Args) -> SimpleNamespace:
    """Run directory, data, networks, environments: all that bad input can make fail, before any training."""
    task, script = find_task(args.env), Path(__file__).resolve()
    run_dir = Path(args.run_dir or f"runs/{args.env}__{script.stem}__{args.seed}__{int(time.time())}")
    if (run_dir / "config.json").exists() and not args.resume:
        raise ValueError(f"--run-dir {run_dir} already holds a run: add --resume, or name another folder")
    config, data = {"script": script.stem, "env_id": task.env_id.format(args.env), "args": asdict(args)}, None
    if args.offline_steps or args.mixing_ratio:
        data, path = load_d4rl(args.env, args.dataset_path), find_dataset(args.env, args.dataset_path)
        config |= {"data_file": str(path), "data_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        if args.env.startswith("antmaze") and not (data["rewards"] > 0).any():
            raise ValueError(f"{path} never reaches the goal (no reward > 0): give a file with successes")
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc: keep large blocks, not hand them back to the
        libc.mallopt(-3, 2**30)  # kernel, which clears them anew: a fourth of the time of CQL's updates
        libc.mallopt(-1, 2**31 - 1)  # (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD)
    torch.manual_seed(args.seed)
    state = SimpleNamespace(phase="offline", step=0, evals=[], train_scores=[], run_dir=run_dir, signals=[])
    state.data_sha256 = config.get("data_sha256")
    state.buffer, state.env = ReplayBuffer(data, args), make_env(args.env, args.physics)
    state.networks, state.optimizer = make_networks(task.observation_dim, task.action_dim, args)
    state.bonus_networks = state.networks if args.sera_critic == "current" else copy.deepcopy(state.networks)
    if args.resume:
        load_checkpoint(run_dir / "checkpoint.pt", state)
    run_dir.mkdir(parents=True, exist_ok=True)
    state.lock = FileLock(run_dir / "in_use_by_a_run.lock").acquire(timeout=0)  # ends with this process
    state.eval_envs = [make_env(args.env, args.physics) for _ in range(args.eval_episodes)]
    config["versions"] = {x.__name__: x.__version__ for x in (torch, gymnasium, mujoco, np, h5py)}
    save_checkpoint(run_dir / "checkpoint.pt", state, args)  # from here on --resume works
    (run_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{args.env}: {state.buffer.offline_size:,} rows; {args.device}; {run_dir}")
    return state


def train(args: Args, state: SimpleNamespace) -> None:
    """The offline phase, the switch and the online phase, with evaluations, logs and checkpoints."""
    networks, buffer, env, space = state.networks, state.buffer, state.env, state.env.observation_space
    live = torch.from_numpy(np.flatnonzero(space.low < space.high)).to(args.device)

    def policy(observations: np.ndarray, deterministic: bool = True) -> np.ndarray:
        with torch.no_grad():
            inputs = torch.from_numpy(buffer.normalize(observations)).to(args.device)
            return act(networks, inputs, deterministic).cpu().numpy()

    def run_evaluation() -> None:  # its start states depend on phase and step alone, so runs share them
        seeds = np.random.SeedSequence([phase == "online", state.step]).generate_state(args.eval_episodes)
        returns, lengths = evaluate(policy, state.eval_envs, seeds)
        scores = normalized_score(args.env, returns)
        rows = zip(itertools.count(), returns.tolist(), lengths.tolist(), scores.tolist())
        state.evals += [(state.phase, state.step, *row) for row in rows]
        table = [("phase", "step", "episode", "return", "length", "normalized_score"), *state.evals]
        (state.run_dir / "evals.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in table))
        for name, values in (("return", returns), ("length", lengths), ("normalized_score", scores)):
            writer.add_scalar(f"eval/{name}", values.mean(), before + state.step)
        progress.set_postfix(score=f"{scores.mean():.1f}")

    before = args.offline_steps if state.phase == "online" else 0
    writer = SummaryWriter(state.run_dir, purge_step=before + state.step + 1 if args.resume else None)
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "dones")
    pending, done, due = [], True, False  # transitions of the episode that are not in the buffer yet
    for phase, steps in (("offline", args.offline_steps), ("online", args.online_steps)):
        if phase == "online" and state.phase == "offline":  # the switch: networks and optimisers simply go on
            state.phase, state.step, before = "online", 0, args.offline_steps
            if args.sera_critic == "offline":
                state.bonus_networks.load_state_dict(networks.state_dict())
        if state.phase != phase or state.step >= steps:
            continue
        with tqdm(total=steps, initial=state.step, desc=phase, unit=" steps", mininterval=1) as progress:
            if phase == "online" and state.step == 0:
                run_evaluation()
            while state.step < steps:
                state.step += 1
                if phase == "online":
                    if done:  # after the first reset the environment's own generator draws the start states
                        observation, _ = env.reset(seed=args.seed if state.step == 1 else None)
                    action = policy(observation[None], deterministic=False)[0]
                    next_observation, reward, terminated, truncated, info = env.step(action)
                    done = terminated or truncated
                    if done:  # exploration included, so neither is an evaluation
                        state.train_scores.append(float(normalized_score(args.env, info["episode"]["r"])))
                        regret = 1 - np.mean(state.train_scores) / 100
                        writer.add_scalar("train/score", state.train_scores[-1], before + state.step)
                        writer.add_scalar("train/regret", regret, before + state.step)
                    pending.append((observation, action, reward, next_observation, terminated, done))
                    observation = next_observation
                    if done or not episode_columns:
                        buffer.append({name: np.array(column) for name, column in zip(names, zip(*pending))})
                        pending = []

                online_rows = args.batch_size - round(args.batch_size * args.mixing_ratio)
                enough = buffer.size - buffer.offline_size >= online_rows
                if phase == "offline" or (args.mixing_ratio and not enough):
                    online_rows, enough = 0, True
                logs = {}
                if enough:
                    batch = buffer.sample(args.batch_size - online_rows, online_rows)
                    if phase == "online" and args.sera_coef:
                        bonus, logs = sera_bonus(state.bonus_networks, batch, live, args)
                        batch["rewards"] = batch["rewards"] + bonus  # a copy: the buffer keeps its own
                    logs |= update(state, batch, args)

                progress.update()
                due = due or state.signals or state.step % args.checkpoint_every == 0
                saving = state.step == steps or (due and done)  # between episodes: resumes exactly
                if saving or state.step % 500 == 0:  # only now do the numbers leave the device
                    for name, value in (logs | networks.state_dict()).items():
                        if not torch.as_tensor(value).isfinite().all():
                            where = f"{phase} step {state.step}: {state.run_dir} has the last good checkpoint"
                            raise FloatingPointError(f"{name} became NaN or infinite by {where}")
                        if name in logs:
                            writer.add_scalar(name, float(value), before + state.step)
                if state.step == steps or state.step % args.eval_every == 0:
                    run_evaluation()
                if saving:
                    save_checkpoint(state.run_dir / "checkpoint.pt", state, args)
                    writer.flush()
                    due = False
                    if state.signals:
                        sys.exit(f"{state.signals[0].name}: go on with --run-dir {state.run_dir} --resume")
    writer.close()
    print(f"final score {np.mean([row[-1] for row in state.evals[-args.eval_episodes :]]):.1f}")


def main(argv: list[str] | None = None) -> None:
    """Run the script. Bad input ends in one sentence on stderr and exit code 2."""
    expected = (ValueError, OSError, gymnasium.error.Error)
    try:
        args = parse_args(argv)
        state = set_up(args)
        expected = (OSError, FloatingPointError)  # in training any other is a mistake: show where
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if argv is None and signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, lambda number, _: state.signals.append(signal.Signals(number)))
        train(args, state)
    except expected as error:
        tqdm.write(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
