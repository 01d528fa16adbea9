"""Lists for a file of users, into a Parquet file."""

from pathlib import Path

import polars as pl

from foretaste.arguments import checked
from foretaste.errors import DataError
from foretaste.serving.recommender import Recommender
from foretaste.serving.rules import NO_RULES, Rules


@checked
def write_lists(
    recommender: Recommender,
    users: Path,
    out: Path,
    *,
    k: int = 10,
    exclude_seen: bool = True,
    rules: Rules = NO_RULES,
) -> dict[str, int]:
    """Write each user's k best items; the file is written whole or not at all.

    Args:
        recommender: Users whom training never saw are answered by what its table of users says of
            them, or by its most popular items; their `source` says so.
        users: Parquet with a column `user_id`, or text with one id a line.
        out: The Parquet file: `user_id`, `source`, and the lists `item_id` and `score`.
        k: Length of the lists.
        exclude_seen: Leave out what a user had.
        rules: Filters on attributes, caps on categories, diversity, for every list.

    Returns:
        How many `users` there were, and how many of them training never saw (`unknown`).

    Raises:
        DataError: The file of users cannot be read or is empty, the other not written, or rules
            name a column that is not there or not of their kind.
    """
    lists = recommender.recommend_many(
        _read_users(users), k=k, exclude_seen=exclude_seen, rules=rules
    )
    half = out.with_name(f"{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lists.write_parquet(half)
        half.replace(out)
    except OSError as error:
        half.unlink(missing_ok=True)
        raise DataError(f"{out} cannot be written: {error.strerror or error}") from error
    return {"users": len(lists), "unknown": int((lists["source"] != "model").sum())}


def _read_users(file: Path) -> list[object]:
    try:
        if file.suffix == ".parquet":
            table = pl.read_parquet(file)
            if "user_id" not in table.columns:
                raise DataError(f"{file} has no column user_id, but {', '.join(table.columns)}")
            ids: list[object] = table["user_id"].to_list()
        else:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
            ids = [line.strip() for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError, pl.exceptions.PolarsError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"the users in {file} cannot be read: {reason}") from error
    if not ids:
        raise DataError(f"{file} holds no user id: write one a line")
    return ids
