"""The evaluation protocol: which users are counted, what is a candidate, and the report."""

import json
import math
from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn

import foretaste as ft
from foretaste.config import Config
from foretaste.data.batch import Queries
from foretaste.data.interactions import Interactions
from foretaste.data.splits import Holdout
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import ConfigError, DataError, NonFiniteError
from foretaste.evaluation import asked as task_file
from foretaste.evaluation.compare import compare
from foretaste.evaluation.measure_queries import ACCURACY, SampledNegatives
from foretaste.evaluation.protocol import evaluate
from foretaste.evaluation.report import Report, Slice
from foretaste.models.base import Retriever, Scorer
from foretaste.training.trained import Trained


class Fixed(Scorer):
    """Scores of each user that do not depend on the history; stores how many were asked for."""

    def __init__(self, score_UI: Tensor) -> None:
        super().__init__()
        self.score_UI = score_UI
        self.asked: list[int] = []

    def score(self, queries: Queries) -> Tensor:
        self.asked.append(len(queries))
        return self.score_UI[queries.user_B]


class Dot(Retriever):
    """A retriever that counts how often its item table is asked for."""

    def __init__(self, user_UD: Tensor, item_ID: Tensor) -> None:
        super().__init__()
        self.user_UD, self.item_ID, self.num_items = user_UD, item_ID, len(item_ID)
        self.tables = 0

    def encode(self, queries: Queries) -> Tensor:
        return self.user_UD[queries.user_B]

    def items(self, item_V: Tensor) -> Tensor:
        return self.item_ID[item_V]

    def item_blocks(self) -> Iterator[tuple[int, Tensor]]:
        self.tables += 1
        yield 0, self.item_ID


def vocabulary(size: int) -> Vocabulary:
    return Vocabulary(pl.Series(range(size), dtype=pl.Int64))


NUM_USERS = 2500
"""All events are of so many users; no query is of the last one."""


def interactions(histories: Sequence[Sequence[int]], num_items: int) -> Interactions:
    histories = [*histories, *[()] * (NUM_USERS - len(histories))]
    return Interactions(
        users=vocabulary(len(histories)),
        items=vocabulary(num_items),
        offsets=np.concatenate([[0], np.cumsum([len(h) for h in histories])]).astype(np.int64),
        item_idx=np.array([i for h in histories for i in h], dtype=np.int32),
    )


def holdout(
    histories: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], num_items: int
) -> Holdout:
    """One query per user, all its history known; users without targets have none."""
    events = interactions(histories, num_items)
    users = np.array([u for u, own in enumerate(targets) if own], dtype=np.int64)
    return Holdout(
        name="test",
        events=events,
        user_Q=users,
        end_Q=events.offsets[users + 1],
        target_offsets=np.concatenate([[0], np.cumsum([len(targets[u]) for u in users])]).astype(
            np.int64
        ),
        target_item=np.array([i for own in targets for i in own], dtype=np.int32),
    )


def trained(module: nn.Module, events: Interactions) -> Trained:
    return Trained(config=Config(), model=module, events=events, seed=0)


def everything(num_items: int) -> Interactions:
    """Training events with every item once, all of a user that no query is about."""
    return interactions([*[()] * (NUM_USERS - 1), range(num_items)], num_items)


def random_case(
    num_users: int = 60, num_items: int = 40, num_targets: int = 3
) -> tuple[Tensor, list[list[int]], list[list[int]]]:
    """Scores without equals, histories of 1 to 9 items, targets outside them."""
    generator = np.random.default_rng(0)
    scores = generator.permuted(np.tile(np.arange(float(num_items)), (num_users, 1)), axis=1)
    histories, targets = [], []
    for _ in range(num_users):
        items = generator.permutation(num_items).tolist()
        length = int(generator.integers(1, 10))
        histories.append(items[:length])
        targets.append(items[length : length + num_targets])
    return torch.from_numpy(scores).float(), histories, targets


def part(report: Report, group: str) -> Slice:
    (only,) = [part for part in report.slices if part.group == group]
    return only


def test_the_headline_by_hand() -> None:
    # 5 items scored 5 4 3 2 1 for both users. User 0 has seen item 0: target 1 is at place 1.
    # User 1 has seen item 4: its target 3 is at place 4, beyond the 2 that are shown.
    scores = torch.tensor([[5.0, 4, 3, 2, 1]] * 2)
    asked = holdout([[0], [4]], [[1], [3]], num_items=5)
    report = evaluate(trained(Fixed(scores), everything(5)), asked, k=(2, 4))
    assert report.metrics["hit_rate_at_2"] == 0.5
    assert report.metrics["hit_rate_at_4"] == 1
    assert report.metrics["ndcg_at_4"] == pytest.approx((1 + 1 / math.log2(5)) / 2)
    assert report.metrics["mrr_at_4"] == pytest.approx((1 + 1 / 4) / 2)
    # shown at 2: items 1 and 2 to user 0, 0 and 1 to user 1: 3 of 5
    assert report.metrics["coverage_at_2"] == pytest.approx(3 / 5)
    assert report.metrics["novelty_at_2"] == pytest.approx(math.log2(5))
    assert report.per_user["hit_rate_at_2"].tolist() == [1, 0]
    assert report.user_idx.tolist() == [0, 1]


def test_a_user_with_many_queries_weighs_as_one() -> None:
    # User 0 has 3 queries of which 1 is answered, user 1 has one, answered: (1/3 + 1) / 2.
    events = interactions([[0, 1, 2, 3], [0, 1]], 5)
    asked = Holdout(
        name="test",
        events=events,
        user_Q=np.array([0, 0, 0, 1]),
        end_Q=np.array([1, 2, 3, 5]),
        target_offsets=np.arange(5),
        target_item=np.array([1, 2, 3, 1], dtype=np.int32),
    )
    scores = torch.tensor([[0.0, 3, 2, 1, 9], [0, 9, 1, 1, 1]])
    report = evaluate(trained(Fixed(scores), everything(5)), asked, k=(1,))
    assert report.per_user["hit_rate_at_1"].tolist() == [0, 1]
    report = evaluate(trained(Fixed(scores), everything(5)), asked, k=(2,))
    assert report.per_user["hit_rate_at_2"].tolist() == [1, 1]
    scores[0, 1] = 10  # now the first query of user 0 is answered at once
    report = evaluate(trained(Fixed(scores), everything(5)), asked, k=(1,))
    assert report.metrics["hit_rate_at_1"] == pytest.approx((1 / 3 + 1) / 2)
    assert report.counts["users"] == 2
    assert report.counts["queries"] == 4


def slow_recall(scores: Tensor, seen: list[int], targets: list[int], k: int) -> float:
    candidates = [i for i in range(scores.shape[0]) if i not in seen]
    ranked = sorted(candidates, key=lambda i: -scores[i].item())[:k]
    return len(set(ranked) & set(targets)) / len(targets)


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_recall_is_that_of_a_sort(*, exclude_seen: bool) -> None:
    scores, histories, targets = random_case()
    report = evaluate(
        trained(Fixed(scores), everything(40)),
        holdout(histories, targets, 40),
        k=(5,),
        exclude_seen=exclude_seen,
    )
    expected = [
        slow_recall(row, seen if exclude_seen else [], own, 5)
        for row, seen, own in zip(scores, histories, targets, strict=True)
    ]
    np.testing.assert_allclose(report.per_user["recall_at_5"], expected)


@pytest.mark.parametrize("num_items", [1, 2, 17, 500])
@pytest.mark.parametrize("k", [1, 10])
def test_a_constant_scorer_gets_the_score_of_chance(num_items: int, k: int) -> None:
    # One target; the item 0 is seen by all, if there is another.
    histories = [[0] if num_items > 1 else [] for _ in range(30)] + [[0]]
    target = num_items - 1
    asked = holdout(histories, [[target]] * 31, num_items)
    model = trained(Fixed(torch.zeros(31, num_items)), everything(num_items))
    if num_items == 1:
        with pytest.raises(DataError, match="whose targets were all seen before"):
            evaluate(model, asked, k=(k,))
        return
    report = evaluate(model, asked, k=(k,))
    chance = min(1, k / (num_items - 1))
    assert report.metrics[f"hit_rate_at_{k}"] == pytest.approx(chance)
    assert report.metrics[f"recall_at_{k}"] == pytest.approx(chance)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"exclude_seen": False},
        {"among": "cold"},
        {"sampled": SampledNegatives(num=4)},
        {"users": "new"},
        {"k": (1, 60)},  # a list longer than the catalogue
    ],
    ids=lambda how: "-".join(how) or "usual",
)
def test_the_chance_level_is_what_a_constant_scorer_gets(how: dict[str, object]) -> None:
    # 40 items of which the last 10 are cold; targets in any number, seen and cold ones among them
    scores, histories, targets = random_case()
    histories = [
        [i for i in own if i < 30] if user % 4 else [] for user, own in enumerate(histories)
    ]
    asked, events = holdout(histories, targets, 40), interactions([range(30)], 40)
    settings = {"k": (3, 10), **how}
    report = evaluate(trained(Fixed(scores), events), asked, **settings)
    flat = evaluate(trained(Fixed(torch.zeros_like(scores)), events), asked, **settings)
    assert {name.partition("_at_")[0] for name in report.chance} == set(ACCURACY)
    for name, level in report.chance.items():
        assert level == pytest.approx(flat.metrics[name], abs=1e-12)
    assert report.chance == pytest.approx(flat.chance)
    assert set(flat.at_chance) == set(flat.chance)
    assert evaluate(trained(Fixed(scores), events), asked, resamples=0, **how).chance == {}


def test_random_scorers_get_the_chance_level_that_is_printed() -> None:
    # 4,000 users, 2 of 29 items to find: the standard error of a mean is below .006
    draw = np.random.default_rng(0)
    drawn = [draw.permutation(29)[:3] + 1 for _ in range(4000)]
    asked = holdout([[0]] * 4000, [items[:2].tolist() for items in drawn], 30)
    scores = torch.from_numpy(draw.normal(size=(4000, 30)).astype(np.float32))
    report = evaluate(trained(Fixed(scores), everything(30)), asked, k=(3, 10))
    assert report.chance["hit_rate_at_3"] == pytest.approx(1 - (26 / 29) * (25 / 28))
    for name, level in report.chance.items():
        assert report.metrics[name] == pytest.approx(level, abs=0.025)
    frame = report.to_frame()
    assert frame.columns == ["metric", "value", "low", "high", "chance"]
    assert dict(zip(frame["metric"], frame["value"], strict=True)) == report.metrics
    row = frame.row(by_predicate=pl.col("metric") == "ndcg_at_10", named=True)
    assert (row["low"], row["high"]) == report.intervals["ndcg_at_10"]
    assert row["chance"] == report.chance["ndcg_at_10"]
    assert frame.filter(metric="coverage_at_10")["low"].to_list() == [None]


def test_a_figure_at_chance_is_said_to_be_no_better() -> None:
    # one of ten items is the target, at random: HR@3 of chance is 3/10
    asked, model = (
        holdout([[0]] * 50, [[1 + u % 10] for u in range(50)], 11),
        Fixed(torch.zeros(50, 11)),
    )
    blind = evaluate(trained(model, everything(11)), asked, k=(3,))
    assert blind.chance["hit_rate_at_3"] == pytest.approx(0.3)
    assert "no better than chance, because" in str(blind)
    assert "| hit_rate | 0.3000 [0.3000, 0.3000] | 0.3000 |" in blind.to_markdown()
    sighted = torch.zeros(50, 11)
    sighted[torch.arange(50), torch.tensor([1 + u % 10 for u in range(50)])] = 1
    found = evaluate(trained(Fixed(sighted), everything(11)), asked, k=(3,))
    assert found.at_chance == ()
    assert "no better" not in str(found)


def test_a_constant_scorer_covers_and_leans_like_chance() -> None:
    # 2000 lists of 5 from 100 items: all are shown, and a fifth of the places is the head's.
    generator = np.random.default_rng(0)
    popular = generator.integers(0, 100, size=3000) ** 2 // 100
    events = interactions([[*range(100), *popular.tolist()]], 100)
    asked = holdout([[0]] * 2000, [[7]] * 2000, 100)
    report = evaluate(
        trained(Fixed(torch.zeros(2000, 100)), events), asked, k=(5,), exclude_seen=False
    )
    assert report.metrics["coverage_at_5"] == 1
    assert report.metrics["popularity_share_at_5"] == pytest.approx(0.2, abs=5 * 0.004)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_broken_scorer_gets_no_report(broken: float) -> None:
    scores = torch.zeros(2, 5)
    scores[1, 3] = broken
    with pytest.raises(NonFiniteError):
        evaluate(trained(Fixed(scores), everything(5)), holdout([[0], [0]], [[1], [1]], 5))


def test_an_item_unknown_to_training_is_never_found_but_counted() -> None:
    # Item 3 has no training event: whatever it scores, even NaN, it is no candidate.
    scores = torch.tensor([[1.0, 2, 3, math.nan]])
    events = interactions([[0, 1, 2]], 4)
    report = evaluate(
        trained(Fixed(scores), events), holdout([[0]], [[2, 3]], 4), k=(1, 4), exclude_seen=False
    )
    assert report.metrics["recall_at_1"] == 0.5
    assert report.metrics["recall_at_4"] == 0.5
    assert report.counts["cold_targets"] == 1
    assert report.counts["catalogue"] == 3
    assert part(report, "cold items").metrics["recall_at_4"] == 0


def test_a_target_that_was_seen_is_no_target() -> None:
    scores, histories, targets = random_case()
    asked = holdout(histories, targets, 40)
    plain = evaluate(trained(Fixed(scores), everything(40)), asked, k=(5,))
    repeated = [[*own, seen[0]] for own, seen in zip(targets, histories, strict=True)]
    report = evaluate(
        trained(Fixed(scores), everything(40)), holdout(histories, repeated, 40), k=(5,)
    )
    assert report.metrics == plain.metrics
    assert report.counts["repeated_targets"] == 60
    assert any("60 such targets" in note for note in report.notes)


def test_a_query_with_nothing_left_to_find_is_not_in_the_mean() -> None:
    scores = torch.tensor([[3.0, 2, 1]] * 2)
    asked = holdout([[0], [0]], [[1], [0]], 3)
    report = evaluate(trained(Fixed(scores), everything(3)), asked, k=(1,))
    assert report.metrics["hit_rate_at_1"] == 1
    assert report.user_idx.tolist() == [0]
    assert report.counts["idle_queries"] == 1


def test_a_target_named_twice_is_one() -> None:
    scores = torch.tensor([[3.0, 2, 1]])
    report = evaluate(trained(Fixed(scores), everything(3)), holdout([[2]], [[0, 0, 1]], 3), k=(1,))
    assert report.metrics["recall_at_1"] == 0.5
    assert report.counts["doubled_targets"] == 1


def test_users_without_history_are_counted_apart() -> None:
    scores = torch.tensor([[3.0, 2, 1], [1, 2, 3], [1, 2, 3]])
    asked = holdout([[2], [], []], [[0], [0], [2]], 3)
    report = evaluate(trained(Fixed(scores), everything(3)), asked, k=(1,))
    assert report.metrics["hit_rate_at_1"] == 1
    assert report.user_idx.tolist() == [0]
    assert report.counts["cold_users"] == 2
    assert part(report, "cold users").metrics["hit_rate_at_1"] == 0.5
    assert report.metrics["coverage_at_1"] == pytest.approx(1 / 3)


def test_slices_by_hand() -> None:
    # Items 0..9 by falling popularity, a tenth each. Users with 1 and with 12 events.
    events = interactions([[i for i in range(10) for _ in range(20 - i)]], 10)
    asked = holdout([[9], [9] * 12], [[0], [1]], 10)
    scores = torch.zeros(2, 10)
    scores[:, 0] = 1
    report = evaluate(trained(Fixed(scores), events), asked, k=(1,))
    found = {(part.group, part.label): part.metrics["recall_at_1"] for part in report.slices}
    assert found == {
        ("history length", "1 to 4 events"): 1,
        ("history length", "10 to 19 events"): 0,
        ("target popularity", "tenth 1 (most popular)"): 1,
        ("target popularity", "tenth 2"): 0,
    }


def rolled(order: np.ndarray) -> Holdout:
    """Every event but a user's first is a query; in the order given."""
    _, histories, targets = random_case(num_users=80)
    events = interactions([h + t for h, t in zip(histories, targets, strict=True)], 40)
    end_Q = np.setdiff1d(np.arange(len(events)), events.offsets[:-1])[order]
    return Holdout(
        name="test",
        events=events,
        user_Q=events.user_idx[end_Q].astype(np.int64),
        end_Q=end_Q,
        target_offsets=np.arange(len(end_Q) + 1),
        target_item=events.item_idx[end_Q],
    )


def test_the_order_of_queries_changes_no_digit() -> None:
    generator = torch.Generator().manual_seed(0)
    users, items = (torch.randn(n, 16, generator=generator) for n in (80, 40))
    model = trained(Dot(users, items), everything(40))
    num = len(rolled(np.arange(0)).events) - 80
    straight = evaluate(model, rolled(np.arange(num)), k=(3, 10), resamples=20)
    mixed = rolled(np.random.default_rng(1).permutation(num))
    assert straight.to_json() == evaluate(model, mixed, k=(3, 10), resamples=20).to_json()


def test_the_size_of_blocks_changes_no_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.from_numpy(np.random.default_rng(0).integers(0, 4, size=(80, 40))).float()
    asked = rolled(np.arange(200))
    model = trained(Fixed(scores), everything(40))
    whole = evaluate(model, asked, k=(3, 10), resamples=20)
    monkeypatch.setattr(task_file, "_MOST_ROWS", 7)
    assert whole.to_json() == evaluate(model, asked, k=(3, 10), resamples=20).to_json()
    assert max(model.model.asked[-5:]) == 7


def test_asking_for_more_list_lengths_changes_none() -> None:
    scores = torch.from_numpy(np.random.default_rng(0).integers(0, 4, size=(80, 40))).float()
    asked, model = rolled(np.arange(200)), trained(Fixed(scores), everything(40))
    one, two = (evaluate(model, asked, k=k, resamples=20) for k in ((5,), (20, 5)))
    assert {name: two.metrics[name] for name in one.metrics} == one.metrics


@pytest.mark.parametrize(
    ("num_items", "most"), [(3, 1024), (2**15, 128), (2**20, 32), (10**7, 13), (10**9, 1)]
)
def test_no_block_is_larger_than_the_catalogue_allows(num_items: int, most: int) -> None:
    assert task_file.block_rows(num_items) == most


def test_the_model_is_asked_for_blocks_of_queries_and_for_its_items_once_a_block() -> None:
    num_users, num_items = 1500, 30
    asked = holdout([[0]] * num_users, [[1]] * num_users, num_items)
    fixed = Fixed(torch.zeros(num_users, num_items))
    evaluate(trained(fixed, everything(num_items)), asked, resamples=0)
    assert fixed.asked == [1024, 476]
    dot = Dot(torch.zeros(num_users, 2), torch.zeros(num_items, 2))
    evaluate(trained(dot, everything(num_items)), asked, resamples=0)
    assert dot.tables == 2


def test_the_model_keeps_its_scores() -> None:
    scores, histories, targets = random_case()
    before = scores.clone()
    evaluate(trained(Fixed(scores), everything(40)), holdout(histories, targets, 40))
    assert torch.equal(scores, before)


def test_a_list_longer_than_the_catalogue() -> None:
    report = evaluate(
        trained(Fixed(torch.tensor([[1.0, 2, 3]])), everything(3)),
        holdout([[0]], [[1]], 3),
        k=(50,),
    )
    assert report.metrics["hit_rate_at_50"] == 1
    assert report.metrics["precision_at_50"] == pytest.approx(1 / 50)
    assert report.metrics["mrr_at_50"] == 0.5


def test_one_user_and_one_item() -> None:
    model = trained(Fixed(torch.zeros(1, 1)), everything(1))
    report = evaluate(model, holdout([[0]], [[0]], 1), exclude_seen=False)
    assert report.metrics["ndcg_at_10"] == 1
    assert report.intervals["ndcg_at_10"] == (1, 1)
    with pytest.raises(DataError, match="whose targets were all seen before"):
        evaluate(model, holdout([[0]], [[0]], 1))


def test_a_query_without_candidates_finds_nothing() -> None:
    # The one known item was seen, the target is not in the training data: the list is empty.
    model = trained(Fixed(torch.zeros(1, 2)), interactions([[0]], 2))
    report = evaluate(model, holdout([[0]], [[1]], 2), resamples=10)
    assert report.metrics["ndcg_at_10"] == 0
    assert report.metrics["coverage_at_10"] == 0
    assert Report.from_json(report.to_json()).metrics == report.metrics


def test_intervals_hold_the_mean_and_can_be_left_out() -> None:
    scores, histories, targets = random_case()
    model, asked = trained(Fixed(scores), everything(40)), holdout(histories, targets, 40)
    report = evaluate(model, asked, k=(5, 10))
    assert set(report.intervals) == set(report.per_user)
    for name, (low, high) in report.intervals.items():
        assert low - 1e-12 <= report.metrics[name] <= high + 1e-12
    assert evaluate(model, asked, resamples=0).intervals == {}


@pytest.mark.parametrize("k", [(), (0,), (10, 10), (10, -1)])
def test_a_wrong_k_is_refused(k: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"at least 1|list lengths"):
        evaluate(trained(Fixed(torch.zeros(1, 3)), everything(3)), holdout([[0]], [[1]], 3), k=k)


def test_wrong_doors_say_so() -> None:
    model, asked = trained(Fixed(torch.zeros(1, 3)), everything(3)), holdout([[0]], [[1]], 3)
    with pytest.raises(ConfigError) as caught:
        evaluate(model, asked, resamples=-1)
    assert (caught.value.name, caught.value.value) == ("resamples", -1)
    with pytest.raises(DataError, match="no query of 'test'"):
        evaluate(model, holdout([[]], [[1]], 3))
    with pytest.raises(DataError, match="no query of 'test'"):
        evaluate(model, holdout([[0]], [[]], 3))
    with pytest.raises(DataError, match="training events are empty"):
        evaluate(trained(Fixed(torch.zeros(1, 3)), interactions([[]], 3)), asked)


def two_reports() -> tuple[Report, Report]:
    scores, histories, targets = random_case(num_users=200)
    asked, better = holdout(histories, targets, 40), scores.clone()
    for user, own in enumerate(targets):
        better[user, own] += 8
    first, second = (
        evaluate(trained(Fixed(s), everything(40)), asked, k=(5,), resamples=50)
        for s in (better, scores)
    )
    return first, second


def test_a_report_comes_back_from_json_as_it_was() -> None:
    report, _ = two_reports()
    again = Report.from_json(report.to_json())
    assert again.to_json() == report.to_json()
    assert str(again) == str(report)
    slim = Report.from_json(report.to_json(per_user=False))
    assert slim.metrics == report.metrics
    assert slim.per_user == {}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1}', "nonsense"])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="report"):
        Report.from_json(text)


def test_a_report_reads_as_a_table() -> None:
    report, _ = two_reports()
    low, high = report.intervals["ndcg_at_5"]
    cell = f"{report.metrics['ndcg_at_5']:.4f} [{low:.4f}, {high:.4f}]"
    for text in (str(report), report.to_markdown()):
        assert cell in text
        assert "200 users" in text
        assert "seen items are excluded" in text
        assert "min(k, targets)" in text
    lines = str(report).splitlines()
    assert all(line == line.rstrip() for line in lines)
    assert all(len(line) <= 110 for line in lines if not line.startswith("·"))  # notes may be long
    table = [line for line in report.to_markdown().splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table[:8]}) == 1


def test_the_report_names_every_choice() -> None:
    scores, histories, targets = random_case()
    model, asked = trained(Fixed(scores), everything(40)), holdout(histories, targets, 40)
    notes = " ".join(evaluate(model, asked, exclude_seen=False).notes)
    for choice in ("full catalogue", "not excluded", "ties:", "ranx", "bootstrap", "bits"):
        assert choice in notes


def test_json_is_plain() -> None:
    report, _ = two_reports()
    document = json.loads(report.to_json())
    assert document["metrics"]["ndcg_at_5"] == report.metrics["ndcg_at_5"]
    assert len(document["per_user"]["ndcg_at_5"]) == len(document["user_idx"]) == 200


def test_a_model_does_not_differ_from_itself() -> None:
    report, _ = two_reports()
    comparison = compare(report, report, "ndcg_at_5", resamples=100)
    assert comparison.difference == 0
    assert comparison.interval == (0, 0)
    assert comparison.p_value == 1


def test_a_better_model_differs_significantly_from_a_worse_one() -> None:
    better, worse = two_reports()
    comparison = compare(better, worse, "ndcg_at_5", resamples=1000)
    assert comparison.difference == pytest.approx(
        better.metrics["ndcg_at_5"] - worse.metrics["ndcg_at_5"]
    )
    assert comparison.interval.low > 0
    assert comparison.p_value == pytest.approx(1 / 1001)
    turned = compare(worse, better, "ndcg_at_5", resamples=1000)
    assert turned.difference == -comparison.difference
    assert turned.p_value == comparison.p_value
    assert "200 users" in str(comparison)


def test_only_reports_of_one_holdout_are_compared() -> None:
    report, _ = two_reports()
    scores, histories, targets = random_case(num_users=199)
    other = evaluate(
        trained(Fixed(scores), everything(40)), holdout(histories, targets, 40), k=(5,)
    )
    with pytest.raises(DataError, match="different holdouts"):
        compare(report, other, "ndcg_at_5")
    with pytest.raises(DataError, match="no 'ndcg_at_7' per user"):
        compare(report, report, "ndcg_at_7")
    slim = Report.from_json(report.to_json(per_user=False))
    with pytest.raises(DataError, match="none at all"):
        compare(slim, report, "ndcg_at_5")


def test_the_headline_may_be_of_users_without_history_alone() -> None:
    scores = torch.tensor([[3.0, 2, 1], [1, 2, 3], [3, 1, 2]])
    asked = holdout([[2], [], []], [[0], [0], [0, 1]], 3)
    report = evaluate(trained(Fixed(scores), everything(3)), asked, k=(1,), users="new")
    assert report.user_idx.tolist() == [1, 2]
    assert report.per_user["recall_at_1_of_new_users"].tolist() == [0, 0.5]
    assert report.metrics["recall_at_1_of_new_users"] == 0.25
    assert report.metrics["coverage_at_1_of_new_users"] == pytest.approx(2 / 3)
    assert (report.counts["queries"], report.counts["targets"]) == (2, 3)
    assert any("users with a history are not in it" in note for note in report.notes)
    few = evaluate(
        trained(Fixed(scores), everything(3)),
        asked,
        k=(1,),
        users="new",
        sampled=SampledNegatives(num=1),
    )
    assert "recall_at_1_sampled_1_of_new_users" in few.metrics
    with pytest.raises(DataError, match=r'users is "new".*cold_users_split'):
        evaluate(trained(Fixed(scores), everything(3)), holdout([[0]], [[1]], 3), users="new")


# --- cold items among themselves -----------------------------------------------------------------


class Placing(Scorer):
    """Scores every item, and names the items without an event that it has a vector for."""

    def __init__(self, score_UI: Tensor, placed: Sequence[int]) -> None:
        super().__init__()
        self.score_UI, self.placed = score_UI, list(placed)

    def score(self, queries: Queries) -> Tensor:
        return self.score_UI[queries.user_B]

    def known_items(self) -> Tensor:
        placed_I = torch.zeros(self.score_UI.shape[1], dtype=torch.bool)
        placed_I[self.placed] = True
        return placed_I


def cold_case(placed: Sequence[int]) -> tuple[Trained, Holdout]:
    """Items 0 to 2 have events, 3 to 7 none; both users have seen item 0, user 1 also item 4."""
    scores = torch.tensor([[9.0, 8, 7, 1, 3, 2, 0, 5], [9.0, 8, 7, 2, 5, 3, 1, 0]])
    events = interactions([[0], [1, 2]], 8)
    return trained(Placing(scores, placed), events), holdout([[0], [0, 4]], [[5, 1], [3]], 8)


def test_cold_items_among_themselves_by_hand() -> None:
    # All are placed. User 0's cold ones by score: 7 4 5 3 6, the cold target 5 is third, the other
    # target is no candidate. User 1's without the seen 4: 5 3 6 7, the target 3 is second.
    model, asked = cold_case(range(3, 8))
    report = evaluate(model, asked, k=(2, 3), resamples=0, among="cold")
    assert report.per_user["recall_at_2_among_cold"].tolist() == [0, 1]
    assert report.per_user["recall_at_3_among_cold"].tolist() == [0.5, 1]
    assert report.per_user["mrr_at_3_among_cold"].tolist() == pytest.approx([1 / 3, 1 / 2])
    assert report.metrics["coverage_at_2_among_cold"] == 4 / 5
    assert report.counts["catalogue"] == 5
    assert report.notes[0].startswith("candidates: NOT the full catalogue but its 5 items without")
    whole = evaluate(model, asked, k=(2, 3), resamples=0)
    assert part(whole, "cold items").metrics == {"recall_at_2": 0, "recall_at_3": 0}
    among = part(whole, "cold items among themselves")
    assert among.metrics == {"recall_at_2": 0.5, "recall_at_3": 1}
    assert (among.users, among.targets) == (2, 2)


def test_cold_items_without_a_vector_come_last_as_equals() -> None:
    # only 7 is placed: user 0 has 7, then 3 4 5 6 as equals, the target 5 one of them, so at 3 the
    # chance is 2 / 4; user 1 has 7, then 3 5 6: 2 / 3
    model, asked = cold_case([7])
    report = evaluate(model, asked, k=(3,), resamples=0, among="cold")
    assert report.per_user["hit_rate_at_3_among_cold"].tolist() == pytest.approx([2 / 4, 2 / 3])


def test_a_model_that_places_nothing_gets_chance_among_cold_items_and_nothing_among_all() -> None:
    model, asked = cold_case([])
    among = evaluate(model, asked, k=(2,), resamples=0, among="cold")
    assert among.per_user["hit_rate_at_2_among_cold"].tolist() == pytest.approx([2 / 5, 2 / 4])
    whole = evaluate(model, asked, k=(2,), resamples=0)
    assert part(whole, "cold items").metrics == {"recall_at_2": 0}
    apart = part(whole, "cold items among themselves").metrics
    assert apart["recall_at_2"] == pytest.approx((2 / 5 + 2 / 4) / 2)


def test_what_warm_items_score_does_not_matter_among_cold_ones() -> None:
    model, asked = cold_case(range(3, 8))
    before = evaluate(model, asked, k=(2,), resamples=0, among="cold").metrics
    model.model.score_UI[:, :3] -= 100
    assert evaluate(model, asked, k=(2,), resamples=0, among="cold").metrics == before


def test_sampled_and_cold_candidates_are_not_mixed() -> None:
    model, asked = cold_case([])
    with pytest.raises(ConfigError, match="not both"):
        evaluate(model, asked, sampled=SampledNegatives(num=2), among="cold")


def test_fit_is_stopped_by_repeats_where_validation_holds_nothing_else() -> None:
    frame = pl.DataFrame({"user_id": [0, 1, 2, 3] * 5, "item_id": ["only"] * 20})
    split = ft.leave_last_split(ft.read_interactions(frame))
    training = ft.TrainingConfig(epochs=1, device="cpu")
    trained = ft.fit(ft.MFConfig(embedding_dim=2), split, training=training, show=False)
    with pytest.raises(DataError, match="exclude_seen=False"):
        ft.evaluate(trained, split.test)
    # One item, and it was taken: nothing else could have stood first.
    assert ft.evaluate(trained, split.test, exclude_seen=False).metrics["ndcg_at_10"] == 1
