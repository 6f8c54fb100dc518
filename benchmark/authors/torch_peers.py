"""Peers that use PyTorch: TD3_BC, CORL, CQL's authors, rlkit."""

import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from authors.importing import import_from
from authors.sides import (
    SHAPE,
    Draws,
    TorchPeer,
    arch,
    cql_draws,
    cql_losses,
    linear_views,
    twin_views,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize


def adam(module: nn.Module, lr: float, **options) -> torch.optim.Adam:
    """An optimizer for a module, which is made float64: some parameters are float32 by name."""
    return torch.optim.Adam(module.double().parameters(), lr=lr, **options)


def actor_critic_views(*networks: nn.Module | list[nn.Linear]) -> dict[str, Tensor]:
    """Of policy, critics and their targets, or of the first few of them."""
    names = ("actor", "critics_1", "critics_2", "target_critics_1", "target_critics_2")
    views = {}
    for name, network in zip(names, networks):
        views |= linear_views(name, network)
    return views


# ------------------------------ sfujim/TD3_BC
class Td3Bc(TorchPeer):
    """TD3+BC by its authors. Its update returns no losses."""

    def __init__(self, folder: Path, args: Any):
        (module,) = import_from(folder, "TD3_BC")
        module.device = torch.device("cpu")
        self.learner = module.TD3_BC(
            *SHAPE,
            max_action=1.0,
            discount=args.gamma,
            tau=args.tau,
            policy_noise=args.policy_noise,
            noise_clip=args.noise_clip,
            policy_freq=args.policy_delay,
            alpha=args.bc_alpha,
        )

    def draws(self) -> Draws:
        return ["next"]

    def views(self) -> dict[str, Tensor]:
        learner = self.learner
        critics = []  # two of three layers each in one module
        for both in (learner.critic, learner.critic_target):
            critics += [[both.l1, both.l2, both.l3], [both.l4, both.l5, both.l6]]
        views = actor_critic_views(learner.actor, *critics)
        return views | linear_views("target_actor", learner.actor_target)

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        columns = [batch[name] for name in ("observations", "actions", "next_observations")]
        columns += [batch["rewards"][:, None], 1 - batch["terminals"][:, None]]
        self.learner.train(SimpleNamespace(sample=lambda batch_size: columns))
        return {}


# ------------------------------ tinkoff-ai/CORL
def corl_batch(batch: dict[str, Tensor]) -> list[Tensor]:
    """States, actions, rewards (B, 1), next states, terminals (B, 1)."""
    rewards, terminals = batch["rewards"][:, None], batch["terminals"][:, None]
    return [batch["observations"], batch["actions"], rewards, batch["next_observations"], terminals]


class CorlTd3Bc(TorchPeer):
    """TD3+BC of CORL."""

    def __init__(self, folder: Path, args: Any):
        (module,) = import_from(folder / "algorithms" / "offline", "td3_bc")
        actor, critics = module.Actor(*SHAPE, 1.0), [module.Critic(*SHAPE) for _ in range(2)]
        self.learner = module.TD3_BC(
            1.0,
            *(actor, adam(actor, args.actor_lr)),
            *(critics[0], adam(critics[0], args.critic_lr)),
            *(critics[1], adam(critics[1], args.critic_lr)),
            discount=args.gamma,
            tau=args.tau,
            policy_noise=args.policy_noise,
            noise_clip=args.noise_clip,
            policy_freq=args.policy_delay,
            alpha=args.bc_alpha,
        )

    def draws(self) -> Draws:
        return ["next"]

    def views(self) -> dict[str, Tensor]:
        learner = self.learner
        critics = (learner.critic_1, learner.critic_2)
        targets = (learner.critic_1_target, learner.critic_2_target)
        views = actor_critic_views(learner.actor, *critics, *targets)
        return views | linear_views("target_actor", learner.actor_target)

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        names = {"critic_loss": "losses/td", "actor_loss": "losses/actor"}
        return {names[name]: loss for name, loss in self.learner.train(corl_batch(batch)).items()}


class CorlIql(TorchPeer):
    """IQL of CORL, its steps put into the order of IQL's authors.

    Its critics' loss is half of ours, of which Adam sees nothing but its epsilon: that is halved.
    """

    def __init__(self, folder: Path, args: Any):
        (module,) = import_from(folder / "algorithms" / "finetune", "iql")
        actor = module.GaussianPolicy(*SHAPE, 1.0, args.hidden_dim, args.actor_layers)
        critics = module.TwinQ(*SHAPE, args.hidden_dim, args.critic_layers)
        value = module.ValueFunction(SHAPE[0], args.hidden_dim, args.critic_layers)
        self.learner = module.ImplicitQLearning(
            1.0,
            *(actor, adam(actor, args.actor_lr)),
            *(critics, adam(critics, args.critic_lr, eps=0.5e-8)),
            *(value, adam(value, args.critic_lr)),
            iql_tau=args.expectile,
            beta=args.beta,
            max_steps=args.offline_steps,
            discount=args.gamma,
            tau=args.tau,
        )

    def draws(self) -> Draws:
        return []

    def views(self) -> dict[str, Tensor]:
        learner, target = self.learner, self.learner.q_target
        critics = (learner.qf.q1, learner.qf.q2)
        views = actor_critic_views(learner.actor, *critics, target.q1, target.q2)
        views |= linear_views("value_network", learner.vf)
        return views | {"actor.log_std": learner.actor.log_std.detach()}

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        learner, logs = self.learner, {}
        states, actions, rewards, next_states, terminals = corl_batch(batch)
        learner._update_v(states, actions, logs)
        with torch.no_grad():  # from here on the new V, where CORL goes on with the old one
            advantages = learner.q_target(states, actions) - learner.vf(states)
            next_values = learner.vf(next_states)
        learner._update_policy(advantages, states, actions, logs)
        learner._update_q(next_values, states, actions, rewards[:, 0], terminals[:, 0], logs)
        losses = {"losses/value": logs["value_loss"], "losses/actor": logs["actor_loss"]}
        return losses | {"losses/td": 2 * logs["q_loss"]}


class SquashedLogStd(nn.Module):
    """Log sigma of AWAC's authors and of ours: within [-6, 0]."""

    def forward(self, logits: Tensor) -> Tensor:
        return 6 * torch.sigmoid(logits) - 6


class CorlAwac(TorchPeer):
    """AWAC of CORL, with the policy of AWAC's authors, and both losses before the first step."""

    def __init__(self, folder: Path, args: Any):
        (module,) = import_from(folder / "algorithms" / "finetune", "awac")
        actor = module.Actor(*SHAPE, args.hidden_dim)
        actor._mlp.append(nn.Tanh())
        actor.double()
        parametrize.register_parametrization(actor, "_log_std", SquashedLogStd())
        critics = [module.Critic(*SHAPE, args.hidden_dim) for _ in range(2)]
        self.optimizers = [adam(actor, args.actor_lr, weight_decay=args.weight_decay)]
        self.optimizers += [adam(critic, args.critic_lr) for critic in critics]
        self.learner = module.AdvantageWeightedActorCritic(
            *(actor, self.optimizers[0]),
            *(critics[0], self.optimizers[1]),
            *(critics[1], self.optimizers[2]),
            gamma=args.gamma,
            tau=args.tau,
            awac_lambda=args.awac_lambda,
        )
        self.soft_update = module.soft_update

    def draws(self) -> Draws:
        return ["next", "policy"]

    def views(self) -> dict[str, Tensor]:
        learner = self.learner
        critics = (learner._critic_1, learner._critic_2)
        targets = (learner._target_critic_1, learner._target_critic_2)
        logits = learner._actor.parametrizations._log_std.original.detach()
        views = actor_critic_views(learner._actor, *critics, *targets)
        return views | {"actor.log_std_logits": logits}

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        learner = self.learner
        states, actions, rewards, next_states, terminals = corl_batch(batch)
        critic_loss = learner._critic_loss(states, actions, rewards, terminals, next_states)
        actor_loss = learner._actor_loss(states, actions)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        (critic_loss + actor_loss).backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.soft_update(learner._target_critic_1, learner._critic_1, learner._tau)
        self.soft_update(learner._target_critic_2, learner._critic_2, learner._tau)
        return {"losses/td": critic_loss.item(), "losses/actor": actor_loss.item()}


def tanh_gaussian_views(policy: nn.Module, log_alpha: Tensor) -> dict[str, Tensor]:
    """Log sigma's and the temperature of CORL's CQL and Cal-QL and of CQL's authors."""
    return {
        "log_alpha": log_alpha.detach(),
        "actor.log_std_scale": policy.log_std_multiplier.constant.detach(),
        "actor.log_std_offset": policy.log_std_offset.constant.detach(),
    }


class CorlCql(TorchPeer):
    """CQL of CORL."""

    names = ("cql", "ContinuousCQL")

    def __init__(self, folder: Path, args: Any):
        (module,) = import_from(folder / "algorithms" / "finetune", self.names[0])
        self.max_target_backup = args.cql_max_target_backup
        actor = module.TanhGaussianPolicy(*SHAPE, max_action=1.0)
        depth = {"n_hidden_layers": args.critic_layers}
        critics = [module.FullyConnectedQFunction(*SHAPE, **depth) for _ in range(2)]
        self.learner = getattr(module, self.names[1])(
            *(critics[0], adam(critics[0], args.critic_lr)),
            *(critics[1], adam(critics[1], args.critic_lr)),
            *(actor, adam(actor, args.actor_lr)),
            target_entropy=-SHAPE[1],
            discount=args.gamma,
            policy_lr=args.actor_lr,
            qf_lr=args.critic_lr,
            soft_target_update_rate=args.tau,
            bc_steps=0,
            cql_n_actions=args.cql_actions,
            cql_lagrange=args.cql_lagrange,
            cql_target_action_gap=args.cql_gap,
            cql_alpha=args.cql_weight,
            cql_max_target_backup=args.cql_max_target_backup,
        )
        self.learner.log_alpha.double()
        self.learner.log_alpha_prime.double()

    def draws(self) -> Draws:
        return cql_draws(self.max_target_backup)

    def views(self) -> dict[str, Tensor]:
        learner = self.learner
        critics = (learner.critic_1, learner.critic_2)
        targets = (learner.target_critic_1, learner.target_critic_2)
        views = actor_critic_views(learner.actor, *critics, *targets)
        views |= tanh_gaussian_views(learner.actor, learner.log_alpha.constant)
        return views | {"log_multiplier": learner.log_alpha_prime.constant.detach()}

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        return cql_losses(self.learner.train(corl_batch(batch)), "", ("qf1_loss", "qf2_loss"))


class CorlCalQl(CorlCql):
    """Cal-QL of CORL."""

    names = ("cal_ql", "CalQL")

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        logs = self.learner.train([*corl_batch(batch), batch["mc_returns"]])
        return cql_losses(logs, "", ("qf1_loss", "qf2_loss"))


class CorlSacN(TorchPeer):
    """SAC-N of CORL with two critics, the exact density, and all losses before the first step."""

    def __init__(self, folder: Path, args: Any):
        (module,) = import_from(folder / "algorithms" / "offline", "sac_n")
        # Its density has log(1 - tanh^2 + 1e-6): take the last term away again.
        exact = vars(torch) | {"log": lambda x: torch.log(x - 1e-6)}
        module.torch = SimpleNamespace(**exact)
        actor = module.Actor(*SHAPE, args.hidden_dim)
        critics = module.VectorizedCritic(*SHAPE, args.hidden_dim, num_critics=2)
        self.learner = module.SACN(
            *(actor, adam(actor, args.actor_lr)),
            *(critics, adam(critics, args.critic_lr)),
            gamma=args.gamma,
            tau=args.tau,
            alpha_learning_rate=args.actor_lr,
        )
        self.learner.log_alpha.data = self.learner.log_alpha.data.double()
        self.soft_update = module.soft_update

    def draws(self) -> Draws:
        return ["policy", "policy", "next"]  # an action for each of two losses, which ours share

    def ours_as_theirs(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The policy's last layer is two there, one for the mean and one for log sigma."""
        weights = super().ours_as_theirs(weights)
        last = sum(name.startswith("actor.") for name in weights) // 2 - 1
        for kind in ("weight", "bias"):
            mean, log_std = weights.pop(f"actor.{last}.{kind}").chunk(2, dim=-1)
            weights |= {f"actor mean.0.{kind}": mean, f"actor log_std.0.{kind}": log_std}
        return weights

    def views(self) -> dict[str, Tensor]:
        learner = self.learner
        views = linear_views("actor", learner.actor.trunk)
        views |= linear_views("actor mean", learner.actor.mu)
        views |= linear_views("actor log_std", learner.actor.log_sigma)
        views |= twin_views("critics", learner.critic.critic[::2])
        views |= twin_views("target_critics", learner.target_critic.critic[::2])
        return views | {"log_alpha": learner.log_alpha.detach()[0]}

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        learner, columns = self.learner, corl_batch(batch)
        optimizers = (learner.alpha_optimizer, learner.actor_optimizer, learner.critic_optimizer)
        learner.alpha = learner.log_alpha.exp().detach()
        alpha_loss = learner._alpha_loss(columns[0])
        actor_loss, entropy, _ = learner._actor_loss(columns[0])
        critic_loss = learner._critic_loss(*columns)
        for optimizer, loss in zip(optimizers, (alpha_loss, actor_loss, critic_loss)):
            optimizer.zero_grad()  # the critics' last: the policy's loss has left gradients there
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        self.soft_update(learner.target_critic, learner.critic, learner.tau)
        losses = {"losses/td": critic_loss.item(), "losses/actor": actor_loss.item()}
        return losses | {"losses/entropy": entropy}


# ------------------------------ young-geng/CQL
class CqlAuthors(TorchPeer):
    """CQL by one of its authors."""

    needs = ("ml_collections",)

    def __init__(self, folder: Path, args: Any):
        names = ("SimpleSAC.conservative_sac", "SimpleSAC.sac", "SimpleSAC.model")
        conservative_sac, sac, model = import_from(folder, *names)
        self.args = args
        layers = arch(args.hidden_dim, args.critic_layers)
        self.policy = model.TanhGaussianPolicy(*SHAPE, arch(args.hidden_dim, args.actor_layers))
        self.critics = [model.FullyConnectedQFunction(*SHAPE, layers) for _ in range(4)]
        for network in (self.policy, *self.critics):
            network.double()
        self.learner = self.make_learner(conservative_sac, sac)
        self.learner.log_alpha.double()

    def make_learner(self, conservative_sac: ModuleType, sac: ModuleType) -> Any:
        args = self.args
        config = self.config() | {
            "cql_n_actions": args.cql_actions,
            "cql_lagrange": args.cql_lagrange,
            "cql_target_action_gap": args.cql_gap,
            "cql_min_q_weight": args.cql_weight,
            "cql_max_target_backup": args.cql_max_target_backup,
        }
        learner = conservative_sac.ConservativeSAC(config, self.policy, *self.critics)
        if args.cql_lagrange:
            learner.log_alpha_prime.double()
        else:
            self.unused = ("log_multiplier",)
        return learner

    def config(self) -> dict[str, Any]:
        """What CQL and SAC share."""
        return {
            "discount": self.args.gamma,
            "target_entropy": -float(SHAPE[1]),
            "policy_lr": self.args.actor_lr,
            "qf_lr": self.args.critic_lr,
            "soft_target_update_rate": self.args.tau,
        }

    def draws(self) -> Draws:
        return cql_draws(self.args.cql_max_target_backup)

    def views(self) -> dict[str, Tensor]:
        views = actor_critic_views(self.policy, *self.critics)
        views |= tanh_gaussian_views(self.policy, self.learner.log_alpha.constant)
        if self.args.cql_lagrange:
            views["log_multiplier"] = self.learner.log_alpha_prime.constant.detach()
        return views

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        logs = self.learner.train(batch | {"dones": batch["terminals"]})
        return cql_losses(logs, "cql/", ("qf1_loss", "qf2_loss"))


class SacOfCqlAuthors(CqlAuthors):
    """SAC in the same repository, its log sigma within [-5, 2] and without scale and offset."""

    def make_learner(self, conservative_sac: ModuleType, sac: ModuleType) -> Any:
        self.policy.tanh_gaussian.log_std_min = -5.0
        self.policy.log_std_multiplier.requires_grad_(False)
        self.policy.log_std_offset.requires_grad_(False).constant.fill_(0.0)
        return sac.SAC(self.config(), self.policy, *self.critics)

    def draws(self) -> Draws:
        return ["policy", "next"]

    def views(self) -> dict[str, Tensor]:
        log_alpha = self.learner.log_alpha.constant.detach()
        return actor_critic_views(self.policy, *self.critics) | {"log_alpha": log_alpha}

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        logs = self.learner.train(batch | {"dones": batch["terminals"]})
        losses = {"losses/td": logs["qf1_loss"] + logs["qf2_loss"]}
        return losses | {"losses/actor": logs["policy_loss"], "losses/entropy": -logs["log_pi"]}


# ------------------------------ rail-berkeley/rlkit
class Rlkit(TorchPeer):
    """AWAC by its authors, with sampled actions cut to [-1, 1] before a critic sees them."""

    def __init__(self, folder: Path, args: Any):
        names = ("rlkit.torch.sac.awac_trainer", "rlkit.torch.sac.policies", "rlkit.torch.networks")
        trainer, policies, networks = import_from(folder, *names)
        log_std = {"min_log_std": -6, "max_log_std": 0, "std_architecture": "values"}
        hidden = [args.hidden_dim] * args.actor_layers
        self.policy = policies.GaussianPolicy(hidden, *SHAPE, **log_std)
        hidden = [args.hidden_dim] * args.critic_layers
        self.critics = [networks.ConcatMlp(hidden, 1, sum(SHAPE)) for _ in range(4)]
        for critic in self.critics:
            critic.register_forward_pre_hook(lambda _, inputs: (inputs[0], inputs[1].clamp(-1, 1)))
        self.learner = trainer.AWACTrainer(
            None,  # the environment
            self.policy,
            *self.critics,
            discount=args.gamma,
            beta=args.awac_lambda,
            policy_lr=args.actor_lr,
            qf_lr=args.critic_lr,
            policy_weight_decay=args.weight_decay,
            soft_target_tau=args.tau,
            # as its own example for Gym-MuJoCo has it
            use_automatic_entropy_tuning=False,
            alpha=0,
            reparam_weight=0.0,
            compute_bc=False,
            awr_min_q=True,
        )

    def draws(self) -> Draws:
        return ["policy", "next"]

    def views(self) -> dict[str, Tensor]:
        logits = self.policy.log_std_logits.detach()
        views = actor_critic_views(self.policy, *self.critics)
        return views | {"actor.log_std_logits": logits}

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        columns = {name: batch[name][:, None] for name in ("rewards", "terminals")}
        self.learner._need_to_update_eval_statistics = True  # they hold the losses
        with warnings.catch_warnings():
            # Its targets are broadcast to (B, B) by alpha log pi (B,), which is 0 here: harmless.
            warnings.filterwarnings("ignore", "Using a target size")
            self.learner.train_from_torch(batch | columns)
        logs = self.learner.eval_statistics
        losses = {"losses/td": float(logs["QF1 Loss"]) + float(logs["QF2 Loss"])}
        return losses | {"losses/advantage": float(logs["Advantage Score Mean"])}
