"""What a file is, by its place and its first bytes, before anybody reads it as a table."""

import os
from pathlib import Path

from foretaste.errors import DataError

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
            "give the table"
        )
    if "\x00" in text:
        raise DataError(f"{text!r} is no path")
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
