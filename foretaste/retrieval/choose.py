"""Building an index: the choice of its kind, its build, and tuning of the search width for a target
recall.

Shape legend: I items of the catalogue, N items in the index, Q measured queries, D width.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from foretaste.config import Seed
from foretaste.data.arrays import check_fits
from foretaste.errors import BundleError, ConfigError, DataError, NonFiniteError
from foretaste.later import later
from foretaste.models.layers.codes import Codes, train_codes
from foretaste.retrieval.faiss_index import (
    BLOCK_ROWS,
    NARROWEST,
    FaissIndex,
    load_faiss,
)
from foretaste.retrieval.index import (
    CodeIndex,
    ExactIndex,
    IndexChoice,
    IndexFacts,
    IndexKind,
    ItemIndex,
    WholeIndex,
    load_codes,
    load_vectors,
    room_for,
)

if TYPE_CHECKING:
    import faiss
else:
    faiss = later("faiss")

EXACT_MS = 1.0
""""auto" chooses the exact index if it answers one query within this many milliseconds."""
ALWAYS_EXACT = 10_000
""""auto" chooses the exact index without measuring for up to this many items."""
EXACT_BELOW = 200_000
"""`kind_by_size` chooses the exact index for up to this many known items."""
RECALL_AT = 100
NUMBERS_OF_A_CODE = 4
"""Dimensions per byte, if vectors are coded for the index."""
MEASURED_QUERIES = 256


def build_index(
    vectors: Float[Tensor, "I D"] | Iterable[tuple[int, Float[Tensor, "_ D"]]] | Codes,
    *,
    kind: IndexChoice = "auto",
    known_I: Bool[Tensor, " I"],
    seed: Seed = 0,
    recall_target: float = 0.95,
    query_QD: Float[Tensor, "Q D"] | None = None,
    exact_ms: float = EXACT_MS,
) -> ItemIndex:
    """Build an index of the known items.

    The search width of an approximate index is the smallest that reaches the target recall@100
    against the exact index. Recall is measured on `query_QD` or, without it, on vectors of known
    items with noise of half their standard deviation; the facts of the index record which queries
    were used, and the recall.

    Args:
        vectors: The vectors of all items: one tensor, blocks with the number of their first item,
            or codes.
        kind: The kind of index. "auto": exact if the exact index answers one query within
            `exact_ms`, measured on these vectors; else "ivf_sq8" if it reaches the target recall
            and is faster; "codes" if `vectors` are codes. With "codes", vectors are quantised to
            one byte for every four dimensions, and the facts record the recall of the codes.
        known_I: The items to index; other items are never returned.
        seed: Determines IVF's sample and centroids, and the measured queries.
        recall_target: The target for recall@100, in (0, 1].
        query_QD: Vectors of real queries; a few hundred are enough.
        exact_ms: See `kind`.

    Raises:
        DataError: No item is known, or `recall_target` is out of range.
        NonFiniteError: A known item's vector is NaN or infinite.
        TooLargeError: The index would not fit in memory.
    """
    _check_target(recall_target)
    if isinstance(vectors, Codes) and kind in ("auto", "codes"):
        return _of_codes(vectors, known_I)
    blocks = vectors.blocks() if isinstance(vectors, Codes) else vectors
    exact = _exact([(0, blocks)] if isinstance(blocks, Tensor) else blocks, known_I)
    return index_of(
        exact,
        kind=kind,
        seed=seed,
        recall_target=recall_target,
        query_QD=query_QD,
        exact_ms=exact_ms,
    )


def index_of(
    exact: ExactIndex,
    *,
    kind: IndexChoice,
    seed: Seed,
    recall_target: float,
    query_QD: Float[Tensor, "Q D"] | None,
    exact_ms: float = EXACT_MS,
) -> ItemIndex:
    """Build an index that shares the vectors of an exact one; see `build_index`."""
    num = exact.facts.num_items
    if kind == "exact" or not may_be_approximate(kind, num_items=num):
        return exact
    if query_QD is None or len(query_QD) == 0:
        origin, query_QD = "item vectors with noise", noisy_items(exact, seed)
    else:
        origin, query_QD = "the model's queries", query_QD[:MEASURED_QUERIES]
    exact_took = milliseconds(exact, query_QD) if kind == "auto" else 0.0
    if kind == "auto" and exact_took <= exact_ms:
        return exact
    check_fits(
        num * bytes_of_item("ivf_sq8" if kind == "auto" else kind, exact.facts.embedding_dim),
        f"an index of {num:,} items, {exact.facts.embedding_dim:,} wide,",
        'take kind "exact", or train a model of fewer dimensions',
        name="index",
        value=kind,
    )
    aim = {"recall_target": recall_target, "recall_queries": f"{len(query_QD)} {origin}"}
    match kind:
        case "codes":
            return _coded(exact, query_QD, aim)
        case "hnsw":
            return _hnsw(exact, query_QD, aim)
        case "auto":
            lists = build_ivf(exact, kind="ivf_sq8", seed=seed)
            lists = _tuned(lists, query_QD, aim, most_ms=exact_took)
            is_good = lists.facts.recall_at_100 >= recall_target
            return lists if is_good and milliseconds(lists, query_QD) < exact_took else exact
        case _:
            return _tuned(build_ivf(exact, kind=kind, seed=seed), query_QD, aim)


TIMED_QUERIES, TIMES = 16, 3


def milliseconds(
    index: ItemIndex,
    query_QD: Float[Tensor, "Q D"],
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the time of a top-100 search: the mean over some queries of the fastest of several
    runs.
    """
    none_10, best = torch.full((1, 0), -1), []
    for query_1D in query_QD[:TIMED_QUERIES].split(1):
        took = []
        for _ in range(TIMES):
            started = clock()
            index.search(query_1D, RECALL_AT, exclude_BX=none_10)
            took.append(clock() - started)
        best.append(min(took))
    return 1e3 * sum(best) / len(best)


def may_be_approximate(kind: IndexChoice, *, num_items: int) -> bool:
    """Return whether an index of this kind needs queries to measure its recall."""
    return kind != "exact" and (kind != "auto" or num_items > ALWAYS_EXACT)


def kind_by_size(num_items: int) -> Literal["exact", "ivf_sq8"]:
    """Return a kind of index by the number of items, so that runs do not depend on timing."""
    return "exact" if num_items < EXACT_BELOW else "ivf_sq8"


def _hnsw(exact: ExactIndex, query_QD: Tensor, aim: Mapping[str, object]) -> FaissIndex:
    plain = _tuned(build_hnsw(exact, levelled=False), query_QD, aim)
    if plain.facts.recall_at_100 >= plain.facts.recall_target:
        return plain
    levelled = _tuned(build_hnsw(exact, levelled=True), query_QD, aim)
    return max(plain, levelled, key=lambda index: index.facts.recall_at_100)


def _check_target(recall_target: float) -> None:
    if not 0 < recall_target <= 1:
        raise DataError(
            f"recall_target is {recall_target}, not in (0, 1]",
            name="recall_target",
            value=recall_target,
        )


def exact_of(index: ItemIndex) -> WholeIndex:
    """Return the exact index over the same items, which every index carries.

    Raises:
        ConfigError: The index is of another class.
    """
    match index:
        case WholeIndex():
            return index
        case FaissIndex():
            return index.exact
        case _:
            raise ConfigError(
                f"{type(index).__name__} carries no exact index",
                name="index",
                value=type(index).__name__,
            )


def _of_codes(codes: Codes, known_I: Tensor) -> CodeIndex:
    item_N = _known_items(known_I)
    if not codes.book_MCd.isfinite().all():
        raise _not_finite()
    known = codes if len(item_N) == len(codes) else codes.take(item_N)
    facts = IndexFacts(
        kind="codes",
        num_items=len(item_N),
        catalogue_size=len(known_I),
        embedding_dim=codes.width,
        build={"sub_spaces": codes.code_RM.shape[1]},
    )
    return CodeIndex(known, item_N, facts)


def _coded(exact: ExactIndex, query_QD: Tensor, aim: Mapping[str, object]) -> CodeIndex:
    """Quantise vectors, and measure the recall of the codes."""
    width = exact.facts.embedding_dim
    codes = train_codes(exact.vectors_ND.float(), max(1, width // NUMBERS_OF_A_CODE))
    facts = exact.facts.model_copy(
        update={**aim, "kind": "codes", "build": {"sub_spaces": codes.code_RM.shape[1]}}
    )
    index = CodeIndex(codes, exact.item_N, facts)
    k, none = min(RECALL_AT, facts.num_items), torch.full((len(query_QD), 0), -1)
    true, found = (one.search(query_QD, k, exclude_BX=none).item_BK for one in (exact, index))
    reached = float(_recall(true, found).mean())
    return CodeIndex(codes, exact.item_N, facts.model_copy(update={"recall_at_100": reached}))


def _known_items(known_I: Tensor) -> Tensor:
    item_N = known_I.nonzero().flatten()
    if len(item_N) == 0:
        raise DataError("no item has a training event: there is nothing to index")
    return item_N


def _exact(blocks: Iterable[tuple[int, Tensor]], known_I: Tensor) -> ExactIndex:
    """Copy the vectors of known items, block by block; a single block of known items is not
    copied.
    """
    item_N = _known_items(known_I)
    vectors_ND, filled = torch.empty(0, 0), 0
    for first, block_VD in blocks:
        known_V = known_I[first : first + len(block_VD)].to(block_VD.device)
        part_VD = (block_VD if known_V.all() else block_VD[known_V]).detach().cpu()
        if not part_VD.isfinite().all():
            raise _not_finite()
        if len(part_VD) == len(item_N):
            vectors_ND = part_VD
            break
        if not vectors_ND.numel():
            vectors_ND = room_for(len(item_N), part_VD.shape[1], part_VD.dtype)
        vectors_ND[filled : filled + len(part_VD)] = part_VD
        filled += len(part_VD)
    return ExactIndex(vectors_ND, item_N, catalogue_size=len(known_I))


def _not_finite() -> NonFiniteError:
    return NonFiniteError("an item's vector is NaN or infinite: train the model again")


def noisy_items(exact: ExactIndex, seed: int) -> Float[Tensor, "Q D"]:
    """Return vectors of known items with noise, as a substitute for queries."""
    generator = torch.Generator().manual_seed(seed)
    row_Q = torch.randint(exact.facts.num_items, (MEASURED_QUERIES,), generator=generator)
    vectors_QD = exact.vectors_ND[row_Q].float()
    noise_QD = torch.randn(vectors_QD.shape, generator=generator)
    return vectors_QD + 0.5 * noise_QD * vectors_QD.std(dim=0, correction=0)


def _recall(true_QK: Tensor, found_QK: Tensor) -> Float[Tensor, " Q"]:
    """Return the share of true best items that were found, for each query."""
    pairs = zip(true_QK, found_QK, strict=True)
    return torch.stack([torch.isin(true, found).float().mean() for true, found in pairs])


def _tuned(
    index: FaissIndex, query_QD: Tensor, aim: Mapping[str, object], *, most_ms: float = math.inf
) -> FaissIndex:
    """Find the search width: double it until both halves of the queries reach the target, then
    bisect. A width at which a search takes `most_ms` is not doubled.
    """
    index = index.with_facts(index.facts.model_copy(update=aim))
    k = min(RECALL_AT, index.facts.num_items)
    none = torch.full((len(query_QD), 0), -1)
    true_QK = index.exact.search(query_QD, k, exclude_BX=none).item_BK

    def of(width: int) -> FaissIndex:
        return index.with_facts(index.facts.model_copy(update={"search_width": width}))

    def at(width: int) -> tuple[float, float]:
        found_Q = _recall(true_QK, of(width).candidates(query_QD, k))
        worse = min(float(half.mean()) for half in found_Q.chunk(2))
        return worse, float(found_Q.mean())

    def may_widen(width: int) -> bool:
        is_fast = math.isinf(most_ms) or milliseconds(of(width), query_QD) < most_ms
        return width < index.widest and is_fast

    target = index.facts.recall_target
    width = min(index.facts.search_width, index.widest)  # it is built with the smallest width
    low = width - 1
    while (reached := at(width))[0] < target and may_widen(width):
        low, width = width, min(2 * width, index.widest)
    while reached[0] >= target and width - low > max(1, width // 8):
        middle = (low + width) // 2
        if (narrower := at(middle))[0] >= target:
            width, reached = middle, narrower
        else:
            low = middle
    update = {"search_width": width, "recall_at_100": reached[1]}
    return index.with_facts(index.facts.model_copy(update=update))


def load_index(folder: Path, *, is_verified: bool = False) -> ItemIndex:
    """Read an index that `save` wrote; vectors and IVF lists are memory-mapped.

    Args:
        folder: The folder of the index.
        is_verified: Whether the caller has verified the checksums of the files.

    Raises:
        BundleError: A file is missing, damaged or older than the vectors.
    """
    try:
        facts = IndexFacts.model_validate_json((folder / "index.json").read_bytes())
        if facts.kind == "codes":
            return load_codes(folder, facts)
        exact = load_vectors(folder, facts)
        if facts.kind == "exact":
            return exact
        return load_faiss(folder, exact, facts, is_verified=is_verified)
    except (OSError, KeyError, ValidationError, SafetensorError, RuntimeError) as error:
        raise BundleError(
            f"{folder}: the index cannot be read: {error}: build it again", name=str(folder)
        ) from error


SAMPLE = 2**16
"""Number of vectors in the sample for the value range of HNSW's bytes."""
NEIGHBOURS = 32
"""Number of edges of a node (M in the paper)."""
BUILD_WIDTH = 80
"""Number of candidates while a node is inserted (efConstruction)."""


def build_hnsw(exact: ExactIndex, *, levelled: bool) -> FaissIndex:
    """Build an HNSW index: a navigable small-world graph of near items, with greedy search.

    It is fast for single queries and slow to build, and items cannot be deleted from it. On some
    vectors it may miss the target recall; the facts record the recall that it reached. Items are
    inserted in their order.

    Args:
        exact: The exact index of the items.
        levelled: False searches the graph by inner product, which suits spread vectors. True
            adds a coordinate that gives all vectors the same norm and searches by distance,
            which gives the same order; clusters stay connected that way.

    References:
        Malkov and Yashunin, "Efficient and Robust Approximate Nearest Neighbor Search Using
        Hierarchical Navigable Small World Graphs", TPAMI 2020,
        https://arxiv.org/abs/1603.09320
        Bachrach et al., "Speeding Up the Xbox Recommender System Using a Euclidean
        Transformation for Inner-Product Spaces", RecSys 2014.
    """
    width, metric, square = exact.facts.embedding_dim, faiss.METRIC_INNER_PRODUCT, None
    if levelled:
        width, metric = width + 1, faiss.METRIC_L2
        square = max(float((block_nD**2).sum(dim=1).max()) for block_nD in exact.blocks())
    graph = faiss.IndexHNSWSQ(width, faiss.ScalarQuantizer.QT_8bit, NEIGHBOURS, metric)
    graph.hnsw.efConstruction = BUILD_WIDTH
    graph.train(_wide(exact.vectors_ND.float()[_sample(exact, SAMPLE, seed=0)], width, square))
    for block_nD in exact.vectors_ND.split(BLOCK_ROWS):
        graph.add(_wide(block_nD.float(), width, square))
    build = {"neighbours": NEIGHBOURS, "build_width": BUILD_WIDTH, "levelled": int(levelled)}
    facts = exact.facts.model_copy(
        update={"kind": "hnsw", "search_width": NARROWEST, "build": build}
    )
    return FaissIndex(graph, exact, facts)


def _wide(
    vectors_ND: Float[Tensor, "N D"], width: int, square: float | None = None
) -> Float32[np.ndarray, "N W"]:
    """Pad vectors with zeros; if a norm is given, the last column gives all vectors that norm."""
    wide_ND = np.zeros((len(vectors_ND), width), np.float32)
    wide_ND[:, : vectors_ND.shape[1]] = vectors_ND.numpy()
    if square is not None:
        wide_ND[:, -1] = np.sqrt(np.maximum(square - (wide_ND**2).sum(axis=1), 0.0))
    return wide_ND


def _sample(exact: ExactIndex, num: int, *, seed: int) -> Int64[Tensor, " S"]:
    some = np.random.default_rng(seed).permutation(len(exact.item_N))[:num]
    return torch.from_numpy(np.sort(some))


POINTS_PER_LIST = 64
"""Maximum number of training vectors per centroid."""
VALUES_OF_A_CODE = 2
"""Dimensions per byte of "ivf_pq"."""


def bytes_of_item(kind: IndexKind, width: int) -> int:
    """Return the memory of one item while its index is built, besides its vector.

    A list doubles its room when it is full, so it may take twice the bytes of what it holds.
    """
    match kind:
        case "ivf_flat":
            return 2 * (4 * width + 8)
        case "ivf_sq8":
            return 2 * (width + 8)
        case "ivf_pq":
            return 2 * (-(-width // VALUES_OF_A_CODE) + 8)
        case _:  # the codes, and the edges of HNSW
            return 2 * width + 512


def build_ivf(
    exact: ExactIndex, *, kind: Literal["ivf_flat", "ivf_sq8", "ivf_pq"], seed: int
) -> FaissIndex:
    """Build an inverted file (IVF): items are in lists by centroid, and a query visits the nearest
    lists.

    There are about 2 √N lists, with centroids trained on a sample of the items. The lists of
    "ivf_sq8" hold one byte per dimension, those of "ivf_pq" one byte per two dimensions; the
    candidates found are ranked again by the full vectors, which stay on disk. "ivf_flat" stores the
    full vectors twice.

    References:
        Jégou et al., "Product Quantization for Nearest Neighbor Search", TPAMI 2011, section IV;
        Douze et al., "The Faiss library", 2024, https://arxiv.org/abs/2401.08281
    """
    num_items, width = exact.facts.num_items, exact.facts.embedding_dim
    num_lists = max(1, min(int(2 * num_items**0.5), num_items // 39))
    metric = faiss.METRIC_INNER_PRODUCT
    if kind == "ivf_pq":
        width += -width % VALUES_OF_A_CODE
    centroids = faiss.IndexFlatIP(width)
    lists: faiss.IndexIVF
    match kind:
        case "ivf_flat":
            lists = faiss.IndexIVFFlat(centroids, width, num_lists, metric)
        case "ivf_sq8":
            byte = faiss.ScalarQuantizer.QT_8bit
            lists = faiss.IndexIVFScalarQuantizer(centroids, width, num_lists, byte, metric)
        case "ivf_pq":
            codes, bits = width // VALUES_OF_A_CODE, min(8, num_items.bit_length() - 1)
            lists = faiss.IndexIVFPQ(centroids, width, num_lists, codes, max(1, bits), metric)
            lists.pq.cp.seed, lists.pq.cp.min_points_per_centroid = seed % 2**31, 1
    lists.cp.seed = seed % 2**31
    lists.cp.min_points_per_centroid = 1
    sample = _sample(exact, num_lists * POINTS_PER_LIST, seed=seed)
    sample = sample.repeat(2) if len(sample) == 1 else sample  # a code has at least two dimensions
    lists.train(_wide(exact.vectors_ND[sample].float(), width))
    for block_nD in exact.vectors_ND.split(BLOCK_ROWS):
        lists.add(_wide(block_nD.float(), width))
    facts = exact.facts.model_copy(
        update={"kind": kind, "search_width": 1, "build": {"num_lists": num_lists}}
    )
    return FaissIndex(lists, exact, facts)
