"""foretaste's side of `evaluation.py`: DATA RESAMPLES, then one evaluation for each line read."""

import json
import sys
import time

import numpy as np
import polars as pl
import torch
from torch import Tensor

from foretaste.config import Config
from foretaste.data.batch import Queries
from foretaste.data.interactions import Interactions
from foretaste.data.splits import Holdout
from foretaste.data.vocabulary import Vocabulary
from foretaste.evaluation.protocol import evaluate
from foretaste.models.base import Retriever
from foretaste.training.trained import Trained


class DotProduct(Retriever):
    """A retriever with fixed vectors."""

    def __init__(self, user_UD: Tensor, item_ID: Tensor) -> None:
        super().__init__()
        self.user_UD, self.item_ID = user_UD, item_ID

    def encode(self, queries: Queries) -> Tensor:
        return self.user_UD[queries.user_B]

    def item_table(self) -> Tensor:
        return self.item_ID


def main() -> None:
    data, resamples = np.load(sys.argv[1]), int(sys.argv[2])
    offsets, item_idx = data["offsets"], data["item_idx"]
    events = Interactions(
        users=Vocabulary(pl.Series(range(len(data["user_UD"])), dtype=pl.Int64)),
        items=Vocabulary(pl.Series(range(len(data["item_ID"])), dtype=pl.Int64)),
        offsets=offsets,
        item_idx=item_idx,
    )
    last = offsets[1:] - 1
    holdout = Holdout(
        name="test",
        events=events,
        user_Q=np.arange(len(last)),
        end_Q=last,
        target_offsets=np.arange(len(last) + 1),
        target_item=item_idx[last],
    )
    network = DotProduct(torch.from_numpy(data["user_UD"]), torch.from_numpy(data["item_ID"]))
    model = Trained(config=Config(), model=network, events=events, seed=0)
    for _ in sys.stdin:
        begin = time.perf_counter()
        found = evaluate(model, holdout, k=(10, 20), resamples=resamples)
        seconds = time.perf_counter() - begin
        names = ("hit_rate_at_10", "mrr_at_10")
        answer = {"seconds": seconds, **{name: found.metrics[name] for name in names}}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
