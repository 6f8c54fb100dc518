"""Ways to damage data files and checkpoints, for test_fuzz.py. As a program: byte damage against load_d4rl.

    python tests/mutate.py SCRIPT FOLDER CASES

prints one line of JSON per case, so that even a crash of the HDF5 library only ends the list early.
"""

import faulthandler
import importlib
import json
import os
import resource
import sys
from pathlib import Path

import h5py
import numpy as np

ENV, ROWS = "hopper-medium-v2", 30
NAMES = ("observations", "actions", "rewards", "terminals", "timeouts")
FLAT, CHUNKED = {}, {"compression": "gzip"}  # how arrays are stored


def columns(width: int = 11, rows: int = ROWS) -> dict[str, np.ndarray]:
    """A small, correct data set for Hopper, or, with another width, for something else."""
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
    """Every file below a folder, less the lock that a run may leave."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "in_use_by_a_run.lock")
    return {str(path): path.read_bytes() for path in files}


# ------------------------------ bytes
def damage_bytes(body: bytes, seed: int) -> bytes:
    """The body with one byte, a run of random bytes or a block of zeros put in: never the body itself."""
    rng, old = np.random.default_rng(seed), np.frombuffer(body, np.uint8)
    start = rng.choice(np.flatnonzero(old))  # padding would often not be read at all
    new = old.copy()
    if seed % 3 == 0:
        new[start] ^= rng.integers(1, 256)
    elif seed % 3 == 1:
        block = new[start : start + rng.integers(2, 65)]
        block[:] = rng.integers(0, 256, len(block))
    else:
        new[start : start + rng.integers(1, 257)] = 0
    return damage_bytes(body, seed + 3000) if (new == old).all() else new.tobytes()


def truncations(body: bytes, count: int, seed: int) -> dict[str, bytes]:
    """The body cut at the start, near the end and at random places."""
    places = {0, 1, len(body) // 2, len(body) - 1}
    places |= set(np.random.default_rng(seed).integers(2, len(body) - 1, count - len(places)).tolist())
    return {f"cut to {place} bytes": body[:place] for place in sorted(places)}


# ------------------------------ one array of a data file
def with_value(value: float, dtype=np.float64):
    """One random element replaced."""

    def replaced(x, rng):
        x = x.astype(dtype)
        x[tuple(rng.integers(x.shape))] = value
        return x

    return replaced


def objects(array, kind):
    """Something of the array's length for h5py to store as variable-length data."""
    return lambda x, rng: np.array([array] * len(x), dtype=kind)


# What takes the place of an array x: kind -> (function, names of the arrays).
REPLACED = {
    "zero rows": (lambda x, rng: x[:0], NAMES),
    "one row": (lambda x, rng: x[:1], NAMES),
    "one row less": (lambda x, rng: x[:-1], NAMES),
    "random rows less": (lambda x, rng: x[: rng.integers(2, len(x))], NAMES),
    "one row more": (lambda x, rng: np.concatenate([x, x[-1:]]), NAMES),
    "twice as long": (lambda x, rng: np.concatenate([x, x]), NAMES),
    "axis in front": (lambda x, rng: x[None], NAMES),
    "doubled in a last axis": (lambda x, rng: np.stack([x, x], -1), NAMES),
    "two last axes": (lambda x, rng: x[..., None, None], NAMES),
    "reshaped": (lambda x, rng: x.reshape(2, -1), NAMES),
    "transposed": (lambda x, rng: x.T, NAMES[:2]),
    "flat": (lambda x, rng: x.reshape(-1), NAMES[:2]),
    "one column less": (lambda x, rng: x[:, 1:], NAMES[:2]),
    "one column more": (lambda x, rng: np.concatenate([x, x[:, :1]], axis=1), NAMES[:2]),
    "no columns": (lambda x, rng: x[:, :0], NAMES[:2]),
    "one number": (lambda x, rng: x.flat[0], NAMES),
    "null dataspace": (lambda x, rng: h5py.Empty(x.dtype), NAMES),
    "null dataspace of text": (lambda x, rng: h5py.Empty(h5py.string_dtype()), NAMES),
    "text": (lambda x, rng: np.full(len(x), b"one"), NAMES),
    "numbers as text": (lambda x, rng: x.astype("S"), NAMES),
    "text of any length": (objects("one", h5py.string_dtype()), NAMES),
    "one text": (lambda x, rng: "one", NAMES),
    "one text of fixed length": (lambda x, rng: np.bytes_(b"one"), NAMES),
    "compound": (lambda x, rng: np.zeros(x.shape, [("a\nb", "f4"), ("c", "i4")]), NAMES),
    "one compound": (lambda x, rng: np.zeros((), [("a", "f4"), ("b", "i4")]), NAMES),
    "complex": (lambda x, rng: x.astype(np.complex64), NAMES),
    "one complex": (lambda x, rng: np.complex128(1j), NAMES),
    "opaque": (lambda x, rng: np.zeros(x.shape, "V4"), NAMES),
    "dates": (lambda x, rng: np.zeros(x.shape, "M8[s]").astype(h5py.opaque_dtype("M8[s]")), NAMES),
    "type alone": (lambda x, rng: x.dtype, NAMES),
    "NaN": (with_value(np.nan), NAMES),
    "infinity": (with_value(np.inf), NAMES),
    "minus infinity": (with_value(-np.inf, np.float16), NAMES),
    "all NaN": (lambda x, rng: np.full(x.shape, np.nan), NAMES),
    "beyond float32": (with_value(1e39), NAMES),
    "beyond minus float32": (with_value(-1e300), NAMES),
    "beyond float64": (with_value(np.longdouble("1e400"), np.longdouble), NAMES),
    "action of 1.5": (with_value(1.5), ["actions"]),
    "action of -2.5": (with_value(-2.5), ["actions"]),
    "action just beyond 1": (with_value(1 + 1e-5), ["actions"]),
    "action of -128": (with_value(-128, np.int8), ["actions"]),
    "action of 255": (with_value(255, np.uint8), ["actions"]),
    "action of the least int64": (with_value(-(2**63), np.int64), ["actions"]),
    "flag of 2": (with_value(2), NAMES[3:]),
    "flag of -1": (with_value(-1, np.int8), NAMES[3:]),
    "flag of 0.5": (with_value(0.5), NAMES[3:]),
}


def renamed(new):
    """Under another name, which may depend on the old one."""
    return lambda file, name, folder: file.move(name, new(name))


def linked(make):
    """A link in place of the array, which is kept as /kept, where a soft link finds it."""

    def act(file, name, folder):
        file.move(name, "kept")
        file[name] = make(name, folder)

    return act


def remade(make):
    """Whatever make stores under the name, given the file, the name, the array and the folder."""

    def act(file, name, folder):
        array = file[name][()]
        del file[name]
        make(file, name, array, folder)

    return act


def virtual(source):
    """A virtual data set that shows the array of another file or of this one."""

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
        if present:
            (folder / "raw").write_bytes(array.tobytes())
        outside = [(str(folder / ("raw" if present else "nowhere")), 0, array.nbytes)]
        file.create_dataset(name, array.shape, array.dtype, external=outside)

    return remade(make)


def raw_chunk(compression):
    """One chunk of rubbish behind a filter that HDF5 knows or does not know."""

    def make(file, name, array, folder):
        options = {"compression": compression, "allow_unknown_filter": True, "chunks": array.shape}
        data = file.create_dataset(name, array.shape, array.dtype, **options)
        data.id.write_direct_chunk((0,) * array.ndim, b"rubbish")

    return remade(make)


def referenced(kind, scalar=False):
    """References in place of numbers."""

    def make(file, name, array, folder):
        file["kept"] = array
        one = file["kept"].ref if kind is h5py.ref_dtype else file["kept"].regionref[:2]
        data = file.create_dataset(name, () if scalar else (len(array),), kind)
        data[...] = one

    return remade(make)


def vlen(file, name, array, folder):
    """Arrays of any length in place of rows."""
    data = file.create_dataset(name, (len(array),), h5py.vlen_dtype(np.float32))
    for i, row in enumerate(array):
        data[i] = np.atleast_1d(row)


# What happens to an array within the file; all of NAMES in turn. folder holds other.hdf5, a correct file.
MOVED = {
    "missing": remade(lambda *_: None),
    "renamed": renamed(lambda name: f"{name}_"),
    "renamed with a space": renamed(lambda name: f"{name} "),
    "in capitals": renamed(str.upper),
    "in a group": renamed("data/{}".format),
    "group in its place": remade(lambda file, name, x, folder: file.create_dataset(f"{name}/{name}", data=x)),
    "empty group in its place": remade(lambda file, name, x, folder: file.create_group(name)),
    "attribute in its place": remade(lambda file, name, x, folder: file.attrs.create(name, x)),
    "soft link": linked(lambda name, folder: h5py.SoftLink("/kept")),
    "soft link to nothing": linked(lambda name, folder: h5py.SoftLink("/nowhere")),
    "soft link to itself": linked(lambda name, folder: h5py.SoftLink(f"/{name}")),
    "external link": linked(lambda name, folder: h5py.ExternalLink("other.hdf5", name)),
    "external link by full path": linked(lambda n, folder: h5py.ExternalLink(folder / "other.hdf5", n)),
    "external link to nothing": linked(lambda name, folder: h5py.ExternalLink("nowhere.hdf5", name)),
    "virtual, of another file": virtual("other"),
    "virtual, of this file": virtual("self"),
    "stored outside": stored_outside(True),
    "stored outside, and lost": stored_outside(False),
    "broken gzip": raw_chunk("gzip"),
    "unknown filter": raw_chunk(40_000),
    "object references": referenced(h5py.ref_dtype),
    "one object reference": referenced(h5py.ref_dtype, scalar=True),
    "region references": referenced(h5py.regionref_dtype),
    "arrays of any length": remade(vlen),
}

# Arrays that stand in each other's place. Terminals for timeouts cannot be told.
SWAPS = [(a, b) for i, a in enumerate(NAMES) for b in NAMES[i + 1 :] if (a, b) != NAMES[3:]]


def damage_array(path: Path, kind: str, name: str, seed: int) -> None:
    """Write a correct file and damage one array of it."""
    arrays, storage = columns(), (FLAT, CHUNKED)[seed % 2]
    if kind in REPLACED:
        write(path, arrays, storage)
        with h5py.File(path, "r+") as file:
            del file[name]
            file[name] = REPLACED[kind][0](arrays[name], np.random.default_rng(seed))
    else:
        write(path.parent / "other.hdf5", arrays)
        write(path, arrays, storage)
        with h5py.File(path, "r+") as file:
            MOVED[kind](file, name, path.parent)


# ------------------------------ the program
def flaw(data: dict[str, np.ndarray]) -> str | None:
    """What is wrong with the arrays that load_d4rl gave, if anything."""
    rows = len(data["rewards"])
    shapes = {"observations": (rows, 11), "next_observations": (rows, 11), "actions": (rows, 3)}
    kinds = {"terminals": np.bool_, "dones": np.bool_}
    if data.keys() != {*NAMES[:4], "next_observations", "dones"}:
        return f"keys {sorted(data)}"
    for name, array in data.items():
        if array.shape != shapes.get(name, (rows,)) or array.dtype != kinds.get(name, np.float32):
            return f"{name} is {array.dtype} {array.shape}"
        if not np.isfinite(array).all():
            return f"{name} is not finite"
    if rows == 0 or np.abs(data["actions"]).max() > np.float32(1 + 1e-6) or not data["dones"][-1]:
        return "no rows, actions out of range, or an open end"
    return None


def try_to_load(load, path: Path) -> str:
    """refused, loaded, or what went wrong; the folder has to stay as it is."""
    before = contents(path.parent)
    try:
        fault = flaw(load(ENV, str(path)))
        outcome = f"loaded, but {fault}" if fault else "loaded"
    except (ValueError, FileNotFoundError) as error:
        outcome = f"several lines: {error}" if len(str(error).splitlines()) != 1 else "refused"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    return outcome if contents(path.parent) == before else f"{outcome}, and the folder has changed"


def main(name: str, folder: Path, cases: int) -> None:
    load = importlib.import_module(name).load_d4rl
    # A flipped length may ask for any amount of memory: let that fail before the machine suffers.
    resource.setrlimit(resource.RLIMIT_DATA, (4 * 2**30, resource.RLIM_INFINITY))
    bodies = [write(folder / "x.hdf5", columns(), storage).read_bytes() for storage in (FLAT, CHUNKED)]
    for case in range(cases):
        faulthandler.dump_traceback_later(30, exit=True)
        (folder / "x.hdf5").write_bytes(damage_bytes(bodies[case % 2], case))
        print(json.dumps({"case": case, "outcome": try_to_load(load, folder / "x.hdf5")}), flush=True)
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
