"""Conditions in SQL syntax: which events are kept, and which of them are positive.

`rating >= 4`, `quantity > 0 AND country = 'DE'`, `"watch minutes" > 5 OR liked`. A numeric
condition holds where it is above 0. A condition does not hold for a row where it is missing or NaN.
Times with a zone are compared in UTC, and durations in seconds.
"""

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import polars as pl
from jaxtyping import Bool

from foretaste.data.columns import in_words, kept
from foretaste.data.interactions import Interactions
from foretaste.errors import ConfigError, DataError, did_you_mean


def columns_in(condition: str, name: str, columns: Collection[str] | None = None) -> list[str]:
    """Return the columns that a condition reads.

    Args:
        condition: In SQL syntax; "" reads no column.
        name: The setting with the condition, for messages.
        columns: The existing columns; None skips the check.

    Raises:
        ConfigError: It is not a condition, or reads no column or a missing one.
    """
    found = list(dict.fromkeys(_parsed(condition, name).meta.root_names())) if condition else []
    if condition and not found:
        raise ConfigError(
            f"{name} = {condition!r} reads no column, so it is the same for every row: "
            'compare a column with something, such as rating >= 4; write a name such as "2" in '
            "double quotes",
            name=name,
            value=condition,
        )
    for column in found:
        if columns is not None and column not in columns:
            has = ", ".join(map(repr, list(columns)[:30]))
            lower = {known.lower(): known for known in columns}
            near = lower.get(column.lower(), column)
            raise ConfigError(
                f"{name} = {condition!r} reads column {column!r}, which is not there; there are "
                f"{has}{did_you_mean(near, columns)} (write text in 'single' quotes, a name "
                'with blanks or dashes in "double" ones)',
                name=name,
                column=column,
                value=condition,
            )
    return found


def rows_where(frame: pl.DataFrame, condition: str, name: str) -> Bool[np.ndarray, " E"]:
    """Return for each row of a table whether a condition holds.

    Raises:
        ConfigError: It is not a condition, or reads a column that is not there.
        DataError: A comparison does not fit a column's type, or the result is not a truth value.
    """
    asked = _comparable(frame.select(columns_in(condition, name, frame.columns)))
    try:
        holds = asked.select(_parsed(condition, name).alias("holds"))["holds"]
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
        raise DataError(
            f"{name} = {condition!r} does not fit its columns ({_described(asked)}): compare "
            "numbers with numbers, text with 'text', and times with DATE '2024-05-01' or "
            "TIMESTAMP '2024-05-01 12:30:00'",
            name=name,
            value=condition,
        ) from None
    if holds.dtype.is_numeric():
        holds = (holds.fill_nan(None) if holds.dtype.is_float() else holds) > 0
    if holds.dtype != pl.Boolean or holds.len() not in (1, frame.height):
        raise DataError(
            f"{name} = {condition!r} is not true or false for each row ({_described(asked)}): "
            "compare a column with something, such as rating >= 4 or answer = 'yes'",
            name=name,
            value=condition,
        )
    if holds.len() == 1 and frame.height != 1:  # the result is a sum or another figure of all rows
        holds = holds.new_from_index(0, frame.height)
    return holds.fill_null(value=False).to_numpy()


def _comparable(frame: pl.DataFrame) -> pl.DataFrame:
    """Return columns in types that compare as in SQL.

    Otherwise small integers would overflow in a sum, NaN would be above every number, and
    categories would be compared by their position.
    """
    frame = kept(frame, "the event table", needed=True).frame
    return pl.DataFrame([_wide(column) for column in frame.iter_columns()])


def _wide(column: pl.Series) -> pl.Series:
    if column.dtype == pl.Duration:
        return column.dt.total_microseconds() / 1e6
    if column.dtype.is_float():
        return column.fill_nan(None)
    if not column.dtype.is_integer():
        return column
    whole = column.cast(pl.Int64, strict=False)
    return whole if whole.null_count() == column.null_count() else column.cast(pl.Int128)


def _described(frame: pl.DataFrame) -> str:
    """Describe the types of columns; for text, also the first value that is not a number."""
    words = []
    for column in frame.iter_columns():
        shown = ""
        if column.dtype == pl.String and column.count():
            odd = column.is_not_null() & column.cast(pl.Float64, strict=False).is_null()
            row = odd.arg_max() if odd.any() else column.is_not_null().arg_max()
            shown = f", such as {column[row or 0]!r} in row {1 + (row or 0)}"
        words.append(f"{column.name!r} holds {in_words(column)}{shown}")
    return "; ".join(words)


def only_where(events: Interactions, condition: str) -> Interactions:
    """Return the events for which a condition holds; the notes count the others.

    Args:
        events: A condition may read their columns, context, `timestamp_s`, `user_id` and `item_id`.
        condition: In SQL syntax.

    Raises:
        ConfigError: It is not a condition, or reads a column that the events do not have.
        DataError: No event meets the condition, or it does not fit the types.
    """
    keep_E = rows_where(_table(events, condition, "where"), condition, "where")
    check_some(keep_E, condition, "where")
    return replace(events.select(keep_E), notes=(*events.notes, *left_out(keep_E, condition)))


def counted_as_positive(events: Interactions, condition: str) -> Interactions:
    """Return events in which those that meet a condition count as positive.

    Raises:
        ConfigError: It is not a condition, or reads a column that the events do not have.
        DataError: No event meets the condition, or it does not fit the types.
    """
    positive_E = rows_where(_table(events, condition, "positive"), condition, "positive")
    check_some(positive_E, condition, "positive")
    return replace(
        events,
        columns={**events.columns, condition: positive_E},
        positive=condition,
        notes=(*events.notes, positive_note(positive_E, condition)),
    )


def unread_labels(events: Interactions) -> tuple[str, ...]:
    """Return a note that a model without labels takes all events as positive."""
    if events.positive:
        return ()
    notes = []
    for name, value_E in events.columns.items():
        low, high = (value_E.min(), value_E.max()) if len(events) else (0, 0)
        if name == "rating" and low < high:
            notes.append(
                "every event counts as positive, whatever its rating: if low ones should not, give "
                f"positive = 'rating >= {high - (high - low) / 4:g}' when reading, for example"
            )
        elif low == 0 and high == 1 and (zeros := int((value_E == 0).sum())):
            notes.append(
                f"{zeros:,} of {len(events):,} events have {name!r} = 0 and count as positive: "
                f"give positive = {name!r} when reading, if they should not"
            )
    return tuple(notes)


def check_some(holds_E: Bool[np.ndarray, " E"], condition: str, name: str) -> None:
    """Raise an error if no event meets a condition.

    Raises:
        DataError: None does.
    """
    if not holds_E.any():
        raise DataError(
            f"{name} = {condition!r} is true for none of {len(holds_E):,} rows: nothing would be "
            "left to learn from; compare it with the values of its columns",
            name=name,
            value=condition,
        )


def left_out(keep_E: Bool[np.ndarray, " E"], condition: str) -> tuple[str, ...]:
    """Return a note on the number of rows that `where` left out, if any."""
    num = int((~keep_E).sum())
    return (f"{num:,} of {len(keep_E):,} rows were left out by where = {condition!r}",) * bool(num)


def positive_note(positive_E: Bool[np.ndarray, " E"], condition: str) -> str:
    """Return a note on how many events count as positive."""
    return f"{int(positive_E.sum()):,} of {len(positive_E):,} events are positive: {condition}"


def _parsed(condition: str, name: str) -> pl.Expr:
    try:
        found = pl.sql_expr(condition)
        if not any(column.startswith("_POLARS") for column in found.meta.root_names()):
            return found  # a condition can read only this table
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
        pass
    raise ConfigError(
        f"{name} = {condition!r} is not a condition: write it as in SQL, such as rating >= 4 "
        "or clicked = 1 AND country = 'DE', column names with blanks in double quotes",
        name=name,
        value=condition,
    )


def _table(events: Interactions, condition: str, name: str) -> pl.DataFrame:
    """Return the columns of events that a condition reads."""
    found = {}
    for column in columns_in(condition, name):
        if column in events.columns:
            found[column] = pl.Series(column, events.columns[column])
        elif events.context is not None and column in events.context.columns:
            found[column] = events.context[column]
        elif column == "timestamp_s" and events.timestamp_s is not None:
            found[column] = pl.Series(column, events.timestamp_s)
        elif column in ("user_id", "item_id"):
            side, rows = (
                (events.users, events.user_idx)
                if column == "user_id"
                else (events.items, events.item_idx)
            )
            found[column] = side.ids.gather(pl.Series(rows)).alias(column)
    if not found and len(events):
        known = [*events.columns, *([] if events.context is None else events.context.columns)]
        wanted = ", ".join(map(repr, columns_in(condition, name))) or "no column"
        raise ConfigError(
            f"{name} = {condition!r} reads {wanted}; the events have "
            f"{', '.join(map(repr, [*known, 'user_id', 'item_id', 'timestamp_s']))}: name a column "
            "with columns= or context= when reading",
            name=name,
            value=condition,
        )
    return pl.DataFrame(found)
