"""Small trained models for the tests of serving: one of each kind, on events made up here."""

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from foretaste.data.interactions import Interactions
from foretaste.data.vocabulary import Vocabulary
from foretaste.models.base import Retriever
from foretaste.models.baselines import (
    EASEConfig,
    ImplicitALSConfig,
    ItemKNNConfig,
    PopularityConfig,
)
from foretaste.models.catalogue import ModelConfig, build_model
from foretaste.models.sasrec import SASRecConfig
from foretaste.training.trained import Trained

CONFIGS: dict[str, ModelConfig] = {
    "sasrec": SASRecConfig(embedding_dim=8, num_blocks=1, num_heads=2, max_len=10),
    "als": ImplicitALSConfig(factors=8, iterations=3),
    "ease": EASEConfig(),
    "item_knn": ItemKNNConfig(),
    "popularity": PopularityConfig(),
}
NUM_USERS, NUM_ITEMS = 30, 20
SILENT_USER, SILENT_ITEM = NUM_USERS, NUM_ITEMS
"""Rows of a user and an item that the vocabularies hold and training never saw."""


def make_events(*, text_ids: bool = False, seed: int = 0) -> Interactions:
    """Users do four to nine distinct items each; user ids are 100 + row, item ids 500 + row.

    With `text_ids` they are "u100" and "i500". The title of item row 3 is "Title 3".
    """
    rng = np.random.default_rng(seed)
    weight = np.arange(NUM_ITEMS, 0, -1) / (NUM_ITEMS * (NUM_ITEMS + 1) / 2)
    histories = [
        rng.choice(NUM_ITEMS, size=rng.integers(4, 10), replace=False, p=weight)
        for _ in range(NUM_USERS)
    ]
    lengths = [len(history) for history in histories]
    users: list[int] = [100 + row for row in range(NUM_USERS + 1)]
    items: list[int] = [500 + row for row in range(NUM_ITEMS + 1)]
    return Interactions(
        users=Vocabulary(pl.Series([f"u{i}" for i in users] if text_ids else users)),
        items=Vocabulary(pl.Series([f"i{i}" for i in items] if text_ids else items)),
        offsets=np.cumsum([0, *lengths, 0]).astype(np.int64),
        item_idx=np.concatenate(histories).astype(np.int32),
        timestamp_s=np.concatenate([1000 + np.arange(n, dtype=np.int64) for n in lengths]),
        item_table=pl.DataFrame(
            {
                "title": [f"Title {row}" for row in range(NUM_ITEMS + 1)],
                "vector": [[0.5, 1.0]] * (NUM_ITEMS + 1),
            }
        ),
    )


def make_trained(kind: str, events: Interactions | None = None, *, seed: int = 0) -> Trained:
    """Make a model of a kind; a closed-form one learns, another keeps its first weights."""
    events = make_events() if events is None else events
    torch.manual_seed(seed)
    model: nn.Module = build_model(
        CONFIGS[kind], num_users=events.num_users, num_items=events.num_items
    )
    if model.learns_by == "events":
        model.learn(events)
    return Trained(
        config=CONFIGS[kind],
        model=model.eval(),
        events=events,
        seed=seed,
        train_seconds=1.5,
        settings={"model": CONFIGS[kind].model_dump(mode="json"), "split": "temporal"},
        log={"epochs": [{"epoch": 1, "loss": 2.5}]},
    )


def every_vector(model: nn.Module) -> Tensor:
    """Return every item's vector."""
    assert isinstance(model, Retriever)
    return torch.cat([item_VD for _, item_VD in model.item_blocks()])
