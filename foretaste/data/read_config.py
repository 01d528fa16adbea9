"""The settings of reading events, defined once for Python, recipes and the command line."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from foretaste.config import Config

Column = str | int
"""A column by its name or, as an integer, by its position from 0."""
Columns = Annotated[Sequence[Column], AfterValidator(tuple)]
TimestampUnit = Literal[
    "s",
    "ms",
    "us",
    "ns",
    "minutes",
    "hours",
    "days",
    "excel",
    "years",
    "YYYYMM",
    "YYYYMMDD",
    "YYYYMMDDHHMM",
    "YYYYMMDDHHMMSS",
    "DD.MM.YYYY",
    "DD/MM/YYYY",
    "MM/DD/YYYY",
    "order",
]
"""The unit of numbers: seconds or finer or coarser units since 1970; "excel", days since
1899-12-30; "years" such as 2024 or 2024.5; the digits of a date; "order", a mere count, not of
seconds. The three with a separator are for text, which may end with a time of day."""
Duplicates = Literal["keep", "first", "last"]
MISSING = (
    *("", "NA", "N/A", "n/a", "#N/A", "<NA>", "NULL", "Null", "null", "\\N", "None"),
    *("nan", "NaN", "NAN", "NaT"),
)
"""Texts that mean a missing value by default: those of R, SQL, MySQL and pandas."""


class WhichEvents(Config):
    """Which rows are events, and which of these are positive."""

    where: str = ""
    """A condition as SQL writes it, such as `quantity > 0 AND country = 'DE'`. Rows that do not
    meet it are left out and counted."""
    positive: str = ""
    """Which events are positive: a column whose values above 0 mark them, or a condition as SQL
    writes it, such as `rating >= 4`. Retrievers and baselines learn from positive events alone, and
    histories and the lists of the test hold only those; rankers learn from all events. Without it,
    every event is positive."""


class ReadConfig(WhichEvents):
    """How a table of events is read: the role of each column, and the handling of odd values."""

    user: Column | None = "user_id"
    """Column of user ids, by name or position (without a header, columns are named "0", "1" and so
    on). None ("none" in a recipe) is for a table without users: every row is then its own user."""
    item: Column | None = "item_id"
    """Column of item ids. None is for a table without items: all rows then belong to one item,
    "row"."""
    timestamp: Column | None = None
    """Column of times: numbers, datetimes, dates or ISO 8601 text, from 1970 to 2200. They are kept
    as whole seconds, but fractions decide the order. Without a column, the order of the rows is the
    order in time."""
    timestamp_unit: TimestampUnit = "s"
    """The unit of numbers: seconds, or finer or coarser units, since 1970; "excel", days since
    1899-12-30; "years" such as 2024 or 2024.5; the digits of a date; "order", a mere count. For
    text that is not ISO 8601, the order of day, month and year."""
    rating: Column | None = None
    """Column of ratings, kept as `columns["rating"]`, 32-bit floats."""
    columns: Columns = ()
    """Further columns of numbers to keep, such as labels; a missing value becomes NaN."""
    context: Columns = ()
    """Further columns to keep, such as the hour or the place: context features, which are known
    when a recommendation is asked for. Numbers, truth values, text, dates, times and durations, or
    lists of these."""
    user_key: Column | None = None
    """Column of ids in the table of users. Without one, it is the column named like `user`, or else
    the column that holds the ids of at least half of the users with events."""
    item_key: Column | None = None
    """Column of ids in the table of items, found in the same way."""
    missing: Annotated[Sequence[str], AfterValidator(tuple)] = MISSING
    """Texts that mean a missing value, in files and tables, in all columns that are read. A text
    that is a number, such as "-1", also counts in columns of numbers. With an empty list only the
    empty text means a missing value."""
    separator: str | None = None
    """Between the fields of a text file, of any length; without it, the first line decides. A tab
    may be written as `\\t`, runs of blanks as ` +`."""
    encoding: str | None = None
    """Encoding of text files, as Python names it, such as gbk or cp1251. Without it: UTF-8, UTF-16
    if the first bytes show it, or cp1252, which is noted."""
    header: bool = True
    """Whether the first line of text files names the columns."""
    duplicates: Duplicates = "keep"
    """What to do with events of the same user, item and second (the same user and item where there
    are no times): keep all, or only the first or the last of them."""
    drop_incomplete: bool = False
    """Leave out rows without a user, item, time or rating, and count them; otherwise they are an
    error."""


class ReadTables(ReadConfig):
    """The settings of reading in Python, where the tables beside the events may be in memory."""

    users: Any = None
    """A table of users, any kind of source; `user_key` is its column of ids. Users without an event
    join the vocabulary. If several rows have one key, the first is taken."""
    items: Any = None
    """A table of items, read in the same way."""
    user_links: Any = None
    """A table of two columns of user ids, any kind of source: the first trusts the second. Links to
    unknown ids, links to oneself and repeated links are left out and counted."""
    item_links: Any = None
    """A table of two columns of item ids that go together, read in the same way."""
