"""Kinds of tables: the contract of each, by hand; and every model with every trainable kind."""

import math
from typing import get_args

import numpy as np
import polars as pl
import pytest
import torch

import foretaste as ft
from foretaste.config import Config
from foretaste.data.interactions import Interactions
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import ConfigError, DataError
from foretaste.experiment.learning import usual_objective
from foretaste.models.catalogue import ModelConfig, TwoStageConfig
from foretaste.models.layers.table import Dense, DenseConfig, Table, TableKind
from foretaste.models.layers.table_kinds import Quantised, QuantisedConfig, start_from_events
from foretaste.models.layers.tables import (
    CompositionalConfig,
    FilledConfig,
    Hash,
    HashConfig,
    NarrowConfig,
    hashed,
)
from foretaste.models.layers.tables_at_rest import (
    HalfConfig,
    IntegerConfig,
    Pruned,
    PrunedConfig,
)
from foretaste.training.objectives import PairsConfig
from tests.worlds import make_events

NUM, WIDTH = 600, 16
TRAINED: dict[str, TableKind] = {
    "narrow": NarrowConfig(from_rows=0, times=2),
    "hash": HashConfig(from_rows=0, times=2),
    "product": CompositionalConfig(from_rows=0),
    "sum": CompositionalConfig(from_rows=0, operation="sum"),
    "concatenation": CompositionalConfig(from_rows=0, operation="concatenation", parts=4),
    "quantised": QuantisedConfig(from_rows=0, sub_spaces=4),
}
AT_REST: dict[str, FilledConfig] = {
    "half": HalfConfig(),
    "bf16": HalfConfig(format="bf16"),
    "int8": IntegerConfig(),
    "int4": IntegerConfig(kind="int4"),
    "hidden": IntegerConfig(kind="int4", scale_bits=6),
    "pruned": PrunedConfig(),
}


def dense(num: int = NUM, width: int = WIDTH) -> Dense:
    torch.manual_seed(0)
    return Dense(num, width)


def made(name: str) -> Table:
    torch.manual_seed(0)
    if name in TRAINED:
        return TRAINED[name].make(NUM, WIDTH)
    return AT_REST[name].compressed(dense())


def whole(table: Table) -> torch.Tensor:
    return table.block(0, table.num_rows).detach()


@pytest.mark.parametrize("name", [*TRAINED, *AT_REST])
def test_rows_blocks_and_row_minus_1_agree(name: str) -> None:
    table = made(name)
    found = table(torch.tensor([[5, -1], [NUM - 1, 5]]))
    assert found.shape == (2, 2, WIDTH)
    assert not found[0, 1].any()
    assert torch.equal(found[0, 0], whole(table)[5])
    assert torch.allclose(found[1, 0], table.block(NUM - 1, NUM)[0], atol=1e-6)
    assert table(torch.tensor([], dtype=torch.int64)).shape == (0, WIDTH)
    for row in (NUM, -2):
        with pytest.raises(DataError) as caught:
            table(torch.tensor([0, row]))
        assert (caught.value.name, caught.value.value) == ("row", row)


@pytest.mark.parametrize("name", ["dense", *TRAINED, *AT_REST])
@pytest.mark.parametrize(
    ("first", "last", "named"), [(5, NUM + 1, NUM + 1), (-1, 3, -1), (4, 3, 4)]
)
def test_a_block_beyond_the_table_is_refused(name: str, first: int, last: int, named: int) -> None:
    table = dense() if name == "dense" else made(name)
    with pytest.raises(DataError) as caught:
        table.block(first, last)
    assert (caught.value.name, caught.value.value) == ("row", named)


@pytest.mark.parametrize("name", TRAINED)
def test_rows_are_drawn_with_the_deviation_that_is_asked(name: str) -> None:
    table = made(name)
    table.draw(std=0.1)
    assert whole(table).std().item() == pytest.approx(0.1, rel=0.4)


@pytest.mark.parametrize("name", TRAINED)
def test_a_grown_table_keeps_its_rows(name: str) -> None:
    table, before = made(name), whole(made(name))
    table.grow(2 * NUM)
    assert table.num_rows == 2 * NUM
    assert torch.equal(table.block(0, NUM), before)
    assert table.block(NUM, 2 * NUM).isfinite().all()
    with pytest.raises(DataError) as caught:
        table.grow(NUM)
    assert caught.value.name == "num_rows"


def weights_of(table: Table) -> int:
    return sum(weight.numel() for weight in table.parameters())


@pytest.mark.parametrize("times", [4.0, 16.0])
def test_tables_are_as_many_times_smaller_as_is_asked(times: float) -> None:
    kinds = [
        NarrowConfig(times=times),
        HashConfig(times=times),
        CompositionalConfig(times=times),
        CompositionalConfig(times=times, operation="concatenation"),
    ]
    for kind in kinds:
        found = weights_of(kind.make(100_000, 64))
        assert found == pytest.approx(100_000 * 64 / times, rel=0.1), kind


@pytest.mark.parametrize("name", ["dense", *TRAINED])
def test_only_kinds_whose_rows_share_weights_have_no_l2_by_default(name: str) -> None:
    kind = {"dense": DenseConfig(), **TRAINED}[name]
    table = kind.make(NUM, WIDTH)
    before = whole(table).clone()
    table(torch.tensor([0])).square().sum().backward()
    with torch.no_grad():
        for weight in table.parameters():
            weight -= 0.0 if weight.grad is None else weight.grad
    changed = (whole(table) != before).any(dim=1)
    assert bool(changed[1:].any()) == kind.shares
    for model in (ft.MFConfig(table=kind), ft.TwoTowerConfig(table=kind)):
        learned = usual_objective(model, SPLIT.train)
        assert isinstance(learned, PairsConfig)
        assert (learned.l2 == 0) == kind.shares


def test_small_tables_and_biases_stay_dense() -> None:
    for kind in [*TRAINED.values(), *AT_REST.values()]:
        usual = kind.model_copy(update={"from_rows": 256})
        assert isinstance(usual.make(255, WIDTH), Dense)
        assert isinstance(usual.make(1000, 1), Dense)


def test_a_hash_is_a_weighted_sum_of_shared_rows() -> None:
    table = made("hash")
    assert isinstance(table, Hash)
    with torch.no_grad():
        table.importance.weight.normal_()
    row, shared = torch.tensor([7]), table.shared.num_rows
    share = table.importance.weight[hashed(row, 0, shared)][0]
    first, second = (table.shared.weight[hashed(row, salt, shared)][0] for salt in (1, 2))
    assert torch.allclose(table(row)[0], share[0] * first + share[1] * second)


def test_hashes_are_even_and_do_not_depend_on_each_other() -> None:
    row_N = torch.arange(100_000)
    first, second = (hashed(row_N, salt, 100) for salt in (0, 1))
    for found in (first, second):
        assert (torch.bincount(found) - 1000).abs().max() < 5 * math.sqrt(1000)
    together = torch.bincount(first * 100 + second, minlength=10_000)
    assert together.float().var().item() == pytest.approx(10, rel=0.1)  # Poisson's
    assert (together - 10).abs().max() < 25


@pytest.mark.parametrize(("operation", "expected"), [("product", 2.0 * 5.0), ("sum", 2.0 + 5.0)])
def test_quotient_and_remainder_are_put_together(operation: str, expected: float) -> None:
    table = CompositionalConfig(from_rows=0, operation=operation).make(100, 3)
    remainders, quotients = (part for part in table.modules() if isinstance(part, Dense))
    base = remainders.num_rows
    with torch.no_grad():
        remainders.weight[37 % base] = 2.0
        quotients.weight[37 // base] = 5.0
    assert table(torch.tensor([37]))[0].tolist() == [expected] * 3


@pytest.mark.parametrize("name", ["concatenation", "product", "sum"])
def test_rows_put_together_from_drawn_ones_differ(name: str) -> None:
    assert len(whole(made(name)).unique(dim=0)) == NUM


def grouped(num_users: int = 200, num_items: int = 80) -> Interactions:
    """Two groups of users who do things of two groups of items, each of which some do more."""
    rng = np.random.default_rng(0)
    half = num_items // 2
    histories = [(u % 2) * half + rng.permutation(half)[: half // 4 + 1] for u in range(num_users)]
    return Interactions(
        users=Vocabulary(pl.Series(range(num_users))),
        items=Vocabulary(pl.Series(range(num_items))),
        offsets=np.arange(num_users + 1) * len(histories[0]),
        item_idx=np.concatenate(histories).astype(np.int32),
        timestamp_s=np.arange(num_users * len(histories[0])),
    )


def test_quantised_tables_start_near_the_decomposition_of_the_events() -> None:
    events = grouped()
    users, items = (Quantised(num, 16, sub_spaces=8) for num in (200, 80))
    for table in (users, items):
        table.draw(std=0.1)
    start_from_events(events, users=users, items=items)
    done_UI = np.zeros((200, 80))
    done_UI[events.user_idx, events.item_idx] = 1.0
    done_UI /= np.sqrt(done_UI.sum(1, keepdims=True) * done_UI.sum(0))
    user_UF, length_F, item_FI = np.linalg.svd(done_UI, full_matrices=False)
    best_UI = (user_UF[:, :16] * length_F[:16]) @ item_FI[:16]
    found_UI = (whole(users) @ whole(items).T).numpy()
    assert np.corrcoef(found_UI.ravel(), best_UI.ravel())[0, 1] > 0.85
    for table in (users, items):
        assert whole(table).square().mean().sqrt() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(("num_users", "num_items"), [(1, 2), (3, 80), (300, 2), (300, 80)])
def test_few_users_or_items_start_quantised_tables_with_finite_rows(
    num_users: int, num_items: int
) -> None:
    tables = {"users": Quantised(num_users, 10, sub_spaces=3)}
    tables["items"] = Quantised(num_items, 10, sub_spaces=3)
    start_from_events(grouped(num_users, num_items), **tables)
    assert all(whole(table).isfinite().all() for table in tables.values())


def test_numbers_of_8_bits_are_within_half_a_step() -> None:
    table = dense()
    step_R = whole(table).abs().amax(dim=1, keepdim=True) / 127
    error = (whole(IntegerConfig().compressed(table)) - whole(table)).abs()
    assert (error <= step_R / 2 * 1.001).all()


def test_a_row_of_4_bits_loses_no_more_by_its_scale_than_by_any_other_of_those_tried() -> None:
    table = dense()
    error_R = (whole(IntegerConfig(kind="int4").compressed(table)) - whole(table)).square().sum(1)
    for share in (1.0, 0.9, 0.8, 0.7, 0.6):
        scale_R = (whole(table).abs().amax(dim=1, keepdim=True) * share / 7).half().float()
        other = (whole(table) / scale_R).round().clamp(-7, 7) * scale_R
        assert (error_R <= (other - whole(table)).square().sum(1) + 1e-9).all()


def test_hidden_scales_take_no_byte_and_are_read_from_the_last_six_numbers() -> None:
    table = Dense(200, 32)
    with torch.no_grad():
        table.weight.mul_(torch.linspace(0.2, 5, 200).unsqueeze(1))
        table.weight[3] = 0.0
    hidden = IntegerConfig(kind="int4", scale_bits=6, from_rows=0).compressed(table)
    state = hidden.state_dict()
    assert state["weight"].nbytes == 200 * 32 // 2
    assert state["scale_S"].numel() == 64
    assert set(state) == {"weight", "scale_S"}
    for row, codes in enumerate(state["weight"].tolist()):
        numbers = [number for byte in codes for number in (byte % 16 - 8, byte // 16 - 8)]
        place = sum((number % 2) << power for power, number in enumerate(numbers[-6:]))
        read = [*numbers[:-6], *(number - number % 2 for number in numbers[-6:])]
        by_hand = torch.tensor(read) * state["scale_S"][place]
        assert torch.allclose(whole(hidden)[row], by_hand)
    lost_R = (whole(hidden) - whole(table)).square().sum(1) / whole(table).square().sum(1)
    assert lost_R.nanquantile(0.9) < 0.03
    narrow = IntegerConfig(kind="int4", scale_bits=6, from_rows=0).compressed(Dense(9, 11))
    assert set(narrow.state_dict()) == {"weight", "scale_R"}
    with pytest.raises(ConfigError) as caught:
        ft.parse_settings(IntegerConfig, {"kind": "int8", "scale_bits": 6}, source="table")
    assert "scale_bits" in str(caught.value)


def test_rows_of_zeros_stay_so_and_16_bits_keep_what_they_can() -> None:
    table = dense()
    with torch.no_grad():
        table.weight[3] = 0.0
        table.weight[4] = torch.arange(WIDTH) / 8
    for name in ("half", "bf16", "int8", "int4", "hidden"):
        assert not AT_REST[name].compressed(table)(torch.tensor([3])).any()
    assert torch.equal(whole(HalfConfig().compressed(table))[4], whole(table)[4])


def test_pruning_keeps_the_longest_rows_and_the_mean_of_the_others() -> None:
    table = dense()
    pruned = PrunedConfig(keep=0.1).compressed(table)
    assert isinstance(pruned, Pruned)
    longest = whole(table).norm(dim=1).topk(60).indices
    kept = torch.zeros(NUM, dtype=torch.bool)
    kept[longest] = True
    assert torch.equal(whole(pruned)[kept], whole(table)[kept])
    mean = whole(table)[~kept].mean(dim=0)
    assert torch.allclose(whole(pruned)[~kept], mean.expand(NUM - 60, -1), atol=1e-6)


def test_the_kept_row_with_the_most_in_common_answers_for_a_dropped_one() -> None:
    table = Dense(6, 2)
    with torch.no_grad():
        table.weight.copy_(torch.tensor([[9, 0], [0, 9], [1, 0], [0, 1], [1, 1], [9, 9]]).float())
    # Rows 0, 1 and 5 stay. Of what row 2 has (10, 11), row 0 has both and more, row 5 one and no
    # more: cosines of 2 / (2 * 3)^.5 = .82 and 1 / 2^.5 = .71. Row 3 has what row 1 has. Row 4 has
    # nothing that is kept, so the mean of rows 2, 3 and 4 answers.
    row = torch.tensor([0, 0, 0, 5, 2, 2, 2, 1, 3, 4])
    has = torch.tensor([10, 11, 12, 10, 10, 11, 10, 13, 13, 7])
    kind = PrunedConfig(from_rows=0, keep=0.5, instead="neighbours")
    pruned = kind.compressed(table, lambda asked: (row, has) if asked == "neighbours" else None)
    kept = table.weight.detach()
    third = kept[2:5].mean(dim=0)
    torch.testing.assert_close(
        pruned.block(0, 6), torch.stack([kept[0], kept[1], kept[0], kept[1], third, kept[5]])
    )


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("num", [1, 100, 256, 300])
def test_few_rows_are_coded_exactly_or_nearly(num: int, *, turned: bool) -> None:
    table = dense(num)
    made = QuantisedConfig(from_rows=0, sub_spaces=4, turned=turned).compressed(table)
    assert isinstance(made, Quantised)
    assert (whole(made) - whole(table)).square().mean() < 0.05


def test_the_longest_rows_of_a_table_of_codes_may_stay_as_they_are() -> None:
    table = dense(1000)
    with torch.no_grad():
        table.weight[[3, 500, 999]] *= 20
    made = QuantisedConfig(sub_spaces=2, exact=0.003).compressed(table)
    assert torch.equal(
        made(torch.tensor([999, -1, 3, 500]))[[0, 2, 3]], table.weight[[999, 3, 500]]
    )
    assert not made(torch.tensor([-1])).any()
    plain = QuantisedConfig(sub_spaces=2).compressed(table)
    rest = torch.ones(1000).bool().index_fill(0, torch.tensor([3, 500, 999]), value=False)
    error = [(whole(one) - whole(table))[rest].square().mean() for one in (made, plain)]
    assert error[0] < error[1]  # the codebooks are for the others alone
    assert not made.trains


@pytest.mark.parametrize("width", [16, 17, 23])
def test_a_width_that_parts_do_not_divide_is_cut_as_evenly_as_can_be(width: int) -> None:
    table = Dense(2000, width)
    found = whole(QuantisedConfig(sub_spaces=8, turned=width % 2 == 0).compressed(table))
    error_D = (found - whole(table)).square().mean(dim=0)
    assert (error_D < 0.3).all()  # of 1
    side = CompositionalConfig(operation="concatenation", parts=3).make(2000, width)
    assert side(torch.tensor([1999])).shape == (1, width)


def test_k_means_codes_come_near_to_the_rows() -> None:
    table = Dense(2000, WIDTH)
    found = whole(QuantisedConfig(sub_spaces=8).compressed(table))
    left = (found - whole(table)).square().mean() / whole(table).square().mean()
    assert left < 0.1  # 4 bits a number: the rate of two Gaussian numbers in 8 bits is .004
    coarse = whole(QuantisedConfig(sub_spaces=2).compressed(table))
    assert (coarse - whole(table)).square().mean() > (found - whole(table)).square().mean()


@pytest.mark.parametrize("name", AT_REST)
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_row_is_named_and_not_compressed(name: str, broken: float) -> None:
    table = dense()
    with torch.no_grad():
        table.weight[17, 2] = broken
    with pytest.raises(ConfigError) as caught:
        AT_REST[name].compressed(table)
    assert (caught.value.name, caught.value.value) == ("row", 17)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (QuantisedConfig(from_rows=0, sub_spaces=3), "table.sub_spaces"),
        (CompositionalConfig(from_rows=0, operation="concatenation", parts=3), "table.parts"),
    ],
)
def test_a_width_that_cannot_be_cut_is_refused(kind: TableKind, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kind.make(NUM, 2)
    assert caught.value.name == name


SPLIT = ft.leave_last_split(make_events())
WITH_TABLES: list[type[Config]] = [
    config
    for config in get_args(get_args(ModelConfig)[0])
    if config is not TwoStageConfig and "table" in config.model_fields
]


def fitted(config: Config, *, epochs: int = 3, **more: object) -> ft.Trained:
    training = ft.TrainingConfig(epochs=epochs, batch_events=64, learning_rate=0.03, patience=None)
    return ft.fit(config, SPLIT, training=training, show=False, **more)


@pytest.mark.parametrize("name", ["narrow", "hash", "product", "quantised"])
@pytest.mark.parametrize("config", WITH_TABLES, ids=lambda config: config.__name__)
def test_every_model_learns_with_every_kind_and_is_stored(
    config: type[Config], name: str, tmp_path
) -> None:
    kind = TRAINED[name]
    trained = fitted(config(table=kind), epochs=8)
    losses = [epoch["loss"] for epoch in trained.log["epochs"]]
    assert min(losses[1:]) < losses[0]
    made = [m for m in trained.model.modules() if isinstance(m, type(kind.make(20, 16)))]
    assert made
    users = list(range(5))
    recommender = ft.build_recommender(trained)
    recommender.save(tmp_path / "bundle")
    loaded = ft.load(tmp_path / "bundle")
    for user in users:
        before, after = (
            {row.item_id: row.score for row in one.recommend(100 + user, k=20).rows}
            for one in (recommender, loaded)
        )
        assert after == pytest.approx(before, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", ["dense", *TRAINED])
@pytest.mark.parametrize("tables", ["adamw", "lazy_adamw", "row_adagrad"])
def test_a_resumed_run_ends_at_the_same_bits(name: str, tables: str, tmp_path) -> None:
    class Broken(Exception):
        pass

    def stop(epoch) -> None:
        if epoch.epoch == 2:
            raise Broken

    config = ft.MFConfig(embedding_dim=16, table=TRAINED.get(name, DenseConfig()))
    training = ft.TrainingConfig(
        epochs=4, batch_events=32, tables=tables, weight_decay=0.01, patience=None
    )
    run = {"split": SPLIT, "training": training, "show": False}
    once = ft.fit(config, **run)
    with pytest.raises(Broken):
        ft.fit(config, folder=tmp_path, on_epoch=stop, **run)
    again = ft.fit(config, folder=tmp_path, resume=True, **run)
    for key, value in once.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key


@pytest.mark.parametrize("name", AT_REST)
def test_a_table_at_rest_is_not_trained(name: str) -> None:
    kind = AT_REST[name].model_copy(update={"from_rows": 0})
    with pytest.raises(ConfigError) as caught:
        fitted(ft.MFConfig(table=kind))
    assert caught.value.name == "model.table"
