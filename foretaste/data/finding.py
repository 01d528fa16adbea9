"""One thing that an audit saw."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["leak", "warning", "note"]
_ORDER: tuple[Severity, ...] = ("leak", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """What was seen, how often, and what it means."""

    severity: Severity
    """"leak": the future or the label is known where it must not be; "warning": likely a fault
    of the data; "note": true, and good to know."""
    what: str
    """A short name, the same for all findings of the kind."""
    count: int
    """How many events, pairs, ids or columns."""
    sentence: str
    """For people: with numbers and what to do."""


def worst_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return leaks, then warnings, then notes, each in the order given."""
    return tuple(sorted(findings, key=lambda finding: _ORDER.index(finding.severity)))
