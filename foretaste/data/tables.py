"""Any table to a Polars frame: files of text, Parquet and Arrow; pandas, Polars, Arrow, DuckDB.

Objects in memory come through the Arrow PyCapsule interface, so that none of those libraries but
Polars and pyarrow is ever imported here.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, final, runtime_checkable

import polars as pl
import pyarrow as pa

from foretaste.data.delimited import TextFile, open_text
from foretaste.data.vocabulary import id_text
from foretaste.errors import DataError, nearest

_T = TypeVar("_T")
_BROKEN = (pl.exceptions.PolarsError, pl.exceptions.PanicException, pa.ArrowException, OSError)
_NOT_TABLES = {
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"BZh": "bzip2",
}


class Table(NamedTuple):
    """Columns of a source, in the order asked for."""

    frame: pl.DataFrame
    notes: tuple[str, ...] = ()


@runtime_checkable
class Source(Protocol):
    """A table whose columns are known and whose rows are not read yet."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def columns(self) -> list[str]:
        """The names of all columns, in order."""
        ...

    def read(self, columns: list[str], ids: list[str]) -> Table:
        """Read some of the columns, those of `ids` typed as ids where the source has no types."""
        ...


def open_source(
    source: object, *, separator: str | None = None, header: bool = True, role: str = "the table"
) -> Source:
    """Look at a table without reading its rows.

    Args:
        source: A path or a list of paths; a pandas or Polars frame, a lazy one too; anything with
            `__arrow_c_stream__`, such as a pyarrow table or a DuckDB relation.
        separator: Between the fields of text files; None finds it.
        header: Whether the first line of text files names the columns.
        role: What a table in memory is called in messages.

    Raises:
        DataError: It is not such a thing, or a file is missing, empty or broken.
    """
    match source:
        case str() | os.PathLike():
            return _open_file(Path(source), separator=separator, header=header)
        case list() | tuple() if source and all(isinstance(s, str | os.PathLike) for s in source):
            files = [_open_file(Path(s), separator=separator, header=header) for s in source]
            return files[0] if len(files) == 1 else _Many(files)
        case pl.DataFrame():
            return _Scan(role, source.lazy())
        case pl.LazyFrame():
            return _Scan(role, source)
    if type(source).__module__.split(".")[0] == "pandas" and hasattr(source, "columns"):
        return _Pandas(role, source)
    if hasattr(source, "__arrow_c_stream__"):
        return _Stream(role, _quietly(role, lambda: pa.RecordBatchReader.from_stream(source)))
    raise DataError(
        f"{role} cannot be a {type(source).__name__}: give a path, a list of paths, or a pandas, "
        "Polars, pyarrow or DuckDB table"
    )


def find_column(source: Source, wanted: str | int, *, argument: str) -> str:
    """Return the name of a column given by name or, as an integer, by position.

    Raises:
        DataError: There is none; the message lists those there are and the nearest name.
    """
    columns = source.columns
    if isinstance(wanted, int):
        if 0 <= wanted < len(columns):
            return columns[wanted]
        raise DataError(
            f"{source.name} has no column at position {wanted} ({argument}): it has "
            f"{len(columns)}, counted from 0"
        )
    if columns.count(wanted) == 1:
        return wanted
    if wanted in columns:
        raise DataError(f"{source.name} has more than one column {wanted!r}: rename them")
    raise DataError(_no_column(source, wanted, argument))


def _no_column(source: Source, wanted: str, argument: str) -> str:
    lower = {name.lower(): name for name in source.columns}
    near = nearest(wanted.lower(), lower, likeness=0.5)
    names = ", ".join(map(repr, source.columns[:30])) + (" …" if len(source.columns) > 30 else "")
    advice = f"did you mean {argument}={lower[near]!r}?" if near else f"say {argument}=NAME"
    if (isinstance(source, _Text) and source.file.header) or (
        isinstance(source, _Many) and source.header
    ):
        advice += " (header=False if the first line holds values)"
    return f"{source.name} has no column {wanted!r} ({argument}); it has {names}: {advice}"


@final
@dataclass(frozen=True)
class _Scan:
    """Polars reads it: a Parquet or Arrow file, or one of its own frames."""

    name: str
    lazy: pl.LazyFrame

    @property
    def columns(self) -> list[str]:
        return _quietly(self.name, lambda: self.lazy.collect_schema().names())

    def read(self, columns: list[str], ids: list[str]) -> Table:
        return Table(_quietly(self.name, lambda: self.lazy.select(columns).collect()))


@final
@dataclass(frozen=True)
class _Text:
    """A text file, as a `Source`."""

    file: TextFile

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def columns(self) -> list[str]:
        return self.file.columns

    def read(self, columns: list[str], ids: list[str]) -> Table:
        return Table(*self.file.read(columns, ids))


@final
@dataclass(frozen=True)
class _Stream:
    """A stream of Arrow batches."""

    name: str
    batches: pa.RecordBatchReader

    @property
    def columns(self) -> list[str]:
        return list(self.batches.schema.names)

    def read(self, columns: list[str], ids: list[str]) -> Table:
        return Table(
            _quietly(self.name, lambda: _of_arrow(self.batches.read_all().select(columns)))
        )


@final
@dataclass(frozen=True)
class _Pandas:
    """A pandas frame: a column of mixed types, which Arrow refuses, is taken as text."""

    name: str
    frame: Any  # pandas is not imported here, so it has no type

    @property
    def columns(self) -> list[str]:
        return [str(label) for label in self.frame.columns]

    def read(self, columns: list[str], ids: list[str]) -> Table:
        return Table(pl.DataFrame([self._column(name) for name in columns]))

    def _column(self, name: str) -> pl.Series:
        one = self.frame.iloc[:, [self.columns.index(name)]]
        try:
            table = pa.RecordBatchReader.from_stream(one).read_all().select([0])
            return _of_arrow(table).to_series().alias(name)
        except pa.ArrowException:
            column = one.iloc[:, 0]
            pairs = zip(column.isna(), column, strict=True)
            values = [None if missing else id_text(value) for missing, value in pairs]
            return pl.Series(name, values, dtype=pl.String)


@final
@dataclass(frozen=True)
class _Many:
    """Files one after the other."""

    files: list[Source]

    @property
    def name(self) -> str:
        return f"{self.files[0].name} and {len(self.files) - 1} more"

    @property
    def header(self) -> bool:
        return any(isinstance(file, _Text) and file.file.header for file in self.files)

    @property
    def columns(self) -> list[str]:
        return self.files[0].columns

    def read(self, columns: list[str], ids: list[str]) -> Table:
        for file in self.files:
            for name in columns:
                find_column(file, name, argument="in every file")
        tables = [file.read(columns, ids) for file in self.files]
        frames = _alike([table.frame for table in tables])
        together = _quietly(self.name, lambda: pl.concat(frames, how="vertical_relaxed"))
        return Table(together, tuple(note for table in tables for note in table.notes))


def _alike(frames: list[pl.DataFrame]) -> list[pl.DataFrame]:
    """Take as text, everywhere, a column that is text in one of the files."""
    text = [
        name
        for name in frames[0].columns
        if Counter(frame.schema[name] == pl.String for frame in frames).keys() == {True, False}
    ]
    return [frame.with_columns(pl.col(text).cast(pl.String)) if text else frame for frame in frames]


def _open_file(path: Path, *, separator: str | None, header: bool) -> Source:
    if path.is_dir():
        raise DataError(f"{path} is a folder: give its files as a list")
    try:
        with path.open("rb") as file:
            magic = file.read(6)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not magic:
        raise DataError(f"{path} is empty (0 bytes): it holds no table")
    suffix = path.suffix.lower()
    for start, what in _NOT_TABLES.items():
        if magic.startswith(start):
            raise DataError(f"{path} is {what}: unpack it first")
    if magic[:4] == b"PAR1" or suffix in (".parquet", ".pq"):
        return _checked(_Scan(str(path), pl.scan_parquet(path)))
    if magic == b"ARROW1" or suffix in (".arrow", ".feather", ".ipc"):
        return _checked(_Scan(str(path), pl.scan_ipc(path)))
    return _Text(open_text(path, separator=separator, header=header))


def _checked(scan: _Scan) -> _Scan:
    """Read the schema now: a truncated file is refused at the door."""
    _quietly(scan.name, scan.lazy.collect_schema)
    return scan


def _of_arrow(table: pa.Table) -> pl.DataFrame:
    columns = {}
    for field in table.schema:
        column = table[field.name]
        if getattr(field.type, "extension_name", "") == "arrow.uuid":
            values = column.to_pylist()
            column = pa.array([None if v is None else str(v) for v in values], pa.large_string())
        columns[field.name] = pl.Series(field.name, column)
    return pl.DataFrame(columns)


def _quietly(name: str, work: Callable[[], _T]) -> _T:
    """Call into Polars or Arrow, whose errors become ours."""
    try:
        return work()
    except _BROKEN as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{name} cannot be read ({reason}): if it is a file, it is broken or cut short, get it "
            "anew"
        ) from error
