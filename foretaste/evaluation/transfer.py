"""What tasks give to and take from each other: joint models against one model a task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from foretaste.arguments import checked
from foretaste.config import Resamples, Seed
from foretaste.errors import DataError
from foretaste.evaluation.compare import Comparison
from foretaste.evaluation.compare_rows import compare_rows
from foretaste.evaluation.report import markdown_table
from foretaste.evaluation.rows_report import RowsReport


@dataclass(frozen=True, kw_only=True)
class TransferRow:
    """One task of one joint model."""

    model: str
    task: str
    compared: Comparison
    """The joint model less the single one."""
    lower_is_better: bool

    @property
    def verdict(self) -> str:
        """Say whether the other tasks helped; "neither" where luck could have made it."""
        low, high = self.compared.interval
        if low <= 0 <= high:
            return "neither"
        return "gain" if (low > 0) != self.lower_is_better else "loss"


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """A table of gains and losses. Printed, it is Markdown."""

    rows: tuple[TransferRow, ...]

    def __str__(self) -> str:
        table = [["task", "metric", "model", "joint", "single", "difference", "p", ""]]
        for row in self.rows:
            found = row.compared
            ends = f"[{found.interval.low:+.4f}, {found.interval.high:+.4f}]"
            table.append(
                [
                    row.task,
                    found.metric,
                    row.model,
                    f"{found.mean_a:.4f}",
                    f"{found.mean_b:.4f}",
                    f"{found.difference:+.4f} {ends}",
                    f"{found.p_value:.4f}",
                    row.verdict,
                ]
            )
        return markdown_table(table)


@checked
def transfer(
    joint: Mapping[str, Sequence[RowsReport]],
    single: Mapping[str, Sequence[RowsReport]],
    *,
    resamples: Resamples = 2000,
    seed: Seed = 0,
) -> Transfer:
    """Compare joint models with single ones, task by task, on the same rows and users.

    Binary tasks are compared by AUC, the others by RMSE.

    Args:
        joint: From a model's name to its reports, one a seed.
        single: From a task's name to the reports of a model that has this task alone.
        resamples: How often users are drawn again.
        seed: Decides the draw.

    Raises:
        DataError: The rows or labels differ, or no joint model has a task of `single`.
    """
    rows = [
        TransferRow(
            model=name,
            task=task.name,
            compared=compare_rows(
                reports,
                single[task.name],
                "auc" if task.kind == "binary" else "rmse",
                task=task.name,
                resamples=resamples,
                seed=seed,
            ),
            lower_is_better=task.kind != "binary",
        )
        for name, reports in joint.items()
        for task in reports[0].tasks
        if task.name in single
    ]
    if not rows:
        raise DataError(f"no joint model has a task of {', '.join(single) or 'the single ones'}")
    return Transfer(rows=tuple(sorted(rows, key=lambda row: row.task)))
