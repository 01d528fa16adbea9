"""The field encoder: one look-up for all fields, and two ways to combine their vectors."""

from itertools import pairwise
from typing import Literal

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foretaste.data.features import FieldSide, FieldTable
from foretaste.data.features_fitted import Bag, Buckets, Categories, Number, Values, Vector
from foretaste.errors import ConfigError
from foretaste.models.layers import table as table_layer
from foretaste.models.layers.embedding import FieldEncoder
from foretaste.models.layers.table import DenseConfig, look_up, mean_bags

FUSIONS: tuple[Literal["concat", "gate"], ...] = ("concat", "gate")
D = 6


def values(*texts: str) -> Values:
    return Values(texts=texts, rare=0)


SIDE = FieldSide(
    codes=(Categories(name="c", values=values("p", "q")), Buckets(name="b", edges=(1.0,))),
    bags=(Bag(name="g", separator=None, values=values("r", "s")),),
    numbers=(Number(name="n", log1p=False, mean=0.0, std=1.0),),
    vectors=(Vector(name="v", width=3, length=1.0),),
)
FRAME = pl.DataFrame(
    {
        "c": ["p", None, "q", None],
        "b": [0.0, 5.0, None, None],
        "g": [["r", "s", "s"], ["r"], None, None],
        "n": [2.0, None, -1.0, None],
        "v": [[1.0, 2.0, 3.0], None, [0.0, 1.0, 0.0], None],
    }
)
TABLE = SIDE.encode(FRAME)


def encoder(fusion: Literal["concat", "gate"], side: FieldSide = SIDE) -> FieldEncoder:
    torch.manual_seed(0)
    return FieldEncoder(side, embedding_dim=D, fusion=fusion, table=DenseConfig())


def slow_fields(model: FieldEncoder, table: FieldTable) -> Tensor:
    """Every field of every row by itself, from the definitions."""
    assert model.fields.codes is not None
    assert model.fields.number_weight_MD is not None
    assert model.fields.number_bias_MD is not None
    rows = []
    for row in range(len(table)):
        fields = [model.fields.codes.weight[code] for code in table.code_RC[row]]
        offsets = table.bag_offsets_RG1[row].tolist()
        for start, end in pairwise(offsets):
            fields.append(model.fields.codes.weight[table.bag_N[start:end]].mean(dim=0))
        present = table.present_RF[row, len(fields) :].tolist()
        numbers = [
            x * w + b
            for x, w, b in zip(
                table.number_RM[row],
                model.fields.number_weight_MD,
                model.fields.number_bias_MD,
                strict=True,
            )
        ]
        vectors = [
            layer(vector[row])
            for layer, vector in zip(model.fields.vectors, table.vectors, strict=True)
        ]
        fields += [
            field if there else torch.zeros(D)
            for field, there in zip([*numbers, *vectors], present, strict=True)
        ]
        rows.append(torch.stack(fields))
    return torch.stack(rows)


def with_every_weight(model: FieldEncoder) -> FieldEncoder:
    """Give weights that start at zero another value, so that an error in their use shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def test_concatenation_is_a_linear_layer_over_all_fields() -> None:
    model = with_every_weight(encoder("concat"))
    assert model.mix is not None
    expected = model.mix(slow_fields(model, TABLE).flatten(1))
    torch.testing.assert_close(model(TABLE), expected)


def test_the_gate_is_a_softmax_over_the_fields_that_say_something() -> None:
    model = with_every_weight(encoder("gate"))
    assert model.gate is not None
    for row, field_FD in enumerate(slow_fields(model, TABLE)):
        there = TABLE.present_RF[row]
        if not there.any():
            continue
        logits = model.gate((field_FD * there.unsqueeze(1)).flatten())[there]
        expected = (logits.softmax(dim=0).unsqueeze(1) * field_FD[there]).sum(dim=0)
        torch.testing.assert_close(model(TABLE)[row], expected)


def test_a_row_of_which_nothing_is_known_is_zero_behind_a_gate_and_finite_otherwise() -> None:
    assert not TABLE.known_R[3]
    assert torch.equal(encoder("gate")(TABLE)[3], torch.zeros(D))
    assert encoder("concat")(SIDE.unknown(2)).isfinite().all()


def test_one_known_field_has_all_the_weight_of_the_gate() -> None:
    model = encoder("gate")
    assert model.fields.codes is not None
    only = model(SIDE.encode(pl.DataFrame({"c": ["q"]})))
    torch.testing.assert_close(only[0], model.fields.codes.weight[3])


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_content_of_a_missing_value_does_not_matter(
    fusion: Literal["concat", "gate"],
) -> None:
    model = with_every_weight(encoder(fusion))
    meddled = FieldTable(
        code_RC=TABLE.code_RC,
        bag_N=TABLE.bag_N,
        bag_offsets_RG1=TABLE.bag_offsets_RG1,
        number_RM=TABLE.number_RM.where(TABLE.present_RF[:, 3:4], 99.0),
        vectors=(TABLE.vectors[0].where(TABLE.present_RF[:, 4:5], 99.0),),
        present_RF=TABLE.present_RF,
    )
    assert torch.equal(model(meddled), model(TABLE))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_category_never_seen_has_the_vector_of_a_missing_one_before_training(
    fusion: Literal["concat", "gate"],
) -> None:
    model = encoder(fusion)
    unseen, missing = (model(SIDE.encode(pl.DataFrame({"c": [c]}))) for c in ("z", None))
    assert torch.equal(unseen, missing)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_gradient_reaches_every_parameter(fusion: Literal["concat", "gate"]) -> None:
    model = encoder(fusion)
    (model(TABLE) * torch.randn(len(TABLE), D)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(
    ("side", "frame"),
    [
        (SIDE.model_copy(update={"bags": (), "numbers": (), "vectors": ()}), FRAME),
        (SIDE.model_copy(update={"codes": (), "numbers": (), "vectors": ()}), FRAME),
        (FieldSide(numbers=SIDE.numbers), FRAME),
        (FieldSide(vectors=SIDE.vectors), FRAME),
        (FieldSide(codes=SIDE.codes[:1]), FRAME),
    ],
    ids=["codes", "bags", "a number", "a vector", "one category"],
)
def test_any_kind_alone_is_enough_and_every_parameter_learns(
    fusion: Literal["concat", "gate"], side: FieldSide, frame: pl.DataFrame
) -> None:
    model = encoder(fusion, side)
    out_RD = model(side.encode(frame))
    assert out_RD.shape == (4, D)
    (out_RD * torch.randn(4, D)).sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0
        for parameter in model.parameters()
    )


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_table_without_rows_gives_no_vectors(fusion: Literal["concat", "gate"]) -> None:
    model = encoder(fusion)
    assert model(SIDE.unknown(0)).shape == (0, D)
    assert model(TABLE.rows(torch.empty(0, dtype=torch.int64))).shape == (0, D)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_row_does_not_depend_on_its_neighbours(fusion: Literal["concat", "gate"]) -> None:
    model = encoder(fusion)
    picked = torch.tensor([2, 0, 2])
    torch.testing.assert_close(model(TABLE.rows(picked)), model(TABLE)[picked])


# --- the look-up ---------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=60)
@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=8), seed=st.integers(0, 10**6))
def test_means_of_bags_and_their_gradient_are_torchs(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    code_N = torch.randint(5, (sum(lengths),), generator=generator)
    offsets_P = torch.tensor([0, *np.cumsum(lengths)[:-1].tolist()])
    weight = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    pull_PD = torch.randn(len(lengths), 3, generator=generator, dtype=torch.float64)
    ours, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    mean_PD = mean_bags(code_N, offsets_P, ours)
    expected_PD = F.embedding_bag(code_N, theirs, offsets_P, mode="mean")
    torch.testing.assert_close(mean_PD, expected_PD)
    (mean_PD * pull_PD).sum().backward()
    (expected_PD * pull_PD).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def wide_side(num_fields: int, num_bags: int, num_values: int) -> FieldSide:
    texts = tuple(str(n) for n in range(num_values))
    return FieldSide(
        codes=tuple(
            Categories(name=f"c{n}", values=values(*texts)) for n in range(num_fields - num_bags)
        ),
        bags=tuple(
            Bag(name=f"g{n}", separator=None, values=values(*texts)) for n in range(num_bags)
        ),
    )


def wide_frame(side: FieldSide, num_rows: int, num_values: int) -> pl.DataFrame:
    draw = np.random.default_rng(0)
    columns: dict[str, object] = {
        field.name: draw.integers(0, num_values, num_rows) for field in side.codes
    }
    for bag in side.bags:
        lengths = draw.integers(1, 5, num_rows)
        columns[bag.name] = [draw.integers(0, num_values, n).tolist() for n in lengths]
    return pl.DataFrame(columns)


@pytest.mark.parametrize("num_bags", [0, 3])
def test_ten_fields_of_4096_rows_are_one_look_up(
    num_bags: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = wide_side(10, num_bags, 50)
    table = side.encode(wide_frame(side, 4096, 50))
    model = encoder("concat", side)
    calls = []

    def counted(codes: Tensor, *rest: object, **options: object) -> Tensor:
        calls.append(len(codes))
        return F.embedding_bag(codes, *rest, **options)

    spied = type("Spied", (), {"embedding_bag": staticmethod(counted)})
    monkeypatch.setattr(table_layer, "F", spied)
    with torch.profiler.profile() as seen:
        model(table)
    looked = [
        event for event in seen.events() if event.name in ("aten::embedding", "aten::embedding_bag")
    ]
    assert len(calls) == len(looked) == 1
    assert calls[0] == table.code_RC.numel() + len(table.bag_N)


# --- doors ---------------------------------------------------------------------------------------


def test_no_field_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="no field to encode"):
        encoder("gate", FieldSide())


@pytest.mark.parametrize("lowest", [0, -1])
def test_rows_looked_up_and_their_gradient_are_torch_s_and_row_minus_1_is_0(lowest: int) -> None:
    torch.manual_seed(0)
    code_N, weight_VD = torch.randint(lowest, 7, (50,)), torch.randn(9, 3, requires_grad=True)
    other_VD = weight_VD.detach().clone().requires_grad_()
    looked_ND, factor_ND = look_up(code_N, weight_VD), torch.randn(50, 3)
    expected_ND = F.embedding(code_N + 1, F.pad(other_VD, (0, 0, 1, 0)))
    torch.testing.assert_close(looked_ND, expected_ND)
    (looked_ND * factor_ND).sum().backward()
    (expected_ND * factor_ND).sum().backward()
    torch.testing.assert_close(weight_VD.grad, other_VD.grad)
