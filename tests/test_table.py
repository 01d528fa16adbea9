"""Tables of rows: the contract of every kind, and the dense one."""

import pytest
import torch

from foretaste.errors import DataError
from foretaste.models.layers import table as table_layer
from foretaste.models.layers.table import DenseConfig, Table

NUM_ROWS, WIDTH = 7, 3


def drawn(num_rows: int = NUM_ROWS) -> Table:
    torch.manual_seed(0)
    table = DenseConfig().make(num_rows, WIDTH)
    table.draw(std=0.5)
    return table


def test_row_minus_1_is_0_in_any_shape_and_blocks_hold_the_same_rows() -> None:
    table, row = drawn(), torch.tensor([[3, -1], [0, 3]])
    found = table(row)
    assert found.shape == (2, 2, WIDTH)
    assert not found[0, 1].any()
    assert torch.equal(found[0, 0], table.block(3, 4)[0])
    assert torch.equal(found[1, 0], table.block(0, 7)[0])
    assert table(row[:0]).shape == (0, 2, WIDTH)


def test_a_block_of_a_dense_table_is_a_view_and_passes_its_gradient_on() -> None:
    table = drawn()
    block_RD = table.block(2, 5)
    weight = table.get_parameter("weight")
    assert block_RD.data_ptr() == weight[2].data_ptr()
    (block_RD * 2).sum().backward()
    assert weight.grad is not None
    assert weight.grad.sum(dim=1).tolist() == [0, 0, 6, 6, 6, 0, 0]


def test_all_blocks_are_the_table_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    table = drawn()
    monkeypatch.setattr(table_layer, "BLOCK_ROWS", 3)
    first, rows = zip(*table.blocks(), strict=True)
    assert first == (0, 3, 6)
    assert not any(block_RD.requires_grad for block_RD in rows)
    assert torch.equal(torch.cat(rows), table.block(0, NUM_ROWS))


def test_rows_that_nothing_trains_are_0_and_the_others_stay() -> None:
    table, before = drawn(), drawn().block(0, NUM_ROWS)
    table.zero_rows(torch.arange(NUM_ROWS) % 2 == 0)
    assert not table.block(0, NUM_ROWS)[::2].any()
    assert torch.equal(table.block(0, NUM_ROWS)[1::2], before[1::2])


def test_a_table_grows_at_its_end_by_rows_drawn_as_the_first_were() -> None:
    table, before = drawn(), drawn().block(0, NUM_ROWS).detach().clone()
    table.grow(5000)
    assert table.num_rows == 5000
    assert torch.equal(table.block(0, NUM_ROWS), before)
    more_RD = table.block(NUM_ROWS, 5000)
    assert more_RD.std().item() == pytest.approx(0.5, rel=0.05)
    table(torch.tensor([4999])).sum().backward()


def test_a_table_does_not_shrink() -> None:
    table = drawn()
    with pytest.raises(DataError, match="cannot grow to 3") as caught:
        table.grow(3)
    assert (caught.value.name, caught.value.value) == ("num_rows", 3)
    assert table.num_rows == NUM_ROWS


@pytest.mark.parametrize("row", [NUM_ROWS, 2**40, -2])
def test_a_row_that_a_table_has_not_is_named(row: int) -> None:
    with pytest.raises(DataError) as caught:
        drawn()(torch.tensor([0, row]))
    assert (caught.value.name, caught.value.value) == ("row", row)


def test_means_of_bags_are_means_of_rows() -> None:
    table, code_N, offsets_P = drawn(), torch.tensor([1, 1, 6, 0]), torch.tensor([0, 3])
    rows = table.block(0, NUM_ROWS)
    expected = torch.stack([(2 * rows[1] + rows[6]) / 3, rows[0]])
    torch.testing.assert_close(table.mean_bags(code_N, offsets_P), expected)
    torch.testing.assert_close(Table.mean_bags(table, code_N, offsets_P), expected)


def test_tables_made_together_are_one_table_cut() -> None:
    torch.manual_seed(3)
    parts = DenseConfig().make_several((2, 0, 5), WIDTH, std=0.1)
    after = torch.rand(1)
    torch.manual_seed(3)
    whole = DenseConfig().make(NUM_ROWS, WIDTH)
    whole.draw(std=0.1)
    assert [part.num_rows for part in parts] == [2, 0, 5]
    rows = torch.cat([part.block(0, part.num_rows) for part in parts])
    assert torch.equal(rows, whole.block(0, NUM_ROWS))
    assert torch.equal(after, torch.rand(1))
