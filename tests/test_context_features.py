"""Context features: fitted to training events, encoded in the same way for all others."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from foretaste.config import Config
from foretaste.data.batch import Queries
from foretaste.data.features import Features, FieldTable, fit_features
from foretaste.data.features_schema import (
    CategoricalField,
    FeatureSchema,
    NumericField,
    inspect_schema,
)
from foretaste.data.interactions import Interactions
from foretaste.data.reading import read_interactions
from foretaste.data.splits import Split
from foretaste.data.splitting import leave_last_split, ratio_split, temporal_split
from foretaste.errors import BundleError, ConfigError, DataError
from foretaste.evaluation.protocol import evaluate
from foretaste.models.base import Scorer
from foretaste.training.trained import Trained

SCHEMA = FeatureSchema(
    context={"place": CategoricalField(), "hour": NumericField(transform="standardise")}
)
TRAIN = pl.DataFrame(
    {
        "user_id": [1, 1, 2, 2],
        "item_id": ["a", "b", "a", "c"],
        "place": ["home", "work", "home", None],
        "hour": [8.0, 12.0, 16.0, 20.0],
    }
)


def events(frame: pl.DataFrame = TRAIN) -> Interactions:
    return read_interactions(frame, context=["place", "hour"])


def table_of(features: Features) -> FieldTable:
    assert features.context_table is not None
    return features.context_table


def test_each_event_has_a_row_of_its_own_context() -> None:
    # home twice is 2, work 3, missing 0; hours have mean 14 and variance 20
    table = table_of(fit_features(SCHEMA, events()))
    assert table.code_RC.squeeze(1).tolist() == [2, 3, 2, 0]
    expected = (np.array([8, 12, 16, 20]) - 14) / np.sqrt(20)
    np.testing.assert_allclose(table.number_RM[:, 0], expected, rtol=1e-6)
    assert table.present_RF.tolist() == [[True, True]] * 3 + [[False, True]]


def test_other_events_are_encoded_by_what_training_fitted() -> None:
    features = fit_features(SCHEMA, events())
    later = events(TRAIN.head(2).with_columns(place=pl.Series(["moon", "work"]), hour=pl.lit(14.0)))
    table = table_of(features.of(later))
    assert table.code_RC.squeeze(1).tolist() == [1, 3]
    assert table.number_RM.tolist() == [[0], [0]]
    alone = features.context_of(later)
    assert alone is not None
    assert all(torch.equal(alone.tensors()[n], t) for n, t in table.tensors().items())


def test_a_context_that_is_missing_when_somebody_asks_is_missing_and_no_error() -> None:
    features = fit_features(SCHEMA, events())
    assert features.context is not None
    one_column = features.context.encode(pl.DataFrame({"place": ["work"]}))
    assert (one_column.code_RC.tolist(), one_column.number_RM.tolist()) == ([[3]], [[0]])
    assert one_column.present_RF.tolist() == [[True, False]]
    bare = read_interactions(TRAIN)
    assert table_of(features.of(bare)).known_R.tolist() == [False] * 4


def test_the_context_is_saved_without_the_rows_of_training(tmp_path: Path) -> None:
    features = fit_features(SCHEMA, events())
    features.save(tmp_path)
    again = Features.load(tmp_path)
    assert again.context == features.context
    assert again.context_table is None
    first, second = table_of(again.of(events())), table_of(features)
    assert all(torch.equal(first.tensors()[n], t) for n, t in second.tensors().items())


def test_features_of_before_there_was_a_context_still_open(tmp_path: Path) -> None:
    fit_features(FeatureSchema(), events()).save(tmp_path)
    path = tmp_path / "features.json"
    stored = json.loads(path.read_text())
    del stored["context"]
    path.write_text(json.dumps(stored))
    assert Features.load(tmp_path).context is None
    path.write_text(json.dumps(stored | {"weather": None}))
    with pytest.raises(BundleError, match="written by a newer version"):
        Features.load(tmp_path)


def test_a_context_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigError, match=r"context fields \(place, hour\), and the events have no"
    ):
        fit_features(SCHEMA, read_interactions(TRAIN))
    other = FeatureSchema(context={"hours": NumericField()})
    with pytest.raises(
        ConfigError, match=r"context column 'hours', but the events' context has .*mean 'hour'"
    ):
        fit_features(other, events())


def test_text_where_numbers_were_declared_is_refused_by_its_event() -> None:
    late = TRAIN.with_columns(hour=pl.Series(["8", "noon", "16", "20"]))
    with pytest.raises(DataError, match=r"'hour', the event of user .*: 'noon' is not a number"):
        fit_features(SCHEMA, events(late))
    features = fit_features(SCHEMA, events())
    with pytest.raises(DataError, match=r"'hour', the event of user .*: 'noon' is not a number"):
        features.of(events(late))


def test_inspection_looks_at_the_context_too() -> None:
    count = 400
    draw = np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "user_id": draw.integers(0, 20, count),
            "item_id": draw.integers(0, 30, count),
            "device": [["tv", "phone"][n % 2] for n in range(count)],
            "minutes": draw.exponential(30, count),
            "session": [f"s{n}" for n in range(count)],
            "app": ["ours"] * count,
        }
    )
    names = ["device", "minutes", "session", "app"]
    schema = inspect_schema(read_interactions(frame, context=names))
    assert {name: field.kind for name, field in schema.context.items()} == {
        "device": "categorical",
        "minutes": "numeric",
    }
    assert schema.left_out == {
        "context.session": "400 distinct texts in 400 rows: an id, a title or free text",
        "context.app": "is 'ours' in every row",
    }


def test_a_selection_of_events_is_fitted_to_alone() -> None:
    table = events()
    chosen = table.select(np.array([False, True, False, True]))
    features = fit_features(SCHEMA, chosen)
    assert features.context is not None
    assert table_of(features).code_RC.squeeze(1).tolist() == [2, 0]
    assert table_of(features.of(table)).code_RC.squeeze(1).tolist() == [1, 2, 1, 0]
    assert table_of(features.of(replace(table, context=None))).known_R.tolist() == [False] * 4


PLACES = ["home", "work", "train", "gym"]


class ByPlace(Scorer):
    """Recommends to every user the item whose row is that of the place in `PLACES`."""

    def __init__(self, features: Features) -> None:
        super().__init__()
        assert features.context is not None
        self.code_I = features.context.encode(pl.DataFrame({"place": PLACES})).code_RC[:, 0]

    def score(self, queries: Queries) -> Tensor:
        if queries.context is None:
            return torch.zeros(len(queries), len(PLACES))
        return (queries.context.code_RC == self.code_I).float()


def split_by(name: str) -> tuple[Split, pl.DataFrame]:
    """Six users do ten events each, and the item is that of the place."""
    draw = np.random.default_rng(0)
    place = draw.integers(len(PLACES), size=60)
    frame = pl.DataFrame(
        {
            "user_id": np.arange(60) % 6,
            "item_id": place,
            "timestamp": 1000 + np.arange(60),
            "place": [PLACES[p] for p in place],
        }
    )
    events = read_interactions(
        frame,
        timestamp="timestamp",
        context=["place"],
        items=pl.DataFrame({"item_id": range(len(PLACES))}),
    )
    makers = {"rolling": temporal_split, "ratio": ratio_split, "last": leave_last_split}
    return makers[name](events), frame


@pytest.mark.parametrize("name", ["rolling", "ratio", "last"])
def test_a_list_has_the_context_of_its_first_target(name: str) -> None:
    split, frame = split_by(name)
    schema = FeatureSchema(context={"place": CategoricalField()})
    features = fit_features(schema, split.train)
    model = ByPlace(features)
    # of each user's ten events a ratio holds out two, leave-last one; of all, the last six roll
    if name == "rolling":
        expected = frame.sort("timestamp").tail(6).sort("user_id", "timestamp")
    else:
        place = {"ratio": 8, "last": 9}[name]
        expected = frame.group_by("user_id", maintain_order=True).agg(
            pl.all().sort_by("timestamp").get(place)
        )
    queries = split.test.queries(np.arange(len(split.test)), features.context)
    assert queries.user_B.tolist() == expected["user_id"].to_list()
    assert queries.context is not None
    asked = model.code_I[expected["item_id"].to_list()]
    assert torch.equal(queries.context.code_RC[:, 0], asked)
    trained = Trained(config=Config(), model=model, events=split.train, features=features, seed=0)
    report = evaluate(trained, split.test, k=(1,), exclude_seen=False, resamples=0)
    assert report.metrics["hit_rate_at_1"] == 1.0
    assert "context: each query has the context of its first target" in report.notes
    mute = replace(split, events=replace(split.events, context=None))
    blind = evaluate(trained, mute.test, k=(1,), exclude_seen=False, resamples=0)
    assert blind.metrics["hit_rate_at_1"] < 1.0
    assert any("it is missing in every query" in note for note in blind.notes)
    untold = replace(trained, features=None)
    plain = evaluate(untold, split.test, k=(1,), exclude_seen=False, resamples=0)
    assert plain.metrics == blind.metrics
    assert not any(note.startswith("context") for note in plain.notes)
