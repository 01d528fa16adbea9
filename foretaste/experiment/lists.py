"""Writes lists for a file of users into a file."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import polars as pl

from foretaste.arguments import checked
from foretaste.data.folder import check_place, reason_of, whole_file
from foretaste.data.tables import Source, open_source
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import DataError
from foretaste.serving.recommender import Recommender
from foretaste.serving.rules import NO_RULES, Rules

USER_COLUMN = "user_id"
_NO_SEPARATOR = "\x1f"
_NAME_OF_USERS = re.compile(
    r"\D*(user|customer|client|member|visitor|account|session|email|_id\b| id\b|Id\b|ID\b)\D*|id",
    re.IGNORECASE,
)
"""A word that is more likely the name of a column than an id."""


@checked
def write_lists(
    recommender: Recommender,
    users: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    k: int = 10,
    exclude_seen: bool = True,
    rules: Rules = NO_RULES,
    replace: bool = False,
) -> dict[str, object]:
    """Write each user's k best items into a file, atomically.

    Args:
        recommender: The recommender. Unknown users get lists by their features in its table of
            users, or the most popular items; `source` shows which.
        users: A file in a format of `read_interactions`. The ids are its column `user_id`, or the
            user column of the recipe, or else the first column with a known user. A text file needs
            no header: its first line is a header if it is such a name or similar to one
            (`customer_email`), or if it is not a whole number although the training ids and all
            lines below are. A repeated user has one list.
        out: The file, whose suffix decides the format. `.parquet`, `.json` and `.jsonl`: a row per
            user with `user_id`, `source`, and the lists `item_id` and `score`. `.csv`: a row per
            item with `user_id`, `source`, `rank`, `item_id` and `score`; a user without items has
            one row without a rank.
        k: Length of the lists.
        exclude_seen: Leave out items that a user already had.
        rules: Filters on attributes, caps on categories, diversity, for every list.
        replace: Replace an existing file.

    Returns:
        The numbers of `users`, of `unknown` users, and of rows without a user id, which are left
        out (`missing`); and `notes` on assumptions.

    Raises:
        DataError: `out` has another suffix, exists while `replace` is false, or cannot be written;
            the file of users cannot be read or has no id; or rules name a column that does not
            exist or has another type.
    """
    write = _writer(Path(out))
    check_place(out, replace=replace)
    ids, notes = _read_users(Path(users), recommender)
    known = ids.drop_nulls().unique(maintain_order=True)
    repeats = len(ids) - ids.null_count() - len(known)
    if repeats:
        notes.append(f"{repeats:,} rows repeat a user: there is one list for each")
    if not len(known):
        raise DataError(
            f"{users} holds no user id: write one per line", name="users", value=str(users)
        )
    lists = recommender.recommend_many(known, k=k, exclude_seen=exclude_seen, rules=rules)
    with whole_file(out, replace=replace) as part:
        write(lists, part)
    unknown = int((lists["source"] != "model").sum())
    counts = {"users": len(lists), "unknown": unknown, "missing": ids.null_count()}
    return counts | {"notes": notes}


def _writer(out: Path) -> Callable[[pl.DataFrame, Path], object]:
    writers: dict[str, Callable[[pl.DataFrame, Path], object]] = {
        ".parquet": pl.DataFrame.write_parquet,
        ".csv": lambda lists, path: _by_item(lists).write_csv(path),
        ".json": lambda lists, path: path.write_text(lists.write_json(), encoding="utf-8"),
        ".jsonl": lambda lists, path: path.write_text(lists.write_ndjson(), encoding="utf-8"),
    }
    if out.suffix.lower() not in writers:
        raise DataError(
            f"{out} ends in {out.suffix or 'no suffix'!r}: name a file that ends in "
            f"{', '.join(writers)}, which decides what is written",
            name="out",
            value=str(out),
        )
    return writers[out.suffix.lower()]


def _by_item(lists: pl.DataFrame) -> pl.DataFrame:
    rank = pl.int_ranges(1, pl.col("item_id").list.len() + 1).alias("rank")
    columns = ("user_id", "source", "rank", "item_id", "score")
    return lists.with_columns(rank).select(columns).explode("rank", "item_id", "score")


def _read_users(file: Path, recommender: Recommender) -> tuple[pl.Series, list[str]]:
    """Return the ids, with nulls for missing ones, and notes on assumptions."""
    trained = recommender.trained
    names = {USER_COLUMN, _column_of_training(trained.settings)}
    separator = _separator(file, trained.events.users)
    known = trained.events.users
    whole = open_source(file, separator=separator, header=False, role="the users")
    column, notes = _column_of_users(whole, names, known)
    ids, read = _ids(whole, column)
    if whole.columns[0] != "0":  # this format has column names
        return ids, [*notes, *read]
    if len(ids) < 2 or not _is_header(ids[0], ids[1:], known, names):
        return ids, [*notes, *read]
    named = open_source(file, separator=separator, role="the users")
    by_place = named.columns[whole.columns.index(column)]
    column = next((name for name in named.columns if name in names), by_place)
    ids, read = _ids(named, column)
    said = f"the first line of {file} was read as a header: {column!r} are the users"
    return ids, [*read, said]


def _column_of_users(
    source: Source, names: set[object], users: Vocabulary
) -> tuple[str, list[str]]:
    """Return the column of this name, or the first with a known user, and a note."""
    first = source.columns[0]
    named = next((name for name in source.columns if name in names), None)
    if named is not None or len(source.columns) == 1:
        return named or first, []
    columns = {name: _ids_or_none(source, name) for name in source.columns}
    for name, ids in columns.items():
        if len(ids) and ids[0] in names:  # the header of a text file
            return name, []
    for name, ids in columns.items():
        if (users.encode(ids.drop_nulls()) >= 0).any():
            where = f"column {name!r} of {source.name} holds the users"
            return name, [] if name == first else [f"{where}: the columns before it hold none"]
    raise DataError(
        f"no column of {source.name} holds a user of the training data: name the column of user "
        f"ids {USER_COLUMN!r}",
        name="users",
        value=source.name,
    )


def _ids_or_none(source: Source, column: str) -> pl.Series:
    """Return a column of ids; empty if it has another type."""
    try:
        ids, _ = _ids(source, column)
    except DataError:  # an unreadable column, which is not needed
        return pl.Series(column, [], dtype=pl.String)
    return (
        ids
        if ids.dtype == pl.String or ids.dtype.is_numeric()
        else pl.Series(column, [], dtype=pl.String)
    )


def _separator(file: Path, users: Vocabulary) -> str | None:
    """Return a separator that no id contains if each line is one id; None: detect it."""
    try:
        with file.open("rb") as lines:
            line = lines.readline(1 << 16).decode("utf-8", "replace").strip()
    except OSError as error:
        raise DataError(
            f"the users in {file} cannot be read: {reason_of(error)}", name="users", value=str(file)
        ) from error
    is_one = users.find(line) >= 0 or not any(mark in line for mark in ("::", *"\t,;|"))
    return _NO_SEPARATOR if is_one else None


def _ids(source: Source, column: str) -> tuple[pl.Series, list[str]]:
    frame, notes = source.read([column], [column])
    ids = frame[column]
    if ids.dtype == pl.String:
        ids = ids.str.strip_chars().replace("", None)
    return ids, list(notes)


def _column_of_training(settings: Mapping[str, object]) -> object:
    """Return the name of the user column in the recipe's events."""
    data = settings.get("data")
    return data.get("user") if isinstance(data, Mapping) else None


def _is_header(first: object, rest: pl.Series, users: Vocabulary, names: set[object]) -> bool:
    """Return whether the first value of a column is its name and not an id."""
    if not isinstance(first, str) or users.find(first) >= 0:
        return False
    rest = rest.drop_nulls()
    all_whole = bool(rest.len() and rest.str.contains(r"^-?[0-9]+$").all())
    is_named = first in names or _NAME_OF_USERS.fullmatch(first) is not None
    return is_named or (users.is_integer and all_whole)
