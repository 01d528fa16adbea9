"""Metrics over a few sampled items: named so, exact for listed items, unbiased for drawn ones."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from foretaste.data.batch import Queries
from foretaste.data.interactions import Interactions
from foretaste.data.sources.load import get_dataset
from foretaste.data.splits import Split
from foretaste.data.splitting import given_split_by_column, leave_last_split
from foretaste.errors import ConfigError
from foretaste.evaluation.measure_queries import SampledNegatives, kept_items
from foretaste.evaluation.protocol import evaluate
from foretaste.evaluation.report import Report
from foretaste.experiment.fit import fit
from foretaste.models.base import Scorer
from foretaste.models.baselines import PopularityConfig
from foretaste.models.catalogue import ModelConfig
from foretaste.models.neumf import NeuMFConfig
from foretaste.models.rankers import DeepFMConfig, DINConfig, MMoEConfig
from foretaste.training.settings import TrainingConfig
from tests.worlds import events_of


def listed_split() -> Split:
    """User 0 has item 3 to find among 4 and 5; user 1 item 0 among 1, 2 and 0 itself."""
    histories = [[0, 0, 1, 3, 4, 5], [3, 4, 5, 5, 0, 1, 2, 0]]
    parts = [[0, 0, 0, 2, 4, 4], [0, 0, 0, 0, 2, 4, 4, 4]]
    events = events_of(histories, num_items=7)
    part = np.array([code for row in parts for code in row], dtype=np.uint8)
    return given_split_by_column(replace(events, columns={"part": part}), column="part")


def test_listed_items_are_the_only_candidates() -> None:
    split = listed_split()
    assert len(split.train) == 7
    report = evaluate(
        fit(PopularityConfig(), split, show=False),
        split.test,
        k=(1, 2),
        resamples=0,
        sampled=SampledNegatives(num=2, by="listed"),
    )
    # Counts in training are 2, 1, -, 1, 1, 2 for items 0 to 5. Item 3 ties with 4 behind 5;
    # item 0 leads 1 and the unseen 2, and its double among the negatives counts once.
    assert report.metrics["hit_rate_at_1_sampled_2"] == pytest.approx((0 + 1) / 2)
    assert report.metrics["hit_rate_at_2_sampled_2"] == pytest.approx((0.5 + 1) / 2)
    assert all(name.endswith("_sampled_2") for name in report.metrics)
    assert "NOT the full catalogue" in report.notes[0]
    assert "0.5000" in str(report)
    again = Report.from_json(report.to_json())
    assert (again.suffix, again.metrics) == (report.suffix, report.metrics)


def test_missing_listed_items_are_an_error() -> None:
    split = leave_last_split(events_of([[0, 1, 2, 3], [1, 2, 3, 0]], num_items=4))
    with pytest.raises(ConfigError, match="the data list no negatives"):
        evaluate(
            fit(PopularityConfig(), split, show=False),
            split.test,
            sampled=SampledNegatives(by="listed"),
        )


COUNTS = np.array([8, 4, 2, 1, 0, 16, 3, 5])


def kept(sampled: SampledNegatives, *, rows: int = 1, history: tuple[int, ...] = ()) -> Tensor:
    queries = Queries.of_histories([list(history)] * rows)
    target_2P = torch.stack([torch.arange(rows), torch.zeros(rows, dtype=torch.int64)])
    return kept_items(sampled, queries, np.arange(rows), target_2P, count_I=COUNTS, listed=None)


def test_drawn_items_are_as_many_as_asked_known_and_neither_seen_nor_targets() -> None:
    kept_BI = kept(SampledNegatives(num=3), rows=500, history=(1, 2))
    assert kept_BI[:, 0].all()  # the target
    assert not kept_BI[:, [1, 2, 4]].any()  # the history, and the item without training events
    assert (kept_BI.sum(dim=1) == 4).all()
    assert (kept(SampledNegatives(num=99), rows=2, history=(1,)).sum(dim=1) == 6).all()


@pytest.mark.parametrize(("by", "power"), [("uniform", 0.75), ("popularity", 0.75)])
def test_drawn_items_follow_their_distribution(by, power: float) -> None:
    rows = 4000
    found_I = kept(SampledNegatives(num=1, by=by, power=power), rows=rows)[:, 1:].sum(dim=0).numpy()
    weight_I = (COUNTS[1:] > 0) * (COUNTS[1:] ** power if by == "popularity" else 1.0)
    expected_I = rows * weight_I / weight_I.sum()
    known = expected_I > 0
    assert found_I[~known].sum() == 0
    assert stats.chisquare(found_I[known], expected_I[known]).pvalue > 1e-3


def test_a_draw_depends_on_the_query_not_on_the_block() -> None:
    whole = kept(SampledNegatives(num=2), rows=20)
    assert torch.equal(whole[:5], kept(SampledNegatives(num=2), rows=5))
    assert not torch.equal(whole, kept(SampledNegatives(num=2, seed=1), rows=20))


def test_chance_is_k_over_the_candidates() -> None:
    histories = [[user % 30, (user + 1) % 30, (user + 2) % 30] for user in range(120)]
    split = leave_last_split(events_of(histories, num_items=30))
    constant = fit(PopularityConfig(), split, show=False)
    constant.model.count_I.fill_(1)  # type: ignore[union-attr, operator]
    report = evaluate(constant, split.test, k=(5,), sampled=SampledNegatives(num=9))
    assert report.metrics["hit_rate_at_5_sampled_9"] == pytest.approx(0.5)


def random_split() -> Split:
    """30 users, 20 items, some 20 events each."""
    rng = np.random.default_rng(0)
    histories = [rng.integers(20, size=rng.integers(3, 20)).tolist() for _ in range(30)]
    return leave_last_split(events_of(histories, num_items=20))


RANDOM = random_split()
POPULAR = fit(PopularityConfig(), RANDOM, show=False)


@pytest.mark.parametrize("by", ["uniform", "popularity"])
@pytest.mark.parametrize("num", [19, 20, 1000])
def test_more_sampled_items_than_there_are_are_refused(num: int, by) -> None:
    with pytest.raises(ConfigError) as caught:
        evaluate(POPULAR, RANDOM.test, k=(5,), sampled=SampledNegatives(num=num, by=by))
    assert (caught.value.name, caught.value.value) == ("num", num)


def test_the_most_that_any_query_has_is_said_and_can_be_had_and_fewer_are_counted() -> None:
    with pytest.raises(ConfigError, match="no query has more than") as caught:
        evaluate(POPULAR, RANDOM.test, k=(5,), sampled=SampledNegatives(num=19))
    most = int(str(caught.value).split("give ")[1].split(" or")[0])
    lengths = [
        19 - len(set(RANDOM.test.events.history(int(user)).tolist()) - {int(target)})
        for user, target in zip(RANDOM.test.user_Q, RANDOM.test.target_item, strict=True)
    ]
    assert most == max(lengths)
    report = evaluate(POPULAR, RANDOM.test, k=(5,), sampled=SampledNegatives(num=most))
    assert f"ndcg_at_5_sampled_{most}" in report.metrics
    (note,) = (note for note in report.notes if "sampled items" in note)
    assert f"{min(lengths)} at least" in note


def test_listed_items_are_named_by_how_many_the_data_list() -> None:
    split = listed_split()
    model = fit(PopularityConfig(), split, show=False)
    report = evaluate(model, split.test, k=(1,), sampled=SampledNegatives(by="listed"))
    assert "ndcg_at_1_sampled_2" in report.metrics
    assert "2 sampled items, the items that the data list" in report.notes[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num", 0),
        ("num", -1),
        ("num", True),
        ("power", math.nan),
    ],
)
def test_sampled_items_that_cannot_be_are_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        SampledNegatives(**{name: value})  # type: ignore[arg-type]
    assert caught.value.name == name


class OnlyTheCatalogue(Scorer):
    """A ranker that can no longer be asked about given items."""

    def __init__(self, ranker: Scorer) -> None:
        super().__init__()
        self.ranker = ranker

    def score(self, queries: Queries) -> Tensor:
        return self.ranker.score(queries)


@pytest.mark.parametrize(
    ("by", "exclude_seen"), [("uniform", True), ("listed", True), ("listed", False)]
)
@pytest.mark.parametrize("config", [DINConfig(), DeepFMConfig(), NeuMFConfig(), MMoEConfig()])
def test_a_ranker_says_of_some_items_what_it_says_of_them_among_all(
    config: ModelConfig, by, *, exclude_seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some targets are in no training event, some users have no history, some lists are short."""
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 60, size=2 + user % 9).tolist() for user in range(80)]
    parts = [[0] * (len(row) - 2) + [2, 4] for row in histories]
    part = np.array([code for row in parts for code in row], dtype=np.uint8)
    events = replace(events_of(histories, num_items=60), columns={"part": part})
    split = given_split_by_column(events, column="part")
    quick = TrainingConfig(epochs=1, batch_events=64)
    asked = {"exclude_seen": exclude_seen, "sampled": SampledNegatives(num=9, by=by)}

    trained = fit(config, split, training=quick, show=False)
    whole = replace(trained, model=OnlyTheCatalogue(trained.model))  # type: ignore[arg-type]
    slow = evaluate(whole, split.test, k=(1, 5), **asked)  # type: ignore[arg-type]
    monkeypatch.setattr(trained.model, "score", None)
    fast = evaluate(trained, split.test, k=(1, 5), **asked)  # type: ignore[arg-type]

    assert replace(slow, model="").to_json() == replace(fast, model="").to_json()
    assert fast.metrics["coverage_at_5" + fast.suffix] > 0.5


def ncf(shared_data: Path) -> Interactions:
    return get_dataset("ml-1m-ncf", data_dir=shared_data).events


def test_popularity_on_the_published_lists_is_what_was_published(shared_data: Path) -> None:
    split = given_split_by_column(ncf(shared_data), column="part")
    assert (len(split.train), len(split.test)) == (994_169, 6_040)
    report = evaluate(
        fit(PopularityConfig(), split, show=False),
        split.test,
        resamples=0,
        sampled=SampledNegatives(by="listed"),
    )
    # He et al., figure 4: ItemPop on MovieLens is slightly above .45 and .25.
    assert report.metrics["hit_rate_at_10_sampled_99"] == pytest.approx(0.4535, abs=1e-3)
    assert report.metrics["ndcg_at_10_sampled_99"] == pytest.approx(0.2543, abs=1e-3)
