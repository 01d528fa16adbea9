"""A recommender as a folder: written whole or not at all, verified when read, free of pickles.

manifest.json         what it is, and the checksum of every other file
weights.safetensors   the network
popular.safetensors   what is offered to somebody of whom nothing is known
events/               an event store: ids, training histories, user and item tables
index/                the item index, of a model with vectors
features/             what was fitted to users' and items' columns, of a model that reads them
report.json           measured figures, where there are any
calibration.json      what a ranker's probabilities become, where that was fitted
"""

import json
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from jaxtyping import Float
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from foretaste.data.disk import sync
from foretaste.data.features import Features
from foretaste.data.store import open_store, write_store
from foretaste.errors import BundleError
from foretaste.models.catalogue import ModelConfig, build_model
from foretaste.retrieval.choose import load_index
from foretaste.retrieval.index import ItemIndex
from foretaste.serving.manifest import (
    MANIFEST_FILE,
    DataFacts,
    Manifest,
    list_files,
    plain,
    read_manifest,
    verify_files,
)
from foretaste.training.calibration import Calibration
from foretaste.training.trained import Trained
from foretaste.version import __version__

WEIGHTS_FILE = "weights.safetensors"
POPULAR_FILE = "popular.safetensors"
REPORT_FILE = "report.json"
CALIBRATION_FILE = "calibration.json"
EVENTS_FOLDER = "events"
INDEX_FOLDER = "index"
FEATURES_FOLDER = "features"
LIBRARIES = ("torch", "numpy", "polars", "faiss-cpu", "safetensors")
_MODEL_CONFIG: TypeAdapter[ModelConfig] = TypeAdapter(ModelConfig)
_CALIBRATION: TypeAdapter[dict[str, Calibration]] = TypeAdapter(dict[str, Calibration])


@dataclass(frozen=True, eq=False, kw_only=True)
class Bundle:
    """All that a recommender needs.

    Shape legend: I items.
    """

    trained: Trained
    popular_I: Float[Tensor, " I"]
    """How good an offer each item is to somebody of whom nothing is known; -inf for no offer."""
    index: ItemIndex | None = None
    """Of a retriever's items; None for a model that scores the whole catalogue."""
    report: Mapping[str, object] | None = None
    """Measured figures, as JSON values."""


def write_bundle(bundle: Bundle, path: Path) -> None:
    """Write a bundle, whole or not at all.

    It is written beside `path` under a hidden name, forced to disk, and renamed. An older bundle
    at `path` is moved away first and deleted last; a failure leaves it as it was.

    Raises:
        BundleError: `path` is something else than a bundle, the model is not one of foretaste's,
            or the disk is full or refuses.
    """
    path = path.absolute()
    _check_replaceable(path)
    _check_model(bundle.trained)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _beside(path) as folder:
            _write_parts(bundle, folder)
            _sync(folder)
            _put_in_place(folder, path)
    except (OSError, SafetensorError, BundleError) as error:
        raise BundleError(
            f"{path} could not be written: {error}: nothing of it was left behind; make room or "
            "choose another place"
        ) from error


def read_bundle(path: Path) -> Bundle:
    """Read a bundle of this or any earlier format; large parts are memory-mapped.

    Every listed file is compared with its checksum before any is used; files that the manifest
    does not list are ignored.

    Raises:
        BundleError: Something is missing, changed or broken, or the format is a newer one.
    """
    if not path.is_dir():
        raise BundleError(f"{path} is not a folder: name the folder of a bundle{_leftover(path)}")
    manifest = read_manifest(path)
    verify_files(path, manifest)
    try:
        return _read_parts(manifest, path)
    except (OSError, KeyError, ValueError, SafetensorError, RuntimeError) as error:
        raise BundleError(
            f"{path} cannot be used although its checksums are right: {error}: it was written by "
            f"foretaste {manifest.foretaste}; save it anew with that version"
        ) from error


def _check_replaceable(path: Path) -> None:
    if not path.exists() or (path / MANIFEST_FILE).is_file():
        return
    if path.is_dir() and not any(path.iterdir()):
        return
    raise BundleError(f"{path} exists and is not a bundle: it is left alone; choose another place")


def _check_model(trained: Trained) -> None:
    try:
        _MODEL_CONFIG.validate_python(trained.config.model_dump())
    except ValidationError as error:
        raise BundleError(
            f"{type(trained.config).__name__} is not of foretaste's catalogue of models, so a "
            "bundle of it could not be read: add it to foretaste/models/catalogue.py"
        ) from error


def _make_beside(path: Path, purpose: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=f".{purpose}", dir=path.parent))


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Give a new hidden folder next to `path`; it is deleted unless it was renamed."""
    folder = _make_beside(path, "writing")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_parts(bundle: Bundle, folder: Path) -> None:
    folder.chmod(0o755)  # mkdtemp makes it private
    trained = bundle.trained
    save_file(_owned(trained.model.state_dict()), folder / WEIGHTS_FILE)
    save_file({"popular_I": bundle.popular_I.contiguous()}, folder / POPULAR_FILE)
    write_store(trained.events, folder / EVENTS_FOLDER)
    if bundle.index is not None:
        (folder / INDEX_FOLDER).mkdir()
        bundle.index.save(folder / INDEX_FOLDER)
    if trained.features is not None:
        (folder / FEATURES_FOLDER).mkdir()
        trained.features.save(folder / FEATURES_FOLDER)
    if trained.calibration:
        written = _CALIBRATION.dump_json(dict(trained.calibration), indent=2)
        (folder / CALIBRATION_FILE).write_bytes(written + b"\n")
    if bundle.report is not None:
        text = json.dumps(plain(bundle.report), indent=2)
        (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    manifest = _manifest(bundle).model_copy(update={"files": list_files(folder)})
    (folder / MANIFEST_FILE).write_text(manifest.render(), encoding="utf-8")


def _owned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give each tensor memory of its own, as safetensors wants it."""
    seen: set[int] = set()
    owned: dict[str, Tensor] = {}
    for name, tensor in state.items():
        place = tensor.untyped_storage().data_ptr()
        owned[name] = tensor.cpu().contiguous() if place not in seen else tensor.cpu().clone()
        seen.add(place)
    return owned


def _manifest(bundle: Bundle) -> Manifest:
    trained, events = bundle.trained, bundle.trained.events
    return Manifest(
        foretaste=__version__,
        versions={"python": platform.python_version()}
        | {name: version(name) for name in LIBRARIES},
        model=_mapping(trained.config.model_dump(mode="json")),
        seed=trained.seed,
        train_seconds=trained.train_seconds,
        settings=_mapping(trained.settings),
        log=_mapping(trained.log),
        data=DataFacts(
            fingerprint=events.fingerprint(),
            num_users=events.num_users,
            num_items=events.num_items,
            num_events=len(events),
        ),
        index=None if bundle.index is None else _mapping(bundle.index.facts.model_dump()),
    )


def _mapping(values: Mapping[str, object]) -> dict[str, object]:
    return {str(name): plain(value) for name, value in values.items()}


def _sync(folder: Path) -> None:
    """Force a folder, all below it and its own entry to the disk."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        sync(path)


def _put_in_place(folder: Path, path: Path) -> None:
    """Rename `folder` to `path`; what stood there moves away first, and back if that fails."""
    if not path.exists():
        folder.rename(path)
    else:
        aside = _make_beside(path, "replaced")
        try:
            path.rename(aside / path.name)
            folder.rename(path)
        except OSError:
            if not path.exists():
                (aside / path.name).rename(path)
            aside.rmdir()
            raise
        shutil.rmtree(aside, ignore_errors=True)
    sync(path.parent)


def _leftover(path: Path) -> str:
    """Say where the older bundle lies, if a replacement was cut off between its two renames."""
    found = sorted(path.absolute().parent.glob(f".{path.name}.*.replaced/{path.name}"))
    return f"; {found[-1]} was left there by an interrupted save: move it back" if found else ""


def _read_parts(manifest: Manifest, path: Path) -> Bundle:
    events = open_store(path / EVENTS_FOLDER)
    config = _MODEL_CONFIG.validate_python(manifest.model)
    has_features = any(name.startswith(f"{FEATURES_FOLDER}/") for name in manifest.files)
    features = Features.load(path / FEATURES_FOLDER) if has_features else None
    model = build_model(
        config, num_users=events.num_users, num_items=events.num_items, features=features
    )
    model.load_state_dict(load_file(path / WEIGHTS_FILE), strict=True, assign=True)
    trained = Trained(
        config=config,
        model=model.eval().requires_grad_(requires_grad=False),
        events=events,
        features=features,
        seed=manifest.seed,
        train_seconds=manifest.train_seconds,
        settings=manifest.settings,
        log=manifest.log,
        calibration=_CALIBRATION.validate_json((path / CALIBRATION_FILE).read_bytes())
        if CALIBRATION_FILE in manifest.files
        else {},
    )
    return Bundle(
        trained=trained,
        popular_I=load_file(path / POPULAR_FILE)["popular_I"],
        index=None if manifest.index is None else load_index(path / INDEX_FOLDER),
        report=_read_report(manifest, path),
    )


def _read_report(manifest: Manifest, path: Path) -> Mapping[str, object] | None:
    if REPORT_FILE not in manifest.files:
        return None
    report: Mapping[str, object] = json.loads((path / REPORT_FILE).read_text(encoding="utf-8"))
    return report
