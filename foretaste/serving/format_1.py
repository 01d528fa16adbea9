"""Bundles of the first format: their weights under today's names.

Then users, items and the rest stood one behind the other in one table of a graph or of a ranker;
now each has a table of its own.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from foretaste.models.bert4rec import BERT4Rec
from foretaste.models.layers.nodes import NodeInputs
from foretaste.models.layers.row_fields import RowFields
from foretaste.models.lightgcn import LightGCN
from foretaste.models.mf import MF
from foretaste.models.sasrec import SASRec
from foretaste.models.two_tower import TwoTower

_TABLES = {"users": "user_table", "items": "item_table", "bias": "bias_table"}


def weights_of_format_1(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return weights under the names that a model has for them today.

    Args:
        state: As the file has them; those that have today's names already stay as they are.
        model: The network that they are for.
    """
    weights = dict(state)
    for place, module in model.named_modules():
        prefix = f"{place}." if place else ""
        match module:
            case MF() | SASRec() | BERT4Rec() | TwoTower():
                for then, now in _TABLES.items():
                    _cut(weights, f"{prefix}{then}.weight", [(f"{prefix}{now}.weight", None)])
            case LightGCN():
                parts = [
                    ("user_table.weight", module.num_users),
                    ("item_table.weight", module.num_items),
                    ("other_table.weight", None),
                ]
                _cut(weights, f"{prefix}layer_0.weight", _below(prefix, parts))
            case NodeInputs():
                parts = [
                    ("user_table.weight", module.num_users),
                    ("item_table.weight", len(module.linked_X) - module.num_users),
                    ("everybody_1D", 1),
                ]
                _cut(weights, f"{prefix}ids.weight", _below(prefix, parts))
            case RowFields():
                sides = {"user": module.user, "item": module.item, "context": module.context}
                parts = [
                    ("", 1),
                    *((f"{name}.id_table.weight", side.num_ids) for name, side in sides.items()),
                    *((f"{name}.code_table.weight", s.num_codes) for name, s in sides.items()),
                ]
                _cut(weights, f"{prefix}table.weight", _below(prefix, parts))
    return weights


def _below(prefix: str, parts: list[tuple[str, int | None]]) -> list[tuple[str, int | None]]:
    return [(prefix + name if name else "", rows) for name, rows in parts]


def _cut(weights: dict[str, Tensor], then: str, parts: list[tuple[str, int | None]]) -> None:
    """Replace a table by its parts, by name and number of rows, None: the rest; "" is dropped."""
    if then not in weights:
        return
    table, first = weights.pop(then), 0
    for name, rows in parts:
        last = len(table) if rows is None else first + rows
        if name and last > first:
            weights[name] = table[first:last]
        first = last
