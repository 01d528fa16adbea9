"""Bundles: a recommender as a folder, written atomically, verified when read, without pickles.

manifest.json         facts about the bundle, and the checksum of every other file
weights.safetensors   the network
popular.safetensors   the scores for a user without history and profile
events/               an event store: ids, training histories, user and item tables
index/                the item index, for a model with vectors
features/             the encoders of users' and items' columns, for a model that reads them
answers.json          queries, and the answers of the model when it was saved
report.json           measured figures, if there are any
calibration.json      the calibration of a ranker's probabilities, if it was fitted

Format 2 has optional parts, `PLACES`; `optional` in the manifest has the facts about each. Later
versions may fill them; this version does not write them.
"""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeInt, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from foretaste.config import Config
from foretaste.data.features import Features
from foretaste.data.folder import (
    MANIFEST_FILE,
    FolderManifest,
    files_below,
    leftover,
    read_manifest,
    seal,
    verify_files,
    whole_folder,
)
from foretaste.data.splits import LearnedFrom
from foretaste.data.store import fill_store, open_store
from foretaste.errors import BundleError
from foretaste.models.bert4rec import BERT4Rec
from foretaste.models.catalogue import ModelConfig, as_written, build_model
from foretaste.models.layers.nodes import NodeInputs
from foretaste.models.layers.row_fields import RowFields
from foretaste.models.lightgcn import LightGCN
from foretaste.models.mf import MF
from foretaste.models.sasrec import SASRec
from foretaste.models.two_tower import TwoTower
from foretaste.retrieval.choose import load_index
from foretaste.retrieval.index import ItemIndex
from foretaste.serving.self_test import StoredAnswers
from foretaste.shown import json_value
from foretaste.training.checkpoint import save_tensors
from foretaste.training.objectives import ObjectiveConfig
from foretaste.training.trained import Calibration, Trained
from foretaste.version import __version__

WEIGHTS_FILE = "weights.safetensors"
POPULAR_FILE = "popular.safetensors"
REPORT_FILE = "report.json"
CALIBRATION_FILE = "calibration.json"
ANSWERS_FILE = "answers.json"
EVENTS_FOLDER = "events"
INDEX_FOLDER = "index"
FEATURES_FOLDER = "features"
LIBRARIES = ("torch", "numpy", "polars", "faiss-cpu", "safetensors")
_SMALL = 2**20
_LARGEST = 1e12
"""Larger weights mean damage: their products overflow float32."""
_LEARNED_FROM = {
    "train": "the training part of its split, without validation and test",
    "train and validation": "the training and validation parts of its split, without the test",
    "all events": "all of its split, validation and test included",
}
PLACES = {
    "optimizer": "optimizer/: the optimizer's state, with which training can continue",
    "answers": "answers.json: queries, and the answers of the model when it was saved",
    "base": "the checksum of the manifest of the version from which this one was updated",
    "shards": "weights-NUMBER-of-NUMBER.safetensors: the weights in several files",
    "signature": "signature.json: a signature of the manifest",
}
"""Optional parts of a bundle, with descriptions."""
_READABLE: frozenset[str] = frozenset()
"""The optional parts that this version can read although a bundle may depend on them."""
_MODEL_CONFIG: TypeAdapter[ModelConfig] = TypeAdapter(ModelConfig)
_OBJECTIVE: TypeAdapter[ObjectiveConfig | None] = TypeAdapter(ObjectiveConfig | None)
_CALIBRATION: TypeAdapter[dict[str, Calibration]] = TypeAdapter(dict[str, Calibration])


class DataFacts(Config):
    """Facts about the training data."""

    fingerprint: str
    """`Interactions.fingerprint` of the training events."""
    num_users: NonNegativeInt
    """Number of users."""
    num_items: NonNegativeInt
    """Number of items."""
    num_events: NonNegativeInt
    """Number of events."""


class BundleManifest(FolderManifest):
    """The manifest of a bundle: everything except its tensors and tables."""

    kind = "bundle"
    latest = 2
    remedy = "save the bundle again"

    format: Literal["foretaste-bundle"] = "foretaste-bundle"
    """Identifies the folder as a bundle."""
    format_version: int = 2
    """Version of the bundle format."""
    foretaste: str
    """Version of foretaste that wrote it."""
    versions: dict[str, str]
    """Versions of Python and of the libraries that affect the results."""
    model: dict[str, object]
    """The model's settings, with its `kind`."""
    seed: int
    """The seed of the run."""
    train_seconds: float
    """Seconds that training took."""
    settings: dict[str, object]
    """Everything that determined the run."""
    log: dict[str, object]
    """The log of training: losses and validations by epoch."""
    data: DataFacts
    """Facts about the training events."""
    index: dict[str, object] | None
    """Facts about the item index, with its measured recall; None for a model without vectors."""
    objective: dict[str, object] | None = None
    """The training objective; None for a model that is fitted in closed form."""
    learned_from: LearnedFrom | Literal[""] = ""
    """The parts of its split that the model was trained on."""
    optional: dict[str, dict[str, object]] = Field(default_factory=dict)
    """Facts about each optional part of the bundle, by its name."""
    needs: tuple[str, ...] = ()
    """The optional parts without which the bundle cannot be read."""

    @classmethod
    def upgraded(cls, document: dict[str, Any]) -> dict[str, Any]:
        """Convert format 1, in which the objective is part of the settings and the log."""
        if document.get("format_version") != 1:
            return document
        settings, log = document.get("settings", {}), document.get("log", {})
        learned_from = log.get("learned_from", "")
        if "refit" in settings:
            learned_from = "train and validation" if settings["refit"] else "train"
        sent = {"objective": settings.get("objective"), "learned_from": learned_from}
        return document | sent


@dataclass(frozen=True, eq=False, kw_only=True)
class Bundle:
    """The contents of a bundle: everything that a recommender needs.

    Shape legend: I items.
    """

    trained: Trained
    popular_I: Float[Tensor, " I"]
    """Score of each item for a user without history and profile; -inf excludes the item."""
    index: ItemIndex | None = None
    """The index of a retriever's items; None for a model that scores the whole catalogue."""
    report: Mapping[str, object] | None = None
    """Measured figures, as JSON values."""
    answers: StoredAnswers | None = None
    """The answers of the model when it was saved."""

    @property
    def learned_from(self) -> str:
        """The events that the model was trained on, in words."""
        parts = self.trained.learned_from
        sent = f"{len(self.trained.events):,} events"
        return f"{sent}: {_LEARNED_FROM[parts]}" if parts in _LEARNED_FROM else sent

    @property
    def measured_on(self) -> str:
        """The events that the report was measured on, in words."""
        if self.report is None:
            return "nothing, because there is no report"
        if self.trained.learned_from == "all events":
            return (
                "the test part, by a first run that had not learned from it; this model was not "
                "measured, because it also learned from the test part"
            )
        holdout = self.report.get("holdout")
        return f"the {holdout} part" if holdout else "events that the report does not name"


def write_bundle(bundle: Bundle, path: Path, *, replace: bool = False) -> None:
    """Write a bundle atomically; see `whole_folder`.

    Args:
        bundle: The bundle.
        path: The bundle's folder; missing parent folders are created.
        replace: Replace an existing bundle; after a failure it is unchanged.

    Raises:
        BundleError: `path` exists and `replace` is false, or it is not a bundle, the model is not
            one of foretaste's, or the disk is full or not writable.
    """
    _check_model(bundle.trained)
    with whole_folder(path, "bundle", replace=replace) as folder:
        _write_parts(bundle, folder)


def read_bundle(path: Path) -> Bundle:
    """Read a bundle of this or any earlier format; large parts are memory-mapped.

    All listed files are verified by their checksums before any is used. A file that could be read
    but is not listed is an error; other unlisted files are ignored.

    Raises:
        BundleError: A file is missing, changed or damaged, or the format is newer.
    """
    if not path.is_dir():
        raise BundleError(
            f"{path} is not a folder: name the folder of a bundle{leftover(path)}",
            name=str(path),
            value=str(path),
        )
    manifest = read_manifest(path, BundleManifest)
    _check_needs(manifest, path)
    _check_listed(manifest, path)
    verify_files(path, manifest)
    try:
        return _read_parts(manifest, path)
    except (OSError, KeyError, ValueError, SafetensorError, RuntimeError) as error:
        raise BundleError(
            f"{path} cannot be read although its checksums match: {error}: it was written by "
            f"foretaste {manifest.foretaste}; save it again with that version",
            name=str(path),
            value=str(path),
        ) from error


def _check_needs(manifest: BundleManifest, path: Path) -> None:
    unknown = [name for name in manifest.needs if name not in _READABLE]
    if unknown:
        what = f" ({PLACES[unknown[0]]})" if unknown[0] in PLACES else ""
        raise BundleError(
            f"{path} cannot be read without its {unknown[0]}{what}, which this version does not "
            f"read: install foretaste {manifest.foretaste}, which wrote it, or a newer one",
            name=unknown[0],
            value=str(path),
        )


def _check_listed(manifest: BundleManifest, path: Path) -> None:
    """Raise an error if the manifest omits a file that could be read."""
    needed = {WEIGHTS_FILE, POPULAR_FILE, f"{EVENTS_FOLDER}/{MANIFEST_FILE}"}
    for folder in (EVENTS_FOLDER, INDEX_FOLDER, FEATURES_FOLDER):
        needed |= {f"{folder}/{name}" for name in files_below(path / folder)}
    left_out = sorted(needed - manifest.files.keys())
    if left_out:
        raise BundleError(
            f"{path / MANIFEST_FILE} does not list {left_out[0]}, which has no checksum therefore: "
            f"remove the file if it does not belong to the bundle, or {manifest.remedy}",
            name=str(path / MANIFEST_FILE),
            value=left_out[0],
        )


def _check_model(trained: Trained) -> None:
    try:
        _MODEL_CONFIG.validate_python(trained.config.model_dump())
    except ValidationError as error:
        raise BundleError(
            f"{type(trained.config).__name__} is not in foretaste's catalogue of models, so a "
            "bundle of it could not be read: add it to foretaste/models/catalogue.py",
            name="trained",
            value=type(trained.config).__name__,
        ) from error


def _write_parts(bundle: Bundle, folder: Path) -> None:
    trained = bundle.trained
    save_tensors(trained.model.state_dict(), folder / WEIGHTS_FILE)
    save_tensors({"popular_I": bundle.popular_I}, folder / POPULAR_FILE)
    fill_store(trained.events, folder / EVENTS_FOLDER)
    if bundle.index is not None:
        (folder / INDEX_FOLDER).mkdir()
        bundle.index.save(folder / INDEX_FOLDER)
    if trained.features is not None:
        (folder / FEATURES_FOLDER).mkdir()
        trained.features.save(folder / FEATURES_FOLDER)
    if trained.calibration:
        written = _CALIBRATION.dump_json(dict(trained.calibration), indent=2)
        (folder / CALIBRATION_FILE).write_bytes(written + b"\n")
    if bundle.answers is not None:
        (folder / ANSWERS_FILE).write_bytes(bundle.answers.model_dump_json().encode() + b"\n")
    if bundle.report is not None:
        text = json.dumps(json_value(bundle.report), indent=2)
        (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    seal(folder, _manifest(bundle))


def _manifest(bundle: Bundle) -> BundleManifest:
    trained, events = bundle.trained, bundle.trained.events
    return BundleManifest(
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
        objective=None
        if trained.objective is None
        else _mapping(trained.objective.model_dump(mode="json")),
        learned_from=trained.learned_from,
        optional={} if bundle.answers is None else {"answers": {"file": ANSWERS_FILE}},
    )


def _mapping(values: Mapping[str, object]) -> dict[str, object]:
    return {str(name): json_value(value) for name, value in values.items()}


def _read_parts(manifest: BundleManifest, path: Path) -> Bundle:
    events = open_store(path / EVENTS_FOLDER, trusted=False)
    config = _MODEL_CONFIG.validate_python(as_written(manifest.model))
    has_features = any(name.startswith(f"{FEATURES_FOLDER}/") for name in manifest.files)
    features = Features.load(path / FEATURES_FOLDER) if has_features else None
    model = build_model(
        config, num_users=events.num_users, num_items=events.num_items, features=features
    )
    _load_weights(model, path / WEIGHTS_FILE)
    trained = Trained(
        config=config,
        model=model.eval().requires_grad_(requires_grad=False),
        events=events,
        features=features,
        seed=manifest.seed,
        train_seconds=manifest.train_seconds,
        objective=_OBJECTIVE.validate_python(manifest.objective),
        learned_from=manifest.learned_from,
        settings=_as_written(manifest.settings),
        log=manifest.log,
        calibration=_CALIBRATION.validate_json((path / CALIBRATION_FILE).read_bytes())
        if CALIBRATION_FILE in manifest.files
        else {},
    )
    return Bundle(
        trained=trained,
        popular_I=_load_popular(path / POPULAR_FILE, events.num_items),
        index=None if manifest.index is None else load_index(path / INDEX_FOLDER, is_verified=True),
        report=_read_report(manifest, path),
        answers=StoredAnswers.model_validate_json((path / ANSWERS_FILE).read_bytes())
        if ANSWERS_FILE in manifest.files
        else None,
    )


def _load_weights(model: nn.Module, file: Path) -> None:
    weights = {
        name: weight.clone() if weight.nbytes < _SMALL else weight  # aligned as it was in training
        for name, weight in weights_of_format_1(load_file(file), model).items()
    }
    made = {name: weight.dtype for name, weight in model.state_dict().items()}
    missing, unknown = model.load_state_dict(weights, strict=False, assign=True)
    if missing or unknown:
        lacks, wrong = ("lacks", missing[0]) if missing else ("has, and the model not,", unknown[0])
        raise BundleError(
            f"{file} {lacks} the weights {wrong}: the bundle is damaged; save it again from the "
            "model",
            name=wrong,
            value=str(file),
        )
    for name, own in made.items():
        weight = weights[name]
        sound = weight.dtype == own and (
            not weight.is_floating_point() or _within(weight, _LARGEST)
        )
        if not sound:
            raise BundleError(
                f"the weights {name} of {file} are {weight.dtype} where {own} are needed, NaN or "
                "implausibly large: train the model again",
                name=name,
                value=str(file),
            )


def _within(weight: Tensor, largest: float) -> bool:
    """Return whether all numbers are within the limit, without further memory."""
    if not weight.numel():
        return True
    lowest, highest = weight.aminmax()
    return bool((-lowest <= largest) & (highest <= largest))


def _load_popular(file: Path, num_items: int) -> Float[Tensor, " I"]:
    """Read the popularity score of each item, which may be -inf but not NaN or +inf."""
    popular_I = load_file(file)["popular_I"]
    if popular_I.shape != (num_items,) or not bool((popular_I < torch.inf).all()):
        raise BundleError(
            f"{file} does not have a valid number for each of {num_items} items: save the bundle "
            "again",
            name=str(file),
        )
    return popular_I.float()


def _as_written(settings: Mapping[str, object]) -> dict[str, object]:
    model = settings.get("model")
    return {**settings, "model": as_written(model)} if isinstance(model, Mapping) else {**settings}


def _read_report(manifest: BundleManifest, path: Path) -> Mapping[str, object] | None:
    if REPORT_FILE not in manifest.files:
        return None
    report: Mapping[str, object] = json.loads((path / REPORT_FILE).read_text(encoding="utf-8"))
    return report


_TABLES = {"users": "user_table", "items": "item_table", "bias": "bias_table"}


def weights_of_format_1(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of format 1 under their current names.

    Args:
        state: The weights in the file; those that have their current names are unchanged.
        model: The network that the weights are for.
    """
    weights = dict(state)
    for place, module in model.named_modules():
        prefix = f"{place}." if place else ""
        match module:
            case MF() | SASRec() | BERT4Rec() | TwoTower():
                for then, now in _TABLES.items():
                    _cut(weights, f"{prefix}{then}.weight", [(f"{prefix}{now}.weight", None)])
            case LightGCN():
                parts = [
                    ("user_table.weight", module.num_users),
                    ("item_table.weight", module.num_items),
                    ("other_table.weight", None),
                ]
                _cut(weights, f"{prefix}layer_0.weight", _below(prefix, parts))
            case NodeInputs():
                parts = [
                    ("user_table.weight", module.num_users),
                    ("item_table.weight", len(module.linked_X) - module.num_users),
                    ("everybody_1D", 1),
                ]
                _cut(weights, f"{prefix}ids.weight", _below(prefix, parts))
            case RowFields():
                sides = {"user": module.user, "item": module.item, "context": module.context}
                parts = [
                    ("", 1),
                    *((f"{name}.id_table.weight", side.num_ids) for name, side in sides.items()),
                    *((f"{name}.code_table.weight", s.num_codes) for name, s in sides.items()),
                ]
                _cut(weights, f"{prefix}table.weight", _below(prefix, parts))
    return weights


def _below(prefix: str, parts: list[tuple[str, int | None]]) -> list[tuple[str, int | None]]:
    return [(prefix + name if name else "", rows) for name, rows in parts]


def _cut(weights: dict[str, Tensor], then: str, parts: list[tuple[str, int | None]]) -> None:
    """Split a table into parts, given by name and number of rows (None: the rest; "": dropped)."""
    if then not in weights:
        return
    table, first = weights.pop(then), 0
    for name, rows in parts:
        last = len(table) if rows is None else first + rows
        if name and last > first:
            weights[name] = table[first:last]
        first = last
