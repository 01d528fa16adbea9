"""Seven ways of cutting events into training, validation and test.

Shape legend: E events, U users, R rows, which are users or items.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import polars as pl
from jaxtyping import Bool, Float64, Int64, UInt8

from foretaste.arguments import checked
from foretaste.config import Seed
from foretaste.data.interactions import Interactions
from foretaste.data.merging import concatenate
from foretaste.data.splits import (
    NEGATIVE,
    TEST,
    TRAIN,
    UNUSED,
    VALIDATION,
    Split,
    SplitKind,
    find_leaks,
)
from foretaste.errors import ConfigError, DataError
from foretaste.later import later

_ROUNDING = 1e-9  # 0.29 of 100 events is 29, not the 28.999… of floating point
_NAMES: Mapping[str, int] = {
    "train": TRAIN,
    "validation": VALIDATION,
    "valid": VALIDATION,
    "val": VALIDATION,
    "test": TEST,
    "unused": UNUSED,
    "negative": NEGATIVE,
}


@checked
def temporal_split(events: Interactions, *, validation: float = 0.1, test: float = 0.1) -> Split:
    """Cut all users at the same two moments: training before, then validation, then test.

    The cuts fall where the shares are met best without parting events of one second. The test
    is rolling: each event is predicted from everything its user did before it, by weights that
    saw nothing after the first cut.

    Args:
        events: With times.
        validation: Share of the events, in [0, 1).
        test: Share of the events, in [0, 1); 0: nothing is measured.

    Raises:
        ConfigError: The shares leave nothing to train on.
        DataError: The events have no times, or too few different ones.
    """
    _check_shares(validation, test)
    if events.timestamp_s is None:
        raise DataError(
            "a temporal split needs times and these events have none: name the timestamp column "
            "when reading, or use leave_last",
            name="timestamp",
        )
    part_E = np.full(len(events), TRAIN, dtype=np.uint8)
    if len(events):
        time_E = events.timestamp_s
        if validation + test > 0:
            part_E[time_E >= _cut(time_E, 1 - test - validation)] = VALIDATION
        if test > 0:
            part_E[time_E >= _cut(time_E, 1 - test)] = TEST
    return _checked("temporal", events, part_E, rolling=True, held_out=(validation > 0, test > 0))


@checked
def leave_last_split(events: Interactions, *, validation: bool = True) -> Split:
    """Hold out each user's last event for the test and the last but one for validation.

    Of events of which some are positive, the last positive one and what follows it are the test.
    Users with fewer than three events (two without validation) stay in training whole; the
    split's notes count them.

    Raises:
        DataError: No user has events enough.
    """
    part_E, notes = _leave_last(events, (TEST, VALIDATION) if validation else (TEST,))
    return _checked("leave_last", events, part_E, held_out=(validation, True), notes=notes)


@checked
def ratio_split(events: Interactions, *, validation: float = 0.1, test: float = 0.2) -> Split:
    """Hold out the last share of every user's own events, rounded down.

    Args:
        events: With times, or in an order that stands for time.
        validation: Share of a user's events, in [0, 1), just before the test's.
        test: Share of a user's events, in [0, 1), the last ones; 0: nothing is measured.

    Raises:
        ConfigError: The shares leave nothing to train on.
        DataError: No user has events enough.
    """
    _check_shares(validation, test)
    length_U = _num_positives(events)
    test_U = np.floor(length_U * test + _ROUNDING).astype(np.int64)
    validation_U = np.floor(length_U * validation + _ROUNDING).astype(np.int64)
    from_end_E = _from_end(events)
    part_E = np.full(len(events), TRAIN, dtype=np.uint8)
    part_E[from_end_E < (test_U + validation_U)[events.user_idx]] = VALIDATION
    part_E[from_end_E < test_U[events.user_idx]] = TEST
    short = int(((test_U == 0) & (length_U > 0)).sum()) if test else 0
    notes = (f"{short:,} users have too few events for a test share of {test:g}",) if short else ()
    return _checked("ratio", events, part_E, held_out=(validation > 0, test > 0), notes=notes)


@checked
def random_split(
    events: Interactions, *, validation: float = 0.1, test: float = 0.1, seed: Seed = 0
) -> Split:
    """Hold out events drawn without regard to user or time.

    Args:
        events: Any.
        validation: Share of the events, in [0, 1).
        test: Share of the events, in [0, 1); 0: nothing is measured.
        seed: Equal seeds give equal splits.

    Raises:
        ConfigError: The shares leave nothing to train on.
        DataError: There are too few events.
    """
    _check_shares(validation, test)
    num_test, num_validation = (
        int(np.floor(len(events) * share + _ROUNDING)) for share in (test, validation)
    )
    drawn = np.random.default_rng(seed).permutation(len(events))
    part_E = np.full(len(events), TRAIN, dtype=np.uint8)
    part_E[drawn[:num_test]] = TEST
    part_E[drawn[num_test : num_test + num_validation]] = VALIDATION
    return _checked("random", events, part_E, held_out=(validation > 0, test > 0))


@checked
def cold_items_split(
    events: Interactions, *, validation: float = 0.1, test: float = 0.2, seed: Seed = 0
) -> Split:
    """Hold out all events of some items, so that training sees nothing of them.

    What is asked is which of these items a user did, from the user's other events: the parts
    before, so the test's histories hold the validation's items too. All items are ranked, the
    others as well, so a model must place items by what else is known of them.

    Args:
        events: Any.
        validation: Share of the items that have an event, in [0, 1).
        test: Share of them, in [0, 1); 0: nothing is measured.
        seed: Equal seeds give equal splits.

    Raises:
        ConfigError: The shares leave nothing to train on.
        DataError: There are too few items.
    """
    part_I = _parts_of_rows(events.item_count, validation, test, seed)
    part_E = part_I[events.item_idx]
    return _checked("cold_items", events, part_E, held_out=(validation > 0, test > 0))


@checked
def cold_users_split(
    events: Interactions, *, validation: float = 0.1, test: float = 0.2, seed: Seed = 0
) -> Split:
    """Hold out all events of some users, so that training sees nothing of them.

    What is asked is what such a user did, from no history: a model must tell users by what else is
    known of them. `evaluate` measures them with `users="new"`.

    Args:
        events: Any.
        validation: Share of the users that have an event, in [0, 1).
        test: Share of them, in [0, 1); 0: nothing is measured.
        seed: Equal seeds give equal splits.

    Raises:
        ConfigError: The shares leave nothing to train on.
        DataError: There are too few users.
    """
    part_U = _parts_of_rows(np.diff(events.offsets), validation, test, seed)
    part_E = part_U[events.user_idx]
    return _checked("cold_users", events, part_E, held_out=(validation > 0, test > 0))


@checked
def given_split(
    train: Interactions, *, test: Interactions, validation: Interactions | None = None
) -> Split:
    """Take parts as they come, under one vocabulary: training's ids first, then new ones.

    Without times a user's training events stand before the validation and test events. Where the
    tables about users or items of several parts know an id, each value is taken from the first
    part that has it; the notes of the events count where a later part has another.

    Raises:
        DataError: A part has no event, or a column holds lists in one part and single values in
            another.
    """
    parts = {TRAIN: train, VALIDATION: validation, TEST: test}
    present = {part: events for part, events in parts.items() if events is not None}
    called = {TRAIN: "train", VALIDATION: "validation", TEST: "test"}
    merged, source_E = concatenate(list(present.values()), [called[part] for part in present])
    part_E = np.array(list(present), dtype=np.uint8)[source_E]
    return _checked("given", merged, part_E, held_out=(validation is not None, True))


@checked
def given_split_by_column(
    events: Interactions,
    *,
    column: str = "part",
    validation: float = 0.0,
    validation_by: Literal["events", "blocks"] = "events",
    seed: Seed = 0,
) -> Split:
    """Take parts from a column that says of each event where it belongs.

    Args:
        events: With that column.
        validation: Share of the training events, in [0, 1), drawn at random to choose by, where
            the column gives no validation.
        validation_by: Draw each event for itself, or of each user a block of what belongs together
            (`draw_blocks`): nearer to a test that holds users' last events.
        seed: Decides the draw.
        column: Holds "train", "validation", "test" or "unused", or the codes 0, 1, 2 and 3.

    Raises:
        ConfigError: A share is asked for, and the column gives a validation already.
        DataError: There is no such column, or a value is none of these.
    """
    context = {} if events.context is None else {c.name: c for c in events.context.iter_columns()}
    if column in events.columns:
        values, inverse_E = np.unique(events.columns[column], return_inverse=True)
    elif column in context:
        text = context[column].cast(pl.String).fill_null("nothing")
        values, inverse_E = np.unique(text.to_numpy().astype(str), return_inverse=True)
    else:
        raise DataError(
            f"no column {column!r} says which part an event belongs to; there are "
            f"{sorted([*events.columns, *context])}: name it among the columns, or the context if "
            "it is text, when reading",
            column=column,
            name="column",
            value=column,
        )
    part_E = np.array([_part_code(value, column) for value in values.tolist()], np.uint8)[inverse_E]
    validated = bool((part_E == VALIDATION).any())
    if validation:
        _hold_out(part_E, events, validation, validation_by, seed, column)
        validated = True
    return _checked("given", events, part_E, held_out=(validated, True))


@checked
def leave_last_within_training(split: Split) -> Split:
    """Return the same test, with each user's last event before it as the validation.

    The split's own validation joins training first. For a temporal split with few users on
    both sides of the cut: there is more to stop early by, and the reported test stays what it
    was. Users with fewer than three training events are not validated on.

    Raises:
        DataError: No user has training events enough.
    """
    whole = split.refit()
    inner_E, notes = _leave_last(whole.train, (VALIDATION,), fewest=3)
    part_E = whole.part_E.copy()
    part_E[part_E == TRAIN] = inner_E
    return _checked(
        split.kind,
        split.events,
        part_E,
        rolling=split.rolling,
        held_out=(True, split.has_test),
        notes=(*split.notes, *notes),
    )


def _hold_out(
    part_E: UInt8[np.ndarray, " E"],
    events: Interactions,
    share: float,
    by: Literal["events", "blocks"],
    seed: int,
    column: str,
) -> None:
    """Move a share of the training events into validation."""
    if (part_E == VALIDATION).any():
        raise ConfigError(
            f"split.validation is {share:g}, but column {column!r} gives a validation part "
            "already: leave the share out",
            name="split.validation",
            value=share,
        )
    train = np.flatnonzero(part_E == TRAIN)
    if by == "blocks":
        part_E[train[draw_blocks(events.select(part_E == TRAIN), share, seed)]] = VALIDATION
        return
    num = int(np.floor(len(train) * share + _ROUNDING))
    part_E[np.random.default_rng(seed).permutation(train)[:num]] = VALIDATION


def _parts_of_rows(
    count_R: Int64[np.ndarray, " R"], validation: float, test: float, seed: int
) -> UInt8[np.ndarray, " R"]:
    """Draw the rows with an event whose events are all held out."""
    _check_shares(validation, test)
    row = np.flatnonzero(count_R)
    num_test, num_validation = (
        int(np.floor(len(row) * share + _ROUNDING)) for share in (test, validation)
    )
    drawn = np.random.default_rng(seed).permutation(row)
    part_R = np.full(len(count_R), TRAIN, dtype=np.uint8)
    part_R[drawn[:num_test]] = TEST
    part_R[drawn[num_test : num_test + num_validation]] = VALIDATION
    return part_R


def _check_shares(validation: float, test: float) -> None:
    if not (test >= 0 and validation >= 0 and test + validation < 1):
        raise ConfigError(
            f"validation={validation:g} and test={test:g} are no shares that leave something to "
            "train on: each is in [0, 1), their sum below 1",
            name="test",
            value=test,
        )


def _cut(timestamp_E: Int64[np.ndarray, " E"], share_before: float) -> int:
    """Return the time before which the share of events comes nearest to `share_before`."""
    wanted = min(round(len(timestamp_E) * share_before), len(timestamp_E) - 1)
    middle = int(np.partition(timestamp_E, wanted)[wanted])
    before, until = int((timestamp_E < middle).sum()), int((timestamp_E <= middle).sum())
    return middle if wanted - before <= until - wanted else middle + 1


def _from_end(events: Interactions) -> Int64[np.ndarray, " E"]:
    """Return for each event how many positive ones its user has after it: the last has 0."""
    until_E1 = np.concatenate([[0], np.cumsum(events.positive_E, dtype=np.int64)])
    from_end_E: Int64[np.ndarray, " E"] = (
        until_E1[events.offsets[1:]][events.user_idx] - until_E1[1:]
    )
    return from_end_E


def _num_positives(events: Interactions) -> Int64[np.ndarray, " U"]:
    until_E1 = np.concatenate([[0], np.cumsum(events.positive_E, dtype=np.int64)])
    num_U: Int64[np.ndarray, " U"] = np.diff(until_E1[events.offsets])
    return num_U


def _leave_last(
    events: Interactions, parts: tuple[int, ...], *, fewest: int | None = None
) -> tuple[UInt8[np.ndarray, " E"], tuple[str, ...]]:
    """Give the last event to `parts[0]`, the one before it to `parts[1]`, and say who is short."""
    fewest = fewest or len(parts) + 1
    length_U = _num_positives(events)
    long_E = (length_U >= fewest)[events.user_idx]
    from_end_E = _from_end(events)
    part_E = np.full(len(events), TRAIN, dtype=np.uint8)
    for place, part in enumerate(parts):
        part_E[long_E & (from_end_E == place)] = part
    short = int(((length_U > 0) & (length_U < fewest)).sum())
    note = f"{short:,} users have fewer than {fewest} events and stay in training whole"
    return part_E, (note,) if short else ()


def _part_code(value: object, column: str) -> int:
    if isinstance(value, int | float) and value in _NAMES.values():
        return int(value)
    if isinstance(value, str) and value.strip().lower() in _NAMES:
        return _NAMES[value.strip().lower()]
    raise DataError(
        f"column {column!r} says {value!r}, which is no part: write one of {sorted(_NAMES)}, or "
        f"{TRAIN}, {VALIDATION}, {TEST}, {UNUSED}, {NEGATIVE}",
        column=column,
        name="column",
        value=value,
    )


def _checked(
    kind: SplitKind,
    events: Interactions,
    part_E: UInt8[np.ndarray, " E"],
    *,
    rolling: bool = False,
    held_out: tuple[bool, bool] = (True, True),
    notes: tuple[str, ...] = (),
) -> Split:
    """Refuse a split with an empty part, if validation and test are `held_out`; say what leaks."""
    sizes = np.bincount(part_E, minlength=UNUSED + 1)
    validation, test = held_out
    wanted = {
        "training": (TRAIN, True),
        "validation": (VALIDATION, validation),
        "test": (TEST, test),
    }
    for name, (part, is_wanted) in wanted.items():
        if is_wanted and not sizes[part]:
            raise DataError(
                f"the {name} part of this {kind} split is empty: {len(events):,} events of "
                f"{int((np.diff(events.offsets) > 0).sum()):,} users{_moments(events)} are too "
                "few for it; give more events, other shares, or another kind of split",
                name=name,
            )
    return Split(
        kind=kind,
        events=events,
        part_E=part_E,
        rolling=rolling,
        leaks=find_leaks(kind, events, part_E),
        notes=notes,
    )


def _moments(events: Interactions) -> str:
    if events.timestamp_s is None:
        return ""
    return f" at {len(np.unique(events.timestamp_s)):,} different times"


sparse = later("scipy.sparse")

_PAIRS = 2**24
"""Users of the items that are compared at once, of all of them together."""


def draw_blocks(events: Interactions, share: float, seed: int) -> Bool[np.ndarray, " E"]:
    r"""Draw a block of each user's events: one at random and those most alike to it.

    How alike two items are is the cosine of who did them, :math:`|U_i \cap U_j| /
    \sqrt{|U_i| |U_j|}`. A user with n events gives round(share * n) of them, so one with few may
    give none. Held out alone, an event is often betrayed by those that were done beside it; a
    block leaves together, as blocked cross-validation has it (Roberts et al. 2017,
    https://doi.org/10.1111/ecog.02881). The work is the sum over items of their squared counts.

    Args:
        events: All that may be drawn.
        share: Of each user's events, in (0, 1).
        seed: Decides the draw.
    """
    user_E, item_E = events.user_idx, events.item_idx.astype(np.int64)
    count_U = np.diff(events.offsets)
    chosen_U = events.offsets[:-1] + np.floor(
        np.random.default_rng(seed).random(len(count_U)) * count_U
    ).astype(np.int64)
    chosen_E = chosen_U[user_E]
    alike_E = alike(events, item_E, item_E[chosen_E])
    alike_E[chosen_E] = np.inf
    order_E = np.lexsort((-alike_E, user_E))
    rank_E = np.arange(len(events)) - events.offsets[user_E]
    held_E = np.zeros(len(events), bool)
    held_E[order_E] = rank_E < np.rint(share * count_U)[user_E]
    return held_E


def alike(
    events: Interactions, a_E: Int64[np.ndarray, " E"], b_E: Int64[np.ndarray, " E"]
) -> Float64[np.ndarray, " E"]:
    """Return the cosine of two items' users, pair by pair."""
    ones_E = np.ones(len(events), np.float32)
    shape = (events.num_items, events.num_users)
    done_IU = sparse.csr_array((ones_E, (events.item_idx, events.user_idx)), shape=shape)
    done_IU.data[:] = 1  # whoever did it twice counts once
    count_I = np.diff(done_IU.indptr).astype(np.int64)  # of 32 bits, products would wrap round
    block_E = np.cumsum(count_I[a_E] + count_I[b_E]) // _PAIRS
    cuts = np.flatnonzero(np.diff(block_E)) + 1
    both_E = np.concatenate(
        [
            (done_IU[some_a] * done_IU[some_b]).sum(axis=1)
            for some_a, some_b in zip(np.split(a_E, cuts), np.split(b_E, cuts), strict=True)
        ]
    )
    cosine_E: Float64[np.ndarray, " E"] = both_E / np.sqrt(count_I[a_E] * count_I[b_E])
    return cosine_E
