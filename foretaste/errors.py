"""Every error that foretaste raises on purpose.

ForetasteError
├── DataError        the caller's table, ids or file are wrong
├── ConfigError      a setting is missing, unknown or out of range
├── NonFiniteError   a loss or a score is NaN or infinite
├── TooLargeError    what was asked for would not fit, said before it is tried
├── SourceError      a public data set could not be had, or is not what it should be
├── BundleError      a bundle or an event store is missing, broken, or was tampered with
└── ProcessError     one of several processes that train a model has ended

A message names the thing, the value and the fix. The command line prints it as one line. What the
message names is also an attribute of the error, so that a program need not read prose.
"""

import difflib
import pickle
from collections.abc import Iterable


class ForetasteError(Exception):
    """The root: catch it to catch all that foretaste raises on purpose.

    Args:
        message: One sentence that names the thing, the value and the fix.
        name: The setting, argument, feature, task or file that is wrong, as its user wrote it.
        column: The column of the caller's table.
        row: The row of the caller's table, counted from 1, the header not counted.
        value: What stands there.
    """

    def __init__(
        self,
        message: str,
        *,
        name: str | None = None,
        column: str | None = None,
        row: int | None = None,
        value: object = None,
    ) -> None:
        super().__init__(message)
        self.name = name
        self.column = column
        self.row = row
        self.value = value

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the error, for a pool of processes; a value that has no pickle is left out."""
        facts = dict(self.__dict__)
        try:
            pickle.dumps(self.value)
        except (pickle.PicklingError, TypeError, AttributeError, ValueError, RuntimeError):
            facts["value"] = None
        return type(self), self.args, facts


class DataError(ForetasteError):
    """The caller's table, ids or file are wrong."""


class ConfigError(ForetasteError):
    """A setting is missing, unknown or out of range."""


class NonFiniteError(ForetasteError):
    """A loss or a score is NaN or infinite."""


class TooLargeError(ForetasteError):
    """What was asked for would not fit in memory."""


class SourceError(ForetasteError):
    """A public data set could not be had, or is not what it should be."""


class BundleError(ForetasteError):
    """A bundle or an event store is missing, broken, or was tampered with."""


class ProcessError(ForetasteError):
    """One of several processes that train a model together has ended, or does not answer."""

    followed = 75
    """The exit code of a process that ended because another one did."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return how a message about an unknown name ends: with the nearest known one, if any is."""
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else ""


def nearest(name: str, known: Iterable[str], *, likeness: float = 0.6) -> str | None:
    """Return the known name that an unknown one is most like, if any is like it at all.

    Args:
        name: What was asked for.
        known: What there is.
        likeness: From 0, anything, to 1, the name itself.
    """
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=likeness)
    return found[0] if found else None
