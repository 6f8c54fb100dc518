"""A script with another bonus in the place of SERA's: RND, counts of states, or one of your own.

    python benchmark/other_bonuses.py rnd td3bc_sera.py --env hopper-medium-v2
    python benchmark/other_bonuses.py counts iql_sera.py --env hopper-medium-v2 --sera-coef 0.5

What follows the script are its own options. The script is not changed: it looks its bonus up by
the name intrinsic_reward, so another function may stand there. One without a memory needs no more
than that:

    script.intrinsic_reward = lambda agent, batch, *others: (batch["observations"][:, 0], {})

What a bonus remembers has to come back with --resume. Here are two ways: RND's networks are part
of the agent, which checkpoints hold; counts are worked out anew from the stored transitions.

As with SERA, --sera-coef is the weight, states are those of the pairs (s, a), rows are those of the
training batch, and both phases, rewards, scores and logs are the script's own. --sera-bonus,
--sera-k, --sera-pool, --sera-scale and --sera-critic mean nothing here.

RND: random network distillation, Burda et al. 2018, arXiv 1810.12894; from batches of a replay
buffer as in URLB, Laskin et al. 2021, arXiv 2110.15191.
Counts: SimHash, Tang et al. 2017, arXiv 1611.04717.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

FEATURES = 64  # that RND's networks give of a state
RND_RATE = 1e-4  # of Adam, for RND's predictor
CODE_BITS = 16  # of a state, for the counts
USAGE = "usage: python benchmark/other_bonuses.py {rnd,counts} SCRIPT.py [options of the script]"


# ------------------------------ RND
class RunningMoments(nn.Module):
    """Mean and variance of all rows so far, by the parallel formula of Chan et al. 1979."""

    def __init__(self, dimension: int):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(dimension, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(dimension, dtype=torch.float64))

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Take more rows (n, dimension) into account, in place."""
        rows = rows.double()
        total = self.count + len(rows)
        difference = rows.mean(0) - self.mean
        squares = self.variance * self.count + rows.var(0, correction=0) * len(rows)
        squares += difference.square() * self.count * len(rows) / total
        self.mean += difference * len(rows) / total
        self.variance.copy_(squares / total)
        self.count.copy_(total)


class Novelty(nn.Module):
    """RND's two networks: a predictor learns what the other, random one says of a state.

    It learns that where there are many states, so that its error is large for rare ones.
    """

    def __init__(self, script: ModuleType, observation_dim: int, hidden_dim: int, on_gpu: bool):
        super().__init__()
        self.random_network = script.mlp(observation_dim, hidden_dim, 2, FEATURES)
        self.predictor = script.mlp(observation_dim, hidden_dim, 2, FEATURES)
        self.random_network.requires_grad_(False)
        self.state_moments = RunningMoments(observation_dim)
        self.error_moments = RunningMoments(1)
        parameters = self.predictor.parameters()
        self.optimizer = torch.optim.Adam(parameters, RND_RATE, capturable=on_gpu)

    def get_extra_state(self) -> dict[str, Any]:
        """The optimizer's state, for checkpoints, which hold the state of modules."""
        return self.optimizer.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)

    def errors(self, observations: Tensor) -> Tensor:
        """Squared errors of the predictor at whitened states, (B, d) -> (B,)."""
        moments = self.state_moments
        whitened = (observations - moments.mean) / (moments.variance + 1e-8).sqrt()
        whitened = whitened.clamp(-5, 5).float()
        return (self.predictor(whitened) - self.random_network(whitened)).square().mean(-1)

    @torch.enable_grad()
    def learn(self, observations: Tensor) -> Tensor:
        """One step of the predictor; the errors (B,) before it, over their running deviation."""
        self.state_moments.add(observations)
        errors = self.errors(observations)
        self.error_moments.add(errors.detach()[:, None])
        self.optimizer.zero_grad()
        errors.mean().backward()
        self.optimizer.step()
        return errors.detach() / (self.error_moments.variance + 1e-8).sqrt().float()


def use_rnd(script: ModuleType) -> None:
    """Give a script's agents RND's networks, and make their errors its bonus."""

    class AgentWithNovelty(script.Agent):
        def __init__(self, observation_dim: int, action_dim: int, args):
            super().__init__(observation_dim, action_dim, args)
            on_gpu = args.device != "cpu" and torch.cuda.is_available()
            with torch.random.fork_rng(devices=[]):  # the script's own draws stay what they were
                self.novelty = Novelty(script, observation_dim, args.hidden_dim, on_gpu)

        def load_state_dict(self, state: dict, *others, **options):
            """Also of a checkpoint of the plain script: then RND's networks stay new."""
            novelty = self.novelty.state_dict(prefix="novelty.")
            return super().load_state_dict(novelty | state, *others, **options)

    @torch.compiler.disable
    def intrinsic_reward(agent, batch, varying_dims, args, log, pool=None):
        bonus = agent.novelty.learn(batch["observations"])
        logs = numbers_to_watch(bonus) if log else {}
        return args.sera_coef * bonus, logs

    script.Agent = AgentWithNovelty
    script.intrinsic_reward = intrinsic_reward


# ------------------------------ counts
def simhash(observations: Tensor, directions: Tensor) -> Tensor:
    """Codes (B,) of states (B, d): bit b says on which side of direction b (d, bits) one lies.

    In float64: a product that is rounded otherwise in a batch than when the state was counted, as a
    GPU's TF32 may be, gives a code that nobody has counted, and a bonus of infinity.
    """
    bits = (observations.double() @ directions.double() > 0).long()
    weights = 2 ** torch.arange(directions.shape[1], device=bits.device)
    return (bits * weights).sum(-1)


def use_counts(script: ModuleType) -> None:
    """Count the stored transitions by the codes of their states; the bonus is 1 / sqrt(count)."""

    class CountingBuffer(script.ReplayBuffer):
        def __init__(self, data, args, device):
            self.counts = torch.zeros(2**CODE_BITS, device=device)
            self.directions = torch.empty(0)  # made by the first transitions
            super().__init__(data, args, device)

        def codes(self, rows: dict[str, Tensor]) -> Tensor:
            observations = rows["observations"]
            if not len(self.directions):
                generator = torch.Generator().manual_seed(self.args.seed)
                shape = (observations.shape[1], CODE_BITS)
                self.directions = torch.randn(shape, generator=generator).to(self.device)
            return simhash(observations, self.directions)

        def append_rows(self, rows: Tensor) -> None:
            """All transitions pass here: of the dataset, online ones, and those of --resume."""
            super().append_rows(rows)
            codes = self.codes(self.as_columns(rows.to(self.device)))
            self.counts += torch.bincount(codes, minlength=len(self.counts))

        def sample(self, rows):
            batch = super().sample(rows)
            return batch | {"visits": self.counts[self.codes(batch)]}

    def intrinsic_reward(agent, batch, varying_dims, args, log, pool=None):
        bonus = batch["visits"].rsqrt()
        logs = numbers_to_watch(bonus) if log else {}
        return args.sera_coef * bonus, logs

    script.ReplayBuffer = CountingBuffer
    script.intrinsic_reward = intrinsic_reward


# ------------------------------ running a script with one of them
BONUSES = {"rnd": use_rnd, "counts": use_counts}


def numbers_to_watch(bonus: Tensor) -> dict[str, Tensor]:
    """What SERA's own function logs under the same names."""
    return {"sera/bonus_mean": bonus.mean(), "sera/bonus_sd": bonus.std()}


def load_script(path: Path) -> ModuleType:
    """A script as a module of its own, beside the plain one. FileNotFoundError if it is none."""
    if path.suffix != ".py" or not path.is_file():
        raise FileNotFoundError(f"there is no script {path}: {USAGE}")
    sys.path.insert(0, str(path.resolve().parent))  # for envs/
    name = f"{path.stem}_with_another_bonus"
    spec = importlib.util.spec_from_file_location(name, path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[name] = script  # where its dataclass looks for its types
    spec.loader.exec_module(script)
    return script


def use_bonus(script: ModuleType, name: str) -> None:
    """Put a bonus into a script, and its name into the config.json of runs."""
    BONUSES[name](script)
    script.bonus_q_is_stored = lambda args: False  # no q is asked for
    start_logs = script.start_logs
    script.start_logs = lambda run, args, config: start_logs(run, args, config | {"bonus": name})


def main(words: list[str]) -> int:
    if len(words) < 2 or words[0] not in BONUSES:
        print(USAGE, file=sys.stderr)
        return 2
    name, path, *options = words
    try:
        script = load_script(Path(path))
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    use_bonus(script, name)
    sys.argv = [path, *options]  # as if it had been started by itself
    script.main()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
