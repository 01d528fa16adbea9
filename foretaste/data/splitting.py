"""Seven ways of cutting events into training, validation and test.

Shape legend: E events, U users, R rows, which are users or items.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import polars as pl
from jaxtyping import Bool, Float64, Int64, UInt8

from foretaste.arguments import checked, settings_as_arguments
from foretaste.data.arrays import user_blocks
from foretaste.data.interactions import Interactions
from foretaste.data.merging import concatenate
from foretaste.data.splits import (
    NEGATIVE,
    TEST,
    TRAIN,
    UNUSED,
    VALIDATION,
    ColdItemsSplitConfig,
    ColdUsersSplitConfig,
    GivenSplitConfig,
    LeaveLastSplitConfig,
    RandomSplitConfig,
    RatioSplitConfig,
    SharesConfig,
    Split,
    SplitConfig,
    SplitKind,
    TemporalSplitConfig,
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


@settings_as_arguments(TemporalSplitConfig)
def temporal_split(events: Interactions, split: TemporalSplitConfig) -> Split:
    """Cut all users at the same two times: training before, then validation, then test.

    The cuts are the times that come closest to the shares; events of one second stay together. The
    test is rolling: each event is predicted from all earlier events of its user, with weights that
    were trained only on events before the first cut.

    Args:
        events: Events with times.
        (settings)

    Raises:
        ConfigError: The shares leave nothing to train on.
        DataError: The events have no times, or too few different ones.
    """
    if events.timestamp_s is None:
        raise DataError(
            "a temporal split needs times and these events have none: name the timestamp column "
            "when reading, or use leave_last",
            name="timestamp",
        )
    part_E = np.full(len(events), TRAIN, dtype=np.uint8)
    if len(events):
        time_E = events.timestamp_s
        if split.validation + split.test > 0:
            part_E[time_E >= _cut(time_E, 1 - split.test - split.validation)] = VALIDATION
        if split.test > 0:
            part_E[time_E >= _cut(time_E, 1 - split.test)] = TEST
    made = _checked("temporal", events, part_E, rolling=True, held_out=_held_out(split))
    return leave_last_within_training(made) if split.stop_on == "leave_last" else made


@settings_as_arguments(LeaveLastSplitConfig)
def leave_last_split(events: Interactions, split: LeaveLastSplitConfig) -> Split:
    """Hold out each user's last event for the test and the last but one for validation.

    If only some events are positive, the test is the last positive event and those after it. All
    events of users with fewer than three events (two without validation) stay in training; the
    split's notes count these users.

    Args:
        events: Events with times, or in order of time.
        (settings)

    Raises:
        DataError: No user has enough events.
    """
    part_E, notes = _leave_last(events, (TEST, VALIDATION) if split.validation else (TEST,))
    return _checked("leave_last", events, part_E, held_out=(split.validation, True), notes=notes)


@settings_as_arguments(RatioSplitConfig)
def ratio_split(events: Interactions, split: RatioSplitConfig) -> Split:
    """Hold out the last share of every user's own events, rounded down.

    Args:
        events: Events with times, or in order of time.
        (settings)

    Raises:
        ConfigError: The shares leave nothing to train on.
        DataError: No user has enough events.
    """
    length_U = _num_positives(events)
    test_U = np.floor(length_U * split.test + _ROUNDING).astype(np.int64)
    validation_U = np.floor(length_U * split.validation + _ROUNDING).astype(np.int64)
    part_E = np.full(len(events), TRAIN, dtype=np.uint8)
    for part_B, user_B, from_end_B in _from_end(events, part_E):
        part_B[from_end_B < (test_U + validation_U)[user_B]] = VALIDATION
        part_B[from_end_B < test_U[user_B]] = TEST
    short = int(((test_U == 0) & (length_U > 0)).sum()) if split.test else 0
    note = f"{short:,} users have too few events for a test share of {split.test:g}"
    return _checked(
        "ratio", events, part_E, held_out=_held_out(split), notes=(note,) if short else ()
    )


@settings_as_arguments(RandomSplitConfig)
def random_split(events: Interactions, split: RandomSplitConfig) -> Split:
    """Hold out events drawn without regard to user or time.

    Args:
        events: Any events.
        (settings)

    Raises:
        ConfigError: The shares leave nothing to train on.
        DataError: There are too few events.
    """
    part_E = _drawn_parts(np.arange(len(events)), len(events), split)
    return _checked("random", events, part_E, held_out=_held_out(split))


@settings_as_arguments(ColdItemsSplitConfig)
def cold_items_split(events: Interactions, split: ColdItemsSplitConfig) -> Split:
    """Hold out all events of some items, so that training has none of them.

    The task is to find these items from the user's other events in the earlier parts, so the
    histories of the test contain the items of validation too. All items are ranked, including those
    of training, so a model must rank cold items by their features.

    Args:
        events: Any events.
        (settings)

    Raises:
        ConfigError: The shares leave nothing to train on.
        DataError: There are too few items.
    """
    part_I = _drawn_parts(np.flatnonzero(events.item_count), events.num_items, split)
    part_E = part_I[events.item_idx]
    return _checked("cold_items", events, part_E, held_out=_held_out(split))


@settings_as_arguments(ColdUsersSplitConfig)
def cold_users_split(events: Interactions, split: ColdUsersSplitConfig) -> Split:
    """Hold out all events of some users, so that training has none of them.

    The task is to predict the events of such users without a history, from their features.
    `evaluate` measures them with `users="new"`.

    Args:
        events: Any events.
        (settings)

    Raises:
        ConfigError: The shares leave nothing to train on.
        DataError: There are too few users.
    """
    part_U = _drawn_parts(np.flatnonzero(np.diff(events.offsets)), events.num_users, split)
    part_E = part_U[events.user_idx]
    return _checked("cold_users", events, part_E, held_out=_held_out(split))


@checked
def given_split(
    train: Interactions, *, test: Interactions, validation: Interactions | None = None
) -> Split:
    """Take separate tables as the parts, under one vocabulary: training's ids first, then new ones.

    Without times, a user's training events are before the validation and test events. If the side
    tables of several parts have an id, each value is taken from the first part that has it; notes
    count different values in later parts.

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


@settings_as_arguments(GivenSplitConfig)
def given_split_by_column(events: Interactions, split: GivenSplitConfig) -> Split:
    """Take parts from a column that holds the part of each event.

    Args:
        events: Events with this column.
        (settings)

    Raises:
        ConfigError: `validation` is set, and the column has a validation part.
        DataError: The column does not exist, or a value is not a part.
    """
    column = split.column
    context = {} if events.context is None else {c.name: c for c in events.context.iter_columns()}
    if column in events.columns:
        values, inverse_E = np.unique(events.columns[column], return_inverse=True)
    elif column in context:
        text = context[column].cast(pl.String).fill_null("nothing")
        values, inverse_E = np.unique(text.to_numpy().astype(str), return_inverse=True)
    else:
        raise DataError(
            f"no column {column!r} holds the part of each event; there are "
            f"{sorted([*events.columns, *context])}: name it among the columns, or the context if "
            "it is text, when reading",
            column=column,
            name="column",
            value=column,
        )
    part_E = np.array([_part_code(value, column) for value in values.tolist()], np.uint8)[inverse_E]
    validated = bool((part_E == VALIDATION).any())
    if split.validation:
        _hold_out(part_E, events, split)
        validated = True
    return _checked("given", events, part_E, held_out=(validated, True))


@checked
def leave_last_within_training(split: Split) -> Split:
    """Return the same test, with each user's last event before it as the validation.

    The split's own validation first moves into training. This gives a temporal split with few users
    on both sides of the cut more validation events, and does not change the test. Users with fewer
    than three training events have no validation event.

    Raises:
        DataError: No user has enough training events.
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


_CUTS: Mapping[str, Callable[..., Split]] = {
    "temporal": temporal_split,
    "leave_last": leave_last_split,
    "ratio": ratio_split,
    "random": random_split,
    "given": given_split_by_column,
    "cold_items": cold_items_split,
    "cold_users": cold_users_split,
}
"""The function of each kind; its arguments have the names of the settings."""


@checked
def make_split(config: SplitConfig, events: Interactions) -> Split:
    """Cut `events` as `config` describes.

    Raises:
        DataError: The events do not allow this split; the message has the reason.
    """
    return _CUTS[config.kind](events, **config.model_dump(exclude={"kind"}))


def _hold_out(
    part_E: UInt8[np.ndarray, " E"], events: Interactions, split: GivenSplitConfig
) -> None:
    """Move a share of the training events into validation."""
    share = split.validation
    if (part_E == VALIDATION).any():
        raise ConfigError(
            f"split.validation is {share:g}, but column {split.column!r} gives a validation part "
            "already: leave the share out",
            name="split.validation",
            value=share,
        )
    train = np.flatnonzero(part_E == TRAIN)
    if split.validation_by == "blocks":
        held_E = draw_blocks(events.select(part_E == TRAIN), share, split.seed)
        part_E[train[held_E]] = VALIDATION
        return
    num = int(np.floor(len(train) * share + _ROUNDING))
    part_E[np.random.default_rng(split.seed).permutation(train)[:num]] = VALIDATION


def _drawn_parts(
    row_N: Int64[np.ndarray, " N"],
    num_rows: int,
    split: RandomSplitConfig | ColdItemsSplitConfig | ColdUsersSplitConfig,
) -> UInt8[np.ndarray, " R"]:
    """Return the part of each row; a random share of `row_N` is held out."""
    num_test, num_validation = (
        int(np.floor(len(row_N) * share + _ROUNDING)) for share in (split.test, split.validation)
    )
    drawn = np.random.default_rng(split.seed).permutation(row_N)
    part_R = np.full(num_rows, TRAIN, dtype=np.uint8)
    part_R[drawn[:num_test]] = TEST
    part_R[drawn[num_test : num_test + num_validation]] = VALIDATION
    return part_R


def _held_out(split: SharesConfig) -> tuple[bool, bool]:
    return split.validation > 0, split.test > 0


def _cut(timestamp_E: Int64[np.ndarray, " E"], share_before: float) -> int:
    """Return the time before which the share of events comes nearest to `share_before`."""
    wanted = min(round(len(timestamp_E) * share_before), len(timestamp_E) - 1)
    middle = int(np.partition(timestamp_E, wanted)[wanted])
    before, until = int((timestamp_E < middle).sum()), int((timestamp_E <= middle).sum())
    return middle if wanted - before <= until - wanted else middle + 1


def _from_end(
    events: Interactions, part_E: UInt8[np.ndarray, " E"]
) -> Iterator[tuple[UInt8[np.ndarray, " B"], Int64[np.ndarray, " B"], Int64[np.ndarray, " B"]]]:
    """Yield blocks of parts, users, and counts of the user's later positive events."""
    for first, last in user_blocks(events.offsets):
        offsets, here = events.offsets[first : last + 1], slice(*events.offsets[[first, last]])
        until_B1 = np.concatenate([[0], np.cumsum(events.positive_E[here], dtype=np.int64)])
        until_U = until_B1[offsets[1:] - offsets[0]]
        length_U = np.diff(offsets)
        yield (
            part_E[here],
            np.repeat(np.arange(first, last), length_U),
            np.repeat(until_U, length_U) - until_B1[1:],
        )


def _num_positives(events: Interactions) -> Int64[np.ndarray, " U"]:
    if not events.positive:
        return np.diff(events.offsets)
    until_E1 = np.concatenate([[0], np.cumsum(events.positive_E, dtype=np.int64)])
    num_U: Int64[np.ndarray, " U"] = np.diff(until_E1[events.offsets])
    return num_U


def _leave_last(
    events: Interactions, parts: tuple[int, ...], *, fewest: int | None = None
) -> tuple[UInt8[np.ndarray, " E"], tuple[str, ...]]:
    """Put the last event into `parts[0]`, the one before into `parts[1]`; note short histories."""
    fewest = fewest or len(parts) + 1
    length_U = _num_positives(events)
    part_E = np.full(len(events), TRAIN, dtype=np.uint8)
    for part_B, user_B, from_end_B in _from_end(events, part_E):
        long_B = length_U[user_B] >= fewest
        for place, part in enumerate(parts):
            part_B[long_B & (from_end_B == place)] = part
    short = int(((length_U > 0) & (length_U < fewest)).sum())
    note = f"{short:,} users have fewer than {fewest} events, all of which stay in training"
    return part_E, (note,) if short else ()


def _part_code(value: object, column: str) -> int:
    if isinstance(value, int | float) and value in _NAMES.values():
        return int(value)
    if isinstance(value, str) and value.strip().lower() in _NAMES:
        return _NAMES[value.strip().lower()]
    raise DataError(
        f"column {column!r} holds {value!r}, which is not a part: write one of {sorted(_NAMES)}, "
        f"or {TRAIN}, {VALIDATION}, {TEST}, {UNUSED}, {NEGATIVE}",
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
    """Raise an error if a `held_out` part is empty; find the leaks."""
    sizes = [np.count_nonzero(part_E == part) for part in range(UNUSED + 1)]
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
"""Total number of users of the items that are compared at once."""


def draw_blocks(events: Interactions, share: float, seed: int) -> Bool[np.ndarray, " E"]:
    r"""Draw a block of each user's events: one at random and those most similar to it.

    The similarity of two items is the cosine of their users, :math:`|U_i \cap U_j| /
    \sqrt{|U_i| |U_j|}`. round(share * n) of a user's n events are drawn, which may be none. A
    single held-out event is often revealed by events that belong with it, so a block is held out
    together, as in blocked cross-validation (Roberts et al. 2017,
    https://doi.org/10.1111/ecog.02881). The work is the sum of squared counts over items.

    Args:
        events: The events to draw from.
        share: Share of each user's events, in (0, 1).
        seed: The seed of the draw.
    """
    user_E, item_E = events.user_idx, events.item_idx.astype(np.int64)
    count_U = np.diff(events.offsets)
    chosen_U = events.offsets[:-1] + np.floor(
        np.random.default_rng(seed).random(len(count_U)) * count_U
    ).astype(np.int64)
    chosen_E = chosen_U[user_E]
    similarity_E = similarity(events, item_E, item_E[chosen_E])
    similarity_E[chosen_E] = np.inf
    order_E = np.lexsort((-similarity_E, user_E))
    rank_E = np.arange(len(events)) - events.offsets[user_E]
    held_E = np.zeros(len(events), bool)
    held_E[order_E] = rank_E < np.rint(share * count_U)[user_E]
    return held_E


def similarity(
    events: Interactions, a_E: Int64[np.ndarray, " E"], b_E: Int64[np.ndarray, " E"]
) -> Float64[np.ndarray, " E"]:
    """Return the cosine of two items' users, pair by pair."""
    ones_E = np.ones(len(events), np.float32)
    shape = (events.num_items, events.num_users)
    done_IU = sparse.csr_array((ones_E, (events.item_idx, events.user_idx)), shape=shape)
    done_IU.data[:] = 1  # a user with several events of an item counts once
    count_I = np.diff(done_IU.indptr).astype(np.int64)  # 32-bit products would overflow
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
