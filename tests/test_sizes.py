"""Absurd sizes, weights and seeds: refused by name before anything large is made, or harmless."""

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import polars as pl
import psutil
import pytest
import torch

import foretaste as ft
from foretaste.config import Config
from foretaste.data import arrays
from foretaste.data.features_schema import MultiField
from foretaste.data.graph import GraphConfig
from foretaste.data.splits import RandomSplitConfig
from foretaste.evaluation.measure_queries import SampledNegatives
from foretaste.experiment.recipe import EvaluationConfig, TuneConfig
from foretaste.experiment.two_stage import FirstStage
from foretaste.models.baselines import ItemKNN
from foretaste.models.catalogue import ModelConfig, TwoStageConfig, build_model
from foretaste.training.objectives import ObjectiveConfig

GIB = 2**30
ABSURD_COUNTS = (10**9, 10**12, 2**63)
EXTREME_NUMBERS = (0.0, -1.0, 1e308, 1e-320)
NUM_ITEMS = 30
EVENTS = ft.read_interactions(
    pl.DataFrame(
        {
            "user_id": [n // 8 for n in range(240)],
            "item_id": [(n * 7) % NUM_ITEMS for n in range(240)],
            "timestamp": range(240),
        }
    )
)
SPLIT = ft.leave_last_split(EVENTS)
SMALL = ft.MFConfig(embedding_dim=4)


def members(union: Any) -> tuple[type[Config], ...]:
    """The settings classes of a tagged union."""
    return get_args(get_args(union)[0])


BASES: list[Config] = [kind() for kind in members(ModelConfig) if kind is not TwoStageConfig]
BASES += [
    ft.SASRecConfig(block="modern"),
    ft.BERT4RecConfig(block="modern"),
    ft.TwoTowerConfig(history="sasrec", query_hidden=(8,), item_hidden=(8,)),
    ft.TwoTowerConfig(history="attention"),
    ft.LightGCNConfig(transform=True),
    ft.LightGCNConfig(contrast_layer=1),
    ft.PinSageConfig(neighbours="uniform"),
    ft.TrainingConfig(),
    *(kind() for kind in members(ObjectiveConfig)),
    ft.PairsConfig(loss="bpr", row_negatives=2, popularity_power=0.5),
    ft.PairsConfig(loss="margin", row_negatives=2, exclude_known=True),
    ft.PairsConfig(loss="gbce", in_batch=True, frequency="streamed"),
    ft.PairsConfig(hard_negatives=1, hard_from_epoch=1),
    ft.PairsConfig(hard_negatives=1, hard_from_epoch=1, hard_from="index"),
    ft.RowsConfig(negatives_from="popularity"),
    GraphConfig(),
]


def settings_of(kind: str) -> Iterator[Any]:
    """Each setting of each base that holds numbers of a kind."""
    for place, base in enumerate(BASES):
        for name, field in type(base).model_fields.items():
            if kind in str(field.annotation) and name != "seed":
                yield pytest.param(base, name, id=f"{place}-{type(base).__name__}-{name}")


def filled(base: Config, name: str, value: float) -> object:
    """The value in the form that the setting has."""
    present = getattr(base, name)
    if name == "hard_ranks":
        return (0, value)
    return (value,) * max(1, len(present)) if isinstance(present, tuple) else value


def use(config: Config) -> ft.Report:
    """Learn and measure as settings of any kind say."""
    usual = ft.TrainingConfig(epochs=2)
    match config:
        case ft.TrainingConfig():
            small = config.model_copy(update={"epochs": 2})
            trained = ft.fit(SMALL, SPLIT, training=small, show=False)
        case GraphConfig():
            model = ft.LightGCNConfig(embedding_dim=4, graph=config)
            trained = ft.fit(model, SPLIT, training=usual, show=False)
        case _ if type(config) in members(ObjectiveConfig):
            by = {
                "next_item": ft.SASRecConfig(embedding_dim=4),
                "masked_item": ft.BERT4RecConfig(embedding_dim=4),
                "pairs": SMALL,
                "rows": ft.GMFConfig(),
            }[config.kind]
            trained = ft.fit(by, SPLIT, training=usual, objective=config, show=False)
        case _:
            trained = ft.fit(config, SPLIT, training=usual, show=False)
    return ft.evaluate(trained, SPLIT.test, resamples=0)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One GiB is free, and the system gives little more."""
    monkeypatch.setattr(arrays, "available_bytes", lambda: GIB)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * GIB, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def outcome(base: Config, name: str, value: float) -> str:
    """Result of a value: finite figures, or an error that names the setting."""
    try:
        report = use(type(base)(**dict(base) | {name: filled(base, name, value)}))
    except ft.NonFiniteError:
        return "not finite"
    except ft.ForetasteError as error:
        return "named" if name in f"{error.name} {error}" else str(error)
    return "finite" if np.isfinite(list(report.metrics.values())).all() else "NaN"


@pytest.mark.parametrize(("base", "name"), list(settings_of("int")))
def test_an_absurd_size_is_harmless_or_refused_by_its_name_before_anything_is_made(
    base: Config, name: str, little_memory: None
) -> None:
    for value in ABSURD_COUNTS:
        assert outcome(base, name, value) in ("finite", "named")


@pytest.mark.parametrize(("base", "name"), list(settings_of("float")))
def test_an_extreme_number_is_refused_by_name_or_leaves_finite_figures(
    base: Config, name: str
) -> None:
    for value in EXTREME_NUMBERS:
        assert outcome(base, name, value) in ("finite", "named", "not finite")


@pytest.mark.parametrize("k", [10**6, 2 * 10**9])
def test_a_list_longer_than_the_catalogue_is_cut_to_it(k: int, little_memory: None) -> None:
    trained = ft.fit(ft.PopularityConfig(), SPLIT)
    report = ft.evaluate(trained, SPLIT.test, k=(NUM_ITEMS, k), resamples=0)
    whole, cut = report.metrics[f"ndcg_at_{NUM_ITEMS}"], report.metrics[f"ndcg_at_{k}"]
    assert whole == pytest.approx(cut)
    assert report.metrics[f"precision_at_{k}"] < 1e-4


@pytest.mark.parametrize("kind", [EvaluationConfig, TuneConfig, FirstStage, MultiField])
def test_counts_of_other_settings_have_an_upper_end(kind: type[Config]) -> None:
    for name, field in kind.model_fields.items():
        if "int" in str(field.annotation) and name != "seed":
            with pytest.raises(ft.ConfigError) as caught:
                kind(**{name: (2**63,) if name == "k" else 2**63})
            assert (caught.value.name or "").split(".")[0] == name


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_a_seed_out_of_range_is_refused_by_name_everywhere(seed: int) -> None:
    report = ft.evaluate(ft.fit(ft.PopularityConfig(), SPLIT), SPLIT.test, resamples=0)
    for call in (
        lambda: ft.fit(SMALL, SPLIT, seed=seed),
        lambda: ft.random_split(EVENTS, seed=seed),
        lambda: ft.cold_items_split(EVENTS, seed=seed),
        lambda: ft.cold_users_split(EVENTS, seed=seed),
        lambda: ft.compare(report, report, "ndcg_at_10", seed=seed),
        lambda: RandomSplitConfig(seed=seed),
    ):
        with pytest.raises(ft.ConfigError) as caught:
            call()
        assert caught.value.name == "seed"


@pytest.mark.parametrize("seed", [0, 2**31, 2**32, 2**63 - 1])
def test_every_seed_in_range_serves_all_that_draws(seed: int, tmp_path: Path) -> None:
    hard = ft.PairsConfig(hard_negatives=1, hard_from_epoch=1, hard_from="index")
    short = ft.TrainingConfig(epochs=1)
    trained = ft.fit(SMALL, SPLIT, seed=seed, objective=hard, training=short, show=False)
    ft.fit(ft.PinSageConfig(), SPLIT, seed=seed, training=short, show=False)
    ft.fit(ft.GMFConfig(), SPLIT, seed=seed, training=short, show=False)
    for cut in (ft.random_split, ft.cold_items_split, ft.cold_users_split):
        assert len(cut(EVENTS, seed=seed).train) > 0
    sampled = SampledNegatives(num=5, seed=seed)
    report = ft.evaluate(trained, SPLIT.test, seed=seed, sampled=sampled)
    assert np.isfinite(list(report.metrics.values())).all()
    for kind in ("ivf_flat", "ivf_sq8", "ivf_pq", "hnsw"):
        ft.build_recommender(trained, index=kind)


def test_the_setting_that_saves_most_is_named_not_the_largest_one() -> None:
    with pytest.raises(ft.TooLargeError, match=r"lower model\.embedding_dim, which") as caught:
        build_model(ft.SASRecConfig(max_len=500), num_users=10**9, num_items=10**9)
    assert (caught.value.name, caught.value.value) == ("embedding_dim", 64)


def test_counting_a_model_draws_nothing_and_counts_what_is_made() -> None:
    torch.manual_seed(0)
    model = build_model(SMALL, num_users=30, num_items=NUM_ITEMS)
    torch.manual_seed(0)
    first = torch.nn.init.normal_(torch.empty(30, 4), std=1.0)  # nn.Embedding's own, then ours
    torch.nn.init.normal_(torch.empty(NUM_ITEMS, 4), std=1.0)
    second = torch.nn.init.normal_(torch.empty(30, 4), std=SMALL.init_std)
    torch.testing.assert_close(model.user_table.weight.detach(), second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("free", [100_000, 10**9])
def test_learning_counts_five_times_the_weights(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_SURELY_FITS", 0)
    monkeypatch.setattr(arrays, "available_bytes", lambda: free)
    wide = ft.MFConfig(embedding_dim=100)  # 60 rows of 400 bytes, five times: 120,000
    if free > 120_000:
        ft.fit(wide, SPLIT, training=ft.TrainingConfig(epochs=1), show=False)
    else:
        build_model(wide, num_users=30, num_items=NUM_ITEMS)  # to answer, once is enough
        with pytest.raises(ft.TooLargeError):
            ft.fit(wide, SPLIT, show=False)


@pytest.mark.parametrize(
    "failure", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_runs_out_while_learning_is_said_in_our_words(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def learn(*_: object) -> None:
        raise failure

    monkeypatch.setattr(ItemKNN, "learn", learn)
    with pytest.raises(ft.TooLargeError, match="learning item_knn ran out of memory"):
        ft.fit(ft.ItemKNNConfig(), SPLIT)


def test_an_index_that_would_not_fit_is_refused_before_it_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = ft.fit(SMALL, SPLIT, training=ft.TrainingConfig(epochs=1), show=False)
    monkeypatch.setattr(arrays, "_SURELY_FITS", 0)
    monkeypatch.setattr(arrays, "available_bytes", lambda: 100)
    ft.build_recommender(trained, index="exact")
    for kind in ("ivf_flat", "ivf_sq8", "ivf_pq", "hnsw"):
        with pytest.raises(ft.TooLargeError) as caught:
            ft.build_recommender(trained, index=kind)
        assert caught.value.name == "index"


def test_a_list_with_one_wrong_number_is_not_said_to_be_too_short_as_well() -> None:
    with pytest.raises(ft.ConfigError, match=r"k\.0: must be at most 2000000000, not 10\d+$"):
        EvaluationConfig(k=(10**12,))
    with pytest.raises(ft.ConfigError, match="must be a list of at least 1"):
        EvaluationConfig(k=())
