"""Distributed data-parallel training; only this file contains the communication of processes.

Every process has the same weights and a share of the rows of each batch. All processes make the
same random draws for all rows, and each keeps those of its share. The functions below gather what a
loss needs from all rows, and sum the gradients after the backward pass. A step therefore equals
that of a single process up to the order of summation. With a single process the functions do
nothing.

Shape legend: N rows of this process, K numbers of each, V items of a batch, X items that this
process encodes, T means, D width.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, final

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, distributed, nn
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from foretaste.arguments import checked
from foretaste.data.draws import WHOLE, Part, Share, only_part, shared_out
from foretaste.errors import ConfigError, ForetasteError, ProcessError

T = TypeVar("T")
_TIMEOUT, _PATIENCE = 600.0, 144.0
"""Seconds that a process waits for another one in a step, and the factor on this time while the
other one reads data or computes more, which gives a day."""
_ROLL_CALL = timedelta(seconds=5)
"""Seconds that a failing process waits for a sign of the other processes."""


class _Group(NamedTuple):
    share: Share
    patient: distributed.ProcessGroup
    timeout: timedelta


_joined: list[_Group] = []


def share() -> Share:
    """Return this process's share of every batch; a single process has the whole batch."""
    return _joined[-1].share if _joined else WHOLE


def is_first() -> bool:
    """Return whether this process prints, validates and writes files for all processes."""
    return share().rank == 0


def was_started() -> bool:
    """Return whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@final
class Together:
    """The rank of this process and the number of processes; a single process has rank 0."""

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes files for all processes."""
        return is_first()

    def first_goes(self, work: Callable[[], T]) -> T:
        """Do some work, such as a download, in every process, and first in the first process."""
        return first_goes(work)


@checked
@contextmanager
def joined_processes(*, timeout_seconds: float = _TIMEOUT) -> Iterator[Together]:
    """Join the other processes that torchrun started, if there are any.

    All processes must make the same calls in this context, in the same order.

    Args:
        timeout_seconds: Seconds that a process waits for another one in a step before it ends, and
            a 144th of the time that it waits while another one reads data or computes more.

    Raises:
        ProcessError: The other processes did not connect, or one of them has ended.
    """
    if not was_started() or _joined:
        yield Together()
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    meet = not distributed.is_initialized()  # a launcher such as Ray Train has joined them already
    try:
        if meet:
            engine = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            store, rank, world = next(rendezvous("env://"))
            # a launcher that restarts all processes may keep its store with the earlier addresses
            again = (store.add("foretaste/joined", 1) - 1) // world
            distributed.init_process_group(
                engine,
                store=distributed_c10d.PrefixStore(str(again), store),
                rank=rank,
                world_size=world,
            )
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
        raise ProcessError(
            f"the processes could not connect at {place}: start all of them, with the same address "
            "and a port that no other program uses (torchrun --rdzv-endpoint)",
            name="processes",
            value=place,
        ) from error
    own = Share(distributed.get_rank(), distributed.get_world_size())
    timeout = timedelta(seconds=timeout_seconds)
    patient = distributed.new_group(backend="gloo", timeout=_PATIENCE * timeout)
    _joined.append(_Group(own, patient, timeout))
    try:
        wait()
        distributed_c10d._set_pg_timeout(timeout)
        yield Together()
        if meet:
            distributed.destroy_process_group()  # which may hang if another process has ended
    except ForetasteError as error:
        if own.rank:
            error.args = (f"process {own.rank}: {error}",)
        raise
    finally:
        _joined.pop()


@contextmanager
def _in_our_words() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        silent = _silent_processes()
        which = f"process {', '.join(map(str, silent))}" if silent else "another process"
        raise ProcessError(
            f"{which} of this training has ended, or did not answer for "
            f"{_joined[-1].timeout.total_seconds():g} seconds: read its messages, then continue "
            "with --resume",
            name="processes",
            value=silent,
        ) from error


def _silent_processes() -> list[int]:
    """Return the processes that do not report a missing process, as this one does."""
    own, until = share(), time.monotonic() + _ROLL_CALL.total_seconds()
    key, found = "foretaste-alive-{}".format, set[int]()
    with suppress(RuntimeError):  # the store may have ended with its process
        store = distributed_c10d._get_default_store()
        store.set_timeout(_ROLL_CALL)
        store.set(key(own.rank), "")
        while len(found) < own.world and time.monotonic() < until:
            found = {rank for rank in range(own.world) if store.check([key(rank)])}
            time.sleep(0.1)
    return sorted(set(range(own.world)) - found) if found else []


def first_goes(work: Callable[[], T]) -> T:
    """Do some work, such as a download, in every process, and first in the first process."""
    if not _joined:
        return work()
    if is_first():
        result = work()
    wait()
    return result if is_first() else work()


def wait() -> None:
    """Wait until all processes have reached this call."""
    if not _joined:
        return
    with _in_our_words():
        distributed.all_reduce(torch.zeros(()), group=_joined[-1].patient)


def by_first(work: Callable[[], float | bool], *, at_once: bool = False) -> float:
    """Compute a number in the first process and send it to the others, which wait for it.

    Args:
        work: Computes the number.
        at_once: Whether this takes no longer than a step.
    """
    if not _joined:
        return float(work())
    value = torch.tensor(work() if is_first() else 0.0, dtype=torch.float64)
    with _in_our_words():
        distributed.broadcast(value, 0, group=None if at_once else _joined[-1].patient)
    return float(value)


def check_same(facts: Mapping[str, object]) -> None:
    """Raise an error if the data or settings of a process differ from those of the first one.

    Raises:
        ConfigError: The fact of this name differs.
    """
    if not _joined:
        return
    found: list[Any] = [None] * share().world
    with _in_our_words():
        distributed.all_gather_object(found, dict(facts))
    for rank, other in enumerate(found):
        for name, value in found[0].items():
            if other[name] != value:
                raise ConfigError(
                    f"process {rank} has {name} {other[name]!r}, and process 0 has {value!r}: "
                    "start all processes with the same recipe and the same data",
                    name=name,
                    value=other[name],
                )


def work_divided() -> AbstractContextManager[None]:
    """Divide work that is done in blocks, such as evaluation, among the processes.

    All processes must do the same work; each of them gets the whole result.
    """
    return shared_out(share(), _fill) if _joined else nullcontext()


def _fill(values: Tensor) -> None:
    operation = (
        distributed.ReduceOp.MAX if values.dtype == torch.uint8 else distributed.ReduceOp.SUM
    )
    whole = values.cpu()
    with _in_our_words():
        distributed.all_reduce(whole, operation, group=_joined[-1].patient)
    values.copy_(whole)


def dealt(batch: Sized) -> AbstractContextManager[None]:
    """Restrict draws for rows to this process's share of a step's batch."""
    if not _joined:
        return nullcontext()
    return only_part(_part(_sizes(len(batch))), lambda key_S: all_rows(key_S)[0][0].unique())


def _part(sizes: list[int]) -> Part:
    first = sum(sizes[: share().rank])
    return Part(first, first + sizes[share().rank], sum(sizes))


def _sizes(num_rows: int) -> list[int]:
    size = torch.tensor([num_rows])
    return [int(other) for other in _from_all(size)]


def most_of_all(num: int) -> int:
    """Return the largest of the numbers that the processes give."""
    return max(_sizes(num)) if _joined else num


def _from_all(same_shape: Tensor) -> list[Tensor]:
    """Return the tensors of all processes, which have equal shapes."""
    found = [torch.empty_like(same_shape) for _ in range(share().world)]
    with _in_our_words():
        distributed.all_gather(found, same_shape)
    return found


def all_rows(
    rows_N: Int64[Tensor, " N"], *others: Int64[Tensor, "..."]
) -> tuple[tuple[Tensor, ...], slice]:
    """Return the rows of all processes, by rank, and the slice of this process's rows."""
    if not _joined:
        return (rows_N, *others), slice(0, len(rows_N))
    columns = [rows.unsqueeze(1) if rows.ndim == 1 else rows for rows in (rows_N, *others)]
    sizes = _sizes(len(rows_N))
    whole_NK = torch.cat(_gathered(torch.cat(columns, dim=1), sizes))
    parts = whole_NK.split([column.shape[1] for column in columns], dim=1)
    shaped = tuple(
        part.reshape(len(whole_NK), *rows.shape[1:]).contiguous()
        for part, rows in zip(parts, (rows_N, *others), strict=True)
    )
    return shaped, _part(sizes).rows


def _gathered(rows_NK: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Gather the rows of all processes, whose numbers of rows may differ."""
    padded = rows_NK.new_zeros(max(sizes), rows_NK.shape[1])
    padded[: len(rows_NK)] = rows_NK
    found = _from_all(padded)
    return [rows[:size] for rows, size in zip(found, sizes, strict=True)]


def exchanged(
    rows: Shaped[Tensor, "N ..."], sizes: list[int], incoming: list[int] | None = None
) -> tuple[Shaped[Tensor, "A ..."], list[int]]:
    """Send `sizes[0]` rows to process 0, the next `sizes[1]` to process 1, and so on.

    Args:
        rows: The rows for all processes, in the order of ranks.
        sizes: Number of rows for each process.
        incoming: Number of rows that each process sends; None: exchanged first.

    Returns:
        The received rows, and how many came from each process.
    """
    with _in_our_words():
        if incoming is None:
            sent = torch.tensor(sizes, device=rows.device)
            numbers = torch.empty_like(sent)
            distributed.all_to_all_single(numbers, sent)
            incoming = [int(number) for number in numbers]
        received = rows.new_empty(sum(incoming), *rows.shape[1:])
        distributed.all_to_all_single(received, rows.contiguous(), incoming, sizes)
    return received, incoming


def norm_of_all(common: Iterable[Tensor], dealt: Iterable[Tensor]) -> Float[Tensor, ""]:
    """Return the joint Euclidean norm of replicated tensors and of sharded ones."""
    norm = nn.utils.get_total_norm(list(common))
    parts = list(dealt)
    if not _joined or not parts:
        return norm
    square = nn.utils.get_total_norm(parts).square()
    _add(square)
    return (norm.square() + square).sqrt()


def same_draws(generator: torch.Generator) -> None:
    """Set a generator to the state of the first process's, so that all processes draw the same."""
    if _joined:
        state = generator.get_state()
        with _in_our_words():
            distributed.broadcast(state, 0)
        generator.set_state(state)


def joined_vectors(vector_XD: Float[Tensor, "X D"], num: int) -> Float[Tensor, "V D"]:
    """Gather the vectors of `num` items, of which each process has encoded a share."""
    if not _joined:
        return vector_XD
    joined_VD: Tensor = _Joined.apply(vector_XD, num)  # type: ignore[no-untyped-call]  # torch
    return joined_VD


@final
class _Joined(torch.autograd.Function):
    """Concatenates the parts of all processes; the gradient of a part is the sum over processes."""

    @staticmethod
    def forward(
        context: Any,  # torch's own, without a public type
        part_XD: Tensor,
        num: int,
    ) -> Tensor:
        context.own = share().of(num)
        slices = [Share(rank, share().world).of(num) for rank in range(share().world)]
        return torch.cat(_gathered(part_XD, [each.stop - each.start for each in slices]))

    @staticmethod
    def backward(context: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        grad_VD = grad_outputs[0].contiguous().clone()
        _add(grad_VD)
        return grad_VD[context.own], None


def mean_of_all(summed: Float[Tensor, ""], num: int) -> Float[Tensor, ""]:
    """Return the mean over the rows of all processes, given the sum over this process's rows."""
    return means_of_all(summed.unsqueeze(0), [num])[0][0]


def means_of_all(
    summed_T: Float[Tensor, " T"], num_T: Sequence[int]
) -> tuple[Float[Tensor, " T"], list[int]]:
    """Return means over the rows of all processes, and the numbers of these rows.

    The gradient of each process covers its own rows; gradients are summed over processes later.

    Args:
        summed_T: Sums over this process's rows.
        num_T: Numbers of these rows.
    """
    total_T = list(num_T)
    if _joined:
        both_2T = torch.stack([summed_T.double(), summed_T.new_tensor(total_T).double()])
        both_2T = _Total.apply(both_2T)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        summed_T, total_T = both_2T[0].to(summed_T.dtype), [int(num) for num in both_2T[1]]
    return summed_T / summed_T.new_tensor([max(1, num) for num in total_T]), total_T


@final
class _Total(torch.autograd.Function):
    """The sum over processes; all compute the same loss, so the gradient passes unchanged."""

    @staticmethod
    def forward(
        context: Any,  # torch's own, without a public type
        value: Tensor,
    ) -> Tensor:
        total = value.clone()
        _add(total)
        return total

    @staticmethod
    def backward(context: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


def _add(values: Tensor, *, most: bool = False) -> None:
    operation = distributed.ReduceOp.MAX if most else distributed.ReduceOp.SUM
    with _in_our_words():
        distributed.all_reduce(values, operation)


_NONE, _DENSE, _ROWS = 0, 1, 2


@torch.no_grad()
def add_gradients(
    parameters: Sequence[nn.Parameter], *, shared: Iterable[nn.Parameter] = ()
) -> None:
    """Sum the gradients over all processes.

    Args:
        parameters: The model's parameters, whose gradients cover the rows of one process.
        shared: Parameters of the loss, whose gradients are complete in every process.
    """
    if not _joined:
        return
    for parameter in shared:
        if parameter.grad is not None:
            parameter.grad /= share().world
    every = [*parameters, *shared]
    kinds = torch.tensor([_kind(parameter) for parameter in every])
    _add(kinds, most=True)
    by_rows = [p for p, kind in zip(every, kinds.tolist(), strict=True) if kind == _ROWS]
    dense = [p for p, kind in zip(every, kinds.tolist(), strict=True) if kind == _DENSE]
    for parameter in by_rows:
        parameter.grad = _rows_of_all(parameter)
    if dense:
        flat = torch.cat([_dense(parameter).flatten() for parameter in dense])
        _add(flat)
        parts = flat.split([parameter.numel() for parameter in dense])
        for parameter, part in zip(dense, parts, strict=True):
            parameter.grad = part.view_as(parameter)


def _kind(parameter: nn.Parameter) -> int:
    if parameter.grad is None:
        return _NONE
    return _ROWS if parameter.grad.is_sparse else _DENSE


def _dense(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _rows_of_all(parameter: nn.Parameter) -> Tensor:
    """Return the summed gradient of all rows that at least one process has read."""
    grad = _dense(parameter)
    grad = (grad if grad.is_sparse else grad.to_sparse(1)).coalesce()
    sizes = _sizes(len(grad.values()))
    row_N = torch.cat(_gathered(grad.indices().T.contiguous(), sizes)).squeeze(1)
    grad_ND = torch.cat(_gathered(grad.values(), sizes))
    return torch.sparse_coo_tensor(
        row_N.unsqueeze(0), grad_ND, parameter.shape, check_invariants=False
    )
