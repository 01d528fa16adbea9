"""How much memory is free, and refusing what would not fit before it is made."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foretaste.errors import TooLargeError
from foretaste.later import later

psutil = later("psutil")

_CGROUP = Path("/sys/fs/cgroup")
_SURELY_FITS = 2**26
"""Bytes below which nobody asks how many are free, so that a check may stand in every step."""

_NO_MORE = ("out of memory", "not enough memory", "can't allocate memory")
"""How torch says that it got none."""


def available_bytes() -> int:
    """Return the memory that is free: the machine's, or the container's where less."""
    machine = int(psutil.virtual_memory().available)
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if not (limit.is_file() and used.is_file()) or limit.read_text().strip() == "max":
        return machine
    return min(machine, max(0, int(limit.read_text()) - int(used.read_text())))


def check_fits(
    needed_bytes: int,
    what: str,
    fix: str,
    *,
    name: str,
    value: object = None,
    limit_bytes: int | None = None,
) -> None:
    """Raise unless something fits in memory; call it before anything large is made.

    Args:
        needed_bytes: What it takes.
        what: What would be made, the subject of the message.
        fix: What to do about it.
        name: The setting or argument that makes it smaller.
        value: What that setting is.
        limit_bytes: What may be used; None: what is free.

    Raises:
        TooLargeError: It does not fit.
    """
    if limit_bytes is None and needed_bytes <= _SURELY_FITS:
        return
    limit = available_bytes() if limit_bytes is None else limit_bytes
    if needed_bytes > limit:
        raise TooLargeError(
            f"{what} needs {_gib(needed_bytes)} of memory, and "
            f"{_gib(limit)} {'are free' if limit_bytes is None else 'may be used'}: {fix}",
            name=name,
            value=value,
        )


@contextmanager
def out_of_memory(what: str, fix: str, *, name: str) -> Iterator[None]:
    """Say in our words that memory ran out after all, for work that nobody can count before.

    Args:
        what: The work, the subject of the message.
        fix: What to do about it.
        name: The setting that makes it smaller.

    Raises:
        TooLargeError: The system, or the GPU, gave no more memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = str(error).lower()
        if isinstance(error, RuntimeError) and not any(words in said for words in _NO_MORE):
            raise
        raise TooLargeError(f"{what} ran out of memory: {fix}", name=name) from error


def _gib(size: int) -> str:
    return f"{min(size, 2**100) / 2**30:,.1f} GiB"
