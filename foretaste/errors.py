"""Every error that foretaste raises on purpose.

ForetasteError
├── DataError        the caller's table, ids or file are wrong
├── ConfigError      a setting is missing, unknown or out of range
├── NonFiniteError   a loss or a score is NaN or infinite
├── TooLargeError    the request would not fit in memory; raised before it is tried
├── SourceError      a public data set could not be downloaded, or has wrong content
├── BundleError      a bundle or an event store is missing, broken, or was changed
└── ProcessError     one of several processes that train a model has ended

A message names the thing, the value and the fix. The command line prints it as one line. These
names are also attributes of the error, so that a program need not parse the message.
"""

import difflib
import pickle
from collections.abc import Iterable


class ForetasteError(Exception):
    """The root: catch it to catch all errors that foretaste raises on purpose.

    Args:
        message: One sentence that names the thing, the value and the fix.
        name: The wrong setting, argument, feature, task or file, as the caller wrote it.
        column: The column of the caller's table.
        row: The row of the caller's table, counted from 1 without the header.
        value: The value there.
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
        """Pickle the error, for a pool of processes; a value that cannot be pickled is left out."""
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
    """The request would not fit in memory."""


class SourceError(ForetasteError):
    """A public data set could not be downloaded, or has wrong content."""


class BundleError(ForetasteError):
    """A bundle or an event store is missing, broken, or was changed."""


class ProcessError(ForetasteError):
    """One of several processes that train a model has ended, or does not answer."""

    followed = 75
    """The exit code of a process that ended because another one did."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: a similar known name, if any."""
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else ""


def nearest(name: str, known: Iterable[str], *, likeness: float = 0.6) -> str | None:
    """Return the known name that is most similar to an unknown one, if any is similar.

    Args:
        name: The unknown name.
        known: The known names.
        likeness: Required similarity, from 0 (any name) to 1 (equal names).
    """
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=likeness)
    return found[0] if found else None
