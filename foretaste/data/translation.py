"""From the rows of other events to the rows of those that a model was trained on, by their ids.

Rows number what one reading found: one user more or less shifts all that follow. So what is asked
of a model in rows of other events is translated before the model reads it.

Shape legend: U users and I items of the other events; X items of these, then those that only the
model knows; M items of the model; B queries, C items of each.
"""

from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from foretaste.data.batch import FieldTable, Queries, RowBatch
from foretaste.data.interactions import Interactions
from foretaste.data.vocabulary import Vocabulary


def rows_in(own: Vocabulary, other: Vocabulary) -> Int64[np.ndarray, " N"]:
    """Return the row in `own` of each id of `other`, -1 where there is none.

    Where only one of them holds integers, texts are compared: 7 is "7" and not "07".
    """
    kind = pl.Int64 if own.is_integer and other.is_integer else pl.String
    known = pl.DataFrame({"id": own.ids.cast(kind), "row": np.arange(len(own))})
    asked = other.ids.cast(kind).alias("id").to_frame()
    found = asked.join(known, on="id", how="left", maintain_order="left")["row"]
    rows: Int64[np.ndarray, " N"] = found.fill_null(-1).to_numpy().astype(np.int64)
    return rows


@dataclass(frozen=True, eq=False, kw_only=True)
class Translation:
    """What stands in which row of a model, for other events."""

    user_U: Int64[np.ndarray, " U"]
    """The model's user_idx of each user of the other events, -1 of one that it does not know."""
    item_X: Int64[np.ndarray, " X"]
    """The model's item_idx, -1 of an item that it does not know."""
    profile: FieldTable | None = None
    """A row for each user of the other events: what their table says, for a model that reads it."""

    @staticmethod
    def of(own: Interactions, other: Interactions) -> "Translation | None":
        """Translate rows of `other` into rows of `own`; None where they are the same."""
        if own.users.same_as(other.users) and own.items.same_as(other.items):
            return None
        item_I = rows_in(own.items, other.items)
        is_other = np.ones(own.num_items, np.bool_)
        is_other[item_I[item_I >= 0]] = False
        return Translation(
            user_U=rows_in(own.users, other.users),
            item_X=np.concatenate([item_I, np.flatnonzero(is_other)]),
        )

    def queries(self, queries: Queries, *, new_users_histories: bool = False) -> Queries:
        """Return queries as the model reads them, without events of items that it does not know.

        Args:
            queries: Users and histories in rows of the other events.
            new_users_histories: Leave the histories of users out that the model knows.
        """
        user_B = self.user_U[queries.user_B.numpy()]
        item_N, offsets_B1 = self.item_X[queries.history_N.numpy()], queries.offsets_B1.numpy()
        keep_N = item_N >= 0
        if new_users_histories:
            keep_N &= np.repeat(user_B < 0, np.diff(offsets_B1))
        before_N1, times = np.concatenate([[0], np.cumsum(keep_N)]), queries.times
        return replace(
            queries,
            user_B=torch.from_numpy(user_B),
            history_N=torch.from_numpy(item_N[keep_N]),
            offsets_B1=torch.from_numpy(before_N1[offsets_B1]),
            profile=None if self.profile is None else self.profile.rows(queries.user_B),
            times=None if times is None else lambda: times()[torch.from_numpy(keep_N)],
        )

    def items(self, item_BC: Int64[Tensor, "B C"]) -> Int64[Tensor, "B C"]:
        """Return items as the model reads them, its first one in place of those unknown to it."""
        return torch.from_numpy(self.item_X)[item_BC].clamp_(min=0)

    def batch(self, batch: RowBatch, *, new_users_histories: bool = False) -> RowBatch:
        """Return labelled rows as the model reads them; the argument is that of `queries`."""
        queries = self.queries(batch.queries, new_users_histories=new_users_histories)
        return replace(batch, queries=queries, item_BC=self.items(batch.item_BC))

    def scores(self, score_BM: Float[Tensor, "B M"]) -> Float[Tensor, "B X"]:
        """Return the model's scores in the order of the other events; -inf where it has none."""
        nowhere_B1 = score_BM.new_full((len(score_BM), 1), -torch.inf)
        item_X = torch.from_numpy(self.item_X).to(score_BM.device)
        place_X = item_X.where(item_X >= 0, score_BM.shape[1])
        return torch.cat([score_BM, nowhere_B1], dim=1).index_select(1, place_X)

    def known(self, known_M: Bool[Tensor, " M"]) -> Bool[Tensor, " X"]:
        """Return which items the model ranks."""
        item_X = torch.from_numpy(self.item_X)
        return known_M[item_X.clamp(min=0)] & (item_X >= 0)

    def counts(self, count_M: Int64[np.ndarray, " M"]) -> Int64[np.ndarray, " X"]:
        """Return how many training events each item has."""
        counts: Int64[np.ndarray, " X"] = np.append(count_M, 0)[self.item_X]
        return counts
