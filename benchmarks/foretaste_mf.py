"""foretaste's side of `mf_implicit.py`: one epoch of MF per turn."""

import json
import sys
from pathlib import Path

import polars as pl
import torch
from turns import read_pairs, say, say_ready, wait_for_turn

from foretaste.data.reading import read_interactions
from foretaste.data.splitting import leave_last_split
from foretaste.experiment.fit import fit
from foretaste.models.mf import MFConfig
from foretaste.training.checkpoint import Epoch
from foretaste.training.objectives import PairsConfig
from foretaste.training.settings import TrainingConfig

MODEL = {"embedding_dim": 64, "similarity": "cosine", "temperature": 0.15}
OBJECTIVE = {"loss": "sampled_softmax", "negatives": 256}
TRAINING = {"epochs": 100, "batch_events": 4096, "learning_rate": 1e-2, "warmup_steps": 50}


def main() -> None:
    data, threads, ours = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(threads)
    users, items = read_pairs(data)
    pairs = pl.DataFrame({"user": users, "item": items})
    split = leave_last_split(read_interactions(pairs, user="user", item="item"))

    def tell(epoch: Epoch) -> None:
        seconds = len(split.train) / epoch.events_per_second
        say({"epoch": epoch.epoch, "train_seconds": seconds, "ndcg_at_10": epoch.validation})
        wait_for_turn()

    settings = {
        "model": MODEL | ours.get("model", {}),
        "objective": OBJECTIVE | ours.get("objective", {}),
        "training": TRAINING | ours.get("training", {}),
    }
    say_ready(["torch", "numpy"], events=len(split.train), settings=settings)
    fit(
        MFConfig(**settings["model"]),
        split,
        objective=PairsConfig(**settings["objective"]),
        training=TrainingConfig(**settings["training"], patience=None, device="cpu"),
        show=False,
        on_epoch=tell,
    )


if __name__ == "__main__":
    main()
