"""Where PinSage's importance pooling and curriculum of hard negatives help.

Each idea is measured on a planted graph where it can help, on one where it cannot, and on real
data, against the same model without it, with the same seeds, epochs and steps; CPU seconds are
recorded too.

200 groups have 15 users and 15 items each, and 200 more items are hits. A user has events with
items of the own group; the last two are held out. The worlds of `WORLDS` differ in the users' other
events and in the items' vectors.

    nice python benchmarks/pinsage_ideas.py --out benchmarks/results/pinsage-ideas.json
    nice python benchmarks/pinsage_ideas.py --data-dir DATA --real tiktok-mm \
        --out benchmarks/results/pinsage-ideas.json

The file keeps its entries for other data.
"""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch

import foretaste as ft
from foretaste.experiment.record import run_facts

GROUPS, SIZE, HITS, WIDTH = 200, 15, 200, 16
METRIC = "ndcg_at_10"
TRAINING = ft.TrainingConfig(
    epochs=6,
    batch_events=2048,
    learning_rate=1e-2,
    schedule="cosine",
    warmup_steps=20,
    validate_every=6,
    patience=None,
)
HARD = {"hard_negatives": 4, "hard_from_epoch": 2, "hard_epochs": 4, "hard_ranks": (10, 60)}


class World(NamedTuple):
    """A user's events outside the own group, and the content of items' vectors."""

    what: str
    own: int = 12
    """Items of the own group."""
    stray: int = 0
    """Items of any group."""
    hits: int = 0
    near: int = 0
    """Items of the own family of groups."""
    groups_a_family: int = 1
    group_share: float = 1.0
    """Length of the vector component that separates groups of a family; that of families has 1."""
    noise: float = 3.0
    """Standard deviation of each item's individual vector component."""


class Arm(NamedTuple):
    """A model and its training settings."""

    model: ft.PinSageConfig
    objective: ft.PairsConfig


POOLING = {
    "pooling planted": World("12 stray events of each user, spread evenly", stray=12),
    "pooling absent": World("no stray events"),
    "pooling, hits": World("12 stray events of each user, all of 200 hits", hits=12),
}
CURRICULUM = {
    "curriculum planted": World(
        "10 groups a family, separated by .3 of the distance of families; 6 events in the family",
        own=10,
        near=6,
        groups_a_family=10,
        group_share=0.3,
        noise=0.3,
    ),
    "curriculum absent": World(
        "no families: 6 more events in the group, which may repeat", own=10, near=6
    ),
}
WORLDS = POOLING | CURRICULUM
REAL = {
    "tiktok-mm": ({"kind": "given"}, {"image": {"kind": "vector"}, "audio": {"kind": "vector"}}),
    "s3rec-lastfm": ({"kind": "leave_last"}, {"attributes": {"kind": "multi"}}),
    "social-lastfm": ({"kind": "given", "validation": 0.1}, None),
}


def main() -> None:
    asked = parse()
    torch.set_num_threads(1)
    document: dict[str, object] = {}
    if asked.out is not None and asked.out.exists():
        document = json.loads(asked.out.read_text(encoding="utf-8"))
    kept = document.get("data", {})
    found = dict(kept) if isinstance(kept, Mapping) else {}
    for name in asked.real or WORLDS:
        found[name] = (real if asked.real else planted)(name, asked) | run_facts()
        document = {
            "what": f"{METRIC} of test users: mean over seeds, the lowest and the highest",
            "data": found,
        }
        if asked.out is not None:
            asked.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", nargs="*", choices=REAL, help="data sets in place of worlds")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def planted(name: str, asked: argparse.Namespace) -> dict[str, object]:
    """Measure an idea in a world; each seed has a world of its own."""
    splits = [ft.leave_last_split(events_of(WORLDS[name], seed)) for seed in range(asked.seeds)]
    schema = ft.FeatureSchema(item={"vector": ft.VectorField()})
    arms = pooling_arms(with_vectors=True) if name in POOLING else curriculum_arms()
    figures = {label: measured(label, arm, splits, schema) for label, arm in arms.items()}
    return {"what": WORLDS[name].what, "figures": figures}


def real(name: str, asked: argparse.Namespace) -> dict[str, object]:
    """Measure both ideas on real data, with the settings of the planted worlds."""
    split, features = REAL[name]
    recipe = ft.ExperimentConfig.model_validate(
        {
            "data": {"kind": "public", "name": name},
            "split": split,
            "model": {"kind": "pinsage"},
            "features": {"item": features} if features else None,
        }
    )
    splits = [ft.read_split(recipe, data_dir=asked.data_dir)] * asked.seeds
    arms = pooling_arms(with_vectors=features is not None)
    arms["ids, walks, hard negatives"] = Arm(pinsage(ids=True), pairs(512, **HARD))
    figures = {label: measured(label, arm, splits, recipe.features) for label, arm in arms.items()}
    return {"figures": figures}


def pooling_arms(*, with_vectors: bool) -> dict[str, Arm]:
    """Return the models with uniform neighbours and with those that walks visit most."""
    arms = {}
    for prefix, ids in (("vectors alone", False), ("ids", True))[not with_vectors :]:
        arms |= {
            f"{prefix}, uniform": Arm(pinsage(ids=ids, neighbours="uniform"), pairs(512)),
            f"{prefix}, walks": Arm(pinsage(ids=ids), pairs(512)),
            f"{prefix}, longer walks": Arm(pinsage(ids=ids, walks=1000, hops=6), pairs(512)),
        }
    return arms


def curriculum_arms() -> dict[str, Arm]:
    """Return the model with and without hard negatives, beside few and many others."""
    model = pinsage(ids=False)
    return {
        "8 negatives": Arm(model, pairs(8)),
        "8 negatives and hard ones": Arm(model, pairs(8, **HARD)),
        "64 negatives": Arm(model, pairs(64)),
        "64 negatives and hard ones": Arm(model, pairs(64, **HARD)),
        "512 negatives": Arm(model, pairs(512)),
        "512 negatives and hard ones": Arm(model, pairs(512, **HARD)),
    }


def pinsage(**settings: object) -> ft.PinSageConfig:
    return ft.PinSageConfig.model_validate(
        {"embedding_dim": 32, "num_neighbours": 8, "kind": "pinsage", **settings}
    )


def pairs(negatives: int, **settings: object) -> ft.PairsConfig:
    return ft.PairsConfig.model_validate({"negatives": negatives, **settings})


def events_of(world: World, seed: int) -> ft.Interactions:
    """Draw a world's events, and a vector for each item."""
    draw = np.random.default_rng(seed)
    size = GROUPS * SIZE  # of users, and of items that are no hits
    group_U, in_family = np.arange(size) // SIZE, SIZE * world.groups_a_family
    first_U = group_U // world.groups_a_family * in_family
    order_UN = draw.random((size, SIZE)).argsort(axis=1)[:, : world.own]
    item_UE = np.concatenate(
        [
            draw.integers(size, size=(size, world.stray)),
            size + draw.integers(HITS, size=(size, world.hits)),
            first_U[:, None] + draw.integers(in_family, size=(size, world.near)),
            group_U[:, None] * SIZE + order_UN,
        ],
        axis=1,
    )
    time_UE = draw.random(item_UE.shape)
    time_UE[:, -2:] += 1  # two of the own group are the last
    item_UE = np.take_along_axis(item_UE, time_UE.argsort(axis=1), axis=1)
    num_users, num_events = item_UE.shape
    return ft.read_interactions(
        pl.DataFrame(
            {
                "user": np.repeat(np.arange(num_users), num_events),
                "item": item_UE.ravel(),
                "time": np.tile(60 * np.arange(num_events), num_users),
            }
        ),
        user="user",
        item="item",
        timestamp="time",
        items=item_table(world, draw),
    )


def item_table(world: World, draw: np.random.Generator) -> pl.DataFrame:
    """Return each item's vector: that of its group, which a family shares in part, plus noise."""
    group_GD = draw.normal(0, world.group_share, size=(GROUPS, WIDTH))
    if world.groups_a_family > 1:
        num_families = GROUPS // world.groups_a_family
        family_FD = draw.normal(size=(num_families, WIDTH))
        group_GD = group_GD + family_FD.repeat(world.groups_a_family, axis=0)
    vector_ID = np.concatenate([group_GD.repeat(SIZE, axis=0), np.zeros((HITS, WIDTH))])
    vector_ID = vector_ID + draw.normal(0, world.noise, size=vector_ID.shape)
    vectors = pl.Series("vector", vector_ID.astype(np.float32)).arr.to_list()
    return pl.DataFrame({"item": np.arange(len(vector_ID)), "vector": vectors})


def measured(
    name: str, arm: Arm, splits: list[ft.Split], schema: ft.FeatureSchema | None
) -> dict[str, object]:
    """Return an arm's figures, one seed per split, and its CPU seconds of training."""
    values, seconds = [], []
    for seed, split in enumerate(splits):
        started = time.process_time()
        trained = ft.fit(
            arm.model,
            split,
            seed=seed,
            objective=arm.objective,
            training=TRAINING,
            features=schema if arm.model.ids is False else None,
            show=False,
        )
        seconds.append(time.process_time() - started)
        values.append(round(ft.evaluate(trained, split.test).metrics[METRIC], 4))
        print(f"{name}, seed {seed}: {values[-1]}, {seconds[-1]:.1f} s", flush=True)
    return {
        "mean": round(float(np.mean(values)), 4),
        "spread": [min(values), max(values)],
        "per_seed": values,
        "cpu_seconds": round(float(np.median(seconds)), 1),
    }


if __name__ == "__main__":
    main()
