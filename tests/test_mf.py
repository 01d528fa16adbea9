"""MF and its vectors of new users."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from foretaste.data.batch import Queries, Reads, newest_events
from foretaste.data.draws import epoch_generator
from foretaste.data.plans import plan_pairs
from foretaste.data.reading import read_interactions
from foretaste.data.splitting import leave_last_split, random_split, temporal_split
from foretaste.errors import ConfigError
from foretaste.evaluation.protocol import evaluate
from foretaste.experiment.fit import fit
from foretaste.models.catalogue import ModelConfig
from foretaste.models.layers.history import FoldIn
from foretaste.models.layers.table import DenseConfig
from foretaste.models.lightgcn import LightGCNConfig
from foretaste.models.mf import MF, MFConfig
from foretaste.models.pinsage import PinSageConfig
from foretaste.models.two_tower import TwoTowerConfig
from foretaste.training.settings import TrainingConfig
from tests.worlds import events_of, every_vector, planted_histories, walks

EVENTS = events_of(planted_histories(), num_items=40)


def made(config: MFConfig | None = None) -> MF:
    torch.manual_seed(0)
    config = config or MFConfig(embedding_dim=8)
    return MF(config, num_users=EVENTS.num_users, num_items=EVENTS.num_items)


def known(users: list[int], histories: list[list[int]]) -> Queries:
    return replace(Queries.of_histories(histories), user_B=torch.tensor(users))


def test_a_score_is_the_dot_product_plus_the_items_bias() -> None:
    model = made(MFConfig(embedding_dim=3, biases=True))
    model.user_table.weight.data[7] = torch.tensor([1.0, 2.0, 3.0])
    model.item_table.weight.data[4] = torch.tensor([4.0, 5.0, 6.0])
    assert model.bias_table is not None
    model.bias_table.weight.data[4] = 10
    queries = known([7], [EVENTS.history(7).tolist()])
    score_BI = model.encode(queries) @ every_vector(model).T
    assert score_BI[0, 4].item() == pytest.approx(4 + 10 + 18 + 10)
    vectors = model(queries, torch.tensor([4]))
    assert (vectors.query_BD @ vectors.item_VD.T).item() == pytest.approx(42)


def test_the_cosine_does_not_see_length() -> None:
    model = made(MFConfig(embedding_dim=4, similarity="cosine", temperature=0.1))
    before = every_vector(model).clone()
    model.item_table.weight.data[3] *= 7
    torch.testing.assert_close(every_vector(model), before)
    length_B = model.encode(known([0], [[]])).norm(dim=1)
    assert length_B.tolist() == pytest.approx([10.0])


def linear_world(model: MF) -> Tensor:
    """Make each user's vector a known linear function of their history."""
    weight_DD, bias_D = torch.randn(8, 8), torch.randn(8)
    for user in range(EVENTS.num_users):
        items = torch.from_numpy(EVENTS.history(user)).long()
        bag_D = model.item_table.weight[items].sum(dim=0) / len(items) ** 0.5
        model.user_table.weight.data[user] = bag_D.detach() @ weight_DD + bias_D
    return weight_DD


def test_the_regression_finds_the_function_that_users_follow() -> None:
    model = made()
    with torch.no_grad():
        weight_DD = linear_world(model)
        model.learn_new_users(EVENTS)
        torch.testing.assert_close(model.fold_in.weight_DD, weight_DD, rtol=0.03, atol=0.03)
        histories = [EVENTS.history(user).tolist() for user in range(5)]
        strangers = model.encode(Queries.of_histories(histories))
        torch.testing.assert_close(strangers, model.user_table.weight[:5], rtol=0.05, atol=0.05)


def test_a_known_user_is_their_own_vector_until_they_do_more() -> None:
    model = made()
    model.learn_new_users(EVENTS)
    history = EVENTS.history(3).tolist()
    same, more = model.encode(known([3, 3], [history, [*history, 30]]))
    assert torch.equal(same, model.user_table.weight[3])
    fold_in = model.fold_in
    folded = model.encode(Queries.of_histories([history, [*history, 30]]))
    torch.testing.assert_close(more - same, folded[1] - folded[0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(more, same)
    assert fold_in.num_events_U[3] == len(history)


def test_a_user_whose_past_is_forgotten_is_answered_by_what_is_left() -> None:
    model = made()
    model.learn_new_users(EVENTS)
    left = EVENTS.history(3).tolist()[-1:]
    assert torch.equal(model.encode(known([3], [left])), model.encode(Queries.of_histories([left])))


def test_users_without_training_events_are_new_users() -> None:
    events = events_of([*planted_histories(num_users=20), []], num_items=40)
    torch.manual_seed(0)
    model = MF(MFConfig(embedding_dim=8), num_users=21, num_items=40)
    model.learn_new_users(events)
    for history in ([], [1, 2]):
        stranger = model.encode(Queries.of_histories([history]))
        assert torch.equal(model.encode(known([20], [history])), stranger)


def test_fold_in_without_users_or_with_one_is_finite() -> None:
    fold_in = FoldIn(num_users=1, embedding_dim=4)
    users, items = (DenseConfig().make(num, 4) for num in (1, 3))
    fold_in.learn(events_of([[0, 1]], num_items=3), users, items)
    answer = fold_in(Queries.of_histories([[2], []]), users, items)
    assert answer.isfinite().all()
    nobody = FoldIn(num_users=0, embedding_dim=4)
    assert nobody(Queries.of_histories([[2], []]), None, items).isfinite().all()


@pytest.mark.parametrize("reads", ["nothing", "before", "others"])
def test_an_epoch_holds_every_event_once(reads: Reads) -> None:
    plan = plan_pairs(EVENTS, batch_events=70, generator=epoch_generator(0, 0), reads=reads)
    batches = [plan.batch(index) for index in range(len(plan))]
    pairs = [
        pair
        for batch in batches
        for pair in zip(batch.queries.user_B.tolist(), batch.item_B.tolist(), strict=True)
    ]
    assert sorted(pairs) == sorted(
        zip(EVENTS.user_idx.tolist(), EVENTS.item_idx.tolist(), strict=True)
    )
    assert pairs != sorted(pairs)
    assert plan.num_events == len(EVENTS)


@pytest.mark.parametrize("max_len", [2, 50])
def test_what_is_read_along_never_holds_the_pairs_own_event(max_len: int) -> None:
    for reads in ("before", "others"):
        plan = plan_pairs(
            EVENTS, batch_events=70, generator=epoch_generator(0, 0), reads=reads, max_len=max_len
        )
        for index in range(len(plan)):
            batch = plan.batch(index)
            offsets = batch.queries.offsets_B1.tolist()
            for b, (user, item) in enumerate(
                zip(batch.queries.user_B.tolist(), batch.item_B.tolist(), strict=True)
            ):
                read = batch.queries.history_N[offsets[b] : offsets[b + 1]].tolist()
                history = EVENTS.history(user).tolist()  # its items are all different
                place = history.index(item)
                if reads == "before":
                    assert read == history[max(0, place - max_len) : place]
                else:
                    assert set(read) <= set(history) - {item}
                    assert len(read) == len(set(read)) == min(max_len, len(history) - 1)


def test_the_same_epoch_and_batch_are_the_same_whenever_they_are_made() -> None:
    def plan() -> object:
        return plan_pairs(
            EVENTS, batch_events=70, generator=epoch_generator(1, 2), reads="others", max_len=3
        )

    first, second = plan(), plan()
    second.batch(0)
    for name in ("user_B", "history_N", "offsets_B1"):
        assert torch.equal(
            getattr(first.batch(3).queries, name), getattr(second.batch(3).queries, name)
        )
    assert not np.array_equal(first.order_E, np.sort(first.order_E))


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="temperature"):
        MFConfig(temperature=0)


NEWCOMERS: tuple[ModelConfig, ...] = (
    MFConfig(embedding_dim=8),
    TwoTowerConfig(embedding_dim=8),
    LightGCNConfig(embedding_dim=8),
    PinSageConfig(embedding_dim=8, num_neighbours=4),
)


@pytest.mark.parametrize("config", NEWCOMERS, ids=lambda config: config.kind)
@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_what_is_validated_is_what_will_answer(config: ModelConfig, ema_decay: float) -> None:
    # cut in time, so that half of the users come after training: before, they were validated by
    # untrained vectors
    at = np.repeat(np.arange(60), 8) * 10 + np.tile(np.arange(8), 60)
    item = np.concatenate([(u % 2 * 12 + (np.arange(8) * 5 + u) % 12) for u in range(60)])
    table = pl.DataFrame({"user": np.repeat(np.arange(60), 8), "item": item, "at": at})
    events = read_interactions(table, user="user", item="item", timestamp="at")
    split = temporal_split(events, validation=0.3, test=0.2)
    training = TrainingConfig(
        epochs=3, batch_events=50, learning_rate=0.05, warmup_steps=0, ema_decay=ema_decay
    )
    trained = fit(config, split, training=training, show=False)
    assert isinstance(trained.log["epochs"], list)
    logged = trained.log["epochs"][trained.log["best_epoch"] - 1]["validation"]
    if recencies := trained.log.get("recency"):
        assert recencies["1"] == logged
        logged = recencies[f"{trained.model.recency:g}"]
        assert logged == max(recencies.values())
        assert trained.config.recency == trained.model.recency
    report = evaluate(trained, split.validation, k=(10,), resamples=0)
    assert logged == pytest.approx(report.metrics["ndcg_at_10"], abs=1e-9)


@pytest.mark.parametrize("settings", [{}, {"biases": True}, {"similarity": "cosine"}])
def test_blocks_of_items_are_the_items(settings: dict[str, object]) -> None:
    model = made(MFConfig(embedding_dim=3, **settings)).eval()
    (block,) = [item_VD for _, item_VD in model.item_blocks()]
    assert torch.equal(block, model.items(model.every_item))


# ---- the newest events weigh more -------------------------------------------------------------


def test_the_weight_of_the_newest_events_halves_with_each_newer_one() -> None:
    queries = Queries.of_histories([[5, 6, 7], [], list(range(12))])
    item_N, offsets_B1, weight_N = newest_events(queries, 5.0)
    assert item_N.tolist() == [5, 6, 7, *range(4, 12)]
    assert offsets_B1.tolist() == [0, 3, 3, 11]
    assert weight_N.tolist() == [1, 2, 4, *(4 / 2**newer for newer in range(7, -1, -1))]


def test_a_recency_adds_the_newest_events_to_any_answer() -> None:
    model = made()
    model.learn_new_users(EVENTS)
    history = EVENTS.history(3).tolist()
    queries = known([3, 3, -1, -1], [history, [*history, 30], [4, 9], []])
    usual_BD, model.recency = model.encode(queries), 3.0
    for query, more_D in enumerate(model.encode(queries) - usual_BD):
        items = queries.history_N[queries.offsets_B1[query] : queries.offsets_B1[query + 1]]
        newest = items.flip(0)[:8]
        weight_N1 = 2 * 0.5 ** torch.arange(len(newest)).unsqueeze(1)
        added_D = (weight_N1 * model.item_table.weight[newest]).sum(dim=0)
        expected_D = added_D / max(1, len(items)) ** 0.5 @ model.fold_in.weight_DD
        torch.testing.assert_close(more_D, expected_D, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        MFConfig(embedding_dim=16),
        TwoTowerConfig(embedding_dim=16),
        LightGCNConfig(embedding_dim=16),
    ],
    ids=lambda config: config.kind,
)
def test_validation_chooses_a_recency_where_the_last_event_says_what_is_next(
    config: MFConfig | TwoTowerConfig | LightGCNConfig,
) -> None:
    training = TrainingConfig(epochs=10, batch_events=500)
    split = leave_last_split(events_of(walks(), num_items=60))
    figures = {}
    for recency in (1.0, "auto"):
        asked = config.model_copy(update={"recency": recency})
        trained = fit(asked, split, training=training, show=False)
        figures[recency] = evaluate(trained, split.test, k=(10,)).metrics["ndcg_at_10"]
    assert trained.config.recency in (4, 16, 64)
    assert trained.log["recency"].keys() >= {"1", "4", "16"}
    assert figures["auto"] > 1.2 * figures[1.0]

    without_times = replace(split.events, timestamp_s=None)
    unordered = random_split(without_times, validation=0.1, test=0.1)
    trained = fit(config, unordered, training=training, show=False)
    assert trained.config.recency == 1
    assert "recency" not in trained.log
