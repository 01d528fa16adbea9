"""Quality against cost as a picture."""

import math
from collections.abc import Sequence
from html import escape

from foretaste.evaluation.chart import line, page, text
from foretaste.experiment.compare_table import ModelComparison, label

_WIDTH, _HEIGHT = 760.0, 420.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 70.0, 230.0, 40.0, 50.0
_LEAST_SECONDS = 1e-3
_BLUE, _GREEN, _GREY = "#3465a4", "#2e8b57", "#888888"


def comparison_svg(found: ModelComparison) -> str:
    """Draw each model's quality, with its interval, over the seconds of its training.

    The seconds are on a logarithmic scale. The model to take is green; models that cannot be
    told from the best are filled.
    """
    seconds = [max(row.train_seconds, _LEAST_SECONDS) for row in found.rows]
    ends = [end for row in found.rows for end in row.interval]
    first, last = math.floor(math.log10(min(seconds))), math.ceil(math.log10(max(seconds)))
    last = max(last, first + 1)
    ticks = _ticks(min(0.0, *ends), max(*ends, 1e-9))
    low, high = ticks[0], ticks[-1]

    def across(value: float) -> float:
        share = (math.log10(value) - first) / (last - first)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def up(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [text(_LEFT, 22.0, found.title(), size=14)]
    for tick in ticks:
        parts += [line(_LEFT, up(tick), _WIDTH - _RIGHT, up(tick), "#dddddd")]
        parts += [text(_LEFT - 8, up(tick) + 4, f"{tick:g}", anchor="end")]
    for power in range(first, last + 1):
        x = across(10.0**power)
        parts += [line(x, _TOP, x, _HEIGHT - _BOTTOM, "#dddddd")]
        parts += [text(x, _HEIGHT - _BOTTOM + 18, f"{10.0**power:g}", anchor="middle")]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts += [text(middle, _HEIGHT - 10, "seconds of training", anchor="middle")]
    for number, (row, cost) in enumerate(zip(found.rows, seconds, strict=True), 1):
        colour = _GREEN if row.name == found.pick else _BLUE
        x, y = across(cost), up(row.quality)
        fill = colour if row.ties_with_the_best else "white"
        ink = "white" if row.ties_with_the_best else colour
        parts += [
            line(x, up(row.interval.low), x, up(row.interval.high), colour),
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" fill="{fill}" stroke="{colour}">'
            f"<title>{escape(row.name)}</title></circle>",
            text(x, y + 4, str(number), anchor="middle", colour=ink),
        ]
        legend = f"{number}  {row.name}  {row.quality:.4f}"
        parts += [text(_WIDTH - _RIGHT + 16, _TOP + 18 * number, legend, colour=colour)]
    for number, failed in enumerate(found.failed, len(found.rows) + 1):
        legend = f"×  {failed.name}  failed"
        parts += [text(_WIDTH - _RIGHT + 16, _TOP + 18 * number, legend, colour=_GREY)]
    height = max(_HEIGHT, _TOP + 18 * (len(found.rows) + len(found.failed) + 1))
    title = f"{label(found.metric)} against seconds of training"
    return page(parts, width=_WIDTH, height=height, title=title)


def _ticks(low: float, high: float) -> Sequence[float]:
    """Return about five round numbers that reach from `low` to `high` or beyond."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [
        round(step * number, 12)
        for number in range(math.floor(low / step), math.ceil(high / step) + 1)
    ]
