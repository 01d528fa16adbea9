"""Charts as SVG text: reliability curves and the gates of MMoE."""

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

import numpy as np
import torch
from jaxtyping import Float64

from foretaste.arguments import checked
from foretaste.data.draws import own_blocks
from foretaste.data.rows import PartName
from foretaste.data.splits import Split
from foretaste.errors import ConfigError
from foretaste.evaluation.report import RowsReport
from foretaste.evaluation.rows import blocks_of, known_rows, ranker_of, rows_to_judge
from foretaste.training.trained import Trained


def page(parts: Iterable[str], *, width: float, height: float, title: str) -> str:
    """Return a complete picture on a white background."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" font-family="sans-serif">\n'
        f"<title>{escape(title)}</title>\n"
        '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    """Return a straight line."""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}"/>'


def text(
    x: float,
    y: float,
    words: str,
    *,
    anchor: str = "start",
    size: int = 12,
    colour: str = "#333333",
) -> str:
    """Return a text; `anchor` is "start", "middle" or "end"."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'fill="{colour}">{escape(words)}</text>'
    )


_SIZE, _LEFT, _TOP, _LEGEND = 300.0, 60.0, 40.0, 160.0
_COLOURS = ("#3465a4", "#2e8b57", "#c4622d", "#75507b", "#888888")


@checked
def reliability_svg(report: RowsReport) -> str:
    """Draw observed over predicted shares, one curve per task and calibration.

    A calibrated model lies on the grey diagonal. A dot's area grows with the rows of its bin.
    """
    title = f"{report.model} on {report.holdout}: predicted and observed shares"
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


_BLOCK_ROWS = 2**13
_LEFT, _TOP, _BAR, _GROUP_GAP, _HEIGHT = 60.0, 50.0, 22.0, 30.0, 200.0
_BLUE, _GREY = "#3465a4", "#888888"


@dataclass(frozen=True, eq=False, kw_only=True)
class Gates:
    """The weights of experts by task. A task's means sum to 1."""

    model: str
    tasks: tuple[str, ...]
    mean_TE: Float64[np.ndarray, "T E"]
    spread_TE: Float64[np.ndarray, "T E"]
    """Standard deviation over rows; 0 if every row has the same weights."""
    rows: int

    def apart(self, one: str, other: str) -> float:
        """Return the distance of two tasks' means: 0 if equal, 1 without a common expert."""
        first, second = (self.mean_TE[self.tasks.index(name)] for name in (one, other))
        return float(np.abs(first - second).sum() / 2)


@checked
def read_gates(model: Trained, split: Split, *, part: PartName = "test") -> Gates:
    """Read a model's gates over the rows of a part.

    Raises:
        ConfigError: The model has no gates, or the part has no rows.
        DataError: The model knows few items of the rows, or was trained on most of them.
    """
    network, ranker, model = model.model, ranker_of(model), model.asked_by(split.events)
    if not ranker.has_gates:
        raise ConfigError(
            f"{type(network).__name__} has no gates: MMoE has",
            name="trained",
            value=type(network).__name__,
        )
    split = known_rows(model, split, part=part)[0]
    rows, _, _ = rows_to_judge(model, split, part=part)
    if not len(rows):
        raise ConfigError(
            f"{part!r} has no rows: read the gates on another part", name="part", value=part
        )
    blocks = []
    for _, batch in blocks_of(model, rows, own_blocks(len(rows), _BLOCK_ROWS)):
        with torch.inference_mode():
            gates = ranker.gates(batch.queries, batch.item_BC[:, :1])
        blocks.append(torch.stack([gates[task.name][:, 0] for task in ranker.tasks]))
    gate_TNE = torch.cat(blocks, dim=1).double().cpu().numpy()
    return Gates(
        model=type(network).__name__,
        tasks=tuple(task.name for task in ranker.tasks),
        mean_TE=gate_TNE.mean(axis=1),
        spread_TE=gate_TNE.std(axis=1),
        rows=len(rows),
    )


@checked
def gates_svg(gates: Gates) -> str:
    """Draw a group of bars per task, one bar per expert, with lines of one standard deviation."""
    num_experts = gates.mean_TE.shape[1]
    title = f"{gates.model}: how each task weights the experts, mean over {gates.rows:,} rows"
    parts = [text(_LEFT, 22.0, title, size=14)]
    group = _BAR * num_experts + _GROUP_GAP
    right, bottom = _LEFT + group * len(gates.tasks), _TOP + _HEIGHT
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = bottom - tick * _HEIGHT
        parts += [
            line(_LEFT, y, right, y, "#dddddd"),
            text(_LEFT - 8, y + 4, f"{tick:g}", anchor="end"),
        ]
    for place, task in enumerate(gates.tasks):
        left = _LEFT + place * group + _GROUP_GAP / 2
        parts.append(text(left + _BAR * num_experts / 2, bottom + 36, task, anchor="middle"))
        for expert in range(num_experts):
            mean, spread = gates.mean_TE[place, expert], gates.spread_TE[place, expert]
            x, height = left + expert * _BAR, mean * _HEIGHT
            middle = x + _BAR / 2
            low, high = (bottom - min(1, max(0, mean + s * spread)) * _HEIGHT for s in (-1, 1))
            parts += [
                f'<rect x="{x + 2:.1f}" y="{bottom - height:.1f}" width="{_BAR - 4:.1f}" '
                f'height="{height:.1f}" fill="{_BLUE}"/>',
                line(middle, low, middle, high, _GREY),
                text(middle, bottom + 16, str(expert + 1), anchor="middle"),
            ]
    width = max(right + 40, _LEFT + 8.0 * len(title))
    return page(parts, width=width, height=bottom + 50, title=title)
