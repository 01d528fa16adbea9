"""How much memory there is, and refusing what would not fit before it is tried."""

import os
from pathlib import Path

from foretaste.errors import TooLargeError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Return the memory that can still be had: the machine's, or the container's where less."""
    return min(_machine_bytes(), _container_bytes())


def refuse_beyond(limit_bytes: int, needed_bytes: int, what: str, mend: str) -> None:
    """Raise unless `needed_bytes` are within `limit_bytes`.

    Args:
        limit_bytes: What may be used.
        needed_bytes: What would be.
        what: What needs them, the subject of the message.
        mend: What to do about it.

    Raises:
        TooLargeError: It would not fit.
    """
    if needed_bytes > limit_bytes:
        raise TooLargeError(
            f"{what} needs {needed_bytes / 2**30:.1f} GiB, and {limit_bytes / 2**30:.1f} GiB "
            f"may be used: {mend}"
        )


def _machine_bytes() -> int:
    if _MEMINFO.is_file():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _container_bytes() -> int:
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if not (limit.is_file() and used.is_file()) or limit.read_text().strip() == "max":
        return _machine_bytes()
    return max(0, int(limit.read_text()) - int(used.read_text()))
