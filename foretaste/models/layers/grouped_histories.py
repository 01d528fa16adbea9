"""Histories of like length side by side, so that little work is done on padding.

Shape legend: B queries, b those of a group, A rows of items (B, or 1 where all queries have the
same), C items of each, L positions, M events laid out group by group, N those of a group, K width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from foretaste.data.batch import Queries, SequenceBatch, last_events

_GROUPS, _GROUP_ROWS = 8, 128


class Histories(NamedTuple):
    """Groups of queries whose histories are about as long."""

    order_B: Int64[Tensor, " B"]
    """The queries, group after group."""
    batches: list[SequenceBatch]
    """Each group's items."""

    def items(self) -> Int64[Tensor, " M"]:
        """Return all items, -1 under padding."""
        if not self.batches:
            return self.order_B.new_empty(0)
        return torch.cat(
            [batch.item_BL.where(batch.valid_BL, -1).flatten() for batch in self.batches]
        )

    def map(
        self,
        make: Callable[[Tensor, Tensor, Tensor], Tensor],
        event_MK: Float[Tensor, "M K"],
        item_ACK: Float[Tensor, "A C K"],
    ) -> Float[Tensor, "B _ _"]:
        """Make something of each group's events, items and validity; return it query by query.

        Args:
            make: From events (b, L, K), items (b, C, K) and validity (b, L) to a row for each.
            event_MK: What `items` stand for.
            item_ACK: The items that are judged.
        """
        sizes = [batch.item_BL.numel() for batch in self.batches]
        one = len(self.batches) == 1
        if len(item_ACK) > 1 and not one:
            item_ACK = item_ACK.index_select(0, self.order_B)
        rows, made = 0, []
        for batch, event_NK in zip(self.batches, event_MK.split(sizes), strict=True):
            event_BLK = event_NK.view(*batch.item_BL.shape, event_MK.shape[1])
            own_ACK = item_ACK if len(item_ACK) == 1 else item_ACK[rows : rows + len(batch)]
            made.append(make(event_BLK, own_ACK, batch.valid_BL))
            rows += len(batch)
        return made[0] if one else torch.cat(made).index_select(0, self.order_B.argsort())


def group_histories(queries: Queries, max_len: int) -> Histories:
    """Put queries into groups by the length of what is read of their histories."""
    length_B = queries.offsets_B1.diff().clamp(max=max_len)
    num_groups = max(1, min(_GROUPS, len(queries) // _GROUP_ROWS))
    if num_groups == 1:
        order_B = torch.arange(len(queries), device=length_B.device)
        return Histories(order_B, [last_events(queries, max_len)])
    order_B = length_B.argsort(stable=True)
    groups = [last_events(queries, max_len, rows=rows) for rows in order_B.chunk(num_groups)]
    return Histories(order_B, groups)
