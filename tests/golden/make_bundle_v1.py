"""Made `bundle-v1/`: bundles of the first format, and their answers then.

Run once, on the first format; kept to say how. Later formats get a script and a folder of their
own, and this folder stays as it is.
"""

import json
from pathlib import Path

import torch

from foretaste.serving.recommender import build_recommender
from tests.worlds import make_events, make_trained

QUESTIONS: list[tuple[str | None, list[str] | None]] = [
    ("u100", None),
    ("u117", ["i503", "i519"]),
    ("u130", None),
    ("stranger", ["i501", "i502", "i501"]),
    (None, None),
]


def main() -> None:
    """Write the bundles and their answers next to this file."""
    torch.set_num_threads(1)
    folder = Path(__file__).parent / "bundle-v1"
    for kind in ("sasrec", "popularity"):
        trained = make_trained(kind, make_events(text_ids=True))
        recommender = build_recommender(trained, report={"ndcg_at_10": 0.25})
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
