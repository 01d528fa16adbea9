"""The reliability curve as a picture."""

from html import escape

from foretaste.arguments import checked
from foretaste.evaluation.rows_report import RowsReport
from foretaste.evaluation.svg import line, page, text

_SIZE, _LEFT, _TOP, _LEGEND = 300.0, 60.0, 40.0, 160.0
_COLOURS = ("#3465a4", "#2e8b57", "#c4622d", "#75507b", "#888888")


@checked
def reliability_svg(report: RowsReport) -> str:
    """Draw what happened over what was predicted, a curve a task and calibration.

    A calibrated model lies on the grey diagonal. A dot's area grows with the rows of its bin.
    """
    title = f"{report.model} on {report.holdout}: what was said and what happened"
    middle, bottom = _LEFT + _SIZE / 2, _TOP + _SIZE
    parts = [
        text(_LEFT, 22.0, title, size=14),
        line(_x(0.0), _y(0.0), _x(1.0), _y(1.0), "#bbbbbb"),
        text(middle, bottom + 36, "predicted probability", anchor="middle"),
    ]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts += [
            line(_x(0.0), _y(tick), _x(1.0), _y(tick), "#eeeeee"),
            text(_x(tick), bottom + 18, f"{tick:g}", anchor="middle"),
            text(_LEFT - 8, _y(tick) + 4, f"{tick:g}", anchor="end"),
        ]
    for number, (name, curve) in enumerate(report.reliability.items()):
        colour, rows = _COLOURS[number % len(_COLOURS)], sum(curve.count)
        points = list(zip(curve.predicted, curve.happened, curve.count, strict=True))
        path = " L".join(f"{_x(said):.1f},{_y(happened):.1f}" for said, happened, _ in points)
        parts.append(f'<path d="M{path}" stroke="{colour}" fill="none"/>')
        for said, happened, count in points:
            radius = 2 + 8 * (count / rows) ** 0.5
            words = f"{name}: {count:,} rows, {said:.3f} predicted, {happened:.3f} happened"
            parts.append(
                f'<circle cx="{_x(said):.1f}" cy="{_y(happened):.1f}" r="{radius:.1f}" '
                f'fill="{colour}" fill-opacity="0.5"><title>{escape(words)}</title></circle>'
            )
        parts.append(text(_x(1.0) + 16, _TOP + 18 * (number + 1), name, colour=colour))
    width = max(_LEFT + _SIZE + _LEGEND, _LEFT + 8.0 * len(title))
    return page(parts, width=width, height=bottom + 50, title=title)


def _x(value: float) -> float:
    return _LEFT + value * _SIZE


def _y(value: float) -> float:
    return _TOP + (1 - value) * _SIZE
