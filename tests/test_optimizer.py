"""Tables updated by rows: only the rows of a batch change, and only they cost time."""

import pytest
import torch
from torch import Tensor

from foretaste.models.layers.table import Dense
from foretaste.training.settings import AdamWByRows, TrainingConfig, clip, gradients, make_optimizer

NUM_ROWS, WIDTH, RATE, DECAY = 6, 3, 0.1, 0.5


def table_of(tables: str, num_rows: int = NUM_ROWS, **settings: float) -> tuple[Dense, AdamWByRows]:
    torch.manual_seed(0)
    table = Dense(num_rows, WIDTH).double()
    config = TrainingConfig(tables=tables, learning_rate=RATE, **settings)  # type: ignore[arg-type]
    return table, make_optimizer(list(table.parameters()), config, tables=[table])


def step(table: Dense, optimizer: AdamWByRows, row: list[int], pull_ND: Tensor) -> None:
    optimizer.zero_grad()
    (table(torch.tensor(row)) * pull_ND).sum().backward()
    optimizer.step()


def pulls(num: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(num, WIDTH, generator=generator, dtype=torch.float64) for _ in range(8)]


@pytest.mark.parametrize("bags", [False, True])
def test_the_gradient_by_rows_is_that_of_the_whole_table(*, bags: bool) -> None:
    row, found = torch.tensor([4, 1, 4, 0]), []
    for tables in ("lazy_adamw", "adamw"):
        table, _ = table_of(tables)
        looked = table.mean_bags(row, torch.tensor([0, 3])) if bags else table(row)
        (looked * pulls(4)[0][: len(looked)]).sum().backward()
        assert table.weight.grad is not None
        found.append(table.weight.grad)
    sparse, dense = found
    assert sparse.is_sparse
    assert sparse.coalesce().indices().tolist() == [[0, 1, 4]]
    torch.testing.assert_close(sparse.to_dense(), dense)


def test_row_minus_1_has_no_gradient_by_rows_either() -> None:
    table, optimizer = table_of("lazy_adamw")
    before = table.weight.detach().clone()
    step(table, optimizer, [-1, 2], pulls(2)[0])
    moved = (table.weight != before).any(dim=1).nonzero().flatten().tolist()
    assert moved == [2]
    step(table, optimizer, [-1, -1], pulls(2)[0])


def test_where_every_batch_reads_every_row_it_is_adamw() -> None:
    results = []
    for tables in ("lazy_adamw", "adamw"):
        table, optimizer = table_of(tables, weight_decay=DECAY)
        for pull_ND in pulls(NUM_ROWS):
            step(table, optimizer, [3, 1, 0, 2, 5, 4], pull_ND)
        optimizer.settle()
        results.append(table.weight.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_rows_are_those_of_a_table_each_and_rest_between() -> None:
    # the oracle: each row is a table of its own, which AdamW without decay moves when it is read,
    # given the number of the step; decay multiplies it in every step
    table, optimizer = table_of("lazy_adamw", weight_decay=DECAY, beta2=0.9)
    slow_RD = table.weight.detach().clone()
    mean_RD, square_RD = torch.zeros_like(slow_RD), torch.zeros_like(slow_RD)
    for number, pull_ND in enumerate(pulls(3), start=1):
        rows = [number % NUM_ROWS, (2 * number) % NUM_ROWS, number % NUM_ROWS]
        step(table, optimizer, rows, pull_ND)
        slow_RD *= 1 - RATE * DECAY
        for row in set(rows):
            grad_D = sum(pull_ND[place] for place, other in enumerate(rows) if other == row)
            mean_RD[row] = 0.9 * mean_RD[row] + 0.1 * grad_D
            square_RD[row] = 0.9 * square_RD[row] + 0.1 * grad_D**2
            root_D = (square_RD[row] / (1 - 0.9**number)).sqrt() + 1e-8
            slow_RD[row] -= RATE * mean_RD[row] / (1 - 0.9**number) / root_D
        read = table(torch.arange(NUM_ROWS))
        torch.testing.assert_close(read.detach(), slow_RD)  # decayed, though it is not written yet
        torch.testing.assert_close(table.block(0, NUM_ROWS).detach(), slow_RD)
    optimizer.settle()
    torch.testing.assert_close(table.weight.detach(), slow_RD)


def test_one_rate_a_row_by_hand() -> None:
    # squares of [3, 4, 0]: 25 / 3 in the mean; of the same once more: 50 / 3
    table, optimizer = table_of("row_adagrad")
    before, pull = table.weight.detach().clone(), torch.tensor([[3.0, 4.0, 0.0]]).double()
    for _ in range(2):
        step(table, optimizer, [2], pull)
    change = before[2] - table.weight[2].detach()
    expected = RATE * pull[0] * ((25 / 3) ** -0.5 + (50 / 3) ** -0.5)
    torch.testing.assert_close(change, expected, rtol=1e-7, atol=1e-9)
    assert torch.equal(before[[0, 1, 3, 4, 5]], table.weight.detach()[[0, 1, 3, 4, 5]])


def test_a_block_in_a_step_makes_it_one_of_the_whole_table() -> None:
    results = []
    for tables in ("lazy_adamw", "adamw"):
        table, optimizer = table_of(tables, weight_decay=DECAY)
        for number, pull_ND in enumerate(pulls(NUM_ROWS)):
            optimizer.zero_grad()
            loss = (table(torch.arange(NUM_ROWS)) * pull_ND).sum()
            if number % 2:
                loss = loss + table.block(0, 4).square().sum()
            loss.backward()
            optimizer.step()
        optimizer.settle()
        results.append(table.weight.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_a_clipped_gradient_by_rows_is_the_whole_one_clipped() -> None:
    found = []
    for tables in ("lazy_adamw", "adamw"):
        table, _ = table_of(tables)
        (table(torch.tensor([4, 1, 4])) * pulls(3)[0]).sum().backward()
        parts = gradients([table.weight])
        norm = torch.nn.utils.get_total_norm(parts)
        clip(parts, norm, 0.5)
        assert table.weight.grad is not None
        found.append((norm, table.weight.grad.to_dense()))
    torch.testing.assert_close(found[0], found[1])
    assert found[0][1].norm().item() == pytest.approx(0.5)


def test_what_an_optimizer_keeps_is_restored_to_the_last_digit() -> None:
    straight, optimizer = table_of("lazy_adamw", weight_decay=DECAY)
    for pull_ND in pulls(2):
        step(straight, optimizer, [1, 4], pull_ND)
    halted, first = table_of("lazy_adamw", weight_decay=DECAY)
    for pull_ND in pulls(2)[:5]:
        step(halted, first, [1, 4], pull_ND)
    resumed, second = table_of("lazy_adamw", weight_decay=DECAY)
    resumed.load_state_dict(halted.state_dict())
    second.load_state_dict(first.state_dict())
    for pull_ND in pulls(2)[5:]:
        step(resumed, second, [1, 4], pull_ND)
    assert torch.equal(resumed.weight, straight.weight)
    assert resumed.scale == straight.scale


@pytest.mark.parametrize("tables", ["lazy_adamw", "row_adagrad"])
def test_a_step_makes_nothing_of_the_size_of_the_table(tables: str) -> None:
    table, optimizer = table_of(tables, num_rows=200_000, weight_decay=DECAY)
    step(table, optimizer, [7, 9], pulls(2)[0])
    with torch.profiler.profile(profile_memory=True) as seen:
        step(table, optimizer, [199_999, 7], pulls(2)[1])
    assert max(event.cpu_memory_usage for event in seen.events()) < 10_000


@pytest.mark.parametrize(
    ("num_rows", "settings", "by_rows"),
    [(2**17, {}, True), (2**17 - 1, {}, False), (2**17, {"ema_decay": 0.9}, False)],
)
def test_many_rows_decide_how_a_table_learns(
    num_rows: int, settings: dict[str, float], *, by_rows: bool
) -> None:
    assert table_of("auto", num_rows, **settings)[0].by_rows == by_rows
    assert not table_of("adamw", num_rows, **settings)[0].by_rows
    assert table_of("lazy_adamw", 1, **settings)[0].by_rows
