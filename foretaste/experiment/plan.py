"""Estimates memory, traffic and hours of a recipe for more users, items and events.

Tables are counted on torch's meta device, where a tensor has a size and no memory. The speed of
training, and the number of rows that an event reads, are measured with synthetic events on this
machine.

Shape legend: E synthetic events.
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, final

import numpy as np
import polars as pl
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from foretaste.arguments import checked
from foretaste.data.draws import Share
from foretaste.data.interactions import Interactions
from foretaste.data.splits import Split
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import ConfigError
from foretaste.experiment.fit import fit
from foretaste.experiment.recipe import ExperimentConfig
from foretaste.models.base import Model, sizes_only
from foretaste.models.catalogue import ModelConfig, TwoStageConfig, build_model, tasks_of
from foretaste.models.layers.table import OwnRows, Table
from foretaste.training.settings import ROWS_FROM, TrainingConfig, learns_by_rows
from foretaste.training.sharded import rows_of

_MOST_IDS, _MOST_EVENTS = 2 * ROWS_FROM, 300_000
"""Number of synthetic ids, enough for a table that is updated by rows."""
_SECONDS = 10.0
_EVENT_BYTES = 16
"""Bytes of an event's user, item and time in a store."""


@dataclass(frozen=True, kw_only=True)
class TablePlan:
    """The memory and traffic of one table."""

    name: str
    rows: int
    width: int
    bytes_in_all: int
    """Bytes of weights, the optimizer's state, dense gradients if any, and copies."""
    bytes_of_each: int
    """Bytes of it in the process with the most rows."""


@final
@dataclass(frozen=True, kw_only=True)
class SizePlan:
    """The estimated needs of a recipe."""

    tables: tuple[TablePlan, ...]
    processes: int
    dense_bytes: int
    """Bytes of all other weights in each process, with the optimizer's state."""
    events_bytes: int
    """Bytes of the events on disk, which batches read on demand."""
    traffic_bytes: int
    """Maximum number of bytes that a process sends and receives in a step; a row may be read
    twice."""
    steps: int
    """Number of steps in an epoch."""
    events_per_second: float
    """Events per second of one process, measured here."""
    hours: float
    """Hours of all epochs that the settings allow, if processes do not wait for each other."""

    @property
    def bytes_of_each(self) -> int:
        """Memory of weights in each process."""
        return self.dense_bytes + sum(table.bytes_of_each for table in self.tables)

    def document(self) -> dict[str, Any]:
        """Return all figures by name."""
        return {**asdict(self), "bytes_of_each": self.bytes_of_each}


@checked
def plan_size(
    config: ExperimentConfig, *, events: int, users: int, items: int, processes: int = 1
) -> SizePlan:
    """Estimate the needs of a recipe at another size, without features.

    Args:
        config: The recipe.
        events: Number of events.
        users: Number of users.
        items: Number of items.
        processes: Number of training processes.

    Raises:
        ConfigError: The model is fitted in closed form or in two stages, or a size is below 1.
    """
    model = config.model
    if isinstance(model, TwoStageConfig) or not model.usual.objective:
        raise ConfigError(
            f"{model.kind} is not trained in one training loop: plan for a model that is, such as "
            "the retriever of two stages",
            name="model.kind",
            value=model.kind,
        )
    if min(events, users, items, processes) < 1:
        raise ConfigError("events, users, items and processes are 1 or more", name="events")
    training = config.training.settled(model.usual.training, events, items)
    network = _on_meta(model, users, items)
    tables = _tables(network)
    plans = tuple(_table_plan(name, t, training, processes) for name, t in tables.items())
    in_tables = {p for table in tables.values() for p in table.parameters()}
    dense = sum(p.nbytes for p in network.parameters() if p not in in_tables)
    batch = training.batch_of(events)
    rate, reads = _measured(config, events=events, users=users, items=items, batch=batch)
    sent = 2 * dense + sum(
        _sent(table, training, rows=batch * reads.get(name, 0.0), processes=processes)
        for name, table in tables.items()
    )
    return SizePlan(
        tables=plans,
        processes=processes,
        dense_bytes=round(_copies(training) * dense),
        events_bytes=_EVENT_BYTES * events,
        traffic_bytes=0 if processes == 1 else round(sent),
        steps=math.ceil(events / batch),
        events_per_second=rate,
        hours=training.rounds * events / (rate * processes) / 3600,
    )


def _tables(network: nn.Module) -> dict[str, Table]:
    """Return a model's tables by name, without the parts of a table."""
    found: dict[str, Table] = {}
    for name, part in network.named_modules():
        if isinstance(part, Table) and not any(name.startswith(f"{known}.") for known in found):
            found[name] = part
    return found


def _sent(table: Table, training: TrainingConfig, *, rows: float, processes: int) -> float:
    """Return the bytes per step that a process sends and receives for a table.

    Args:
        table: The table.
        training: Decides whether it is sharded, and whether it is updated by rows.
        rows: Number of rows read in a step by all processes together.
        processes: Number of processes.
    """
    row_bytes = 4 * table.width
    if _is_dealt(table, training):
        return 2 * row_bytes * rows / processes
    if isinstance(table, OwnRows) and learns_by_rows(table, training):
        return row_bytes * rows
    return 2.0 * sum(p.nbytes for p in table.parameters())


def _on_meta(config: ModelConfig, users: int, items: int) -> Model:
    with sizes_only():
        return build_model(config, num_users=users, num_items=items, copies=0)


def _table_plan(name: str, table: Table, training: TrainingConfig, processes: int) -> TablePlan:
    in_all, dealt = 0, 0
    for part in table.modules():
        for weight in part.parameters(recurse=False):
            needed = round(weight.nbytes * _copies(training, part))
            in_all += needed
            if _is_dealt(part, training):
                dealt += needed
    largest = len(rows_of(table.num_rows, Share(0, processes))) / max(1, table.num_rows)
    return TablePlan(
        name=name,
        rows=table.num_rows,
        width=table.width,
        bytes_in_all=in_all,
        bytes_of_each=in_all - dealt + math.ceil(dealt * largest),
    )


def _is_dealt(part: nn.Module, training: TrainingConfig) -> bool:
    least = training.sharded_from
    return least is not None and isinstance(part, OwnRows) and part.num_rows >= least


def _copies(training: TrainingConfig, part: nn.Module | None = None) -> float:
    """Return the number of stored numbers per weight, including the best so far and an average."""
    kept = 3.0 if training.average_decay else 2.0
    if isinstance(part, OwnRows) and learns_by_rows(part, training):
        return kept + (1 / part.width if training.tables == "row_adagrad" else 2)
    return kept + 3


def _measured(
    config: ExperimentConfig, *, events: int, users: int, items: int, batch: int
) -> tuple[float, dict[str, float]]:
    """Return the training rate in synthetic events per second, and the rows that an event reads."""
    made = _made_up(config, min(events, _MOST_EVENTS), users, items)
    rows = Counter[Table]()

    def count(module: nn.Module, given: tuple[Any, ...]) -> None:
        if isinstance(module, Table) and module.training:
            rows[module] += given[0].numel()

    part_E = np.zeros(len(made), dtype=np.uint8)
    split = Split(kind="random", events=made, part_E=part_E, rolling=False)
    training = config.training.model_copy(update={"search": False, "batch_events": batch})
    hook = register_module_forward_pre_hook(count)
    try:
        trained = fit(
            config.model,
            split,
            training=training,
            objective=config.objective,
            show=False,
            max_seconds=_SECONDS,
        )
    finally:
        hook.remove()
    log: Any = trained.log
    names = {table: name for name, table in trained.model.named_modules()}
    learned = log["steps"] * min(batch, len(made))
    reads = {names[table]: num / learned for table, num in rows.items()}
    return float(log["epochs"][-1]["events_per_second"]), reads


def _made_up(config: ExperimentConfig, num: int, users: int, items: int) -> Interactions:
    """Return synthetic events with the requested number per user and a skewed item popularity."""
    rng = np.random.default_rng(0)
    num_users, num_items = (min(ids, _MOST_IDS) for ids in (users, items))
    user_E = np.sort(rng.integers(num_users, size=num))
    item_E = np.minimum(rng.zipf(1.2, num) - 1, num_items - 1).astype(np.int32)
    offsets = np.searchsorted(user_E, np.arange(num_users + 1)).astype(np.int64)
    columns = {
        task.column: rng.choice(task.levels or (0.0, 1.0), num).astype(np.float32)
        for task in tasks_of(config.model)
        if task.column
    }
    return Interactions(
        users=Vocabulary(pl.Series(range(num_users))),
        items=Vocabulary(pl.Series(range(num_items))),
        offsets=offsets,
        item_idx=item_E,
        timestamp_s=np.arange(num, dtype=np.int64),
        columns=columns,
    )
