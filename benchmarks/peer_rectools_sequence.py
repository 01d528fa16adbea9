"""RecTools' SASRec or BERT4Rec, one epoch per turn. Runs in the environment that `peers.sh` makes:

    .peers/rectools/bin/python benchmarks/peer_rectools_sequence.py ml-1m.txt.gz < turns

64 dimensions, 2 blocks, 2 heads. It is trained on all but each user's last two items; NDCG@10 is
that of the last but one in the whole catalogue without the user's earlier items.
"""

import logging
import math
import time
import warnings
from functools import partial
from typing import Any

import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import BERT4RecModel, SASRecModel
from turns import read_pairs, say, say_ready, sequence_arguments, wait_for_turn

warnings.filterwarnings("ignore")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


class Clock(Callback):
    """Times each epoch: making batches, forward, backward, step."""

    def on_train_epoch_start(self, *_: Any) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.started


def ndcg_at_10(
    model: SASRecModel | BERT4RecModel, dataset: Dataset, targets: pd.DataFrame
) -> float:
    """Return the mean over users of 1 / log2(1 + rank) where the rank is 10 or better."""
    lists = model.recommend(
        users=targets[Columns.User].to_numpy(), dataset=dataset, k=10, filter_viewed=True
    )
    hits = lists.merge(targets, on=[Columns.User, Columns.Item])
    return sum(1 / math.log2(1 + rank) for rank in hits[Columns.Rank]) / len(targets)


def main() -> None:
    args = sequence_arguments("RecTools' SASRec or BERT4Rec, one epoch per turn")
    torch.set_num_threads(args.threads)
    seed_everything(args.seed)
    users, items = read_pairs(args.data, args.users)
    table = pd.DataFrame({Columns.User: users, Columns.Item: items, Columns.Weight: 1.0})
    table[Columns.Datetime] = pd.to_datetime(range(len(table)), unit="s")  # order is time
    from_end = table.groupby(Columns.User).cumcount(ascending=False)
    size = table.groupby(Columns.User)[Columns.Item].transform("size")
    train = table[(from_end >= 2) | (size < 3)]
    targets = table[(from_end == 1) & (size >= 3)][[Columns.User, Columns.Item]]
    dataset = Dataset.construct(train)
    clock = Clock()

    def trainer() -> Trainer:
        return Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[clock],
        )

    make = (
        partial(BERT4RecModel, mask_prob=args.mask_ratio)
        if args.model == "bert4rec"
        else SASRecModel
    )
    model = make(
        n_factors=64,
        n_blocks=2,
        n_heads=2,
        session_max_len=args.max_len,
        batch_size=args.batch_size,
        loss=args.loss,
        n_negatives=args.negatives,
        lr=1e-3,
        dropout_rate=0.2,
        get_trainer_func=trainer,
        recommend_torch_device="cpu",
    )
    say_ready(["rectools", "pytorch-lightning", "torch", "numpy"], events=len(train))
    for epoch in range(1, args.epochs + 1):
        model.fit_partial(dataset, min_epochs=1, max_epochs=1)
        # the trainer is a deep copy, and so is its clock
        seconds = next(c for c in model.fit_trainer.callbacks if isinstance(c, Clock)).seconds
        message: dict[str, Any] = {"epoch": epoch, "train_seconds": seconds}
        if epoch == args.epochs or (args.evaluate_every and epoch % args.evaluate_every == 0):
            started = time.perf_counter()
            message["ndcg_at_10"] = ndcg_at_10(model, dataset, targets)
            message["evaluation_seconds"] = time.perf_counter() - started
        say(message)
        wait_for_turn()


if __name__ == "__main__":
    main()
