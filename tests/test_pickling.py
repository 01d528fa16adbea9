"""Every public object survives a pickle, as pools of processes, joblib and Dask need it."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import foretaste as ft
from foretaste.config import Config

SETTINGS = sorted(
    name
    for name in ft.__all__
    if isinstance(getattr(ft, name), type) and issubclass(getattr(ft, name), Config)
)
ERRORS = sorted(
    name
    for name in ft.__all__
    if isinstance(getattr(ft, name), type) and issubclass(getattr(ft, name), Exception)
)


@cache
def events() -> ft.Interactions:
    count = range(240)
    return ft.read_interactions(
        pl.DataFrame(
            {
                "user_id": [n // 8 for n in count],
                "item_id": [f"i{n * 7 % 30}" for n in count],
                "t": [1_700_000_000 + n for n in count],
                "clicked": [n % 3 == 0 for n in count],
            }
        ),
        timestamp="t",
        columns=["clicked"],
        items=pl.DataFrame({"item_id": [f"i{n}" for n in range(31)], "x": range(31)}),
    )


@cache
def split() -> ft.Split:
    return ft.leave_last_split(events())


@cache
def features() -> ft.Features:
    schema = ft.schema_from_toml('[item.x]\nkind = "numeric"')
    return ft.fit_features(schema, split().train)


@cache
def trained() -> ft.Trained:
    return ft.fit(ft.PopularityConfig(), split(), show=False)


@cache
def vectors() -> ft.Trained:
    once = ft.TrainingConfig(epochs=1)
    return ft.fit(ft.MFConfig(embedding_dim=4), split(), training=once, show=False)


@cache
def report() -> ft.Report:
    return ft.evaluate(trained(), split().test)


def recommender(index: str = "auto") -> ft.Recommender:
    return ft.build_recommender(vectors(), index=index)


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))  # noqa: S301  # our own


def experiment() -> ft.ExperimentConfig:
    return ft.ExperimentConfig(
        data={"kind": "store", "path": "x"}, split={"kind": "leave_last"}, model={"kind": "mf"}
    )


OBJECTS: dict[str, Callable[[], Any]] = {
    "Interactions": events,
    "Vocabulary of integers": lambda: events().users,
    "Vocabulary": lambda: events().items,
    "Split": split,
    "Holdout": lambda: split().test,
    "Rows": lambda: ft.rows_of(
        split(), "test", tasks=[ft.Task(name="clicked", column="clicked", kind="binary")]
    ),
    "Features": features,
    "Trained": trained,
    "Recommender": recommender,
    "Recommender with an exact index": partial(recommender, "exact"),
    "Recommender with a graph": partial(recommender, "hnsw"),
    "Recommender with lists": partial(recommender, "ivf_sq8"),
    "ChangingIndex": lambda: ft.ChangingIndex(recommender("exact").bundle.index),
    "Answer": lambda: recommender().recommend(3),
    "Recommendation": lambda: recommender().recommend(3).rows[0],
    "Report": report,
    "Reports": lambda: ft.Reports(lists=report()),
    "Comparison": lambda: ft.compare(report(), ft.evaluate(vectors(), split().test), "ndcg_at_10"),
    "Candidates": lambda: ft.Candidates(retriever=trained()),
    "SampledNegatives": ft.SampledNegatives,
    "Run": lambda: ft.Run(trained=trained(), report=ft.Reports(lists=report())),
    "Dataset": lambda: ft.Dataset(name="own", events=events(), origin="here", licence="none"),
}
OF_THESE = {"BundleContents", "ModelComparison", "Quickstart", "RankingGain", "RowsReport"}
OF_THESE |= {"Frontier", "TuneResult"}
"""Records of plain values and of the objects above."""
PROTOCOLS = {"Tracker"}
AT_WORK = {"ChangingIndex"}
"""It holds a thread and a lock, and is saved to a folder."""


def test_no_public_class_is_forgotten() -> None:
    classes = {name for name in ft.__all__ if isinstance(getattr(ft, name), type)}
    assert classes - {*SETTINGS, *ERRORS} <= {*OBJECTS, *OF_THESE, *PROTOCOLS, *AT_WORK}


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_survives_a_pickle(name: str) -> None:
    made = OBJECTS[name]()
    for again in (pickled(made), copy.deepcopy(made)):
        assert type(again) is type(made)
        assert repr(again)
        assert says(again) == says(made)


def says(thing: Any) -> object:
    """Results of an object, as plain values."""
    match thing:
        case ft.Interactions():
            return thing.fingerprint()
        case ft.Vocabulary():
            return thing.ids.to_list(), [thing.find(one) for one in thing.ids]
        case ft.Split():
            return says(thing.train), says(thing.test)
        case ft.Recommender():
            return thing.recommend(3, k=4), thing.recommend_many([1, 2]).rows(), thing.similar("i3")
        case ft.Report():
            return thing.metrics
        case ft.Trained():
            return says(ft.build_recommender(thing))
        case ft.Answer() | ft.Recommendation() | ft.Comparison() | ft.SampledNegatives():
            return thing
        case _:
            return sorted(getattr(thing, "__dict__", {}))


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_survive_a_pickle(name: str) -> None:
    kind = getattr(ft, name)
    try:
        made = kind()
    except ft.ConfigError:
        made = kind.model_construct()  # it has settings without a default
    assert pickled(made) == made


def test_a_recipe_survives_a_pickle() -> None:
    assert pickled(experiment()) == experiment()


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("value", [None, 3, (n for n in ())])
def test_an_error_survives_a_pickle_with_what_it_names(name: str, value: object) -> None:
    error = getattr(ft, name)("k is 3", name="k", column="a", row=2, value=value)
    again = pickled(error)
    assert (type(again), str(again)) == (type(error), "k is 3")
    assert (again.name, again.column, again.row) == ("k", "a", 2)
    assert again.value == (3 if value == 3 else None)


@pytest.mark.slow
def test_another_process_answers_from_a_pickle(tmp_path: Path) -> None:
    one = recommender()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(one.recommend, 3, k=4).result() == one.recommend(3, k=4)
        with pytest.raises(ft.DataError) as caught:
            pool.submit(one.recommend, float("nan")).result()
    assert caught.value.name == "user_id"
    assert np.isnan(caught.value.value)
