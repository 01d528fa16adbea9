"""The settings of reading a table of events, written once for Python, recipes and the prompt."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from foretaste.config import Config
from foretaste.errors import DataError

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
"""What numbers count: seconds and finer or coarser units since 1970; "excel", days since
1899-12-30; "years" such as 2024 or 2024.5; the digits of a date; "order", a mere count, not of
seconds. The three with a separator are of texts, with a time of day behind if there is one."""
Duplicates = Literal["keep", "first", "last"]
MISSING = (
    *("", "NA", "N/A", "n/a", "#N/A", "<NA>", "NULL", "Null", "null", "\\N", "None"),
    *("nan", "NaN", "NAN", "NaT"),
)
"""Texts that mean a missing value if nothing else is said: those of R, SQL, MySQL and pandas."""


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
    """How a table of events is read: which columns are what, and what to do with odd values."""

    user: Column | None = "user_id"
    """Column of user ids, by name or position (without a header, columns are named "0", "1" and so
    on). None ("none" in a recipe) is for a table without users: every row is then a user of its
    own."""
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
    """A table of two columns of user ids, any kind of source: who trusts whom. Links to unknown
    ids, links to oneself and repeated links are left out and counted."""
    item_links: Any = None
    """A table of two columns of item ids that go together, read in the same way."""


_UNPACK, _EXPORT = "unpack it first", "write it as CSV or Parquet"
_NOT_TABLES = (
    (0, b"PK\x03\x04", "a zip archive or a spreadsheet", "unpack it first, or save it as CSV"),
    (0, b"\xd0\xcf\x11\xe0", "a spreadsheet", "save it as CSV"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (0, b"BZh", "a bzip2 archive", _UNPACK),
    (0, b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!", "a rar archive", _UNPACK),
    (0, b"\x04\x22\x4d\x18", "an lz4 archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (8, b"DUCK", "a DuckDB database", "give the result of a query, duckdb.connect(FILE).sql(…)"),
    (0, b"SQLite format 3", "an SQLite database", "give the result of pandas.read_sql"),
    (0, b"\x89HDF", "an HDF5 file", _EXPORT),
    (0, b"\x93NUMPY", "a NumPy array", _EXPORT),
    (0, b"ORC", "an ORC file", "read it with pyarrow.orc, and give the table"),
    (0, b"Obj\x01", "an Avro file", "read it with polars.read_avro, and give the table"),
    (0, b"\xff\xff\xff\xff", "an Arrow stream", "read it with pyarrow.ipc, and give the table"),
    (0, b"FEA1", "a Feather file of the first version", _EXPORT),
    (0, b"%PDF", "a PDF", _EXPORT),
)
"""Where which bytes stand in a file, what it is then, and what to do."""


def place_of(source: str | os.PathLike[str]) -> Path:
    """Return where a table lies.

    Raises:
        DataError: It is no path, but an address of a database or the web.
    """
    text = os.fspath(source)
    if "://" in text:  # what follows may hold a password
        raise DataError(
            f"{text.split('://')[0]}:// is no path: read it with pandas, Polars or DuckDB, and "
            "give the table",
            name="files",
            value=text,
        )
    if "\x00" in text:
        raise DataError(f"{text!r} is no path", name="files", value=text)
    return Path(text)


def first_bytes(path: Path) -> bytes:
    """Return the first bytes of what may be a table.

    Raises:
        DataError: It cannot be read, is empty, or is known to be something else.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(512)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", name=str(path)) from error
    if not magic:
        raise DataError(f"{path} is empty (0 bytes): it holds no table", name=str(path))
    for start, there, what, fix in _NOT_TABLES:
        if magic.startswith(there, start):
            raise DataError(f"{path} is {what}: {fix}", name=str(path))
    return magic
