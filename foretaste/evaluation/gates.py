"""Which experts each task listens to: what a model's gates say over the rows of a part.

Shape legend: N rows, T tasks, E experts.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64

from foretaste.arguments import checked
from foretaste.data.rows import PartName
from foretaste.data.splits import Split
from foretaste.errors import ConfigError
from foretaste.evaluation.rows import blocks_of, known_rows, ranker_of, rows_to_judge
from foretaste.evaluation.svg import line, page, text
from foretaste.models.interface import Gated
from foretaste.training.trained import Trained

_BLOCK_ROWS = 2**13
_LEFT, _TOP, _BAR, _GROUP_GAP, _HEIGHT = 60.0, 50.0, 22.0, 30.0, 200.0
_BLUE, _GREY = "#3465a4", "#888888"


@dataclass(frozen=True, eq=False, kw_only=True)
class Gates:
    """How tasks weigh experts. A task's means sum to 1."""

    model: str
    tasks: tuple[str, ...]
    mean_TE: Float64[np.ndarray, "T E"]
    spread_TE: Float64[np.ndarray, "T E"]
    """Standard deviation over rows: 0 where every row is weighed alike."""
    rows: int

    def apart(self, one: str, other: str) -> float:
        """Return how far two tasks' means lie apart: 0 alike, 1 no expert in common."""
        first, second = (self.mean_TE[self.tasks.index(name)] for name in (one, other))
        return float(np.abs(first - second).sum() / 2)


@checked
def read_gates(model: Trained, split: Split, *, part: PartName = "test") -> Gates:
    """Read a model's gates over the rows of a part.

    Raises:
        ConfigError: The model has no gates, or the part no rows.
        DataError: The model knows hardly an item of the rows, or was trained on most of them.
    """
    network, ranker, model = model.model, ranker_of(model), model.asked_by(split.events)
    if not isinstance(network, Gated):
        raise ConfigError(f"{type(network).__name__} has no gates: MMoE has")
    split = known_rows(model, split, part=part)[0]
    rows, _, _ = rows_to_judge(model, split, part=part)
    if not len(rows):
        raise ConfigError(f"{part!r} has no rows: read the gates on another part")
    blocks = []
    for batch in blocks_of(model, rows, _BLOCK_ROWS):
        with torch.inference_mode():
            gates = network.gates(batch.queries, batch.item_BC[:, :1])
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
    """Draw a group of bars a task, one bar an expert; a line reaches one deviation up and down."""
    num_experts = gates.mean_TE.shape[1]
    title = f"{gates.model}: how each task weighs the experts, mean over {gates.rows:,} rows"
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
