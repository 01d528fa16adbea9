"""Made `bundle-without-history/`: multi-task rankers from before they could read histories.

Run once, before that change, and kept to show how they were made. Their manifests lack
the settings of histories.
"""

import json
from pathlib import Path

import numpy as np
import polars as pl
import torch

import foretaste as ft

TASKS = (ft.Task(name="click", column="click"), ft.Task(name="like", column="like"))
MMOE = ft.MMoEConfig(embedding_dim=4, tasks=TASKS, num_experts=2, expert_hidden=(6,))
CONFIGS: dict[str, ft.ModelConfig] = {
    "mmoe": MMOE,
    "shared_bottom": ft.SharedBottomConfig(embedding_dim=4, tasks=TASKS, bottom_hidden=(6,)),
    "two_stage": ft.TwoStageConfig(retriever=ft.PopularityConfig(), ranker=MMOE, candidates=8),
}
QUESTIONS: list[tuple[str | None, list[str] | None]] = [
    ("u0", None),
    ("u7", ["i3", "i9"]),
    ("stranger", ["i1", "i2"]),
    (None, None),
]


def events() -> ft.Interactions:
    """Return 20 users who meet 6 of 12 items each; every second meeting is a click."""
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user}", f"i{item}", 1_000 * user + place, (user + item) % 2, user * item % 3 % 2)
        for user in range(20)
        for place, item in enumerate(rng.permutation(12)[:6].tolist())
    ]
    table = pl.DataFrame(rows, schema=["user", "item", "time", "click", "like"], orient="row")
    return ft.read_interactions(
        table, user="user", item="item", timestamp="time", columns=["click", "like"]
    )


def main() -> None:
    """Write the bundles and their answers next to this file."""
    torch.set_num_threads(1)
    folder = Path(__file__).parent / "bundle-without-history"
    training = ft.TrainingConfig(epochs=5, batch_events=32, learning_rate=0.02, warmup_steps=1)
    split = ft.leave_last_split(events())
    for kind, config in CONFIGS.items():
        objective = None if kind == "two_stage" else ft.RowsConfig()
        trained = ft.fit(config, split, training=training, objective=objective, show=False)
        recommender = ft.build_recommender(trained)
        answers = []
        for user_id, history in QUESTIONS:
            answer = recommender.recommend(user_id, history=history, k=5)
            answers.append(
                {
                    "user_id": user_id,
                    "history": history,
                    "source": answer.source,
                    "item_ids": [row.item_id for row in answer.rows],
                    "scores": [row.score for row in answer.rows],
                }
            )
        recommender.save(folder / kind)
        (folder / f"{kind}.json").write_text(json.dumps(answers, indent=1) + "\n")


if __name__ == "__main__":
    main()
