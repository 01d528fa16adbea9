"""The parts that a split deals events into, and the ways of dealing them."""

from typing import Literal

TRAIN, VALIDATION, TEST, UNUSED, NEGATIVE = 0, 1, 2, 3, 4
"""The values of `Split.part_E`; an UNUSED event is neither learned from nor in any history. A
NEGATIVE is no event at all: a pair that a published protocol lists for its user's test events to
be compared with."""

LearnedFrom = Literal["train", "train and validation", "all events"]
"""The parts that a model learned from."""

SplitKind = Literal[
    "temporal", "leave_last", "ratio", "random", "given", "cold_items", "cold_users"
]
