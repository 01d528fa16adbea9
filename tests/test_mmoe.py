"""MMoE and Shared-Bottom: one expert is a shared bottom, gates sum to 1, tasks keep apart."""

import pytest
import torch

from foretaste.data.tasks import Task
from foretaste.errors import ConfigError
from foretaste.models.interface import CatalogueScorer, Ranker
from foretaste.models.layers import field_ranker
from foretaste.models.layers.experts import Experts
from foretaste.models.mmoe import MMoE, MMoEConfig
from foretaste.models.shared_bottom import SharedBottom, SharedBottomConfig
from tests.test_row_fields import EVENTS, FEATURES, ITEMS, NUM_ITEMS, NUM_USERS, QUERIES

TASKS = (
    Task(name="click"),
    Task(name="buy", column="buy", weight=2.0),
    Task(name="stars", kind="ordinal", column="stars", levels=(1, 2, 3)),
)


def mixture(*, experts: int = 3, hidden: tuple[int, ...] = (6,), tasks: int = 3) -> MMoE:
    torch.manual_seed(0)
    config = MMoEConfig(
        embedding_dim=4,
        tasks=TASKS[:tasks],
        num_experts=experts,
        expert_hidden=hidden,
        tower_hidden=(5,),
    )
    model = MMoE(config, num_users=NUM_USERS, num_items=NUM_ITEMS, features=FEATURES)
    model.fields.begin(EVENTS)
    return model.eval()


def bottom(hidden: tuple[int, ...] = (6,)) -> SharedBottom:
    torch.manual_seed(1)
    config = SharedBottomConfig(
        embedding_dim=4, tasks=TASKS, bottom_hidden=hidden, tower_hidden=(5,)
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


@pytest.mark.parametrize("kind", ["mmoe", "shared_bottom"])
def test_the_catalogue_is_ordered_by_the_weighted_sum_of_answers_between_0_and_1(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixture() if kind == "mmoe" else bottom()
    assert isinstance(model, Ranker)
    assert isinstance(model, CatalogueScorer)
    monkeypatch.setattr(field_ranker, "_BLOCK_PAIRS", 7)
    every_BI = torch.arange(NUM_ITEMS).expand(len(QUERIES), -1)
    predicted = model.predict(QUERIES, every_BI)
    share_BI = (predicted["stars"] - 1) / 2  # of the way from 1 star to 3
    expected = predicted["click"] + 2 * predicted["buy"] + share_BI
    torch.testing.assert_close(model.score(QUERIES), expected)


def test_one_task_is_enough_and_two_of_one_name_are_too_many() -> None:
    assert list(mixture(tasks=1)(QUERIES, ITEMS)) == ["click"]
    with pytest.raises(ConfigError, match="two tasks are named 'click'"):
        MMoE(MMoEConfig(tasks=(TASKS[0], TASKS[0])), num_users=1, num_items=1)
