"""Import of files into an event store, one range of users at a time, in bounded memory.

Text is first streamed into Parquet. A first pass counts each user's events and cuts the users, in
the order of their ids, into ranges; then each range is read from the files and sorted like any
table, and the ranges are concatenated.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import polars as pl
from jaxtyping import Shaped
from pydantic import PositiveInt

from foretaste.arguments import settings_as_arguments
from foretaste.data.columns import in_words
from foretaste.data.folder import check_place, whole_folder
from foretaste.data.interactions import Interactions
from foretaste.data.read_config import ReadConfig, ReadTables
from foretaste.data.reading import EVENTS, choose_columns, read_interactions
from foretaste.data.store import fill_files, open_store, write_store
from foretaste.data.tables import BROKEN, Source, open_source
from foretaste.data.vocabulary import number_ids
from foretaste.errors import DataError

T = TypeVar("T")
IN_MEMORY_BYTES = 1 << 28
"""Files with a smaller total size are read as one table."""
_WRITTEN = 1 << 20
_COUNTED = re.compile(r"(\d+) (.+)", re.DOTALL)
_WHOLE = r"^(0|-?[1-9][0-9]*)$"
_CODE = r"^[+-]?0[0-9]"


class ImportConfig(ReadTables):
    """The settings of an import."""

    out: Path
    """The folder of the event store."""
    replace: bool = False
    """An existing store is replaced; a failure leaves it unchanged."""
    block_events: PositiveInt = 1 << 22
    """Number of events that are sorted in memory at a time; a single user may have more."""


@settings_as_arguments(ImportConfig)
def import_events(files: Path | Sequence[Path], read: ImportConfig) -> Interactions:
    """Read files of events into an event store, and open it.

    The result is that of `read_interactions`. CSV and Parquet files of more than 256 MiB are read
    in several passes, with one range of users in memory. Gzipped text is read into memory at once,
    and so is every file if a side table, links, `where` or `positive` is given, or if there is no
    column of users.

    Args:
        files: Text or Parquet files, read in order.
        (settings)

    Raises:
        BundleError: `out` exists and `replace` is false, or the disk is full or refuses.
        DataError: A file is missing, truncated, has another schema than the first, or changed
            during the import; or `read_interactions` would raise an error.
    """
    check_place(read.out, "event store", replace=read.replace)
    files = [files] if isinstance(files, Path) else list(files)
    settings = {name: getattr(read, name) for name in ReadTables.model_fields}
    large = sum(path.stat().st_size for path in files if path.is_file()) >= IN_MEMORY_BYTES
    if not large or not _goes_in_blocks(read):
        events = read_interactions(files, **settings)
        write_store(events, read.out, replace=read.replace)
        return open_store(read.out)
    before = _stamps(files)
    with (
        whole_folder(read.out, "event store", replace=read.replace) as folder,
        TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as spool,
    ):
        lazy, chosen, notes = _opened(files, read, Path(spool))
        parts = []
        for number, some in enumerate(_ranges(lazy, str(chosen.user), read.block_events)):
            part = Path(spool) / f"range-{number}"
            write_store(_arranged(some, chosen), part)
            parts.append(open_store(part))
        for path, stamp in _stamps(files).items():
            if stamp != before[path]:
                raise DataError(
                    f"{path} changed while it was imported: import the files again",
                    name=str(path),
                    value=str(path),
                )
        fill_files(_joined(parts, notes, Path(spool)), folder)
    return open_store(read.out)


def _goes_in_blocks(read: ReadTables) -> bool:
    whole = (read.users, read.items, read.user_links, read.item_links)
    asks_all = bool(read.where or read.positive) or read.user is None
    return not asks_all and all(table is None for table in whole)


def _stamps(files: Sequence[Path]) -> dict[Path, tuple[int, int]]:
    """Return size and time of each file, to detect changes; the reader reports missing files."""
    found = {path: path.stat() for path in files if path.exists()}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def _opened(
    files: Sequence[Path], read: ReadConfig, spool: Path
) -> tuple[pl.LazyFrame, ReadConfig, list[str]]:
    """Return a scan of the columns of all files, the settings to read it with, and notes."""
    scans, notes, is_text = [], list[str](), False
    for number, path in enumerate(files):
        source = open_source(
            path,
            separator=read.separator,
            header=read.header,
            encoding=read.encoding,
            missing=read.missing,
        )
        names = choose_columns(source, read)
        lazy = _scanned(source, names.all)
        if source.is_text:
            copy = spool / f"text-{number}.parquet"
            _run(path.name, partial(lazy.sink_parquet, copy), source.explain)
            lazy, is_text, notes = pl.scan_parquet(copy), True, [*notes, *source.notes]
        scans.append(lazy)
        _check_alike(files[0], scans[0], path, lazy)
    lazy = pl.concat(scans)
    if is_text:
        lazy = _typed(lazy, names.ids, read.missing)
    chosen = read.model_copy(
        update={
            "user": names.user,
            "item": names.item,
            "timestamp": names.timestamp,
            "rating": names.numbers.get("rating") if read.rating is not None else None,
            "columns": tuple(n for n in names.numbers if n != "rating" or read.rating is None),
            "context": names.context,
        }
    )
    return lazy, chosen, notes


def _scanned(source: Source, columns: list[str]) -> pl.LazyFrame:
    if source.scan is None:
        raise DataError(
            f"{source.name} cannot be read in blocks: write it again as Parquet", name=source.name
        )
    return source.scan(columns)


def _run(name: str, work: Callable[[], T], explain: Callable[[], str] | None = None) -> T:
    """Call Polars and convert its errors to ours."""
    try:
        return work()
    except BROKEN as error:
        said = f"{name} cannot be read: it is broken or cut short, or there is no room beside it"
        raise DataError(explain() if explain else said, name=name) from error


def _collected(lazy: pl.LazyFrame) -> pl.DataFrame:
    def collect() -> pl.DataFrame:
        return lazy.collect(engine="streaming")

    return _run(EVENTS, collect)


def _check_alike(first: Path, expected: pl.LazyFrame, path: Path, lazy: pl.LazyFrame) -> None:
    wanted, found = expected.collect_schema(), lazy.collect_schema()
    for name, dtype in wanted.items():
        if found[name] != dtype:
            there, here = (in_words(pl.Series(dtype=kind)) for kind in (dtype, found[name]))
            raise DataError(
                f"{path}: column {name!r} holds {here}, and {there} in {first}: write all files "
                "with one schema",
                name=str(path),
                column=name,
                value=str(found[name]),
            )


def _typed(lazy: pl.LazyFrame, ids: list[str], missing: Sequence[str]) -> pl.LazyFrame:
    """Give text columns the types that the complete files determine."""
    markers = list({padded for text in missing for padded in (text, " " + text, text + " ")})
    lazy = lazy.select(
        pl.when(~pl.all().is_in(markers)).then(pl.all()).name.keep()  # a missing id is null
    )
    tests: dict[str, pl.Expr] = {}
    names = lazy.collect_schema().names()
    for name in names:
        text = pl.col(name)
        bare = text if name in ids else text.str.strip_chars()
        whole = bare.cast(pl.Int64, strict=False).is_not_null() | text.is_null()
        if name in ids:
            tests[f"Int64 {name}"] = whole.all() & text.str.contains(_WHOLE).all()
        else:
            code = ~text.str.contains(_CODE).any()
            tests[f"Int64 {name}"] = whole.all() & code
            number = bare.cast(pl.Float64, strict=False).is_not_null() | text.is_null()
            tests[f"Float64 {name}"] = number.all() & code
    holds = _collected(lazy.select(**tests)).row(0, named=True)
    casts = []
    for name in names:
        bare = pl.col(name) if name in ids else pl.col(name).str.strip_chars()
        for dtype in (pl.Int64, pl.Float64):
            if holds.get(f"{dtype} {name}"):
                casts.append(bare.cast(dtype))
                break
        else:
            casts.append(pl.col(name))
    return lazy.select(casts)


def _ranges(lazy: pl.LazyFrame, user: str, block_events: int) -> Iterator[pl.DataFrame]:
    """Yield the rows of ranges of users of similar size, in the order of the files."""
    counted = lazy.group_by(user).agg(pl.len().alias("events")).sort(user, nulls_last=False)
    count = _collected(counted)
    kinds = (pl.String, pl.Int64, pl.Int32, pl.Int16, pl.Int8)
    if (dtype := count.schema[user]) not in (*kinds, pl.UInt32, pl.UInt16, pl.UInt8):
        raise DataError(
            f"column {user!r} holds {in_words(count[user])}: so many events are imported by ranges "
            "of ids, which are texts or integers; cast the column",
            column=user,
            value=str(dtype),
        )
    unknown = int(count.filter(pl.col(user).is_null())["events"].sum())
    count = count.drop_nulls()
    number_U = (count["events"].cum_sum() - count["events"]).to_numpy() // block_events
    first_R = np.flatnonzero(np.diff(number_U, prepend=-1))
    for place, first in enumerate(first_R.tolist()):
        last = int(first_R[place + 1]) - 1 if place + 1 < len(first_R) else len(count) - 1
        low, high = pl.lit(count[user][first], dtype), pl.lit(count[user][last], dtype)
        here = pl.col(user).is_between(low, high)
        if unknown and not place:
            here |= pl.col(user).is_null()
        yield _collected(lazy.filter(here))


def _arranged(some: pl.DataFrame, read: ReadConfig) -> Interactions:
    settings = {name: getattr(read, name) for name in ReadConfig.model_fields}
    try:
        return read_interactions(some, **settings)
    except DataError as error:
        if error.row is not None:
            error.args = (f"{error} (rows are counted among those of a range of users)",)
        raise


def _joined(parts: list[Interactions], notes: list[str], spool: Path) -> Interactions:
    """Concatenate ranges of users, under one vocabulary of items."""
    users, row_U = number_ids(pl.concat([part.users.ids for part in parts]))
    if not np.array_equal(row_U, np.arange(len(users))):
        raise DataError(
            "two ids of users that differ in the files are one id here: write ids in one way",
            name="user",
        )
    items, row_J = number_ids(pl.concat([part.items.ids for part in parts]))
    item_of = np.split(row_J, np.cumsum([len(part.items) for part in parts])[:-1])
    first = np.cumsum([0, *(len(part) for part in parts)])
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, first, strict=False)]
    items_by_block = (
        row_I[block]
        for part, row_I in zip(parts, item_of, strict=True)
        for block in _blocks(part.item_idx)
    )
    times = [part.timestamp_s for part in parts if part.timestamp_s is not None]
    contexts = [part.context for part in parts if part.context is not None]
    return replace(
        parts[0],
        users=users,
        items=items,
        offsets=np.concatenate([*offsets, first[-1:]]),
        item_idx=_mapped(spool / "items", items_by_block, np.int32),
        timestamp_s=None if len(times) < len(parts) else _one(spool / "times", times),
        columns={
            name: _one(spool / f"column-{number}", [part.columns[name] for part in parts])
            for number, name in enumerate(parts[0].columns)
        },
        context=pl.concat(contexts, how="vertical_relaxed") if contexts else None,
        notes=(*notes, *_added(parts)),
    )


def _blocks(array: Shaped[np.ndarray, " E"]) -> Iterator[Shaped[np.ndarray, " e"]]:
    for start in range(0, len(array), _WRITTEN):
        yield array[start : start + _WRITTEN]


def _one(path: Path, arrays: list[np.ndarray]) -> Shaped[np.ndarray, " E"]:
    """Concatenate arrays in a file, and map it."""
    kind = np.result_type(*arrays)
    return _mapped(path, (block for array in arrays for block in _blocks(array)), kind)


def _mapped(
    path: Path, blocks: Iterator[np.ndarray], kind: np.dtype | type
) -> Shaped[np.ndarray, " E"]:
    with path.open("xb") as file:
        for block in blocks:
            file.write(np.ascontiguousarray(block, kind).data)
    return np.asarray(np.memmap(path, kind, "r"))


def _added(parts: list[Interactions]) -> list[str]:
    """Return the notes of all ranges, with equal notes merged and their counts added."""
    total: dict[str, int | None] = {}
    for note in (note for part in parts for note in part.notes):
        counted = _COUNTED.fullmatch(note)
        if counted is None:
            total.setdefault(note, None)
        else:
            total[counted[2]] = (total.get(counted[2]) or 0) + int(counted[1])
    return [said if count is None else f"{count} {said}" for said, count in total.items()]
