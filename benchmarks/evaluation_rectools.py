"""RecTools' side of `evaluation.py`: DATA, then one evaluation for each line read.

Its ranker for dot products makes the lists, its metrics pipeline measures them, as in its guide.
"""

import json
import sys
import time

import numpy as np
import pandas as pd
from rectools import Columns
from rectools.metrics import (
    MAP,
    MRR,
    NDCG,
    CatalogCoverage,
    HitRate,
    MeanInvUserFreq,
    Precision,
    Recall,
    calc_metrics,
)
from rectools.models.rank import Distance, TorchRanker
from scipy import sparse

METRICS = {
    f"{kind.__name__}@{k}": kind(k=k)
    for k in (10, 20)
    for kind in (HitRate, Recall, Precision, NDCG, MRR, MAP, CatalogCoverage, MeanInvUserFreq)
}


def main() -> None:
    data = np.load(sys.argv[1])
    num_users, num_items = len(data["user_UD"]), len(data["item_ID"])
    users = np.repeat(np.arange(num_users), np.diff(data["offsets"]))
    items = data["item_idx"].astype(np.int64)
    is_last = np.zeros(len(items), dtype=bool)
    is_last[data["offsets"][1:] - 1] = True
    seen = sparse.csr_matrix(
        (np.ones((~is_last).sum(), np.float32), (users[~is_last], items[~is_last])),
        shape=(num_users, num_items),
    )
    frame = pd.DataFrame({Columns.User: users, Columns.Item: items})
    before, wanted = frame[~is_last], frame[is_last]
    catalogue = np.arange(num_items)
    for _ in sys.stdin:
        begin = time.perf_counter()
        ranker = TorchRanker(
            distance=Distance.DOT,
            device="cpu",
            subjects_factors=data["user_UD"],
            objects_factors=data["item_ID"],
            batch_size=1024,
        )
        user, item, score = ranker.rank(np.arange(num_users), k=20, filter_pairs_csr=seen)
        lists = pd.DataFrame({Columns.User: user, Columns.Item: item, Columns.Score: score})
        lists[Columns.Rank] = lists.groupby(Columns.User, sort=False).cumcount() + 1
        found = calc_metrics(METRICS, lists, wanted, prev_interactions=before, catalog=catalogue)
        answer = {
            "seconds": time.perf_counter() - begin,
            "hit_rate_at_10": float(found["HitRate@10"]),
            "mrr_at_10": float(found["MRR@10"]),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
