r"""Tables in text files: CSV and similar formats, any separator, optional header, optional gzip.

Fields may be quoted as in RFC 4180, with separators, quotes and line ends inside, unless the
separator is longer than one character. Lines before the table that start with `#` or `%`, and the
line `sep=;` of spreadsheets, are not part of it.
"""

import codecs
import csv
import gzip
import io
import re
import zlib
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import NamedTuple, final

import polars as pl

from foretaste.data.columns import ids_of_text, narrowed, plain_integers, without_markers
from foretaste.data.read_config import MISSING
from foretaste.errors import ConfigError, DataError

_GZIP = b"\x1f\x8b"
_UNIT_SEPARATOR = "\x1f"
_BLANKS = " +"
"""Runs of blanks and tabs as one separator; a line may also begin with a run."""
_WRITTEN = {"\\t": "\t", "tab": "\t", "\\s+": _BLANKS, _BLANKS: _BLANKS}
_LOOK_BYTES, _LOOK_ROWS = 1 << 16, 10_000
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_OTHER_TEXT = (
    (r"\{|\[\s*[\[{\n]", "JSON", "read it with pandas or Polars, and give the table"),
    (r"(?i)<!doctype|<html|<\?xml", "a web page or XML", "get the file itself"),
    (r"%%MatrixMarket", "a matrix", "write its rows, columns and values as CSV"),
)
_FOREIGN = re.compile(rb"[\x80-\xff]{4}")


class TextTable(NamedTuple):
    """The content of a text file."""

    frame: pl.DataFrame
    notes: tuple[str, ...]


@final
@dataclass(frozen=True, kw_only=True)
class TextFile:
    """An open text file, whose columns are known.

    A column of ids becomes integers if every value is a plain integer (no leading zeros, no plus
    sign; all may end in `.0`), and text otherwise. In other columns, digits with leading zeros, as
    in a postal code, stay text.
    """

    name: str
    data: Path | bytes
    separator: str
    header: bool
    encoding: str | None
    missing: Collection[str]
    num_skipped: int
    """Lines before the table."""
    names: Sequence[str] | None = None
    """Column names in a comment before the table, if there is one."""
    columns: Sequence[str] = ()
    """Names from the header, or "0", "1", … by position."""
    inner: Sequence[str] = ()
    """The parser's names of the columns, which are unique."""
    notes: tuple[str, ...] = ()

    def read(self, columns: list[str], ids: list[str], numbers: Collection[str]) -> TextTable:
        """Return some of the columns; those in `ids` have the type of ids.

        Args:
            columns: The columns to read.
            ids: Which of them hold ids.
            numbers: Which of them hold only numbers, whose spelling does not matter.

        Raises:
            DataError: The file cannot be parsed.
        """
        file = self
        try:
            frame = self.scan(columns, numbers).collect()
        except pl.exceptions.PolarsError:
            # A later value is not a number, or the file is not UTF-8: read all columns as text.
            file = _in_utf8(self)
            try:
                frame = file.scan(columns).collect()
            except pl.exceptions.PolarsError as error:
                raise DataError(file.explain(), name=file.name) from error
        with ThreadPoolExecutor(2) as pool:
            whole = dict(
                zip(ids, pool.map(plain_integers, (frame[name] for name in ids)), strict=True)
            )
        found = {name: column for name, column in whole.items() if column is not None}
        integers, given = without_markers(pl.DataFrame(list(found.values())), file.missing)
        done = {column.name: column for column in integers.iter_columns()}
        if len(done) == len(columns):
            return TextTable(integers.select(columns), (*file.notes, *given))
        rest, notes = without_markers(frame.drop(done), file.missing)
        for column in rest.iter_columns():
            typed = ids_of_text(column) if column.name in ids else narrowed(column)
            done[column.name] = typed
        if any(column.dtype == pl.String for column in done.values()):
            _refuse_backslashes(file)
        return TextTable(
            pl.DataFrame([done[name] for name in columns]), (*file.notes, *given, *notes)
        )

    def scan(self, columns: list[str], numbers: Collection[str] = ()) -> pl.LazyFrame:
        """Return a lazy scan of some columns; all but `numbers` are text."""
        inner = dict(zip(self.columns, self.inner, strict=True))
        scan = pl.scan_csv(
            self.data,
            separator=self.separator,
            quote_char=_quote(self.separator),
            has_header=self.header and self.names is None,
            skip_lines=self.num_skipped,
            schema_overrides={inner[name]: pl.String for name in columns if name not in numbers},
            infer_schema_length=_LOOK_ROWS if numbers else 0,
        )
        return scan.select(pl.col(inner[name]).alias(name) for name in columns)

    def explain(self) -> str:
        """Return an error that names the line, if it is known."""
        text = io.StringIO(_bytes(self.data).decode("utf-8", "replace"), newline="")
        for _ in range(self.num_skipped):
            text.readline()
        if _quote(self.separator):
            lines = csv.reader(text, delimiter=self.separator, strict=True)
        else:
            lines = csv.reader(text, delimiter=self.separator, quoting=csv.QUOTE_NONE)
        width, line = None, self.num_skipped + 1
        try:
            for fields in lines:
                width = len(fields) if width is None else width
                if len(fields) > width:
                    return (
                        f"{self.name}, line {line} has {len(fields)} fields, the first line "
                        f"{width}: fix or quote it, or set another separator"
                    )
                line = self.num_skipped + lines.line_num + 1
        except csv.Error:
            return (
                f"{self.name}, line {line} cannot be read: a quote in it is not closed, or a quote "
                'inside a quoted field is not doubled ("")'
            )
        return (
            f"{self.name} cannot be read as a table of text: set separator= and encoding=, or fix "
            "its quotes"
        )


def open_text(
    path: Path,
    *,
    separator: str | None,
    header: bool,
    encoding: str | None = None,
    missing: Collection[str] = MISSING,
) -> TextFile:
    r"""Open a text file and read its first lines.

    Args:
        path: Not empty. May be gzipped.
        separator: None finds it in the first line: `::`, tab, the most frequent of `,` `;` `|`,
            or blanks. `\t` may be written as two characters, and runs of blanks as ` +` or `\s+`.
        header: Whether the first line names the columns.
        encoding: A codec's name. None: UTF-8, or UTF-16 by the first bytes, or else cp1252, which
            is noted.
        missing: Texts that mean a missing value.

    Raises:
        DataError: It holds no table, or the archive is broken.
        ConfigError: The encoding does not exist, or the separator is invalid.
    """
    data, notes = _line_ends(_plain(path)), list[str]()
    encoding = _encoding_of(data, encoding)
    if encoding is not None:
        data = _line_ends(_decoded(data, encoding, str(path)).encode())
    lines = _first_lines(data, str(path))
    found = _layout(lines, separator, header=header)
    if found.num_comments:
        notes.append(
            f"{path}: the first {found.num_comments} lines, which start with "
            f"{lines[found.num_skipped - 1][:1]!r}, were left out"
        )
    data, separator = _one_byte(data, found.separator)
    file = TextFile(
        name=str(path),
        data=data,
        separator=separator,
        header=header,
        encoding=encoding,
        missing=missing,
        num_skipped=found.num_skipped,
        names=found.names,
        notes=tuple(notes),
    )
    try:
        return _with_columns(file)
    except pl.exceptions.NoDataError as error:
        raise DataError(f"{path} is empty: it holds no table", name=str(path)) from error
    except pl.exceptions.PolarsError:
        file = _in_utf8(file)
    try:
        return _with_columns(file)
    except pl.exceptions.PolarsError as error:
        raise DataError(file.explain(), name=file.name) from error


def _with_columns(file: TextFile) -> TextFile:
    def rows(number: int, *, header: bool) -> pl.DataFrame:
        return pl.read_csv(
            file.data,
            separator=file.separator,
            quote_char=_quote(file.separator),
            has_header=header,
            skip_lines=file.num_skipped,
            infer_schema=False,
            n_rows=number,
        )

    inner = rows(_LOOK_ROWS, header=file.header and file.names is None).columns
    if not file.header:
        return replace(file, columns=[str(position) for position in range(len(inner))], inner=inner)
    names = file.names or [name or "" for name in rows(1, header=False).row(0)]
    return replace(file, columns=names, inner=inner)


# Bytes


def _plain(path: Path) -> Path | bytes:
    """Return the path, or the content of a file that Polars cannot read from disk."""
    with path.open("rb") as file:
        zipped = file.read(2) == _GZIP
    try:
        raw: Path | bytes = gzip.decompress(path.read_bytes()) if zipped else path
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is a broken gzip file: get it again", name=str(path)) from error
    if raw == b"":
        raise DataError(f"{path} is empty: it holds no table", name=str(path))
    return raw


def _bytes(data: Path | bytes) -> bytes:
    return data.read_bytes() if isinstance(data, Path) else data


def _look(data: Path | bytes) -> bytes:
    """Return the first bytes."""
    with data.open("rb") if isinstance(data, Path) else io.BytesIO(data) as file:
        return file.read(_LOOK_BYTES)


def _line_ends(data: Path | bytes) -> Path | bytes:
    """Replace the line ends of old Macs, a lone CR, by LF."""
    look = _look(data)
    lone = b"\r" in look[:-1] and b"\n" not in look and b"\x00" not in look
    return _bytes(data).replace(b"\r", b"\n") if lone else data


def _encoding_of(data: Path | bytes, encoding: str | None) -> str | None:
    """Return the encoding if it is not UTF-8; the first bytes of a file show UTF-16."""
    if encoding is not None:
        try:
            name = codecs.lookup(encoding).name
            _is_text(name)
        except (LookupError, ValueError, TypeError) as error:
            raise ConfigError(
                f"there is no encoding {encoding!r}: set one such as utf-8, utf-16, cp1252, gbk or "
                "shift_jis",
                name="encoding",
                value=encoding,
            ) from error
        return name
    look = _look(data)
    for mark, name in _MARKS.items():
        if look.startswith(mark):
            return name
    even, odd = look[0:200:2], look[1:200:2]
    if even and 2 * odd.count(0) > len(odd) and not even.count(0):
        return "utf-16-le"
    return "utf-16-be" if odd and 2 * even.count(0) > len(even) and not odd.count(0) else None


def _is_text(codec: str) -> None:
    """Raise LookupError for codecs such as base64, which do not decode to text."""
    with suppress(UnicodeError):
        b"a".decode(codec)


def _decoded(data: Path | bytes, encoding: str, name: str) -> str:
    raw = _bytes(data)
    try:
        return raw.decode(encoding).removeprefix("\ufeff")
    except UnicodeError as error:
        start = error.start if isinstance(error, UnicodeDecodeError) else 0
        raise DataError(
            f"{name}, line {1 + raw[:start].count(10)} is not {encoding}: set another encoding",
            name="encoding",
            value=encoding,
        ) from error


def _in_utf8(file: TextFile) -> TextFile:
    """Return the file if it is UTF-8, else its content decoded as cp1252, with a note.

    Raises:
        DataError: It cannot be cp1252, or has runs of letters that no language in cp1252 has.
    """
    raw = _bytes(file.data)
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        wrong = f"{file.name}, line {1 + raw[: error.start].count(10)} is not UTF-8"
        try:
            text = None if _FOREIGN.search(raw) else raw.decode("cp1252")
        except UnicodeDecodeError:
            text = None
        if text is None:
            raise DataError(
                f'{wrong}: set its encoding, such as encoding="cp1252", "gbk", "shift_jis" or '
                '"latin-1"',
                name=file.name,
            ) from error
        note = f"{wrong}: it was read as cp1252, Western European; if that is wrong, set encoding="
        return replace(file, data=text.encode(), notes=(*file.notes, note))
    return file


# Lines


class _Layout(NamedTuple):
    separator: str
    num_skipped: int
    num_comments: int
    names: list[str] | None


def _first_lines(data: Path | bytes, name: str) -> list[str]:
    look = _look(data)
    if b"\x00" in look:
        raise DataError(
            f"{name} is not text, and its format is unknown: give CSV, Parquet or Arrow",
            name=name,
        )
    text = look.decode("utf-8", "replace").removeprefix("\ufeff")
    for pattern, what, fix in _OTHER_TEXT:
        if re.match(pattern, text.lstrip()):
            raise DataError(f"{name} is {what}, not a table of text: {fix}", name=name)
    return text.splitlines() or [""]


def _layout(lines: list[str], separator: str | None, *, header: bool) -> _Layout:
    """Find the separator and the lines before the table."""
    skipped, said = 0, None
    while skipped < len(lines) - 1 and not lines[skipped].strip():
        skipped += 1
    if spreadsheet := re.fullmatch(r'"?sep=(.|\\t)"?', lines[skipped], re.IGNORECASE):
        skipped, said = skipped + 1, spreadsheet[1]
    before = skipped
    while skipped < len(lines) and lines[skipped][:1] in ("#", "%"):
        skipped += 1
    if skipped == len(lines):  # if all lines are such lines, they are ids
        skipped = before
    wanted = separator or said
    found = _written(wanted) if wanted else _sniff(lines[skipped:])
    comments = lines[before:skipped]
    names = _names_in(comments[-1], lines[skipped], found) if header and comments else None
    return _Layout(found, skipped, len(comments) - (names is not None), names)


def _names_in(comment: str, first: str, separator: str) -> list[str] | None:
    """Return column names from a comment if it has as many names as the first line has values."""
    names, values = (_fields(line, separator) for line in (comment.lstrip("#% "), first))
    numbers = [value for value in values if value.strip('"').replace(".", "", 1).isdigit()]
    return [name.strip('"') for name in names] if numbers and len(names) == len(values) else None


def _written(separator: str) -> str:
    """Return a separator, as a caller writes it, in the form that is used here."""
    if any(character in separator for character in '"\r\n'):
        raise ConfigError(
            f"separator cannot be {separator!r}: quotes and line ends have their own meaning",
            name="separator",
            value=separator,
        )
    if re.fullmatch(r"\\x[0-9a-fA-F]{2}", separator):
        return chr(int(separator[2:], 16))
    return _WRITTEN.get(separator, separator)


def _fields(line: str, separator: str) -> list[str]:
    return line.split() if separator == _BLANKS else line.split(separator)


def _sniff(lines: list[str]) -> str:
    line = lines[0]
    for sure in ("::", "\t", "\x01"):
        if sure in line:
            return sure
    likely = max((",", ";", "|"), key=line.count)
    if likely in line:
        return likely
    if " " not in line.strip():
        return ","
    aligned = any("  " in one.rstrip() or one.startswith(" ") for one in lines[:1_000])
    return _BLANKS if aligned else " "


def _one_byte(data: Path | bytes, separator: str) -> tuple[Path | bytes, str]:
    """Replace a longer separator by one of the parser's single bytes."""
    if separator == _BLANKS:
        raw = (
            _bytes(data).removeprefix(codecs.BOM_UTF8).replace(b"\t", b" ").replace(b"\r\n", b"\n")
        )
        while b"  " in raw:
            raw = raw.replace(b"  ", b" ")
        return raw.replace(b"\n ", b"\n").replace(b" \n", b"\n").strip(b" "), " "
    if len(separator.encode()) > 1:
        raw = _bytes(data).replace(separator.encode(), _UNIT_SEPARATOR.encode())
        return raw, _UNIT_SEPARATOR
    return data, separator


def _refuse_backslashes(file: TextFile) -> None:
    """Raise an error for quotes escaped by a backslash, which would be misread."""
    if _quote(file.separator) is None:
        return
    if isinstance(file.data, Path):
        with file.data.open("rb") as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as raw:
            found = _backslashed(raw, file.separator)
    else:
        found = _backslashed(file.data, file.separator)
    if found is not None:
        raise DataError(
            f'{file.name}, line {found} has \\" inside a quoted field: write quotes twice, as ""',
            name=file.name,
        )


def _backslashed(raw: bytes | mmap, separator: str) -> int | None:
    """Return the line of the first quote with a backslash before it, if there is one."""
    if raw.find(b'\\"') < 0:
        return None
    mark = re.escape(separator.encode())
    field = re.search(b"(?:^|[\n" + mark + b'])"[^"\n]*\\\\"[^\r\n' + mark + b"]", raw)
    return None if field is None else 1 + raw[: field.end() - 1].count(b"\n")


def _quote(separator: str) -> str | None:
    return None if separator == _UNIT_SEPARATOR else '"'
