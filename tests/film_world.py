"""A small world whose right answers are known: two kinds of films, two kinds of people."""

from pathlib import Path

import numpy as np
import polars as pl

from foretaste.data.interactions import Interactions
from foretaste.data.vocabulary import Vocabulary
from foretaste.models.baselines import ItemKNNConfig, PopularityConfig
from foretaste.models.catalogue import build_model
from foretaste.serving.building import build_recommender
from foretaste.training.trained import Trained

NUM_USERS, PER_KIND, SEEN = 40, 15, 9
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
    for user in range(1, NUM_USERS + 1):
        first = 0 if user % 2 else PER_KIND
        others = first + 1 + rng.permutation(PER_KIND - 1)[: SEEN - 1]
        histories.append([*others.tolist(), first] if user % 5 else others.tolist())
    lengths = [len(history) for history in histories]
    titles = [f"Space {n}" for n in range(1, PER_KIND + 1)]
    titles += [f"Heist {n}" for n in range(1, PER_KIND + 1)]
    titles[1], titles[2] = HOSTILE, LONG
    genres = [["Space"]] * PER_KIND + [["Crime", "Drama"]] * PER_KIND
    return Interactions(
        users=Vocabulary(pl.Series(range(1, NUM_USERS + 2))),
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
