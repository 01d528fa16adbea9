"""Scoring rows of codes without decompressing them, and the index that keeps them.

Codebooks of small whole numbers make sums exact and ties frequent, so answers are compared to the
last bit with those of the decompressed rows.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import foretaste as ft
from foretaste.errors import BundleError, ConfigError, NonFiniteError
from foretaste.models.base import top_k
from foretaste.models.layers.codes import CODES, Codes, balanced_turn, even, train_codes
from foretaste.models.layers.table_kinds import QuantisedConfig
from foretaste.retrieval.choose import build_index, load_index
from foretaste.retrieval.index import CodeIndex
from tests.worlds import make_events

SPLIT = ft.leave_last_split(make_events())
TRAINING = ft.TrainingConfig(epochs=1, batch_events=64, patience=None)
CODED = QuantisedConfig(from_rows=0, sub_spaces=8)


def codes(
    num_rows: int,
    parts: int,
    width: int,
    *,
    whole: bool = False,
    num_exact: int = 0,
    seed: int = 0,
) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    sizes = even(width, parts)
    book = torch.zeros(parts, CODES, sizes[0])
    for part, size in enumerate(sizes):
        if whole:
            drawn = torch.randint(-2, 3, (CODES, size), generator=generator).float()
        else:
            drawn = torch.randn(CODES, size, generator=generator)
        book[part, :, :size] = drawn
    code = torch.randint(0, CODES, (num_rows, parts), generator=generator, dtype=torch.uint8)
    rows = Codes(code_RM=code, book_MCd=book, width=width)
    if not num_exact:
        return rows
    exact_L = torch.randperm(num_rows, generator=generator)[:num_exact].sort().values
    return replace(
        rows, exact_L=exact_L, exact_LD=queries(len(exact_L), width, whole=whole, seed=seed + 9)
    )


def queries(num: int, width: int, *, whole: bool = False, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if whole:
        return torch.randint(-2, 3, (num, width), generator=generator).float()
    return torch.randn(num, width, generator=generator)


def nothing(num: int) -> Tensor:
    return torch.full((num, 0), -1)


def test_two_sub_spaces_by_hand() -> None:
    # Rows (1, 2, 5) and (3, 4, 6) of parts 2 + 1 wide; the query (1, 10, 100).
    book = torch.zeros(2, CODES, 2)
    book[0, 7], book[0, 8] = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    book[1, 255, 0], book[1, 0, 0] = 5.0, 6.0
    code = torch.tensor([[7, 255], [8, 0]], dtype=torch.uint8)
    rows = Codes(code_RM=code, book_MCd=book, width=3)
    query = torch.tensor([[1.0, 10.0, 100.0]])
    assert rows.rows(torch.tensor([0, 1])).tolist() == [[1.0, 2.0, 5.0], [3.0, 4.0, 6.0]]
    assert rows.products(query).tolist() == [[521.0, 643.0]]
    score, row = rows.best(query, 5, left_out_BY=torch.tensor([[1]]))
    assert (score.tolist(), row.tolist()) == ([[521.0, -torch.inf]], [[0, -1]])


@pytest.mark.parametrize("parts", [1, 3, 7, 8, 9, 16, 23])
@pytest.mark.parametrize("turned", [False, True])
def test_products_are_those_of_decompressed_rows(parts: int, *, turned: bool) -> None:
    rows, query = codes(3000, parts, 23, num_exact=100 * (parts % 2)), queries(5, 23)
    if turned:
        rows = replace(rows, turn_DD=balanced_turn(queries(50, 23), parts))
    plain = query.double() @ rows.rows(torch.arange(3000)).double().T
    torch.testing.assert_close(rows.products(query).double(), plain, rtol=1e-5, atol=1e-5)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    num_rows=st.sampled_from([1, 5, 300, 1024, 1025, 5000]),
    parts=st.sampled_from([1, 2, 8, 11]),
    k=st.sampled_from([1, 2, 100, 700, 6000]),
    left=st.integers(0, 40),
    num_exact=st.sampled_from([0, 1, 40]),
    seed=st.integers(0, 10**6),
)
def test_the_best_are_a_sort_of_the_decompressed_rows_and_ties_go_to_the_lower_row(
    num_rows: int, parts: int, k: int, left: int, num_exact: int, seed: int
) -> None:
    rows = codes(num_rows, parts, 11, whole=True, num_exact=num_exact, seed=seed)
    query = queries(3, 11, whole=True, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    left_out_BY = torch.randint(-1, num_rows, (3, left), generator=generator)
    left_out_R = torch.rand(num_rows, generator=generator) < 0.3 if seed % 2 else None
    plain = query @ rows.rows(torch.arange(num_rows)).T
    for row in range(3):
        plain[row, left_out_BY[row][left_out_BY[row] >= 0]] = -torch.inf
    if left_out_R is not None:
        plain[:, left_out_R] = -torch.inf
    score, row = rows.best(query, k, left_out_BY=left_out_BY, left_out_R=left_out_R)
    expected, place = top_k(plain, k)
    assert torch.equal(score, expected)
    assert torch.equal(row, place.where(expected > -torch.inf, -1))


def test_some_rows_are_stored_as_they_are_by_hand() -> None:
    rows = codes(5, 2, 3, whole=True)
    kept = replace(
        rows, exact_L=torch.tensor([1, 4]), exact_LD=torch.tensor([[9.0] * 3, [7.0] * 3])
    )
    plain = rows.rows(torch.arange(5)).tolist()
    assert kept.rows(torch.arange(5)).tolist() == [plain[0], [9.0] * 3, *plain[2:4], [7.0] * 3]
    taken = kept.take(torch.tensor([4, 0]))
    assert taken.rows(torch.tensor([0, 1])).tolist() == [[7.0] * 3, plain[0]]
    assert rows.take(torch.tensor([0, 2])).rows(torch.tensor(1)).tolist() == plain[2]
    assert kept.take(torch.tensor([2])).rows(torch.tensor([0])).tolist() == [plain[2]]


def test_rising_scores_and_several_threads_find_the_same() -> None:
    rows = codes(20_000, 8, 8)
    order = rows.rows(torch.arange(20_000)).sum(dim=1).argsort()
    rising = rows.take(order)  # each row is better than all before it
    query, threads = torch.ones(7, 8), torch.get_num_threads()
    score, row = rising.best(query, 50, left_out_BY=nothing(7))
    assert (row == torch.arange(19_999, 19_949, -1)).float().mean() > 0.9  # near ties may swap
    try:
        torch.set_num_threads(3)
        again = rising.best(query, 50, left_out_BY=nothing(7))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(score, again[0])
    assert torch.equal(row, again[1])


@pytest.mark.parametrize("num_exact", [0, 30])
def test_an_index_of_codes_answers_as_the_exact_one_of_the_decompressed_vectors(
    num_exact: int, tmp_path: Path
) -> None:
    rows = codes(3000, 8, 16, whole=True, num_exact=num_exact)
    query = queries(6, 16, whole=True)
    known = torch.rand(3000, generator=torch.Generator().manual_seed(0)) < 0.7
    index = build_index(rows, known_I=known)
    exact = build_index(rows, kind="exact", known_I=known)
    assert index.facts.kind == "codes"
    assert index.facts.recall_at_100 == 1.0
    exclude = torch.randint(-1, 3000, (6, 50), generator=torch.Generator().manual_seed(1))
    index.save(tmp_path)
    for allow in (None, torch.arange(3000) % 3 == 0):
        expected = exact.search(query, 40, exclude_BX=exclude, allow_I=allow)
        for one in (index, load_index(tmp_path)):
            found = one.search(query, 40, exclude_BX=exclude, allow_I=allow)
            assert torch.equal(found.item_BK, expected.item_BK)
            assert torch.equal(found.score_BK, expected.score_BK)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size < int(known.sum()) * (8 + 8) + num_exact * 72 + 8 * CODES * 2 * 4 + 2000


def test_vectors_may_be_coded_for_an_index_and_its_facts_say_how_good_that_is() -> None:
    centre = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    vectors = centre.repeat(50, 1) + 0.05 * torch.randn(2000, 16)
    index = build_index(vectors, kind="codes", known_I=torch.ones(2000).bool())
    assert isinstance(index, CodeIndex)
    assert index.codes.code_RM.shape == (2000, 4)
    assert 0.5 < index.facts.recall_at_100 < 1.0
    query = centre[:8]
    none = nothing(8)
    found = index.search(query, 100, exclude_BX=none).item_BK
    true = build_index(vectors, kind="exact", known_I=torch.ones(2000).bool())
    best = true.search(query, 100, exclude_BX=none).item_BK
    shared = [len(set(a) & set(b)) for a, b in zip(found.tolist(), best.tolist(), strict=True)]
    assert np.mean(shared) > 50  # by chance: 5


def test_a_turned_table_keeps_what_few_directions_carry() -> None:
    # 4 of 32 directions carry nearly all; they are spread over all axes.
    generator = torch.Generator().manual_seed(0)
    length_D = torch.tensor([1.0] * 4 + [0.05] * 28)
    turn_DD = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    row_RD = torch.randn(4000, 32, generator=generator) * length_D @ turn_DD
    lost = {}
    for turned in (False, True):
        found = train_codes(row_RD, 4, turned=turned)
        lost[turned] = float((found.rows(torch.arange(4000)) - row_RD).square().sum())
    assert lost[True] < 0.2 * lost[False]


@pytest.mark.parametrize(("width", "parts"), [(8, 3), (12, 4), (5, 5), (7, 1)])
def test_a_turn_is_orthogonal_and_deals_the_longest_directions_to_parts_of_their_own(
    width: int, parts: int
) -> None:
    row_RD = torch.randn(500, width, generator=torch.Generator().manual_seed(1))
    row_RD = row_RD * torch.arange(width, 0, -1)
    turn_DD = balanced_turn(row_RD, parts)
    torch.testing.assert_close(turn_DD @ turn_DD.T, torch.eye(width))
    length_D = (row_RD @ turn_DD.T).square().sum(dim=0)
    first = [length_D[place] for place in np.cumsum([0, *even(width, parts)[:-1]])]
    assert sorted(first) == length_D.sort().values[-parts:].tolist()


DAMAGES = {
    "code_NM": lambda code: code.short() + 200,  # beyond the codebook
    "book_MCd": lambda book: book[:, :100].contiguous(),
    "turn_DD": lambda _: torch.zeros(4, 16),
    "exact_L": lambda row: row + 300,  # beyond the rows
    "exact_LD": lambda row: row[:, :3].contiguous(),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("damage", ["shape", "missing", "nan", "order"])
def test_damaged_codes_in_a_file_are_refused(damage: str, name: str, tmp_path: Path) -> None:
    rows = replace(codes(300, 4, 16, num_exact=5), turn_DD=torch.eye(16))
    build_index(rows, known_I=torch.ones(300).bool()).save(tmp_path)
    path = tmp_path / "codes.safetensors"
    tensors = load_file(path)
    if damage == "shape":
        tensors[name] = DAMAGES[name](tensors[name])
    elif damage == "missing" and name != "turn_DD":  # which may be missing
        del tensors[name]
    elif damage == "nan" and tensors[name].is_floating_point():
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[0] = torch.nan
    else:
        tensors["exact_L"] = tensors["exact_L"].flip(0).contiguous()
    path.unlink()
    save_file(tensors, path)
    with pytest.raises(BundleError) as caught:
        load_index(tmp_path)
    assert str(tmp_path) in str(caught.value.name)
    assert damage == "missing" or "codes.safetensors" in str(caught.value.name)


def test_a_broken_codebook_cannot_be_indexed() -> None:
    rows = codes(300, 4, 16)
    rows.book_MCd[0, 0, 0] = torch.inf
    with pytest.raises(NonFiniteError):
        build_index(rows, known_I=torch.ones(300).bool())


@pytest.mark.parametrize(
    "config",
    [
        ft.MFConfig(table=CODED),
        ft.SASRecConfig(table=CODED),
        ft.HSTUConfig(table=CODED),
        ft.BERT4RecConfig(table=CODED, output_bias=False),
    ],
    ids=lambda config: config.kind,
)
def test_a_model_of_codes_is_searched_by_codes_and_answers_as_offline(
    config, tmp_path: Path
) -> None:
    trained = ft.fit(config, SPLIT, training=TRAINING, show=False)
    recommender = ft.build_recommender(trained)
    assert recommender.index is not None
    assert recommender.index.kind == "codes"
    recommender.save(tmp_path / "bundle")
    assert not list((tmp_path / "bundle").rglob("vectors.safetensors"))
    query = SPLIT.test.queries(np.arange(5))
    item_VD = torch.cat([block for _, block in trained.model.item_blocks()])
    with torch.no_grad():
        plain = trained.model.encode(query) @ item_VD.T
    known = trained.known_I
    torch.testing.assert_close(
        trained.score(query)[:, known], plain[:, known], rtol=1e-5, atol=1e-5
    )
    loaded = ft.load(tmp_path / "bundle")
    whole = ft.build_recommender(trained, index="exact")
    for user in trained.events.users.ids.head(3).to_list():
        rows = [
            {row.item_id: row.score for row in one.recommend(user, k=10).rows}
            for one in (recommender, loaded, whole)
        ]
        assert rows[0] == rows[1]
        assert rows[0] == pytest.approx(rows[2], rel=1e-5, abs=1e-5)
    item = trained.events.items.ids[0]
    near = [
        {row.item_id: row.score for row in one.similar(item, k=5).rows}
        for one in (recommender, whole)
    ]
    assert near[0] == pytest.approx(near[1], rel=1e-4, abs=1e-5)
    facts = json.loads((tmp_path / "bundle" / "index" / "index.json").read_text())
    assert facts["build"] == {"sub_spaces": 8}


@pytest.mark.parametrize(
    "config",
    [ft.LightGCNConfig(), ft.PinSageConfig(), ft.TwoTowerConfig()],
    ids=lambda config: config.kind,
)
def test_vectors_that_a_model_works_out_are_searched_as_codes(config, tmp_path: Path) -> None:
    trained = ft.fit(config, SPLIT, training=TRAINING, show=False)
    recommender = ft.build_recommender(trained, index="codes")
    recommender.save(tmp_path / "bundle")
    loaded = ft.load(tmp_path / "bundle")
    index = loaded.index
    assert isinstance(index, CodeIndex)
    query = SPLIT.test.queries(np.arange(4))
    with torch.no_grad():
        query_BD = trained.model.encode(query).float()
        whole_ND = torch.cat([block for _, block in trained.model.item_blocks()])
    found = index.search(query_BD, 5, exclude_BX=nothing(4))
    coded_ND = torch.cat(list(index.blocks()))
    scores = torch.einsum("bd,bkd->bk", query_BD, index.vectors_at(index.positions(found.item_BK)))
    torch.testing.assert_close(found.score_BK, scores, rtol=1e-5, atol=1e-5)
    known_ND = whole_ND[trained.known_I]
    assert (coded_ND - known_ND).square().mean() < 0.1 * known_ND.var()  # few items: nearly exact
    user = trained.events.users.ids[0]
    first, second = (
        {row.item_id: row.score for row in one.recommend(user, k=5).rows}
        for one in (recommender, loaded)
    )
    assert first == second


def test_a_model_without_vectors_has_no_codes_to_search() -> None:
    trained = ft.fit(ft.EASEConfig(), SPLIT, show=False)
    with pytest.raises(ConfigError) as caught:
        ft.build_recommender(trained, index="codes")
    assert caught.value.name == "index"
