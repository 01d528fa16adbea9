"""Input of a ranker, against the fields of each row by itself."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from foretaste.data.batch import Queries
from foretaste.data.features import Features, FieldSide, FieldTable
from foretaste.data.features_fitted import Bag, Categories, Number, Values, Vector
from foretaste.data.interactions import Interactions
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import ConfigError
from foretaste.models.layers import table as table_layer
from foretaste.models.layers.row_fields import RowFields
from foretaste.models.layers.side_fields import RowFieldsConfig, SideFields
from foretaste.models.layers.table import look_up

NUM_USERS, NUM_ITEMS, W = 3, 4, 5


def values(*texts: str) -> Values:
    return Values(texts=texts, rare=0)


USER = FieldSide(
    codes=(Categories(name="city", values=values("a", "b")),),
    numbers=(Number(name="age", log1p=False, mean=0.0, std=1.0),),
)
ITEM = FieldSide(
    codes=(Categories(name="brand", values=values("x", "y")),),
    bags=(Bag(name="genres", separator=None, values=values("r", "s")),),
    vectors=(Vector(name="image", width=2, length=1.0),),
)
MOMENT = FieldSide(
    codes=(Categories(name="hour", values=values("0", "1")),),
    bags=(Bag(name="tags", separator=None, values=values("t")),),
)
FEATURES = Features(
    user=USER,
    item=ITEM,
    user_table=USER.encode(pl.DataFrame({"city": ["a", "b", None], "age": [1.0, None, 2.0]})),
    item_table=ITEM.encode(
        pl.DataFrame(
            {
                "brand": ["x", None, "y", None],
                "genres": [["r", "s"], ["s"], None, None],
                "image": [[1.0, 2.0], [0.0, 1.0], None, None],
            }
        )
    ),
    context=MOMENT,
)
HOURS = pl.DataFrame({"hour": ["1", "0", None, "0"], "tags": [["t"], None, ["t"], []]})
QUERIES = Queries(
    user_B=torch.tensor([2, 0, -1, 1]),
    history_N=torch.tensor([3, 1]),
    offsets_B1=torch.tensor([0, 0, 2, 2, 2]),
    profile=USER.encode(pl.DataFrame({"city": ["b"] * 4, "age": [7.0] * 4})),
    context=MOMENT.encode(HOURS),
)
ITEMS = torch.tensor([[0, 3], [1, 1], [2, 0], [3, 2]])
EVENTS = Interactions(
    users=Vocabulary(pl.Series(range(NUM_USERS))),
    items=Vocabulary(pl.Series(range(NUM_ITEMS))),
    offsets=np.array([0, 2, 2, 4]),
    item_idx=np.array([0, 1, 2, 1], dtype=np.int32),
)
"""User 1 and item 3 have no event."""


def fields(
    config: RowFieldsConfig | None = None,
    features: Features | None = FEATURES,
    *,
    reads_history: bool = True,
    folds_in: bool = False,
) -> RowFields:
    torch.manual_seed(0)
    made = RowFields(
        config or RowFieldsConfig(embedding_dim=W),
        num_users=NUM_USERS,
        num_items=NUM_ITEMS,
        features=features,
        reads_history=reads_history,
        folds_in=folds_in,
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    made.begin(EVENTS)
    return made


def slow_side(made: RowFields, side: SideFields, table: FieldTable, row: int) -> list[Tensor]:
    found = [] if side.code_table is None else list(side.code_table(table.code_RC[row]))
    if side.others is not None:
        one = table.rows(torch.tensor([row]))
        of_others = replace(
            one,
            code_RC=one.code_RC[:, :0],
            bag_N=one.bag_N - side.num_codes,
            present_RF=one.present_RF[:, side.num_singles :],
        )
        found += list(side.others(of_others)[0])
    return found


def slow_query(made: RowFields, row: int) -> Tensor:
    assert FEATURES.user_table is not None
    assert QUERIES.profile is not None
    assert QUERIES.context is not None
    user = int(QUERIES.user_B[row])
    known = user in (0, 2)
    assert made.user.id_table is not None
    own = made.user.id_table(torch.tensor(user if known else -1))
    table, place = (FEATURES.user_table, user) if user >= 0 else (QUERIES.profile, row)
    of_user = slow_side(made, made.user, table, place)
    return torch.stack([own, *of_user, *slow_side(made, made.context, QUERIES.context, row)])


def slow_item(made: RowFields, item: int) -> Tensor:
    assert FEATURES.item_table is not None
    assert made.item.id_table is not None
    own = made.item.id_table(torch.tensor(item if item != 3 else -1))
    return torch.stack([own, *slow_side(made, made.item, FEATURES.item_table, item)])


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_every_field_is_what_it_is_by_itself(mode: str) -> None:
    made = fields().train(mode == "training")
    parts = made(QUERIES, ITEMS, torch.tensor([1, -1, 3]))
    for row in range(len(QUERIES)):
        torch.testing.assert_close(parts.query_BQW[row], slow_query(made, row))
        for place, item in enumerate(ITEMS[row].tolist()):
            torch.testing.assert_close(parts.item_ACGW[row, place], slow_item(made, item))
    torch.testing.assert_close(parts.history_MGW[0], slow_item(made, 1))
    torch.testing.assert_close(parts.history_MGW[2], slow_item(made, 3))
    assert parts.query_BQW.shape[1] == made.num_query_fields
    assert parts.item_ACGW.shape[2] == made.num_item_fields


def test_queries_and_items_alone_are_as_in_one_pass() -> None:
    made = fields().eval()
    parts = made(QUERIES, ITEMS)
    torch.testing.assert_close(made.query(QUERIES), parts.query_BQW)
    torch.testing.assert_close(made.items(ITEMS), parts.item_ACGW)


def test_each_table_is_looked_up_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made, passes = fields(), []

    def counted(row_N: Tensor, weight: Tensor, **how: object) -> Tensor:
        passes.append(id(weight))
        return look_up(row_N, weight, **how)

    monkeypatch.setattr(table_layer, "look_up", counted)
    made(QUERIES, ITEMS, torch.tensor([1, 3]))
    assert len(passes) == len(set(passes)) == 5  # ids of users and items, codes of all three sides


def test_row_minus_one_gets_no_gradient() -> None:
    made = fields()
    parts = made(QUERIES, ITEMS, torch.tensor([-1]))
    (parts.query_BQW.sum() + parts.item_ACGW.sum() + parts.history_MGW.sum()).backward()
    for side, row in ((made.user, 1), (made.item, 3)):  # neither has an event
        assert side.id_table is not None
        grad_RW = side.id_table.get_parameter("weight").grad
        assert grad_RW is not None
        assert grad_RW.any()
        assert not grad_RW[row].any()


def test_the_gradient_is_that_of_each_field_by_itself() -> None:
    fast, slow = fields(), fields()
    parts = fast(QUERIES, ITEMS)
    (parts.query_BQW.square().sum() + parts.item_ACGW.pow(3).sum()).backward()
    loss = torch.stack([slow_query(slow, row).square().sum() for row in range(4)]).sum()
    for item in ITEMS.flatten().tolist():
        loss = loss + slow_item(slow, item).pow(3).sum()
    loss.backward()
    for (name, one), (_, other) in zip(
        fast.named_parameters(), slow.named_parameters(), strict=True
    ):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_behind_a_gate_an_item_without_events_is_represented_by_its_vectors() -> None:
    made = fields(RowFieldsConfig(embedding_dim=W, fusion="gate")).eval()
    assert made.num_item_fields == 3  # id and image, brand, genres
    # item 1 has an id and an image; item 2 an id alone; item 3 neither
    plain = fields().eval()
    plain.load_state_dict(
        {name: value for name, value in made.state_dict().items() if "gate" not in name}
    )
    item_1C = torch.tensor([[1, 2, 3]])
    one_CW, whole_CGW = made.items(item_1C)[0, :, 0], plain.items(item_1C)[0]
    torch.testing.assert_close(one_CW[1], whole_CGW[1, 0])
    assert one_CW[2].abs().sum() == 0
    assert not torch.allclose(one_CW[0], whole_CGW[0, 0])
    made.taught_I[1] = False
    torch.testing.assert_close(made.items(item_1C)[0, 0, 0], whole_CGW[0, -1])


def test_ids_are_dropped_in_training_only_where_something_else_is_known() -> None:
    config = RowFieldsConfig(embedding_dim=W, id_dropout=0.999999)
    made, plain = fields(config), fields()
    item_AC = torch.tensor([[0, 2, 3]])
    nobody = replace(FEATURES, item=None, item_table=None)
    assert made(QUERIES, item_AC).item_ACGW[0, :2, 0].abs().sum() == 0
    made.eval()
    torch.testing.assert_close(made.items(item_AC), plain.eval().items(item_AC))
    bare = fields(config, nobody)
    assert bare(QUERIES, item_AC).item_ACGW[0, :2, 0].abs().sum() > 0


def test_a_context_without_values_is_unknown() -> None:
    made = fields().eval()
    untold = made.query(replace(QUERIES, context=None))
    told = made.query(replace(QUERIES, context=MOMENT.unknown(4)))
    torch.testing.assert_close(untold, told)


def test_a_new_user_has_the_features_that_the_history_makes_likely() -> None:
    made = fields(reads_history=False, folds_in=True).eval()
    made.learn_new_users(EVENTS)
    # users 0 and 2, on which the regression was fitted, did items 0 and 1, and 2 and 1
    likely = made.query(Queries.of_histories([[0, 1], [2, 1]]))
    known = replace(QUERIES, user_B=torch.tensor([0, 2]), profile=None, context=None)
    known_BQW = made.query(
        replace(
            known, history_N=torch.empty(0, dtype=torch.int64), offsets_B1=torch.zeros(3).long()
        )
    )
    torch.testing.assert_close(likely, known_BQW, rtol=0.05, atol=0.05)
    told = Queries.of_histories([[0, 1]])
    told = replace(told, profile=USER.encode(pl.DataFrame({"city": ["b"]})))
    untouched = slow_side(made, made.user, USER.encode(pl.DataFrame({"city": ["b"]})), 0)
    torch.testing.assert_close(made.query(told)[0, 1:3], torch.stack(untouched))


def test_where_histories_are_read_only_new_users_have_the_id_that_theirs_makes_likely() -> None:
    made = fields(reads_history=True, folds_in=True).eval()
    made.learn_new_users(EVENTS)
    assert made.user.id_table is not None
    own_UW = made.user.id_table.block(0, NUM_USERS)
    asked = replace(Queries.of_histories([[0, 1], [2]]), user_B=torch.tensor([0, 0]))
    known_BQW = made.query(replace(asked, profile=None, context=None))
    assert torch.equal(known_BQW[:, 0], own_UW[:1].expand(2, -1))
    new_BQW = made.query(Queries.of_histories([[0, 1], [2, 1]]))
    torch.testing.assert_close(new_BQW[:, 0], own_UW[[0, 2]], rtol=0.05, atol=0.05)


def test_events_that_cannot_be_written_teach_without_a_warning() -> None:
    """As in a bundle, whose events are read-only maps of its files."""
    mapped = replace(EVENTS, offsets=EVENTS.offsets.copy(), item_idx=EVENTS.item_idx.copy())
    for array in (mapped.offsets, mapped.item_idx):
        array.setflags(write=False)
    made = fields(reads_history=False, folds_in=True)
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        made.begin(mapped)
        made.learn_new_users(mapped)
    finally:
        torch.set_warn_always(always)


def test_if_each_row_is_its_own_user_no_user_has_a_vector() -> None:
    held_out = replace(EVENTS, offsets=np.array([0, 1, 1, 2]), item_idx=EVENTS.item_idx[:2])
    made = fields()
    made.begin(held_out)
    assert not made.taught_U.any()
    assert made.user.id_table is not None
    assert not made.user.id_table.block(0, NUM_USERS).any()
    # Users with one event each, who may return, have a history like any other.
    all_here = replace(EVENTS, offsets=np.array([0, 1, 2, 3]), item_idx=EVENTS.item_idx[:3])
    made.begin(all_here)
    assert made.taught_U.all()


def test_one_item_needs_no_field_but_a_row_does() -> None:
    moments = RowFieldsConfig(user_id=False, item_id=False, item_features=False)
    made = RowFields(moments, num_users=NUM_USERS, num_items=1, features=FEATURES)
    assert made.num_item_fields == 0
    with pytest.raises(ConfigError, match="neither ids nor features"):
        RowFields(moments, num_users=NUM_USERS, num_items=1, features=None)


def test_settings_leave_sides_out() -> None:
    none = RowFieldsConfig(
        embedding_dim=W,
        user_id=False,
        user_features=False,
        item_features=False,
        context_features=False,
    )
    made = fields(none)
    assert (made.num_query_fields, made.num_item_fields) == (0, 1)
    assert made(QUERIES, ITEMS).query_BQW.shape == (4, 0, W)
    assert not made.known_items().any()
    with pytest.raises(ConfigError, match="items have neither ids nor features"):
        fields(none.model_copy(update={"item_id": False}))
    with pytest.raises(ConfigError, match="features of 4 items for 9"):
        RowFields(RowFieldsConfig(), num_users=NUM_USERS, num_items=9, features=FEATURES)
