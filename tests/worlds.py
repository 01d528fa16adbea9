"""Synthetic data whose right answers are known, and models trained on them."""

from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from foretaste.data.graph import Graph
from foretaste.data.interactions import Interactions
from foretaste.data.splits import Split
from foretaste.data.vocabulary import Vocabulary
from foretaste.experiment.learning import make_learning
from foretaste.models.base import Model, Retriever
from foretaste.models.baselines import (
    EASEConfig,
    ImplicitALSConfig,
    ItemKNNConfig,
    PopularityConfig,
)
from foretaste.models.catalogue import ModelConfig, build_model
from foretaste.models.sasrec import SASRecConfig
from foretaste.serving.recommender import build_recommender
from foretaste.training.fit import Fit
from foretaste.training.objectives import ObjectiveConfig
from foretaste.training.settings import TrainingConfig
from foretaste.training.trained import Trained

# --- histories -----------------------------------------------------------------------------------


def walks(*, num_users: int = 300, num_items: int = 60, length: int = 12) -> list[list[int]]:
    """Return histories that walk on, one or two items at a time, from anywhere on a circle."""
    draw = np.random.default_rng(0)
    steps_UL = draw.integers(1, 3, (num_users, length)).cumsum(axis=1)
    start_U1 = draw.integers(0, num_items, (num_users, 1))
    return ((start_U1 + steps_UL) % num_items).tolist()


def events_of(histories: list[list[int]], *, num_items: int, **columns: np.ndarray) -> Interactions:
    """Return events of given histories, each a list of items, oldest first.

    Ids are the rows; times count the events, user by user.
    """
    lengths = [len(history) for history in histories]
    return Interactions(
        users=Vocabulary(pl.Series(range(len(histories)), dtype=pl.Int64)),
        items=Vocabulary(pl.Series(range(num_items), dtype=pl.Int64)),
        offsets=np.cumsum([0, *lengths]).astype(np.int64),
        item_idx=np.array([item for history in histories for item in history], dtype=np.int32),
        timestamp_s=np.arange(sum(lengths), dtype=np.int64),
        columns=columns,
    )


def everything(events: Interactions) -> Split:
    """Return a split in which all events are training events."""
    part_E = np.zeros(len(events), dtype=np.uint8)
    return Split(kind="given", events=events, part_E=part_E, rolling=False)


NUM_GROUPS, GROUP_SIZE = 5, 8
PLANTED_ITEMS = NUM_GROUPS * GROUP_SIZE


def planted_histories(seed: int = 0, num_users: int = 120) -> list[list[int]]:
    """Each user does five of the eight items of one group."""
    rng = np.random.default_rng(seed)
    return [
        (user % NUM_GROUPS * GROUP_SIZE + rng.permutation(GROUP_SIZE)[:5]).tolist()
        for user in range(num_users)
    ]


def learn(
    model: Model,
    events: Interactions,
    objective: ObjectiveConfig,
    *,
    epochs: int = 20,
    learning_rate: float = 0.03,
    graph: Graph | None = None,
) -> None:
    """Train a model that no settings describe, by the wiring of `fit`."""
    model.begin(events)
    learning = make_learning(model, objective, events, batch_events=100, seed=0, graph=graph)
    loop = TrainingConfig(epochs=epochs, learning_rate=learning_rate, warmup_steps=10, device="cpu")
    Fit(model, loop, seed=0, plan=learning.plan, objective=learning.objective).run()
    model.learn_new_users(events)
    model.finish()
    model.eval()


# --- small served models -------------------------------------------------------------------------

CONFIGS: dict[str, ModelConfig] = {
    "sasrec": SASRecConfig(embedding_dim=8, num_blocks=1, num_heads=2, max_len=10),
    "als": ImplicitALSConfig(factors=8, iterations=3),
    "ease": EASEConfig(),
    "item_knn": ItemKNNConfig(),
    "popularity": PopularityConfig(),
}
NUM_USERS, NUM_ITEMS = 30, 20
SILENT_USER, SILENT_ITEM = NUM_USERS, NUM_ITEMS
"""Rows of a user and an item that are in the vocabularies and have no training event."""


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


# --- films: two kinds of films, two kinds of people ----------------------------------------------

FILM_USERS, PER_KIND, SEEN = 40, 15, 9
HOSTILE = 'The <script>document.title = "owned"</script><b>Bold</b> & Brave'
LONG = "The" + "VeryLongTitleWithoutASingleBlankInIt" * 3
REPORT = {
    "model": "ItemKNN",
    "holdout": "test",
    "k": [10],
    "metrics": {"ndcg_at_10": 0.25, "hit_rate_at_10": 0.5, "coverage_at_10": 0.9},
    "intervals": {"ndcg_at_10": [0.2, 0.3], "hit_rate_at_10": [0.4, 0.6]},
    "counts": {"users": 40},
    "notes": ["candidates: the full catalogue"],
}


def is_space(item_id: str) -> bool:
    """Films 101 to 115 play in space, 116 to 130 are heists."""
    return int(item_id) <= 100 + PER_KIND


def film_events() -> Interactions:
    """User `u` (1 to 40) watched nine films of one kind: space if odd, heists if even.

    The first of each kind, 101 and 116, is the most popular. User 41 and film 131 stand in the
    vocabularies and have no event.
    """
    rng = np.random.default_rng(0)
    histories = []
    for user in range(1, FILM_USERS + 1):
        first = 0 if user % 2 else PER_KIND
        others = first + 1 + rng.permutation(PER_KIND - 1)[: SEEN - 1]
        histories.append([*others.tolist(), first] if user % 5 else others.tolist())
    lengths = [len(history) for history in histories]
    titles = [f"Space {n}" for n in range(1, PER_KIND + 1)]
    titles += [f"Heist {n}" for n in range(1, PER_KIND + 1)]
    titles[1], titles[2] = HOSTILE, LONG
    genres = [["Space"]] * PER_KIND + [["Crime", "Drama"]] * PER_KIND
    return Interactions(
        users=Vocabulary(pl.Series(range(1, FILM_USERS + 2))),
        items=Vocabulary(pl.Series(range(101, 102 + 2 * PER_KIND))),
        offsets=np.cumsum([0, *lengths, 0]).astype(np.int64),
        item_idx=np.concatenate(histories).astype(np.int32),
        timestamp_s=np.concatenate([1_000_000 + np.arange(n, dtype=np.int64) for n in lengths]),
        item_table=pl.DataFrame(
            {
                "title": [*titles, "Unseen"],
                "year": [1980 + n for n in range(2 * PER_KIND)] + [None],
                "genres": [*genres, None],
                "vector": [[0.5, float("nan")]] * (2 * PER_KIND + 1),
            }
        ),
    )


def write_film_bundle(folder: Path, *, seed: int = 0, popularity: bool = False) -> Path:
    """Train in closed form and save; another seed is another version of the same."""
    events = film_events()
    config = PopularityConfig() if popularity else ItemKNNConfig()
    model = build_model(config, num_users=events.num_users, num_items=events.num_items)
    if model.learns_by == "events":
        model.learn(events)
    trained = Trained(config=config, model=model.eval(), events=events, seed=seed)
    build_recommender(trained, report=REPORT).save(folder, replace=folder.exists())
    return folder
