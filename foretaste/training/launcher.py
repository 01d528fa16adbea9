"""Starts several processes on this machine with torchrun's launcher, and names one that fails."""

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from foretaste.arguments import checked
from foretaste.errors import ConfigError, ProcessError
from foretaste.training.processes import was_started

_HANDLED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
_LAST_WORDS = 15
"""Seconds within which the other processes must end after one has failed."""


@checked
def start_processes(num: int, command: Sequence[str]) -> int:
    """Start `num` Python processes on this machine with torchrun's launcher, and wait for them.

    Args:
        num: Number of processes.
        command: The arguments of `python`, such as the path of a script.

    Returns:
        The number of the signal that stopped the processes, or 0.

    Raises:
        ConfigError: There are fewer cores, or torchrun started this process.
        ProcessError: A process failed; the message and `value` name it.
    """
    from torch.distributed.elastic.multiprocessing import SignalException  # noqa: PLC0415
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: PLC0415
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: PLC0415

    if was_started():
        raise ConfigError(
            "torchrun has started several processes already: omit --processes",
            name="processes",
            value=num,
        )
    cores = os.cpu_count() or 1
    if num > cores:
        raise ConfigError(
            f"{num} processes on a machine of {cores} cores: ask for {cores} at most",
            name="processes",
            value=num,
        )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // num)))
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num,
        run_id=f"foretaste-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=_LAST_WORDS,
    )
    try:
        with _own_handlers():
            elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        failures = error.failures
        rank = min(failures, key=lambda r: (_followed(failures[r].exitcode), failures[r].timestamp))
        if failures[rank].exitcode == ProcessError.followed:
            silent = sorted(set(range(num)) - set(failures)) or [rank]
            raise ProcessError(
                f"of {num} processes, one did not answer the others, which ended; it is among "
                f"{silent}: see the messages above, then continue with --resume",
                name="processes",
                value=silent[0],
            ) from error
        raise ProcessError(
            f"process {rank} of {num} ended with {_ended(failures[rank].exitcode)}, which ended "
            "the training: read its messages above, then continue with --resume",
            name="processes",
            value=rank,
        ) from error
    except SignalException as stop:
        return int(stop.sigval)
    return 0


@contextmanager
def _own_handlers() -> Iterator[None]:
    """Restore this process's signal handlers, which torch leaves changed."""
    numbers = [getattr(signal, name) for name in _HANDLED if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        with suppress(ValueError):  # signals are handled in the main thread alone
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)


def _followed(code: int) -> bool:
    """Return whether a process ended because another one had ended."""
    return code in (ProcessError.followed, 128 + signal.SIGTERM, -signal.SIGTERM)


def _ended(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
