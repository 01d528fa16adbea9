"""What a request tells of new items, as rules ask for it: in the words of the item table.

Shape legend: R new items, M items found.
"""

from collections.abc import Collection
from datetime import UTC, date, datetime

import numpy as np
import polars as pl
from jaxtyping import Int64

from foretaste.data.columns import in_words
from foretaste.data.features_values import texts_of
from foretaste.errors import DataError
from foretaste.serving.item_labels import Carried, ItemLabels, Labels
from foretaste.serving.new_items import Told


def labels_of_new(labels: ItemLabels, told: Told, columns: Collection[str]) -> ItemLabels:
    """Return a table of new items like the catalogue's; what an item does not tell is missing.

    Args:
        labels: Of the catalogue: says what each column holds.
        told: What is known of each new item; R of them.
        columns: Those that rules name.

    Raises:
        DataError: A column is unknown, or a value is none that it can hold; it says of which item.
    """
    table, separators = {}, {}
    for name in columns:
        own = labels.labels(name)
        separators[name] = own.separator
        is_list = isinstance(own.dtype, pl.List | pl.Array)
        like = pl.Series(name, [], dtype=own.dtype)
        like = like.explode() if is_list else like
        values = [_as_told(item_id, said.get(name), own, like) for item_id, said in told.items()]
        dtype = pl.List(pl.String) if is_list else _held(like).dtype
        table[name] = pl.Series(name, values, dtype=dtype)
    return ItemLabels(pl.DataFrame(table), num_items=len(told), separators=separators)


def carried_beside(
    own: Labels, new: Labels, item_M: Int64[np.ndarray, " M"], first: int
) -> Carried:
    """Return what items carry, whether the catalogue has them or not, under the same codes.

    Args:
        own: A column of the item table.
        new: The same of new items.
        item_M: Rows; those from `first` on are new.
        first: The first new row.
    """
    is_new_M = item_M >= first
    known, added = own.of(item_M[~is_new_M]), new.of(item_M[is_new_M] - first)
    code_V = own.texts.encode(new.texts.ids)
    code_V = np.where(code_V < 0, len(own.texts) + np.arange(len(code_V)), code_V)
    row_N = np.concatenate(
        [np.flatnonzero(~is_new_M)[known.row_N], np.flatnonzero(is_new_M)[added.row_N]]
    )
    order_N = np.argsort(row_N, kind="stable")
    return Carried(row_N[order_N], np.concatenate([known.code_N, code_V[added.code_N]])[order_N])


def _held(like: pl.Series) -> pl.Series:
    """Return an empty column for single values as `_as_one` gives them."""
    if like.dtype.is_numeric():
        return like.cast(pl.Float64)
    typed = like.dtype in (pl.Boolean, pl.Date, pl.Datetime)
    return like if typed else pl.Series(like.name, [], dtype=pl.String)


def _as_told(item_id: object, value: object, own: Labels, like: pl.Series) -> object:
    """Return a value as a column of its type takes it, None where missing."""
    if value is None or value == "" or value != value:
        return None
    try:
        if isinstance(own.dtype, pl.List | pl.Array):
            parts = value if isinstance(value, list | tuple) else [value]
            return texts_of(pl.Series([_as_one(part, like) for part in parts])).to_list()
        if own.separator is not None and isinstance(value, list | tuple):
            return own.separator.join(str(_as_one(part, like)) for part in value)
        return _as_one(value, like)
    except (ValueError, TypeError, OverflowError, DataError, pl.exceptions.PolarsError):
        raise DataError(
            f"rules look at the column {own.name!r}, which holds "
            f"{in_words(pl.Series(dtype=own.dtype))}; the new item {item_id!r} has {value!r} "
            "there, which is none",
            column=own.name,
            value=value,
        ) from None


def _as_one(value: object, like: pl.Series) -> object:
    """Return a single value as a column like `like` holds it: any number is a float."""
    text = texts_of(pl.Series([value]))[0]
    if text is None or (like.dtype == pl.Boolean and text not in ("true", "false")):
        raise ValueError
    if like.dtype == pl.Boolean:
        return text == "true"
    if like.dtype.is_numeric():
        return float(text)
    if like.dtype == pl.Date:
        return date.fromisoformat(text)
    if like.dtype == pl.Datetime:
        time = datetime.fromisoformat(text)
        time = time.replace(tzinfo=time.tzinfo or UTC).astimezone(UTC).replace(tzinfo=None)
        return pl.Series([time]).cast(like.dtype)[0]
    return str(text)
