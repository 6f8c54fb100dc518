"""Ways to damage data files, for the tests. As a program: byte damage against load_d4rl.

    python tests/tools/corrupt.py SCRIPT FOLDER CASES

prints one line of JSON per case, so that even a crash of the HDF5 library only ends the list early.
"""

import faulthandler
import importlib
import itertools
import json
import os
import resource
import sys
from pathlib import Path

import h5py
import numpy as np

ENV = "hopper-medium-v2"
ROWS = 30
NAMES = ("observations", "actions", "rewards", "terminals", "timeouts")
MATRICES = NAMES[:2]
FLAGS = NAMES[3:]
FLAT = {}  # how arrays are stored
CHUNKED = {"compression": "gzip"}


def columns(width: int = 11, rows: int = ROWS) -> dict[str, np.ndarray]:
    """A small, correct dataset for Hopper, or, with another width, for something else."""
    rng = np.random.default_rng(0)
    return {
        "observations": rng.normal(size=(rows, width)).astype(np.float32),
        "actions": rng.uniform(-1, 1, size=(rows, 3)).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "terminals": np.arange(rows) == 9,
        "timeouts": np.arange(rows) == 19,
    }


def write(path: Path, arrays: dict, storage: dict = FLAT) -> Path:
    """Store arrays by name and return the path."""
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            chunks = {"chunks": (10, *array.shape[1:])} if storage else {}
            file.create_dataset(name, data=array, **chunks, **storage)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, except the lock that a run may leave."""
    files = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "in_use_by_a_run.lock":
            files[str(path)] = path.read_bytes()
    return files


# ------------------------------ bytes
def damage_bytes(body: bytes, seed: int) -> bytes:
    """One byte changed, a run of random bytes or a block of zeros put in: never the body itself."""
    rng = np.random.default_rng(seed)
    old = np.frombuffer(body, np.uint8)
    start = rng.choice(np.flatnonzero(old))  # padding would often not be read at all
    new = old.copy()
    if seed % 3 == 0:
        new[start] ^= rng.integers(1, 256)
    elif seed % 3 == 1:
        block = new[start : start + rng.integers(2, 65)]
        block[:] = rng.integers(0, 256, len(block))
    else:
        new[start : start + rng.integers(1, 257)] = 0
    if (new == old).all():
        return damage_bytes(body, seed + 3000)
    return new.tobytes()


def truncations(body: bytes, count: int, seed: int) -> dict[str, bytes]:
    """The body cut at the start, near the end and at random places."""
    places = {0, 1, len(body) // 2, len(body) - 1}
    rng = np.random.default_rng(seed)
    places |= set(rng.integers(2, len(body) - 1, count - len(places)).tolist())
    return {f"cut to {place} bytes": body[:place] for place in sorted(places)}


# ------------------------------ one array of a data file, replaced
def with_value(value: float, dtype=np.float64):
    """One random element replaced."""

    def replace(array, rng):
        changed = array.astype(dtype)
        changed[tuple(rng.integers(changed.shape))] = value
        return changed

    return replace


def objects(element, kind):
    """Something of the array's length for h5py to store as variable-length data."""
    return lambda array, rng: np.array([element] * len(array), dtype=kind)


def dates(array, rng):
    """Dates, which HDF5 knows as opaque bytes."""
    return np.zeros(array.shape, "M8[s]").astype(h5py.opaque_dtype("M8[s]"))


# What takes the place of an array: kind -> (function of array and generator, names of the arrays).
REPLACED = {
    "zero rows": (lambda array, rng: array[:0], NAMES),
    "one row": (lambda array, rng: array[:1], NAMES),
    "one row less": (lambda array, rng: array[:-1], NAMES),
    "random rows less": (lambda array, rng: array[: rng.integers(2, len(array))], NAMES),
    "one row more": (lambda array, rng: np.concatenate([array, array[-1:]]), NAMES),
    "twice as long": (lambda array, rng: np.concatenate([array, array]), NAMES),
    "axis in front": (lambda array, rng: array[None], NAMES),
    "doubled in a last axis": (lambda array, rng: np.stack([array, array], -1), NAMES),
    "two last axes": (lambda array, rng: array[..., None, None], NAMES),
    "reshaped": (lambda array, rng: array.reshape(2, -1), NAMES),
    "transposed": (lambda array, rng: array.T, MATRICES),
    "flat": (lambda array, rng: array.reshape(-1), MATRICES),
    "one column less": (lambda array, rng: array[:, 1:], MATRICES),
    "one column more": (lambda array, rng: np.hstack([array, array[:, :1]]), MATRICES),
    "no columns": (lambda array, rng: array[:, :0], MATRICES),
    "one number": (lambda array, rng: array.flat[0], NAMES),
    "null dataspace": (lambda array, rng: h5py.Empty(array.dtype), NAMES),
    "null dataspace of text": (lambda array, rng: h5py.Empty(h5py.string_dtype()), NAMES),
    "text": (lambda array, rng: np.full(len(array), b"one"), NAMES),
    "numbers as text": (lambda array, rng: array.astype("S"), NAMES),
    "text of any length": (objects("one", h5py.string_dtype()), NAMES),
    "one text": (lambda array, rng: "one", NAMES),
    "one text of fixed length": (lambda array, rng: np.bytes_(b"one"), NAMES),
    "compound": (lambda array, rng: np.zeros(array.shape, [("a\nb", "f4"), ("c", "i4")]), NAMES),
    "one compound": (lambda array, rng: np.zeros((), [("a", "f4"), ("b", "i4")]), NAMES),
    "complex": (lambda array, rng: array.astype(np.complex64), NAMES),
    "one complex": (lambda array, rng: np.complex128(1j), NAMES),
    "opaque": (lambda array, rng: np.zeros(array.shape, "V4"), NAMES),
    "dates": (dates, NAMES),
    "type alone": (lambda array, rng: array.dtype, NAMES),
    "NaN": (with_value(np.nan), NAMES),
    "infinity": (with_value(np.inf), NAMES),
    "minus infinity": (with_value(-np.inf, np.float16), NAMES),
    "all NaN": (lambda array, rng: np.full(array.shape, np.nan), NAMES),
    "beyond float32": (with_value(1e39), NAMES),
    "beyond minus float32": (with_value(-1e300), NAMES),
    "beyond float64": (with_value(np.longdouble("1e400"), np.longdouble), NAMES),
    "action of 1.5": (with_value(1.5), ["actions"]),
    "action of -2.5": (with_value(-2.5), ["actions"]),
    "action just beyond 1": (with_value(1 + 1e-5), ["actions"]),
    "action of -128": (with_value(-128, np.int8), ["actions"]),
    "action of 255": (with_value(255, np.uint8), ["actions"]),
    "action of the least int64": (with_value(-(2**63), np.int64), ["actions"]),
    "flag of 2": (with_value(2), FLAGS),
    "flag of -1": (with_value(-1, np.int8), FLAGS),
    "flag of 0.5": (with_value(0.5), FLAGS),
}


# ------------------------------ one array of a data file, moved within it
def renamed(new):
    """Under another name, which may depend on the old one."""
    return lambda file, name, folder: file.move(name, new(name))


def linked(make):
    """A link in place of the array, which is kept as /kept, where a soft link finds it."""

    def change(file, name, folder):
        file.move(name, "kept")
        file[name] = make(name, folder)

    return change


def remade(make):
    """Whatever make stores under the name, given the file, the name, the array and the folder."""

    def change(file, name, folder):
        array = file[name][()]
        del file[name]
        make(file, name, array, folder)

    return change


def group(file, name, array, folder):
    """A group in the array's place, with the array in it."""
    file.create_dataset(f"{name}/{name}", data=array)


def virtual(source):
    """A virtual array that shows the array of another file or of this one."""

    def make(file, name, array, folder):
        file["kept"] = array
        layout = h5py.VirtualLayout(array.shape, array.dtype)
        path, key = (folder / "other.hdf5", name) if source == "other" else (".", "kept")
        layout[...] = h5py.VirtualSource(path, key, array.shape)
        file.create_virtual_dataset(name, layout)

    return remade(make)


def stored_outside(present):
    """The numbers lie in another file, which is there or is not."""

    def make(file, name, array, folder):
        path = folder / "raw"
        if present:
            path.write_bytes(array.tobytes())
        external = [(str(path), 0, array.nbytes)]
        file.create_dataset(name, array.shape, array.dtype, external=external)

    return remade(make)


def raw_chunk(compression):
    """One chunk of rubbish behind a filter that HDF5 knows or does not know."""

    def make(file, name, array, folder):
        options = {"compression": compression, "allow_unknown_filter": True, "chunks": array.shape}
        dataset = file.create_dataset(name, array.shape, array.dtype, **options)
        dataset.id.write_direct_chunk((0,) * array.ndim, b"rubbish")

    return remade(make)


def referenced(kind, scalar=False):
    """References in place of numbers."""

    def make(file, name, array, folder):
        file["kept"] = array
        reference = file["kept"].ref if kind is h5py.ref_dtype else file["kept"].regionref[:2]
        dataset = file.create_dataset(name, () if scalar else (len(array),), kind)
        dataset[...] = reference

    return remade(make)


def rows_of_any_length(file, name, array, folder):
    """Arrays of variable length in place of rows."""
    dataset = file.create_dataset(name, (len(array),), h5py.vlen_dtype(np.float32))
    for number, row in enumerate(array):
        dataset[number] = np.atleast_1d(row)


def never_written(file, name, array, folder):
    """Created with its shape and type, and left at that."""
    file.create_dataset(name, array.shape, array.dtype)


# What happens to an array within the file; folder holds other.hdf5, a correct file. All of these
# are to be refused, for all of NAMES.
MOVED = {
    "missing": remade(lambda file, name, array, folder: None),
    "renamed": renamed(lambda name: f"{name}_"),
    "renamed with a space": renamed(lambda name: f"{name} "),
    "in capitals": renamed(str.upper),
    "in a group": renamed(lambda name: f"data/{name}"),
    "group in its place": remade(group),
    "empty group in its place": remade(lambda file, name, array, folder: file.create_group(name)),
    "attribute in its place": remade(
        lambda file, name, array, folder: file.attrs.create(name, array)
    ),
    "soft link to nothing": linked(lambda name, folder: h5py.SoftLink("/nowhere")),
    "soft link to itself": linked(lambda name, folder: h5py.SoftLink(f"/{name}")),
    "external link to nothing": linked(
        lambda name, folder: h5py.ExternalLink("nowhere.hdf5", name)
    ),
    "stored outside, and lost": stored_outside(False),
    "broken gzip": raw_chunk("gzip"),
    "unknown filter": raw_chunk(40_000),
    "object references": referenced(h5py.ref_dtype),
    "one object reference": referenced(h5py.ref_dtype, scalar=True),
    "region references": referenced(h5py.regionref_dtype),
    "arrays of any length": remade(rows_of_any_length),
}

# These are no damage: HDF5 finds the very same numbers elsewhere.
FOLLOWED = {
    "soft link": linked(lambda name, folder: h5py.SoftLink("/kept")),
    "external link": linked(lambda name, folder: h5py.ExternalLink("other.hdf5", name)),
    "external link by full path": linked(
        lambda name, folder: h5py.ExternalLink(folder / "other.hdf5", name)
    ),
    "virtual, of another file": virtual("other"),
    "virtual, of this file": virtual("self"),
    "stored outside": stored_outside(True),
}

# And these read as zeros, the fill value, which is all that such an array holds.
ZEROS = {"never written": remade(never_written)}

# Arrays that stand in each other's place. Terminals for timeouts cannot be told.
SWAPS = [pair for pair in itertools.combinations(NAMES, 2) if pair != FLAGS]


def damage_array(path: Path, kind: str, name: str, seed: int) -> None:
    """Write a correct file and do to one array of it what the kind says, by any table above."""
    arrays = columns()
    storage = (FLAT, CHUNKED)[seed % 2]
    if kind not in REPLACED:
        write(path.parent / "other.hdf5", arrays)
    write(path, arrays, storage)
    with h5py.File(path, "r+") as file:
        if kind in REPLACED:
            replace, _ = REPLACED[kind]
            del file[name]
            file[name] = replace(arrays[name], np.random.default_rng(seed))
        else:
            change = (MOVED | FOLLOWED | ZEROS)[kind]
            change(file, name, path.parent)


# ------------------------------ the program
def flaw(data: dict[str, np.ndarray]) -> str | None:
    """What is wrong with the arrays that load_d4rl gave, if anything."""
    rows = len(data["rewards"])
    shapes = {"observations": (rows, 11), "next_observations": (rows, 11), "actions": (rows, 3)}
    types = {"terminals": np.bool_, "episode_ends": np.bool_}
    if data.keys() != {*NAMES[:4], "next_observations", "episode_ends"}:
        return f"keys {sorted(data)}"
    for name, array in data.items():
        if array.shape != shapes.get(name, (rows,)) or array.dtype != types.get(name, np.float32):
            return f"{name} is {array.dtype} {array.shape}"
        if not np.isfinite(array).all():
            return f"{name} is not finite"
    if rows == 0:
        return "no rows"
    if np.abs(data["actions"]).max() > np.float32(1 + 1e-6):
        return "actions out of range"
    if not data["episode_ends"][-1]:
        return "an open end"
    return None


def try_to_load(load, path: Path) -> str:
    """refused, loaded, or what went wrong; the folder has to stay as it is."""
    before = contents(path.parent)
    try:
        fault = flaw(load(ENV, path))
        outcome = f"loaded, but {fault}" if fault else "loaded"
    except (ValueError, FileNotFoundError) as error:
        one_line = len(str(error).splitlines()) == 1
        outcome = "refused" if one_line else f"several lines: {error}"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    if contents(path.parent) != before:
        outcome += ", and the folder has changed"
    return outcome


def main(script: str, folder: Path, cases: int) -> None:
    """Load files with damaged bytes, one after another."""
    load = importlib.import_module(script).load_d4rl
    # A flipped length may ask for any amount of memory: let that fail before the machine suffers.
    resource.setrlimit(resource.RLIMIT_DATA, (4 * 2**30, resource.RLIM_INFINITY))
    path = folder / "x.hdf5"
    bodies = [write(path, columns(), storage).read_bytes() for storage in (FLAT, CHUNKED)]
    for case in range(cases):
        faulthandler.dump_traceback_later(30, exit=True)
        path.write_bytes(damage_bytes(bodies[case % 2], case))
        print(json.dumps({"case": case, "outcome": try_to_load(load, path)}), flush=True)
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
