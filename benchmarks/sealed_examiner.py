"""The process that checks bundles accepted in `sealed_mutations`; it imports no numerical library.

A child that is forked after a library has started threads may wait for them forever.
"""

import json
from pathlib import Path

import numpy as np

from foretaste.serving import slot
from foretaste.serving.answer import Recommendation
from foretaste.serving.self_test import StoredAnswers, check_answers
from foretaste.serving.slot import load_version


def examine(copy: Path, **_: object) -> None:
    """Raise if an accepted bundle gives other answers, NaN, or items outside the catalogue."""
    original = Path((copy.parents[1] / "original").read_text())
    answers = json.loads((original / "answers.json").read_text())
    loaded = load_version(copy).recommender
    check_answers(loaded, StoredAnswers.model_validate(answers))
    events = loaded.trained.events
    for user_id in events.users.ids:
        for row in loaded.recommend(user_id, k=events.num_items).rows:
            _check(row, events.items.find(row.item_id) >= 0)
    for item_id in events.items.ids:
        for row in loaded.similar(item_id, events.num_items).rows:
            _check(row, events.items.find(row.item_id) >= 0)
    loaded.recommend_many(list(events.users.ids), k=5)


def _check(row: Recommendation, is_known: bool) -> None:  # noqa: FBT001
    if not is_known or not np.isfinite(row.score):
        raise ValueError(f"{row} is no item, or has no score")


if __name__ == "__main__":
    slot.load_version = examine
    slot.main()
