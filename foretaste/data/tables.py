"""Reads any table into a Polars frame: text, Parquet and Arrow files, and tables in memory.

Objects in memory are read by the Arrow PyCapsule interface, so that only Polars and pyarrow are
imported here.
"""

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, final

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from foretaste.data.columns import (
    canonical_ids,
    in_words,
    of_arrow,
    without_extensions,
    without_markers,
)
from foretaste.data.delimited import TextFile, open_text
from foretaste.data.read_config import MISSING
from foretaste.data.vocabulary import id_text
from foretaste.errors import DataError, nearest

_T = TypeVar("_T")
BROKEN = (Exception, pl.exceptions.PanicException)
"""Errors of Polars, Arrow, DuckDB and pandas; no list of their classes was complete."""


class Table(NamedTuple):
    """Columns of a source, in the requested order."""

    frame: pl.DataFrame
    notes: tuple[str, ...] = ()


@final
@dataclass(frozen=True, kw_only=True)
class Source:
    """A table with known columns, whose rows are not read yet."""

    name: str
    """Its name in messages."""
    columns: list[str]
    """The names of all columns, in order."""
    header: bool = False
    """Whether the first line of text has the names."""
    fetch: Callable[[list[str], Collection[str], Collection[str], Collection[str]], Table]
    """Reads columns, with the arguments of `read`."""
    scan: Callable[[list[str]], pl.LazyFrame] | None = None
    """Scans columns in blocks, those of text files as text; None if this is impossible."""
    is_text: bool = False
    """Whether it is a text file."""
    notes: tuple[str, ...] = ()
    """Notes on what opening assumed."""
    explain: Callable[[], str] | None = None
    """Explains why a text file cannot be parsed."""

    def read(
        self,
        columns: list[str],
        ids: Collection[str],
        *,
        numbers: Collection[str] = (),
        optional: Collection[str] = (),
    ) -> Table:
        """Read some of the columns.

        Args:
            columns: The names.
            ids: Columns that get the type of ids if the source has no types.
            numbers: Columns that hold only numbers or times.
            optional: Columns that are left out, with a note, if their type cannot be read.
        """
        _each_once(self, columns)
        return self.fetch(columns, ids, numbers, optional)


def open_source(
    source: object,
    *,
    separator: str | None = None,
    header: bool = True,
    role: str = "the table",
    encoding: str | None = None,
    missing: Collection[str] = MISSING,
) -> Source:
    """Open a table without reading its rows.

    Args:
        source: A path or a list of paths; a pandas or Polars frame, a lazy one too; anything with
            `__arrow_c_stream__`, such as a pyarrow table or a DuckDB relation.
        separator: The separator of text files; None detects it.
        header: Whether the first line of text files names the columns.
        role: The name of a table in memory, in messages.
        encoding: The encoding of text files; None: UTF-8, UTF-16 or cp1252, by content.
        missing: Texts that mean a missing value, in any kind of source.

    Raises:
        DataError: It is not a table, or a file is missing, empty or broken.
        ConfigError: The separator or the encoding is invalid.
    """
    missing = (missing,) if isinstance(missing, str) else tuple(missing)
    opened = partial(
        _open_file, separator=separator, header=header, encoding=encoding, missing=missing
    )
    match source:
        case str() | os.PathLike():
            return opened(source)
        case list() | tuple() if source and all(isinstance(s, str | os.PathLike) for s in source):
            files = [opened(file) for file in source]
            return files[0] if len(files) == 1 else _together(files)
        case pl.DataFrame():
            return _scan(role, source.lazy(), missing)
        case pl.LazyFrame():
            return _scan(role, source, missing)
    if type(source).__module__.split(".")[0] == "pandas" and hasattr(source, "columns"):
        return _pandas(role, _with_index(source), missing)
    if hasattr(source, "__arrow_c_stream__") and not hasattr(source, "to_frame"):
        batches = _quietly(role, lambda: pa.RecordBatchReader.from_stream(source))
        return _stream(role, batches, missing)
    raise _no_source(source, role)


def _no_source(source: object, role: str) -> DataError:
    """Return the error for an object that is not a table, with the advice."""
    match source:
        case dict() | list() | tuple() if source:
            fix = "make a table of it, such as polars.DataFrame(…), and give that"
        case object(to_frame=_) | object(to_numpy=_, type=_):
            fix = "it is one column: give the table that has it"
        case object(shape=_):
            fix = "name its columns: pandas.DataFrame(…, columns=['user_id', 'item_id'])"
        case _:
            fix = "give a path, a list of paths, or a pandas, Polars, pyarrow or DuckDB table"
    return DataError(f"{role} cannot be a {type(source).__name__}: {fix}", name=role, value=source)


def find_column(source: Source, wanted: str | int, *, argument: str) -> str:
    """Return the name of a column given by name or, as an integer, by position.

    Raises:
        DataError: The column does not exist; the message lists the columns and the nearest name.
    """
    columns = source.columns
    if isinstance(wanted, int):
        if not 0 <= wanted < len(columns):
            raise DataError(
                f"{source.name} has no column at position {wanted} ({argument}): it has "
                f"{len(columns)}, counted from 0",
                name=argument,
                value=wanted,
            )
        wanted = columns[wanted]
    if wanted not in columns:
        raise DataError(_no_column(source, wanted, argument), name=argument, value=wanted)
    _each_once(source, [name for name in columns if name == wanted])
    return wanted


def _no_column(source: Source, wanted: str, argument: str) -> str:
    lower = {name.lower(): name for name in source.columns}
    near = nearest(wanted.lower(), lower, likeness=0.5)
    names = ", ".join(map(repr, source.columns[:30])) + (" …" if len(source.columns) > 30 else "")
    advice = f"did you mean {argument}={lower[near]!r}?" if near else f"say {argument}=NAME"
    if source.header:
        advice += " (set header=False if the first line holds values)"
    return f"{source.name} has no column {wanted!r} ({argument}); it has {names}: {advice}"


def _scan(name: str, lazy: pl.LazyFrame, missing: tuple[str, ...]) -> Source:
    """Scan a file or a frame with Polars and read its schema, so that broken files raise now."""
    columns = _quietly(name, lambda: lazy.collect_schema().names())
    source = _typed(name, columns, lambda names: lazy.select(names).collect(), missing)
    return replace(source, scan=lazy.select)


def _stream(name: str, batches: pa.RecordBatchReader, missing: tuple[str, ...]) -> Source:
    """Read a stream of Arrow batches, once."""
    whole = cache(lambda: _quietly(name, batches.read_all))

    def load(names: list[str]) -> pl.DataFrame:
        return pl.DataFrame([of_arrow(column, whole()[column]) for column in names])

    return _typed(name, list(batches.schema.names), load, missing)


def _pandas(name: str, frame: Any, missing: tuple[str, ...]) -> Source:
    """Read a pandas frame; a column of mixed types, which Arrow refuses, becomes text."""
    columns = [str(label) for label in frame.columns]

    def load(names: list[str]) -> pl.DataFrame:
        return pl.DataFrame(
            [_of_pandas(column, frame.iloc[:, [columns.index(column)]]) for column in names]
        )

    return _typed(name, columns, load, missing)


def _of_pandas(name: str, one: Any) -> pl.Series:
    dtype = one.dtypes.iloc[0]
    kind = str(dtype.categories.dtype if hasattr(dtype, "categories") else dtype)
    try:
        if kind.startswith(("period", "interval")):
            raise TypeError(kind)  # Arrow would read them as numbers and records
        if kind.startswith("Sparse"):
            one = one.sparse.to_dense()
        if kind in ("float96", "float128"):
            one = one.astype("float64")
        return of_arrow(name, pa.RecordBatchReader.from_stream(one).read_all()[0])
    except BROKEN:
        column = one.iloc[:, 0]
        pairs = zip(column.isna(), column, strict=True)
        values = [None if missing else id_text(value) for missing, value in pairs]
        return pl.Series(name, values, dtype=pl.String)


def _text(file: TextFile) -> Source:
    """Read a text file."""

    def fetch(columns: list[str], ids: Any, numbers: Any, optional: Any) -> Table:
        return Table(*file.read(columns, list(ids), numbers))

    return Source(
        name=file.name,
        columns=list(file.columns),
        header=file.header,
        fetch=fetch,
        scan=file.scan,
        is_text=True,
        notes=file.notes,
        explain=file.explain,
    )


def _together(files: list[Source]) -> Source:
    """Read files one after the other."""
    name = f"{files[0].name} and {len(files) - 1} more"

    def fetch(columns: list[str], ids: Any, numbers: Any, optional: Any) -> Table:
        for file in files:
            for column in columns:
                find_column(file, column, argument="in every file")
        tables = [file.read(columns, ids, numbers=numbers, optional=optional) for file in files]
        in_all = set.intersection(*(set(table.frame.columns) for table in tables))
        together = [
            _joined(name, files, [table.frame[column] for table in tables], is_id=column in ids)
            for column in columns
            if column in in_all
        ]
        return Table(pl.DataFrame(together), tuple(n for table in tables for n in table.notes))

    header = any(file.header for file in files)
    return Source(name=name, columns=files[0].columns, header=header, fetch=fetch)


def _joined(name: str, files: list[Source], parts: list[pl.Series], *, is_id: bool) -> pl.Series:
    """Concatenate one column of several files."""
    column = parts[0].name
    try:
        frames = [part.to_frame() for part in _alike(parts, is_id=is_id)]
        return pl.concat(frames, how="vertical_relaxed")[column]
    except BROKEN as error:
        kinds = ", ".join(
            f"{in_words(part)} in {file.name}" for part, file in zip(parts, files, strict=True)
        )
        raise DataError(
            f"{name}: column {column!r} has types that do not go together ({kinds}): "
            "use one type in all files",
            column=column,
        ) from error


def _alike(parts: list[pl.Series], *, is_id: bool) -> list[pl.Series]:
    """Convert one column of several files to one type if the types differ."""
    dtypes = {part.dtype for part in parts if part.dtype != pl.Null}
    if len(dtypes) < 2:
        return parts
    if not is_id and all(dtype in (pl.Date, pl.Datetime) for dtype in dtypes):
        return [_in_utc(part) for part in parts]
    if not is_id and all(dtype.is_numeric() or dtype.is_nested() for dtype in dtypes):
        return parts
    texts = [
        part if part.dtype == pl.Null
        else canonical_ids(part if is_id or part.dtype != pl.Datetime else _in_utc(part))
        for part in parts
    ]  # fmt: skip
    same = len({text.dtype for text in texts if text.dtype != pl.Null}) == 1
    return texts if same else [text.cast(pl.String) for text in texts]


def _in_utc(times: pl.Series) -> pl.Series:
    """Return dates and times as times in UTC; times without a zone are taken as UTC."""
    if times.dtype == pl.Datetime and times.dtype.time_zone is not None:  # type: ignore[attr-defined]  # Datetime has it
        return times.cast(pl.Datetime("us", "UTC"))
    return times.cast(pl.Datetime("us")).dt.replace_time_zone("UTC")


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
"""Position and bytes that identify a file's format, its name, and the advice."""


def _place_of(source: str | os.PathLike[str]) -> Path:
    """Return the path of a table.

    Raises:
        DataError: It is not a path but an address of a database or the web.
    """
    text = os.fspath(source)
    if "://" in text:  # the rest may contain a password
        raise DataError(
            f"{text.split('://')[0]}:// is not a path: read it with pandas, Polars or DuckDB, and "
            "give the table",
            name="files",
            value=text,
        )
    if "\x00" in text:
        raise DataError(f"{text!r} is not a path", name="files", value=text)
    return Path(text)


def _first_bytes(path: Path) -> bytes:
    """Return the first bytes of a file that may be a table.

    Raises:
        DataError: It cannot be read, is empty, or has another format.
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


def _open_file(
    source: str | os.PathLike[str],
    *,
    separator: str | None,
    header: bool,
    encoding: str | None,
    missing: tuple[str, ...],
) -> Source:
    path = _place_of(source)
    if path.is_dir():
        return _open_folder(path, missing)
    magic = _first_bytes(path)
    suffix = path.suffix.lower()
    if magic[:4] == b"PAR1" or suffix in (".parquet", ".pq"):
        return _open_parquet(path, missing)
    if magic[:6] == b"ARROW1" or suffix in (".arrow", ".feather", ".ipc"):
        return _scan(str(path), pl.scan_ipc(path), missing)
    return _text(
        open_text(path, separator=separator, header=header, encoding=encoding, missing=missing)
    )


def _open_folder(path: Path, missing: tuple[str, ...]) -> Source:
    """Open the Parquet files of a folder; its subfolders may be values such as `day=2024-05-01`."""
    if (path / "_delta_log").is_dir() or (path / "metadata").is_dir():
        raise DataError(
            f"{path} is a Delta or Iceberg table: read it with polars.scan_delta or scan_iceberg, "
            "and give the result",
            name=str(path),
        )
    if (path / "manifest.json").is_file():
        raise DataError(
            f"{path} is an event store or a bundle: open it with open_store or load",
            name=str(path),
        )
    if any(path.glob("**/*.parquet")):
        lazy = pl.scan_parquet(path / "**/*.parquet", hive_partitioning=True)
        return _scan(str(path), lazy, missing)
    names = sorted(str(file) for file in path.iterdir() if file.is_file())[:2]
    raise DataError(
        f"{path} is a folder: give its files as a list, such as {[*names, '…']}", name=str(path)
    )


def _open_parquet(path: Path, missing: tuple[str, ...]) -> Source:
    """Open a Parquet file with Polars, or with Arrow if Polars lacks the type of a column."""
    try:
        return _scan(str(path), pl.scan_parquet(path), missing)
    except DataError as error:
        try:
            file = pq.ParquetFile(path)
            batches = pa.RecordBatchReader.from_batches(file.schema_arrow, file.iter_batches())
        except BROKEN:
            raise error from None
        return _stream(str(path), batches, missing)


def _each_once(source: Source, columns: list[str]) -> None:
    for name in columns:
        if columns.count(name) > 1:
            raise DataError(
                f"{source.name} has more than one column {name!r}: rename them", column=name
            )


def _typed(
    name: str,
    columns: list[str],
    load: Callable[[list[str]], pl.DataFrame],
    missing: tuple[str, ...],
) -> Source:
    """Return a source whose columns have types; `load` reads some of them."""

    def fetch(wanted: list[str], ids: Any, numbers: Any, optional: Any) -> Table:
        return _gathered(name, wanted, load, missing, optional)

    return Source(name=name, columns=columns, fetch=fetch)


def _gathered(
    name: str,
    columns: list[str],
    load: Callable[[list[str]], pl.DataFrame],
    missing: tuple[str, ...],
    optional: Collection[str],
) -> Table:
    """Load columns; raise an error that names a failing one, or leave it out if optional."""
    left_out: list[str] = []
    try:
        frame = load(columns)
    except BROKEN:
        parts = []
        for column in columns:
            try:
                parts.append(load([column]))
            except BROKEN as error:
                if column not in optional:
                    raise DataError(
                        f"{name}: column {column!r} cannot be read: its type is unknown here, "
                        "or the file is broken or cut short; cast it to text or numbers, leave "
                        "the column out, or get the file again",
                        column=column,
                    ) from error
                left_out.append(
                    f"{name}: column {column!r} was left out: its type cannot be read here"
                )
        frame = pl.concat(parts, how="horizontal")
    frame, notes = without_markers(without_extensions(frame), missing)
    return Table(frame, (*left_out, *notes))


def _with_index(frame: Any) -> Any:
    """Return a pandas frame with the named levels of its index as its last columns."""
    named = [name for name in frame.index.names if name is not None and name not in frame.columns]
    if not named:
        return frame
    last = [*range(len(named), len(named) + frame.shape[1]), *range(len(named))]
    return frame.reset_index(level=named).iloc[:, last]


def _quietly(name: str, work: Callable[[], _T]) -> _T:
    """Call Polars or Arrow and convert their errors to ours."""
    try:
        return work()
    except BROKEN as error:
        raise DataError(
            f"{name} cannot be read: if it is a file, it is broken or cut short, get it again; if "
            "it is a table or a query, it fails before it returns rows",
            name=name,
        ) from error
