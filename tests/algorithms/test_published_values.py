"""Hyperparameters as the papers and their authors' code have them, number by number.

docs/tasks.md names the source of each. test_all_scripts.py tests how presets work.
"""

import dataclasses

import pytest

ALL = {
    "offline_steps": 250_000,
    "online_steps": 250_000,
    "updates_per_step": 1,
    "learning_starts": 5_000,
    "eval_every": 5_000,
    "eval_episodes": 10,
    "batch_size": 256,
    "gamma": 0.99,
    "tau": 0.005,
    "mixing_ratio": 0.5,
    "normalize_observations": True,
    "normalize_rewards": False,
    "reward_scale": 1.0,
    "reward_bias": 0.0,
    "sera_coef": 1.0,
    "sera_k": 10,
    "sera_critic": "offline",
    "online_sampling": "mix",
    "actor_lr": 3e-4,
    "critic_lr": 3e-4,
    "hidden_dim": 256,
    "actor_layers": 2,
    "critic_layers": 2,
}
CONSERVATIVE = {
    "actor_lr": 1e-4,
    "cql_weight": 5.0,
    "cql_actions": 10,
    "cql_lagrange": False,
    "cql_gap": 0.8,
    "cql_max_target_backup": False,
}
DEFAULTS = {
    "sac_sera": {},
    "cql_sera": CONSERVATIVE,
    "calql_sera": CONSERVATIVE,
    "iql_sera": {"actor_dropout": 0.0, "expectile": 0.7, "beta": 3.0},
    "td3bc_sera": {
        "online_sampling": "append",
        "policy_noise": 0.2,
        "noise_clip": 0.5,
        "policy_delay": 2,
        "bc_alpha": 2.5,
        "bc_online": "keep",
        "bc_anneal_steps": 125_000,
        "exploration_noise": 0.1,
    },
    "awac_sera": {
        "online_sampling": "append",
        "actor_layers": 3,
        "critic_layers": 3,
        "weight_decay": 1e-4,
        "awac_lambda": 2.0,
        "advantage_weights": "softmax",
    },
}
LONG = {"offline_steps": 1_000_000, "eval_every": 25_000}
BINARY = {"offline_steps": 20_000, "eval_every": 2_000, "reward_scale": 10.0, "reward_bias": 5.0}
MAZE = LONG | {"eval_episodes": 100, "normalize_observations": False, "sera_k": 25}
CONSERVATIVE_MAZE = MAZE | {
    "reward_scale": 10.0,
    "reward_bias": -5.0,
    "critic_layers": 4,
    "cql_lagrange": True,
    "cql_max_target_backup": True,
}
CONSERVATIVE_HAND = LONG | {"hidden_dim": 512, "critic_layers": 3, "cql_weight": 1.0}
MAZES = {
    "cql_sera": CONSERVATIVE_MAZE,
    "calql_sera": CONSERVATIVE_MAZE,
    "iql_sera": MAZE
    | {"reward_bias": -1.0, "expectile": 0.9, "beta": 10.0, "online_sampling": "append"},
}
HANDS = {
    "cql_sera": CONSERVATIVE_HAND,
    "calql_sera": CONSERVATIVE_HAND,
    "iql_sera": LONG | {"beta": 0.5, "actor_dropout": 0.1},
    "awac_sera": LONG | {"advantage_weights": "exp", "awac_lambda": 0.1},
}


def preset(name, env):
    """What a script's defaults change to for a dataset."""
    robot = env.partition("-")[0]
    if robot == "antmaze":
        return MAZES.get(name, MAZE | {"reward_bias": -1.0})
    if robot in ("pen", "door", "hammer", "relocate"):
        of_hand = HANDS.get(name, LONG)
        binary = "binary" in env and name in ("cql_sera", "calql_sera")
        return of_hand | BINARY if binary else of_hand
    changes = {"sera_k": 20} if robot == "walker2d" else {}
    if name == "iql_sera" and robot != "ant":  # the authors' own rule leaves ant out
        changes["normalize_rewards"] = True
    return changes


@pytest.mark.parametrize(
    "env",
    [
        "hopper-medium-v2",
        "halfcheetah-random-v0",
        "walker2d-medium-replay-v2",
        "ant-expert-v1",
        "antmaze-umaze-v2",
        "antmaze-large-diverse-v0",
        "pen-human-v1",
        "door-cloned-v0",
        "hammer-expert-v1",
        "relocate-binary-v0",
        "pen-binary-v0",
        "door-binary-v0",
    ],
)
def test_published_values(script, env):
    """All that has to do with learning, for every family of datasets."""
    name = script.__name__
    expected = ALL | DEFAULTS[name] | preset(name, env)
    args = script.parse_args(["--env", env])
    assert {key: getattr(args, key) for key in expected} == expected


def test_no_argument_is_left_out(script):
    """What is not in the table is no number of an algorithm, or SERA's own variant."""
    others = {field.name for field in dataclasses.fields(script.Args)} - {*ALL}
    others -= DEFAULTS[script.__name__].keys()
    of_runs = (
        "env dataset_path clip_actions physics seed device threads cudagraphs compile run_dir "
    )
    of_runs += "resume track wandb_project wandb_entity capture_video log_every checkpoint_every "
    variants = "sera_pool sera_bonus sera_scale"
    assert others - {"actor_lr_schedule"} == {*of_runs.split(), *variants.split()}
