"""Convert a dataset of another format to an HDF5 file in D4RL's, which all scripts take.

    python data/convert.py SOURCE my-data.hdf5

SOURCE is a Minari dataset (its id, its folder, or its main_data.hdf5), a file of robomimic or of
d3rlpy, an .npz or a folder of .npy files with plain arrays, or an .npz of OGBench. The format is
recognised by the names in it. docs/own_task.md has the formats, and what is refused.

D4RL's loader takes the observation of the following row as the next one, leaves out every row with
a timeout, and never keeps the last row of a file. So where a trajectory breaks off and its last
observation is known, a closing row is written: that observation, a zero action, a zero reward and a
timeout. With it the loader gives every transition that the source has, and none that it has not.
"""

import json
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import h5py
import numpy as np
import tyro
from tyro.conf import Positional, arg

D4RL = ("observations", "actions", "rewards", "terminals", "timeouts")
# What plain arrays may be called, the first one found being taken.
NAMES = {
    "observations": ("observations", "observation", "obs", "states"),
    "actions": ("actions", "action", "acts"),
    "rewards": ("rewards", "reward"),
    "next_observations": ("next_observations", "next_observation", "next_obs", "next_states"),
    "terminals": ("terminals", "terminations", "terminated", "dones", "done"),
    "timeouts": ("timeouts", "truncations", "truncated"),
}
IMAGE = "observations of more than one axis (images) are not supported"


@dataclass
class Args:
    """Convert a dataset to an HDF5 file in D4RL's format, for --dataset-path of any script.

    So do a file whose format is recognised, Dict observations in an order of one's own, and
    actions of an environment whose bounds are not -1 and 1:

    python data/convert.py lift.hdf5 my-data.hdf5

    python data/convert.py D4RL/pen/human-v2 my-data.hdf5 --keys observation,desired_goal

    python data/convert.py buffer.npz my-data.hdf5 --action-low=-2 --action-high=2
    """

    source: Positional[Annotated[str, arg(metavar="SOURCE")]]
    """file or folder to convert, or the id of a Minari dataset that is on this machine"""
    output: Positional[Annotated[str, arg(metavar="OUTPUT")]]
    """HDF5 file to write; it must not exist yet"""
    format: Literal[
        "auto", "minari", "robomimic", "d3rlpy", "arrays", "ogbench", "adroit-binary"
    ] = "auto"
    """format of SOURCE; auto recognises it by the names in it, but for adroit-binary"""
    allow_pickle: bool = False
    """for adroit-binary, whose files are pickles: reading one runs whatever program is in it, so
    say this only of a file from somebody you trust"""
    keys: Annotated[str | None, arg(metavar="A,B")] = None
    """keys of Dict observations to take, in this order; by default all but images, by name"""
    action_low: Annotated[str | None, arg(metavar="X")] = None
    """the action that becomes -1: a number, or one per dimension, as in --action-low=-2,-1"""
    action_high: Annotated[str | None, arg(metavar="X")] = None
    """the action that becomes 1, likewise; Minari knows both by itself"""


class Rows(NamedTuple):
    """Transitions in the order of the source, (N, ...) each."""

    observations: np.ndarray  # (N, d) float32
    actions: np.ndarray  # (N, a) float64, as they may still have to be rescaled
    rewards: np.ndarray  # (N,) float32
    next_observations: np.ndarray  # (N, d) float32, anything where has_next is False
    terminals: np.ndarray  # (N,) bool
    ends: np.ndarray  # (N,) bool: the last row of a trajectory, however it ends
    has_next: np.ndarray  # (N,) bool: the source knows the next observation


# ------------------------------ recognising formats
def recognise(path: str | Path) -> str | None:
    """The format of a file or folder, by the names in it: "d4rl", one of --format's, or None."""
    path = Path(path)
    if path.is_dir():
        arrays = format_of_arrays({each.stem for each in path.glob("*.npy")})
        return arrays or ("minari" if minari_folder(path) else None)
    if not path.is_file():
        return None
    try:
        if h5py.is_hdf5(path):
            with h5py.File(path, locking=False) as file:
                return format_of_hdf5(file)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                return format_of_arrays({name.removesuffix(".npy") for name in file.namelist()})
    except (OSError, RuntimeError, zipfile.BadZipFile):  # damaged
        pass
    return None


def minari_folder(path: Path) -> Path | None:
    """Where the files of a Minari dataset's folder are, if it is one."""
    for folder in (path / "data", path):
        if any((folder / name).is_file() for name in ("main_data.hdf5", "metadata.json")):
            return folder
    return None


def format_of_hdf5(file: h5py.File) -> str | None:
    """The format of an HDF5 file."""
    names = set(file)
    if names.issuperset(D4RL):
        return "d4rl"
    if {"columns", "num_episodes"} <= names or "episode_terminals" in names:
        return "d3rlpy"
    if "episode_0" in names:
        return "minari"
    if any(name.startswith("demo_") for name in children(file, "data")):
        return "robomimic"
    return format_of_arrays(names)


def format_of_arrays(names: set[str]) -> str | None:
    """The format of arrays that have these names and no groups."""
    found = {name for name, spellings in NAMES.items() if names & set(spellings)}
    if not found >= {"observations", "actions"}:
        return None
    reward_free = not found & {"rewards", "timeouts"}
    # Others have masks too: OGBench's come with next_observations or, in its compact form, valids.
    says_what_follows = bool(names & {"next_observations", "valids"})
    is_masked = "masks" in names and "timeouts" not in found
    has_its_marks = reward_free or (is_masked and says_what_follows)
    if {"observations", "actions", "terminals"} <= names and has_its_marks:
        return "ogbench"
    return "arrays"


def children(file: h5py.File, name: str) -> list[str]:
    """The names in a group, none if it is not there or is no group."""
    found = file.get(name)
    return list(found) if isinstance(found, h5py.Group) else []


# ------------------------------ reading arrays
@contextmanager
def opened(path: str) -> Iterator[h5py.File]:
    """An HDF5 file to read. ValueError, too, for whatever HDF5 cannot read of it meanwhile."""
    try:
        with h5py.File(path, locking=False) as file:
            yield file
    except (OSError, RuntimeError, MemoryError, TypeError, KeyError) as error:
        fix = "fetch it again, or name its --format"
        raise ValueError(f"{path} cannot be read as HDF5 ({error}): {fix}") from None


def group(node, place: str) -> h5py.Group:
    """An HDF5 group. ValueError, naming the place, if it is anything else."""
    if not isinstance(node, h5py.Group):
        raise ValueError(f"{place} is no group of arrays: fetch it again, or name its --format")
    return node


def read(node, place: str) -> np.ndarray:
    """An HDF5 dataset, or an array as it is. ValueError, naming the place, if it has no numbers."""
    if node is None:
        raise ValueError(f"the array {place} is missing: fetch it again, or name another source")
    if isinstance(node, (h5py.Group, Mapping, tuple)):
        raise ValueError(f"{place} is a Dict, a Tuple or a group: one array is needed")
    try:
        array = np.asarray(node)
    except Exception as error:  # whatever h5py raises for damage
        raise ValueError(f"{place} cannot be read ({error}): fetch it again") from None
    if array.dtype.kind not in "fbiu":
        raise ValueError(f"{place} is {array.dtype}: numbers are needed")
    return array


def numbers(node, place: str, axes: int, dtype=np.float32) -> np.ndarray:
    """An array of so many axes, of finite numbers that float32 can hold. ValueError otherwise.

    A column (T, 1) does for (T,), and (T,) for a column.
    """
    array = read(node, place)
    if axes == 1 and array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if axes == 2 and array.ndim == 1:
        array = array[:, None]
    if array.ndim != axes:
        needed = "(steps,)" if axes == 1 else "(steps, numbers)"
        raise ValueError(f"{place} has the shape {array.shape}, but {needed} is needed")
    if not (np.abs(array) <= np.finfo(np.float32).max).all():
        raise ValueError(f"{place} has NaN or infinity: fix the source")
    return array.astype(dtype)


def flags(node, place: str) -> np.ndarray:
    """An array (T,) of bool. ValueError for anything but 0 and 1."""
    array = numbers(node, place, axes=1)
    if not np.isin(array, (0, 1)).all():
        raise ValueError(f"{place} has flags other than 0 and 1: fix the source")
    return array.astype(bool)


def actions_of(node, place: str) -> np.ndarray:
    """Continuous actions (T, a) float64. ValueError if they are anything else."""
    array = read(node, place)
    if array.dtype.kind != "f":
        fix = "the scripts need continuous ones (Box)"
        raise ValueError(f"{place} is {array.dtype}, which are discrete actions: {fix}")
    return numbers(array, place, axes=2, dtype=np.float64)


# ------------------------------ flattening Dict observations
def leaves(node, name: str = "") -> dict:
    """The arrays of nested Dict and Tuple observations, HDF5 groups too, by names like a/b."""
    if isinstance(node, tuple):
        node = {f"_index_{number}": each for number, each in enumerate(node)}  # as Minari's files
    if not isinstance(node, (h5py.Group, Mapping)):
        return {name: node}
    found = {}
    for key in node:
        found |= leaves(node[key], f"{name}/{key}" if name else key)
    return found


def refuse_keys(source: str, keys: str | None) -> None:
    """ValueError for --keys where there are none."""
    if keys is not None:
        found = f"observations of {source} have no keys"
        raise ValueError(f"--keys is {keys}, but {found}: leave it out")


def is_image(node) -> bool:
    """Whether it has more than one axis per step, or holds JPEG files, as Minari stores images."""
    if np.ndim(node) > 2:
        return True
    if not isinstance(node, h5py.Dataset) or len(node) == 0:
        return False
    if h5py.check_vlen_dtype(node.dtype) is not None:
        return True
    start = np.array([0xFF, 0xD8, 0xFF])
    return node.ndim == 2 and node.dtype == np.uint8 and np.array_equal(node[0, :3], start)


def in_order(key: str) -> str:
    """What to sort names by: the parts of a Tuple, _index_0 and so on, in their own order."""
    return re.sub(r"_index_(\d+)", lambda match: f"_index_{int(match[1]):09d}", key)


def choose_keys(observations, wanted: str | None, place: str) -> tuple[list[str], list[str]]:
    """The keys to take, in order, and the image keys that are left out; ([""], []) without keys."""
    found = leaves(observations)
    if list(found) == [""]:
        refuse_keys(place, wanted)
        return [""], []
    images = sorted(key for key, node in found.items() if is_image(node))
    if wanted is None:
        order = sorted(found.keys() - images, key=in_order)
    else:
        order = [key.strip() for key in wanted.split(",")]
    known = ", ".join(sorted(found))
    for key in order:
        if key not in found:
            raise ValueError(f"--keys names '{key}', which {place} has not: it has {known}")
        if key in images:
            raise ValueError(f"--keys names '{key}', {np.shape(found[key])} in {place}: {IMAGE}")
    if not order:
        raise ValueError(f"{place} has images alone ({known}): {IMAGE}")
    if len(set(order)) < len(order):
        raise ValueError(f"--keys is {wanted}, which names a key twice: name each once")
    return order, images


def flatten(observations, order: list[str], place: str) -> np.ndarray:
    """Observations (T, d) float32: the arrays of these keys side by side."""
    found = leaves(observations)
    parts = []
    for key in order:
        name = f"observations/{key}" if key else "observations"
        node = found.get(key)
        if np.ndim(node) > 2:
            raise ValueError(f"{name} of {place} is {np.shape(node)}: {IMAGE}")
        parts.append(numbers(node, f"{name} of {place}", axes=2))
    if len({len(part) for part in parts}) > 1:
        lengths = ", ".join(f"{key} {len(part)}" for key, part in zip(order, parts))
        raise ValueError(f"observations of {place} differ in length ({lengths}): fix the source")
    return np.concatenate(parts, axis=1)


def key_notes(order: list[str], images: list[str]) -> dict[str, str]:
    """What the file's attributes say of the keys."""
    notes = {"observation_keys": ",".join(order)} if order != [""] else {}
    return notes | ({"left_out_keys": ",".join(images)} if images else {})


# ------------------------------ trajectories
def check_lengths(place: str, steps: int, columns: dict[str, np.ndarray]) -> None:
    """ValueError for a column that has not one row for each action."""
    for name, column in columns.items():
        if len(column) != steps:
            found = f"{steps} actions, but {len(column)} {name}"
            raise ValueError(f"{place} has {found}: fix the source")


def trajectory(
    place: str,
    observations: np.ndarray,
    actions: np.ndarray,
    rewards: np.ndarray,
    terminals: np.ndarray,
    next_observations: np.ndarray | None = None,
) -> Rows:
    """The rows of one trajectory of T steps. ValueError if the lengths do not fit.

    Observations (T, d) with the next ones, (T + 1, d), or (T, d) alone: then the last step's next
    observation is not known.
    """
    steps = len(actions)
    has_next = np.ones(steps, dtype=bool)
    if next_observations is None and len(observations) == steps:
        has_next[-1:] = False
        next_observations = np.concatenate([observations[1:], observations[-1:]])
    elif next_observations is None:
        observations, next_observations = observations[:-1], observations[1:]
    columns = {
        "observations": observations,
        "rewards": rewards,
        "flags": terminals,
        "next observations": next_observations,
    }
    check_lengths(place, steps, columns)
    if observations.shape != next_observations.shape:
        shapes = f"{observations.shape[1:]} and {next_observations.shape[1:]}"
        raise ValueError(f"observations of {place} and the next ones are {shapes}: fix the source")
    ends = np.arange(steps) == steps - 1
    return Rows(observations, actions, rewards, next_observations, terminals, ends, has_next)


def joined(parts: list[Rows], source: str) -> Rows:
    """All trajectories in one. ValueError if they do not fit to each other or are none."""
    parts = [part for part in parts if len(part.rewards)]
    if not parts:
        raise ValueError(f"{source} has no steps: name another source, or its --format")
    for name in ("observations", "actions"):
        widths = sorted({getattr(part, name).shape[1] for part in parts})
        if len(widths) > 1:
            found = " and ".join(map(str, widths))
            raise ValueError(f"{name} of {source} are {found} wide: all have to be alike")
    return Rows(*(np.concatenate(column) for column in zip(*parts)))


def numbered(names, prefix: str) -> list[str]:
    """Those of the names that are prefix_0, prefix_1 and so on, in the order of their numbers."""
    found = [name for name in names if re.fullmatch(rf"{prefix}_\d+", name)]
    return sorted(found, key=lambda name: int(name.rpartition("_")[2]))


# ------------------------------ Minari
def read_minari(source: str, keys: str | None) -> tuple[Rows, dict]:
    """A Minari dataset: main_data.hdf5 as it is, an id or a folder with the package."""
    if Path(source).is_file():
        return read_minari_file(source, keys)
    return read_minari_package(source, keys)


def read_minari_file(source: str, keys: str | None) -> tuple[Rows, dict]:
    """main_data.hdf5, and the action space from the metadata.json beside it, if that is there."""
    with opened(source) as file:
        names = numbered(file, "episode")
        episodes = ((name, group(file[name], f"{name} of {source}")) for name in names)
        rows, notes = minari_rows(episodes, source, keys)
    path = Path(source).with_name("metadata.json")
    if not path.is_file():
        return rows, notes
    try:
        metadata = json.loads(path.read_text())
        space = json.loads(metadata.get("action_space", "{}"))
        kind = space.get("type", "Box")
        notes["dataset_id"] = str(metadata["dataset_id"])
        if "low" in space:
            bounds = (space["low"], space["high"])
            notes["bounds"] = tuple(np.ravel(bound).astype(np.float64) for bound in bounds)
    except (ValueError, KeyError, TypeError, AttributeError):
        fix = "fetch it again, or move it away and give --action-low and --action-high"
        raise ValueError(f"{path} is damaged: {fix}") from None
    if kind != "Box":
        raise ValueError(f"actions of {source} are {kind}: the scripts need a Box")
    return rows, notes


def read_minari_package(source: str, keys: str | None) -> tuple[Rows, dict]:
    """What minari finds under a folder or an id. Nothing is downloaded."""
    try:
        import minari
    except ImportError:
        fix = "pip install minari, or name the main_data.hdf5 of the dataset"
        raise ValueError(f"minari, to read {source}, is not installed: {fix}") from None
    from gymnasium import spaces

    folder = minari_folder(Path(source))
    try:
        dataset = minari.MinariDataset(folder) if folder else minari.load_dataset(source)
        space = dataset.action_space
    except Exception as error:  # whatever a missing, damaged or too new dataset makes it raise
        fix = f"name a folder, or an id after 'minari download {source}'"
        raise ValueError(f"minari cannot load {source} ({error}): {fix}") from None
    if not isinstance(space, spaces.Box):
        raise ValueError(f"actions of {source} are {space}: the scripts need a Box")
    rows, notes = minari_rows(package_episodes(dataset, source), source, keys)
    notes |= {"dataset_id": dataset.id, "minari": minari.__version__}
    return rows, notes | {"bounds": (np.ravel(space.low), np.ravel(space.high))}


def package_episodes(dataset, source: str) -> Iterator[tuple[str, Mapping]]:
    """The episodes of a Minari dataset, by name."""
    try:
        for episode in dataset.iterate_episodes():
            yield f"episode_{episode.id}", vars(episode)
    except Exception as error:  # whatever a damaged file makes minari raise
        raise ValueError(f"minari cannot read {source} ({error}): fetch it again") from None


def minari_rows(
    episodes: Iterator[tuple[str, Mapping]], source: str, keys: str | None
) -> tuple[Rows, dict]:
    """The rows of all episodes, of T + 1 observations each. ValueError if they are not so."""
    parts = []
    order, images = None, []
    for name, episode in episodes:
        place = f"{name} of {source}"
        observations = episode.get("observations")
        if order is None:
            order, images = choose_keys(observations, keys, place)
        part = trajectory(
            place,
            flatten(observations, order, place),
            actions_of(episode.get("actions"), f"actions of {place}"),
            numbers(episode.get("rewards"), f"rewards of {place}", axes=1),
            flags(episode.get("terminations"), f"terminations of {place}"),
        )
        if not part.has_next.all():
            raise ValueError(f"{place} has no observation after its last action: fix the source")
        parts.append(part)
    rows = joined(parts, source)
    return rows, key_notes(order, images)


# ------------------------------ robomimic
def read_robomimic(source: str, keys: str | None) -> tuple[Rows, dict]:
    """The demonstrations of a robomimic file. dones are terminals, as in robomimic itself."""
    parts = []
    order, images = None, []
    with opened(source) as file:
        for name in numbered(children(file, "data"), "demo"):
            place = f"{name} of {source}"
            demo = group(file["data"][name], place)
            if "obs" not in demo:
                fix = "make them with robomimic's dataset_states_to_obs.py"
                raise ValueError(f"{place} has no observations: {fix}")
            if order is None:
                order, images = choose_keys(demo["obs"], keys, place)
            next_observations = None
            if "next_obs" in demo:
                next_observations = flatten(demo["next_obs"], order, f"next_obs in {place}")
            part = trajectory(
                place,
                flatten(demo["obs"], order, place),
                actions_of(demo.get("actions"), f"actions of {place}"),
                numbers(demo.get("rewards"), f"rewards of {place}", axes=1),
                flags(demo.get("dones"), f"dones of {place}"),
                next_observations,
            )
            parts.append(part)
    rows = joined(parts, source)
    return rows, key_notes(order, images)


# ------------------------------ d3rlpy
def read_d3rlpy(source: str, keys: str | None) -> tuple[Rows, dict]:
    """What ReplayBuffer.dump of d3rlpy 2 or MDPDataset.dump of d3rlpy 1 wrote.

    d3rlpy does not store the observation after a trajectory's last step: where no terminal ends
    it, that step is no transition there, and none here.
    """
    with opened(source) as file:
        if "num_episodes" not in file:
            return read_first_d3rlpy(source, file, keys)
        parts = []
        order, images = None, []
        for number in range(int(read(file["num_episodes"], f"num_episodes of {source}"))):
            place = f"episode {number} of {source}"
            observations = file.get(f"observations_{number}")
            if observations is None:  # a tuple
                names = numbered(file, f"observations_{number}")
                observations = tuple(file[name] for name in names) or None
            if order is None:
                order, images = choose_keys(observations, keys, place)
            actions = actions_of(file.get(f"actions_{number}"), f"actions of {place}")
            terminated = read(file.get(f"terminated_{number}"), f"terminated of {place}")
            part = trajectory(
                place,
                flatten(observations, order, place),
                actions,
                numbers(file.get(f"rewards_{number}"), f"rewards of {place}", axes=1),
                (np.arange(len(actions)) == len(actions) - 1) & bool(terminated),
            )
            parts.append(part)
    rows = joined(parts, source)
    return rows, key_notes(order, images)


def read_first_d3rlpy(source: str, file: h5py.File, keys: str | None) -> tuple[Rows, dict]:
    """A file of d3rlpy 1: flat arrays, in which episode_terminals mark all ends."""
    refuse_keys(source, keys)
    terminals = flags(file.get("terminals"), f"terminals of {source}")
    ends = flags(file.get("episode_terminals"), f"episode_terminals of {source}")
    rows = flat_rows(
        source,
        flatten(file.get("observations"), [""], source),
        actions_of(file.get("actions"), f"actions of {source}"),
        numbers(file.get("rewards"), f"rewards of {source}", axes=1),
        terminals,
        ends,
    )
    return rows, {}


def flat_rows(
    source: str,
    observations: np.ndarray,
    actions: np.ndarray,
    rewards: np.ndarray,
    terminals: np.ndarray,
    ends: np.ndarray,
    next_observations: np.ndarray | None = None,
) -> Rows:
    """Rows (N, ...) in which ends marks the last of each trajectory.

    Without next_observations a row's next one is the following row's, and unknown where it ends.
    """
    check_lengths(source, len(actions), {"observations": observations, "flags": ends})
    rows = trajectory(source, observations, actions, rewards, terminals, next_observations)
    has_next = rows.has_next if next_observations is not None else rows.has_next & ~ends
    return rows._replace(ends=rows.ends | ends, has_next=has_next)


# ------------------------------ plain arrays
def read_named(source: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz, of a folder of .npy files, or at the root of an HDF5 file, by name.

    Those that nothing needs are not read. ValueError for pickled objects, which are never read.
    """
    path = Path(source)
    wanted = {"masks", "valids"}.union(*NAMES.values())
    if path.is_file() and h5py.is_hdf5(path):
        with opened(source) as file:
            names = [name for name in file if name in wanted]
            return {name: read(file[name], f"{name} of {source}") for name in names}
    try:
        if path.is_dir():
            files = {each.stem: each for each in path.glob("*.npy") if each.stem in wanted}
            return {name: np.load(each, allow_pickle=False) for name, each in files.items()}
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name in wanted}
    except Exception as error:  # whatever NumPy and zipfile raise for damage
        fix = "save plain arrays with np.savez or np.save, as pickles are never read"
        raise ValueError(f"{source} cannot be read ({error}): {fix}") from None


def read_arrays(source: str, keys: str | None) -> tuple[Rows, dict]:
    """Arrays (N, ...) under the usual names, in the order of time or, with next ones, in any."""
    refuse_keys(source, keys)
    named = read_named(source)
    chosen = {}  # ours -> the source's
    for name, spellings in NAMES.items():
        found = [spelling for spelling in spellings if spelling in named]
        if found:
            chosen[name] = found[0]
        elif name in ("observations", "actions", "rewards", "terminals"):
            fix = f"call it {' or '.join(spellings)}"
            raise ValueError(f"{source} has no array of {name}: {fix}")
    if "next_observations" not in chosen and "timeouts" not in chosen:
        fix = "add next_observations or timeouts (zeros, if terminals end every episode)"
        raise ValueError(f"where episodes of {source} are cut cannot be told: {fix}")

    def place(name):
        return f"{chosen[name]} of {source}"

    def array(name):
        return named[chosen[name]]

    terminals = flags(array("terminals"), place("terminals"))
    timeouts = np.zeros_like(terminals)
    if "timeouts" in chosen:
        timeouts = flags(array("timeouts"), place("timeouts"))
        if len(timeouts) != len(terminals):
            found = f"{len(terminals)} and {len(timeouts)} long"
            raise ValueError(f"{place('terminals')} and timeouts are {found}: fix the source")
    next_observations = None
    if "next_observations" in chosen:
        next_observations = numbers(array("next_observations"), place("next_observations"), axes=2)
    if chosen["terminals"] in ("done", "dones"):
        terminals = terminals & ~timeouts  # they usually are: terminated or truncated
    rows = flat_rows(
        source,
        flatten(array("observations"), [""], source),
        actions_of(array("actions"), place("actions")),
        numbers(array("rewards"), place("rewards"), axes=1),
        terminals,
        terminals | timeouts,
        next_observations,
    )
    return rows, {"arrays": ",".join(chosen.values())}


# ------------------------------ OGBench
def read_ogbench(source: str, keys: str | None) -> tuple[Rows, dict]:
    """OGBench's arrays with the rewards and masks of a single task.

    Its terminals mark where trajectories end, by their length; masks are 0 where the task is
    solved. Without next_observations, a trajectory's last row has no next state.
    """
    refuse_keys(source, keys)
    named = read_named(source)
    fix = "save what ogbench.make_env_and_datasets gives for a -singletask- name"
    if "rewards" not in named:
        raise ValueError(f"{source} is reward-free, as OGBench's goal-conditioned data are: {fix}")
    if "masks" not in named:
        raise ValueError(f"{source} has no masks, which say where the task is solved: {fix}")
    observations = flatten(named.get("observations"), [""], source)
    actions = actions_of(named.get("actions"), f"actions of {source}")
    rewards = numbers(named["rewards"], f"rewards of {source}", axes=1)
    solved = ~flags(named["masks"], f"masks of {source}")
    ends = flags(named.get("terminals"), f"terminals of {source}")
    if "next_observations" in named:
        place = f"next_observations of {source}"
        next_observations = numbers(named["next_observations"], place, axes=2)
        rows = flat_rows(source, observations, actions, rewards, solved, ends, next_observations)
        return rows, {}
    if "valids" in named:  # its compact form, in which terminals mark the row before, too
        ends = ~flags(named["valids"], f"valids of {source}")
    rows = flat_rows(source, observations, actions, rewards, solved, ends)
    # The last state of a trajectory comes with an action that led nowhere: only its state counts.
    follows = rows._replace(ends=np.append(rows.ends[1:], True))
    return Rows(*(column[rows.has_next] for column in follows)), {}


# ------------------------------ Adroit's binary tasks
def read_adroit_binary(source: str, keys: str | None) -> tuple[Rows, dict]:
    """The .npy files of AWAC and Cal-QL: pickled lists of trajectories with rewards -1 and 0.

    A trajectory is cut after its first success (reward 0), where the environment would have ended
    it. ValueError unless it is such a file. main has made sure that pickles are allowed.
    """
    refuse_keys(source, keys)
    try:
        trajectories = list(np.load(source, allow_pickle=True))
    except Exception as error:  # whatever unpickling may raise
        raise ValueError(f"{source} cannot be read ({error}): name another file") from None
    parts = []
    for number, given in enumerate(trajectories):
        place = f"trajectory {number} of {source}"
        if not isinstance(given, dict) or not {"observations", "actions", "rewards"} <= set(given):
            fix = "name one of the authors' files"
            raise ValueError(f"{place} has no observations, actions and rewards: {fix}")
        actions = numbers(list(given["actions"]), f"actions of {place}", axes=2, dtype=np.float64)
        rewards = numbers(np.ravel(list(given["rewards"])), f"rewards of {place}", axes=1)
        rewards = rewards[: len(actions)]
        if not np.isin(rewards, (-1, 0)).all():
            raise ValueError(f"{place} has rewards other than -1 and 0: name a binary task's file")
        successes = np.flatnonzero(rewards == 0)
        steps = successes[0] + 1 if len(successes) else len(actions)
        next_observations = None
        if "next_observations" in given:
            next_observations = plain_observations(given["next_observations"], place)[:steps]
        part = trajectory(
            place,
            plain_observations(given["observations"], place)[:steps],
            actions[:steps],
            rewards[:steps],
            rewards[:steps] == 0,
            next_observations,
        )
        parts.append(part)
    return joined(parts, source), {}


def plain_observations(observations, place: str) -> np.ndarray:
    """(T, d) float32, also from a list of dictionaries with a state_observation each."""
    rows = []
    for observation in observations:
        if isinstance(observation, dict):
            if "state_observation" not in observation:
                fix = "name one of the authors' files"
                raise ValueError(f"{place} has observations without state_observation: {fix}")
            observation = observation["state_observation"]
        rows.append(observation)
    return numbers(rows, f"observations of {place}", axes=2)


# ------------------------------ D4RL's format
READERS = {
    "minari": read_minari,
    "robomimic": read_robomimic,
    "d3rlpy": read_d3rlpy,
    "arrays": read_arrays,
    "ogbench": read_ogbench,
    "adroit-binary": read_adroit_binary,
}


def parse_bound(text: str, flag: str, width: int) -> np.ndarray:
    """The numbers of an option, (width,). ValueError if they are none, or too many or few."""
    try:
        values = np.array([float(part) for part in text.split(",")])
    except ValueError:
        values = np.array([np.nan])
    if not np.isfinite(values).all() or len(values) not in (1, width):
        fix = f"give a number or a comma list of {width}, as the actions have"
        raise ValueError(f"{flag} is {text}: {fix}")
    return np.broadcast_to(values, (width,))


def choose_bounds(args: Args, notes: dict, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Which actions become -1 and 1, (a,) each: the user's, else Minari's, else -1 and 1."""
    if (args.action_low is None) != (args.action_high is None):
        raise ValueError("--action-low and --action-high belong together: give both or none")
    if args.action_low is not None:
        low = parse_bound(args.action_low, "--action-low", width)
        high = parse_bound(args.action_high, "--action-high", width)
        if not (low < high).all():
            values = f"{args.action_low} and --action-high {args.action_high}"
            raise ValueError(f"--action-low is {values}: give a low below a high")
        return low, high
    low, high = notes.get("bounds", ((), ()))
    if len(low) == len(high) == width and np.isfinite([low, high]).all() and (low < high).all():
        return low.astype(np.float64), high.astype(np.float64)
    return -np.ones(width), np.ones(width)  # unknown, or unbounded


def rescaled(actions: np.ndarray, low: np.ndarray, high: np.ndarray, source: str) -> np.ndarray:
    """Actions (N, a) float32, from [low, high] to [-1, 1]. ValueError if some are beyond."""
    half = (high - low) / 2
    beyond = np.maximum(actions - high, low - actions) / half > 1e-6  # float32 rounds
    if beyond.any():
        number = np.flatnonzero(beyond.any(axis=0))[0]
        values = actions[:, number]
        found = f"{values.min():g} to {values.max():g}, beyond {low[number]:g} and {high[number]:g}"
        fix = "give the environment's bounds (--action-low, --action-high), or clip them first"
        raise ValueError(f"action {number} of {source} runs from {found}: {fix}")
    if (low == -1).all() and (high == 1).all():
        return actions.astype(np.float32)  # bit for bit
    return np.clip((actions - (high + low) / 2) / half, -1, 1).astype(np.float32)


def d4rl_arrays(rows: Rows) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The five arrays of a D4RL file, (M, ...) each, and where trajectories end in rows, (N,).

    The loader gives, in order, the rows that have a next observation or are terminal.
    """
    following = np.roll(rows.observations, -1, axis=0)
    jumps = np.any(rows.next_observations != following, axis=1)
    last = np.arange(len(jumps)) == len(jumps) - 1
    goes_on = rows.has_next & ~rows.terminals
    ends = rows.ends | last | goes_on & jumps
    # A terminal needs no closing row, unless it is in the last row, which the loader drops.
    closed = goes_on & ends | rows.terminals & last
    known = rows.has_next[closed][:, None]
    closing = np.where(known, rows.next_observations[closed], rows.observations[closed])
    places = np.flatnonzero(closed) + 1
    return {
        "observations": np.insert(rows.observations, places, closing, axis=0),
        "actions": np.insert(rows.actions.astype(np.float32), places, 0, axis=0),
        "rewards": np.insert(rows.rewards, places, 0),
        "terminals": np.insert(rows.terminals, places, False),
        "timeouts": np.insert(~rows.has_next & ~rows.terminals, places, True),
    }, ends


# ------------------------------ the program
def choose_format(args: Args) -> str:
    """The format to read. ValueError if it cannot be recognised, or needs no conversion."""
    if args.format != "auto":
        return args.format
    found = recognise(args.source)
    if found == "d4rl":
        fix = "give it to --dataset-path, or rescale its actions with --format arrays"
        raise ValueError(f"{args.source} is in D4RL's format already: {fix}")
    if found:
        return found
    if not Path(args.source).exists():
        if re.fullmatch(r"[\w./-]+-v\d+", args.source):
            return "minari"  # an id, or a folder that is not there
        fix = "name a file, a folder or the id of a Minari dataset, which ends in -v and a number"
        raise ValueError(f"there is no {args.source}: {fix}")
    fix = "name its --format, or save plain arrays with np.savez"
    raise ValueError(f"{args.source} is damaged, or in no format that is recognised: {fix}")


def check_args(args: Args) -> None:
    """ValueError, before any work, for what cannot become a file."""
    output = Path(args.output)
    if output.exists():
        raise ValueError(f"{output} exists: name a new file")
    if not output.parent.is_dir():
        raise ValueError(f"there is no folder {output.parent}: name a file in one that exists")
    if args.format not in ("auto", "minari") and not Path(args.source).exists():
        raise ValueError(f"there is no {args.source}: name a file or a folder")
    if args.format == "adroit-binary" and not args.allow_pickle:
        risk = "is a pickle, and reading it runs whatever program is in it"
        raise ValueError(f"{args.source} {risk}: add --allow-pickle if you trust where it is from")


def convert(args: Args) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays of the file, and attributes that say where they came from."""
    chosen = choose_format(args)
    print(f"format: {chosen}{' (recognised)' if args.format == 'auto' else ''}", flush=True)
    rows, notes = READERS[chosen](args.source, args.keys)
    low, high = choose_bounds(args, notes, rows.actions.shape[1])
    rows = rows._replace(actions=rescaled(rows.actions, low, high, args.source))
    kept = rows.has_next | rows.terminals
    if not kept.any():
        raise ValueError(f"{args.source} has no step whose next observation is known: name another")
    arrays, ends = d4rl_arrays(rows)
    notes.pop("bounds", None)
    attributes = {"source": args.source, "format": chosen} | notes
    attributes |= {
        "episodes": int(ends.sum()),
        "transitions": int(kept.sum()),
        "steps_without_next_observation": int((~kept).sum()),
        "action_low": low,
        "action_high": high,
        "converted_with": f"data/convert.py, numpy {np.__version__}, h5py {h5py.__version__}",
    }
    return arrays, attributes


def write(path: str, arrays: dict[str, np.ndarray], attributes: dict, level: int = 4) -> None:
    """A new HDF5 file, which appears when it is whole; level: of gzip's compression, up to 9."""
    part = Path(f"{path}.part")
    try:
        with h5py.File(part, "w") as file:
            for name, array in arrays.items():
                how = {"compression": "gzip", "compression_opts": level, "shuffle": True}
                file.create_dataset(name, data=array, **how)
            file.attrs.update(attributes)
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> None:
    """Bad input ends in one sentence on stderr and exit code 2."""
    args = tyro.cli(Args, args=argv)
    try:
        check_args(args)
        arrays, attributes = convert(args)
        write(args.output, arrays, attributes)
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    for name, value in attributes.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
