"""Building the index that fits: which kind, and how wide it must search to find enough.

Shape legend: I items of the catalogue, N items in the index, Q measured queries, D width.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from foretaste.config import Seed
from foretaste.data.arrays import check_fits
from foretaste.errors import BundleError, ConfigError, DataError, NonFiniteError
from foretaste.later import later
from foretaste.retrieval.faiss_index import FAISS_FILE, FaissIndex, build_hnsw, build_ivf
from foretaste.retrieval.index import (
    ExactIndex,
    IndexChoice,
    IndexFacts,
    IndexKind,
    ItemIndex,
    load_vectors,
)

faiss = later("faiss")

EXACT_BELOW = 200_000
"""Items up to which "auto" compares everything: about 10 ms a query on one core."""
RECALL_AT = 100
MEASURED_QUERIES = 256


def build_index(
    vectors: Float[Tensor, "I D"] | Iterable[tuple[int, Float[Tensor, "_ D"]]],
    *,
    kind: IndexChoice = "auto",
    known_I: Bool[Tensor, " I"],
    seed: Seed = 0,
    recall_target: float = 0.95,
    query_QD: Float[Tensor, "Q D"] | None = None,
    exact_below: int = EXACT_BELOW,
) -> ItemIndex:
    """Index the items that training knew.

    An approximate index searches as narrowly as recall@100 against the exact one allows. Recall
    is measured on `query_QD`, or without it on known items' vectors with noise of half their
    standard deviation; the facts say which, and what was reached.

    Args:
        vectors: Every item's vector, in one piece or in blocks with the number of the first item.
        kind: "auto" is exact below `exact_below` known items and "ivf_flat" from there on.
        known_I: The items to index; the others are never answered.
        seed: Decides IVF's sample and centroids, and the measured queries.
        recall_target: In (0, 1].
        query_QD: Vectors of real queries; some hundreds are enough.
        exact_below: See `kind`.

    Raises:
        DataError: No item is known, or `recall_target` is out of range.
        NonFiniteError: A known item's vector is NaN or infinite.
        TooLargeError: The index would not fit in memory.
    """
    if not 0 < recall_target <= 1:
        raise DataError(
            f"recall_target is {recall_target}, not in (0, 1]",
            name="recall_target",
            value=recall_target,
        )
    exact = _exact([(0, vectors)] if isinstance(vectors, Tensor) else vectors, known_I)
    kind = choose_kind(kind, num_items=exact.facts.num_items, exact_below=exact_below)
    if kind == "exact":
        return exact
    num, width = exact.facts.num_items, exact.facts.embedding_dim
    check_fits(
        num * (8 * width + 512),  # a copy for FAISS and its own, and HNSW's edges
        f"an index of {num:,} items, {width:,} wide,",
        'take kind "exact", or train a model of fewer dimensions',
        name="index",
        value=kind,
    )
    if query_QD is None or len(query_QD) == 0:
        origin, query_QD = "item vectors with noise", _noisy_items(exact, seed)
    else:
        origin, query_QD = "the model's queries", query_QD[:MEASURED_QUERIES]
    aim = {"recall_target": recall_target, "recall_queries": f"{len(query_QD)} {origin}"}
    if kind != "hnsw":
        return _tuned(build_ivf(exact, kind=kind, seed=seed), query_QD, aim)
    plain = _tuned(build_hnsw(exact, levelled=False), query_QD, aim)
    if plain.facts.recall_at_100 >= recall_target:
        return plain
    levelled = _tuned(build_hnsw(exact, levelled=True), query_QD, aim)
    return max(plain, levelled, key=lambda index: index.facts.recall_at_100)


def choose_kind(kind: IndexChoice, *, num_items: int, exact_below: int = EXACT_BELOW) -> IndexKind:
    """Return what "auto" stands for with so many known items; other kinds as they are."""
    if kind != "auto":
        return kind
    return "exact" if num_items < exact_below else "ivf_flat"


def exact_of(index: ItemIndex) -> ExactIndex:
    """Return the exact index over the same items, which every index carries.

    Raises:
        ConfigError: The index is of a foreign kind.
    """
    match index:
        case ExactIndex():
            return index
        case FaissIndex():
            return index.exact
        case _:
            raise ConfigError(
                f"{type(index).__name__} carries no exact index",
                name="index",
                value=type(index).__name__,
            )


def _exact(blocks: Iterable[tuple[int, Tensor]], known_I: Tensor) -> ExactIndex:
    item_N = known_I.nonzero().flatten()
    if len(item_N) == 0:
        raise DataError("no item has a training event: there is nothing to index")
    parts = []
    for first, block_VD in blocks:
        known_V = known_I[first : first + len(block_VD)].to(block_VD.device)
        parts.append((block_VD if known_V.all() else block_VD[known_V]).detach().cpu())
    vectors_ND = parts[0] if len(parts) == 1 else torch.cat(parts)
    if not vectors_ND.isfinite().all():
        raise NonFiniteError("an item's vector is NaN or infinite: train the model anew")
    return ExactIndex(vectors_ND, item_N, catalogue_size=len(known_I))


def _noisy_items(exact: ExactIndex, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    row_Q = torch.randint(exact.facts.num_items, (MEASURED_QUERIES,), generator=generator)
    vectors_QD = exact.vectors_ND[row_Q].float()
    noise_QD = torch.randn(vectors_QD.shape, generator=generator)
    return vectors_QD + 0.5 * noise_QD * vectors_QD.std(dim=0, correction=0)


def _recall(true_QK: Tensor, found_QK: Tensor) -> Float[Tensor, " Q"]:
    """Return for each query the share of its true best that were found."""
    pairs = zip(true_QK, found_QK, strict=True)
    return torch.stack([torch.isin(true, found).float().mean() for true, found in pairs])


def _tuned(index: FaissIndex, query_QD: Tensor, aim: Mapping[str, object]) -> FaissIndex:
    """Double the width until both halves of the queries reach the target, then halve the gap."""
    index = index.with_facts(index.facts.model_copy(update=aim))
    k = min(RECALL_AT, index.facts.num_items)
    none = torch.full((len(query_QD), 0), -1)
    true_QK = index.exact.search(query_QD, k, exclude_BX=none).item_BK

    def at(width: int) -> tuple[float, float]:
        wider = index.with_facts(index.facts.model_copy(update={"search_width": width}))
        found_Q = _recall(true_QK, wider.candidates(query_QD, k))
        worse = min(float(half.mean()) for half in found_Q.chunk(2))
        return worse, float(found_Q.mean())

    target = index.facts.recall_target
    width = min(index.facts.search_width, index.widest)  # it is built at its narrowest
    low = width - 1
    while (reached := at(width))[0] < target and width < index.widest:
        low, width = width, min(2 * width, index.widest)
    while reached[0] >= target and width - low > max(1, width // 8):
        middle = (low + width) // 2
        if (narrower := at(middle))[0] >= target:
            width, reached = middle, narrower
        else:
            low = middle
    update = {"search_width": width, "recall_at_100": reached[1]}
    return index.with_facts(index.facts.model_copy(update=update))


def load_index(folder: Path) -> ItemIndex:
    """Read an index that `save` wrote; vectors and IVF's lists are memory-mapped.

    Raises:
        BundleError: A file is missing or broken.
    """
    try:
        facts = IndexFacts.model_validate_json((folder / "index.json").read_bytes())
        exact = load_vectors(folder, facts)
        if facts.kind == "exact":
            return exact
        flags = 0 if facts.kind == "hnsw" else faiss.IO_FLAG_MMAP
        return FaissIndex(faiss.read_index(str(folder / FAISS_FILE), flags), exact, facts)
    except (OSError, KeyError, ValidationError, SafetensorError, RuntimeError) as error:
        raise BundleError(
            f"{folder}: the index cannot be read: {error}: build it anew", name=str(folder)
        ) from error
