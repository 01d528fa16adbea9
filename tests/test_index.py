"""The item index: brute force against an oracle, and the fast ones against brute force.

Shape legend: I items, N items in the index, B queries, D width, X exclusions, K list length.
"""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foretaste.errors import BundleError, DataError, NonFiniteError
from foretaste.models.base import top_k
from foretaste.retrieval import changing, choose, faiss_index
from foretaste.retrieval import index as index_module
from foretaste.retrieval.changing import ChangingIndex
from foretaste.retrieval.choose import build_index, build_ivf, bytes_of_item, load_index
from foretaste.retrieval.faiss_index import FaissIndex
from foretaste.retrieval.index import ExactIndex, IndexChoice, ItemIndex

NUM_ITEMS, WIDTH = 4000, 16
APPROXIMATE: tuple[IndexChoice, ...] = ("ivf_flat", "ivf_sq8", "ivf_pq", "hnsw")


def all_known(table: Tensor) -> Tensor:
    return torch.ones(len(table), dtype=torch.bool)


def nobody(queries: int) -> Tensor:
    return torch.full((queries, 0), -1)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clustered(num_items: int = NUM_ITEMS) -> Tensor:
    centre = normal(1, 40, WIDTH)[torch.arange(num_items) % 40]
    return 2 * centre + 0.3 * normal(2, num_items, WIDTH)


def spread(num_items: int = NUM_ITEMS) -> Tensor:
    return normal(3, num_items, WIDTH)


def argsort_oracle(table: Tensor, query: Tensor, k: int, banned: set[int]) -> list[int]:
    """The obvious way: score all, sort all, walk down."""
    order = np.argsort(-(query.double() @ table.double().T).numpy(), kind="stable")
    return [int(item) for item in order if int(item) not in banned][:k]


@pytest.fixture(scope="module", params=APPROXIMATE)
def fast(request: pytest.FixtureRequest) -> ItemIndex:
    table = clustered()
    return build_index(table, kind=request.param, known_I=all_known(table), seed=0)


def test_an_index_takes_about_the_memory_that_is_asked_for(fast: FaissIndex) -> None:
    size = faiss.serialize_index(fast._index).nbytes
    assert size <= NUM_ITEMS * bytes_of_item(fast.kind, WIDTH) <= 4 * size


def test_three_items_by_hand() -> None:
    # Query (1, 2) scores the items 1·1 + 2·0 = 1, 0 + 2 = 2, and 3 - 4 = -1.
    index = build_index(
        torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, -2.0]]), known_I=torch.ones(3).bool()
    )
    answer = index.search(torch.tensor([[1.0, 2.0]]), 2, exclude_BX=nobody(1))
    assert answer.item_BK.tolist() == [[1, 0]]
    assert answer.score_BK.tolist() == [[2.0, 1.0]]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    num_items=st.integers(1, 40),
    k=st.integers(1, 50),
    share_known=st.floats(0.1, 1.0),
    excluded=st.integers(0, 45),
    item_block=st.integers(1, 50),
    score_block=st.integers(1, 100),
    seed=st.integers(0, 10**6),
)
def test_exact_is_a_sort_of_what_is_allowed(
    num_items: int,
    k: int,
    share_known: float,
    excluded: int,
    item_block: int,
    score_block: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    known = torch.rand(num_items, generator=generator) < share_known
    known[seed % num_items] = True
    allow = torch.rand(num_items, generator=generator) < 0.6 if seed % 2 else None
    table, queries = normal(seed, num_items, 4), normal(seed + 1, 3, 4)
    exclude = torch.randint(-1, num_items, (3, excluded), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "ITEM_BLOCK", item_block)
        patch.setattr(index_module, "SCORE_BLOCK", score_block)
        index = build_index(table, kind="exact", known_I=known)
        answer = index.search(queries, k, exclude_BX=exclude, allow_I=allow)
    for row in range(3):
        banned = set(exclude[row].tolist()) | set((~known).nonzero().flatten().tolist())
        if allow is not None:
            banned |= set((~allow).nonzero().flatten().tolist())
        expected = argsort_oracle(table, queries[row], k, banned)
        assert answer.item_BK[row].tolist() == expected + [-1] * (k - len(expected))
        assert (answer.score_BK[row, len(expected) :] == -torch.inf).all()


def test_ties_go_to_the_lower_row_and_a_longer_list_begins_with_the_shorter() -> None:
    score = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 0.0]])
    lists = [top_k(score, k)[1][0].tolist() for k in range(1, 7)]
    assert lists[-1] == [1, 3, 0, 2, 4, 5]
    assert all(shorter == lists[-1][: len(shorter)] for shorter in lists)


def test_one_item_and_a_catalogue_that_runs_out() -> None:
    index = build_index(torch.ones(1, 2), known_I=torch.ones(1).bool())
    answer = index.search(torch.ones(1, 2), 5, exclude_BX=nobody(1))
    assert answer.item_BK.tolist() == [[0, -1, -1, -1, -1]]
    gone = index.search(torch.ones(1, 2), 2, exclude_BX=torch.tensor([[0, -1]]))
    assert gone.item_BK.tolist() == [[-1, -1]]
    assert gone.score_BK.tolist() == [[-torch.inf, -torch.inf]]


def test_no_query_gets_no_answer() -> None:
    index = build_index(torch.ones(3, 2), known_I=torch.ones(3).bool())
    assert index.search(torch.ones(0, 2), 2, exclude_BX=nobody(0)).item_BK.shape == (0, 2)


@pytest.mark.parametrize("kind", APPROXIMATE)
@pytest.mark.parametrize("vectors", [clustered, spread])
def test_a_fast_index_keeps_its_promise_of_recall(kind: IndexChoice, vectors: object) -> None:
    # Chance: 100 of 4000 items, 0.025. The queries are not those that it was tuned on.
    table = clustered() if vectors is clustered else spread()
    index = build_index(table, kind=kind, known_I=all_known(table), seed=0)
    queries = table[::41] + 0.1 * normal(9, len(table[::41]), WIDTH)
    assert index.facts.recall_at_100 >= 0.95
    assert isinstance(index, FaissIndex)
    true_best = (queries @ table.T).argsort(dim=1, descending=True)[:, :100]
    found = index.candidates(queries, 100)
    share = (true_best.unsqueeze(2) == found.unsqueeze(1)).any(dim=2).float().mean()
    assert float(share) >= 0.94


def test_spread_vectors_are_searched_wider_than_clustered_ones() -> None:
    widths = [
        build_index(table, kind="ivf_flat", known_I=all_known(table)).facts.search_width
        for table in (clustered(), spread())
    ]
    assert widths[0] < widths[1]


def test_a_higher_target_costs_width_and_the_facts_say_what_was_measured() -> None:
    table, queries = spread(), normal(5, 300, WIDTH)
    low, high = (
        build_index(
            table, kind="ivf_flat", known_I=all_known(table), recall_target=target, query_QD=queries
        ).facts
        for target in (0.5, 0.99)
    )
    assert low.search_width < high.search_width
    assert 0.5 <= low.recall_at_100 < 0.99 <= high.recall_at_100
    assert high.recall_queries == "256 the model's queries"


def test_auto_is_exact_where_that_is_fast_enough_and_else_what_was_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = clustered(1000)
    monkeypatch.setattr(choose, "ALWAYS_EXACT", 999)
    took, widths = {"exact": 5.0, "ivf_sq8": 1.0}, list[int]()

    def milliseconds(index: ItemIndex, queries: Tensor) -> float:
        widths.append(index.facts.search_width)
        return took[index.kind]

    monkeypatch.setattr(choose, "milliseconds", milliseconds)
    build = partial(build_index, table, known_I=all_known(table))
    assert build(exact_ms=5.0).kind == "exact"
    assert build(exact_ms=4.0).kind == "ivf_sq8"
    took["ivf_sq8"] = 6.0
    widths.clear()
    assert build(exact_ms=4.0).kind == "exact"
    assert widths == [0, 1]  # no wider search is tried once one is slower than the exact one
    monkeypatch.setattr(choose, "ALWAYS_EXACT", 1000)
    took.clear()
    assert build(exact_ms=0.0).kind == "exact"


def test_a_query_is_timed_by_its_fastest_answer() -> None:
    # Two queries, three answers each: 3, 1 and 2 s, then 5, 4 and 6 s: (1 + 4) / 2 s.
    ticks = iter(np.cumsum([0, 3, 0, 1, 0, 2, 0, 5, 0, 4, 0, 6]).tolist())
    index = build_index(spread(9), known_I=torch.ones(9).bool())
    assert choose.milliseconds(index, spread(2), clock=ticks.__next__) == 2500.0


def test_an_index_of_a_run_goes_by_the_number_of_items_alone() -> None:
    assert [choose.kind_by_size(num) for num in (199_999, 200_000)] == ["exact", "ivf_sq8"]


def test_the_best_items_once_excluded_do_not_come_back(fast: ItemIndex) -> None:
    queries = clustered()[:5] + 0.01
    best = fast.search(queries, 20, exclude_BX=nobody(5))
    for rows in (slice(0, 1), slice(0, 5)):  # one query: by a set; five: fetched and dropped
        rest = fast.search(queries[rows], 20, exclude_BX=best.item_BK[rows])
        for shown, answer in zip(best.item_BK[rows], rest.item_BK, strict=True):
            assert not set(shown.tolist()) & set(answer.tolist())
            assert len(set(answer.tolist()) - {-1}) == 20


def test_one_row_and_many_rows_agree(fast: ItemIndex) -> None:
    queries, exclude = clustered()[:30] + 0.1, torch.randint(-1, NUM_ITEMS, (30, 40))
    together = fast.search(queries, 10, exclude_BX=exclude)
    alone = [fast.search(queries[b : b + 1], 10, exclude_BX=exclude[b : b + 1]) for b in range(30)]
    same = together.item_BK == torch.cat([answer.item_BK for answer in alone])
    assert same.float().mean() > 0.97  # HNSW walks a little differently for longer lists


def test_long_exclusions_go_by_bitmap_for_each_row(fast: ItemIndex) -> None:
    queries = clustered()[:4]
    exclude = torch.stack([torch.randperm(NUM_ITEMS)[:1500] for _ in range(4)])
    answer = fast.search(queries, 10, exclude_BX=exclude)
    for row in range(4):
        expected = argsort_oracle(clustered(), queries[row], 10, set(exclude[row].tolist()))
        assert len(set(expected) & set(answer.item_BK[row].tolist())) >= 8


def test_scores_are_dot_products_and_fall(fast: ItemIndex) -> None:
    queries = spread(3)
    answer = fast.search(queries, 10, exclude_BX=nobody(3))
    dots = torch.einsum("bkd,bd->bk", clustered()[answer.item_BK], queries)
    torch.testing.assert_close(answer.score_BK, dots, rtol=1e-4, atol=1e-4)
    assert (answer.score_BK.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("allowed", [1, 5, 30, 700, 3000])
@pytest.mark.parametrize("rows", [1, 3])
def test_an_allow_list_is_honoured_and_filled(fast: ItemIndex, allowed: int, rows: int) -> None:
    allow = torch.zeros(NUM_ITEMS, dtype=torch.bool)
    allow[torch.randperm(NUM_ITEMS, generator=torch.Generator().manual_seed(1))[:allowed]] = True
    exclude = allow.nonzero()[:1].T.expand(rows, 1)
    answer = fast.search(spread(rows), 20, exclude_BX=exclude, allow_I=allow)
    for row in answer.item_BK:
        found = row[row >= 0]
        assert len(set(found.tolist())) == min(20, allowed - 1)
        assert allow[found].all()
        assert int(exclude[0, 0]) not in found.tolist()


def test_a_narrow_search_is_completed_by_the_exact_one() -> None:
    # One list of about 40 is probed, and 300 items are asked for: IVF alone falls short.
    table = clustered()
    index = build_index(table, kind="ivf_flat", known_I=all_known(table), recall_target=1e-6)
    assert index.facts.search_width == 1
    answer = index.search(table[:2], 300, exclude_BX=nobody(2))
    for row in range(2):
        assert answer.item_BK[row].tolist() == argsort_oracle(table, table[row], 300, set())


@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_sq8", "ivf_pq"])
def test_an_index_with_lists_finds_similar_items_without_comparing_all(
    kind: Literal["ivf_flat", "ivf_sq8", "ivf_pq"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faiss_index, "LISTS_OF_SIMILAR", 4)
    monkeypatch.setattr(faiss_index, "FETCHED_SIMILAR", 40)
    rng = np.random.default_rng(0)
    centre_CD = rng.standard_normal((70, 10)).astype(np.float32)
    vectors_ND = torch.from_numpy(np.repeat(centre_CD, 50, axis=0))
    vectors_ND = vectors_ND + 0.2 * torch.from_numpy(rng.standard_normal((3500, 10), np.float32))
    vectors_ND *= torch.from_numpy(rng.uniform(0.5, 2.0, (3500, 1)).astype(np.float32))
    exact = ExactIndex(vectors_ND, torch.arange(3500), catalogue_size=3500)
    index = build_ivf(exact, kind=kind, seed=0)
    unit = vectors_ND / vectors_ND.norm(dim=1, keepdim=True)
    found = []
    for own in range(0, 3500, 100):
        position_F = index.near(vectors_ND[own], 6)
        assert position_F is not None
        assert len(position_F.unique()) == len(position_F) < 100
        found.append(torch.isin((unit @ unit[own]).topk(6).indices, position_F).float().mean())
    assert torch.stack(found).mean() > 0.95
    assert index.near(vectors_ND[0], 3500) is None  # more than the lists hold
    monkeypatch.setattr(faiss_index, "LISTS_OF_SIMILAR", 20)
    assert index.near(vectors_ND[0], 6) is None  # an eighth of all: comparing all is as fast


def test_a_list_as_long_as_the_catalogue_holds_every_item_once(fast: ItemIndex) -> None:
    answer = fast.search(spread(2), NUM_ITEMS + 7, exclude_BX=torch.tensor([[3], [-1]]))
    counts = [len(set(row[row >= 0].tolist())) for row in answer.item_BK]
    assert counts == [NUM_ITEMS - 1, NUM_ITEMS]


@pytest.mark.parametrize("kind", ["exact", *APPROXIMATE])
def test_an_item_without_training_events_is_never_recommended(kind: IndexChoice) -> None:
    table = clustered(3000)
    known = torch.rand(3000, generator=torch.Generator().manual_seed(0)) < 0.5
    index = build_index(table, kind=kind, known_I=known)
    assert index.facts.num_items == int(known.sum())
    exclude = known.nonzero()[:3].T.expand(4, 3)
    for k in (10, 3000):
        item = index.search(table[:4], k, exclude_BX=exclude).item_BK
        assert known[item[item >= 0]].all()
        assert not torch.isin(item, exclude[0]).any()
    assert (item >= 0).sum(dim=1).tolist() == [int(known.sum()) - 3] * 4


@pytest.mark.parametrize("kind", ["exact", *APPROXIMATE])
def test_saved_and_loaded_answers_are_equal(kind: IndexChoice, tmp_path: Path) -> None:
    table = clustered(3000)
    known = torch.arange(3000) % 7 != 0
    index = build_index(table, kind=kind, known_I=known)
    index.save(tmp_path)
    loaded = load_index(tmp_path)
    assert loaded.facts == index.facts
    exclude = torch.randint(-1, 3000, (20, 9))
    for k in (10, 2000):
        before, after = (each.search(spread(20), k, exclude_BX=exclude) for each in (index, loaded))
        assert torch.equal(before.item_BK, after.item_BK)
        assert torch.equal(before.score_BK, after.score_BK)


def test_searches_from_several_threads_do_not_disturb_each_other(fast: ItemIndex) -> None:
    queries = spread(64)
    exclude = torch.randint(-1, NUM_ITEMS, (64, 30), generator=torch.Generator().manual_seed(2))

    def one(row: int) -> list[int]:
        allow = torch.arange(NUM_ITEMS) % 2 == row % 2
        answer = fast.search(
            queries[row : row + 1], 10, exclude_BX=exclude[row : row + 1], allow_I=allow
        )
        return answer.item_BK[0].tolist()

    expected = [one(row) for row in range(64)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, list(range(64)) * 3)) == expected * 3


def test_one_seed_builds_one_index() -> None:
    table = spread(2000)
    first, second = (
        build_index(table, kind="ivf_flat", known_I=all_known(table), seed=4) for _ in range(2)
    )
    assert first.facts == second.facts
    answers = [index.search(table[:50], 20, exclude_BX=nobody(50)) for index in (first, second)]
    assert torch.equal(answers[0].item_BK, answers[1].item_BK)


@pytest.mark.parametrize("kind", ["exact", "ivf_flat", "hnsw"])
def test_a_wrong_search_says_what_is_wrong(kind: IndexChoice) -> None:
    index = build_index(spread(900), kind=kind, known_I=torch.ones(900).bool())
    with pytest.raises(DataError, match="k is 0"):
        index.search(spread(1), 0, exclude_BX=nobody(1))
    with pytest.raises(DataError, match="3 and the index 16"):
        index.search(torch.ones(1, 3), 1, exclude_BX=nobody(1))
    with pytest.raises(DataError, match="allow names 5 items of 900"):
        index.search(spread(1), 1, exclude_BX=nobody(1), allow_I=torch.ones(5).bool())
    with pytest.raises(NonFiniteError, match="query"):
        index.search(torch.full((1, WIDTH), torch.nan), 1, exclude_BX=nobody(1))


def test_what_cannot_be_indexed_is_refused() -> None:
    with pytest.raises(DataError, match="nothing to index"):
        build_index(spread(3), known_I=torch.zeros(3).bool())
    with pytest.raises(NonFiniteError, match="item's vector"):
        build_index(torch.full((2, 2), torch.inf), known_I=torch.ones(2).bool())
    with pytest.raises(DataError, match="recall_target is 0"):
        build_index(spread(3), known_I=torch.ones(3).bool(), recall_target=0.0)


def test_an_unknown_items_broken_vector_does_not_matter() -> None:
    table = spread(4)
    table[2] = torch.nan
    index = build_index(table, known_I=torch.tensor([True, True, False, True]))
    assert set(index.search(spread(1), 3, exclude_BX=nobody(1)).item_BK[0].tolist()) == {0, 1, 3}


@pytest.mark.parametrize("name", ["index.json", "vectors.safetensors", "index.faiss"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_a_broken_index_is_a_bundle_error(name: str, damage: str, tmp_path: Path) -> None:
    table = spread(900)
    build_index(table, kind="ivf_flat", known_I=all_known(table)).save(tmp_path)
    path = tmp_path / name
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(b"" if damage == "empty" else whole[: len(whole) // 2])
    with pytest.raises(BundleError, match="build it again"):
        load_index(tmp_path)


@pytest.mark.parametrize("kind", ["ivf_sq8", "hnsw"])
def test_an_index_older_than_its_vectors_is_refused(kind: IndexChoice, tmp_path: Path) -> None:
    table = spread(900)
    build_index(table, kind=kind, known_I=all_known(table)).save(tmp_path)
    older = (tmp_path / "index.faiss").read_bytes()
    table[5] += 1
    build_index(table, kind=kind, known_I=all_known(table)).save(tmp_path)
    load_index(tmp_path)
    (tmp_path / "index.faiss").write_bytes(older)
    with pytest.raises(BundleError, match="older; build it again") as caught:
        load_index(tmp_path)
    assert caught.value.name == str(tmp_path / "index.faiss")


@pytest.mark.parametrize("num_items", [1, 5, 300])
def test_codes_in_lists_of_few_items_of_an_odd_width(num_items: int) -> None:
    table = normal(6, num_items, 5)
    index = build_index(table, kind="ivf_pq", known_I=all_known(table))
    assert isinstance(index, FaissIndex)
    index.check()
    answer = index.search(table[:1], 3, exclude_BX=nobody(1)).item_BK[0]
    assert answer[answer >= 0].tolist() == argsort_oracle(table, table[0], 3, set())


def brute_force(rows: dict[int, Tensor], query: Tensor, k: int, banned: set[int]) -> list[int]:
    items = [item for item in sorted(rows) if item not in banned]
    scores = [float(query @ rows[item]) for item in items]
    order = sorted(range(len(items)), key=lambda place: (-scores[place], place))
    return [items[place] for place in order[:k]]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    kind=st.sampled_from(["exact", "ivf_flat"]),
    bound=st.sampled_from([1, 7, 1000]),
    steps=st.lists(st.sampled_from(["add", "replace", "remove", "wait"]), max_size=12),
    seed=st.integers(0, 10**6),
)
def test_after_any_changes_an_exhaustive_search_is_brute_force(
    kind: IndexChoice, bound: int, steps: list[str], seed: int
) -> None:
    rng, table = np.random.default_rng(seed), normal(seed, 60, 4)
    known = torch.from_numpy(rng.random(60) < 0.8)
    known[0] = True
    built = build_index(table, kind=kind, known_I=known)
    if isinstance(built, FaissIndex):
        every = built.facts.model_copy(update={"search_width": built.widest, "recall_target": 1.0})
        built = built.with_facts(every)
    index, rows = ChangingIndex(built, bound=bound), {}
    rows |= {item: table[item] for item in known.nonzero().flatten().tolist()}
    for step, name in enumerate(steps):
        some = rng.permutation(sorted(rows))[: rng.integers(1, 9)]
        if name == "add":
            some = rng.permutation(100)[: rng.integers(1, 9)]
        if name in ("add", "replace"):
            vectors = normal(seed + step + 1, len(some), 4)
            index.put(torch.from_numpy(some), vectors)
            rows |= {int(item): vector for item, vector in zip(some, vectors, strict=True)}
        if name == "remove" and len(some) < len(rows):
            index.remove(torch.from_numpy(some))
            rows = {item: vector for item, vector in rows.items() if item not in some}
        if name == "wait":
            index.wait()
        size = index.facts.catalogue_size
        allow = torch.from_numpy(rng.random(size) < 0.7) if step % 2 else None
        exclude, queries = torch.from_numpy(rng.integers(-1, size, (3, 5))), normal(step, 3, 4)
        answer = index.search(queries, 9, exclude_BX=exclude, allow_I=allow)
        assert index.facts.num_items == len(rows)
        for row in range(3):
            banned = set(exclude[row].tolist())
            banned |= set() if allow is None else set((~allow).nonzero().flatten().tolist())
            expected = brute_force(rows, queries[row], 9, banned)
            assert answer.item_BK[row].tolist() == expected + [-1] * (9 - len(expected))


def test_past_its_bound_a_changing_index_is_built_again_while_it_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = clustered(1000)
    index = ChangingIndex(build_index(table, kind="ivf_sq8", known_I=all_known(table)), bound=20)
    begun, go_on = threading.Event(), threading.Event()

    def held(*arguments: object, **more: object) -> ItemIndex:
        begun.set()
        go_on.wait(60)
        return choose.index_of(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(changing, "index_of", held)
    table = table.clone()
    for first in (0, 20, 40):  # the first 20 are not past the bound
        assert not begun.is_set() or first == 40
        table[first : first + 20] = normal(first, 20, WIDTH)
        index.put(torch.arange(first, first + 20), table[first : first + 20])
        if first == 20:
            assert begun.wait(60)
    assert index.changed == 60
    go_on.set()
    index.wait()
    assert index.changed in (0, 20)  # the last 20 came while it was built
    answer = index.search(table[:40], 1, exclude_BX=nobody(40)).item_BK.flatten()
    assert (answer == (table[:40] @ table.T).argmax(dim=1)).float().mean() > 0.9


@pytest.mark.parametrize("bound", [1, 3])
def test_waiting_meets_builders_that_start_late(
    bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(threading.Thread):
        def start(self) -> None:
            time.sleep(0.02)
            super().start()

    monkeypatch.setattr(changing.threading, "Thread", Late)
    index = ChangingIndex(build_index(spread(9), known_I=torch.ones(9).bool()), bound=bound)
    for first in (0, 2, 5):  # the later ones come while an index is built, which starts another
        index.put(torch.arange(first, first + 4), torch.ones(4, WIDTH))
    index.wait()
    assert index.changed <= bound


def test_building_that_fails_is_said_at_the_next_change_and_the_old_index_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> ItemIndex:
        raise DataError("no room", name="TMPDIR")

    monkeypatch.setattr(changing, "index_of", fail)
    index = ChangingIndex(build_index(spread(9), known_I=torch.ones(9).bool()), bound=1)
    index.remove(torch.tensor([3, 4]))
    with pytest.raises(DataError, match="no room"):
        index.wait()
    found = index.search(spread(1), 9, exclude_BX=nobody(1)).item_BK[0].tolist()
    assert sorted(found) == [-1, -1, 0, 1, 2, 5, 6, 7, 8]


def test_wrong_changes_name_the_item() -> None:
    index = ChangingIndex(build_index(spread(9), known_I=torch.arange(9) != 2))
    for item in (2, 9, -1):
        with pytest.raises(DataError, match="not in the index") as caught:
            index.remove(torch.tensor([0, item]))
        assert caught.value.value == item
    with pytest.raises(DataError, match="twice") as caught:
        index.put(torch.tensor([5, 1, 5]), torch.ones(3, WIDTH))
    assert caught.value.value == 5
    with pytest.raises(DataError, match="negative"):
        index.put(torch.tensor([-1]), torch.ones(1, WIDTH))
    with pytest.raises(DataError, match="of width 16"):
        index.put(torch.tensor([1]), torch.ones(1, 3))
    with pytest.raises(NonFiniteError):
        index.put(torch.tensor([1]), torch.full((1, WIDTH), torch.nan))
    with pytest.raises(DataError, match="bound is 0"):
        ChangingIndex(build_index(spread(3), known_I=torch.ones(3).bool()), bound=0)
    assert index.facts.num_items == 8


def test_a_changed_index_is_saved_with_its_changes(tmp_path: Path) -> None:
    table = clustered(2000)
    index = ChangingIndex(build_index(table, kind="ivf_sq8", known_I=all_known(table)))
    index.put(torch.tensor([7, 2003]), 50 * normal(1, 2, WIDTH))
    index.remove(torch.tensor([8]))
    assert (index.changed, index.facts.num_items, index.facts.catalogue_size) == (2, 2000, 2004)
    index.save(tmp_path)
    loaded = load_index(tmp_path)
    assert (loaded.kind, loaded.facts.num_items, loaded.facts.catalogue_size) == (
        "ivf_sq8",
        2000,
        2004,
    )
    queries = 50 * normal(1, 2, WIDTH)
    assert loaded.search(queries, 1, exclude_BX=nobody(2)).item_BK.flatten().tolist() == [7, 2003]


def test_a_large_table_is_built_in_a_file_and_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    table, known = spread(500), torch.arange(500) % 3 != 0
    blocks = list(zip(range(0, 500, 120), table.split(120), strict=True))
    small = build_index(blocks, kind="exact", known_I=known)
    monkeypatch.setattr(index_module, "MAPPED_BYTES", 1)
    large = build_index(blocks, kind="exact", known_I=known)
    assert isinstance(small, ExactIndex)
    assert isinstance(large, ExactIndex)
    assert torch.equal(small.vectors_ND, large.vectors_ND)
    assert torch.equal(large.vectors_ND, table[known])


def test_a_table_without_room_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(index_module, "MAPPED_BYTES", 1)
    with pytest.raises(DataError, match="no room for the table") as caught:
        build_index([(0, spread(3)), (3, spread(3))], known_I=torch.ones(6).bool())
    assert caught.value.name == "TMPDIR"
