"""Users and items as a trained graph answers for them, also those that it does not have.

A new node takes part with its own degree, and layer 0 of it is 0. What its neighbours send at
each layer is known, since they were there in training, so its vector is one sum of rows.
**Approximate** is that its neighbours, too, would have changed a little: their degrees by its tie,
and their own layers by what it sends back.

Shape legend: B queries, U users, I items, V nodes, D width of layer 0, W width of what is sent,
F width of the answer, N events, P distinct ones.
"""

from collections.abc import Callable
from itertools import chain
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from foretaste.data.batch import Queries
from foretaste.models.layers.table import Table

Combine = Callable[[Tensor, Tensor], Tensor]
"""From layer 0 (B, D) and what neighbours send at each layer (B, W) to the answer (B, F)."""


class NodeTables(NamedTuple):
    """What a trained graph knows."""

    user_UF: Float[Tensor, "U F"]
    item_IF: Float[Tensor, "I F"]
    sent_VW: Float[Tensor, "V W"]
    """What each node sends along a tie of weight 1; 0 from isolated ones."""
    received_UW: Float[Tensor, "U W"]
    """Sum of what each user is sent, not yet divided by the root of the degree."""
    strength_U: Float[Tensor, " U"]
    """Degree of each user: the sum of the weights of its ties."""
    events_U: Int64[Tensor, " U"]
    """How many different items each user has in training."""
    tied_I: Bool[Tensor, " I"]
    """Items that have any tie."""
    placed_I: Bool[Tensor, " I"]
    """Items that have ties, but none to a user."""


@final
class PlacedNodes(nn.Module):
    """Keeps the tables as buffers, empty until `keep`, and answers from them."""

    def __init__(self) -> None:
        super().__init__()
        kinds = {"events_U": torch.int64, "tied_I": torch.bool, "placed_I": torch.bool}
        for name in NodeTables._fields:
            shape = (0,) if name in (*kinds, "strength_U") else (0, 0)
            self.register_buffer(name, torch.empty(shape, dtype=kinds.get(name, torch.float32)))
        self.register_load_state_dict_pre_hook(take_shapes)  # type: ignore[no-untyped-call]  # torch

    def keep(self, tables: NodeTables) -> None:
        """Take tables for good: they are saved with the model."""
        for name, table in tables._asdict().items():
            setattr(self, name, table.detach().clone())

    def tables(self) -> NodeTables:
        """Return what was kept."""
        return NodeTables(*(self.get_buffer(name) for name in NodeTables._fields))


def take_shapes(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Give a module's own tensors the shapes of those that it is about to be loaded with.

    For `register_load_state_dict_pre_hook`: sizes that only the training's graph decides.
    """
    own = (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    for name, tensor in chain(*own):
        loaded = state.get(prefix + name)
        if loaded is not None and loaded.shape != tensor.shape:
            tensor.data = tensor.new_empty(loaded.shape)


def answer_users(
    queries: Queries, tables: NodeTables, users: Table, combine: Combine
) -> Float[Tensor, "B F"]:
    """Return a vector for each query.

    A user of training with the training history has their row of the table. With further items,
    these are added to the user's neighbours. Anybody else, and a user of training of whom less
    is told than training saw, is placed by the items told. Who has none gets 0.
    """
    row_P, item_P, place_P = _distinct(queries, tables.tied_I)
    user_B, length_B = queries.user_B, torch.bincount(row_P, minlength=len(queries))
    trained_B = torch.zeros_like(length_B)
    trained_B[user_B >= 0] = tables.events_U[user_B[user_B >= 0]]
    known_R = ((user_B >= 0) & (length_B >= trained_B)).nonzero().squeeze(1)
    user_R = user_B[known_R]
    is_known_B = torch.zeros_like(user_B, dtype=torch.bool).index_fill_(0, known_R, 1)
    is_new_P = ~is_known_B[row_P] | (place_P >= trained_B[row_P])
    row_P, node_P = row_P[is_new_P], len(tables.user_UF) + item_P[is_new_P]
    new_B = torch.bincount(row_P, minlength=len(queries))
    received_BW = sum_of_rows(tables.sent_VW, node_P, new_B)
    strength_B = new_B.to(received_BW.dtype)
    layer_0_BD = received_BW.new_zeros(len(queries), users.width)
    received_BW.index_add_(0, known_R, tables.received_UW[user_R])
    strength_B.index_add_(0, known_R, tables.strength_U[user_R])
    layer_0_BD.index_copy_(0, known_R, users(user_R))
    answer_BF = place(layer_0_BD, received_BW, strength_B, combine)
    same_R = new_B[known_R] == 0
    return answer_BF.index_copy_(0, known_R[same_R], tables.user_UF[user_R[same_R]])


def place(
    layer_0_BD: Float[Tensor, "B D"],
    received_BW: Float[Tensor, "B W"],
    strength_B: Float[Tensor, " B"],
    combine: Combine,
) -> Float[Tensor, "B F"]:
    """Return nodes' answers from what they are sent; 0 for one without a tie."""
    scale_B1 = strength_B.clamp(min=1e-12).rsqrt().unsqueeze(1)
    return combine(layer_0_BD, received_BW * scale_B1) * (strength_B > 0).unsqueeze(1)


def sum_of_rows(
    table_VW: Float[Tensor, "V W"], node_P: Int64[Tensor, " P"], length_B: Int64[Tensor, " B"]
) -> Float[Tensor, "B W"]:
    """Return the sum of each query's rows, which stand one query after the other."""
    if len(node_P) == 0:
        return table_VW.new_zeros(len(length_B), table_VW.shape[1])
    offsets_B1 = F.pad(length_B.cumsum(0), (1, 0))
    return F.embedding_bag(node_P, table_VW, offsets_B1, mode="sum", include_last_offset=True)


def _distinct(
    queries: Queries, tied_I: Bool[Tensor, " I"]
) -> tuple[Int64[Tensor, " P"], Int64[Tensor, " P"], Int64[Tensor, " P"]]:
    """Return each history's different items that have ties: row, item, and which one it is.

    They stand by row and item, so that sums of them do not depend on the order of events.
    """
    row_N = torch.repeat_interleave(queries.offsets_B1.diff())
    tied_N = tied_I[queries.history_N]
    key_N = row_N[tied_N] * len(tied_I) + queries.history_N[tied_N]
    order_N = key_N.argsort(stable=True)
    ordered_N = key_N[order_N]
    first_N = torch.ones_like(key_N, dtype=torch.bool)
    first_N[1:] = ordered_N[1:] != ordered_N[:-1]
    key_P, event_P = ordered_N[first_N], order_N[first_N]
    row_P = key_P // len(tied_I)
    length_B = torch.bincount(row_P, minlength=len(queries))
    start_B = length_B.cumsum(0) - length_B
    place_P = torch.empty_like(event_P)
    place_P[event_P.argsort()] = torch.arange(len(event_P), device=event_P.device)
    return row_P, key_P % len(tied_I), place_P - start_B[row_P]
