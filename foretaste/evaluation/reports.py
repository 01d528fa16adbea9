"""All that was measured of one model: its lists, its predictions of labelled rows, or both."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from foretaste.arguments import checked
from foretaste.evaluation.bootstrap import Interval
from foretaste.evaluation.compare import Comparison
from foretaste.evaluation.report import Report
from foretaste.evaluation.rows_report import RowsReport
from foretaste.shown import Shown


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class RankingGain(Shown):
    """What ranking anew brings: two stages against the first of them alone."""

    retrieval: Report
    """Of the retriever alone."""
    comparison: Comparison
    """The two stages minus the retriever alone, user by user."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """The retriever's figures, and the gain."""
        alone = {f"{name}_retrieval": value for name, value in self.retrieval.metrics.items()}
        return alone | {f"{self.comparison.metric}_gain": self.comparison.difference}

    @property
    def intervals(self) -> Mapping[str, Interval]:
        """Of the gain, paired."""
        return {f"{self.comparison.metric}_gain": self.comparison.interval}

    @checked
    def to_json(self) -> dict[str, object]:
        """Return it as plain JSON values."""
        return {**asdict(self.comparison), "retrieval": dict(self.retrieval.metrics)}

    def __str__(self) -> str:
        return f"two stages - retrieval alone, {self.comparison}"

    def _facts(self) -> dict[str, object]:
        return {"": str(self)}


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Reports(Shown):
    """One report or two of the same model. Printed, their tables."""

    lists: Report | None = None
    """Of lists over the catalogue; None where they were not asked for."""
    rows: RowsReport | None = None
    """Of labelled rows; None for models that predict no labels, or where not asked for."""
    gain: RankingGain | None = None
    """Of lists in two stages against the first alone; None for other models."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """All figures; no name is of both."""
        return {name: value for part in self._parts() for name, value in part.metrics.items()}

    @property
    def intervals(self) -> Mapping[str, Interval]:
        """All intervals."""
        return {name: ends for part in self._parts() for name, ends in part.intervals.items()}

    @checked
    def to_json(self, *, per_user: bool = True) -> str:
        """Return one JSON document; of two reports, that of rows stands in the other as `rows`.

        Args:
            per_user: False leaves each user's and each row's values out.
        """
        rows = None if self.rows is None else self.rows.to_json(per_row=per_user)
        if self.lists is None:
            return rows or "{}"
        document = json.loads(self.lists.to_json(per_user=per_user))
        if rows is not None:
            document["rows"] = json.loads(rows)
        if self.gain is not None:
            document["gain"] = self.gain.to_json()
        return json.dumps(document, allow_nan=False)

    @checked
    def noted(self, sentence: str) -> "Reports":
        """Return them with a further note, which comes first."""
        lists, rows = self.lists, self.rows
        return replace(
            self,
            lists=lists and replace(lists, notes=(sentence, *lists.notes)),
            rows=rows and replace(rows, notes=(sentence, *rows.notes)),
        )

    def __str__(self) -> str:
        return "\n\n".join(map(str, self._parts())) or "nothing was measured"

    def _parts(self) -> list[Report | RowsReport | RankingGain]:
        return [part for part in (self.lists, self.gain, self.rows) if part is not None]

    def _facts(self) -> dict[str, object]:
        return {"": ", ".join(map(repr, self._parts())) or "nothing was measured"}

    def _repr_html_(self) -> str:
        return "".join(part._repr_html_() for part in self._parts())
