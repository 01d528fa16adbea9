"""The parts that a split deals events into, and the ways of dealing them."""

from typing import Literal

TRAIN, VALIDATION, TEST, UNUSED = 0, 1, 2, 3
"""The values of `Split.part_E`; an UNUSED event is neither learned from nor in any history."""

SplitKind = Literal["temporal", "leave_last", "ratio", "random", "given", "cold_items"]
