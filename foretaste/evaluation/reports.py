"""All that was measured of one model: its lists, its predictions of labelled rows, or both."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from foretaste.evaluation.bootstrap import Interval
from foretaste.evaluation.report import Report
from foretaste.evaluation.rows_report import RowsReport


@dataclass(frozen=True, eq=False, kw_only=True)
class Reports:
    """One report or two of the same model. Printed, their tables."""

    lists: Report | None = None
    """Of lists over the catalogue; None where they were not asked for."""
    rows: RowsReport | None = None
    """Of labelled rows; None for models that predict no labels, or where not asked for."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """All figures; no name is of both."""
        return {name: value for part in self._parts() for name, value in part.metrics.items()}

    @property
    def intervals(self) -> Mapping[str, Interval]:
        """All intervals."""
        return {name: ends for part in self._parts() for name, ends in part.intervals.items()}

    def to_json(self, *, per_user: bool = True) -> str:
        """Return one JSON document; of two reports, that of rows stands in the other as `rows`.

        Args:
            per_user: False leaves each user's and each row's values out.
        """
        rows = None if self.rows is None else self.rows.to_json(per_row=per_user)
        if self.lists is None:
            return rows or "{}"
        lists = self.lists.to_json(per_user=per_user)
        if rows is None:
            return lists
        return json.dumps(json.loads(lists) | {"rows": json.loads(rows)}, allow_nan=False)

    def __str__(self) -> str:
        return "\n\n".join(map(str, self._parts()))

    def _parts(self) -> list[Report | RowsReport]:
        return [part for part in (self.lists, self.rows) if part is not None]
