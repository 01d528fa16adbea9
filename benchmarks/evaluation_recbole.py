"""RecBole's side of `evaluation.py`: DATA, then one evaluation for each line read.

It runs RecBole's collector and evaluator as its trainer does, in batches of 1,024 users. Coverage
is left out, to RecBole's advantage: in release 1.2.1 ItemCoverage raises an AttributeError.
"""

import json
import sys
import time

import numpy as np
import torch
from recbole.config import Config
from recbole.evaluator import Collector, Evaluator

SETTINGS = {
    "topk": [10, 20],
    "metrics": ["Hit", "Recall", "Precision", "NDCG", "MRR", "MAP"],
    "metric_decimal_place": 12,
    "use_gpu": False,
    "state": "ERROR",
}
ROWS = 1024


def main() -> None:
    data = np.load(sys.argv[1])
    sys.argv = sys.argv[:1]  # RecBole reads the command line too
    settings = Config(model="BPR", dataset="ml-100k", config_dict=SETTINGS)
    settings["device"] = torch.device("cpu")
    users, items = torch.from_numpy(data["user_UD"]), torch.from_numpy(data["item_ID"])
    offsets, item_idx = torch.from_numpy(data["offsets"]), torch.from_numpy(data["item_idx"]).long()
    for _ in sys.stdin:
        begin = time.perf_counter()
        collector, evaluator = Collector(settings), Evaluator(settings)
        with torch.no_grad():
            for first in range(0, len(users), ROWS):
                last = min(first + ROWS, len(users))
                scores = users[first:last] @ items.T
                ends = offsets[first + 1 : last + 1] - 1
                starts = offsets[first:last]
                row = torch.arange(last - first).repeat_interleave(ends - starts)
                history = torch.cat(
                    [item_idx[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
                )
                scores[row, history] = -torch.inf
                wanted = (torch.arange(last - first), item_idx[ends])
                collector.eval_batch_collect(scores, None, *wanted)
        found = evaluator.evaluate(collector.get_data_struct())
        answer = {
            "seconds": time.perf_counter() - begin,
            "hit_rate_at_10": float(found["hit@10"]),
            "mrr_at_10": float(found["mrr@10"]),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
