"""The metrics of parts: who is served well, and who is not.

Shape legend: Q queries, N targets of all queries, I items, M metrics.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Bool, Float64, Int64

from foretaste.evaluation.list_metrics import popularity_rank
from foretaste.evaluation.report import Slice
from foretaste.evaluation.task import Task

HISTORY_EDGES = (1, 5, 10, 20, 50, 100)
"""Where each bucket of history lengths begins."""


def mean_by_user(
    user_R: Int64[np.ndarray, " R"], values_RM: Float64[np.ndarray, "R M"]
) -> tuple[Int64[np.ndarray, " U"], Float64[np.ndarray, "U M"]]:
    """Return the users that occur, ascending, and each one's mean over its rows."""
    user_U, row_R, count_U = np.unique(user_R, return_inverse=True, return_counts=True)
    sums = [np.bincount(row_R, values_RM[:, m], len(user_U)) for m in range(values_RM.shape[1])]
    return user_U, np.stack(sums, axis=1) / count_U[:, None]


def query_slices(task: Task, values: Mapping[str, Float64[np.ndarray, " Q"]]) -> Iterator[Slice]:
    """Give the users without history, then the others by its length; empty slices are left out."""
    targets_Q = np.diff(task.offsets_Q1)
    parts: list[tuple[str, str, np.ndarray]] = [("cold users", "no history", task.length_Q == 0)]
    for low, high in zip(HISTORY_EDGES, (*HISTORY_EDGES[1:], None), strict=True):
        label = f"{low} events or more" if high is None else f"{low} to {high - 1} events"
        below = True if high is None else task.length_Q < high
        parts.append(("history length", label, (task.length_Q >= low) & below))
    for group, label, in_Q in parts:
        if in_Q.any():
            user_U, means_UM = mean_by_user(
                task.user_Q[in_Q], np.stack([value[in_Q] for value in values.values()], axis=1)
            )
            yield Slice(
                group=group,
                label=label,
                users=len(user_U),
                queries=int(in_Q.sum()),
                targets=int(targets_Q[in_Q].sum()),
                metrics=dict(zip(values, means_UM.mean(axis=0).tolist(), strict=True)),
            )


def target_slices(
    task: Task,
    found: Mapping[str, Float64[np.ndarray, " N"]],
    found_among_cold: Mapping[str, Float64[np.ndarray, " N"]],
    *,
    count_I: Int64[np.ndarray, " I"],
    in_headline_N: Bool[np.ndarray, " N"],
) -> Iterator[Slice]:
    """Give the targets by tenths of the catalogue, most popular first, then those unknown to it.

    Args:
        task: The queries.
        found: Name of a recall to each target's probability to be found.
        found_among_cold: Likewise, where items without a training event are ranked alone; empty
            gives no slice of it.
        count_I: Training events of each item.
        in_headline_N: Targets of queries with a history.
    """
    query_N, num_known = task.query_N, int((count_I > 0).sum())
    tenth_N = 10 * popularity_rank(count_I)[task.target_N] // num_known
    tenth_N[count_I[task.target_N] == 0] = 10
    parts = [("target popularity", _tenth_label(tenth), tenth, found) for tenth in range(10)]
    parts.append(("cold items", "no training event", 10, found))
    if found_among_cold:
        parts.append(("cold items among themselves", "no training event", 10, found_among_cold))
    for group, label, tenth, recalls in parts:
        in_N = in_headline_N & (tenth_N == tenth)
        if not in_N.any():
            continue
        query = query_N[in_N]
        user_U, means_UM = mean_by_user(
            task.user_Q[query], np.stack([value[in_N] for value in recalls.values()], axis=1)
        )
        yield Slice(
            group=group,
            label=label,
            users=len(user_U),
            queries=len(np.unique(query)),
            targets=int(in_N.sum()),
            metrics=dict(zip(recalls, means_UM.mean(axis=0).tolist(), strict=True)),
        )


def _tenth_label(tenth: int) -> str:
    end = {0: " (most popular)", 9: " (least popular)"}.get(tenth, "")
    return f"tenth {tenth + 1}{end}"
