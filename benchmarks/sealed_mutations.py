"""Bundles changed at random and sealed again, like those of a faulty or malicious writer.

Each is loaded by a server's slot, including trials in child processes. An accepted bundle must give
the answers that were recorded when the original was saved, with finite scores and items of the
catalogue, from an index that holds the model's vectors. With a key, all must be refused.

    python benchmarks/faults.py --mutations 1000 --out benchmarks/results/service.json
"""

import hashlib
import io
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import safetensors.numpy

from foretaste.data.folder import MANIFEST_FILE, entry_of
from foretaste.data.store import StoreManifest
from foretaste.errors import ForetasteError
from foretaste.serving.bundle import BundleManifest
from foretaste.serving.recommender import build_recommender
from foretaste.serving.slot import Trials
from foretaste.serving.versions import Versions, sign_bundle

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from test_two_stage import make_two_stage
from worlds import make_trained, write_film_bundle

KEY = b"k" * 64
EXTREME = [0, -1, 1, 7, 2**31 - 1, -(2**31), 10**5, 2**62, 1e308, None, "", "x", [], {}, True]


def write_bundles(folder: Path) -> list[Path]:
    """Write one small bundle of each kind."""
    paths = [write_film_bundle(folder / "item_knn")]
    for kind in ("exact", "ivf_flat", "ivf_sq8", "ivf_pq", "hnsw"):
        build_recommender(make_trained("sasrec"), index=kind).save(folder / kind)
        paths.append(folder / kind)
    build_recommender(make_two_stage(make_trained("sasrec").config)).save(folder / "two_stage")
    return [*paths, folder / "two_stage"]


def mutate(bundle: Path, rng: np.random.Generator) -> str:
    """Change a bundle at random in one or two places; return a description."""
    times = 1 + int(rng.integers(2))
    return " and ".join(_mutate_once(bundle, rng, is_first=not n) for n in range(times))


def _mutate_once(bundle: Path, rng: np.random.Generator, *, is_first: bool) -> str:
    files = sorted(p for p in bundle.rglob("*") if p.is_file())
    path = files[rng.integers(len(files))]
    ways: list[Callable[[Path, np.random.Generator], str]] = [_bytes, _bytes, _smear, _cut]
    if path.suffix == ".json":
        ways += [_json] * 8
    if path.suffix in (".npy", ".safetensors"):
        ways += [_array] * 8
    if path.suffix == ".arrow" and is_first:  # a broken one could end this process too
        ways += [_table] * 4
    way = ways[rng.integers(len(ways))]
    try:
        return f"{path.relative_to(bundle)}: {way(path, rng)}"
    except (ValueError, OSError, KeyError, safetensors.SafetensorError, pl.exceptions.PolarsError):
        return f"{path.relative_to(bundle)}: {_bytes(path, rng)}"  # broken by the first change


def _bytes(path: Path, rng: np.random.Generator) -> str:
    content = bytearray(path.read_bytes() or b"\0")
    for _ in range(1 + rng.integers(4)):
        content[rng.integers(len(content))] = rng.integers(256)
    path.write_bytes(content)
    return "bytes"


def _smear(path: Path, rng: np.random.Generator) -> str:
    content = bytearray(path.read_bytes())
    size = max(1, int(len(content) * 10 ** rng.uniform(-3, -1)))
    start = int(rng.integers(max(1, len(content) - size)))
    content[start : start + size] = rng.bytes(size)
    path.write_bytes(content)
    return f"{size} bytes in a row"


def _cut(path: Path, rng: np.random.Generator) -> str:
    content = path.read_bytes()
    if rng.integers(2):
        path.write_bytes(content[: rng.integers(len(content) + 1)])
        return "cut short"
    path.write_bytes(content + rng.bytes(1 + rng.integers(1000)))
    return "made longer"


def _json(path: Path, rng: np.random.Generator) -> str:
    document = json.loads(path.read_text())
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, inner in items:
            places.append((value, name))
            if isinstance(inner, dict | list):
                walk(inner)

    walk(document)
    holder, name = places[rng.integers(len(places))]
    if rng.integers(5) == 0:
        del holder[name]
    else:
        holder[name] = EXTREME[rng.integers(len(EXTREME))]
    path.write_text(json.dumps(document))
    return f"{name}"


def _array(path: Path, rng: np.random.Generator) -> str:
    if path.suffix == ".npy":
        array = np.load(path, allow_pickle=False)
        array, what = _changed(array, rng)
        np.save(path, array, allow_pickle=False)
        return what
    tensors = safetensors.numpy.load_file(path)
    name = sorted(tensors)[rng.integers(len(tensors))]
    tensors[name], what = _changed(tensors[name], rng)
    safetensors.numpy.save_file(tensors, path)
    return f"{name}: {what}"


def _changed(array: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    flat = array.copy().reshape(-1)
    way = int(rng.integers(6))
    if way == 0 or not flat.size:
        return array[: len(array) // 2] if array.ndim else array + 1, "half of its rows"
    if way == 1:
        other = np.float64 if array.dtype != np.float64 else np.int64
        return array.astype(other), f"{other.__name__}"
    if way == 2 and array.ndim:
        return np.ascontiguousarray(array[rng.permutation(len(array))]), "rows in another order"
    values = (
        [np.nan, np.inf, -np.inf, 3e38, -1e20]
        if array.dtype.kind == "f"
        else [-1, 2**31 - 1, -(2**31), len(flat), 100_000]
    )
    for _ in range(1 + rng.integers(3)):
        with np.errstate(all="ignore"):
            value = np.array(values[rng.integers(len(values))]).astype(array.dtype)
        flat[rng.integers(flat.size)] = value
    return flat.reshape(array.shape), "extreme values"


def _table(path: Path, rng: np.random.Generator) -> str:
    table = pl.read_ipc(io.BytesIO(path.read_bytes()))
    way = int(rng.integers(4))
    if way == 0:
        pl.concat([table] * int(rng.integers(1, 1000))).write_ipc(path, compression="zstd")
        return "compressed"
    if way == 1:
        table.head(1).write_ipc(path)
        return "one row"
    if way == 2:
        table.with_columns(pl.lit(None).alias(table.columns[0])).write_ipc(path)
        return "nothing but nulls"
    pl.concat([table, table]).write_ipc(path)
    return "rows twice"


def seal_again(bundle: Path) -> None:
    """Write correct checksums of the current files into both manifests, if they can be read."""
    for folder, kind in ((bundle / "events", StoreManifest), (bundle, BundleManifest)):
        path = folder / MANIFEST_FILE
        try:
            document = json.loads(path.read_text())
            document.pop("checksum", None)
            for name in document["files"]:
                if (folder / name).is_file():
                    document["files"][name] = vars(entry_of(folder / name))
            try:
                path.write_text(kind.model_validate(kind.upgraded(document)).render())
            except (ForetasteError, ValueError, AttributeError, TypeError):
                path.write_text(_rendered(document))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue


def _rendered(document: dict[str, Any]) -> str:
    own = hashlib.sha256(json.dumps(document, indent=2).encode()).hexdigest()
    return json.dumps({**document, "checksum": own}, indent=2) + "\n"


@dataclass
class Count:
    """The results of the mutations."""

    tried: int = 0
    unchanged: int = 0
    refused: int = 0
    accepted: int = 0
    died_in_trial: int = 0
    crashed: int = 0
    tracebacks: int = 0
    wrong_accepted: int = 0
    signed_accepted: int = 0
    slowest_s: float = 0.0
    wrong: list[str] = field(default_factory=list)
    causes: Counter[str] = field(default_factory=Counter)


def try_one(
    original: Path,
    folder: Path,
    trials: Trials,
    examiner: Trials,
    rng: np.random.Generator,
    count: Count,
) -> None:
    """Break a copy of a bundle, seal it again, and try it as a server does."""
    broken = folder / "bundle"
    shutil.copytree(original, broken)
    sign_bundle_with(broken)
    before = {p: p.read_bytes() for p in broken.rglob("*") if p.is_file()}
    what = f"{original.name} {mutate(broken, rng)}"
    seal_again(broken)
    count.tried += 1
    if all(p.is_file() and p.read_bytes() == content for p, content in before.items()):
        count.unchanged += 1
        return
    started = time.perf_counter()
    versions = Versions(broken, folder / "versions")
    try:
        version = versions.take()
        copy = versions.path(version)
        trials.try_bundle(copy)
    except ForetasteError as error:
        count.refused += 1
        count.tracebacks += "Traceback" in str(error)
        count.died_in_trial += "ended the process" in str(error)
        count.causes[str(error).partition(": ")[2][:60]] += 1
        count.slowest_s = max(count.slowest_s, time.perf_counter() - started)
        return
    except Exception as error:  # noqa: BLE001 - that is what is counted
        count.tracebacks += 1
        count.wrong.append(f"{what}: {type(error).__name__} {error}")
        return
    count.slowest_s = max(count.slowest_s, time.perf_counter() - started)
    count.accepted += 1
    try:
        Versions(broken, folder / "versions", key=KEY).check_signature(version)
        count.signed_accepted += 1
        count.wrong.append(f"{what}: accepted with the signature of another")
    except ForetasteError:
        pass
    (folder / "original").write_text(str(original))
    try:
        examiner.try_bundle(copy)
    except ForetasteError as error:
        died = "ended the process" in str(error)
        count.crashed, count.wrong_accepted = count.crashed + died, count.wrong_accepted + 1
        count.wrong.append(f"{what}: {error}")


def sign_bundle_with(bundle: Path) -> None:
    """Sign a bundle with the shared test key."""
    key = bundle.with_name("key")
    key.write_bytes(KEY)
    sign_bundle(bundle, key)


def mutations(
    number: int, *, seed: int, trials: Trials, folder: Path, count: Count | None = None
) -> Iterator[Count]:
    """Try mutations of bundles of all kinds in turn until `count` reaches the number.

    Yields the count after each 25 and at the end.
    """
    count = count or Count()
    bundles = write_bundles(folder / "sound")
    for bundle in bundles:
        trials.try_bundle(bundle)  # they are sound
    program = [str(Path(__file__).with_name("sealed_examiner.py"))]
    with closing(Trials(timeout_s=600.0, within_s=60.0, program=program)) as examiner:
        for turn in range(count.tried, number):
            rng = np.random.default_rng([seed, turn])
            with tempfile.TemporaryDirectory(dir=folder) as inner:
                bundle = bundles[turn % len(bundles)]
                try_one(bundle, Path(inner), trials, examiner, rng, count)
            if count.tried % 25 == 0:
                yield count
    yield count
