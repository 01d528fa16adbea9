"""Which of several models to take, and why: the sentence under the table."""

from collections.abc import Sequence

from foretaste.experiment.compare_table import ModelRow, difference, label

WORTH = 0.1
"""A model is as good as the best if it is behind by less than this share of what the best gains
over chance."""
FEWEST_USERS = 6
"""Of 5 users, all have the same sign of difference by luck alone in 2 of 32 cases: with fewer than
6 no paired test comes below .05."""


def choose(rows: Sequence[ModelRow], metric: str, *, users: int, chance: float) -> tuple[str, str]:
    """Return the name of the model to take, and the sentence that says why.

    It is the best, unless one that trains faster is as good: its paired interval holds 0 and ends
    below `WORTH` of what the best gains over chance. Where luck may explain that a model is behind,
    and the interval reaches further, there are too few users to say: the best figure stays the
    advice.

    Args:
        rows: Best first.
        metric: The leading one.
        users: How many were measured.
        chance: The leading figure of a model that knows nothing.
    """
    best, others = rows[0], rows[1:]
    margin = WORTH * abs(best.quality - chance)
    tied = [row for row in others if row.ties_with_the_best]
    unsure = [row for row in tied if _reach(row, users) > margin]
    faster = [row for row in tied if row.train_seconds < best.train_seconds]
    if unsure:
        pick, sentence = best, _too_few(best, unsure, metric, users=users, margin=margin)
    elif faster:
        pick = min(faster, key=lambda row: row.train_seconds)
        sentence = (
            f"Take {pick.name}: its {label(metric)} of {pick.quality:.4f} is as good as the "
            f"{best.quality:.4f} of {best.name}, the best (behind by {_behind(pick)}; less than "
            f"{margin:.2g}, a tenth of what {best.name} gains over chance, makes no difference), "
            f"and it trains in {pick.train_seconds:.2f} s instead of {best.train_seconds:.2f} s."
        )
    else:
        pick = best
        sentence = f"Take {pick.name}: its {label(metric)} "
        if others:
            next_one = f"{others[0].name} comes next, behind by {_behind(others[0])}"
            sentence += f"of {best.quality:.4f} is the best; {next_one}."
        else:
            sentence += f"is {best.quality:.4f}, and there is no other model to compare it with."
    return pick.name, sentence + _cut_short(rows)


def _reach(row: ModelRow, users: int) -> float:
    """Return how far the model may be behind: by its interval, and by what luck may have hidden.

    If none of U users shows a difference, up to 3 in U may still have one (the rule of three), of
    1 at most.
    """
    high = 0.0 if row.behind is None else row.behind.interval.high
    return max(high, 3 / users)


def _too_few(
    best: ModelRow, unsure: Sequence[ModelRow], metric: str, *, users: int, margin: float
) -> str:
    """Say which models cannot be told from the best, and how many users it would take."""
    names = ", ".join(row.name for row in unsure)
    far = max(unsure, key=lambda row: row.behind.difference if row.behind else 0.0)
    seen = max(3 / users, *(_half(row) for row in unsure))
    needed = max(_users_needed(row, users=users, margin=margin) for row in unsure)
    return (
        f"Too few users to say which is best: on {users:,} test "
        f"{'user' if users == 1 else 'users'} luck may explain that {names} "
        f"{'is' if len(unsure) == 1 else 'are'} behind {best.name} ({far.name} by {_behind(far)}); "
        f"differences below about {seen:.2g} do not show. Stay with {best.name}, whose "
        f"{label(metric)} of {best.quality:.4f} is the best figure, or measure about "
        f"{needed:,} users."
    )


def _half(row: ModelRow) -> float:
    """Return half the width of the interval: a smaller difference does not show."""
    return 0.0 if row.behind is None else (row.behind.interval.high - row.behind.interval.low) / 2


def _users_needed(row: ModelRow, *, users: int, margin: float) -> int:
    """Return about how many users would tell the model from the best, or show that it is as good.

    Widths fall with the root of the number of users; the figure is rounded to two digits.
    """
    wanted = max(margin, row.behind.difference if row.behind else 0.0, 1e-4)
    needed = max(users * (_half(row) / wanted) ** 2, 3 / wanted, users + 1, FEWEST_USERS)
    return int(float(f"{needed:.2g}"))


def _cut_short(rows: Sequence[ModelRow]) -> str:
    cut = [row.name for row in rows if row.stopped]
    if not cut:
        return ""
    return (
        f" More time could change this: the budget cut {', '.join(cut)} short, and what "
        f"{'it' if len(cut) == 1 else 'they'} could reach is not known."
    )


def _behind(row: ModelRow) -> str:
    return "0" if row.behind is None else difference(row.behind)
