"""MMoE and Shared-Bottom: one expert is a shared bottom, gates sum to 1, tasks are separate."""

from dataclasses import replace
from typing import Literal

import numpy as np
import polars as pl
import pytest
import torch

from foretaste.data.batch import Queries
from foretaste.data.interactions import Interactions
from foretaste.data.tasks import Task, notes_about_histories
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import ConfigError
from foretaste.models.catalogue import as_written, settled
from foretaste.models.layers import field_ranker
from foretaste.models.layers.dense import Experts
from foretaste.models.rankers import MMoE, MMoEConfig, SharedBottom, SharedBottomConfig
from tests.test_row_fields import EVENTS, FEATURES, ITEMS, NUM_ITEMS, NUM_USERS, QUERIES

TASKS = (
    Task(name="click"),
    Task(name="buy", column="buy", weight=2.0),
    Task(name="stars", kind="ordinal", column="stars", levels=(1, 2, 3)),
)

Pooling = Literal["auto", "attention", "mean", "none"]
HISTORIES = [[1, 2, 0, 2], [], [0], [2, 3, 1]]
ASKED = replace(
    QUERIES,
    history_N=Queries.of_histories(HISTORIES).history_N,
    offsets_B1=Queries.of_histories(HISTORIES).offsets_B1,
)


def mixture(
    *,
    experts: int = 3,
    hidden: tuple[int, ...] = (6,),
    tasks: int = 3,
    pooling: Pooling = "attention",
) -> MMoE:
    torch.manual_seed(0)
    config = MMoEConfig(
        embedding_dim=4,
        tasks=TASKS[:tasks],
        num_experts=experts,
        expert_hidden=hidden,
        tower_hidden=(5,),
        pooling=pooling,
    )
    model = MMoE(config, num_users=NUM_USERS, num_items=NUM_ITEMS, features=FEATURES)
    model.fields.begin(EVENTS)
    return model.eval()


def bottom(hidden: tuple[int, ...] = (6,), pooling: Pooling = "attention") -> SharedBottom:
    torch.manual_seed(1)
    config = SharedBottomConfig(
        embedding_dim=4, tasks=TASKS, bottom_hidden=hidden, tower_hidden=(5,), pooling=pooling
    )
    model = SharedBottom(config, num_users=NUM_USERS, num_items=NUM_ITEMS, features=FEATURES)
    model.fields.begin(EVENTS)
    return model.eval()


@pytest.mark.parametrize("hidden", [(6,), (6, 5)])
def test_mmoe_with_one_expert_is_a_shared_bottom(hidden: tuple[int, ...]) -> None:
    one, shared = mixture(experts=1, hidden=hidden), bottom(hidden)
    with torch.no_grad():
        shared.fields.load_state_dict(one.fields.state_dict())
        shared.towers.load_state_dict(one.towers.state_dict())
        assert one.attention is not None
        assert shared.attention is not None
        shared.attention.load_state_dict(one.attention.state_dict())
        first = one.experts.first.joint
        shared.bottom.first.joint.weight.copy_(first.weight[: hidden[0]])
        shared.bottom.first.joint.bias.copy_(first.bias[: hidden[0]])
        linear = [layer for layer in shared.bottom.layers if isinstance(layer, torch.nn.Linear)]
        for layer, further in zip(linear, one.experts.further, strict=True):
            layer.weight.copy_(further.weight_EHK[0].T)
            layer.bias.copy_(further.bias_EK[0])
    mine, theirs = one(QUERIES, ITEMS), shared(QUERIES, ITEMS)
    for task in TASKS:
        torch.testing.assert_close(mine[task.name], theirs[task.name])


def test_the_gates_of_a_pair_sum_to_one_and_differ_between_tasks() -> None:
    gates = mixture().gates(QUERIES, ITEMS)
    assert list(gates) == ["click", "buy", "stars"]
    for gate_BCE in gates.values():
        assert gate_BCE.shape == (4, 2, 3)
        torch.testing.assert_close(gate_BCE.sum(dim=2), torch.ones(4, 2))
    assert not torch.allclose(gates["click"], gates["buy"])


def test_a_mixture_is_its_experts_weighted_by_its_gate() -> None:
    torch.manual_seed(0)
    layer = Experts(3, 2, (4, 5), num_experts=2, num_gates=2)
    query_BQ, item_BCI = torch.randn(2, 3), torch.randn(2, 3, 2)
    expert_BCEH, gate_BCTE = layer(query_BQ, item_BCI)
    for b in range(2):
        for c in range(3):
            both = layer.first.joint(torch.cat([query_BQ[b], item_BCI[b, c]]))
            torch.testing.assert_close(gate_BCTE[b, c], both[8:].view(2, 2).softmax(dim=1))
            for e in range(2):
                state = both[4 * e : 4 * e + 4].relu()
                state = state @ layer.further[0].weight_EHK[e] + layer.further[0].bias_EK[e]
                torch.testing.assert_close(expert_BCEH[b, c, e], state.relu())


def test_a_tower_and_a_gate_belong_to_one_task() -> None:
    model = mixture()
    before = model(QUERIES, ITEMS)
    with torch.no_grad():
        model.towers.towers[1].layers[0].bias.add_(1.0)
        model.experts.first.joint.bias[-3:].copy_(torch.tensor([9.0, 0.0, 0.0]))  # of stars
    after = model(QUERIES, ITEMS)
    changed = {name: not torch.equal(before[name], after[name]) for name in before}
    assert changed == {"click": False, "buy": True, "stars": True}


@pytest.mark.parametrize("pooling", ["attention", "mean", "none"])
@pytest.mark.parametrize("kind", ["mmoe", "shared_bottom"])
def test_the_catalogue_is_ordered_by_the_weighted_sum_of_answers_between_0_and_1(
    kind: str, pooling: Pooling, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixture(pooling=pooling) if kind == "mmoe" else bottom(pooling=pooling)
    for name in ("_BLOCK_PAIRS", "_HISTORY_PAIRS"):
        monkeypatch.setattr(field_ranker, name, 7)
    monkeypatch.setattr(field_ranker, "_HISTORY_QUERIES", 3)
    every_BI = torch.arange(NUM_ITEMS).expand(len(QUERIES), -1)
    predicted = model.predict(ASKED, every_BI)
    share_BI = (predicted["stars"] - 1) / 2  # of the way from 1 star to 3
    expected = predicted["click"] + 2 * predicted["buy"] + share_BI
    torch.testing.assert_close(model.score(ASKED), expected)


def test_one_task_is_enough_and_two_of_one_name_are_too_many() -> None:
    assert list(mixture(tasks=1)(QUERIES, ITEMS)) == ["click"]
    with pytest.raises(ConfigError, match="two tasks are named 'click'"):
        MMoE(MMoEConfig(tasks=(TASKS[0], TASKS[0])), num_users=1, num_items=1)


@pytest.mark.parametrize("kind", ["mmoe", "shared_bottom"])
def test_a_history_gives_its_vector_for_the_item_and_their_product(
    kind: str,
) -> None:
    model = mixture(pooling="mean") if kind == "mmoe" else bottom(pooling="mean")
    query_BQW, item_BCGW = model.read(ASKED, ITEMS)
    num_fields = model.fields.num_item_fields
    for row, history in enumerate(HISTORIES):
        for place, item in enumerate(ITEMS[row].tolist()):
            own_GW, *event_LGW = model.fields.items(torch.tensor([[item, *history]]))[0]
            mean_GW = sum(event_LGW, torch.zeros_like(own_GW)) / max(1, len(history))
            expected = torch.cat([own_GW, mean_GW, mean_GW * own_GW])
            torch.testing.assert_close(item_BCGW[row, place], expected)
    assert item_BCGW.shape[2] == 3 * num_fields
    torch.testing.assert_close(query_BQW, model.fields.query(ASKED))


@pytest.mark.parametrize("pooling", ["attention", "mean"])
@pytest.mark.parametrize("kind", ["mmoe", "shared_bottom"])
def test_every_task_reads_the_last_events_of_a_history_and_no_padding(
    kind: str, pooling: Pooling
) -> None:
    model = mixture(pooling=pooling) if kind == "mmoe" else bottom(pooling=pooling)
    together, item_12 = model(ASKED, ITEMS), torch.tensor([[1, 2]])
    for row in range(4):  # alone, no row has padding
        alone = model(ASKED.part(row, row + 1), ITEMS[row : row + 1])
        for task in TASKS:
            torch.testing.assert_close(alone[task.name][0], together[task.name][row])
    one, other = (model(Queries.of_histories([h]), item_12) for h in ([0, 3], [0, 1]))
    assert all(not torch.allclose(one[task.name], other[task.name]) for task in TASKS)
    model.max_len = 2
    both = Queries.of_histories([[3, 0, 2, 1], [2, 1]])
    both = replace(both, user_B=torch.tensor([0, 0]))  # a new user's id vector reads all events
    long, short = (model(both.part(row, row + 1), item_12) for row in (0, 1))
    for task in TASKS:
        torch.testing.assert_close(long[task.name], short[task.name])


def events_of_users(counts: list[int], *, num_items: int = 3, clicks: int = 1) -> Interactions:
    """Users with so many events, of which the first `clicks` of each are positive."""
    place = np.concatenate([np.arange(count) for count in counts])
    return Interactions(
        users=Vocabulary(pl.Series(range(len(counts)))),
        items=Vocabulary(pl.Series(range(num_items))),
        offsets=np.cumsum([0, *counts]),
        item_idx=np.zeros(sum(counts), np.int32),
        columns={"click": (place < clicks).astype(np.float32)},
    )


@pytest.mark.parametrize(
    ("events", "positive", "pooling"),
    [
        (events_of_users([1, 2], clicks=2), "", "attention"),
        (events_of_users([1, 1]), "", "none"),
        (events_of_users([0, 0]), "", "none"),
        (events_of_users([5, 2], num_items=1), "", "none"),
        (events_of_users([5, 2], clicks=1), "click", "none"),
        (events_of_users([5, 2], clicks=2), "click", "attention"),
    ],
)
def test_histories_are_read_by_default_where_users_have_several_events_that_make_them(
    events: Interactions, positive: str, pooling: str
) -> None:
    for config in (MMoEConfig(), SharedBottomConfig()):
        found = settled(config, events, positive=positive)
        assert found == config.model_copy(update={"pooling": pooling, "reads": "before"})
        asked = config.model_copy(update={"pooling": "mean", "reads": "before"})
        assert settled(asked, events, positive=positive) == asked


CLICK, LIKE = Task(name="click", column="click"), Task(name="like", column="like", above=3)


@pytest.mark.parametrize(
    ("tasks", "pooling"),
    [
        ((CLICK,), "none"),
        ((LIKE, CLICK), "none"),
        ((CLICK, Task(name="view")), "attention"),  # every event is a view
        ((LIKE,), "attention"),  # a rating of 1 is a positive event
        ((Task(name="minutes", kind="regression", column="click"),), "attention"),
    ],
)
def test_histories_that_would_hold_what_did_not_happen_are_not_read_by_default(
    tasks: tuple[Task, ...], pooling: str
) -> None:
    events = events_of_users([5, 2], clicks=2)
    events.columns["like"] = events.columns["click"]
    for config in (MMoEConfig(tasks=tasks), SharedBottomConfig(tasks=tasks)):
        assert settled(config, events).pooling == pooling
        assert settled(config, replace(events, positive="click")).pooling == "attention"
    reads, does_not = (notes_about_histories(events, tasks, reads=r) for r in (True, False))
    assert len(reads) == len(does_not) == (pooling == "none")
    assert all("3 of 7 events have 'click' = 0" in note for note in reads + does_not)
    assert notes_about_histories(replace(events, positive="click"), tasks, reads=True) == ()


def test_settings_that_an_older_bundle_lacks_are_as_it_was_made() -> None:
    for config in (MMoEConfig(), SharedBottomConfig()):
        older = config.model_dump(exclude={"pooling", "reads", "max_len", "weights"})
        both = {"kind": "two_stage", "ranker": older, "retriever": {"kind": "popularity"}}
        assert as_written(older)["pooling"] == "none"
        ranker = as_written(both)["ranker"]
        assert isinstance(ranker, dict)
        assert ranker["pooling"] == "none"
        assert as_written(config.model_dump()) == config.model_dump()
