"""Tables in text files: CSV and its kin, any separator, with or without a header, gzipped or not.

Fields may be quoted as in RFC 4180, with separators, quotes and line ends inside, unless the
separator is longer than one character.
"""

import csv
import gzip
import io
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, final

import polars as pl

from foretaste.errors import DataError

_GZIP = b"\x1f\x8b"
_UNIT_SEPARATOR = "\x1f"
_HEAD_ROWS = 10_000
_INTEGER = r"^-?(0|[1-9][0-9]*)$"
_Kind = Literal["integer", "float", "text"]
_PATTERNS: dict[_Kind, str] = {"integer": _INTEGER, "float": r"^-?(0|[1-9][0-9]*)\.0*$"}
_DTYPES = {"integer": pl.Int64, "float": pl.Float64, "text": pl.String}


class TextTable(NamedTuple):
    """What was read of a text file."""

    frame: pl.DataFrame
    notes: tuple[str, ...]


@final
@dataclass(frozen=True, kw_only=True)
class TextFile:
    """An open text file, its columns known and its head looked at.

    A column of ids is taken as integers where the head holds nothing but plain ones (no leading
    zeros, no plus sign) and every later value is one too, as text otherwise. Of other columns,
    digits with leading zeros, as in a postal code, stay text.
    """

    name: str
    data: Path | bytes
    separator: str
    header: bool
    head: pl.DataFrame
    notes: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """Names from the header, or "0", "1", … by position."""
        found = self.head.columns
        return found if self.header else [str(position) for position in range(len(found))]

    def read(self, columns: list[str], ids: list[str]) -> "TextTable":
        """Return some of the columns, those of `ids` typed as ids.

        Raises:
            DataError: The file cannot be parsed.
        """
        kinds = {name: _id_kind(self.head[self._inner[name]]) for name in ids}
        others = [name for name in columns if name not in ids]
        kinds |= {name: "text" for name in others if _is_code(self.head[self._inner[name]])}
        try:
            return TextTable(self._scan(kinds, _HEAD_ROWS, columns), self.notes)
        except pl.exceptions.PolarsError:
            # A value later in the file is not what the head promised: take all as text.
            file = in_utf8(self)
        try:
            frame = file._scan(_all_text(columns), None, columns)
        except pl.exceptions.PolarsError as error:
            raise DataError(file.explain(error)) from error
        return TextTable(
            frame.with_columns(_narrowed(frame[name], is_id=name in ids) for name in columns),
            file.notes,
        )

    @property
    def _inner(self) -> dict[str, str]:
        """Polars' name of each column."""
        return dict(zip(self.columns, self.head.columns, strict=True))

    def _scan(
        self,
        kinds: Mapping[str, _Kind],
        infer: int | None,
        columns: list[str],
    ) -> pl.DataFrame:
        inner = self._inner
        scan = pl.scan_csv(
            self.data,
            separator=self.separator,
            quote_char=_quote(self.separator),
            has_header=self.header,
            schema_overrides={inner[name]: _DTYPES[kind] for name, kind in kinds.items()},
            infer_schema_length=infer,
        )
        return scan.select(pl.col(inner[name]).alias(name) for name in columns).collect()

    def explain(self, error: Exception) -> str:
        """Say what is wrong with the file in terms of its lines, as far as one can tell."""
        raw = self.data.read_bytes() if isinstance(self.data, Path) else self.data
        text = io.StringIO(raw.decode("utf-8", "replace"), newline="")
        lines = csv.reader(text, delimiter=self.separator)
        width = None
        try:
            for fields in lines:
                width = len(fields) if width is None else width
                if len(fields) > width:
                    return (
                        f"{self.name}, line {lines.line_num} has {len(fields)} fields, the first "
                        f"line {width}: mend or quote it, or say another separator"
                    )
        except csv.Error as reason:
            return f"{self.name}, line {lines.line_num} cannot be read: {reason}"
        return f"{self.name} cannot be read as a table of text: {str(error).splitlines()[0]}"


def open_text(path: Path, *, separator: str | None, header: bool) -> TextFile:
    """Look at a text file's first lines.

    Args:
        path: Not empty; UTF-8, or Latin-1, which is noted. May be gzipped.
        separator: None finds it in the first line: `::`, tab, the most frequent of `,` `;` `|`,
            or a blank.
        header: Whether the first line names the columns.

    Raises:
        DataError: There is no table in it, or the archive is broken.
    """
    data = _plain(path)
    separator = separator or _sniff(data)
    if len(separator.encode()) > 1:  # Polars wants one byte
        raw = data.read_bytes() if isinstance(data, Path) else data
        data, separator = raw.replace(separator.encode(), _UNIT_SEPARATOR.encode()), _UNIT_SEPARATOR
    file = TextFile(
        name=str(path), data=data, separator=separator, header=header, head=pl.DataFrame()
    )
    try:
        return _with_head(file)
    except pl.exceptions.NoDataError as error:
        raise DataError(f"{path} is empty: it holds no table") from error
    except pl.exceptions.PolarsError:
        file = in_utf8(file)
    try:
        return _with_head(file)
    except pl.exceptions.PolarsError as error:
        raise DataError(file.explain(error)) from error


def in_utf8(file: TextFile) -> TextFile:
    """Return the file itself where it is UTF-8, else its bytes taken for Latin-1, and say so."""
    raw = file.data.read_bytes() if isinstance(file.data, Path) else file.data
    try:
        raw.decode()
    except UnicodeDecodeError:
        note = f"{file.name} is not UTF-8: it was read as Latin-1"
        return replace(file, data=raw.decode("latin-1").encode(), notes=(*file.notes, note))
    return file


def _with_head(file: TextFile) -> TextFile:
    head = pl.read_csv(
        file.data,
        separator=file.separator,
        quote_char=_quote(file.separator),
        has_header=file.header,
        infer_schema=False,
        n_rows=_HEAD_ROWS,
    )
    return replace(file, head=head)


def _plain(path: Path) -> Path | bytes:
    """Return the path, or the bytes of a file that Polars cannot read as it lies on disk."""
    with path.open("rb") as file:
        zipped = file.read(2) == _GZIP
    try:
        raw: Path | bytes = gzip.decompress(path.read_bytes()) if zipped else path
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is a broken gzip file: get it anew ({error})") from error
    if raw == b"":
        raise DataError(f"{path} is empty: it holds no table")
    return raw


def _sniff(data: Path | bytes) -> str:
    with data.open("rb") if isinstance(data, Path) else io.BytesIO(data) as file:
        line = file.readline(1 << 20).decode("utf-8", "replace")
    for sure in ("::", "\t"):
        if sure in line:
            return sure
    likely = max((",", ";", "|"), key=line.count)
    if likely in line:
        return likely
    return " " if " " in line.strip() else ","


def _quote(separator: str) -> str | None:
    return None if separator == _UNIT_SEPARATOR else '"'


def _all_text(columns: list[str]) -> dict[str, _Kind]:
    return dict.fromkeys(columns, "text")


def _id_kind(head: pl.Series) -> _Kind:
    for kind, pattern in _PATTERNS.items():
        if head.str.contains(pattern).all():  # nulls pass
            return kind
    return "text"


def _is_code(text: pl.Series) -> bool:
    """Return whether leading zeros mean something, as in a postal code: no number keeps them."""
    return bool(text.str.contains(r"^[+-]?0[0-9]").any())


def _narrowed(text: pl.Series, *, is_id: bool) -> pl.Series:
    """Return text as integers if all of it is such, or, unless it is of ids, as other numbers."""
    kinds = (pl.Int64,) if is_id else (pl.Int64, pl.Float64)
    if (is_id and not text.str.contains(_INTEGER).all()) or _is_code(text):
        return text
    for dtype in kinds:
        numbers = text.cast(dtype, strict=False)
        if numbers.null_count() == text.null_count():
            return numbers
    return text
