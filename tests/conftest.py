"""Fixtures of all tests, and faster checks of types and shapes."""

import inspect
import subprocess
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, ForwardRef, Literal, get_args, get_origin

import jaxtyping
import pytest
import torch
from jaxtyping import AbstractArray
from jaxtyping._storage import pop_shape_memo, push_shape_memo

_checked_slowly = jaxtyping.jaxtyped
_RUNS_LATER = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def _parts(annotation: object) -> Iterator[object]:
    yield annotation
    if get_origin(annotation) is not Literal:
        for part in get_args(annotation):
            yield from _parts(part)


def _checked(function: Any = None, *, typechecker: Callable[[Any], Any]) -> Any:
    """Check types and shapes as `jaxtyped` does, in a fraction of the time.

    A function without shapes needs no memory of sizes, and one with shapes is checked in one pass
    instead of two. Classes, nested functions (which wrap their constructors), generators and
    functions with quoted annotations are left to `jaxtyped`.
    """
    if function is None:
        return lambda function: _checked(function, typechecker=typechecker)
    is_plain = (
        inspect.isfunction(function)
        and "<locals>" not in function.__qualname__
        and not function.__code__.co_flags & _RUNS_LATER
    )
    hints = getattr(function, "__annotations__", {}).values()
    parts = [part for hint in hints for part in _parts(hint)]
    if not is_plain or any(isinstance(part, str | ForwardRef) for part in parts):
        return _checked_slowly(function, typechecker=typechecker)
    checked = typechecker(function)
    if not any(isinstance(part, type) and issubclass(part, AbstractArray) for part in parts):
        return checked

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        push_shape_memo({})
        try:
            return checked(*args, **kwargs)
        finally:
            pop_shape_memo()

    return call


jaxtyping.jaxtyped = _checked

from foretaste.cli.main import run  # noqa: E402  # checked from here on
from foretaste.experiment import compare_models  # noqa: E402
from foretaste.training.fit import Fit  # noqa: E402

torch.set_num_threads(1)  # on a busy machine, two threads stall at every parallel region


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the checkout; without it, the test is skipped."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data sets are not at {folder}: their tests are left out")
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB; skip the test if this process may not mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small disk cannot be mounted here: that takes root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="session", autouse=True)
def shapes_of_the_first_epoch() -> Iterator[None]:
    """Check shapes only in the first epoch of each training; later epochs have the same shapes."""
    epoch = Fit._epoch

    def checked_at_first(run: Any, *args: Any) -> None:
        jaxtyping.config.update("jaxtyping_disable", run.progress.epoch > 0)
        try:
            epoch(run, *args)
        finally:
            jaxtyping.config.update("jaxtyping_disable", value=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fit, "_epoch", checked_at_first)
        yield


@pytest.fixture(scope="session", autouse=True)
def few_requests() -> Iterator[None]:
    """Time a tenth of the usual requests: the tests need only that they are timed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_models, "ASKED", 20)
        yield


@pytest.fixture
def foretaste(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line; return its exit code, answer and log."""

    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            run([str(word) for word in words])
        code = 0 if ended.value.code is None else ended.value.code
        out, err = capsys.readouterr()
        return int(code), out, err

    return call
