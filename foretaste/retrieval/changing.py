"""An item index with insertions, replacements and deletions between two builds.

Changed rows are kept apart from the built index, and a search compares the query with all of them;
the built index finds the other rows. When the number of changed rows passes a bound, a thread
builds a new index from the current rows while the old one answers; changes made during the build
are kept apart from the new index.

Shape legend: B queries, M changed items, G items of the built index that were replaced or removed,
N items, D width, Q measured queries, X exclusions, I items of the catalogue, K list length.
"""

import threading
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from foretaste.arguments import checked
from foretaste.config import Seed
from foretaste.errors import DataError, NonFiniteError
from foretaste.models.base import TopK, best_first
from foretaste.retrieval.choose import exact_of, index_of, milliseconds, noisy_items
from foretaste.retrieval.index import (
    ExactIndex,
    IndexFacts,
    IndexKind,
    ItemIndex,
    check_search,
    room_for,
)

LEAST_BOUND = 1000
"""With "auto", the index is not built again for this many changed rows or fewer."""
_MEASURED_ROWS = 4096


class _Rows(NamedTuple):
    """The state that a search reads; it is replaced as a whole, so each search sees one state."""

    base: ItemIndex
    fresh: ExactIndex
    """Rows added or replaced since the index was built; it may be empty."""
    gone_G: Int64[Tensor, " G"]
    """Items of the built index that were replaced or removed since, ascending."""

    @property
    def changed(self) -> int:
        return max(len(self.fresh.item_N), len(self.gone_G))


@final
class ChangingIndex:
    """An index over the current rows, which may change. Thread-safe."""

    def __init__(
        self,
        index: ItemIndex,
        *,
        bound: int | Literal["auto"] = "auto",
        query_QD: Float[Tensor, "Q D"] | None = None,
        seed: Seed = 0,
    ) -> None:
        """Wrap an index, which is not modified.

        Args:
            index: An index that foretaste built.
            bound: The index is built again when more rows than this have changed. "auto": the
                number of rows that are compared in the time of one query to the index, measured
                at the first change.
            query_QD: Queries for tuning the search width of a new index; without it, item vectors
                with noise are used.
            seed: Seed of the new index.

        Raises:
            ConfigError: The index is of another class.
            DataError: The bound is below 1.
        """
        if bound != "auto" and bound < 1:
            raise DataError(f"bound is {bound}: set it to 1 or more", name="bound", value=bound)
        self._bound, self._query_QD, self._seed = bound, query_QD, seed
        width, size = exact_of(index).facts.embedding_dim, index.facts.catalogue_size
        none = ExactIndex(
            torch.empty(0, width), torch.empty(0, dtype=torch.int64), catalogue_size=size
        )
        self._rows = _Rows(index, none, none.item_N)
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._since_M = none.item_N
        self._failure: Exception | None = None

    def __getstate__(self) -> dict[str, object]:
        """Return the state for a copy, without waiting for a new index that is being built."""
        with self._lock:
            return {**vars(self), "_lock": None, "_thread": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())

    @property
    def kind(self) -> IndexKind:
        return self._rows.base.kind

    @property
    def facts(self) -> IndexFacts:
        """The facts of the built index, with the current number of rows."""
        return _facts(self._rows)

    @property
    def changed(self) -> int:
        """The number of changed rows since the index was built."""
        return self._rows.changed

    @checked
    def put(self, item_M: Int64[Tensor, " M"], vectors_MD: Float[Tensor, "M D"]) -> None:
        """Add or replace the vectors of some items; an item past the end extends the catalogue.

        Raises:
            DataError: An item is negative or occurs twice, or the vectors have another width.
            NonFiniteError: A vector is NaN or infinite.
            Exception: The error that ended the last build of the index.
        """
        facts = self.facts
        if (item_M < 0).any():
            raise _wrong_item(int(item_M.min()), "it is negative")
        sorted_M, order_M = item_M.sort()
        twice = sorted_M[1:][sorted_M[1:] == sorted_M[:-1]]
        if len(twice):
            raise _wrong_item(int(twice[0]), "it occurs twice")
        if vectors_MD.shape != (len(item_M), facts.embedding_dim):
            raise DataError(
                f"the vectors have shape {tuple(vectors_MD.shape)}: give {len(item_M)} rows of "
                f"width {facts.embedding_dim}",
                name="vectors",
                value=vectors_MD.shape[-1],
            )
        is_broken_M = ~vectors_MD.isfinite().all(dim=1)
        if is_broken_M.any():
            item = int(item_M[is_broken_M][0])
            raise NonFiniteError(
                f"the vector of item {item} is NaN or infinite: give only finite ones",
                name="vectors",
                value=item,
            )
        self._change(sorted_M, vectors_MD.detach().float().cpu()[order_M])

    @checked
    def remove(self, item_M: Int64[Tensor, " M"]) -> None:
        """Remove items from the index.

        Raises:
            DataError: An item is not in the index.
            Exception: The error that ended the last build of the index.
        """
        with self._lock:
            rows, item_M = self._rows, item_M.unique()
            is_there_M = _holds(rows.base, item_M) & ~torch.isin(item_M, rows.gone_G)
            is_there_M |= torch.isin(item_M, rows.fresh.item_N)
            if not is_there_M.all():
                raise _wrong_item(int(item_M[~is_there_M][0]), "it is not in the index")
            self._change(item_M, torch.empty(0, rows.fresh.vectors_ND.shape[1]))

    def _change(self, item_M: Tensor, vectors_MD: Tensor) -> None:
        """Set the vectors of some items, ascending, or remove the items if there are no vectors."""
        with self._lock:
            self._raise_failure()
            rows = self._rows
            size = max([rows.fresh.facts.catalogue_size, *(item_M[-1:] + 1).tolist()])
            fresh = _only(rows.fresh, ~torch.isin(rows.fresh.item_N, item_M), size)
            if len(vectors_MD):
                item_N = torch.cat([fresh.item_N, item_M])
                order_N = item_N.argsort()
                vectors_ND = torch.cat([fresh.vectors_ND, vectors_MD])[order_N]
                fresh = ExactIndex(vectors_ND, item_N[order_N], catalogue_size=size)
            gone_G = torch.cat([rows.gone_G, item_M[_holds(rows.base, item_M)]]).unique()
            if self._thread is not None:
                self._since_M = torch.cat([self._since_M, item_M])
            self._rows = _Rows(rows.base, fresh, gone_G)
            self._build_if_due()

    @checked
    def search(
        self,
        query_BD: Float[Tensor, "B D"],
        k: int,
        *,
        exclude_BX: Int64[Tensor, "B X"],
        allow_I: Bool[Tensor, " I"] | None = None,
    ) -> TopK:
        """Return the K best items of each query; see `ItemIndex.search`."""
        rows = self._rows
        check_search(_facts(rows), query_BD, k, allow_I)
        size = rows.base.facts.catalogue_size
        gone_BG = rows.gone_G.expand(len(query_BD), -1)
        found = rows.base.search(
            query_BD,
            k,
            exclude_BX=torch.cat([exclude_BX.where(exclude_BX < size, -1), gone_BG], dim=1),
            allow_I=None if allow_I is None else allow_I[:size],
        )
        if not len(rows.fresh.item_N):
            return found
        more = rows.fresh.search(query_BD, k, exclude_BX=exclude_BX, allow_I=allow_I)
        score_BK, item_BK = best_first(
            torch.cat([found.score_BK, more.score_BK], dim=1),
            torch.cat([found.item_BK, more.item_BK], dim=1),
        )
        return TopK(item_BK=item_BK[:, :k], score_BK=score_BK[:, :k])

    @checked
    def wait(self) -> None:
        """Wait for the index that is being built, if there is one.

        Raises:
            Exception: The error that ended the build; the old index continues to answer.
        """
        while (thread := self._building()) is not None:
            thread.join()
        with self._lock:
            self._raise_failure()

    def _building(self) -> threading.Thread | None:
        with self._lock:
            return self._thread

    @checked
    def save(self, folder: Path) -> None:
        """Build an index of the current rows, and write its files into an existing folder."""
        rows = self._rows
        (rows.base if not rows.changed else self._built(rows)).save(folder)

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _build_if_due(self) -> None:
        if self._bound == "auto":
            self._bound = self.measured_bound()
        if self._thread is None and self._rows.changed > self._bound and self.facts.num_items:
            self._since_M = self._since_M[:0]
            thread = threading.Thread(target=self._build, args=(self._rows,), daemon=True)
            thread.start()
            self._thread = thread  # only if it runs; it waits for the lock before it ends

    @checked
    def measured_bound(self) -> int:
        """Return how many rows can be compared in the time of one query to the index."""
        base = self._rows.base
        whole = exact_of(base)
        few_N = torch.arange(min(_MEASURED_ROWS, len(whole.item_N)))
        few = ExactIndex(whole.vectors_at(few_N), few_N, catalogue_size=len(few_N))
        query_QD = noisy_items(few, self._seed) if self._query_QD is None else self._query_QD
        rows = milliseconds(base, query_QD) / milliseconds(few, query_QD) * len(few_N)
        return max(LEAST_BOUND, int(rows))

    def _build(self, rows: _Rows) -> None:
        try:
            base = self._built(rows)
            with self._lock:
                now, since_M = self._rows, self._since_M.unique()
                keep_N = torch.isin(now.fresh.item_N, since_M)
                fresh = _only(now.fresh, keep_N, now.fresh.facts.catalogue_size)
                self._rows = _Rows(base, fresh, since_M[_holds(base, since_M)])
                self._thread = None
                self._build_if_due()
        except Exception as error:  # noqa: BLE001  it belongs to whoever changes rows next
            with self._lock:
                self._failure, self._thread = error, None

    def _built(self, rows: _Rows) -> ItemIndex:
        facts = rows.base.facts
        return index_of(
            _joined(rows),
            kind=facts.kind,
            seed=self._seed,
            recall_target=facts.recall_target,
            query_QD=self._query_QD,
        )


def _wrong_item(value: int, why: str) -> DataError:
    return DataError(f"item {value}: {why}", name="item", value=value)


def _facts(rows: _Rows) -> IndexFacts:
    facts, fresh = rows.base.facts, rows.fresh
    num = facts.num_items - len(rows.gone_G) + len(fresh.item_N)
    update = {"num_items": num, "catalogue_size": fresh.facts.catalogue_size}
    return facts.model_copy(update=update)


def _holds(index: ItemIndex, item_M: Tensor) -> Bool[Tensor, " M"]:
    """Return whether the built index holds each of these items."""
    inside_M = (item_M >= 0) & (item_M < index.facts.catalogue_size)
    place_M = exact_of(index).positions(item_M.where(inside_M, 0).unsqueeze(0))[0]
    return inside_M & (place_M >= 0)


def _only(index: ExactIndex, keep_N: Tensor, size: int) -> ExactIndex:
    return ExactIndex(index.vectors_ND[keep_N], index.item_N[keep_N], catalogue_size=size)


def _joined(rows: _Rows) -> ExactIndex:
    """Copy the current rows, block by block, into one table."""
    whole, fresh = exact_of(rows.base), rows.fresh
    keep_N = torch.ones(len(whole.item_N), dtype=torch.bool)
    keep_N[whole.positions(rows.gone_G.unsqueeze(0))[0]] = False
    item_N = torch.cat([whole.item_N[keep_N], fresh.item_N])
    sorted_N, order_N = item_N.sort()
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N))
    vectors_ND = room_for(len(item_N), fresh.vectors_ND.shape[1])
    start = done = 0
    for block_nD in whole.blocks():
        kept_nD = block_nD[keep_N[start : start + len(block_nD)]]
        vectors_ND[place_N[done : done + len(kept_nD)]] = kept_nD
        start, done = start + len(block_nD), done + len(kept_nD)
    vectors_ND[place_N[done:]] = fresh.vectors_ND
    return ExactIndex(vectors_ND, sorted_N, catalogue_size=fresh.facts.catalogue_size)
